"""Pointwise DPO and ULMA for TRL: learn from ratings, thumbs, votes and demonstrations of single answers."""

from importlib import import_module, metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trl_ulma.config import PointwiseDPOConfig, ULMAConfig
    from trl_ulma.rows.collator import DataCollatorForPointwisePreference
    from trl_ulma.rows.images import DataCollatorForVisionPointwisePreference
    from trl_ulma.trainer import PointwiseDPOTrainer, ULMATrainer

__version__ = metadata.version("trl-ulma")

__all__ = [
    "DataCollatorForPointwisePreference",
    "DataCollatorForVisionPointwisePreference",
    "PointwiseDPOConfig",
    "PointwiseDPOTrainer",
    "ULMAConfig",
    "ULMATrainer",
    "__version__",
]

# Modules are loaded on first use, so that the command line starts without importing torch
_MODULES = {
    "DataCollatorForPointwisePreference": "rows.collator",
    "DataCollatorForVisionPointwisePreference": "rows.images",
    "PointwiseDPOConfig": "config",
    "ULMAConfig": "config",
    "PointwiseDPOTrainer": "trainer",
    "ULMATrainer": "trainer",
}


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
