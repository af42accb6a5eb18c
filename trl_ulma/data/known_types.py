"""Renames and converts the columns of datasets whose types are known: from the Hub, `save_to_disk` and Parquet."""

# pyarrow makes its functions when it is imported
# pyright: reportAttributeAccessIssue=false

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict, Value

from trl_ulma.data.columns import (
    BOOLS,
    MISSING,
    NUMBERS,
    ODD_TEXT,
    TEXTS,
    Shown,
    Truths,
    class_labels,
    class_of,
    read_value,
    say,
    say_once,
)
from trl_ulma.data.names import Names, read_row, unknown_label, unknown_labels
from trl_ulma.data.tables import ROUNDED, feature_of, is_kept_by_json, joined, kind_of, mixed
from trl_ulma.data.unread import UNREAD


def renamed_splits(splits: Any, names: Names, where: str, invalid_rows: str) -> DatasetDict | IterableDatasetDict:
    """Splits with the columns that trainers read, see `renamed`."""
    made: Any = {str(split): renamed(rows, names, where, invalid_rows) for split, rows in splits.items()}
    is_stream = any(isinstance(rows, IterableDataset) for rows in made.values())
    return IterableDatasetDict(made) if is_stream else DatasetDict(made)


Rows = TypeVar("Rows", bound=Dataset | IterableDataset)


def without_classes(rows: Rows, names: Names, where: str) -> Rows:
    """A dataset or stream with the names of classes in place of their numbers, or of labels what the names mean.

    A label stays a name if `label_map` gives the names their numbers.

    Example:
        >>> from datasets import Features
        >>> features = Features({"label": ClassLabel(names=["5", "1"]), "who": ClassLabel(names=["Ann", "Tom"])})
        >>> rows = Dataset.from_dict({"label": [0, 1], "who": [1, -1]}, features=features)
        >>> without_classes(rows, Names(), "the dataset")[:]
        {'label': [5.0, 1.0], 'who': ['Tom', None]}
    """
    made: Any = rows
    for name, feature in (getattr(rows, "features", None) or {}).items():
        if not isinstance(feature, ClassLabel):
            continue
        is_label = name == names.columns.get("label", "label") and not names.label_map
        try:
            classes = class_labels(feature.names) if is_label else feature.names
        except ValueError as error:
            raise ValueError(f"{where} {error}") from error
        kind = Value("float64" if is_label else "string")
        if isinstance(made, IterableDataset):
            features: Any = Features({**(made.features or {}), name: kind})
            made = made.map(partial(_name_class, name=name, classes=classes), features=features)
        else:
            values: Any = [class_of(number, classes) for number in made.with_format(None)[name][:]]
            columns = made.column_names
            made = made.remove_columns(name).add_column(name, values, feature=kind).select_columns(columns)
    return made


def _name_class(row: dict[str, Any], name: str, classes: Sequence[Any]) -> dict[str, Any]:
    return {name: class_of(row[name], classes)}


class _Read:
    """Converts a row of a stream to the form that trainers read."""

    def __init__(self, names: Names, where: str):
        self.names, self.where = names, where
        self.truths = Truths(names.columns.get("label", "label"))

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        unknown: Counter[str] = Counter()
        row = read_row(row, self.names, unknown, lambda what, _="": say_once(what, self.where), delimiter=None)
        problem = unknown_labels(unknown, self.names.label_map, self.where)
        if problem:
            raise ValueError(problem)
        self.truths.add(row)
        for what in self.truths.found:
            say_once(what, self.where)
        return row


def renamed(rows: Dataset | IterableDataset, names: Names, where: str, invalid_rows: str) -> Dataset | IterableDataset:
    """Rows with the column names that trainers read, and with numbers that are stored as text converted to numbers.

    A label that `label_map` lacks raises an error, or is treated as in `trl_ulma.data.files.load_rows`. In a stream, it
    always raises an error.
    """
    if isinstance(rows, IterableDataset):
        first = next(iter(rows.take(1)), {})
        if alike := _check_names(names, list(first), where):
            rows = rows.rename_columns(alike)
            first = {alike.get(name, name): value for name, value in first.items()}
        rows = without_classes(rows, names, where)
        known = rows.features or {}
        read = _Read(names, where)
        odd = [name for name in (*NUMBERS, *BOOLS) if name in first and not _is_as_read(name, known.get(name))]
        if not (names.columns or names.label_map or odd):
            texts = [name for name in TEXTS if isinstance(first.get(name), str) or _is_text(known.get(name))]
            look = partial(_look, names=texts, where=where)
            return rows.map(look, input_columns=texts, features=rows.features) if texts else rows
        return rows.map(read, remove_columns=[name for name in names.columns.values() if name in first])
    if alike := _check_names(names, rows.column_names, where):
        rows = rows.rename_columns(alike)
    rows = without_classes(rows, names, where)
    found: Counter[str] = Counter()
    if names.columns:
        taken = {*names.columns, *names.columns.values()}
        kept = [name for name in rows.column_names if name not in taken]
        for ours, theirs in names.columns.items():
            if ours in rows.column_names and ours not in names.columns.values():
                found[f"{ours}: the column of this name is ignored, because {theirs} is read as {ours}"] = 1
        there = {ours: theirs for ours, theirs in names.columns.items() if theirs in rows.column_names}
        rows = rows.select_columns([*there.values(), *kept])
        rows = rows.rename_columns({theirs: ours for ours, theirs in there.items() if ours != theirs})
    found |= _odd_texts(rows, names)
    shown = Shown()
    unknown: Counter[str] = Counter()
    marks: list[str | None] = [None] * len(rows)
    for name in [name for name in (*NUMBERS, *BOOLS) if name in rows.column_names]:
        feature = rows.features[name]
        is_mapped = name == "label" and bool(names.label_map)
        if _is_as_read(name, feature) and not is_mapped:
            continue
        values = rows.with_format(None)[name][:]
        if is_mapped:
            for row, value in enumerate(values):
                own: Counter[str] = Counter()
                values[row] = names.label(value, own)
                unknown.update(own)
                if own and invalid_rows != "error":
                    values[row], marks[row] = None, unknown_label(next(iter(own))).message
        noticed: Counter[str] = Counter()
        theirs = names.columns.get(name, name)
        for row, value in enumerate(values):

            def notice(what: str, value: str | None = None, row: int = row, noticed: Counter[str] = noticed) -> None:
                noticed[what] += 1
                if value is not None:
                    shown.add(what, value, f"row {row}")

            is_missing = name in BOOLS and value != value  # NaN
            values[row] = None if is_missing else read_value(name, value, notice, theirs=theirs)
        kind: Any = "null"
        for value in values:
            kind = joined(kind, kind_of(value), is_number=name in NUMBERS)
        is_mixed = kind == "json" and not all(isinstance(value, str | None) for value in values)
        if not is_mixed and kind not in ("bool", "int", "long", "float"):
            continue  # trainers raise an error that names the row
        found |= noticed
        if name == "label":
            truths = Truths(theirs)
            types = rows["label_type"] if "label_type" in rows.column_names else [None] * len(rows)
            for value, label_type in zip(values, types, strict=True):
                truths.add({"label": value, "label_type": label_type})
            found |= truths.found
        if is_mixed:  # one value that cannot be read does not make the others unreadable
            if not all(map(is_kept_by_json, values)):
                found[f"{name}: {ROUNDED}"] = 1
            rows = rows.remove_columns(name).add_column(name, mixed(values), feature=feature_of(kind))
            continue
        values = [None if value is None else {"bool": bool, "float": float}.get(kind, int)(value) for value in values]
        dtype = {"bool": "bool", "float": "float64"}.get(kind, "int64")
        rows = rows.remove_columns(name).add_column(name, values, feature=Value(dtype))
    problem = unknown_labels(unknown, names.label_map, where)
    if problem and invalid_rows == "error":
        raise ValueError(problem)
    if problem and invalid_rows == "drop":
        rows = rows.select([row for row, mark in enumerate(marks) if mark is None])
        found[f"{problem} Rows with these labels are left out"] = 1
    elif problem:
        rows = rows.add_column(UNREAD, marks, feature=Value("string"))  # type: ignore[call-arg]
    say(found, where, shown)
    return rows


def _look(*texts: Any, names: list[str], where: str) -> dict[str, Any]:
    """Log findings about the texts of a row of a stream, each once. Nothing is changed."""
    for name, text in zip(names, texts, strict=True):
        read_value(name, text, lambda what, _="": say_once(what, where))
    return {}


def _odd_texts(rows: Dataset, names: Names) -> Counter[str]:
    """Findings about texts, as of those in CSV and JSON files, and their numbers."""
    found: Counter[str] = Counter()
    for name in TEXTS:
        if not _is_text(rows.features.get(name)):
            continue
        table: Any = rows.select_columns([name]).with_format("arrow")[:]
        texts = table.column(name)
        odd = pc.or_(pc.match_substring_regex(texts, ODD_TEXT), pc.is_in(texts, pa.array(list(MISSING), texts.type)))
        for text in texts.filter(odd).to_pylist():
            read_value(name, text, lambda what, _="": found.update([what]), theirs=names.columns.get(name))
    return found


def _is_text(feature: Any) -> bool:
    return getattr(feature, "dtype", "") in ("string", "large_string")


def _check_names(names: Names, there: list[str], where: str) -> dict[str, str]:
    try:
        return names.check(there)
    except ValueError as error:
        raise ValueError(f"{where} {error}") from error


def _is_as_read(name: str, feature: Any) -> bool:
    dtype = getattr(feature, "dtype", "")
    return dtype.startswith("bool") or (name not in BOOLS and dtype.startswith(("int", "uint", "float")))
