"""Converts raw rows to a dataset of pointwise rows, and accounts for every answer."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Any

from datasets import Dataset, Features, IterableDataset, List, Value, concatenate_datasets

from trl_ulma.data.adapters import FAMILIES, OFF_SCALE, OUTSIDE, Adapter, LeftOut, Noted, find, is_number
from trl_ulma.data.columns import OTHERS
from trl_ulma.data.directions import direction
from trl_ulma.data.known_types import without_classes
from trl_ulma.data.names import Names
from trl_ulma.data.proposals import proposed, rating_of
from trl_ulma.data.readable import whole_file
from trl_ulma.data.tables import Kind, feature_of, joined, kind_of
from trl_ulma.data.unread import UNREAD
from trl_ulma.labels import are_ratings, is_empty

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
    "eos": Value("bool"),
}
SAME_SPEAKER = "two consecutive turns of the same speaker, which some chat templates do not support"
_CHUNK = 10_000
# Columns without which a row means something else
_MEANT = frozenset((*OTHERS, "weight", "log_z", "trials", "system", "system_prompt")) - {UNREAD}


@dataclass
class Found:
    """The number of times that something was found.

    Attributes:
        count: the number of times.
        first_row: the number of the first raw row with this finding.
    """

    count: int
    first_row: int


@dataclass
class Account:
    """An account of the conversion. `answers` is the sum of `rows_out` and all answers that were left out.

    Attributes:
        rows_in: the number of raw rows.
        rows_out: the number of pointwise rows.
        left_out: reason → number of answers.
        noted: finding that did not change a row → number of times.
    """

    rows_in: int = 0
    rows_out: int = 0
    left_out: dict[str, Found] = field(default_factory=dict)
    noted: dict[str, Found] = field(default_factory=dict)

    @property
    def answers(self) -> int:
        """The number of answers in the raw rows."""
        return self.rows_out + sum(found.count for found in self.left_out.values())

    def add(self, to: dict[str, Found], what: str) -> None:
        """Count a finding in the current raw row."""
        to.setdefault(what, Found(0, self.rows_in - 1)).count += 1


def convert(
    family: str, rows: Dataset | IterableDataset, *, alternating: bool = False, **options: Any
) -> tuple[Dataset, Account]:
    r"""The pointwise rows of a raw dataset, in memory, and an account of the conversion.

    The columns are `prompt` and `completion` (messages), `label`, `sft_mask`, `label_type`, for pairs that have them
    `log_z` and `weight`, and for steps (text) `eos`. Both trainers accept these rows.

    Args:
        family: a name in `FAMILIES`.
        rows: raw rows, as a dataset or a stream.
        alternating: whether to leave out conversations in which a speaker has two consecutive turns.
        options: the options of the family, see its function.

    Raises:
        ValueError: if the columns do not match the family, or if there is no valid row.

    Example:
        >>> raw = Dataset.from_dict({"transcript": ["\n\nHuman: Harm!\n\nAssistant: No."], "rating": [3.0]})
        >>> converted, account = convert("red-team", raw)
        >>> converted["label"][0], account.rows_in, account.answers
        (-3.0, 1, 1)
    """
    adapter, account = find(family), Account()
    if options.get("label_map"):
        options["label_map"] = dict(Names.of(None, options["label_map"]).label_map)
    stream = iter(without_classes(rows, Names(), "The dataset"))
    first = next(stream, None)
    if first is None:
        raise ValueError("The dataset contains no rows. Pass at least one row.")
    _check_columns(family, adapter, first, stream)
    unread = _unread_rating(adapter, first)
    lost = [name for name in adapter.unused(first) if name in _MEANT]

    def counted() -> Iterator[Mapping[str, Any]]:
        for raw in chain([first], stream):
            account.rows_in += 1
            if raw.get(UNREAD) is not None:
                account.add(account.left_out, "it cannot be read")
            else:
                if unread and raw.get(unread[0]) is not None:
                    account.add(account.noted, unread[1])
                for name in (each for each in lost if raw.get(each) not in (None, "", [], {})):
                    account.add(account.noted, f"its column `{name}` is not read, and is not in the rows")
                yield {name: value for name, value in raw.items() if name != UNREAD}

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
    outside = account.left_out[OUTSIDE].count if OUTSIDE in account.left_out else 0
    answers = account.rows_out + sum(each.count for each in account.left_out.values())
    if are_ratings(outside, answers):
        raise ValueError(
            f"{outside:,} of {answers:,} answers have labels outside [0, 1], as ratings have. If these were left out, "
            "the low ratings would stay, and count as likes. Set --label_type continuous. For thumbs of −1 and 1, set "
            "--label_map=-1=0,1=1."
        )
    for why, found in account.left_out.items():
        if why.startswith(OFF_SCALE) and are_ratings(found.count, answers):
            raise ValueError(
                f"{found.count:,} of {answers:,} answers are left out because {why} (first in raw row "
                f"{found.first_row}). They would be missing at one end of the scale. Convert the ratings to the scale "
                f"of {family} data."
            )
    if options.get("liked") and parts and all("binary" not in part.unique("label_type") for part in parts):
        raise ValueError(
            "liked is for answers with the binary label 1, but all labels are continuous, and their answers are no "
            "demonstrations. Remove liked (on the command line --liked)."
        )
    if not parts:
        raise ValueError(
            f"None of the {account.rows_in:,} raw rows could be converted: {reasons(account)}. Check that this is "
            f"{family} data."
        )
    features = max((part.features for part in parts), key=lambda each: len(str(each)))
    if any(kind == "json" or part.features != features for part in parts for kind in keys.values()):
        # Only later rows have some keys of messages, or their types
        parts = [_dataset(part.to_list(), keys) for part in parts]
    return concatenate_datasets(parts), account


def reasons(account: Account) -> str:
    """The reasons why answers were left out, in one line.

    Example:
        >>> reasons(Account(3, 1, {"its answer is empty": Found(2, 1)}))
        '2 times its answer is empty (first in raw row 1)'
    """
    said = (
        f"{found.count:,} times {why} (first in raw row {found.first_row})" for why, found in account.left_out.items()
    )
    return "; ".join(said)


def _unread_rating(adapter: Adapter, first: Mapping[str, Any]) -> tuple[str, str] | None:
    """The column that looks like a label although answers become demonstrations, and what to do about it."""
    if not adapter.rated or not {"label", "kto_tag", "chosen", "rejected"}.isdisjoint(first):
        return None
    name = rating_of({column: 0 if value is None else value for column, value in first.items()})
    if name is None:
        return None
    family = "kto" if adapter.rated == "messages" and "completion" in first else adapter.rated
    return name, (
        f"its column `{name}` looks like a rating and is not read, so the answer is a demonstration. To learn from it, "
        f"run trl-ulma prepare {family} with --columns label={name}, for ratings also with --label_type continuous."
        f"{direction(name)}"
    )


def _check_columns(family: str, adapter: Adapter, first: Mapping[str, Any], others: Iterator[Any]) -> None:
    columns = list(first)
    if adapter.reads(columns):
        return
    refused = [name for name in adapter.refuses if name in columns]
    needed = " or ".join(", ".join(layout) for layout in adapter.needs)
    fault = f"not have the column {refused[0]}" if refused else f"have the columns {needed}"
    looks = [name for name in FAMILIES if name != family and find(name).reads(columns)]
    likely = proposed({name: [value] for name, value in first.items()})
    hint = f" It looks like {' or '.join(looks)}." if looks else ""
    if {"prompt", "completion", "label"} <= set(columns):
        hint = " These are already pointwise rows. Train on them directly."
    elif not refused and any(set(layout) <= {*likely, *columns} for layout in adapter.needs):
        hint = f" Did you mean --columns {','.join(f'{ours}={theirs}' for ours, theirs in likely.items())}?"
        hint += direction(likely.get("label", ""))
    whole = whole_file({name: [value] for name, value in first.items()}) if next(others, None) is None else None
    if whole is not None and not hint:
        hint = f" It has only one row, {whole}"
    raise ValueError(f"{family} data must {fault}; found {', '.join(columns)}.{hint}")


def _fault(row: Mapping[str, Any]) -> str | None:
    """The reason why a row is not valid for training, or None."""
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
    """Rows as a dataset. `keys` are the keys of messages besides role and content."""
    features = Features({name: FEATURES[name] for name in rows[0]})
    if isinstance(rows[0]["prompt"], str):
        features |= {"prompt": Value("string"), "completion": Value("string")}
    elif keys:
        mixed = [key for key, kind in keys.items() if kind == "json"]  # a number in some rows and text in others
        others = {key: Value("string") if key in mixed else feature_of(kind) for key, kind in keys.items()}
        features |= dict.fromkeys(("prompt", "completion"), List(_TURN | others))
        for turn in (turn for row in rows if mixed for name in ("prompt", "completion") for turn in row[name]):
            turn |= {key: str(turn[key]) for key in mixed if turn.get(key) is not None}
    return Dataset.from_list(rows, features=Features(features))
