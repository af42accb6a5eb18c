"""How a model was trained: what its labels are read by, and its implicit reward's β and log Z."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from trl_ulma.judge import FILE, JudgeSettings, saved_log_partition
from trl_ulma.labels import LabelRules, LabelTransform
from trl_ulma.log_partition import Learned

BETA = 0.1


class RewardScale(NamedTuple):
    """What turns log-ratios into rewards.

    Attributes:
        beta: β.
        log_z: `(N,)` nats.
        length_normalize: whether log-probabilities are divided by the completion's tokens.
    """

    beta: float
    log_z: np.ndarray
    length_normalize: bool


def label_rules(
    sources: Sequence[str], *, label_type: str | None, sft_threshold: float | None
) -> tuple[LabelRules, list[str]]:
    """How the held-out rows' labels are read: as by the training of the first model that says how it was trained.

    Args:
        sources: the models' folders or names.
        label_type: taken in place of the training's; without either it is "binary". The training's `label_transform` is
            for labels of its own type only.
        sft_threshold: continuous labels of this and above, after the transform, are demonstrations.

    Returns:
        the rules, and a note for each model that was trained on labels that were read otherwise.

    Raises:
        ValueError: where a `pointwise.json` does not hold what it should.

    Example:
        >>> label_rules(["gpt2"], label_type=None, sft_threshold=None)[0].label_type
        'binary'
    """
    known = {source: saved for source in sources if (saved := _saved(source)) is not None}
    first = next(iter(known.values()), JudgeSettings(beta=BETA))
    chosen = first.label_type if label_type is None else label_type
    transform = first.label_transform if first.label_type == chosen else None
    read = _described(chosen, transform)
    trained = {source: _described(saved.label_type, saved.label_transform) for source, saved in known.items()}
    notes = [
        f"{source} was trained on {on}, and the rows here have {read}: its figures may mislead."
        for source, on in trained.items()
        if on != read
    ]
    return LabelRules(chosen, sft_threshold, transform=transform), notes


def reward_scale(
    source: str,
    continuous: np.ndarray,
    *,
    beta: float | None,
    log_z: float | None,
    prompt_states: Callable[[], torch.Tensor],
) -> RewardScale:
    """The reward's scale as `pointwise.json` and `log_z.safetensors` in a model's folder have it.

    Args:
        source: the model's folder or name; without these files β is 0.1 and log Z 0.
        continuous: `(N,)` bool, whether a row's label is continuous.
        beta: taken in place of the model's.
        log_z: the same, nats.
        prompt_states: called where log Z reads them, see `trl_ulma.evaluation.logps.prompt_states`.

    Raises:
        ValueError: where a file is there that does not hold what it should.

    Example:
        >>> reward_scale("gpt2", np.array([False]), beta=None, log_z=0.5, prompt_states=lambda: torch.zeros(1, 8))
        RewardScale(beta=0.1, log_z=array([0.5]), length_normalize=False)
    """
    saved = _saved(source) or JudgeSettings(beta=BETA)
    found = np.zeros(len(continuous))
    if log_z is not None:
        found += log_z
    elif saved.log_z != "column":
        state = Path(source) / "log_z.safetensors"
        partition = saved_log_partition(saved, state if state.is_file() else None, "cpu")
        reads = isinstance(partition, Learned) and partition.needs_prompt_states
        found = partition(torch.from_numpy(continuous), prompt_states() if reads else None).numpy()
    return RewardScale(saved.beta if beta is None else beta, found, saved.length_normalize)


def _saved(source: str) -> JudgeSettings | None:
    """What training wrote beside a model, or None."""
    path = Path(source) / FILE
    return JudgeSettings.read(path) if path.is_file() else None


def _described(label_type: str, transform: LabelTransform | None) -> str:
    """Labels, in words."""
    return f"{label_type} labels" + (" as they are" if transform is None else f" after {transform}")
