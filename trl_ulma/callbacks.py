"""What a training does at its events: Ctrl-C, checks at start and end, pictures in trackers."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from datasets import Dataset
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from trl_ulma.rows.dataset_labels import are_demonstrations

logger = get_logger(__name__)

# Those of `report_to` that take pictures
TRACKERS = {"tensorboard": TensorBoardCallback, "trackio": TrackioCallback, "wandb": WandbCallback}


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
    """

    def __init__(
        self,
        on_train_begin: Callable[[], None],
        on_train_end: Callable[[], None],
        on_epoch_begin: Callable[[int], None],
    ):
        self._begin, self._end, self._epoch = on_train_begin, on_train_end, on_epoch_begin

    def on_train_begin(self, args, state, control, **kwargs):
        """Call the function."""
        self._begin()

    def on_train_end(self, args, state, control, **kwargs):
        """Call the function."""
        self._end()

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Call the function."""
        self._epoch(int(state.epoch or 0))


class TracksPictures(TrainerCallback):
    """Logs pictures to those of TensorBoard, Trackio and W&B that `report_to` names.

    - `train/labels`, when training begins: how often each label comes, demonstrations apart (not of a stream);
    - `eval/calibration`, after each evaluation: mean label against mean σ(r) of the rows with binary labels. The last
      is that of the model as it is saved.

    Args:
        trainer: whose callbacks it is to be added to.

    Raises:
        ImportError: without matplotlib.

    Example:
        >>> trainer.add_callback(TracksPictures(trainer))  # doctest: +SKIP
    """

    def __init__(self, trainer: Any):
        try:
            from trl_ulma.evaluation import figures
        except ImportError as error:
            raise ImportError(
                "Pictures are drawn with matplotlib, which is not installed: pip install 'trl-ulma[evaluation]'."
            ) from error
        self.trainer = trainer
        self._figures = figures

    def on_train_begin(self, args, state, control, **kwargs):
        """Log the labels."""
        rows = self.trainer.train_dataset
        if state.is_world_process_zero and isinstance(rows, Dataset):
            picture = self._figures.label_histogram(np.asarray(rows["label"][:]), are_demonstrations(rows, args))
            self._log("train/labels", picture, state.global_step)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """Log the calibration."""
        from trl_ulma.evaluation.implicit_reward import calibration_curve

        reward, label, continuous = self.trainer.evaluated.T
        binary = continuous == 0
        if not (state.is_world_process_zero and self.trainer.has_rewards and binary.any()):
            return
        name = next((key.removesuffix("_loss") for key in metrics or () if key.endswith("_loss")), "eval")
        probability = np.exp(-np.logaddexp(0, -reward[binary]))
        bins = calibration_curve(probability, label[binary])
        step = f"step {state.global_step}"
        self._log(f"{name}/calibration", self._figures.calibration({step: bins}), state.global_step)

    def _log(self, name: str, figure: Any, step: int) -> None:
        image = _pixels(figure)
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_image(name, image, step, dataformats="HWC")
                callback.tb_writer.flush()
            elif isinstance(callback, TrackioCallback):
                trackio = callback._trackio
                trackio.log({name: trackio.Image(image), "train/global_step": step})
            elif isinstance(callback, WandbCallback):
                wandb: Any = callback._wandb
                wandb.log({name: wandb.Image(image), "train/global_step": step})


def add_pictures(trainer: Any) -> str:
    """Have a trainer log pictures where `report_to` names a tracker that takes them; what to say of it, or ""."""
    if not set(TRACKERS).intersection(trainer.args.report_to):
        return ""
    try:
        trainer.add_callback(TracksPictures(trainer))
    except ImportError as problem:
        return f"No pictures are logged. {problem}"
    return ""


def _pixels(figure: Any) -> np.ndarray:
    """`(height, width, 3)` uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
