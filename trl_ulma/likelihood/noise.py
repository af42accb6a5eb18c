"""Dropout and other noise in a model's forward pass: switch it off temporarily or permanently."""

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig

# The standard deviation of parameters in `with_effect`
_EFFECT = 0.02


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """A context with every module in evaluation mode. Afterwards each module is in its previous mode.

    Dropout, functional dropout and the noise of NEFTune are off in this context.

    Example:
        >>> model = nn.Sequential(nn.Dropout(0.5), nn.Linear(1, 1).eval())
        >>> with evaluation_mode(model):
        ...     model[0].training
        False
        >>> model[0].training, model[1].training
        (True, False)
    """
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def switch_off_noise(model: nn.Module) -> None:
    """Set every dropout rate of a model to 0, including those of functional dropout and skipped layers.

    `nn.Dropout` modules, and others of which the class is named so, have a rate `p`. Other modules pass a rate to
    `nn.functional.dropout` or to attention, and read it from an attribute of their own or of their config, whose name
    contains "drop". In adapters, it can be a dict with the rate of each adapter. The config that is saved with the
    model keeps its rates. The jitter of routers is not changed, because it can also be a threshold in evaluation mode.

    Example:
        >>> from transformers import OPTConfig, OPTForCausalLM
        >>> sizes = {"vocab_size": 8, "hidden_size": 8, "word_embed_proj_dim": 8, "ffn_dim": 8, "num_hidden_layers": 1}
        >>> model = OPTForCausalLM(OPTConfig(**sizes, num_attention_heads=1, max_position_embeddings=8))
        >>> layer = model.model.decoder.layers[0]
        >>> layer.dropout
        0.1
        >>> switch_off_noise(model)
        >>> layer.dropout
        0.0
    """
    quiet: dict[int, PretrainedConfig] = {}
    for module in model.modules():
        is_named_so = "Dropout" in type(module).__name__ and isinstance(vars(module).get("p"), float)
        if isinstance(module, nn.modules.dropout._DropoutNd) or is_named_so:
            module.p = 0.0  # type: ignore[assignment]
        for name in _rates(module):
            setattr(module, name, 0.0)
        for name, of_adapters in vars(module).items():
            if "drop" in name.lower() and isinstance(of_adapters, dict):
                of_adapters.update({key: 0.0 for key, rate in of_adapters.items() if isinstance(rate, float)})
        config = vars(module).get("config")
        if isinstance(config, PretrainedConfig) and _reads(module, rates := _rates(config)):
            # A copy, because the config is saved with the model
            if id(config) not in quiet:
                quiet[id(config)] = copy.copy(config)
                vars(quiet[id(config)]).update(dict.fromkeys(rates, 0.0))
            module.config = quiet[id(config)]  # type: ignore[assignment]


@contextmanager
def with_effect(model: nn.Module) -> Iterator[None]:
    """A context in which an untrained adapter has an effect. Afterwards its parameters are what they were.

    Many adapters begin with a matrix of zeros, which hides whatever else is wrong with them, such as dropout of their
    own. Trainable parameters that are 0 get small random numbers meanwhile, which are the same in all processes.
    Parameters that FSDP2 or ZeRO-3 shard are not changed.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> _ = layer.weight.data.zero_()
        >>> with with_effect(layer):
        ...     bool(layer.weight.any())
        True
        >>> layer.weight.data
        tensor([[0., 0.]])
    """
    zeros = [
        p
        for p in model.parameters()
        if p.requires_grad and not isinstance(p, DTensor) and not hasattr(p, "ds_id") and p.numel() and not p.any()
    ]
    with torch.no_grad():
        for number, p in enumerate(zeros):
            generator = torch.Generator().manual_seed(number)
            p.copy_(_EFFECT * torch.randn(p.shape, generator=generator))
    try:
        yield
    finally:
        with torch.no_grad():
            for p in zeros:
                p.zero_()


def _reads(module: nn.Module, rates: Sequence[str]) -> bool:
    """Whether the forward pass of a module reads any of these rates from its config, as Falcon's does."""
    names = getattr(getattr(inspect.unwrap(type(module).forward), "__code__", None), "co_names", ())
    return "config" in names and not set(names).isdisjoint(rates)


def _rates(owner: Any) -> list[str]:
    """The names of the attributes with a rate above 0 of functional dropout or of skipped layers."""
    return [
        name
        for name, value in vars(owner).items()
        if isinstance(value, float) and 0 < value <= 1 and "drop" in name.lower() and not name.startswith("_")
    ]
