"""Conversations with a label for the last answer, or for each answer."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from trl_ulma.data.adapters import LABELED, Adapter, LeftOut, Noted, Outcome, labeled
from trl_ulma.data.pairs import split_messages
from trl_ulma.data.sharegpt import NOT_LEARNED, as_turns, is_not_learned

NO_LABEL = "its turn has no label"


def messages(
    rows: Iterable[Mapping[str, Any]], *, label_type: str = "binary", liked: bool = False
) -> Iterator[Outcome]:
    """One row per conversation. The last assistant turn is the answer.

    Args:
        rows: `messages` and `label`.
        label_type: the type of the labels. Answers with the binary label 1 are demonstrations.
        liked: answers with the binary label 1 are not demonstrations.

    Example:
        >>> turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Go."}]
        >>> [outcome] = messages([{"messages": turns, "label": 0}])
        >>> outcome["completion"], outcome["label"]
        ([{'role': 'assistant', 'content': 'Go.'}], 0.0)
    """
    for raw in rows:
        try:
            prompt, completion = split_messages(as_turns(raw["messages"]))
        except ValueError as error:
            yield LeftOut(str(error))
            continue
        if is_not_learned(completion):
            yield Noted(NOT_LEARNED)
        yield labeled(prompt, completion, raw["label"], label_type=label_type, liked=liked)


def turns(
    rows: Iterable[Mapping[str, Any]],
    *,
    label_type: str = "binary",
    liked: bool = False,
    label_map: Mapping[str, Any] | None = None,
) -> Iterator[Outcome]:
    """One row per assistant turn. Its prompt consists of all previous turns. Turns without a label are left out.

    Args:
        rows: `messages`. Each assistant turn has a `label` in addition to its `content`.
        label_type: the type of the labels. Answers with the binary label 1 are demonstrations.
        liked: answers with the binary label 1 are not demonstrations.
        label_map: label, as text → number.

    Example:
        >>> first = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Go.", "label": 0}]
        >>> second = [{"role": "user", "content": "Oh."}, {"role": "assistant", "content": "Sorry!", "label": 1}]
        >>> [(len(row["prompt"]), row["label"]) for row in turns([{"messages": first + second}])]
        [(1, 0.0), (3, 1.0)]
    """
    for raw in rows:
        try:
            conversation = as_turns(raw["messages"])
        except ValueError as error:
            yield LeftOut(str(error))
            continue
        plain = [{key: value for key, value in turn.items() if key != "label"} for turn in conversation]
        for place, turn in enumerate(conversation):
            if turn["role"] != "assistant":
                continue
            label = raw["messages"][place].get("label")
            if label is None:
                yield LeftOut(NO_LABEL)
                continue
            answer = plain[place : place + 1]
            yield labeled(plain[:place], answer, label, label_type=label_type, liked=liked, label_map=label_map)


MESSAGES = Adapter(messages, needs=(("messages", "label"),), refuses=("chosen", "rejected"), options=LABELED)
TURNS = Adapter(
    turns, needs=(("messages",),), refuses=("label", "chosen", "rejected"), options=LABELED, maps_labels=True
)
