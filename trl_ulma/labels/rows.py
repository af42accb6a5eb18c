"""The schema of a pointwise row, and the errors for rows that do not fit it."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trl_ulma.labels.transforms import LabelTransform

LABEL_TYPES = ("binary", "continuous")
OPTIONAL_COLUMNS = ("sft_mask", "label_type", "log_z", "weight")
# Roles of the turns that a prompt may end with
ASKING_ROLES = ("user", "system", "developer")

# Batches hold labels, weights and log Z in float32
_LARGEST = float(np.finfo(np.float32).max)

# How many invalid rows an error lists
LISTED = 20
_PROMPT_SHOWN = 60  # characters
# The end of the error about a label outside [0, 1]
_NOT_BINARY = 'Rescale it, or set label_type="continuous".'
_FIX = 'Fix these rows, or set invalid_rows="drop" (on the command line --invalid_rows drop) to leave them out.'
_ARE_RATINGS = (
    'Most labels are outside [0, 1], as ratings and scores are. Set label_type="continuous". Do not leave these rows '
    "out: the low ratings would stay, and count as likes."
)
_UNREADABLE = "a row that cannot be read"
# The origin of a row of a table, whose empty cells are read as None
_OF_TABLE = re.compile(r"\.[ct]sv(\.gz)?, line \d+", re.IGNORECASE)
# Numbers with decimal commas, thousands separators or percent signs
_OTHER_FORM = re.compile(r"[+-]?(?!\d+(\.\d*)?$)\d[\d.,_' ]*\s?%?", re.ASCII)
# A number with one decimal comma. The comma of 1,234 may separate thousands
_DECIMAL_COMMA = re.compile(r"(?![+-]?[1-9]\d{0,2},\d{3}$)[+-]?\d+,\d+", re.ASCII)


class InvalidRow(ValueError):
    """A row that cannot be read.

    Args:
        message: names the row, what was found and what to do.
        kind: the kind of error in a few words; rows are counted by it.
        prompt: the prompt of the row, whose start is shown.
        origin: the file and line of the row, or "" if unknown.

    Example:
        >>> str(InvalidRow("Row 3 of the train dataset: label is None.", "label is no number"))
        'Row 3 of the train dataset: label is None.'
    """

    def __init__(self, message: str, kind: str, prompt: str = "", origin: str = ""):
        super().__init__(message, kind, prompt, origin)
        self.message, self.kind, self.prompt, self.origin = message, kind, prompt, origin

    def __str__(self) -> str:
        return self.message

    def at_prompt(self, prompt: Any) -> "InvalidRow":
        """Return this error with the start of the row's prompt."""
        return InvalidRow(self.message, self.kind, start_of(prompt), self.origin)

    def at_origin(self, origin: str | None, where: str, columns: Mapping[str, str] | None = None) -> "InvalidRow":
        """Return this error in the words of the file that the row is from. Unchanged if `origin` is None.

        Args:
            origin: the file and line of the row. It replaces the number of the row.
            where: the name of the dataset.
            columns: column that trainers read → its name in the file.

        Example:
            >>> error = InvalidRow("Row 3 of the train dataset: label is None; it is needed.", "label is missing")
            >>> error.at_origin("a.csv, line 5", "train", {"label": "stars"}).message
            'a.csv, line 5: stars is empty; it is needed.'
        """
        if origin is None:
            return self
        named = re.match(rf"Row \d+( \(\w+\))? of the {re.escape(where)} dataset", self.message)
        half, rest = (named[1] or "", self.message[named.end() :]) if named else ("", f": {self.message}")
        kind = self.kind
        if kind == _UNREADABLE:  # its error names the line, too
            rest = re.sub(rf" in {re.escape(origin.rpartition(', ')[2])}(?!\d| or below|, column)", "", rest, count=1)
        if _OF_TABLE.search(origin):
            rest = re.sub(r"^(: \w+ is) None;", r"\1 empty;", rest)
            kind = re.sub(r" is missing$", " is empty", kind)
        if columns and not kind.startswith("prompt and completion"):
            rest = re.sub(r"^: (\w+)(?= )", lambda word: f": {columns.get(word[1], word[1])}", rest)
            kind = re.sub(r"^\w+(?= )", lambda word: columns.get(word[0], word[0]), kind)
        return InvalidRow(f"{origin}{half}{rest}", kind, self.prompt, origin)


class InvalidRows(ValueError):
    """All invalid rows. The last line of the message says what to do.

    Attributes:
        found: the errors.
        total: the number of rows of the dataset, or None if it is unknown.
        remedy: what to do.
    """

    found: Sequence[InvalidRow] = ()
    total: int | None = None
    remedy: str = ""

    @classmethod
    def of(cls, found: Sequence[InvalidRow], total: int | None, where: str | None, remedy: str) -> "InvalidRows":
        """The error for these rows; the arguments are those of `list_invalid`, plus the attribute `remedy`."""
        error = cls(f"{list_invalid(found, total, where)}\n{remedy}")
        error.found, error.total, error.remedy = found, total, remedy
        return error

    @classmethod
    def joined(cls, errors: Sequence["InvalidRows"]) -> "InvalidRows":
        """One error for several datasets.

        Example:
            >>> halves = [InvalidRow(f"a.csv, line {n}: label is empty.", "k", "", f"a.csv, line {n}") for n in (7, 3)]
            >>> print(InvalidRows.joined([InvalidRows.of([half], 10, "train", "Fix it.") for half in halves]))
            2 of 20 rows are invalid:
              a.csv, line 3: label is empty.
              a.csv, line 7: label is empty.
            By kind: 2 × k.
            Fix it.
        """
        if len(errors) == 1:
            return errors[0]
        totals = [error.total for error in errors if error.total is not None]
        total = sum(totals) if len(totals) == len(errors) else None
        remedies = [error.remedy for error in errors]
        remedy = _ARE_RATINGS if _ARE_RATINGS in remedies else remedies[0]
        return cls.of([row for error in errors for row in error.found], total, None, remedy)


def unread(fault: str, at: str) -> InvalidRow:
    """Return the error of a row whose line could not be read.

    Args:
        fault: what is wrong with the line, beginning with a verb.
        at: name of the row.

    Example:
        >>> str(unread("has 2 fields in line 5, but 3 columns.", "Row 3 of the train dataset"))
        'Row 3 of the train dataset has 2 fields in line 5, but 3 columns.'
    """
    return InvalidRow(f"{at} {fault}", _UNREADABLE)


def start_of(prompt: Any) -> str:
    """Return the start of a prompt (text or messages) on one line, or "" for anything else.

    Example:
        >>> start_of([{"role": "user", "content": "How do I\\nboil an egg?"}])
        'How do I boil an egg?'
    """
    if is_messages(prompt):
        asked = [turn.get("content") for turn in prompt if turn["role"] == "user"] or [""]
        parts = asked[-1] if isinstance(asked[-1], list) else [asked[-1]]
        prompt = " ".join(str(part.get("text") or "") if isinstance(part, dict) else str(part or "") for part in parts)
    if not isinstance(prompt, str):
        return ""
    line = " ".join(prompt[: 4 * _PROMPT_SHOWN].split()).encode(errors="replace").decode()
    return line if len(line) <= _PROMPT_SHOWN else f"{line[:_PROMPT_SHOWN]}…"


def list_invalid(found: Sequence[InvalidRow], total: int | None, where: str | None) -> str:
    """Return one text about all invalid rows: at most 20 messages with the starts of prompts, and counts by kind.

    Args:
        found: the errors, in row order. If all are from files, they are listed in the order of each file.
        total: number of rows of the dataset, or None if it is unknown.
        where: name of the dataset, or None for several datasets.

    Example:
        >>> print(list_invalid([InvalidRow("Row 3: label is None.", "label is no number", "Hi")], 4, "train"))
        Row 3: label is None.
        Its prompt begins: 'Hi'
    """
    if len(found) == 1:
        return str(found[0]) + (f"\nIts prompt begins: {found[0].prompt!r}" if found[0].prompt else "")
    found = _in_order(found)
    of = "" if total is None else f" of {total:,}"
    of_dataset = "" if where is None else f" of the {where} dataset"
    lines = [f"{len(found):,}{of} rows{of_dataset} are invalid:"]
    # Both halves of a pair can have the same error, such as an invalid weight
    listed = [f"  {each}" + (f" Prompt: {each.prompt!r}" if each.prompt else "") for each in found[:LISTED]]
    lines += dict.fromkeys(listed)
    if len(found) > LISTED:
        lines.append(f"  … and {len(found) - LISTED:,} more.")
    kinds = Counter(each.kind for each in found)
    lines.append("By kind: " + "; ".join(f"{count:,} × {kind}" for kind, count in kinds.most_common()) + ".")
    return "\n".join(lines)


def _in_order(found: Sequence[InvalidRow]) -> Sequence[InvalidRow]:
    """Return the errors in the order of the lines of their files, or as they are if they are not all from files."""
    if not all(each.origin for each in found):
        return found
    places = [each.origin.rpartition(" ") for each in found]
    files = {file: number for number, file in enumerate(dict.fromkeys(file for file, _, _ in places))}
    keys = [(files[file], int(line)) for file, _, line in places]
    return [found[i] for i in sorted(range(len(found)), key=keys.__getitem__)]


def refuse_invalid(found: Sequence[InvalidRow], total: int | None, where: str) -> None:
    """Raise `InvalidRows`, which lists all invalid rows and what to do; do nothing if there are none."""
    if found:
        raise InvalidRows.of(found, total, where, _ARE_RATINGS if look_like_ratings(found, total) else _FIX)


def look_like_ratings(found: Sequence[InvalidRow], total: int | None) -> bool:
    """Return whether more than half of all rows are invalid because their labels would need label_type="continuous".

    Example:
        >>> rating = InvalidRow(f"Row 3: label is 5.0, outside [0, 1]. {_NOT_BINARY}", "label outside [0, 1]")
        >>> look_like_ratings([rating], 1), look_like_ratings([rating], 2)
        (True, False)
    """
    ratings = sum(each.message.endswith(_NOT_BINARY) for each in found)
    return total is not None and 2 * ratings > total


@dataclass(frozen=True)
class LabelRules:
    """Rules for reading labels.

    Attributes:
        label_type: "binary" or "continuous", for rows without their own `label_type`.
        sft_threshold: for rows without `sft_mask`, a continuous label at or above this marks a demonstration.
        need_mask: whether an error is raised if it is unknown which rows with continuous labels are demonstrations.
        binary_only: whether continuous labels raise an error; unlearning needs this.
        transform: applied first, to the labels of rows whose type is `label_type`. Other labels stay as they are.
        is_settled: whether the rules are those of a saved model, so that errors do not suggest changing them.
    """

    label_type: str = "binary"
    sft_threshold: float | None = None
    need_mask: bool = False
    binary_only: bool = False
    transform: LabelTransform | None = None
    is_settled: bool = False

    def is_demonstration(self, label: float, label_type: str | None = None) -> bool:
        """Return whether a row without an `sft_mask` is a demonstration.

        Example:
            >>> LabelRules().is_demonstration(1.0), LabelRules("continuous", 0.5).is_demonstration(0.7)
            (True, True)
        """
        if (label_type or self.label_type) == "binary":
            return label == 1
        return self.sft_threshold is not None and label >= self.sft_threshold


def check_columns(names: Sequence[str], where: str, *, takes_images: bool = False) -> bool:
    """Check that the columns are those of pointwise or paired rows, and return whether they are paired.

    Args:
        names: column names.
        where: name of the dataset, for errors.
        takes_images: whether the trainer reads a column `image` or `images`.

    Raises:
        ValueError: if columns are missing, or if they contradict one another.
    """
    found = f"found {', '.join(sorted(map(str, names))) or 'none'}"
    if not takes_images and ("image" in names or "images" in names):
        raise ValueError(
            f"The {where} dataset has images ({found}). Only a trainer with a vision-language model and its processor "
            "reads them. Pass the processor as processing_class, or remove the column."
        )
    paired = "chosen" in names or "rejected" in names
    if paired and "completion" in names:
        raise ValueError(
            f"The {where} dataset has `completion` together with `chosen` or `rejected`, so it is not clear which are "
            f"its answers ({found}). Remove the one or the others."
        )
    needed = ("chosen", "rejected") if paired else ("prompt", "completion", "label")
    missing = [name for name in needed if name not in names]
    if missing:
        raise ValueError(
            f"The {where} dataset lacks the column{'s' if len(missing) > 1 else ''} {', '.join(missing)}; {found}. "
            "Needed are prompt, completion and label (one answer per row), or chosen and rejected (pairs)."
        )
    return paired


def raw_labels(
    columns: Mapping[str, Sequence[Any]],
    rows: Sequence[int],
    where: str,
    rules: LabelRules,
    invalid: dict[int, InvalidRow] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Return the labels that `rules.transform` applies to, before it. The arguments are those of `read_labels`.

    Rows that `invalid` already holds are left out.

    Returns:
        `(M,)` positions among the rows, `(M,)` labels, and `(M,)` trials if the transform reads them, else None.

    Raises:
        ValueError: naming the rows whose label is no number, or whose votes are none, unless `invalid` takes them.

    Example:
        >>> columns = {"label": [3, True, 1], "label_type": ["continuous", "binary", "continuous"]}
        >>> raw_labels(columns, [0, 1, 2], "train", LabelRules("continuous"))[:2]
        (array([0, 2]), array([3., 1.]))
    """
    needs_trials = rules.transform is not None and rules.transform.needs_trials
    has_trials = needs_trials and "trials" in columns
    types = columns.get("label_type")
    own, labels, trials = [], [], []
    found: dict[int, InvalidRow] = {}
    for i, row in enumerate(rows):
        if (types is not None and types[i] != rules.label_type) or (invalid is not None and i in invalid):
            continue
        at = f"Row {row} of the {where} dataset"
        try:
            label = _number(columns["label"][i], at, "label")
            cast = _number(columns["trials"][i], at, "trials") if has_trials else 0.0
            if has_trials and not 0 <= label <= cast:
                raise InvalidRow(
                    f"{at}: label is {label:g} and trials {cast:g}; votes for an answer are between 0 and the votes "
                    "cast.",
                    "votes outside [0, trials]",
                )
        except InvalidRow as error:
            found[i] = error.at_prompt(_at(columns, "prompt", i))
            continue
        own.append(i)
        labels.append(label)
        trials.append(cast)
    _hand_on(found, invalid, len(rows), where)
    if needs_trials and not has_trials:
        raise ValueError(
            f"label_transform=votes reads a column `trials`, the number of votes cast, which the {where} dataset "
            "does not have. Add it; `label` is how many of them are for the answer."
        )
    return np.array(own, dtype=int), np.array(labels), np.array(trials) if needs_trials else None


def transform_labels(
    columns: Mapping[str, Sequence[Any]],
    rows: Sequence[int],
    where: str,
    rules: LabelRules,
    prompts: Sequence[Any] | None = None,
    invalid: dict[int, InvalidRow] | None = None,
) -> list[Any]:
    """Return the label column after `rules.transform`. The arguments are those of `read_labels`, plus prompt keys.

    Example:
        >>> from trl_ulma.labels import parse_transform
        >>> rules = LabelRules("continuous", transform=parse_transform("lower_is_better", "continuous"))
        >>> transform_labels({"label": [4, 0]}, [0, 1], "train", rules)
        [-4.0, 0.0]
    """
    found = list(columns["label"])
    if rules.transform is not None:
        own, labels, trials = raw_labels(columns, rows, where, rules, invalid)
        if not len(own):
            return found
        keys = None if prompts is None else [prompts[i] for i in own]
        for i, label in zip(own, rules.transform.apply(labels, trials, keys).tolist(), strict=True):
            found[i] = label
    return found


def read_labels(
    columns: Mapping[str, Sequence[Any]],
    rows: Sequence[int],
    where: str,
    rules: LabelRules,
    invalid: dict[int, InvalidRow] | None = None,
) -> dict[str, list]:
    """Return the checked values of `label` and the optional columns; `sft_mask` is added if it is absent.

    Args:
        columns: column name → values: `label` (after `transform_labels`); `sft_mask`, `label_type`, `log_z` and
            `weight` if present; `prompt`, for errors.
        rows: row numbers, for errors.
        where: name of the dataset, for errors.
        rules: rules for reading labels.
        invalid: collects the errors, position → error. Rows at positions that it already holds are not read. All
            values of these rows are neutral. If None, invalid rows raise an error.

    Raises:
        ValueError: listing all invalid rows, what was found and what is needed, if `invalid` is None.

    Example:
        >>> read_labels({"label": [True, 0]}, [0, 1], "train", LabelRules())
        {'label': [1.0, 0.0], 'sft_mask': [True, False]}
    """
    present = [name for name in OPTIONAL_COLUMNS if name in columns]
    read: dict[str, list] = {name: [] for name in ("label", "sft_mask", *present)}
    neutral = {"label": 0.0, "sft_mask": False, "label_type": rules.label_type, "log_z": 0.0, "weight": 1.0}
    found: dict[int, InvalidRow] = {}
    for i, row in enumerate(rows):
        values = neutral
        if invalid is None or i not in invalid:
            try:
                values = _read_label(columns, i, f"Row {row} of the {where} dataset", rules)
            except InvalidRow as error:
                found[i] = error.at_prompt(_at(columns, "prompt", i))
        for name, into in read.items():
            into.append(values[name])
    _hand_on(found, invalid, len(rows), where)
    return read


def _hand_on(found: dict[int, InvalidRow], invalid: dict[int, InvalidRow] | None, total: int, where: str) -> None:
    if invalid is None:
        refuse_invalid(list(found.values()), total, where)
    else:
        invalid |= found


def _at(columns: Mapping[str, Sequence[Any]], name: str, i: int) -> Any:
    return columns[name][i] if name in columns else None


def _read_label(columns: Mapping[str, Sequence[Any]], i: int, at: str, rules: LabelRules) -> dict[str, Any]:
    """Return the checked values of one row, for `read_labels`."""
    after = "" if rules.transform is None else f" after label_transform={str(rules.transform)!r}"
    label_type = columns["label_type"][i] if "label_type" in columns else rules.label_type
    if not isinstance(label_type, str) or label_type not in LABEL_TYPES:
        raise InvalidRow(
            f"{at}: label_type is {shown(label_type)}; it must be one of {LABEL_TYPES}.", "unknown label_type"
        )
    if label_type == "continuous" and rules.binary_only:
        raise InvalidRow(
            f"{at} has a continuous label, but negative_loss='unlearning' needs binary labels: a continuous label does "
            "not say whether to unlearn an answer. Use negative_loss='pointwise_dpo'.",
            "continuous label with negative_loss='unlearning'",
        )
    label = _number(columns["label"][i], at, "label")
    if label_type == "binary" and not 0 <= label <= 1:
        remedy = (
            'Rescale it, leave it empty, or add a column label_type with "continuous": the model was trained on binary '
            "labels."
            if rules.is_settled
            else _NOT_BINARY
        )
        raise InvalidRow(f"{at}: label is {label}{after}, outside [0, 1]. {remedy}", "label outside [0, 1]")
    if "sft_mask" in columns:
        sft_mask = columns["sft_mask"][i]
        if not isinstance(sft_mask, bool | np.bool_):
            raise InvalidRow(f"{at}: sft_mask is {shown(sft_mask)}; it must be True or False.", "sft_mask is no bool")
        if sft_mask and label_type == "binary" and label == 0:
            raise InvalidRow(
                f"{at} is marked sft_mask=True but has label 0.0{after}. A demonstration is imitated, so its label "
                "must be above 0: set sft_mask=False, or drop the row.",
                "sft_mask=True with label 0",
            )
    elif rules.need_mask and label_type == "continuous" and rules.sft_threshold is None:
        raise InvalidRow(
            f"{at} has a continuous label, and nothing says which of these rows are demonstrations. Add a boolean "
            "column sft_mask, or set sft_threshold: rows with labels at or above it are demonstrations.",
            "continuous label without sft_mask or sft_threshold",
        )
    else:
        sft_mask = rules.is_demonstration(label, label_type)
    values = {"label": label, "sft_mask": bool(sft_mask), "label_type": label_type}
    for name in ("log_z", "weight"):
        if name in columns:
            values[name] = _number(columns[name][i], at, name)
    if values.get("weight", 0) < 0:
        raise InvalidRow(f"{at}: weight is {values['weight']}; it must be 0 or above.", "weight below 0")
    return values


def _number(value: Any, at: str, name: str) -> float:
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        raise InvalidRow(f"{at}: {name} is a list of {len(value)}; it must be one number per row.", f"{name} is a list")
    if not isinstance(value, bool | int | float):
        found = "None" if value is None else f"{shown(value)}, a {type(value).__name__}"
        text = value.strip() if isinstance(value, str) else ""
        meant = f" Did you mean {text.replace(',', '.')}?" if _DECIMAL_COMMA.fullmatch(text) else ""
        form = " Write it as in 0.5 or 1234, with a decimal point and without separators."
        raise InvalidRow(
            f"{at}: {name} is {found}; it must be a number{' or a bool' if name == 'label' else ''}.{meant}"
            + (form if _OTHER_FORM.fullmatch(text) else ""),
            f"{name} is {'missing' if value is None else 'no number'}",
        )
    if not abs(value) <= _LARGEST:
        found = "an int of many digits" if isinstance(value, int) else float(value)
        raise InvalidRow(
            f"{at}: {name} is {found}; it must be finite, and within ±3.4e38, the range of float32.",
            f"{name} is not finite in float32",
        )
    return float(value)


def shown(value: Any) -> str:
    """Return the `repr` of a value, cut to 60 characters, for errors.

    Example:
        >>> shown("no")
        "'no'"
    """
    try:
        text = repr(value)
    except ValueError:  # an int of more than 4,300 digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:60]}…"


def is_messages(value: Any) -> bool:
    """Return whether a value is a list of messages: each has a role, and content (if any) that is text or parts.

    Example:
        >>> is_messages([{"role": "user", "content": "Hi"}]), is_messages(["Hi"])
        (True, False)
    """
    return isinstance(value, list) and all(
        isinstance(turn, dict)
        and isinstance(turn.get("role"), str)
        and isinstance(turn.get("content"), str | list | dict | None)
        for turn in value
    )


def check_texts(prompt: Any, completion: Any, at: str, *, takes_images: bool = False) -> None:
    """Raise InvalidRow unless prompt and completion are both text or both messages and the completion is not empty.

    Args:
        prompt: text, or a list of messages.
        completion: the same.
        at: name of the row, for errors.
        takes_images: whether the messages of the prompt may contain placeholders for images.
    """
    for name, value in (("prompt", prompt), ("completion", completion)):
        if isinstance(value, str):
            continue
        if not is_messages(value):
            raise InvalidRow(
                f"{at}: {name} is {shown(value)}; it must be text, or a list of messages such as "
                '{"role": "user", "content": "Hi"}.',
                f"{name} is {'missing' if value is None else 'neither text nor messages'}",
            )
        if not value:
            raise InvalidRow(
                f"{at}: {name} is an empty list; it must hold at least one message.", f"{name} has no message"
            )
        for turn in value:
            is_result = turn["role"] in ("tool", "function", "ipython")  # which can be any value
            if isinstance(turn.get("content"), dict) and not is_result:
                raise InvalidRow(
                    f"{at}: {name} has a message of role {turn['role']!r} whose content is a dict; it must be text, or "
                    'a list of parts such as {"type": "text", "text": "Hi"}.',
                    f"a dict as content in a {name}'s message",
                )
            for part in turn["content"] if isinstance(turn.get("content"), list) else ():
                kind = part.get("type") if isinstance(part, dict) else None
                is_text = isinstance(part, dict) and isinstance(part.get("text"), str)
                if kind == "image" and takes_images and name == "prompt":
                    continue
                if kind == "image":
                    needed = (
                        "images of a row belong to its prompt" if takes_images else "the column `images` is missing"
                    )
                    raise InvalidRow(
                        f"{at}: {name} has a message with 'image' in it; {needed}.", f"an image in a {name}'s message"
                    )
                if kind in ("image_url", "video", "audio", "input_audio"):
                    raise InvalidRow(
                        f"{at}: {name} has a message with {kind!r} in it, which is not supported.",
                        f"{kind} in a message",
                    )
                if not is_result and (not is_text or kind not in ("text", None)):
                    raise InvalidRow(
                        f"{at}: {name} has a message with the part {shown(part)}; it must be such as "
                        '{"type": "text", "text": "Hi"}.',
                        f"a part that is not text in a {name}'s message",
                    )
    if isinstance(prompt, str) != isinstance(completion, str):
        raise InvalidRow(
            f"{at}: prompt is {'text' if isinstance(prompt, str) else 'a list of messages'} and completion is not; "
            "both must be text, or both messages. (If chosen and rejected are whole conversations, remove the column "
            "prompt.)",
            "prompt and completion of different kinds",
        )
    if not isinstance(completion, str) and completion[0]["role"] in ASKING_ROLES:
        raise InvalidRow(
            f"{at}: completion begins with a turn of {completion[0]['role']!r}; it must begin with the assistant's. "
            "Move the turns before it into the prompt. (If chosen and rejected are whole conversations, remove the "
            "column prompt.)",
            "completion does not begin with the assistant",
        )
    if not isinstance(completion, str) and not any(turn["role"] == "assistant" for turn in completion):
        roles = ", ".join(repr(role) for role in dict.fromkeys(turn["role"] for turn in completion))
        raise InvalidRow(
            f"{at}: completion has no turn of the role 'assistant'; its roles are {roles}. Rename the role of the "
            "answer.",
            "completion without an assistant turn",
        )
    if is_empty(completion):
        raise InvalidRow(
            f"{at}: completion is empty, so there is nothing to learn. Drop the row.", "completion is empty"
        )


def is_empty(completion: Any) -> bool:
    """Return whether a completion (text or messages) has no content.

    Example:
        >>> is_empty("  "), is_empty([{"role": "assistant", "content": "Hello!"}])
        (True, False)
    """
    if isinstance(completion, str):
        return not completion.strip()
    said = (turn.get(key) for turn in completion for key in ("content", "tool_calls", "thinking", "reasoning_content"))
    return not any(
        value.strip() if isinstance(value, str) else isinstance(value, list | dict) and value for value in said
    )


def one_class(label: np.ndarray, continuous: np.ndarray) -> str | None:
    """Describe what all labels have in common if they do not distinguish any rows; return None if they do.

    Args:
        label: `(N,)` float.
        continuous: `(N,)` bool.

    Example:
        >>> one_class(np.array([1.0, 1.0]), np.array([False, False]))
        'every label is 1/2 or above'
    """
    if continuous.any():
        return f"every label is {label[0]:g}" if continuous.all() and (label == label[0]).all() else None
    if (label >= 0.5).all():
        return "every label is 1/2 or above"
    return "every label is below 1/2" if (label < 0.5).all() else None
