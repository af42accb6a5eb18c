"""Estimates with 95% intervals: bootstrap over prompts, Wilson for shares, Student's t over seeds."""

from collections.abc import Sequence

import numpy as np
from scipy import stats

from trl_ulma.bootstrap import CONFIDENCE, Estimate, bootstrap, mean_of, ratio_of

__all__ = ["Estimate", "bootstrap", "mean_of", "over_seeds", "ratio_of", "wilson"]


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


def shown(estimate: Estimate | None, form: str = ".3f") -> str:
    """A figure with its interval.

    Example:
        >>> shown(Estimate(0.5, 0.4, 0.6, 100)), shown(Estimate(2.0, None, None, 1), ".1f"), shown(None)
        ('0.500 [0.400, 0.600]', '2.0', '–')
    """
    if estimate is None:
        return "–"
    if estimate.low is None or estimate.high is None:
        return format(estimate.value, form)
    return f"{estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"
