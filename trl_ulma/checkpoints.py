"""Checkpoints that were written to their end, and runs that are interrupted."""

import re
import shutil
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from accelerate.logging import get_logger
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

logger = get_logger(__name__)

_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin")

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


def refuse_pickle(folder: str | Path, loading: dict[str, Any] | None) -> None:
    """Raise ValueError where the weights in a folder are pickled, unless `loading` has `use_safetensors=False`.

    Args:
        folder: of a model or a checkpoint; what is no folder is left to whoever loads it.
        loading: the settings' `model_init_kwargs`.
    """
    loading = loading or {}
    weights = Path(folder) / loading.get("subfolder", "")
    pickled = next((name for name in _PICKLED if (weights / name).exists()), None)
    if pickled is None or any(weights.glob("*.safetensors")) or loading.get("use_safetensors") is False:
        return
    raise ValueError(
        f"The weights in {weights} are a pickle ({pickled}), which can hold programs, and are not loaded. Save them as "
        'safetensors, or, where you trust them, set model_init_kwargs={"use_safetensors": False}.'
    )


class Interruption(TrainerCallback):
    """Ends training after the optimiser step in which Ctrl-C came, with its state saved; a second one ends it at once.

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


class KeepsCheckpoints(Trainer):
    """A `Trainer` that resumes only from checkpoints that were written to their end, and leaves one when interrupted.

    Attributes:
        interruption: whether Ctrl-C came; whoever knows of all processes sets its `agreed`.
    """

    # Files of a checkpoint that go with its weights wherever these are pushed
    _beside_weights: tuple[str, ...] = ()

    def __init__(self, *args: Any, **kwargs: Any):
        self.interruption = Interruption()
        super().__init__(*args, **kwargs)
        self.add_callback(self.interruption)

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """As `Trainer.train`. `resume_from_checkpoint=True` takes the newest checkpoint that was written to its end,
        and where there is none, training starts afresh.

        Raises:
            KeyboardInterrupt: after Ctrl-C, when the step that was running is done and a checkpoint is written.
            ValueError: where the checkpoint's weights are pickled.
        """
        if resume_from_checkpoint is True:
            output_dir = str(self.args.output_dir)
            whole = last_whole(output_dir)
            if whole is None:
                logger.warning(f"There is no whole checkpoint in {output_dir}: training starts afresh.")
            resume_from_checkpoint = None if whole is None else str(whole)
        elif resume_from_checkpoint and not (Path(resume_from_checkpoint) / WHOLE).exists():
            logger.warning(
                f"{resume_from_checkpoint} has no mark that it was written to its end: it is half-written, or another "
                "trainer's. Training goes on from it as it is."
            )
        if resume_from_checkpoint:
            refuse_pickle(resume_from_checkpoint, getattr(self.args, "model_init_kwargs", None))
        with self.interruption:
            result = super().train(resume_from_checkpoint, *args, **kwargs)
        if self.interruption.agreed:
            # What follows a training is not for one that was stopped
            raise KeyboardInterrupt
        return result

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        limit = self.args.save_total_limit
        # Older checkpoints go only after this one is whole
        self.args.save_total_limit = None
        try:
            if self.args.should_save:
                unmark(folder)
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            last = next((path for path in checkpoints(folder.parent) if (path / WHOLE).exists()), "none")
            raise OSError(
                f"The checkpoint {folder} could not be written ({error}). The last whole one is {last}: make room, and "
                "go on with resume_from_checkpoint=True."
            ) from error
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_whole(folder)
            rotate_checkpoints(
                output_dir=str(folder.parent),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _push_from_checkpoint(self, checkpoint_folder):
        # What is pushed is whole: Trainer copies and uploads what it knows, and before the mark is set
        self.accelerator.wait_for_everyone()
        folder = Path(checkpoint_folder)
        if self.args.should_save:
            mark_whole(folder)
            for name in self._beside_weights:
                if (folder / name).exists():
                    shutil.copy(folder / name, str(self.args.output_dir))
        super()._push_from_checkpoint(checkpoint_folder)
