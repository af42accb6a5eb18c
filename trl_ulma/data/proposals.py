"""Which columns look like those that trainers read, and how to name them and their labels on the command line."""

import re
import shlex
from collections.abc import Mapping, Sequence
from decimal import Decimal
from itertools import zip_longest
from typing import Any

from trl_ulma.data.columns import READ, number
from trl_ulma.data.directions import direction, is_lower_better, words_of
from trl_ulma.labels import is_messages

# Common other names of columns, the most likely first
CALLED = {
    "prompt": ("question", "instruction", "query", "input", "problem", "context", "post", "user", "request", "message"),
    "completion": ("response", "answer", "output", "reply", "generation", "completions", "assistant", "generated"),
    "label": (
        "labels", "rating", "score", "feedback", "thumb", "thumbs", "vote", "votes", "reward", "quality", "overall",
        "stars", "grade", "preference", "is_good", "liked", "upvoted", "correct", "likes", "upvotes", "helpful",
        "passed", "success", "satisfaction", "satisfied", "csat", "nps", "points", "marks", "rated", "verdict",
        "judgment", "judgement", "helpfulness", "correctness", "accuracy", "relevance", "usefulness", "utility",
        "win_rate", "elo", "karma", "mos", "pass", "bleu", "rouge", "f1", "rank", "toxicity", "toxic", "harmful",
        "flagged", "bad", "dislikes", "downvotes", "errors", "disliked", "downvoted", "unhelpful", "incorrect", "wrong",
        "complaints", "complaint", "issues", "refusal", "inaccurate", "inaccuracy", "unsafe", "error_rate", "loss",
        "perplexity", "ppl", "wer", "cer", "mse", "rmse", "mae", "brier", "edit_distance", "severity", "harm",
        "harmfulness", "hallucination", "hallucinations", "hallucinated", "violation", "violations", "mistakes",
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
# Whole names of such columns; model_score can be a label
_NO_LABEL_NAMES = frozenset(
    (
        "lang", "language", "locale", "temperature", "top_p", "top_k", "seed", "split", "topic", "category", "subject",
        "title", "url", "domain", "tag", "tags", "license", "model", "model_name", "source", "name", "user_name",
        "username", "country", "region", "platform", "device", "channel", "system", "type", "task", "difficulty",
    )
)  # fmt: skip
# Those of them that can be numbers of good or bad votes
_COUNTS = frozenset(("count", "counts", "num", "n"))
# What Prodigy writes in its column `answer` about a row
VERDICTS = frozenset(("accept", "reject", "ignore"))


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
    if compared_answers(columns, found):
        del found["completion"]
        found.pop("label", None)
    return found


def compared_answers(columns: Mapping[str, Sequence[Any]], likely: Mapping[str, str]) -> list[str]:
    """The columns of answers to one prompt, if there are several and one label, which then compares them. Else [].

    Args:
        columns: name → the values of a few rows.
        likely: the columns that look like those that are missing.

    Example:
        >>> compared_answers({"answer_a": ["Yes"], "answer_b": ["No"], "better": [1]}, {"completion": "answer_a"})
        ['answer_a', 'answer_b']
    """
    answers = [likely["completion"], *_alike("completion", likely, columns)] if "completion" in likely else []
    base = _without_number(answers[0]) if answers else []
    # A rated `response` can have a context, a count or a version `response_2` beside it
    is_one_rated = any(words_of(name) == base for name in answers)
    return [] if len(answers) < 2 or is_one_rated or _alike("label", likely, columns) else answers


def _like(name: str, columns: Mapping[str, Sequence[Any]]) -> str | None:
    free = [each for each in columns if each not in READ and _may_be(name, columns[each])]
    if name != "label":
        return _named_like(name, free)
    free = [each for each in free if not _NO_LABELS.intersection(words_of(each))]
    better = [each for each in free if not is_lower_better(each)]
    return _named_like(name, better) or _named_like(name, free)


def _named_like(name: str, free: Sequence[str]) -> str | None:
    lower = {"_".join(words_of(each)): each for each in free}
    words = (name, *CALLED[name])
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
    if all(str(value).strip().lower() in VERDICTS for value in values):
        return False
    return any(isinstance(value, str) or (isinstance(value, list) and is_messages(value)) for value in values)


def quoted(text: str) -> str:
    """A value for the command line, quoted for the shell if it needs quotes.

    Example:
        >>> quoted("label=rating"), quoted("label=Your rating"), quoted("label=Is it $5?")
        ('label=rating', '"label=Your rating"', "'label=Is it $5?'")
    """
    if re.fullmatch(r"[^\s\\$`\"'!&|;<>()*?\[\]{}#~]+", text):
        return text
    return shlex.quote(text) if set(text) & set('\\$`"!') else f'"{text}"'


def as_option(columns: Mapping[str, str]) -> str:
    """The value for `--columns`, in the order of `READ`, quoted for the shell."""
    return quoted(as_value(columns))


def as_value(columns: Mapping[str, str]) -> str:
    """The value for `--columns`, in the order of `READ`."""
    return ",".join(f"{ours}={columns[ours]}" for ours in dict.fromkeys((*READ, *columns)) if ours in columns)


def proposal(
    likely: Mapping[str, str],
    given: Mapping[str, str],
    columns: Mapping[str, Sequence[Any]],
    missing: Sequence[str],
) -> str:
    like = {name: found for name in missing if (found := _like(name, columns))}
    if "completion" in like and (answers := compared_answers(columns, like)):
        return (
            f"{listed([f'`{name}`' for name in answers])} look like answers to one prompt, which are compared. Write "
            "the better one as `chosen` and the other one as `rejected`, or see trl-ulma prepare --help for layouts "
            "that it reads. If only one of them is rated, name it and its label with --columns"
        )
    if not likely or (set(likely) == {"label"} and len(missing) > 1):  # a label alone is of no use
        return (
            "Rows need prompt, completion and label (one answer per row), or chosen and rejected (pairs). Name the "
            "columns with --columns, as in --columns prompt=question,completion=response,label=rating"
        )
    hint = direction(likely.get("label", "")) + _others(likely, columns)
    return f"{_looks_like(likely)}: --columns {as_option({**likely, **given})}" + (f".{hint}" if hint else "")


def _looks_like(likely: Mapping[str, str]) -> str:
    (first, theirs), *others = likely.items()
    return listed([f"`{theirs}` looks like the {first}", *(f"`{column}` like the {name}" for name, column in others)])


def as_rated(
    where: str, columns: Mapping[str, Sequence[Any]], likely: Mapping[str, str], families: Sequence[str]
) -> str:
    """The proposal of a family that reads a text, such as the input of Alpaca, besides those that rows have. Else "".

    Example:
        >>> rows = {"instruction": ["Add."], "input": ["2 + 2"], "output": ["4"], "rating": [5]}
        >>> print(as_rated("a.csv", rows, proposed(rows), ["alpaca"]))
        `rating` looks like the label of alpaca data: trl-ulma prepare alpaca --dataset a.csv --output FOLDER --columns
        label=rating --label_type continuous
    """
    from trl_ulma.data.adapters import find

    family = find(families[0]).rated if families else ""
    if "label" not in likely or not family:
        return ""
    if family != families[0] and not any({*layout} <= {*columns, "label"} for layout in find(family).needs):
        return ""
    unused = find(families[0]).unused(columns)
    if not any(name not in (*unused, *likely.values()) and is_lost(name, columns) for name in columns):
        return ""
    label = likely["label"]
    values = [number(value) if isinstance(value, str) else value for value in columns[label]]
    is_rating = any(isinstance(value, int | float | Decimal) and not 0 <= value <= 1 for value in values)
    hint = direction(label) + _others(likely, columns)
    return (
        f"`{label}` looks like the label of {family} data: trl-ulma prepare {family} --dataset {quoted(where)} "
        f"--output FOLDER --columns {as_option({'label': label})}{' --label_type continuous' * is_rating}"
        + (f".{hint}" if hint else "")
    )


def families_of(columns: Mapping[str, Sequence[Any]]) -> list[str]:
    """The families of `trl-ulma prepare` that have these columns."""
    from trl_ulma.data.adapters import FAMILIES, find

    return [name for name in FAMILIES if find(name).reads(columns)]


def without_label(
    where: str, columns: Mapping[str, Sequence[Any]], likely: Mapping[str, str], given: Mapping[str, str]
) -> str:
    """The proposal for prompts and answers of which no column looks like the label: to name it, or demonstrations.

    Args:
        where: the name of the dataset.
        columns: name → the values of a few rows.
        likely: the columns that look like those that are missing.
        given: the columns that `--columns` gives.

    Example:
        >>> print(without_label("a.csv", {"prompt": ["Hi"], "answer": ["Ho"]}, {"completion": "answer"}, {}))
        `answer` looks like the completion. It looks like demonstrations data: trl-ulma prepare demonstrations --dataset
        a.csv --output FOLDER --columns completion=answer
    """
    known = {**likely, **given}
    start = f"{_looks_like(likely)}. " if likely else ""
    return start + as_family(where, ["demonstrations"], [*{*columns} - {*likely.values()}], known, columns)


def as_family(
    where: str,
    families: Sequence[str],
    names: Sequence[str],
    given: Mapping[str, str],
    columns: Mapping[str, Sequence[Any]],
) -> str:
    """The proposal of `trl-ulma prepare`. A family that makes demonstrations of all answers may ignore a label.

    Args:
        where: the name of the dataset.
        families: the families that have these columns.
        names: the columns that may be labels.
        given: column → its name in the data, as far as it is another.
        columns: name → the values of a few rows.
    """
    from trl_ulma.data.adapters import find

    start = "It"
    if find(families[0]).rated and (unused := find(families[0]).unused(names)):
        labels = [name for name in unused if _may_be("label", columns[name])]
        labels = [name for name in labels if not (_NO_LABELS - _COUNTS).intersection(words_of(name))]
        labels = [name for name in labels if "_".join(words_of(name)) not in _NO_LABEL_NAMES]
        option = as_option({**given, "label": labels[0] if len(labels) == 1 else "COLUMN"})
        start = f"If a column says how good answers are, name it: --columns {option}. If not, it"
        if len(labels) == 1:
            start = (
                f"If `{labels[0]}` says how good answers are, set --columns {option}.{direction(labels[0])} If not, it"
            )
    used = {ours: theirs for ours, theirs in given.items() if not find(families[0]).unused([ours])}
    return (
        f"{start} looks like {' or '.join(families)} data: trl-ulma prepare {families[0]} --dataset {quoted(where)} "
        f"--output FOLDER{f' --columns {as_option(used)}' if used else ''}"
    )


def _others(likely: Mapping[str, str], columns: Mapping[str, Sequence[Any]]) -> str:
    """What to do about the labels of other raters or answers, such as rating_2 beside rating_1. "" if there are none.

    Example:
        >>> _others({"label": "rating_1"}, {"rating_1": [4], "rating_2": [5]})
        ' `rating_2` stays unread. To keep all ratings, write one row per rating.'
    """

    labels, answers = _alike("label", likely, columns), _alike("completion", likely, columns)
    if not labels:
        return ""
    unread = ", ".join(f"`{name}`" for name in (*answers, *labels))
    is_one = len(labels) + len(answers) == 1
    return (
        f" {unread} stay{'s' * is_one} unread. To keep all {'answers' if answers else 'ratings'}, write one row per "
        f"{'answer' if answers else 'rating'}."
    )


def _alike(name: str, likely: Mapping[str, str], columns: Mapping[str, Sequence[Any]]) -> list[str]:
    """The columns with the same name as the one that looks like `name`, but for a number or letter."""
    return [
        each
        for each in columns
        if name in likely and each != likely[name] and each not in READ and _may_be(name, columns[each])
        if _without_number(each) == _without_number(likely[name])
    ]


def unread_labels(likely: Mapping[str, str], columns: Mapping[str, Sequence[Any]]) -> str:
    """What to say of other columns that look like labels, without a full stop. "" if there are none.

    Example:
        >>> unread_labels({"label": "likes"}, {"likes": [4], "dislikes": [5]})
        '; `dislikes` stays unread'
    """
    if others := _others(likely, columns):
        return f";{others.removesuffix('.')}"
    unread: list[str] = []
    rest = {name: values for name, values in columns.items() if name not in likely.values()}
    while "label" in likely and (name := _like("label", rest)):
        unread.append(name)
        del rest[name]
    return f"; {listed([f'`{name}`' for name in unread])} stay{'s' * (len(unread) == 1)} unread" if unread else ""


def _without_number(name: str) -> list[str]:
    """The words in the name of a column, without the number or letter of a rater.

    Example:
        >>> _without_number("rater_a_score"), _without_number("Rater2 Score")
        (['rater', 'score'], ['rater', 'score'])
    """
    return [word for each in words_of(name) if len(word := each.rstrip("0123456789")) > 1]


def is_lost(name: str, columns: Mapping[str, Sequence[Any]]) -> bool:
    """Whether a column has texts or messages that are not in the prompts of their rows.

    Example:
        >>> is_lost("context", {"context": ["Ann is 5."], "prompt": ["Ann is 5. How old is she?"]})
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


def listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
