"""Log-probabilities of a whole table of prepared rows, under a model or a reference."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm

from trl_ulma.likelihood.noise import evaluation_mode
from trl_ulma.likelihood.reference import Reference
from trl_ulma.likelihood.scorer import Batch, Scorer
from trl_ulma.rows.collator import DataCollatorForPointwisePreference
from trl_ulma.rows.images import DataCollatorForVisionPointwisePreference
from trl_ulma.rows.rendering import processor_of, tokenizer_of

# The keys of a batch that describe its rows and are not inputs of a model's forward
ROW_KEYS = ("label", "sft_mask", "continuous", "log_z", "weight", "ref_logps", "row", "real", "group", "image_key")


def batches(
    rows: Dataset,
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
    *,
    batch_size: int = 8,
    device: Any = "cpu",
    what: str | None = "Scoring",
) -> Iterator[tuple[Sequence[int], dict[str, torch.Tensor]]]:
    """Yield (row numbers, batch) of prepared rows, the longest rows first, with a progress bar.

    Args:
        collate: collates rows to a batch. Default: padding on the right.
        what: the description on the progress bar. None for no bar.
    """
    # The token at padding positions makes no difference
    collate = collate or DataCollatorForPointwisePreference(pad_token_id=0)
    by_length = np.argsort(-np.asarray(rows["length"][:]), kind="stable").tolist()
    # Not disable=False, because the environment can switch bars off
    hidden: Any = {"disable": True} if what is None else {}
    with tqdm(total=len(rows), desc=what, unit="row", **hidden) as bar:
        for start in range(0, len(rows), batch_size):
            numbers = by_length[start : start + batch_size]
            batch = collate([rows[i] for i in numbers])
            yield (
                numbers,
                {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()},
            )
            bar.update(len(numbers))


def collator_for(processing_class: Any, **settings: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """What makes batches of prepared rows, and processes their images if the model takes any.

    Args:
        processing_class: the model's tokenizer or processor.
        **settings: of `DataCollatorForPointwisePreference`.
    """
    processor = processor_of(processing_class)
    pad: Any = tokenizer_of(processing_class).pad_token_id
    if processor is None:
        return DataCollatorForPointwisePreference(pad_token_id=pad, **settings)
    return DataCollatorForVisionPointwisePreference(pad_token_id=pad, processor=processor, **settings)


def forward_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a model's forward in a batch, and its `completion_mask`.

    Example:
        >>> sorted(forward_inputs({"input_ids": 1, "completion_mask": 2, "label": 3}))
        ['completion_mask', 'input_ids']
    """
    return {name: value for name, value in batch.items() if name not in ROW_KEYS}


@torch.no_grad()
def completion_logps(
    model: Any,
    rows: Dataset,
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
    *,
    batch_size: int = 8,
    what: str | None = "Scoring",
    reference: Reference | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """`(N,)` log π(y|x) in nats, summed over completion tokens including EOS, and `(N,)` numbers of these tokens.

    The first token of a sequence has no prediction, so it is not scored if the prompt is empty.

    Args:
        reference: asked in place of the model, which may be what it is an adapter on.

    Raises:
        ValueError: if a log-probability is not finite. The message names the row.

    Example:
        >>> logps, tokens = completion_logps(model, rows)  # doctest: +SKIP
    """
    scorer = Scorer()
    logps, tokens = np.zeros(len(rows)), np.zeros(len(rows), dtype=np.int64)
    with evaluation_mode(model):
        for numbers, batch in batches(rows, collate, batch_size=batch_size, device=model.device, what=what):
            inputs: Batch = forward_inputs(batch)
            found = scorer(model, inputs).logps if reference is None else reference.logps(model, inputs)
            logps[numbers] = found.double().cpu().numpy()
            tokens[numbers] = inputs["completion_mask"][:, 1:].sum(1).cpu().numpy()
    check_finite(logps, rows)
    return logps, tokens


def batching_difference(
    model: Any,
    rows: Dataset,
    logps: np.ndarray,
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
    *,
    batch_size: int = 8,
    most: int = 4,
) -> float:
    """By how many nats the log-probabilities of the first rows differ if they are computed in other batches.

    In half precision, sums are rounded otherwise in another batch. Rows that were computed in batches are computed one
    by one, and rows that were computed one by one are computed together.

    Args:
        logps: `(N,)` of `completion_logps`.
        most: rows that are computed again.
    """
    first = rows.select(range(min(most, len(rows))))
    other = completion_logps(model, first, collate, batch_size=1 if batch_size > 1 else most, what=None)[0]
    return float(np.abs(other - logps[: len(first)]).max())


@torch.no_grad()
def prompt_states(
    model: Any,
    rows: Dataset,
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
    *,
    batch_size: int = 8,
) -> torch.Tensor:
    """`(N, H)`, what the output embeddings read before each completion; a learned log Z reads it, too.

    Args:
        rows: prepared rows; if a prompt is empty, it is the state of the completion's first token.

    Example:
        >>> prompt_states(model, rows)  # doctest: +SKIP
    """
    scorer = Scorer()
    found: list[torch.Tensor] = [torch.empty(0)] * len(rows)
    with evaluation_mode(model):
        read = {"batch_size": batch_size, "device": model.device, "what": "Reading prompts"}
        for numbers, batch in batches(rows, collate, **read):
            states: Any = scorer(model, forward_inputs(batch), prompt_states=True).prompt_states
            for i, state in zip(numbers, states.float().cpu(), strict=True):
                found[i] = state
    return torch.stack(found)


def check_finite(values: np.ndarray, rows: Dataset) -> None:
    """Raise ValueError if a value is NaN or infinite. The message names the row."""
    broken = np.flatnonzero(~np.isfinite(values))
    if len(broken):
        raise ValueError(
            f"The log-probability of row {rows['row'][int(broken[0])]} is {values[broken[0]]} (in total, {len(broken)} "
            'rows are not finite). Load the model with dtype="float32", or check its weights.'
        )
