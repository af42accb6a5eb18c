"""Checks of the settings: alone, on this machine, and against the data of a training."""

import copy
import difflib
import math
import numbers
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from transformers import Trainer
from transformers.utils import is_liger_kernel_available
from trl import DPOConfig

from trl_ulma.labels import LABEL_TYPES, parse_transform
from trl_ulma.log_partition import LOG_Z_CHOICES
from trl_ulma.losses import check_binary_loss, check_cell
from trl_ulma.metrics import EVALUATED, NEEDED_ROWS, is_of_rewards
from trl_ulma.presets import apply_preset
from trl_ulma.rows.chat import check_chat
from trl_ulma.rows.dropped import INVALID_ROWS

# Settings of TRL that only apply to pairs, and what to use instead
PAIRWISE = {
    "loss_type": "positive_loss and negative_loss of ULMAConfig choose the method",
    "loss_weights": "use sft_weight for demonstrations, and desirable_weight and undesirable_weight for the classes",
    "ld_alpha": "use length_normalize=True to divide by the completion's length",
    "f_divergence_type": "only the reverse KL divergence defines an implicit reward for single rows",
    "f_alpha_divergence_coef": "only the reverse KL divergence defines an implicit reward for single rows",
    "label_smoothing": "soften the labels in the data: use 0.9 and 0.1 instead of 1 and 0",
    "use_weighting": "add a weight column to the rows",
    "discopop_tau": "positive_loss and negative_loss of ULMAConfig choose the method",
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
_SWITCHES = (
    "label_report",
    "length_normalize",
    "share_prompts",
    "padding_free",
    "assistant_only_loss",
    "startup_checks",
)
# Real numbers, and their bounds
_NUMBERS: dict[str, dict[str, float]] = {
    "beta": {"above": 0},
    "log_z": {},
    "log_z_learning_rate": {"above": 0},
    "desirable_weight": {"least": 0},
    "undesirable_weight": {"least": 0},
    "sft_weight": {"least": 0},
    "sft_threshold": {},
    "ref_model_mixup_alpha": {"above": 0, "most": 1},
    # Trainer's own: out of these bounds, a training would do something else than it says, or fail at its first step
    "learning_rate": {"least": 0},
    "weight_decay": {"least": 0},
    "max_grad_norm": {"least": 0},
    "adam_beta1": {"least": 0, "below": 1},
    "adam_beta2": {"least": 0, "below": 1},
    "adam_epsilon": {"least": 0},
    "num_train_epochs": {"least": 0},
    "warmup_steps": {"least": 0},
}
# Numbers that can be infinite: no clipping, and as many epochs as max_steps take
_ENDLESS = ("max_grad_norm", "num_train_epochs")
_FLOAT32 = torch.finfo(torch.float32)
# What Trainer adds to the figures of an evaluation
_TIMES = ("runtime", "samples_per_second", "steps_per_second")
_PARALLELISM = {"tp_size": "tensor", "cp_size": "context", "sp_size": "sequence"}


def check_settings(args: Any) -> None:
    """Set what `preset` stands for, and raise ValueError if the trainers do not support a value."""
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "").lower() in ("1", "true"):
        sizes = {size: int(os.environ.get(f"PARALLELISM_CONFIG_{size.upper()}", 1)) for size in _PARALLELISM}
        check_parallelism(SimpleNamespace(**sizes))
    _check_pairwise(args)
    _check_choice("label_type", args.label_type, LABEL_TYPES)
    _check_number("beta", args.beta, **_NUMBERS["beta"])  # which presets read
    apply_preset(args, {f.name: f.default for f in fields(args)})
    check_binary_loss(args.binary_loss)
    check_cell(*args.cell)
    if args.label_transform is not None:
        parse_transform(args.label_transform, args.label_type)
    if isinstance(args.log_z, str) and args.log_z not in LOG_Z_CHOICES:
        raise ValueError(f"log_z must be a number or one of {LOG_Z_CHOICES}; got {args.log_z!r}.")
    check_numbers(args)
    for name, least in _WHOLE.items():
        value = getattr(args, name)
        if value is None or (name == "pad_to_multiple_of" and isinstance(value, str)):  # text, which TRL reads
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be a whole number, {least} or above; got {value!r}.")
    if args.truncation_mode not in ("keep_start", "keep_end"):
        raise ValueError(f"truncation_mode must be 'keep_start' or 'keep_end'; got {args.truncation_mode!r}.")
    check_chat(args.chat, args.system_message)
    _check_choice("invalid_rows", args.invalid_rows, INVALID_ROWS)
    # Trainer takes rows in a random order with any other one. transformers 5.2 does not have "batch_rebalance".
    orders = DPOConfig.__dataclass_fields__["train_sampling_strategy"].metadata["choices"]
    _check_choice("train_sampling_strategy", args.train_sampling_strategy, orders)
    for name in _SWITCHES:
        if not isinstance(getattr(args, name), bool):
            raise ValueError(f"{name} must be True or False; got {getattr(args, name)!r}.")
    for is_wrong, message in _combinations(args):
        if is_wrong:
            raise ValueError(message)
    if args.log_z == "group":
        _check_group(args)


def _combinations(args: Any) -> list[tuple[bool, str]]:
    """(whether they are set, what is wrong) of values that are valid alone and not together."""
    return [
        (
            args.desirable_weight == args.undesirable_weight == 0,
            "desirable_weight and undesirable_weight are both 0, so the loss of every row would be 0. Raise one of "
            "them.",
        ),
        (
            getattr(args, "sft_weight", 1) == 0 and args.cell == ("sft", "none"),
            "sft_weight is 0 and negative_loss is 'none', so the loss of every row would be 0. Change one of them.",
        ),
        (
            args.label_type == "continuous" and args.cell[1] == "unlearning",
            "negative_loss='unlearning' needs binary labels: a continuous label rates an answer, but does not say "
            "that the model should unlearn it. Use negative_loss='pointwise_dpo' or label_type='binary'.",
        ),
        (
            args.sync_ref_model and args.precompute_ref_log_probs,
            "sync_ref_model=True changes the reference during training, but precompute_ref_log_probs=True runs it "
            "only once, before training. Set only one of them.",
        ),
        (
            args.log_z == "batch_kl" and args.precompute_ref_log_probs,
            "log_z='batch_kl' runs the reference on new rows in each step, but precompute_ref_log_probs=True runs "
            "it only once, before training. Set precompute_ref_log_probs=False or another log_z.",
        ),
        (
            args.log_z == "batch_kl" and args.per_device_train_batch_size < 2,
            "log_z='batch_kl' pairs the prompt of one row with the completion of another, so it needs at least two "
            "rows per micro-batch. Set per_device_train_batch_size to 2 or more, or set another log_z.",
        ),
        (
            args.label_smoothing_factor != 0,
            f"label_smoothing_factor={args.label_smoothing_factor!r} is a setting of Trainer's own loss, which is not "
            "used here. Leave it at 0.0; soften the labels in the data: use 0.9 and 0.1 instead of 1 and 0.",
        ),
        (
            args.bf16_full_eval or args.fp16_full_eval,
            "bf16_full_eval and fp16_full_eval convert the model itself before an evaluation: the rewards, the weights "
            "that are saved afterwards, and a later training would be in half precision. Leave them at False. With "
            "bf16=True or fp16=True, evaluations compute in this format anyway.",
        ),
        (
            args.eval_strategy == "no" and (args.load_best_model_at_end or args.save_strategy == "best"),
            "The best model is found by evaluations, but with eval_strategy='no' there are none, so no checkpoint "
            "would be the best. Set eval_strategy to 'steps' or 'epoch', or leave out load_best_model_at_end=True and "
            "save_strategy='best'.",
        ),
        (
            args.num_train_epochs == 0 and args.max_steps <= 0,
            f"num_train_epochs=0 with max_steps={args.max_steps} trains no step. Set either above 0. To evaluate, "
            "leave them as they are and do not call train().",
        ),
        (
            _name_of_optimizer(args) in ("lomo", "adalomo") and args.gradient_accumulation_steps > 1,
            "LOMO changes the weights in each backward pass, so each of the gradient_accumulation_steps="
            f"{args.gradient_accumulation_steps} micro-batches would be a step of its own. Set it to 1, and a larger "
            "per_device_train_batch_size, or another optim.",
        ),
        (
            args.padding_free and args.share_prompts,
            "padding_free and share_prompts exclude each other: both lay out a batch. Set only one.",
        ),
        (
            args.length_column_name != "length",
            f"length_column_name={args.length_column_name!r} is not used, because the trainer writes the number of "
            "tokens of each row into the column 'length'. Leave it at 'length'.",
        ),
    ]


def _check_group(args: Any) -> None:
    """Raise ValueError, which names all of them, if settings contradict log_z='group'."""
    wrong = []
    if args.per_device_train_batch_size < 2:
        wrong.append("it compares the rows of a micro-batch: set per_device_train_batch_size to 2 or more")
    if args.train_sampling_strategy != "random":
        wrong.append(
            "it has its own order of rows, which keeps prompts together: leave "
            f"train_sampling_strategy={args.train_sampling_strategy!r} at 'random'"
        )
    if args.label_type == "binary" and args.binary_loss != "cross_entropy":
        wrong.append(f"it is a likelihood: leave binary_loss={args.binary_loss!r} at 'cross_entropy'")
    if args.label_type == "binary" and args.desirable_weight != args.undesirable_weight:
        wrong.append(
            "a group's likes and dislikes have one loss, so classes have no weights of their own: leave "
            f"desirable_weight={args.desirable_weight:g} and undesirable_weight={args.undesirable_weight:g} at 1"
        )
    if wrong:
        raise ValueError(f"log_z='group' contradicts other settings: {'; '.join(wrong)}. Or set another log_z.")


def _check_pairwise(args: Any) -> None:
    name_of_class = type(args).__name__
    for name, instead in PAIRWISE.items():
        original = DPOConfig.__dataclass_fields__[name]
        default = original.default if original.default is not MISSING else original.default_factory()
        value = getattr(args, name)
        if name == "loss_type" and "kto" in (value if isinstance(value, list) else [value]):
            raise ValueError(
                f"loss_type={value!r} is a setting of DPOConfig, which {name_of_class} does not have. Set "
                "preset='kto' for KTO's loss and reference point, and leave loss_type out."
            )
        if value != default and [value] != default:
            raise ValueError(
                f"{name}={value!r} is a setting of pairwise losses that {name_of_class} does not support. Leave it at "
                f"{default!r}; {instead}."
            )


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}; got {value!r}.")


def check_numbers(args: Any) -> None:
    """Raise ValueError if a setting that is a number is none, or is out of its bounds."""
    for name, bounds in _NUMBERS.items():
        value = getattr(args, name, 0.0)  # only ULMA has the last two
        if not ((name == "log_z" and isinstance(value, str)) or (name == "sft_threshold" and value is None)):
            _check_number(name, value, **bounds)


def _check_number(
    name: str,
    value: Any,
    *,
    above: float = -math.inf,
    least: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
) -> None:
    if name == "max_grad_norm" and value is None:
        raise ValueError("max_grad_norm=None is not a number. Set it to 0.0 to train without clipping gradients.")
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    is_endless = is_number and value == math.inf and name in _ENDLESS
    size: Any = value
    if not is_number or not (is_endless or (above < size < below and least <= size <= most)):  # also for NaN
        needed = f"above {above}" if above > -math.inf else f"{least} or above" if least > -math.inf else "a number"
        needed += "" if most == math.inf else f", and at most {most}"
        needed += "" if below == math.inf else f", and below {below}"
        raise ValueError(f"{name} must be {needed}; got {value!r}.")
    if size and not is_endless and not _FLOAT32.tiny <= abs(size) <= _FLOAT32.max:
        raise ValueError(f"{name} is {value!r}, which float32 rounds to 0 or to infinity. Choose another value.")


def check_machine(args: Any) -> None:
    """Raise ValueError or ImportError if this machine does not support a setting."""
    check_parallelism(getattr(args, "parallelism_config", None))
    if args.activation_offloading and not torch.accelerator.is_available():
        raise ValueError(
            "activation_offloading=True moves activations from an accelerator's memory to CPU memory, and this "
            "machine has no accelerator. Set it to False. gradient_checkpointing=True saves memory on any machine."
        )
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise ImportError(
            "use_liger_kernel=True requires liger-kernel, which is not installed. Run `pip install liger-kernel`, "
            "or set it to False. TRL will remove this setting; model_init_kwargs={'use_kernels': True} replaces it."
        )


def check_batches(args: Any, rows: Any, size: int) -> None:
    """Raise ValueError if `dataloader_drop_last` leaves no batch of the training rows, or has no effect on them.

    Args:
        rows: prepared rows.
        size: the number of rows of a batch over all processes.
    """
    if args.dataloader_drop_last and not isinstance(rows, Dataset):
        raise ValueError(
            "dataloader_drop_last=True has no effect on a stream, of which the last batch is trained on, too. Set it "
            "to False."
        )
    if args.dataloader_drop_last and len(rows) < size:
        raise ValueError(
            f"dataloader_drop_last=True leaves no rows of the train dataset: it has {len(rows)}, and a batch over all "
            f"processes has {size}. Set it to False, or lower the batch size."
        )


def check_optimizer_arguments(args: Any, trainer: type[Trainer]) -> None:
    """Raise ValueError if the optimizer that a class of trainers creates does not read one of `optim_args`."""
    text, optim = str(args.optim_args or "").replace(" ", ""), _name_of_optimizer(args)
    # These are created with the model, which they may change
    if not text or optim.split("_")[0] in ("galore", "apollo", "lomo", "adalomo"):
        return
    if trainer.create_optimizer is not Trainer.create_optimizer:  # which can read anything
        return
    given = {name: value for name, _, value in (pair.partition("=") for pair in text.split(","))}

    def made(arguments: Mapping[str, str] | None = None) -> Any:
        changed = copy.copy(args)
        if arguments is not None:
            vars(changed)["optim_args"] = ",".join(f"{name}={value}" for name, value in arguments.items())
        try:
            return trainer.get_optimizer_cls_and_kwargs(changed)
        except Exception as error:
            return error

    wanted = made()
    if isinstance(wanted, Exception):  # which Trainer raises
        return

    def is_read(name: str) -> bool:
        # Another value is another setting, or an error
        others = {key: value for key, value in given.items() if key != name}
        return any(made(arguments) != wanted for arguments in (others, {**given, name: "no-value"}))

    unread = [name for name in given if not is_read(name)]
    if unread:
        raise ValueError(
            f"optim={optim!r} does not read {', '.join(unread)} of optim_args={args.optim_args!r}, so the "
            "training would ignore it. Leave it out, or pass an optimizer with `optimizers=(optimizer, None)`."
        )


def _name_of_optimizer(args: Any) -> str:
    return str(getattr(args.optim, "value", args.optim))


def check_parallelism(parallelism: Any) -> None:
    """Raise ValueError if a kind of parallelism is on for which the log-probabilities are not known to be right."""
    for name, kind in _PARALLELISM.items():
        size = getattr(parallelism, name, None) or 1
        if size > 1:
            raise ValueError(
                f"{kind} parallelism ({name}={size}) is not supported: it would split the output embeddings or the "
                "tokens of a row across processes, and log-probabilities would be incomplete. Use DDP, FSDP2 or ZeRO."
            )


def check_with_data(args: Any, *, needs_reference: bool, has_mask: bool) -> None:
    """Raise ValueError if a setting contradicts the data.

    Args:
        needs_reference: whether the loss of any row uses the reference.
        has_mask: whether any row is marked as a demonstration.
    """
    weighted = args.desirable_weight != 1 or args.undesirable_weight != 1
    if weighted and args.label_type == "continuous" and not has_mask:
        raise ValueError(
            "For continuous labels, desirable_weight applies to demonstrations and undesirable_weight to all other "
            "rows, but no row is marked as a demonstration. Add a boolean column sft_mask, or set the weight of "
            "each row in a column weight."
        )
    if needs_reference:
        return
    if isinstance(args.log_z, str):
        raise ValueError(
            f"log_z={args.log_z!r} only affects rows that are compared with the reference; with {args.method} no "
            "row is. Leave log_z at 0."
        )
    if is_of_rewards((args.metric_for_best_model or "").removeprefix("eval_")):
        raise ValueError(
            f"metric_for_best_model={args.metric_for_best_model!r} needs a reference model; with {args.method} no "
            "row is compared with one, so none is loaded. Use eval_loss or eval_loss/sft."
        )
    if args.sync_ref_model:
        raise ValueError(
            f"sync_ref_model=True has no effect: with {args.method} no row is compared with a reference. Set it to "
            "False."
        )


def check_best_metric(metric: str | None, logged: Mapping[str, Sequence[str]], *, in_groups: bool = False) -> None:
    """Raise ValueError if no evaluation will log `metric_for_best_model`, before the first evaluation shows it.

    Args:
        logged: the name of each evaluated dataset, or "" if there is one, → the figures that it will log.
        in_groups: whether rewards are compared within a prompt, with log_z="group".
    """
    prefixes = {name: f"{name}_" if name else "" for name in logged}
    known = [prefixes[name] + figure for name, figures in logged.items() for figure in figures]
    best = (metric or "loss").removeprefix("eval_")
    if best in known or best in [prefix + each for prefix in prefixes.values() for each in _TIMES]:
        return
    setting = f"metric_for_best_model={metric!r}"
    for name, prefix in prefixes.items():
        figure = best.removeprefix(prefix)
        if figure in EVALUATED and best.startswith(prefix):
            among = " among the rows of a prompt, which log_z='group' compares" if in_groups else ""
            needed = NEEDED_ROWS.get(figure, "several answers")
            raise ValueError(
                f"{setting} will not be logged: it needs {needed}{among}, which the "
                f"{name or 'eval'} dataset does not have. It logs {', '.join(prefix + f for f in logged[name])}."
            )
    everything = [prefix + figure for prefix in prefixes.values() for figure in EVALUATED]
    near = difflib.get_close_matches(best, [*known, *everything], n=1, cutoff=0.75)
    hint = f"Did you mean eval_{near[0]}?" if near else f"Choices: {', '.join(known)}."
    raise ValueError(f"{setting} is not an eval metric. {hint} (Metrics of your own come from compute_metrics.)")
