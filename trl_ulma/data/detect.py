"""Which families of data sets a data set may be of."""

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
    """A family that reads a data set's first rows.

    Attributes:
        family: its name.
        kept: how many of their answers become rows.
        answers: how many answers they have.
        rows: how many rows were tried.
    """

    family: str
    kept: int
    answers: int
    rows: int


def detected(rows: Iterable[Mapping[str, Any]]) -> list[Detected]:
    """The families that can read the first rows, those first that can use most of their answers.

    Example:
        >>> [each.family for each in detected([{"prompt": "Hi", "response": "Hello!", "is_safe": True}])]
        ['beavertails']
    """
    first = list(islice(iter(rows), _ROWS))
    found = []
    for family in FAMILIES:
        if not first or not find(family).reads(list(first[0])):
            continue
        try:
            _, account = convert(family, IterableDataset.from_generator(lambda: iter(first)))
        except (KeyError, TypeError, ValueError):
            continue  # which has such columns, and other values
        found.append(Detected(family, account.rows_out, account.answers, account.rows_in))
    return sorted(found, key=lambda each: -each.kept / each.answers)
