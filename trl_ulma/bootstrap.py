"""Figures with 95% intervals from a bootstrap over prompts, for reports and model cards."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 2000
# Beyond each end of an interval there are at least so many resamples, or the end would be due to chance
_BEYOND = 10
# Of fewer prompts, the bootstrap gives intervals that are too narrow
ENOUGH_PROMPTS = 30
# A figure can be undefined in a resample, such as an AUC if all drawn answers are good. The others give the interval if
# they are at least this share of all
_DEFINED = 0.95
# Numbers in memory at once, at most: resamples × rows
_AT_ONCE = 4_000_000

Statistic = Callable[[np.ndarray], np.ndarray]


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


def bootstrap(statistic: Statistic, groups: np.ndarray, seed: int, comparisons: int = 1) -> Estimate:
    """Return a statistic of rows with its percentile-bootstrap interval.

    The bootstrap resamples whole groups, because the rows of a prompt depend on one another. There is no interval in
    three cases: there are fewer than two groups; the statistic is undefined (NaN) in more than 5% of the resamples,
    such as an AUC if all drawn answers are good; or all resamples give the same value. In the last case, an interval
    without width would claim too much certainty.

    Args:
        statistic: a function of copies `(..., N)`, how often each row is drawn, that returns figures `(...)`. It gets
            many resamples at once, because one call for each would take minutes for a large dataset.
        groups: `(N,)` group of each row, such as the number of its prompt.
        seed: seed of the bootstrap.
        comparisons: the number of intervals that shall hold together (Bonferroni). More than 5 need more resamples,
            because the ends of the interval are further out.

    Raises:
        ValueError: if the statistic of all rows is not finite.

    Example:
        >>> found = bootstrap(mean_of(np.array([1.0, 2.0, 3.0, 6.0])), np.array([0, 1, 2, 3]), seed=0)
        >>> found.value, found.n, found.low < 3 < found.high
        (3.0, 4, True)
    """
    _, group = np.unique(groups, return_inverse=True)
    value = float(statistic(np.ones(len(group))))
    if not np.isfinite(value):
        raise ValueError(f"The figure of all {len(group)} rows is {value}, so it has no interval. Look at the rows.")
    count = int(group.max()) + 1
    if count < 2:
        return Estimate(value, None, None, count)

    tail = (1 - CONFIDENCE) / 2 / comparisons
    resamples = max(RESAMPLES, round(_BEYOND / tail))
    random = np.random.default_rng(seed)
    at_once = max(1, _AT_ONCE // len(group))
    figures = np.concatenate(
        [
            statistic(_copies(random, min(at_once, resamples - done), count)[:, group])
            for done in range(0, resamples, at_once)
        ]
    )
    defined = figures[~np.isnan(figures)]
    if len(defined) < _DEFINED * len(figures) or np.allclose(defined, value, rtol=1e-9, atol=1e-12):
        return Estimate(value, None, None, count)
    low, high = np.percentile(defined, [100 * tail, 100 * (1 - tail)])
    return Estimate(value, float(low), float(high), count)


def mean_of(values: np.ndarray) -> Statistic:
    """The mean of the drawn rows' values `(N,)`, for `bootstrap`."""
    return ratio_of(values, np.ones(len(values)))


def ratio_of(numerator: np.ndarray, denominator: np.ndarray) -> Statistic:
    """The drawn rows' sum of one value `(N,)` over their sum of another, for `bootstrap`. NaN for 0/0.

    Example:
        >>> ratio_of(np.array([1.0, 4.0]), np.array([2.0, 1.0]))(np.array([[1, 1], [2, 0]]))
        array([1.66666667, 0.5       ])
    """

    def ratio(copies: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            return (copies @ numerator) / (copies @ denominator)

    return ratio


def _copies(random: np.random.Generator, resamples: int, count: int) -> np.ndarray:
    """`(resamples, count)`, how often each of `count` groups is drawn."""
    drawn = random.integers(count, size=(resamples, count))
    places = drawn + count * np.arange(resamples)[:, None]
    return np.bincount(places.ravel(), minlength=resamples * count).reshape(resamples, count).astype(float)
