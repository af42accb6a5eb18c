"""Opens text files, gzipped or not, and detects their encoding."""

import codecs
import gzip
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO, cast

_CHUNK = 1 << 20
# Longest first, because the mark of UTF-32 begins with that of UTF-16
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# The first bytes of files that are not text, and what to do
_NO_TEXT = (
    (b"PK\x03\x04", "a zip archive or an Excel file. Save the sheet as CSV, or unzip the archive."),
    (b"\xd0\xcf\x11\xe0", "an Excel file. Save the sheet as CSV."),
    (b"\x1f\x8b", "a gzip file. Add .gz to its name."),
    (b"PAR1", "a Parquet file. Name it .parquet."),
    (b"BZh", "a bzip2 file. Unpack it."),
    (b"\xfd7zXZ\x00", "an xz file. Unpack it."),
    (b"\x28\xb5\x2f\xfd", "a Zstandard file. Unpack it."),
    (b"<!doctype html", "an HTML page, such as one that asks you to log in. Download the file itself."),
    (b"<html", "an HTML page, such as one that asks you to log in. Download the file itself."),
)
# Letters outside ASCII stand alone or in pairs in Western languages, but make up whole words in other scripts
_LETTERS = re.compile("[\udca1-\udcff]")
_FOREIGN = re.compile("[\udca1-\udcff]{4,}")
# Between two small letters, cp1252 has a small letter. In the encodings of old Macs and of DOS, it is one of the other
# bytes, which are signs or capitals in cp1252.
_SMALL = re.compile("[a-z][\udcdf-\udcff][a-z]")
_NOT_SMALL = re.compile("[a-z][\udc80-\udc84\udc86-\udc90\udc98\udc99\udc9b\udc9d\udc9f][a-z]")

# Words that other code pages of Europe write with bytes that are signs in cp1252, or letters that its languages do not
# have there. It does not match sin³x, cm³, 1ºC, nº, mot¹, £100, ¿Qué?, a±b and one¶two.
_S, _END = "[a-z\udcdf-\udcff]", "(?![\\w\udc80-\udcff])"
_CENTRAL = re.compile(
    "|".join(
        (
            f"{_S}[\udcaf\udcbc\udcbe]{_S}",  # ź and ž
            f"(?!n){_S}\udcba{_S}",  # ş
            f"{_S}{{2}}\udcb9{_S}|{_S}\udcb9{_S}{{2}}",  # ą and š
            "[A-Z\udcdf-\udcffa-z][aeiouybdgkpwz]\udcb3[aeiouy]",  # ł, which is also at the start
            f"(?<![\\w\udc80-\udcff)\\]])\udcb3[aeiouy\udcf3]{_S}",
            f"{_S}[\udcb1\udcb3\udcb6\udcb9\udcbc\udcbf]{{2}}{_S}",  # ąż
            f"{_S}[\udc9f\udcbc\udcfe]{_END}|{_S}{{2}}\udcf5{_END}",  # ź, ş and ő at the end
            "[\udcd8\udcf8][\udcec\udced]|[\udcec\udced]\udcf8|\udce8[aiou]",  # ří, ře, íř, ěř and či
        )
    )
)
# Polish ż is ¿ in cp1252, before which a space can be missing in Spanish
_QUESTION = re.compile(f"{_S}\udcbf{_S}")


def encoding_of(path: Path, *, takes_cp1252: bool) -> str:
    """The encoding of a text file: that of its byte order mark, UTF-8, UTF-16 without a mark, or cp1252.

    Args:
        path: the file. It is gzipped if its name ends in `.gz`.
        takes_cp1252: whether bytes that are not UTF-8 can be cp1252, the encoding of Windows programs in Western
            languages.

    Raises:
        ValueError: if the file is in none of these encodings. The message begins with "is" and names the line.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile(suffix=".csv") as file:
        ...     _ = file.write("café".encode("cp1252")), file.flush()
        ...     encoding_of(Path(file.name), takes_cp1252=True)
        'cp1252'
    """
    with opened(path) as file:
        head = file.read(_CHUNK)
        for start, remedy in _NO_TEXT:
            if head.startswith(start) or (start[:1] == b"<" and head.lstrip().lower().startswith(start)):
                raise ValueError(f"is {remedy}")
        for mark, encoding in _MARKS:
            if head.startswith(mark):
                return encoding
        zeros = [head[start::2].count(0) for start in (0, 1)]
        if sum(zeros) > len(head) // 4:  # in UTF-16, every other byte of English text is 0
            return "utf-16-le" if zeros[1] > zeros[0] else "utf-16-be"
        # A byte that is not UTF-8 becomes a lone surrogate. Any other character above 127 has several bytes.
        decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        strange, is_utf8_elsewhere, lines = None, False, 1
        letters = foreign = small = not_small = central = 0
        chunk = head
        while True:
            text = decoder.decode(chunk, final=not chunk)
            if not text.isascii():
                for line in text.splitlines(keepends=True) if strange is None else ():
                    found = next((c for c in line if "\udc80" <= c <= "\udcff"), None)
                    if found is not None:
                        strange = (ord(found) - 0xDC00, lines)
                        break
                    lines += line.endswith("\n")
                if strange is not None:
                    letters += len(_LETTERS.findall(text))
                    foreign += sum(map(len, _FOREIGN.findall(text)))
                    small += len(_SMALL.findall(text))
                    not_small += len(_NOT_SMALL.findall(text))
                    words = " ".join(word for word in text.split() if not word.isascii())
                    central += 100 * len(_CENTRAL.findall(words)) + 4 * len(_QUESTION.findall(words))
                is_utf8_elsewhere = is_utf8_elsewhere or any(c > "\x7f" and not "\udc80" <= c <= "\udcff" for c in text)
            elif strange is None:
                lines += text.count("\n")
            if not chunk:
                break
            chunk = file.read(_CHUNK)
    if strange is None:
        return "utf-8"
    is_other = 2 * foreign > letters or not_small > small or central > letters
    if is_utf8_elsewhere or not takes_cp1252 or is_other:
        raise ValueError(f"is not UTF-8 text: byte 0x{strange[0]:02x} in line {strange[1]}. Save the file as UTF-8.")
    return "cp1252"


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file for its bytes. It is unzipped if its name ends in `.gz`."""
    with path.open("rb") as raw:
        if path.suffix.lower() == ".gz":
            with gzip.open(raw) as unzipped:
                yield cast("BinaryIO", unzipped)
        else:
            yield raw


@contextmanager
def opened_text(path: Path, encoding: str, newline: str) -> Iterator[TextIO]:
    """Open a file for its text, like `open`. Gzipped files are unzipped."""
    with opened(path) as file, io.TextIOWrapper(file, encoding=encoding, newline=newline) as text:
        yield text
