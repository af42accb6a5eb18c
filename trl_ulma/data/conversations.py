r"""Transcripts of `\n\nHuman:` and `\n\nAssistant:` turns, plain texts and messages: what is prompt, what is answer."""

import re
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
    r"""Whether a text is a transcript that begins with a human turn, and not with what follows a prompt.

    Example:
        >>> is_whole_transcript("\n\nHuman: Hi\n\nAssistant: Hello!"), is_whole_transcript("\n\nAssistant: Hello!")
        (True, False)
    """
    return isinstance(text, str) and is_transcript(text) and text.lstrip().startswith(HUMAN.lstrip())


def check_repeats(transcript: str, prompt: Any) -> None:
    r"""Raise ValueError where a whole transcript does not say its prompt again, which can be left out where it does.

    Example:
        >>> check_repeats("\n\nHuman: Hi\n\nAssistant: Hello!", "\n\nHuman: Hi\n\nAssistant:")
        >>> check_repeats("\n\nHuman: Hi\n\nAssistant: Hello!", "Hi")
    """
    if isinstance(prompt, str):
        asked = (turn["content"].strip() for turn in parse_transcript(transcript) if turn["role"] == "user")
        if transcript.strip().startswith(prompt.strip()) or prompt.strip() in asked:
            return
    raise ValueError("it is a transcript from its first turn on, and its prompt is not in it")


def split_transcript(text: str) -> tuple[str, str]:
    r"""A transcript cut at its last assistant turn: (prompt up to and with the marker, completion).

    Raises:
        ValueError: where the text has no assistant turn, or ends in a human one.

    Example:
        >>> split_transcript("\n\nHuman: Hi\n\nAssistant: Hello!")
        ('\n\nHuman: Hi\n\nAssistant:', ' Hello!')
    """
    marks = list(_TURN.finditer(text))
    if not any(mark[1] == "Assistant" for mark in marks):
        raise ValueError("no assistant turn in it")
    if marks[-1][1] == "Human":
        raise ValueError("it ends in a human turn")
    cut = marks[-1].end()
    return text[:cut], text[cut:]


def parse_transcript(text: str) -> list[dict[str, str]]:
    r"""The turns of a transcript as messages, with every text as it was.

    A marker is `Human:` or `Assistant:` after an empty line (or at the start), with the one space that follows it.
    All else is the turn's text: further spaces, line ends before the next marker, and `Human:` within a line.

    Raises:
        ValueError: where the text has no turn, or something before the first.

    Example:
        >>> parse_transcript("\n\nHuman: Who says Human: ?\n\nAssistant: I do.\n")
        [{'role': 'user', 'content': 'Who says Human: ?'}, {'role': 'assistant', 'content': 'I do.\n'}]
    """
    marks = list(_TURN.finditer(text))
    if not marks:
        raise ValueError("it is no transcript of `Human:` and `Assistant:` turns")
    if text[: marks[0].start()].strip():
        raise ValueError("it has text before its first turn")
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return [
        {"role": ROLES[mark[1]], "content": text[mark.end() : end].removeprefix(" ")}
        for mark, end in zip(marks, ends, strict=True)
    ]


def split_turns(transcript: Any) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    r"""(prompt, completion) of a transcript as messages: all turns but the last, and the last, an assistant's.

    Raises:
        ValueError: where it is no such transcript, or has no answer at its end.

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
    """Whether a turn's text holds `Human:` or `Assistant:`, which may be a turn that the transcript runs into another.

    Example:
        >>> names_in_text([{"role": "user", "content": "Is it so?  Human: And this?"}])
        True
    """
    return any(_NAME_IN_TEXT.search(turn["content"]) for turn in turns)


def as_messages(prompt: Any, completion: Any) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    r"""A prompt and its completion, each text or messages, as messages; texts stay as they are.

    A prompt that is a transcript, open at its end, becomes its turns. Any other text is one turn.

    Raises:
        ValueError: where one is neither text nor messages, or a message holds more than text.

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


# What a message may hold that has no place in prepared rows; other plain keys, as `name` and `weight`, are kept
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
        raise ValueError("a turn of it holds something else than text, as tool calls or images")
    return {"role": turn["role"], "content": content, **others}


def _present(value: Any) -> list[str]:
    """The keys that have a value: Arrow gives every message the keys of all."""
    return [key for key, each in value.items() if each is not None] if isinstance(value, Mapping) else []
