"""The file and line that each row was read from. They are stored in a file beside the Arrow file of the rows."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from datasets import Dataset, config
from datasets.table import ConcatenationTable, MemoryMappedTable

from trl_ulma.data.sheet_rows import with_sheet_row
from trl_ulma.labels import LISTED, InvalidRow


@dataclass(frozen=True)
class Origins:
    """The origin of each row of an Arrow file. Arrays are `(N,)`.

    Indexing returns the file and line of a row for messages, with the row that a spreadsheet shows, if it differs.

    Attributes:
        names: the files, or what else rows came from.
        units: what is counted in each of them: "line" or "row".
        source: int, the number of the row's file in `names`.
        line: int, the number of the line or row in that file.
        columns: for each file, column that trainers read → its name in the file. Empty if the names are unknown.
    """

    names: Sequence[str]
    units: Sequence[str]
    source: np.ndarray
    line: np.ndarray
    columns: Sequence[Mapping[str, str]] = ()

    def __getitem__(self, row: int) -> str:
        return with_sheet_row(self.place(row))

    def place(self, row: int) -> str:
        """The file and line of a row, without the row that a spreadsheet shows, which takes time to find out."""
        source = self.source[row]
        return f"{self.names[source]}, {self.units[source]} {self.line[row]}"

    def save(self, rows: Dataset) -> None:
        """Store the origins of `rows` beside their Arrow files. Each row of these files must be in `rows`, in order."""
        start = 0
        for size, file, _ in _stretches(rows):
            own = slice(start, start + size)
            start += size
            if file is None:
                continue
            about = file.with_suffix(".npz")
            part = about.with_suffix(f".{os.getpid()}.part")  # other processes may be reading the file
            with part.open("wb") as to:
                np.savez(
                    to,
                    names=np.array(self.names, dtype=str),
                    units=np.array(self.units, dtype=str),
                    source=np.asarray(self.source[own], dtype=np.int32),
                    line=np.asarray(self.line[own], dtype=np.int64),
                    columns=np.array(json.dumps(list(self.columns))),
                )
            part.replace(about)


Places = Callable[[], Iterator[str | None]]
# A function that yields the origins of the rows of a stream, by the object that yields the rows. A stream that is
# shuffled or changed in another way has another such object.
_places: WeakKeyDictionary[Any, Places] = WeakKeyDictionary()


def note_places(stream: Any, places: Places) -> None:
    """Note a function that yields the origins of the rows of a stream. It is only called if rows are invalid."""
    _places[stream._ex_iterable] = places


def places_of(stream: Any) -> Places | None:
    """The function that was noted for a stream, or None."""
    return _places.get(getattr(stream, "_ex_iterable", None))


class StreamOrigins:
    """The origin of a row of a stream by its number, or None. Rows are counted from the start, so ask in their order.

    Args:
        places: yields the origins of all rows, or None if they are unknown.
    """

    def __init__(self, places: Places | None):
        self.places = places
        self._rest: Iterator[str | None] = iter(())
        self._row, self._place = -1, None

    def __call__(self, row: int | str) -> str | None:
        """The origin of the row with this number. None for a row that is only counted in its shard."""
        if self.places is None or isinstance(row, str):
            return None
        if row == self._row:  # the other half of a pair
            return self._place
        if self._row < 0 or row < self._row:
            self._rest, self._row = self.places(), -1
        self._place = next(islice(self._rest, row - self._row - 1, None), None)
        self._row = row
        self._place = self._place and with_sheet_row(self._place)
        return self._place

    def __reduce__(self) -> Any:
        return StreamOrigins, (self.places,)


def origin(rows: Any, row: int) -> str | None:
    """The file and line that a row was read from, and the row that a spreadsheet shows, if it differs. None if unknown.

    Args:
        rows: the result of `load_rows`, or rows that were selected, split off or concatenated from it.
        row: the number of the row.

    Example:
        >>> import tempfile
        >>> from trl_ulma.data.files import load_rows
        >>> with tempfile.NamedTemporaryFile("w", suffix=".csv") as file:
        ...     _ = file.write('prompt,completion\\n"Two\\nlines",4\\nHi,Hello\\n'), file.flush()
        ...     rows = load_rows(file.name)["train"]
        ...     origin(rows, 1)
        '/.../tmp....csv, line 4 (row 3 in a spreadsheet)'
    """
    if not isinstance(rows, Dataset) or not -len(rows) <= row < len(rows):
        return None
    row = range(len(rows))[row]
    if rows._indices is not None:
        row = rows._indices.column(0)[row].as_py()
    for size, file, first in _stretches(rows):
        if row < size:
            return None if file is None else _origin_in(file, first + row)
        row -= size
    return None


def origins(rows: Dataset) -> list[str | None]:
    """The file and line of each row that `load_rows` has read. None for other rows. Faster than `origin` per row, and
    without the row that a spreadsheet shows.

    Example:
        >>> origins(Dataset.from_dict({"prompt": ["Hi"]}))
        [None]
    """
    found = joined_origins([("", rows)])
    return [found.place(row) if found.names[found.source[row]] else None for row in range(len(rows))]


def with_origins(numbers: Sequence[int], rows: Any) -> str:
    """Numbers of rows as text, each with its file and line if they are known.

    Example:
        >>> with_origins([3, 7], Dataset.from_dict({"prompt": ["Hi"] * 8}))
        '3, 7'
    """
    places = [origin(rows, number) if number >= 0 else None for number in numbers]
    return ", ".join(
        f"{number} ({place})" if place else str(number) for number, place in zip(numbers, places, strict=True)
    )


def located(invalid: Sequence[tuple[int, InvalidRow]], rows: Any) -> list[InvalidRow]:
    """The errors of rows, with the file and line of each row, and the names of columns in the file.

    Args:
        invalid: (number of the row, error).
        rows: the rows.
    """
    if not invalid or not isinstance(rows, Dataset):
        return [error for _, error in invalid]
    known = joined_origins([("", rows)])
    found = []
    for row, error in invalid:
        source = known.source[row]
        place: str | None = known[row] if known.names[source] else None
        if place is None and len(found) < LISTED:
            place = origin(rows, row)
        found.append(error.at_origin(place, known.columns[source]))
    return found


def joined_origins(parts: Sequence[tuple[str, Dataset]]) -> Origins:
    """The origins of the rows of several datasets, one after the other.

    Args:
        parts: (name, rows). Rows of unknown origin are counted within their part.
    """
    names: dict[tuple[str, str, str], int] = {}
    sources, lines = [np.zeros(0, np.int32)], [np.zeros(0, np.int64)]
    for name, rows in parts:
        source, line = np.full(_size(rows), -1, np.int32), np.arange(_size(rows))
        start = 0
        for size, file, first in _stretches(rows):
            known = None if file is None else _known(file)
            if known is not None:
                columns = [json.dumps(each) for each in known.columns or [{}] * len(known.names)]
                keys = zip(known.names, known.units, columns, strict=True)
                numbers = np.array([names.setdefault(key, len(names)) for key in keys], np.int32)
                source[start : start + size] = numbers[known.source[first : first + size]]
                line[start : start + size] = known.line[first : first + size]
            start += size
        if rows._indices is not None:
            taken = rows._indices.column(0).to_numpy()
            source, line = source[taken], np.where(source[taken] < 0, np.arange(len(rows)), line[taken])
        source[source < 0] = names.setdefault((name, "row", "{}"), len(names))
        sources.append(source)
        lines.append(line)
    return Origins(
        [name for name, _, _ in names],
        [unit for _, unit, _ in names],
        np.concatenate(sources),
        np.concatenate(lines),
        [json.loads(columns) for _, _, columns in names],
    )


def names_in_files(rows: Any) -> Mapping[str, str]:
    """Column that trainers read → its name in the file, where it is another. Empty if unknown, or if files differ.

    Args:
        rows: the result of `load_rows`, or rows that were selected, split off or concatenated from it.

    Example:
        >>> names_in_files(Dataset.from_dict({"prompt": ["Hi"]}))
        {}
    """
    if not isinstance(rows, Dataset) or not len(rows):
        return {}
    known = joined_origins([("", rows)])
    first, *others = (known.columns[source] for source in np.unique(known.source))
    return first if all(each == first for each in others) else {}


def _size(rows: Dataset) -> int:
    return rows.data.num_rows


def _origin_in(file: Path, row: int) -> str | None:
    known = _known(file)
    if known is not None:
        return known[row]
    is_cache = file.name.startswith("cache-") or any(
        file.is_relative_to(folder) for folder in (config.HF_CACHE_HOME, config.HF_DATASETS_CACHE)
    )
    return None if is_cache else f"{file}, row {row}"  # written by `save_to_disk`


def _known(file: Path) -> Origins | None:
    about = file.with_suffix(".npz")
    return _load(about, about.stat().st_mtime_ns) if about.exists() else None


@lru_cache(maxsize=8)
def _load(about: Path, changed: int) -> Origins:
    with np.load(about) as found:
        columns = json.loads(str(found["columns"])) if "columns" in found else []
        return Origins(found["names"].tolist(), found["units"].tolist(), found["source"], found["line"], columns)


def _stretches(rows: Dataset) -> Iterator[tuple[int, Path | None, int]]:
    """(number of rows, Arrow file or None, number of the first row in it) of each part of the table of `rows`."""
    table: Any = rows.data
    for tables in table.blocks if isinstance(table, ConcatenationTable) else [[table]]:
        file, first = None, 0
        for each in tables:
            if isinstance(each, MemoryMappedTable) and all(step[0] != "filter" for step in each.replays):
                file = Path(each.path)
                first = sum(arguments[0] for step, arguments, _ in each.replays if step == "slice")
                break
        yield len(tables[0]), file, first
