"""What an adapter is, and the table of those there are.

A new family is a file with a generator over raw rows and its `Adapter`, and a line in `FAMILIES`; the command, its
help, the checks and the report follow from these. The generator yields a `row` for each answer that can be learned
from, and `LeftOut` for each that cannot, so that every answer is accounted for.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

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


def is_number(value: Any) -> bool:
    """Whether a value is an int or a float, as it is in the data: no bool, no text.

    Example:
        >>> is_number(0.5), is_number("4.0")
        (True, False)
    """
    return isinstance(value, int | float) and not isinstance(value, bool)
