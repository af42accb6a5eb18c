"""How long a recipe takes, and what memory a GPU needs, before anything is downloaded."""

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from trl_ulma.scripts.memory import estimate_memory

# An H100's dense bfloat16 operations a second, and the share that training and sampling reach of it
PEAK, TRAINING, SAMPLING = 989e12, 0.4, 0.1
# Mean tokens of a row, and of an answer to an instruction
ROW, ANSWER = 600, 450
INSTRUCTIONS = 805


def estimate(recipe: dict[str, Any], options: argparse.Namespace) -> Iterator[str]:
    """Lines that say what the recipe takes on H100 GPUs, from its arithmetic; a guess to about a factor of two."""
    config = AutoConfig.for_model(**recipe["config"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    weights = sum(parameter.numel() for parameter in model.parameters())
    pairs = options.rows or recipe["pairs"]["count"]
    rows, drawn = 2 * pairs, recipe["reference_answers"] * pairs
    speed = PEAK * options.num_processes
    checkpointing = recipe["training"].get("gradient_checkpointing", False)
    hours = {
        "training": 2 * weights * (3 + checkpointing + 1) * rows * ROW / (speed * TRAINING),
        "sampling": 2 * weights * (drawn + 2 * INSTRUCTIONS) * ANSWER / (speed * SAMPLING),
        "rating": 2 * weights * ((rows + drawn) * bool(drawn) + 2 * INSTRUCTIONS) * ROW / (speed * TRAINING),
    }
    memory = estimate_memory(
        model,
        tokens=options.rows_per_device * recipe["training"]["max_length"],
        gradient_checkpointing=checkpointing,
        has_reference=not recipe["training"].get("precompute_ref_log_probs", False),
    )
    times = ", ".join(f"{name} {seconds / 3600:.1f} h" for name, seconds in hours.items())
    yield f"{weights / 1e9:.2f}B weights, {rows:,} rows. On {options.num_processes} H100, roughly: {times}."
    whole = {name: size / 2**30 for name, size in memory.items() if size}
    parts = ", ".join(f"{name} {size:.1f}" for name, size in whole.items())
    yield f"Memory in GiB: {parts}; {sum(whole.values()):.1f} in all. ZeRO-3 and FSDP2 divide all but the activations."
