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
    (file, _, first), *others = lines
    if not others:
        return f"{file} {first.message}"
    shown = ", ".join(
        f"{line if other == file else f'line {line} of {other}'} ({fault.found})"
        for other, line, fault in others[:_LISTED]
    )
    more = f" and {len(others) - _LISTED:,} more" if len(others) > _LISTED else ""
    return f"{file} {first.message} These lines cannot be read either: {shown}{more}."
