"""Reads the rows of CSV, JSON and Parquet files one by one, with the values that trainers read."""

import difflib
import json
import os
import re
import zlib
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from gzip import BadGzipFile
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trl_ulma.data.columns import (
    DELIMITERS,
    NUMBERS,
    READ,
    TEXTS,
    THOUSAND_COMMA,
    Shown,
    Truths,
    class_labels,
    class_of,
    number,
)
from trl_ulma.data.csv_rows import csv_rows, delimiter_of
from trl_ulma.data.json_rows import json_rows
from trl_ulma.data.names import Names, read_row, unknown_label, unknown_labels
from trl_ulma.data.sheet_rows import with_sheet_row
from trl_ulma.data.unread import UNREAD, Unread
from trl_ulma.labels import DECIMAL_COMMA, WERE_RATINGS

KINDS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "csv"}
KINDS |= {f"{suffix}.gz": kind for suffix, kind in KINDS.items()}
KINDS[".parquet"] = "parquet"
ACCEPTED = ".jsonl[.gz], .json[.gz], .csv[.gz], .tsv[.gz] or .parquet"
# Endings of files that cannot be read, and what to do
_SHEET, _ARCHIVE = " Save the sheet as CSV.", " Unpack the file."
OTHER_FILES: dict[str, str] = {
    ".xlsx": _SHEET,
    ".xls": _SHEET,
    ".ods": _SHEET,
    ".zip": _ARCHIVE,
    ".tar": _ARCHIVE,
    ".tar.gz": _ARCHIVE,
    ".bz2": _ARCHIVE,
    ".xz": _ARCHIVE,
    ".zst": _ARCHIVE,
    ".arrow": " Name the folder that save_to_disk wrote.",
}
# The start of a file that stands for another one, the tool that wrote it, and the command that gets the other one
_POINTERS = (
    (b"version https://git-lfs.github.com/spec/", "Git LFS", "git lfs pull"),
    (b"/annex/objects/", "git-annex", "git annex get ."),
)
# What is done with lines that cannot be read
UNREAD_LINES = ("error", "drop", "mark")
# The number of lines that an error lists besides the first one
_LISTED = 20
_BATCH = 1000
# Rows of a JSON file that are looked at for columns that the first row lacks
_AHEAD = 10_000
# A number that looks like a day and a month
_DAY = re.compile(r"0[1-9]\.(0[1-9]|1[0-2])", re.ASCII)
# Whole numbers with points between thousands, or numbers with three decimals
_GROUPED = re.compile(r"[+-]?[1-9]\d{0,2}(\.\d{3})+", re.ASCII)


def suffix_of(path: Path) -> str:
    """The ending of a file's name, in lower case, with the ending before ".gz".

    Example:
        >>> suffix_of(Path("rows.JSONL.gz"))
        '.jsonl.gz'
    """
    inner = Path(path.stem).suffix if path.suffix.lower() == ".gz" else ""
    return (inner + path.suffix).lower()


def unit_of(file: Path) -> str:
    """What is counted in a file: "row" or "line"."""
    return "row" if suffix_of(file) == ".parquet" else "line"


def looks_local(name: str) -> bool:
    """Whether a name that does not exist was meant as a file or folder, because it cannot be a name on the Hub.

    Example:
        >>> looks_local("rows.csv"), looks_local("./rows"), looks_local("out/"), looks_local("org/rows")
        (True, True, True, False)
    """
    is_path = name.startswith(("/", ".", "~")) or name.endswith("/") or "\\" in name or name.count("/") > 1
    return is_path or name.endswith((*KINDS, ".gz"))


def check_downloaded(file: Path) -> None:
    """Raise ValueError if a file is only the pointer that Git LFS or git-annex puts into its place."""
    with file.open("rb") as opened:
        start = opened.read(200)
    for sign, tool, remedy in _POINTERS:
        if start.startswith(sign):
            raise ValueError(
                f"{file} is a pointer of {tool}, which stands for the file and does not contain its rows. Run {remedy} "
                "in its folder to download it."
            )


def missing(path: Path) -> str:
    """An error message for a `path` that does not exist, with the most similar names that exist."""
    if path.is_symlink():
        target = os.readlink(path)
        remedy = "Run git annex get." if "annex" in target else "Copy the file itself."
        return f"{path} is a link to {target}, which does not exist. {remedy}"
    name, folder = path.name, path.parent
    while not folder.is_dir():
        name, folder = folder.name, folder.parent
    there = sorted(entry.name for entry in folder.iterdir())
    near = [entry for entry in there if entry.startswith(name)][:3] or difflib.get_close_matches(name, there)
    hint = f" Did you mean {' or '.join(str(folder / entry) for entry in near)}?" if near else ""
    return f"There is no file or folder {path} (looked in {folder.resolve()}).{hint}"


class FileRows:
    """Yields the rows of several files, as trainers read them. Each call reads the files again.

    Args:
        files: CSV, JSON or Parquet files.
        names: the names of columns and labels in the files.
        invalid_rows: "error" raises one error for all lines that cannot be read, after the last file. "drop" leaves
            them out. "mark" yields them with the error in the column `unread_line`, without a label, and without values
            that cannot be read. Rows with a label that `names` lacks are treated in the same way.

    Attributes:
        found: the conversions of values in the last call, and their numbers.
        shown: the first values of some of them.
        lines: the line of each row in the last call.
        firsts: the number of the first row of each file in the last call.
        unread: (file, line, fault) of the lines of the last call that cannot be read, or have an unknown label.

    Raises:
        ValueError: if a file or the label of a row cannot be read. The message names the file and the line.
    """

    def __init__(self, files: list[Path], names: Names, invalid_rows: str = "error"):
        self.files, self.names, self.invalid_rows = files, names, invalid_rows

    def __call__(self) -> Iterator[dict[str, Any]]:
        self.found: Counter[str] = Counter()
        self.shown = Shown()
        self._at = self.files[0], 0
        self.lines, self.firsts = array("q"), []
        self.unread: list[tuple[str, int, Unread]] = []
        self._unknown: Counter[str] = Counter()
        # Of CSV files: (column, mark) → the place of the first number such as 1.000 or 1,000, the number, and the
        # delimiter; and the marks that are known to be decimal, such as the point of 0.500
        self._grouped: dict[tuple[str, str], tuple[str, str, str]] = {}
        self._decimal: set[tuple[str, str]] = set()
        # Of CSV files: column → the place of the first number such as 01.05, and the number
        self._days: dict[str, tuple[str, str, str]] = {}
        # Of one CSV file: column → its texts, and (column, mark) → its texts between such marks
        self._texts: Counter[str] = Counter()
        self._quoted: Counter[tuple[str, str]] = Counter()
        truths = Truths(self.names.columns.get("label", "label"))
        for file in self.files:
            self.firsts.append(len(self.lines))
            is_json = KINDS[suffix_of(file)] == "json"
            for line, row in self._rows(file):
                self._at = file, line
                own: Counter[str] = Counter()
                if self._delimiter not in (None, ","):
                    self._note_points(row)
                row = read_row(row, self.names, own, self._notice, delimiter=self._delimiter)
                self._unknown.update(own)
                if own and self.invalid_rows != "error":
                    fault = unknown_label(next(iter(own)), f" in {unit_of(file)} {line}")
                    self.unread.append((str(file), line, fault))
                    if self.invalid_rows == "drop":
                        continue
                    row |= {"label": None, UNREAD: fault.message}
                if is_json and isinstance(row.get("tools"), list) and row["tools"]:
                    # In a column of lists, tools get the keys of all others, in the order of the first, and lose nulls
                    row["tools"] = json.dumps(row["tools"], ensure_ascii=False)
                if self._delimiter is not None:
                    self._note_quotes(row)
                truths.add(row, str(file))
                self.found |= truths.found
                self.lines.append(line)
                yield row
            self.find_quotes()
        self.found |= truths.sources
        self.check_points()
        self.check()

    def _note_points(self, row: dict[str, Any]) -> None:
        file, line = self._at
        for name in NUMBERS:
            text = str(row.get(self.names.columns.get(name, name)) or "").strip()
            if name == "label" and self.names.label_map:
                continue
            found = f"{file}, line {line}", f"{self.names.columns.get(name, name)} is {text!r}", str(self._delimiter)
            if _GROUPED.fullmatch(text):
                self._grouped.setdefault((name, "."), found)
            elif THOUSAND_COMMA.fullmatch(text):
                self._grouped.setdefault((name, ","), found)
            elif "." in text and number(text) is not None:
                self._decimal.add((name, "."))
                if _DAY.fullmatch(text):
                    self._days.setdefault(name, found)
            elif DECIMAL_COMMA.fullmatch(text):
                self._decimal.add((name, ","))

    def _note_quotes(self, row: dict[str, Any]) -> None:
        for name in TEXTS:
            text = row.get(name)
            if not isinstance(text, str) or not text.strip():
                continue
            self._texts[name] += 1
            inner = text.strip()
            if len(inner) > 1 and inner[0] == inner[-1] and (inner[0] == "'" or (inner[0] == '"' and text[0] == " ")):
                self._quoted[name, inner[0]] += 1

    def find_quotes(self) -> None:
        """Add to `found` the columns of which most texts in the file so far are between quotes that are not CSV's."""
        for (name, mark), count in self._quoted.items():
            if 2 * count > self._texts[name]:
                fault = (
                    "begin with a space and a quote, so the quotes are read as text. Remove these spaces"
                    if mark == '"'
                    else "are between single quotes, which are read as text. Replace them by double quotes"
                )
                self.found[f"{self.names.columns.get(name, name)}: most texts {fault}"] += count
        self._texts.clear()
        self._quoted.clear()

    def check_points(self) -> None:
        """Raise ValueError if it is unknown whether points or commas in the numbers so far separate thousands."""
        for (name, mark), (place, found, delimiter) in self._grouped.items():
            # Where tabs separate the fields, points are decimal, unless commas are
            is_usual = mark == "." and delimiter != ";" and (name, ",") not in self._decimal
            if (name, mark) not in self._decimal and not is_usual:
                raise ValueError(
                    f"{with_sheet_row(place)}: {found}. {DELIMITERS[delimiter].capitalize()} separate the fields, so "
                    "this can be a thousand or have three decimals, and no other number in the column shows which. "
                    "Write such numbers as 1000 or as 1.0."
                )

        for name, (place, found, _) in self._days.items():
            if (name, ",") in self._decimal:
                raise ValueError(
                    f"{with_sheet_row(place)}: {found}, but other numbers in the column have a decimal comma, so this "
                    f"looks like a day and a month. {WERE_RATINGS}"
                )

    def check(self) -> None:
        """Raise ValueError for lines so far that cannot be read or have an unknown label, unless they are marked or
        left out."""
        if self.invalid_rows != "error":
            return
        problem = unknown_labels(self._unknown, self.names.label_map, self.where)
        unread = list_unread(self.unread) if self.unread else None
        problems = [each for each in (unread, problem) if each is not None]
        if problems:
            raise ValueError(
                f'{" ".join(problems)} To leave such rows out, set invalid_rows="drop" (on the command line '
                "--invalid_rows drop)."
            )

    @property
    def where(self) -> str:
        """The name of the files, for messages."""
        return str(self.files[0]) if len(self.files) == 1 else str(Path(os.path.commonpath(self.files)))

    def place(self, row: int) -> str:
        """The file and line of a row that was already read."""
        file = int(np.searchsorted(self.firsts, row, side="right")) - 1
        return f"{self.files[file]}, {unit_of(self.files[file])} {self.lines[row]}"

    def _rows(self, file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        """(line, row). Marks have the columns of the first row, also those of lines before it."""
        if file.stat().st_size == 0:
            raise ValueError(f"{file} is empty. It must contain at least one row.")
        kind, columns, before = KINDS[suffix_of(file)], None, len(self.unread)
        alike: dict[str, str] = {}
        is_marking, early = self.invalid_rows == "mark", []
        self._delimiter = None
        try:
            if kind == "csv":
                known = (*READ, *self.names.columns.values())
                self._delimiter = delimiter_of(file, known)
                rows = csv_rows(file, known, lambda what: self._notice(_with_sheet_row(what, str(file))))
            else:
                rows = self._with_all_names(json_rows(file)) if kind == "json" else _parquet_rows(file, self.names)
            for line, row in rows:
                if isinstance(row, Unread):
                    self.unread.append((str(file), line, row))
                    if columns is None:
                        early.append((line, row.message))
                    elif is_marking:
                        yield line, dict.fromkeys(columns) | {UNREAD: row.message}
                    continue
                if columns is None:
                    alike = {} if kind == "json" else self.names.check(list(row))
                    columns = [alike.get(name, name) for name in row]
                    for early_line, message in early if is_marking else ():
                        yield early_line, dict.fromkeys(columns) | {UNREAD: message}
                yield line, {alike.get(name, name): value for name, value in row.items()} if alike else row
        except (BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{file} is a broken gzip file ({error}). Write or copy it again.") from error
        except (ValueError, pa.ArrowException) as error:
            raise ValueError(f"{file} {error}") from error
        if columns is None and early:
            raise ValueError(list_unread(self.unread[before:]))
        if columns is None:
            raise ValueError(f"{file} contains no rows. It must contain at least one row.")

    def _with_all_names(self, rows: Iterator[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
        """The rows of a JSON file, after a look for the columns that `names` has: exports leave out empty values."""
        first: list[tuple[int, Any]] = []
        there: dict[str, None] = {}
        for line, row in rows:
            first.append((line, row))
            there |= {} if isinstance(row, Unread) else dict.fromkeys(row)
            if there and (there.keys() >= set(self.names.columns.values()) or len(first) == _AHEAD):
                break
        alike = self.names.check(list(there)) if there else {}
        for line, row in chain(first, rows):
            if alike and not isinstance(row, Unread):
                yield line, {alike.get(name, name): value for name, value in row.items()}
            else:
                yield line, row

    def _notice(self, what: str, value: str | None = None) -> None:
        self.found[what] += 1
        if value is not None:
            self.shown.add(what, value, self._place_shown)

    def _place_shown(self) -> str:
        """The place of the current row, for a notice that names the files."""
        file, line = self._at
        there = _in_sheet(str(file), line)
        place = f"{unit_of(file)} {line}{f' ({there})' if there else ''}"
        return place if len(self.files) == 1 else f"{file}, {place}"


def _parquet_rows(file: Path, names: Names) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    with pq.ParquetFile(file) as table:
        classes = classes_in(table.schema_arrow)
        label = names.columns.get("label", "label")
        if label in classes and not names.label_map:
            classes[label] = class_labels(classes[label])
        for batch in table.iter_batches(_BATCH):
            for row in batch.to_pylist():
                yield number, row | {name: class_of(row[name], known) for name, known in classes.items()}
                number += 1


def classes_in(schema: pa.Schema) -> dict[str, Sequence[Any]]:
    """The names of the classes of columns of numbers, which `datasets` writes beside the types of a Parquet file."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: about["names"] for name, about in features.items() if about.get("_type") == "ClassLabel"}
    except (AttributeError, KeyError, TypeError, ValueError):  # they are not from `datasets`
        return {}


def list_unread(lines: Sequence[tuple[str, int, Unread]]) -> str:
    """An error message for lines that cannot be read: the first one with its message, and up to 20 others.

    Args:
        lines: (file, line, fault).

    Example:
        >>> fault = Unread("has 1 field in line 3, but 2 columns. Write a comma.", "1 field")
        >>> print(list_unread([("a.csv", 3, fault), ("a.csv", 5, fault), ("b.csv", 2, fault)]))
        a.csv has 1 field in line 3, but 2 columns. Write a comma. These lines cannot be read either: 5 (1 field),
        line 2 of b.csv (1 field).
    """
    (file, _, first), *others = lines
    message = _with_sheet_row(first.message, file)
    if not others:
        return f"{file} {message}"
    shown = ", ".join(
        f"{line if other == file else f'line {line} of {other}'} "
        f"({'; '.join(filter(None, (fault.found, _in_sheet(other, line))))})"
        for other, line, fault in others[:_LISTED]
    )
    more = f" and {len(others) - _LISTED:,} more" if len(others) > _LISTED else ""
    return f"{file} {message} These lines cannot be read either: {shown}{more}."


def _in_sheet(file: str, line: int) -> str:
    """The row of a spreadsheet that is in a line of a file. "" if it has the same number."""
    place = f"{file}, line {line}"
    return with_sheet_row(place).removeprefix(place).strip(" ()")


def _with_sheet_row(said: str, file: str) -> str:
    """A message about a line of a file, with the row of a spreadsheet after the line, if the two numbers differ."""
    found = re.search(r"\bin line (\d+)", said)
    there = _in_sheet(file, int(found[1])) if found else ""
    return f"{said[: found.end()]} ({there}){said[found.end() :]}" if found and there else said
