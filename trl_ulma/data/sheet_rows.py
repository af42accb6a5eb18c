"""The rows that a spreadsheet shows of a CSV file. They are not its lines if cells contain line breaks."""

import csv
import re
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from trl_ulma.data.columns import READ
from trl_ulma.data.csv_rows import LONGEST_FIELD, delimiter_of
from trl_ulma.data.encodings import encoding_of, opened_text

_PLACE = re.compile(r"(.+\.[ct]sv(?:\.gz)?), line (\d+)", re.IGNORECASE | re.DOTALL)

_DECLARES = re.compile(r"sep=[,;|\t]?")


def with_sheet_row(place: str) -> str:
    r"""A file and line, and the row of the file in a spreadsheet, if it is a CSV file in which the two differ.

    The file is read for it, once, so this is for messages about a few rows.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile("w", suffix=".csv") as file:
        ...     _ = file.write('prompt,label\n"Two\nlines",4\nHi,5\n'), file.flush()
        ...     with_sheet_row(f"{file.name}, line 4")
        '/.../tmp....csv, line 4 (row 3 in a spreadsheet)'
        >>> with_sheet_row("a.jsonl, line 4")
        'a.jsonl, line 4'
    """
    found = _PLACE.fullmatch(place)
    row = None if found is None else sheet_row(Path(found[1]), int(found[2]))
    return place if row is None else f"{place} (row {row:d} in a spreadsheet)"


def named_rows(numbers: Sequence[int], places: Sequence[str | None]) -> list[str]:
    """A name of each row of a list: its file and line, or its number if they are not known.

    Args:
        numbers: `(N,)` numbers of the rows, counted from 0, as the first one says.
        places: `(N,)` file and line, with `with_sheet_row`.

    Example:
        >>> named_rows([3, 12, 13], ["a.csv, line 5", None, None])
        ['a.csv, line 5', 'row 12 (counted from 0)', 'row 13']
    """
    first = next((i for i, place in enumerate(places) if not place), None)
    return [
        place or f"row {number}{' (counted from 0)' if i == first else ''}"
        for i, (number, place) in enumerate(zip(numbers, places, strict=True))
    ]


def sheet_row(file: Path, line: int) -> int | None:
    """The row of a spreadsheet that begins in a line of a CSV file. None if it has the same number, or is not known."""
    try:
        about = file.stat()
        first, starts = _starts(file, about.st_mtime_ns, about.st_size)
    except (OSError, EOFError, ValueError):  # such as a file that is gone
        return None
    place = bisect_left(starts, line)
    row = place + first
    return row if place < len(starts) and starts[place] == line and row != line else None


@lru_cache(maxsize=8)
def _starts(file: Path, changed: int, size: int) -> tuple[int, array]:
    """(the row of the first line, the lines in which rows begin), as far as the file can be read."""
    starts = array("q")
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_FIELD))
    encoding = encoding_of(file, takes_cp1252=True)
    with opened_text(file, encoding, newline="") as text:
        reader = csv.reader(text, delimiter=delimiter_of(file, READ), strict=True)
        line, first = 1, 1
        try:
            for fields in reader:
                if not starts and fields and _DECLARES.fullmatch(fields[0]):
                    first = 0  # spreadsheets do not show this line
                starts.append(line)
                line = reader.line_num + 1
        except csv.Error:
            pass
    return first, starts
