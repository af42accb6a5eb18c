"""python examples/paper/tables.py paper-runs [RESULTS.md]

Writes the paper's tables and figures from the records in a run's folder, the same to the last digit each time.
"""

import functools
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grid
from comparing import MAIN, claims, claims_by_value, gains
from records import Group, estimate, groups, judges_of, read, swept

from trl_ulma.evaluation import figures
from trl_ulma.evaluation.intervals import Estimate
from trl_ulma.evaluation.judges import Verdict
from trl_ulma.evaluation.judging import is_above_chance
from trl_ulma.evaluation.rates import POINTS, mean_points
from trl_ulma.evaluation.report import shown, table

TABLES = (
    ("Table 1: preference learning, harmlessness", ("hh", "golden-hh")),
    ("Table 2: preference learning, QA-feedback", ("qa-feedback",)),
    ("Table 4: continuous labels, red-team", ("red-team",)),
)
ABLATION = ("base", "sft", "positive-dpo", "unlearning", "negative-dpo")
FIGURE_1 = "golden-hh"
# What is varied: the paper's figure, if it has one
SWEPT = {"quality": "Figure 2", "beta": "Figure 3", "learning_rate": "Learning rate", "train_rows": "Size"}
INTRODUCTION = """\
The tables compare the methods, and say of each claim of the paper whether it was confirmed. Brackets are 95 %
intervals, the wider ends of two: over prompts (the bootstrap's, for shares Wilson's) and over seeds (Student's t). With
one seed, they are over prompts only. [How they are run](README.md#what-was-found) summarizes what was found; the
commands are [at the end](#how-it-was-measured)."""
DEPARTURES = """\
Departures from the paper: PPO is replaced by REINFORCE leave-one-out (TRL's `RLOOTrainer`), because TRL no longer has
PPO. The paper's judge was GPT-4. All methods begin with the same model, without an SFT stage before. Prompts with a row
that is too long are left out for all methods alike. The numbers of Table 4 and of Figures 2 and 3 are ours."""


def write(folder: Path, file: Path | None = None) -> Path:
    """Write RESULTS.md and the figures (into `figures` beside it), and return its name.

    Raises:
        FileNotFoundError: where the folder holds no record.
    """
    file = folder / "RESULTS.md" if file is None else file
    found = read(folder)
    pictures = file.parent / "figures"
    pictures.mkdir(parents=True, exist_ok=True)
    parts = ["# The paper's experiments", INTRODUCTION]
    for scale in grid.SCALES:
        of_scale = [record for record in found if record["cell"]["scale"] == scale]
        if of_scale:
            parts += [f"## At the {scale} scale", *_Scale(folder, scale, of_scale, pictures).parts()]
    parts += ["## How it was measured", "`tables.py` wrote this page from stored records, by one command:"]
    parts += ["    python examples/paper/tables.py FOLDER RESULTS.md", _how(folder, found), DEPARTURES]
    file.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return file


class _Scale:
    """The tables and figures of one scale."""

    def __init__(self, folder: Path, scale: str, found: Sequence[dict[str, Any]], pictures: Path):
        self.folder, self.scale, self.found, self.pictures = folder, scale, found, pictures

    def parts(self) -> Iterator[str]:
        """The paragraphs, each after its figures are written."""
        for title, data in (*TABLES[:2], ("Table 3: ablation", grid.DATA), *TABLES[2:]):
            methods = ABLATION if title.startswith("Table 3") else MAIN
            for each in data:
                chosen = {m: g for m, g in self.groups(each).items() if m in methods}
                if set(chosen) - {"base"}:
                    yield from self._table(title, each, {m: chosen[m] for m in methods if m in chosen})
        for each in grid.DATA:
            yield from self._verdicts(each)
        for varied in SWEPT:
            for each in grid.DATA:
                if at := swept(self.found, each, varied):
                    yield from self._sweep(each, varied, at)
        for each in grid.DATA:
            yield from self._training(each)

    def groups(self, data: str, **varied: Any) -> dict[str, Group]:
        """The runs on a dataset that are in no sweep, or at one of a sweep's points."""
        return groups(self.found, data=data, **(dict.fromkeys(grid.SWEEPS) | varied))

    def agreement(self, data: str, judge: str) -> Estimate | None:
        """A judge's agreement with the data's labels, of the pairs of all folds."""
        verdicts: list[Verdict] = []
        for file in sorted((self.folder / "agreement" / self.scale).glob(f"{data}*/*.json")):
            told = json.loads(file.read_text(encoding="utf-8"))
            if told["judge"] == judge and re.fullmatch(rf"{data}(-fold-\d+)?", file.parent.name):
                verdicts += map(Verdict, told["verdicts"])
        return mean_points(verdicts)

    def trusted(self, data: str, judges: Sequence[str]) -> list[str]:
        """The judges that agree with the data's labels more than chance would."""
        return [judge for judge in judges if is_above_chance(self.agreement(data, judge))]

    def _table(self, title: str, data: str, chosen: dict[str, Group]) -> Iterator[str]:
        first = next(iter(chosen.values())).first
        yield f"### {title}: {first['settings']['data_title']}"
        continuous = first["settings"]["rows"]["label_type"] == "continuous"
        figures_shown = {"spearman": "Spearman", "mse": "MSE"} if continuous else {"auc": "AUC", "brier": "Brier"}
        judges = judges_of(chosen)
        header = ["method", "seeds", "perplexity", *(f"{name}, implicit reward" for name in figures_shown.values())]
        header += [f"{name}, {judge}" for judge in judges for name in ("win or tie", "win")]
        rows = []
        for group in chosen.values():
            cells = [group.title, str(len(group.runs)), _shown_perplexity(group.over_seeds(_perplexity))]
            cells += [shown(group.over_seeds(functools.partial(_reward, name=name))) for name in figures_shown]
            cells += [shown(group.share(judge, name), ".1%") for judge in judges for name in ("win or tie", "win")]
            rows.append(cells)
        yield table(header, rows)
        yield _rows_said(chosen)
        why = {reason for group in chosen.values() if (reason := group.too_few()) is not None}
        if why:
            yield f"**Inconclusive**: {'; '.join(sorted(why))}. No ranking is claimed."
        for judge in judges:
            yield self._judge_said(data, judge, chosen)
        if not why:
            yield from claims(data, chosen, self.trusted(data, judges))

    def _judge_said(self, data: str, judge: str, chosen: Mapping[str, Group]) -> str:
        agreed = self.agreement(data, judge)
        runs = [run for group in chosen.values() for run in group.runs.values() if judge in run["judged"]]
        verdicts = [verdict for run in runs for verdict in run["judged"][judge]["verdicts"]]
        unjudged = sum(Verdict(verdict) not in POINTS for verdict in verdicts)
        criterion = runs[0]["judged"][judge]["criterion"]
        counted = f" {unjudged} of its {len(verdicts)} comparisons were not judged and are in no share."
        if agreed is None:
            return f"{judge} ({criterion}): its agreement with known labels is not known, so no ranking is claimed." + (
                counted if unjudged else ""
            )
        said = (
            f"{judge} ({criterion}) agrees with the data's own labels on {shown(agreed, '.1%')} of {agreed.n} pairs of "
            "held-out answers, a tie counted half"
        )
        said += "." if is_above_chance(agreed) else ": near chance, so no ranking by it is claimed."
        return said + (counted if unjudged else "")

    def _verdicts(self, data: str) -> Iterator[str]:
        chosen = {method: group for method, group in self.groups(data).items() if method in MAIN}
        name = "Figure 1" if data == FIGURE_1 else "Appendix D"
        for number, judge in enumerate(judges_of(chosen), start=1):
            shares = {
                chosen[method].title: {
                    verdict: chosen[method].share(judge, verdict) for verdict in ("win", "tie", "lose")
                }
                for method in MAIN
                if method in chosen and chosen[method].share(judge, "win") is not None
            }
            if not shares:
                continue
            first = next(iter(chosen.values())).first
            title = f"{first['settings']['criterion'].capitalize()} on {first['settings']['data_title']}, by {judge}"
            file = f"{name.lower().replace(' ', '-')}-{self.scale}-{data}-{number}"
            figures.save(figures.win_rates(shares, title), self.pictures, file)  # type: ignore[arg-type]
            yield f"### {name}: win, tie and lose rates, {first['settings']['data_title']}, {judge}"
            yield f"![{file}](figures/{file}.png)"

    def _sweep(self, data: str, varied: str, at: Mapping[float, Mapping[str, Group]]) -> Iterator[str]:
        label, is_logarithmic = grid.SWEEPS[varied]
        every = {f"{value:g} {method}": group for value, found in at.items() for method, group in found.items()}
        judges = judges_of(every)
        first = next(iter(every.values())).first
        reward, ranks = _ranking(first)
        measures = [
            ("perplexity", ".2f", lambda group: group.over_seeds(_perplexity)),
            (f"{ranks}, implicit reward", ".3f", lambda group: group.over_seeds(reward)),
        ]
        measures += [
            (f"win or tie, {judge}", ".1%", functools.partial(_share, judge=judge, name="win or tie"))
            for judge in judges
        ]
        name, title = SWEPT[varied], first["settings"]["data_title"]
        title = f"{name}: {title}" if name.lower() in label else f"{name}: against {label}, {title}"
        yield f"### {title}"
        for number, (measure, form, measured) in enumerate(measures):
            series: dict[str, dict[float, Estimate]] = {}
            for value, found in at.items():
                for group in found.values():
                    if (point := measured(group)) is not None:
                        series.setdefault(group.title, {})[value] = point
            lines = [[t, *(shown(points.get(value), form) for value in at)] for t, points in series.items()]
            if not lines:
                continue
            yield table([f"{measure}, {label} =", *(f"{value:g}" for value in at)], lines)
            drawn = figures.sweep(series, x_label=label, y_label=measure, title=title, log_x=is_logarithmic)
            file = f"{name.lower().replace(' ', '-')}-{self.scale}-{data}-{number}"
            figures.save(drawn, self.pictures, file)
            yield f"![{file}](figures/{file}.png)"
        yield _seeds_said(at)
        yield _rows_said(every)
        few = [
            f"{group.title} at {value:g}: {reason}"
            for value, found in at.items()
            for group in found.values()
            if (reason := group.too_few())
        ]
        if few:
            yield f"**Inconclusive**, and in no comparison: {'; '.join(few)}."
        for judge in judges:
            yield self._judge_said(data, judge, every)
        trusted = self.trusted(data, judges)
        enough = {value: {m: g for m, g in found.items() if g.too_few() is None} for value, found in at.items()}
        yield from claims_by_value(data, label, enough, trusted)
        if varied == "quality":
            yield from gains(enough, trusted)

    def _training(self, data: str) -> Iterator[str]:
        """The last stage's loss, of the first seed."""
        history = {}
        for group in self.groups(data).values():
            if group.first["trained"]:
                log = group.first["trained"][-1]["log"]
                history[group.title] = [each for each in log if isinstance(each.get("loss"), int | float)]
        history = {title: log for title, log in history.items() if log}
        if history:
            file = f"training-{self.scale}-{data}"
            figures.save(figures.training_curves(history, ["loss"]), self.pictures, file)
            yield f"### Training, {data}, the first seed's last stage (losses of different methods are not comparable)"
            yield f"![{file}](figures/{file}.png)"


def _seeds_said(at: Mapping[float, Mapping[str, Group]]) -> str:
    titles = dict.fromkeys((method, group.title) for found in at.values() for method, group in found.items())
    numbers = {title: [len(found[m].runs) if m in found else 0 for found in at.values()] for m, title in titles}
    if len({each for of_method in numbers.values() for each in of_method}) == 1:
        return f"Seeds of each: {next(iter(numbers.values()))[0]}."
    said = "; ".join(f"{title} {', '.join(map(str, each))}" for title, each in numbers.items())
    return f"Seeds, column by column: {said}."


def _shown_perplexity(found: Estimate | None) -> str:
    """A perplexity. Far beyond the size of a vocabulary, as after unlearning, it says no more than that."""
    return shown(found, ".2f") if found is None or found.value < 1e6 else "> 1,000,000"


def _perplexity(run: Mapping[str, Any]) -> Estimate | None:
    return estimate(run["measured"].get("perplexity"))


def _reward(run: Mapping[str, Any], name: str) -> Estimate | None:
    return estimate(run["measured"].get("implicit_reward", {}).get(name))


def _ranking(run: Mapping[str, Any]) -> tuple[Callable[[Mapping[str, Any]], Estimate | None], str]:
    """How well implicit rewards rank a dataset's answers: the figure of a run, and its name."""
    is_continuous = run["settings"]["rows"]["label_type"] == "continuous"
    key, name = ("spearman", "Spearman") if is_continuous else ("auc", "AUC")
    return functools.partial(_reward, name=key), name


def _share(group: Group, judge: str, name: str) -> Estimate | None:
    return group.share(judge, name)


def _rows_said(chosen: Mapping[str, Group]) -> str:
    rows = [run["rows"] for group in chosen.values() for run in group.runs.values()]
    train, prompts = ({each[name] for each in rows} for name in ("train_rows", "test_prompts"))
    settings = rows[0]["settings"]
    said = f"{_range(train)} training rows, {_range(prompts)} held-out prompts"
    if settings["folds"]:
        said += f", another {settings['folds']}th part of the prompts for each seed"
    said += f". Left out of {rows[0]['answers']:,} answers: "
    reasons = dict.fromkeys(why for each in rows for why in each["left_out"])
    counts = {why: {each["left_out"].get(why, 0) for each in rows} for why in reasons}
    said += "; ".join(f"{_range(count)} because {why}" for why, count in counts.items()) or "none"
    options = ", ".join(f"{name} {value}" for name, value in settings["options"].items())
    return said + (f". Adapter's options: {options}." if options else ".")


def _range(values: set[int]) -> str:
    return f"{min(values):,}" if len(values) == 1 else f"{min(values):,} to {max(values):,}"


def _how(folder: Path, found: Sequence[dict[str, Any]]) -> str:
    models = sorted({Path(record["settings"]["model"]).name for record in found})
    machines = sorted({json.dumps(record["hardware"], sort_keys=True) for record in found})
    versions = sorted({", ".join(f"{k} {v}" for k, v in record["versions"].items()) for record in found})
    commits = sorted({record["commit"] or "unknown" for record in found})
    seconds = sum(
        sum(record["measured"]["seconds"].values()) + sum(stage["seconds"] for stage in record["trained"])
        for record in found
    )
    lines = [
        f"- {len(found)} cells; model: {', '.join(models)}; {seconds / 3600:.1f} h in all",
        f"- hardware: {'; '.join(machines)}",
        f"- versions: {'; '.join(versions)}; commit {', '.join(commits)}",
    ]
    changed = folder / "commands.json"
    if changed.exists():
        lines += [f"- `{command}`" for command in json.loads(changed.read_text(encoding="utf-8"))]
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    try:
        print(write(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) == 3 else None))
    except FileNotFoundError as problem:
        sys.exit(f"error: {problem}")
