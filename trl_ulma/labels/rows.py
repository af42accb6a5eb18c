"""The schema of a pointwise row, and the rules for reading its label."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trl_ulma.labels.invalid_rows import NOT_BINARY, InvalidRow, refuse_invalid
from trl_ulma.labels.missing import is_missing
from trl_ulma.labels.rater_offsets import rater_name
from trl_ulma.labels.texts import (
    BESIDE_CONTENT,
    INSTEAD_OF_CONTENT,
    WERE_RATINGS,
    is_date,
    is_empty,
    is_messages,
    shown,
)
from trl_ulma.labels.transforms import LabelTransform, reaches

LABEL_TYPES = ("binary", "continuous")
OPTIONAL_COLUMNS = ("sft_mask", "label_type", "log_z", "weight")
# Roles of the turns that a prompt may end with
ASKING_ROLES = ("user", "system", "developer")

# Batches hold labels, weights and log Z in float32
_LARGEST = float(np.finfo(np.float32).max)
_WANTED = {"binary": "a number, true or false", "continuous": "a number"}

# Numbers with decimal commas, thousands separators or percent signs
_OTHER_FORM = re.compile(r"[+-]?(?!\d+(\.\d*)?$)\d[\d.,_' ]*\s?%?", re.ASCII)
# Numbers with a unit, and ratings such as 4/5. With three decimals, a number can be a thousand
_UNIT = r"(stars?|points?|pts?\.?|sterne?|punkte?|étoiles?|estrellas?|stell[ae]|puntos?|punti|[★⭐]\ufe0f?)"
_OF_UNITS = re.compile(rf"([+-]?\d+([.,]\d\d?)?)\s*{_UNIT}", re.IGNORECASE)
_OUT_OF = re.compile(rf"(\d+([.,]\d+)?)\s*(/|of|out of|von|sur|de|su)\s*(\d+([.,]\d+)?)\s*{_UNIT}?", re.IGNORECASE)
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
# A number with one decimal comma. The comma of 1,234 may separate thousands
DECIMAL_COMMA = re.compile(r"(?![+-]?[1-9]\d{0,2},\d{3}$)[+-]?\d+,\d+", re.ASCII)


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
        return self.sft_threshold is not None and bool(reaches(label, self.sft_threshold))


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
    prompts: Sequence[Any] | None = None,
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Return the labels that `rules.transform` applies to, before it. The arguments are those of `read_labels`, plus
    keys of the prompts.

    Rows that `invalid` already holds are left out.

    Returns:
        `(M,)` positions among the rows, `(M,)` labels, and what else the transform reads of these rows, as keywords for
        `LabelTransform.apply`.

    Raises:
        ValueError: naming the rows whose label is no number, or whose votes are none, unless `invalid` takes them.

    Example:
        >>> columns = {"label": [3, True, 1], "label_type": ["continuous", "binary", "continuous"]}
        >>> raw_labels(columns, [0, 1, 2], "train", LabelRules("continuous"))[:2]
        (array([0, 2]), array([3., 1.]))
    """
    reads = frozenset() if rules.transform is None else rules.transform.reads
    has_trials = "trials" in reads and "trials" in columns
    raters_of = columns.get("rater") if "raters" in reads else None
    types = columns.get("label_type")
    own, labels, trials, raters = [], [], [], []
    found: dict[int, InvalidRow] = {}
    for i, row in enumerate(rows):
        if (types is not None and types[i] != rules.label_type) or (invalid is not None and i in invalid):
            continue
        try:
            label = _number(columns["label"][i], "label", _WANTED[rules.label_type])
            cast = _number(columns["trials"][i], "trials") if has_trials else 0.0
            if has_trials and not 0 <= label <= cast:
                raise InvalidRow(
                    f"is {label:g} and trials {cast:g}; votes for an answer are between 0 and the votes cast.",
                    "votes outside [0, trials]",
                    "label",
                )
            rater = "" if raters_of is None else rater_name(raters_of[i])
        except InvalidRow as error:
            found[i] = error.at(row, where).at_prompt(_at(columns, "prompt", i))
            continue
        own.append(i)
        labels.append(label)
        trials.append(cast)
        raters.append(rater)
    _hand_on(found, invalid, len(rows), where)
    if "trials" in reads and not has_trials:
        raise ValueError(
            f"label_transform=votes reads a column `trials`, the number of votes cast, which the {where} dataset "
            "does not have. Add it; `label` is how many of them are for the answer."
        )
    beside = {
        "trials": np.array(trials),
        "prompts": None if prompts is None else [prompts[i] for i in own],
        "raters": raters,
    }
    return np.array(own, dtype=int), np.array(labels), {name: beside[name] for name in reads}


def transform_labels(
    columns: Mapping[str, Sequence[Any]],
    rows: Sequence[int],
    where: str,
    rules: LabelRules,
    prompts: Sequence[Any] | None = None,
    invalid: dict[int, InvalidRow] | None = None,
    note: Callable[[str], None] | None = None,
) -> list[Any]:
    """Return the label column after `rules.transform`. The arguments are those of `raw_labels`, plus `note`, which is
    called with a message about raters that the transform does not know.

    Example:
        >>> from trl_ulma.labels import parse_transform
        >>> rules = LabelRules("continuous", transform=parse_transform("lower_is_better", "continuous"))
        >>> transform_labels({"label": [4, 0]}, [0, 1], "train", rules)
        [-4.0, 0.0]
    """
    found = list(columns["label"])
    if rules.transform is not None:
        own, labels, beside = raw_labels(columns, rows, where, rules, invalid, prompts)
        if not len(own):
            return found
        told = rules.transform.unknown_raters(beside.get("raters"), where)
        if told is not None and note is not None:
            note(told)
        for i, label in zip(own, rules.transform.apply(labels, **beside).tolist(), strict=True):
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
                values = _read_label(columns, i, rules)
            except InvalidRow as error:
                found[i] = error.at(row, where).at_prompt(_at(columns, "prompt", i))
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


def _read_label(columns: Mapping[str, Sequence[Any]], i: int, rules: LabelRules) -> dict[str, Any]:
    """Return the checked values of one row, for `read_labels`."""
    after = "" if rules.transform is None else f" after label_transform={str(rules.transform)!r}"
    label_type = columns["label_type"][i] if "label_type" in columns else rules.label_type
    if not isinstance(label_type, str) or label_type not in LABEL_TYPES:
        raise InvalidRow(
            f"is {shown(label_type)}; it must be one of {LABEL_TYPES}.", "unknown label_type", "label_type"
        )
    if label_type == "continuous" and rules.binary_only:
        raise InvalidRow(
            "has a continuous label, but negative_loss='unlearning' needs binary labels: a continuous label does "
            "not say whether to unlearn an answer. Use negative_loss='pointwise_dpo'.",
            "continuous label with negative_loss='unlearning'",
        )
    label = _number(columns["label"][i], "label", _WANTED[label_type])
    if label_type == "binary" and not 0 <= label <= 1:
        remedy = (
            'Rescale it, leave it empty, or add a column label_type with "continuous": the model was trained on binary '
            "labels."
            if rules.is_settled
            else NOT_BINARY
        )
        raise InvalidRow(f"is {label}{after}, outside [0, 1]. {remedy}", "label outside [0, 1]", "label")
    if "sft_mask" in columns:
        sft_mask = columns["sft_mask"][i]
        if not isinstance(sft_mask, bool | np.bool_):
            raise InvalidRow(f"is {shown(sft_mask)}; it must be True or False.", "sft_mask is no bool", "sft_mask")
        if sft_mask and label_type == "binary" and label == 0:
            raise InvalidRow(
                f"is marked sft_mask=True but has label 0.0{after}. A demonstration is imitated, so its label "
                "must be above 0: set sft_mask=False, or drop the row.",
                "sft_mask=True with label 0",
            )
    elif rules.need_mask and label_type == "continuous" and rules.sft_threshold is None:
        raise InvalidRow(
            "has a continuous label, and nothing says which of these rows are demonstrations. Add a boolean "
            "column sft_mask, or set sft_threshold: rows with labels at or above it are demonstrations.",
            "continuous label without sft_mask or sft_threshold",
        )
    else:
        sft_mask = rules.is_demonstration(label, label_type)
    values = {"label": label, "sft_mask": bool(sft_mask), "label_type": label_type}
    for name in ("log_z", "weight"):
        if name in columns:
            values[name] = _number(columns[name][i], name)
    weight = values.get("weight", 0)
    if weight < 0:
        raise InvalidRow(f"is {weight}; it must be 0 or above.", "weight below 0", "weight")
    if weight > 0 and np.float32(weight) == 0:
        raise InvalidRow(
            f"is {weight}, which float32 rounds to 0. Write 0 if the row is not to count, or scale all weights up.",
            "weight that float32 rounds to 0",
            "weight",
        )
    return values


def _number(value: Any, name: str, wanted: str = "a number") -> float:
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        raise InvalidRow(f"is a list of {len(value)}; it must be one number per row.", f"{name} is a list", name)
    if not isinstance(value, bool | int | float):
        found = "None" if value is None else f"{shown(value)}, a {type(value).__name__}"
        if isinstance(value, str):
            found = f"the text {shown(value)}"
        raise InvalidRow(
            f"is {found}; it must be {wanted}." + (_hint(value.strip()) if isinstance(value, str) else ""),
            f"{name} is {_kind_of(value)}",
            name,
        )
    if not abs(value) <= _LARGEST:
        found = "an int of many digits" if isinstance(value, int) else float(value)
        raise InvalidRow(
            f"is {found}; it must be finite, and within ±3.4e38, the range of float32.",
            f"{name} is not finite in float32",
            name,
        )
    return float(value)


def _kind_of(value: Any) -> str:
    """Return what a value is that is no number, in a few words.

    Example:
        >>> _kind_of(None), _kind_of("n/a"), _kind_of("maybe")
        ('missing', 'a word for a missing value', 'no number')
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return "missing"
    return "a word for a missing value" if is_missing(value) else "no number"


def worded_number(text: str) -> tuple[str, str] | None:
    """Read a number with a unit, such as `4 stars`, or the word for a number. Return None for other texts.

    Returns:
        The number as text, with a decimal point, and its unit, which is "" for a word.

    Example:
        >>> worded_number("4,5 Stars"), worded_number("Five"), worded_number("good"), worded_number("1,234 stars")
        (('4.5', 'stars'), ('5', ''), None, None)
    """
    text = text.strip()
    if text.lower() in _WORDS:
        return str(_WORDS.index(text.lower())), ""
    found = _OF_UNITS.fullmatch(text)
    return (found[1].replace(",", "."), found[3].lower()) if found else None


def _hint(text: str) -> str:
    """Return what a text was probably meant as and how to write it, or "" if neither is known.

    Example:
        >>> _hint("4 stars"), _hint("Five"), _hint("good")
        (' Did you mean 4?', ' Did you mean 5?', '')
    """
    if is_date(text):
        return f" It is a date. {WERE_RATINGS}"
    named = worded_number(text)
    meant = named[0] if named else text.replace(",", ".") if DECIMAL_COMMA.fullmatch(text) else text
    hint = f" Did you mean {meant}?" if meant != text else ""
    if out_of := _OUT_OF.fullmatch(text):
        first = out_of[1].replace(",", ".")
        hint += f" Write {first} if all labels are out of {out_of[4]}, or write all labels as shares, such as 0.8."
    if _OTHER_FORM.fullmatch(text):
        hint += " Write it as in 0.5 or 1234, with a decimal point and without separators."
    return hint


def check_texts(prompt: Any, completion: Any, *, takes_images: bool = False) -> None:
    """Raise InvalidRow unless prompt and completion are both text or both messages and the completion is not empty.

    Args:
        prompt: text, or a list of messages.
        completion: the same.
        takes_images: whether the messages of the prompt may contain placeholders for images.
    """
    for name, value in (("prompt", prompt), ("completion", completion)):
        if isinstance(value, str):
            continue
        if not is_messages(value):
            raise InvalidRow(
                f"is {shown(value)}; it must be text, or a list of messages such as "
                '{"role": "user", "content": "Hi"}.',
                f"{name} is {'missing' if value is None else 'neither text nor messages'}",
                name,
            )
        if not value:
            raise InvalidRow("is an empty list; it must hold at least one message.", f"{name} has no message", name)
        for turn in value:
            is_result = turn["role"] in ("tool", "function", "ipython")  # which can be any value
            if isinstance(turn.get("content"), dict) and not is_result:
                raise InvalidRow(
                    f"has a message of role {turn['role']!r} whose content is a dict; it must be text, or "
                    'a list of parts such as {"type": "text", "text": "Hi"}.',
                    f"a dict as content in a {name}'s message",
                    name,
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
                        f"has a message with 'image' in it; {needed}.", f"an image in a {name}'s message", name
                    )
                if kind in ("image_url", "video", "audio", "input_audio"):
                    raise InvalidRow(
                        f"has a message with {kind!r} in it, which is not supported.",
                        f"{kind} in a message",
                        name,
                    )
                if not is_result and (not is_text or kind not in ("text", None)):
                    raise InvalidRow(
                        f"has a message with the part {shown(part)}; it must be such as "
                        '{"type": "text", "text": "Hi"}.',
                        f"a part that is not text in a {name}'s message",
                        name,
                    )
    kinds = ["text" if isinstance(value, str) else "messages" for value in (prompt, completion)]
    if kinds[0] != kinds[1]:
        raise InvalidRow(
            f"has a prompt of {kinds[0]}, but a completion of {kinds[1]}. Both must be text, or both messages. (If "
            "chosen and rejected are whole conversations, remove the column prompt.)",
            "prompt and completion of different kinds",
        )
    if not isinstance(completion, str) and completion[0]["role"] in ASKING_ROLES:
        raise InvalidRow(
            f"begins with a turn of {completion[0]['role']!r}; it must begin with the assistant's. Move the turns "
            "before it into the prompt. (If chosen and rejected are whole conversations, remove the column prompt.)",
            "completion does not begin with the assistant",
            "completion",
        )
    if not isinstance(completion, str) and not any(turn["role"] == "assistant" for turn in completion):
        roles = ", ".join(repr(role) for role in dict.fromkeys(turn["role"] for turn in completion))
        raise InvalidRow(
            f"has no turn of the role 'assistant'; its roles are {roles}. Rename the role of the answer.",
            "completion without an assistant turn",
            "completion",
        )
    if is_empty(completion):
        turns = () if isinstance(completion, str) else completion
        elsewhere = [key for key in (*BESIDE_CONTENT, *INSTEAD_OF_CONTENT) if any(turn.get(key) for turn in turns)]
        if elsewhere:
            raise InvalidRow(
                f"has no content, only {', '.join(elsewhere)}, which chat templates do not read. Write a text into "
                "content and a call into tool_calls.",
                f"completion has only {', '.join(elsewhere)}",
                "completion",
            )
        raise InvalidRow(
            "is empty, so there is nothing to learn. Fill it in, or drop the row.", "completion is empty", "completion"
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
