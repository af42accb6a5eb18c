"""The pictures of a report, and what they show in words. A picture is drawn only if there are enough points."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from trl_ulma.evaluation import figures
from trl_ulma.evaluation.conclusions import are_alone
from trl_ulma.evaluation.implicit_reward import CalibrationBin
from trl_ulma.evaluation.intervals import shown
from trl_ulma.labels.report import counted

TRAINING_METRICS = (
    *("loss", "eval_loss", "rewards/margins", "eval_rewards/margins"),
    *("rewards/accuracies", "eval_rewards/auc", "eval_rewards/spearman", "loss/sft"),
)
_MOST_PANELS = 6
# With fewer points, the shape would be due to chance
ENOUGH = {"labels": 20, "training": 3, "calibration": 100, "predicted labels": 20, "verdicts": 20}

# With more distinct labels, the words for their picture are their quartiles
_MOST_LABELS = 12


@dataclass(frozen=True)
class Drawing:
    """A picture of a report.

    Attributes:
        draw: draws it for a light page or, with dark=True, for a dark one.
        caption: one sentence on what to look at.
        alternative: what it shows, in words and numbers, for readers who do not see it.
    """

    draw: Callable[..., Figure]
    caption: str
    alternative: str


def pictures(
    models: Sequence[Mapping[str, Any]], label: np.ndarray, is_demonstration: np.ndarray
) -> tuple[dict[str, Drawing], list[str]]:
    """Return file name (without suffix) → picture, and the pictures that have too few points.

    Args:
        models: facts about each model.
        label: `(N,)` labels in the data.
        is_demonstration: `(N,)` bool.
    """
    found: dict[str, Drawing] = {}
    too_few: list[str] = []

    def add(name: str, kind: str, points: int, unit: str, drawing: Drawing) -> None:
        if points >= ENOUGH[kind]:
            found[name] = drawing
        else:
            too_few.append(f"{kind} ({points} of {ENOUGH[kind]} {unit})")

    called = _legend(models)
    add("labels", "labels", len(label), "rows", _labels(label, is_demonstration))
    history = {called[model["name"]]: training_log(Path(model["source"])) for model in models}
    history = {run: logs for run, logs in history.items() if logs}
    logged = [name for name in TRAINING_METRICS if any(name in log for logs in history.values() for log in logs)]
    if logged:
        points = max(sum(name in log for log in logs) for name in logged for logs in history.values())
        add("training", "training", points, "logged steps", _training(history, logged[:_MOST_PANELS]))
    scales = {called[model["name"]]: model["own_scale"] for model in models if model.get("own_scale")}
    binary = {called[model["name"]]: model["calibration"] for model in models if model.get("calibration")}
    if scales:
        curves = {name: scale["calibration"] for name, scale in scales.items()}
        add("calibration", "calibration", _rows(curves), "rows", _calibration(curves, own_scale=True))
        groups = {name: scale["by_label"] for name, scale in scales.items() if len(scale["by_label"]) > 1}
        if groups:
            points = min(sum(each["rows"] for each in of) for of in groups.values())
            add("predicted-labels", "predicted labels", points, "rows", _predicted(groups, models))
    elif binary:
        add("calibration", "calibration", _rows(binary), "rows", _calibration(binary, own_scale=False))
    judged = [
        (judge, criterion) for model in models for judge in model["judged"] for criterion in model["judged"][judge]
    ]
    for number, (judge, criterion) in enumerate(dict.fromkeys(judged), start=1):
        shares = {
            called[model["name"]]: model["judged"].get(judge, {}).get(criterion, {}).get("rates") for model in models
        }
        shares = {name: each for name, each in shares.items() if each}
        if shares:
            points = max(each["win"].n for each in shares.values())
            add(
                f"verdicts-{number}-{criterion}", "verdicts", points, "comparisons", _verdicts(shares, judge, criterion)
            )
    return found, too_few


def _legend(models: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What pictures call each model: by its name, or if there is only one, as the one before or after training."""
    bases = [model["name"] for model in models if model.get("is_base")]
    if not are_alone(models) or len(bases) > 1:
        return {model["name"]: model["name"] for model in models}
    return {
        model["name"]: "the model before training" if model["name"] in bases else "the model after training"
        for model in models
    }


def _labels(label: np.ndarray, is_demonstration: np.ndarray) -> Drawing:
    parts = [("demonstrations", label[is_demonstration]), ("other rows", label[~is_demonstration])]
    if not is_demonstration.any():
        parts = [("rows", label)]
    told = [f"{len(of):,} {name}: {_distribution(of)}" for name, of in parts if len(of)]
    return Drawing(
        partial(figures.label_histogram, label, is_demonstration),
        "The number of evaluated rows with each label: the figures say little about labels that few rows have.",
        f"Bar chart of the labels. {' '.join(told)}",
    )


def _distribution(label: np.ndarray) -> str:
    values, counts = np.unique(label, return_counts=True)
    if len(values) <= _MOST_LABELS:
        of = (
            f"{counted(int(count), 'row')} with label {value:.6g}" for value, count in zip(values, counts, strict=True)
        )
        return f"{', '.join(of)}."
    low, quarter, middle, three, high = np.quantile(label, [0, 0.25, 0.5, 0.75, 1])
    return f"labels from {low:.6g} to {high:.6g}, half of them from {quarter:.6g} to {three:.6g}, median {middle:.6g}."


def _training(history: Mapping[str, Sequence[Mapping[str, Any]]], metrics: Sequence[str]) -> Drawing:
    told = []
    for metric in metrics:
        for run, logs in history.items():
            points = [(log["step"], log[metric]) for log in logs if metric in log and "step" in log]
            if points:
                (first, start), (last, end) = points[0], points[-1]
                whose = f" of {run}" if len(history) > 1 else ""
                told.append(f"{metric}{whose}: {start:.3g} at step {first}, {end:.3g} at step {last}.")
    held_out = [metric for metric in metrics if metric.startswith("eval_")]
    caption = "What training logged: the loss should fall."
    if held_out:
        caption = (
            "What training logged (eval_: on held-out rows): if only the other figures improve, the model has learned "
            "its training rows by heart."
        )
    return Drawing(
        partial(figures.training_curves, history, metrics), caption, f"Line charts by training step. {' '.join(told)}"
    )


def _calibration(curves: Mapping[str, Sequence[CalibrationBin]], *, own_scale: bool) -> Drawing:
    told = [
        f"{name}: {', '.join(f'{each.predicted:.2f} for {each.observed:.2f}' for each in bins)}."
        for name, bins in curves.items()
    ]
    return Drawing(
        partial(figures.calibration, curves, own_scale=own_scale),
        "Groups of rows with similar predictions: below the gray line predictions are too high on average, and above "
        "it too low.",
        f"Line chart of the mean prediction for the mean label of groups of rows. {' '.join(told)}",
    )


def _predicted(groups: Mapping[str, Sequence[Mapping[str, Any]]], models: Sequence[Mapping[str, Any]]) -> Drawing:
    told = []
    for name, of in groups.items():
        each_label = (f"{shown(each['predicted'], '.2f')} for label {each['label']:.6g}" for each in of)
        told.append(f"{name}: {', '.join(each_label)}.")
    shows = "Predicted labels of rows with each label, beside the gray line of a perfect prediction"
    caption = f"{shows}: the closer a line is to it, the better."
    if any(model.get("is_base") for model in models):
        caption = f"{shows}: training helped where the model's line is closer to it than the line before training."
    if any((model.get("own_scale") or {}).get("knows_raters") for model in models):
        caption = f"{caption[:-1]}; all predictions include how strict the rater of a row is."
    return Drawing(
        partial(figures.predicted_by_label, groups),
        caption,
        f"Line chart of the mean predicted label, with 95% intervals in brackets. {' '.join(told)}",
    )


def _verdicts(shares: Mapping[str, Mapping[str, Any]], judge: str, criterion: str) -> Drawing:
    # The end of a folder's name says more
    name = judge if len(judge) <= 45 else f"…{judge[-44:]}"
    told = [
        f"{model}: {', '.join(f'{each} {of[each].value:.1%}' for each in ('win', 'tie', 'lose'))} of "
        f"{counted(of['win'].n, 'comparison')}."
        for model, of in shares.items()
    ]
    return Drawing(
        partial(figures.win_rates, shares, f"{criterion.capitalize()}: answers against the chosen ones\njudge: {name}"),
        "How often the judge prefers the answer of a model to the chosen answer of the data (win), finds both equally "
        "good (tie), or prefers the chosen one (lose).",
        f"Bar chart of verdicts, {criterion}, judge {judge}. {' '.join(told)}",
    )


def _rows(curves: Mapping[str, Sequence[Any]]) -> int:
    """Return the number of rows of the curve with the fewest."""
    return min(sum(each.rows for each in bins) for bins in curves.values())


def accuracy_in_training(logs: Sequence[Mapping[str, Any]]) -> float | None:
    """The mean of `rewards/accuracies` in the last quarter of the logs of a training. None if it was not logged.

    Example:
        >>> accuracy_in_training([{"rewards/accuracies": each} for each in (0.5, 0.5, 0.6, 0.8)])
        0.8
    """
    found = [float(log["rewards/accuracies"]) for log in logs if log.get("rewards/accuracies") is not None]
    last = found[-max(len(found) // 4, 1) :]
    return sum(last) / len(last) if last else None


def training_log(folder: Path) -> list[dict[str, Any]]:
    """Return the `log_history` of `trainer_state.json` in a folder, or in its last checkpoint.

    Raises:
        ValueError: if transformers did not write the file.
    """
    checkpoints = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda file: file.stat().st_mtime_ns)
    file = folder / "trainer_state.json"
    file = file if file.is_file() else next(reversed(checkpoints), None)
    if file is None:
        return []
    try:
        return list(json.loads(file.read_text(encoding="utf-8"))["log_history"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is no trainer state ({type(error).__name__}: {error}). Delete it.") from error
