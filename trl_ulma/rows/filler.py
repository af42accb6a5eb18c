"""Rows that are there twice so that all processes have as many: marked in the data, and counted as nothing."""

from collections.abc import Callable, Iterator
from typing import Any

import datasets
import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import Dataset, IterableDataset, RandomSampler, Sampler

# What the column `row` holds of a filler row
FILLER = -1


def is_real(batch: dict[str, Any]) -> torch.Tensor:
    """`(B,)` bool on the CPU, False for filler rows.

    Example:
        >>> is_real({"label": torch.ones(2), "row": torch.tensor([7, -1])})
        tensor([ True, False])
    """
    return batch["row"].cpu() >= 0 if "row" in batch else torch.ones(len(batch["label"]), dtype=torch.bool)


class FilledStream(IterableDataset):
    """The prepared rows of a stream, filled up to a multiple of `size`.

    All processes read the same rows in the same order, each takes its part, and none runs out before the others, as
    they do if accelerate gives each of them shards of a `datasets.IterableDataset`.

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
        yield from [{**row, "row": FILLER}] * missing

    def set_epoch(self, epoch: int) -> None:
        """Passed on to the stream, which shuffles by it."""
        self.rows.set_epoch(epoch)


class FilledRows(Dataset):
    """The prepared rows of a table, and under numbers from `len` on the first of them again, as filler.

    Args:
        rows: the table.
    """

    def __init__(self, rows: datasets.Dataset):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index < len(self.rows):
            return self.rows[index]
        return {**self.rows[index % len(self.rows)], "row": FILLER}


class FilledSampler(Sampler[int]):
    """A sampler's order, filled up with the numbers of filler rows of `FilledRows`.

    Args:
        sampler: of the table.
        rows: how many the table has.
        size: rows in a micro-batch of all processes together, of which a multiple is given.
        seed: of a random order, which then is the same in all processes and differs from epoch to epoch.

    Example:
        >>> list(FilledSampler(range(3), rows=3, size=2, seed=0))
        [0, 1, 2, 3]
    """

    def __init__(self, sampler: Any, *, rows: int, size: int, seed: int):
        if type(sampler) is RandomSampler:  # accelerate does so with samplers that it sees
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
        """Passed on to the sampler."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return self.rows + -self.rows % self.size

    def __iter__(self) -> Iterator[int]:
        yield from self.sampler
        yield from range(self.rows, len(self))


def filled(
    rows: Any, sampler: Callable[[Any], Any] | None, *, size: int, seed: int
) -> tuple[Any, Callable[[Any], Any] | None]:
    """(rows, sampler) of a data loader, with filler rows up to a multiple of `size`.

    Args:
        rows: a table of prepared rows, or a stream of such.
        sampler: makes the order of the table's rows; None for the order that they have.
        size: rows in a micro-batch of all processes together.
        seed: of a random order.
    """
    if isinstance(rows, datasets.IterableDataset):
        return FilledStream(rows, size), sampler
    order = range(len(rows)) if sampler is None else sampler(rows)
    made = FilledSampler(order, rows=len(rows), size=size, seed=seed)
    return FilledRows(rows), lambda _: made
