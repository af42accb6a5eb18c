"""log Z in training: check it against the rows, create it from the settings, save it beside the weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from trl_ulma.log_partition import NEED_CLASSES, BatchKL, Learned, LogPartition, Prior, RunningMean
from trl_ulma.losses import is_informative
from trl_ulma.rows.dataset_labels import is_continuous, prompt_numbers

logger = logging.get_logger(__name__)

# The file beside the model's weights
FILE = "log_z.safetensors"


def make_log_partition(args: Any, train_dataset: Any, compared: Any, model: Any, device: Any) -> LogPartition:
    """The `LogPartition` that `log_z` of a config selects.

    Args:
        args: the trainer's config.
        train_dataset: prepared rows. `check_labels` must have passed for them.
        compared: returns `(N,)` bool, the rows that are compared with the reference.
        model: the policy. Its output embeddings read the hidden states that "learned" reads.
        device: the device of the rows.

    Raises:
        ValueError: if the policy's adapter shifts the position that "learned" reads.
    """
    choice, beta = args.log_z, args.beta
    if choice == "prior":
        return Prior(*_labels_of(train_dataset, args, compared(train_dataset)), beta=beta, device=device)
    if choice == "running_mean":
        return RunningMean(device=device)
    if choice == "batch_kl":
        return BatchKL(device=device)
    if choice in ("learned", "learned_constant"):
        size = _hidden_size(model) if choice == "learned" else 0
        return Learned(size, beta=beta, learning_rate=args.log_z_learning_rate, device=device)
    return LogPartition(0.0 if choice in ("column", "group") else choice, device)


def _hidden_size(model: Any) -> int:
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(
            "log_z='learned' reads the prompt's hidden state, but prompt-learning adapters put virtual tokens "
            "before the rows, which shifts its position. Set log_z='learned_constant', or train with LoRA."
        )
    # OPT-350m projects its hidden states to another width before the output embeddings
    size = getattr(model.get_output_embeddings(), "in_features", None)
    return size or model.config.get_text_config().hidden_size


def save_log_partition(log_partition: LogPartition, folder: str | Path) -> None:
    """Write the state of a `LogPartition` to a folder. If it has no state, write nothing."""
    state = log_partition.state_dict()
    if state:
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file({name: value.cpu().contiguous() for name, value in state.items()}, Path(folder) / FILE)


def load_log_partition(log_partition: LogPartition, folder: str | Path) -> None:
    """Load the state that was saved in a folder.

    Raises:
        ValueError: if the state belongs to another choice or model.
    """
    path = Path(folder) / FILE
    log_partition.load_state_dict(load_file(path) if path.exists() else {})


def saved_log_partition(settings: Any, state: str | Path | None, device: Any) -> LogPartition:
    """log Z of a saved model.

    Args:
        settings: the settings that were saved with the model, with `beta` and `log_z`.
        state: the path of `log_z.safetensors`. None if there is no such file.
        device: the device of the rows.

    Raises:
        ValueError: if the choice has a state, but the file is missing.

    Example:
        >>> from types import SimpleNamespace
        >>> saved_log_partition(SimpleNamespace(beta=0.1, log_z=0.5), None, "cpu").log_z
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    if settings.log_z in ("column", "group"):  # a group's log Z is that of the rows trained on
        return LogPartition(0.0, device)
    if not isinstance(settings.log_z, str):
        return LogPartition(float(settings.log_z), device)
    if state is None:
        raise ValueError(
            f"The model was trained with log_z={settings.log_z!r}, but the file {FILE} with its state is missing from "
            "the model's folder. Copy it from the folder that training wrote."
        )
    found = load_file(state)
    if "weights" not in found:
        fixed = LogPartition(0.0, device)
        fixed.log_z.copy_(found["log_z"])
        return fixed
    # The weights consist of those of the prompt's hidden state and one for each of the two kinds of labels
    learned = Learned(len(found["weights"]) - 2, beta=settings.beta, learning_rate=0.0, device=device)
    learned.load_state_dict(found)
    return learned


def schedule_rate(optimizer: torch.optim.Optimizer, schedule: Any = None) -> float:
    """The factor of the learning-rate schedule at this step.

    Args:
        schedule: the schedule, with or without accelerate's wrapper.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
        >>> schedule_rate(optimizer)
        1.0
        >>> schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=10)
        >>> round(schedule_rate(optimizer), 9)
        0.04
    """
    group = optimizer.param_groups[0]
    # OneCycleLR and CyclicLR begin below their peak, which they store here or there. Of others, such as GreedyLR,
    # max_lrs is a bound that may be far above.
    schedule = getattr(schedule, "scheduler", schedule)
    peak = schedule.max_lrs[0] if isinstance(schedule, torch.optim.lr_scheduler.CyclicLR) else group.get("max_lr")
    if peak:
        return float(group["lr"] / peak)
    # torch's schedulers store the initial rate under this key, others do not. It is saved with the optimizer.
    initial = group.setdefault("initial_lr", group["lr"])
    return float(group["lr"] / initial) if initial else 1.0


def mismatched(
    batch: dict[str, torch.Tensor], real: torch.Tensor, image_key: torch.Tensor | None = None
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Each row's prompt with the completion of the next row that has another prompt, and a `(B,)` bool of valid rows.

    A row without such a partner keeps its own completion and is not valid, so all processes run the same number of
    rows. Completions are truncated if a row would become wider than the batch.

    Args:
        batch: `input_ids`, `attention_mask`, `completion_mask` `(B, T)`, padded on the right.
        real: `(B,)` bool, False for rows that are repeated.
        image_key: `(B,)` keys of the rows' images, if rows have images. Rows with different images have different
            prompts.
    """
    ids, width = batch["input_ids"].tolist(), batch["input_ids"].size(1)
    lengths = batch["attention_mask"].sum(1).tolist()
    starts = batch["completion_mask"].argmax(1).tolist()
    prompts = [row[:start] for row, start in zip(ids, starts, strict=True)]
    scored = batch["completion_mask"].tolist()
    spans = [slice(start, length) for start, length in zip(starts, lengths, strict=True)]
    completions = [row[span] for row, span in zip(ids, spans, strict=True)]
    masks = [row[span] for row, span in zip(scored, spans, strict=True)]
    is_real = real.tolist()
    seen = [0] * len(prompts) if image_key is None else image_key.tolist()
    made = {name: torch.zeros_like(value) for name, value in batch.items()}
    counts = []
    for row, prompt in enumerate(prompts):
        others = [(row + by) % len(prompts) for by in range(1, len(prompts))]
        differ = (o for o in others if is_real[o] and (prompts[o], seen[o]) != (prompt, seen[row]))
        partner = next(differ, None)
        counts.append(partner is not None and is_real[row])
        source = row if partner is None else partner
        tokens = (prompt + completions[source])[:width]
        kept = masks[source][: len(tokens) - len(prompt)]
        made["input_ids"][row, : len(tokens)] = torch.tensor(tokens, device=made["input_ids"].device)
        made["attention_mask"][row, : len(tokens)] = 1
        made["completion_mask"][row, len(prompt) : len(tokens)] = torch.tensor(kept, device=made["input_ids"].device)
    return made, torch.tensor(counts, device=real.device)


def check_column(
    choice: float | str, dataset: Dataset | IterableDataset, name: str, trained: Dataset | IterableDataset | None = None
) -> None:
    """Raise ValueError if a dataset lacks the column that `log_z` reads, or has a column that contradicts `log_z`.

    Args:
        choice: `log_z` of the config.
        dataset: prepared rows. A stream is only checked if its columns are known.
        name: the name of the dataset, for messages.
        trained: the prepared training rows, which have the column if and only if the others do.
    """
    names = dataset.column_names
    has_column = "log_z" in (names or ())
    if choice == "column" and names and not has_column:
        raise ValueError(
            f"log_z='column' needs a column log_z, in nats, but the {name} dataset has none. Add the column, or set "
            "another log_z."
        )
    if choice not in (0, "column") and has_column:
        raise ValueError(
            f"log_z={choice!r} contradicts the column log_z in the {name} dataset. Remove the column, or set "
            "log_z='column'."
        )
    trained_names = names if trained is None else trained.column_names
    if names and trained_names and has_column != ("log_z" in trained_names):
        which = ("train", name) if not has_column else (name, "train")
        raise ValueError(
            f"The {which[0]} dataset has a column log_z, but the {which[1]} dataset has none, so the same reward would "
            f"not mean the same in both. Add the column to the {which[1]} dataset, or remove it from the other."
        )


def check_labels(
    args: Any, train_dataset: Dataset | IterableDataset, compared: Callable[[Dataset], np.ndarray]
) -> None:
    """Raise ValueError if log Z cannot be learned from the labels.

    Args:
        args: the trainer's config.
        train_dataset: prepared rows.
        compared: returns which rows are compared with the reference, `(N,)` bool.
    """
    if args.log_z not in NEED_CLASSES:
        return
    if isinstance(train_dataset, Dataset):
        _check_classes(args.log_z, *_labels_of(train_dataset, args, compared(train_dataset)))
    elif args.log_z == "prior":
        raise ValueError(
            "log_z='prior' needs the mean label of all rows, which is unknown for a stream. Set log_z to a number or "
            "to 'learned_constant', or load the dataset without streaming."
        )


def with_groups(
    dataset: Dataset | IterableDataset, args: Any, compared: Callable[[Dataset], np.ndarray], name: str
) -> Dataset | IterableDataset:
    """Prepared rows with a column `group`: a number for each prompt and kind of label, for log_z="group".

    Args:
        dataset: prepared rows.
        args: the trainer's config.
        compared: returns which rows are compared with the reference, `(N,)` bool.
        name: the name of the dataset, for messages.

    Raises:
        ValueError: if the dataset is a stream, or if binary labels are not 0 or 1.
    """
    if args.log_z != "group" or "group" in (dataset.column_names or ()):
        return dataset
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            f"log_z='group' brings the rows of a prompt together, but the {name} dataset is a stream, whose rows come "
            "in their own order. Load the dataset without streaming, or set another log_z."
        )
    label, continuous = np.asarray(dataset["label"][:]), is_continuous(dataset, args.label_type)
    soft = np.flatnonzero(compared(dataset) & ~continuous & ~np.isin(label, (0, 1)))
    if len(soft) and name != "score":  # a score has no loss
        first = np.asarray(dataset["row"][:])[soft[0]]
        raise ValueError(
            f"log_z='group' counts a prompt's likes, so binary labels must be 0 or 1, but {len(soft)} rows of the "
            f"{name} dataset have others. The first is row {first} with {label[soft[0]]:g}. Set "
            "label_type='continuous', or label_transform='threshold:0.5'."
        )
    return dataset.add_column("group", 2 * prompt_numbers(dataset) + continuous)


def check_groups(args: Any, train_dataset: Dataset, compared: np.ndarray) -> None:
    """Warn about rows that log_z="group" cannot compare with others.

    Args:
        args: the trainer's config.
        train_dataset: prepared rows with a column `group`.
        compared: `(N,)` bool, the rows that are compared with the reference.

    Raises:
        ValueError: if these are all rows.
    """
    label, continuous, weight = _labels_of(train_dataset, args, compared)
    group = torch.from_numpy(np.where(weight > 0, np.asarray(train_dataset["group"][:])[compared], -1))
    informative = is_informative(torch.from_numpy(label), group, torch.from_numpy(continuous))
    alone = len(label) - int(informative.sum())
    what = "a prompt of one compared row, or with binary labels of one class only"
    if alone == len(label):
        raise ValueError(
            f"log_z='group' compares the rows of a prompt with each other, but each of the {alone} compared rows has "
            f"{what}. (If labels are binary, ULMA only compares rows that are not demonstrations.) Set another log_z."
        )
    if not args.should_log:
        return
    if alone:
        logger.warning(
            f"log_z='group': {alone} of the {len(label)} compared rows have {what}. Their preference loss is 0."
        )
    size = args.per_device_train_batch_size
    large = group[informative].unique(return_counts=True)[1]
    large = large[large > size]
    if len(large):
        logger.warning(
            f"log_z='group': {len(large)} prompts have up to {large.max()} rows, and a micro-batch has {size}. Their "
            f"rows are split. To compare all of them, set per_device_train_batch_size={large.max()}."
        )


def _labels_of(rows: Dataset, args: Any, compared: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(label, continuous, weight in the loss) of the rows that are compared with the reference, each `(M,)`."""
    label = np.asarray(rows["label"][:])
    continuous = is_continuous(rows, args.label_type)
    chosen = np.where(continuous, np.asarray(rows["sft_mask"][:]), label >= 0.5)
    weight = np.where(chosen, args.desirable_weight, args.undesirable_weight)
    if "weight" in rows.column_names:
        weight = weight * np.asarray(rows["weight"][:])
    return label[compared], continuous[compared], weight[compared]


def _check_classes(choice: str, label: np.ndarray, continuous: np.ndarray, weight: np.ndarray) -> None:
    for kind in (False, True):
        rows = (continuous == kind) & (weight > 0)
        if rows.any() and (label[rows] == label[rows][0]).all():
            raise ValueError(
                f"log_z={choice!r} needs compared rows of both classes: all {rows.sum()} rows that are compared with "
                f"the reference have the label {label[rows][0]:g}. log Z alone would fit them, and the policy would "
                "learn nothing. (If labels are binary, ULMA only compares rows that are not demonstrations.) Mark the "
                "demonstrations among the good answers with sft_mask, or set log_z to a number."
            )
