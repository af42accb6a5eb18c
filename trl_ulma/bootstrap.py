"""Figures with 95% intervals from a bootstrap over prompts, for reports and model cards."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 2000
# Of fewer prompts, the bootstrap gives intervals that are too narrow
ENOUGH_PROMPTS = 30
# A figure can be undefined in a resample, such as an AUC if all drawn answers are good. The others give the interval if
# they are at least this share of all
_DEFINED = 0.95


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
    three cases: there are fewer than two groups; the statistic is undefined (NaN) in more than 5% of the resamples,
    such as an AUC if all drawn answers are good; or all resamples give the same value. In the last case, an interval
    without width would claim too much certainty.

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
    drawn = np.random.default_rng(seed).integers(len(members), size=(RESAMPLES, len(members)))
    figures = np.array(
        [
            statistic(np.concatenate([members[group] for group in chosen]) if table is None else table[chosen].ravel())
            for chosen in drawn
        ],
        float,
    )
    defined = figures[~np.isnan(figures)]
    if len(defined) < _DEFINED * len(figures) or np.allclose(defined, value, rtol=1e-9, atol=1e-12):
        return Estimate(value, None, None, len(members))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.percentile(defined, [100 * tail, 100 * (1 - tail)])
    return Estimate(value, float(low), float(high), len(members))
