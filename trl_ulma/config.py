"""Settings of the trainers: TRL's `DPOConfig` less what only pairs have, plus what only points have."""

import argparse
import copy
import difflib
import math
import os
import sys
from dataclasses import MISSING, dataclass, field, fields
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Self

import torch
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.utils import (
    is_in_notebook,
    is_liger_kernel_available,
    is_torch_bf16_gpu_available,
    is_torch_xla_available,
    logging,
)
from trl import DPOConfig

from trl_ulma.labels import LABEL_TYPES, TRANSFORMS, parse_transform
from trl_ulma.log_partition import LOG_Z_CHOICES
from trl_ulma.losses import BINARY_LOSSES, NEGATIVE_LOSSES, POSITIVE_LOSSES, check_binary_loss, check_cell
from trl_ulma.metrics import EVALUATED
from trl_ulma.presets import PRESETS, apply_preset
from trl_ulma.rows.chat import check_chat
from trl_ulma.rows.dropped import INVALID_ROWS

logger = logging.get_logger(__name__)

_INSTEAD = {
    "loss_type": "positive_loss and negative_loss of ULMAConfig choose the method",
    "loss_weights": "weigh demonstrations with sft_weight, classes with desirable_weight and undesirable_weight",
    "ld_alpha": "length_normalize=True divides by the completion's length",
    "f_divergence_type": "only the reverse KL divergence has an implicit reward for single rows",
    "f_alpha_divergence_coef": "only the reverse KL divergence has an implicit reward for single rows",
    "label_smoothing": "soften the labels in the data: 0.9 and 0.1 in place of 1 and 0",
    "use_weighting": "give the rows a weight column",
    "discopop_tau": "positive_loss and negative_loss of ULMAConfig choose the method",
}

# Losses of KTOConfig, and the line that replaces them
_KTO_LOSSES = {
    "apo_zero_unpaired": "set binary_loss='kto' in the PointwiseDPOConfig, with log_z=0, which is the same loss",
}

# Whole numbers, and their least values
_WHOLE = {
    "max_length": 2,
    "pad_to_multiple_of": 1,
    "dataset_num_proc": 0,
    "precompute_ref_batch_size": 1,
    "ref_model_sync_steps": 1,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
}


if TYPE_CHECKING:
    LogZ = float | str
else:

    class LogZ:
        """How `HfArgumentParser`, which takes no union, reads log_z: a number, or the name of a choice."""

        def __new__(cls, text):
            try:
                return float(text)
            except ValueError:
                return text


def _hidden(name: str) -> Any:
    """TRL's field `name`, left out of `--help` and still settable, so that a YAML that repeats its default runs."""
    original = DPOConfig.__dataclass_fields__[name]
    metadata = {**original.metadata, "help": argparse.SUPPRESS}
    if original.default_factory is not MISSING:
        return field(default_factory=original.default_factory, metadata=metadata)
    return field(default=original.default, metadata=metadata)


@dataclass(repr=False)
class PointwiseDPOConfig(DPOConfig):
    r"""Settings of `PointwiseDPOTrainer`; every other setting is `trl.DPOConfig`'s.

    Parameters:
        label_type: "binary" reads labels in [0, 1] (thumbs, soft labels) and takes the loss of Eq. 8; "continuous"
            reads any number as a reward, higher is better, and takes the loss of Eq. 9. A column `label_type` decides
            per row.
        label_transform: what is done to labels first, fitted on the training set, saved with the model and applied to
            what is evaluated or scored: names divided by commas, a name's numbers after a colon, as in
            "lower_is_better,standardise", "threshold:0.5" or "votes:1,1"; `trl_ulma.labels.TRANSFORMS` says what there
            is. `label_type`, `sft_threshold` and the check of `sft_mask` speak of labels after it. It is for rows of
            `label_type`; rows that a column `label_type` gives the other type are taken as they are.
        label_report: print what the training labels look like before training, and write it into
            `output_dir`/label_report.json (not of a stream).
        log_z: log Z(x), added to every log-ratio: r = β·(log π_θ − log π_ref + log Z). A number of nats (the paper's
            is 0; where the data has a column `log_z`, that decides), or the name of a choice of
            `trl_ulma.log_partition`: "column" (every row must carry it), "prior" (the start is calibrated to the
            training labels' mean), "running_mean" (the moving average of the log-ratio), "batch_kl" (KTO's reference
            point), "learned_constant" (trained by the loss), "learned" (a read-out of the prompt, trained by the loss).
        log_z_learning_rate: of the learned ones, in units of the reward a step; follows the schedule.
        length_normalize: divide every log-probability by its completion's number of tokens, as the authors' code does.
            The log-ratio is then about as many times smaller as a completion has tokens: raise β by that factor.
        binary_loss: the loss of compared rows with binary or soft labels. "cross_entropy" is pointwise DPO's (Eq. 8),
            "squared_error" is UNA's (σ(r) − z)², and "kto" is KTO's, which saturates for rewards on either side.
        preset: a published method by its name: "qrpo", "sppo", "bco", "una" or "kto". It sets the options that the
            method stands for, see `trl_ulma.presets`. An option that contradicts it raises an error.
        desirable_weight: weight of rows with a label of ½ and above (continuous labels: of demonstrations).
        undesirable_weight: weight of the other rows.
        share_prompts: run rows of a micro-batch that have the same prompt as one prompt and its branches, and keep a
            prompt's rows together. Exact, which is tried out at the start; with attention other than "sdpa" and
            "eager", sliding windows or recurrent layers rows are padded, and that is said.
        invalid_rows: what happens to rows that cannot be read, such as rows without a label or with an empty
            completion. "error" lists them and stops; "drop" leaves them out, and counts them in a warning and in the
            label report.
        assistant_only_loss: score only the assistant's turns of a completion that has several turns. User turns and
            tool results within a completion are read by the model and not scored. Set it to False to score everything
            after the prompt.
        chat: whether rows of text become a user's and an assistant's message. "auto" does that for rows of CSV and TSV
            files if the tokenizer has a chat template, and logs it; rows from elsewhere stay text. True and False
            decide for all rows of text.
        system_message: a system message for conversations that have none. Rows of text have one only if they become
            messages, see `chat`.
        startup_checks: before the first step, show on a few rows that the log-probabilities are those of the model's
            own logits, that the reference is the model as it is before training, that asking twice gives the same, and
            that the chosen layout gives what padding gives. What fails is an error that says by how much. It costs less
            than an optimizer step. False trains regardless.

    Of `DPOConfig`'s settings, `padding_free` works here: rows of a micro-batch are packed into one sequence. It is
    tried out at the start whether the model computes the same, and refused where it does not.

    `disable_tqdm` is True by itself where stderr is neither a terminal nor a notebook's.

    Random numbers: `seed` (42) decides dropout, which is off unless `disable_dropout=False`, the first weights of
    adapters, and the order of rows, which `data_seed` decides where it is set. The same seeds on the same machine, with
    the same versions and number of threads and processes, give the same numbers, bit for bit on CPU; on a GPU
    `full_determinism=True` asks for it. `split_by_prompt` and the order of a stream have seeds of their own.

    Settings of DPOConfig that exist for pairs only (`loss_type`, `label_smoothing`, …) are refused away from their
    default. Batch sizes count rows: a pair takes two.

    Raises:
        ValueError: for a value out of range, or a pair-only setting away from its default.

    Example:
        >>> PointwiseDPOConfig("out", label_type="continuous", beta=0.05, report_to="none").beta
        0.05
    """

    label_type: str = field(
        default="binary",
        metadata={
            "help": "What labels are: 'binary' (in [0, 1], soft labels too) or 'continuous' (any number, higher is "
            "better). A column `label_type` decides per row.",
            "choices": LABEL_TYPES,
        },
    )
    label_transform: str | None = field(
        default=None,
        metadata={
            "help": "What is done to labels first: names divided by commas, numbers after a colon, as in "
            f"'lower_is_better,standardise' or 'threshold:0.5'. There are {', '.join(TRANSFORMS)}."
        },
    )
    label_report: bool = field(
        default=True,
        metadata={"help": "Print a report on the training labels, and write it into output_dir/label_report.json."},
    )
    log_z: LogZ = field(
        default=0.0,
        metadata={
            "help": "log Z(x), added to every log-ratio: a number of nats, or one of " + ", ".join(LOG_Z_CHOICES) + "."
        },
    )
    log_z_learning_rate: float = field(
        default=0.01,
        metadata={"help": "Learning rate of log_z='learned' and 'learned_constant', in units of the reward a step."},
    )
    length_normalize: bool = field(
        default=False,
        metadata={
            "help": "Divide every log-probability by its completion's number of tokens, as the paper's authors' code "
            "does. Raise `beta` by about that factor."
        },
    )
    binary_loss: str = field(
        default="cross_entropy",
        metadata={
            "help": "The loss of compared rows with binary or soft labels: 'cross_entropy' (pointwise DPO, Eq. 8), "
            "'squared_error' (UNA) or 'kto' (KTO's, which saturates).",
            "choices": tuple(BINARY_LOSSES),
        },
    )
    preset: str | None = field(
        default=None,
        metadata={
            "help": "A published method by its name, which sets the options that it stands for: "
            f"{', '.join(PRESETS)}. An option that contradicts it is an error.",
            "choices": tuple(PRESETS),
        },
    )
    desirable_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of rows with a label of 1/2 and above (continuous labels: of demonstrations)."},
    )
    undesirable_weight: float = field(default=1.0, metadata={"help": "Weight of the other rows."})
    share_prompts: bool = field(
        default=False,
        metadata={
            "help": "Run rows of a micro-batch that have the same prompt as one prompt and its branches, and keep a "
            "prompt's rows together. Needs 'sdpa' or 'eager' attention."
        },
    )
    padding_free: bool = field(
        default=False,
        metadata={
            "help": "Pack the rows of a micro-batch into one sequence without padding. Whether the model computes the "
            "same is tried out at the start."
        },
    )
    invalid_rows: str = field(
        default="error",
        metadata={
            "help": "What happens to rows that cannot be read: 'error' lists them and stops, 'drop' leaves them out.",
            "choices": INVALID_ROWS,
        },
    )
    assistant_only_loss: bool = field(
        default=True,
        metadata={"help": "Score only the assistant's turns of a completion that has several turns."},
    )
    chat: str = field(
        default="auto",
        metadata={
            "help": "Whether rows of text become a user's and an assistant's message: 'true', 'false', or 'auto', "
            "which does so for CSV and TSV files if the tokenizer has a chat template."
        },
    )
    system_message: str | None = field(
        default=None, metadata={"help": "A system message for conversations that have none."}
    )

    startup_checks: bool = field(
        default=True,
        metadata={
            "help": "Before the first step, show on a few rows that log-probabilities equal the model's own "
            "logits, that "
            "the reference is the model before training, and that nothing is noisy; raise an error otherwise."
        },
    )

    # TRL before 1.7 has neither of these, and before 1.15 another default of the second
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Whether models and tokenizers may run Python code that comes with them from the hub."},
    )
    router_aux_loss_coef: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the load-balancing loss of a mixture of experts. By default the model's own weight; 0.0 "
            "switches the loss off."
        },
    )

    loss_type: list[str] = _hidden("loss_type")
    loss_weights: list[float] | None = _hidden("loss_weights")
    ld_alpha: float | None = _hidden("ld_alpha")
    f_divergence_type: str = _hidden("f_divergence_type")
    f_alpha_divergence_coef: float = _hidden("f_alpha_divergence_coef")
    label_smoothing: float = _hidden("label_smoothing")
    use_weighting: bool = _hidden("use_weighting")
    discopop_tau: float = _hidden("discopop_tau")

    def __post_init__(self):
        self.check()
        # TRL's default is bf16, which a machine without support for it refuses
        if self.bf16 is None and not (self.use_cpu or is_torch_bf16_gpu_available() or is_torch_xla_available()):
            self.bf16 = False
        # A bar in a log file is many lines a second
        if self.disable_tqdm is None and not (sys.stderr.isatty() or is_in_notebook()):
            self.disable_tqdm = True
        super().__post_init__()

    @property
    def cell(self) -> tuple[str, str]:
        """The cell of the grid of methods: (positive_loss, negative_loss)."""
        return "pointwise_dpo", "pointwise_dpo"

    def check(self) -> None:
        """Raise ValueError on a value that these trainers cannot take, and set what `preset` stands for."""
        if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "").lower() in ("1", "true"):
            sizes = ("tp_size", "cp_size", "sp_size")
            check_parallelism(
                SimpleNamespace(**{s: int(os.environ.get(f"PARALLELISM_CONFIG_{s.upper()}", 1)) for s in sizes})
            )
        for name, instead in _INSTEAD.items():
            original = DPOConfig.__dataclass_fields__[name]
            default = original.default if original.default is not MISSING else original.default_factory()
            value = getattr(self, name)
            if name == "loss_type" and "kto" in (value if isinstance(value, list) else [value]):
                raise ValueError(
                    f"loss_type={value!r} is a setting of DPOConfig, which {type(self).__name__} does not have. Set "
                    "preset='kto' for KTO's loss and reference point, and leave loss_type out."
                )
            if value != default and [value] != default:
                raise ValueError(
                    f"{name}={value!r} is a setting of pair-wise losses, which {type(self).__name__} does not have. "
                    f"Leave it at {default!r}; {instead}."
                )
        if self.label_type not in LABEL_TYPES:
            raise ValueError(f"label_type must be one of {LABEL_TYPES}; got {self.label_type!r}.")
        _check_number("beta", self.beta, above=0)
        apply_preset(self, {f.name: f.default for f in fields(self)})
        check_binary_loss(self.binary_loss)
        if self.label_transform is not None:
            parse_transform(self.label_transform, self.label_type)
        if isinstance(self.log_z, str) and self.log_z not in LOG_Z_CHOICES:
            raise ValueError(f"log_z must be a number, or one of {LOG_Z_CHOICES}; got {self.log_z!r}.")
        if not isinstance(self.log_z, str):
            _check_number("log_z", self.log_z)
        _check_number("log_z_learning_rate", self.log_z_learning_rate, above=0)
        _check_number("desirable_weight", self.desirable_weight, least=0)
        _check_number("undesirable_weight", self.undesirable_weight, least=0)
        if self.desirable_weight == self.undesirable_weight == 0:
            raise ValueError(
                "desirable_weight and undesirable_weight are both 0: no row would be learned from. Set one of them."
            )
        for name, least in _WHOLE.items():
            value = getattr(self, name)
            if value is None or (name == "pad_to_multiple_of" and isinstance(value, str)):  # text, which TRL reads
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be a whole number, {least} or above; got {value!r}.")
        if self.truncation_mode not in ("keep_start", "keep_end"):
            raise ValueError(f"truncation_mode must be 'keep_start' or 'keep_end'; got {self.truncation_mode!r}.")
        self.chat = str(self.chat).lower()
        check_chat(self.chat, self.system_message)
        if self.invalid_rows not in INVALID_ROWS:
            raise ValueError(f"invalid_rows must be one of {INVALID_ROWS}; got {self.invalid_rows!r}.")
        switches = ("label_report", "length_normalize", "share_prompts", "padding_free", "assistant_only_loss")
        for name in (*switches, "startup_checks"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False; got {getattr(self, name)!r}.")
        if self.sync_ref_model and self.precompute_ref_log_probs:
            raise ValueError(
                "sync_ref_model=True moves the reference while training, and precompute_ref_log_probs=True asks it "
                "once, before. Set one of them."
            )
        if self.log_z == "batch_kl" and self.precompute_ref_log_probs:
            raise ValueError(
                "log_z='batch_kl' asks the reference about new rows in each step, and precompute_ref_log_probs=True "
                "asks it once, before. Set precompute_ref_log_probs=False, or another log_z."
            )
        if self.log_z == "batch_kl" and self.per_device_train_batch_size < 2:
            raise ValueError(
                "log_z='batch_kl' needs two rows in a micro-batch, to pair one's prompt with the other's completion. "
                "Raise per_device_train_batch_size, or set another log_z."
            )
        if self.padding_free and self.share_prompts:
            raise ValueError("padding_free and share_prompts are two ways to lay out a batch's rows: set one of them.")

    def check_machine(self) -> None:
        """Raise ValueError or ImportError on a setting that this machine cannot carry out."""
        check_parallelism(getattr(self, "parallelism_config", None))
        if self.activation_offloading and not torch.accelerator.is_available():
            raise ValueError(
                "activation_offloading=True moves activations from an accelerator's memory to the CPU's, and there is "
                "no accelerator. Leave it at False; gradient_checkpointing=True saves memory anywhere."
            )
        if self.use_liger_kernel and not is_liger_kernel_available():
            raise ImportError(
                "use_liger_kernel=True needs liger-kernel, which is not installed. Run `pip install liger-kernel`, or "
                "leave it at False: TRL will remove it, and model_init_kwargs={'use_kernels': True} is its successor."
            )

    def check_with_data(self, *, needs_reference: bool, has_mask: bool) -> None:
        """Raise ValueError on a setting that the data contradicts.

        Args:
            needs_reference: whether the loss of any row contains the reference.
            has_mask: whether any row is marked as a demonstration.
        """
        weighted = self.desirable_weight != 1 or self.undesirable_weight != 1
        if weighted and self.label_type == "continuous" and not has_mask:
            raise ValueError(
                "desirable_weight and undesirable_weight weigh continuous labels by the SFT mask, and no row is "
                "marked. Add a boolean column sft_mask, or weigh rows with a column weight."
            )
        if needs_reference:
            return
        if isinstance(self.log_z, str):
            raise ValueError(
                f"log_z={self.log_z!r} is for rows that are compared with the reference; with {self.method} none is. "
                "Leave it at 0."
            )
        best = (self.metric_for_best_model or "").removeprefix("eval_")
        if best.startswith("rewards/") or best in ("kl", "log_z"):
            raise ValueError(
                f"metric_for_best_model={self.metric_for_best_model!r} needs a reference model; with {self.method} no "
                "row is compared with one, so that none is loaded. Use eval_loss or eval_loss/sft."
            )
        if self.sync_ref_model:
            raise ValueError(
                f"sync_ref_model=True has nothing to synchronise: with {self.method} no row is compared with a "
                "reference. Leave it at False."
            )

    def check_best_metric(self, eval_sets: list[str]) -> None:
        """Raise ValueError where `metric_for_best_model` is a misspelt figure, before an evaluation shows it.

        Args:
            eval_sets: names of the evaluated data sets, where there are several.
        """
        known = [f"{name}_{figure}" for name in eval_sets for figure in EVALUATED] if eval_sets else list(EVALUATED)
        best = (self.metric_for_best_model or "loss").removeprefix("eval_")
        near = difflib.get_close_matches(best, known, n=1, cutoff=0.75)
        is_own = best.split("/")[0] in {figure.split("/")[0] for figure in EVALUATED if "/" in figure}
        if best not in known and (near or is_own):
            hint = f"Did you mean eval_{near[0]}?" if near else f"There are {', '.join(known)}."
            raise ValueError(f"metric_for_best_model={self.metric_for_best_model!r} is no figure of evaluation. {hint}")

    def to_dict(self) -> dict[str, Any]:
        """As `DPOConfig.to_dict`, which blanks out `hub_token`; without the token in `model_init_kwargs`, too."""
        found = super().to_dict()
        found["model_init_kwargs"] = _without_tokens(found["model_init_kwargs"])
        return found

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.to_dict().items())})"

    __str__ = __repr__

    def __getstate__(self) -> dict[str, Any]:
        # Trainer pickles its settings beside every checkpoint, and uploads them with it
        tokens = {"hub_token": None, "model_init_kwargs": _without_tokens(self.model_init_kwargs)}  # nosec B105
        return {**vars(self), **tokens}

    def __copy__(self) -> Self:
        copied = object.__new__(type(self))
        vars(copied).update(vars(self))
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = memo[id(self)] = object.__new__(type(self))
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    @property
    def method(self) -> str:
        """The cell of the grid of methods, in words."""
        return "positive_loss={!r} and negative_loss={!r}".format(*self.cell)

    @classmethod
    def from_dpo_config(cls, args: DPOConfig) -> Self:
        """`args`' values in a config of this class, and this class's defaults for the rest.

        `args` stays as it is, and its `__post_init__`, which reads the environment and warns, is not run again.

        Raises:
            ValueError: for a pair-only setting of `args` away from its default.
        """
        config = cls._with_defaults()
        theirs = DPOConfig.__dataclass_fields__
        for name, value in vars(args).items():
            if name == "router_aux_loss_coef" and value == theirs[name].default:
                continue  # of TRL before 1.15: 0.001 for all models, and not the model's own weight
            # TRL writes into these while it sets up
            own = copy.deepcopy(value) if isinstance(value, list | dict | AcceleratorConfig) else value
            object.__setattr__(config, name, own)
        config.check()
        return config

    @classmethod
    def from_kto_config(cls, args: Any) -> Self:
        """The values of a `trl.KTOConfig` in a config of this class, and this class's defaults for the rest.

        `desirable_weight` and `undesirable_weight` mean the same here. The loss becomes the pointwise one, which is
        logged once.

        Raises:
            ValueError: for settings that only KTO has, away from their defaults; all of them at once.
        """
        config = cls._with_defaults()
        theirs = {f.name: f.default_factory() if f.default_factory is not MISSING else f.default for f in fields(args)}
        refused = []
        for name, value in vars(args).items():
            if name == "loss_type":
                if value not in ("kto", ["kto"]):
                    refused.append(f"loss_type={value!r}: {_KTO_LOSSES.get(str(value), 'it has no counterpart')}")
            elif name in theirs and not hasattr(config, name):
                if value != theirs[name]:
                    refused.append(f"{name}={value!r}: it has no counterpart, leave it out")
            # TRL's default for KTO's mismatched pairs, and not a choice of the user's
            elif not (name in ("train_sampling_strategy", "router_aux_loss_coef") and value == theirs[name]):
                object.__setattr__(config, name, copy.deepcopy(value))
        if refused:
            raise ValueError(
                f"{cls.__name__} cannot take over these settings of {type(args).__name__}: {'; '.join(refused)}."
            )
        config.check()
        logger.warning_once(
            f"{type(args).__name__} is taken over as a {cls.__name__}: its loss becomes pointwise DPO's cross-entropy "
            f"with log Z = 0. Set {cls.__name__}(preset='kto') to train with KTO's own loss and reference point."
        )
        return config

    @classmethod
    def _with_defaults(cls) -> Self:
        config = object.__new__(cls)
        for f in fields(cls):
            default = f.default_factory() if f.default_factory is not MISSING else f.default
            object.__setattr__(config, f.name, default)
        return config


@dataclass(repr=False)
class ULMAConfig(PointwiseDPOConfig):
    r"""Settings of `ULMATrainer`; those of `PointwiseDPOConfig`, and:

    Parameters:
        sft_weight: weight of −log π_θ(y|x) on demonstrations, ≥ 0.
        sft_threshold: where the data has no `sft_mask`, rows with a continuous label of this and above are
            demonstrations. (With binary labels, rows with label 1 are.)
        positive_loss: loss of demonstrations: "sft", "pointwise_dpo" or "none".
        negative_loss: loss of rows with a label below 1 that are no demonstrations (of continuous labels, of all rows
            that are none): "pointwise_dpo", "unlearning" (+log π_θ) or "none".

    `positive_loss` × `negative_loss` is the paper's grid of methods: ULMA ("sft" × "pointwise_dpo"), point-wise DPO
    ("pointwise_dpo" × "pointwise_dpo"), SFT ("sft" × "none"), unlikelihood ("sft" × "unlearning"), unlearning
    ("none" × "unlearning"), positive DPO ("pointwise_dpo" × "none"), negative DPO ("none" × "pointwise_dpo").

    Raises:
        ValueError: for a value out of range, a cell that is no method, or a pair-only setting away from its default.

    Example:
        >>> ULMAConfig("out", positive_loss="sft", negative_loss="none", report_to="none").cell
        ('sft', 'none')
    """

    sft_weight: float = field(default=1.0, metadata={"help": "Weight of the SFT term of demonstrations."})
    sft_threshold: float | None = field(
        default=None,
        metadata={
            "help": "Where the data has no `sft_mask`, rows with a continuous label of this and above are "
            "demonstrations. With binary labels, rows with label 1 are."
        },
    )
    positive_loss: str = field(
        default="sft",
        metadata={"help": "Loss of demonstrations.", "choices": POSITIVE_LOSSES},
    )
    negative_loss: str = field(
        default="pointwise_dpo",
        metadata={
            "help": "Loss of rows with a label below 1 that are no demonstrations; of continuous labels, of all rows "
            "that are none.",
            "choices": NEGATIVE_LOSSES,
        },
    )

    @property
    def cell(self) -> tuple[str, str]:
        """The cell of the grid of methods: (positive_loss, negative_loss)."""
        return self.positive_loss, self.negative_loss

    def check(self) -> None:
        """Raise ValueError on a value that these trainers cannot take."""
        super().check()
        check_cell(*self.cell)
        _check_number("sft_weight", self.sft_weight, least=0)
        if self.sft_weight == 0 and self.cell == ("sft", "none"):
            raise ValueError("sft_weight is 0 and negative_loss 'none': no row would be learned from. Set one of them.")
        if self.sft_threshold is not None:
            _check_number("sft_threshold", self.sft_threshold)
        if self.label_type == "continuous" and self.negative_loss == "unlearning":
            raise ValueError(
                "negative_loss='unlearning' needs binary labels: a continuous label says how good an answer is, not "
                "that it is to be unlearned. Use negative_loss='pointwise_dpo', or label_type='binary'."
            )


def check_parallelism(parallelism: Any) -> None:
    """Raise ValueError on a way to split a model or a sequence that the log-probabilities are not known to be right in.

    Args:
        parallelism: accelerate's `ParallelismConfig`, or None.
    """
    kinds = {"tp_size": "tensor", "cp_size": "context", "sp_size": "sequence"}
    for name, kind in kinds.items():
        size = getattr(parallelism, name, None) or 1
        if size > 1:
            raise ValueError(
                f"{kind} parallelism ({name}={size}) is not supported: the output embeddings, or a row's tokens, would "
                "be split over processes, and log-probabilities would be of parts. Use DDP, FSDP2 or ZeRO."
            )


def _without_tokens(loading: Any) -> Any:
    return {k: v for k, v in loading.items() if "token" not in k} if isinstance(loading, dict) else loading


def _check_number(name: str, value: Any, *, above: float | None = None, least: float | None = None) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or (above is not None and value <= above) or (least is not None and value < least):
        needed = f"above {above}" if above is not None else "a number" if least is None else f"{least} or above"
        raise ValueError(f"{name} must be {needed}; got {value!r}.")
