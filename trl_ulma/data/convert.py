"""From raw rows to a data set of point-wise rows, with an account of every answer."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Any

from datasets import Dataset, Features, IterableDataset, List, Value, concatenate_datasets

from trl_ulma.data.adapters import FAMILIES, Adapter, LeftOut, Noted, find, is_number
from trl_ulma.data.columns import proposed
from trl_ulma.data.tables import Kind, feature_of, joined, kind_of
from trl_ulma.labels import is_empty

_TURN = {"role": Value("string"), "content": Value("string")}
_MESSAGES = List(_TURN)
FEATURES = {
    "prompt": _MESSAGES,
    "completion": _MESSAGES,
    "label": Value("float64"),
    "sft_mask": Value("bool"),
    "label_type": Value("string"),
    "log_z": Value("float64"),
    "weight": Value("float64"),
}
SAME_SPEAKER = "two turns of one speaker in a row, which some chat templates refuse"
_CHUNK = 10_000


@dataclass
class Found:
    """How often something was found.

    Attributes:
        count: how often.
        first_row: the number of the first raw row that it was found in.
    """

    count: int
    first_row: int


@dataclass
class Account:
    """What became of the raw rows: `answers` is `rows_out` and all that was left out.

    Attributes:
        rows_in: raw rows.
        rows_out: point-wise rows.
        left_out: reason → how many answers.
        noted: what was found and left as it is → how often.
    """

    rows_in: int = 0
    rows_out: int = 0
    left_out: dict[str, Found] = field(default_factory=dict)
    noted: dict[str, Found] = field(default_factory=dict)

    @property
    def answers(self) -> int:
        """Answers in the raw rows."""
        return self.rows_out + sum(found.count for found in self.left_out.values())

    def add(self, to: dict[str, Found], what: str) -> None:
        """Count a finding in the raw row that is being read."""
        to.setdefault(what, Found(0, self.rows_in - 1)).count += 1


def convert(
    family: str, rows: Dataset | IterableDataset, *, alternating: bool = False, **options: Any
) -> tuple[Dataset, Account]:
    r"""The point-wise rows of a raw data set, in memory, and the account of what became of it.

    Columns are `prompt` and `completion` (messages), `label`, `sft_mask`, `label_type`, and for pairs `log_z` and
    `weight` where they have them: what every trainer here takes.

    Args:
        family: a name in `FAMILIES`.
        rows: raw rows, all at hand or streamed.
        alternating: leave out conversations in which one speaker has two turns in a row.
        options: the family's own; see its function.

    Raises:
        ValueError: where the columns are not this family's, or no row comes out.

    Example:
        >>> raw = Dataset.from_dict({"transcript": ["\n\nHuman: Harm!\n\nAssistant: No."], "rating": [3.0]})
        >>> converted, account = convert("red-team", raw)
        >>> converted["label"][0], account.rows_in, account.answers
        (-3.0, 1, 1)
    """
    adapter, account = find(family), Account()
    stream = iter(rows)
    first = next(stream, None)
    if first is None:
        raise ValueError("The data set holds no rows.")
    _check_columns(family, adapter, first)

    def counted() -> Iterator[Mapping[str, Any]]:
        for raw in chain([first], stream):
            account.rows_in += 1
            yield raw

    parts: list[Dataset] = []
    chunk: list[dict[str, Any]] = []
    keys: dict[str, Kind] = {}
    for outcome in adapter.read(counted(), **options):
        if isinstance(outcome, Noted):
            account.add(account.noted, outcome.what)
            continue
        if isinstance(outcome, LeftOut):
            account.add(account.left_out, outcome.why)
            continue
        why = _fault(outcome)
        if why is None and not _alternates(outcome):
            account.add(account.noted, SAME_SPEAKER)
            why = SAME_SPEAKER if alternating else None
        if why is not None:
            account.add(account.left_out, why)
            continue
        account.rows_out += 1
        for turn in (*outcome["prompt"], *outcome["completion"]):
            if isinstance(turn, dict) and len(turn) > len(_TURN):
                found = {key: kind_of(value) for key, value in turn.items() if key not in _TURN}
                keys |= {key: joined(keys.get(key, "null"), kind) for key, kind in found.items()}
        chunk.append(outcome)
        if len(chunk) == _CHUNK:
            parts.append(_dataset(chunk, keys))
            chunk = []
    if chunk:
        parts.append(_dataset(chunk, keys))
    if not parts:
        raise ValueError(
            f"No point-wise row came out of {account.rows_in:,} raw rows: {reasons(account)}. Is it {family} data?"
        )
    features = max((part.features for part in parts), key=lambda each: len(str(each)))
    if any(kind == "json" or part.features != features for part in parts for kind in keys.values()):
        # Keys of messages, or their types, that only a later row has
        parts = [_dataset(part.to_list(), keys) for part in parts]
    return concatenate_datasets(parts), account


def reasons(account: Account) -> str:
    """Why answers were left out, in a line.

    Example:
        >>> reasons(Account(3, 1, {"its answer is empty": Found(2, 1)}))
        '2 times its answer is empty (first in raw row 1)'
    """
    said = (
        f"{found.count:,} times {why} (first in raw row {found.first_row})" for why, found in account.left_out.items()
    )
    return "; ".join(said)


def _check_columns(family: str, adapter: Adapter, first: Mapping[str, Any]) -> None:
    columns = list(first)
    if adapter.reads(columns):
        return
    refused = [name for name in adapter.refuses if name in columns]
    needed = " or ".join(", ".join(layout) for layout in adapter.needs)
    fault = f"not {refused[0]}" if refused else f"the columns {needed}"
    others = [name for name in FAMILIES if name != family and find(name).reads(columns)]
    likely = proposed({name: [value] for name, value in first.items()})
    hint = f" It looks like {' or '.join(others)}." if others else ""
    if {"prompt", "completion", "label"} <= set(columns):
        hint = " These are point-wise rows already: train on them as they are."
    elif not refused and any(set(layout) <= {*likely, *columns} for layout in adapter.needs):
        hint = f" Perhaps you mean --columns {','.join(f'{ours}={theirs}' for ours, theirs in likely.items())}"
    raise ValueError(f"{family} data have {fault}; found {', '.join(columns)}.{hint}")


def _fault(row: Mapping[str, Any]) -> str | None:
    """Why a row can not be learned from."""
    for name, what in (("prompt", "prompt"), ("completion", "answer")):
        turns = row[name]
        if isinstance(turns, str):
            if not turns.strip():
                return f"its {what} is empty"
            continue
        if not isinstance(turns, list) or not all(isinstance(turn["content"], str) for turn in turns):
            return f"its {what} is not text"
        if is_empty(turns):
            return f"its {what} is empty"
    for name in ("label", "log_z", "weight"):
        if name in row and not (is_number(row[name]) and math.isfinite(row[name])):
            return f"its {name} is not a finite number"
    if not isinstance(row["sft_mask"], bool):
        return "its sft_mask is neither true nor false"
    return None


def _alternates(row: Mapping[str, Any]) -> bool:
    if isinstance(row["prompt"], str):
        return True
    return all(turn["role"] != after["role"] for turn, after in pairwise(row["prompt"] + row["completion"]))


def _dataset(rows: list[dict[str, Any]], keys: Mapping[str, Kind]) -> Dataset:
    """Rows as a dataset; `keys` are those that messages have besides role and content."""
    features = Features({name: FEATURES[name] for name in rows[0]})
    if isinstance(rows[0]["prompt"], str):
        features |= {"prompt": Value("string"), "completion": Value("string")}
    elif keys:
        mixed = [key for key, kind in keys.items() if kind == "json"]  # what is a number here and text there
        others = {key: Value("string") if key in mixed else feature_of(kind) for key, kind in keys.items()}
        features |= dict.fromkeys(("prompt", "completion"), List(_TURN | others))
        for turn in (turn for row in rows if mixed for name in ("prompt", "completion") for turn in row[name]):
            turn |= {key: str(turn[key]) for key in mixed if turn.get(key) is not None}
    return Dataset.from_list(rows, features=Features(features))
