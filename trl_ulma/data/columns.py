"""The columns that trainers read: their values, their names in a file, and the meaning of labels."""

import ast
import difflib
import json
import logging
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cache
from types import MappingProxyType
from typing import Any

from trl_ulma.data.unread import UNREAD, Unread
from trl_ulma.labels import DECIMAL_COMMA, is_messages, worded_number

TEXTS = ("prompt", "completion", "chosen", "rejected")
NUMBERS = ("label", "weight", "log_z", "trials")
BOOLS = ("sft_mask", "eos")
OTHERS = (*BOOLS, "label_type", "tools", "chat_template_kwargs", "image", "images", UNREAD)
# Columns that have no use without labels
_OF_LABELS = ("label", "label_type", "sft_mask", "trials", "weight")
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

# Characters that cannot be seen, and characters that look like others
_LOOKS = dict.fromkeys((*range(0xFE00, 0xFE10), *range(0x200B, 0x2010), 0xAD, 0x2060, 0xFEFF)) | str.maketrans(
    "\u00a0\u2007\u202f\u2018\u2019\u02bc\u201c\u201d", "   '''\"\""
)

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


@dataclass(frozen=True)
class Names:
    """The names of columns and labels in a file.

    Attributes:
        columns: column that trainers read → its name in the file.
        label_map: label in the file, as text → its number.
        needs_label: whether the column of the label must exist.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    label_map: Mapping[str, bool | int | float] = field(default_factory=dict)
    needs_label: bool = field(default=True, repr=False)

    @classmethod
    def of(
        cls,
        columns: str | Mapping[str, str] | None,
        label_map: str | Mapping[Any, Any] | None,
        *,
        needs_label: bool = True,
    ) -> "Names":
        """Names from settings such as `prompt=question,label=rating` and `up=1,down=0`, or from mappings.

        Raises:
            ValueError: if a setting has another form.

        Example:
            >>> Names.of("prompt=question, label=rating", {"up": 1, "down": 0})
            Names(columns={'prompt': 'question', 'label': 'rating'}, label_map={'up': 1, 'down': 0})
            >>> Names.of("prompt=Question, in full,label=rating", "Yes, good=1,bad=0")
            Names(columns={'prompt': 'Question, in full', 'label': 'rating'}, label_map={'yes, good': 1, 'bad': 0})
        """
        named = _entries(columns, "columns", "prompt=question,label=rating", str.partition)
        for ours, theirs in named.items():
            if not isinstance(ours, str) or not isinstance(theirs, str) or not ours or not theirs:
                raise ValueError(f"columns has {ours!r}: {theirs!r}; it must map names of columns to names of columns.")
        twice = [theirs for theirs, count in Counter(named.values()).items() if count > 1]
        if twice:
            raise ValueError(f"columns names {twice[0]!r} twice. Each column of the file can only be used once.")
        meanings: dict[str, bool | int | float] = {}
        for label, meaning in _entries(label_map, "label_map", "up=1,down=0", str.rpartition).items():
            found = number(meaning) if isinstance(meaning, str) else meaning
            if not isinstance(found, bool | int | float):
                raise ValueError(f"label_map has {meaning!r} for {label!r}; it must be a number.")
            # `yes` and `no` are true and false in YAML
            words = {True: ("true", "yes"), False: ("false", "no")}[label] if isinstance(label, bool) else [label]
            for key in map(_label_key, words):
                if meanings.get(key, found) != found:
                    raise ValueError(f"label_map gives {label!r} two meanings, {meanings[key]} and {found}. Keep one.")
                meanings[key] = found
        return cls(named, meanings, needs_label)

    def row(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row with its columns renamed. If a renamed column has the name of another one, the other is dropped.

        Example:
            >>> Names.of("label=rating", None).row({"rating": 4, "label": "good"})
            {'label': 4}
        """
        if not self.columns:
            return row
        taken = {*self.columns, *self.columns.values()}
        kept = {name: value for name, value in row.items() if name not in taken}
        return {ours: row[theirs] for ours, theirs in self.columns.items() if theirs in row} | kept

    def check(self, there: Sequence[str]) -> dict[str, str]:
        """The columns in `there` that only look like the names of `columns`, such as those with spaces around them.

        If no label is needed and its column is missing, the other columns about labels may be missing, too. A name that
        looks misspelled is always an error.

        Returns:
            Column in `there` → its name in `columns`.

        Raises:
            ValueError: if a column is missing in `there`. The message begins with "has".

        Example:
            >>> Names.of("label=rating", None).check(["prompt", "rating "])
            {'rating ': 'rating'}
        """
        has_label = self.columns.get("label", "") in there
        alike: dict[str, str] = {}
        for ours, theirs in self.columns.items():
            if theirs not in there:
                same = [name for name in there if _plain(name) == _plain(theirs)]
                if len(same) == 1 and same[0] not in (*alike, *self.columns.values()):
                    alike[same[0]] = theirs
                    continue
                near = difflib.get_close_matches(theirs, there, n=1)
                if not (self.needs_label or has_label or near) and ours in _OF_LABELS and "label" in self.columns:
                    continue
                hint = f" Did you mean {near[0]}?" if near else ""
                raise ValueError(f"has no column {theirs}; its columns are {', '.join(there)}.{hint}")
        return alike

    def label(self, value: Any, unknown: Counter) -> Any:
        """The number of a label. A label that `label_map` does not name is returned unchanged and counted.

        Blank text is a missing label, unless `label_map` names it.

        Example:
            >>> Names.of(None, "up=1,down=0").label("Up ", Counter())
            1
        """
        if not self.label_map or value is None:
            return value
        key = _label_key(value)
        if key in self.label_map:
            return self.label_map[key]
        if isinstance(value, str) and not key:
            return None
        unknown[str(value)[:40]] += 1
        return value


def _entries(given: Any, name: str, example: str, cut: Callable[[str, str], tuple[str, str, str]]) -> dict[Any, Any]:
    if given is None:
        return {}
    if isinstance(given, Mapping):
        return dict(given)
    if not isinstance(given, str):
        raise ValueError(f"{name} is {given!r}; it must be a mapping, or text such as {example}.")
    found: dict[str, str] = {}
    entries = given.split(",")
    # The names in a file can have commas, but a part that is no entry belongs to the name before or after it
    for place in range(len(entries) - 1, 0, -1):
        is_entry = "=" in entries[place - 1]
        if cut is str.partition:
            before = ",".join(entries[:place])
            is_entry = _is_entry(entries[place], is_inside=before.count("(") > before.count(")"))
        if not is_entry:
            entries[place - 1 : place + 1] = [",".join(entries[place - 1 : place + 1])]
    for entry in entries:
        key, equals, value = (part.strip() for part in cut(entry, "="))
        if not (key and equals and value) or key in found:
            raise ValueError(f"{name} has {entry.strip()!r}; it must be written as {example}, each name once.")
        found[key] = value
    return found


def _is_entry(text: str, *, is_inside: bool) -> bool:
    """Whether a part of `--columns` gives a column its name, and does not continue a name such as "5 = good".

    Args:
        text: the part.
        is_inside: whether the part is inside parentheses, where only the columns that trainers read are keys.

    Example:
        >>> [_is_entry(text, is_inside=False) for text in (" label = stars", " chat=x", " 5=good", "good = 5")]
        [True, True, False, False]
    """
    key, equals, _ = text.partition("=")
    is_key = not is_inside and key.strip().replace("-", "_").isidentifier() and key[-1] != " "
    return bool(equals) and (key.strip() in READ or is_key)


def _plain(text: str) -> str:
    """A text in the form in which texts that look the same are equal.

    Example:
        >>> _plain("Don’t know​ ")
        "Don't know"
    """
    return unicodedata.normalize("NFC", text.translate(_LOOKS)).strip()


def _label_key(value: Any) -> str:
    """What labels that mean the same have in common: letters of either case, and 5 and 5.0."""
    read = number(value) if isinstance(value, str) else value
    if isinstance(read, bool) or not isinstance(read, int | float | Decimal):
        return _plain(str(value).lower())
    whole = isinstance(read, int) or (math.isfinite(read) and read == int(read))
    return str(int(read)) if whole else repr(float(read))


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


# What to do about labels such as ["good"], which no label_map can contain
_NO_LIST = "A label that is a list cannot be mapped. Write it as a text or number of its own, such as good."


def unknown_labels(unknown: Counter, label_map: Mapping[str, Any], where: str) -> str | None:
    """An error message that lists the labels that `label_map` lacks, or None if it has all.

    Example:
        >>> unknown_labels(Counter(up=2), {"good": 1}, "a.csv")
        "label_map does not contain the labels 'up' (2 rows) of a.csv, only good. Add the missing labels."
    """
    if not unknown:
        return None
    found = ", ".join(f"{label!r} ({count:,} row{'s' * (count > 1)})" for label, count in unknown.most_common(10))
    more = f" and {len(unknown) - 10:,} more" if len(unknown) > 10 else ""
    return f"label_map does not contain the labels {found}{more} of {where}, only {', '.join(label_map)}. " + (
        _NO_LIST if all(label.startswith("[") for label in unknown) else "Add the missing labels."
    )


def unknown_label(label: str, place: str = "") -> Unread:
    """The error of a row whose label `label_map` lacks.

    Example:
        >>> unknown_label("up", " in line 3").message
        "has the label 'up' in line 3, which label_map does not contain. Add it to label_map."
    """
    shown = f"the label {label!r}"
    remedy = _NO_LIST if label.startswith("[") else "Add it to label_map."
    return Unread(f"has {shown}{place}, which label_map does not contain. {remedy}", shown)


def read_row(
    row: dict[str, Any], names: Names, unknown: Counter, notice: Notice, *, delimiter: str | None
) -> dict[str, Any]:
    """A row of a file with the names, labels and values that trainers read.

    Args:
        row: the row.
        names: the names of columns and labels in the file.
        unknown: counts the labels that `names` lacks.
        notice: called with a message for each value that was converted, and for columns that are ignored.
        delimiter: of the CSV file, or None for another file.

    Example:
        >>> read_row({"prompt": "Hi", "stars": "4"}, Names({"label": "stars"}), Counter(), print, delimiter=",")
        {'label': 4, 'prompt': 'Hi'}
    """
    for ours, theirs in names.columns.items():
        if ours in row and ours not in names.columns.values():
            notice(f"{ours}: the column of this name is ignored, because {theirs} is read as {ours}")
    row = names.row(row)
    if "label" in row:
        row["label"] = names.label(row["label"], unknown)
    return {
        name: read_value(name, value, notice, delimiter=delimiter, theirs=names.columns.get(name))
        if name in _ODD
        else value
        for name, value in row.items()
    }


# The columns whose values can need a conversion
_ODD = frozenset((*READ, *CONVERSATIONS))


class Shown(dict[str, list[str]]):
    """The first values of some findings, with their places.

    Example:
        >>> shown = Shown()
        >>> shown.add("label: numbers with a unit", "4 stars", "line 2")
        >>> shown
        {'label: numbers with a unit': ["'4 stars' in line 2"]}
    """

    def add(self, what: str, value: str, place: str) -> None:
        """Keep a value, if it is one of the first."""
        if len(first := self.setdefault(what, [])) < _SHOWN:
            first.append(f"{value.strip()!r} in {place}")


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


@cache
def say_once(what: str, where: str) -> None:
    """Log a finding that is met while a stream is read, once per process."""
    say({what: 1}, where)
