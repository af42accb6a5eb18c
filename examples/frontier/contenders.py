"""The methods, each as its trainer runs it from the same feedback, for the same number of steps."""

import contextlib
import hashlib
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, load_from_disk
from peft import LoraConfig
from pool import copy_of
from regimes import Feedback
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging as transformers_logging
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from trl_ulma import PointwiseDPOConfig, PointwiseDPOTrainer, ULMAConfig, ULMATrainer
from trl_ulma.log_partition import quantile_log_z

BATCH = 16  # rows; DPO has half as many pairs


@dataclass(frozen=True)
class Method:
    """A contender.

    Attributes:
        name: in tables.
        kind: "pointwise", "ulma", "sft", "dpo" or "kto".
        continuous: whether it learns from ratings; otherwise from thumbs.
        log_z: as in `PointwiseDPOConfig`; None is what QRPO's quantile labels make it.
        sft_weight: of ULMA; "beta" is β.
        rounds: how often answers are drawn; with 1, all are the reference's.
    """

    name: str
    kind: str
    continuous: bool = False
    log_z: float | str | None = 0.0
    sft_weight: float | str = 1.0
    rounds: int = 1


METHODS = {
    "sft": Method("SFT on the best", "sft"),
    "dpo": Method("DPO (TRL), pairs", "dpo"),
    "kto": Method("KTO (TRL), thumbs", "kto"),
    "bco": Method("BCO's shift, thumbs", "pointwise", log_z="running_mean"),
    "qrpo": Method("QRPO, quantiles", "pointwise", continuous=True, log_z=None),
    "thumbs-0": Method("pointwise DPO, thumbs, log Z 0", "pointwise"),
    "thumbs-prior": Method("pointwise DPO, thumbs, log Z prior", "pointwise", log_z="prior"),
    "thumbs-learned": Method("pointwise DPO, thumbs, log Z learned", "pointwise", log_z="learned"),
    "ratings-0": Method("pointwise DPO, ratings, log Z 0", "pointwise", continuous=True),
    "ratings-prior": Method("pointwise DPO, ratings, log Z prior", "pointwise", continuous=True, log_z="prior"),
    "ratings-learned": Method("pointwise DPO, ratings, log Z learned", "pointwise", continuous=True, log_z="learned"),
    "rounds": Method("pointwise DPO, ratings, log Z prior, 3 rounds", "pointwise", True, "prior", rounds=3),
    "ulma-ratings-1": Method("ULMA, ratings, sft_weight 1", "ulma", continuous=True, log_z="prior"),
    # Its β is 0.1, which is one of the values of sft_weight to compare
    "ulma-ratings-beta": Method("ULMA, ratings, sft_weight β", "ulma", True, "prior", "beta"),
    "ulma-thumbs-1": Method("ULMA, thumbs, sft_weight 1", "ulma"),
    "ulma-thumbs-beta": Method("ULMA, thumbs, sft_weight β", "ulma", sft_weight="beta"),
}


@dataclass(frozen=True)
class Recipe:
    """How every method is trained: LoRA on all linear layers, AdamW, linear decay."""

    steps: int = 60
    learning_rate: float = 2e-4
    rank: int = 16


def can_learn(method: str, feedback: Feedback) -> bool:
    """Whether the feedback has what the method learns from."""
    found = METHODS[method]
    if found.kind == "dpo":
        return feedback.pairs() is not None
    return feedback.rated or not found.continuous


def train(
    method: str,
    beta: float | None,
    feedback: Feedback,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    recipe: Recipe | None = None,
    rows_folder: Path | None = None,
) -> tuple[PreTrainedModel, float]:
    """(The trained policy with its adapter merged into it, in eval mode; the mean training loss).

    Args:
        method: one of `METHODS`.
        beta: β. SFT has none: here it is the share of the steps that SFT takes, and None is all of them.
        feedback: what it learns from.
        reference: the model that training begins with; it stays as it is.
        tokenizer: its tokenizer.
        seed: of the adapter and the order of rows.
        recipe: steps and rates.
        rows_folder: where the rows are stored, so that the log-probabilities of the reference are found again by the
            next method with the same rows.
    """
    recipe = recipe or Recipe()
    if METHODS[method].kind == "sft" and beta is not None:
        recipe, beta = replace(recipe, steps=round(beta * recipe.steps)), None
    with tempfile.TemporaryDirectory() as folder, quiet():
        set_seed(seed)
        trainer = _trainer(METHODS[method], beta, feedback, reference, tokenizer, seed, recipe, folder, rows_folder)
        trainer.remove_callback(PrinterCallback)
        loss = trainer.train().training_loss
    model: Any = trainer.model
    return model.merge_and_unload().eval(), loss


def _trainer(
    method: Method,
    beta: float | None,
    feedback: Feedback,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    recipe: Recipe,
    folder: str,
    rows_folder: Path | None,
) -> Trainer:
    shared: dict[str, Any] = {
        "per_device_train_batch_size": BATCH,
        "max_steps": recipe.steps,
        "learning_rate": recipe.learning_rate,
        "seed": seed,
        "logging_steps": recipe.steps,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "bf16": False,
        "use_cpu": not torch.cuda.is_available(),
        "precompute_ref_log_probs": True,
        **({} if beta is None else {"beta": beta}),
    }
    common: dict[str, Any] = {
        "model": copy_of(reference),
        "processing_class": tokenizer,
        "peft_config": LoraConfig(
            r=recipe.rank, lora_alpha=2 * recipe.rank, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    }

    def stored(rows: Dataset, name: str) -> Dataset:
        if rows_folder is None:
            return rows
        digest = hashlib.sha256(repr(rows[:]).encode()).hexdigest()[:16]
        path = rows_folder / f"{name}-{digest}"
        if not path.exists():
            part = path.with_name(f"{path.name}-{os.getpid()}")
            rows.save_to_disk(str(part))
            with contextlib.suppress(OSError):  # another run stored the same rows first
                part.rename(path)
        return load_from_disk(str(path))

    if method.kind == "dpo":
        pairs = feedback.pairs()
        if pairs is None:
            raise ValueError("No prompt has two answers that differ, so there is no pair for DPO.")
        args = DPOConfig(folder, **{**shared, "per_device_train_batch_size": BATCH // 2})
        return DPOTrainer(**common, args=args, train_dataset=stored(pairs, "pairs"))
    if method.kind == "kto":
        # TRL's advice for unbalanced classes: both weigh the same
        liked = float(np.mean(feedback.thumb))
        weights = {"undesirable_weight": liked / (1 - liked)} if liked > 0.5 else {}
        args = KTOConfig(folder, **shared, **weights, train_sampling_strategy="sequential")
        return KTOTrainer(**common, args=args, train_dataset=stored(feedback.thumbs(), "thumbs"))
    own: dict[str, Any] = {
        "label_type": "continuous" if method.continuous else "binary",
        "log_z": method.log_z,
        "label_report": False,
    }
    if method.log_z is None:
        assert beta is not None
        own |= {"label_transform": "prompt_quantile", "log_z": quantile_log_z(beta)}
    imitate = method.kind != "pointwise"
    name = f"{'ratings' if method.continuous else 'thumbs'}{'-imitated' if imitate else ''}"
    rows = stored(feedback.rows(continuous=method.continuous, imitate=imitate), f"own-{name}")
    if method.kind == "pointwise":
        return PointwiseDPOTrainer(**common, args=PointwiseDPOConfig(folder, **shared, **own), train_dataset=rows)
    if method.kind == "sft":
        rows = rows.filter(lambda imitated: imitated, input_columns="sft_mask")
        own |= {"positive_loss": "sft", "negative_loss": "none"}
        shared["precompute_ref_log_probs"] = False
    else:
        own["sft_weight"] = beta if method.sft_weight == "beta" else method.sft_weight
    return ULMATrainer(**common, args=ULMAConfig(folder, **shared, **own), train_dataset=rows)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
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
