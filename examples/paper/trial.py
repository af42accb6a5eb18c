"""What a dry run is made of: a tiny model with random weights, and a few rows of each family."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
THINGS = ("a cat", "a dog", "the rain", "a river", "the moon", "a stone", "a letter", "a tree", "a song", "the bread")
ROWS = 24
# What is small enough for two steps on one core, whatever the scale
OPTIONS: dict[str, Any] = {
    "max_steps": 2,
    "save_steps": 1,
    "logging_steps": 1,
    "fp16": False,  # needs a GPU
    "gradient_accumulation_steps": 1,
    "disable_tqdm": True,
}
BATCH = {"ulma": 4, "dpo": 2, "reward": 2, "pointwise-reward": 4, "rloo": 4}
GENERATION = {"num_generations": 2, "max_completion_length": 6}
ROWS_TAKEN = {"train_rows": 16, "held_out_prompts": 5, "folds": None, "max_length": 192}
ANSWERS = {"max_new_tokens": 4, "batch_size": 4}


def shrink(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a cell for two steps: batches, generations and the trainers' own paces; one process."""
    for stage in settings["stages"]:
        stage["options"] |= OPTIONS | {"per_device_train_batch_size": BATCH[stage["trainer"]]}
        if stage["trainer"] == "rloo":
            stage["options"] |= GENERATION
    return settings | {"processes": 1}


def make_model(folder: Path) -> Path:
    """A two-layer Llama and its tokenizer, with a chat template."""
    if (folder / "config.json").exists():
        return folder
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "</s>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([json.dumps(raw_rows(family)) for family in FAMILIES], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(0)
    ids = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
        **ids,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def raw_rows(family: str) -> list[dict[str, Any]]:
    """Some raw rows, in the layout of a family."""
    return [FAMILIES[family](i, f"Tell me of {THINGS[i % 10]}, in {i} words.") for i in range(ROWS)]


def write_rows(folder: Path) -> dict[str, str]:
    """Raw rows of all families as files: family → file."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for family in FAMILIES:
        file = folder / f"{family}.json"
        file.write_text(json.dumps(raw_rows(family)), encoding="utf-8")
        found[family] = str(file)
    return found


def _transcript(question: str, answer: str) -> str:
    return f"\n\nHuman: {question}\n\nAssistant: {answer}"


def _hh(i: int, question: str) -> dict[str, Any]:
    return {"chosen": _transcript(question, f"Gladly, {i} times."), "rejected": _transcript(question, "Go away.")}


def _golden(i: int, question: str) -> dict[str, Any]:
    return _hh(i, question) | {"chosen": _transcript(question, f"With pleasure: {THINGS[i % 10]} is old.")}


def _qa(i: int, question: str) -> dict[str, Any]:
    return {
        "question": question,
        "passages": [["Things", f"This is {THINGS[i % 10]}."]],
        **{f"prediction {number}": f"It is thing {number}." for number in range(1, 5)},
        "feedback": {"errors": [{"start": 0}], "missing-info": [], "corrected-prediction": f"It is {THINGS[i % 10]}."},
        "preference": [2, 2, 1, 1, 1, 1],
    }


def _red_team(i: int, question: str) -> dict[str, Any]:
    return {
        "transcript": _transcript(question, "No." if i % 2 else "Yes."),
        "rating": 0.0 if i % 2 else float(i % 4 + 1),
    }


FAMILIES = {"hh": _hh, "golden-hh": _golden, "qa-feedback": _qa, "red-team": _red_team}
