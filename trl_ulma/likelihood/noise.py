"""Dropout and other noise in a model's forward pass: switch it off temporarily or permanently."""

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PretrainedConfig


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

    `nn.Dropout` modules have a rate `p`. Other modules pass a rate to `nn.functional.dropout` or to attention, and
    read it from an attribute of their own or of their config, whose name contains "drop". The config that is saved with
    the model keeps its rates. The jitter of routers is not changed, because it can also be a threshold in evaluation
    mode.

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
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name in _rates(module):
            setattr(module, name, 0.0)
        config = vars(module).get("config")
        if isinstance(config, PretrainedConfig) and _reads(module, rates := _rates(config)):
            # A copy, because the config is saved with the model
            if id(config) not in quiet:
                quiet[id(config)] = copy.copy(config)
                vars(quiet[id(config)]).update(dict.fromkeys(rates, 0.0))
            module.config = quiet[id(config)]  # type: ignore[assignment]


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
