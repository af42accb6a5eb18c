"""The messages in what applications send to a model and get from it, as several libraries store them."""

import json
from collections.abc import Mapping
from typing import Any

from trl_ulma.data.sharegpt import ROLES

# Keys that hold the messages, or the message, of a request or a reply
_INSIDE = ("messages", "choices", "message", "generations")
# Keys of a message that say more than its role and content. Libraries add many others, which no chat template reads.
_KEPT = ("name", "tool_calls", "tool_call_id", "function_call", "reasoning_content")
_TYPES = {"human": "user", "ai": "assistant", "system": "system", "tool": "tool"} | {
    f"{name}Message{chunk}": role
    for name, role in (("Human", "user"), ("AI", "assistant"), ("System", "system"), ("Tool", "tool"))
    for chunk in ("", "Chunk")
}


def messages_in(value: Any, role: str, key: str | None = None) -> list[dict[str, Any]]:
    """The messages in a request or a reply.

    It can be text, JSON text, a message, a list of messages (OpenAI's, LangChain's, Gemini's), or an object with one of
    these: `messages`, `choices`, `generations`, or a single text under any name.

    Args:
        value: the request or the reply.
        role: the role of text without one.
        key: where the text or the messages are in an object that has several.

    Raises:
        ValueError: if there are no messages in it, or several texts.

    Example:
        >>> messages_in("Hi", "user"), messages_in({"question": "Hi"}, "user")
        ([{'role': 'user', 'content': 'Hi'}], [{'role': 'user', 'content': 'Hi'}])
        >>> messages_in({"choices": [{"message": {"role": "assistant", "content": "Hello!"}}]}, "assistant")
        [{'role': 'assistant', 'content': 'Hello!'}]
    """
    what = "prompt" if role == "user" else "answer"
    if isinstance(value, str):
        found = _parsed(value, is_object=key is not None or role == "user")
        if found is None:
            return [{"role": role, "content": value}]
        value = found
    if isinstance(value, list):
        if len(value) == 1 and isinstance(value[0], list):
            return messages_in(value[0], role)
        if not value or not all(isinstance(each, Mapping) for each in value):
            raise ValueError(f"its {what} is neither text nor messages")
        return [turn for each in value for turn in messages_in(each, role)]
    if not isinstance(value, Mapping):
        raise ValueError(f"its {what} is neither text nor messages")
    there = {name: each for name, each in value.items() if each is not None}
    if key is not None:
        if key not in there:
            raise ValueError(f"its {what} has no `{key}`")
        return messages_in(there[key], role)
    found = _message(there, role)
    if found is not None:
        return [found]
    for name in _INSIDE:
        if isinstance(there.get(name), Mapping | list) and there[name]:
            # Of several replies to one request, the application shows the first
            inside = there[name][:1] if name in ("choices", "generations") else there[name]
            return messages_in(inside, role)
    texts = texts_in(there)
    if len(texts) != 1:
        names = f"the texts {', '.join(texts)}" if texts else "no text"
        raise ValueError(f"its {what} has {names}: say where it is with --{what}_key")
    return [{"role": role, "content": there[texts[0]]}]


def texts_in(value: Any) -> list[str]:
    """The keys of an object whose values are text. Empty for other values, and for a message.

    Example:
        >>> texts_in({"question": "Hi", "top_k": 3}), texts_in("Hi")
        (['question'], [])
    """
    if not isinstance(value, Mapping) or _is_payload(value):
        return []
    return [name for name, each in value.items() if isinstance(each, str) and each.strip()]


def _parsed(text: str, *, is_object: bool) -> Any:
    """The object or list of objects that a text is the JSON of, or None.

    Objects that hold no messages are only read if `is_object`, because an answer can be JSON.
    """
    if not text.lstrip().startswith(("{", "[")):
        return None
    try:
        found = json.loads(text)
    except ValueError:
        return None
    is_list = isinstance(found, list) and found and all(isinstance(each, dict | list) for each in found)
    return found if is_list or (isinstance(found, dict) and (is_object or _is_payload(found))) else None


def _is_payload(found: Mapping[str, Any]) -> bool:
    """Whether an object is a message or holds some."""
    return any(found.get(name) for name in (*_INSIDE, "role", "lc", "parts")) or found.get("type") in _TYPES


def _message(value: Mapping[str, Any], role: str) -> dict[str, Any] | None:
    """A message in the form that chat templates read. None if the value is no message."""
    inside = value.get("kwargs") if "lc" in value else value.get("data") if value.get("type") in _TYPES else None
    kind = value["id"][-1] if isinstance(value.get("id"), list) and value["id"] else value.get("type")
    named = value.get("role")
    if named is None and kind in _TYPES:
        named = _TYPES[kind]
    body = inside if isinstance(inside, Mapping) else value
    if named is None and value.get("type") in ("Generation", "ChatGeneration"):
        return None if value.get("message") else {"role": role, "content": value.get("text")}
    if not isinstance(named, str) and "parts" not in body:
        return None
    content = body.get("content")
    if content is None and isinstance(body.get("parts"), list):
        parts = [{k: v for k, v in part.items() if v is not None} for part in body["parts"]]
        # A part with more than text stays, so that the row is not read without it
        content = [{"type": "text", **part} if set(part) == {"text"} else part for part in parts]
    named = named if isinstance(named, str) else role
    more = {key: body[key] for key in _KEPT if body.get(key)}
    extra = body.get("additional_kwargs")
    if isinstance(extra, Mapping):
        more |= {key: extra[key] for key in ("tool_calls", "function_call") if extra.get(key)}
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        content = "".join(part.get("text") or "" for part in content)
    return {"role": ROLES.get(named.lower(), named), "content": content, **more}
