"""Writes the report folder (`report.json`, `report.md`, `report.html` and pictures), and the text for a terminal."""

import json
import platform
import subprocess  # nosec B404
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from trl_ulma.data.sheet_rows import named_rows
from trl_ulma.evaluation.conclusions import are_alone, conclusions, of_prompts, what_next
from trl_ulma.evaluation.document import (
    Bullets,
    Code,
    Details,
    Heading,
    Part,
    Picture,
    Quote,
    Table,
    Text,
    table,
    to_html,
    to_markdown,
    to_text,
)
from trl_ulma.evaluation.figures import save
from trl_ulma.evaluation.intervals import shown
from trl_ulma.evaluation.pictures import ENOUGH, Drawing
from trl_ulma.evaluation.report_judges import judged_section, more_of_judge
from trl_ulma.evaluation.report_seeds import seeds_section
from trl_ulma.labels.report import counted
from trl_ulma.predictions import AS_THE_MEAN, TOO_CLOSE, too_close
from trl_ulma.rows.dropped import reasons_in_words

__all__ = ["commit", "conclusions", "document", "in_terminal", "shown", "table", "versions", "write"]

_LIBRARIES = (
    *("trl-ulma", "trl", "transformers", "torch", "peft", "datasets"),
    *("numpy", "scipy", "openai", "matplotlib"),
)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that affect the numbers."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in _LIBRARIES}}


def commit() -> str | None:
    """Return the commit of the package's checkout, with "+" if files differ from it; None if it is installed."""
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


def write(folder: Path, facts: dict[str, Any], pictures: Mapping[str, Drawing]) -> None:
    """Write `report.json`, `report.md`, `report.html` and the pictures, whose names and texts are added to the facts.

    Raises:
        ValueError: if a number is not finite, because JSON cannot hold it.
    """
    facts["pictures"] = list(pictures)
    facts["picture_texts"] = {
        name: {"caption": picture.caption, "alternative": picture.alternative} for name, picture in pictures.items()
    }
    for name, picture in pictures.items():
        save(picture.draw(), folder, name)
        save(picture.draw(dark=True), folder, f"{name}-dark")
    text = json.dumps(facts, indent=2, ensure_ascii=False, allow_nan=False, default=_plain)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    parts = document(facts)
    (folder / "report.md").write_text(to_markdown(parts), encoding="utf-8")
    (folder / "report.html").write_text(to_html(parts, folder), encoding="utf-8")


def in_terminal(facts: Mapping[str, Any], width: int = 80) -> str:
    """Return the report as text for a terminal.

    It has the conclusions, what to do next, the main figures and the judged answers. All else is in `report.html`.
    Notes are left out, because they were printed when they came up.
    """
    return to_text(document(facts, is_short=True), width)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return str(value)


def document(facts: Mapping[str, Any], *, is_short: bool = False) -> list[Part]:
    """The parts of the report: conclusions first, then the main figures, then closed sections with all else.

    Args:
        facts: the contents of `report.json`, with `Estimate`s.
        is_short: whether the parts are left out that `in_terminal` does not show.
    """
    data, models = facts["data"], facts["models"]
    # A model before training has the reward 0 for every answer
    trained = [model for model in models if not model.get("is_base")]
    sentences = conclusions(facts)
    parts: list[Part] = [Text(sentence, strong=True) for sentence in sentences]
    if advice := what_next(facts):
        parts.append(Text(advice))
    rows, is_special = _which_rows(data, models)
    if is_short:
        # The conclusion says how many rows there are
        parts += [Text(rows)] if is_special or not sentences else []
    else:
        parts.insert(0, Heading(f"Evaluation of {', '.join(model['name'] for model in trained)}", 1))
        parts += [Bullets(facts["notes"])] if facts["notes"] else []
        parts += [Heading("Main figures"), Text(rows)]
    parts += _main_figures(models, data)
    parts += [] if is_short else [Details("What the figures mean", [Bullets(_meanings(facts))])]
    parts += [
        Text(too_close(_called(model, models), shown(model["own_scale"]["slope"], ".1f")))
        for model in trained
        if _is_too_close(model.get("own_scale"))
    ]
    for judge in facts["judges"]:
        parts += judged_section(facts, judge)
    parts += seeds_section(facts["over_seeds"])
    if is_short:
        return parts
    first, others = _pictures(facts)
    details = [
        *([Details("More pictures" if first else "Pictures", others)] if others else []),
        *(part for model in models for part in _surprises(model, facts)),
        *(part for model in models for part in _changed(model, models)),
        *_figures("More figures: rewards and labels", [*models, *_by_length(models)], "implicit_reward", ".3f"),
        *_figures(
            "More figures: perplexity of the given answers",
            models,
            "perplexity",
            ".2f",
            names={} if data["demonstrations"] else _ALL_ANSWERS,
        ),
        *_split(trained, data),
        *_own_scale(trained, facts),
        *_calibration(trained),
        *(part for judge in facts["judges"] for part in more_of_judge(facts, judge)),
        *_reading(facts),
        Details("Settings and versions", _settings(facts)),
    ]
    return [*parts, *first, *details]


def _called(model: Mapping[str, Any], models: Sequence[Mapping[str, Any]]) -> str:
    """What sentences call a trained model."""
    return "the model" if are_alone(models) else model["name"]


def _rows_in_words(facts: Mapping[str, Any]) -> str:
    """What sentences call the evaluated rows: held-out ones if no model was trained on any of their prompts."""
    trained = [model for model in facts["models"] if not model.get("is_base")]
    are_new = bool(trained) and all(model.get("trained_on") == 0 for model in trained)
    return "held-out rows" if are_new else "evaluated rows"


def _which_rows(data: Mapping[str, Any], models: Sequence[Mapping[str, Any]]) -> tuple[str, bool]:
    """A sentence on how many rows are evaluated, and how many are left out or demonstrations; and whether any are."""
    left_out = [f"{count:,} left out" for count in [sum(data.get("left_out", {}).values())] if count]
    left_out += [f"{model['left_out']:,} left out for {model['name']}" for model in models if model.get("left_out")]
    said = (
        f"{of_prompts(data['rows'], data['prompts'])} from {data['dataset']} ({data['split']})"
        + (f", {data['demonstrations']:,} of them demonstrations" if data["demonstrations"] else "")
        + "".join(f", {each}" for each in left_out)
        + ". Brackets hold 95% intervals."
    )
    return said, bool(left_out or data["demonstrations"])


# Main figure of rewards → its column
_MAIN = {"auc": "AUC (0.5 by chance)", "accuracy": "accuracy", "spearman": "Spearman (0 by chance)"}
_ALL_ANSWERS = {"other answers": "all answers"}


def _main_figures(models: Sequence[Mapping[str, Any]], data: Mapping[str, Any]) -> list[Part]:
    """The table that a reader needs first: one row per model, and one for ranking answers by their length."""
    lines = [*models, *_by_length(models)]
    names = [name for name in _MAIN if any(name in line["implicit_reward"] for line in lines)]
    columns = {_MAIN[name]: [shown(line["implicit_reward"].get(name)) for line in lines] for name in names}
    if any(line.get("own_scale") for line in lines):
        columns["mean error"] = [shown((line.get("own_scale") or {}).get("error"), ".2f") for line in lines]
    answers = dict.fromkeys(name for model in models for name in model["perplexity"])
    for name in ["demonstrations"] if data["demonstrations"] else [] if names else answers:
        title = name if data["demonstrations"] else _ALL_ANSWERS.get(name, name)
        columns[f"perplexity of {title}"] = [shown(line.get("perplexity", {}).get(name), ".2f") for line in lines]
    if not columns:
        return []
    rows = zip([line["name"] for line in lines], *columns.values(), strict=True)
    return [Table(["model", *columns], [list(row) for row in rows])]


def _reading(facts: Mapping[str, Any]) -> list[Details]:
    """How rows were read, and which were left out and why, of the data and for each model."""
    data, found = facts["data"], []
    if facts.get("how_read"):
        found.append(Bullets(facts["how_read"]))
    if data.get("left_out"):
        found.append(Text(_left_out_in_words(data["left_out"])))
    if data.get("invalid_rows"):
        found.append(Bullets(data["invalid_rows"]))
    for model in facts["models"]:
        if model.get("left_out"):
            which = f"The first: {'; '.join(model['left_out_rows'])}."
            found.append(Text(f"{model['name']}: {_left_out_in_words(model['left_out_reasons'])} {which}"))
    return [Details("How the rows were read", found)] if found else []


def _left_out_in_words(counts: Mapping[str, int]) -> str:
    total = sum(counts.values())
    return f"{counted(total, 'row')} {'was' if total == 1 else 'were'} left out. {reasons_in_words(Counter(counts))}"


def _settings(facts: Mapping[str, Any]) -> list[Part]:
    """The command that makes the report again, and the versions."""
    named = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    commit = f"; commit {facts['commit']}" if facts["commit"] else ""
    parts: list[Part] = []
    if facts.get("command"):
        parts += [Text("This command makes the report again:"), Code(facts["command"])]
    return [*parts, Text(f"Versions: {named}{commit}."), Text("`report.json` has all settings and figures.")]


def _figures(
    title: str,
    models: Sequence[Mapping[str, Any]],
    section: str,
    form: str,
    *,
    names: Mapping[str, str] | None = None,
) -> list[Details]:
    columns: list[str] = list(dict.fromkeys(name for model in models for name in model.get(section, {})))
    if not columns:
        return []
    rows = [[model["name"], *(shown(model[section].get(name), form) for name in columns)] for model in models]
    header = ["model", *((names or {}).get(name, name) for name in columns)]
    return [Details(title, [Table(header, rows)])]


_REWARD = (
    "Reward: how much more likely the model makes an answer than its reference does, usually the model before training."
)
# Figure of rewards → description, with the value if rewards and labels are independent
_MEANINGS = {
    "auc": "AUC: how often a good answer has a higher reward than a bad one (0.5 by chance).",
    "accuracy": "Accuracy: how often a reward has the sign of its label.",
    "brier": "Brier: mean squared error of the predicted probability (0 is best, 0.25 without a prediction).",
    "spearman": "Spearman: how well the order of the rewards agrees with that of the labels (1: the same order, 0 by "
    "chance, -1: the opposite order). Pearson: the same for their values instead of their order.",
    "mse": "MSE: mean squared error of the reward as a prediction of the label that was learned (0 is best).",
}


# The name of the row that ranks answers by their length
_LENGTH = "length alone"


def _meanings(facts: Mapping[str, Any]) -> list[str]:
    """Explanations of the figures, and what is not drawn."""
    models = facts["models"]
    there = {name for model in models for name in model["implicit_reward"]}
    said = [_REWARD] if there else []
    said += [meaning for name, meaning in _MEANINGS.items() if name in there]
    if any(model.get("own_scale") for model in models):
        said.append("Mean error: how far predicted labels are from the given ones on average, in units of the labels.")
    if any(model.get("length_alone") for model in models):
        said.append(
            f"{_LENGTH.capitalize()}: the figures if answers are ranked by their number of tokens, longest first. A "
            "negative correlation means that shorter answers have better labels. A model should be further from chance "
            "than length, in either direction."
        )
    if any(model.get("is_base") for model in models):
        said.append("A model before training has the reward 0 for every answer, which ranks nothing.")
    if any(model["perplexity"] for model in models):
        said.append("Perplexity: lower is better for answers to be imitated.")
    if any(model.get("split") for model in models):
        center = _center_in_words(facts["data"])
        side = "below" if facts["data"].get("is_reversed") else "above"
        is_good = "of ½ or above" if center is None else f"at or {side} {center[0]} ({center[1]})"
        said.append(
            f"Good and bad: a label {is_good} is good. A reward tells both apart if it is on the side of the label."
        )
    methods = ["bootstrap over prompts"]
    methods += ["Wilson for shares"] if facts["judges"] else []
    methods += ["Student's t over seeds"] if facts["over_seeds"] else []
    said.append(f"Brackets: 95% intervals ({', '.join(methods)}).")
    if facts["not_drawn"]:
        said.append(f"Pictures that need more data: {'; '.join(facts['not_drawn'])}.")
    return said


def _by_length(models: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the table that rank answers by their length: one, unless tokenizers differ."""
    found: list[dict[str, Any]] = []
    for model in models:
        figures = model.get("length_alone")
        if figures and all(figures != each["implicit_reward"] for each in found):
            found.append({"name": _LENGTH if not found else f"{_LENGTH}, {model['name']}", "implicit_reward": figures})
    return found


def _center_in_words(data: Mapping[str, Any]) -> tuple[str, str] | None:
    """The label that separates good from bad ratings: which mean it is, and its value. None if labels are binary."""
    if data.get("label_center") is None:
        return None
    whose = "training rows" if data.get("is_training_center", True) else "evaluated rows"
    # What is the mean of the transformed labels is not the mean of the labels
    which = "middle" if "quantile" in (data.get("label_transform") or "") else "mean"
    return f"the {which} label of the {whose}", f"{data['label_center']:g}"


def _split(models: Sequence[Mapping[str, Any]], data: Mapping[str, Any]) -> list[Details]:
    found = [model for model in models if model.get("split")]
    if not found:
        return []
    center = _center_in_words(data)
    higher, lower = ("below", "above") if data.get("is_reversed") else ("above", "below")
    if center is None:
        title, sides = "More figures: rewards of chosen and rejected rows", ("chosen", "rejected")
        which = "Rows with a label of ½ and above are chosen. Accuracy and AUC leave out labels of exactly ½."
    else:
        mean, value = center
        title, sides = f"Rows at or {higher} {mean}, and {lower}", (f"at or {higher}", lower)
        which = f"The mean reward of rows with a label of {value} ({mean}) or {higher}, and of the others."
    names = {"chosen": sides[0], "rejected": sides[1], "margins": "difference", "accuracies": "accuracy, all rows"}
    columns = [name for name in names if any(name in model["split"] for model in found)]
    rows = [[model["name"], *(shown(model["split"].get(name)) for name in columns)] for model in found]
    meaning = (
        "Accuracy is the share of rows whose reward is on the side of their label. A reward between the sides, such "
        "as 0, counts as half. Training logs these figures as rewards/chosen, rejected, margins and accuracies, but "
        "counts a reward between the sides as that of a rejected row."
    )
    known = [
        f"{'' if len(found) == 1 else model['name'] + ': '}The mean accuracy of the training rows in the last quarter "
        f"of the training log is {model['accuracy_in_training']:.3f}."
        for model in found
        if model.get("accuracy_in_training") is not None
    ]
    table = Table(["model", *(names[name] for name in columns)], rows)
    return [Details(title, [Text(which), table, Text(meaning), *map(Text, known)])]


def _is_too_close(scale: Mapping[str, Any] | None) -> bool:
    """Whether predicted labels are too close to one another, even at the lower end of the interval."""
    slope = (scale or {}).get("slope")
    return slope is not None and (slope.low or 0) > TOO_CLOSE


def _why_few_mistakes(scale: Mapping[str, Any] | None, rows: str) -> str:
    """Why the most surprising labels are the extreme ones rather than mistakes; "" if they are not.

    Args:
        scale: the predictions on the scale of the labels.
        rows: what sentences call the rows.
    """
    if _is_too_close(scale):
        return "The predictions are too close to one another"
    if scale and abs(scale["error"].value - scale["error_of_mean"].value) < AS_THE_MEAN * scale["error_of_mean"].value:
        return f"The predictions are hardly better than the mean label of the {rows}"
    return ""


def _own_scale(models: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> list[Details]:
    scales = {model["name"]: model["own_scale"] for model in models if model.get("own_scale")}
    if not scales:
        return []
    labels = list(
        dict.fromkeys((each["label"], each["rows"]) for scale in scales.values() for each in scale["by_label"])
    )
    rows = []
    for label, count in sorted(labels):
        found = [
            next(
                (each["predicted"] for each in scale["by_label"] if (each["label"], each["rows"]) == (label, count)),
                None,
            )
            for scale in scales.values()
        ]
        rows.append([f"{label:g}", str(count), *(shown(each, ".2f") for each in found)])
    errors = [
        [name, shown(scale["error"], ".2f"), shown(scale["error_of_mean"], ".2f")] for name, scale in scales.items()
    ]
    mean = f"the mean label of the {_rows_in_words(facts)}"
    return [
        Details(
            "More figures: predicted labels",
            [
                Text("The mean predicted label of rows with each label. A perfect model predicts the label itself."),
                Table(["label", "rows", *scales], rows),
                Text(f"The mean error of predicted labels, and that of predicting {mean} for every row."),
                Table(["model", "mean error", f"error if every row got {mean}"], errors),
            ],
        )
    ]


def _calibration(models: Sequence[Mapping[str, Any]]) -> list[Details]:
    bins = {}
    for model in models:
        scale = model.get("own_scale")
        bins[model["name"]] = scale["calibration"] if scale else model.get("calibration") or []
    rows_of_a_model = max((sum(each.rows for each in of_model) for of_model in bins.values()), default=0)
    if not any(len(of_model) > 1 for of_model in bins.values()) or rows_of_a_model < ENOUGH["calibration"]:
        return []
    rows = [
        [name, f"{each.predicted:.2f}", f"{each.observed:.2f}", str(each.rows)]
        for name, of_model in bins.items()
        for each in of_model
    ]
    what = "predicted label" if any(model.get("own_scale") for model in models) else "σ(r)"
    text = f"Rows in groups with a similar {what}. A calibrated model predicts the mean label of each group."
    return [
        Details(
            "More figures: calibration",
            [Text(text), Table(["model", f"mean {what}", "mean label of the group", "rows"], rows)],
        )
    ]


# The beginnings of the names of pictures that show best what the model learned, the first one first
_TELLING = ("verdicts", "predicted-labels", "calibration")


def _pictures(facts: Mapping[str, Any]) -> tuple[list[Part], list[Part]]:
    """The picture that shows best what the model learned, if there is one, and the others."""
    texts, names = facts.get("picture_texts", {}), facts["pictures"]
    first = [name for begin in _TELLING for name in names if name.startswith(begin)][:1]
    pictures: dict[str, Part] = {name: Picture(name, **texts.get(name, {})) for name in names}
    return [pictures[name] for name in first], [pictures[name] for name in names if name not in first]


def _surprises(model: Mapping[str, Any], facts: Mapping[str, Any]) -> list[Details]:
    found = model.get("surprises", ())
    if not found:
        return []
    places = named_rows([each["row"] for each in found], [each["file_line"] for each in found])
    rows = [
        [
            place,
            f"{each['label']:g}",
            f"{each['predicted']:.2f}",
            f"{each['predicted_before']:.2f}",
            each["prompt"],
            each["answer"],
        ]
        for place, each in zip(places, found, strict=True)
    ]
    why = _why_few_mistakes(model.get("own_scale"), _rows_in_words(facts))
    said = (
        f"{why}, so these are mostly the labels farthest from the mean. The list does not point to mistakes."
        if why
        else "Check these labels for mistakes first."
    )
    title = "The most surprising labels" + _for(model, facts["models"])
    header = ["row", "label", "predicted", "before training", "prompt", "answer"]
    return [Details(title, [Text(said), Table(header, rows, is_text=True)])]


def _for(model: Mapping[str, Any], models: Sequence[Mapping[str, Any]]) -> str:
    """Whose section it is, for its title; "" if there is only one model."""
    return "" if are_alone(models) else f", for the model {model['name']}"


def _changed(model: Mapping[str, Any], models: Sequence[Mapping[str, Any]]) -> list[Details]:
    found = model.get("changed")
    if not found:
        return []
    before, after = f"Before, by {found['base']}", f"After, by {model['name']}"
    if are_alone(models):
        before, after = "Before training", "After training"
    count = f"{found['others']} of {counted(found['answers'], 'answer')}"
    parts: list[Part] = [Text(f"Training changed {count} of {found['base']}.")]
    for number, each in enumerate(found["examples"], start=1):
        parts += [
            Heading(f"Example {number}", 3),
            Quote("Prompt", each["prompt"]),
            Quote(before, each["before"] or "(no answer)"),
            Quote(after, "(the same)" if each["after"] == each["before"] else each["after"] or "(no answer)"),
            Quote("The data's answer", each["chosen"]),
        ]
    return [Details(f"Answers before and after training{_for(model, models)}: {count} changed", parts)]
