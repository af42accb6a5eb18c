"""Answers to imitate, in TRL's prompt-completion and conversation layouts."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from trl_ulma.data.adapters import Adapter, LeftOut, Noted, Outcome, row
from trl_ulma.data.conversations import as_messages, check_repeats, is_whole_transcript, split_turns
from trl_ulma.data.pairs import split_messages
from trl_ulma.data.sharegpt import NOT_LEARNED, as_turns, check_unlabeled, is_not_learned


def demonstrations(rows: Iterable[Mapping[str, Any]]) -> Iterator[Outcome]:
    """One row per answer, which is a demonstration with label 1.

    Args:
        rows: `prompt` and `completion`, text or messages; or `messages`, whose last answer is the completion. A
            completion that is a whole transcript is split at its last answer. It is left out if it does not repeat its
            prompt.

    Example:
        >>> [outcome] = demonstrations([{"prompt": "Hi", "completion": "Hello!"}])
        >>> outcome["label"], outcome["sft_mask"]
        (1.0, True)
    """
    for raw in rows:
        try:
            if "completion" in raw:
                prompt, completion = raw["prompt"], raw["completion"]
                if is_whole_transcript(completion):
                    check_repeats(completion, prompt)
                    prompt, completion = split_turns(completion)
            else:
                turns = as_turns(raw["messages"])
                check_unlabeled(turns)
                prompt, completion = split_messages(turns)
            prompt, completion = as_messages(prompt, completion)
        except ValueError as error:
            yield LeftOut(str(error))
            continue
        if is_not_learned(completion):
            yield Noted(NOT_LEARNED)
        yield row(prompt, completion, 1.0, demonstration=True)


DEMONSTRATIONS = Adapter(
    demonstrations,
    needs=(("prompt", "completion"), ("messages",)),
    refuses=("label", "chosen", "rejected"),
    rated="messages",
)
