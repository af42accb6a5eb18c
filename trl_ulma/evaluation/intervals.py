"""Estimates with 95% intervals: bootstrap over prompts, Wilson for shares, Student's t over seeds."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% interval.

    Attributes:
        value: the value.
        low, high: ends of the interval; None if the data allow no interval.
        n: number of independent units: prompts, comparisons or seeds.
    """

    value: float
    low: float | None
    high: float | None
    n: int


def bootstrap(statistic: Callable[[np.ndarray], float], groups: np.ndarray, seed: int) -> Estimate:
    """Return a statistic of rows with its percentile-bootstrap interval.

    The bootstrap resamples whole groups, because the rows of a prompt depend on one another. There is no interval in
    three cases: there are fewer than two groups; the statistic is undefined (NaN) in a resample, such as an AUC if all
    drawn answers are good; or all resamples give the same value. In the last case, an interval without width would
    claim too much certainty.

    Args:
        statistic: a function of row numbers `(M,)`, which may repeat.
        groups: `(N,)` group of each row, such as the number of its prompt.
        seed: seed of the bootstrap.

    Raises:
        ValueError: if the statistic of all rows is not finite.

    Example:
        >>> values = np.array([1.0, 2.0, 3.0, 6.0])
        >>> found = bootstrap(lambda rows: values[rows].mean(), np.array([0, 1, 2, 3]), seed=0)
        >>> found.value, found.n, found.low < 3 < found.high
        (3.0, 4, True)
    """
    groups = np.asarray(groups)
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order])) + 1
    members = np.split(order, starts)
    value = float(statistic(np.arange(len(groups))))
    if not np.isfinite(value):
        raise ValueError(f"The figure of all {len(groups)} rows is {value}, so it has no interval. Look at the rows.")
    if len(members) < 2:
        return Estimate(value, None, None, len(members))

    # Most datasets have as many rows of each prompt: then indexing a table is faster than joining lists
    table = np.stack(members) if len({len(rows) for rows in members}) == 1 else None

    def resampled(drawn: np.ndarray, axis: int) -> np.ndarray:
        if table is not None:
            return np.array([statistic(table[chosen].ravel()) for chosen in drawn], float)
        return np.array([statistic(np.concatenate([members[group] for group in chosen])) for chosen in drawn], float)

    with warnings.catch_warnings():
        # An undefined resample gives an Estimate without an interval
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        drawn = stats.bootstrap(
            (np.arange(len(members)),),
            resampled,
            n_resamples=RESAMPLES,
            vectorized=True,
            confidence_level=CONFIDENCE,
            method="percentile",
            rng=seed,
        )
    low, high = map(float, drawn.confidence_interval)
    figures = drawn.bootstrap_distribution
    if np.isnan(figures).any() or np.allclose(figures, value, rtol=1e-9, atol=1e-12):
        return Estimate(value, None, None, len(members))
    return Estimate(value, low, high, len(members))


def wilson(count: int, n: int) -> Estimate:
    """Return the share `count` / `n` with Wilson's score interval.

    Raises:
        ValueError: if n is below 1, or if `count` is not between 0 and n.

    Example:
        >>> share = wilson(8, 10)
        >>> share.value, round(share.low, 3), round(share.high, 3)
        (0.8, 0.49, 0.943)
    """
    if n < 1 or not 0 <= count <= n:
        raise ValueError(f"A share needs a count between 0 and n, and n of 1 or above; got {count} of {n}.")
    low, high = stats.binomtest(count, n).proportion_ci(CONFIDENCE, method="wilson")
    return Estimate(count / n, float(low), float(high), n)


def over_seeds(values: Sequence[float]) -> Estimate:
    """Return the mean over runs that differ only in their seed, with Student's t interval; None for a single run.

    Raises:
        ValueError: if there are no values.

    Example:
        >>> found = over_seeds([1.0, 2.0, 3.0])
        >>> found.value, round(found.low, 3), round(found.high, 3)
        (2.0, -0.484, 4.484)
    """
    n = len(values)
    if n == 0:
        raise ValueError("A mean over seeds needs one run at least; got none.")
    mean = float(np.mean(values))
    if n == 1:
        return Estimate(mean, None, None, n)
    half = float(stats.sem(values) * stats.t.ppf((1 + CONFIDENCE) / 2, n - 1))
    return Estimate(mean, mean - half, mean + half, n)
