"""Each method as its trainer runs it: this package's trainers unmodified, TRL's but for rows that are token ids."""

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import trl
from feedback import Feedback
from packaging.version import Version
from transformers import PreTrainedModel, Trainer
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging as transformers_logging
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from trl_ulma import PointwiseDPOConfig, PointwiseDPOTrainer, ULMAConfig, ULMATrainer
from trl_ulma.rows.collator import DataCollatorForPointwisePreference

METHODS = ("sft", "dpo", "kto", "pointwise_dpo", "ulma")


class _TokenDPOTrainer(DPOTrainer):
    """TRL's trainer for rows that are token ids, with no EOS to add."""

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset


class _TokenKTOTrainer(KTOTrainer):
    """TRL's trainer for rows that are token ids, with no EOS to add."""

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset


class _WholeBatch:
    """Collates a batch once, where every batch is the whole dataset in the same order."""

    def __init__(self, **kwargs: Any):
        self._collate = DataCollatorForPointwisePreference(**kwargs)
        self._batches: dict[tuple[Any, ...], dict[str, torch.Tensor]] = {}

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        # The reference's log-probabilities come on top, and the startup checks are of a few rows
        kind = (len(examples), *examples[0])
        if kind not in self._batches:
            self._batches[kind] = self._collate(examples)
        return dict(self._batches[kind])


@dataclass(frozen=True)
class Recipe:
    """How long and how fast every method is trained, with AdamW and a cosine schedule."""

    steps: int = field(default=200, metadata={"help": "Optimizer steps."})
    batch_size: int | None = field(default=128, metadata={"help": "Rows a step (DPO: half as many pairs); None: all."})
    learning_rate: float = field(default=5e-3, metadata={"help": "Its peak."})
    log_z_learning_rate: float = field(default=0.03, metadata={"help": "Of a learned log Z."})
    seed: int = field(default=0, metadata={"help": "Of the order of rows."})


def train(
    feedback: Feedback,
    method: str,
    beta: float,
    log_z: float | str = 0.0,
    recipe: Recipe | None = None,
    sft_weight: float = 1.0,
    start: PreTrainedModel | None = None,
) -> Any:
    """The trainer after training on the feedback; `.model` is the policy. None for DPO where there is no pair.

    Args:
        feedback: what all methods learn from.
        method: one of `METHODS`.
        beta: β; SFT has none.
        log_z: of pointwise DPO and ULMA: as in `PointwiseDPOConfig`, and "column" is the exact one.
        recipe: steps and rates.
        sft_weight: of ULMA.
        start: the model to begin with, which is pointwise DPO's reference. Default: the world's reference.

    Raises:
        ValueError: for an unknown method, and for KTO with TRL before 1.8, which takes texts only.
    """
    if method not in METHODS:
        raise ValueError(f"There is no method {method!r}. Methods are {', '.join(METHODS)}.")
    recipe = recipe or Recipe()
    with tempfile.TemporaryDirectory() as folder, _quiet():
        trainer = _trainer(feedback, method, beta, log_z, recipe, sft_weight, start, folder)
        if trainer is not None:
            trainer.remove_callback(PrinterCallback)
            trainer.train()
    return trainer


def _trainer(
    feedback: Feedback,
    method: str,
    beta: float,
    log_z: float | str,
    recipe: Recipe,
    sft_weight: float,
    start: PreTrainedModel | None,
    folder: str,
) -> Trainer | None:
    world = feedback.world
    size = recipe.batch_size or len(feedback.label)
    shared: dict[str, Any] = {
        "per_device_train_batch_size": size,
        "max_steps": recipe.steps,
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": recipe.steps // 20,
        "weight_decay": 0.0,
        "adam_beta2": 0.95,
        "max_grad_norm": 0.0,
        "seed": recipe.seed,
        "logging_steps": recipe.steps,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "bf16": False,
        "use_cpu": True,
        "max_length": None,
        "beta": beta,
    }
    model: PreTrainedModel = world.policy() if start is None else start
    common: dict[str, Any] = {"model": model, "processing_class": world.tokenizer}
    if method == "dpo":
        pairs = feedback.pairs()
        if pairs is None:
            return None
        args = DPOConfig(folder, **{**shared, "per_device_train_batch_size": size // 2}, precompute_ref_log_probs=True)
        # TRL before 1.3 would load the reference of a model without one by its name
        return _TokenDPOTrainer(**common, ref_model=world.policy(), args=args, train_dataset=pairs)
    if method == "kto":
        if Version(trl.__version__) < Version("1.8"):
            raise ValueError(f"KTO of TRL {trl.__version__} takes no token ids. Install TRL 1.8 or newer.")
        # TRL's advice for unbalanced classes: both weigh the same
        good = feedback.is_good.sum()
        weights = {"undesirable_weight": float(good / max(len(feedback.label) - good, 1))}
        args = KTOConfig(
            folder, **shared, **weights, precompute_ref_log_probs=True, train_sampling_strategy="sequential"
        )
        return _TokenKTOTrainer(**common, args=args, train_dataset=feedback.kto_rows(size))
    own = {"log_z": log_z, "log_z_learning_rate": recipe.log_z_learning_rate, "label_type": feedback.label_type}
    if recipe.batch_size is None:
        own["train_sampling_strategy"] = "sequential"
        common["data_collator"] = _WholeBatch(pad_token_id=world.tokenizer.pad_token_id)
    if log_z == "batch_kl":
        common["ref_model"] = world.policy()
    else:
        own["precompute_ref_log_probs"] = True
    rows = feedback.rows(imitate=method != "pointwise_dpo", beta=beta if log_z == "column" else None)
    if method == "pointwise_dpo":
        return PointwiseDPOTrainer(**common, args=PointwiseDPOConfig(folder, **shared, **own), train_dataset=rows)
    if method == "sft":
        rows = rows.filter(lambda imitated: imitated, input_columns="sft_mask")
        own = {"positive_loss": "sft", "negative_loss": "none", "label_type": feedback.label_type}
    else:
        own["sft_weight"] = sft_weight
    return ULMATrainer(**common, args=ULMAConfig(folder, **shared, **own), train_dataset=rows)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hundreds of trainers say the same about their settings; errors are still raised."""
    trl, verbosity = logging.getLogger("trl"), transformers_logging.get_verbosity()
    level = trl.level
    transformers_logging.set_verbosity_error()
    trl.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        trl.setLevel(level)
