"""log π_ref of a whole table, asked once and kept in a cache that knows what it depends on."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

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

from trl_ulma.likelihood.reference import Reference
from trl_ulma.likelihood.scorer import bare_model
from trl_ulma.likelihood.table import forward_inputs


def has_ref_logps(rows: Dataset) -> bool:
    """Whether log π_ref of every row is known.

    Example:
        >>> has_ref_logps(Dataset.from_dict({"ref_logps": [-1.0, float("nan")]}))
        False
    """
    return "ref_logps" in rows.column_names and not np.isnan(rows["ref_logps"][:]).any()


def with_ref_logps(rows: Dataset, asked: np.ndarray, **asking: Any) -> Dataset:
    """The rows with a column `ref_logps`, NaN for those that the reference is not asked for.

    Args:
        rows: prepared rows.
        asked: `(N,)` bool.
        **asking: as `precomputed_logps` takes it.
    """
    if "ref_logps" in rows.column_names:  # of the training set's compared rows alone
        rows = rows.remove_columns("ref_logps")
    ref_logps = np.full(len(rows), np.nan)
    if asked.any():
        part = rows if asked.all() else rows.select(np.flatnonzero(asked))
        # Whether they are computed or read from the cache, training draws the same random numbers: a data loader takes
        # its seed from torch's
        with torch.random.fork_rng(devices=[]):
            ref_logps[asked] = precomputed_logps(rows=part, **asking)
    return rows.add_column("ref_logps", ref_logps.tolist())


def cache_key(reference: Reference, policy: Any, probe: torch.Tensor, accelerator: Accelerator) -> str:
    """What the reference's log-probabilities depend on besides the rows: weights, config, number formats, layout.

    What none of these names (a module that was changed in memory) shows in the log-probabilities of `probe`.

    Args:
        reference: that is asked.
        policy: the policy's model, for references that are an adapter on it.
        probe: `(N, W)` tokens.
        accelerator: of the trainer.
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
    """A hash of a model's weights, the same on all processes, each of which may hold a part of them.

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
    what: str = "Asking the reference",
) -> np.ndarray:
    """`(N,)` log π_ref of prepared rows in nats, on all processes; from the cache, if they are there.

    Rows that were made in memory have no cache.

    Args:
        reference: that is asked.
        policy: the policy's model, for references that are an adapter on it.
        rows: prepared rows.
        collate: makes a batch of rows.
        accelerator: of the trainer; each process asks for its part of the rows.
        key: see `cache_key`.
        batch_size: rows per forward and process.
        num_workers: of the data loader.
        what: on the progress bar.
    """
    file = None
    if rows.cache_files:
        file = Path(rows._get_cache_file_path(Hasher.hash((rows._fingerprint, key)))).with_suffix(".npy")
        # One process reads for all, since they may not see one file system
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
    # The processes take batches in turn; what was added so that all have as many comes last
    values = torch.cat(found)[: len(rows)].numpy()
    if file is not None and accelerator.is_main_process:
        half = file.with_suffix(".half.npy")
        np.save(half, values)
        os.replace(half, file)  # so that a file that is there is whole
    accelerator.wait_for_everyone()
    return values
