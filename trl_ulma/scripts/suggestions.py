"""The settings that `trl-ulma check` suggests for a dataset, if its command names no method.

A suggestion is a few options and the reason for them, found from the names of the columns and the first rows. Nothing
is suggested beside an option that was given.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import Any

from trl_ulma.scripts.command_line import CommandParser
from trl_ulma.scripts.help_page import GROUPS

# The column of the options
_WIDTH = 34
# The rows of the training split in which columns are looked for, and those whose labels are looked at. In a sorted
# file, the first labels are all alike.
_FIRST_ROWS, _MOST_ROWS = 1_000, 100_000
# Longer texts are read in the first rows only
_LONGEST = 100
# The share of labels in [0, 1] from which on all others are taken for mistakes
_MOSTLY = 0.9
# Options that choose which weights are trained, and how fast
_TRAINING = ("--use_peft", "--learning_rate", "--load_in_4bit", "--load_in_8bit", "--sync_ref_model")
# Options of which each excludes --share_prompts
_LAYOUTS = ("--share_prompts", "--padding_free")
_ONLY_ULMA = {option.name for options in GROUPS.values() for option in options if option.methods == ("ulma",)}
# Options that say what labels mean
_LABELS = ("--label_type", "--label_transform", "--preset", "--sft_threshold")
_CONTINUOUS = ("--label_type", "continuous")
# Words in names of columns that can mark demonstrations, and the values of such a column
_DEMONSTRATIONS = frozenset(("gold", "golden", "demonstration", "demo", "expert", "reference", "human", "curated"))
_FLAGS = frozenset(("true", "false", "1", "0", "1.0", "0.0", ""))
# Options with which an evaluation is chosen
_EVALUATIONS = ("--eval_strategy", "--do_eval", "--eval_steps")


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
    from trl_ulma.data.label_words import scale_of
    from trl_ulma.data.proposals import as_rated, as_value, families_of, proposed, unread_labels

    parser = CommandParser(add_help=False)
    for name in ("--dataset", "--dataset_config", "--columns", "--label_map"):
        parser.add_argument(name, name.replace("_", "-"))
    parser.add_argument("--dataset_train_split", "--dataset-train-split", default="train")
    args, _ = parser.parse_known_args(words)
    given = _given(words)
    try:
        with unsaid():
            first = _first_rows(args, args.columns, _FIRST_ROWS)
            likely = {} if args.columns else proposed(first)
            if as_rated(args.dataset, first, likely, families_of(first)):
                return []  # a text besides the prompt belongs to it, as `prepare` knows
            columns = as_value(likely) if likely else args.columns
            rows = _first_rows(args, columns, _MOST_ROWS)
    except (TypeError, ValueError):
        return []
    pairs = {"chosen", "rejected"} <= set(rows)
    if not rows or not (pairs or {"completion", "label"} <= set(rows)):
        return []
    settings: list[Suggestion] = []
    if not pairs:
        if scale := {} if args.label_map else scale_of(rows["label"]):
            label_map = ",".join(f"{word}={number:g}" for word, number in scale.items())
            settings.append(Suggestion(("--label_map", label_map), "labels are numbers of a scale as text"))
            rows["label"] = [scale.get(value, value) if isinstance(value, str) else value for value in rows["label"]]
        rater = None if args.columns else _rater_column(rows)
        settings += _beside(_of_labels(rows, columns, args.label_map, rater), values_of(words))
        if rater and rater != "rater" and any("center_raters" in each.options[-1] for each in settings):
            likely["rater"] = rater
    suggested = [_method(rows, given, pairs=pairs)]
    if likely:
        why = f"guessed from the names of the columns{unread_labels(likely, first)}"
        suggested.append(Suggestion(("--columns", as_value(likely)), why))
    suggested += settings
    if given.isdisjoint(_TRAINING):
        options = ("--use_peft", "--learning_rate", "1e-4")
        suggested.append(Suggestion(options, "trains an adapter (LoRA), not all weights"))
    if given.isdisjoint(_EVALUATIONS) and not holds_out_none(values_of(words)) and _has_prompts(rows):
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


def values_of(words: Sequence[str]) -> dict[str, str]:
    """The options of a command, without dashes, and their values as text: "True" for a flag.

    Example:
        >>> values_of(["--use-peft", "--beta", "0.1", "--columns=label=stars"])
        {'use_peft': 'True', 'beta': '0.1', 'columns': 'label=stars'}
    """
    found = {}
    for word, following in zip_longest(words, words[1:], fillvalue="--"):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            flag = "True" if following.startswith("--") else following
            found[name.replace("-", "_")] = value if equals else flag
    return found


def _given(words: Sequence[str]) -> set[str]:
    return {f"--{name}" for name in values_of(words)}


def holds_out_none(given: Mapping[str, str]) -> bool:
    """Whether a command with these options has `--test_split_size 0`."""
    try:
        return float(given.get("test_split_size", 1)) == 0
    except ValueError:
        return False


def _first_rows(args: Any, columns: str | None, most: int) -> dict[str, list[Any]]:
    """The first rows of the training split, up to `most`: column → values."""
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
    found: dict[str, list[Any]] = {}
    for number, row in enumerate(islice(splits.get(args.dataset_train_split, ()), most)):
        for name, value in row.items():
            is_long = isinstance(value, list | dict) or (isinstance(value, str) and len(value) > _LONGEST)
            # Rows before this one may lack the column
            values = found.setdefault(name, [])
            values += [None] * (number - len(values))
            values.append(None if number >= _FIRST_ROWS and is_long else value)
    rows = max(map(len, found.values()), default=0)
    return {name: values + [None] * (rows - len(values)) for name, values in found.items()}


def _has_prompts(rows: Mapping[str, Sequence[Any]]) -> bool:
    """Whether the first rows have two different prompts, so that one can be held out."""
    from datasets import Dataset

    from trl_ulma.data.splits import count_prompts

    names = ["prompt"] if "prompt" in rows else ["chosen", "rejected"]
    if not rows.keys() >= set(names):
        return False
    try:
        return count_prompts(Dataset.from_dict({name: list(rows[name][:_FIRST_ROWS]) for name in names})) > 1
    except (TypeError, ValueError):  # the command that reads the rows says so
        return False


def _method(rows: Mapping[str, Sequence[Any]], given: set[str], *, pairs: bool) -> Suggestion:
    if own := given & _ONLY_ULMA:
        return Suggestion(("--method", "ulma"), f"has the option {min(own)}")
    if any(mask is True for mask in rows.get("sft_mask", ())):
        return Suggestion(("--method", "ulma"), "imitates the rows with sft_mask, and learns from all labels")
    if pairs:
        shared = ("--share_prompts", "True") if given.isdisjoint(_LAYOUTS) else ()
        return Suggestion(("--method", "pointwise-dpo", *shared), "a pair becomes two rows; also try `trl dpo`")
    also = "ulma also imitates good answers"
    if name := next((name for name, values in rows.items() if _marks_demonstrations(name, values)), None):
        also = f"if `{name}` marks answers to imitate, add sft_mask={name} to --columns, and choose --method ulma"
    return Suggestion(("--method", "pointwise-dpo"), f"learns from labels; {also}")


def _marks_demonstrations(name: str, values: Sequence[Any]) -> bool:
    """Whether a column looks as if it marks demonstrations.

    Example:
        >>> _marks_demonstrations("is_gold", [True, False]), _marks_demonstrations("is_gold", [True, True])
        (True, False)
    """
    from trl_ulma.data.directions import words_of

    there = {str(value).strip().lower() for value in values if value is not None}
    return len(there) > 1 and there <= _FLAGS and not _DEMONSTRATIONS.isdisjoint(words_of(name))


def _beside(settings: list[Suggestion], given: Mapping[str, str]) -> list[Suggestion]:
    """What is left of the suggestions about labels if options about labels are given."""
    said = {name for name in given if f"--{name}" in _LABELS}
    if not said:
        return settings
    continuous = [each for each in settings if each.options[: len(_CONTINUOUS)] == _CONTINUOUS]
    if said == {"label_type"} and given["label_type"] == "continuous":
        return [Suggestion(each.options[len(_CONTINUOUS) :], each.reason) for each in continuous]
    if said == {"sft_threshold"}:  # a label as rows have it, so they are not transformed
        return [Suggestion(_CONTINUOUS, each.reason) for each in continuous]
    return []


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
    import numpy as np

    from trl_ulma.data.directions import reversing
    from trl_ulma.data.label_words import known_number, says_yes
    from trl_ulma.data.names import Names
    from trl_ulma.data.readable import are_missing
    from trl_ulma.labels.outliers import outliers, tail_share

    if any(value is not None for value in rows.get("label_type", ())):
        return []
    labels = [value for value in rows["label"] if value is not None]
    if any(value is not None for value in rows.get("trials", ())):
        if any(isinstance(value, float) and not value.is_integer() for value in labels):
            return []  # shares of the votes, or another scale
        return [Suggestion(("--label_transform", "votes:1,1"), "labels are votes for, and trials are votes cast")]
    labels = [value for value, is_none in zip(labels, are_missing(labels), strict=True) if not is_none]
    name = Names.of(columns, None).columns.get("label", "label")
    reverse = "" if label_map else reversing(name)
    lower = f", and a low `{name}` looks better" if reverse else ""
    better = lower or (f", and a high `{name}` is read as better" if name != "label" else "")
    words = [value for value in labels if isinstance(value, str)]
    if 2 * len(words) > len(labels):
        meant = {word: known_number(word) for word in words}
        answers = {says_yes(word) for word in meant}
        if label_map or None in meant.values() or (reverse and answers == {True, False}):
            return []
        why = "labels are words"
        if reverse and answers == {True}:  # yes, it is harmful
            meant = {word: 1 - (n or 0) for word, n in meant.items()}
            why += f", and yes in `{name}` looks bad"
        # A value must not begin with a dash
        pairs = sorted(meant.items(), key=lambda pair: pair[0].startswith("-"))
        return [Suggestion(("--label_map", ",".join(f"{word}={n}" for word, n in pairs)), why)]
    values = [float(value) for value in labels if isinstance(value, bool | int | float)]
    numbers = sorted(set(values))
    if len(numbers) < 2:
        return []
    low, high = numbers[0], numbers[-1]
    is_binary = sum(0 <= value <= 1 for value in values) > _MOSTLY * len(values)  # the others are invalid rows
    if is_binary:
        return [Suggestion(("--label_transform", reverse), f"labels are in [0, 1]{lower}")] if reverse else []
    is_whole = len(rows["label"]) < _MOST_ROWS
    if len(numbers) == 2 and not reverse and is_whole:
        if words:  # which may be the other numbers of a scale, such as 1,234
            return []
        why = f"labels are {low:g} and {high:g}, read as bad and good"
        return [Suggestion(("--label_transform", f"threshold:{high:g}"), why)]
    usual = np.delete(values, outliers(np.array(values)))  # the others are named when all rows are read
    tail = tail_share(usual)
    steps = reverse
    if "," not in reverse:
        scaled = "quantile,center" if tail else "standardize"
        steps = ",".join(filter(None, (reverse, "center_raters" if rater else "", scaled)))
    where = "" if is_whole else f" in the first {_MOST_ROWS:,} rows"
    why = f"labels are numbers from {usual.min():,.10g} to {usual.max():,.10g}{where}{better}"
    if "quantile,center" in steps:
        why += "; a few of them have more than half of the variance, so only their order is learned"
    if "center_raters" in steps:
        why += f"; some raters ({rater}) are stricter"
    return [Suggestion((*_CONTINUOUS, "--label_transform", steps), why)]
