"""Converts messages to the form that chat templates need, and finds what a template leaves out of them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from trl_ulma.labels import BESIDE_CONTENT, INSTEAD_OF_CONTENT

# Keys of messages for the reasoning before the answer
REASONING = ("reasoning_content", "reasoning", "thinking")
_SYSTEM = ("system", "developer")


def without_nones(value: Any) -> Any:
    """Messages, tools or settings without keys whose value is None, and with lists instead of NumPy arrays.

    Arrow adds such keys if other rows have them, for example for the arguments of another tool.

    Example:
        >>> without_nones([{"role": "user", "content": "Hi", "name": None}])
        [{'role': 'user', 'content': 'Hi'}]
    """
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: without_nones(each) for key, each in value.items() if each is not None}
    return [without_nones(each) for each in value] if isinstance(value, list) else value


def joined(turn: dict[str, Any]) -> dict[str, Any]:
    """A message whose content is text. If all parts of a content are text, they are joined.

    Example:
        >>> joined({"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": " there"}]})
        {'role': 'user', 'content': 'Hi there'}
    """
    parts = turn.get("content")
    if not isinstance(parts, list) or not all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in parts):
        return turn
    if any(part.get("type", "text") != "text" for part in parts):
        return turn
    return {**turn, "content": "".join(part["text"] for part in parts)}


def decoded(turn: dict[str, Any]) -> dict[str, Any]:
    """A message whose tool calls have their arguments as dicts. Arguments that are JSON text are parsed.

    Example:
        >>> decoded({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]})
        {'role': 'assistant', 'tool_calls': [{'function': {'name': 'f', 'arguments': {'a': 1}}}]}
    """
    return _with_arguments(turn, _parsed)


def encoded(turn: dict[str, Any]) -> dict[str, Any]:
    """A message whose tool calls have their arguments as JSON text, for templates that concatenate them.

    Example:
        >>> encoded({"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": "é"}}]})
        {'role': 'assistant', 'tool_calls': [{'name': 'f', 'arguments': '{"a": "é"}'}]}
    """
    return _with_arguments(turn, lambda a: a if isinstance(a, str) else json.dumps(a, ensure_ascii=False))


def _with_arguments(turn: dict[str, Any], change: Any) -> dict[str, Any]:
    calls = turn.get("tool_calls")
    if not isinstance(calls, list):
        return turn
    made = []
    for call in calls:
        if isinstance(call, dict) and "arguments" in call:
            call = {**call, "arguments": change(call["arguments"])}
        elif isinstance(call, dict) and isinstance(call.get("function"), dict) and "arguments" in call["function"]:
            call = {**call, "function": {**call["function"], "arguments": change(call["function"]["arguments"])}}
        made.append(call)
    return {**turn, "tool_calls": made}


def _parsed(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        value = json.loads(arguments)
    except ValueError:
        return arguments
    return value if isinstance(value, dict) else arguments


def calls_of(turn: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The function calls of a message, each with its `name` and `arguments`.

    Example:
        >>> [call["name"] for call in calls_of({"tool_calls": [{"function": {"name": "f"}}, {"name": "g"}]})]
        ['f', 'g']
    """
    calls = turn.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        if isinstance(call, Mapping):
            inner = call.get("function")
            yield inner if isinstance(inner, Mapping) else call


def prints_python(messages: Sequence[Mapping[str, Any]], whole: str) -> bool:
    """Whether a rendering contains a tool call's arguments as a printed Python dict, which is not JSON."""
    found = (call.get("arguments") for turn in messages for call in calls_of(turn))
    return any(isinstance(each, dict) and "'" in str(each) and str(each) in whole for each in found)


def left_out_by_template(messages: Sequence[Mapping[str, Any]], first: int, whole: str) -> str | None:
    """A description of the text of the messages that a rendering lacks. None if it has all text.

    The texts must be in the order of their messages, except system messages, which can be anywhere. Whitespace can
    differ, and text can be escaped as in JSON. The assistant's reasoning in the prompt can be missing, because
    templates leave it out on purpose.

    Args:
        messages: the messages of prompt and completion.
        first: the index of the first message of the completion.
        whole: the rendering of the messages.

    Example:
        >>> messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
        >>> left_out_by_template(messages, 1, "<user>Hi<assistant>")
        'the chat template leaves out the content of its assistant message'
    """
    wanted = [(i, turn["role"], list(_texts(turn, i >= first))) for i, turn in enumerate(messages)]
    at = 0
    for _, role, texts in wanted:
        ends = []
        for _, text in texts:
            found = whole.find(text.strip(), 0 if role in _SYSTEM else at)
            if found < 0:
                return _left_out_but_for_spaces(wanted, first, whole)
            ends.append(found + len(text.strip()))
        if role not in _SYSTEM:
            at = max([at, *ends])
    return None


def _left_out_but_for_spaces(wanted: list, first: int, whole: str) -> str | None:
    """A slower `left_out_by_template` that ignores whitespace and escapes, and the order of the prompt's messages."""
    whole, at, prompt_end = _squashed(whole), 0, 0
    for number, role, texts in wanted:
        if number == first:
            at = prompt_end
        ends = []
        for field, text in texts:
            forms = [text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1]]
            hits = [(whole.find(form, at), len(form)) for form in map(_squashed, forms)]
            hits = [start + length for start, length in hits if start >= 0]
            if not hits:
                return f"the chat template leaves out the {field} of its {role} message"
            ends.append(min(hits))
        if number >= first:
            at = max([at, *ends])
        elif role not in _SYSTEM:
            prompt_end = max([0, *ends])
    return None


def _squashed(text: str) -> str:
    return "".join(text.split())


def _texts(turn: Mapping[str, Any], is_scored: bool) -> Iterator[tuple[str, str]]:
    """The (field, text) of everything that a rendering of a message must contain."""
    is_thought = turn["role"] == "assistant" and not is_scored
    content = turn.get("content")
    if not (is_thought and turn.get("tool_calls")):  # in a prompt, templates can leave out the text beside a tool call
        for text in _leaves(content, parts=True):
            yield "content", text.split("</think>")[-1] if is_thought else text
    if not is_thought:
        thought = next((turn[name] for name in REASONING if turn.get(name)), None)
        for text in _leaves(thought):
            yield "reasoning", text
    for call in calls_of(turn):
        if isinstance(call.get("name"), str):
            yield "tool call", call["name"]
        for text in _leaves(call.get("arguments")):
            yield "tool call's arguments", text
    calls = turn.get("tool_calls")
    for text in _leaves(calls if isinstance(calls, str) else None):
        yield "tool calls in JSON text", text
    for name in (*BESIDE_CONTENT, *(() if content else INSTEAD_OF_CONTENT)):
        for text in _leaves(turn.get(name)):
            yield f"key {name!r}", text


def _leaves(value: Any, *, parts: bool = False) -> Iterator[str]:
    """The texts and numbers in a value. With `parts`, only the text of a content's parts."""
    if isinstance(value, str):
        if value.strip():
            yield value
    elif isinstance(value, int | float) and not isinstance(value, bool):  # templates write true or True
        yield f"{value:g}" if isinstance(value, float) and value == int(value) else str(value)
    elif isinstance(value, list):
        for each in value:
            if parts and isinstance(each, dict):
                yield from _leaves(each.get("text"))
            else:
                yield from _leaves(each)
    elif isinstance(value, dict):
        for each in value.values():
            yield from _leaves(each)
