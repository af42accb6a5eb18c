"""Checkpoints: which ones are complete, and which one training resumes from."""

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import is_peft_model
from datasets import Dataset
from peft import set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import Trainer, TrainerState
from transformers import __version__ as transformers_version
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

from trl_ulma.main_process import get_logger

logger = get_logger(__name__)

_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin")

# This file is written to a checkpoint's folder after all other files
WHOLE = "whole"
# This one holds the settings that a resumed training must have in common with the one that wrote the checkpoint
CONDITIONS = "conditions.json"
_LOSS = (
    *("positive_loss", "negative_loss", "binary_loss", "sft_weight", "beta", "log_z", "log_z_learning_rate"),
    *("length_normalize", "desirable_weight", "undesirable_weight", "label_type", "label_transform", "sft_threshold"),
    *("max_length", "truncation_mode", "assistant_only_loss", "disable_dropout", "precompute_ref_log_probs"),
    *("system_message", "router_aux_loss_coef"),
)
# Settings that the states in a checkpoint replace
_RESTORED = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
# Settings by which the steps to come differ
_STEPS = (
    *("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio", "max_grad_norm", "optim"),
    *("optim_args", "optim_target_modules", "neftune_noise_alpha", "bf16", "fp16"),
)
# Schedules that do not depend on the number of steps
_ENDLESS = ("constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau", "greedy")
_EFFECTS = {
    "order": "The order of rows is another one now, so some rows of this epoch are skipped or repeated.",
    "loss": "The steps to come minimize another loss than those before.",
    "steps": "The steps to come have other learning rates or gradients than those of one training.",
    "restored": "The checkpoint's optimizer keeps its own {names}.",
}


def mark_whole(folder: Path) -> None:
    """Mark a checkpoint as complete."""
    (folder / WHOLE).touch()


def copy_files(source: Path, target: str, names: Sequence[str]) -> None:
    """Copy the files that there are from one folder to another."""
    for name in names:
        if (source / name).exists():
            shutil.copy(source / name, target)


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints in a folder, complete or not, the newest first."""
    folder = Path(output_dir)
    found = {
        int(match[1]): path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    return [found[step] for step in sorted(found, reverse=True)]


def last_whole(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint in a folder, or None. Logs a warning for each newer one that it skips.

    `transformers` takes the checkpoint with the highest number, complete or not, and fails if there is none.
    """
    for path in checkpoints(output_dir):
        if (path / WHOLE).exists():
            return path
        logger.warning(f"The checkpoint {path} is incomplete and is skipped.")
    return None


def refuse_pickle(folder: str | Path, loading: dict[str, Any] | None) -> None:
    """Raise ValueError if the weights in a folder are pickled, unless `loading` has `use_safetensors=False`.

    Args:
        folder: the folder of a model or a checkpoint. If it is not a folder, it is not checked.
    """
    loading = loading or {}
    weights = Path(folder) / loading.get("subfolder", "")
    pickled = next((name for name in _PICKLED if (weights / name).exists()), None)
    if pickled is None or any(weights.glob("*.safetensors")) or loading.get("use_safetensors") is False:
        return
    raise ValueError(
        f"The weights in {weights} are pickled ({pickled}). They are not loaded, because a pickle can run code. Save "
        'them as safetensors, or, if you trust them, set model_init_kwargs={"use_safetensors": False}.'
    )


def checkpoint_to_resume(resume_from_checkpoint: Any, output_dir: str, loading: dict[str, Any] | None) -> str | None:
    """The checkpoint that training resumes from. True selects the newest complete checkpoint.

    Args:
        resume_from_checkpoint: the argument of `Trainer.train`: None, a bool, or a folder.

    Raises:
        ValueError: if the checkpoint's weights are pickled.
    """
    if not resume_from_checkpoint:
        return None
    if resume_from_checkpoint is True:
        whole = last_whole(output_dir)
        if whole is None:
            logger.warning(f"There is no complete checkpoint in {output_dir}. Training starts from scratch.")
            return None
        resume_from_checkpoint = str(whole)
    elif not (Path(resume_from_checkpoint) / WHOLE).exists():
        logger.warning(
            f"The checkpoint {resume_from_checkpoint} is not marked as complete: it is incomplete, or another trainer "
            "wrote it. Training resumes from it anyway."
        )
    refuse_pickle(resume_from_checkpoint, loading)
    folder = Path(resume_from_checkpoint)
    # DeepSpeed's own schedules are in its folder
    if folder.is_dir() and not ((folder / SCHEDULER_NAME).exists() or any(folder.glob("global_step*"))):
        logger.warning(
            f"The checkpoint {folder} has no states of the optimizer and the learning-rate schedule, as with "
            "save_only_model=True. Both start anew, so the steps to come differ from those of an unbroken training."
        )
    return resume_from_checkpoint


@contextmanager
def other_shapes_explained(checkpoint: str | Path) -> Iterator[None]:
    """A context for loading a checkpoint's weights. If they are not those of the model, the error says so.

    Raises:
        ValueError: if names or shapes differ. The message names a weight, and what to do.
    """
    try:
        yield
    except (KeyError, ValueError) as error:
        if isinstance(error, ValueError) and "checkpoint index" not in str(error):
            raise
        raise ValueError(
            f"The checkpoint {checkpoint} does not fit the model ({error}). Resume with the model of the checkpoint "
            "and, for an adapter, with its settings."
        ) from error
    except RuntimeError as error:
        weight = re.search(r"size mismatch for ([^:\n]+): .*?(\[[\d, ]*\]).*?(\[[\d, ]*\])", str(error))
        if weight is None:
            raise
        name, there, here = weight.groups()
        raise ValueError(
            f"The checkpoint {checkpoint} does not fit the model: {name} has the shape {there} in the checkpoint and "
            f"{here} in the model. Resume with the model of the checkpoint and, for an adapter, with its settings, "
            "such as the rank of LoRA."
        ) from error


def load_adapter_without_peft_model(folder: str | Path, model: Any) -> bool:
    """Load the weights of an adapter that transformers has added to a model (`model.add_adapter`), and return True.

    Trainer looks for those of a full model then. Return False if the model has no such adapter, or the folder none.
    """
    is_added = getattr(model, "_hf_peft_config_loaded", False) and not is_peft_model(model)
    if not is_added or not (Path(folder) / SAFETENSORS_WEIGHTS_NAME).exists():
        return False
    saved = load_file(Path(folder) / SAFETENSORS_WEIGHTS_NAME)
    weights = {name.removeprefix("base_model.model."): value for name, value in saved.items()}
    set_peft_model_state_dict(model, weights, model.active_adapters()[0])
    return True


def check_optimizer_state(checkpoint: str | Path, optim: str, own: set[str], loaded: Any) -> None:
    """Raise ValueError if a checkpoint has the state of another kind of optimizer, with which no step can be taken.

    Args:
        optim: the name of the optimizer.
        own: the names of its settings before the state was loaded.
        loaded: the optimizer with the state.
    """
    missing = sorted(own.difference(loaded.param_groups[0]))
    if missing:
        raise ValueError(
            f"The checkpoint {checkpoint} has the state of another optimizer than optim={optim!r}: it lacks "
            f"{', '.join(missing)}. Resume with the optimizer of the checkpoint. To go on with another one, train the "
            "checkpoint's model anew, and pass as ref_model the model that the training began with."
        )


def stream_position(checkpoint: str | Path, accumulation: int) -> tuple[int, int] | None:
    """(complete passes over a stream, micro-batches of the pass after them) at a checkpoint. None if it is not known.

    Args:
        accumulation: micro-batches per optimizer step.

    Raises:
        ValueError: if it is in a later pass than the first one, and the installed transformers cannot resume there.
    """
    file = Path(checkpoint) / TRAINER_STATE_NAME
    if not file.exists():
        return None
    state = TrainerState.load_from_json(str(file))
    # Trainer counts a pass over a stream, whose length it does not know, as max_steps steps. It writes after a step, so
    # a whole number is the end of a pass.
    epoch = state.epoch or 0
    passes = max(math.ceil(epoch) - 1, 0)
    if passes and not hasattr(Trainer, "_init_training_state"):
        raise ValueError(
            f"The checkpoint {checkpoint} is in pass {passes + 1} over a stream, and transformers "
            f"{transformers_version} can only resume in the first one. "
            "Install a newer transformers, or load the dataset without streaming."
        )
    return passes, round((epoch - passes) * state.max_steps) * accumulation


def warn_of_other_place(state: Any, micro_batches: int, accumulation: int) -> None:
    """Log a warning if a resumed training goes on in another place of an epoch than the one where it stopped.

    The place is computed from the number of steps, and an epoch has another number of steps if the rows, the batch
    size, the accumulation, or the number of processes is another one.

    Args:
        state: the trainer's state, loaded from the checkpoint.
        micro_batches: the number of micro-batches in an epoch.
        accumulation: the number of micro-batches in a step.
    """
    epochs, steps = divmod(state.global_step, max(math.ceil(micro_batches / accumulation), 1))
    place = epochs + min(steps * accumulation / max(micro_batches, 1), 1)
    if abs(place - state.epoch) * micro_batches >= 1:
        logger.warning(
            f"The checkpoint was written at epoch {state.epoch:.2f}, but training resumes at epoch {place:.2f}, so "
            f"some rows are skipped or repeated. Step {state.global_step} is elsewhere in the epoch now, because the "
            "number of rows, the batch size, gradient_accumulation_steps, or the number of processes has changed. "
            "Resume with the settings and rows of the checkpoint to continue exactly."
        )


def conditions_of(args: Any, rows: Any, processes: int) -> dict[str, dict[str, Any]]:
    """What a resumed training must have in common with the unbroken one, by what it affects, see `_EFFECTS`.

    Args:
        args: the trainer's config.
        rows: prepared rows.
        processes: the number of processes.
    """
    size, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    # The order only depends on the seed, and steps take the rows in this order, however they are split
    seed = args.seed if args.data_seed is None else args.data_seed
    order = {"data_seed or seed": seed, "rows per step": size * accumulation * processes}
    names = ("share_prompts", "train_sampling_strategy", "dataloader_drop_last")
    order |= {name: getattr(args, name) for name in names}
    if args.train_sampling_strategy == "group_by_length" or args.log_z == "group":
        order |= {"per_device_train_batch_size": size, "number of processes": processes}
    if isinstance(rows, Dataset):
        order["training rows"] = f"{len(rows)} ({_digest(rows, ('row', 'length', 'label'))})"
    found = {"order": order}
    for effect, names in (("loss", _LOSS), ("steps", _STEPS), ("restored", _RESTORED)):
        values = {name: getattr(args, name) for name in names if hasattr(args, name)}
        found[effect] = {
            name: value if isinstance(value, bool | int | float | None) else str(getattr(value, "value", value))
            for name, value in values.items()
        }
    if args.lr_scheduler_type not in _ENDLESS or 0 < args.warmup_steps < 1:
        length = f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
        found["steps"]["max_steps or num_train_epochs"] = length
    if isinstance(rows, Dataset):
        found["loss"]["sft_mask, weight and log_z of the rows"] = _digest(rows, ("sft_mask", "weight", "log_z"))
    return found


def optimized_parameters(model: Any, optimizer: Any) -> dict[str, Any]:
    """What identifies the parameters of an optimizer: how many tensors, the first name, and a digest of all names.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(1, 1)
        >>> optimized_parameters(layer, torch.optim.SGD([layer.bias]))["first"]
        'bias'
    """
    name_of = {id(p): name for name, p in model.named_parameters()}
    # Some optimizers step in hooks, and hold a placeholder
    names = [name_of.get(id(p), "") for group in optimizer.param_groups for p in group["params"]]
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
    return {"count": len(names), "first": min(names, default=""), "digest": digest}


def check_same_parameters(checkpoint: str | Path, now: dict[str, Any]) -> None:
    """Raise ValueError if a checkpoint has the optimizer's state of other parameters, which is kept by their order.

    Args:
        now: what `optimized_parameters` returns for the training that resumes.
    """
    file = Path(checkpoint) / CONDITIONS
    then = json.loads(file.read_text(encoding="utf-8")).get("parameters", now) if file.exists() else now
    if then["digest"] != now["digest"] and any(Path(checkpoint).glob("optimizer*")):
        raise ValueError(
            f"The checkpoint {checkpoint} is of a training of other parameters: {then['count']} tensors, such as "
            f"{then['first']}; here {now['count']}, such as {now['first']}. The optimizer's state would be that of "
            "others. Resume with the same trainable parameters and, for an adapter, with its settings."
        )


def _digest(rows: Dataset, names: Sequence[str]) -> str:
    columns = [str(rows[name][:]) for name in names if name in rows.column_names]
    return hashlib.sha256("".join(columns).encode()).hexdigest()[:8]


def write_conditions(folder: Path, conditions: dict[str, dict[str, Any]]) -> None:
    """Write what `conditions_of` returns into the folder of a checkpoint."""
    (folder / CONDITIONS).write_text(json.dumps(conditions, indent=2) + "\n", encoding="utf-8")


def warn_of_other_conditions(checkpoint: str, now: dict[str, dict[str, Any]], *, skips: bool) -> None:
    """Log a warning that names the settings which differ from those that a checkpoint was written with.

    Args:
        now: what `conditions_of` returns for the training that resumes.
        skips: whether it skips the rows that the checkpoint's training has seen.
    """
    file = Path(checkpoint) / CONDITIONS
    if not file.exists():
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    changes, effects = [], []
    for effect, values in now.items():
        if effect == "order" and not skips:
            continue
        then = before.get(effect, {})
        # Checkpoints of earlier versions lack some names
        names = [name for name in then if then[name] != values.get(name)]
        changes += [f"{name} was {then.get(name)} and is {values.get(name)}" for name in names]
        effects += [_EFFECTS[effect].format(names=" and ".join(names))] if names else []
    if changes:
        logger.warning(
            f"The checkpoint {checkpoint} was written with other settings: {'; '.join(changes)}. "
            f"{' '.join(effects)} To continue exactly, resume with the settings of the checkpoint."
        )


@contextmanager
def written_whole(args: Any, folder: Path, best: Callable[[], str | None]) -> Iterator[None]:
    """A context for writing a checkpoint. It marks the checkpoint at the end, and deletes older ones only afterwards.

    Args:
        best: returns the checkpoint that must be kept. It is called after this checkpoint is written.

    Raises:
        OSError: if the checkpoint cannot be written. The message names the last complete checkpoint.
    """
    limit, args.save_total_limit = args.save_total_limit, None
    try:
        if args.should_save:
            (folder / WHOLE).unlink(missing_ok=True)
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        last = next((path for path in checkpoints(folder.parent) if (path / WHOLE).exists()), "none")
        raise OSError(
            f"The checkpoint {folder} could not be written ({error}). The last complete checkpoint is {last}. Free "
            "disk space, and resume with resume_from_checkpoint=True."
        ) from error
    finally:
        args.save_total_limit = limit
    PartialState().wait_for_everyone()
    if args.should_save:
        mark_whole(folder)
        rotate_checkpoints(
            output_dir=str(folder.parent),
            save_total_limit=limit,
            best_model_checkpoint=best(),
            use_mtime=True,
        )
