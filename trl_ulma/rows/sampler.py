"""Orders of rows: rows of the same prompt together, or rows of similar length together."""

from collections.abc import Hashable, Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from trl_ulma.labels.report import counted
from trl_ulma.main_process import get_logger

logger = get_logger(__name__)


class PromptSampler(Sampler[int]):
    """Rows in random order, with the rows of a prompt next to each other.

    Prompts with mostly good and with mostly bad answers alternate, so that micro-batches contain both classes.

    Args:
        prompts: for each row, its prompt or a key that identifies it.
        desirable: for each row, whether its label is good.
        seed: the seed of the order. The order differs between epochs and is the same in every process.

    Example:
        >>> list(PromptSampler(["a", "b", "a"], [True, False, False], seed=0))
        [0, 2, 1]
    """

    def __init__(self, prompts: Sequence[Hashable], desirable: Sequence[bool], seed: int):
        groups: dict[Hashable, list[int]] = {}
        for row, prompt in enumerate(prompts):
            groups.setdefault(prompt, []).append(row)
        self._groups = list(groups.values())
        self._is_good = [2 * sum(desirable[row] for row in group) > len(group) for group in self._groups]
        self._size = len(prompts)
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng((self._seed, self._epoch))
        order = random.permutation(len(self._groups)).tolist()
        good = [group for group in order if self._is_good[group]]
        other = [group for group in order if not self._is_good[group]]
        # Spread each list evenly over the whole: element n of k is at (n + ½) / k
        places = [((n + 0.5) / len(part), group) for part in (good, other) for n, group in enumerate(part)]
        for _, group in sorted(places):
            yield from random.permutation(self._groups[group]).tolist()


class GroupSampler(Sampler[int]):
    """Rows in random order, in micro-batches that never split a group.

    Groups are packed into micro-batches. Rows that belong to no group, or are alone in theirs, fill the gaps. Indices
    from the number of rows on stand for filler rows, see `trl_ulma.rows.filler.FilledRows`. If a group is larger than a
    micro-batch, it is split into parts of about the same size and the same labels.

    Args:
        groups: `(N,)` the number of each row's group, negative for rows without one.
        label: `(N,)`.
        size: the number of rows in a micro-batch of a process.
        multiple: the number of micro-batches is a multiple of this number, the number of processes.
        seed: the seed of the order. The order differs between epochs and is the same in every process.

    Example:
        >>> from accelerate import PartialState
        >>> state = PartialState()  # which logging asks for the main process; a trainer makes it
        >>> sampler = GroupSampler([0, 1, 0, 1, 1, -1], [1, 0, 0, 1, 1, 1], size=4, multiple=1, seed=0)
        >>> list(sampler)
        [2, 0, 8, 6, 1, 4, 3, 5]
    """

    def __init__(self, groups: Sequence[int], label: Sequence[float], *, size: int, multiple: int, seed: int):
        found: dict[int, list[int]] = {}
        for row, group in enumerate(groups):
            found.setdefault(group if group >= 0 else -1 - row, []).append(row)
        self._groups = list(found.values())
        self._label = np.asarray(label, dtype=np.float64)
        self._rows, self._size, self._seed, self._epoch = len(groups), size, seed, 0
        # Sizes are packed once, so every epoch has the same number of micro-batches
        self._packed = _packed([len(part) for group in self._groups for part in self._parts(group)], size)
        self._packed += [[]] * (-len(self._packed) % multiple)
        if self.fillers > 0.1 * len(self):
            logger.warning(
                f"log_z='group' keeps the rows of a prompt in one micro-batch of {size} rows, and {self.fillers} of "
                f"the {len(self)} places remain empty, which costs time. Choose a per_device_train_batch_size that is "
                "a multiple of the number of rows per prompt."
            )

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self._epoch = epoch

    @property
    def fillers(self) -> int:
        """The number of filler rows of an epoch."""
        return len(self) - self._rows

    def __len__(self) -> int:
        return len(self._packed) * self._size

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng((self._seed, self._epoch))
        of_size: dict[int, list[list[int]]] = {}
        for number in random.permutation(len(self._groups)):
            for part in self._parts(random.permutation(self._groups[number]).tolist()):
                of_size.setdefault(len(part), []).append(part)
        for number in random.permutation(len(self._packed)):
            rows = [row for size in self._packed[number] for row in of_size[size].pop()]
            fillers = [self._rows + (rows or [0])[i % (len(rows) or 1)] for i in range(self._size - len(rows))]
            yield from rows + fillers

    def _parts(self, group: list[int]) -> list[list[int]]:
        count = -(-len(group) // self._size)
        if count == 1:
            return [group]
        # Dealt like cards in the order of their labels, so that parts have the same mix
        dealt = [group[i] for i in np.argsort(self._label[group], kind="stable")]
        return [dealt[first::count] for first in range(count)]


def _packed(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Sizes in bins of `room`, each in the fullest bin that it fits in, the largest first.

    Example:
        >>> _packed([1, 3, 2, 2, 1], 4)
        [[3, 1], [2, 2], [1]]
    """
    bins: list[list[int]] = []
    with_room: dict[int, list[int]] = {left: [] for left in range(room + 1)}
    for size in sorted(sizes, reverse=True):
        left = next((left for left in range(size, room) if with_room[left]), room)
        if left == room:
            bins.append([])
            number = len(bins) - 1
        else:
            number = with_room[left].pop()
        bins[number].append(size)
        with_room[left - size].append(number)
    return bins


class LengthSampler(Sampler[int]):
    """The order of transformers' `LengthGroupedSampler`, but determined by the seed and the epoch only.

    The original sampler draws from the random numbers of its process. These differ between processes and after a
    resume.

    Args:
        grouped: transformers' sampler.
        seed: the seed of the order. The order differs between epochs and is the same in every process.
    """

    def __init__(self, grouped: LengthGroupedSampler, seed: int):
        self._grouped = grouped
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._grouped)

    def __iter__(self) -> Iterator[int]:
        self._grouped.generator = torch.Generator().manual_seed(self._seed + self._epoch)
        return iter(self._grouped)


def warn_of_repeats(rows: int, of_step: int, micro_batches: int) -> None:
    """Warn if transformers' sampler "batch_rebalance" repeats rows, so that no micro-batch of the last step is empty.

    Args:
        rows: the number of rows of an epoch.
        of_step: the number of rows of a step over all processes.
        micro_batches: the number of micro-batches of a step over all processes.
    """
    left = rows % of_step
    if 0 < left < micro_batches:
        logger.warning(
            f"The last step of an epoch has {counted(left, 'row')} for {micro_batches} micro-batches. So that none is "
            f"empty, train_sampling_strategy='batch_rebalance' adds {counted(micro_batches - left, 'row')} of earlier "
            "steps, counted twice. Set dataloader_drop_last=True to leave this step out."
        )
