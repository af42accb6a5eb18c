"""TRL's configs as configs of this package."""

import copy
from dataclasses import MISSING, fields
from typing import Any

from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.utils import logging
from trl import DPOConfig

logger = logging.get_logger(__name__)

# Losses of KTOConfig, and the line that replaces them
_KTO_LOSSES = {
    "apo_zero_unpaired": "set binary_loss='kto' in the PointwiseDPOConfig, with log_z=0, which is the same loss",
}
# Settings with another default in older versions: TRL before 1.15 has 0.001 for all models, and not the model's own
# weight, and transformers 5.2 a public Space
_OTHER_DEFAULTS = ("router_aux_loss_coef", "trackio_space_id")


def from_dpo_config(config_class: Any, args: DPOConfig, settings: dict[str, Any]) -> Any:
    """See `PointwiseDPOConfig.from_dpo_config`."""
    unknown = set(settings) - {f.name for f in fields(config_class)}
    if unknown:
        raise TypeError(f"{config_class.__name__} has no setting {', '.join(sorted(unknown))}.")
    theirs = _defaults(DPOConfig)
    values = {
        name: value for name, value in vars(args).items() if not (name in _OTHER_DEFAULTS and value == theirs.get(name))
    }
    return _with_values(config_class, values | settings)


def from_kto_config(config_class: Any, args: Any) -> Any:
    """See `PointwiseDPOConfig.from_kto_config`."""
    ours, theirs = _defaults(config_class), _defaults(type(args))
    values, refused = {}, []
    for name, value in vars(args).items():
        if name == "loss_type":
            if value not in ("kto", ["kto"]):
                refused.append(f"loss_type={value!r}: {_KTO_LOSSES.get(str(value), 'it has no counterpart')}")
        elif name in theirs and name not in ours:
            if value != theirs[name]:
                refused.append(f"{name}={value!r}: it has no counterpart, leave it out")
        # TRL's default for KTO's mismatched pairs, and not a choice of the user's
        elif not (name in ("train_sampling_strategy", *_OTHER_DEFAULTS) and value == theirs[name]):
            values[name] = value
    if refused:
        raise ValueError(
            f"{config_class.__name__} cannot take over these settings of {type(args).__name__}: {'; '.join(refused)}."
        )
    config = _with_values(config_class, values)
    logger.warning_once(
        f"{type(args).__name__} is taken over as a {config_class.__name__}: its loss becomes pointwise DPO's "
        f"cross-entropy with log Z = 0. Set {config_class.__name__}(preset='kto') to train with KTO's own loss and "
        "reference point."
    )
    return config


def _with_values(config_class: Any, values: dict[str, Any]) -> Any:
    """A config with these values, whose `__post_init__`, which reads the environment and warns, has not run."""
    config = object.__new__(config_class)
    for name, value in (_defaults(config_class) | values).items():
        # TRL writes into these while it sets up
        own = copy.deepcopy(value) if isinstance(value, list | dict | AcceleratorConfig) else value
        object.__setattr__(config, name, own)
    config.check()
    return config


def _defaults(config_class: Any) -> dict[str, Any]:
    return {
        f.name: f.default_factory() if f.default_factory is not MISSING else f.default for f in fields(config_class)
    }
