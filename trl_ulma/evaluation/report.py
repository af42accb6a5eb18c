"""One folder with all that was found: `report.json`, `report.md` and the pictures."""

import json
import platform
import subprocess  # nosec B404
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from trl_ulma.evaluation.figures import save
from trl_ulma.evaluation.intervals import Estimate, over_seeds
from trl_ulma.evaluation.judging import is_above_chance

_LIBRARIES = (
    *("trl-ulma", "trl", "transformers", "torch", "peft", "datasets"),
    *("numpy", "scipy", "openai", "matplotlib"),
)


def versions() -> dict[str, str]:
    """Of Python and of the libraries that the numbers depend on."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in _LIBRARIES}}


def commit() -> str | None:
    """The commit of the package's checkout, with "+" where files differ from it; None where it is installed."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        found = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True)  # nosec B603 B607
        return found.stdout.strip()

    try:
        # Site-packages can lie in somebody else's checkout
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def write(folder: Path, facts: dict[str, Any], pictures: Mapping[str, Figure]) -> None:
    """Write `report.json`, `report.md` and the pictures into a folder; their names are added to the facts.

    Raises:
        ValueError: for a number that is not finite, which JSON does not have.
    """
    facts["pictures"] = list(pictures)
    for name, picture in pictures.items():
        save(picture, folder, name)
    text = json.dumps(facts, indent=2, ensure_ascii=False, allow_nan=False, default=_plain)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    (folder / "report.md").write_text(markdown(facts), encoding="utf-8")


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return str(value)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    r"""A table of Markdown; the first column is text, the others are numbers.

    Example:
        >>> print(table(["model", "AUC"], [["a|b", "0.9"]]))
        | model | AUC |
        | :-- | --: |
        | a\|b | 0.9 |
    """
    rule = [":--", *["--:"] * (len(header) - 1)]
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (header, *rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (cells[0], rule, *cells[1:]))


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


def markdown(facts: Mapping[str, Any]) -> str:
    """The tables of a report.

    Args:
        facts: what `report.json` holds, with its `Estimate`s.
    """
    data = facts["data"]
    said = (
        f"{data['rows']:,} rows of {data['prompts']:,} prompts from {data['dataset']} ({data['split']}), of which "
        f"{data['demonstrations']:,} are demonstrations. In brackets are 95 % intervals: bootstrap over prompts, for "
        "shares Wilson's, over seeds Student's t."
    )
    models = facts["models"]
    parts = ["# Evaluation", said]
    if facts["notes"]:
        parts.append("\n".join(f"- {note}" for note in facts["notes"]))
    parts += _figures("Perplexity of the given answers (lower is better)", models, "perplexity", ".2f")
    parts += _figures("Implicit reward", models, "implicit_reward", ".3f")
    for judge in facts["judges"]:
        parts += _judged(facts, judge)
    parts += _over_seeds(facts["over_seeds"])
    parts += ["## Pictures", *(f"![{name}]({name}.png)" for name in facts["pictures"])]
    settings = json.dumps(facts["settings"], ensure_ascii=False, default=_plain)
    named = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    parts += ["## How", f"Settings: `{settings}`", f"Versions: {named}; commit {facts['commit'] or 'unknown'}."]
    return "\n\n".join(parts) + "\n"


def _figures(title: str, models: Sequence[Mapping[str, Any]], section: str, form: str) -> list[str]:
    columns = list(dict.fromkeys(name for model in models for name in model[section]))
    if not columns:
        return []
    rows = [[model["name"], *(shown(model[section].get(name), form) for name in columns)] for model in models]
    return [f"## {title}", table(["model", *columns], rows)]


def _judged(facts: Mapping[str, Any], judge: Mapping[str, Any]) -> list[str]:
    name, criterion = judge["judge"], judge["criterion"]
    rows = []
    for model in facts["models"]:
        found = model["judged"].get(name, {}).get(criterion)
        if found is not None:
            shares = [shown(found["rates"].get(verdict), ".1%") for verdict in ("win", "tie", "lose", "win_or_tie")]
            rows.append([model["name"], *shares, str(found["counts"]["unparsable"])])
    parts = [
        f"## {criterion.capitalize()}: answers against the data's chosen ones, judged by {name}",
        table(["model", "win", "tie", "lose", "win or tie", "unparsable"], rows),
        _agreement_said(judge["agreement"]),
    ]
    gained = [each for each in facts["differences"] if (each["judge"], each["criterion"]) == (name, criterion)]
    if gained:
        lines = [[f"{each['one']} − {each['other']}", shown(each["points"], "+.3f")] for each in gained]
        parts.append(table(["points (win 1, tie ½), paired by prompt", "difference"], lines))
    return parts


def _agreement_said(agreement: Estimate | None) -> str:
    if agreement is None:
        return (
            "The judge's agreement with known labels could not be measured (no prompt has both a good and a bad "
            "answer, or no verdict could be parsed): no ranking is claimed."
        )
    said = (
        f"On {agreement.n} of the data's own good and bad answers, the judge agrees with the labels by "
        f"{shown(agreement, '.1%')}, a tie counted half"
    )
    return said + ("." if is_above_chance(agreement) else ", which is not above chance: no ranking is claimed.")


def over_runs(names: Sequence[str], models: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Estimate]]:
    """Name → figure → mean over the runs of that name, of names with several runs and figures that all of them have.

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


def _over_seeds(found: Mapping[str, Mapping[str, Estimate]]) -> list[str]:
    rows = [
        [f"{name}: {figure}", shown(estimate), str(estimate.n)]
        for name, of in found.items()
        for figure, estimate in of.items()
    ]
    return ["## Over seeds", table(["", "mean", "runs"], rows)] if rows else []
