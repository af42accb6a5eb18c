"""Log messages of the main process alone."""

import logging
from collections.abc import MutableMapping
from typing import Any

from accelerate import PartialState
from accelerate.logging import MultiProcessAdapter


class MainProcessLogger(MultiProcessAdapter):
    """A logger that logs on the main process, as accelerate's, whose prefix `[RANK 0]` it leaves out where there is
    one process only."""

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        if PartialState().num_processes > 1:
            return super().process(msg, kwargs)
        kwargs.setdefault("stacklevel", 2)
        return logging.LoggerAdapter.process(self, msg, kwargs)


def get_logger(name: str) -> MainProcessLogger:
    """The logger of a module.

    Args:
        name: the module's `__name__`.
    """
    return MainProcessLogger(logging.getLogger(name), {})
