"""What an adapter is, and the table of those there are.

A new family is a file with a generator over raw rows and its `Adapter`, and a line in `FAMILIES`; the command, its
help, the checks and the report follow from these. The generator yields a `row` for each answer that can be learned
from, and `LeftOut` for each that cannot, so that every answer is accounted for.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from trl_ulma.data.columns import number

# name: (where its Adapter is, what it reads)
FAMILIES = {
    "hh": ("trl_ulma.data.hh:HH", "HH-RLHF: `chosen` and `rejected` transcripts"),
    "golden-hh": ("trl_ulma.data.hh:GOLDEN_HH", "Golden HH: the same, where `chosen` is a demonstration"),
    "qa-feedback": ("trl_ulma.data.qa_feedback:QA_FEEDBACK", "QA-feedback: flawed answers and their corrections"),
    "red-team": ("trl_ulma.data.red_team:RED_TEAM", "red-team attempts: a `transcript` and its `rating`, 0 to 4"),
    "votes": ("trl_ulma.data.votes:VOTES", "questions and voted answers: StackExchange preferences, SHP"),
    "pairs": ("trl_ulma.data.pairs:PAIRS", "TRL's preference pairs: `chosen`, `rejected`, with or without `prompt`"),
    "demonstrations": (
        "trl_ulma.data.demonstrations:DEMONSTRATIONS",
        "answers to imitate: `prompt` and `completion`, or `messages`",
    ),
    "kto": ("trl_ulma.data.kto:KTO", "kto-mix, unpaired preferences: `prompt`, `completion` and `label`"),
    "messages": ("trl_ulma.data.labelled_messages:MESSAGES", "`messages` and a `label` of the last answer"),
    "turns": ("trl_ulma.data.labelled_messages:TURNS", "`messages` in which each answer has a `label` of its own"),
    "sharegpt": ("trl_ulma.data.sharegpt:SHAREGPT", "`conversations` of turns with `from` and `value`"),
    "alpaca": ("trl_ulma.data.alpaca:ALPACA", "`instruction`, `input` and `output`"),
    "stepwise": (
        "trl_ulma.data.stepwise:STEPWISE",
        "TRL's step-wise supervision: `completions` and `labels`, one a step",
    ),
    "helpsteer": ("trl_ulma.data.helpsteer:HELPSTEER", "HelpSteer2: a `response` and its ratings, 0 to 4"),
    "ultrafeedback": (
        "trl_ulma.data.ultrafeedback:ULTRAFEEDBACK",
        "UltraFeedback: rated `completions` of an `instruction`",
    ),
    "oasst": ("trl_ulma.data.oasst:OASST", "OpenAssistant: trees of messages, or the messages one by one"),
    "pku-saferlhf": ("trl_ulma.data.pku_saferlhf:PKU_SAFERLHF", "PKU-SafeRLHF: two responses, whether each is safe"),
    "beavertails": ("trl_ulma.data.beavertails:BEAVERTAILS", "BeaverTails: a `response`, and `is_safe`"),
    "arena": ("trl_ulma.data.arena:ARENA", "Chatbot Arena: two conversations and a vote, with ties"),
    "nectar": ("trl_ulma.data.nectar:NECTAR", "Nectar: ranked `answers` to a transcript"),
    "webgpt": ("trl_ulma.data.webgpt:WEBGPT", "WebGPT comparisons: two answers with a score each, −1 to 1"),
    "tldr": ("trl_ulma.data.tldr:TLDR", "summarize from feedback: compared summaries, or rated ones"),
    "stack-exchange-paired": (
        "trl_ulma.data.stack_exchange_paired:STACK_EXCHANGE_PAIRED",
        "`question`, the better `response_j` and the worse `response_k`",
    ),
}


@dataclass(frozen=True)
class LeftOut:
    """An answer that becomes no row.

    Attributes:
        why: the reason, in the same words for all answers that it is true of, so that they can be counted.
    """

    why: str


@dataclass(frozen=True)
class Noted:
    """Something that was found on the way and changes no count.

    Attributes:
        what: the finding, in the same words wherever it is found.
    """

    what: str


Outcome = dict[str, Any] | LeftOut | Noted


@dataclass(frozen=True)
class Adapter:
    """How one family of data sets is read.

    Attributes:
        read: raw rows and the options by keyword → an outcome an answer.
        needs: the layouts it knows, each the columns that it needs.
        refuses: columns that say that the file is of another kind.
        options: command-line flag → the arguments of argparse's `add_argument`.
    """

    read: Callable[..., Iterator[Outcome]]
    needs: tuple[tuple[str, ...], ...]
    refuses: tuple[str, ...] = ()
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def reads(self, columns: Any) -> bool:
        """Whether a data set with these columns is of this family.

        Example:
            >>> find("pairs").reads(["chosen", "rejected"]), find("hh").reads(["prompt", "completion"])
            (True, False)
        """
        there = set(columns)
        return any(there.issuperset(layout) for layout in self.needs) and there.isdisjoint(self.refuses)


def find(family: str) -> Adapter:
    """The adapter of a family in `FAMILIES`.

    Example:
        >>> find("red-team").needs
        (('transcript', 'rating'),)
    """
    module, _, name = FAMILIES[family][0].partition(":")
    return getattr(import_module(module), name)


def row(
    prompt: str | list[dict[str, str]],
    completion: str | list[dict[str, str]],
    label: float,
    *,
    demonstration: bool = False,
    label_type: str = "binary",
) -> dict[str, Any]:
    """A point-wise row. A text is one turn.

    Example:
        >>> row("Hi", "Hello!", 1.0)["completion"]
        [{'role': 'assistant', 'content': 'Hello!'}]
    """
    return {
        "prompt": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt,
        "completion": [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion,
        "label": label,
        "sft_mask": demonstration,
        "label_type": label_type,
    }


def as_number(value: Any) -> int | float | None:
    """The number that a value is, or that its text says (all of a CSV file is text), or None.

    Example:
        >>> as_number(4), as_number("0.5"), as_number(True), as_number("N/A")
        (4, 0.5, None, None)
    """
    found = number(value) if isinstance(value, str) else value
    return found if is_number(found) else None


def as_bool(value: Any) -> bool | None:
    """The truth value that a value is, or that its text says, or None; 0 and 1 are truth values.

    Example:
        >>> as_bool(True), as_bool("false"), as_bool(1), as_bool("perhaps")
        (True, False, True, None)
    """
    found = number(value) if isinstance(value, str) else value
    return bool(found) if isinstance(found, bool | int | float) and found in (0, 1) else None


def labelled(prompt: Any, completion: Any, label: Any, *, label_type: str = "binary", liked: bool = False) -> "Outcome":
    """A point-wise row with the label that the data have, or why there is none.

    Args:
        prompt: text, a transcript, or messages.
        completion: the same.
        label: a number or a truth value.
        label_type: of the label. Binary labels of 1 are demonstrations.
        liked: binary labels of 1 are no demonstrations.

    Example:
        >>> labelled("Hi", "Hello!", "up")
        LeftOut(why='its label is not a number')
    """
    from trl_ulma.data.conversations import as_messages  # which reads labels, too

    value = as_number(label)
    if value is None:
        truth = as_bool(label)
        if truth is None:
            return LeftOut("its label is not a number")
        value = float(truth)
    if label_type == "binary" and not 0 <= value <= 1:
        return LeftOut("its label is outside [0, 1], where binary labels lie: set --label_type continuous")
    try:
        prompt, completion = as_messages(prompt, completion)
    except ValueError as error:
        return LeftOut(str(error))
    is_demonstration = label_type == "binary" and value == 1 and not liked
    return row(prompt, completion, float(value), demonstration=is_demonstration, label_type=label_type)


LIKED = {
    "--liked": {
        "action": "store_true",
        "help": "answers with label 1 are liked, not demonstrations: ULMA then compares them, too",
    }
}
LABELLED = LIKED | {
    "--label_type": {
        "choices": ("binary", "continuous"),
        "default": "binary",
        "help": "binary: labels from 0 to 1; continuous: any number, higher is better (default: %(default)s)",
    }
}


def is_number(value: Any) -> bool:
    """Whether a value is an int or a float, as it is in the data: no bool, no text.

    Example:
        >>> is_number(0.5), is_number("4.0")
        (True, False)
    """
    return isinstance(value, int | float) and not isinstance(value, bool)
