"""Stored records of cells, grouped into runs that differ in their seed alone, and figures of such groups."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from grid import SWEEPS

from trl_ulma.evaluation.intervals import Estimate, bootstrap, mean_of, over_seeds, ratio_of, wilson
from trl_ulma.evaluation.judges import Verdict
from trl_ulma.evaluation.rates import POINTS

ENOUGH_ROWS, ENOUGH_PROMPTS = 400, 200
# What a verdict counts for, of each share that is shown
SHARES: dict[str, Mapping[Verdict, float]] = {
    "win": {Verdict.WIN: 1.0, Verdict.TIE: 0.0, Verdict.LOSE: 0.0},
    "tie": {Verdict.WIN: 0.0, Verdict.TIE: 1.0, Verdict.LOSE: 0.0},
    "lose": {Verdict.WIN: 0.0, Verdict.TIE: 0.0, Verdict.LOSE: 1.0},
    "win or tie": {Verdict.WIN: 1.0, Verdict.TIE: 1.0, Verdict.LOSE: 0.0},
    "points": POINTS,
}
# A held-out row of a fold
Unit = tuple[int, int]


@dataclass(frozen=True)
class Group:
    """The runs of a method on a dataset that differ in their seed alone.

    Attributes:
        title: of the method.
        runs: seed → record.
    """

    title: str
    runs: Mapping[int, dict[str, Any]]

    @property
    def first(self) -> dict[str, Any]:
        """One of the runs' records, for what all have in common."""
        return next(iter(self.runs.values()))

    def only(self, seed: int) -> "Group":
        """One seed's run alone."""
        return replace(self, runs={seed: self.runs[seed]})

    def over_seeds(self, figure: Callable[[dict[str, Any]], Estimate | None]) -> Estimate | None:
        """A figure's mean over seeds with the wider ends of two intervals: Student's t over seeds and that over
        prompts, of which the runs' own ends are averaged; of a single run with the run's own."""
        found = [each for each in map(figure, self.runs.values()) if each is not None]
        if len(found) < len(self.runs):
            return None
        if len(found) == 1:
            return found[0]
        of_seeds = over_seeds([each.value for each in found])
        ends = [(each.low, each.high) for each in found if each.low is not None and each.high is not None]
        if len(ends) < len(found) or of_seeds.low is None or of_seeds.high is None:
            return replace(of_seeds, low=None, high=None)
        low, high = np.mean(ends, axis=0)
        return replace(of_seeds, low=min(of_seeds.low, float(low)), high=max(of_seeds.high, float(high)))

    def points(self, judge: str, worth: Mapping[Verdict, float]) -> dict[Unit, float]:
        """Held-out prompt → what its verdicts are worth, the mean over seeds; without those that cannot be parsed."""
        found: dict[Unit, list[float]] = {}
        for run in self.runs.values():
            fold = run["settings"]["rows"]["fold"] or 0
            verdicts = run["judged"].get(judge, {"verdicts": []})["verdicts"]
            for answer, verdict in zip(run["measured"]["answers"], verdicts, strict=False):
                if verdict in worth:
                    found.setdefault((fold, answer["row"]), []).append(worth[Verdict(verdict)])
        return {unit: float(np.mean(values)) for unit, values in found.items()}

    def share(self, judge: str, name: str) -> Estimate | None:
        """A share of the verdicts, over seeds."""
        found = self.over_seeds(lambda run: _share(run, judge, SHARES[name]))
        if found is None or found.low is None or found.high is None:
            return found
        # Student's t knows no bounds
        return replace(found, low=max(found.low, 0.0), high=min(found.high, 1.0))

    def demonstrations(self) -> dict[Unit, tuple[float, int, int]]:
        """Held-out demonstration → (log π, the mean over seeds; tokens; the prompt's number)."""
        found: dict[Unit, tuple[list[float], int, int]] = {}
        for run in self.runs.values():
            fold, measured = run["settings"]["rows"]["fold"] or 0, run["measured"]
            columns = (measured[name] for name in ("logps", "tokens", "prompt", "demonstration"))
            for row, (logp, tokens, prompt, is_demonstration) in enumerate(zip(*columns, strict=True)):
                if is_demonstration:
                    found.setdefault((fold, row), ([], tokens, prompt))[0].append(logp)
        return {unit: (float(np.mean(logps)), tokens, prompt) for unit, (logps, tokens, prompt) in found.items()}

    def too_few(self) -> str | None:
        """Why nothing can be concluded from these runs."""
        rows = self.first["rows"]["train_rows"]
        prompts = {(fold, prompt) for (fold, _), (_, _, prompt) in self.demonstrations().items()}
        if rows < ENOUGH_ROWS:
            return f"{rows} training rows, where {ENOUGH_ROWS} are needed"
        if len(prompts) < ENOUGH_PROMPTS:
            return f"{len(prompts)} held-out prompts, where {ENOUGH_PROMPTS} are needed"
        return None


def _share(run: Mapping[str, Any], judge: str, worth: Mapping[Verdict, float]) -> Estimate | None:
    verdicts = run["judged"].get(judge, {"verdicts": []})["verdicts"]
    values = [worth[Verdict(verdict)] for verdict in verdicts if verdict in worth]
    return wilson(round(sum(values)), len(values)) if values else None


def read(folder: Path) -> list[dict[str, Any]]:
    """The records in a run's folder, in the order of their names.

    Raises:
        FileNotFoundError: where there is none.
    """
    files = sorted((folder / "records").rglob("*.json"))
    if not files:
        raise FileNotFoundError(f"There is no record in {folder / 'records'}. Run reproduce.py with --output {folder}.")
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def groups(records: Iterable[dict[str, Any]], **wanted: Any) -> dict[str, Group]:
    """Method → its runs, of the records whose cells are as wanted, in the order of the methods' names in the grid.

    Example:
        >>> cell = {"scale": "small", "data": "hh", "method": "ulma", "seed": 1, "beta": None, "quality": None}
        >>> found = groups([{"cell": cell, "settings": {"title": "ULMA"}}], data="hh", beta=None)
        >>> found["ulma"].title, list(found["ulma"].runs)
        ('ULMA', [1])
    """
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for record in records:
        cell = record["cell"]
        if all(cell.get(name) == value for name, value in wanted.items()):
            found.setdefault(cell["method"], {})[cell["seed"]] = record
    return {
        method: Group(next(iter(runs.values()))["settings"]["title"], dict(sorted(runs.items())))
        for method, runs in found.items()
    }


def swept(records: Sequence[dict[str, Any]], data: str, varied: str) -> dict[float, dict[str, Group]]:
    """The points of a sweep on a dataset: value → method → its runs.

    The runs that are in no sweep are a point, too, where they stand in this one.
    """
    alone: dict[str, Any] = {"data": data, **dict.fromkeys(SWEEPS)}
    values = {record["cell"].get(varied) for record in records if record["cell"]["data"] == data} - {None}
    at = {value: groups(records, **(alone | {varied: value})) for value in values}
    methods = {method: group for found in at.values() for method, group in found.items()}
    for method, group in groups(records, **alone).items():
        if method in methods and (own := _own_value(group, varied, methods[method])) is not None:
            at.setdefault(own, {}).setdefault(method, group)
    return dict(sorted(at.items()))


def _own_value(group: Group, varied: str, swept: Group) -> float | None:
    """Where runs that are in no sweep stand in one; None where that is nowhere."""
    first = group.first
    if varied == "quality":
        # Their demonstrations are all good; prompts without an ordinary one are not left out of them
        return 1.0 if first["rows"]["left_out"] == swept.first["rows"]["left_out"] else None
    if varied == "beta":
        return first["settings"]["beta"]
    if varied == "learning_rate":
        return float(first["settings"]["stages"][-1]["options"]["learning_rate"])
    return first["rows"]["train_rows"]


def estimate(stored: Mapping[str, Any] | None) -> Estimate | None:
    """An `Estimate` as it was stored."""
    return None if stored is None else Estimate(**stored)


def gained(judge: str, better: Sequence[Group], worse: Sequence[Group]) -> Estimate | None:
    """How many more points (1 a win, ½ a tie) answers of `better` get than those of `worse`, paired by prompt.

    Points are summed over the groups of either side, of one for a difference, of two for a difference of differences;
    each is the mean over seeds. None without a common prompt. The interval is that of `_of_both`.
    """
    return _of_both(_gained_over_prompts, better, worse, judge)


def log_perplexity_saved(better: Sequence[Group], worse: Sequence[Group]) -> Estimate | None:
    """ln of the perplexity of `worse` over that of `better`, on held-out demonstrations: above 0 where this is lower.

    Logarithms are summed over the groups of either side, as in `gained`, of log-probabilities that are means over
    seeds. None without common rows. The interval is that of `_of_both`.
    """
    return _of_both(_saved_over_prompts, better, worse)


def _of_both(
    measured: Callable[..., Estimate | None], better: Sequence[Group], worse: Sequence[Group], *more: Any
) -> Estimate | None:
    """A difference with the wider ends of two intervals: the bootstrap's over prompts of the means over seeds, and
    Student's t of the differences of the seeds that all groups have. Where that is one seed, the first alone."""
    found = measured(better, worse, *more)
    seeds = set.intersection(*(set(group.runs) for group in (*better, *worse)))
    if found is None or found.low is None or found.high is None or len(seeds) < 2:
        return found
    each = [measured(*([group.only(seed) for group in side] for side in (better, worse)), *more) for seed in seeds]
    seen = over_seeds([one.value for one in each if one is not None])
    if seen.low is None or seen.high is None:
        return found
    # About the same value: other rows can be common to the groups of one seed than to all of them
    return replace(
        found,
        low=min(found.low, found.value + seen.low - seen.value),
        high=max(found.high, found.value + seen.high - seen.value),
    )


def _gained_over_prompts(better: Sequence[Group], worse: Sequence[Group], judge: str) -> Estimate | None:
    points = [group.points(judge, POINTS) for group in (*better, *worse)]
    sign = np.repeat([1.0, -1.0], [len(better), len(worse)])
    common = [unit for unit in points[0] if all(unit in each for each in points)]
    if not common:
        return None
    values = np.array([[each[unit] for each in points] for unit in common]) @ sign
    return bootstrap(mean_of(values), np.arange(len(values)), 0)


def _saved_over_prompts(better: Sequence[Group], worse: Sequence[Group]) -> Estimate | None:
    found = [group.demonstrations() for group in (*better, *worse)]
    sign = np.repeat([1.0, -1.0], [len(better), len(worse)])
    common = [unit for unit in found[0] if all(unit in each for each in found)]
    if not common:
        return None
    saved = np.array([[each[unit][0] for each in found] for unit in common]) @ sign
    tokens = np.array([found[0][unit][1] for unit in common])
    prompts = [(unit[0], found[0][unit][2]) for unit in common]
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    of_prompt = np.array([number[prompt] for prompt in prompts])
    return bootstrap(ratio_of(saved, tokens), of_prompt, 0)


def judges_of(found: Mapping[str, Group]) -> Sequence[str]:
    """The judges that have judged a run of these methods."""
    return sorted({judge for group in found.values() for run in group.runs.values() for judge in run["judged"]})
