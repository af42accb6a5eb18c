"""Number formats in which a training learns nothing, or in which rewards are not what they seem."""

from typing import Any

import torch
from torch import nn

# Adam moves a weight by about the learning rate. A weight that is moved by less than this part of itself stays as it is
_SMALLEST_MOVE = {torch.bfloat16: 2**-9, torch.float16: 2**-12}


def notes(model: nn.Module, ref_model: nn.Module | None, args: Any, *, keeps_float32: bool) -> list[str]:
    """What to say about the number formats of a training, one text for each fault.

    Args:
        model: the policy.
        ref_model: a reference that the user gave, or None.
        args: the trainer's config.
        keeps_float32: whether the optimizer keeps its own weights in float32, as DeepSpeed does.

    Example:
        >>> from types import SimpleNamespace
        >>> model = nn.Linear(9, 9).bfloat16()
        >>> args = SimpleNamespace(learning_rate=1e-6)
        >>> print(notes(model, None, args, keeps_float32=False)[0].split(",")[0])
        The weights are trained in bfloat16
    """
    found = []
    still = 0.0 if keeps_float32 else _share_that_stays(model, args.learning_rate)
    if still > 0.5:
        dtype = _name(next(p.dtype for p in model.parameters() if p.requires_grad and p.dtype in _SMALLEST_MOVE))
        found.append(
            f"The weights are trained in {dtype}, in which {still:.0%} of them are too large to be moved by the "
            f"learning rate of {args.learning_rate:g}. Load the model with dtype='float32' (bf16=True still computes "
            "in bfloat16), or raise the learning rate."
        )
    own = _dtype(model)
    if ref_model is not None and _dtype(ref_model) != own:
        found.append(
            f"The model computes in {_name(own)} and its reference in {_name(_dtype(ref_model))}, so rewards are not 0 "
            "before training even if both are the same model. Load both with the same dtype."
        )
    return found


def _share_that_stays(model: nn.Module, learning_rate: float) -> float:
    """The share of the trained weights that a step of the learning rate does not move."""
    stay = total = 0
    for p in model.parameters():
        if p.requires_grad:
            total += p.numel()
            if p.dtype in _SMALLEST_MOVE:
                stay += int((p.detach().abs() * _SMALLEST_MOVE[p.dtype] > learning_rate).sum())
    return stay / max(total, 1)


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
