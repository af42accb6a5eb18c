"""Reads JSON files as rows: an array of objects, one object per line, or consecutive objects."""

import json
import math
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from trl_ulma.data.encodings import encoding_of, opened_text
from trl_ulma.data.unread import Unread

_CHUNK = 1 << 20
_BLANK = " \t\r\n"


class _Fault(ValueError):
    """An error in a value, without its position."""


def json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | Unread]]:
    r"""Yield (line that the row begins in, row). Only one row at a time is in memory.

    If each row is a line, the error of a line that cannot be read is yielded instead of its row.

    Raises:
        ValueError: if the file is not JSON, if a row is not an object, or if an object has a key twice. The message
            begins with a verb and names the line.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        ...     _ = file.write('[{"prompt": "Hi"},\n {"prompt": "Ho"}]'), file.flush()
        ...     list(json_rows(Path(file.name)))
        [(1, {'prompt': 'Hi'}), (2, {'prompt': 'Ho'})]
    """
    encoding = encoding_of(path, takes_cp1252=False)
    with opened_text(path, encoding, newline="\n") as text:
        start, first = 1, text.readline()
        while first and not first.strip():
            start, first = start + 1, text.readline()
        if not first:
            raise ValueError("is empty. It must contain at least one row.")
        try:
            second = text.readline() if _is_cut(first) else ""
            is_next_row = second.lstrip().startswith("{") and not first.rstrip().endswith(("[", ":"))
            if first.lstrip().startswith("[") or (second and not is_next_row):
                yield from _values(text, first + second, start)
            elif second:
                yield from _lines(chain([second], iter(text.readline, "")), first, start)
            else:
                yield from _lines(iter(text.readline, ""), first, start)
        except UnicodeError as error:
            raise ValueError(f"is not {encoding.upper()} text: {error}. Save the file as UTF-8.") from error
        except RecursionError as error:
            raise ValueError("contains lists or objects that are nested too deeply. Check its rows.") from error


def json_text(value: Any) -> str:
    """A value as JSON. NaN is null, dates are ISO text, and what else JSON does not have is as Python prints it.

    Example:
        >>> json_text({"label": float("nan"), "most": [float("inf")]})
        '{"label": null, "most": ["inf"]}'
    """
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, default=_as_text)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def _as_text(value: Any) -> str:
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _is_cut(line: str) -> bool:
    """Whether a line begins an object that is not complete at its end."""
    if not line.lstrip().startswith("{"):
        return False
    try:
        _DECODER.raw_decode(line.strip())
    except json.JSONDecodeError as error:
        return error.pos >= len(line.strip())
    except ValueError:
        pass
    return False


def _lines(others: Iterable[str], line: str, number: int) -> Iterator[tuple[int, dict[str, Any] | Unread]]:
    for each in chain([line], others):
        if each.strip():
            yield number, _row(each, number)
        number += 1


def _row(line: str, number: int) -> dict[str, Any] | Unread:
    try:
        row = _DECODER.decode(line)
    except json.JSONDecodeError as error:
        is_more = error.msg == "Extra data"
        what = "there is text after the object. Write one object per line, without commas between them" * is_more
        return Unread(_broken(number, error.colno, what or error.msg), "invalid JSON")
    except _Fault as error:
        return Unread(f"{error} in line {number}.", "a key twice")
    except ValueError as error:  # a number with thousands of digits
        return Unread(f"is invalid JSON in line {number}: {error}. Correct or remove this row.", "invalid JSON")
    if "\\ud" in line.lower():
        half = _half_pair(row)
        if half:
            return Unread(_no_character(half, f"in line {number}"), "half of a surrogate pair")
    return row if isinstance(row, dict) else Unread(_no_object(line.strip()[:40], number), "no object")


class _Text:
    """A buffer of a file's text from a position on, and the line and column of that position."""

    def __init__(self, text: TextIO, first: str, line: int):
        self.text, self.buffer, self.at = text, first, 0
        self.is_whole = False
        # The line of buffer[self._counted], and the position where it begins
        self._line, self._counted, self._begin = line, 0, 0

    def more(self, size: int = _CHUNK) -> bool:
        """Read more text, and drop the text before the current position. Returns whether there was more."""
        self.place(self.at)
        self.buffer, cut = self.buffer[self.at :], self.at
        self.at, self._counted, self._begin = 0, self._counted - cut, self._begin - cut
        read = self.text.read(size)
        self.buffer += read
        self.is_whole = not read
        return bool(read)

    def next(self) -> str:
        """The next character that is not blank, or "" at the end."""
        while True:
            while self.at < len(self.buffer) and self.buffer[self.at] in _BLANK:
                self.at += 1
            if self.at < len(self.buffer):
                return self.buffer[self.at]
            if not self.more():
                return ""

    def place(self, position: int) -> tuple[int, int]:
        """The (line, column) of a position in the buffer. Positions must not decrease between calls."""
        newlines = self.buffer.count("\n", self._counted, position)
        if newlines:
            self._begin = self.buffer.rindex("\n", self._counted, position) + 1
        self._line, self._counted = self._line + newlines, position
        return self._line, position - self._begin + 1

    def row(self) -> dict[str, Any] | Unread:
        """The object that begins at the current position."""
        if self.buffer[self.at] != "{":
            shown = self.buffer[self.at : self.at + 40].split("\n")[0]
            raise ValueError(_no_object(shown, self.place(self.at)[0]))
        size = _CHUNK
        while True:
            try:
                row, end = _DECODER.raw_decode(self.buffer, self.at)
            except json.JSONDecodeError as error:
                # Whether the object is cut off at the end of the buffer, or invalid before it
                is_cut = error.msg.startswith("Unterminated") or error.pos > len(self.buffer) - 16
                if not is_cut or self.is_whole:
                    raise ValueError(_broken(*self.place(error.pos), error.msg)) from error
                self.more(size)
                size *= 2
                continue
            except _Fault as error:
                raise ValueError(f"{error} in line {self.place(self.at)[0]} or below.") from error
            except ValueError as error:  # a number with thousands of digits
                raise ValueError(f"is invalid JSON in line {self.place(self.at)[0]} or below: {error}.") from error
            half = _half_pair(row) if "\\ud" in self.buffer[self.at : end].lower() else None
            if half:
                place = f"in line {self.place(self.at)[0]} or below"
                row = Unread(_no_character(half, place), "half of a surrogate pair")
            self.at = end
            return row


def _half_pair(value: Any) -> str | None:
    """Half of a surrogate pair in the texts of a value, as in a text that is cut inside an emoji, or None."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return error.object[error.start]
    return None


def _no_character(half: str, where: str) -> str:
    return (
        f"has half of a surrogate pair (\\u{ord(half):04x}) {where}, which is not a character. Correct or remove this "
        "row."
    )


def _values(text: TextIO, first: str, line: int) -> Iterator[tuple[int, dict[str, Any] | Unread]]:
    """Yield the values of an array, or consecutive values. Only the current value is in memory."""
    source = _Text(text, first, line)
    is_array = source.next() == "["
    source.at += is_array
    is_first = True
    while True:
        character = source.next()
        if not character:
            if is_array:
                raise ValueError(_broken(*source.place(source.at), "the array is not closed"))
            return
        if is_array and character == "]":
            break
        if is_array and not is_first:
            if character != ",":
                raise ValueError(_broken(*source.place(source.at), "Expecting ',' delimiter"))
            source.at += 1
            if source.next() in ("", "]"):
                raise ValueError(_broken(*source.place(source.at), "Expecting value"))
        at = source.place(source.at)[0]
        yield at, source.row()
        is_first = False
    source.at += 1
    if source.next():
        raise ValueError(_broken(*source.place(source.at), "there is text after the end of the array"))


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Fault(f"has an object with the key {next(name for name in names if names.count(name) > 1)!r} twice")
    return found


def _no_object(shown: str, line: int) -> str:
    return f"has {shown!r} in line {line}; each row must be an object with the columns of the row."


def _broken(line: int, column: int, message: str) -> str:
    return f"is invalid JSON in line {line}, column {column}: {message}. Correct or remove this row."


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs)
