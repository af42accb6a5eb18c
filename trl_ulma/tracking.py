"""Plots in the experiment tracker: the labels when training starts, and the calibration after each evaluation."""

from typing import Any

import numpy as np
from datasets import Dataset
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from trl_ulma.rows.dataset_labels import are_demonstrations

# The trackers of `report_to` that support images
TRACKERS = {"tensorboard": TensorBoardCallback, "trackio": TrackioCallback, "wandb": WandbCallback}


class TracksPictures(TrainerCallback):
    """Logs plots to TensorBoard, Trackio and W&B, if `report_to` names them.

    - `train/labels`, when training begins: a histogram of the labels, demonstrations apart; with a label transform also
      of the labels before it (not of a stream);
    - `eval/calibration`, after each evaluation: mean label against mean σ(r) of the rows with binary labels. The last
      plot shows the model as it is saved.

    Raises:
        ImportError: if matplotlib is not installed.

    Example:
        >>> trainer.add_callback(TracksPictures(trainer))  # doctest: +SKIP
    """

    def __init__(self, trainer: Any):
        try:
            from trl_ulma.evaluation import figures
        except ImportError as error:
            raise ImportError(
                "Plots require matplotlib, which is not installed. Run `pip install 'trl-ulma[evaluation]'`."
            ) from error
        self.trainer = trainer
        self._figures = figures

    def on_train_begin(self, args, state, control, **kwargs):
        """Log the labels."""
        rows = self.trainer.train_dataset
        if state.is_world_process_zero and isinstance(rows, Dataset):
            picture = self._figures.label_histogram(
                np.asarray(rows["label"][:]), are_demonstrations(rows, args), raw=self.trainer.raw_labels
            )
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
    """Make a trainer log plots if `report_to` names a tracker that supports them. Returns a message, or ""."""
    if not set(TRACKERS).intersection(trainer.args.report_to):
        return ""
    try:
        trainer.add_callback(TracksPictures(trainer))
    except ImportError as problem:
        return f"No plots are logged. {problem}"
    return ""


def _pixels(figure: Any) -> np.ndarray:
    """The figure as a `(height, width, 3)` uint8 array."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
