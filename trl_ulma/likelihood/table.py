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

# The keys of a batch that describe its rows and are not inputs of a model's forward
ROW_KEYS = ("label", "sft_mask", "continuous", "log_z", "weight", "ref_logps", "row", "real", "image_key")


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
        rows: prepared rows.
        collate: collates rows to a batch. Default: padding on the right.
        batch_size: the number of rows per batch.
        device: the device of the batch.
        what: the description on the progress bar. None for no bar.
    """
    # The token at padding positions makes no difference
    collate = collate or DataCollatorForPointwisePreference(pad_token_id=0)
    by_length = np.argsort(-np.asarray(rows["length"][:]), kind="stable").tolist()
    with tqdm(total=len(rows), desc=what, unit="row", disable=what is None) as bar:
        for start in range(0, len(rows), batch_size):
            numbers = by_length[start : start + batch_size]
            batch = collate([rows[i] for i in numbers])
            yield (
                numbers,
                {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()},
            )
            bar.update(len(numbers))


def forward_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a model's forward in a batch, and its `completion_mask`.

    Example:
        >>> sorted(forward_inputs({"input_ids": 1, "completion_mask": 2, "label": 3}))
        ['completion_mask', 'input_ids']
    """
    return {name: value for name, value in batch.items() if name not in ROW_KEYS}


@torch.no_grad()
def completion_logps(
    model: Any, rows: Dataset, *, batch_size: int = 8, what: str | None = "Scoring", reference: Reference | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """`(N,)` log π(y|x) in nats, summed over completion tokens including EOS, and `(N,)` numbers of these tokens.

    The first token of a sequence has no prediction, so it is not scored if the prompt is empty.

    Args:
        model: a causal language model, or an adapter on one.
        rows: prepared rows.
        batch_size: the number of rows per forward pass.
        what: the description on the progress bar. None for no bar.
        reference: if given, it computes the log-probabilities. It can be an adapter on `model`.

    Raises:
        ValueError: if a log-probability is not finite. The message names the row.

    Example:
        >>> logps, tokens = completion_logps(model, rows)  # doctest: +SKIP
    """
    scorer = Scorer()
    logps, tokens = np.zeros(len(rows)), np.zeros(len(rows), dtype=np.int64)
    with evaluation_mode(model):
        for numbers, batch in batches(rows, batch_size=batch_size, device=model.device, what=what):
            inputs: Batch = forward_inputs(batch)
            found = scorer(model, inputs).logps if reference is None else reference.logps(model, inputs)
            logps[numbers] = found.double().cpu().numpy()
            tokens[numbers] = inputs["completion_mask"][:, 1:].sum(1).cpu().numpy()
    check_finite(logps, rows)
    return logps, tokens


@torch.no_grad()
def prompt_states(model: Any, rows: Dataset, *, batch_size: int = 8) -> torch.Tensor:
    """`(N, H)` inputs of the output embeddings before each completion. A learned log Z reads the same states.

    Args:
        model: a causal language model, or an adapter on one.
        rows: prepared rows. If a prompt is empty, the state is that of the first completion token.
        batch_size: the number of rows per forward pass.

    Example:
        >>> prompt_states(model, rows)  # doctest: +SKIP
    """
    scorer = Scorer()
    found: list[torch.Tensor] = [torch.empty(0)] * len(rows)
    with evaluation_mode(model):
        for numbers, batch in batches(rows, batch_size=batch_size, device=model.device, what="Reading prompts"):
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
