"""Lines of files that cannot be read as rows. The other lines of the file can still be read."""

from collections.abc import Sequence
from dataclasses import dataclass

# The column with the error of a line, in rows that only have this value
UNREAD = "unread_line"
# The number of lines that an error lists besides the first one
_LISTED = 20


@dataclass(frozen=True)
class Unread:
    """A line that cannot be read.

    Attributes:
        message: begins with a verb, names the line, and says what to do.
        found: the fault in a few words.
    """

    message: str
    found: str


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
    (file, line, first), *others = lines
    there = _in_sheet(file, line)
    message = first.message.replace(f"in line {line}", f"in line {line} ({there})", 1) if there else first.message
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
    from trl_ulma.data.sheet_rows import with_sheet_row  # imported here, because it imports the reader

    place = f"{file}, line {line}"
    return with_sheet_row(place).removeprefix(place).strip(" ()")
