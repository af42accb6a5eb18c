"""What a training does at its events: Ctrl-C, checks at start and end."""

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
    """Ends training after the optimizer step in which Ctrl-C came, with its state saved; a second one ends it at once.

    Use it as a context around the training. Processes may notice in different steps, so that they have to agree:
    `noticed` is what this one knows, `agreed` what all know.

    Args:
        accelerator: of the trainer.
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
        # Not by print, which this may have interrupted
        os.write(
            2, b"\nInterrupted: the step that is running ends, and a checkpoint is written. Ctrl-C ends it at once.\n"
        )

    def agree(self) -> bool:
        """Have all processes know what one of them has noticed."""
        noticed = torch.tensor(float(self.noticed), device=self._accelerator.device)
        self.agreed = bool(self._accelerator.reduce(noticed, "sum") > 0)
        return self.agreed

    def on_step_end(self, args, state, control, **kwargs):
        """Ask for a checkpoint and for the end."""
        self._stop(args, state, control)

    def on_epoch_end(self, args, state, control, **kwargs):
        """The same, of what came after the epoch's last step."""
        self._stop(args, state, control)

    def on_evaluate(self, args, state, control, **kwargs):
        """The same, of what came in an evaluation while training."""
        if self._is_training:
            self._stop(args, state, control)

    def _stop(self, args: Any, state: Any, control: Any) -> None:
        if self.agreed or not self.agree():
            return
        control.should_save = control.should_training_stop = True
        control.should_evaluate = False
        folder = f"{args.output_dir}/checkpoint-{state.global_step}"
        logger.warning(
            f"Interrupted: step {state.global_step} is saved in {folder}. Go on with resume_from_checkpoint=True "
            "(on the command line --resume_from_checkpoint True)."
        )


class Calls(TrainerCallback):
    """Calls functions at a training's events.

    Args:
        on_train_begin: called before the first step, when the model is as it is trained.
        on_train_end: called after the last step.
        on_epoch_begin: called with the epoch's number.
        on_optimizer_step: called when the weights have changed, before the learning rate does.
    """

    def __init__(
        self,
        on_train_begin: Callable[[], None],
        on_train_end: Callable[[], None],
        on_epoch_begin: Callable[[int], None],
        on_optimizer_step: Callable[[], None],
    ):
        self._begin, self._end = on_train_begin, on_train_end
        self._epoch, self._step = on_epoch_begin, on_optimizer_step

    def on_train_begin(self, args, state, control, **kwargs):
        """Call the function."""
        self._begin()

    def on_train_end(self, args, state, control, **kwargs):
        """Call the function."""
        self._end()

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Call the function."""
        self._epoch(int(state.epoch or 0))

    def on_optimizer_step(self, args, state, control, **kwargs):
        """Call the function."""
        self._step()
