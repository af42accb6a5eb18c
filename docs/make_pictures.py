r"""Draw the curves of `docs/metrics.md` from short real runs, each beside one in which a single setting is wrong.

    python docs/make_pictures.py                # all pictures into docs/pictures, minutes of one CPU core
    python docs/make_pictures.py one-class      # one of them

The model is the demo's two-layer GPT-2, after it was taught to write the answers of `trl_ulma/data/everyday.jsonl`. The
rows are from that file, and evaluation is on its test split. The pictures show what the trainer logged, nothing else.

`pictures/report/` is not drawn here. It has screenshots of the report of the quick start, cut at the end of the page:

    chromium --headless --hide-scrollbars --window-size=1000,2400 --screenshot=light.png report.html
    chromium --headless --hide-scrollbars --window-size=1000,2400 --blink-settings=preferredColorScheme=0 \
        --screenshot=dark.png report.html
"""

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from transformers import PrinterCallback, set_seed
from transformers.utils import logging

from trl_ulma import PointwiseDPOConfig, PointwiseDPOTrainer, ULMAConfig, ULMATrainer
from trl_ulma.evaluation.figures import training_curves
from trl_ulma.scripts.demo import load_rows
from trl_ulma.scripts.demo_models import make_tiny

PICTURES = Path(__file__).with_name("pictures")
QUIET = {
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "label_report": False,
    "logging_strategy": "steps",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "seed": 0,
}
RUN = {
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 32,
    "num_train_epochs": 3,
    "learning_rate": 2e-4,
    "logging_steps": 4,
    "eval_strategy": "steps",
    "eval_steps": 8,
    "eval_on_start": True,
}


class Runs:
    """A model that can write the answers, and the trainings that begin from it."""

    def __init__(self, folder: str):
        self.folder = folder
        rows = load_rows()
        self.rows = {split: [row for row in rows if row["split"] == split] for split in ("train", "test")}
        set_seed(0)
        texts = [turn["content"] for row in self.rows["train"] for turn in row["prompt"] + row["completion"]]
        model, self.tokenizer = make_tiny(texts)
        spoken = [{**row, "label": 1.0, "sft_mask": True, "label_type": "binary"} for row in self.rows["train"]]
        settings = {**QUIET, "per_device_train_batch_size": 16, "num_train_epochs": 15, "learning_rate": 3e-3}
        trainer = ULMATrainer(
            model=model,
            args=ULMAConfig(folder, negative_loss="none", lr_scheduler_type="cosine", **settings),
            train_dataset=Dataset.from_list(spoken),
            processing_class=self.tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        self.model = model

    def of(self, kind: str, *, offset: float = 0.0, only: float | None = None) -> dict[str, Dataset]:
        """The rows of a type of label, `offset` added to labels; of the training set those with label `only`."""
        found = {}
        for split, rows in self.rows.items():
            kept = [{**row, "label": row["label"] + offset} for row in rows if row["label_type"] == kind]
            if only is not None and split == "train":
                kept = [row for row in kept if row["label"] == only]
            found[split] = Dataset.from_list(kept)
        return found

    def __call__(self, rows: dict[str, Dataset], **settings: Any) -> list[dict[str, float]]:
        """The logs of a training, those of evaluation included."""
        is_ulma = settings.pop("ulma", False)
        trainer_class, config_class = (
            (ULMATrainer, ULMAConfig) if is_ulma else (PointwiseDPOTrainer, PointwiseDPOConfig)
        )
        if not is_ulma:
            rows = {split: each.remove_columns("sft_mask") for split, each in rows.items()}
        trainer = trainer_class(
            model=copy.deepcopy(self.model),
            ref_model=copy.deepcopy(self.model),
            args=config_class(self.folder, **QUIET, **{**RUN, **settings}),
            train_dataset=rows["train"],
            eval_dataset=rows["test"],
            processing_class=self.tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return trainer.state.log_history


def healthy(runs: Runs) -> Any:
    logs = {"learning rate 2e-4, 3 epochs": runs(runs.of("binary"))}
    metrics = ["loss", "eval_loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "eval_rewards/auc"]
    return training_curves(logs, [*metrics, "logps/chosen", "kl"])


def too_long(runs: Runs) -> Any:
    rows = runs.of("binary")
    logs = {"3 epochs": runs(rows), "12 epochs": runs(rows, num_train_epochs=12)}
    metrics = ["loss", "eval_loss", "rewards/accuracies", "eval_rewards/accuracies"]
    return training_curves(logs, [*metrics, "eval_rewards/chosen", "eval_rewards/auc"])


def learning_rate(runs: Runs) -> Any:
    rows = runs.of("binary")
    logs = {
        "learning rate 2e-4": runs(rows),
        "learning rate 2e-2": runs(rows, learning_rate=2e-2),
    }
    return training_curves(logs, ["loss", "eval_loss", "logps/chosen", "kl", "entropy", "eval_rewards/auc"])


def targets(runs: Runs) -> Any:
    rows = runs.of("continuous")
    logs = {
        "β = 0.1: targets of 10 nats": runs(rows, label_type="continuous"),
        "β = 0.002: targets of 500 nats": runs(rows, label_type="continuous", beta=0.002),
    }
    metrics = ["rewards/mse", "eval_rewards/mse", "logps/rejected", "kl", "entropy", "eval_rewards/spearman"]
    return training_curves(logs, metrics)


def one_class(runs: Runs) -> Any:
    logs = {
        "likes and dislikes": runs(runs.of("binary")),
        "likes only": runs(runs.of("binary", only=1.0), num_train_epochs=5),
    }
    metrics = ["loss", "eval_loss", "eval_rewards/chosen", "eval_rewards/rejected", "eval_rewards/auc", "eval_kl"]
    return training_curves(logs, metrics)


def offset(runs: Runs) -> Any:
    rows = runs.of("continuous", offset=4.0)
    logs = {
        "log_z = 0": runs(rows, label_type="continuous"),
        'log_z = "prior"': runs(rows, label_type="continuous", log_z="prior"),
    }
    metrics = ["rewards/mse", "kl", "logps/rejected", "eval_kl", "eval_rewards/pearson", "eval_rewards/mse"]
    return training_curves(logs, metrics)


def demonstrations(runs: Runs) -> Any:
    rows = runs.of("binary")
    logs = {
        "sft_weight = 0.02": runs(rows, ulma=True, sft_weight=0.02),
        "sft_weight = 1": runs(rows, ulma=True),
    }
    metrics = ["loss/sft", "eval_loss/sft", "loss/preference", "eval_loss/preference"]
    return training_curves(logs, [*metrics, "eval_rewards/auc", "kl"])


DRAWN = {
    "healthy": healthy,
    "too-long": too_long,
    "learning-rate": learning_rate,
    "targets": targets,
    "one-class": one_class,
    "offset": offset,
    "demonstrations": demonstrations,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(DRAWN)} (default: all)")
    parser.add_argument("--output", type=Path, default=PICTURES, help="default: docs/pictures")
    args = parser.parse_args()
    unknown = sorted(set(args.names) - set(DRAWN))
    if unknown:
        parser.error(f"{', '.join(unknown)} is not a picture. There are {', '.join(DRAWN)}.")
    torch.set_num_threads(1)
    disable_progress_bars()
    logging.set_verbosity_error()
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(folder)
        for name in args.names or DRAWN:
            DRAWN[name](runs).savefig(args.output / f"{name}.png", dpi=120, facecolor="white")


if __name__ == "__main__":
    main()
