"""BCO of TRL 1.13, the last version that has it, beside `preset="bco"`, on the same rows, seeds and settings.

    pip install --no-deps --target trl-1.13 trl==1.13.0
    PYTHONPATH=trl-1.13 python examples/bco/compare.py

Both start from the same model and see the same rows in the same order, in float32. The rows are those that
`trl-ulma demo` trains on. The table has the mean over the seeds, each of which is another order of the rows.
"""

import argparse
import json
import tempfile
import warnings
from importlib import resources
from importlib.metadata import version
from typing import Any

import numpy as np
from datasets import Dataset
from packaging.version import Version
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_ulma import PointwiseDPOConfig, PointwiseDPOTrainer

FIGURES = ("loss", "rewards/chosen", "rewards/rejected", "delta")


def everyday_rows(tokenizer: Any, seed: int, count: int) -> Dataset:
    """Prompts and completions as text, as both trainers read it, with likes and dislikes in turn."""
    lines = resources.files("trl_ulma.data").joinpath("everyday.jsonl").read_text("utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["split"] == "train" and row["label_type"] == "binary"]
    random = np.random.default_rng(seed)
    classes = [[row for row in rows if (row["label"] == 1) == liked] for liked in (True, False)]
    made = []
    for number in range(count):
        of_class = classes[number % 2]
        row = of_class[random.integers(len(of_class))]
        prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        made.append({"prompt": prompt, "completion": row["completion"][0]["content"], "label": row["label"] == 1})
    return Dataset.from_list(made)


def logged(trainer: Any, delta: Any) -> np.ndarray:
    """`(steps, 4)` FIGURES of each step."""
    trainer.train()
    steps = [log for log in trainer.state.log_history if "loss" in log]
    return np.array([[log["loss"], log["rewards/chosen"], log["rewards/rejected"], delta(log)] for log in steps])


def compare(model: str, *, seeds: int, steps: int, batch_size: int, beta: float, learning_rate: float) -> np.ndarray:
    """`(2, seeds, steps, 4)` FIGURES of TRL's BCO and of `preset="bco"`."""
    from trl.experimental.bco import BCOConfig, BCOTrainer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    found = []
    for seed in range(seeds):
        rows = everyday_rows(tokenizer, seed, steps * batch_size)
        with tempfile.TemporaryDirectory() as folder:
            settings = {
                "output_dir": folder,
                "beta": beta,
                "learning_rate": learning_rate,
                "per_device_train_batch_size": batch_size,
                "max_steps": steps,
                "seed": seed,
                "logging_steps": 1,
                "lr_scheduler_type": "constant",
                "bf16": False,
                "gradient_checkpointing": False,
                "save_strategy": "no",
                "report_to": "none",
                "disable_tqdm": True,
            }
            theirs = BCOTrainer(
                model=AutoModelForCausalLM.from_pretrained(model, dtype="float32"),
                ref_model=AutoModelForCausalLM.from_pretrained(model, dtype="float32"),
                args=BCOConfig(**settings),
                train_dataset=rows,
                processing_class=tokenizer,
            )
            ours = PointwiseDPOTrainer(
                model=AutoModelForCausalLM.from_pretrained(model, dtype="float32"),
                args=PointwiseDPOConfig(
                    **settings, preset="bco", train_sampling_strategy="sequential", label_report=False
                ),
                train_dataset=rows,
                processing_class=tokenizer,
            )
            # r = β·(u + log Z) here, and δ = −β·log Z. TRL logs β·u.
            mine = logged(ours, lambda log: -beta * log["log_z"])
            mine[:, 1:3] += mine[:, 3:]
            found.append((logged(theirs, lambda log: log["delta"]), mine))
    return np.stack(found, 1)


def table(found: np.ndarray) -> str:
    """The means over the seeds as a Markdown table, one line per step."""
    theirs, ours = found.mean(1)
    lines = [
        "| step | " + " | ".join(f"{name}, TRL | here" for name in ("loss", "β·u liked", "β·u disliked", "δ")) + " |",
        "|---" * 9 + "|",
    ]
    for step in range(len(theirs)):
        cells = [f"{value:.3f}" for pair in zip(theirs[step], ours[step], strict=True) for value in pair]
        lines.append(f"| {step + 1} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--learning_rate", type=float, default=1e-5)
    args = parser.parse_args()
    if Version(version("trl")) >= Version("1.14"):
        raise SystemExit(f"TRL {version('trl')} has no BCOTrainer; put TRL 1.13 first on the path, as the head says.")
    warnings.filterwarnings("ignore")  # deprecations among the libraries, said anew by each trainer
    found = compare(**vars(args))
    gap = np.abs(found[0] - found[1]).max((0, 1))
    print(f"trl {version('trl')}, transformers {version('transformers')}, {vars(args)}\n")
    print(table(found))
    print("\nLargest differences: " + ", ".join(f"{n} {g:.2g}" for n, g in zip(FIGURES, gap, strict=True)))


if __name__ == "__main__":
    main()
