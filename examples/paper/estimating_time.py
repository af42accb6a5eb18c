"""How long cells will take: from cells that were measured, else from their arithmetic and this machine's speed."""

import time
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

# Of the speed of one large product, what a whole training reaches
EFFICIENCY = 0.5
# Seconds in which a cell's process loads what it needs
START = 20.0
# Answers are made a token at a time, which reads all weights for few products
GENERATING = 3.0


def parameters(model: str) -> int:
    """The number of a model's weights, without loading them."""
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    return sum(weight.numel() for weight in made.parameters())


def products_a_second(dtype: torch.dtype) -> float:
    """Multiplications and additions a second in one large product here."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 4096 if device == "cuda" else 512
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        # Read back, since a GPU answers before it is done
        (a @ b)[0, 0].item()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def arithmetic(settings: Mapping[str, Any], rows: Mapping[str, Any], weights: int) -> float:
    """Multiplications and additions of a cell: 2 a weight and token forward, as many for the gradient of what is below.

    Example:
        >>> cell = {"stages": [], "answers": {"max_new_tokens": 10}}
        >>> arithmetic(cell, {"test_tokens": 100, "test_prompts": 5}, 1000)
        500000.0
    """
    forward = 2.0 * weights
    found = forward * (rows["test_tokens"] + GENERATING * rows["test_prompts"] * settings["answers"]["max_new_tokens"])
    for stage in settings["stages"]:
        options = stage["options"]
        step = (2.0 if options["use_peft"] else 3.0) + options.get("gradient_checkpointing", False)
        tokens = float(rows["train_tokens"])
        if stage["trainer"] == "rloo":
            made = rows["train_prompts"] * options["num_generations"]
            new = made * options["max_completion_length"]
            tokens = new + made * tokens / max(rows["train_rows"], 1)
            found += forward * GENERATING * new
            step += 1  # the reward model
        if stage["trainer"] in ("ulma", "dpo", "rloo"):
            step += 1  # the reference
        found += forward * step * tokens * options.get("num_train_epochs", 1)
    return found


def said(seconds: float) -> str:
    """A duration in words.

    Example:
        >>> said(45), said(600), said(9000)
        ('45 s', '10 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
