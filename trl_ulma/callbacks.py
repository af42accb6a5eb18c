"""Callbacks of a training: Ctrl-C, and the checks at its start and end."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from accelerate.logging import get_logger
from transformers import TrainerCallback

logger = get_logger(__name__)


class Interruption(TrainerCallback):
    """Stops training after Ctrl-C once the current optimizer step has finished, and saves a checkpoint.

    A second Ctrl-C stops immediately. Use the callback as a context manager around the training. Processes can notice
    the signal in different steps, so they have to agree: `noticed` is what this process knows, `agreed` what all know.
    """

    def __init__(self, accelerator: Any):
        self._accelerator = accelerator
        self.noticed = False
        self.agreed = False
        self._is_training = False
        self._previous: Any = None

    def __enter__(self) -> "Interruption":
        self.noticed = self.agreed = False
        self._is_training = True
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._notice)
        return self

    def __exit__(self, *exception: object) -> None:
        self._is_training = False
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def _notice(self, number: int, frame: FrameType | None) -> None:
        if self.noticed:
            raise KeyboardInterrupt
        self.noticed = True
        # print is not safe here, because the signal can interrupt another print
        os.write(
            2, b"\nInterrupted: finishing this step and writing a checkpoint. Press Ctrl-C again to stop immediately.\n"
        )

    def agree(self) -> bool:
        """Tell all processes if one of them has noticed the signal."""
        noticed = torch.tensor(float(self.noticed), device=self._accelerator.device)
        self.agreed = bool(self._accelerator.reduce(noticed, "sum") > 0)
        return self.agreed

    def on_step_end(self, args, state, control, **kwargs):
        """Request a checkpoint and the end of the training."""
        self._stop(args, state, control)

    def on_epoch_end(self, args, state, control, **kwargs):
        """The same, for a signal after the last step of an epoch."""
        self._stop(args, state, control)

    def on_evaluate(self, args, state, control, **kwargs):
        """The same, for a signal during an evaluation in training."""
        if self._is_training:
            self._stop(args, state, control)

    def on_save(self, args, state, control, **kwargs):
        """The end of the training, for a signal while the checkpoint of this step was written."""
        self._stop(args, state, control)
        control.should_save = False

    def _stop(self, args: Any, state: Any, control: Any) -> None:
        if self.agreed or not self.agree():
            return
        control.should_save = control.should_training_stop = True
        control.should_evaluate = False
        folder = f"{args.output_dir}/checkpoint-{state.global_step}"
        logger.warning(
            f"Interrupted: saving step {state.global_step} to {folder}. Resume with resume_from_checkpoint=True (on "
            "the command line --resume_from_checkpoint True)."
        )


class Calls(TrainerCallback):
    """Calls functions at the events of a training, with the trainer's state.

    Args:
        **functions: by the names of the events, such as `on_train_begin`.
    """

    def __init__(self, **functions: Callable[[Any], None]):
        for event, function in functions.items():
            setattr(self, event, lambda args, state, control, call=function, **kwargs: call(state))
