"""Checks whether rows have the columns that trainers read, and suggests how to read them if not."""

import re
import shlex
from collections.abc import Mapping, Sequence
from decimal import Decimal
from itertools import zip_longest
from types import MappingProxyType
from typing import Any

from trl_ulma.data.columns import CONVERSATIONS, LIST, READ, TEXTS, number, parsed_list
from trl_ulma.data.csv_rows import DELIMITERS
from trl_ulma.data.directions import direction, is_lower_better, words_of
from trl_ulma.data.unread import UNREAD
from trl_ulma.labels import is_messages

_COMMA = re.compile(r"[+-]?[\d.]+(,\d+)+(\.\d+)?", re.ASCII)
_PRINTED = re.compile(r"""['"]role['"]\s*:\s*['"](user|assistant|system)['"]""")  # in a list that cannot be read

# Common other names of columns, the most likely first
_CALLED = {
    "prompt": ("question", "instruction", "query", "input", "problem", "context", "post", "user", "request", "message"),
    "completion": ("response", "answer", "output", "reply", "generation", "completions", "assistant", "generated"),
    "label": (
        "labels", "rating", "score", "feedback", "thumb", "thumbs", "vote", "votes", "reward", "quality", "overall",
        "stars", "grade", "preference", "is_good", "liked", "upvoted", "correct", "likes", "upvotes", "helpful",
        "passed", "success", "rank", "toxicity", "toxic", "harmful", "flagged", "bad", "dislikes", "downvotes",
        "errors", "disliked", "downvoted", "unhelpful", "incorrect", "wrong", "complaints", "complaint", "issues",
        "refusal", "inaccurate", "inaccuracy", "unsafe",
    ),
    "chosen": ("preferred", "better", "winner", "accepted", "good", "best", "positive", "response_j"),
    "rejected": ("dispreferred", "worse", "loser", "bad", "worst", "negative", "response_k"),
}  # fmt: skip
# Words in names of columns that are no labels, such as vote_count
_NO_LABELS = frozenset(
    (
        "id", "ids", "uuid", "key", "index", "idx", "count", "counts", "num", "n", "latency", "time", "timestamp",
        "date", "duration", "seconds", "ms", "length", "tokens", "cost", "comment", "comments", "reason", "version",
        "max", "min", "std", "sd", "variance", "suggestion", "suggestions",
    )
)  # fmt: skip


def rating_of(row: Mapping[str, Any]) -> str | None:
    """The column of a row that looks like a label, or None.

    Example:
        >>> rating_of({"prompt": "Hi", "stars": 4}), rating_of({"prompt": "Hi", "vote_count": 4})
        ('stars', None)
    """
    return _like("label", {name: [value] for name, value in row.items()})


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
        free = {each: values for each, values in columns.items() if each not in found.values()}
        like = None if name in columns else _like(name, free)
        if like is not None:
            found[name] = like
    return found


def _like(name: str, columns: Mapping[str, Sequence[Any]]) -> str | None:
    free = [each for each in columns if each not in READ and _may_be(name, columns[each])]
    if name != "label":
        return _named_like(name, free)
    free = [each for each in free if not _NO_LABELS.intersection(words_of(each))]
    better = [each for each in free if not is_lower_better(each)]
    return _named_like(name, better) or _named_like(name, free)


def _named_like(name: str, free: Sequence[str]) -> str | None:
    lower = {"_".join(words_of(each)): each for each in free}
    words = (name, *_CALLED[name])
    for word in words:
        if word in lower:
            return lower[word]
    for word in words:
        parts = [each for each in free if word in words_of(each)]
        if parts:
            return parts[0]
    return None


def _may_be(name: str, values: Sequence[Any]) -> bool:
    values = [value for value in values if value is not None]
    if name == "label":
        return any(isinstance(value, bool | int | float | Decimal | str) for value in values) and not any(
            isinstance(value, str) and len(value) > 40 for value in values
        )
    if all(str(value).strip().lower() in _VERDICTS for value in values):
        return False
    return any(isinstance(value, str) or (isinstance(value, list) and is_messages(value)) for value in values)


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


# Words of spreadsheets and programs for a missing value
_MISSING = frozenset(
    (
        "", "na", "n/a", "n.a.", "#n/a", "nan", "<na>", "nat", "null", "nil", "none", "undefined", "missing", "\\n",
        "-", "--", "\N{EN DASH}", "\N{EM DASH}", ".", "?",
    )
)  # fmt: skip


def are_missing(labels: Sequence[Any]) -> list[bool]:
    """Whether each label is a text for a missing value. `-` beside `+` is a label.

    Example:
        >>> are_missing([4, "NA", "good", "-"]), are_missing(["+", "-"])
        ([False, True, False, True], [False, False])
    """
    words = _MISSING - {"-"} if "+" in labels else _MISSING
    return [isinstance(label, str) and label.strip().lower() in words for label in labels]


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
    likely = proposed(columns)
    needed = ["chosen", "rejected"] if is_paired else ["prompt", "completion", *(["label"] if needs_label else [])]
    missing = [name for name in needed if name not in names]
    families = _families(columns) if missing else []
    is_nested = any(isinstance(label, list | Mapping) for label in columns.get("label", ()))
    whole = whole_file(columns) if (missing and not families) or is_nested else None
    if whole is not None:
        raise ValueError(f"{where} has only one row, {whole}")
    if missing and (fault := _header_fault(names, columns)):
        raise ValueError(f"{where} {fault}")
    if missing:
        raise ValueError(
            f"{where} lacks the column{'s' * (len(missing) > 1)} {_and(missing)}; found "
            f"{', '.join(given.get(name, name) for name in names)}. "
            + (
                _as_rated(where, columns, likely, families) or _proposal(likely, given, columns, missing)
                if set(missing) <= set(likely) or not families
                else f"{_unless_rated(names, families)} looks like {' or '.join(families)} data: trl-ulma prepare "
                f"{families[0]} --dataset {where} --output FOLDER"
            )
        )
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
    labels = [value for value in columns.get("label", ()) if value is not None]
    labels = [label for label, is_missing in zip(labels, are_missing(labels), strict=True) if not is_missing]
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
    halves = {str(half).strip().lower() for name in ("chosen", "rejected") for half in columns.get(name, ())}
    texts = [name for name in names if {"model", *_CALLED["completion"]}.intersection(words_of(name))]
    if halves and all(any(half == name.lower() or half in words_of(name) for name in texts) for half in halves):
        raise ValueError(
            f"{where} has names in the place of answers: chosen and rejected are {_and(sorted(halves))}, as in the "
            f"columns {_and(texts)}. Write the answers themselves."
        )
    lacks_prompt = is_paired and "prompt" not in names and _are_answers(columns)
    if lacks_prompt and "prompt" in likely:
        raise ValueError(
            f"{where} has pairs without a prompt, and its column {likely['prompt']} would be ignored. If it is the "
            f"prompt, set --columns {_as_option({'prompt': likely['prompt'], **given})}. If not, remove the column."
        )
    unread = [
        name
        for name in names
        if name not in READ
        and (
            (_is_context(name) and _is_lost(name, columns)) or (lacks_prompt and any(map(_is_question, columns[name])))
        )
    ]
    said = []
    if unread:
        said.append(
            f"{where}: the text in column{'s' * (len(unread) > 1)} {_and(unread)} is ignored. If the answers depend on "
            "it, put it into the prompt."
        )
    said += [
        f"{where}: the column {name} is ignored. If it is {meant}, set --columns {_quoted(f'{meant}={name}')}."
        for name in names
        if name not in READ and (meant := _MISSPELT.get(re.sub(r"[^a-z]", "", name.lower()))) and meant not in names
    ]
    if is_paired and "label" in names and any(value is not None for value in columns["label"]):
        said.append(
            f"{where}: the column {given.get('label', 'label')} is ignored, because of each pair the chosen answer is "
            "good and the rejected one bad. If it says which answer is better, swap the answers accordingly."
        )
    for name in (name for name in names if name not in READ):
        values = [str(value).strip() for value in columns[name]]
        if not name.lower().endswith("status") and not _VERDICTS.issuperset(value.lower() for value in values):
            continue
        refused = [value for value in values if value.lower() in _REFUSED]
        if refused:
            said.append(
                f"{where}: the column {name}, which is not read, says {_and(list(dict.fromkeys(refused)))} in "
                f"{len(refused)} of the first {len(values)} rows. Remove such rows if they do not count."
            )
    scored = scores_of(names)
    scores = [columns[name] for name in scored]
    worse = sum(is_worse(*pair) for pair in zip(*scores, strict=True)) if is_paired else 0
    if worse:
        said.append(
            f"{where}: {worse} of its first {len(scores[0])} pairs have a {scored[0]} below their {scored[1]}, so "
            "their chosen answer is not the better one. Swap or remove them, unless lower scores are better."
        )
    return said


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
# What Prodigy writes in its column `answer` about a row
_VERDICTS = frozenset(("accept", "reject", "ignore"))
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


def _families(columns: Mapping[str, Sequence[Any]]) -> list[str]:
    """The families of `trl-ulma prepare` that have these columns."""
    from trl_ulma.data.adapters import FAMILIES, find

    return [name for name in FAMILIES if find(name).reads(columns)]


def _unless_rated(names: Sequence[str], families: Sequence[str]) -> str:
    """The start of a proposal. A family that makes demonstrations of all answers may ignore a column of labels."""
    from trl_ulma.data.adapters import find

    if not find(families[0]).rated or not find(families[0]).unused(names):
        return "It"
    return "If a column says how good answers are, name it: --columns label=COLUMN. If not, it"


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


def _as_rated(
    where: str, columns: Mapping[str, Sequence[Any]], likely: Mapping[str, str], families: Sequence[str]
) -> str:
    """The proposal of a family that reads a text, such as the input of Alpaca, besides those that rows have. Else "".

    Example:
        >>> rows = {"instruction": ["Add."], "input": ["2 + 2"], "output": ["4"], "rating": [5]}
        >>> print(_as_rated("a.csv", rows, proposed(rows), ["alpaca"]))
        `rating` looks like the label of alpaca data: trl-ulma prepare alpaca --dataset a.csv --output FOLDER --columns
        label=rating --label_type continuous
    """
    from trl_ulma.data.adapters import find

    if "label" not in likely or not families or find(families[0]).rated != families[0]:
        return ""
    unused = find(families[0]).unused(columns)
    if not any(name not in (*unused, *likely.values()) and _is_lost(name, columns) for name in columns):
        return ""
    label = likely["label"]
    values = [number(value) if isinstance(value, str) else value for value in columns[label]]
    is_rating = any(isinstance(value, int | float | Decimal) and not 0 <= value <= 1 for value in values)
    hint = direction(label) + _others(likely, columns)
    return (
        f"`{label}` looks like the label of {families[0]} data: trl-ulma prepare {families[0]} --dataset {where} "
        f"--output FOLDER --columns {_as_option({'label': label})}{' --label_type continuous' * is_rating}"
        + (f".{hint}" if hint else "")
    )


# Names of columns, without their punctuation, whose text belongs before the answer, as the prompt does
_CONTEXTS = re.compile(
    "(system|sys)(prompt|message|instruction|text)?s?|(inputs?|context|background|passage|document)(text)?s?|"
    "(chat|conversation|dialog(ue)?|message)?history"
)


def _is_context(name: str) -> bool:
    return _CONTEXTS.fullmatch("".join(words_of(name))) is not None


def _is_lost(name: str, columns: Mapping[str, Sequence[Any]]) -> bool:
    """Whether a column has texts or messages that are not in the prompts of their rows.

    Example:
        >>> _is_lost("context", {"context": ["Ann is 5."], "prompt": ["Ann is 5. How old is she?"]})
        False
    """
    prompts = columns.get("prompt", columns.get("chosen", ()))
    return any(
        text.strip() not in "\n".join(_texts(prompt))
        for value, prompt in zip_longest(columns[name], prompts)
        for text in _texts(value)
    )


def _texts(value: Any) -> list[str]:
    """The texts of a value: of a text, a list, or messages."""
    if isinstance(value, Mapping):
        value = next((value[key] for key in ("content", "value", "text") if key in value), None)
    if isinstance(value, list):
        return [text for each in value for text in _texts(each)]
    return [value] if isinstance(value, str) else []


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


def _as_option(columns: Mapping[str, str]) -> str:
    """The value for `--columns`, in the order of `READ`."""
    return _quoted(",".join(f"{ours}={columns[ours]}" for ours in dict.fromkeys((*READ, *columns)) if ours in columns))


def _proposal(
    likely: Mapping[str, str],
    given: Mapping[str, str],
    columns: Mapping[str, Sequence[Any]],
    missing: Sequence[str],
) -> str:
    if not likely or (set(likely) == {"label"} and len(missing) > 1):  # a label alone is of no use
        return (
            "Rows need prompt, completion and label (one answer per row), or chosen and rejected (pairs). Name the "
            "columns with --columns, as in --columns prompt=question,completion=response,label=rating"
        )
    (first, theirs), *others = likely.items()
    said = _and([f"`{theirs}` looks like the {first}", *(f"`{column}` like the {name}" for name, column in others)])
    hint = direction(likely.get("label", "")) + _others(likely, columns)
    return f"{said}: --columns {_as_option({**likely, **given})}" + (f".{hint}" if hint else "")


def _others(likely: Mapping[str, str], columns: Mapping[str, Sequence[Any]]) -> str:
    """What to do about the labels of other raters or answers, such as rating_2 beside rating_1. "" if there are none.

    Example:
        >>> _others({"label": "rating_1"}, {"rating_1": [4], "rating_2": [5]})
        ' `rating_2` stays unread. To keep all ratings, write one row per rating.'
    """

    def alike(name: str) -> list[str]:
        return [
            each
            for each in columns
            if name in likely and each != likely[name] and each not in READ and _may_be(name, columns[each])
            if _without_number(each) == _without_number(likely[name])
        ]

    labels, answers = alike("label"), alike("completion")
    if not labels:
        return ""
    unread = ", ".join(f"`{name}`" for name in (*answers, *labels))
    is_one = len(labels) + len(answers) == 1
    return (
        f" {unread} stay{'s' * is_one} unread. To keep all {'answers' if answers else 'ratings'}, write one row per "
        f"{'answer' if answers else 'rating'}."
    )


def _without_number(name: str) -> list[str]:
    """The words in the name of a column, without the number or letter of a rater.

    Example:
        >>> _without_number("rater_a_score"), _without_number("Rater2 Score")
        (['rater', 'score'], ['rater', 'score'])
    """
    return [word for each in words_of(name) if len(word := each.rstrip("0123456789")) > 1]


def _and(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
