"""OpenAssistant conversations: trees of messages whose answers were rated, and ranked among their siblings."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from trl_ulma.data.adapters import Adapter, LeftOut, Outcome, as_number, labeled

LABELS = ("quality", "rank")
ROLES = {"prompter": "user", "assistant": "assistant"}
NO_PARENT = "a message before it is missing"
REFUSED = "it was deleted, or rejected in review"


def oasst(rows: Iterable[Mapping[str, Any]], *, label: str = "quality") -> Iterator[Outcome]:
    """One row per assistant message. Its prompt is the path from the root of the tree.

    Args:
        rows: trees (`message_tree_id` and `prompt`, a message with `replies`), or messages (`message_id`, `parent_id`,
            `text`, `role`), which are all kept in memory.
        label: "quality" is a binary label, the mean rating from 0 to 1. "rank" is a continuous label, minus the rank
            among the answers to a message, with 0 for the best.

    Example:
        >>> answer = {"text": "Hello!", "role": "assistant", "rank": 1, "replies": []}
        >>> tree = {"message_tree_id": "a", "prompt": {"text": "Hi", "role": "prompter", "replies": [answer]}}
        >>> [row["label"] for row in oasst([tree], label="rank")]
        [-1.0]
    """
    if label not in LABELS:
        raise ValueError(f"label is {label!r}; it must be one of {LABELS}.")
    flat: dict[Any, Mapping[str, Any]] = {}
    for raw in rows:
        if "message_id" in raw and not isinstance(raw.get("prompt"), Mapping):
            flat[raw["message_id"]] = raw
        elif not isinstance(raw.get("prompt"), Mapping):
            yield LeftOut("its tree has no first message")
        else:
            yield from _tree(raw["prompt"], [], label)
    for message in flat.values():
        if message.get("role") == "assistant":
            way = _way(message, flat)
            yield LeftOut(NO_PARENT) if way is None else _row(way, message, label)


def _tree(message: Mapping[str, Any], before: list[dict[str, Any]], label: str) -> Iterator[Outcome]:
    waiting = [(message, before)]
    while waiting:
        message, before = waiting.pop()
        if message.get("role") == "assistant":
            yield _row(before, message, label)
        way = [*before, _turn(message)]
        waiting += [(reply, way) for reply in reversed(message.get("replies") or []) if isinstance(reply, Mapping)]


def _way(message: Mapping[str, Any], flat: Mapping[Any, Mapping[str, Any]]) -> list[dict[str, Any]] | None:
    way: list[dict[str, Any]] = []
    parent, passed = message.get("parent_id"), set()
    while parent is not None:
        if parent not in flat or parent in passed:
            return None
        passed.add(parent)
        way.append(_turn(flat[parent]))
        parent = flat[parent].get("parent_id")
    return way[::-1]


def _turn(message: Mapping[str, Any]) -> dict[str, Any]:
    return {"role": ROLES.get(message.get("role", ""), "user"), "content": message.get("text")}


def _row(before: list[dict[str, Any]], message: Mapping[str, Any], label: str) -> Outcome:
    if message.get("deleted") is True or message.get("review_result") is False:
        return LeftOut(REFUSED)
    if not isinstance(message.get("text"), str) or not all(isinstance(turn["content"], str) for turn in before):
        return LeftOut("its text, or that of a message before it, is not text")
    value = message.get("rank") if label == "rank" else _quality(message.get("labels"))
    value = as_number(value)
    if value is None or (label == "rank" and value < 0):
        return LeftOut(f"it has no {label}")
    if label == "rank":
        return labeled(before, message["text"], 0 - value, label_type="continuous")
    return labeled(before, message["text"], value, scale=(0, 1))


def _quality(labels: Any) -> Any:
    """The quality. Trees have `{"quality": {"value": 0.5}}`, messages on the Hub have
    `{"name": ["quality"], "value": [0.5]}`."""
    if not isinstance(labels, Mapping):
        return None
    if isinstance(labels.get("name"), list) and isinstance(labels.get("value"), list):
        return dict(zip(labels["name"], labels["value"], strict=False)).get("quality")
    quality = labels.get("quality")
    return quality.get("value") if isinstance(quality, Mapping) else None


OASST = Adapter(
    oasst,
    needs=(("message_tree_id", "prompt"), ("message_id", "parent_id", "text", "role")),
    also=("rank", "labels", "deleted", "review_result"),
    options={
        "--label": {
            "choices": LABELS,
            "default": "quality",
            "help": "the label to use: quality is the mean rating, from 0 to 1; rank is minus the rank among siblings, "
            "a continuous label (default: %(default)s)",
        },
    },
)
