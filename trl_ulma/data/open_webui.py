"""Open WebUI: exported feedback, with a snapshot of the conversation."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from trl_ulma.data.adapters import LIKED, Adapter, LeftOut, Noted, Outcome, as_number, labeled
from trl_ulma.data.payloads import REASONED

KINDS = ("thumbs", "rating")
# Versions before 0.5.8 left the tags of the model
_REASONING = re.compile(r'<details\s+type="reasoning".*?</details>\s*|\A\s*<think>.*?</think>\s*', re.DOTALL)
_OTHER_DETAILS = re.compile(r'<details\s+type="(\w+)"')


def open_webui(
    rows: Iterable[Mapping[str, Any]], *, feedback: str = "thumbs", liked: bool = False
) -> Iterator[Outcome]:
    """One row per feedback. The prompt is the branch of the conversation that leads to the rated answer.

    Args:
        rows: `data` (with `rating`, and its `details`), `meta` (with `message_id`) and `snapshot`.
        feedback: "thumbs" has binary labels: 1 for a thumb up, 0 for a thumb down. "rating" has the rating from 1 to 10
            as a continuous label.
        liked: answers with a thumb up are not demonstrations.

    Example:
        >>> messages = {"a": {"role": "user", "content": "Hi", "parentId": None}}
        >>> messages["b"] = {"role": "assistant", "content": "Hello!", "parentId": "a"}
        >>> raw = {"data": {"rating": 1}, "meta": {"message_id": "b"}}
        >>> [outcome] = open_webui([raw | {"snapshot": {"chat": {"chat": {"history": {"messages": messages}}}}}])
        >>> outcome["prompt"], outcome["label"]
        ([{'role': 'user', 'content': 'Hi'}], 1.0)
    """
    if feedback not in KINDS:
        raise ValueError(f"feedback is {feedback!r}; it must be one of {KINDS}.")
    for raw in rows:
        try:
            turns, notes = _branch(raw)
        except ValueError as error:
            yield LeftOut(str(error))
            continue
        yield from notes
        data = raw.get("data")
        data = data if isinstance(data, Mapping) else {}
        if feedback == "thumbs":
            thumb = as_number(data.get("rating"))
            if thumb not in (None, -1, 0, 1):
                yield LeftOut("its thumb is not −1, 0 or 1")
                continue
            label = None if thumb is None else 0.5 + 0.5 * thumb
        else:
            label = next((each["rating"] for each in _rated(data.get("details"), raw.get("details"))), None)
        if label is None:
            yield LeftOut("it has no rating" if feedback == "rating" else "it has no thumb")
            continue
        kind, scale = ("binary", None) if feedback == "thumbs" else ("continuous", (1, 10))
        yield labeled(turns[:-1], turns[-1:], label, label_type=kind, liked=liked, scale=scale)


def _rated(*values: Any) -> list[Mapping[str, Any]]:
    return [value for value in values if isinstance(value, Mapping) and value.get("rating") is not None]


def _has(value: Any, key: str) -> bool:
    return isinstance(value, Mapping) and value.get(key) is not None


def _branch(raw: Mapping[str, Any]) -> tuple[list[dict[str, str]], list[Noted]]:
    """The turns up to the rated answer, and findings."""
    meta, snapshot = raw.get("meta"), raw.get("snapshot")
    if not _has(meta, "message_id") or not isinstance(snapshot, Mapping):
        raise ValueError("it has no message_id or no snapshot of the conversation")
    message_id = meta["message_id"]  # type: ignore[index] # `_has` is true
    chats, messages = [snapshot], None
    while _has(chats[-1], "chat"):
        chats.append(chats[-1]["chat"])
    for chat in chats:
        if _has(chat, "history") and _has(chat["history"], "messages"):
            messages = chat["history"]["messages"]
    if isinstance(messages, list):
        messages = {each.get("id"): each for each in messages if isinstance(each, Mapping)}
    if not isinstance(messages, Mapping) or not _has(messages, message_id):
        raise ValueError("its snapshot does not contain the rated message")
    turns, notes, at, seen = [], [], message_id, set()
    while at is not None:
        message = messages.get(at)
        if not isinstance(message, Mapping) or at in seen:
            raise ValueError("its snapshot does not contain all messages before the rated one")
        seen.add(at)
        content, role = message.get("content"), message.get("role")
        if turns and _has(message.get("merged"), "content"):
            content = message["merged"]["content"]  # the answers of several models as one, with which the talk went on
        if message.get("files"):
            raise ValueError("one of its turns has files, whose content is not in the export")
        if not isinstance(content, str):
            raise ValueError("one of its turns is not text")
        if role == "assistant":
            if _REASONING.search(content):
                content = _REASONING.sub("", content)
                notes.append(Noted(REASONED))
            if found := _OTHER_DETAILS.search(content):
                raise ValueError(f"one of its turns contains {found[1]}")
            output = message.get("output")
            for each in output if isinstance(output, list) else ():
                if not _has(each, "type") or each["type"] not in ("message", "reasoning"):
                    raise ValueError(f"one of its turns contains {each['type'] if _has(each, 'type') else each}")
            if "<details>" in content:
                notes.append(Noted("one of its turns contains a <details> block, which can be reasoning"))
            if message.get("sources"):
                notes.append(Noted("one of its answers used documents, which the prompt does not contain"))
        if role != "assistant" or content.strip() or not turns:  # Open WebUI drops empty answers from requests
            turns.append({"role": role, "content": content})
        at = message.get("parentId")
    system = [chat["params"]["system"] for chat in chats if _has(chat, "params") and _has(chat["params"], "system")]
    if system and system[-1]:
        turns.append({"role": "system", "content": system[-1]})
    if turns[0]["role"] != "assistant":
        raise ValueError("the rated message is not an answer")
    return turns[::-1], notes


OPEN_WEBUI = Adapter(
    open_webui,
    needs=(("data", "meta", "snapshot"),),
    also=("details",),
    options=LIKED
    | {
        "--feedback": {
            "choices": KINDS,
            "default": "thumbs",
            "help": "thumbs gives binary labels, rating gives the rating from 1 to 10 (default: %(default)s)",
        }
    },
)
