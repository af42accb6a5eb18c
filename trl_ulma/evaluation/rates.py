"""Win, tie and lose rates, and the difference between two models."""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from trl_ulma.evaluation.intervals import Estimate, bootstrap, mean_of, wilson
from trl_ulma.evaluation.judges import Verdict

Prompt = TypeVar("Prompt", bound=Hashable)

# A tie counts as half a win
POINTS = {Verdict.WIN: 1.0, Verdict.TIE: 0.5, Verdict.LOSE: 0.0}


def counts(verdicts: Sequence[Verdict]) -> dict[str, int]:
    """Return the number of verdicts of each kind.

    Example:
        >>> counts([Verdict.WIN, Verdict.WIN, Verdict.UNPARSABLE])
        {'win': 2, 'tie': 0, 'lose': 0, 'unparsable': 1, 'cut': 0, 'refused': 0, 'unread': 0}
    """
    found = Counter(verdicts)
    return {verdict.value: found[verdict] for verdict in Verdict}


def rates(verdicts: Sequence[Verdict]) -> dict[str, Estimate]:
    """Return the shares `win`, `tie`, `lose` and `win_or_tie` of the judged comparisons, with Wilson's intervals.

    The result is empty if nothing was judged. Pass one verdict per prompt: verdicts on the same prompt are not
    independent.

    Example:
        >>> found = rates([Verdict.WIN, Verdict.TIE, Verdict.LOSE, Verdict.WIN])
        >>> found["win"].value, found["win_or_tie"].value
        (0.5, 0.75)
    """
    found = counts(verdicts)
    n = found["win"] + found["tie"] + found["lose"]
    if n == 0:
        return {}
    of = {**{name: found[name] for name in ("win", "tie", "lose")}, "win_or_tie": found["win"] + found["tie"]}
    return {name: wilson(count, n) for name, count in of.items()}


def mean_points(verdicts: Sequence[Verdict], *, seed: int = 0) -> Estimate | None:
    """Return the mean points (1 for a win, ½ for a tie, 0 for a loss) with their bootstrap interval.

    None if nothing was judged. If all verdicts are wins or all are losses, the interval is Wilson's. If all are ties,
    there is no interval.

    Example:
        >>> mean_points([Verdict.WIN, Verdict.TIE]).value
        0.75
        >>> round(mean_points([Verdict.WIN, Verdict.WIN]).low, 3)
        0.342
    """
    points = np.array([POINTS[verdict] for verdict in verdicts if verdict in POINTS])
    if not len(points):
        return None
    if (points == points[0]).all() and points[0] != POINTS[Verdict.TIE]:
        return wilson(int(points.sum()), len(points))
    return bootstrap(mean_of(points), np.arange(len(points)), seed)


def difference(
    one: Mapping[Prompt, Verdict], other: Mapping[Prompt, Verdict], *, seed: int = 0, comparisons: int = 1
) -> Estimate | None:
    """Return how many points one model is ahead of another, on prompts where both have a verdict.

    The comparison is paired by prompt, so a prompt that is hard for both does not widen the interval. The interval is a
    bootstrap over prompts.

    Args:
        one, other: prompt → verdict, against the same answers.
        seed: the seed of the bootstrap.
        comparisons: the number of differences whose intervals shall hold together.

    Returns:
        The mean difference in points per prompt (1 for a win, ½ for a tie), or None without a common prompt.

    Example:
        >>> difference({"a": Verdict.WIN, "b": Verdict.TIE}, {"a": Verdict.LOSE, "b": Verdict.TIE}).value
        0.5
    """
    common = [prompt for prompt in one if one[prompt] in POINTS and other.get(prompt) in POINTS]
    if not common:
        return None
    gained = np.array([POINTS[one[prompt]] - POINTS[other[prompt]] for prompt in common])
    return bootstrap(mean_of(gained), np.arange(len(gained)), seed, comparisons)
