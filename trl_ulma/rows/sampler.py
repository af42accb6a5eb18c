"""Orders of rows: rows of the same prompt together, or rows of similar length together."""

from collections.abc import Hashable, Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler


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
