"""How much memory a training needs on one device, before a model is loaded."""

from typing import Any

import torch

# Of tensors that a layer of a decoder keeps for the backward, in hidden and in intermediate sizes a token: norms,
# queries and values, attention's output, residuals; gate, up, their product, and its activation
_KEPT_HIDDEN, _KEPT_INTERMEDIATE = 9, 4
# bitsandbytes: 4 bits a weight and a float32 scale for each 64 of them, or 8 bits and a scale a row
_QUANTIZED = {4: 0.5 + 4 / 64, 8: 1.0}


def estimate_memory(
    model: Any,
    *,
    tokens: int,
    optimizer: str = "adamw_torch",
    has_reference: bool = False,
    gradient_checkpointing: bool = True,
    autocast: bool = False,
    bits: int | None = None,
) -> dict[str, int]:
    """Bytes on one device, by what they are for; not counted are the device's context and fragmentation.

    Weights, reference, gradients and the optimizer's state follow from the weights. Activations are counted for a
    decoder with gated feed-forward layers and attention that keeps no scores (sdpa, flash), to about a factor of two.

    Args:
        model: the policy, with its adapter; its weights may be on the meta device.
        tokens: of the largest micro-batch, with padding.
        optimizer: its name in `TrainingArguments`.
        has_reference: whether a model of its own is the reference (an adapter's is its base model).
        gradient_checkpointing: keep the layers' inputs only.
        autocast: compute in bfloat16, whatever the weights are in.
        bits: 4 or 8 where bitsandbytes loads the linear layers so.

    Example:
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> config = LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        >>> with torch.device("meta"):
        ...     model = AutoModelForCausalLM.from_config(config)
        >>> found = estimate_memory(model, tokens=32)
        >>> found["optimizer"] == 2 * found["weights"] == 2 * found["gradients"]
        True
    """
    head = model.get_output_embeddings()
    whole = {id(parameter) for parameter in ([] if head is None else head.parameters())}
    linear = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and id(module.weight) not in whole and not module.weight.requires_grad
    }
    weights = trainable = trainable_number = 0
    for parameter in model.parameters():
        size = parameter.numel() * parameter.element_size()
        if parameter.requires_grad:
            trainable += size
            trainable_number += parameter.numel()
        weights += int(parameter.numel() * _QUANTIZED[bits]) if bits and id(parameter) in linear else size
    if "8bit" in optimizer:
        state = 2 * trainable_number
    elif optimizer.startswith(("adam", "paged_adam", "lamb")):
        state = 2 * trainable
    else:
        state = trainable if optimizer.startswith(("lion", "rmsprop", "adagrad")) else 0

    config = model.config.get_text_config()
    hidden, layers = config.hidden_size, config.num_hidden_layers
    intermediate = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden
    width = 2 if autocast else torch.empty(0, dtype=model.dtype).element_size()
    layer = tokens * width * (_KEPT_HIDDEN * hidden + _KEPT_INTERMEDIATE * intermediate)
    kept = layers * tokens * width * hidden + layer if gradient_checkpointing else layers * layer
    return {
        "weights": weights,
        "reference": weights if has_reference else 0,
        "gradients": trainable,
        "optimizer": state,
        "activations": kept,
    }
