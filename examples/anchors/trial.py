"""What a dry run is made of: a tiny chat model, a tiny reward model, a few pairs, and a few instructions."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2ForSequenceClassification

from trl_ulma.scripts.demo_models import make_tiny

THINGS = ("a cat", "a dog", "the rain", "a river", "the moon", "a stone", "a letter", "a tree")


def shrink(recipe: dict[str, Any], options: argparse.Namespace, folder: Path) -> None:
    """Put tiny models and a few rows in place of the recipe's, and two steps in place of its epochs."""
    if not (folder / "instructions.json").exists():
        _make(folder)
    recipe |= {"model": str(folder / "model"), "reward_model": str(folder / "reward")}
    recipe["pairs"] = {"name": str(folder / "pairs.jsonl"), "split": "train"}
    recipe["training"] |= {"batch_rows": 4, "max_steps": 2, "max_length": 64, "bf16": False}
    recipe["answers"] |= {"max_new_tokens": 4}
    options.instructions, options.rows_per_device, options.rows = folder / "instructions.json", 4, len(THINGS)


def _make(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pairs = []
    for thing in THINGS:
        asked = {"role": "user", "content": f"Tell me of {thing}."}
        answers = (f"Gladly: {thing} is old.", "No.")
        pairs.append([[asked, {"role": "assistant", "content": text}] for text in answers])
    lines = [json.dumps({"chosen": chosen, "rejected": rejected}) for chosen, rejected in pairs]
    (folder / "pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    torch.manual_seed(0)
    model, tokenizer = make_tiny(lines)
    model.config.update({"num_labels": 1, "pad_token_id": tokenizer.pad_token_id})
    for name, made in (("model", model), ("reward", GPT2ForSequenceClassification(model.config))):
        made.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    asked = [{"instruction": f"What is {thing}?"} for thing in THINGS]
    (folder / "instructions.json").write_text(json.dumps(asked), encoding="utf-8")
