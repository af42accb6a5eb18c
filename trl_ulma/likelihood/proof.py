"""Whether a model computes the same when its rows are laid out in another way: tried out before training."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from trl_ulma.likelihood.layouts import Layout, packed, padded, shared

Batch = Mapping[str, torch.Tensor]
Scores = Callable[[Layout, Batch], torch.Tensor]

# Nats a token by which a log-probability may differ in fp32
TOLERANCE = 1e-4
# Share of a contaminated layout's error that an exact one may have; in half precision that its noise may have
CONTAMINATION = 0.01
CONTAMINATION_OF_NOISE = 0.1
# What another exact layout may differ by in half precision, in units of what padding changes. Of a few rows the two are
# measured loosely: with SmolLM2-135M in bf16 their ratio is now and then above 2, and a contaminated one's above 100.
NOISES = 4
LONGEST_COMPLETION = 64


def probe_packed(scores: Scores, batch: Batch, *, exact: bool) -> None:
    """Raise ValueError unless rows packed into one sequence keep apart.

    Args:
        scores: per-token log-probabilities `(B, T − 1)` of a layout of a batch, with dropout off.
        batch: at least two rows.
        exact: whether the forward computes in fp32 or better.
    """
    layout = packed(batch)
    places = torch.arange(layout.inputs["input_ids"].size(1), device=layout.positions.device)
    contaminated = layout._replace(inputs={**layout.inputs, "position_ids": places[None]})
    _compare(scores, batch, layout, contaminated, "padding_free", exact)


def probe_shared(scores: Scores, batch: Batch, *, exact: bool, dtype: torch.dtype | None) -> None:
    """Raise ValueError unless branches of a shared prompt keep apart.

    Args:
        scores: as for `probe_packed`.
        batch: at least two rows with the same prompt.
        exact: whether the forward computes in fp32 or better.
        dtype: as for `trl_ulma.likelihood.layouts.shared`.
    """
    layout = shared(batch, dtype)
    allowed = layout.inputs["attention_mask"]
    everything = torch.ones_like(allowed, dtype=torch.bool).tril()
    if dtype is not None:
        everything = torch.zeros_like(allowed).masked_fill(~everything, torch.finfo(dtype).min)
    contaminated = layout._replace(inputs={**layout.inputs, "attention_mask": everything})
    _compare(scores, batch, layout, contaminated, "share_prompts", exact)


def _compare(scores: Scores, batch: Batch, layout: Layout, contaminated: Layout, option: str, exact: bool) -> None:
    wanted = scores(padded(batch), batch)
    remedy = f"Set {option}=False, or load the model with attn_implementation='sdpa' or 'flash_attention_2'."
    try:
        found = scores(layout, batch) - wanted
    except (IndexError, RuntimeError, TypeError, ValueError) as failure:
        raise ValueError(
            f"{option}=True is not exact with this model, which does not run ({failure}). {remedy}"
        ) from failure
    size, measure, allowed, noise = _largest, "the fp32 bound", TOLERANCE, 0.0
    if not exact:
        # In half precision the padding alone changes the sums' order, and the largest difference is chance
        size, measure = _root_mean_square, f"{NOISES} times the difference between rows padded and by themselves"
        wider = [scores(padded(_wider(batch, by)), batch) - wanted for by in (1, 7, 64)]
        noise = max(map(size, [*wider, _one_by_one(scores, batch) - wanted]))
        allowed = max(TOLERANCE, NOISES * noise)
    error, contamination = size(found), size(scores(contaminated, batch) - wanted)
    told_apart = error <= CONTAMINATION * contamination
    told_apart |= not exact and noise <= CONTAMINATION_OF_NOISE * contamination
    if not (error <= allowed and told_apart):  # also where they are NaN
        raise ValueError(
            f"{option}=True is not exact with this model: log-probabilities differ from the padded ones by "
            f"{error:.2g} nats a token ({measure} is {allowed:.2g}), where rows that see one another differ by "
            f"{contamination:.2g}. {remedy}"
        )


def _largest(difference: torch.Tensor) -> float:
    return difference.abs().max().item()


def _root_mean_square(difference: torch.Tensor) -> float:
    return (difference.pow(2).sum() / difference.count_nonzero().clamp(min=1)).sqrt().item()


def _one_by_one(scores: Scores, batch: Batch) -> torch.Tensor:
    """The scores of each row by itself, without padding."""
    found = []
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        alone = {name: value[row : row + 1, :length] for name, value in batch.items()}
        missing = batch["input_ids"].size(1) - length
        found.append(torch.nn.functional.pad(scores(padded(alone), alone), (0, missing)))
    return torch.cat(found)


def _wider(batch: Batch, by: int) -> dict[str, torch.Tensor]:
    """The batch with `by` more columns of padding."""
    return {name: torch.nn.functional.pad(value, (0, by)) for name, value in batch.items()}


def probe_rows(examples: Sequence[Mapping[str, Any]], *, same_prompt: bool) -> list[dict[str, Any]]:
    """Rows to probe with: four of `examples` cut short, over and over where there are fewer, with the first's prompt
    where `same_prompt`."""
    chosen = [examples[i % len(examples)] for i in range(4)]
    longest = [LONGEST_COMPLETION - 7 * i for i in range(4)]  # rows of one length would hide much
    return [
        {
            "prompt_ids": list((chosen[0] if same_prompt else row)["prompt_ids"])[-LONGEST_COMPLETION:],
            "completion_ids": list(row["completion_ids"])[: max(length, 2)],
            "label": 1.0,
        }
        for row, length in zip(chosen, longest, strict=True)
    ]
