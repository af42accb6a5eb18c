"""The trainings that cells are made of: each reads its options, as a YAML file, and leaves a model and its log."""

import math
import os
import platform
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from peft import get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    Trainer,
)
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, RLOOConfig, RLOOTrainer

from trl_ulma import ULMAConfig, ULMATrainer
from trl_ulma.callbacks import Interruption
from trl_ulma.checkpoints import checkpoint_to_resume, written_whole
from trl_ulma.saved import adapter_base
from trl_ulma.scripts.options import OptionParser
from trl_ulma.scripts.training import STOPPED, train

# trainer: (its config, the rows it reads)
KINDS: dict[str, tuple[type, str]] = {
    "ulma": (ULMAConfig, "train"),
    "dpo": (DPOConfig, "pairs"),
    "reward": (RewardConfig, "pairs"),
    "pointwise-reward": (RewardConfig, "train"),
    "rloo": (RLOOConfig, "prompts"),
}


class Interrupted(Exception):
    """Training was stopped, with a checkpoint to go on from."""


class _Resumes(Trainer):
    """A trainer of TRL or transformers that resumes from its last whole checkpoint, and stops at Ctrl-C with one."""

    def __init__(self, *args: Any, **kwargs: Any):
        if kwargs.get("quantization_config") is None:  # before TRL 1.7, there is no such argument
            kwargs.pop("quantization_config", None)
        super().__init__(*args, **kwargs)
        self.interruption = Interruption(self.accelerator)
        self.add_callback(self.interruption)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        resume = checkpoint_to_resume(resume_from_checkpoint, str(self.args.output_dir), None)
        with self.interruption:
            result = super().train(resume, *args, **kwargs)
        if self.interruption.agreed:
            raise KeyboardInterrupt
        return result

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        with written_whole(self.args, folder, lambda: self.state.best_model_checkpoint):
            super()._save_checkpoint(model, trial)


class _DPO(_Resumes, DPOTrainer):
    pass


class _Reward(_Resumes, RewardTrainer):
    pass


class _RLOO(_Resumes, RLOOTrainer):
    pass


class PointwiseRewardTrainer(_Resumes):
    """A reward model r(x, y) learned from labels: a sequence classifier with one output.

        binary:      −z·log σ(r) − (1 − z)·log σ(−r), the mean over rows    (Eq. 7; the paper's misprint corrected)
        continuous:  (z − r)², the mean over rows                           (Eq. 9)

    Args:
        model: the name of the language model that it begins as.
        args: a `RewardConfig`; `max_length` is a bound that no row may pass.
        train_dataset: pointwise rows, of which all labels are binary or all are continuous.
        peft_config: adapters, or None.

    Raises:
        ValueError: for rows of both kinds, or one that is longer than `max_length`.
    """

    def __init__(
        self,
        model: str,
        args: RewardConfig,
        train_dataset: Dataset,
        peft_config: Any = None,
        eval_dataset: None = None,
        quantization_config: Any = None,
    ):
        kinds = sorted(set(train_dataset["label_type"]))
        if len(kinds) > 1:
            raise ValueError("A pointwise reward model needs labels of one type; the rows have binary and continuous.")
        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        torch.manual_seed(args.seed)
        # transformers' own losses for these two are Eq. 7 and Eq. 9
        problem = "regression" if kinds == ["continuous"] else "multi_label_classification"
        scorer = AutoModelForSequenceClassification.from_pretrained(
            model, num_labels=1, problem_type=problem, quantization_config=quantization_config, **args.model_init_kwargs
        )
        scorer.config.get_text_config().pad_token_id = scorer.config.pad_token_id = tokenizer.pad_token_id
        if args.disable_dropout:
            for module in scorer.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
        if peft_config is not None:
            scorer = get_peft_model(scorer, peft_config)
            if args.gradient_checkpointing:
                scorer.enable_input_require_grads()
        rows = train_dataset.map(scored, fn_kwargs={"tokenizer": tokenizer}, remove_columns=train_dataset.column_names)
        longest = max(map(len, rows["input_ids"]))
        if args.max_length is not None and longest > args.max_length:
            raise ValueError(f"A row has {longest} tokens, and max_length is {args.max_length}. Leave it out.")
        super().__init__(
            model=scorer,
            args=args,
            train_dataset=rows,
            processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(tokenizer),
        )


def scored(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Token ids of prompt and answer, as TRL's reward trainer has them, and the label."""
    if isinstance(row["prompt"], str):
        text = row["prompt"] + row["completion"]
        ids = tokenizer(text if text.endswith(tokenizer.eos_token) else text + tokenizer.eos_token)["input_ids"]
    else:
        ids = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=False)
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [float(row["label"])]}


def load_scorer(folder: Path) -> tuple[Any, PreTrainedTokenizerBase]:
    """A reward model, its adapters merged, and its tokenizer."""
    base = adapter_base(str(folder))
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if base is None:
        model: Any = AutoModelForSequenceClassification.from_pretrained(folder)
    else:
        from peft import AutoPeftModelForSequenceClassification

        model = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1).merge_and_unload()
    model.config.get_text_config().pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer


def write_options(stage: Mapping[str, Any], file: Path, rows: Path, output: Path) -> None:
    """A stage's options as a YAML file of its trainer's command, with the rows and the folder of the model.

    Where there is no GPU, `use_cpu` is added, without which bfloat16 would be refused.
    """
    options = dict(stage["options"])
    if stage["trainer"] in ("reward", "pointwise-reward") and options.get("use_peft"):
        options["lora_task_type"] = "SEQ_CLS"
    options |= {"dataset_name": str(rows / f"{KINDS[stage['trainer']][1]}.parquet"), "output_dir": str(output)}
    if not torch.cuda.is_available():
        options["use_cpu"] = True
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(options, sort_keys=False, allow_unicode=True), encoding="utf-8")


def parse(trainer: str, file: Path) -> tuple[Any, ...]:
    """The settings in a stage's file; exits with a message that names the file where one is wrong."""
    return OptionParser(KINDS[trainer][0], f"the {trainer} stage", "").parse_settings(["--config", str(file)])


def run(trainer: str, file: Path, scorer: Path | None) -> dict[str, Any]:
    """Train a stage from its last whole checkpoint on, and return what is to be stored of it.

    Args:
        trainer: one of `KINDS`.
        file: its options.
        scorer: the folder of the reward model, for "rloo".

    Raises:
        Interrupted: where Ctrl-C came.
    """
    script_args, training_args, model_args, dataset_args = parse(trainer, file)
    training_args.resume_from_checkpoint = "true"
    made: list[Trainer] = []

    def make(**arguments: Any) -> Trainer:
        made.append(_maker(trainer, scorer)(**arguments))
        return made[-1]

    started = time.perf_counter()
    try:
        train(make, script_args, training_args, model_args, dataset_args)  # type: ignore[arg-type]
    except SystemExit as stop:
        if stop.code != STOPPED:
            raise
        raise Interrupted(f"Stopped at step {made[0].state.global_step} of {made[0].state.max_steps}.") from None
    state = made[0].state
    return {
        "trainer": trainer,
        "steps": state.global_step,
        # Of the last sitting
        "seconds": time.perf_counter() - started,
        "log": [{name: _number(value) for name, value in entry.items()} for entry in state.log_history],
    }


def _number(value: Any) -> Any:
    """A logged value as JSON has it: one that is no number, as a gradient's norm can be, by its name."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _maker(trainer: str, scorer: Path | None) -> Callable[..., Trainer]:
    if trainer != "rloo":
        return {"ulma": ULMATrainer, "dpo": _DPO, "reward": _Reward, "pointwise-reward": PointwiseRewardTrainer}[
            trainer
        ]
    if scorer is None:
        raise ValueError("The rloo stage needs a reward model's stage before it.")
    model, tokenizer = load_scorer(scorer)

    def make(**arguments: Any) -> Trainer:
        return _RLOO(reward_funcs=model, reward_processing_classes=tokenizer, **arguments)

    return make


def hardware() -> dict[str, Any]:
    """What the numbers of seconds depend on."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text(encoding="utf-8").splitlines() if cpus.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    machine = named[0] if named else platform.machine()
    return {"machine": machine, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpus": gpus}


def versions() -> dict[str, str]:
    """Of the libraries that trainings depend on."""
    return {name: metadata.version(name) for name in ("trl", "transformers", "torch", "peft", "datasets")}
