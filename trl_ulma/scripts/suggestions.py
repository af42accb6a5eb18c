"""The settings that `trl-ulma check` suggests for a dataset, if its command names no method.

A suggestion is a few options and the reason for them, found from the names of the columns and the first rows. Nothing
is suggested beside an option that was given.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from trl_ulma.scripts.command_line import CommandParser
from trl_ulma.scripts.help_page import GROUPS

# The column of the options
_WIDTH = 34
# The rows of the training split that are read
_FIRST_ROWS = 10_000
# The share of labels in [0, 1] from which on all others are taken for mistakes
_MOSTLY = 0.9
# Options that choose which weights are trained, and how fast
_TRAINING = ("--use_peft", "--learning_rate", "--load_in_4bit", "--load_in_8bit")
_ONLY_ULMA = {option.name for options in GROUPS.values() for option in options if option.methods == ("ulma",)}
# Options that say what labels mean
_LABELS = ("--label_type", "--label_transform", "--preset", "--sft_threshold")


@dataclass(frozen=True)
class Suggestion:
    """Options, and why they suit.

    Attributes:
        options: the options and their values, as on the command line.
        reason: the reason, without a full stop.
    """

    options: tuple[str, ...]
    reason: str


def may_suggest(words: Sequence[str]) -> bool:
    """Whether to suggest settings: if neither a method nor a YAML file is named, and a dataset is, which is no stream.

    Example:
        >>> may_suggest(["--dataset", "rows.csv"]), may_suggest(["--dataset", "rows.csv", "--method=ulma"])
        (True, False)
    """
    given = _given(words)
    named = {"--dataset", "--dataset_name"} & given
    return bool(named) and given.isdisjoint(("--method", "--config", "--dataset_streaming", "--streaming"))


def suggest(words: Sequence[str]) -> list[Suggestion]:
    """The suggestions for the options of a command, the method first.

    Args:
        words: the options of `trl-ulma check`.

    Returns:
        The suggestions; [] if rows are invalid as a whole, or have no column that looks like an answer or a label. The
        command that reads them says so.

    Raises:
        OSError: if there is no such dataset, or the Hub cannot be reached.
    """
    from trl_ulma.data.columns import unsaid
    from trl_ulma.data.proposals import as_value, proposed

    parser = CommandParser(add_help=False)
    for name in ("--dataset", "--dataset_config", "--columns", "--label_map"):
        parser.add_argument(name)
    parser.add_argument("--dataset_train_split", default="train")
    args, _ = parser.parse_known_args(words)
    given = _given(words)
    try:
        with unsaid():
            rows = _first_rows(args, args.columns)
            likely = {} if args.columns else proposed(rows)
            columns = as_value(likely) if likely else args.columns
            if likely:
                rows = _first_rows(args, columns)
    except (TypeError, ValueError):
        return []
    pairs = {"chosen", "rejected"} <= set(rows)
    if not rows or not (pairs or {"completion", "label"} <= set(rows)):
        return []
    settings: list[Suggestion] = []
    if not pairs and given.isdisjoint(_LABELS):
        rater = None if args.columns else _rater_column(rows)
        settings = _of_labels(rows, columns, args.label_map, rater)
        if rater and rater != "rater" and any("center_raters" in each.options[-1] for each in settings):
            likely["rater"] = rater
    suggested = [_method(rows, given, pairs=pairs)]
    if likely:
        suggested.append(Suggestion(("--columns", as_value(likely)), "by the names of the columns"))
    suggested += settings
    if given.isdisjoint(_TRAINING):
        options = ("--use_peft", "--learning_rate", "1e-4")
        suggested.append(Suggestion(options, "trains an adapter (LoRA), not all weights"))
    prompts = rows.get("prompt", rows.get("chosen", ()))
    if given.isdisjoint(("--eval_strategy", "--do_eval")) and len(set(map(repr, prompts))) > 1:
        suggested.append(Suggestion(("--eval_strategy", "epoch"), "evaluates on held-out rows after each epoch"))
    if given.isdisjoint(("--output", "--output_dir")):
        suggested.append(Suggestion(("--output", "out"), "where the model is saved"))
    return suggested


def in_words(suggested: Sequence[Suggestion]) -> str:
    """The suggestions as a table, and how not to get any.

    Example:
        >>> print(in_words([Suggestion(("--method", "pointwise-dpo"), "no row is marked as a demonstration")]))
        Suggested settings (to choose your own, name a --method):
          --method pointwise-dpo             no row is marked as a demonstration
    """
    lines = ["Suggested settings (to choose your own, name a --method):"]
    for each in suggested:
        shown = shlex.join(each.options)
        if len(shown) > _WIDTH:
            lines.append(f"  {shown}")
            shown = ""
        lines.append(f"  {shown:<{_WIDTH}} {each.reason}")
    return "\n".join(lines)


def _given(words: Sequence[str]) -> set[str]:
    return {f"--{word[2:].partition('=')[0].replace('-', '_')}" for word in words if word.startswith("--")}


def _first_rows(args: Any, columns: str | None) -> dict[str, list[Any]]:
    """The first rows of the training split: column → values."""
    from trl_ulma.data.files import load_rows

    splits: Any = load_rows(
        args.dataset,
        config=args.dataset_config,
        streaming=True,
        columns=columns,
        label_map=args.label_map,
        invalid_rows="mark",
        needs_label=False,
    )
    rows = list(islice(splits[args.dataset_train_split], _FIRST_ROWS)) if args.dataset_train_split in splits else []
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _method(rows: Mapping[str, Sequence[Any]], given: set[str], *, pairs: bool) -> Suggestion:
    if own := given & _ONLY_ULMA:
        return Suggestion(("--method", "ulma"), f"has the option {min(own)}")
    if any(mask is True for mask in rows.get("sft_mask", ())):
        return Suggestion(("--method", "ulma"), "imitates the rows with sft_mask, and learns from all labels")
    if pairs:
        return Suggestion(
            ("--method", "pointwise-dpo", "--share_prompts", "True"),
            "a pair becomes two rows; also try `trl dpo`",
        )
    return Suggestion(("--method", "pointwise-dpo"), "learns from labels; ulma also imitates good answers")


def _rater_column(rows: Mapping[str, Sequence[Any]]) -> str | None:
    """The column that names raters of whom some are stricter than others by more than chance. None if there is none."""
    import numpy as np

    from trl_ulma.data.directions import words_of
    from trl_ulma.labels import raters_in_words
    from trl_ulma.rows.dataset_labels import RATER_WORDS

    label = np.array([value if isinstance(value, int | float) else np.nan for value in rows["label"]])
    named = {name: values for name, values in rows.items() if not RATER_WORDS.isdisjoint(words_of(name))}
    return next((name for name, values in named.items() if raters_in_words(label, {name: values})), None)


def _of_labels(
    rows: Mapping[str, Sequence[Any]], columns: str | None, label_map: str | None, rater: str | None
) -> list[Suggestion]:
    """What the labels mean, as far as the first rows show it."""
    from trl_ulma.data.directions import reversing
    from trl_ulma.data.names import Names
    from trl_ulma.data.proposals import known_number
    from trl_ulma.data.readable import are_missing

    if any(value is not None for value in rows.get("label_type", ())):
        return []
    if any(value is not None for value in rows.get("trials", ())):
        return [Suggestion(("--label_transform", "votes:1,1"), "labels are votes for, and trials are votes cast")]
    labels = [value for value in rows["label"] if value is not None]
    labels = [value for value, is_none in zip(labels, are_missing(labels), strict=True) if not is_none]
    words = [value for value in labels if isinstance(value, str)]
    if 2 * len(words) > len(labels):
        meant = {word: known_number(word) for word in words}
        if label_map or None in meant.values():
            return []
        return [Suggestion(("--label_map", ",".join(f"{word}={n}" for word, n in meant.items())), "labels are words")]
    values = [float(value) for value in labels if isinstance(value, bool | int | float)]
    numbers = sorted(set(values))
    if len(numbers) < 2:
        return []
    low, high = numbers[0], numbers[-1]
    is_binary = sum(0 <= value <= 1 for value in values) > _MOSTLY * len(values)  # the others are invalid rows
    name = Names.of(columns, None).columns.get("label", "label")
    reverse = "" if label_map else reversing(name)
    lower = f", and a low {name} looks better" if reverse else ""
    if is_binary:
        return [Suggestion(("--label_transform", reverse), f"labels are in [0, 1]{lower}")] if reverse else []
    if len(numbers) == 2 and not reverse:
        return [
            Suggestion(("--label_transform", f"threshold:{high:g}"), f"labels are {low:g} and {high:g}, bad and good")
        ]
    steps = reverse
    if "," not in reverse:
        steps = ",".join(filter(None, (reverse, "center_raters" if rater else "", "standardize")))
    why = f"labels are numbers from {low:g} to {high:g}{lower}"
    if "center_raters" in steps:
        why += f"; some raters ({rater}) are stricter"
    return [Suggestion(("--label_type", "continuous", "--label_transform", steps), why)]
