"""Lines of files that cannot be read as rows. The other lines of the file can still be read."""

from dataclasses import dataclass

# The column with the error of a line, in rows that only have this value
UNREAD = "unread_line"


@dataclass(frozen=True)
class Unread:
    """A line that cannot be read.

    Attributes:
        message: begins with a verb, names the line, and says what to do.
        found: the fault in a few words.
    """

    message: str
    found: str
