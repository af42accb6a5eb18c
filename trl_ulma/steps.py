"""What is decided about the micro-batches of an optimiser step before they are run."""

from collections.abc import Iterator
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from torch.utils.data import IterableDataset


class EvenStream(IterableDataset):
    """The prepared rows of a stream, filled up to a multiple of `size` with rows that count for nothing (`row` -1).

    All processes read the same rows in the same order, each takes its part, and none runs out before the others, as
    they do where accelerate gives each of them shards of a `datasets.IterableDataset`.

    Args:
        rows: the stream.
        size: rows in a micro-batch of all processes together.
    """

    def __init__(self, rows: datasets.IterableDataset, size: int):
        self.rows = rows
        self.size = size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        missing, row = 0, {}
        for row in self.rows:
            missing = (missing - 1) % self.size
            yield row
        yield from [{**row, "row": -1}] * missing

    def set_epoch(self, epoch: int) -> None:
        """Passed on to the stream, which shuffles by it."""
        self.rows.set_epoch(epoch)


def real_rows(batch: dict[str, Any], accelerator: Accelerator, *, is_last: bool) -> torch.Tensor:
    """`(B,)` bool on the CPU, False for rows that were only added so that all processes have as many.

    Args:
        batch: a micro-batch, with `label` and, of a stream, `row`.
        accelerator: of the trainer.
        is_last: whether it is the newest that the data loader gave.
    """
    size = len(batch["label"])
    state = accelerator.gradient_state
    if state.remainder > 0 and is_last and state.end_of_dataloader:
        return torch.arange(size) + accelerator.process_index * size < state.remainder
    return batch["row"].cpu() >= 0 if "row" in batch else torch.ones(size, dtype=torch.bool)


def plan_references(batches: list[dict[str, Any]], compared: list[torch.Tensor], *, at_least_one: bool) -> None:
    """Give each micro-batch, as `asked`, the rows that the reference is asked for and the width of the longest.

    All micro-batches of a step are planned together, since reading them off the device synchronises.

    Args:
        batches: micro-batches with `attention_mask` `(B, T)`; written to.
        compared: of each, `(B,)` bool: whether the row's loss contains the reference.
        at_least_one: ask for a row even where none needs it, since other processes' forwards wait for this one's.
    """
    plans = []
    for batch, rows in zip(batches, compared, strict=True):
        positions = torch.arange(1, batch["attention_mask"].size(1) + 1, device=rows.device)
        plans.append(torch.stack([rows, (batch["attention_mask"] * positions).amax(1)]))
    sizes = [plan.size(1) for plan in plans]
    for batch, (needed, widths) in zip(batches, torch.cat(plans, 1).cpu().split(sizes, 1), strict=True):
        asked = needed.nonzero()[:, 0].tolist() or ([0] if at_least_one else [])
        batch["asked"] = (asked, int(widths[asked].max()) if asked else 0)


def mismatched(
    batch: dict[str, torch.Tensor], real: torch.Tensor, image_key: torch.Tensor | None = None
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Each row's prompt with the completion of the next row that has another prompt, and which rows count, `(B,)` bool.

    A row without such a partner keeps its own completion and does not count, so that all processes run as many rows.
    Completions are cut where a row would become wider than the batch.

    Args:
        batch: `input_ids`, `attention_mask`, `completion_mask` `(B, T)`, padded on the right.
        real: `(B,)` bool, False for rows that are repeated.
        image_key: `(B,)` of the rows' images, where they have some: another image makes another prompt.
    """
    ids, width = batch["input_ids"].tolist(), batch["input_ids"].size(1)
    lengths = batch["attention_mask"].sum(1).tolist()
    starts = batch["completion_mask"].argmax(1).tolist()
    prompts = [row[:start] for row, start in zip(ids, starts, strict=True)]
    completions = [row[start:length] for row, start, length in zip(ids, starts, lengths, strict=True)]
    is_real = real.tolist()
    seen = [0] * len(prompts) if image_key is None else image_key.tolist()
    made = {name: torch.zeros_like(value) for name, value in batch.items()}
    counts = []
    for row, prompt in enumerate(prompts):
        others = [(row + by) % len(prompts) for by in range(1, len(prompts))]
        differ = (o for o in others if is_real[o] and (prompts[o], seen[o]) != (prompt, seen[row]))
        partner = next(differ, None)
        counts.append(partner is not None and is_real[row])
        tokens = (prompt + completions[row if partner is None else partner])[:width]
        made["input_ids"][row, : len(tokens)] = torch.tensor(tokens, device=made["input_ids"].device)
        made["attention_mask"][row, : len(tokens)] = 1
        made["completion_mask"][row, len(prompt) : len(tokens)] = 1
    return made, torch.tensor(counts, device=real.device)
