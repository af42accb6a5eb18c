"""The columns that trainers read: their values, and the meaning of labels."""

import ast
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal
from functools import cache
from types import MappingProxyType
from typing import Any

from trl_ulma.data.unread import UNREAD
from trl_ulma.labels import DECIMAL_COMMA, is_messages, worded_number

TEXTS = ("prompt", "completion", "chosen", "rejected")
NUMBERS = ("label", "weight", "log_z", "trials")
BOOLS = ("sft_mask", "eos")
OTHERS = (*BOOLS, "label_type", "rater", "tools", "chat_template_kwargs", "image", "images", UNREAD)
READ = (*TEXTS, *NUMBERS, *OTHERS)
# Columns that can be JSON text in a CSV file
CONVERSATIONS = (*TEXTS, "messages", "conversations", "conversation_a", "conversation_b", "answers", "completions")

_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
# What spreadsheets write in place of a cell that they could not compute or show, in English, German, French, Spanish,
# Italian, Portuguese, Dutch, Polish and Russian. #NAME? can have been an answer such as "- Yes"
_SHEET_ERROR = re.compile(
    r"#(?:N/A|NV|N/D!?|N/B|Н/Д|DIV/0!|¡DIV/0!|DEEL/0!|DZIEL/0!|ДЕЛ/0!|GETTING_DATA|"
    r"(?:NAME|NOM|¿NOMBRE|NOME|NAAM|NAZWA|ИМЯ)\?|"
    r"(?:VALUE|WERT|VALEUR|¡VALOR|VALORE|VALOR|WAARDE|ARG|ЗНАЧ|REF|BEZUG|¡REF|RIF|VERW|ADR|ССЫЛКА|"
    r"NUM|ZAHL|NOMBRE|¡NUM|NÚM|GETAL|LICZBA|ЧИСЛО|NULL|NUL|¡NULO|NULLO|NULO|LEEG|ZERO|ПУСТО|"
    r"SPILL|ÜBERLAUF|PROPAGATION|¡DESBORDAMIENTO|ESPANSIONE|OVERLOOP|CALC|KALK|¡CALC|"
    r"ERROR|BLOCKED|CONNECT|FIELD|UNKNOWN|BUSY|EXTERNAL|PYTHON)!)|#{5,}|Err:5\d\d|Loading\.\.\."
)
# What exports write around or before a text so that a spreadsheet does not take it for a number or a formula
_GUARD = re.compile(r"""="(?:[^"]|"")*"|'[=+\-@\t\r].*""", re.DOTALL)
_GUARDED_NUMBER = re.compile(r"""="([^"]*)"|'([^']*)""")
# The replacement character, and UTF-8 of letters and of typographic quotes that was read as cp1252
_MOJIBAKE = re.compile("\ufffd|Ã[\u00a0-\u00bf]|â€[\u0090-\u00ff\u2000-\u2122œž]")
# At the start of a text, a byte order mark is left from a file that was appended
_CONTROL = re.compile("^\ufeff|[\\x00-\\x08\\x0e-\\x1f\\x7f]")
# As web pages write these characters: text that was copied or exported from one
_ENTITY = re.compile("&(?:amp|quot|apos|nbsp|#0?39|#x27|#34);")
# A control character as Excel files hold it, such as a carriage return
_EXCEL = re.compile("_x000[0-9A-F]_")
# The characters themselves, because Arrow does not read \u in a pattern
ODD_TEXT = f"{_MOJIBAKE.pattern}|{_CONTROL.pattern}|{_ENTITY.pattern}|{_EXCEL.pattern}"
LIST = re.compile(r"\s*\[\s*\{")  # the beginning of a list of objects that is stored as text
_LONGEST_CELL = 32_767  # of Excel
# A missing value → the programs that print it so
MISSING = {"nan": "pandas prints", "<NA>": "pandas prints", "NaT": "pandas prints", r"\N": "databases export"}
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
# A whole number with a comma between thousands, or a number with three decimals
THOUSAND_COMMA = re.compile(r"[+-]?[1-9]\d{0,2},\d{3}", re.ASCII)
_DIGITS = 18  # all numbers with so many digits fit into 64 bits
_FLOAT_BITS = 1024  # larger whole numbers do not fit into a float
_WORDS = {"true": True, "false": False}

# Called with a message, and with the value if the message does not show it
Notice = Callable[..., None]
# How many of the values that it is called with are shown
_SHOWN = 3

logger = logging.getLogger(__name__)


def number(text: str) -> bool | int | float | None:
    """A text as a number or bool. None if it is neither.

    Example:
        >>> number("4"), number(" 0.5"), number("True"), number("4 stars"), number("nan")
        (4, 0.5, True, None, None)
    """
    text = text.strip().replace("\N{MINUS SIGN}", "-")
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if _NUMBER.fullmatch(text) is None:
        return None
    if text.lstrip("+-").isdecimal():
        return int(text) if len(text) <= _DIGITS else None
    return float(text)


def read_value(
    name: str, value: Any, notice: Notice, *, delimiter: str | None = None, theirs: str | None = None
) -> Any:
    """A value of a column, converted to the type that trainers read.

    Values that cannot be converted are returned unchanged, and trainers raise an error for them.

    Args:
        name: the name of the column.
        value: the value in the file.
        notice: called with a message if the value was converted, and also with the value if it was read as another one.
        delimiter: of the CSV file that the value is a field of, or None. CSV files store all values as text.
        theirs: the name of the column in the file, for messages; None if it is the same.

    Example:
        >>> read_value("label", "4", print)
        label: numbers that are stored as text are converted to numbers
        4
        >>> read_value("sft_mask", 1, print), read_value("completion", "4", print), read_value("label", "up", print)
        (True, '4', 'up')
        >>> read_value("label", "4,5", print, delimiter=";")
        label: decimal commas are read as decimal points, because semicolons separate the fields
        4.5
        >>> read_value("label", "5 Stars", print)
        label: numbers with a unit, such as '4 stars', are read as numbers 5 Stars
        5
    """
    is_cell, theirs = delimiter is not None, theirs or name
    if is_cell and isinstance(value, str) and not value.strip() and name in (*NUMBERS, *OTHERS):
        return None
    if name in TEXTS and isinstance(value, str) and not value.isascii() and _MOJIBAKE.search(value):
        notice(
            f"{theirs}: texts were decoded wrongly before, because they contain characters such as � or Ã©. Export "
            "them again as UTF-8"
        )
    if name in TEXTS and isinstance(value, str) and (control := _CONTROL.search(value)):
        notice(f"{theirs}: texts contain control characters, such as {control[0]!r}. Remove them")
    if name in TEXTS and isinstance(value, str) and "&" in value and (entity := _ENTITY.search(value)):
        notice(f"{theirs}: texts contain characters as HTML. Unescape them, unless the texts are about HTML", entity[0])
    if name in TEXTS and isinstance(value, str) and "_x" in value and (control := _EXCEL.search(value)):
        notice(
            f"{theirs}: texts contain {control[0]}, as Excel stores a control character. Replace it with the character"
        )
    if is_cell and name in TEXTS and isinstance(value, str) and _SHEET_ERROR.fullmatch(value.strip()):
        notice(
            f"{theirs}: cells that are errors of a spreadsheet, such as {value.strip()}, are read as text. Restore them"
        )
    if is_cell and name in TEXTS and isinstance(value, str) and _GUARD.fullmatch(value):
        sign = '="…"' if value[0] == "=" else f"an apostrophe before {value[1]}"
        notice(
            f"{theirs}: cells have {sign}, which exports write so that a spreadsheet takes no text for a formula, and "
            "which is read as text. Remove it",
            value[:20],
        )
    if is_cell and name in TEXTS and isinstance(value, str) and len(value) == _LONGEST_CELL:
        notice(f"{theirs}: texts have exactly {_LONGEST_CELL:,} characters, after which Excel cuts a cell", value[:20])
    if name in TEXTS and isinstance(value, str) and value in MISSING:
        notice(f"{theirs}: texts that are only {value}, as {MISSING[value]} a missing value. Remove these rows")
    if name in CONVERSATIONS and isinstance(value, str) and LIST.match(value):
        found = parsed_list(value)
        # An answer can be a list of other objects, as text
        if found is not None and (is_messages(found) or (is_cell and name not in TEXTS)):
            notice(f"{theirs}: lists that are stored as text are converted to lists")
            return found
    if name in NUMBERS or name in BOOLS:
        if isinstance(value, str):
            found = number(value)
            if found is None and is_cell and (guarded := _GUARDED_NUMBER.fullmatch(value.strip())):
                found = number(guarded[1] or guarded[2] or "")
                if found is not None:
                    notice(
                        f'{theirs}: numbers that exports guard, as in \'-1 and ="4", are read without the guard', value
                    )
            is_comma = DECIMAL_COMMA.fullmatch(value.strip()) or (
                name in NUMBERS and THOUSAND_COMMA.fullmatch(value.strip())  # `FileRows.check_points` refuses thousands
            )
            if found is None and is_comma and delimiter not in (None, ","):
                separated = f"{DELIMITERS[delimiter]} separate the fields"
                notice(f"{theirs}: decimal commas are read as decimal points, because {separated}")
                found = float(value.replace(",", "."))
            if found is None and name == "label" and (named := worded_number(value)):
                example = f"with a unit, such as '4 {named[1]}'" if named[1] else "in words, such as 'four'"
                notice(f"{theirs}: numbers {example}, are read as numbers", value)
                found = number(named[0])
            elif found is not None and not is_cell:
                notice(f"{theirs}: numbers that are stored as text are converted to numbers")
            value = value if found is None else found
        elif isinstance(value, int) and abs(value) >= 2**63 and value.bit_length() < _FLOAT_BITS:
            notice(f"{theirs}: whole numbers of more than 64 bits are rounded to floats")
            value = float(value)
        elif isinstance(value, Decimal):
            value = int(value) if value == value.to_integral_value() else float(value)
    if name in BOOLS and isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    return value


def parsed_list(text: str) -> list[Any] | None:
    """A list of objects that is stored as text, as JSON or as Python prints it. None for other texts.

    Example:
        >>> parsed_list("[{'role': 'user'}]"), parsed_list("[1]")
        ([{'role': 'user'}], None)
    """
    for parse in (json.loads, ast.literal_eval):  # json.dumps or repr wrote the list
        try:
            found = parse(text)
        except (MemoryError, RecursionError, SyntaxError, TypeError, ValueError):
            continue
        return found if isinstance(found, list) and all(isinstance(each, dict) for each in found) else None
    return None


# Class names whose usual numbers are 0 for the worse class and 1 for the better one
_ORDERED = (
    *(("no", "yes"), ("false", "true"), ("bad", "good"), ("negative", "positive"), ("neg", "pos")),
    *(("dislike", "like"), ("disliked", "liked"), ("down", "up"), ("rejected", "chosen"), ("unsafe", "safe")),
)


def class_labels(names: Sequence[str]) -> list[float]:
    """The label of each class of a `datasets.ClassLabel`: its name if it is a number, or 0 and 1 for known words.

    Raises:
        ValueError: if it is unknown which class is better. The message begins with "has".

    Example:
        >>> class_labels(["5", "1"]), class_labels(["bad", "good"])
        ([5.0, 1.0], [0.0, 1.0])
    """
    numbers = [number(name) for name in names]
    known = [float(each) for each in numbers if each is not None]
    if len(known) == len(names):
        return known
    if tuple(name.strip().lower() for name in names) in _ORDERED:
        return [0.0, 1.0]
    raise ValueError(
        f"has labels of the classes {', '.join(names)}, and their numbers do not say which is better. Map them to "
        f"numbers: label_map {','.join(f'{name}=…' for name in names)}"
    )


def class_of(number: Any, classes: Sequence[Any]) -> Any:
    """The class of a number in a column of the type `datasets.ClassLabel`. A number below 0 is no class.

    Example:
        >>> class_of(1, ["bad", "good"]), class_of(-1, ["bad", "good"])
        ('good', None)
    """
    return None if number is None or number < 0 else classes[number]


class Truths:
    """Finds thumbs among ratings, if the rows have no `label_type`: labels true and false, which count as 1 and 0, and
    files with only 0 and 1 beside files with ratings.

    Args:
        column: the name of the column in the file, for the message.

    Attributes:
        found: messages about labels true and false, and the number of such labels.
        sources: messages about files with only 0 and 1, and the number of their labels.

    Example:
        >>> truths = Truths()
        >>> for label in (True, 5):
        ...     truths.add({"label": label})
        >>> list(truths.found.values())
        [1]
    """

    _ENOUGH = 20  # ratings of a file can be 0 and 1 by chance

    def __init__(self, column: str = "label") -> None:
        self.column = column
        self._count = 0
        self._rating: int | float | None = None
        # source → the number of its labels 0, of 1, and of others
        self._numbers: dict[str, list[int]] = {}

    def add(self, row: Mapping[str, Any], source: str = "") -> None:
        """Look at one more row of a file."""
        label = row.get("label")
        if row.get("label_type") is not None:
            return
        if isinstance(label, bool):
            self._count += 1
        elif isinstance(label, int | float):
            self._numbers.setdefault(source, [0, 0, 0])[0 if label == 0 else 1 if label == 1 else 2] += 1
            if self._rating is None and (label < 0 or label > 1):
                self._rating = label

    @property
    def found(self) -> dict[str, int]:
        """See the class."""
        if not self._count or self._rating is None:
            return {}
        return {
            f"{self.column}: true and false stand among ratings such as {self._rating:g}, and count as 1 and 0. If "
            "they are likes and dislikes, add a column label_type, with binary for them and continuous for "
            "ratings": self._count
        }

    @property
    def sources(self) -> dict[str, int]:
        """See the class."""
        if self._rating is None:
            return {}
        return {
            f"{self.column}: {source} has only 0 and 1, beside ratings such as {self._rating:g} elsewhere. If they are "
            "likes and dislikes, add a column label_type, with binary for them and continuous for ratings": zeros + ones
            for source, (zeros, ones, others) in self._numbers.items()
            if zeros and ones and not others and zeros + ones >= self._ENOUGH
        }


class Shown(dict[str, list[str]]):
    """The first values of some findings, with their places.

    Example:
        >>> shown = Shown()
        >>> shown.add("label: numbers with a unit", "4 stars", "line 2")
        >>> shown
        {'label: numbers with a unit': ["'4 stars' in line 2"]}
    """

    def add(self, what: str, value: str, place: str | Callable[[], str]) -> None:
        """Keep a value, if it is one of the first. A place that takes time to find is a function, called only then."""
        if len(first := self.setdefault(what, [])) < _SHOWN:
            first.append(f"{value.strip()!r} in {place() if callable(place) else place}")


def say(found: Mapping[str, int], where: str, shown: Mapping[str, Sequence[str]] = MappingProxyType({})) -> None:
    """Log findings about the values of a dataset, their numbers and some values, on the first process: in one line, but
    for those of several sentences.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    told = []
    for what, count in found.items():
        parts = [f"{count:,} values"] * (count > 1) + [", ".join(shown.get(what, ()))] * (what in shown)
        values = ": ".join(parts)
        told.append(f"{what}{f' ({values})' if values else ''}")
    long = [each for each in told if ". " in each]
    for each in filter(None, ["; ".join(each for each in told if each not in long), *long]):
        logger.warning(f"{where}: {each}.")


@contextmanager
def unsaid() -> Iterator[None]:
    """Log no findings meanwhile, because a file is read again later, and then as a whole."""
    package = logging.getLogger("trl_ulma.data")
    level = package.level
    package.setLevel(logging.ERROR)
    try:
        yield
    finally:
        package.setLevel(level)


@cache
def say_once(what: str, where: str) -> None:
    """Log a finding that is met while a stream is read, once per process."""
    say({what: 1}, where)
