"""How a model was trained: the rules for its labels, and β and log Z of its implicit reward."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from trl_ulma.labels import LabelRules, LabelTransform, parse_transform
from trl_ulma.log_partition import Learned
from trl_ulma.log_z import FILE as LOG_Z_FILE
from trl_ulma.log_z import saved_log_partition
from trl_ulma.saved import SavedSettings, saved_file, saved_settings

BETA = 0.1
# Settings of a training that say how rows become tokens
_READING = ("max_length", "truncation_mode", "assistant_only_loss", "chat", "system_message")


class RewardScale(NamedTuple):
    """The numbers that turn log-ratios into rewards.

    Attributes:
        beta: β.
        log_z: `(N,)` log Z in nats.
        length_normalize: whether log-probabilities are divided by the number of completion tokens.
    """

    beta: float
    log_z: np.ndarray
    length_normalize: bool


@dataclass(frozen=True)
class AsTrained:
    """How to read held-out rows: as in the training of the first model that recorded its training.

    Attributes:
        rules: rules for labels.
        label_center: see `trl_ulma.saved.SavedSettings`; None if labels are not read as in a training.
        max_length: longest sequence in tokens, or None.
        truncation_mode: "keep_start" or "keep_end".
        assistant_only_loss: whether only the assistant's turns of a completion are scored.
        chat: whether rows of text become messages.
        system_message: system message of conversations that have none, or None.
        read_as: a sentence on how labels are read, if as in a training; else None.
        notes: notes for the report.
    """

    rules: LabelRules
    label_center: float | None
    max_length: int | None
    truncation_mode: str
    assistant_only_loss: bool
    chat: str
    system_message: str | None
    read_as: str | None
    notes: list[str]


def as_trained(
    sources: Sequence[str],
    *,
    label_type: str | None = None,
    label_transform: str | None = None,
    sft_threshold: float | None = None,
    max_length: int | None = None,
    truncation_mode: str | None = None,
    is_paired: bool = False,
    labels: Iterable[Any] = (),
) -> AsTrained:
    """Return how to read rows, from the records of training. Arguments override the records.

    Args:
        sources: folders of the models, or their names on the Hub.
        label_type: "binary" or "continuous"; only records with this type are then used. "binary" if it is not given and
            there is no record.
        label_transform: the setting with its numbers, or "none". A transform as it was printed is the saved one.
        sft_threshold: rows whose continuous label, after the transform, is at or above it are demonstrations.
        max_length: longest sequence in tokens.
        truncation_mode: "keep_start" or "keep_end".
        is_paired: whether rows are pairs, whose labels are always 1 and 0.
        labels: the labels of the rows, if they have no types of their own.

    Raises:
        ValueError: if `label_transform` is unknown or lacks its numbers, or if a `pointwise.json` is invalid.

    Example:
        >>> as_trained(["."], label_transform="center:3", label_type="continuous").rules.transform.is_fitted
        True
    """
    known = {source: saved for source in sources if (saved := saved_settings(source)) is not None}
    if is_paired and label_type is None:
        label_type = "binary"
    fitting = [source for source, saved in known.items() if label_type in (None, saved.label_type)]
    name, first = (fitting[0], known[fitting[0]]) if fitting else ("", SavedSettings(beta=BETA))
    chosen = label_type or first.label_type
    read_as = None
    if is_paired:
        if label_transform not in (None, "none"):
            raise ValueError(
                f"label_transform={label_transform!r} reads labels, and pairs have none. Leave it out, or set 'none'."
            )
        transform = None
    elif label_transform is None:
        transform = first.label_transform
        if transform is not None:
            read_as = f"Labels are read as in the training of {name}: {_described(chosen, transform)}."
    else:
        transform = None if label_transform == "none" else parse_transform(label_transform, chosen)
        if transform is not None and str(transform) == str(first.label_transform):
            transform = first.label_transform  # as it was printed: rounded, without the numbers of some steps
        if transform is not None and not transform.is_fitted:
            raise ValueError(
                f"label_transform={label_transform!r} has no numbers, which a training fits on its own rows. Give "
                "them, as in standardize:2.5,1.2 (quantile and center_raters take none), or leave it out to take those "
                "of the models' training."
            )
    notes = [
        f"{source} was trained on {_described(saved.label_type, saved.label_transform)}, and the rows here have "
        f"{_described(chosen, transform)}: its figures may mislead."
        for source, saved in known.items()
        if not is_paired and (saved.label_type, saved.label_transform) != (chosen, transform)
    ]
    if fitting and label_type is None and chosen == "continuous" and _are_binary(labels):
        notes.append(
            f"All labels of the rows are 0 or 1 (false or true), and {name} was trained on "
            f"{_described(chosen, first.label_transform)}: figures may mislead. If the labels are likes and dislikes, "
            "set --label_type binary."
        )
    reader = first if fitting else next(iter(known.values()), first)
    given = {"max_length": max_length, "truncation_mode": truncation_mode}
    cut: dict[str, Any] = {name: getattr(reader, name) for name in _READING}
    for source, saved in known.items():
        differing = [name for name in _READING if given.get(name) is None and getattr(saved, name) != cut[name]]
        others = [f"{name} {getattr(saved, name)}, here {cut[name]}" for name in differing]
        if others:
            notes.append(
                f"{source} was trained on rows that were read in another way ({'; '.join(others)}). If this makes a "
                "difference, its rewards are not those of its training. Evaluate it by itself."
            )
    cut |= {name: value for name, value in given.items() if value is not None}
    return AsTrained(
        LabelRules(chosen, first.sft_threshold if sft_threshold is None else sft_threshold, transform=transform),
        first.label_center if (first.label_type, first.label_transform) == (chosen, transform) else None,
        **cut,
        read_as=read_as,
        notes=notes,
    )


def _are_binary(labels: Iterable[Any]) -> bool:
    """Whether all labels are 0 or 1, and there are any.

    Example:
        >>> _are_binary([True, None, 0]), _are_binary([1, 5]), _are_binary([])
        (True, False, False)
    """
    found = [label for label in labels if label is not None]
    return bool(found) and all(label in (0, 1) for label in found)


def reward_scale(
    source: str,
    continuous: np.ndarray,
    *,
    beta: float | None,
    log_z: float | None,
    prompt_states: Callable[[], torch.Tensor],
) -> RewardScale:
    """Return the scale of the reward, from `pointwise.json` and `log_z.safetensors` in the folder of a model.

    Args:
        source: folder or name of the model. Without these files, β is 0.1 and log Z is 0.
        continuous: `(N,)` bool, whether the label of a row is continuous.
        beta: replaces the model's β.
        log_z: replaces the model's log Z, in nats.
        prompt_states: called if log Z depends on prompt states, see `trl_ulma.likelihood.table.prompt_states`.

    Raises:
        ValueError: if a file is invalid, or if training read log Z from a column and `log_z` is not given.

    Example:
        >>> reward_scale(".", np.array([False]), beta=None, log_z=0.5, prompt_states=lambda: torch.zeros(1, 8))
        RewardScale(beta=0.1, log_z=array([0.5]), length_normalize=False)
    """
    saved = saved_settings(source) or SavedSettings(beta=BETA)
    found = np.zeros(len(continuous))
    if log_z is not None:
        found += log_z
    elif saved.log_z == "column":
        raise ValueError(
            f"{source}: log_z='column' needs a column log_z in the scored rows, in nats; there is none. Add it, or set "
            "log_z."
        )
    else:
        partition = saved_log_partition(saved, saved_file(source, LOG_Z_FILE), "cpu")
        reads = isinstance(partition, Learned) and partition.needs_prompt_states
        found = partition(torch.from_numpy(continuous), prompt_states() if reads else None).numpy()
    return RewardScale(saved.beta if beta is None else beta, found, saved.length_normalize)


def _described(label_type: str, transform: LabelTransform | None) -> str:
    """Return a description of labels in words."""
    return f"{label_type} labels" + (" as they are" if transform is None else f" after {transform}")
