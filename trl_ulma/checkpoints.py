"""Checkpoints: which were written to their end, which can be gone on from."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.logging import get_logger
from safetensors import SafetensorError
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


def checkpoint_to_resume(resume_from_checkpoint: Any, output_dir: str, loading: dict[str, Any] | None) -> str | None:
    """The checkpoint that training goes on from; True takes the newest that was written to its end.

    Args:
        resume_from_checkpoint: what `Trainer.train` was given: None, a bool, or a folder.
        output_dir: of the training.
        loading: the settings' `model_init_kwargs`.

    Raises:
        ValueError: if the checkpoint's weights are pickled.
    """
    if not resume_from_checkpoint:
        return None
    if resume_from_checkpoint is True:
        whole = last_whole(output_dir)
        if whole is None:
            logger.warning(f"There is no whole checkpoint in {output_dir}: training starts afresh.")
            return None
        resume_from_checkpoint = str(whole)
    elif not (Path(resume_from_checkpoint) / WHOLE).exists():
        logger.warning(
            f"{resume_from_checkpoint} has no mark that it was written to its end: it is half-written, or another "
            "trainer's. Training goes on from it as it is."
        )
    refuse_pickle(resume_from_checkpoint, loading)
    return resume_from_checkpoint


@contextmanager
def written_whole(args: Any, folder: Path, best: Callable[[], str | None]) -> Iterator[None]:
    """Around the writing of a checkpoint: it is marked at its end, and older ones go only after.

    Args:
        args: the trainer's config.
        folder: of the checkpoint.
        best: the checkpoint that is to be kept in any case, asked when this one is written.

    Raises:
        OSError: naming the last whole checkpoint, if this one cannot be written.
    """
    limit, args.save_total_limit = args.save_total_limit, None
    try:
        if args.should_save:
            unmark(folder)
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        last = next((path for path in checkpoints(folder.parent) if (path / WHOLE).exists()), "none")
        raise OSError(
            f"The checkpoint {folder} could not be written ({error}). The last whole one is {last}: make room, and "
            "go on with resume_from_checkpoint=True."
        ) from error
    finally:
        args.save_total_limit = limit
    PartialState().wait_for_everyone()
    if args.should_save:
        mark_whole(folder)
        rotate_checkpoints(
            output_dir=str(folder.parent),
            save_total_limit=limit,
            best_model_checkpoint=best(),
            use_mtime=True,
        )
