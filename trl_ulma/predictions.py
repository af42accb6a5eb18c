"""What implicit rewards predict: the labels that a model expects, and what has to be said of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from trl_ulma.labels import LabelRules
from trl_ulma.ranking import auc, spearman

# Rewards below this are 0 up to rounding
_NO_REWARD = 1e-6
# The predictions are alike if 90% of them span at most this share of what 90% of the labels span; without labels, of 1
_ALIKE, _SCALE = 0.1, 1.0
# They are too close to one another if labels differ this many times as much, in so many rows at least
TOO_CLOSE, ENOUGH = 2.0, 30
# Predictions whose mean error is within this share of the error of the mean label say no more than it does
AS_THE_MEAN = 0.05


def judged(
    reward: np.ndarray,
    label: np.ndarray,
    continuous: np.ndarray,
    rules: LabelRules,
    raters: Sequence[Any] | None = None,
) -> dict[str, np.ndarray]:
    r"""What an implicit reward says of rows.

        binary:      P(label = 1) = σ(r),  surprise −z·log σ(r) − (1 − z)·log σ(−r)
        continuous:  E[label] = r,         surprise (z − r)²

    Args:
        reward: `(N,)` r.
        label: `(N,)` z after the transform.
        continuous: `(N,)` bool.
        rules: how labels were read.
        raters: `(N,)` the raters whose labels are predicted. None for an average rater, see "center_raters".

    Returns:
        `probability` (NaN for continuous labels), `predicted_label` (the expected label on the scale that rows carry)
        and `surprise` (the loss of Eq. 8 or Eq. 9, high where label and reward disagree), `(N,)` each.

    Example:
        >>> found = judged(np.array([0.0, 2.0]), np.array([1.0, 1.5]), np.array([False, True]), LabelRules())
        >>> found["predicted_label"], found["surprise"].round(4)
        (array([0.5, 2. ]), array([0.6931, 0.25  ]))
    """
    negative, positive = np.logaddexp(0, reward), np.logaddexp(0, -reward)  # −log σ(−r), −log σ(r)
    probability = np.exp(-positive)
    expected = np.where(continuous, reward, probability)
    predicted = expected
    if rules.transform is not None:
        own = continuous == (rules.label_type == "continuous")
        predicted = np.where(own, rules.transform.invert(expected, raters), expected)
    surprise = np.where(continuous, (label - reward) ** 2, label * positive + (1 - label) * negative)
    return {
        "probability": np.where(continuous, np.nan, probability),
        "predicted_label": predicted,
        "surprise": surprise,
    }


def beyond_training(label: np.ndarray, rules: LabelRules) -> str | None:
    """What is to be said of labels beyond those of the training set, which the transform reads as its ends; None if
    there are none.

    Args:
        label: `(N,)` labels as rows carry them.
        rules: how labels are read.

    Example:
        >>> from trl_ulma.labels import parse_transform
        >>> fitted = parse_transform("quantile", "continuous").fit(np.array([1.0, 2.0, 4.0]))
        >>> beyond_training(np.array([0.0, 3.0, 5.0]), LabelRules("continuous", transform=fitted))
        '2 of 3 labels are outside the range of the training labels, 1 to 4. The transform quantile reads them as the
        ends of this range.'
    """
    ends = None if rules.transform is None else rules.transform.ends
    if ends is None:
        return None
    outside = int(((label < ends[0] - 1e-9) | (label > ends[1] + 1e-9)).sum())
    are = "is" if outside == 1 else "are"
    return (
        f"{outside:,} of {len(label):,} labels {are} outside the range of the training labels, {ends[0]:g} to "
        f"{ends[1]:g}. The transform {rules.transform} reads them as the ends of this range."
        if outside
        else None
    )


def thumbs(label: np.ndarray, rules: LabelRules, center: float | None) -> str | None:
    """A warning if all labels are 0 or 1, and those of the training were ratings. None if not, or if that is unknown.

    Args:
        label: `(N,)` continuous labels as rows carry them.
        rules: how labels are read.
        center: the mean of the training labels after the transform, or None.

    Example:
        >>> thumbs(np.array([0.0, 1.0]), LabelRules("continuous"), 3.25)
        'All 2 labels are 0 or 1 (false or true), and those of the training are about 3.25 on average. If they are likes
        and dislikes, add a column label_type with "binary".'
    """
    if center is None or not len(label) or not np.isin(label, (0, 1)).all():
        return None
    mean = center if rules.transform is None else float(rules.transform.invert(np.array([center]))[0])
    if 0 <= mean <= 1:
        return None
    return (
        f"All {len(label):,} labels are 0 or 1 (false or true), and those of the training are about {mean:.3g} on "
        'average. If they are likes and dislikes, add a column label_type with "binary".'
    )


def too_close(whose: str, slope: str) -> str:
    """What to say of predictions that are too close to one another.

    Args:
        whose: predictions of what.
        slope: by how much labels differ on average if predictions differ by 1.
    """
    return (
        f"The predicted labels of {whose} are too close to one another: where two of them differ by 1, the labels "
        f"differ by {slope} on average (the slope of labels over predictions). More epochs, or a learning rate that "
        "is 3 to 10 times as high, move them apart; held-out rows show whether they are then better."
    )


def order_in_words(predicted: np.ndarray, label: np.ndarray, continuous: bool) -> str:
    """How well the order of predictions ranks rows. "" if that is undefined.

    Args:
        predicted: `(N,)` predicted labels.
        label: `(N,)` labels on the same scale.
        continuous: whether the labels are continuous.

    Example:
        >>> order_in_words(np.array([0.1, 0.2, 0.3]), np.array([1.0, 3.0, 2.0]), True)
        'Their order has a rank correlation of 0.50 with that of the labels (Spearman; 0 by chance).'
        >>> order_in_words(np.array([0.1, 0.3]), np.array([0.0, 1.0]), False)
        'Their order puts a good answer above a bad one with a probability of 1.00 (AUC; 0.5 by chance).'
    """
    if continuous:
        figure = float(spearman(predicted, label))
        said = "Their order has a rank correlation of {} with that of the labels (Spearman; 0 by chance)."
    else:
        decided = label != 0.5
        figure = float(auc(predicted[decided], label[decided] > 0.5))
        said = "Their order puts a good answer above a bad one with a probability of {} (AUC; 0.5 by chance)."
    return said.format(f"{figure:.2f}".replace("-", "−")) if np.isfinite(figure) else ""


def alike(
    reward: np.ndarray,
    predicted: np.ndarray,
    label: np.ndarray | None,
    *,
    continuous: bool = True,
    trained_on: int | None = None,
) -> str | None:
    """A warning if predictions are nearly alike, or too close to one another for the labels. None if they are not, or
    if there are fewer than two rows.

    Args:
        reward: `(N,)` implicit rewards.
        predicted: `(N,)` predicted labels, on the scale of `label`.
        label: `(N,)` labels, or None.
        continuous: whether the labels are continuous.
        trained_on: how many of the rows were trained on; None if that is not known.

    Example:
        >>> alike(np.zeros(3), np.full(3, 0.5), None)
        'The rewards of all 3 rows are 0, because the model computes the same log-probabilities as its reference. Was it
        trained?'
    """
    rows = len(reward)
    if rows < 2:
        return None
    these = f"the {rows:,} {'held-out ' * (trained_on == 0)}rows"
    if np.abs(reward).max() < _NO_REWARD:
        return (
            f"The rewards of all {rows:,} rows are 0, because the model computes the same log-probabilities as its "
            "reference. Was it trained?"
        )
    low, high = np.quantile(predicted, [0.05, 0.95])
    if label is None:
        if high - low > _ALIKE * _SCALE:
            return None
        than = ""
    else:
        least, greatest = np.quantile(label, [0.05, 0.95])
        if greatest == least or high - low > _ALIKE * (greatest - least):
            apart = predicted - predicted.mean()
            slope = float(apart @ label) / max(float(apart @ apart), np.finfo(float).tiny)
            if greatest == least or rows < ENOUGH or slope < TOO_CLOSE:
                return None
            return too_close(these, f"{slope:.1f}")
        than = f", and 90% of their labels between {least:.3g} and {greatest:.3g}"
    order = "" if label is None else order_in_words(predicted, label, continuous)
    if order and rows < ENOUGH:
        order = "These are too few rows to measure how good their order is."
    elif order and trained_on:
        order += f" This includes {trained_on:,} that were trained on; `trl-ulma evaluate` measures held-out ones."
    elif order:
        order += " `trl-ulma evaluate` gives its interval."
    else:
        order = "`trl-ulma evaluate` measures their order on rows with labels."
    return (
        f"The predicted labels of {these} are nearly alike, as is common after little training: 90% of them are "
        f"between {low:.3g} and {high:.3g}{than}. {order}"
    )


def held_out_alike(evaluated: np.ndarray, rules: LabelRules) -> str | None:
    """The warning of `alike` on the rows that a trainer evaluated last. None if a reward is NaN, which was said then.

    Args:
        evaluated: `(N, 3)` implicit reward, label after the transform, and whether it is continuous.
        rules: how labels were read.

    Example:
        >>> rows = np.array([[0.01, -1.0, 1.0], [0.02, 0.0, 1.0], [0.03, 1.0, 1.0]])
        >>> held_out_alike(rows, LabelRules("continuous"))
        'The predicted labels of the 3 held-out rows are nearly alike, as is common after little training: 90% of them
        are between 0.011 and 0.029, and 90% of their labels between -0.9 and 0.9. These are too few rows to measure how
        good their order is.'
        >>> held_out_alike(rows * [[np.nan, 1, 1]], LabelRules("continuous")) is None
        True
    """
    reward, label, continuous = evaluated.T
    own = continuous.astype(bool) == (rules.label_type == "continuous")
    reward, label = reward[own], label[own]
    if not np.isfinite(reward).all():
        return None
    predicted = judged(reward, label, continuous[own].astype(bool), rules)["predicted_label"]
    said = alike(
        reward,
        predicted,
        label if rules.transform is None else rules.transform.invert(label),
        continuous=rules.label_type == "continuous",
        trained_on=0,
    )
    centered = (
        "" if rules.transform is None or not rules.transform.offsets else " (Labels are those of an average rater.)"
    )
    return None if said is None else said + centered
