"""log π_ref of a whole table, computed once and cached with a key that covers everything it depends on."""

import contextlib
import hashlib
import os
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from datasets.fingerprint import Hasher
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from trl_ulma.likelihood.layouts import length_that_changes_positions
from trl_ulma.likelihood.reference import Reference
from trl_ulma.likelihood.scorer import bare_model
from trl_ulma.likelihood.table import forward_inputs
from trl_ulma.main_process import get_logger

logger = get_logger(__name__)

# The columns of prepared rows that a model's forward reads
_INPUTS = ("prompt_ids", "completion_ids", "completion_mask", "prompt_text", "prompt_images")

# The end of the name of a file that is being written, and the seconds after which its process must have been killed
_HALF, _LONGEST_WRITE = ".half.npy", 3600


def has_ref_logps(rows: Dataset) -> bool:
    """Whether log π_ref is known for every row.

    Example:
        >>> has_ref_logps(Dataset.from_dict({"ref_logps": [-1.0, float("nan")]}))
        False
    """
    return "ref_logps" in rows.column_names and not np.isnan(rows["ref_logps"][:]).any()


def input_hashes(rows: Dataset) -> list[bytes]:
    """A hash for each prepared row of what a model reads of it: its tokens, which of them are scored, and its images.

    Example:
        >>> rows = Dataset.from_dict({"prompt_ids": [[5], [5]], "completion_ids": [[6], [7]], "label": [1.0, 1.0]})
        >>> len(set(input_hashes(rows)))
        2
    """
    columns: Any = rows.select_columns([name for name in _INPUTS if name in rows.column_names]).with_format(None)
    return [hashlib.blake2b(repr([row.get(name) for name in _INPUTS]).encode()).digest() for row in columns]


def known_ref_logps(rows: Dataset, known: Iterable[Any]) -> list[float] | None:
    """The log π_ref that other datasets have for the same tokens, for each prepared row. None if any is unknown.

    Logs a warning if the rows have other values in a column `ref_logps` of their own, for example edited ones.

    Args:
        known: datasets. Only those with a column `ref_logps` are read.
    """
    table: dict[bytes, list[float]] = {}
    for each in {id(each): each for each in known}.values():
        if isinstance(each, Dataset) and "ref_logps" in each.column_names:
            for read, logps in zip(input_hashes(each), each.with_format(None)["ref_logps"][:], strict=True):
                table.setdefault(read, []).append(logps)
    found = [table.get(read) for read in input_hashes(rows)] if table else [None]
    if None in found:
        return None
    every = cast("list[list[float]]", found)
    if "ref_logps" in rows.column_names:
        given = np.asarray(rows.with_format(None)["ref_logps"][:], dtype=np.float64)
        other = [i for i, values in enumerate(every) if not np.isclose(given[i], values, equal_nan=True).any()]
        if other:
            logger.warning(
                f"In {len(other):,} of {len(rows):,} rows, such as row {rows['row'][other[0]]}, the column ref_logps "
                f"differs from the log-probability that this trainer's reference has computed for the same tokens "
                f"({given[other[0]]:.6g}, computed {every[other[0]][0]:.6g}). The computed values are used. To compare "
                "with another reference, create a trainer with that ref_model."
            )
    # Rows that are not compared in training may be in an evaluation
    return [next((value for value in values if not np.isnan(value)), np.nan) for values in every]


def with_ref_logps(rows: Dataset, asked: np.ndarray, **asking: Any) -> Dataset:
    """The rows with a column `ref_logps`, which is NaN for rows that are not selected.

    Args:
        asked: `(N,)` bool, the rows to compute log π_ref for.
        **asking: the arguments of `precomputed_logps`.
    """
    if "ref_logps" in rows.column_names:  # known only for the compared rows of the training set
        rows = rows.remove_columns("ref_logps")
    check_positions(bare_model(asking["policy"]).config, rows["length"][:])
    ref_logps = np.full(len(rows), np.nan)
    if asked.any():
        part = rows if asked.all() else rows.select(np.flatnonzero(asked))
        # Computing must not change the random numbers of the training, so that it matches a run that reads the cache. A
        # data loader draws its seed from torch's generator.
        with torch.random.fork_rng(devices=[]):
            ref_logps[asked] = precomputed_logps(rows=part, **asking)
    return rows.add_column("ref_logps", ref_logps.tolist())


def check_positions(config: Any, lengths: Sequence[int]) -> None:
    """Raise ValueError if the reference of a row depends on the rows that share its batch.

    With rotary positions of the types "longrope" and "dynamic", a row that is longer than the original context turns
    the positions of all rows in its batch. The batches of the precomputation are not those of the training.

    Args:
        config: the configuration of the model.
        lengths: `(N,)` numbers of tokens of the rows.

    Example:
        >>> from transformers import LlamaConfig
        >>> check_positions(LlamaConfig(), [100_000])
    """
    limit = length_that_changes_positions(config)
    longest = max(lengths, default=0)
    if limit is not None and longest > limit:
        raise ValueError(
            f"precompute_ref_log_probs=True is not exact for these rows: the longest has {longest:,} tokens, and rows "
            f"with more than {limit:,} tokens change the rotary positions of all rows in their batch. Set max_length="
            f"{limit}, or set precompute_ref_log_probs=False."
        )


def cache_key(reference: Reference, policy: Any, probe: torch.Tensor, accelerator: Accelerator) -> str:
    """A hash of what the reference's log-probabilities depend on besides the rows.

    It covers weights, config, number formats and layout. It also covers the log-probabilities of `probe`, which most
    other changes alter, such as a module that was changed in memory.

    Args:
        policy: the policy's model, for references that are an adapter on it.
        probe: `(N, W)` tokens.
    """
    model = bare_model(policy if reference.model is None else reference.model)
    adapters = {name: str(config) for name, config in getattr(model, "peft_config", {}).items()}
    return Hasher.hash(
        (
            *(weights_hash(model), reference.kind, reference.scorer.layout, model.config.to_json_string(), adapters),
            *(str(model.dtype), model.config._attn_implementation, accelerator.mixed_precision),
            *(torch.__version__, transformers.__version__, reference.fingerprint(policy, probe)),
        )
    )


def weights_hash(model: Any) -> str:
    """A hash of a model's weights. It is the same on all processes, even if each process holds a part of the weights.

    Example:
        >>> weights_hash(torch.nn.Linear(1, 1)) == weights_hash(torch.nn.Linear(1, 1))
        False
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if torch.is_tensor(local):
            digest.update(f"{name} {local.dtype}".encode())
            digest.update(local.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return Hasher.hash(gather_object([digest.hexdigest()]))


def precomputed_logps(
    reference: Reference,
    policy: Any,
    rows: Dataset,
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
    accelerator: Accelerator,
    *,
    key: str,
    batch_size: int,
    num_workers: int = 0,
    what: str = "Computing reference log-probabilities",
) -> np.ndarray:
    """`(N,)` log π_ref of prepared rows in nats, on all processes. They are read from the cache if they are there.

    Rows that were created in memory have no cache.

    Args:
        policy: the policy's model, for references that are an adapter on it.
        accelerator: the trainer's accelerator. Each process computes its part of the rows.
        batch_size: the number of rows per forward pass and process.
    """
    file = None
    if rows.cache_files:
        # What was changed in memory, such as a window of the attention, may only affect long rows
        longest = collate([rows[int(np.argmax(rows["length"][:]))]])
        on_device = {name: value.to(accelerator.device) for name, value in forward_inputs(longest).items()}
        # Collators can truncate rows or change their tokens
        everything = Hasher.hash((rows._fingerprint, key, collate, reference.logps(policy, on_device).tolist()))
        file = Path(rows._get_cache_file_path(everything)).with_suffix(".npy")
        # One process reads for all, because processes may have different file systems
        has = accelerator.is_main_process and file.exists()
        cached = broadcast_object_list([np.load(file) if has else None])[0]
        if cached is not None:
            return cached
    loader = prepare_data_loader(
        DataLoader(rows, batch_size=batch_size, collate_fn=collate, num_workers=num_workers),  # pyright: ignore[reportArgumentType]
        accelerator.device,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
        put_on_device=True,
    )
    found = []
    for batch in tqdm(loader, desc=what, unit="batch", disable=None if accelerator.is_main_process else True):
        logps = reference.logps(policy, forward_inputs(batch)).double()
        found.append(torch.as_tensor(accelerator.gather(logps)).cpu())
    # Processes take batches in turn. Rows that were repeated to fill up the last batches come last.
    values = torch.cat(found)[: len(rows)].numpy()
    if file is not None and accelerator.is_main_process:
        # So that an existing file is complete, also if another run computes the same rows at the same time
        half = file.with_suffix(f".{uuid.uuid4().hex}{_HALF}")
        try:
            np.save(half, values)
            os.replace(half, file)
        finally:
            half.unlink(missing_ok=True)
        for other in file.parent.glob(f"*{_HALF}"):
            with contextlib.suppress(OSError):  # another process may have finished it or removed it
                if time.time() - other.stat().st_mtime > _LONGEST_WRITE:
                    other.unlink()
    accelerator.wait_for_everyone()
    return values
