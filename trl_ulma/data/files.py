"""Loads datasets by name, from a file, a folder or the Hub, and splits them by prompt."""

import difflib
import glob
import hashlib
import json
import logging
import os
import re
import zlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import partial
from gzip import BadGzipFile
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    IterableDatasetDict,
    Value,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.data_files import DataFilesDict, get_data_patterns
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from datasets.packaged_modules.csv.csv import Csv
from datasets.packaged_modules.json.json import Json
from datasets.packaged_modules.parquet.parquet import Parquet
from huggingface_hub import snapshot_download

from trl_ulma.data.columns import BOOLS, CONVERSATIONS, NUMBERS, READ, Names, check_readable, read_value, unknown_labels
from trl_ulma.data.csv_rows import DELIMITERS, csv_rows
from trl_ulma.data.json_rows import json_rows
from trl_ulma.data.origins import Origins, note_places
from trl_ulma.data.pairs import pairs_to_rows
from trl_ulma.data.tables import as_dataset, joined, kind_of

_KINDS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "csv"}
_KINDS |= {f"{suffix}.gz": kind for suffix, kind in _KINDS.items()}
_KINDS[".parquet"] = "parquet"
ACCEPTED = ".jsonl[.gz], .json[.gz], .csv[.gz], .tsv[.gz] or .parquet"
# Files in a folder that can declare its data files
_NAME_FILES = ("README.md", ".huggingface.yaml")
# The `info.builder_name` of rows of CSV and TSV files (as in `datasets`), and of rows of which some are
TABLES, SOME_TABLES = "csv", "csv and others"
# The number of rows of a stream that are read immediately to find errors
_FIRST_ROWS = 1000

# The errors that `datasets` and pyarrow raise for files that they cannot read
_UNREADABLE = (DatasetGenerationError, EOFError, OSError, StopIteration, TypeError, ValueError, zlib.error)

logger = logging.getLogger(__name__)


def load_rows(
    name: str | PathLike,
    *,
    config: str | None = None,
    streaming: bool = False,
    columns: str | Mapping[str, str] | None = None,
    label_map: str | Mapping[Any, float] | None = None,
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
    names = Names.of(columns, label_map)
    path = Path(name).expanduser()
    if path.is_dir():
        return _load_folder(path, config, streaming, names)
    if path.exists():
        if config is not None:
            raise ValueError(f"{path} is a file, so it has no configurations. Remove the configuration {config!r}.")
        rows = load_files([path], streaming=streaming, columns=columns, label_map=label_map)
        return _as_splits({"train": rows}, streaming)
    if _looks_local(str(name)):
        raise FileNotFoundError(missing(path))
    return load_hub(str(name), config=config, streaming=streaming, columns=columns, label_map=label_map)


def load_files(
    files: list[Path],
    *,
    streaming: bool = False,
    columns: str | Mapping[str, str] | None = None,
    label_map: str | Mapping[Any, float] | None = None,
) -> Dataset | IterableDataset:
    """Load the rows of files as one split. For the arguments, see `load_rows`."""
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(missing(file))
        if _suffix(file) not in _KINDS:
            raise ValueError(f"{file} ends in {_suffix(file) or 'nothing'!r}; a data file must be {ACCEPTED}.")
    return _load_files(files, streaming, Names.of(columns, label_map))


def load_hub(
    name: str,
    *,
    config: str | None = None,
    streaming: bool = False,
    columns: str | Mapping[str, str] | None = None,
    label_map: str | Mapping[Any, float] | None = None,
    data_dir: str | None = None,
    data_files: Any = None,
) -> DatasetDict | IterableDatasetDict:
    """Load the splits of a dataset on the Hub.

    CSV, TSV and JSON files are downloaded to the cache of the Hub, also for a stream, and are read like a local folder
    with the same files. Offline, the files in this cache are read. All other datasets are read by
    `datasets.load_dataset`. If it can choose other types than `load_rows`, a warning is logged.

    Args:
        name: the name on the Hub, or the name of a builder of `datasets`.
        config: see `load_rows`. So are `streaming`, `columns` and `label_map`.
        data_dir: a folder of the repository, as in `datasets.load_dataset`.
        data_files: files of the repository, as in `datasets.load_dataset`.

    Raises:
        FileNotFoundError: if there is no such dataset.
        ValueError: if it cannot be read.
    """
    names = Names.of(columns, label_map)
    given = {"data_dir": data_dir, "data_files": data_files}
    which: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    try:
        builder: Any = load_dataset_builder(name, name=config, **which)
    except (DatasetNotFoundError, ConnectionError) as error:
        folder = None if which else _in_hub_cache(name)
        if folder is None:
            raise FileNotFoundError(
                f"{missing(Path(name))} It could not be loaded from the Hub either: {error}"
            ) from error
        _say({f"the Hub cannot be reached, so the files in {folder} are read": 1}, name)
        return _load_folder(folder, config, streaming, names)
    except (*_UNREADABLE, RuntimeError) as error:  # a RuntimeError if the repository has a loading script
        if "infer the same data file format" in str(error) and not which:  # it has CSV and JSON files
            return _load_folder(_whole(partial(snapshot_download, name, repo_type="dataset")), config, streaming, names)
        raise ValueError(f"The dataset {name} cannot be read: {_line(error)}") from error
    is_ours = isinstance(builder, Json | Csv)
    places = {
        str(split): [_in_repository(str(file)) for file in files]
        for split, files in (builder.config.data_files or {}).items()
    }
    found = [place for each in places.values() for place in each if place is not None]
    if is_ours and _is_plain(builder.config) and found and len(found) == sum(map(len, places.values())):
        if streaming:
            _say({"the files are downloaded, and then streamed": 1}, name)
        folder = _downloaded(found, is_whole=not which)
        if not which:
            return _load_folder(folder, config, streaming, names)
        files = {split: [folder / place[2] for place in each if place is not None] for split, each in places.items()}
        return _as_splits({split: _load_files(each, streaming, names) for split, each in files.items()}, streaming)
    try:
        splits: Any = load_dataset(name, name=config, streaming=streaming, **which)
    except _UNREADABLE as error:
        raise ValueError(f"The dataset {name} cannot be read: {_line(error)}") from error
    if is_ours:
        _say({_READ_BY_DATASETS: 1}, name)
    return _renamed_splits(splits, names, name)


_READ_BY_DATASETS = (
    "the files are read by the library datasets, because they are on another server or the README sets how to read "
    "them, so the type of a column depends on its first rows"
)


def _in_repository(url: str) -> tuple[str, str, str] | None:
    """(repository, revision, path) of a file on the Hub, or None.

    Example:
        >>> _in_repository("hf://datasets/org/name@0a1b/data/train.csv")
        ('org/name', '0a1b', 'data/train.csv')
    """
    found = re.fullmatch(r"hf://datasets/(.+?)@([^/]+)/(.+)", url)
    return None if found is None else (found[1], unquote(found[2]), found[3])


def _downloaded(places: Sequence[tuple[str, str, str]], *, is_whole: bool) -> Path:
    """A folder with these files of a Hub repository, and with the files that declare its data files.

    Args:
        places: see `_in_repository`.
        is_whole: whether the repository is read as it is. If no file declares its data files, it is read like a folder,
            so all of them are downloaded.
    """
    repository, revision, _ = places[0]
    download = partial(snapshot_download, repository, repo_type="dataset", revision=revision)
    folder = Path(download(allow_patterns=list(_NAME_FILES)))
    if is_whole and not any((folder / about).exists() for about in _NAME_FILES):
        return _whole(download)
    return Path(download(allow_patterns=[*_NAME_FILES, *(glob.escape(path) for _, _, path in places)]))


def _whole(download: Callable[..., str]) -> Path:
    """A folder with all files of a Hub repository that the readers support."""
    return Path(download(allow_patterns=[*_NAME_FILES, *(f"*{suffix}" for suffix in _KINDS)]))


def _in_hub_cache(name: str) -> Path | None:
    """The folder of a repository in the cache of the Hub, or None."""
    try:
        folder = Path(snapshot_download(name, repo_type="dataset", local_files_only=True))
    except (OSError, ValueError):
        return None
    return folder if data_files(folder) else None


def data_files(folder: Path) -> list[Path]:
    """The data files in a folder and its subfolders."""
    return [file for file in sorted(folder.rglob("*")) if _suffix(file) in _KINDS]


def missing(path: Path) -> str:
    """An error message for a `path` that does not exist, with the most similar names that exist."""
    name, folder = path.name, path.parent
    while not folder.is_dir():
        name, folder = folder.name, folder.parent
    there = sorted(entry.name for entry in folder.iterdir())
    near = [entry for entry in there if entry.startswith(name)][:3] or difflib.get_close_matches(name, there)
    hint = f" Did you mean {' or '.join(str(folder / entry) for entry in near)}?" if near else ""
    return f"There is no file or folder {path} (looked in {folder.resolve()}).{hint}"


def check_splits(splits: Mapping[str, Any], name: str, *, needs_label: bool = True) -> list[str]:
    """Check that the first rows of each split are valid for training. Returns warnings about ignored columns.

    Raises:
        ValueError: see `trl_ulma.data.columns.check_readable`.
    """
    said: dict[str, None] = {}
    for rows in splits.values():
        first = list(rows.take(20)) if isinstance(rows, IterableDataset) else rows.with_format(None)[:200]
        if isinstance(first, list):
            first = {
                column: [row.get(column) for row in first] for column in dict.fromkeys(c for r in first for c in r)
            }
        said |= dict.fromkeys(check_readable(first, name, needs_label=needs_label))
    return list(said)


def _looks_local(name: str) -> bool:
    is_path = name.startswith(("/", ".", "~")) or "\\" in name or name.count("/") > 1
    return is_path or name.endswith((*_KINDS, ".gz"))


def _suffix(path: Path) -> str:
    inner = Path(path.stem).suffix if path.suffix.lower() == ".gz" else ""
    return (inner + path.suffix).lower()


def _as_splits(splits: Any, streaming: bool) -> DatasetDict | IterableDatasetDict:
    return IterableDatasetDict(splits) if streaming else DatasetDict(splits)


# Files


class _FileRows:
    """Yields the rows of several files, as trainers read them. Each call reads the files again.

    Attributes:
        found: the conversions of values in the last call, and their numbers.
        lines: the line of each row in the last call.
        firsts: the number of the first row of each file in the last call.
    """

    def __init__(self, files: list[Path], names: Names):
        self.files, self.names = files, names

    def __call__(self) -> Iterator[dict[str, Any]]:
        self.found: Counter[str] = Counter()
        self.lines, self.firsts = array("q"), []
        unknown: Counter[str] = Counter()
        for file in self.files:
            self.firsts.append(len(self.lines))
            for line, row in self._rows(file):
                self.lines.append(line)
                yield self._read(row, unknown, is_cell=_KINDS[_suffix(file)] == "csv")
        problem = unknown_labels(unknown, self.names.label_map, self.where)
        if problem:
            raise ValueError(problem)

    @property
    def where(self) -> str:
        """The name of the files, for messages."""
        return str(self.files[0]) if len(self.files) == 1 else str(Path(os.path.commonpath(self.files)))

    def place(self, row: int) -> str:
        """The file and line of a row that was already read."""
        file = int(np.searchsorted(self.firsts, row, side="right")) - 1
        return f"{self.files[file]}, {_unit(self.files[file])} {self.lines[row]}"

    def _rows(self, file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        if file.stat().st_size == 0:
            raise ValueError(f"{file} is empty. It must contain at least one row.")
        kind, is_empty = _KINDS[_suffix(file)], True
        try:
            if kind == "csv":
                rows = csv_rows(file, (*READ, *self.names.columns.values()), self._notice)
            else:
                rows = json_rows(file) if kind == "json" else _parquet_rows(file)
            for line, row in rows:
                if is_empty:
                    self.names.check(list(row))
                is_empty = False
                yield line, row
        except (BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{file} is a broken gzip file ({error}). Write or copy it again.") from error
        except (ValueError, pa.ArrowException) as error:
            raise ValueError(f"{file} {error}") from error
        if is_empty:
            raise ValueError(f"{file} contains no rows. It must contain at least one row.")

    def _read(self, row: dict[str, Any], unknown: Counter, *, is_cell: bool) -> dict[str, Any]:
        return _read_row(row, self.names, unknown, self._notice, is_cell=is_cell)

    def _notice(self, what: str) -> None:
        self.found[what] += 1


def _read_row(row: dict[str, Any], names: Names, unknown: Counter, notice: Any, *, is_cell: bool) -> dict[str, Any]:
    for ours, theirs in names.columns.items():
        if ours in row and ours not in names.columns.values():
            notice(f"{ours}: the column of this name is ignored, because {theirs} is read as {ours}")
    row = names.row(row)
    if "label" in row:
        row["label"] = names.label(row["label"], unknown)
    return {
        name: read_value(name, value, notice, is_cell=is_cell) if name in _ODD else value for name, value in row.items()
    }


# The columns whose values can need a conversion
_ODD = frozenset((*READ, *CONVERSATIONS))


def _parquet_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    with pq.ParquetFile(file) as table:
        for batch in table.iter_batches(_FIRST_ROWS):
            for row in batch.to_pylist():
                yield number, row
                number += 1


def _unit(file: Path) -> str:
    return "row" if _suffix(file) == ".parquet" else "line"


def _say(found: Mapping[str, int], where: str) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    for what, count in found.items():
        logger.warning(f"{where}: {what}{f' ({count:,} values)' if count > 1 else ''}.")


def _load_files(files: list[Path], streaming: bool, names: Names) -> Dataset | IterableDataset:
    """The rows of one split."""
    if all(_suffix(file) == ".parquet" for file in files):
        rows = _load_parquet(files, streaming)
        if rows is not None:
            return _renamed(rows, names, str(files[0]))
    reader = _FileRows(files, names)
    if streaming:
        for _ in zip(range(_FIRST_ROWS), reader(), strict=False):
            pass
        _say(reader.found, reader.where)
        stream = IterableDataset.from_generator(_stream, gen_kwargs={"files": files, "names": names})
        note_places(stream, partial(_places, files, names))
        return _marked(stream, files)
    about = [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = [version("trl-ulma"), about, [*names.columns.items()], [*names.label_map.items()]]
    other: Counter[str] = Counter()
    rows = as_dataset(reader, reader.place, key, lambda what: other.update([what]))
    _say(reader.found | other, reader.where)
    lines = np.frombuffer(reader.lines, dtype=np.int64)
    source = np.searchsorted(reader.firsts, np.arange(len(lines)), side="right") - 1
    Origins([str(file) for file in files], [_unit(file) for file in files], source, lines).save(rows)
    return _marked(rows, files)


def _marked(rows: Any, files: list[Path]) -> Any:
    return marked(rows, [_suffix(file).removesuffix(".gz") in (".csv", ".tsv") for file in files])


def marked(rows: Any, are_tables: Sequence[bool]) -> Any:
    """Rows with a mark if all or some of their parts are CSV or TSV, which cannot contain messages.

    See `trl_ulma.rows.chat`.
    """
    rows.info.builder_name = TABLES if all(are_tables) else SOME_TABLES if any(are_tables) else None
    return rows


def _stream(files: list[Path], names: Names) -> Iterator[dict[str, Any]]:
    yield from _FileRows(files, names)()


def _places(files: list[Path], names: Names) -> Iterator[str]:
    reader = _FileRows(files, names)
    for number, _ in enumerate(reader()):
        yield reader.place(number)


def _load_parquet(files: list[Path], streaming: bool) -> Dataset | IterableDataset | None:
    """The rows of Parquet files as `datasets` reads them. None if their types differ or are not supported."""
    try:
        schemas = []
        for file in files:
            try:
                schemas.append(pq.read_schema(file))
            except (OSError, pa.ArrowException) as error:
                raise ValueError(f"{file} cannot be read as parquet: {error}") from error
        if not all(schema.equals(schemas[0]) for schema in schemas):
            return None
        sizes = [pq.read_metadata(file).num_rows for file in files]
        if not sum(sizes):
            raise ValueError("it contains no rows, but must contain at least one")
        try:
            Features.from_arrow_schema(schemas[0])
        except (KeyError, TypeError, ValueError, NotImplementedError):
            return None
        splits: Any = load_dataset("parquet", data_files=[str(file) for file in files], streaming=streaming)
        if not streaming:
            source = np.repeat(np.arange(len(files)), sizes)
            numbers = np.concatenate([np.arange(size) for size in sizes])
            Origins([str(file) for file in files], ["row"] * len(files), source, numbers).save(splits["train"])
    except _UNREADABLE as error:
        if isinstance(error, ValueError) and str(error).startswith(str(files[0].parent)):
            raise
        while error.__cause__ is not None:
            error = error.__cause__
        raise ValueError(f"{files[0]} cannot be read as parquet: {error}") from error
    return splits["train"]


# Folders


def _load_folder(path: Path, config: str | None, streaming: bool, names: Names) -> DatasetDict | IterableDatasetDict:
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        if config is not None:
            raise ValueError(f"{path} was written by save_to_disk, so it has no configurations. Remove {config!r}.")
        _check_saved(path)
        saved = load_from_disk(str(path))
        splits = _renamed_splits(saved if isinstance(saved, DatasetDict) else {"train": saved}, names, str(path))
        if not streaming:
            return splits
        return IterableDatasetDict({split: rows.to_iterable_dataset() for split, rows in splits.items()})
    if not data_files(path):
        raise FileNotFoundError(f"The folder {path} contains no data file. Add at least one {ACCEPTED} file.")
    about = [name for name in _NAME_FILES if (path / name).exists()]
    named: dict[str, list[str]] = {}
    try:
        builder: Any = load_dataset_builder(str(path), name=config)
    except _UNREADABLE as error:
        if about or config is not None:
            raise ValueError(f"The folder {path} cannot be read: {_line(error)}") from error
        builder = None  # the folder has files of several kinds
    if builder is not None:
        named = {str(split): list(map(str, files)) for split, files in (builder.config.data_files or {}).items()}
        for file in (file for files in named.values() for file in files):
            _check_inside(path, file, about[0] if about else ".")
        if not isinstance(builder, Json | Csv | Parquet) or (about and not _is_plain(builder.config)):
            try:
                splits = load_dataset(str(path), name=config, streaming=streaming)
            except _UNREADABLE as error:
                raise ValueError(f"The folder {path} cannot be read: {_line(error)}") from error
            if isinstance(builder, Json | Csv):
                _say({_READ_BY_DATASETS: 1}, str(path))
            return _renamed_splits(splits, names, str(path))
    if builder is None or not about:
        found = DataFilesDict.from_patterns(get_data_patterns(str(path)), base_path=str(path))
        named = {str(split): list(map(str, files)) for split, files in found.items()}
    files = {split: [Path(f) for f in found if _suffix(Path(f)) in _KINDS] for split, found in named.items()}
    files = {split: found for split, found in files.items() if found}
    read = {file.resolve() for found in files.values() for file in found}
    others = [] if about else [file.name for file in data_files(path) if file.resolve() not in read]
    if others:
        _say(
            {f"{', '.join(others[:3])}{' and others' * (len(others) > 3)} is not in a split and is ignored": 1},
            str(path),
        )
    return _as_splits({split: _load_files(found, streaming, names) for split, found in files.items()}, streaming)


def _line(error: BaseException) -> str:
    """The message of an error of `datasets`, in one line."""
    return " ".join(str(error.__cause__ or error).split())


def _is_plain(config: Any) -> bool:
    """Whether a folder's README only names its files, and does not change how they are read."""
    usual = type(config)()
    ours = {"name", "version", "data_dir", "data_files", "description", "sep", "delimiter"}
    return getattr(config, "sep", ",") in DELIMITERS and all(
        getattr(config, f.name) == getattr(usual, f.name) for f in fields(config) if f.name not in ours
    )


def _check_saved(path: Path) -> None:
    """Raise ValueError if the metadata that `save_to_disk` wrote names a file in another folder."""
    about = path / "dataset_dict.json"
    splits = json.loads(about.read_text())["splits"] if about.exists() else [""]
    for split in splits:
        _check_inside(path, path / split, about.name)
        state = path / split / "state.json"
        for file in json.loads(state.read_text())["_data_files"] if state.exists() else []:
            _check_inside(path, path / split / file["filename"], f"{state.relative_to(path)}")


def _check_inside(folder: Path, file: str | Path, named_by: str) -> None:
    if not Path(os.path.abspath(file)).is_relative_to(folder.absolute()):
        raise ValueError(
            f"{folder / named_by} names {file}, which is not in {folder}. A dataset can only read files of its own "
            "folder. Move the file there, or load the file itself as a dataset."
        )


# Datasets whose types are known: those on the Hub, those of save_to_disk, and Parquet


def _renamed_splits(splits: Any, names: Names, where: str) -> Any:
    renamed = {str(split): _renamed(rows, names, where) for split, rows in splits.items()}
    return _as_splits(renamed, any(isinstance(rows, IterableDataset) for rows in renamed.values()))


class _Read:
    """Converts a row of a stream to the form that trainers read."""

    def __init__(self, names: Names, where: str):
        self.names, self.where = names, where

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        unknown: Counter[str] = Counter()
        row = _read_row(row, self.names, unknown, lambda what: None, is_cell=False)
        problem = unknown_labels(unknown, self.names.label_map, self.where)
        if problem:
            raise ValueError(problem)
        return row


def _renamed(rows: Dataset | IterableDataset, names: Names, where: str) -> Dataset | IterableDataset:
    """Rows with the column names that trainers read, and with numbers that are stored as text converted to numbers."""
    if isinstance(rows, IterableDataset):
        first = next(iter(rows.take(1)), {})
        _check_names(names, list(first), where)
        read = _Read(names, where)
        known = rows.features or {}
        odd = [name for name in (*NUMBERS, *BOOLS) if name in first and not _is_as_read(name, known.get(name))]
        if not (names.columns or names.label_map or odd):
            return rows
        return rows.map(read, remove_columns=[name for name in names.columns.values() if name in first])
    _check_names(names, rows.column_names, where)
    found: Counter[str] = Counter()
    if names.columns:
        taken = {*names.columns, *names.columns.values()}
        kept = [name for name in rows.column_names if name not in taken]
        for ours, theirs in names.columns.items():
            if ours in rows.column_names and ours not in names.columns.values():
                found[f"{ours}: the column of this name is ignored, because {theirs} is read as {ours}"] = 1
        rows = rows.select_columns([*names.columns.values(), *kept])
        rows = rows.rename_columns({theirs: ours for ours, theirs in names.columns.items() if ours != theirs})
    unknown: Counter[str] = Counter()
    for name in [name for name in (*NUMBERS, *BOOLS) if name in rows.column_names]:
        feature = rows.features[name]
        is_mapped = name == "label" and bool(names.label_map)
        if _is_as_read(name, feature) and not is_mapped:
            continue
        values = rows.with_format(None)[name][:]
        if is_mapped:
            if isinstance(feature, ClassLabel):
                values = [None if value is None else feature.int2str(value) for value in values]
            values = [names.label(value, unknown) for value in values]
        noticed: Counter[str] = Counter()
        values = [read_value(name, value, lambda what: noticed.update([what])) for value in values]  # noqa: B023
        kind = "null"
        for value in values:
            kind = joined(kind, kind_of(value), is_number=True)
        if kind not in ("bool", "int", "long", "float"):
            continue  # trainers raise an error that names the row
        found |= noticed
        values = [None if value is None else {"bool": bool, "float": float}.get(kind, int)(value) for value in values]
        dtype = {"bool": "bool", "float": "float64"}.get(kind, "int64")
        rows = rows.remove_columns(name).add_column(name, values, feature=Value(dtype))
    problem = unknown_labels(unknown, names.label_map, where)
    if problem:
        raise ValueError(problem)
    _say(found, where)
    return rows


def _check_names(names: Names, there: list[str], where: str) -> None:
    try:
        names.check(there)
    except ValueError as error:
        raise ValueError(f"{where} {error}") from error


def _is_as_read(name: str, feature: Any) -> bool:
    if isinstance(feature, ClassLabel):
        return True
    dtype = getattr(feature, "dtype", "")
    return dtype.startswith("bool") or (name not in BOOLS and dtype.startswith(("int", "uint", "float")))


def split_by_prompt(dataset: Dataset, *, test_size: float, seed: int) -> DatasetDict:
    """Split a dataset into "train" and "test" without a prompt in both. About `test_size` of the rows are test rows.

    The held-out prompts only depend on `seed` and the prompts themselves, so they are the same on every process and for
    any order of the rows. Pairs without a prompt are split by the prompts that are extracted from them.

    Args:
        dataset: rows with `prompt` (text or messages), or pairs of `chosen` and `rejected`.
        test_size: a fraction between 0 and 1, or a whole number of rows.
        seed: the seed of the choice. Another seed holds out other prompts.

    Raises:
        ValueError: if there is no prompt column, if there are fewer than two prompts, or if `test_size` leaves one
            split empty.

    Example:
        >>> rows = Dataset.from_dict({"prompt": ["a", "b", "a", "c"], "completion": ["1", "2", "3", "4"]})
        >>> splits = split_by_prompt(rows, test_size=0.25, seed=0)
        >>> len(splits["train"]), len(splits["test"])
        (3, 1)
    """
    whole = test_size >= 1
    if not (0 < test_size < 1 or (whole and test_size == int(test_size) and test_size < len(dataset))):
        raise ValueError(
            f"test_split_size is {test_size}; it must be a fraction between 0 and 1, or a whole number of rows below "
            f"{len(dataset)}, the number of rows."
        )
    groups = _groups_by_prompt(dataset)
    if len(groups) < 2:
        raise ValueError(
            f"A split by prompt needs two different prompts; the {len(dataset)} rows have {len(groups)}. Provide a "
            "test split, or switch off the evaluation."
        )

    def rank(prompt: str) -> bytes:
        return hashlib.sha256(f"{seed}\n{prompt}".encode()).digest()

    target = max(1, round(test_size if whole else test_size * len(dataset)))
    test: list[int] = []
    for prompt in sorted(groups, key=rank):
        if len(test) + len(groups[prompt]) <= target:
            test += groups[prompt]
    if not test:
        test = groups[min(groups, key=lambda prompt: (len(groups[prompt]), rank(prompt)))]
    held_out = set(test)
    train = [row for row in range(len(dataset)) if row not in held_out]
    return DatasetDict({"train": dataset.select(train), "test": dataset.select(sorted(test))})


def _groups_by_prompt(dataset: Dataset) -> dict[str, list[int]]:
    """The row numbers of each set of rows that share a prompt, by the first prompt of the set."""
    keys = [[_key(prompt) for prompt in prompts] for prompts in _prompts(dataset)]
    parent = {key: key for row in keys for key in row}

    def root(key: str) -> str:
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    # The halves of a pair can have different prompts. Both must be in the same split. The smaller one names the set.
    for first, *others in keys:
        for other in others:
            low, high = sorted((root(first), root(other)))
            parent[high] = low
    groups = defaultdict(list)
    for number, row in enumerate(keys):
        groups[root(row[0])].append(number)
    return dict(groups)


def _prompts(dataset: Dataset) -> list[list[Any]]:
    names = dataset.column_names
    if "prompt" in names:
        return [[prompt] for prompt in dataset["prompt"]]
    if {"chosen", "rejected"} <= set(names):
        pairs = dataset.select_columns(["chosen", "rejected"])
        prompts = [prompt for batch in pairs.iter(1000) for prompt in pairs_to_rows(dict(batch))["prompt"]]
        return [prompts[first : first + 2] for first in range(0, len(prompts), 2)]
    raise ValueError(
        f"A split by prompt needs a column `prompt`, or `chosen` and `rejected`; found {', '.join(names)}."
    )


def _key(prompt: Any) -> str:
    return json.dumps(prompt, sort_keys=True, ensure_ascii=False, default=str)
