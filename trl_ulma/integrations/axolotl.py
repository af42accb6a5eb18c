"""axolotl: train from its YAML with `PointwiseDPOTrainer` or `ULMATrainer`.

    rl: dpo
    trainer_cls: trl_ulma.integrations.axolotl.ULMATrainer
    plugins:
      - trl_ulma.integrations.axolotl.PointwisePlugin
    skip_prepare_dataset: true
    remove_unused_columns: false
    pointwise:            # settings of ULMAConfig or PointwiseDPOConfig
      sft_weight: 0.1
      log_z: prior

With `rl: dpo` axolotl makes a DPO config, whose settings these trainers take over. `skip_prepare_dataset` leaves the
rows to the trainer, which reads `prompt`, `completion` and `label`, or pairs. β is axolotl's `rl_beta`.
`examples/axolotl/run.yaml` is a whole file.
"""

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from axolotl.integrations.base import BasePlugin  # pyright: ignore[reportMissingImports]
from pydantic import BaseModel

import trl_ulma

_SETTINGS: dict[str, Any] = {}


class PointwiseArgs(BaseModel):
    """What the plugin adds to axolotl's YAML.

    Attributes:
        pointwise: settings of `ULMAConfig` or `PointwiseDPOConfig`, by name.
    """

    pointwise: dict[str, Any] | None = None


class PointwisePlugin(BasePlugin):
    """Takes the settings under `pointwise` in axolotl's YAML."""

    def get_input_args(self) -> str:
        """The name of the class that describes the settings."""
        return f"{__name__}.{PointwiseArgs.__name__}"

    def register(self, cfg: dict) -> None:
        """Take over the settings.

        Raises:
            ValueError: for settings that the config of the trainer does not have.
        """
        settings = cfg.get("pointwise") or {}
        if not isinstance(settings, Mapping):
            raise ValueError(f"pointwise is {settings!r}; it must be a mapping of settings, such as log_z: prior.")
        is_pointwise = str(cfg.get("trainer_cls")).endswith(f".{PointwiseDPOTrainer.__name__}")
        config = trl_ulma.PointwiseDPOConfig if is_pointwise else trl_ulma.ULMAConfig
        known, of_ulma = ([f.name for f in fields(each)] for each in (config, trl_ulma.ULMAConfig))
        unknown = []
        for name in settings:
            if name not in known:
                close = difflib.get_close_matches(str(name), known, 1)
                hint = " (only ULMAConfig does)" if name in of_ulma else ""
                unknown.append(repr(name) + (hint or (f" (did you mean {close[0]!r}?)" if close else "")))
        if unknown:
            raise ValueError(f"pointwise: {config.__name__} does not have {', '.join(unknown)}. Remove or rename this.")
        _SETTINGS.clear()
        _SETTINGS.update(settings)


class PointwiseDPOTrainer(trl_ulma.PointwiseDPOTrainer):
    """`trl_ulma.PointwiseDPOTrainer` with the settings of axolotl's YAML."""

    def __init__(self, model: Any, ref_model: Any = None, args: Any = None, **kwargs: Any):
        args = trl_ulma.PointwiseDPOConfig.from_dpo_config(args, **_SETTINGS)
        super().__init__(model, ref_model, args=args, **kwargs)


class ULMATrainer(trl_ulma.ULMATrainer):
    """`trl_ulma.ULMATrainer` with the settings of axolotl's YAML."""

    def __init__(self, model: Any, ref_model: Any = None, args: Any = None, **kwargs: Any):
        args = trl_ulma.ULMAConfig.from_dpo_config(args, **_SETTINGS)
        super().__init__(model, ref_model, args=args, **kwargs)
