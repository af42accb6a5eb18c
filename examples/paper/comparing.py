"""What the paper says of its methods, and whether runs agree."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import grid
from records import Group, gained, log_perplexity_saved

from trl_ulma.evaluation.intervals import Estimate
from trl_ulma.evaluation.report import shown, table

MAIN = (
    *("base", "sft", "unlearning", "unlikelihood", "rlhf", "pointwise-rlhf"),
    *("dpo", "pointwise-dpo", "ulma", "authors-code"),
)
# What the paper says: (datasets, better, worse, where)
CLAIMS = (
    *((grid.DATA, "ulma", other, "5.2 (ii)") for other in MAIN if other not in ("ulma", "authors-code")),
    (("hh", "golden-hh"), "dpo", "pointwise-dpo", "5.2 (i)"),
    (("qa-feedback",), "pointwise-dpo", "dpo", "5.2 (i)"),
    (("red-team",), "pointwise-dpo", "sft", "5.2 (i)"),
    (grid.DATA, "sft", "positive-dpo", "ablation (i)"),
    (grid.DATA, "negative-dpo", "unlearning", "ablation (ii)"),
)


def claims(data: str, chosen: Mapping[str, Group], judges: Sequence[str]) -> Iterator[str]:
    """What the paper says of two methods, and what their runs say; with `judges` that can be trusted."""
    rows = []
    for where, better, worse, source in CLAIMS:
        if data not in where or better not in chosen or worse not in chosen:
            continue
        one, other = chosen[better], chosen[worse]
        rows += [
            [f"{one.title} better than {other.title} ({source})", name, shown(found, "+.4f"), verdict(found)]
            for name, measured in _differences(judges).items()
            if (found := measured([one], [other])) is not None
        ]
    if rows:
        yield "What the paper says, paired by prompt and by seed:"
        yield table(["the paper", "measured by", "difference", "here"], rows)


def claims_by_value(
    data: str, label: str, at: Mapping[float, Mapping[str, Group]], judges: Sequence[str]
) -> Iterator[str]:
    """What the paper says of two methods, at each of a sweep's points."""
    lines = []
    for where, better, worse, source in CLAIMS:
        both = {value: (found[better], found[worse]) for value, found in at.items() if {better, worse} <= set(found)}
        if data not in where or not both:
            continue
        one, other = next(iter(both.values()))
        for name, measured in _differences(judges).items():
            differences = [measured([both[value][0]], [both[value][1]]) if value in both else None for value in at]
            if any(differences):
                said = f"{one.title} better than {other.title} ({source})"
                lines.append([said, name, *(shown(each, "+.4f") for each in differences)])
    if lines:
        yield "The same, point by point:"
        yield table([f"the paper, {label} =", "measured by", *(f"{value:g}" for value in at)], lines)


def gains(at: Mapping[float, Mapping[str, Group]], judges: Sequence[str]) -> Iterator[str]:
    """What better demonstrations bring each method, and whether ULMA gains more than others."""
    low, high = at[min(at)], at[max(at)]
    both = [method for method in MAIN if method in low and method in high]
    own, claimed = [], []
    for name, measured in _differences(judges).items():
        own += [[low[m].title, name, shown(measured([high[m]], [low[m]]), "+.4f")] for m in both]
        for method in both if "ulma" in both else ():
            found = None if method == "ulma" else measured([high["ulma"], low[method]], [low["ulma"], high[method]])
            if found is not None:
                said = f"ULMA gains more than {low[method].title} (5.2)"
                claimed.append([said, name, shown(found, "+.4f"), verdict(found)])
    if own:
        yield f"What better demonstrations bring, from a share of {min(at):g} to one of {max(at):g}, paired as above:"
        yield table(["method", "measured by", "gain"], own)
    if claimed:
        yield table(["the paper", "measured by", "difference of the gains", "here"], claimed)


def _differences(judges: Sequence[str]) -> dict[str, Callable[[Sequence[Group], Sequence[Group]], Estimate | None]]:
    """What methods are compared by: measure → its difference between some runs and others."""
    by_judge = {f"points, {judge}": functools.partial(gained, judge) for judge in judges}
    return {"ln perplexity saved": log_perplexity_saved, **by_judge}


def verdict(difference: Estimate) -> str:
    """What a difference says of the paper's ordering.

    Example:
        >>> verdict(Estimate(0.2, 0.1, 0.3, 200)), verdict(Estimate(0.2, -0.1, 0.3, 200))
        ('as in the paper', 'undecided')
    """
    if difference.low is None or difference.high is None:
        return "undecided"
    if difference.low > 0:
        return "as in the paper"
    return "**against the paper**" if difference.high < 0 else "undecided"
