"""Measures the implicit reward on held-out rows: ranking, calibration, correlation.

The trainers log the same AUC and correlations, from `trl_ulma.ranking`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.special import expit

from trl_ulma.evaluation.intervals import Estimate, bootstrap, mean_of, ratio_of
from trl_ulma.metrics import is_chosen, is_sided
from trl_ulma.ranking import RANKING_FIGURES, auc, pearson, spearman

BINS = 10

# The value of a figure that ranks if rewards and labels are independent
CHANCE = {"auc": 0.5, "spearman": 0.0}


def implicit_reward(policy_logps: np.ndarray, ref_logps: np.ndarray, beta: float, log_z: Any = 0.0) -> np.ndarray:
    """Return the `(N,)` rewards r = β·(log π_θ(y|x) − log π_ref(y|x) + log Z(x)), Eq. 4 of the ULMA paper.

    Args:
        policy_logps, ref_logps: `(N,)` log-probabilities in nats, summed over completion tokens.
        beta: β, above 0.
        log_z: log Z in nats, `(N,)` or one number.

    Raises:
        ValueError: if β is not above 0, or if arrays have different shapes.

    Example:
        >>> implicit_reward(np.array([-1.0]), np.array([-3.0]), 0.5, log_z=1.0)
        array([1.5])
    """
    if not beta > 0:
        raise ValueError(f"beta must be above 0; got {beta}.")
    if policy_logps.shape != ref_logps.shape:
        raise ValueError(
            f"policy_logps and ref_logps must have one shape; got {policy_logps.shape} and {ref_logps.shape}."
        )
    return beta * (policy_logps - ref_logps + log_z)


@dataclass(frozen=True)
class CalibrationBin:
    """Rows with similar predicted probabilities.

    Attributes:
        predicted: their mean σ(r).
        observed: their mean label.
        rows: the number of rows.
    """

    predicted: float
    observed: float
    rows: int


def calibration_curve(probability: np.ndarray, label: np.ndarray) -> list[CalibrationBin]:
    """Return mean label and mean predicted probability in `BINS` bins of about the same number of rows.

    This is scikit-learn's `calibration_curve(strategy="quantile")`, extended to labels between 0 and 1 and to numbers
    of rows.

    Args:
        probability: `(N,)` in [0, 1].
        label: `(N,)` in [0, 1].

    Example:
        >>> calibration_curve(np.array([0.2, 0.8]), np.array([0.0, 1.0]))
        [CalibrationBin(predicted=0.2, observed=0.0, rows=1), CalibrationBin(predicted=0.8, observed=1.0, rows=1)]
    """
    edges = np.quantile(probability, np.linspace(0, 1, BINS + 1))
    place = np.searchsorted(edges[1:-1], probability)
    return [
        CalibrationBin(float(probability[rows].mean()), float(label[rows].mean()), int(rows.sum()))
        for rows in (place == each for each in range(BINS))
        if rows.any()
    ]


def binary_figures(rewards: np.ndarray, label: np.ndarray, prompt: np.ndarray, *, seed: int = 0) -> dict[str, Estimate]:
    """Return `auc`, `accuracy` and `brier` of rows with binary or soft labels, with bootstrap intervals by prompt.

    `auc` is the probability that an answer with a label above ½ has a higher reward than one with a label below ½. It
    is missing if there is only one of these classes. `accuracy` is the share of rows whose reward has the sign of its
    label; a reward of 0 counts half. Rows with a label of exactly ½ are in neither. `brier` is the mean of (σ(r) − z)²,
    because P(z = 1) = σ(r). 0 is best, and a constant prediction of ½ gets ¼.

    Args:
        rewards: `(N,)` r.
        label: `(N,)` z in [0, 1].
        prompt: `(N,)` numbers of the prompts.
        seed: seed of the bootstrap.

    Raises:
        ValueError: if rewards are not finite, or if labels lie outside [0, 1].

    Example:
        >>> found = binary_figures(np.array([1.0, -1.0]), np.array([1.0, 0.0]), np.array([0, 0]))
        >>> found["auc"].value, found["accuracy"].value, round(found["brier"].value, 4)
        (1.0, 1.0, 0.0723)
    """
    _check(rewards, label, prompt)
    if ((label < 0) | (label > 1)).any():
        raise ValueError('Binary figures need labels in [0, 1]. Set label_type="continuous" for others.')
    sided = label != 0.5
    of_sided, good, where = rewards[sided], label[sided] > 0.5, prompt[sided]
    right = np.where(of_sided == 0, 0.5, (of_sided > 0) == good)
    squares = (expit(rewards) - label) ** 2
    found = {}
    if good.any() and not good.all():
        found["auc"] = bootstrap(partial(auc, of_sided, good), where, seed)
    if sided.any():
        found["accuracy"] = bootstrap(mean_of(right), where, seed)
    return {**found, "brier": bootstrap(mean_of(squares), prompt, seed)}


def continuous_figures(
    rewards: np.ndarray, label: np.ndarray, prompt: np.ndarray, *, seed: int = 0
) -> dict[str, Estimate]:
    """Return `spearman`, `pearson` and `mse` of rows with continuous labels, with bootstrap intervals by prompt.

    `mse` is the mean of (z − r)². Correlations are missing if all rewards or all labels are equal.

    Args:
        rewards: `(N,)` r.
        label: `(N,)` z.
        prompt: `(N,)` numbers of the prompts.
        seed: seed of the bootstrap.

    Raises:
        ValueError: if rewards are not finite.

    Example:
        >>> found = continuous_figures(np.array([1.0, 2.0, 4.0]), np.array([0.0, 1.0, 2.0]), np.arange(3))
        >>> found["spearman"].value, round(found["pearson"].value, 4), found["mse"].value
        (1.0, 0.982, 2.0)
    """
    _check(rewards, label, prompt)

    squares = (rewards - label) ** 2
    found = {}
    if np.ptp(rewards) > 0 and np.ptp(label) > 0:
        found = {
            name: bootstrap(partial(of, rewards, label), prompt, seed)
            for name, of in (("spearman", spearman), ("pearson", pearson))
        }
    return {**found, "mse": bootstrap(mean_of(squares), prompt, seed)}


def split_figures(
    rewards: np.ndarray,
    label: np.ndarray,
    continuous: np.ndarray,
    prompt: np.ndarray,
    center: float,
    *,
    seed: int = 0,
) -> dict[str, Estimate]:
    """`chosen`, `rejected`, `margins` and `accuracies`, as trainers log them, with intervals by prompt.
    `trl_ulma.metrics` defines them.

    A reward at the value that decides its side is counted half in `accuracies`, unlike in logs.

    Args:
        rewards: `(N,)` r.
        label: `(N,)` z after the transform.
        continuous: `(N,)` bool.
        prompt: `(N,)` numbers of the prompts.
        center: the center of the continuous labels of the training set.
        seed: the seed of the bootstrap.

    Example:
        >>> found = split_figures(np.array([3.5, 3.2]), np.array([5.0, 1.0]), np.ones(2, bool), np.arange(2), 3.0)
        >>> [round(found[name].value, 2) for name in ("chosen", "rejected", "margins", "accuracies")]
        [3.5, 3.2, 0.3, 0.5]
    """
    _check(rewards, label, prompt)
    # In the precision of a trainer's batches, so that a label at the center is on the same side
    chosen = is_chosen(torch.tensor(label, dtype=torch.float32), torch.from_numpy(continuous), center).numpy()
    side = np.where(continuous, center, 0.0)
    right = np.where(rewards == side, 0.5, (rewards > side) == chosen)
    good, bad = (ratio_of(rewards * side, side.astype(float)) for side in (chosen, ~chosen))
    found = {}
    if chosen.any():
        found["chosen"] = bootstrap(good, prompt, seed)
    if not chosen.all():
        found["rejected"] = bootstrap(bad, prompt, seed)
    if len(found) == 2:
        found["margins"] = bootstrap(lambda copies: good(copies) - bad(copies), prompt, seed)
    sided = is_sided(torch.from_numpy(label), torch.from_numpy(continuous)).numpy()
    if sided.any():
        found["accuracies"] = bootstrap(mean_of(right[sided]), prompt[sided], seed)
    return found


def length_figures(
    tokens: np.ndarray, label: np.ndarray, continuous: np.ndarray, prompt: np.ndarray, *, seed: int = 0
) -> dict[str, Estimate]:
    """Return `auc` and `spearman` of the answers' lengths in the place of rewards, with intervals by prompt.

    A model that has learned no more than length ranks as well as these figures, or as their opposite if shorter answers
    are better. They are missing if they are undefined, or if all answers have one length.

    Args:
        tokens: `(N,)` number of tokens of each completion.
        label: `(N,)` z.
        continuous: `(N,)` bool.
        prompt: `(N,)` numbers of the prompts.
        seed: seed of the bootstrap.

    Example:
        >>> binary, prompt = np.zeros(3, dtype=bool), np.arange(3)
        >>> length_figures(np.array([7, 9, 2]), np.array([1.0, 0.0, 0.0]), binary, prompt)["auc"].value
        0.5
    """
    found = {}
    for name in ("auc", "spearman"):
        of_kind, figure = RANKING_FIGURES[f"rewards/{name}"]
        rows = of_kind(label, continuous)
        of = partial(figure, tokens[rows].astype(float), label[rows])
        if len(np.unique(tokens[rows])) > 1 and np.isfinite(of()):
            found[name] = bootstrap(of, prompt[rows], seed)
    return found


def over_length(
    rewards: np.ndarray,
    tokens: np.ndarray,
    label: np.ndarray,
    continuous: np.ndarray,
    prompt: np.ndarray,
    alone: Mapping[str, Estimate],
    *,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Return by how much rewards rank better than lengths, as `auc` and `spearman`, with intervals by prompt.

    Both rank the same resampled rows. Lengths rank in the direction that fits all rows: the longest first, or the
    shortest.

    Args:
        rewards: `(N,)` implicit rewards.
        tokens, label, continuous, prompt, seed: as for `length_figures`.
        alone: what `length_figures` returned. What it lacks is missing here, too.

    Example:
        >>> binary, prompt = np.zeros(3, dtype=bool), np.arange(3)
        >>> rows = np.array([7, 9, 2]), np.array([1.0, 0.0, 0.0]), binary, prompt
        >>> over_length(np.array([2.0, 1.0, 0.0]), *rows, length_figures(*rows))["auc"].value
        0.5
    """
    found = {}
    for name, of_all in alone.items():
        of_kind, figure = RANKING_FIGURES[f"rewards/{name}"]
        rows = of_kind(label, continuous)
        sign = 1 if of_all.value >= CHANCE[name] else -1
        of_length = partial(figure, sign * tokens[rows].astype(float), label[rows])
        of_rewards = partial(figure, rewards[rows], label[rows])
        if np.isfinite(of_rewards()):
            found[name] = bootstrap(lambda n, r=of_rewards, t=of_length: r(n) - t(n), prompt[rows], seed)
    return found


def _check(rewards: np.ndarray, label: np.ndarray, prompt: np.ndarray) -> None:
    if not rewards.shape == label.shape == prompt.shape or rewards.size == 0:
        raise ValueError(
            f"rewards, label and prompt must have one shape (N,), N above 0; got {rewards.shape}, {label.shape} and "
            f"{prompt.shape}."
        )
    if not np.isfinite(rewards).all():
        first = np.flatnonzero(~np.isfinite(rewards))[0]
        raise ValueError(f"Reward {first} is {rewards[first]}. Look at the model's weights.")
