r"""Splits transcripts with `\n\nHuman:` and `\n\nAssistant:` turns, plain texts and messages into prompt and answer."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from trl_ulma.labels import ASKING_ROLES, is_messages

HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"
ROLES = {"Human": "user", "Assistant": "assistant"}

_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_NAME_IN_TEXT = re.compile(r"\b(?:Human|Assistant):")


def is_transcript(text: str) -> bool:
    r"""Whether a text is a transcript of `\n\nHuman:` and `\n\nAssistant:` turns."""
    return ASSISTANT in text and HUMAN in "\n\n" + text.lstrip()


def is_whole_transcript(text: Any) -> bool:
    r"""Whether a text is a transcript that begins with a human turn, and not just the continuation of a prompt.

    Example:
        >>> is_whole_transcript("\n\nHuman: Hi\n\nAssistant: Hello!"), is_whole_transcript("\n\nAssistant: Hello!")
        (True, False)
    """
    return isinstance(text, str) and is_transcript(text) and text.lstrip().startswith(HUMAN.lstrip())


def check_repeats(transcript: str, prompt: Any) -> None:
    r"""Raise ValueError unless a whole transcript repeats its prompt, so that the prompt column is not needed.

    Example:
        >>> check_repeats("\n\nHuman: Hi\n\nAssistant: Hello!", "\n\nHuman: Hi\n\nAssistant:")
        >>> check_repeats("\n\nHuman: Hi\n\nAssistant: Hello!", "Hi")
    """
    if isinstance(prompt, str):
        asked = (turn["content"].strip() for turn in parse_transcript(transcript) if turn["role"] == "user")
        if transcript.strip().startswith(prompt.strip()) or prompt.strip() in asked:
            return
    raise ValueError("it is a whole transcript that does not contain its prompt")


def split_transcript(text: str) -> tuple[str, str]:
    r"""A transcript split at its last assistant turn: (prompt including the marker, completion).

    Raises:
        ValueError: if the text has no assistant turn, or ends in a human turn.

    Example:
        >>> split_transcript("\n\nHuman: Hi\n\nAssistant: Hello!")
        ('\n\nHuman: Hi\n\nAssistant:', ' Hello!')
    """
    marks = list(_TURN.finditer(text))
    if not any(mark[1] == "Assistant" for mark in marks):
        raise ValueError("it has no assistant turn")
    if marks[-1][1] == "Human":
        raise ValueError("it ends in a human turn")
    cut = marks[-1].end()
    return text[:cut], text[cut:]


def parse_transcript(text: str) -> list[dict[str, str]]:
    r"""The turns of a transcript as messages, with unchanged texts.

    A marker is `Human:` or `Assistant:` after an empty line (or at the start), including one space after it. All else
    belongs to the text of the turn: further spaces, line breaks before the next marker, and `Human:` within a line.

    Raises:
        ValueError: if the text has no turn, or if there is text before the first turn.

    Example:
        >>> parse_transcript("\n\nHuman: Who says Human: ?\n\nAssistant: I do.\n")
        [{'role': 'user', 'content': 'Who says Human: ?'}, {'role': 'assistant', 'content': 'I do.\n'}]
    """
    marks = list(_TURN.finditer(text))
    if not marks:
        raise ValueError("it is not a transcript with `Human:` and `Assistant:` turns")
    if text[: marks[0].start()].strip():
        raise ValueError("it has text before its first turn")
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return [
        {"role": ROLES[mark[1]], "content": text[mark.end() : end].removeprefix(" ")}
        for mark, end in zip(marks, ends, strict=True)
    ]


def split_turns(transcript: Any) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    r"""The (prompt, completion) of a transcript as messages. The completion is the last turn, which is an assistant's.

    Raises:
        ValueError: if it is not such a transcript, or if it does not end in an answer.

    Example:
        >>> split_turns("\n\nHuman: Hi\n\nAssistant: Hello!")
        ([{'role': 'user', 'content': 'Hi'}], [{'role': 'assistant', 'content': 'Hello!'}])
    """
    if not isinstance(transcript, str):
        raise ValueError("it is not text")
    turns = parse_transcript(transcript)
    split_transcript(transcript)
    return turns[:-1], turns[-1:]


def names_in_text(turns: Sequence[Mapping[str, str]]) -> bool:
    """Whether the text of a turn contains `Human:` or `Assistant:`, which can be another turn without an empty line.

    Example:
        >>> names_in_text([{"role": "user", "content": "Is it so?  Human: And this?"}])
        True
    """
    return any(_NAME_IN_TEXT.search(turn["content"]) for turn in turns)


def as_messages(prompt: Any, completion: Any) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    r"""A prompt and its completion, each text or messages, as messages with unchanged texts.

    A prompt that is a transcript with an open assistant turn at its end becomes several turns. Any other text becomes
    one turn.

    Raises:
        ValueError: if one is neither text nor messages, or if a message contains more than text.

    Example:
        >>> as_messages("Hi", "Hello!")
        ([{'role': 'user', 'content': 'Hi'}], [{'role': 'assistant', 'content': 'Hello!'}])
        >>> as_messages("\n\nHuman: Hi\n\nAssistant:", " Hello!")[1]
        [{'role': 'assistant', 'content': 'Hello!'}]
    """
    if (
        isinstance(prompt, str)
        and isinstance(completion, str)
        and (is_transcript(prompt) or prompt.endswith(ASSISTANT))
    ):
        return split_turns(prompt + completion)
    return _plain(prompt, "user", "prompt"), _plain(completion, "assistant", "answer")


def _plain(value: Any, role: str, name: str) -> list[dict[str, str]]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not is_messages(value):
        raise ValueError(f"its {name} is neither text nor messages")
    if name == "answer" and value and value[0]["role"] in ASKING_ROLES:
        raise ValueError(f"its answer begins with a turn of {value[0]['role']!r}")
    return [_turn(turn) for turn in value]


# Keys of messages that prepared rows do not support. Other keys with plain values, such as `name`, are kept.
_MORE_THAN_TEXT = frozenset(
    ("tool_calls", "tool_call_id", "function_call", "images", "audio", "reasoning_content", "reasoning", "thinking")
)


def _turn(turn: Mapping[str, Any]) -> dict[str, Any]:
    """A message with its content as text."""
    content = turn.get("content")
    if isinstance(content, list) and all(set(_present(part)) == {"type", "text"} for part in content):
        content = "".join(part["text"] for part in content)
    others = {key: turn[key] for key in _present(turn) if key not in ("role", "content")}
    is_plain = all(isinstance(value, str | int | float) for value in others.values())
    if not isinstance(content, str) or not is_plain or _MORE_THAN_TEXT.intersection(others):
        raise ValueError("one of its turns contains more than text, such as tool calls or images")
    return {"role": turn["role"], "content": content, **others}


def _present(value: Any) -> list[str]:
    """The keys that have a value. (Arrow gives every message the keys of all messages, and servers empty lists.)"""
    return [key for key, each in value.items() if each not in (None, [], {})] if isinstance(value, Mapping) else []


def as_chat(prompts: Sequence[Any], completions: Sequence[Any]) -> tuple[list, list]:
    """Each prompt as a user message and each completion as an assistant message. Other values than text stay as is.

    Example:
        >>> as_chat(["Hi"], [" Hello!"])
        ([[{'role': 'user', 'content': 'Hi'}]], [[{'role': 'assistant', 'content': 'Hello!'}]])
    """
    made = [
        ([{"role": "user", "content": prompt.strip()}], [{"role": "assistant", "content": completion.strip()}])
        if isinstance(prompt, str) and isinstance(completion, str)
        else (prompt, completion)
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    return [prompt for prompt, _ in made], [completion for _, completion in made]


def spelled(text: str) -> str:
    r"""A text in the spelling that prompts are compared in: one Unicode form, `\n`, and no whitespace around it."""
    return unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n").strip())


def said(turn: Any) -> Any:
    """What a model reads of a message: files of the same conversation can differ in the rest."""
    if not isinstance(turn, Mapping):
        return turn
    content = turn.get("content")
    if isinstance(content, list):
        content = "".join(str(part.get("text") or "") if isinstance(part, dict) else str(part) for part in content)
    calls = {key: turn[key] for key in ("tool_calls",) if turn.get(key)}
    return {"role": turn.get("role"), "content": spelled(content) if isinstance(content, str) else content, **calls}
