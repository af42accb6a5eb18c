"""Rows of plain text as conversations with a user message and an assistant message."""

import datetime
import re
from typing import Any

from datasets import Dataset, IterableDataset
from transformers.utils import logging

from trl_ulma.data.conversations import is_transcript
from trl_ulma.data.read_files import SOME_TABLES, TABLES

logger = logging.get_logger(__name__)

CHAT = ("auto", "true", "false")
# How a chat template asks for the date of today
TODAY = "strftime_now"


def check_chat(chat: str, system_message: str | None) -> None:
    """Raise ValueError if a value is not valid.

    Example:
        >>> check_chat("auto", None)
    """
    if chat not in CHAT:
        raise ValueError(f"chat must be one of {CHAT}; got {chat!r}.")
    if system_message is not None and not (isinstance(system_message, str) and system_message.strip()):
        raise ValueError(f"system_message must be non-empty text or None; got {system_message!r}.")


def becomes_chat(
    raw: Dataset | IterableDataset, prompt: Any, chat: str, system_message: str | None, has_template: bool, name: str
) -> bool:
    """Whether rows of plain text become messages. The decision is logged.

    With "auto", rows of CSV and TSV files become messages if the tokenizer has a chat template, because such files
    cannot contain messages. Other rows stay plain text, and so do transcripts ("Human: … Assistant: …").

    Args:
        raw: rows whose prompts are text.
        prompt: the first prompt, or None for pairs without prompts.
        chat: one of `CHAT`.
        has_template: whether the tokenizer or processor has a chat template.

    Raises:
        ValueError: if `chat` is "true" and there is no chat template or there are no prompts, or if there is a system
            message but rows stay plain text; or, with "auto", if only some of the files are CSV or TSV.
    """
    if chat == "true" and not has_template:
        raise ValueError(
            f"chat=True converts the texts of the {name} dataset to messages, but the tokenizer has no chat template. "
            "Set tokenizer.chat_template, use the tokenizer of an instruction-tuned model, or set chat=False."
        )
    if chat == "true" and prompt is None:
        raise ValueError(
            f"chat=True converts each prompt to a user message, but the {name} dataset has no prompts. Add a column "
            "prompt, or set chat=False."
        )
    kind = table_kind(raw, prompt)
    if chat == "auto" and has_template and kind == SOME_TABLES:
        raise ValueError(
            f"A part of the {name} dataset comes from CSV or TSV, and its text would become messages. The text of its "
            "other parts would stay as it is. Set chat=True (--chat true) to convert all text to messages, or "
            "chat=False (--chat false) to train on the plain text of all parts."
        )
    if chat == "true" or (chat == "auto" and has_template and kind == TABLES):
        if chat == "auto":
            logger.warning_once(  # not again for the evaluation dataset
                "Rows of CSV and TSV files become conversations, because the tokenizer has a chat template: the "
                "prompt is the user's message, the completion the answer, both without surrounding whitespace. Set "
                "chat=False (--chat false) to train on the plain text."
            )
        return True
    if system_message is not None:
        raise ValueError(
            f"system_message needs conversations, but the {name} dataset is plain text. Set chat=True (--chat true), "
            "or remove system_message."
        )
    if chat == "auto" and has_template:
        logger.warning_once(
            f"The {name} dataset is plain text, so the tokenizer's chat template is not used. Set chat=True (--chat "
            "true) to convert the text to messages, or chat=False to train on the plain text without this warning."
        )
    return False


def table_kind(raw: Dataset | IterableDataset, prompt: Any) -> str | None:
    """`TABLES` or `SOME_TABLES` if all or some of the rows are plain text of CSV and TSV files. None for others.

    Args:
        prompt: the first prompt, or None for pairs without prompts.

    Example:
        >>> rows = Dataset.from_dict({"prompt": ["Hi"]})
        >>> rows.info.builder_name = TABLES
        >>> table_kind(rows, "Hi"), table_kind(rows, None), table_kind(Dataset.from_dict({}), "Hi")
        ('csv', None, None)
    """
    is_plain = isinstance(prompt, str) and prompt and not is_transcript(prompt)
    return raw.info.builder_name if is_plain and raw.info.builder_name in (TABLES, SOME_TABLES) else None


def with_system_message(prompt: Any, system_message: str) -> Any:
    """The conversation with a system message at the start: its own one, or else this one.

    Example:
        >>> with_system_message([{"role": "user", "content": "Hi"}], "Be kind.")[0]
        {'role': 'system', 'content': 'Be kind.'}
    """
    if not isinstance(prompt, list) or not prompt or not all(isinstance(turn, dict) for turn in prompt):
        return prompt
    if any(turn.get("role") in ("system", "developer") for turn in prompt):
        return prompt
    is_parts = isinstance(prompt[0].get("content"), list)
    content: Any = [{"type": "text", "text": system_message}] if is_parts else system_message
    return [{"role": "system", "content": content}, *prompt]


def warn_of_date(template: Any, text: str) -> None:
    """Log a warning, once, if a conversation contains today's date because its chat template prints it.

    Args:
        template: the chat template.
        text: the first row as the template rendered it.
    """
    for call, _, how in re.findall(rf"""({TODAY}\(\s*(["'])(.+?)\2\s*\))""", str(template)):
        today = datetime.datetime.now().strftime(how)
        if today in text:
            logger.warning_once(
                f"The chat template prints the date of today, {today!r}, so the same row has other tokens on another "
                "day: rows are tokenized again, and a resumed training, an evaluation and a score see other prompts "
                f"than this one. Replace {call} in tokenizer.chat_template by a fixed date, such as {today!r}, or pass "
                "the date in each row's chat_template_kwargs if the template reads one, such as date_string."
            )
            return
