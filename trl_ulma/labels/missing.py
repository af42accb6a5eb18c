"""Words of spreadsheets and programs for a label that is not there."""

from collections.abc import Collection, Sequence
from typing import Any

_WORDS = frozenset(
    (
        "", "na", "n/a", "n.a.", "#n/a", "nan", "<na>", "nat", "null", "nil", "none", "undefined", "missing", "\\n",
        "-", "--", "\N{EN DASH}", "\N{EM DASH}", ".", "?",
    )
)  # fmt: skip


def is_missing(label: Any, others: Collection[Any] = ()) -> bool:
    """Whether a label is a text for a missing value. `-` beside `+` is a label.

    Args:
        label: the label.
        others: other labels.

    Example:
        >>> is_missing("N/A"), is_missing("good"), is_missing("-"), is_missing("-", ["+"]), is_missing(None)
        (True, False, True, False, False)
    """
    if not isinstance(label, str):
        return False
    word = label.strip().lower()
    return word in _WORDS and not (word == "-" and "+" in others)


def are_missing(labels: Sequence[Any]) -> list[bool]:
    """`is_missing` of each label, with all of them as the others.

    Example:
        >>> are_missing([4, "NA", "good", "-"]), are_missing(["+", "-"])
        ([False, True, False, True], [False, False])
    """
    others = ["+"] if "+" in labels else []
    return [is_missing(label, others) for label in labels]
