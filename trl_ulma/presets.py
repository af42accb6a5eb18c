"""Presets: published methods by their names, as settings of this package.

A new preset is a new entry of `PRESETS`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from trl_ulma.log_partition import quantile_log_z


class Preset(NamedTuple):
    """A published method.

    Attributes:
        source: where it was published.
        settings: the settings that it stands for, by name, given β.
    """

    source: str
    settings: Callable[[float], dict[str, Any]]


PRESETS = {
    # Labels become their quantiles among the prompt's answers, for which Z is known
    "qrpo": Preset(
        "arXiv 2507.08068",
        lambda beta: {
            "label_type": "continuous",
            "label_transform": "prompt_quantile",
            "log_z": quantile_log_z(beta),
        },
    ),
    # ℓ = (β·log π/π_ref − (z − ½))², where z is the probability to win and β is 1/η
    "sppo": Preset("arXiv 2405.00675", lambda beta: {"label_type": "continuous", "log_z": 0.5 / beta}),
    # The running mean of the rewards is BCO's δ
    "bco": Preset("arXiv 2404.04656", lambda beta: {"log_z": "running_mean"}),
    "una": Preset("arXiv 2408.15339", lambda beta: {"binary_loss": "squared_error"}),
    "kto": Preset("arXiv 2402.01306", lambda beta: {"binary_loss": "kto", "log_z": "batch_kl"}),
}


def follows_from_beta(preset: str) -> bool:
    """Whether a preset's settings depend on β.

    Example:
        >>> follows_from_beta("sppo"), follows_from_beta("kto")
        (True, False)
    """
    settings = PRESETS[preset].settings
    return settings(1.0) != settings(2.0)


def apply_preset(config: Any, defaults: dict[str, Any]) -> None:
    """Set what a config's `preset` stands for.

    Args:
        config: which has `preset` and `beta`.
        defaults: of its settings, by name.

    Raises:
        ValueError: for an unknown preset, and for settings that contradict it; all of them at once.
    """
    if config.preset is None:
        return
    if config.preset not in tuple(PRESETS):  # it may be unhashable
        raise ValueError(f"preset must be one of {tuple(PRESETS)}; got {config.preset!r}.")
    settings = PRESETS[config.preset].settings(config.beta)
    contradicting = {
        name: getattr(config, name)
        for name, value in settings.items()
        if getattr(config, name) not in (value, defaults[name])
    }
    if contradicting:
        told = ", ".join(f"{name}={value!r}" for name, value in contradicting.items())
        wanted = ", ".join(f"{name}={settings[name]!r}" for name in contradicting)
        remedy = "Leave these settings out, or leave out the preset."
        if follows_from_beta(config.preset):
            remedy += (
                f" If you did not set them, beta was changed: create the config with beta={config.beta:g} instead."
            )
        raise ValueError(f"preset={config.preset!r} stands for {wanted}, and the config has {told}. {remedy}")
    for name, value in settings.items():
        setattr(config, name, value)
