"""Rows of text as conversations of a user's and an assistant's message."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset, IterableDataset
from transformers.utils import logging

from trl_ulma.data.conversations import is_transcript

logger = logging.get_logger(__name__)

CHAT = ("auto", "true", "false")
# The readers of `datasets` whose files cannot hold messages
_TABLES = ("csv", "tsv")


def check_chat(chat: str, system_message: str | None) -> None:
    """Raise ValueError for values that are none.

    Example:
        >>> check_chat("auto", None)
    """
    if chat not in CHAT:
        raise ValueError(f"chat must be one of {CHAT}; got {chat!r}.")
    if system_message is not None and not (isinstance(system_message, str) and system_message.strip()):
        raise ValueError(f"system_message must be text, or None; got {system_message!r}.")


def becomes_chat(
    raw: Dataset | IterableDataset, prompt: Any, chat: str, system_message: str | None, has_template: bool, name: str
) -> bool:
    """Whether rows of text are trained on as messages, which is logged.

    With "auto" the rows of CSV and TSV files are, if the tokenizer has a chat template, because such files cannot hold
    messages. Other rows stay text. Transcripts ("Human: … Assistant: …") stay text as well.

    Args:
        raw: rows whose prompts are text.
        prompt: the first row's, or None for pairs without prompts.
        chat: one of `CHAT`.
        system_message: the first message of each conversation, or None.
        has_template: whether the tokenizer or processor has a chat template.
        name: the data set's.

    Raises:
        ValueError: for `chat="true"` without a chat template or without prompts; for a system message of text.
    """
    if chat == "true" and not has_template:
        raise ValueError(
            f"chat=True makes messages of the {name} dataset's texts, and the tokenizer has no chat template. Set "
            "tokenizer.chat_template, use an instruction-tuned model's tokenizer, or set chat=False."
        )
    if chat == "true" and prompt is None:
        raise ValueError(
            f"chat=True makes a user's message of each prompt, and the {name} dataset has none. Add a column prompt, "
            "or set chat=False."
        )
    is_table = raw.info.builder_name in _TABLES
    if chat == "true" or (chat == "auto" and has_template and is_table and prompt and not is_transcript(prompt)):
        if chat == "auto":
            logger.warning(
                f"The {name} dataset is read from CSV or TSV, and the tokenizer has a chat template: each prompt "
                "becomes a user's message and each completion the assistant's, without the spaces around them. Set "
                "chat=False (--chat false) to train on the bare text."
            )
        return True
    if system_message is not None:
        raise ValueError(
            f"system_message needs conversations, and the {name} dataset is text. Set chat=True (--chat true), or "
            "leave system_message out."
        )
    if chat == "auto" and has_template:
        logger.warning_once(
            f"The {name} dataset is text, and the tokenizer has a chat template, which is not used: the model is "
            "trained on the bare text. Set chat=True (--chat true) to make messages of it, or chat=False to keep it so "
            "without this warning."
        )
    return False


def as_chat(prompts: Sequence[Any], completions: Sequence[Any]) -> tuple[list, list]:
    """Each prompt as a user's message and each completion as the assistant's; what is no text, or blank, stays.

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


def with_system_message(prompt: Any, system_message: str) -> Any:
    """A conversation that begins with a system message: its own, or this one.

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
