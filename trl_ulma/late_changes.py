"""What a trainer has already read, and errors if other code changes it too late."""

import copy
from collections.abc import Mapping
from typing import Any

from accelerate.optimizer import AcceleratedOptimizer

from trl_ulma.config_checks import PAIRWISE, check_numbers
from trl_ulma.likelihood.proof import not_optimized
from trl_ulma.likelihood.reference import active_adapters, is_without_adapter
from trl_ulma.likelihood.scorer import bare_model
from trl_ulma.presets import follows_from_beta

# Settings that a trainer reads once, when it is created, or never
_READ_ONCE = (
    *PAIRWISE,
    *("label_type", "label_transform", "sft_threshold", "positive_loss", "negative_loss", "preset"),
    *("log_z", "log_z_learning_rate", "share_prompts", "padding_free", "max_length", "truncation_mode"),
    *("pad_to_multiple_of", "pad_token", "assistant_only_loss", "chat", "system_message", "model_init_kwargs"),
    *("disable_dropout", "precompute_ref_log_probs", "sync_ref_model", "ref_model_mixup_alpha"),
    *("ref_model_sync_steps", "router_aux_loss_coef", "activation_offloading", "use_liger_kernel"),
    *("neftune_noise_alpha", "per_device_train_batch_size", "bf16", "fp16", "bf16_full_eval", "fp16_full_eval"),
)
# What the optimizer is created with in the first training, and what each training reads when it begins
_OF_OPTIMIZER = ("optim", "optim_args", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
_OF_TRAINING = (
    *("gradient_accumulation_steps", "max_steps", "num_train_epochs"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
)


class LateChanges:
    """Raises ValueError if other code, such as a callback, changes what a trainer has already read.

    Args:
        trainer: a trainer that was just created. Only its attributes are read.
    """

    def __init__(self, trainer: Any):
        self._trainer = trainer
        self._args, self._read_once = trainer.args, _read_once(trainer.args)
        self._pairwise = {name: getattr(trainer, name) for name in PAIRWISE if hasattr(trainer, name)}
        self._parts = {name: getattr(trainer, name) for name in ("ref_model", "processing_class")}
        self._model = bare_model(trainer.model)
        self._adapters = active_adapters(trainer.model)
        self._of_optimizer: dict[str, Any] = {}
        self._of_training: dict[str, Any] = {}
        self._not_optimized: set[str] | None = None
        self._stepping: dict[str, Any] = {}

    def check(self) -> None:
        """Check the settings and the active adapter, which any step or evaluation reads."""
        args, model = self._trainer.args, self._trainer.model
        if args is not self._args:
            raise ValueError(
                "trainer.args was replaced, and the trainer has already read its settings. Set the attributes of "
                "trainer.args that are to change, or create another trainer with these settings."
            )
        changed = _changes(args, self._read_once)
        if changed:
            raise ValueError(
                f"The trainer's args were changed after the trainer was created: {changed}. The trainer has "
                "read them before, so the change would have no effect, or only a part of it. Create another trainer "
                "with these settings."
            )
        check_numbers(args)
        now, first = active_adapters(model), self._adapters
        if now and now != first:  # the reference raises an error for a model that has no adapter any more
            raise ValueError(
                f"The model now computes with the adapter {', '.join(now)} instead of "
                f"{', '.join(first) or 'none'}, with which the trainer was created. Other code, such as a callback, "
                "has made another adapter active, so losses and rewards would be those of that adapter. Call "
                f"model.set_adapter({first[0] if len(first) == 1 else first!r}) again, or create another trainer."
            )
        for name, value in self._pairwise.items():
            if getattr(self._trainer, name) != value:
                raise ValueError(
                    f"trainer.{name} was changed from {value!r} to {getattr(self._trainer, name)!r}. It is a setting "
                    f"of pairwise losses, which this trainer does not read. Leave it; {PAIRWISE[name]}."
                )

    def check_parts(self) -> None:
        """Check that reference and tokenizer are the first ones."""
        for name, first in self._parts.items():
            if getattr(self._trainer, name) is not first:
                raise ValueError(
                    f"trainer.{name} was replaced after the trainer was created, and the losses would still be those "
                    f"of the first one. Create another trainer with this {name}."
                )

    def check_model(self) -> None:
        """Check that the model is the first one, before a training."""
        if bare_model(self._trainer.model) is not self._model:
            raise ValueError(
                "trainer.model was replaced after the trainer was created, so training would not change the new model. "
                "Create another trainer with it. For an adapter, pass a peft_config."
            )

    def check_of_optimizer(self) -> None:
        """Check the settings that the optimizer was created with, before a training that goes on with it."""
        if self._trainer.optimizer is None:
            self._of_optimizer, self._not_optimized = {}, None
        changed = _changes(self._trainer.args, self._of_optimizer)
        if changed:
            raise ValueError(
                f"trainer.args was changed after a training: {changed}. The next training goes on with the optimizer "
                "of the last one, which has read these settings before. Set trainer.optimizer = None to begin with a "
                "new optimizer, or create another trainer."
            )

    def training_begins(self) -> None:
        """Remember what a training reads at its beginning."""
        args = self._trainer.args
        self._of_optimizer = self._of_optimizer or {name: getattr(args, name) for name in _OF_OPTIMIZER}
        self._of_training = {name: getattr(args, name) for name in _OF_TRAINING}
        self._stepping = {}  # callbacks may still set it

    def check_step(self) -> None:
        """Check everything that a step of a training depends on."""
        self.check()
        changed = _changes(self._trainer.args, self._of_optimizer | self._of_training)
        if changed:
            raise ValueError(
                f"trainer.args was changed in the middle of a training, for example by a callback: {changed}. The "
                "training has read these settings at its start, so the steps would follow the new values only in "
                "part, or not at all. Set them before the training."
            )
        names = ("optimizer", "lr_scheduler")
        self._stepping = self._stepping or {name: getattr(self._trainer, name) for name in names}
        for name, first in self._stepping.items():
            if getattr(self._trainer, name) is not first:
                raise ValueError(
                    f"trainer.{name} was replaced in the middle of a training, for example by a callback, so the "
                    "learning rates that are logged would not be those of the steps. Pass both before the training, as "
                    "optimizers=(optimizer, scheduler)."
                )
        if is_without_adapter(self._trainer.model):
            raise ValueError(
                "The adapter is switched off or merged into the model in the middle of a training, for example by a "
                "callback that generates text, so the step would not train it. Undo this before the step: call "
                "model.base_model.enable_adapter_layers() or model.unmerge_adapter()."
            )
        is_sharded = self._trainer._is_sharded  # which puts other parameters in their place
        if not (is_sharded or any(p.requires_grad for p in self._trainer.model.parameters())):
            raise ValueError(
                "The model has no trainable parameters any more, so the step would not train it. Other code, such as a "
                "callback that generates text, has frozen them, for example with model.set_adapter(..., "
                "inference_mode=True). Set requires_grad=True again on the parameters to train before the step."
            )

    def check_optimized(self) -> None:
        """Check that no parameters are trainable by now that the optimizer does not have."""
        names = not_optimized(self._trainer.model, self._trainer.optimizer)
        if self._not_optimized is None:  # an optimizer that was given may leave out some
            self._not_optimized = set(names)
        late = [name for name in names if name not in self._not_optimized]
        if late:
            shown = ", ".join(late[:3]) + (f" and {len(late) - 3} others" if len(late) > 3 else "")
            raise ValueError(
                f"Parameters became trainable after the optimizer was created, for example in a callback: {shown}. "
                "The optimizer would not move them, but clipping would make all other steps smaller by their "
                "gradients. Unfreeze them before the training; after an earlier training, also set trainer.optimizer = "
                "None."
            )


def check_schedule(optimizer: Any, scheduler: Any) -> None:
    """Raise ValueError if a scheduler sets the learning rates of another optimizer. Accelerate may wrap both."""
    theirs = getattr(getattr(scheduler, "scheduler", scheduler), "optimizer", optimizer)
    if without_accelerate(theirs) is not without_accelerate(optimizer):
        raise ValueError(
            "The scheduler of optimizers=(optimizer, scheduler) sets the learning rates of another optimizer than "
            "the one that trains, so its rates would be logged and not used. Pass the scheduler's own optimizer."
        )


def without_accelerate(optimizer: Any) -> Any:
    """The optimizer within the wrapper of accelerate, if it has one."""
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


def _read_once(args: Any) -> dict[str, Any]:
    """The settings that a trainer reads once, when it is created, with their values."""
    names = list(_READ_ONCE)
    if args.log_z in ("prior", "group"):
        names += ["desirable_weight", "undesirable_weight"]
    if args.log_z == "group":
        names += ["binary_loss"]
    if args.preset is not None and follows_from_beta(args.preset):
        names += ["beta"]
    return {name: copy.copy(getattr(args, name)) for name in names if hasattr(args, name)}


def _changes(args: Any, before: Mapping[str, Any]) -> str:
    """The settings that differ from earlier values, as text; "" if there are none.

    Example:
        >>> from types import SimpleNamespace
        >>> _changes(SimpleNamespace(beta=0.2, log_z=0), {"beta": 0.1, "log_z": 0})
        'beta from 0.1 to 0.2'
    """
    now = {name: getattr(args, name) for name in before}
    return "; ".join(f"{name} from {before[name]!r} to {now[name]!r}" for name in before if now[name] != before[name])
