"""Trains each run to its end, and once more from one of its checkpoints, in however many processes call it.

`runs.json` is a list of dictionaries: `name`, `model` (folder), `rows` (JSON-lines file), `resume` (step), `args` (of
the trainer's config), and perhaps `lora` and `stream`. The first process writes `<name>-unbroken` and `<name>-resumed`
into the folder `out`: what was logged (`.json`) and the trained weights (`.safetensors`).
"""

import faulthandler
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import save_file
from transformers.utils.logging import disable_progress_bar

from trl_ulma import ULMAConfig, ULMATrainer


def train(run: dict[str, Any], out: Path, resume: str | None) -> ULMATrainer:
    """A training to its end."""
    settings = {
        "bf16": False,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "label_report": False,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 2,
        "report_to": "none",
        "save_strategy": "steps" if resume is None else "no",
        "save_steps": run["resume"],
        "use_cpu": True,
    }
    rows: Any = Dataset.from_json(run["rows"], cache_dir=str(out / "cache"))
    lora = LoraConfig(r=4, target_modules=["c_attn"], task_type="CAUSAL_LM", lora_dropout=0.1)
    trainer = ULMATrainer(
        model=run["model"],
        args=ULMAConfig(str(out / run["name"]), **settings | run["args"]),
        train_dataset=rows.to_iterable_dataset() if run.get("stream") else rows,
        peft_config=lora if run.get("lora") else None,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def write(trainer: ULMATrainer, path: Path) -> None:
    """What was logged and learned."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    save_file(weights, path.with_suffix(".safetensors"))
    path.with_suffix(".json").write_text(json.dumps(trainer.state.log_history))


def main(file: str, folder: str, seconds: float) -> None:
    """Both trainings of each run."""
    runs, out = json.loads(Path(file).read_text()), Path(folder)
    faulthandler.dump_traceback_later(seconds, exit=True)
    disable_progress_bar()
    torch.set_num_threads(1)
    # Each training collects garbage, and need not go through all that was imported
    gc.freeze()
    for run in runs:
        for kind in ("unbroken", "resumed"):
            resume = str(out / run["name"] / f"checkpoint-{run['resume']}") if kind == "resumed" else None
            trainer = train(run, out, resume)
            if trainer.accelerator.is_main_process:
                write(trainer, out / f"{run['name']}-{kind}")
            trainer.accelerator.wait_for_everyone()
    PartialState().destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
