r"""Train `DPOTrainer` and this package's two trainers on the same pairs: the picture and table of `docs/migrating.md`.

    python docs/compare_with_dpo.py            # the runs that docs/pictures/swap.json lacks, then picture and table
    python docs/compare_with_dpo.py --pairs 4 --seeds 0 --output trial      # a short trial of its own

The model is SmolLM2-135M-Instruct in float32, with the LoRA adapter of `trl-ulma demo`. The pairs are questions of
`trl_ulma/data/everyday.jsonl` with a good and a bad answer. All runs of a seed start with the same adapter and see the
same pairs in the same order, once. What a step logs was therefore measured on pairs that training had not seen yet.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from matplotlib.figure import Figure
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, set_seed
from transformers.utils import logging
from trl import DPOConfig, DPOTrainer

from trl_ulma import PointwiseDPOConfig, PointwiseDPOTrainer, ULMAConfig, ULMATrainer
from trl_ulma.evaluation.figures import training_curves
from trl_ulma.evaluation.intervals import bootstrap, mean_of
from trl_ulma.scripts.demo import LORA, load_rows
from trl_ulma.scripts.demo_models import completion_logps, fetch_checkpoint

PICTURES = Path(__file__).with_name("pictures")
BETA = 0.1
PAIRS_PER_STEP = 2
SETTINGS = {
    "beta": BETA,
    "learning_rate": 5e-4,
    "lr_scheduler_type": "cosine",
    "num_train_epochs": 1,
    "train_sampling_strategy": "sequential",
    "logging_steps": 1,
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
# trainer, its config, rows of a pair, settings of its own
RUNS: dict[str, tuple[type[DPOTrainer], type[DPOConfig], int, dict[str, Any]]] = {
    "DPOTrainer": (DPOTrainer, DPOConfig, 1, {}),
    "PointwiseDPOTrainer": (PointwiseDPOTrainer, PointwiseDPOConfig, 2, {"label_report": False}),
    "ULMATrainer": (ULMATrainer, ULMAConfig, 2, {"label_report": False}),
    "ULMATrainer, sft_weight=0.1": (ULMATrainer, ULMAConfig, 2, {"label_report": False, "sft_weight": 0.1}),
}
SEEDS = [0, 1, 2]
CURVES = ("loss", "loss/preference", "rewards/margins", "rewards/rejected")


def pairs_of(split: str) -> list[dict[str, Any]]:
    """The questions of a split, each with the demonstration as `chosen` and the bad answer as `rejected`."""
    good, bad = {}, {}
    for row in load_rows():
        if row["split"] == split and row["label_type"] == "binary" and (row["sft_mask"] or not row["label"]):
            (good if row["label"] else bad)[row["prompt"][0]["content"]] = row
    return [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": bad[question]["completion"]}
        for question, row in good.items()
        if question in bad
    ]


def logps(model: Any, tokenizer: Any, pairs: list[dict[str, Any]]) -> np.ndarray:
    """`(2, N)` log π of the chosen and of the rejected answers, in nats."""
    rows = [{"prompt": pair["prompt"], "completion": pair[half]} for half in ("chosen", "rejected") for pair in pairs]
    return completion_logps(model, tokenizer, rows)[0].reshape(2, -1)


def train(name: str, seed: int, checkpoint: str, pairs: int, before: np.ndarray) -> dict[str, Any]:
    """What a run logged, and the log-ratios of the held-out answers after it, in nats."""
    trainer_class, config_class, rows, settings = RUNS[name]
    batch = PAIRS_PER_STEP * rows
    model = load(checkpoint)
    layers = model.config.num_hidden_layers
    set_seed(seed)  # the adapter
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            model=model,
            args=config_class(folder, **SETTINGS, **settings, seed=seed, per_device_train_batch_size=batch),
            train_dataset=Dataset.from_list(random.Random(seed).sample(pairs_of("train"), pairs)),
            processing_class=AutoTokenizer.from_pretrained(checkpoint),
            peft_config=LoraConfig(**LORA | {"layers_to_transform": list(range(layers // 2, layers))}),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    ratios = (logps(trainer.model, trainer.processing_class, pairs_of("test")) - before).round(4)
    # DPOTrainer has no part of its loss that imitates
    logged = [{"loss/preference": log["loss"], **log} for log in trainer.state.log_history if "loss" in log]
    log = [{key: round(step[key], 4) for key in ("step", *CURVES)} for step in logged]
    return {"log": log, "chosen": ratios[0].tolist(), "rejected": ratios[1].tolist()}


def load(checkpoint: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)


def complete(runs: dict[str, dict[str, Any]]) -> list[str]:
    """The seeds with which every trainer has run."""
    return sorted(set.intersection(*(set(runs[name]) for name in RUNS)))


def draw(runs: dict[str, dict[str, Any]]) -> Figure:
    """The curves, averaged over seeds."""
    curves = {}
    for name in RUNS:
        steps = zip(*(runs[name][seed]["log"] for seed in complete(runs)), strict=True)
        curves[name] = [{key: float(np.mean([log[key] for log in logs])) for key in logs[0]} for logs in steps]
    figure = training_curves(curves, CURVES)
    figure.axes[0].set_yscale("log")
    return figure


def table(runs: dict[str, dict[str, Any]]) -> str:
    """The first loss and what held-out answers gained, averaged over seeds, with 95% intervals over questions."""
    head = ["trainer", "first `loss`", "chosen, nats", "rejected, nats", "margin", "margin minus DPO's"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    seeds = complete(runs)
    margins: dict[str, np.ndarray] = {}
    for name in RUNS:
        first = np.mean([runs[name][seed]["log"][0]["loss"] for seed in seeds])
        chosen, rejected = (np.mean([runs[name][seed][half] for seed in seeds], 0) for half in ("chosen", "rejected"))
        margins[name] = BETA * (chosen - rejected)
        cells = [name, f"{first:.2f}", interval(chosen, 1), interval(rejected, 1), interval(margins[name], 2)]
        cells.append(interval(margins[name] - margins["DPOTrainer"], 2) if name != "DPOTrainer" else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def interval(values: np.ndarray, digits: int) -> str:
    """The mean of a value per question and its 95% interval."""
    found = bootstrap(mean_of(values), np.arange(len(values)), seed=0)
    value, low, high = (f"{round(end, digits) + 0.0:.{digits}f}" for end in (found.value, found.low, found.high))
    return f"{value} [{low}, {high}]"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a model with a chat template (default: download SmolLM2)")
    parser.add_argument("--pairs", type=int, default=20, help="to train on (default: 20)")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, help="default: 0 1 2")
    parser.add_argument("--output", type=Path, default=PICTURES, help="default: docs/pictures")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    disable_progress_bars()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / "swap.json"
    settings = {"model": Path(args.model or "SmolLM2-135M-Instruct").name, "pairs": args.pairs, **SETTINGS}
    kept = (
        json.loads(file.read_text()) if file.is_file() else {"settings": settings, "runs": {name: {} for name in RUNS}}
    )
    if kept["settings"] != settings:
        parser.error(f"{file} holds runs with other settings. Choose another --output, or delete it.")
    runs = kept["runs"]
    missing = [(seed, name) for seed in args.seeds for name in RUNS if str(seed) not in runs[name]]
    if missing:
        checkpoint = args.model or str(fetch_checkpoint(Path.home() / ".cache" / "trl-ulma"))
        before = logps(load(checkpoint), AutoTokenizer.from_pretrained(checkpoint), pairs_of("test"))
    for seed, name in missing:
        runs[name][str(seed)] = train(name, seed, checkpoint, args.pairs, before)
        file.write_text(json.dumps(kept, indent=1) + "\n")
        print(f"seed {seed}: {name}", flush=True)
    draw(runs).savefig(args.output / "swap.png", dpi=120, facecolor="white")
    print(table(runs))


if __name__ == "__main__":
    main()
