"""Dropout and other noise in a model's forward pass: switch it off temporarily or permanently."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

# Attributes for the rates of functional dropout and of skipped layers have this in their names
_RATE = "drop"


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
    store it in an attribute whose name contains "drop". The jitter of routers is not changed, because it can also be a
    threshold in evaluation mode.

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
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            is_rate = isinstance(value, float) and 0 < value <= 1 and _RATE in name.lower()
            if is_rate and not name.startswith("_"):
                setattr(module, name, 0.0)
