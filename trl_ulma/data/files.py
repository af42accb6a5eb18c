"""Loads datasets by name: from a file, a folder or the Hub."""

from collections.abc import Iterable, Mapping
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from trl_ulma.data.columns import Truths
from trl_ulma.data.file_rows import ACCEPTED, KINDS, OTHER_FILES, UNREAD_LINES, looks_local, missing, suffix_of
from trl_ulma.data.folders import load_folder
from trl_ulma.data.hub import load_hub
from trl_ulma.data.names import Names
from trl_ulma.data.read_files import as_splits, read_files
from trl_ulma.data.readable import check_readable
from trl_ulma.data.splits import split_by_prompt

__all__ = ["check_splits", "labels_of", "load_files", "load_rows", "split_by_prompt"]

# The rows of each split of a stream in which labels are compared with those of the other splits before training
_FIRST_ROWS = 1000


def load_rows(
    name: str | PathLike,
    *,
    config: str | None = None,
    streaming: bool = False,
    columns: str | Mapping[str, str] | None = None,
    label_map: str | Mapping[Any, float] | None = None,
    invalid_rows: str = "error",
    needs_label: bool = True,
) -> DatasetDict | IterableDatasetDict:
    """Load the splits of a dataset. A file has one split, "train".

    Values are read as they are stored. `prompt`, `completion`, `chosen` and `rejected` are text or messages. `label`,
    `weight`, `log_z` and `trials` are numbers or bools. The type of a column fits all rows of a split, and does not
    only depend on the first rows. If a value is converted, such as the text "4" to a number, a warning is logged.

    Args:
        name: a `.jsonl[.gz]`, `.json[.gz]`, `.csv[.gz]`, `.tsv[.gz]` or `.parquet` file; a folder of such files, or one
            written by `save_to_disk`; or a name on the Hub, see `load_hub`. JSON can be an array or lines. The
            delimiter of CSV (comma, semicolon or tab) and its encoding (UTF-8, UTF-16 or cp1252) are detected.
        config: the configuration of a dataset with several configurations.
        streaming: whether to read rows only when they are needed. The first 1,000 rows are read immediately.
        columns: the names of the columns in the file, as a mapping or as `prompt=question,label=rating`.
        label_map: the numbers of the labels, as a mapping or as `up=1,down=0`.
        invalid_rows: what to do with lines that cannot be read, such as CSV lines with too many fields, and with rows
            whose label `label_map` lacks. "error" raises an error that lists them. "drop" leaves them out, with a
            warning that lists them. "mark" keeps them, with the error in the column `unread_line`, so that a trainer
            lists or drops them together with all other invalid rows.
        needs_label: whether the column that `columns` names for the label must exist.

    Raises:
        FileNotFoundError: if there is no such dataset.
        ValueError: if a file cannot be read or contains no rows, if `columns` names a column that does not exist, or
            if `label_map` lacks a label. The message names the file and the line.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile("w", suffix=".csv") as file:
        ...     _ = file.write("question,answer,thumb\\nWhat is 2 + 2?,4,up\\n"), file.flush()
        ...     names = {"prompt": "question", "completion": "answer", "label": "thumb"}
        ...     rows = load_rows(file.name, columns=names, label_map={"up": 1, "down": 0})
        >>> rows["train"][0]
        {'prompt': 'What is 2 + 2?', 'completion': '4', 'label': 1}
    """
    names = Names.of(columns, label_map, needs_label=needs_label)
    _check_choice(invalid_rows)
    path = Path(name).expanduser()
    if path.is_dir():
        return load_folder(path, config, streaming, names, invalid_rows)
    if path.exists():
        if config is not None:
            raise ValueError(f"{path} is a file, so it has no configurations. Remove the configuration {config!r}.")
        _check_files([path])
        rows = read_files([path], streaming, names, invalid_rows)
        return as_splits({"train": rows}, streaming)
    if looks_local(str(name)):
        raise FileNotFoundError(missing(path))
    return load_hub(
        str(name),
        config=config,
        streaming=streaming,
        columns=columns,
        label_map=label_map,
        invalid_rows=invalid_rows,
        needs_label=needs_label,
    )


def load_files(
    files: list[Path],
    *,
    streaming: bool = False,
    columns: str | Mapping[str, str] | None = None,
    label_map: str | Mapping[Any, float] | None = None,
    invalid_rows: str = "error",
) -> Dataset | IterableDataset:
    """Load the rows of files as one split. For the arguments, see `load_rows`."""
    names = Names.of(columns, label_map)
    _check_choice(invalid_rows)
    _check_files(files)
    return read_files(files, streaming, names, invalid_rows)


def _check_choice(invalid_rows: str) -> None:
    if invalid_rows not in UNREAD_LINES:
        raise ValueError(f"invalid_rows must be one of {UNREAD_LINES}; got {invalid_rows!r}.")


def _check_files(files: list[Path]) -> None:
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(missing(file))
        if suffix_of(file) not in KINDS:
            remedy = OTHER_FILES.get(suffix_of(file), "")
            raise ValueError(
                f"{file} ends in {suffix_of(file) or 'nothing'!r}; a data file must be {ACCEPTED}.{remedy}"
            )


def check_splits(
    splits: Mapping[str, Any],
    name: str,
    *,
    needs_label: bool = True,
    columns: str | Mapping[str, str] | None = None,
) -> list[str]:
    """Check that the first rows of each split are valid for training. Returns warnings.

    These are about ignored columns, and about splits whose labels are on different scales.

    Args:
        splits: the results of `load_rows`.
        name: the name of the dataset.
        needs_label, columns: as for `load_rows`.

    Raises:
        ValueError: see `trl_ulma.data.readable.check_readable`.
    """
    said: dict[str, None] = {}
    given = Names.of(columns, None).columns
    names = list(splits)
    for split, rows in splits.items():
        first = list(rows.take(20)) if isinstance(rows, IterableDataset) else rows.with_format(None)[:200]
        if isinstance(first, list):
            first = {
                column: [row.get(column) for row in first] for column in dict.fromkeys(c for r in first for c in r)
            }
        try:
            said |= dict.fromkeys(check_readable(first, name, needs_label=needs_label, given=given))
        except ValueError as error:
            if split == names[0]:
                raise
            raise ValueError(
                f"The split {split!r} differs from {names[0]!r}: {str(error).removesuffix('.')}. All splits need the "
                "same names of columns and the same labels."
            ) from error
    if len(splits) > 1:
        truths = Truths(given.get("label", "label"))
        for split, rows in splits.items():
            for row in labels_of(rows):
                truths.add(row, f"the split {split!r}")
        said |= dict.fromkeys(f"{name}: {what}." for what in truths.found | truths.sources)
    return list(said)


def labels_of(rows: Any) -> Iterable[Mapping[str, Any]]:
    """`label` and `label_type` of each row, as far as there are such columns; of a stream only of the first rows.

    Example:
        >>> list(labels_of(Dataset.from_dict({"prompt": ["Hi"], "label": [1]})))
        [{'label': 1}]
    """
    if not isinstance(rows, Dataset):
        return islice(rows, _FIRST_ROWS)
    there = [column for column in ("label", "label_type") if column in rows.column_names]
    columns = [rows.with_format(None)[column][:] for column in there]
    return [dict(zip(there, values, strict=True)) for values in zip(*columns, strict=True)]
