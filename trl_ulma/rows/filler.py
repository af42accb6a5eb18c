"""Filler rows: repeated rows so that all processes have the same number of rows. They are marked and not counted."""

from collections.abc import Callable, Iterator
from typing import Any

import datasets
import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import Dataset, IterableDataset, RandomSampler, Sampler

# The value of the column `row` in filler rows
FILLER = -1


def is_real(batch: dict[str, Any]) -> torch.Tensor:
    """`(B,)` bool on the CPU, False for filler rows.

    Example:
        >>> is_real({"label": torch.ones(2), "row": torch.tensor([7, -1])})
        tensor([ True, False])
    """
    return batch["row"].cpu() >= 0 if "row" in batch else torch.ones(len(batch["label"]), dtype=torch.bool)


def mark_real(batches: list[dict[str, Any]], size: int) -> int:
    """Add the key `real` to the micro-batches of an optimizer step, and return the number of its rows.

    Trainer only steps after `size` micro-batches. Without fillers, the last rows of a stream would be added to the
    first step of the next epoch.

    Args:
        batches: the micro-batches. If there are fewer than `size`, micro-batches of filler rows are appended.
        size: the number of micro-batches in a step.
    """
    rows = 0
    for batch in batches:
        real = is_real(batch)
        rows += int(real.sum())
        batch["real"] = real.to(batch["label"].device)
    nothing = {**batches[-1], "real": torch.zeros_like(batches[-1]["real"])}
    batches += [nothing] * (size - len(batches))
    return rows


class FilledStream(IterableDataset):
    """The prepared rows of a stream, filled up to a multiple of `size`.

    All processes read the same rows in the same order, and each takes its part, so that all of them end at the same
    time. If accelerate gave each process its own shards of a `datasets.IterableDataset`, some would end earlier.

    Args:
        size: the number of rows in a micro-batch over all processes.
    """

    def __init__(self, rows: datasets.IterableDataset, size: int):
        self.rows = rows
        self.size = size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        missing, row = 0, {}
        for row in self.rows:
            missing = (missing - 1) % self.size
            yield row
        yield from [{**row, "row": FILLER}] * missing

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch to the stream, which uses it for shuffling."""
        self.rows.set_epoch(epoch)


class FilledRows(Dataset):
    """The prepared rows of a table. Indices from `len` on return the first rows again, as fillers."""

    def __init__(self, rows: datasets.Dataset):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index < len(self.rows):
            return self.rows[index]
        return {**self.rows[index % len(self.rows)], "row": FILLER}


class FilledSampler(Sampler[int]):
    """The order of a sampler, filled up with indices of filler rows of `FilledRows`.

    Args:
        sampler: the sampler of the table.
        rows: the number of rows of the table.
        size: the number of rows in a micro-batch over all processes. The order is filled up to a multiple of it.
        seed: the seed of a random order. The order is the same in all processes and differs between epochs.

    Example:
        >>> list(FilledSampler(range(3), rows=3, size=2, seed=0))
        [0, 1, 2, 3]
    """

    def __init__(self, sampler: Any, *, rows: int, size: int, seed: int):
        if type(sampler) is RandomSampler:  # accelerate does the same with samplers that it sees
            sampler = SeedableRandomSampler(
                data_source=sampler.data_source,
                replacement=sampler.replacement,
                num_samples=sampler._num_samples,
                generator=torch.Generator(),
                data_seed=seed,
            )
        self.sampler = sampler
        self.rows = rows
        self.size = size

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch to the sampler."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        drawn = len(self.sampler)
        return drawn + -drawn % self.size

    def __iter__(self) -> Iterator[int]:
        drawn = 0
        for index in self.sampler:
            yield index
            drawn += 1  # a subclass's sampler may draw more rows than the table has, or fewer
        yield from range(self.rows, self.rows + -drawn % self.size)


def filled(
    rows: Any, sampler: Callable[[Any], Any] | None, *, size: int, seed: int
) -> tuple[Any, Callable[[Any], Any] | None]:
    """The (rows, sampler) of a data loader, with filler rows up to a multiple of `size`.

    Args:
        rows: a table or a stream of prepared rows.
        sampler: creates the order of the table's rows. None keeps the order of the table.
        size: the number of rows in a micro-batch over all processes.
        seed: the seed of a random order.
    """
    if isinstance(rows, datasets.IterableDataset):
        return FilledStream(rows, size), sampler
    order = range(len(rows)) if sampler is None else sampler(rows)
    made = FilledSampler(order, rows=len(rows), size=size, seed=seed)
    return FilledRows(rows), lambda _: made
