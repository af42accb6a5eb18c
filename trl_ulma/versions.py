"""What differs between the supported versions of TRL and transformers, each with the version in which it can go.

The supported versions are those of `pyproject.toml`. Everything here is for the older ones of them. One more difference
is in `trl_ulma.config`: where `trust_remote_code` is set.
"""

import contextlib
import copy
import functools
import inspect
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from accelerate import PartialState
from accelerate.utils import is_peft_model
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, Trainer, set_seed
from transformers.integrations import TrackioCallback
from transformers.trainer_utils import SaveStrategy
from trl import DPOTrainer
from trl.trainer import dpo_trainer

from trl_ulma.likelihood.scorer import bare_model
from trl_ulma.main_process import get_logger

logger = get_logger(__name__)

# TRL before 1.3 loads a reference model even if precompute_ref_log_probs is set, and keeps it
_LOADS_PRECOMPUTED = Version(trl.__version__) < Version("1.3")
_LEAVES_ZEROS = Version(transformers.__version__) < Version("5.23")
_LOADS_ALL_ADAPTERS = Version(transformers.__version__) >= Version("5.23")
# TRL 1.7 has added the argument `quantization_config`; older ones read it from `model_init_kwargs`
TAKES_QUANTIZATION = "quantization_config" in inspect.signature(DPOTrainer.__init__).parameters


@contextlib.contextmanager
def global_then_local_main_first() -> Iterator[None]:
    """The global main process runs the block first, then the main process of each node, then all others.

    It can go when TRL 1.14 is the oldest: `trl.trainer.utils.global_then_local_main_first`.
    """
    state = PartialState()
    with state.main_process_first(), state.local_main_process_first():
        yield


def is_kto_config(args: Any) -> bool:
    """Whether a config is TRL's `KTOConfig`, which was experimental, and in another module, before TRL 1.8.

    Example:
        >>> is_kto_config(object())
        False
    """
    return any(each.__name__ == "KTOConfig" and each.__module__.split(".")[0] == "trl" for each in type(args).__mro__)


def for_dpo_trainer(args: Any, model: Any, quantization_config: Any) -> tuple[Any, dict[str, Any]]:
    """(a copy of the config, further arguments) as the installed `DPOTrainer` takes them.

    `padding_free` is switched off in the copy, because `DPOTrainer` warns that it switches its own off. The rest can go
    when TRL 1.7 is the oldest.

    Raises:
        ValueError: if `quantization_config` comes with a model in memory, which is already loaded.
    """
    theirs = copy.copy(args)
    theirs.padding_free = False
    set_seed(args.seed)  # of a new adapter; TRL before 1.15 does not
    if TAKES_QUANTIZATION:
        return theirs, {"quantization_config": quantization_config}
    if not isinstance(model, str):
        if quantization_config is not None:
            raise ValueError(
                "quantization_config is set, but the model is already loaded. Pass the model's name, or leave out "
                "quantization_config."
            )
        return theirs, {}
    options = dict(args.model_init_kwargs or {})
    options.setdefault("trust_remote_code", False)  # without a value transformers asks at the terminal
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    theirs.model_init_kwargs = options
    return theirs, {}


@contextlib.contextmanager
def loads_remote_code() -> Iterator[None]:
    """A context in which `DPOTrainer` loads models that come with their own code, if `trust_remote_code` is set.

    TRL before 1.7 reads their configuration without `trust_remote_code`, so that it asks at the terminal or raises, and
    only finds classes of transformers. It can go when TRL 1.7 is the oldest.
    """
    if TAKES_QUANTIZATION:
        yield
        return
    create = dpo_trainer.create_model_from_path

    def create_with_own_class(name: str, **loading: Any) -> Any:
        if not loading.get("trust_remote_code"):
            return create(name, **loading)
        config: Any = AutoConfig.from_pretrained(name, trust_remote_code=True, revision=loading.get("revision"))
        sees = "AutoModelForImageTextToText" in (getattr(config, "auto_map", None) or {})
        auto: Any = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        return create(name, getattr(transformers, config.architectures[0], auto), **loading)

    dpo_trainer.create_model_from_path = create_with_own_class
    try:
        yield
    finally:
        dpo_trainer.create_model_from_path = create


@contextlib.contextmanager
def takes_adapted_head() -> Iterator[None]:
    """A context in which `DPOTrainer` accepts an adapter on the output embeddings.

    TRL refuses it from 1.14 on, because its fused LM head reads `lm_head.weight` and passes the adapter over. These
    trainers call the output embeddings, and with them the adapter. It can go when TRL's head does the same.
    """
    layer = getattr(dpo_trainer, "BaseTunerLayer", None)
    if layer is not None:
        dpo_trainer.BaseTunerLayer = ()  # no object is an instance of an empty tuple of classes
    try:
        yield
    finally:
        if layer is not None:
            dpo_trainer.BaseTunerLayer = layer


def _loads_on_first_process_only() -> bool:
    """Whether transformers gives models zeros for weights on all processes but the first of each node.

    Before 5.23 it does, with `fsdp_cpu_ram_efficient_loading`. accelerate sends the first process's weights to the
    others when it shards the policy, but TRL does not when it shards a reference with FSDP2. It can go when 5.23 is the
    oldest.
    """
    wanted = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")
    is_on = all(os.environ.get(name, "").lower() in ("1", "true", "yes") for name in wanted)
    return _LEAVES_ZEROS and is_on and os.environ.get("FSDP_VERSION") == "2"


@contextlib.contextmanager
def loads_on_all_processes() -> Iterator[None]:
    """A context in which models are loaded with their weights on all processes, so that a reference is right."""
    if not _loads_on_first_process_only():
        yield
        return
    name = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    before, os.environ[name] = os.environ[name], "false"
    try:
        yield
    finally:
        os.environ[name] = before


def send_weights(*models: Any) -> None:
    """Give all processes the first one's weights of models in memory, which may be zeros on the others.

    Args:
        *models: models, or their names, which are left out.
    """
    if not _loads_on_first_process_only():
        return
    device = PartialState().device
    for model in models:
        for weight in model.state_dict().values() if hasattr(model, "state_dict") else ():
            sent = weight.detach().to(device)
            torch.distributed.broadcast(sent, src=0)
            weight.detach().copy_(sent)


def set_auxiliary_loss(trainer: Any) -> None:
    """Set what a mixture of experts' load-balancing loss weighs: the config's coefficient, or else the model's.

    TRL before 1.7 has no such loss, and before 1.15 its default is 0.001 for all models. It can go when TRL 1.15 is the
    oldest.

    Raises:
        ValueError: if the config names a coefficient, and the model returns no router logits.
    """
    model, chosen = trainer.model, trainer.args.router_aux_loss_coef
    config = model.config.get_text_config()
    is_routed = hasattr(config, "output_router_logits")
    if chosen and not is_routed:
        raise ValueError(
            f"router_aux_loss_coef is {chosen}, but {type(bare_model(model)).__name__} is not a Mixture-of-Experts "
            "model that returns its router logits. Leave router_aux_loss_coef out."
        )
    coefficient = getattr(config, "router_aux_loss_coef", 0.0) if chosen is None else chosen
    trainer.router_aux_loss_coef = coefficient
    trainer.aux_loss_enabled = is_routed and coefficient != 0.0


def go_without_auxiliary_loss(trainer: Any) -> None:
    """Switch off the load-balancing loss of a model that does not return it, with a warning.

    Which models return it depends on the version of transformers. With 5.2, for example, GraniteMoe does not.

    Raises:
        ValueError: if the config names a coefficient.
    """
    name = f"{type(bare_model(trainer.model)).__name__} of transformers {transformers.__version__}"
    if trainer.args.router_aux_loss_coef:
        raise ValueError(
            f"router_aux_loss_coef is {trainer.args.router_aux_loss_coef}, but {name} does not return a load-balancing "
            "loss. Leave router_aux_loss_coef out, or install a version of transformers in which the model returns it."
        )
    trainer.aux_loss_enabled = False
    logger.warning(
        f"{name} has a coefficient for a load-balancing loss, but does not return this loss. The model is trained "
        "without it. To silence this warning, set router_aux_loss_coef=0.0."
    )


def loads_needless_reference(args: Any) -> bool:
    """Whether `DPOTrainer` would load a reference model although `precompute_ref_log_probs` has the policy asked.

    Under FSDP the policy cannot be asked before training, and the loaded model is needed. It can go when TRL 1.3 is the
    oldest.
    """
    is_fsdp = bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes")
    return _LOADS_PRECOMPUTED and args.precompute_ref_log_probs and not is_fsdp


def load_adapter_of(checkpoint: str, model: Any) -> None:
    """Load the policy's adapter from a checkpoint that has a folder of its own for the reference's.

    transformers, at least until 5.19, only loads the adapters in folders then, without a word. It can go when 5.23 is
    the oldest, which loads both.
    """
    folder = Path(checkpoint)
    if _LOADS_ALL_ADAPTERS or not is_peft_model(model) or not any(folder.glob("*/adapter_config.json")):
        return
    if model.active_adapter == "default" and (folder / "adapter_model.safetensors").exists():
        model.load_adapter(checkpoint, "default", is_trainable=True)
        model.set_adapter("default")


def note_best_checkpoint(trainer: Any, folder: Path) -> None:
    """Note that the checkpoint about to be written is the best one, if it is.

    transformers, at least until 5.2, does not with `save_strategy="best"`, and `load_best_model_at_end` then keeps the
    last model, without a word. It can go when 5.15 is the oldest.
    """
    state = trainer.state
    if trainer.args.save_strategy == SaveStrategy.BEST and state.best_global_step == state.global_step:
        state.best_model_checkpoint = str(folder)


def reopen_trackio(trainer: Any) -> None:
    """Have Trackio open its run again for what is logged after training, such as an evaluation.

    transformers, at least until 5.2, closes the run when training ends, and the next log raises an error. It can go
    when 5.15 is the oldest.
    """
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TrackioCallback):
            callback._initialized = False


def instance_forward(model: Any) -> Any:
    """The forward that something has set on a model itself, or None if its class's forward runs."""
    return None if isinstance(model, str) else vars(_without_adapter(model)).get("forward")


def restore_forward(model: Any, forward: Any) -> None:
    """Undo `DPOTrainer`'s patch of a model's forward, so that patches of several trainers do not pile up.

    `DPOTrainer` adds a fused LM head from TRL 1.14 on. These trainers have their own head and do not use it.

    Args:
        model: that the trainer has set up, or its name.
        forward: what `instance_forward` gave before.
    """
    if isinstance(model, str) or _fused(instance_forward(model)) is None:
        return
    _forget_forward(model)
    if forward is not None:
        _without_adapter(model).forward = forward


def mend_copied_forward(model: Any) -> None:
    """Undo TRL's patch on a deep copy of a patched model, because its forward would run the original's weights.

    The patch calls the forward that it found, and `copy.deepcopy` does not copy what a function refers to.
    """
    fused = _fused(instance_forward(model))
    if fused is None:
        return
    original = inspect.getclosurevars(fused).nonlocals["original_forward"]
    # accelerate's hooks set a partial of the module
    owner = original.args[0] if isinstance(original, functools.partial) else getattr(original, "__self__", None)
    if owner is not None and owner is not _without_adapter(model):
        _forget_forward(model)


# Functions that TRL sets as a forward and that call the one they found: the second before TRL 1.14, by `SFTTrainer`
_PATCHES = ("_fused_forward", "_chunked_ce_forward")


def _fused(forward: Any) -> Any:
    """TRL's function within a forward, also below what accelerate wraps it in for mixed precision; None without it."""
    function = getattr(forward, "__func__", forward)
    while function is not None:
        code = getattr(function, "__code__", None)
        if code is not None and code.co_name in _PATCHES:
            return function
        function = getattr(function, "__wrapped__", None)
    return None


def _forget_forward(model: Any) -> None:
    for name in ("forward", "_original_forward"):
        vars(_without_adapter(model)).pop(name, None)


def refuse_data_parallel(trainer: Any) -> None:
    """Raise ValueError if the model would be replicated by `nn.DataParallel`. TRL 1.16 raises by itself."""
    if trainer.args.n_gpu > 1 and not trainer.is_model_parallel:
        raise ValueError(
            f"One process sees {trainer.args.n_gpu} GPUs, and nn.DataParallel is not supported. Start one process per "
            "GPU with `accelerate launch`, or set CUDA_VISIBLE_DEVICES to one GPU."
        )


def _without_adapter(model: Any) -> Any:
    bare = bare_model(model)
    return bare.get_base_model() if is_peft_model(bare) else bare


def divide_loss_once(trainer: Any) -> None:
    """Have `Trainer`, and nothing else, divide each loss by the number of micro-batches in the step.

    transformers before 5.19 does not read `Trainer.loss_is_scaled_for_ga`. It leaves a loss undivided if the model's
    forward takes loss arguments, which our `compute_loss` does not pass. It can go when transformers 5.19 is the
    oldest.

    transformers 5.2 also has accelerate divide each loss, so that gradients would be too small by the number of
    micro-batches. Newer versions, 5.15 at the latest, have it divide by 1.
    """
    trainer.accelerator.gradient_accumulation_steps = 1
    if not hasattr(Trainer, "loss_is_scaled_for_ga"):
        trainer.model_accepts_loss_kwargs = bool(trainer.loss_is_scaled_for_ga)


def step_itself(optimizer: Any) -> None:
    """Have the optimizer of a deep copy of a trained trainer step its own weights.

    A schedule wraps its optimizer's `step`, or that of accelerate's wrapper. In a copy, the wrapped one still steps the
    original's optimizer, so the copy would not learn.
    """
    wrapped: tuple[Any, ...] = (optimizer, getattr(optimizer, "optimizer", None))
    for each in wrapped:
        step: Any = getattr(each, "__dict__", {}).get("step")
        if hasattr(step, "_wrapped_by_lr_sched"):
            owner = inspect.getclosurevars(step).nonlocals.get("opt_ref", lambda each=each: each)()
            if owner is not each:
                del each.step
