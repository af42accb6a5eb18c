"""The columns that trainers read: their values, their names in a file, and the meaning of labels."""

import ast
import difflib
import json
import logging
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from trl_ulma.data.unread import UNREAD, Unread
from trl_ulma.labels import is_messages

TEXTS = ("prompt", "completion", "chosen", "rejected")
NUMBERS = ("label", "weight", "log_z", "trials")
BOOLS = ("sft_mask", "eos")
OTHERS = (*BOOLS, "label_type", "tools", "chat_template_kwargs", "image", "images", UNREAD)
READ = (*TEXTS, *NUMBERS, *OTHERS)
# Columns that can be JSON text in a CSV file
CONVERSATIONS = (*TEXTS, "messages", "conversations", "conversation_a", "conversation_b", "answers", "completions")

_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_COMMA = re.compile(r"[+-]?[\d.]+(,\d+)+(\.\d+)?", re.ASCII)
_LIST = re.compile(r"\s*\[\s*\{")  # the beginning of a list of objects that is stored as text
_PRINTED = re.compile(r"""['"]role['"]\s*:\s*['"](user|assistant|system)['"]""")  # in a list that cannot be read
_DIGITS = 18  # all numbers with so many digits fit into 64 bits
_FLOAT_BITS = 1024  # larger whole numbers do not fit into a float
_WORDS = {"true": True, "false": False}

Notice = Callable[[str], None]

logger = logging.getLogger(__name__)


def number(text: str) -> bool | int | float | None:
    """A text as a number or bool. None if it is neither.

    Example:
        >>> number("4"), number(" 0.5"), number("True"), number("4 stars"), number("nan")
        (4, 0.5, True, None, None)
    """
    text = text.strip()
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if _NUMBER.fullmatch(text) is None:
        return None
    if text.lstrip("+-").isdecimal():
        return int(text) if len(text) <= _DIGITS else None
    return float(text)


def read_value(name: str, value: Any, notice: Notice, *, is_cell: bool = False) -> Any:
    """A value of a column, converted to the type that trainers read.

    Values that cannot be converted are returned unchanged, and trainers raise an error for them.

    Args:
        name: the name of the column.
        value: the value in the file.
        notice: called with a message if the value was converted.
        is_cell: whether the value is a CSV field. CSV files store all values as text.

    Example:
        >>> read_value("label", "4", print)
        label: numbers that are stored as text are converted to numbers
        4
        >>> read_value("sft_mask", 1, print), read_value("completion", "4", print), read_value("label", "up", print)
        (True, '4', 'up')
    """
    if is_cell and value == "" and name in (*NUMBERS, *OTHERS):
        return None
    if name in CONVERSATIONS and isinstance(value, str) and _LIST.match(value):
        found = _messages(value)
        # An answer can be a list of other objects, as text
        if found is not None and (is_messages(found) or (is_cell and name not in TEXTS)):
            notice(f"{name}: lists that are stored as text are converted to lists")
            return found
    if name in NUMBERS or name in BOOLS:
        if isinstance(value, str):
            found = number(value)
            if found is not None:
                if not is_cell:
                    notice(f"{name}: numbers that are stored as text are converted to numbers")
                value = found
        elif isinstance(value, int) and abs(value) >= 2**63 and value.bit_length() < _FLOAT_BITS:
            notice(f"{name}: whole numbers of more than 64 bits are rounded to floats")
            value = float(value)
        elif isinstance(value, Decimal):
            value = int(value) if value == value.to_integral_value() else float(value)
    if name in BOOLS and isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    return value


def _messages(text: str) -> list[Any] | None:
    for parse in (json.loads, ast.literal_eval):  # json.dumps or repr wrote the list
        try:
            found = parse(text)
        except (MemoryError, RecursionError, SyntaxError, TypeError, ValueError):
            continue
        return found if isinstance(found, list) and all(isinstance(each, dict) for each in found) else None
    return None


def _has_messages(text: str) -> bool:
    """Whether a text is a list of messages, as JSON or as Python or NumPy print it.

    Example:
        >>> _has_messages("[{'role': 'user', 'content': 'Hi'} {'role': 'assistant', 'content': 'Ho'}]")
        True
    """
    if _LIST.match(text) is None:
        return False
    found = _messages(text)
    if found is not None:
        return is_messages(found)
    return text.rstrip().endswith("}]") and _PRINTED.search(text) is not None


@dataclass(frozen=True)
class Names:
    """The names of columns and labels in a file.

    Attributes:
        columns: column that trainers read → its name in the file.
        label_map: label in the file, as text → its number.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    label_map: Mapping[str, bool | int | float] = field(default_factory=dict)

    @classmethod
    def of(cls, columns: str | Mapping[str, str] | None, label_map: str | Mapping[Any, Any] | None) -> "Names":
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
            meanings |= {_label_key(word): found for word in words}
        return cls(named, meanings)

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

    def check(self, there: Sequence[str]) -> None:
        """Raise ValueError if a column is missing in `there`. The message begins with "has"."""
        for theirs in self.columns.values():
            if theirs not in there:
                near = difflib.get_close_matches(theirs, there, n=1)
                hint = f" Did you mean {near[0]}?" if near else ""
                raise ValueError(f"has no column {theirs}; its columns are {', '.join(there)}.{hint}")

    def label(self, value: Any, unknown: Counter) -> Any:
        """The number of a label. A label that `label_map` does not name is returned unchanged and counted.

        Example:
            >>> Names.of(None, "up=1,down=0").label("Up ", Counter())
            1
        """
        if not self.label_map or value is None:
            return value
        key = _label_key(value)
        if key in self.label_map:
            return self.label_map[key]
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
    # The names in a file can have commas, but a part without "=" is no entry. It belongs to the name before or after it
    for place in range(len(entries) - 1, 0, -1):
        if "=" not in entries[place if cut is str.partition else place - 1]:
            entries[place - 1 : place + 1] = [",".join(entries[place - 1 : place + 1])]
    for entry in entries:
        key, equals, value = (part.strip() for part in cut(entry, "="))
        if not (key and equals and value) or key in found:
            raise ValueError(f"{name} has {entry.strip()!r}; it must be written as {example}, each name once.")
        found[key] = value
    return found


def _label_key(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, int | float | Decimal) else str(value).strip().lower()


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
    return (
        f"label_map does not contain the labels {found}{more} of {where}, only {', '.join(label_map)}. Add the missing "
        "labels."
    )


def unknown_label(label: str, place: str = "") -> Unread:
    """The error of a row whose label `label_map` lacks.

    Example:
        >>> unknown_label("up", " in line 3").message
        "has the label 'up' in line 3, which label_map does not contain. Add it to label_map."
    """
    shown = f"the label {label!r}"
    return Unread(f"has {shown}{place}, which label_map does not contain. Add it to label_map.", shown)


def read_row(row: dict[str, Any], names: Names, unknown: Counter, notice: Notice, *, is_cell: bool) -> dict[str, Any]:
    """A row of a file with the names, labels and values that trainers read.

    Args:
        row: the row.
        names: the names of columns and labels in the file.
        unknown: counts the labels that `names` lacks.
        notice: called with a message for each value that was converted, and for columns that are ignored.
        is_cell: whether values are CSV fields.

    Example:
        >>> read_row({"prompt": "Hi", "stars": "4"}, Names({"label": "stars"}), Counter(), print, is_cell=True)
        {'label': 4, 'prompt': 'Hi'}
    """
    for ours, theirs in names.columns.items():
        if ours in row and ours not in names.columns.values():
            notice(f"{ours}: the column of this name is ignored, because {theirs} is read as {ours}")
    row = names.row(row)
    if "label" in row:
        row["label"] = names.label(row["label"], unknown)
    return {
        name: read_value(name, value, notice, is_cell=is_cell) if name in _ODD else value for name, value in row.items()
    }


# The columns whose values can need a conversion
_ODD = frozenset((*READ, *CONVERSATIONS))


def say(found: Mapping[str, int], where: str) -> None:
    """Log findings about the values of a dataset and their numbers, on the first process."""
    if os.environ.get("RANK", "0") != "0":
        return
    for what, count in found.items():
        logger.warning(f"{where}: {what}{f' ({count:,} values)' if count > 1 else ''}.")


# Common other names of columns, the most likely first
_CALLED = {
    "prompt": ("question", "instruction", "query", "input", "problem", "context", "post", "user", "request", "message"),
    "completion": ("response", "answer", "output", "reply", "generation", "completions", "assistant", "generated"),
    "label": (
        "labels", "rating", "score", "feedback", "thumb", "thumbs", "vote", "votes", "reward", "quality", "overall",
        "stars", "grade", "preference", "is_good", "liked", "upvoted", "correct", "rank",
    ),
    "chosen": ("preferred", "better", "winner", "accepted", "good", "best", "positive", "response_j"),
    "rejected": ("dispreferred", "worse", "loser", "bad", "worst", "negative", "response_k"),
}  # fmt: skip


def proposed(columns: Mapping[str, Sequence[Any]]) -> dict[str, str]:
    """The columns that look like prompt, completion and label, or like chosen and rejected.

    Args:
        columns: name → the values of a few rows.

    Returns:
        Missing column → the column that looks like it.

    Example:
        >>> proposed({"question": ["Why?"], "completion": ["So."], "rating": [4]})
        {'prompt': 'question', 'label': 'rating'}
    """
    is_paired = "chosen" in columns or "rejected" in columns
    if not is_paired and "completion" not in columns:
        is_paired = all(_like(name, columns) for name in ("chosen", "rejected"))
    found = {}
    for name in ("prompt", "chosen", "rejected") if is_paired else ("prompt", "completion", "label"):
        like = None if name in columns else _like(name, columns)
        if like is not None:
            found[name] = like
    return found


def _like(name: str, columns: Mapping[str, Sequence[Any]]) -> str | None:
    free = [each for each in columns if each not in READ and _may_be(name, columns[each])]
    lower = {each.lower().replace(" ", "_").replace("-", "_"): each for each in free}
    words = (name, *_CALLED[name])
    for word in words:
        if word in lower:
            return lower[word]
    for word in words:
        parts = [each for key, each in lower.items() if word in re.split(r"[_.]", key)]
        if parts:
            return parts[0]
    return None


def _may_be(name: str, values: Sequence[Any]) -> bool:
    values = [value for value in values if value is not None]
    if name == "label":
        return any(isinstance(value, bool | int | float | Decimal | str) for value in values) and not any(
            isinstance(value, str) and len(value) > 40 for value in values
        )
    return any(isinstance(value, str) or (isinstance(value, list) and is_messages(value)) for value in values)


def check_readable(columns: Mapping[str, Sequence[Any]], where: str, *, needs_label: bool = True) -> list[str]:
    """Check that rows have the columns that trainers read. Returns warnings about ignored columns.

    Args:
        columns: name → the values of a few rows.
        where: the name of the dataset.
        needs_label: whether rows of single answers need a label.

    Raises:
        ValueError: if a column is missing, if most labels are words, or if pairs have a question that would be ignored.
            The message suggests `--columns`, `--label_map`, or the family for `trl-ulma prepare`.

    Example:
        >>> check_readable({"question": ["Why?"], "completion": ["So."], "rating": [4]}, "rows.csv")
        Traceback (most recent call last):
        ValueError: rows.csv lacks the columns prompt and label; found question, completion, rating. `question` looks
        like the prompt and `rating` like the label: --columns prompt=question,label=rating
    """
    names = [name for name in columns if name != UNREAD]
    if {"prompt_ids", "completion_ids"} <= set(names):  # prepared
        return []
    is_paired = "chosen" in names or "rejected" in names
    likely = proposed(columns)
    needed = ["chosen", "rejected"] if is_paired else ["prompt", "completion", *(["label"] if needs_label else [])]
    missing = [name for name in needed if name not in names]
    families = _families(columns) if missing else []
    is_nested = any(isinstance(label, list | Mapping) for label in columns.get("label", ()))
    whole = _whole_file(columns) if (missing and not families) or is_nested else None
    if whole is not None:
        raise ValueError(f"{where} has only one row, {whole}")
    if missing:
        raise ValueError(
            f"{where} lacks the column{'s' * (len(missing) > 1)} {_and(missing)}; found {', '.join(names)}. "
            + (_proposal(likely) if set(missing) <= set(likely) or not families else "")
            + ("" if set(missing) <= set(likely) or not families else f"It looks like {' or '.join(families)} data: "
               f"trl-ulma prepare {families[0]} --input {where} --output FOLDER")
        )  # fmt: skip
    for name in TEXTS:
        if any(isinstance(value, str) and _has_messages(value) for value in columns.get(name, ())):
            raise ValueError(
                f"{where} has lists of messages that are stored as text in the column {name}. Convert them with "
                "json.loads, or write the rows to a JSON lines file, in which they are read as lists. (The text of "
                "NumPy arrays, which pandas writes to CSV files, cannot be converted.)"
            )
    labels = [value for value in columns.get("label", ()) if value is not None]
    words = [value for value in labels if isinstance(value, str)]
    # A few words among numbers are invalid rows, which the trainer lists together with all others
    if 2 * len(words) > len(labels) and not is_paired:
        words = list(dict.fromkeys(words))
        shown = ", ".join(repr(word if len(word) <= 40 else f"{word[:40]}…") for word in words[:5])
        if any(_COMMA.fullmatch(word.strip()) for word in words):
            raise ValueError(
                f"{where} has labels with a comma ({shown}). Write them with a decimal point and without separators, "
                "as in 0.5 and 1234."
            )
        if all(word.rstrip().endswith("%") for word in words):
            raise ValueError(
                f"{where} has labels with a percent sign ({shown}). Write them as numbers between 0 and 1, as in 0.8."
            )
        raise ValueError(
            f"{where} has labels that are words ({shown}). Map them to numbers: --label_map "
            + _meanings([word for word in words if len(word) <= 40] or ["WORD"])
        )
    if is_paired and "prompt" not in names and "prompt" in likely and _are_answers(columns):
        raise ValueError(
            f"{where} has pairs without a prompt, and its column {likely['prompt']} would be ignored. If it is the "
            f"prompt, set --columns {_quoted('prompt=' + likely['prompt'])}. If not, remove the column."
        )
    unread = [
        name for name in names if name.lower() in ("system", "system_prompt") and _may_be("prompt", columns[name])
    ]
    if is_paired and "prompt" not in names and _are_answers(columns):
        unread = [
            name
            for name in names
            if name not in READ and any(isinstance(value, str) and " " in value.strip() for value in columns[name])
        ]
    if not unread:
        return []
    return [f"{where}: the text in column{'s' * (len(unread) > 1)} {_and(unread)} is ignored."]


# Common words for good and bad labels
_GOOD = frozenset(
    (
        "up", "yes", "good", "like", "liked", "positive", "pos", "true", "correct",
        "right", "chosen", "accepted", "win", "helpful", "safe", "desirable", "satisfied", "y", "t", "+", "👍", "ja",
        "oui", "sí", "wahr", "vrai", "verdadero", "thumbs up", "thumb up", "thumbsup", "+1", "upvote", "upvoted",
    )
)  # fmt: skip
_BAD = frozenset(
    (
        "down", "no", "bad", "dislike", "disliked", "negative", "neg", "false",
        "incorrect", "wrong", "rejected", "lose", "harmful", "unsafe", "undesirable", "dissatisfied", "n", "f", "-",
        "👎", "nein", "non", "falsch", "faux", "falso", "thumbs down", "thumb down", "thumbsdown", "-1", "downvote",
        "downvoted",
    )
)  # fmt: skip


def _meanings(words: Sequence[str]) -> str:
    """The value to suggest for `--label_map`, with numbers for known words.

    Example:
        >>> _meanings(["thumbs_down", "👍🏽"]), _meanings(["very good", "poor"])
        ('thumbs_down=0,👍🏽=1', '"very good=NUMBER,poor=NUMBER"')
    """
    plain = {word: _plain(word) for word in words[:10]}
    numbers = {word: 1 if key in _GOOD else 0 if key in _BAD else "NUMBER" for word, key in plain.items()}
    return _quoted(",".join(f"{word}={number}" for word, number in numbers.items()))


def _plain(word: str) -> str:
    """A label without skin tones, colons of emoji names, and the case."""
    word = re.sub("[\N{VARIATION SELECTOR-16}\U0001f3fb-\U0001f3ff]", "", word.strip().lower())
    if word.startswith(":") and word.endswith(":"):
        word = word[1:-1]
    return re.sub(r"(?<=\w)[_-](?=\w)", " ", word)


def _quoted(text: str) -> str:
    """A value for the command line, quoted for the shell if it needs quotes.

    Example:
        >>> _quoted("label=rating"), _quoted("label=Your rating"), _quoted("label=Is it $5?")
        ('label=rating', '"label=Your rating"', "'label=Is it $5?'")
    """
    if re.fullmatch(r"[^\s\\$`\"'!&|;<>()*?\[\]{}#~]+", text):
        return text
    return shlex.quote(text) if set(text) & set('\\$`"!') else f'"{text}"'


def _whole_file(columns: Mapping[str, Sequence[Any]]) -> str | None:
    """How to write a file whose only object holds all rows. None if it does not look so.

    Example:
        >>> _whole_file({"data": [[{"prompt": "Hi"}, {"prompt": "Ho"}]]})
        'whose `data` is a list of 2 objects. If they are the rows, write this list as the file: jq .data FILE'
    """
    if any(len(values) != 1 for values in columns.values()):
        return None
    only = {name: values[0] for name, values in columns.items() if name != UNREAD}
    for name, value in only.items():
        is_list = isinstance(value, list) and bool(value) and all(isinstance(each, Mapping) for each in value)
        if is_list and not is_messages(value) and name not in CONVERSATIONS:
            return (
                f"whose `{name}` is a list of {len(value):,} object{'s' * (len(value) > 1)}. If they are the rows, "
                f"write this list as the file: jq .{name} FILE"
            )
    if len(only) > 1 and all(isinstance(value, Mapping | list) for value in only.values()):
        return (
            "whose values are lists or objects. If they are columns or rows, write one object per row, as pandas does "
            'with df.to_json(FILE, orient="records", lines=True).'
        )
    return None


def _families(columns: Mapping[str, Sequence[Any]]) -> list[str]:
    """The families of `trl-ulma prepare` that have these columns."""
    from trl_ulma.data.adapters import FAMILIES, find

    return [name for name in FAMILIES if find(name).reads(columns)]


def _are_answers(columns: Mapping[str, Sequence[Any]]) -> bool:
    """Whether pairs are texts without a marker at the end of their prompt."""
    from trl_ulma.data.conversations import is_transcript

    halves = [value for name in ("chosen", "rejected") for value in columns[name]]
    return any(isinstance(half, str) and not is_transcript(half) for half in halves)


def _proposal(likely: Mapping[str, str]) -> str:
    if not likely:
        return (
            "Rows need prompt, completion and label (one answer per row), or chosen and rejected (pairs). Name the "
            "columns with --columns, as in --columns prompt=question,completion=response,label=rating"
        )
    (first, theirs), *others = likely.items()
    said = _and([f"`{theirs}` looks like the {first}", *(f"`{column}` like the {name}" for name, column in others)])
    return f"{said}: --columns {_quoted(','.join(f'{ours}={column}' for ours, column in likely.items()))}"


def _and(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
