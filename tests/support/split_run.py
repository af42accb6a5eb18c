"""Trains a tiny model once a setting, in however many processes it was started in, and writes what came out.

    accelerate launch … split_run.py runs.json out seconds

`runs.json` is a list of `Run`s as dictionaries. The first process writes into the folder `out`, for each run, what it
logged (`<name>.json`) and the trained weights before and after (`<name>.safetensors`). A process that is not done
after so many seconds ends itself and shows where it hung.
"""

import faulthandler
import gc
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from accelerate import DistributedType, PartialState
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import GPT2LMHeadModel
from transformers.utils.logging import disable_progress_bar

from trl_ulma import PointwiseDPOConfig, PointwiseDPOTrainer, ULMAConfig, ULMATrainer


@dataclass
class Run:
    """One training run.

    Attributes:
        name: names the files.
        model: folder of the checkpoint.
        train_rows: JSON-lines file.
        test_rows: JSON-lines file of the evaluation.
        micro: rows in a micro-batch of one process.
        accumulation: micro-batches in an optimizer step.
        args: settings of the trainer's config besides the ones that all runs share.
        method: "ulma" or "pointwise".
        lora: train an adapter only.
        stream: number of shards that the rows are streamed in; 0 for rows in a table.
        dtype: of the weights.
        given: pass a `ref_model`.
    """

    name: str
    model: str
    train_rows: str
    test_rows: str
    micro: int
    accumulation: int
    args: dict[str, Any] = field(default_factory=dict)
    method: str = "ulma"
    lora: bool = False
    stream: int = 0
    in_memory: bool = False
    dtype: str = "float64"
    given: bool = False


def load(path: str, cache: Path, stream: int, in_memory: bool) -> Dataset | IterableDataset:
    """The rows of a file; a run has a cache of its own, so that none reads what another has computed."""
    rows = Dataset.from_json(path, cache_dir=str(cache))
    if in_memory:
        return Dataset.from_list(rows.to_list())
    return rows.to_iterable_dataset(num_shards=stream) if stream else rows


def make_trainer(run: Run, out: Path) -> PointwiseDPOTrainer:
    """The trainer of a run."""
    trainer, config = {
        "ulma": (ULMATrainer, ULMAConfig),
        "pointwise": (PointwiseDPOTrainer, PointwiseDPOConfig),
    }[run.method]
    settings = {
        "bf16": False,
        "disable_dropout": True,
        "eval_strategy": "epoch",
        "learning_rate": 0.02,
        "logging_steps": 1,
        "max_grad_norm": 0.0,
        "model_init_kwargs": {"dtype": getattr(torch, run.dtype)},
        "num_train_epochs": 1,
        "optim": "sgd",
        "report_to": "none",
        "save_strategy": "no",
        "seed": 7,
        "use_cpu": True,
        **run.args,
    }
    args = config(
        str(out),
        per_device_train_batch_size=run.micro,
        per_device_eval_batch_size=run.micro,
        gradient_accumulation_steps=run.accumulation,
        **settings,
    )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # accelerate shards on GPUs and their like only, and without a word takes DDP on CPUs, where FSDP2 works too
        args.distributed_state.distributed_type = DistributedType.MULTI_GPU
    cache = out / f"{run.name}-cache"
    return trainer(
        model=run.model,
        args=args,
        train_dataset=load(run.train_rows, cache, run.stream, run.in_memory),
        eval_dataset=load(run.test_rows, cache, run.stream, run.in_memory),
        peft_config=LoraConfig(r=4, target_modules=["c_attn"], task_type="CAUSAL_LM") if run.lora else None,
        ref_model=GPT2LMHeadModel.from_pretrained(run.model, dtype=getattr(torch, run.dtype)) if run.given else None,
    )


def weights(trainer: PointwiseDPOTrainer) -> dict[str, torch.Tensor]:
    """The trained weights by name, each whole."""
    found = {}
    for name, weight in trainer.accelerator.unwrap_model(trainer.model).named_parameters():
        if weight.requires_grad:
            whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
            found[name] = whole.detach().clone()
    return found


@contextmanager
def counting(loaded: list[int], kept: WeakSet) -> Iterator[None]:
    """A context in which models that are made are counted, and those that are in memory are known later."""
    make = GPT2LMHeadModel.__init__

    def make_and_count(self, *args, **kwargs):
        make(self, *args, **kwargs)
        loaded.append(1)
        kept.add(self)

    GPT2LMHeadModel.__init__ = make_and_count
    try:
        yield
    finally:
        GPT2LMHeadModel.__init__ = make


def train(run: Run, out: Path) -> None:
    """Train, and write what came out."""
    loaded, kept = [], WeakSet()
    with counting(loaded, kept):
        trainer = make_trainer(run, out)
    gc.collect()
    kept_at_start = len(kept)
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    gc.collect()
    if trainer.accelerator.is_main_process:
        found = {
            "processes": trainer.accelerator.num_processes,
            "sharded": any(isinstance(weight, DTensor) for weight in trainer.model.parameters()),
            "logs": trainer.state.log_history,
            "loaded": len(loaded),
            "kept": [kept_at_start, len(kept)],
        }
        (out / f"{run.name}.json").write_text(json.dumps(found))
        both = {"before": before, "after": after}
        tensors = {f"{when}.{name}": weight for when, of in both.items() for name, weight in of.items()}
        save_file(tensors, out / f"{run.name}.safetensors")


def main(file: str, folder: str, seconds: float) -> None:
    """Run all settings one after another in the same processes."""
    runs, out = json.loads(Path(file).read_text()), Path(folder)
    faulthandler.dump_traceback_later(seconds, exit=True)
    disable_progress_bar()
    torch.set_num_threads(1)
    # Each run collects garbage, and need not go through all that was imported
    gc.freeze()
    for settings in runs:
        train(Run(**settings), out)
    # A process that goes while another still reads from it takes that one down, and threads that are left when Python
    # tears itself down can abort the process after all is done
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
