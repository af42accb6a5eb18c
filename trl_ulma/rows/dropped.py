"""Rows that cannot be learned from: refused together, or left out, counted and logged."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from datasets import Dataset, IterableDataset
from transformers.utils import logging

from trl_ulma.labels import InvalidRow, list_invalid, one_class, refuse_invalid
from trl_ulma.rows.dataset_labels import is_continuous
from trl_ulma.rows.notes import note
from trl_ulma.rows.rendering import PROMPT_FILLS

logger = logging.get_logger(__name__)

INVALID_ROWS = ("error", "drop")
# Columns of rows that are being prepared, which prepared rows do not have
PASSING = ("left_out", "cut", "invalid", "unended")


def packed(error: InvalidRow | None) -> str | None:
    """An error as a text, to be kept beside its row.

    Example:
        >>> unpacked(packed(InvalidRow("Row 1: label is None.", "label is missing"))).kind
        'label is missing'
    """
    return None if error is None else json.dumps([error.message, error.kind, error.prompt])


def unpacked(text: str) -> InvalidRow:
    """The error that `packed` has made a text of."""
    return InvalidRow(*json.loads(text))


def kept_of(encoded: Mapping[str, list], name: str, invalid_rows: str, numbers: Sequence[int | str]) -> dict[str, list]:
    """A batch of a stream without the rows to leave out, which are logged by these numbers.

    Raises:
        ValueError: listing the batch's invalid rows, unless they are to be dropped.
    """
    invalid = [None if text is None else unpacked(text) for text in encoded["invalid"]]
    if invalid_rows == "error":
        refuse_invalid([error for error in invalid if error is not None], None, name)
    is_kept = []
    for row, reason, error, unended in zip(numbers, encoded["left_out"], invalid, encoded["unended"], strict=True):
        is_kept.append(reason is None and error is None)
        if error is not None:
            logger.warning(
                f"Left out row {row} of the {name} dataset, which is invalid. {list_invalid([error], 1, name)}"
            )
        elif reason is not None:
            logger.warning(f"Left out row {row} of the {name} dataset: {reason}.")
        elif unended:
            logger.warning_once(
                f"{UNENDED.format('answers')} (Said once; other rows of the {name} dataset may be alike.)"
            )
    return {
        column: [value for value, kept in zip(values, is_kept, strict=True) if kept]
        for column, values in encoded.items()
        if column not in PASSING
    }


UNENDED = (
    "The chat template ends {} with no special token, such as EOS or the end of a turn, so the model would not learn "
    "to stop. Have tokenizer.chat_template end assistant turns with one."
)


def check_stream_has_rows(stream: IterableDataset, name: str) -> None:
    """Raise ValueError where nothing is left of a stream."""
    if next(iter(stream), None) is None:
        raise ValueError(f"All rows of the {name} dataset were left out; a warning for each row says why.")


def kept_rows(
    encoded: Dataset,
    name: str,
    label_type: str | None,
    invalid_rows: str = "error",
    unreadable: Sequence[InvalidRow] = (),
) -> Dataset:
    """The rows that can be learned from; logs what was left out, what was cut, and (given the type of labels) what the
    labels lack. How many rows were left out for which reason is kept with them, see `trl_ulma.rows.notes`.

    Args:
        encoded: prepared rows with the columns `PASSING`.
        name: the data set's.
        label_type: of rows that have none of their own, or None.
        invalid_rows: "error" or "drop".
        unreadable: errors of rows that could not even be read, and are not in `encoded`.

    Raises:
        ValueError: listing the invalid rows; also where no row is left.
    """
    reasons, invalid = encoded["left_out"][:], encoded["invalid"][:]
    errors = [*unreadable, *(unpacked(text) for text in invalid if text is not None)]
    total = len(reasons) + len(unreadable)
    if invalid_rows == "error":
        refuse_invalid(errors, total, name)
    is_kept = [reason is None and text is None for reason, text in zip(reasons, invalid, strict=True)]
    counts = Counter(r for r, text in zip(reasons, invalid, strict=True) if r is not None and text is None)
    if errors:
        counts["it is invalid"] = len(errors)
    why = "; ".join(f"{count} because {reason}" for reason, count in counts.most_common())
    listed = "\n" + list_invalid(errors, total, name) if errors else ""
    if not any(is_kept):
        raise ValueError(
            f"All {total} rows of the {name} dataset were left out: {why}. "
            + ("Raise max_length." if PROMPT_FILLS in counts else "Look at the rows.")
            + listed
        )
    if counts:
        logger.warning(f"Left out {sum(counts.values())} of {total} rows of the {name} dataset: {why}.{listed}")
    if not all(is_kept):
        encoded = encoded.select([i for i, kept in enumerate(is_kept) if kept])
    cut = sum(encoded["cut"][:])
    if cut:
        logger.warning(f"Cut {cut} of {len(encoded)} rows of the {name} dataset at max_length.")
    unended = sum(encoded["unended"][:])
    if unended:
        logger.warning(UNENDED.format(f"{unended} of {len(encoded)} answers of the {name} dataset"))
    rows = encoded.remove_columns(list(PASSING))
    if "completion_mask" in rows.column_names and rows.data["completion_mask"].null_count == len(rows.data):
        rows = rows.remove_columns("completion_mask")
    if "weight" in rows.column_names and not any(rows["weight"][:]):
        raise ValueError(
            f"Every row of the {name} dataset has weight 0, so that nothing would be learned. Remove the column "
            "weight, or set some of it above 0."
        )
    kinds = Counter(error.kind for error in errors)
    counts.pop("it is invalid", None)
    note(rows, left_out={**counts, **{f"invalid: {kind}": count for kind, count in kinds.items()}})
    if label_type is None:
        return rows
    label = np.asarray(rows["label"][:])
    alike = one_class(label, is_continuous(rows, label_type))
    if alike:
        logger.warning(
            f"The {name} dataset has one class: {alike}. That is right for SFT or unlearning; to compare answers, "
            "good and bad ones are needed."
        )
    return rows
