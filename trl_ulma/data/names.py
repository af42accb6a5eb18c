"""The names of columns and labels in a file, and the row that they make of one."""

import difflib
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from trl_ulma.data.columns import CONVERSATIONS, READ, Notice, number, read_value
from trl_ulma.data.unread import Unread
from trl_ulma.labels import is_missing

# Columns that have no use without labels
_OF_LABELS = ("label", "label_type", "rater", "sft_mask", "trials", "weight")
# Characters that cannot be seen, and characters that look like others
_LOOKS = dict.fromkeys((*range(0xFE00, 0xFE10), *range(0x200B, 0x2010), 0xAD, 0x2060, 0xFEFF)) | str.maketrans(
    "\u00a0\u2007\u202f\u2018\u2019\u02bc\u201c\u201d", "   '''\"\""
)
# Names between quotes that contain a comma or "=", as keys or as values of settings; and what stands for one meanwhile
_NAME = r"""(?P<mark>["'])(?P<name>(?:(?!(?P=mark)).)*[,=](?:(?!(?P=mark)).)*)(?P=mark)"""
_QUOTED_KEY = re.compile(rf"(?:^|(?<=,))\s*{_NAME}(?=\s*=)")
_QUOTED_VALUE = re.compile(rf"(?<==)\s*{_NAME}\s*(?=,|$)")
_HELD = "\0"


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
            >>> Names.of("prompt='a,label=b',label=c", '"a=1,b"=1,c=0')
            Names(columns={'prompt': 'a,label=b', 'label': 'c'}, label_map={'a=1,b': 1, 'c': 0})
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

        Blank text is a missing label, and words for a missing label such as "N/A" are not counted, unless `label_map`
        names them.

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
        if not is_missing(key, self.label_map):
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
    # A name between quotes is kept in one piece
    is_key = cut is str.rpartition
    names = [each["name"] for each in (_QUOTED_KEY if is_key else _QUOTED_VALUE).finditer(given)]
    given = (_QUOTED_KEY if is_key else _QUOTED_VALUE).sub(_HELD, given)
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
        key, value = (part.replace(_HELD, names.pop(0)) if _HELD in part else part for part in (key, value))
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
