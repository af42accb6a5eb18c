"""Stores rows in Arrow tables with types that fit all rows, without casting values."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, Json, List, Value, config
from datasets.features.features import generate_from_arrow_type
from filelock import FileLock

from trl_ulma.data.columns import BOOLS, NUMBERS, TEXTS

# A kind describes how values of a column are stored: a word such as "string", ("list", kind), ("object", {key: kind}),
# or an Arrow type that JSON lacks. "int" is exact as a float, "long" is not. "json" is any value, stored as JSON.
Kind = Any
_EXACT = 2**53
_INT64 = 2**63
_LONG_NUMBER = re.compile(r"\d{19}")
# An object with more keys than this is stored as a dictionary instead of a table, and so is what is nested deeper
_MOST_KEYS = 100
_DEEPEST = 50
_BATCH = 1000
ROUNDED = "values of several kinds are stored as JSON, which rounds some numbers and lacks NaN"

Rows = Callable[[], Iterable[dict[str, Any]]]


def kind_of(value: Any, depth: int = 0) -> Kind:
    """The kind of one value, which is in this number of lists and objects.

    Raises:
        ValueError: if a text is not valid Unicode.

    Example:
        >>> kind_of([{"role": "user", "turn": 1}, {"role": "user", "turn": 0.5}])
        ('list', ('object', {'role': 'string', 'turn': 'float'}))
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, str):
        if not value.isascii():
            _check_unicode(value)
        return "string"
    if isinstance(value, int):
        return "int" if abs(value) <= _EXACT else "long" if -_INT64 <= value < _INT64 else "json"
    if isinstance(value, float):
        return "float"
    if depth > _DEEPEST and isinstance(value, Mapping | list | tuple):
        return "json"
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            return "json"
        return ("object", {key: kind_of(each, depth + 1) for key, each in value.items()})
    if isinstance(value, list | tuple):
        kind = "null"
        for each in value:
            kind = joined(kind, kind_of(each, depth + 1))
        return ("list", kind)
    return pa.scalar(value).type


def joined(one: Kind, other: Kind, *, is_number: bool = False) -> Kind:
    """The kind of a column that has values of both kinds.

    Args:
        one: a kind.
        other: another.
        is_number: whether bools count as numbers in this column.

    Example:
        >>> joined("int", "float"), joined("int", "string"), joined("bool", "float", is_number=True)
        ('float', 'json', 'float')
    """
    if one == other or other == "null":
        return one
    if one == "null":
        return other
    kinds = [one, other]
    if is_number and "bool" in kinds:
        kinds = ["int" if kind == "bool" else kind for kind in kinds]
        if kinds[0] == kinds[1]:
            return "int"
    if not any(isinstance(kind, tuple) for kind in kinds):
        if set(kinds) == {"int", "float"}:
            return "float"
        return "long" if set(kinds) == {"int", "long"} else "json"
    if not all(isinstance(kind, tuple) for kind in kinds) or one[0] != other[0]:
        return "json"
    if one[0] == "list":
        return ("list", joined(one[1], other[1]))
    keys = one[1] | {key: joined(one[1].get(key, "null"), kind) for key, kind in other[1].items()}
    return ("object", keys) if len(keys) <= _MOST_KEYS else "json"


def feature_of(kind: Kind) -> Any:
    """The feature of a column of this kind.

    Example:
        >>> feature_of(("list", "int"))
        List(Value('int64'))
    """
    if isinstance(kind, tuple):
        if kind[0] == "list":
            return List(feature_of(kind[1]))
        return {key: feature_of(each) for key, each in kind[1].items()} or Json()
    if isinstance(kind, pa.DataType):
        return generate_from_arrow_type(kind)
    names = {"bool": "bool", "int": "int64", "long": "int64", "float": "float64", "string": "string", "null": "null"}
    return Json() if kind == "json" else Value({**names, "text": "string"}[kind])


def _flattened(kind: Kind) -> Kind:
    """The kind of a column. It is "json" if any part of it is."""
    if isinstance(kind, tuple):
        parts = [kind[1]] if kind[0] == "list" else kind[1].values()
        if kind == ("object", {}) or any(_flattened(part) == "json" for part in parts):
            return "json"
    return kind


def is_kept_by_json(value: Any) -> bool:
    """Whether `Json` keeps a value unchanged. (It rounds some numbers.)"""
    try:
        written = json.dumps(value)
        return json.dumps(Json().decode_example(written)) == written
    except (RecursionError, TypeError, ValueError):
        return False


def typed(rows: Rows, place: Callable[[int], str], warn: Callable[[str], None]) -> dict[str, Kind]:
    """The kind of each column, determined from all rows.

    Args:
        rows: returns the rows each time it is called. A `ValueError` in it is not caught.
        place: returns the file and line of a row by its number, for messages.
        warn: called with a message about values that cannot be kept unchanged.
    """
    kinds: dict[str, Kind] = {}
    for number, row in enumerate(rows()):
        for column, value in row.items():
            before = kinds.get(column)
            try:
                found = kind_of(value)
            except (ValueError, pa.ArrowException, RecursionError) as error:
                raise ValueError(f"{place(number)}: {column} {error}.") from error
            if found != before:
                kinds[column] = found if before is None else joined(before, found, is_number=column in NUMBERS)
    kinds = {column: _flattened(kind) for column, kind in kinds.items()}
    unsure = [column for column, kind in kinds.items() if kind == "json"]
    for row in rows() if unsure else ():
        for column in [each for each in unsure if not is_kept_by_json(row.get(each))]:
            unsure.remove(column)
            if column in (*TEXTS, *NUMBERS, *BOOLS):  # JSON text would be taken for what it is the text of
                warn(f"{column}: {ROUNDED}")
            else:
                kinds[column] = "text"
                warn(f"{column}: values of several kinds are stored as JSON text")
    return kinds


def _as_json(value: Any) -> str:
    """A value as JSON that `Json` reads. What JSON lacks becomes an object with the name of its type, and no text."""
    text = json.dumps(value, ensure_ascii=False, default=lambda each: {type(each).__name__: str(each)})
    if not _LONG_NUMBER.search(text):
        return text
    return json.dumps(json.loads(text, parse_int=_in_64_bits), ensure_ascii=False)


def mixed(values: Sequence[Any]) -> list[str | None]:
    """Values of several kinds as a column of the feature `Json` stores them.

    Example:
        >>> mixed([4, "n/a", None])
        ['4', '"n/a"', None]
    """
    return [None if value is None else _as_json(value) for value in values]


def _in_64_bits(digits: str) -> int | float:
    return int(digits) if -_INT64 <= int(digits) < 2 * _INT64 else float(digits)


def _array(values: list[Any], kind: Kind, type_: pa.DataType, is_number: bool) -> pa.Array:
    if kind == "json":
        return pa.ExtensionArray.from_storage(type_, pa.array(mixed(values), type_.storage_type))
    if kind == "text":
        values = [
            v if v is None or isinstance(v, str) else json.dumps(v, ensure_ascii=False, default=str) for v in values
        ]
    elif is_number and kind in ("int", "long", "float"):
        number = float if kind == "float" else int
        values = [None if value is None else number(value) for value in values]
    return pa.array(values, type_)


def _batches(rows: Iterable[dict[str, Any]], kinds: Mapping[str, Kind], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    stream = iter(rows)
    while batch := list(islice(stream, _BATCH)):
        arrays = [
            _array([row.get(name) for row in batch], kinds[name], schema.field(name).type, name in NUMBERS)
            for name in schema.names
        ]
        yield pa.RecordBatch.from_arrays(arrays, schema=schema)


def as_dataset(rows: Rows, place: Callable[[int], str], key: Any, warn: Callable[[str], None]) -> Dataset:
    """Rows as a dataset in a cache file. The file is written in batches, and reused as long as `key` is the same.

    Args:
        rows: returns the rows each time it is called.
        place: returns the file and line of a row by its number, for messages.
        key: everything that the rows depend on. It must be convertible to JSON.
        warn: called with a message about values that cannot be kept unchanged.

    Raises:
        ValueError: if a row cannot be stored.
    """
    kinds = typed(rows, place, warn)
    features = Features({column: feature_of(kind) for column, kind in kinds.items()})
    digest = hashlib.sha256(json.dumps([key, str(features)], sort_keys=True, default=str).encode()).hexdigest()[:32]
    folder = Path(config.HF_DATASETS_CACHE) / "trl_ulma"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{digest}.arrow"
    with FileLock(f"{file}.lock"):
        if not file.exists():
            part = file.with_suffix(f".{os.getpid()}.part")
            try:
                schema = features.arrow_schema
                with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
                    for batch in _batches(rows(), kinds, schema):
                        writer.write_batch(batch)
                part.replace(file)
            except RecursionError as error:
                raise ValueError(f"{place(0)} or below: a value is nested too deeply. Remove it.") from error
            finally:
                part.unlink(missing_ok=True)
    return Dataset.from_file(str(file))


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"has half of a surrogate pair (\\u{ord(text[error.start]):04x}), which is not a character"
        ) from error
