"""The pictures of a report. A picture is drawn only if there are enough points."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from trl_ulma.evaluation import figures

TRAINING_METRICS = (
    *("loss", "eval_loss", "rewards/margins", "eval_rewards/margins"),
    *("rewards/accuracies", "eval_rewards/auc", "eval_rewards/spearman", "loss/sft"),
)
_MOST_PANELS = 6
# With fewer points, the shape would be due to chance
ENOUGH = {"labels": 20, "training": 3, "calibration": 100, "predicted labels": 20, "verdicts": 20}

# Draws a picture for a light page or, with dark=True, for a dark one
Drawing = Callable[..., Figure]


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

    def add(name: str, kind: str, points: int, unit: str, draw: Drawing) -> None:
        if points >= ENOUGH[kind]:
            found[name] = draw
        else:
            too_few.append(f"{kind} ({points} of {ENOUGH[kind]} {unit})")

    add("labels", "labels", len(label), "rows", partial(figures.label_histogram, label, is_demonstration))
    history = {model["name"]: training_log(Path(model["source"])) for model in models}
    history = {run: logs for run, logs in history.items() if logs}
    logged = [name for name in TRAINING_METRICS if any(name in log for logs in history.values() for log in logs)]
    if logged:
        points = max(sum(name in log for log in logs) for name in logged for logs in history.values())
        drawn = partial(figures.training_curves, history, logged[:_MOST_PANELS])
        add("training", "training", points, "logged steps", drawn)
    scales = {model["name"]: model["own_scale"] for model in models if model.get("own_scale")}
    binary = {model["name"]: model["calibration"] for model in models if model.get("calibration")}
    if scales:
        curves = {name: scale["calibration"] for name, scale in scales.items()}
        drawn = partial(figures.calibration, curves, own_scale=True)
        add("calibration", "calibration", _rows(curves), "rows", drawn)
        groups = {name: scale["by_label"] for name, scale in scales.items() if len(scale["by_label"]) > 1}
        if groups:
            points = min(sum(each["rows"] for each in of) for of in groups.values())
            drawn = partial(figures.predicted_by_label, groups)
            add("predicted-labels", "predicted labels", points, "rows", drawn)
    elif binary:
        add("calibration", "calibration", _rows(binary), "rows", partial(figures.calibration, binary))
    judged = [
        (judge, criterion) for model in models for judge in model["judged"] for criterion in model["judged"][judge]
    ]
    for number, (judge, criterion) in enumerate(dict.fromkeys(judged), start=1):
        shares = {model["name"]: model["judged"].get(judge, {}).get(criterion, {}).get("rates") for model in models}
        shares = {name: each for name, each in shares.items() if each}
        if shares:
            # The end of a folder's name says more
            name = judge if len(judge) <= 45 else f"…{judge[-44:]}"
            title = f"{criterion.capitalize()}: answers against the chosen ones\njudge: {name}"
            points = max(each["win"].n for each in shares.values())
            drawn = partial(figures.win_rates, shares, title)
            add(f"verdicts-{number}-{criterion}", "verdicts", points, "comparisons", drawn)
    return found, too_few


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
