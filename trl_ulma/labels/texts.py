"""Texts in rows: whether they are empty, messages or dates, and how errors show them."""

import re
from typing import Any

# Anything but whitespace and characters without a shape, such as zero-width spaces
_VISIBLE = re.compile(r"[^\s\x00\u00ad\u200b-\u200f\u2060\ufeff]")
_PROMPT_SHOWN = 60  # characters
# Keys of messages that few chat templates know: for text beside the content, and for text in place of it
BESIDE_CONTENT = ("refusal", "function_call", "tool_call")
INSTEAD_OF_CONTENT = ("text", "value", "parts")
# What spreadsheets make of a rating such as 4/5 or 4.5: 05.04.2024, 2024-04-05 00:00:00, 5-Apr
WERE_RATINGS = (
    "Spreadsheets turn ratings such as 4/5 and 4.5 into dates. Format the column as text, and enter or import them "
    "again."
)
_MONTH = (
    r"(jan|feb|fév|fev|mar|mär|mrz|apr|avr|abr|ma[yijg]|jun|jui|giu|jul|lug|aug|ago|ao[uû]|sep|set|o[ckt]t|nov|de[czs]|"
    r"déc|dic|gen|ene)"
)
_DATE = re.compile(
    rf"\d{{1,2}}([./-])\d{{1,2}}\1(\d\d|\d{{4}})|\d{{4}}-\d\d-\d\d([ T]00:00(:00)?(\.0+)?)?|"
    rf"\d{{1,2}}[.\s/-]{{1,2}}{_MONTH}[^\W\d]*\.?|{_MONTH}[^\W\d]*[.\s/-]{{1,2}}\d{{1,2}}",
    re.IGNORECASE,
)


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


def is_date(text: str) -> bool:
    """Return whether a text is a date, as spreadsheets write it.

    Example:
        >>> is_date("05.04.2024"), is_date("5-Apr"), is_date("4/5"), is_date("4.5")
        (True, True, False, False)
    """
    return _DATE.fullmatch(text.strip()) is not None
