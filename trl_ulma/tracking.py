"""Pictures of a run in its tracker: the labels when training begins, the calibration after each evaluation."""

from typing import Any

import numpy as np
from datasets import Dataset
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from trl_ulma.rows.dataset_labels import are_demonstrations

# Those of `report_to` that take pictures
TRACKERS = {"tensorboard": TensorBoardCallback, "trackio": TrackioCallback, "wandb": WandbCallback}


class TracksPictures(TrainerCallback):
    """Logs pictures to those of TensorBoard, Trackio and W&B that `report_to` names.

    - `train/labels`, when training begins: a histogram of the labels, demonstrations apart; with a label transform also
      of the labels before it (not of a stream);
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
