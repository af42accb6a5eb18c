"""Settings of the trainers: TRL's `DPOConfig` without its pairwise settings, plus the pointwise ones."""

import argparse
import copy
import difflib
import math
import os
import sys
from collections.abc import Mapping, Sequence
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
from trl_ulma.metrics import EVALUATED, NEEDED_ROWS, is_of_rewards
from trl_ulma.presets import PRESETS, apply_preset
from trl_ulma.rows.chat import check_chat
from trl_ulma.rows.dropped import INVALID_ROWS

logger = logging.get_logger(__name__)

_INSTEAD = {
    "loss_type": "positive_loss and negative_loss of ULMAConfig choose the method",
    "loss_weights": "use sft_weight for demonstrations, and desirable_weight and undesirable_weight for the classes",
    "ld_alpha": "use length_normalize=True to divide by the completion's length",
    "f_divergence_type": "only the reverse KL divergence defines an implicit reward for single rows",
    "f_alpha_divergence_coef": "only the reverse KL divergence defines an implicit reward for single rows",
    "label_smoothing": "soften the labels in the data: use 0.9 and 0.1 instead of 1 and 0",
    "use_weighting": "add a weight column to the rows",
    "discopop_tau": "positive_loss and negative_loss of ULMAConfig choose the method",
}

# Losses of KTOConfig, and the line that replaces them
_KTO_LOSSES = {
    "apo_zero_unpaired": "set binary_loss='kto' in the PointwiseDPOConfig, with log_z=0, which is the same loss",
}

# What Trainer adds to the figures of an evaluation
_TIMES = ("runtime", "samples_per_second", "steps_per_second")

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
        """Parses `--log_z` as a number or as the name of a choice. `HfArgumentParser` does not support unions."""

        def __new__(cls, text):
            try:
                return float(text)
            except ValueError:
                return text


def _hidden(name: str) -> Any:
    """TRL's field `name`, hidden from `--help`. It can still be set, so a YAML file that repeats its default works."""
    original = DPOConfig.__dataclass_fields__[name]
    metadata = {**original.metadata, "help": argparse.SUPPRESS}
    if original.default_factory is not MISSING:
        return field(default_factory=original.default_factory, metadata=metadata)
    return field(default=original.default, metadata=metadata)


@dataclass(repr=False)
class PointwiseDPOConfig(DPOConfig):
    r"""Settings of `PointwiseDPOTrainer`. All other settings are those of `trl.DPOConfig`.

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
            point), "learned_constant" (trained by the loss), "learned" (a read-out of the prompt, trained by the loss),
            "group" (log Z cancels, because the rows of a prompt in a micro-batch are only compared with each other).
        log_z_learning_rate: of the learned ones, in units of the reward a step; follows the schedule.
        length_normalize: divide every log-probability by its completion's number of tokens, as the authors' code does.
            The log-ratio is then about as many times smaller as a completion has tokens: raise β by that factor.
        binary_loss: the loss of compared rows with binary or soft labels. "cross_entropy" is pointwise DPO's (Eq. 8),
            "squared_error" is UNA's (σ(r) − z)², and "kto" is KTO's, which saturates for rewards on either side.
        preset: a published method by its name: "qrpo", "sppo", "bco", "una" or "kto". It sets the options that the
            method stands for, see `trl_ulma.presets`. An option with another value than its default
            raises an error if it contradicts the preset.
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

    `padding_free`, a setting of `DPOConfig`, is supported: it packs the rows of a micro-batch into one sequence. At
    startup the trainer checks that packed and padded log-probabilities agree, and raises an error if they do not.

    `disable_tqdm` defaults to True if stderr is neither a terminal nor a notebook.

    Reproducibility: `seed` (42) determines dropout (off unless `disable_dropout=False`), the initial weights of
    adapters, and the order of the rows unless `data_seed` is set. Runs with the same seeds, machine, versions, and
    number of threads and processes give the same numbers. On a CPU they agree bit for bit. On a GPU that requires
    `full_determinism=True`. `split_by_prompt` and the order of a stream have their own seeds.

    Settings of `DPOConfig` that only apply to pairs (`loss_type`, `label_smoothing`, …) must keep their defaults. Batch
    sizes count rows, so a pair counts as two.

    Raises:
        ValueError: if a value is out of range, or if a pairwise setting differs from its default.

    Example:
        >>> PointwiseDPOConfig("out", label_type="continuous", beta=0.05, report_to="none").beta
        0.05
    """

    label_type: str = field(
        default="binary",
        metadata={
            "help": "What the labels are: 'binary' (in [0, 1], including soft labels; loss of Eq. 8) or 'continuous' "
            "(any number, higher is better; loss of Eq. 9). A column `label_type` overrides it per row.",
            "choices": LABEL_TYPES,
        },
    )
    label_transform: str | None = field(
        default=None,
        metadata={
            "help": "Transforms to apply to the labels before training, such as 'lower_is_better,standardise' or "
            "'threshold:0.5'. Separate names by commas, and put a name's numbers after a colon. "
            f"Choices: {', '.join(TRANSFORMS)}."
        },
    )
    label_report: bool = field(
        default=True,
        metadata={
            "help": "Whether to print a report on the training labels and to write it to output_dir/label_report.json."
        },
    )
    log_z: LogZ = field(
        default=0.0,
        metadata={
            "help": "log Z(x), which is added to every log-ratio: a number in nats, or one of "
            + ", ".join(LOG_Z_CHOICES)
            + ". Change it if the labels are unbalanced or not centered at 0."
        },
    )
    log_z_learning_rate: float = field(
        default=0.01,
        metadata={
            "help": "Learning rate of the log_z choices 'learned' and 'learned_constant', in units of the reward per "
            "step. It follows the learning-rate schedule."
        },
    )
    length_normalize: bool = field(
        default=False,
        metadata={
            "help": "Whether to divide every log-probability by the number of completion tokens, as the code of the "
            "paper's authors does. If you set it, raise `beta` by about the number of tokens in a completion."
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
            f"{', '.join(PRESETS)}. An option that you have changed and that contradicts "
            "it is an error.",
            "choices": tuple(PRESETS),
        },
    )
    desirable_weight: float = field(
        default=1.0,
        metadata={
            "help": "Loss weight of rows with a label of 1/2 or above. For continuous labels, the weight of "
            "demonstrations. Raise it if desirable rows are rare."
        },
    )
    undesirable_weight: float = field(
        default=1.0, metadata={"help": "Loss weight of all rows that `desirable_weight` does not apply to."}
    )
    share_prompts: bool = field(
        default=False,
        metadata={
            "help": "Whether to run rows of a micro-batch with the same prompt as one prompt with several branches. "
            "It saves time if prompts are long and have several completions. Requires 'sdpa' or 'eager' attention. "
            "Otherwise rows are padded, and a warning is logged."
        },
    )
    padding_free: bool = field(
        default=False,
        metadata={
            "help": "Whether to pack the rows of a micro-batch into one sequence without padding. The trainer raises "
            "an error at startup if packed and padded log-probabilities differ."
        },
    )
    invalid_rows: str = field(
        default="error",
        metadata={
            "help": "What to do with rows that cannot be read, such as rows without a label: 'error' lists them and "
            "stops, 'drop' leaves them out and counts them.",
            "choices": INVALID_ROWS,
        },
    )
    assistant_only_loss: bool = field(
        default=True,
        metadata={
            "help": "Whether to score only the assistant's turns if a completion has several turns. Set it to False "
            "to score everything after the prompt."
        },
    )
    chat: str = field(
        default="auto",
        metadata={
            "help": "Whether rows of plain text become a user message and an assistant message: 'true', 'false', or "
            "'auto'. 'auto' converts rows of CSV and TSV files if the tokenizer has a chat template."
        },
    )
    system_message: str | None = field(
        default=None, metadata={"help": "System message to add to conversations that have none."}
    )

    startup_checks: bool = field(
        default=True,
        metadata={
            "help": "Whether to check on a few rows, before the first step, that the log-probabilities match the "
            "model's own logits, that the reference equals the model before training, and that forward passes have no "
            "noise. A failed check raises an error."
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
        # TRL's default is bf16, which fails on a machine without bf16 support
        if self.bf16 is None and not (self.use_cpu or is_torch_bf16_gpu_available() or is_torch_xla_available()):
            self.bf16 = False
        # A progress bar writes many lines per second into a log file
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
                    f"{name}={value!r} is a setting of pairwise losses that {type(self).__name__} does not support. "
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
            raise ValueError(f"log_z must be a number or one of {LOG_Z_CHOICES}; got {self.log_z!r}.")
        if not isinstance(self.log_z, str):
            _check_number("log_z", self.log_z)
        _check_number("log_z_learning_rate", self.log_z_learning_rate, above=0)
        _check_number("desirable_weight", self.desirable_weight, least=0)
        _check_number("undesirable_weight", self.undesirable_weight, least=0)
        if self.desirable_weight == self.undesirable_weight == 0:
            raise ValueError(
                "desirable_weight and undesirable_weight are both 0, so the loss of every row would be 0. Raise one of "
                "them."
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
                "sync_ref_model=True changes the reference during training, but precompute_ref_log_probs=True runs it "
                "only once, before training. Set only one of them."
            )
        if self.log_z == "batch_kl" and self.precompute_ref_log_probs:
            raise ValueError(
                "log_z='batch_kl' runs the reference on new rows in each step, but precompute_ref_log_probs=True runs "
                "it only once, before training. Set precompute_ref_log_probs=False or another log_z."
            )
        if self.log_z == "batch_kl" and self.per_device_train_batch_size < 2:
            raise ValueError(
                "log_z='batch_kl' pairs the prompt of one row with the completion of another, so it needs at least two "
                "rows per micro-batch. Set per_device_train_batch_size to 2 or more, or set another log_z."
            )
        if self.log_z == "group":
            self._check_group()
        if self.padding_free and self.share_prompts:
            raise ValueError("padding_free and share_prompts exclude each other: both lay out a batch. Set only one.")

    def _check_group(self) -> None:
        """Raise ValueError, which names all of them, if settings contradict log_z='group'."""
        wrong = []
        if self.per_device_train_batch_size < 2:
            wrong.append("it compares the rows of a micro-batch: set per_device_train_batch_size to 2 or more")
        if self.train_sampling_strategy != "random":
            wrong.append(
                "it has its own order of rows, which keeps prompts together: leave "
                f"train_sampling_strategy={self.train_sampling_strategy!r} at 'random'"
            )
        if self.label_type == "binary" and self.binary_loss != "cross_entropy":
            wrong.append(f"it is a likelihood: leave binary_loss={self.binary_loss!r} at 'cross_entropy'")
        if self.label_type == "binary" and self.desirable_weight != self.undesirable_weight:
            wrong.append(
                "a group's likes and dislikes have one loss, so classes have no weights of their own: leave "
                f"desirable_weight={self.desirable_weight:g} and undesirable_weight={self.undesirable_weight:g} at 1"
            )
        if wrong:
            raise ValueError(f"log_z='group' contradicts other settings: {'; '.join(wrong)}. Or set another log_z.")

    def check_machine(self) -> None:
        """Raise ValueError or ImportError if this machine does not support a setting."""
        check_parallelism(getattr(self, "parallelism_config", None))
        if self.activation_offloading and not torch.accelerator.is_available():
            raise ValueError(
                "activation_offloading=True moves activations from an accelerator's memory to CPU memory, and this "
                "machine has no accelerator. Set it to False. gradient_checkpointing=True saves memory on any machine."
            )
        if self.use_liger_kernel and not is_liger_kernel_available():
            raise ImportError(
                "use_liger_kernel=True requires liger-kernel, which is not installed. Run `pip install liger-kernel`, "
                "or set it to False. TRL will remove this setting; model_init_kwargs={'use_kernels': True} replaces it."
            )

    def check_with_data(self, *, needs_reference: bool, has_mask: bool) -> None:
        """Raise ValueError if a setting contradicts the data.

        Args:
            needs_reference: whether the loss of any row uses the reference.
            has_mask: whether any row is marked as a demonstration.
        """
        weighted = self.desirable_weight != 1 or self.undesirable_weight != 1
        if weighted and self.label_type == "continuous" and not has_mask:
            raise ValueError(
                "For continuous labels, desirable_weight applies to demonstrations and undesirable_weight to all other "
                "rows, but no row is marked as a demonstration. Add a boolean column sft_mask, or set the weight of "
                "each row in a column weight."
            )
        if needs_reference:
            return
        if isinstance(self.log_z, str):
            raise ValueError(
                f"log_z={self.log_z!r} only affects rows that are compared with the reference; with {self.method} no "
                "row is. Leave log_z at 0."
            )
        best = (self.metric_for_best_model or "").removeprefix("eval_")
        if is_of_rewards(best):
            raise ValueError(
                f"metric_for_best_model={self.metric_for_best_model!r} needs a reference model; with {self.method} no "
                "row is compared with one, so none is loaded. Use eval_loss or eval_loss/sft."
            )
        if self.sync_ref_model:
            raise ValueError(
                f"sync_ref_model=True has no effect: with {self.method} no row is compared with a reference. Set it to "
                "False."
            )

    def check_best_metric(self, logged: Mapping[str, Sequence[str]]) -> None:
        """Raise ValueError if no evaluation will log `metric_for_best_model`, before the first evaluation shows it.

        Args:
            logged: the name of each evaluated dataset, or "" if there is one, → the figures that it will log.
        """
        prefixes = {name: f"{name}_" if name else "" for name in logged}
        known = [prefixes[name] + figure for name, figures in logged.items() for figure in figures]
        best = (self.metric_for_best_model or "loss").removeprefix("eval_")
        if best in known or best in [prefix + each for prefix in prefixes.values() for each in _TIMES]:
            return
        setting = f"metric_for_best_model={self.metric_for_best_model!r}"
        for name, prefix in prefixes.items():
            if best.removeprefix(prefix) in NEEDED_ROWS and best.startswith(prefix):
                raise ValueError(
                    f"{setting} will not be logged: it needs {NEEDED_ROWS[best.removeprefix(prefix)]}, which the "
                    f"{name or 'eval'} dataset does not have. It logs {', '.join(prefix + f for f in logged[name])}."
                )
        everything = [prefix + figure for prefix in prefixes.values() for figure in EVALUATED]
        near = difflib.get_close_matches(best, [*known, *everything], n=1, cutoff=0.75)
        hint = f"Did you mean eval_{near[0]}?" if near else f"Choices: {', '.join(known)}."
        raise ValueError(f"{setting} is not an eval metric. {hint} (Metrics of your own come from compute_metrics.)")

    def to_dict(self) -> dict[str, Any]:
        """Like `DPOConfig.to_dict`, which masks `hub_token`, but also without the token in `model_init_kwargs`."""
        found = super().to_dict()
        found["model_init_kwargs"] = _without_tokens(found["model_init_kwargs"])
        return found

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.to_dict().items())})"

    __str__ = __repr__

    def __getstate__(self) -> dict[str, Any]:
        # Trainer pickles its settings into every checkpoint and uploads them with it
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
        """The cell of the grid of methods, as text for messages."""
        return "positive_loss={!r} and negative_loss={!r}".format(*self.cell)

    @classmethod
    def from_dpo_config(cls, args: DPOConfig, **settings: Any) -> Self:
        """`args`' values in a config of this class, and this class's defaults for the rest.

        `args` is not changed. Its `__post_init__`, which reads the environment and warns, does not run again.

        Args:
            args: the config.
            **settings: of this class, set on top.

        Raises:
            TypeError: for a setting that this class does not have.
            ValueError: for a pair-only setting of `args` away from its default.
        """
        unknown = set(settings) - {f.name for f in fields(cls)}
        if unknown:
            raise TypeError(f"{cls.__name__} has no setting {', '.join(sorted(unknown))}.")
        config = cls._with_defaults()
        theirs = DPOConfig.__dataclass_fields__
        for name, value in vars(args).items():
            if name == "router_aux_loss_coef" and value == theirs[name].default:
                continue  # of TRL before 1.15: 0.001 for all models, and not the model's own weight
            # TRL writes into these while it sets up
            own = copy.deepcopy(value) if isinstance(value, list | dict | AcceleratorConfig) else value
            object.__setattr__(config, name, own)
        for name, value in settings.items():
            object.__setattr__(config, name, value)
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
                own = copy.deepcopy(value) if isinstance(value, list | dict | AcceleratorConfig) else value
                object.__setattr__(config, name, own)
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
    r"""Settings of `ULMATrainer`: those of `PointwiseDPOConfig`, and the following.

    Parameters:
        sft_weight: the weight of −log π_θ(y|x) on demonstrations, ≥ 0. Lower it if demonstrations dominate the
            feedback. Default: 1.
        sft_threshold: the label from which on a row is a demonstration, if labels are continuous and the data has no
            column `sft_mask`. With binary labels, rows with label 1 are demonstrations. Default: None.
        positive_loss: the loss of demonstrations: "sft", "pointwise_dpo" or "none". Default: "sft".
        negative_loss: the loss of rows with a label below 1 that are not demonstrations: "pointwise_dpo", "unlearning"
            (+log π_θ) or "none". For continuous labels, it is the loss of all rows that are not demonstrations.
            Default: "pointwise_dpo".

    `positive_loss` × `negative_loss` is the paper's grid of methods: ULMA ("sft" × "pointwise_dpo"), pointwise DPO
    ("pointwise_dpo" × "pointwise_dpo"), SFT ("sft" × "none"), unlikelihood ("sft" × "unlearning"), unlearning
    ("none" × "unlearning"), positive DPO ("pointwise_dpo" × "none"), negative DPO ("none" × "pointwise_dpo").

    Raises:
        ValueError: if a value is out of range, if the cell is not a method, or if a pairwise setting differs from its
            default.

    Example:
        >>> ULMAConfig("out", positive_loss="sft", negative_loss="none", report_to="none").cell
        ('sft', 'none')
    """

    sft_weight: float = field(
        default=1.0,
        metadata={
            "help": "Weight of the SFT loss of demonstrations. Lower it if demonstrations dominate the feedback."
        },
    )
    sft_threshold: float | None = field(
        default=None,
        metadata={
            "help": "Continuous label from which on a row is a demonstration, if the data has no column `sft_mask`. "
            "With binary labels, rows with label 1 are demonstrations."
        },
    )
    positive_loss: str = field(
        default="sft",
        metadata={
            "help": "Loss of demonstrations: 'sft' imitates them, 'pointwise_dpo' compares them with the reference, "
            "'none' ignores them.",
            "choices": POSITIVE_LOSSES,
        },
    )
    negative_loss: str = field(
        default="pointwise_dpo",
        metadata={
            "help": "Loss of rows with a label below 1 that are not demonstrations: 'pointwise_dpo' compares them with "
            "the reference, 'unlearning' lowers their probability, 'none' ignores them. For continuous labels, the "
            "loss of all rows that are not demonstrations.",
            "choices": NEGATIVE_LOSSES,
        },
    )

    @property
    def cell(self) -> tuple[str, str]:
        """The cell of the grid of methods: (positive_loss, negative_loss)."""
        return self.positive_loss, self.negative_loss

    def check(self) -> None:
        """Raise ValueError if these trainers do not support a value."""
        super().check()
        check_cell(*self.cell)
        _check_number("sft_weight", self.sft_weight, least=0)
        if self.sft_weight == 0 and self.cell == ("sft", "none"):
            raise ValueError(
                "sft_weight is 0 and negative_loss is 'none', so the loss of every row would be 0. Change one of them."
            )
        if self.sft_threshold is not None:
            _check_number("sft_threshold", self.sft_threshold)
        if self.label_type == "continuous" and self.negative_loss == "unlearning":
            raise ValueError(
                "negative_loss='unlearning' needs binary labels: a continuous label rates an answer, but does not say "
                "that the model should unlearn it. Use negative_loss='pointwise_dpo' or label_type='binary'."
            )


def check_parallelism(parallelism: Any) -> None:
    """Raise ValueError if a kind of parallelism is on for which the log-probabilities are not known to be right.

    Args:
        parallelism: accelerate's `ParallelismConfig`, or None.
    """
    kinds = {"tp_size": "tensor", "cp_size": "context", "sp_size": "sequence"}
    for name, kind in kinds.items():
        size = getattr(parallelism, name, None) or 1
        if size > 1:
            raise ValueError(
                f"{kind} parallelism ({name}={size}) is not supported: it would split the output embeddings or the "
                "tokens of a row across processes, and log-probabilities would be incomplete. Use DDP, FSDP2 or ZeRO."
            )


def _without_tokens(loading: Any) -> Any:
    return {k: v for k, v in loading.items() if "token" not in k} if isinstance(loading, dict) else loading


def _check_number(name: str, value: Any, *, above: float | None = None, least: float | None = None) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or (above is not None and value <= above) or (least is not None and value < least):
        needed = f"above {above}" if above is not None else "a number" if least is None else f"{least} or above"
        raise ValueError(f"{name} must be {needed}; got {value!r}.")
