"""Checkpoints that were written to their end, and runs that are interrupted."""

import re
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from accelerate.logging import get_logger
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = get_logger(__name__)

# Written into a checkpoint's folder after everything else
WHOLE = "whole"


def mark_whole(folder: Path) -> None:
    """Say of a checkpoint that it was written to its end."""
    (folder / WHOLE).touch()


def unmark(folder: Path) -> None:
    """Take it back, before the checkpoint is written again."""
    (folder / WHOLE).unlink(missing_ok=True)


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints in a folder, whole or not, the newest first."""
    folder = Path(output_dir)
    found = {
        int(match[1]): path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    return [found[step] for step in sorted(found, reverse=True)]


def last_whole(output_dir: str | Path) -> Path | None:
    """The newest whole checkpoint in a folder, or None; says which newer ones it passes over.

    `transformers` takes the one with the highest number, whole or not, and fails where there is none.
    """
    for path in checkpoints(output_dir):
        if (path / WHOLE).exists():
            return path
        logger.warning(f"{path} was not written to its end, and is passed over.")
    return None


class Interruption(TrainerCallback):
    """Ends training after the optimiser step in which Ctrl-C came, with its state saved; the second one ends it at once.

    Use as a context around the training. Processes may notice in different steps, so that they have to agree:
    `noticed` is what this one knows, `agreed` what all do.
    """

    def __init__(self):
        self.noticed = False
        self.agreed = False
        self._previous: Any = None

    def __enter__(self) -> "Interruption":
        self.noticed = self.agreed = False
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._notice)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def _notice(self, number: int, frame: FrameType | None) -> None:
        if self.noticed:
            raise KeyboardInterrupt
        self.noticed = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a checkpoint and for the end."""
        if self.agreed:
            control.should_save = control.should_training_stop = True
            logger.warning(
                f"Interrupted: step {state.global_step} is saved in {args.output_dir}/checkpoint-{state.global_step}. "
                "Go on with resume_from_checkpoint=True (on the command line --resume_from_checkpoint True)."
            )
