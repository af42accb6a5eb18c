"""What a saved model does not hold, because it only names its base and its reference: found before it is lost."""

import contextlib
import re
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from peft import get_peft_model_state_dict
from safetensors import safe_open
from torch.distributed.tensor import DTensor
from trl.trainer.utils import get_config_model_id

from trl_ulma.likelihood.reference import active_adapters, outside_adapter
from trl_ulma.likelihood.scorer import bare_model
from trl_ulma.main_process import get_logger

logger = get_logger(__name__)


def warn_of_unsaved_weights(model: Any, *, is_base: bool = False, is_reference: bool = False) -> None:
    """Log a warning if a model in memory has other weights than the model that it is named after.

    What training saves refers to the base of an adapter, and to the reference, by this name. To be quick, only the
    first row of each weight is compared, and the last ones, which are those of tokens that were added.

    Args:
        model: a model, with or without an adapter. Names and None have no weights in memory.
        is_base: whether an adapter is trained on it. Embeddings that were resized are saved with the adapter.
        is_reference: whether it is the reference's own model.
    """
    if not isinstance(model, torch.nn.Module):
        return
    adapters = getattr(model, "peft_config", {}).values()
    starts = [str(getattr(config, "init_lora_weights", "")).lower() for config in adapters]
    for start in starts:
        if start.startswith("pissa_niter_") or start == "corda":
            logger.warning(
                f"init_lora_weights={start!r} has moved a part of the model's weights into the adapter. PEFT cannot "
                "move the same part again when it loads the adapter that this training saves, so what is loaded would "
                "be another model than the trained one. Use another start, such as 'pissa', or save the merged model "
                "after training (trainer.model.merge_and_unload().save_pretrained)."
            )
    if any(start.startswith(("pissa", "olora", "corda", "loftq")) for start in starts):
        return  # they move a part of the weights into the adapter, and do so again when it is loaded
    bare = bare_model(model)
    base = bare.get_base_model() if is_peft_model(bare) else bare
    name = get_config_model_id(base.config)
    if is_reference and is_peft_model(bare):
        logger.warning(
            f"ref_model is a PeftModel. What this training saves names its base {name} alone as the reference. To "
            "score later, pass the adapter's folder as ref_model (on the command line --ref_model)."
        )
    if not is_peft_model(bare) and _has_trained_lora(bare):
        logger.warning(
            "The model has an adapter that load_adapter has loaded. Its reference is the model with this adapter, but "
            f"what this training saves names {name} alone, so its rewards cannot be computed again. Pass "
            "PeftModel.from_pretrained(model, adapter, is_trainable=True) instead: its reference is saved, too."
        )
    if getattr(base.config, "quantization_config", None) is not None:
        return
    vocabulary = getattr(base.get_input_embeddings(), "num_embeddings", 0)
    size = 0 if is_base else vocabulary
    own = {key.replace(".base_layer.", "."): weight for key, weight in base.state_dict().items()}
    other = []
    for file in _saved_weights(name, getattr(base.config, "_commit_hash", None)):
        with safe_open(file, "pt") as saved:
            for key in saved.keys():  # noqa: SIM118 - it is no dict
                weight = own.get(key, own.get(f"{base.base_model_prefix}.{key}"))
                if _differs(weight, saved.get_slice(key), size, vocabulary):
                    other.append(key)
    if other:
        logger.warning(
            f"The model in memory has other weights than {name}, which it was loaded from: {other[0]}"
            + (f" and {len(other) - 1} others" if len(other) > 1 else "")
            + ". An adapter was merged into it, for example, its embeddings were resized, or it was trained before. "
            f"What this training saves refers to {name}, so its rewards cannot be computed again, and an adapter would "
            "be loaded onto other weights than it was trained on. Save this model and its tokenizer first "
            "(save_pretrained), and pass the model loaded from there."
        )


# Settings of a model that do not change its log-probabilities, or that trainers set themselves
_NO_MATTER = re.compile(
    r"_name_or_path|transformers_version|architectures|(torch_)?dtype|use_cache|.*_token_id|_?attn_implementation.*|"
    r"quantization_config|return_dict|output_.*|id2label|label2id|problem_type|vocab_size|.*drop.*|.*aux_loss.*|"
    r".*initializer.*|_.*"
)


def warn_of_other_settings(model: Any) -> None:
    """Log a warning if a model has other settings than the model that it is named after, such as a sliding window.

    What training saves refers to the base of an adapter, and to the reference, by this name, and so to its settings.

    Args:
        model: a model that is loaded, with or without an adapter, or None.
    """
    if model is None:
        return
    bare = bare_model(model)
    config = (bare.get_base_model() if is_peft_model(bare) else bare).config
    name = get_config_model_id(config)
    try:
        saved = type(config).from_pretrained(
            name, revision=getattr(config, "_commit_hash", None), local_files_only=True
        )
    except (OSError, ValueError):  # it has no name, or its config is no longer on this machine
        return
    now, then = _settings(config.to_dict()), _settings(saved.to_dict())
    other = [f"{key} is {now[key]!r} instead of {then[key]!r}" for key in now if key in then and now[key] != then[key]]
    if other:
        logger.warning(
            f"The model has other settings than {name}, which it was loaded from: {', '.join(other)}. What this "
            f"training saves refers to {name}, so its rewards cannot be computed again, and an adapter would be loaded "
            "onto a model with other settings. Save the model with these settings and its tokenizer first "
            "(save_pretrained), and pass the model loaded from there."
        )


def _settings(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings of a config and of the configs in it that matter for log-probabilities, by dotted names."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if _NO_MATTER.fullmatch(str(key)):
            continue
        found |= _settings(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def refuse_lost_weights(folder: str, model: Any, reference: str | None) -> None:
    """Raise ValueError if saving a model into a folder would overwrite its reference, or add it to an old adapter.

    Args:
        folder: where the model is saved.
        model: the trained model, with or without an adapter.
        reference: the name or folder of the reference.
    """
    if is_peft_model(bare_model(model)) or active_adapters(model):
        return  # an adapter is a file of its own
    there = Path(folder)
    if reference and Path(reference).is_dir() and there.exists() and there.samefile(reference):
        raise ValueError(
            f"The trained model would be saved in {folder}, which is the folder of its reference, and overwrite it. "
            "Rewards could not be computed again. Choose another output_dir."
        )
    if (there / "adapter_config.json").exists():
        raise ValueError(
            f"The trained model would be saved in {folder}, which holds an adapter of another training. Whoever loads "
            "the folder would load this adapter. Choose another output_dir, or delete adapter_config.json and "
            "adapter_model.safetensors there."
        )


def _has_trained_lora(model: Any) -> bool:
    """Whether a model computes with a LoRA adapter that changes its output. One that is new does not.

    A model with an adapter that transformers has added is no PeftModel, and names its base alone.
    """
    own = {key.removesuffix(".weight"): weight for key, weight in model.named_parameters()}
    for key, weight in own.items():  # the product of two, one of which begins as 0
        of_a, is_b, adapter = key.rpartition("B.")
        other = own.get(f"{of_a}A.{adapter}") if is_b and adapter in active_adapters(model) else None
        if other is not None and bool(weight.any()) and bool(other.any()):
            return True
    return False


def warn_of_unsaved_parameters(model: Any) -> None:
    """Log a warning if parameters outside an adapter are trained that PEFT does not save with the adapter."""
    outside = set(outside_adapter(model))
    if not outside:
        return
    # Such as biases, and embeddings that were resized
    saved = {
        tensor.data_ptr() for tensor in get_peft_model_state_dict(model, adapter_name=model.active_adapter).values()
    }
    lost = [name for name, p in model.named_parameters() if name in outside and p.data_ptr() not in saved]
    if lost:
        logger.warning(
            f"Parameters outside the adapter are trained, but neither checkpoints nor the saved adapter contain them: "
            f"{', '.join(lost[:3])}" + (f" and {len(lost) - 3} others" if len(lost) > 3 else "") + ". Name their "
            "modules in modules_to_save of the adapter's config, or save the merged model after training "
            "(trainer.model.merge_and_unload().save_pretrained)."
        )


def _saved_weights(name: str, revision: str | None) -> list[Path]:
    """The files with the weights of a model that are on this machine, in a folder or in the Hub's cache."""
    folder = Path(name)
    if not folder.is_dir():
        config = None
        with contextlib.suppress(HFValidationError):  # a folder that is gone, or no name at all
            config = try_to_load_from_cache(name, "config.json", revision=revision)
        if not isinstance(config, str):
            return []
        folder = Path(config).parent
    return sorted(folder.glob("model*.safetensors"))


# Tokens are added at the end, often into rows that a checkpoint has in reserve
_ADDED = 4096


def _differs(weight: Any, saved: Any, size: int, vocabulary: int) -> bool:
    """Whether the first row of a weight, or one of the last of `vocabulary` rows, differs from that of a saved one by
    more than a number format does, or whether it has another number of rows, which is `size`."""
    if not torch.is_tensor(weight) or isinstance(weight, DTensor) or weight.is_meta or not weight.is_floating_point():
        return False
    if type(weight) not in (torch.Tensor, torch.nn.Parameter):
        return False  # one that is quantized in memory
    shape = list(weight.shape)
    if saved.get_shape() != shape and shape[:1] == [size] and saved.get_shape()[1:] == shape[1:]:
        return True
    is_same_kind = saved.get_dtype() in ("F64", "F32", "F16", "BF16") and saved.get_shape() == shape
    if not is_same_kind or not weight.dim():
        return False
    parts = [slice(0, 1)]
    if weight.dim() == 2 and shape[0] == vocabulary:
        parts.append(slice(max(shape[0] - _ADDED, 0), shape[0]))
    pairs = [(weight[part].detach().cpu(), saved[part]) for part in parts]
    return any(
        not any(torch.equal(now.to(dtype), then.to(dtype)) for dtype in (now.dtype, torch.bfloat16, torch.half))
        for now, then in pairs
    )
