"""Detects which families a dataset can belong to."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from datasets import IterableDataset

from trl_ulma.data.adapters import FAMILIES, find
from trl_ulma.data.convert import convert

_ROWS = 100


@dataclass(frozen=True)
class Detected:
    """A family that can read the first rows of a dataset.

    Attributes:
        family: the name of the family.
        kept: the number of answers that become rows.
        answers: the number of answers in the first rows.
        rows: the number of rows that were tried.
        problem: why none of the answers can be used without further options, or "".
    """

    family: str
    kept: int
    answers: int
    rows: int
    problem: str = ""


def detected(rows: Iterable[Mapping[str, Any]]) -> list[Detected]:
    """The families that can read the first rows. Families that use more of their answers come first.

    If none can, these are the families with these columns, and why they cannot read the rows.

    Example:
        >>> [each.family for each in detected([{"prompt": "Hi", "response": "Hello!", "is_safe": True}])]
        ['beavertails']
    """
    first = list(islice(iter(rows), _ROWS))
    found, failed = [], []
    for family in FAMILIES:
        if not first or not find(family).reads(list(first[0])):
            continue
        try:
            _, account = convert(family, IterableDataset.from_generator(lambda: iter(first)))
        except (KeyError, TypeError, ValueError) as error:  # the columns match, but the values do not
            if isinstance(error, ValueError):
                failed.append(Detected(family, 0, 0, len(first), str(error)))
            continue
        found.append(Detected(family, account.rows_out, account.answers, account.rows_in))
    return sorted(found, key=lambda each: -each.kept / each.answers) or failed
