"""Rows that are not valid for training: raises one error for all of them, or leaves them out, counts and logs them."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from itertools import compress

import numpy as np
from datasets import Dataset, IterableDataset
from transformers.utils import logging

from trl_ulma.data.origins import located, with_origins
from trl_ulma.labels import InvalidRow, InvalidRows, list_invalid, look_like_ratings, one_class, places, refuse_invalid
from trl_ulma.rows.dataset_labels import SHOWN_BY, is_continuous
from trl_ulma.rows.notes import note
from trl_ulma.rows.rendering import ESCAPED, NO_TOOLS, PROMPT_FILLS, REPEATED, SPECIAL, UNUSED

logger = logging.get_logger(__name__)

INVALID_ROWS = ("error", "drop")
INVALID = "it is invalid"
# Collects the errors of datasets that also have valid rows, so that a command can show these first. None raises them
COLLECTED: ContextVar[list[InvalidRows] | None] = ContextVar("COLLECTED", default=None)
# Odd rows that a warning names
_NAMED = 5
# What is odd about a row that is kept: what it has, what to do, and the least share of rows for a warning
UNASKED = "unasked"
_ODD = {
    UNASKED: ("an empty prompt", "Check the column prompt.", 0.0),
    # A few answers may begin with the question
    REPEATED: ("a completion that begins with its prompt", "If prompts are part of the completions, remove them.", 0.1),
    # A few answers may be in quotes
    ESCAPED: (
        r"a completion in quotes, or with \n in the place of line breaks",
        "They look like the output of json.dumps or repr. If they are, write the texts themselves.",
        0.5,
    ),
    SPECIAL: (
        "a special token, such as EOS or an end-of-turn token, in the text of a message",
        "The tokenizer reads it as the token itself. Remove it from the text, or set "
        "tokenizer.split_special_tokens=True.",
        0.0,
    ),
    NO_TOOLS: (
        "tools that the chat template leaves out",
        "The model does not see them. Set a tokenizer.chat_template that renders tools, or remove the column tools.",
        0.0,
    ),
    UNUSED: (
        "tools or chat_template_kwargs that are ignored, because the rows are plain text",
        "The model does not see them. Set chat=True (--chat true) to convert the text to messages, or remove the "
        "columns.",
        0.0,
    ),
}
# Columns that exist only while rows are prepared
PASSING = ("left_out", "cut", "invalid", "unended", "odd")


def packed(error: InvalidRow | None) -> str | None:
    """An error as text, to be stored in a column of its row.

    Example:
        >>> error = InvalidRow("is None; set it.", "label is missing", "label").at(3, "train", "chosen")
        >>> str(unpacked(packed(error)))
        'Row 3 (chosen) of the train dataset: label is None; set it.'
    """
    return None if error is None else json.dumps(vars(error))


def unpacked(text: str) -> InvalidRow:
    """The error that `packed` converted to text."""
    return InvalidRow.from_parts(json.loads(text))


def kept_of(
    encoded: Mapping[str, list],
    name: str,
    invalid_rows: str,
    numbers: Sequence[int | str],
    place: Callable[[int | str], str | None] = lambda row: None,
) -> dict[str, list]:
    """A batch of a stream without the rows to leave out. These rows are logged with their numbers.

    Args:
        encoded: the columns of prepared rows, with the columns `PASSING`.
        name: the name of the dataset.
        invalid_rows: "error" or "drop".
        numbers: the number of each row.
        place: returns the file and line of a row by its number.

    Raises:
        ValueError: if the batch has invalid rows and `invalid_rows` is "error". The message lists the rows.
    """
    invalid = [
        None if text is None else unpacked(text).at_origin(place(row))
        for row, text in zip(numbers, encoded["invalid"], strict=True)
    ]
    if invalid_rows == "error":
        refuse_invalid([error for error in invalid if error is not None], None, name)
    is_kept = []
    for row, reason, error, unended in zip(numbers, encoded["left_out"], invalid, encoded["unended"], strict=True):
        is_kept.append(reason is None and error is None)
        if error is not None:
            logger.warning(
                f"Left out row {row} of the {name} dataset because it is invalid. {list_invalid([error], 1, name)}"
            )
        elif reason is not None:
            logger.warning(f"Left out row {row} of the {name} dataset because {reason}.")
        elif unended:
            logger.warning_once(
                f"{UNENDED.format('answers')} (This warning is shown once; it may apply to other rows of the {name} "
                "dataset.)"
            )
    for kind, (what, remedy, share) in _ODD.items():
        odd = sum(kept and kind in (each or "") for kept, each in zip(is_kept, encoded["odd"], strict=True))
        if odd and odd >= share * sum(is_kept):
            logger.warning_once(f"The {name} dataset, a stream, has rows with {what}. {remedy} (This is logged once.)")
    return {
        column: [value for value, kept in zip(values, is_kept, strict=True) if kept]
        for column, values in encoded.items()
        if column not in PASSING
    }


# So many lines of invalid rows of a kind are all named
_FEW = 10

UNENDED = (
    "The chat template ends {} without a special token, such as EOS or an end-of-turn token, so the model would not "
    "learn to stop. Change tokenizer.chat_template so that assistant turns end with one."
)


def reasons_in_words(counts: Counter[str], unit: str = "row", errors: Sequence[InvalidRow] = ()) -> str:
    """How many rows were left out for which reason.

    Args:
        counts: reason → number of rows.
        unit: what is counted.
        errors: of invalid rows, which are counted by kind, with their lines, or with the first row of each kind if it
            is not from a file.

    Example:
        >>> reasons_in_words(Counter({"it is invalid": 3, "its answer is empty": 1}))
        'Reasons: it is invalid (3 rows); its answer is empty (1 row).'
        >>> error = InvalidRow("is None; set it.", "label is missing", "label")
        >>> reasons_in_words(Counter(), errors=[error.at(3, "train"), error.at(5, "train")])
        'Reason: label is missing (2 rows, such as row 3).'
    """
    counts = counts + Counter(error.kind for error in errors)
    which = {
        kind: _listed(each) or f", such as {each[0].origin or f'row {each[0].row}'}"
        for kind, each in _by_kind(errors).items()
    }
    found = [
        f"{reason} ({count:,} {unit}{'' if count == 1 else 's'}{which.get(reason, '')})"
        for reason, count in counts.most_common()
    ]
    return f"Reason{'' if len(found) == 1 else 's'}: {'; '.join(found)}."


def _by_kind(errors: Sequence[InvalidRow]) -> dict[str, list[InvalidRow]]:
    found: dict[str, list[InvalidRow]] = {}
    for error in errors:
        found.setdefault(error.kind, []).append(error)
    return found


def _listed(errors: Sequence[InvalidRow]) -> str:
    """All rows of errors of one kind. "" if they are many, or several that are not all from files."""
    if len(errors) == 1:
        return f": {errors[0].origin or f'row {errors[0].row}'}"
    return places(errors) if len(errors) <= _FEW else ""


def in_short(errors: Sequence[InvalidRow], command: str, counts: Counter[str] | None = None) -> str:
    """How many rows were left out for which reason, and, unless all invalid rows are named, how a command lists them.

    Args:
        errors: of invalid rows.
        counts: of the other rows that were left out, see `reasons_in_words`.
    """
    said = reasons_in_words(counts or Counter(), errors=errors)
    if all(map(_listed, _by_kind(errors).values())):
        return said
    return f"{said} `{command}` lists all invalid rows with --invalid_rows error."


def check_stream_has_rows(stream: IterableDataset, name: str) -> None:
    """Raise ValueError if all rows of a stream were left out."""
    if next(iter(stream), None) is None:
        raise ValueError(f"All rows of the {name} dataset were left out. The logged warnings give the reason per row.")


def kept_rows(
    encoded: Dataset,
    name: str,
    label_type: str | None,
    invalid_rows: str = "error",
    unreadable: Sequence[InvalidRow] = (),
    raw: Dataset | None = None,
) -> Dataset:
    """The rows that are valid for training.

    Logs which rows were left out or truncated, and, if `label_type` is given, whether labels have only one class. The
    numbers of rows that were left out are stored with the rows, see `trl_ulma.rows.notes`.

    Args:
        encoded: prepared rows with the columns `PASSING`.
        invalid_rows: "error", or "drop", which is an error if most labels look like ratings but are read as binary.
        unreadable: errors of rows that could not be read and are not in `encoded`.
        raw: the raw rows, whose files and lines are shown for invalid rows.

    Raises:
        ValueError: if rows are invalid and `invalid_rows` is "error" (the message lists them), if no row is left, or
            if all weights are 0.
    """
    columns = encoded.select_columns(["row", *PASSING])[:]  # all at once: each column would cost a copy of the features
    reasons, invalid = columns["left_out"], columns["invalid"]
    rows_of = zip(columns["row"], invalid, strict=True)
    errors = located([(row, unpacked(text)) for row, text in rows_of if text is not None], raw)
    errors = [*unreadable, *errors]
    total = len(reasons) + len(unreadable)
    is_kept = [reason is None and text is None for reason, text in zip(reasons, invalid, strict=True)]
    are_ratings = look_like_ratings(errors, total)
    kinds = Counter(error.kind for error in errors)
    if invalid_rows == "error" or are_ratings:
        try:
            refuse_invalid(errors, total, name)
        except InvalidRows as problem:
            collected = COLLECTED.get()
            if collected is None or are_ratings or not any(is_kept):
                raise
            collected.append(problem)
            errors = []
    counts = Counter(r for r, text in zip(reasons, invalid, strict=True) if r is not None and text is None)
    if errors:
        counts[INVALID] = len(errors)
    why = reasons_in_words(counts)
    listed = "\n" + list_invalid(errors, total, name) if errors else ""
    if not any(is_kept):
        raise ValueError(
            f"All {total} rows of the {name} dataset were left out. {why} "
            + ("Raise max_length." if PROMPT_FILLS in counts else "Check the rows.")
            + listed
        )
    if counts:
        left_out = sum(counts.values())
        if errors and (command := SHOWN_BY.get()) is not None:
            del counts[INVALID]
            why, listed = in_short(errors, command, counts), ""
        logger.warning(f"Left out {left_out} of {total} rows of the {name} dataset. {why}{listed}")
    if not all(is_kept):
        encoded = encoded.select([i for i, kept in enumerate(is_kept) if kept])
        columns = {name: list(compress(values, is_kept)) for name, values in columns.items()}
    cut = sum(columns["cut"])
    if cut:
        logger.warning(f"Truncated {cut} of {len(encoded)} rows of the {name} dataset to max_length.")
    unended = sum(columns["unended"])
    if unended:
        logger.warning(UNENDED.format(f"{unended} of {len(encoded)} answers of the {name} dataset"))
    for kind, (what, remedy, share) in _ODD.items():
        odd = [row for row, each in zip(columns["row"], columns["odd"], strict=True) if kind in (each or "")]
        if odd and len(odd) >= share * len(encoded):
            are, unit = ("has", "row") if len(odd) == 1 else ("have", "rows")
            more = f", and {len(odd) - _NAMED:,} more" if len(odd) > _NAMED else ""
            logger.warning(
                f"{len(odd)} of {len(encoded)} rows of the {name} dataset {are} {what}: {unit} "
                f"{with_origins(odd[:_NAMED], raw)}{more}. {remedy}"
            )
    rows = encoded.remove_columns(list(PASSING))
    if "completion_mask" in rows.column_names and rows.data["completion_mask"].null_count == len(rows.data):
        rows = rows.remove_columns("completion_mask")
    if "weight" in rows.column_names and not any(rows["weight"][:]):
        raise ValueError(
            f"Every row of the {name} dataset has weight 0, so the loss of every row would be 0. Remove the column "
            "weight, or set some weights above 0."
        )
    counts.pop(INVALID, None)
    note(rows, left_out={**counts, **{f"invalid: {kind}": count for kind, count in kinds.items()}})
    if label_type is None:
        return rows
    label = np.asarray(rows["label"][:])
    alike = one_class(label, is_continuous(rows, label_type))
    if alike:
        logger.warning(
            f"The {name} dataset has only one class: {alike}. This is correct for SFT or unlearning. Comparing answers "
            "requires good and bad ones."
        )
    return rows
