"""Held-out rows for evaluation: one answer per row, numbered prompts, and answers to compare with."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, Self

import numpy as np
from datasets import Dataset, Value
from transformers.utils import logging

from trl_ulma.data.origins import located, origins
from trl_ulma.data.pairs import pairs_to_rows
from trl_ulma.data.unread import UNREAD
from trl_ulma.evaluation.judges import Comparison
from trl_ulma.evaluation.records import digest
from trl_ulma.evaluation.turns import answer_text
from trl_ulma.labels import (
    OPTIONAL_COLUMNS,
    InvalidRow,
    LabelRules,
    check_columns,
    check_texts,
    list_invalid,
    read_labels,
    refuse_invalid,
    unread,
)
from trl_ulma.rows.batches import SAME_ANSWERS
from trl_ulma.rows.dataset_labels import SHOWN_BY, check_pairs, own_labels, prompt_keys, raters_of, transformed_labels
from trl_ulma.rows.dropped import in_short, reasons_in_words
from trl_ulma.rows.images import as_images, image_column, image_key, undecoded_column
from trl_ulma.rows.rendering import OF_TEMPLATES

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Question:
    """A prompt with a good and a bad answer from the data.

    Attributes:
        prompt: text or messages.
        row: the number of the row with the chosen answer.
        chosen: text of the best good answer.
        rejected: text of the worst other answer, or None.
    """

    prompt: Any
    row: int
    chosen: str
    rejected: str | None


def invalid_in_words(errors: Sequence[InvalidRow], others: int, name: str, command: str) -> str:
    """How many invalid rows were left out and why, for the terminal of a command.

    Args:
        errors: of the invalid rows.
        others: the number of the rows that were not left out.
        name: the name of the dataset.
        command: the command, with which all invalid rows can be listed.
    """
    total = len(errors) + others
    return f"Left out {len(errors)} of {total} rows of the {name} dataset. {in_short(errors, command)}"


@dataclass(frozen=True)
class HeldOut:
    """Held-out rows with one answer each, and their labels. Every array is `(N,)`.

    Attributes:
        rows: the N rows, with transformed labels.
        label: float, after the transform.
        own_label: float, on the scale that rows carry, as far as the transform has a way back to it.
        sft_mask: bool, whether the row is a demonstration.
        continuous: bool, whether the label is continuous.
        prompt: the number of the prompt.
        places: the file and line of each row, or None where it is not known.
        raters: the raters of the rows, if the transform reads them.
        left_out: reason → number of the rows that were left out, of which `invalid` has the errors.
        invalid: see `left_out`.
    """

    rows: Dataset
    label: np.ndarray
    own_label: np.ndarray
    sft_mask: np.ndarray
    continuous: np.ndarray
    prompt: np.ndarray
    places: Sequence[str | None] = ()
    raters: Sequence[Any] | None = None
    left_out: Mapping[str, int] = field(default_factory=dict)
    invalid: Sequence[InvalidRow] = ()

    @classmethod
    def of(
        cls,
        dataset: Dataset,
        name: str,
        rules: LabelRules,
        invalid_rows: str = "error",
        *,
        takes_images: bool = False,
        note: Callable[[str], None] | None = None,
    ) -> Self:
        """The rows of a dataset. Pairs become two rows each. Halves without an answer are left out, with a warning.
        `takes_images` says whether they may have images, which tell prompts of the same words apart. `note` is called
        with a message about raters that the training did not have.

        Labels go through the rules' transform, which pairs must not have. With `invalid_rows="drop"`, invalid rows are
        left out with a warning that lists them.

        Raises:
            ValueError: if rows are invalid (the message lists them), if a column is wrong, or if no row is left.
        """
        rows, raw_row, left_out = _one_answer_a_row(dataset, name, takes_images)
        images = image_column(rows.column_names, name)
        columns = {column: rows[column][:] for column in ("prompt", "completion", "label")}
        optional = (*OPTIONAL_COLUMNS, *OF_TEMPLATES)
        columns |= {column: rows[column][:] for column in optional if column in rows.column_names}
        if "chosen" in dataset.column_names:
            check_pairs(rules, name)
        invalid: dict[int, InvalidRow] = {}
        transformed = transformed_labels(rows, name, rules, invalid, note)
        if transformed is not None:
            columns["label"] = transformed
        read = read_labels(columns, range(len(rows)), name, rules, invalid)
        own = own_labels(rows, name, rules, np.asarray(read["label"]))
        seen = repeat(None, len(rows)) if images is None else undecoded_column(rows, images)
        keys = columns["image_key"] = [0] * len(rows)
        faults = rows[UNREAD][:] if UNREAD in rows.column_names else [None] * len(rows)
        for row, (prompt, completion, shown, fault) in enumerate(
            zip(columns["prompt"], columns["completion"], seen, faults, strict=True)
        ):
            if fault is not None:
                invalid[row] = unread(fault).at(row, name)
                continue
            try:
                check_texts(prompt, completion, takes_images=images is not None)
                keys[row] = image_key(as_images(shown))
            except InvalidRow as error:
                invalid.setdefault(row, error.at(row, name).at_prompt(prompt))
        errors: list[InvalidRow] = []
        if invalid:
            errors = located([(raw_row[row], invalid[row]) for row in sorted(invalid)], dataset)
            if invalid_rows == "error" or len(errors) == len(rows):
                refuse_invalid(errors, len(rows), name)
            if SHOWN_BY.get() is None:  # else the command says it, see `invalid_in_words`
                listed = list_invalid(errors, len(rows), name)
                left = f"Left out {len(errors)} of {len(rows)} rows of the {name} dataset."
                logger.warning(f"{left} They are invalid.\n{listed}")
            left_out.update(f"invalid: {error.kind}" for error in errors)
            kept = [row for row in range(len(rows)) if row not in invalid]
            rows = rows.select(kept)
            own = own[kept]
            raw_row = [raw_row[row] for row in kept]
            columns, read = ({c: [v[row] for row in kept] for c, v in each.items()} for each in (columns, read))
        raters = raters_of(rows, rules)
        rows = rows.remove_columns("label").add_column("label", read["label"], feature=Value("float64"))
        prompts = prompt_keys(columns, range(len(rows)))
        numbers: dict[Any, int] = {}
        types = read.get("label_type", [rules.label_type] * len(rows))
        places = origins(dataset)
        return cls(
            rows,
            np.asarray(read["label"]),
            own,
            np.asarray(read["sft_mask"]),
            np.asarray(types) == "continuous",
            # In the order of the rows, as in the model card, whose intervals are the same then
            np.array([numbers.setdefault(prompt, len(numbers)) for prompt in prompts]),
            [places[row] for row in raw_row],
            raters,
            left_out,
            errors,
        )

    def questions(self, limit: int | None, seed: int, center: float = 0.0) -> list[Question]:
        """Return the prompts that have a good answer, in row order.

        A good answer is a demonstration, or has a binary label of at least ½, or a continuous one of at least `center`.

        Args:
            limit: the largest number of prompts. `seed` and the prompts determine which ones are drawn; the order of
                the rows does not matter.
            seed: seed of the draw.
            center: center of the continuous labels, after the transform.
        """
        good = self.sft_mask | (self.label >= np.where(self.continuous, center, 0.5))
        rows_of: dict[int, list[int]] = {}
        for row, number in enumerate(self.prompt):
            rows_of.setdefault(int(number), []).append(row)
        found = []
        for among in rows_of.values():
            best = max((i for i in among if good[i]), key=lambda i: (self.sft_mask[i], self.label[i]), default=None)
            if best is None:
                continue
            worse = [i for i in among if not good[i] and self.label[i] < self.label[best]]
            worst = min(worse, key=lambda i: self.label[i], default=None)
            rejected = None if worst is None else answer_text(self.rows[worst]["completion"])
            row = self.rows[best]
            found.append(Question(row["prompt"], best, answer_text(row["completion"]), rejected))
        if limit is None or limit >= len(found):
            return found
        return sorted(sorted(found, key=lambda each: digest(seed, each.prompt))[:limit], key=lambda each: each.row)


def known_comparisons(questions: Sequence[Question]) -> list[Comparison]:
    """Return comparisons whose outcome is known from the data: chosen against rejected answers."""
    return [Comparison(each.prompt, each.chosen, each.rejected) for each in questions if each.rejected is not None]


def _one_answer_a_row(dataset: Dataset, name: str, takes_images: bool) -> tuple[Dataset, Sequence[int], Counter[str]]:
    """Returns (rows with one answer each, number of the raw row of each, number of left-out answers by reason)."""
    if not len(dataset):
        raise ValueError(f"The {name} dataset is empty; at least one row is needed.")
    if not check_columns(dataset.column_names, name, takes_images=takes_images):
        return dataset.with_format(None), range(len(dataset)), Counter()
    images = image_column(dataset.column_names, name)
    texts = dataset.remove_columns(images) if images is not None else dataset
    columns = pairs_to_rows(texts.with_format(None)[:])
    why, pair = columns.pop("left_out"), columns.pop("pair")
    answers = list(zip(columns["prompt"], columns["completion"], strict=True))
    for i in range(0, len(answers), 2):  # as in training
        if answers[i] == answers[i + 1] and answers[i][1] is not None and why[i] is None:
            why[i] = why[i + 1] = SAME_ANSWERS
    kept = [i for i, reason in enumerate(why) if reason is None]
    left_out = Counter(reason for reason in why if reason is not None)
    reasons = reasons_in_words(left_out, "answer")
    if not kept:
        raise ValueError(f"All {len(why)} answers of the {name} dataset were left out. {reasons}")
    if left_out:
        logger.warning(f"Left out {len(why) - len(kept)} of {len(why)} answers of the {name} dataset. {reasons}")
    rows = Dataset.from_dict({column: [values[i] for i in kept] for column, values in columns.items()})
    rows.info.builder_name = dataset.info.builder_name  # of CSV, which has no messages
    raw_row = [pair[i] for i in kept]
    if images is None:
        return rows, raw_row, left_out
    values = list(undecoded_column(dataset, images))
    rows = rows.add_column(images, [values[row] for row in raw_row], feature=dataset.features[images])
    return rows, raw_row, left_out
