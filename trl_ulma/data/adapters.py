"""Adapters for families of datasets, and the table of all families.

To add a family, add a file with a generator over raw rows and its `Adapter`, and a line in `FAMILIES`. The command, its
help, the checks and the report use these. The generator yields a `row` for each answer that is valid for training, and
`LeftOut` for each other answer, so that every answer is accounted for.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from trl_ulma.data.columns import number
from trl_ulma.data.names import Names

# name: (location of its Adapter, description of the data)
FAMILIES = {
    "hh": ("trl_ulma.data.hh:HH", "HH-RLHF: `chosen` and `rejected` transcripts"),
    "golden-hh": ("trl_ulma.data.hh:GOLDEN_HH", "Golden HH: like HH-RLHF, but `chosen` is a demonstration"),
    "qa-feedback": ("trl_ulma.data.qa_feedback:QA_FEEDBACK", "QA-feedback: flawed answers and their corrections"),
    "red-team": ("trl_ulma.data.red_team:RED_TEAM", "red-team attempts: a `transcript` and its `rating`, 0 to 4"),
    "votes": ("trl_ulma.data.votes:VOTES", "questions and voted answers: StackExchange preferences, SHP"),
    "pairs": ("trl_ulma.data.pairs:PAIRS", "TRL's preference pairs: `chosen`, `rejected`, with or without `prompt`"),
    "demonstrations": (
        "trl_ulma.data.demonstrations:DEMONSTRATIONS",
        "answers to imitate: `prompt` and `completion`, or `messages`",
    ),
    "kto": ("trl_ulma.data.kto:KTO", "kto-mix, unpaired preferences: `prompt`, `completion` and `label`"),
    "messages": ("trl_ulma.data.labeled_messages:MESSAGES", "`messages` and a `label` for the last answer"),
    "turns": ("trl_ulma.data.labeled_messages:TURNS", "`messages` in which each answer has its own `label`"),
    "sharegpt": ("trl_ulma.data.sharegpt:SHAREGPT", "`conversations` of turns with `from` and `value`"),
    "alpaca": ("trl_ulma.data.alpaca:ALPACA", "`instruction`, `input` and `output`"),
    "stepwise": (
        "trl_ulma.data.stepwise:STEPWISE",
        "TRL's stepwise supervision: `completions` and `labels`, one per step",
    ),
    "helpsteer": ("trl_ulma.data.helpsteer:HELPSTEER", "HelpSteer2: a `response` and its ratings, 0 to 4"),
    "ultrafeedback": (
        "trl_ulma.data.ultrafeedback:ULTRAFEEDBACK",
        "UltraFeedback: rated `completions` of an `instruction`",
    ),
    "oasst": ("trl_ulma.data.oasst:OASST", "OpenAssistant: trees of messages, or single messages"),
    "pku-saferlhf": (
        "trl_ulma.data.pku_saferlhf:PKU_SAFERLHF",
        "PKU-SafeRLHF: two responses, each safe or not",
    ),
    "beavertails": ("trl_ulma.data.beavertails:BEAVERTAILS", "BeaverTails: a `response` and `is_safe`"),
    "arena": ("trl_ulma.data.arena:ARENA", "Chatbot Arena: two conversations and a vote, with ties"),
    "nectar": ("trl_ulma.data.nectar:NECTAR", "Nectar: ranked `answers` to a transcript"),
    "webgpt": ("trl_ulma.data.webgpt:WEBGPT", "WebGPT comparisons: two answers, each with a score from −1 to 1"),
    "tldr": ("trl_ulma.data.tldr:TLDR", "summarize from feedback: compared or rated summaries"),
    "stack-exchange-paired": (
        "trl_ulma.data.stack_exchange_paired:STACK_EXCHANGE_PAIRED",
        "`question`, the better `response_j` and the worse `response_k`",
    ),
    "helpsteer3": ("trl_ulma.data.helpsteer3:HELPSTEER3", "HelpSteer3: two responses and a preference, −3 to 3"),
    "distilabel": ("trl_ulma.data.distilabel:DISTILABEL", "distilabel: rated `generations` of an `instruction`"),
    "openai": ("trl_ulma.data.openai_preferences:OPENAI", "OpenAI's preferences: `preferred_output` and the other"),
    "gemini": ("trl_ulma.data.gemini:GEMINI", "Gemini's preferences: `contents` and `completions` with a `score`"),
    "open-webui": ("trl_ulma.data.open_webui:OPEN_WEBUI", "Open WebUI's export of feedback: thumbs, or ratings to 10"),
    "langfuse": ("trl_ulma.data.langfuse:LANGFUSE", "Langfuse's export of traces or observations with scores"),
    "langsmith": ("trl_ulma.data.langsmith:LANGSMITH", "LangSmith's runs with `feedback_stats`"),
    "label-studio": (
        "trl_ulma.data.label_studio:LABEL_STUDIO",
        "Label Studio's JSON export: ratings, choices, comparisons, written answers",
    ),
}


# Why both answers of a comparison are left out
SAME = "both halves of its pair are the same"
# How the reason begins why an answer is left out whose label is not on the scale of its family
OFF_SCALE = "its label is outside"
# Why an answer with a rating is left out if labels are binary
OUTSIDE = f"{OFF_SCALE} [0, 1], the range of binary labels: set --label_type continuous"


@dataclass(frozen=True)
class LeftOut:
    """An answer that is left out.

    Attributes:
        why: the reason. It has the same wording for all answers that it applies to, so that they can be counted.
    """

    why: str


@dataclass(frozen=True)
class Noted:
    """A finding that does not affect the number of rows.

    Attributes:
        what: the finding. It always has the same wording.
    """

    what: str


Outcome = dict[str, Any] | LeftOut | Noted


@dataclass(frozen=True)
class Adapter:
    """How to read one family of datasets.

    Attributes:
        read: takes raw rows and the options as keyword arguments, and yields one outcome per answer.
        needs: the supported layouts, each as the columns that it needs.
        refuses: columns that show that the data is of another family.
        options: command-line flag → the arguments of argparse's `add_argument`.
        rated: the family that reads the same data with a column `label`, if `read` makes answers without one
            demonstrations. "" if not.
        also: columns that `read` uses if they are there. None if it uses all columns.
        maps_labels: whether `read` takes `label_map`, label → number, because its labels are not in a column `label`.
    """

    read: Callable[..., Iterator[Outcome]]
    needs: tuple[tuple[str, ...], ...]
    refuses: tuple[str, ...] = ()
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    rated: str = ""
    also: tuple[str, ...] | None = ()
    maps_labels: bool = False

    def reads(self, columns: Any) -> bool:
        """Whether a dataset with these columns is of this family.

        Example:
            >>> find("pairs").reads(["chosen", "rejected"]), find("hh").reads(["prompt", "completion"])
            (True, False)
        """
        there = set(columns)
        return any(there.issuperset(layout) for layout in self.needs) and there.isdisjoint(self.refuses)

    def unused(self, columns: Iterable[str]) -> list[str]:
        """Those of these columns that `read` does not use.

        Example:
            >>> find("alpaca").unused(["instruction", "input", "stars"])
            ['stars']
        """
        if self.also is None:
            return []
        used = {*self.also, *(name for layout in self.needs for name in layout)}
        return [name for name in columns if name not in used]


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
    """A pointwise row. A text becomes one turn.

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


def off_scale(low: float, high: float) -> LeftOut:
    """The reason why an answer is left out whose label is not on the scale of its family. If there are many, the data
    has another scale, which is an error.

    Example:
        >>> off_scale(0, 4)
        LeftOut(why='its label is outside [0, 4], the scale of this rating')
    """
    return LeftOut(f"{OFF_SCALE} [{low:g}, {high:g}], the scale of this rating")


def as_number(value: Any) -> int | float | None:
    """A value, or its text, as a number. None if it is not a finite number. (All values in CSV files are text.)

    Example:
        >>> as_number(4), as_number("0.5"), as_number(True), as_number("N/A"), as_number(float("nan"))
        (4, 0.5, None, None, None)
    """
    found: Any = number(value) if isinstance(value, str) else value
    return found if is_number(found) and math.isfinite(found) else None


def as_bool(value: Any) -> bool | None:
    """A value, or its text, as a bool. None if it is neither a bool nor 0 or 1.

    Example:
        >>> as_bool(True), as_bool("false"), as_bool(1), as_bool("perhaps")
        (True, False, True, None)
    """
    found = number(value) if isinstance(value, str) else value
    return bool(found) if isinstance(found, bool | int | float) and found in (0, 1) else None


def as_label(value: Any) -> float | None:
    """A number or a bool, or its text, as a number. None for other values.

    Example:
        >>> as_label("4"), as_label(True), as_label("up")
        (4.0, 1.0, None)
    """
    found = as_number(value)
    truth = as_bool(value) if found is None else None
    return float(found) if found is not None else None if truth is None else float(truth)


def labeled(
    prompt: Any,
    completion: Any,
    label: Any,
    *,
    label_type: str = "binary",
    liked: bool = False,
    label_map: Mapping[str, Any] | None = None,
    scale: tuple[float, float] | None = None,
) -> "Outcome":
    """A pointwise row with the label of the data, or the reason why there is none.

    Args:
        prompt: text, a transcript, or messages.
        completion: text, a transcript, or messages.
        label: a number or a bool.
        label_type: the type of the label. Answers with the binary label 1 are demonstrations.
        liked: answers with the binary label 1 are not demonstrations.
        label_map: label, as text → number.
        scale: the lowest and the highest rating, if the family has a fixed scale.

    Example:
        >>> labeled("Hi", "Hello!", "up")
        LeftOut(why='its label is not a number')
        >>> labeled("Hi", "Hello!", "Up", label_map={"up": 1})["label"]
        1.0
    """
    from trl_ulma.data.conversations import as_messages  # imported here, because it imports labels

    if label_map:
        unknown: Counter = Counter()
        label = Names(label_map=label_map).label(label, unknown)
        if unknown:
            return LeftOut(f"its label is {next(iter(unknown))!r}, which label_map does not contain")
    value = as_label(label)
    if value is None:
        return LeftOut("its label is not a number")
    if scale is not None and not scale[0] <= value <= scale[1]:
        return off_scale(*scale)
    if label_type == "binary" and not 0 <= value <= 1:
        return LeftOut(OUTSIDE)
    try:
        prompt, completion = as_messages(prompt, completion)
    except ValueError as error:
        return LeftOut(str(error))
    is_demonstration = label_type == "binary" and value == 1 and not liked
    return row(prompt, completion, float(value), demonstration=is_demonstration, label_type=label_type)


LIKED = {
    "--liked": {
        "action": "store_true",
        "help": "treat answers with label 1 as liked, not as demonstrations, so that ULMA also compares them",
    }
}
LABELED = LIKED | {
    "--label_type": {
        "choices": ("binary", "continuous"),
        "default": "binary",
        "help": "type of the labels: binary (0 to 1) or continuous (any number, higher is better) (default: "
        "%(default)s)",
    }
}


def compared(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """The answers that are compared with each other, without those that have the same text and other labels.

    Example:
        >>> compared([labeled("Hi", "Hello!", label) for label in (0, 1)])[0]
        LeftOut(why='both halves of its pair are the same')
    """
    found = list(outcomes)
    rows = [each for each in found if isinstance(each, dict)]
    return [
        LeftOut(SAME)
        if isinstance(one, dict) and any(_is_same(one, each) and one["label"] != each["label"] for each in rows)
        else one
        for one in found
    ]


def _is_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one["prompt"] == other["prompt"] and one["completion"] == other["completion"]


def refuse_several(names: Mapping[str, int], what: str, flag: str) -> None:
    """Raise ValueError if the answers of a dataset have several names of something of which only one is read.

    Args:
        names: name → number of answers.
        what: what has these names, in the plural.
        flag: the option that says which one is read.

    Example:
        >>> refuse_several({"helpful": 2}, "scores", "--score")
    """
    if len(names) > 1:
        each = ", ".join(f"{name} ({count:,} answer{'s' * (count > 1)})" for name, count in names.items())
        raise ValueError(f"The answers have {what} of several names: {each}. Set {flag} to the one to read.")


def is_number(value: Any) -> bool:
    """Whether a value is an int or a float, and not a bool or text.

    Example:
        >>> is_number(0.5), is_number("4.0")
        (True, False)
    """
    return isinstance(value, int | float) and not isinstance(value, bool)
