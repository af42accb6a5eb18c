"""The sequences of a batch in parts of similar lengths, so that less padding is computed.

Padding takes as long as text, and a batch is as wide as its longest row: a third of a batch of HH is padding. On a CPU,
whose time is that of the arithmetic, a few narrower forward passes take less. The log-probabilities are the same.
"""

import math
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.distributed.fsdp import FSDPModule

from trl_ulma.likelihood.layouts import Layout, length_that_changes_positions

# Inputs that have one row per sequence and one column per token
_BY_TOKEN = {"input_ids", "attention_mask", "position_ids", "token_type_ids"}
# A pass of SmolLM2-135M takes as long as this many tokens before its first one, since all weights are read: measured 16
# to 39 in float32, and 68 to 210 with weights or autocast in bfloat16, where tokens are faster and weights are cast.
# In smaller models the layers' own overhead is more than their arithmetic: that of so many parameters per token
_TOKENS, _TOKENS_IN_HALF_PRECISION, _PARAMETERS = 32, 128, 2e9
# Counting takes milliseconds, several times per step
_counted: WeakKeyDictionary[Any, int] = WeakKeyDictionary()


def cost_of_a_pass(model: Any, bare: Any) -> float:
    """The number of tokens that take as long as one more forward pass. Infinite where a batch must not be divided.

    Batches are divided on a CPU only, and not in these cases. With DDP or a sharded model, all processes must run as
    many passes. A compiled model would be compiled for more shapes. Each pass of a quantized model unpacks its weights.
    The rows of a batch belong together if an auxiliary loss is of all of them, or if positions depend on the longest.

    Args:
        model: the model, with or without wrappers.
        bare: the same without the wrappers of distributed training and of `torch.compile`.
    """
    if (
        model is not bare
        or bare.device.type != "cpu"
        or isinstance(bare, FSDPModule)
        or getattr(bare.config, "quantization_config", None) is not None
        or getattr(bare, "hf_device_map", None)
        or getattr(bare.config.get_text_config(), "output_router_logits", False)
        or length_that_changes_positions(bare.config) is not None
    ):
        return math.inf
    in_half = bare.dtype.itemsize < 4 or torch.is_autocast_enabled("cpu")
    if bare not in _counted:
        _counted[bare] = max(sum(p.numel() for p in bare.parameters()), 1)
    return (_TOKENS_IN_HALF_PRECISION if in_half else _TOKENS) + _PARAMETERS / _counted[bare]


def parts(layout: Layout, cost: float) -> list[tuple[Layout, torch.Tensor]]:
    """The layout in parts whose passes take the least time together, the longest first.

    The sequences, sorted by length, are divided so that Σ over the parts of (sequences · longest + cost) is least.

    Args:
        layout: of the whole batch.
        cost: of a pass, in tokens.

    Returns:
        Each part, and the indices of its `positions` among the layout's.

    Example:
        >>> ids = torch.arange(6).reshape(2, 3)
        >>> layout = Layout({"input_ids": ids}, torch.tensor([1, 3]), torch.tensor([3, 1]))
        >>> [(part.inputs["input_ids"].tolist(), own.tolist()) for part, own in parts(layout, cost=0)]
        [([[0, 1, 2]], [0]), ([[3]], [1])]
        >>> len(parts(layout, cost=8))
        1
    """
    whole = [(layout, torch.arange(len(layout.positions)))]
    count, width = layout.inputs["input_ids"].shape
    if cost == math.inf or count < 2 or layout.lengths is None or not set(layout.inputs) <= _BY_TOKEN:
        return whole
    mask = layout.inputs.get("attention_mask")
    if mask is not None and mask.dim() == 2 and (mask.diff(dim=1) > 0).any():  # padded on the left
        return whole
    lengths, order = layout.lengths.clamp(min=1).sort(descending=True, stable=True)
    found = []
    for begin, end in _ranges(lengths.tolist(), cost):
        chosen, longest = order[begin:end].sort().values, int(lengths[begin])
        place = torch.full((count,), -1)
        place[chosen] = torch.arange(len(chosen))
        rows, columns = layout.positions // width, layout.positions % width
        own = (place[rows] >= 0).nonzero()[:, 0]
        inputs = {name: _trimmed(value[chosen], longest) for name, value in layout.inputs.items()}
        positions = place[rows[own]] * longest + columns[own]
        found.append((Layout(inputs, positions, layout.lengths[chosen]), own))
    return found if len(found) > 1 else whole


def _trimmed(value: torch.Tensor, longest: int) -> torch.Tensor:
    """The first tokens: `(R, W)`, or a mask `(R, 1, W, W)` of which tokens see which."""
    return value[:, :longest] if value.dim() == 2 else value[:, :, :longest, :longest]


def _ranges(lengths: list[int], cost: float) -> list[tuple[int, int]]:
    """The ranges of parts in lengths that are sorted, the longest first.

    Example:
        >>> _ranges([100, 98, 40, 38], 10), _ranges([100, 98, 40, 38], 1000)
        ([(0, 2), (2, 4)], [(0, 4)])
    """
    best, begins = [0.0], [0]  # of the first rows: the least cost, and where its last part begins
    for end in range(1, len(lengths) + 1):
        costs = [best[begin] + (end - begin) * lengths[begin] + cost for begin in range(end)]
        begins.append(min(range(end), key=costs.__getitem__))
        best.append(costs[begins[-1]])
    found, end = [], len(lengths)
    while end:
        found.append((begins[end], end))
        end = begins[end]
    return found[::-1]
