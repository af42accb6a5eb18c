"""Orders of rows: each prompt's rows together, or rows of alike length."""

from collections.abc import Hashable, Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler


class PromptSampler(Sampler[int]):
    """Rows in random order, those of a prompt side by side; prompts with mostly good and mostly bad answers take turns,
    so that micro-batches are not of one class.

    Args:
        prompts: of each row, anything that tells prompts apart.
        desirable: of each row, whether its label is a good one.
        seed: of the order, which differs from epoch to epoch and is the same in every process.

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
        # Each list spread evenly over the whole: the nth of k at (n + ½) / k
        places = [((n + 0.5) / len(part), group) for part in (good, other) for n, group in enumerate(part)]
        for _, group in sorted(places):
            yield from random.permutation(self._groups[group]).tolist()


class LengthSampler(Sampler[int]):
    """The order of transformers' `LengthGroupedSampler`, which depends on the seed and the epoch alone.

    By itself that sampler draws from the process's own random numbers. These differ between processes and after a
    resume.

    Args:
        grouped: transformers' sampler.
        seed: of the order, which differs from epoch to epoch and is the same in every process.
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
