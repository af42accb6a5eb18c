"""The messages in what applications send to a model and get from it, as several libraries store them."""

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

from trl_ulma.data.sharegpt import ROLES

REASONED = "the reasoning in one of its turns is removed"
# Keys of an object whose values are the messages, or the message. "content" only if it is an object, as in Gemini.
_INSIDE = ("messages", "contents", "message", "content")
# Keys of an object that hold several replies to one request. The application shows the first.
_REPLIES = ("choices", "generations", "candidates")
_SYSTEM = ("system", "system_prompt", "instructions", "system_instruction", "systemInstruction")
# Keys of a message that say more than its role and content. Libraries add many others, which no chat template reads.
REASONING = ("reasoning_content", "reasoning", "thinking")
_KEPT = ("name", "tool_calls", "tool_call_id", "function_call", "images", "audio", *REASONING)
_TYPES = {"human": "user", "ai": "assistant", "system": "system", "tool": "tool"} | {
    f"{name}Message{chunk}": role
    for name, role in (("Human", "user"), ("AI", "assistant"), ("System", "system"), ("Tool", "tool"))
    for chunk in ("", "Chunk")
}
_ROLES = ROLES | {"developer": "system"}
_TEXTS = ("text", "input_text", "output_text")


class Unclear(ValueError):
    """It is unclear which field of an object is meant.

    Attributes:
        what: "prompt" or "answer".
    """

    def __init__(self, what: str, found: str):
        super().__init__(f"its {what} has {found}")
        self.what = what


def messages_in(value: Any, role: str, key: str | None = None) -> list[dict[str, Any]]:
    """The messages in a request or a reply.

    It can be text, JSON text, a message, a list of messages (OpenAI's, LangChain's, Gemini's), an object with the keys
    that these use, or an object with a single text, message or list of messages under any name. A system prompt beside
    the messages becomes the first one.

    Args:
        value: the request or the reply.
        role: the role of text without one.
        key: where the text or the messages are in an object that has several. Several keys, separated by commas, are
            read in this order.

    Raises:
        ValueError: if there are no messages in it, or if it has tools.
        Unclear: if it has several fields that could be meant, or none.

    Example:
        >>> messages_in("Hi", "user"), messages_in({"question": "Hi"}, "user")
        ([{'role': 'user', 'content': 'Hi'}], [{'role': 'user', 'content': 'Hi'}])
        >>> messages_in({"choices": [{"message": {"role": "assistant", "content": "Hello!"}}]}, "assistant")
        [{'role': 'assistant', 'content': 'Hello!'}]
    """
    what = "prompt" if role == "user" else "answer"
    if isinstance(value, str):
        found = _parsed(value, what, is_object=key is not None or role == "user")
        if found is None:
            return [{"role": role, "content": value}]
        value = found
    if isinstance(value, list):
        return _listed(value, role, what)
    if not isinstance(value, Mapping):
        raise ValueError(f"its {what} is neither text nor messages")
    there = _fields(value)
    if key is not None:
        keys, turns = [name.strip() for name in key.split(",")], []
        for name in keys:
            if name not in there:
                raise ValueError(f"its {what} has no `{name}`")
            turns += _system(there[name]) if name in _SYSTEM and len(keys) > 1 else messages_in(there[name], role)
        return turns
    found = _message(there, role)
    if found is not None:
        return [found]
    if "lc" in there:  # LangChain's prompts, and messages of a type that has its role in it
        return messages_in(there.get("kwargs"), role)
    for name in _REPLIES:
        if isinstance(there.get(name), list) and there[name]:
            return _first(there[name], role, what)
    name = _inside(there)
    if name is not None:
        if there.get("tools") or there.get("functions"):
            raise ValueError("it has tools, which prepared rows do not support")
        about = there["config"] if isinstance(there.get("config"), Mapping) else {}
        system = next((each[key] for each in (there, about) for key in _SYSTEM if each.get(key)), None)
        return (_system(system) if system else []) + messages_in(there[name], role)
    names = _full(there)
    if len(names) != 1:
        raise Unclear(what, f"several fields ({', '.join(names)})" if names else "no text or messages")
    inside = there[names[0]]
    return [{"role": role, "content": inside}] if isinstance(inside, str) else messages_in(inside, role)


def text_key(value: Any, role: str) -> str | None:
    """The key of the text that `messages_in` takes from an object without a known form. None for other values.

    Example:
        >>> text_key({"question": "Hi", "top_k": 3}, "user"), text_key("Hi", "user")
        ('question', None)
    """
    if isinstance(value, str):
        value = _parsed(value, "prompt", is_object=role == "user")
    if not isinstance(value, Mapping) or _is_payload(value):
        return None
    there = _fields(value)
    names = _full(there)
    if len(names) != 1:
        return None
    return names[0] if isinstance(there[names[0]], str) else text_key(there[names[0]], role)


# At the start of an answer
_THOUGHTS = re.compile(r"\A\s*<think>.*?</think>\s*", re.DOTALL)


def without_reasoning(turns: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], bool]:
    """Messages without the reasoning before their answers, and whether there was any.

    Example:
        >>> without_reasoning([{"role": "assistant", "content": "4", "reasoning_content": "2 + 2"}])
        ([{'role': 'assistant', 'content': '4'}], True)
    """
    found = []
    for turn in turns:
        content = turn["content"]
        if isinstance(content, list):
            content = _joined([part for part in content if not _is_reasoning(part)])
        if turn["role"] == "assistant" and isinstance(content, str):
            content = _THOUGHTS.sub("", content)
        found.append({key: each for key, each in turn.items() if key not in REASONING} | {"content": content})
    return found, found != turns


def _is_reasoning(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in ("thinking", "redacted_thinking", "reasoning")


def _fields(value: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an object that have a value. Arguments of a Python function are named by their place or name."""
    there = {name: each for name, each in value.items() if each is not None}
    if there and set(there) <= {"args", "kwargs"}:
        args, kwargs = there.get("args", []), there.get("kwargs", {})
        if isinstance(args, list) and isinstance(kwargs, Mapping):
            there = {str(i): each for i, each in enumerate(args)} | dict(kwargs)
            return {name: each for name, each in there.items() if each is not None}
    return there


def _inside(there: Mapping[str, Any]) -> str | None:
    """The key of the messages, or the message, of an object."""
    names = (n for n in _INSIDE if isinstance(there.get(n), Mapping if n == "content" else Mapping | list) and there[n])
    return next(names, None)


def _full(there: Mapping[str, Any]) -> list[str]:
    """The fields that are text, also empty text, or that hold something. Numbers are settings."""
    return [n for n, each in there.items() if isinstance(each, str) or (isinstance(each, Mapping | list) and each)]


def _listed(value: list, role: str, what: str) -> list[dict[str, Any]]:
    if value and all(_is_pair(each) for each in value):
        return [{"role": _ROLES[name.lower()], "content": text} for name, text in value]
    if len(value) == 1 and isinstance(value[0], list):
        return _listed(value[0], role, what)
    if len(value) == 1 and isinstance(value[0], str):
        return [{"role": role, "content": value[0]}]
    turns = []
    for each in value:
        there = _fields(each) if isinstance(each, Mapping) else {}
        found = _message(there, role)
        if found is None and "lc" in there:
            turns += messages_in(there, role)
            continue
        if found is None:
            kind = f" ({there['type']})" if isinstance(there.get("type"), str) else ""
            raise ValueError(f"its {what} is a list with something that is no message{kind}")
        turns.append(found)
    if not turns:
        raise ValueError(f"its {what} is neither text nor messages")
    return turns


def _is_pair(value: Any) -> bool:
    """Whether a value is a role and a text."""
    is_pair = isinstance(value, list) and len(value) == 2 and all(isinstance(each, str) for each in value)
    return is_pair and value[0].lower() in _ROLES


def _first(replies: list, role: str, what: str) -> list[dict[str, Any]]:
    """The first of several replies."""
    first = replies[0]
    while isinstance(first, list) and first:
        first = first[0]
    for name in ("message", "content", "text"):
        inside = first.get(name) if isinstance(first, Mapping) else None
        if isinstance(inside, str):
            return [{"role": role, "content": inside}]
        if inside:
            return messages_in(inside, role)
    raise ValueError(f"its {what} is neither text nor messages")


def _system(value: Any) -> list[dict[str, Any]]:
    """A system prompt: text, its parts, or an object of Gemini."""
    turns = [{"role": "system", "content": _joined(value)}]
    if isinstance(value, Mapping):
        turns = messages_in(value, "system")
    return [turn | {"role": "system"} for turn in turns]


def _parsed(text: str, what: str, *, is_object: bool) -> Any:
    """The object or list of objects that a text is the JSON of, or None.

    Objects that hold no messages are only read if `is_object`, because an answer can be JSON.

    Raises:
        ValueError: if it is the text of a Python object.
    """
    if not text.lstrip().startswith(("{", "[")):
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            found = parse(text)
        except (MemoryError, RecursionError, SyntaxError, TypeError, ValueError):
            continue
        is_plain = isinstance(found, dict) or (isinstance(found, list) and found and isinstance(found[0], dict))
        if _is_payload(found) or (is_object and is_plain):
            if parse is json.loads:
                return found
            raise ValueError(f"its {what} is a Python object as text: write it as JSON, with json.dumps")
        return None
    return None


def is_json_object(text: Any) -> bool:
    """Whether a value is the JSON text of an object."""
    try:
        return isinstance(text, str) and isinstance(json.loads(text), dict)
    except ValueError:
        return False


def _is_payload(found: Any) -> bool:
    """Whether a value is a message, holds some, or is a list of such values."""
    if isinstance(found, list):
        return bool(found) and all(_is_payload(each) or _is_pair(each) for each in found)
    if not isinstance(found, Mapping):
        return False
    there = _fields(found)
    is_reply = any(isinstance(there.get(name), list) and there[name] for name in _REPLIES)
    return is_reply or _inside(there) is not None or "lc" in there or _message(there, "") is not None


def _part(part: Any) -> Any:
    """A part of Gemini. If it has more than text, it stays as it is, so that the message is not read without it."""
    if isinstance(part, Mapping):
        part = {key: each for key, each in part.items() if each is not None}
    text = part if isinstance(part, str) else part["text"] if isinstance(part, dict) and set(part) == {"text"} else None
    return part if text is None else {"type": "text", "text": text}


def _joined(content: Any) -> Any:
    """Text parts as one text. Other content stays as it is."""
    is_text = isinstance(content, list) and all(
        isinstance(part, Mapping) and part.get("type") in _TEXTS and isinstance(part.get("text"), str)
        for part in content
    )
    return "".join(part["text"] for part in content) if is_text else content


def _message(value: Mapping[str, Any], role: str) -> dict[str, Any] | None:
    """A message in the form that chat templates read. None if the value is no message."""
    kind = value["id"][-1] if isinstance(value.get("id"), list) and value["id"] else value.get("type")
    kind = kind if isinstance(kind, str) else ""
    inside = value.get("kwargs") if "lc" in value else value.get("data") if kind in _TYPES else None
    body = inside if isinstance(inside, Mapping) else value
    named = _TYPES.get(kind) if value.get("role") is None else value["role"]
    if not isinstance(named, str) and "parts" not in body:
        return None
    if not {"content", "parts", "tool_calls", "function_call"} & set(body):
        return None
    content, parts = body.get("content"), body.get("parts")
    if content is None and parts is not None:
        content = [_part(part) for part in (parts if isinstance(parts, list) else [parts])]
    named = named if isinstance(named, str) else role
    more = {key: body[key] for key in _KEPT if body.get(key)}
    extra = body.get("additional_kwargs")
    if isinstance(extra, Mapping):
        more |= {key: extra[key] for key in ("tool_calls", "function_call", *REASONING) if extra.get(key)}
    return {"role": _ROLES.get(named.lower(), named), "content": _joined(content), **more}
