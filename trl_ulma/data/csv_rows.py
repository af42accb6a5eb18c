"""Reads CSV and TSV files as rows of text. Every field is read exactly, or an error names its line."""

import csv
import re
import string
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from trl_ulma.data.columns import DELIMITERS, THOUSAND_COMMA, number
from trl_ulma.data.encodings import encoding_of, opened_text
from trl_ulma.data.unread import Unread
from trl_ulma.labels import DECIMAL_COMMA

# The ids of questions, in the last of the three header lines of Qualtrics
_IMPORT_ID = re.compile(r"""\{\s*['"]ImportId['"]\s*:""")
# In the second header line of SurveyMonkey, below questions that are answered with text or a single choice
_SURVEY_MONKEY = frozenset(("Response", "Open-Ended Response"))
_LINE_ENDS = re.compile(r"[\r\n]+")
# By default, csv rejects fields of more than 131,072 characters, but long answers can have more
LONGEST_FIELD = 2**31 - 1


def csv_rows(
    path: Path, known: Collection[str] = (), notice: Callable[[str], None] | None = None
) -> Iterator[tuple[int, dict[str, str] | Unread]]:
    r"""Yield (line that the row begins in, column → text of the field), according to RFC 4180.

    If a row has more or fewer fields than the first line, or is a header again, the error is yielded instead. The
    second and third header line of Qualtrics, and rows of empty fields, are left out, and `notice` is called.

    The encoding and the delimiter are detected. If they are not UTF-8 and a comma, `notice` is called.

    Args:
        path: the file. Its first line names the columns.
        known: known column names, which help to detect the delimiter: comma, semicolon, tab or vertical bar.
        notice: called with each finding.

    Raises:
        ValueError: if a quote is not closed, or if a known column name appears twice. The message begins with a verb
            and names the line.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile("w", suffix=".csv") as file:
        ...     _ = file.write('prompt;completion\nHi;"Hello;\nyou"\n'), file.flush()
        ...     list(csv_rows(Path(file.name)))
        [(2, {'prompt': 'Hi', 'completion': 'Hello;\nyou'})]
    """
    encoding = encoding_of(path, takes_cp1252=True)
    delimiter, is_declared = _delimiter(path, encoding, known)
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_FIELD))
    line = 1
    try:
        with opened_text(path, encoding, newline="") as text:
            ends: list[str] = ["", ""]  # the ends of the first line and of the last line read

            def numbered() -> Iterator[str]:
                for each in text:
                    ends[1] = each[-2:]
                    yield each

            reader = csv.reader(numbered(), delimiter=delimiter, strict=True)
            names: list[str] = []
            header: list[str] = []
            held: tuple[int, dict[str, str] | Unread] | None = None  # can be the questions of Qualtrics
            rows = 0  # since the last header
            blank = 0  # the first line of a row of empty fields
            swallowing = 0  # the first line in which a field seems to contain another row
            for fields in reader:
                start, line = line, reader.line_num + 1
                # A single carriage return ends all lines of a file, or is part of a field without quotes
                if names and ends[1].endswith("\r") and not ends[0].endswith("\r"):
                    raise ValueError(
                        f"has a carriage return outside of double quotes in line {start}. Put the field that contains "
                        "it in double quotes."
                    )
                if not fields or (is_declared and start == 1):  # a blank line, or Excel's `sep=;`
                    continue
                if not names:
                    names, ends[0] = _names(fields, start, known, notice), ends[1]
                    header = [_name(name) for name in fields]
                    if notice is not None:
                        if encoding not in ("utf-8", "utf-8-sig"):
                            notice(f"the file is read as {encoding.upper().replace('CP', 'cp')}")
                        if delimiter != ("\t" if ".tsv" in path.name.lower() else ","):
                            notice(f"the fields are separated by {DELIMITERS[delimiter]}")
                    continue
                if notice is not None and _swallows(fields, len(names), delimiter):
                    swallowing = swallowing or start
                    notice(f"a field in quotes contains the end of a row, as in line {swallowing}: a quote is missing")
                if notice is not None and not any(fields):  # as Excel writes below the last row
                    blank = blank or start
                    notice(f"rows whose fields are all empty, as in line {blank}, are left out")
                    continue
                is_ids = any(fields) and all(_IMPORT_ID.match(field) for field in fields if field)
                if is_ids and rows <= 1 and notice is not None:
                    lines = f"lines {held[0]} and {start} are headers" if held and rows else f"line {start} is a header"
                    notice(f"{lines} of Qualtrics, and left out")
                    held = held if not rows else None
                    continue
                if held is not None:
                    yield held
                rows += 1
                if _name(fields[0]) == header[0] and [_name(field) for field in fields] == header:
                    rows = 0
                    fault = f"repeats the names of the columns in line {start}, as in joined files. Remove it."
                    held = start, Unread(fault, "names of columns")
                elif is_ids:
                    fault = f"is a header of Qualtrics in line {start}. Remove it, and the questions of its file."
                    held = start, Unread(fault, "header of Qualtrics")
                elif rows == 1 and (program := _second_header(fields, header)):
                    fault = f"has a second header of {program} in line {start}. Remove it."
                    held = start, Unread(fault, f"header of {program}")
                elif len(fields) == len(names):
                    held = start, dict(zip(names, fields, strict=True))
                else:
                    held = start, _ragged(start, fields, names, delimiter)
            if held is not None:
                yield held
    except csv.Error as error:
        raise ValueError(
            f"is invalid CSV in line {line}: {error}. Put each field that contains {_shown(delimiter)}, a quote or a "
            'line break in double quotes, and write each quote inside it twice ("").'
        ) from error
    except UnicodeError as error:
        raise ValueError(
            f"is not {encoding.upper()} text after line {line}: {error}. Save the file as UTF-8."
        ) from error


def delimiter_of(path: Path, known: Collection[str] = ()) -> str:
    r"""The delimiter that `csv_rows` reads a file with.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile("w", suffix=".csv") as file:
        ...     _ = file.write("prompt;completion\n"), file.flush()
        ...     delimiter_of(Path(file.name))
        ';'
    """
    return _delimiter(path, encoding_of(path, takes_cp1252=True), known)[0]


@dataclass(frozen=True)
class Layout:
    """How a program writes CSV files.

    Attributes:
        delimiter: between fields.
        decimal: the mark in numbers, a point or a comma.
        has_mark: whether a UTF-8 file needs a byte order mark, because the program does not expect UTF-8.
    """

    delimiter: str = ","
    decimal: str = "."
    has_mark: bool = False

    @classmethod
    def of(cls, path: Path, numbers: Collection[str] = (), known: Collection[str] = ()) -> "Layout":
        r"""The layout of a file for the program that wrote it. Tabs become commas, unless the file ends in `.csv`.

        Where semicolons separate fields, the first decimal in a column of numbers decides on the mark. If there is
        none, it is a comma, because Excel writes semicolons where commas are decimal marks.

        Args:
            path: the file.
            numbers: the columns of numbers.
            known: as in `csv_rows`.

        Example:
            >>> import tempfile
            >>> with tempfile.NamedTemporaryFile("w", suffix=".csv") as file:
            ...     _ = file.write("prompt;label\nHi;4,5\n"), file.flush()
            ...     Layout.of(Path(file.name), ["label"])
            Layout(delimiter=';', decimal=',', has_mark=False)
        """
        encoding = encoding_of(path, takes_cp1252=True)
        delimiter, decimal = _delimiter(path, encoding, known)[0], "."
        if delimiter == ";":
            rows = (row for _, row in csv_rows(path, known, lambda what: None) if isinstance(row, dict))
            fields = (row[name].strip() for row in rows for name in numbers if name in row)
            commas = DECIMAL_COMMA, THOUSAND_COMMA  # a file with a comma of thousands cannot be read
            marks = (
                "," if any(comma.fullmatch(each) for comma in commas) else "."
                for each in fields
                if re.search(r"\d[.,]\d", each)
            )
            decimal = next(marks, ",")
        return cls("," if ".tsv" in path.name.lower() else delimiter, decimal, encoding != "utf-8")


def _delimiter(path: Path, encoding: str, known: Collection[str]) -> tuple[str, bool]:
    """The delimiter, and whether the first line declares it, as in `sep=;`.

    If not, it is the one that splits the first line into the most known names, or else into the most names.
    """
    with opened_text(path, encoding, newline="") as text:
        try:
            first = "".join(islice((line for line in text if line.strip()), 1))
        except UnicodeError as error:
            raise ValueError(f"is not {encoding.upper()} text: {error}. Save the file as UTF-8.") from error

    declared = re.fullmatch(r'"?sep=([,;|\t])"?\s*', first)
    if declared is not None:
        return declared[1], True

    def names(delimiter: str) -> tuple[int, int]:
        try:
            fields = [_name(name) for name in next(csv.reader([first], delimiter=delimiter), [])]
        except csv.Error:
            return 0, 0
        return len(set(fields).intersection(known)) if len(fields) > 1 else 0, len(fields)

    own_first = sorted(DELIMITERS, key=lambda delimiter: delimiter == "\t", reverse=".tsv" in path.name.lower())
    return max(own_first, key=names), False  # the first one if several are equally good


def _names(fields: list[str], line: int, known: Collection[str], notice: Callable[[str], None] | None) -> list[str]:
    if fields[0].lstrip().startswith(("{", "[")):
        raise ValueError(f"looks like JSON and not like CSV in line {line}. Name the file .jsonl or .json.")
    names = [_name(name) or f"unnamed {place}" for place, name in enumerate(fields)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if notice is not None and twice and not set(twice) & set(known):
        notice(f"several columns are named {', '.join(twice)}, and get numbers after their names")
        counts: Counter[str] = Counter()
        for place, name in enumerate(names):
            counts[name] += 1
            names[place] = f"{name} {counts[name]}" if name in twice else name
        twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"names the column {', '.join(twice)} twice in line {line}. Give each column its own name.")
    return names


def _name(field: str) -> str:
    """The name of a column without spaces and invisible characters around it."""
    return field.strip(f"{string.whitespace}\N{NO-BREAK SPACE}\N{ZERO WIDTH SPACE}\N{ZERO WIDTH NO-BREAK SPACE}")


def _second_header(fields: list[str], header: list[str]) -> str:
    """The program that wrote a header of two lines, of which this is the second one. "" for other rows."""
    # Such as "Start Date" below StartDate
    if sum(" " in each and each.replace(" ", "") == name for each, name in zip(fields, header, strict=False)) > 1:
        return "Qualtrics"
    found = _SURVEY_MONKEY.intersection(map(_name, fields))
    return "SurveyMonkey" if found and (not fields[0] or _SURVEY_MONKEY.issuperset(filter(None, fields))) else ""


def _swallows(fields: list[str], columns: int, delimiter: str) -> bool:
    """Whether a field with line breaks looks like the rest of a row, whole rows, and the start of a row.

    All these rows must have numbers in the same columns. Rows of text need a whole row between the first and the last,
    because a text can have as many commas by chance. Prose has spaces after its commas.
    """
    for place, field in enumerate(fields):
        first, is_more, _ = field.partition("\n")
        if not is_more or place + first.count(delimiter) + 1 != columns:
            continue
        lines = [line.split(delimiter) for line in _LINE_ENDS.split(field)]
        rows = [fields[:place] + lines[0], *lines[1:-1], lines[-1] + fields[place + 1 :]]
        if any(len(row) != columns for row in rows) or any(part[:1] == " " for line in lines for part in line[1:]):
            continue
        kinds = [{number(cell) is not None for cell in column if cell.strip()} for column in zip(*rows, strict=True)]
        if all(len(kind) < 2 for kind in kinds) and columns > 1 and ({True} in kinds or min(columns, len(rows)) > 2):
            return True
    return False


def _ragged(line: int, fields: list[str], names: list[str], delimiter: str) -> Unread:
    """The error of a line with a wrong number of fields."""
    remedy = (
        f"Put each field that contains {_shown(delimiter)} in double quotes, without a space before them"
        if len(fields) > len(names)
        else f"Write {_shown(delimiter)} also for empty fields, and put fields with line breaks in double quotes"
    )
    more = len(fields) - len(names)
    if more > 0 and names[0].startswith("#") and (len(names) == 1 or " " in names[0]):
        remedy = f"The first line looks like a comment, and not like the names of the columns: {names[0]!r}. Remove it"
    elif more > 0 and not any(fields[-more:]):
        ends = f"the {more} delimiters" if more > 1 else _shown(delimiter).replace("a ", "the ")
        remedy = (
            f"If the line ends with empty fields, remove {ends} at its end, or add as many to the first line. If not, "
            f"put each field that contains {_shown(delimiter)} in double quotes"
        )
    elif more == 1 and fields[0].isdecimal():
        remedy += (
            f". If each line begins with its number, name that column: write number{delimiter} before the first line"
        )
    elif more == -1 and names[-1].startswith("unnamed "):
        remedy += f". If no line has a last field, remove {_shown(delimiter)} at the end of the first line"
    count = f"{len(fields)} field{'s' * (len(fields) > 1)}"
    return Unread(
        f"has {count} in line {line}, but {len(names)} columns ({', '.join(names)}). The fields of the line are "
        f"{' | '.join(field if len(field) <= 30 else field[:30] + '…' for field in fields[:6])}. {remedy}.",
        count,
    )


def _shown(delimiter: str) -> str:
    return {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a vertical bar"}[delimiter]
