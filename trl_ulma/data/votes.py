"""Questions with several voted answers: StackExchange preferences, SHP (Reddit)."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from trl_ulma.data.adapters import Adapter, LeftOut, Outcome, as_bool, as_number, compared, row

LABELS = ("log", "votes")
NOT_A_NUMBER = "its votes are not a number"
SEEN = "an earlier pair has the same answer"


def votes(rows: Iterable[Mapping[str, Any]], *, label: str = "log", accepted: bool = False) -> Iterator[Outcome]:
    """One row per answer, with a continuous label from its votes. Labels are not centered.

    There are two layouts. StackExchange preferences have `question` and `answers`, each with `text`, `pm_score` or
    `score`, and optionally `selected`. SHP has `post_id`, `history` (the post) and two comments per row, `human_ref_A`
    and `human_ref_B`, with `score_A` and `score_B`. A comment that is in several raw rows becomes one row. Centering
    labels would need all rows at once.

    Args:
        rows: the raw rows.
        label: "log" is `pm_score` if the data has it (log2(1 + votes), rounded, plus 1 for an accepted answer, −1
            below 0 votes: Askell et al., arXiv 2112.00861, §4.1), and sign(votes)·log2(1 + |votes|) otherwise. "votes"
            is the number of votes.
        accepted: accepted answers (`selected`) are demonstrations.

    Raises:
        ValueError: if `label` or `accepted` needs information that the data lacks.

    Example:
        >>> answers = [{"text": "Boil it.", "score": 7, "selected": True}, {"text": "Dunno.", "score": -1}]
        >>> [row["label"] for row in votes([{"question": "An egg?", "answers": answers}])]
        [3.0, -1.0]
    """
    if label not in LABELS:
        raise ValueError(f"label is {label!r}; it must be one of {LABELS}.")
    seen: set[int] = set()
    for raw in rows:
        if "answers" in raw:
            yield from _stack_exchange(raw, label, accepted)
        elif accepted:
            raise ValueError("SHP has no information on accepted answers. Remove `accepted`.")
        else:
            yield from _shp(raw, label, seen)


def _stack_exchange(raw: Mapping[str, Any], label: str, accepted: bool) -> Iterator[Outcome]:
    answers = raw["answers"]
    if not isinstance(answers, list) or not answers:
        yield LeftOut("its question has no answers")
        return
    found: list[Outcome] = []
    for answer in answers:
        if not isinstance(answer, Mapping):
            found.append(LeftOut("its answer is not an object with `text` and `pm_score` or `score`"))
            continue
        value = answer.get("score")
        if label == "votes" and value is None and answer.get("pm_score") is not None:
            raise ValueError(
                "The answers have a `pm_score`, which is a logarithm, but no `score`. Use the label 'log'."
            )
        selected = as_bool(answer.get("selected"))
        if accepted and selected is None:
            raise ValueError("The answers have no information on accepted answers (`selected`). Remove `accepted`.")
        if label == "log":
            value = answer["pm_score"] if answer.get("pm_score") is not None else _log(value)
        found.append(_row(raw["question"], answer.get("text"), value, demonstration=accepted and selected is True))
    yield from compared(found)


def _shp(raw: Mapping[str, Any], label: str, seen: set[int]) -> Iterator[Outcome]:
    for half in "AB":
        text, value = raw[f"human_ref_{half}"], raw[f"score_{half}"]
        key = hash((raw["post_id"], text))
        if key in seen:
            yield LeftOut(SEEN)
            continue
        found = _row(raw["history"], text, _log(value) if label == "log" else value)
        if isinstance(found, dict):
            seen.add(key)
        yield found


def _row(question: Any, text: Any, value: Any, *, demonstration: bool = False) -> Outcome:
    value = as_number(value)
    if value is None:
        return LeftOut(NOT_A_NUMBER)
    return row(question, text, float(value), demonstration=demonstration, label_type="continuous")


def _log(count: Any) -> float | None:
    count = as_number(count)
    return None if count is None else math.copysign(math.log2(1 + abs(count)), count)


VOTES = Adapter(
    votes,
    needs=(
        ("question", "answers"),
        ("post_id", "history", "human_ref_A", "human_ref_B", "score_A", "score_B"),
    ),
    options={
        "--label": {
            "choices": LABELS,
            "default": "log",
            "help": "the label to use: log is pm_score if the data has it, and ±log2(1 + |votes|) otherwise; votes is "
            "the number of votes (default: %(default)s)",
        },
        "--accepted": {"action": "store_true", "help": "treat accepted answers (`selected`) as demonstrations"},
    },
)
