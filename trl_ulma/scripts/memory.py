"""Estimates the memory of a training on one device, before a model is loaded."""

from typing import Any

import torch

# The size of the tensors that a decoder layer keeps for the backward pass, per token: in hidden sizes (norms, queries,
# values, output of the attention, residuals) and in intermediate sizes (gate, up, their product, its activation)
_KEPT_HIDDEN, _KEPT_INTERMEDIATE = 9, 4
# Bytes per weight in bitsandbytes: 4 bits and a float32 scale per 64 weights, or 8 bits
_QUANTIZED = {4: 0.5 + 4 / 64, 8: 1.0}
# Values that an optimizer keeps per weight, by the beginning of its name. Adam and its relatives keep 2. Those of
# GaLore, APOLLO, Adafactor and LOMO are small beside the weights.
_STATES = {
    **dict.fromkeys(("adafactor", "adalomo", "apollo", "galore", "lomo", "sgd"), 0),
    **dict.fromkeys(("adagrad", "lion", "muon", "rmsprop", "schedule_free_sgd"), 1),
    **dict.fromkeys(("ademamix", "grokadamw"), 3),
}


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
    """The bytes on one device, by use. The context of the device and fragmentation are not included.

    The estimate of activations is for a decoder with gated feed-forward layers, and for attention that does not store
    scores (sdpa, flash). It is accurate to about a factor of two.

    Args:
        model: the policy, with its adapter. Its weights may be on the meta device.
        tokens: the number of tokens of the largest micro-batch, with padding.
        optimizer: the name of the optimizer in `TrainingArguments`.
        has_reference: whether the reference is a separate model. (The reference of an adapter is its base model.)
        gradient_checkpointing: whether only the inputs of layers are kept.
        autocast: whether the training computes in bfloat16 or float16.
        bits: 4 or 8 if bitsandbytes quantizes the linear layers, else None.

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
    name = optimizer.removeprefix("paged_")
    states = next((count for begin, count in _STATES.items() if name.startswith(begin)), 2)
    quantized = next((size for bits, size in (("4bit", 0.5), ("8bit", 1)) if bits in name), None)
    # bitsandbytes keeps float32
    is_float32 = "32bit" in name or "bnb" in name or name.startswith("ademamix")
    size = quantized or (4 if is_float32 else None)
    state = int(states * (trainable if size is None else size * trainable_number))

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
