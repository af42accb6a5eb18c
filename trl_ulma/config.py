"""Settings of the trainers: TRL's `DPOConfig` without its pairwise settings, plus the pointwise ones."""

import argparse
import copy
import inspect
import re
import sys
from dataclasses import MISSING, dataclass, field
from typing import TYPE_CHECKING, Any, Self

from transformers.utils import is_in_notebook, is_torch_bf16_gpu_available, is_torch_xla_available
from trl import DPOConfig

from trl_ulma import config_conversion
from trl_ulma.config_checks import check_settings
from trl_ulma.labels import LABEL_TYPES, TRANSFORMS
from trl_ulma.log_partition import LOG_Z_CHOICES
from trl_ulma.losses import BINARY_LOSSES, NEGATIVE_LOSSES, POSITIVE_LOSSES
from trl_ulma.metrics import LOWER_IS_BETTER
from trl_ulma.presets import PRESETS
from trl_ulma.rows.dropped import INVALID_ROWS

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


def _with_remote_code(config_class: Any) -> Any:
    """A config class with `trust_remote_code`.

    `DPOConfig` has this setting from TRL 1.7 on. Before, `ModelConfig` has it, and a script that parses both must not
    have it twice. There it is a part of `model_init_kwargs`. This can go when TRL 1.7 is the oldest.
    """

    def get(self: Any) -> bool:
        return (self.model_init_kwargs or {}).get("trust_remote_code", False)

    def put(self: Any, value: bool) -> None:
        self.model_init_kwargs = {**(self.model_init_kwargs or {}), "trust_remote_code": value}

    if "trust_remote_code" not in config_class.__dataclass_fields__:
        config_class.trust_remote_code = property(get, put)
    return config_class


def _with_help(config_class: Any) -> Any:
    """A config class whose docstring is also the help text of its settings on the command line."""
    own = config_class.__dataclass_fields__
    texts = re.findall(r"^    (\w+): (.+(?:\n {8}.+)*)", inspect.cleandoc(config_class.__doc__ or ""), re.M)
    for name, text in texts:
        if name in own:
            names = f" Names: {', '.join(_NAMES[name])}." if name in _NAMES else ""
            own[name].metadata = {**own[name].metadata, "help": " ".join(text.split()) + names}
    return config_class


# Names that a setting accepts beside other values
_NAMES = {"log_z": LOG_Z_CHOICES, "label_transform": TRANSFORMS}


@_with_help
@_with_remote_code
@dataclass(repr=False)
class PointwiseDPOConfig(DPOConfig):
    r"""Settings of `PointwiseDPOTrainer`: those of `trl.DPOConfig`, and the following.

    Parameters:
        label_type: What the labels are: "binary" (in [0, 1], including soft labels; loss of Eq. 8) or "continuous"
            (any number, higher is better; loss of Eq. 9). A column `label_type` overrides it per row.
        label_transform: Transforms to apply to the labels before training, such as "lower_is_better,standardize" or
            "threshold:0.5". Separate names by commas, and put a name's numbers after a colon. They are fitted on the
            training set and saved with the model. "center_raters" reads a column `rater`.
        label_report: Whether to print a report on the training labels and to write it to output_dir/label_report.json.
        log_z: log Z(x), which is added to every log-ratio: a number in nats, or a name. With 0, a column log_z takes
            its place if the rows have one. Change it if the labels are unbalanced or not centered at 0. With "group",
            the rows of a prompt in a micro-batch are only compared with each other, and log Z cancels.
        log_z_learning_rate: Learning rate of the log_z choices "learned" and "learned_constant", in units of the reward
            per step. It follows the learning-rate schedule.
        length_normalize: Whether to divide every log-probability by the number of completion tokens, as the code of the
            paper's authors does. If you set it, multiply `beta` by about the number of tokens in a completion.
        binary_loss: The loss of compared rows with binary or soft labels: "cross_entropy" (pointwise DPO, Eq. 8),
            "squared_error" (UNA) or "kto" (KTO's, which saturates).
        preset: A published method by its name, which sets the options that it stands for: "qrpo", "sppo", "bco", "una"
            or "kto". An option that you have changed and that contradicts it is an error.
        desirable_weight: Loss weight of rows with a label of 1/2 or above. For continuous labels, the weight of
            demonstrations. Raise it if desirable rows are rare.
        undesirable_weight: Loss weight of all rows that `desirable_weight` does not apply to.
        share_prompts: Whether to run rows of a micro-batch with the same prompt as one prompt with several branches.
            It saves time if prompts are long and have several completions. Requires "sdpa" or "eager" attention.
            Otherwise rows are padded, and a warning is logged.
        padding_free: Whether to pack the rows of a micro-batch into one sequence without padding. The trainer raises
            an error at startup if packed and padded log-probabilities differ.
        invalid_rows: What to do with rows that cannot be read, such as rows without a label: "error" lists them and
            stops, "drop" leaves them out and counts them.
        assistant_only_loss: Whether to score only the assistant's turns if a completion has several turns. Set it to
            False to score everything after the prompt.
        chat: Whether rows of plain text become a user message and an assistant message: True, False, or "auto". "auto"
            converts rows of CSV and TSV files if the tokenizer has a chat template.
        system_message: System message to add to conversations that have none.
        startup_checks: Whether to check on a few rows, before the first step, that the log-probabilities match the
            model's own logits, that the reference equals the model before training, and that forward passes have no
            noise. A failed check raises an error.
        trust_remote_code: Whether models and tokenizers may run Python code that comes with them from the hub. With TRL
            before 1.7, it is set in `model_init_kwargs`.
        router_aux_loss_coef: Weight of the load-balancing loss of a mixture of experts. By default the model's own
            weight; 0.0 switches the loss off.

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

    label_type: str = field(default="binary", metadata={"choices": LABEL_TYPES})
    label_transform: str | None = None
    label_report: bool = True
    log_z: LogZ = 0.0
    log_z_learning_rate: float = 0.01
    length_normalize: bool = False
    binary_loss: str = field(default="cross_entropy", metadata={"choices": tuple(BINARY_LOSSES)})
    preset: str | None = field(default=None, metadata={"choices": tuple(PRESETS)})
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    share_prompts: bool = False
    padding_free: bool = False
    invalid_rows: str = field(default="error", metadata={"choices": INVALID_ROWS})
    assistant_only_loss: bool = True
    chat: str = "auto"
    system_message: str | None = None
    startup_checks: bool = True
    # TRL before 1.7 does not have it, and before 1.15 it has another default
    router_aux_loss_coef: float | None = None
    # In transformers 5.2 the default is a Space on the Hub, which is public
    trackio_space_id: str | None = field(
        default=None, metadata=DPOConfig.__dataclass_fields__["trackio_space_id"].metadata
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
        # Trainer takes any metric for one whose largest value is best, unless its name ends with "loss"
        best = (self.metric_for_best_model or "").removeprefix("eval_")
        if self.greater_is_better is None and best.endswith(LOWER_IS_BETTER):
            self.greater_is_better = False
        super().__post_init__()

    @property
    def cell(self) -> tuple[str, str]:
        """The cell of the grid of methods: (positive_loss, negative_loss)."""
        return "pointwise_dpo", "pointwise_dpo"

    def check(self) -> None:
        """Set what `preset` stands for, and raise ValueError if the trainers do not support a value."""
        self.chat = str(self.chat).lower()
        check_settings(self)

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
        return config_conversion.from_dpo_config(cls, args, settings)

    @classmethod
    def from_kto_config(cls, args: Any) -> Self:
        """The values of a `trl.KTOConfig` in a config of this class, and this class's defaults for the rest.

        `desirable_weight` and `undesirable_weight` mean the same here. The loss becomes the pointwise one, which is
        logged once.

        Raises:
            ValueError: for settings that only KTO has, away from their defaults; all of them at once.
        """
        return config_conversion.from_kto_config(cls, args)


@_with_help
@dataclass(repr=False)
class ULMAConfig(PointwiseDPOConfig):
    r"""Settings of `ULMATrainer`: those of `PointwiseDPOConfig`, and the following.

    Parameters:
        sft_weight: Weight of the SFT loss of demonstrations. Lower it if demonstrations dominate the feedback.
        sft_threshold: Continuous label from which on a row is a demonstration, if the data has no column `sft_mask`.
            With binary labels, rows with label 1 are demonstrations.
        positive_loss: Loss of demonstrations: "sft" imitates them, "pointwise_dpo" compares them with the reference,
            "none" ignores them.
        negative_loss: Loss of rows with a label below 1 that are not demonstrations: "pointwise_dpo" compares them with
            the reference, "unlearning" lowers their probability, "none" ignores them. For continuous labels, the loss
            of all rows that are not demonstrations.

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

    sft_weight: float = 1.0
    sft_threshold: float | None = None
    positive_loss: str = field(default="sft", metadata={"choices": POSITIVE_LOSSES})
    negative_loss: str = field(default="pointwise_dpo", metadata={"choices": NEGATIVE_LOSSES})

    @property
    def cell(self) -> tuple[str, str]:
        """The cell of the grid of methods: (positive_loss, negative_loss)."""
        return self.positive_loss, self.negative_loss


def _without_tokens(loading: Any) -> Any:
    return {k: v for k, v in loading.items() if "token" not in k} if isinstance(loading, dict) else loading
