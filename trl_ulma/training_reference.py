"""The reference of a training: which kind it is, which model `DPOTrainer` gets for it, and how it is made."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft import PeftMixedModel, PeftType
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.trainer.utils import get_config_model_id

from trl_ulma.likelihood.proof import check_ref_model
from trl_ulma.likelihood.reference import (
    ADAPTER,
    NoReferenceModel,
    Reference,
    copy_adapter,
)
from trl_ulma.likelihood.scorer import Scorer, bare_model
from trl_ulma.main_process import get_logger
from trl_ulma.versions import loads_needless_reference, mend_copied_forward

logger = get_logger(__name__)

# Types of adapters that cannot be trained here, and why
_REFUSED = {
    "LILY": (
        "route by the mean over all tokens of a batch, so a log-probability would depend on later tokens and on other "
        "rows"
    ),
    "XLORA": "run the model twice in each forward and read its hidden states, which the compact head does not return",
}


def check_models(model: Any, ref_model: Any, peft_config: Any = None) -> None:
    """Raise an error if a trainer's models cannot be policy and reference.

    Raises:
        TypeError: if the policy or the reference is not a model.
        ValueError: if the models cannot be policy and reference.
    """
    kinds: Any = (str, torch.nn.Module)
    if not isinstance(model, kinds):
        raise TypeError(
            f"model must be a causal language model, or its name or folder as a string; got {type(model).__name__}. "
            "The trainer takes no model_init."
        )
    if isinstance(model, PeftMixedModel):
        raise TypeError(
            "model is a PeftMixedModel, whose adapters of several kinds cannot be switched off for the reference. Use "
            "get_peft_model without mixed=True, and merge the other adapters into the model first."
        )
    trained = model.active_peft_config if _is_peft(model) else peft_config
    kind = getattr(getattr(trained, "peft_type", None), "value", "")
    if kind in _REFUSED:
        raise ValueError(f"{kind} adapters {_REFUSED[kind]}. Train another adapter, such as LoRA.")
    if kind == "ADALORA":
        logger.warning(
            "AdaLoRA trains like LoRA here: Trainer never moves ranks, and the loss lacks AdaLoRA's term for "
            "orthogonal adapters (orth_reg_weight). To move ranks, pass a callback whose on_optimizer_step calls "
            "model.base_model.update_and_allocate(state.global_step). Otherwise every rank stays at init_r, as with "
            "a LoraConfig of that rank."
        )
    if ref_model is not None:
        check_ref_model(model, ref_model)
        if _is_peft(model) and model.active_adapters != ["default"]:
            logger.warning(
                f"The model trains the adapter {', '.join(model.active_adapters)}. PEFT saves it in a subfolder of its "
                "name, and Judge and the commands read one adapter, which is named default. Load the adapter under "
                "that name (leave out adapter_name)."
            )
        return
    if not _is_peft(model):
        return
    if model.active_peft_config.peft_type == PeftType.ADALORA:
        raise ValueError(
            "PEFT supports only one AdaLoRA adapter per model, so the reference cannot be a copy of it. Pass as "
            "ref_model the model with the adapter as it is before training."
        )
    if ADAPTER in model.peft_config and not getattr(model, "has_trl_ulma_reference", False):
        raise ValueError(
            f"The model has an adapter named {ADAPTER!r}, which a DPOTrainer leaves on a model. The reference of this "
            f"training would have the same name. Delete it: model.delete_adapter({ADAPTER!r})."
        )
    active = model.active_adapters
    if active != ["default"]:
        raise ValueError(
            f"The model trains the adapter {', '.join(active)}, but the reference would be a copy of the adapter named "
            "default. Load the adapter under that name (leave out adapter_name), or pass a ref_model."
        )


def reference_kind(model: Any, ref_model: Any, args: Any, peft_config: Any, *, is_needed: bool) -> str:
    """The kind of the reference, see `ReferenceIdentity`; arguments as those of the trainer."""
    if not is_needed:
        return "none"
    if ref_model is not None:
        return "given"
    if peft_config is not None:
        return "adapter_off"
    if not _is_peft(model):
        return "copy"
    # PEFT does not support a second adapter with biases, so log π_ref of such adapters is precomputed
    has_bias = getattr(model.active_peft_config, "bias", "none") != "none"
    return "copy" if has_bias and args.precompute_ref_log_probs else "adapter"


def model_for_dpo_trainer(kind: str, model: Any, ref_model: Any, args: Any) -> Any:
    """The `ref_model` to pass to `DPOTrainer`. With None, it makes the reference itself.

    Raises:
        ValueError: if log π_ref is to be precomputed with weights that are offloaded, which DPOTrainer cannot read.
    """
    reference = model if ref_model is None else ref_model
    if (
        args.precompute_ref_log_probs
        and not isinstance(reference, str)
        and any(p.is_meta for p in reference.parameters())
    ):
        raise ValueError(
            "precompute_ref_log_probs=True reads all weights of the reference, but the device_map offloads some of "
            "them to the CPU or to disk. Load the model without device_map, or set precompute_ref_log_probs=False."
        )
    if kind == "none" or (kind == "copy" and _is_peft(model)):
        return NoReferenceModel()
    if kind != "copy":
        return ref_model
    # DPOTrainer would load a model in memory again, from where it came. Under ZeRO-3 each process holds a part of it.
    if not (isinstance(model, str) or args.precompute_ref_log_probs or is_deepspeed_zero3_enabled()):
        try:
            copied = copy.deepcopy(model)
        except (NotImplementedError, RuntimeError, TypeError) as error:  # of quantized weights, for example
            raise ValueError(
                f"The reference of a full training is a copy of the model, and this {type(model).__name__} cannot be "
                f"copied ({type(error).__name__}: {error}). Train an adapter: pass a peft_config."
            ) from error
        mend_copied_forward(copied)
        return copied
    return NoReferenceModel() if loads_needless_reference(args) else None


@contextlib.contextmanager
def ref_keeps_base_weights(model: Any) -> Iterator[None]:
    """A context in which `DPOTrainer` adds the reference's adapter to a model without changing other weights.

    Some values of `init_lora_weights`, such as "pissa", subtract what a new adapter begins with from the weights below
    it. `layer_replication` would repeat the layers once more. The adapter `ADAPTER` is a copy of another one, so this
    would change the policy.

    Raises:
        ValueError: if PEFT cannot add an adapter like the model's.
    """
    config = model.peft_config["default"]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    harmless = {"init_lora_weights": True, "layer_replication": None}
    own = {name: getattr(config, name, value) for name, value in harmless.items()}
    changing = {name: value for name, value in own.items() if isinstance(value, str | list | tuple)}
    for name in changing:
        setattr(config, name, harmless[name])
    try:
        yield
    except (AttributeError, ValueError) as error:
        # The latter is of PEFT before 0.20, with TRL before 1.16
        if f"`{ADAPTER}`" not in str(error) and "only one LoRA adapter per model with `target_parameters`" not in str(
            error
        ):
            raise
        raise ValueError(
            "The reference is a copy of the adapter as it is now, but PEFT cannot add a second adapter like it, for "
            f"example with ensure_weight_tying=True ({error}). Merge the adapter into the model and pass a "
            "peft_config, or pass a ref_model."
        ) from error
    finally:
        for parameter in trained:  # PEFT 0.18 freezes those outside the adapter
            parameter.requires_grad_(True)
        if changing and ADAPTER in model.peft_config:
            # Its own config, because loading it must not change other weights either
            model.peft_config[ADAPTER] = copy.copy(config)
        for name, value in changing.items():
            setattr(config, name, value)


def make_reference(
    kind: str, policy: Any, ref_model: Any, scorer: Scorer, *, args: Any, autocast: Any, before: Callable[[], Any]
) -> Reference:
    """The reference of a trainer that `DPOTrainer` has set up.

    Args:
        kind: see `reference_kind`.
        autocast: returns a context for mixed precision.
        before: returns the policy as it is before training, which is the reference if there is no copy of it.
    """
    name, revision = "", None
    if kind not in ("none", "given"):
        revision = (args.model_init_kwargs or {}).get("revision")
    if kind == "adapter":
        if ADAPTER in policy.peft_config:
            copy_adapter(policy)
            policy.has_trl_ulma_reference = True
        else:  # TRL has logged why it did not make one
            kind = "adapter_off"
    model = None
    if kind in ("given", "copy"):
        has_own = ref_model is not None and not isinstance(ref_model, NoReferenceModel)
        model = ref_model if has_own or kind == "given" else before()
    bare = bare_model(policy if model is None else model)
    if kind == "copy" and is_peft_model(bare):
        revision = None  # a model and an adapter; no copy of them is kept
    elif kind != "none":
        name = get_config_model_id(bare.config)
    return Reference(kind, scorer, model, name=name, revision=revision, autocast=autocast)


def widen_adapters(model: Any) -> None:
    """Store the adapters of a quantized model in float32.

    TRL stores them in bfloat16. The gradient scaler of fp16 training cannot unscale such gradients, and GPUs that need
    fp16, such as a T4, do not compute in bfloat16. Adapters of other models are in float32 already.
    """
    for name, weight in model.named_parameters():
        if weight.dtype == torch.bfloat16 and (weight.requires_grad or f".{ADAPTER}." in name):
            weight.data = weight.data.float()


def _is_peft(model: Any) -> bool:
    return not isinstance(model, str) and bool(is_peft_model(model))
