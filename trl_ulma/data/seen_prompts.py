"""Hashes of a model's training prompts, saved beside its weights, so that evaluation knows which rows are held out."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from trl_ulma.data.splits import canonical, prompts_of

# Trainer does not upload files that begin with "_". With the hashes, a guessed prompt can be confirmed.
FILE = "_training_prompts.npy"
# At 8 bytes each. Of more prompts, those with the smallest hashes are kept, and rows with greater hashes are unknown.
MOST = 100_000
# Rows whose prompts are in memory at once
_BATCH = 1_000
SEEN, NEW, UNKNOWN = 1, 0, -1


def hashes_of(prompts: Iterable[Any]) -> np.ndarray:
    """`(N,)` uint64. Spellings of one prompt have the same hash, see `trl_ulma.data.splits.canonical`.

    Example:
        >>> one, other = hashes_of(["Hi ", [{"role": "user", "content": "Hi"}]])
        >>> bool(one == other)
        True
    """
    return np.array([_hash(prompt) for prompt in prompts], dtype=np.uint64)


def training_hashes(rows: Dataset, numbers: Iterable[int]) -> np.ndarray:
    """The sorted hashes of the prompts of raw rows, at most `MOST`.

    Args:
        rows: raw rows, with prompts or with pairs that contain them.
        numbers: numbers of the rows that were trained on.
    """
    used = rows.with_format(None).select(sorted(set(numbers)))
    found = [np.zeros(0, np.uint64)]
    for start in range(0, len(used), _BATCH):
        part = used.select(range(start, min(start + _BATCH, len(used))))
        found.append(hashes_of(prompt for prompts in prompts_of(part) for prompt in prompts))
    return np.unique(np.concatenate(found))[:MOST]


def save(hashes: np.ndarray | None, folder: Path) -> None:
    """Write the hashes beside a model. If they are None, remove those of an earlier training."""
    if hashes is None:
        (folder / FILE).unlink(missing_ok=True)
    else:
        np.save(folder / FILE, hashes)


def seen(prompts: Iterable[Any], trained: str | np.ndarray | None) -> np.ndarray:
    """`(N,)` `SEEN`, `NEW` or `UNKNOWN`: whether prompts were in the training data of a model.

    Args:
        prompts: `(N,)` text or messages.
        trained: `training_hashes`, or the path of `FILE` in the model's folder. None if they are not known.

    Raises:
        ValueError: if the file contains something else.
    """
    hashes = hashes_of(prompts)
    if trained is None:
        return np.full(len(hashes), UNKNOWN)
    known = _load(trained) if isinstance(trained, str) else trained
    found = np.where(np.isin(hashes, known), SEEN, NEW)
    if len(known) == MOST:
        found[hashes > known.max()] = UNKNOWN
    return found


def _load(file: str) -> np.ndarray:
    try:
        return np.load(file)
    except (EOFError, ValueError) as error:
        raise ValueError(f"{file} does not contain the hashes of training prompts ({error}). Delete it.") from error


def in_words(found: np.ndarray, model: str) -> str | None:
    """How many of N rows have a prompt that a model was trained on. None if it is not known of any row.

    Args:
        found: the result of `seen`.
        model: the name of the model.

    Example:
        >>> in_words(np.array([SEEN, SEEN, NEW]), "out")
        'Rows whose prompt was in the training data of the model out: 2 of 3. Held out: 1.'
    """
    trained, new, unknown = (int((found == kind).sum()) for kind in (SEEN, NEW, UNKNOWN))
    if unknown == len(found):
        return None
    message = f"Rows whose prompt was in the training data of the model {model}: {trained:,} of {len(found):,}."
    return f"{message} Held out: {new:,}." + (f" Not known: {unknown:,}." if unknown else "")


def _hash(prompt: Any) -> int:
    text = canonical(prompt).encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest())
