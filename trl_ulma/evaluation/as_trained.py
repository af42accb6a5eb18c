"""The β and the log Z that a model's implicit reward has: those it was trained with, unless others are asked for."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from trl_ulma.judge import FILE, JudgeSettings, saved_log_partition
from trl_ulma.log_partition import Learned

BETA = 0.1


class RewardScale(NamedTuple):
    """What turns log-ratios into rewards.

    Attributes:
        beta: β.
        log_z: `(N,)` nats.
        length_normalize: whether log-probabilities are divided by the completion's tokens.
        notes: what of the training could not be taken over.
    """

    beta: float
    log_z: np.ndarray
    length_normalize: bool
    notes: list[str]


def reward_scale(source: str, continuous: np.ndarray, *, beta: float | None, log_z: float | None) -> RewardScale:
    """The reward's scale as `pointwise.json` and `log_z.safetensors` in a model's folder have it.

    Args:
        source: the model's folder or name; without these files β is 0.1 and log Z 0.
        continuous: `(N,)` bool, whether a row's label is continuous.
        beta: taken in place of the model's.
        log_z: the same, nats.

    Raises:
        ValueError: where a file is there that does not hold what it should.

    Example:
        >>> reward_scale("gpt2", np.array([False]), beta=None, log_z=0.5)
        RewardScale(beta=0.1, log_z=array([0.5]), length_normalize=False, notes=[])
    """
    path = Path(source) / FILE
    saved = JudgeSettings.read(path) if path.is_file() else JudgeSettings(beta=BETA)
    notes = []
    found = np.zeros(len(continuous))
    if log_z is not None:
        found += log_z
    elif saved.log_z != "column":
        state = path.parent / "log_z.safetensors"
        partition = saved_log_partition(saved, state if state.is_file() else None, "cpu")
        if isinstance(partition, Learned) and partition.needs_prompt_states:
            notes.append(f"{source} reads log Z out of its hidden states: `trl-ulma score` does, and here it is 0.")
        else:
            found = partition(torch.from_numpy(continuous)).numpy()
    if saved.label_transform is not None:
        notes.append(
            f"{source} was trained on transformed labels, and the rows' labels are compared as they are. `trl-ulma "
            "score` transforms them."
        )
    return RewardScale(saved.beta if beta is None else beta, found, saved.length_normalize, notes)
