"""Rows that cannot be learned from: left out, counted and said."""

from collections import Counter
from collections.abc import Mapping

import numpy as np
from datasets import Dataset, IterableDataset
from transformers.utils import logging

from trl_ulma.labels import one_class
from trl_ulma.rows.dataset_labels import is_continuous
from trl_ulma.rows.rendering import PROMPT_FILLS

logger = logging.get_logger(__name__)


def kept_of(encoded: Mapping[str, list], name: str) -> dict[str, list]:
    """A batch of a stream without the rows to leave out, which are said."""
    left_out = encoded["left_out"]
    for row, reason in zip(encoded["row"], left_out, strict=True):
        if reason is not None:
            logger.warning(f"Left out row {row} of the {name} dataset: {reason}.")
    return {
        column: [value for value, reason in zip(values, left_out, strict=True) if reason is None]
        for column, values in encoded.items()
        if column not in ("left_out", "cut")
    }


def check_stream_has_rows(stream: IterableDataset, name: str) -> None:
    """Raise ValueError where nothing is left of a stream."""
    if next(iter(stream), None) is None:
        raise ValueError(f"All rows of the {name} dataset were left out; a warning for each row says why.")


def kept_rows(encoded: Dataset, name: str, label_type: str | None) -> Dataset:
    """The rows that can be learned from; says what was left out, what was cut, and (given the type of labels) what the
    labels lack."""
    reasons = encoded["left_out"][:]
    total = len(reasons)
    counts = Counter(reason for reason in reasons if reason is not None)
    why = "; ".join(f"{count} because {reason}" for reason, count in counts.most_common())
    if sum(counts.values()) == total:
        raise ValueError(
            f"All {total} rows of the {name} dataset were left out: {why}. "
            + ("Raise max_length." if PROMPT_FILLS in counts else "Look at the rows.")
        )
    if counts:
        logger.warning(f"Left out {sum(counts.values())} of {total} rows of the {name} dataset: {why}.")
        encoded = encoded.select([i for i, reason in enumerate(reasons) if reason is None])
    cut = sum(encoded["cut"][:])
    if cut:
        logger.warning(f"Cut {cut} of {len(encoded)} rows of the {name} dataset at max_length.")
    rows = encoded.remove_columns(["left_out", "cut"])
    if "weight" in rows.column_names and not any(rows["weight"][:]):
        raise ValueError(
            f"Every row of the {name} dataset has weight 0, so that nothing would be learned. Remove the column "
            "weight, or set some of it above 0."
        )
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
