"""Reads files as one split of a dataset, with types that fit all rows."""

import hashlib
import logging
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache, partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError

from trl_ulma.data.columns import READ, say, say_once
from trl_ulma.data.file_rows import FileRows, check_downloaded, classes_in, list_unread, suffix_of, unit_of
from trl_ulma.data.known_types import renamed
from trl_ulma.data.names import Names
from trl_ulma.data.origins import Origins, note_places
from trl_ulma.data.sheet_rows import with_sheet_row
from trl_ulma.data.tables import as_dataset

# The `info.builder_name` of rows of CSV and TSV files (as in `datasets`), and of rows of which some are
TABLES, SOME_TABLES = "csv", "csv and others"
# The number of rows of a stream that are read immediately to find errors
_FIRST_ROWS = 1000
# The errors that `datasets` and pyarrow raise for files that they cannot read
UNREADABLE = (DatasetGenerationError, EOFError, OSError, StopIteration, TypeError, ValueError, zlib.error)

logger = logging.getLogger(__name__)


def read_files(files: list[Path], streaming: bool, names: Names, invalid_rows: str) -> Dataset | IterableDataset:
    """The rows of files, one after the other. For the arguments, see `trl_ulma.data.files.load_rows`."""
    for file in files:
        check_downloaded(file)
    if all(suffix_of(file) == ".parquet" for file in files):
        rows = _read_parquet(files, streaming, names)
        if rows is not None:
            return renamed(rows, names, str(files[0]), invalid_rows)
    reader = FileRows(files, names, invalid_rows)
    if streaming:
        for _ in zip(range(_FIRST_ROWS), reader(), strict=False):
            pass
        reader.find_quotes()
        reader.check_points()
        reader.check()
        say(reader.found, reader.where, reader.shown)
        given = {"files": files, "names": names, "invalid_rows": invalid_rows}
        stream = IterableDataset.from_generator(_stream, gen_kwargs=given | {"known": frozenset(reader.found)})
        note_places(stream, partial(_places, **given))
        return _marked(stream, files)
    about = [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = [code_hash(), about, [*names.columns.items()], [*names.label_map.items()], invalid_rows]
    key += [] if names.needs_label else ["needs no label"]
    other: Counter[str] = Counter()
    rows = as_dataset(reader, lambda row: with_sheet_row(reader.place(row)), key, lambda what: other.update([what]))
    say(reader.found | other, reader.where, reader.shown)
    if reader.unread and invalid_rows == "drop":
        logger.warning(f"Left out {len(reader.unread):,} of {len(rows) + len(reader.unread):,} rows, which cannot be "
                       f"read. {list_unread(reader.unread)}")  # fmt: skip
    _note_copies(rows, files, reader.firsts, names)
    lines = np.frombuffer(reader.lines, dtype=np.int64)
    source = np.searchsorted(reader.firsts, np.arange(len(lines)), side="right") - 1
    units, columns = [unit_of(file) for file in files], [names.columns] * len(files)
    Origins([str(file) for file in files], units, source, lines, columns).save(rows)
    return _marked(rows, files)


@cache
def code_hash(folder: Path = Path(__file__).parents[1]) -> str:
    """A hash of the package's code, which cached rows depend on: a checkout can change without a new version."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(f"{file.relative_to(folder)} {file.stat().st_size}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def as_splits(splits: Any, streaming: bool) -> DatasetDict | IterableDatasetDict:
    """Splits as the class of `datasets` that holds them."""
    return IterableDatasetDict(splits) if streaming else DatasetDict(splits)


def _marked(rows: Any, files: list[Path]) -> Any:
    return marked(rows, [suffix_of(file).removesuffix(".gz") in (".csv", ".tsv") for file in files])


def marked(rows: Any, are_tables: Sequence[bool]) -> Any:
    """Rows with a mark if all or some of their parts are CSV or TSV, which cannot contain messages.

    See `trl_ulma.rows.chat`.
    """
    rows.info.builder_name = TABLES if all(are_tables) else SOME_TABLES if any(are_tables) else None
    return rows


def _stream(files: list[Path], names: Names, invalid_rows: str, known: frozenset[str]) -> Iterator[dict[str, Any]]:
    """The rows of a stream. Findings are logged when they are met, except those `known` from the first rows."""
    reader, said = FileRows(files, names, invalid_rows), 0
    for row in chain(reader(), [None]):
        reader.check()
        if len(reader.found) > len(known):
            for what in reader.found.keys() - known:
                say_once(what, reader.where if row is None else with_sheet_row(reader.place(len(reader.lines) - 1)))
            known |= reader.found.keys()
        if invalid_rows == "drop":
            for line in reader.unread[said:]:
                logger.warning(f"Left out a row that cannot be read. {list_unread([line])}")
            said = len(reader.unread)
        if row is not None:
            yield row


def _places(files: list[Path], names: Names, invalid_rows: str) -> Iterator[str]:
    reader = FileRows(files, names, invalid_rows)
    for number, _ in enumerate(reader()):
        yield reader.place(number)


def _note_copies(rows: Dataset, files: Sequence[Path], firsts: Sequence[int], names: Names) -> None:
    """Log files whose rows are all those of another file, such as train.jsonl.gz beside train.jsonl.

    Args:
        rows: the rows of all files.
        files: the files.
        firsts: the number of the first row of each file.
        names: the names of columns in the files.
    """
    read = [name for name in rows.column_names if name in (*READ, *names.columns.values())] or rows.column_names
    parts = rows.select_columns(read)
    seen: dict[tuple[int, str], int] = {}
    for number, (first, end) in enumerate(pairwise((*firsts, len(rows)))):
        if first == end:
            continue
        size = end - first
        same = seen.setdefault((size, str(parts[first])), number)
        if same != number and parts.data.slice(first, size).equals(parts.data.slice(firsts[same], size)):
            say({f"the rows are those of {files[same]}, so each of them counts twice. Remove one of the files": 1},
                str(files[number]))  # fmt: skip


def _read_parquet(files: list[Path], streaming: bool, names: Names) -> Dataset | IterableDataset | None:
    """The rows of Parquet files as `datasets` reads them. None if their types differ or are not supported."""
    try:
        schemas = []
        for file in files:
            try:
                schemas.append(pq.read_schema(file))
            except (OSError, pa.ArrowException) as error:
                raise ValueError(f"{file} cannot be read as parquet: {error}") from error
        for file, schema in zip(files, schemas, strict=True):
            if twice := sorted({name for name in schema.names if schema.names.count(name) > 1}):
                raise ValueError(f"{file} has several columns {', '.join(twice)}. Give each column its own name.")
        if not all(schema.equals(schemas[0]) and classes_in(schema) == classes_in(schemas[0]) for schema in schemas):
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
            _note_copies(splits["train"], files, [0, *np.cumsum(sizes[:-1]).tolist()], names)
    except UNREADABLE as error:
        if isinstance(error, ValueError) and str(error).startswith(str(files[0].parent)):
            raise
        while error.__cause__ is not None:
            error = error.__cause__
        raise ValueError(f"{files[0]} cannot be read as parquet: {error}") from error
    return splits["train"]
