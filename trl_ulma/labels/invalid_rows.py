"""Rows that cannot be read: the error of one row, and the error that lists all of them."""

import re
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from trl_ulma.labels.texts import start_of

# How many invalid rows an error lists, and of how many others it gives the lines
LISTED = 20
PLACES = 200
# If more rows than these are invalid, all for one reason, it is told once
_FEW = 3
# Up to so many errors are not counted by kind
_COUNTED = 10
# The end of the fault of a label outside [0, 1]
NOT_BINARY = 'Rescale it, or set label_type="continuous".'
_FIX = 'Fix these rows, or set invalid_rows="drop" (on the command line --invalid_rows drop) to leave them out.'
_FIX_ALL = "No other row is left, so fix these rows or the settings."
_ARE_RATINGS = (
    'Many labels are outside [0, 1], as ratings and scores are. Set label_type="continuous". Do not leave these rows '
    "out: the low ratings would stay, and count as likes."
)
_UNREADABLE = "a row that cannot be read"
# What an origin can have after the file and line, see `trl_ulma.data.sheet_rows`
_SHEET_ROW = re.compile(r" \(row (\d+) in a spreadsheet\)$")
# The origin of a row of a table, whose empty cells are read as None
_OF_TABLE = re.compile(r"\.[ct]sv(\.gz)?, line \d+", re.IGNORECASE)


class InvalidRow(ValueError):
    """A row that cannot be read. What finds the fault does not know the row; `at` and `at_origin` add it.

    Args:
        fault: what was found and what to do, beginning with a verb.
        kind: the kind of error in a few words; rows are counted by it.
        subject: what has the fault: the name of a column, or other words. None for the row itself.

    Attributes:
        row: the number of the row in its dataset, or None if it is unknown.
        dataset: the name of the dataset.
        half: "chosen" or "rejected" if the fault is in one answer of a pair, else "".
        origin: the file and line of the row, or "" if unknown.
        prompt: the start of the row's prompt, or "" if unknown.

    Example:
        >>> error = InvalidRow("is None; it must be a number.", "label is missing", "label")
        >>> str(error.at(3, "train"))
        'Row 3 of the train dataset: label is None; it must be a number.'
    """

    row: int | str | None = None
    dataset: str = ""
    half: str = ""
    origin: str = ""
    prompt: str = ""

    def __init__(self, fault: str, kind: str, subject: str | None = None):
        super().__init__(fault, kind, subject)
        self.fault, self.kind, self.subject = fault, kind, subject

    def __str__(self) -> str:
        half = f" ({self.half})" if self.half else ""
        place = f"{self.origin}{half}" if self.origin else f"Row {self.row}{half} of the {self.dataset} dataset"
        if self.row is None and not self.origin:
            place = "This row"
        return f"{place} {self.fault}" if self.subject is None else f"{place}: {self.subject} {self.fault}"

    def at(self, row: int | str, dataset: str, half: str = "") -> "InvalidRow":
        """Return the error of this row of a dataset."""
        return self._with(row=row, dataset=dataset, half=half)

    def at_prompt(self, prompt: Any) -> "InvalidRow":
        """Return this error with the start of the row's prompt."""
        return self._with(prompt=start_of(prompt))

    def at_origin(self, origin: str | None, columns: Mapping[str, str] | None = None) -> "InvalidRow":
        """Return this error in the words of the file that the row is from. Unchanged if `origin` is None.

        Args:
            origin: the file and line of the row. It replaces the number of the row.
            columns: column that trainers read → its name in the file.

        Example:
            >>> error = InvalidRow("is None; it must be a number.", "label is missing", "label").at(3, "train")
            >>> str(error.at_origin("a.csv, line 5", {"label": "stars"}))
            'a.csv, line 5: stars is empty; it must be a number.'
        """
        if origin is None:
            return self
        fault, kind, subject = self.fault, self.kind, self.subject
        if kind == _UNREADABLE:  # its fault names the line, too
            line = _SHEET_ROW.sub("", origin).rpartition(", ")[2]
            fault = re.sub(rf" in {re.escape(line)}(?!\d| or below|, column)", "", fault, count=1)
        if _OF_TABLE.search(origin) and fault.startswith("is None;"):
            fault = "is empty;" + fault.removeprefix("is None;")
            kind = re.sub(" is missing$", " is empty", kind)
        if columns and subject is not None and subject in columns:
            if kind.startswith(f"{subject} "):
                kind = columns[subject] + kind.removeprefix(subject)
            subject = columns[subject]
        return self._with(fault=fault, kind=kind, subject=subject, origin=origin)

    def _with(self, **changes: Any) -> "InvalidRow":
        return self.from_parts({**vars(self), **changes})

    @classmethod
    def from_parts(cls, parts: Mapping[str, Any]) -> "InvalidRow":
        """Return the error with these attributes."""
        made = cls(parts["fault"], parts["kind"], parts["subject"])
        vars(made).update(parts)
        return made


class InvalidRows(ValueError):
    """All invalid rows. The last line of the message says what to do.

    Attributes:
        found: the errors.
        total: the number of rows of the dataset, or None if it is unknown.
        remedy: what to do.
    """

    found: Sequence[InvalidRow] = ()
    total: int | None = None
    remedy: str = ""

    @classmethod
    def of(cls, found: Sequence[InvalidRow], total: int | None, where: str | None, remedy: str) -> "InvalidRows":
        """The error for these rows; the arguments are those of `list_invalid`, plus the attribute `remedy`."""
        error = cls(f"{list_invalid(found, total, where)}\n{remedy}")
        error.found, error.total, error.remedy = found, total, remedy
        return error

    def with_command(self, command: str) -> "InvalidRows":
        """This error, with a command that leaves the rows out as its remedy, if they may be left out.

        Example:
            >>> error = InvalidRow("is None; set it.", "k", "label").at(3, "train")
            >>> print(InvalidRows.of([error], 10, "train", _FIX).with_command("trl-ulma check --invalid_rows drop"))
            Row 3 of the train dataset: label is None; set it.
            <BLANKLINE>
            To leave this row out:
            <BLANKLINE>
                trl-ulma check --invalid_rows drop
            <BLANKLINE>
            Or correct it, and check again.
        """
        if self.remedy != _FIX:
            return self
        rows = len({each.origin or (each.dataset, each.row) for each in self.found})
        these, them = ("this row", "it") if rows == 1 else (f"these {rows:,} rows", "them")
        remedy = f"To leave {these} out:\n\n{textwrap.indent(command, '    ')}\n\nOr correct {them}, and check again."
        if rows > 1 and all(each.origin for each in self.found):
            remedy += " If you delete rows, begin with the last one, because the lines below it move up."
        made = InvalidRows(f"{str(self).removesuffix(self.remedy)}\n{remedy}")
        made.found, made.total, made.remedy = self.found, self.total, remedy
        return made

    @classmethod
    def joined(cls, errors: Sequence["InvalidRows"]) -> "InvalidRows":
        """One error for several datasets.

        Example:
            >>> error = InvalidRow("is None; set it.", "k", "label")
            >>> halves = [error.at_origin(f"a.csv, line {line}") for line in (7, 3)]
            >>> print(InvalidRows.joined([InvalidRows.of([half], 10, "train", "Fix it.") for half in halves]))
            2 of 20 rows are invalid:
              a.csv, line 3: label is empty; set it.
              a.csv, line 7: label is empty; set it.
            Fix it.
        """
        if len(errors) == 1:
            return errors[0]
        totals = [error.total for error in errors if error.total is not None]
        total = sum(totals) if len(totals) == len(errors) else None
        remedies = [error.remedy for error in errors]
        remedy = _ARE_RATINGS if _ARE_RATINGS in remedies else remedies[0]
        return cls.of([row for error in errors for row in error.found], total, None, remedy)


def unread(fault: str) -> InvalidRow:
    """Return the error of a row whose line could not be read.

    Args:
        fault: what is wrong with the line, beginning with a verb.

    Example:
        >>> str(unread("has 2 fields in line 5, but 3 columns.").at(3, "train"))
        'Row 3 of the train dataset has 2 fields in line 5, but 3 columns.'
    """
    return InvalidRow(fault, _UNREADABLE)


def list_invalid(found: Sequence[InvalidRow], total: int | None, where: str | None) -> str:
    """Return one text about all invalid rows: at most 20 messages with the starts of prompts, the lines of the others,
    and counts by kind.

    Args:
        found: the errors, in row order. If all are from files, they are listed in the order of each file.
        total: number of rows of the dataset, or None if it is unknown.
        where: name of the dataset, or None for several datasets.

    Example:
        >>> error = InvalidRow("is 'x'; it must be a number.", "label is no number", "label")
        >>> print(list_invalid([error.at(3, "train").at_prompt("Hi")], 4, "train"))
        Row 3 of the train dataset: label is 'x'; it must be a number.
        Its prompt begins: 'Hi'
        >>> print(list_invalid([error.at(row, "train") for row in range(4)], 4, "train"))
        All 4 rows of the train dataset are invalid for the same reason. The first:
          Row 0 of the train dataset: label is 'x'; it must be a number.
    """
    if len(found) == 1:
        return str(found[0]) + (f"\nIts prompt begins: {found[0].prompt!r}" if found[0].prompt else "")
    found = _in_order(found)
    of = "" if total is None else f" of {total:,}"
    of_dataset = "" if where is None else f" of the {where} dataset"
    if total is not None and len(found) == total > _FEW and len({(each.subject, each.fault) for each in found}) == 1:
        prompt = f" Prompt: {found[0].prompt!r}" if found[0].prompt else ""
        return f"All {total:,} rows{of_dataset} are invalid for the same reason. The first:\n  {found[0]}{prompt}"
    lines = [f"{len(found):,}{of} rows{of_dataset} are invalid:"]
    # Both halves of a pair can have the same error, such as an invalid weight
    listed = [f"  {each}" + (f" Prompt: {each.prompt!r}" if each.prompt else "") for each in found[:LISTED]]
    lines += dict.fromkeys(listed)
    if len(found) > LISTED:
        lines.append(f"  … and {len(found) - LISTED:,} more{places(found[LISTED:])}.")
    if len(found) > _COUNTED:
        kinds = Counter(each.kind for each in found)
        lines.append("By kind: " + "; ".join(f"{count:,} × {kind}" for kind, count in kinds.most_common()) + ".")
    return "\n".join(lines)


def places(found: Sequence[InvalidRow]) -> str:
    """Return the lines of at most `PLACES` rows, or "" if they are not all from files.

    Example:
        >>> error = InvalidRow("is None; set it.", "k", "label")
        >>> places([error.at_origin(f"a.csv, line {line}") for line in (3, 7)])
        ': a.csv, lines 3, 7'
        >>> places([error.at_origin(f"a.csv, line {line} (row 2 in a spreadsheet)") for line in (3,)])
        ': a.csv, lines 3 (rows 2 in a spreadsheet)'
    """
    lines: dict[str, dict[str, str]] = {}
    for each in found[:PLACES]:
        if not each.origin:
            return ""
        file, _, line = _SHEET_ROW.sub("", each.origin).rpartition(" ")
        sheet_row = _SHEET_ROW.search(each.origin)
        lines.setdefault(f"{file}s", {})[line] = line if sheet_row is None else sheet_row[1]
    files = []
    for file, numbers in lines.items():
        files.append(f"{file} {', '.join(numbers)}")
        if [*numbers] != [*numbers.values()]:
            files[-1] += f" (rows {', '.join(numbers.values())} in a spreadsheet)"
    return f": {'; '.join(files)}{', …' if len(found) > PLACES else ''}"


def _in_order(found: Sequence[InvalidRow]) -> Sequence[InvalidRow]:
    """Return the errors in the order of the lines of their files, or as they are if they are not all from files."""
    if not all(each.origin for each in found):
        return found
    places = [_SHEET_ROW.sub("", each.origin).rpartition(" ") for each in found]
    files = {file: number for number, file in enumerate(dict.fromkeys(file for file, _, _ in places))}
    keys = [(files[file], int(line)) for file, _, line in places]
    return [found[i] for i in sorted(range(len(found)), key=keys.__getitem__)]


def refuse_invalid(found: Sequence[InvalidRow], total: int | None, where: str) -> None:
    """Raise `InvalidRows`, which lists all invalid rows and what to do; do nothing if there are none."""
    if found:
        is_all = len({each.origin or each.row for each in found}) == total
        remedy = _ARE_RATINGS if look_like_ratings(found, total) else _FIX_ALL if is_all else _FIX
        raise InvalidRows.of(found, total, where, remedy)


def look_like_ratings(found: Sequence[InvalidRow], total: int | None) -> bool:
    """Return whether so many rows have labels that need label_type="continuous" that these are no mistakes.

    Example:
        >>> rating = InvalidRow(f"is 5.0, outside [0, 1]. {NOT_BINARY}", "label outside [0, 1]", "label")
        >>> look_like_ratings([rating] * 3, 29), look_like_ratings([rating] * 3, 30)
        (True, False)
    """
    ratings = sum(each.fault.endswith(NOT_BINARY) for each in found)
    return total is not None and are_ratings(ratings, total)


def are_ratings(outside: int, total: int) -> bool:
    """Return whether three labels or more, and over a tenth of all, are outside [0, 1].

    Fewer can be mistakes. If ratings were left out because they are outside [0, 1], the low ones would stay, and count
    as likes.

    Example:
        >>> are_ratings(3, 29), are_ratings(2, 4)
        (True, False)
    """
    return outside >= 3 and 10 * outside > total
