"""The pictures of a report, of what there is to draw."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from trl_ulma.evaluation import figures
from trl_ulma.evaluation.held_out import HeldOut

TRAINING_METRICS = (
    *("loss", "eval_loss", "rewards/margins", "eval_rewards/margins"),
    *("rewards/accuracies", "eval_rewards/auc", "eval_rewards/spearman", "loss/sft"),
)
_MOST_PANELS = 6


def pictures(models: Sequence[Mapping[str, Any]], held_out: HeldOut) -> dict[str, Figure]:
    """File name, without suffix → picture: the labels, the runs' training and calibration, each judge's verdicts."""
    found = {"labels": figures.label_histogram(held_out.label, held_out.sft_mask)}
    history = {model["name"]: training_log(Path(model["source"])) for model in models}
    history = {run: logs for run, logs in history.items() if logs}
    logged = [name for name in TRAINING_METRICS if any(name in log for logs in history.values() for log in logs)]
    if logged:
        found["training"] = figures.training_curves(history, logged[:_MOST_PANELS])
    calibrated = {model["name"]: model["calibration"] for model in models if model.get("calibration")}
    if calibrated:
        found["calibration"] = figures.calibration(calibrated)
    judged = [
        (judge, criterion) for model in models for judge in model["judged"] for criterion in model["judged"][judge]
    ]
    for number, (judge, criterion) in enumerate(dict.fromkeys(judged), start=1):
        shares = {model["name"]: model["judged"].get(judge, {}).get(criterion, {}).get("rates") for model in models}
        shares = {name: each for name, each in shares.items() if each}
        if shares:
            # Of a checkpoint's folder the end tells more
            name = judge if len(judge) <= 60 else f"…{judge[-59:]}"
            title = f"{criterion.capitalize()}: answers against the chosen ones\njudge: {name}"
            found[f"verdicts-{number}-{criterion}"] = figures.win_rates(shares, title)
    return found


def training_log(folder: Path) -> list[dict[str, Any]]:
    """The `log_history` of a training's `trainer_state.json`: in the folder, or in the last checkpoint there.

    Raises:
        ValueError: where the file is not what transformers writes.
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
