"""Chatbot Arena: two conversations with the same questions, and a vote, which can be a tie."""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from trl_ulma.data.adapters import LIKED, Adapter, LeftOut, Outcome, as_bool, compared, labeled
from trl_ulma.data.pairs import split_messages
from trl_ulma.labels import is_messages

# vote: the labels of A and B
VOTES = {"model_a": (1.0, 0.0), "model_b": (0.0, 1.0), "tie": (0.5, 0.5), "tie (bothbad)": (0.0, 0.0)}
VOTES["both_bad"] = VOTES["tie (bothbad)"]
VOTES |= {name: VOTES[f"model_{name[-1]}"] for name in ("a", "b", "response_a", "response_b")}
TIES = ("half", "leave_out")
NO_VOTE = "its vote is not one of " + ", ".join(VOTES)


def arena(rows: Iterable[Mapping[str, Any]], *, ties: str = "half", liked: bool = False) -> Iterator[Outcome]:
    """Two rows per vote, with binary labels: 1 for the winner and 0 for the loser.

    Both answers of a tie have the label ½, or 0 if both were bad.

    Args:
        rows: `conversation_a`, `conversation_b` (messages) and `winner`; or `prompt`, `response_a`, `response_b` (text,
            or lists of texts, which can be JSON text) and `winner`, or `winner_model_a`, `winner_model_b`,
            `winner_tie`.
        ties: "half", or "leave_out" to leave out both answers of a tie.
        liked: answers with label 1 are not demonstrations.

    Example:
        >>> a = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
        >>> b = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hey!"}]
        >>> raw = {"conversation_a": a, "conversation_b": b, "winner": "tie"}
        >>> [row["label"] for row in arena([raw])]
        [0.5, 0.5]
    """
    if ties not in TIES:
        raise ValueError(f"ties is {ties!r}; it must be one of {TIES}.")
    for raw in rows:
        vote = raw["winner"] if "winner" in raw else _vote(raw)
        vote = vote.strip().lower() if isinstance(vote, str) else vote
        if vote not in VOTES:
            yield from [LeftOut(NO_VOTE)] * 2
            continue
        if vote == "tie" and ties == "leave_out":
            yield from [LeftOut("its vote is a tie")] * 2
            continue
        found: list[Outcome] = []
        for half, label in zip("ab", VOTES[vote], strict=True):
            try:
                conversation = raw[f"conversation_{half}"] if "conversation_a" in raw else _conversation(raw, half)
                if not is_messages(conversation):
                    raise ValueError("its conversation is not a list of turns with a role and content")
                prompt, answer = split_messages(conversation)
            except ValueError as error:
                found.append(LeftOut(str(error)))
                continue
            found.append(labeled(prompt, answer, label, liked=liked))
        yield from compared(found)


def _vote(raw: Mapping[str, Any]) -> str | None:
    names = {"model_a": "winner_model_a", "model_b": "winner_model_b", "tie": "winner_tie"}
    found = [vote for vote, name in names.items() if as_bool(raw[name])]
    return found[0] if len(found) == 1 else None


def _conversation(raw: Mapping[str, Any], half: str) -> list[dict[str, str]]:
    questions, answers = _texts(raw["prompt"]), raw[f"response_{half}"]
    # The answer to a question that is no list can itself be a list, as JSON
    answers = [answers] if [raw["prompt"]] == questions and isinstance(answers, str) else _texts(answers)
    if len(questions) != len(answers):
        raise ValueError("its conversation has different numbers of questions and answers")
    turns = zip(questions, answers, strict=True)
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        try:
            found = json.loads(value)
        except json.JSONDecodeError:
            found = value
        value = found if isinstance(found, list) else [value]
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError("its question or answer is not text")
    return value


ARENA = Adapter(
    arena,
    needs=(
        ("conversation_a", "conversation_b", "winner"),
        ("prompt", "response_a", "response_b", "winner"),
        ("prompt", "response_a", "response_b", "winner_model_a", "winner_model_b", "winner_tie"),
    ),
    options=LIKED
    | {
        "--ties": {
            "choices": TIES,
            "default": "half",
            "help": "what to do with ties: half gives both answers the label ½, leave_out leaves both out (default: "
            "%(default)s). If both answers were voted bad, their label is 0",
        },
    },
)
