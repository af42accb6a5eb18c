"""How well rewards rank rows: AUC and correlations, for a dataset or for many of its resamples at once.

A function takes `(N,)` values of rows and, optionally, `(..., N)` copies: how often each row is there. It returns
figures `(...)`, which are NaN where they are undefined.
"""

from collections.abc import Callable

import numpy as np
import torch


def auc(score: np.ndarray, positive: np.ndarray, copies: np.ndarray | None = None) -> np.ndarray:
    """The probability that a positive row has a higher score than a negative one. Ties count as half.

    NaN without positive rows or without negative ones.

    Example:
        >>> float(auc(np.array([0.1, 0.4, 0.8]), np.array([False, True, True])))
        1.0
    """
    copies = np.ones(len(score)) if copies is None else copies
    n_positive = copies @ positive.astype(float)
    n_negative = copies.sum(-1) - n_positive
    wins = ((copies * positive) * _ranks(score, copies)).sum(-1) - n_positive * (n_positive + 1) / 2
    with np.errstate(invalid="ignore"):
        return wins / (n_positive * n_negative)


def pearson(a: np.ndarray, b: np.ndarray, copies: np.ndarray | None = None) -> np.ndarray:
    """Linear correlation of two values of the rows. NaN if either is constant.

    Example:
        >>> round(float(pearson(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0]))), 6)
        1.0
    """
    copies = np.ones(len(a)) if copies is None else copies
    return _correlation(a, b, copies)


def spearman(a: np.ndarray, b: np.ndarray, copies: np.ndarray | None = None) -> np.ndarray:
    """Rank correlation of two values of the rows. Ties share their mean rank. NaN if either is constant.

    Example:
        >>> round(float(spearman(np.array([1.0, 2.0, 3.0]), np.array([1.0, 4.0, 9.0]))), 6)
        1.0
    """
    copies = np.ones(len(a)) if copies is None else copies
    return _correlation(_ranks(a, copies), _ranks(b, copies), copies)


def _correlation(a: np.ndarray, b: np.ndarray, copies: np.ndarray) -> np.ndarray:
    one, other = _centered(a, copies), _centered(b, copies)
    size = np.sqrt((copies * one**2).sum(-1) * (copies * other**2).sum(-1))
    with np.errstate(invalid="ignore", divide="ignore"):
        found = np.clip((copies * one * other).sum(-1) / size, -1, 1)
    return np.where(_constant(a, copies) | _constant(b, copies), np.nan, found)


def _centered(values: np.ndarray, copies: np.ndarray) -> np.ndarray:
    return values - ((copies * values).sum(-1) / copies.sum(-1))[..., None]


def _constant(values: np.ndarray, copies: np.ndarray) -> np.ndarray:
    """Whether all rows that are there have one value. Rounding can make their variance differ from 0."""
    there = copies > 0
    return np.where(there, values, -np.inf).max(-1) <= np.where(there, values, np.inf).min(-1)


def _ranks(values: np.ndarray, copies: np.ndarray) -> np.ndarray:
    """`(..., N)` ranks from 1 among all copies. Equal values share their mean rank."""
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.diff(values[order], prepend=np.nan) != 0)
    alike = np.add.reduceat(copies[..., order], starts, axis=-1)
    rank = np.cumsum(alike, axis=-1) - (alike - 1) / 2
    value = np.empty(len(values), int)
    value[order] = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(values)))
    return rank[..., value]


def _binary(label: np.ndarray, continuous: np.ndarray) -> np.ndarray:
    return ~continuous & (label != 0.5)


def _continuous(label: np.ndarray, continuous: np.ndarray) -> np.ndarray:
    return continuous


# (which rows it is of, from labels and whether they are continuous; the figure of rewards, labels and copies)
RANKING_FIGURES: dict[str, tuple[Callable[..., np.ndarray], Callable[..., np.ndarray]]] = {
    "rewards/auc": (_binary, lambda reward, label, copies=None: auc(reward, label > 0.5, copies)),
    "rewards/pearson": (_continuous, pearson),
    "rewards/spearman": (_continuous, spearman),
}


def ranking_figures(rewards: torch.Tensor, label: torch.Tensor, continuous: torch.Tensor) -> dict[str, float]:
    """Metrics that need all rows at once: `rewards/auc` for binary labels, correlations for continuous labels.

    Rows with a binary label of ½ have no part in the AUC. A figure that is undefined is missing.

    Args:
        rewards: `(N,)` r. NaN if unknown.
        label: `(N,)` z.
        continuous: `(N,)` bool.
    """
    reward, labels, is_continuous = (each.double().cpu().numpy() for each in (rewards, label, continuous))
    found = {}
    for name, (of_kind, figure) in RANKING_FIGURES.items():
        rows = ~np.isnan(reward) & of_kind(labels, is_continuous.astype(bool))
        if rows.any():
            found[name] = float(figure(reward[rows], labels[rows]))
    return {name: value for name, value in found.items() if not np.isnan(value)}
