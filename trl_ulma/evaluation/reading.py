"""Reads the rows of an evaluation, and their labels as the models' training did."""

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from datasets import Dataset

from trl_ulma.data.conversations import as_chat
from trl_ulma.data.files import check_splits, load_rows, split_by_prompt
from trl_ulma.data.read_files import TABLES
from trl_ulma.data.splits import default_part
from trl_ulma.evaluation.as_trained import AsTrained, as_trained
from trl_ulma.evaluation.held_out import HeldOut, Question
from trl_ulma.predictions import beyond_training
from trl_ulma.rows.chat import table_kind, with_system_message
from trl_ulma.rows.images import has_images
from trl_ulma.rows.rendering import processor_of
from trl_ulma.saved import load_processing_class

Note = Callable[[str | None], None]


@dataclass(frozen=True)
class Reading:
    """The rows of an evaluation, and how they were read.

    Attributes:
        held_out: the rows.
        name: their name in messages.
        split: the name of their split, or a description of the part of one.
        how: the rules for labels and for the length of sequences.
        center: continuous labels at or above it are good, after the transform. 0 if no labels are continuous.
        own_center: the center on the scale of the rows.
        is_reversed: whether lower labels are better on the scale of the rows.
        is_chat: whether prompts of plain text become user messages.
    """

    held_out: HeldOut
    name: str
    split: str
    how: AsTrained
    center: float
    own_center: float
    is_reversed: bool
    is_chat: bool

    def questions(self, most: int | None, seed: int) -> list[Question]:
        """Prompts with a good answer to compare with, at most so many, which the seed draws."""
        found = self.held_out.questions(most, seed, self.center)
        return [replace(each, prompt=self._as_read(each.prompt)) for each in found]

    def _as_read(self, prompt: Any) -> Any:
        """A prompt as models read it, which servers and judges see."""
        if self.is_chat and isinstance(prompt, str):
            prompt = as_chat([prompt], [""])[0][0]
        return prompt if self.how.system_message is None else with_system_message(prompt, self.how.system_message)


def read(args: Namespace, models: Sequence[str], note: Note, tell: Callable[[str], None], *, answers: bool) -> Reading:
    """Read the rows.

    Args:
        args: the options of `trl_ulma.scripts.evaluate`.
        models: the folders of the models, or their names on the Hub. Models that are only served are not among them.
        note: called with each note for the report.
        tell: called with each sentence on how rows are read, which needs no action.
        answers: whether answers to the rows will be generated.

    Raises:
        ValueError, OSError: if the rows cannot be read or cannot be evaluated as asked.
    """
    splits: Any = load_rows(
        args.dataset,
        config=args.dataset_config,
        columns=args.columns,
        label_map=args.label_map,
        invalid_rows="mark",
    )
    split = args.split or "test"
    if vars(args).pop("chose_part", False) and split in splits:
        note(f"{args.dataset} has the split {split!r}: --test_split_size and --split_seed are not used.")
    found = split if split in splits else "train"
    of_split = {found: splits[found]} if found in splits else {}
    for each in check_splits(of_split, args.dataset, columns=args.columns):
        note(each)
    if found in splits and has_images(splits[found]):
        _check_images(args, models, answers)
    if split in splits:
        return _read(args, models, note, tell, splits[split], split, split)
    if args.split is not None or "train" not in splits:
        there = ", ".join(map(str, splits))
        raise ValueError(f"{args.dataset} has no split {split!r}, but {there}. Set --split to one of them.")
    rows: Dataset = splits["train"]
    if args.test_split_size is None:
        args.test_split_size = default_part(rows, seed=args.split_seed)
    part = f"{args.test_split_size:g} of its rows, by prompt, seed {args.split_seed}"
    held_out = split_by_prompt(rows, test_size=args.test_split_size, seed=args.split_seed)["test"]
    tell(
        f"{args.dataset} has no test split, so {len(held_out):,} of its {len(rows):,} rows are selected ({part}). "
        "--split train evaluates all rows."
    )
    return _read(args, models, note, tell, held_out, "test", part)


def _read(
    args: Namespace,
    models: Sequence[str],
    note: Note,
    tell: Callable[[str], None],
    rows: Dataset,
    name: str,
    part: str,
) -> Reading:
    names = rows.column_names
    how = as_trained(
        models,
        label_type=args.label_type,
        label_transform=args.label_transform,
        sft_threshold=args.sft_threshold,
        max_length=args.max_length,
        truncation_mode=args.truncation_mode,
        is_paired="chosen" in names,
        labels=rows["label"][:] if "label" in names and "label_type" not in names else (),
    )
    if how.read_as is not None:
        tell(how.read_as)
    for each in how.notes:
        note(each)
    held_out = HeldOut.of(rows, name, how.rules, args.invalid_rows, takes_images=True, note=note)
    own = held_out.continuous == (how.rules.label_type == "continuous")
    note(beyond_training(held_out.own_label[own], how.rules))
    note(unweighted(held_out.rows["weight"][:] if "weight" in held_out.rows.column_names else ()))
    is_chat = how.chat == "true" or (how.chat == "auto" and _has_chats(args, models, rows))
    return Reading(held_out, name, part, how, *_centers(held_out, how, note), is_chat)


def unweighted(weights: Sequence[float]) -> str | None:
    """A note if rows have different weights, which no figure counts. None if they have not.

    Example:
        >>> unweighted([1, 2, 0.5, 0]), unweighted([2, 2])
        ('The rows have weights from 0 to 2, which only training uses. Every figure counts each row once, also 1 row of
        weight 0.', None)
    """
    if len(set(weights)) < 2:
        return None
    zeros = sum(weight == 0 for weight in weights)
    also = f", also {zeros:,} row{'s' * (zeros > 1)} of weight 0" if zeros else ""
    return (
        f"The rows have weights from {min(weights):g} to {max(weights):g}, which only training uses. Every figure "
        f"counts each row once{also}."
    )


def _has_chats(args: Namespace, models: Sequence[str], rows: Dataset) -> bool:
    """Whether `chat="auto"` converts the text of rows to messages, see `trl_ulma.rows.chat.becomes_chat`."""
    if table_kind(rows, next(iter(rows["prompt"]), None) if "prompt" in rows.column_names else None) != TABLES:
        return False
    return all(
        getattr(load_processing_class(each, trust_remote_code=args.trust_remote_code), "chat_template", None)
        for each in models
    )


def _centers(held_out: HeldOut, how: AsTrained, note: Note) -> tuple[float, float, bool]:
    """`center`, `own_center` and `is_reversed` of a `Reading`."""
    if not held_out.continuous.any():
        return 0.0, 0.0, False
    center = how.label_center
    if center is None:
        center = round(float(held_out.label[held_out.continuous].mean()), 9)
        note(
            "The mean of the training labels is not known, so rows are split into chosen and rejected ones at the mean "
            "label of the rows here."
        )
    transform = how.rules.transform
    if transform is None or how.rules.label_type != "continuous":
        return center, center, False
    own, above = transform.invert(np.array([center, center + 0.01])).tolist()
    return center, own, above < own


def _check_images(args: Namespace, models: Sequence[str], answers: bool) -> None:
    """Raise ValueError if rows with images cannot be evaluated as asked."""
    loading = {"trust_remote_code": args.trust_remote_code}
    blind = [each for each in models if processor_of(load_processing_class(each, **loading)) is None]
    if blind:
        raise ValueError(
            f"{args.dataset} has images, and {blind[0]} was saved with a tokenizer alone, without a processor of "
            "images. Evaluate a vision-language model, or remove the column of images."
        )
    if answers:
        raise ValueError(
            f"{args.dataset} has images, and answers to rows with images are not generated. Leave out --judge, "
            "--generate and served: models. Perplexity and rewards are computed for rows with images."
        )
