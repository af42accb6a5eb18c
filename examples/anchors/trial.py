"""What a dry run is made of: a tiny chat model, a tiny reward model, a few pairs, and a few instructions."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
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
    tokenizer = _tokenizer(lines)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        num_labels=1,
    )
    torch.manual_seed(0)
    for name, kind in (("model", LlamaForCausalLM), ("reward", LlamaForSequenceClassification)):
        kind(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    asked = [{"instruction": f"What is {thing}?"} for thing in THINGS]
    (folder / "instructions.json").write_text(json.dumps(asked), encoding="utf-8")


def _tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "</s>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
