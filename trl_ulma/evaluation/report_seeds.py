"""The figures of runs that differ in their seed, and their section of a report."""

from collections.abc import Mapping, Sequence
from typing import Any

from trl_ulma.bootstrap import Estimate
from trl_ulma.evaluation.document import Heading, Part, Table
from trl_ulma.evaluation.intervals import over_seeds, shown


def over_runs(names: Sequence[str], models: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Estimate]]:
    """Name → figure → mean over runs, for names with several runs and figures that all of them have.

    Args:
        names: `(N,)` of the runs, the same for runs that differ in their seed.
        models: `(N,)` facts of the runs.
    """
    found = {}
    for name in dict.fromkeys(names):
        runs = [_scalars(model) for own, model in zip(names, models, strict=True) if own == name]
        if len(runs) > 1:
            common = [figure for figure in runs[0] if all(figure in run for run in runs)]
            found[name] = {figure: over_seeds([run[figure] for run in runs]) for figure in common}
    return found


def _scalars(model: Mapping[str, Any]) -> dict[str, float]:
    named = {f"perplexity, {name}": each for name, each in model["perplexity"].items()}
    named |= model["implicit_reward"]
    for judge, criteria in model["judged"].items():
        for criterion, found in criteria.items():
            named |= {f"{judge}, {criterion}, {verdict}": each for verdict, each in found["rates"].items()}
    return {name: estimate.value for name, estimate in named.items()}


def seeds_section(found: Mapping[str, Mapping[str, Estimate]]) -> list[Part]:
    """The result of `over_runs` as a table."""
    rows = [
        [f"{name}: {figure}", shown(estimate), str(estimate.n)]
        for name, of in found.items()
        for figure, estimate in of.items()
    ]
    return [Heading("Over seeds"), Table(["", "mean", "runs"], rows)] if rows else []
