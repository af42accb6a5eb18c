"""Checks whether rows have the columns that trainers read, and says what to do if not."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from trl_ulma.data.columns import CONVERSATIONS, LIST, READ, TEXTS, number, parsed_list
from trl_ulma.data.csv_rows import DELIMITERS
from trl_ulma.data.directions import words_of
from trl_ulma.data.label_words import label_map_for
from trl_ulma.data.proposals import (
    CALLED,
    VERDICTS,
    as_family,
    as_option,
    as_rated,
    families_of,
    is_lost,
    listed,
    proposal,
    proposed,
    quoted,
    without_label,
)
from trl_ulma.data.unread import UNREAD
from trl_ulma.labels import WERE_RATINGS, are_missing, is_date, is_messages

_COMMA = re.compile(r"[+-]?[\d.]+(,\d+)+(\.\d+)?", re.ASCII)
_PRINTED = re.compile(r"""['"]role['"]\s*:\s*['"](user|assistant|system)['"]""")  # in a list that cannot be read


def _has_messages(text: str) -> bool:
    """Whether a text is a list of messages, as JSON or as Python or NumPy print it.

    Example:
        >>> _has_messages("[{'role': 'user', 'content': 'Hi'} {'role': 'assistant', 'content': 'Ho'}]")
        True
    """
    if LIST.match(text) is None:
        return False
    found = parsed_list(text)
    if found is not None:
        return is_messages(found)
    return text.rstrip().endswith("}]") and _PRINTED.search(text) is not None


def _is_turns(text: str) -> bool:
    """Whether a text is a single message, or turns with `from` and `value`, as JSON or as Python prints them.

    Example:
        >>> _is_turns('[{"from": "human", "value": "Hi"}]'), _is_turns('{"role": "user", "content": "Hi"}')
        (True, True)
        >>> _is_turns('{"role": "clerk", "name": "Ann"}'), _is_turns('[{"from": "Rome", "to": "Bonn"}]')
        (False, False)
    """
    from trl_ulma.data.sharegpt import ROLES

    text = text.strip()
    if not text.startswith(("{", "[")):
        return False
    turns = parsed_list(f"[{text}]" if text.startswith("{") else text)
    return bool(turns) and all(
        any(
            str(turn.get(speaker)).lower() in ROLES and isinstance(turn.get(said), str)
            for speaker, said in (("from", "value"), ("role", "content"))
        )
        for turn in turns or ()
    )


def check_readable(
    columns: Mapping[str, Sequence[Any]],
    where: str,
    *,
    needs_label: bool = True,
    given: Mapping[str, str] = MappingProxyType({}),
) -> list[str]:
    """Check that rows have the columns that trainers read. Returns warnings about ignored columns.

    Args:
        columns: name → the values of a few rows.
        where: the name of the dataset.
        needs_label: whether rows of single answers need a label.
        given: column that trainers read → its name in the data, as far as `--columns` gives it.

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
    needed = ["chosen", "rejected"] if is_paired else ["prompt", "completion", *(["label"] if needs_label else [])]
    _check_columns(columns, where, [name for name in needed if name not in names], given)
    _check_messages(columns, where, given)
    if not is_paired:
        _check_labels(columns.get("label", ()), where)
    _check_answers(columns, where)
    lacks_prompt = is_paired and "prompt" not in names and _are_answers(columns)
    if lacks_prompt and (theirs := proposed(columns).get("prompt")):
        raise ValueError(
            f"{where} has pairs without a prompt, and its column {theirs} would be ignored. If it is the prompt, set "
            f"--columns {as_option({'prompt': theirs, **given})}. If not, remove the column."
        )
    ignored = {name: columns[name] for name in names if name not in READ}
    return [
        *_ignored_texts(ignored, columns, where, lacks_prompt=lacks_prompt),
        *_misspelt(ignored, names, where),
        *(_ignored_labels(columns, where, given) if is_paired else ()),
        *_refused(ignored, where),
        *(_worse_scores(columns, names, where) if is_paired else ()),
    ]


def _check_columns(
    columns: Mapping[str, Sequence[Any]], where: str, missing: Sequence[str], given: Mapping[str, str]
) -> None:
    """Raise ValueError if columns are missing, or if the only row of a file is a table of rows."""
    families = families_of(columns) if missing else []
    is_nested = any(isinstance(label, list | Mapping) for label in columns.get("label", ()))
    whole = whole_file(columns) if (missing and not families) or is_nested else None
    if whole is not None:
        raise ValueError(f"{where} has only one row, {whole}")
    if not missing:
        return
    names, likely = [name for name in columns if name != UNREAD], proposed(columns)
    if fault := _header_fault(names, columns):
        raise ValueError(f"{where} {fault}")
    remedy = as_rated(where, columns, likely, families)
    if not remedy and not set(missing) <= set(likely):
        if families:
            remedy = as_family(where, families, names, given, columns)
        elif "label" not in likely and {"prompt", "completion"} <= {*names, *likely}:
            remedy = without_label(where, {name: columns[name] for name in names}, likely, given)
    raise ValueError(
        f"{where} lacks the column{'s' * (len(missing) > 1)} {listed(missing)}; found "
        f"{', '.join(given.get(name, name) for name in names)}. "
        + (remedy or proposal(likely, given, columns, missing))
    )


def _check_messages(columns: Mapping[str, Sequence[Any]], where: str, given: Mapping[str, str]) -> None:
    """Raise ValueError if messages are stored as text."""
    for name in TEXTS:
        if any(isinstance(value, str) and _has_messages(value) for value in columns.get(name, ())):
            raise ValueError(
                f"{where} has lists of messages that are stored as text in the column {given.get(name, name)}. Convert "
                "them with json.loads, or write the rows to a JSON lines file, in which they are read as lists. (The "
                "text of NumPy arrays, which pandas writes to CSV files, cannot be converted.)"
            )
        texts = [value for value in columns.get(name, ()) if isinstance(value, str) and value.strip()]
        if texts and all(map(_is_turns, texts)):
            raise ValueError(
                f"{where} has messages that are stored as text in the column {given.get(name, name)}, such as "
                f"{texts[0].strip()[:60]}. Write each value as a list of messages with role and content, in a JSON "
                "lines file. For conversations of turns with `from` and `value`, in a column `conversations`, "
                "trl-ulma prepare sharegpt does this."
            )


def _check_labels(values: Sequence[Any], where: str) -> None:
    """Raise ValueError if most labels are words. A few words among numbers are invalid rows, which the trainer lists
    together with all others.
    """
    labels = [value for value in values if value is not None]
    labels = [label for label, is_missing in zip(labels, are_missing(labels), strict=True) if not is_missing]
    words = [value for value in labels if isinstance(value, str)]
    if 2 * len(words) <= len(labels):
        return
    words = list(dict.fromkeys(words))
    shown = ", ".join(repr(word if len(word) <= 40 else f"{word[:40]}…") for word in words[:5])
    if any(_COMMA.fullmatch(word.strip()) for word in words):
        raise ValueError(
            f"{where} has labels with a comma ({shown}). Write them with a decimal point and without separators, as in "
            "0.5 and 1234."
        )
    if any(map(is_date, words)):
        raise ValueError(f"{where} has labels that are dates ({shown}). {WERE_RATINGS}")
    if all(word.rstrip().endswith("%") for word in words):
        raise ValueError(
            f"{where} has labels with a percent sign ({shown}). Write them as numbers between 0 and 1, as in 0.8."
        )
    raise ValueError(
        f"{where} has labels that are words ({shown}). Map them to numbers: --label_map "
        + label_map_for([word for word in words if len(word) <= 40] or ["WORD"])
    )


def _check_answers(columns: Mapping[str, Sequence[Any]], where: str) -> None:
    """Raise ValueError if chosen and rejected are names of columns."""
    halves = {str(half).strip().lower() for name in ("chosen", "rejected") for half in columns.get(name, ())}
    texts = [
        name for name in columns if name != UNREAD and {"model", *CALLED["completion"]}.intersection(words_of(name))
    ]
    if halves and all(any(half == name.lower() or half in words_of(name) for name in texts) for half in halves):
        raise ValueError(
            f"{where} has names in the place of answers: chosen and rejected are {listed(sorted(halves))}, as in the "
            f"columns {listed(texts)}. Write the answers themselves."
        )


def _ignored_texts(
    ignored: Mapping[str, Sequence[Any]], columns: Mapping[str, Sequence[Any]], where: str, *, lacks_prompt: bool
) -> Iterator[str]:
    """A warning about columns with texts that answers may depend on."""
    unread = [
        name
        for name, values in ignored.items()
        if (_is_context(name) and is_lost(name, columns)) or (lacks_prompt and any(map(_is_question, values)))
    ]
    if unread:
        yield (
            f"{where}: the text in column{'s' * (len(unread) > 1)} {listed(unread)} is ignored. If the answers depend "
            "on it, put it into the prompt."
        )


def _misspelt(ignored: Iterable[str], names: Sequence[str], where: str) -> Iterator[str]:
    """A warning about each column whose name is nearly that of an optional column."""
    for name in ignored:
        meant = _MISSPELT.get(re.sub(r"[^a-z]", "", name.lower()))
        if meant is not None and meant not in names:
            yield (
                f"{where}: the column {name} is ignored. If it is {meant}, set --columns {quoted(f'{meant}={name}')}."
            )


def _ignored_labels(columns: Mapping[str, Sequence[Any]], where: str, given: Mapping[str, str]) -> Iterator[str]:
    """A warning about labels beside pairs."""
    if any(value is not None for value in columns.get("label", ())):
        yield (
            f"{where}: the column {given.get('label', 'label')} is ignored, because of each pair the chosen answer is "
            "good and the rejected one bad. If it says which answer is better, swap the answers accordingly."
        )


def _refused(ignored: Mapping[str, Sequence[Any]], where: str) -> Iterator[str]:
    """A warning about each column that says of some rows that they do not count."""
    for name, given_values in ignored.items():
        values = [str(value).strip() for value in given_values]
        if not name.lower().endswith("status") and not VERDICTS.issuperset(value.lower() for value in values):
            continue
        refused = [value for value in values if value.lower() in _REFUSED]
        if refused:
            yield (
                f"{where}: the column {name}, which is not read, says {listed(list(dict.fromkeys(refused)))} in "
                f"{len(refused)} of the first {len(values)} rows. Remove such rows if they do not count."
            )


def _worse_scores(columns: Mapping[str, Sequence[Any]], names: Sequence[str], where: str) -> Iterator[str]:
    """A warning about pairs whose scores say the opposite."""
    scored = scores_of(names)
    scores = [columns[name] for name in scored]
    worse = sum(is_worse(*pair) for pair in zip(*scores, strict=True))
    if worse:
        yield (
            f"{where}: {worse} of its first {len(scores[0])} pairs have a {scored[0]} below their {scored[1]}, so "
            "their chosen answer is not the better one. Swap or remove them, unless lower scores are better."
        )


# What survey and labeling tools write in a column such as AssignmentStatus about work that does not count
_REFUSED = frozenset(
    (
        "reject",
        "ignore",
        "rejected",
        "returned",
        "timed-out",
        "timed out",
        "expired",
        "discarded",
        "spam",
        "survey preview",
        "survey test",
    )
)
# Names of optional columns without their punctuation, also in the plural
_MISSPELT = {
    name.replace("_", "") + plural: name
    for name in ("weight", "log_z", "trials", "sft_mask", "label_type", "eos", "tools")
    for plural in ("", "s")
}


def scores_of(names: Sequence[str]) -> tuple[str, ...]:
    """The columns with the scores of chosen and rejected answers, or ().

    Example:
        >>> scores_of(["chosen", "rejected", "chosen-rating", "rejected-rating"]), scores_of(["chosen", "rejected"])
        (('chosen-rating', 'rejected-rating'), ())
    """
    for name in names:
        other = name.replace("chosen", "rejected")
        if other != name and other in names and {"score", "rating", "reward"}.intersection(words_of(name)):
            return name, other
    return ()


def is_worse(chosen: Any, rejected: Any) -> bool:
    """Whether the score of a chosen answer, or its text, is below that of the rejected one.

    Example:
        >>> is_worse(1.0, 2), is_worse("2", "2.5"), is_worse(None, 2)
        (True, True, False)
    """
    good, bad = (number(each) if isinstance(each, str) else each for each in (chosen, rejected))
    return isinstance(good, int | float) and isinstance(bad, int | float) and good < bad


def whole_file(columns: Mapping[str, Sequence[Any]]) -> str | None:
    """How to write a file whose only object holds all rows. None if it does not look so.

    Example:
        >>> whole_file({"data": [[{"prompt": "Hi"}, {"prompt": "Ho"}]]})
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


def _header_fault(names: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> str:
    """Why a file has only one column, if its name or its values look like several. The message begins with "has".

    Example:
        >>> print(_header_fault(["prompt  label"], {"prompt  label": ["Hi  1"]}))
        has only one column, 'prompt  label', which looks like several. Separate the fields with commas, semicolons,
        tabs or vertical bars.
        >>> print(_header_fault(["prompt,label"], {"prompt,label": ["Hi,1"]}))
        has only one column, 'prompt,label', because each line is in double quotes as a whole. Remove these quotes.
    """
    if len(names) != 1:
        return ""
    [name] = names
    if name.startswith("#"):
        return f"has a comment in place of the names of the columns, {name!r}. Remove this line."
    values = [value for value in columns[name] if value is not None]
    if any(
        re.search(rf"{re.escape(mark)}\S", name) and all(mark in str(value) for value in values) for mark in DELIMITERS
    ):
        return f"has only one column, {name!r}, because each line is in double quotes as a whole. Remove these quotes."
    parts = re.split(r"\s{2,}", name)
    if len(parts) > 1 or len({*READ}.intersection(name.split())) > 1:
        return (
            f"has only one column, {name!r}, which looks like several. Separate the fields with commas, semicolons, "
            "tabs or vertical bars."
        )
    return ""


# Names of columns, without their punctuation, whose text belongs before the answer, as the prompt does
_CONTEXTS = re.compile(
    "(system|sys)(prompt|message|instruction|text)?s?|(inputs?|context|background|passage|document)(text)?s?|"
    "(chat|conversation|dialog(ue)?|message)?history"
)


def _is_context(name: str) -> bool:
    return _CONTEXTS.fullmatch("".join(words_of(name))) is not None


# Letters of scripts without spaces between words: Thai, Lao, Burmese, Khmer, and those of Japanese and Chinese
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
_LEAST_UNSPACED = 5  # a category is shorter


def _is_question(value: Any) -> bool:
    """Whether a value can be a question: text of several words, or messages.

    Example:
        >>> _is_question("Why not?"), _is_question("卵の茹で方は？"), _is_question("数学"), _is_question("x1")
        (True, True, False, False)
    """
    if isinstance(value, list):
        return bool(value) and is_messages(value)
    if not isinstance(value, str):
        return False
    return " " in value.strip() or len(_UNSPACED.findall(value)) >= _LEAST_UNSPACED


def _are_answers(columns: Mapping[str, Sequence[Any]]) -> bool:
    """Whether pairs are texts without a marker at the end of their prompt, or only messages of the assistant."""
    from trl_ulma.data.conversations import is_transcript

    halves = [value for name in ("chosen", "rejected") for value in columns[name]]
    return any(
        not is_transcript(half) if isinstance(half, str) else all(turn["role"] == "assistant" for turn in half)
        for half in halves
        if isinstance(half, str) or (half and is_messages(half))
    )
