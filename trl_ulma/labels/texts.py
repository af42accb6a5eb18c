"""Prompts and completions: what they are, and how errors show them."""

import re
from typing import Any

# Anything but whitespace and characters without a shape, such as zero-width spaces
_VISIBLE = re.compile(r"[^\s\x00\u00ad\u200b-\u200f\u2060\ufeff]")
_PROMPT_SHOWN = 60  # characters


def is_messages(value: Any) -> bool:
    """Return whether a value is a list of messages: each has a role, and content (if any) that is text or parts.

    Example:
        >>> is_messages([{"role": "user", "content": "Hi"}]), is_messages(["Hi"])
        (True, False)
    """
    return isinstance(value, list) and all(
        isinstance(turn, dict)
        and isinstance(turn.get("role"), str)
        and isinstance(turn.get("content"), str | list | dict | None)
        for turn in value
    )


def is_empty(completion: Any) -> bool:
    """Return whether a completion (text or messages) has no content that can be seen.

    Example:
        >>> is_empty("  "), is_empty([{"role": "assistant", "content": "Hello!"}])
        (True, False)
    """
    if isinstance(completion, str):
        return _VISIBLE.search(completion) is None
    said = (turn.get(key) for turn in completion for key in ("content", "tool_calls", "thinking", "reasoning_content"))
    return not any(
        _VISIBLE.search(value) if isinstance(value, str) else isinstance(value, list | dict) and value for value in said
    )


def start_of(prompt: Any) -> str:
    """Return the start of a prompt (text or messages) on one line, or "" for anything else.

    Example:
        >>> start_of([{"role": "user", "content": "How do I\\nboil an egg?"}])
        'How do I boil an egg?'
    """
    if is_messages(prompt):
        asked = [turn.get("content") for turn in prompt if turn["role"] == "user"] or [""]
        parts = asked[-1] if isinstance(asked[-1], list) else [asked[-1]]
        prompt = " ".join(str(part.get("text") or "") if isinstance(part, dict) else str(part or "") for part in parts)
    if not isinstance(prompt, str):
        return ""
    line = " ".join(prompt[: 4 * _PROMPT_SHOWN].split()).encode(errors="replace").decode()
    return line if len(line) <= _PROMPT_SHOWN else f"{line[:_PROMPT_SHOWN]}…"


def shown(value: Any) -> str:
    """Return the `repr` of a value, cut to 60 characters, for errors.

    Example:
        >>> shown("no")
        "'no'"
    """
    try:
        text = repr(value)
    except ValueError:  # an int of more than 4,300 digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:60]}…"
