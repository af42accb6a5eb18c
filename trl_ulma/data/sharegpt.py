"""ShareGPT's layout: turns with `from` and `value`, as demonstrations, with a label, or as pairs."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from trl_ulma.data.adapters import LABELED, Adapter, LeftOut, Noted, Outcome, labeled
from trl_ulma.data.pairs import split_messages

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "system": "system",
}
NOT_LEARNED = (
    "a message of its answer is marked as not to be learned (`weight` 0, or `train`, `training` or `loss` false). The "
    "mark is not read, so the answer is learned from"
)
# Marks of Axolotl and others, besides OpenAI's weight
_MARKS = ("train", "training", "loss")


def sharegpt(
    rows: Iterable[Mapping[str, Any]], *, label_type: str = "binary", liked: bool = False
) -> Iterator[Outcome]:
    """One row per conversation, with its last answer as completion. If it has `chosen` and `rejected`, two rows.

    Args:
        rows: `conversations` (turns with `from` and `value`, or messages) and optionally `system`. They have a `label`
            (or `kto_tag`), or `chosen` and `rejected` (one turn each). Without these, answers are demonstrations.
        label_type: the type of the labels. Answers with the binary label 1 are demonstrations.
        liked: answers with the binary label 1 are not demonstrations.

    Example:
        >>> turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]
        >>> [outcome] = sharegpt([{"conversations": turns}])
        >>> outcome["prompt"], outcome["sft_mask"]
        ([{'role': 'user', 'content': 'Hi'}], True)
    """
    for raw in rows:
        is_pair = raw.get("chosen") is not None or raw.get("rejected") is not None
        try:
            turns = as_turns(raw["conversations"])
            if raw.get("system"):
                turns = [{"role": "system", "content": raw["system"]}, *turns]
            if is_pair:
                answers = [(as_turns([raw.get("chosen")]), 1.0), (as_turns([raw.get("rejected")]), 0.0)]
                prompts = [turns, turns]
            else:
                check_unlabeled(turns)
                prompt, answer = split_messages(turns)
                if is_not_learned(answer):
                    yield Noted(NOT_LEARNED)
                label = next((raw[name] for name in ("label", "kto_tag") if name in raw), 1.0)
                prompts, answers = [prompt], [(answer, label)]
        except ValueError as error:
            yield from [LeftOut(str(error))] * (2 if is_pair else 1)
            continue
        for prompt, (answer, label) in zip(prompts, answers, strict=True):
            yield labeled(prompt, answer, label, label_type="binary" if is_pair else label_type, liked=liked)


def as_turns(turns: Any) -> list[dict[str, Any]]:
    """Turns with `from` and `value`, or with other names of roles, as messages.

    Raises:
        ValueError: if they are not turns.

    Example:
        >>> as_turns([{"from": "human", "value": "Hi"}, {"role": "model", "content": "Hello!"}])
        [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello!'}]
    """
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise ValueError("its conversation is not a list of turns with a role and content, or with `from` and `value`")
    found = []
    for turn in turns:
        if isinstance(turn.get("role"), str):
            role = turn["role"]
            found.append({**turn, "role": ROLES.get(role.lower(), role)})
            continue
        said = turn.get("from")
        role = ROLES.get(said.lower()) if isinstance(said, str) else None
        if role is None:
            raise ValueError(f"one of its turns is from {said!r}, which is neither a user, an assistant nor a system")
        if not isinstance(turn.get("value"), str):
            raise ValueError("one of its turns is not text")
        marks = {name: turn[name] for name in ("label", "weight", *_MARKS) if turn.get(name) is not None}
        found.append({"role": role, "content": turn["value"], **marks})
    return found


def is_not_learned(answer: Iterable[Mapping[str, Any]]) -> bool:
    """Whether one of an answer's messages is marked as not to be learned."""
    return any(turn.get("weight") == 0 or any(turn.get(name) is False for name in _MARKS) for turn in answer)


def check_unlabeled(turns: Iterable[Mapping[str, Any]]) -> None:
    """Raise ValueError if messages have labels of their own, which are for `turns` data."""
    if any(turn.get("label") is not None for turn in turns):
        raise ValueError("its turns have labels, so it is turns data and not demonstrations")


SHAREGPT = Adapter(
    sharegpt,
    needs=(("conversations",),),
    options=LABELED,
    rated="sharegpt",
    also=("system", "chosen", "rejected", "label", "kto_tag"),
)
