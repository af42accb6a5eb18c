"""What a point-wise row is, and the errors that say what is wrong with one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trl_ulma.labels.transforms import LabelTransform

LABEL_TYPES = ("binary", "continuous")
OPTIONAL_COLUMNS = ("sft_mask", "label_type", "log_z", "weight")
# Of turns that a prompt ends in
ASKING_ROLES = ("user", "system", "developer")

# Labels, weights and log Z are float32 in a batch
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class LabelRules:
    """How labels are read.

    Attributes:
        label_type: "binary" or "continuous", for rows that do not say it themselves.
        sft_threshold: continuous labels of this and above are demonstrations where rows do not say it themselves.
        need_mask: whether it must be known which rows with continuous labels are demonstrations.
        binary_only: whether continuous labels are refused, as unlearning does.
        transform: what is done first to the labels of rows whose type is `label_type`; others are taken as they are.
    """

    label_type: str = "binary"
    sft_threshold: float | None = None
    need_mask: bool = False
    binary_only: bool = False
    transform: LabelTransform | None = None

    def is_demonstration(self, label: float, label_type: str | None = None) -> bool:
        """Whether a row without an `sft_mask` is a demonstration.

        Example:
            >>> LabelRules().is_demonstration(1.0), LabelRules("continuous", 0.5).is_demonstration(0.7)
            (True, True)
        """
        if (label_type or self.label_type) == "binary":
            return label == 1
        return self.sft_threshold is not None and label >= self.sft_threshold


def check_columns(names: Sequence[str], where: str, *, takes_images: bool = False) -> bool:
    """Raise ValueError unless the columns are those of point-wise or paired rows; True for paired ones.

    Args:
        names: of the columns.
        where: the data set's name, for errors.
        takes_images: whether a column `image` or `images` is read.
    """
    found = f"found {', '.join(sorted(map(str, names))) or 'none'}"
    if not takes_images and ("image" in names or "images" in names):
        raise ValueError(
            f"The {where} dataset has images ({found}), which only a trainer with a vision-language model and its "
            "processor reads. Pass the processor as processing_class, or remove the column."
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
            "Needed are prompt, completion and label (one answer a row), or chosen and rejected (pairs)."
        )
    return paired


def raw_labels(
    columns: Mapping[str, Sequence[Any]], rows: Sequence[int], where: str, rules: LabelRules
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """The labels that `rules.transform` is for, as rows carry them; arguments as in `read_labels`.

    Returns:
        `(M,)` their positions among the rows, `(M,)` labels, and `(M,)` trials where the transform reads them.

    Raises:
        ValueError: naming the first row whose label is no number, or whose votes are none.

    Example:
        >>> columns = {"label": [3, True, 1], "label_type": ["continuous", "binary", "continuous"]}
        >>> raw_labels(columns, [0, 1, 2], "train", LabelRules("continuous"))[:2]
        (array([0, 2]), array([3., 1.]))
    """
    types = columns.get("label_type")
    own = [i for i in range(len(rows)) if types is None or types[i] == rules.label_type]
    labels = [_number(columns["label"][i], f"Row {rows[i]} of the {where} dataset: label") for i in own]
    trials = None
    if rules.transform is not None and rules.transform.needs_trials:
        if "trials" not in columns:
            raise ValueError(
                f"label_transform=votes reads a column `trials`, the number of votes cast, which the {where} dataset "
                "does not have. Add it; `label` is how many of them are for the answer."
            )
        trials = [_number(columns["trials"][i], f"Row {rows[i]} of the {where} dataset: trials") for i in own]
        for i, label, cast in zip(own, labels, trials, strict=True):
            if not 0 <= label <= cast:
                raise ValueError(
                    f"Row {rows[i]} of the {where} dataset: label is {label:g} and trials {cast:g}; votes for an "
                    "answer are between 0 and the votes cast."
                )
    return np.array(own, dtype=int), np.array(labels), None if trials is None else np.array(trials)


def transform_labels(
    columns: Mapping[str, Sequence[Any]],
    rows: Sequence[int],
    where: str,
    rules: LabelRules,
    prompts: Sequence[Any] | None = None,
) -> list[Any]:
    """The label column after `rules.transform`, for `read_labels`; arguments as there, and keys of the rows' prompts.

    Example:
        >>> from trl_ulma.labels import parse_transform
        >>> rules = LabelRules("continuous", transform=parse_transform("lower_is_better", "continuous"))
        >>> transform_labels({"label": [4, 0]}, [0, 1], "train", rules)
        [-4.0, 0.0]
    """
    found = list(columns["label"])
    if rules.transform is not None:
        own, labels, trials = raw_labels(columns, rows, where, rules)
        if not len(own):
            return found
        keys = None if prompts is None else [prompts[i] for i in own]
        for i, label in zip(own, rules.transform.apply(labels, trials, keys).tolist(), strict=True):
            found[i] = label
    return found


def read_labels(
    columns: Mapping[str, Sequence[Any]], rows: Sequence[int], where: str, rules: LabelRules
) -> dict[str, list]:
    """The checked values of `label` and the optional columns; `sft_mask` is filled in where it is absent.

    Args:
        columns: column name → values; `label` (after `transform_labels`), and where present `sft_mask`, `label_type`,
            `log_z`, `weight`.
        rows: the rows' numbers, for errors.
        where: the data set's name, for errors.
        rules: how labels are read.

    Raises:
        ValueError: naming the first row that is wrong, what was found and what is needed.

    Example:
        >>> read_labels({"label": [True, 0]}, [0, 1], "train", LabelRules())
        {'label': [1.0, 0.0], 'sft_mask': [True, False]}
    """
    present = [name for name in OPTIONAL_COLUMNS if name in columns]
    after = "" if rules.transform is None else f" after label_transform={str(rules.transform)!r}"
    read: dict[str, list] = {name: [] for name in ("label", "sft_mask", *present)}
    for i, row in enumerate(rows):
        at = f"Row {row} of the {where} dataset"
        label_type = columns["label_type"][i] if "label_type" in columns else rules.label_type
        if not isinstance(label_type, str) or label_type not in LABEL_TYPES:
            raise ValueError(f"{at}: label_type is {shown(label_type)}; it must be one of {LABEL_TYPES}.")
        if label_type == "continuous" and rules.binary_only:
            raise ValueError(
                f"{at} has a continuous label, and negative_loss='unlearning' needs binary ones, since a "
                "continuous label does not say that an answer is to be unlearned. Use negative_loss='pointwise_dpo'."
            )
        label = _number(columns["label"][i], f"{at}: label")
        if label_type == "binary" and not 0 <= label <= 1:
            raise ValueError(
                f'{at}: label is {label}{after}, outside [0, 1]. Rescale it, or set label_type="continuous".'
            )
        if "sft_mask" in columns:
            sft_mask = columns["sft_mask"][i]
            if not isinstance(sft_mask, bool | np.bool_):
                raise ValueError(f"{at}: sft_mask is {shown(sft_mask)}; it must be True or False.")
            if sft_mask and label_type == "binary" and label == 0:
                raise ValueError(
                    f"{at} is marked sft_mask=True but has label 0.0{after}. A demonstration is learned from as it is: "
                    "drop the mark or the row."
                )
        elif rules.need_mask and label_type == "continuous" and rules.sft_threshold is None:
            raise ValueError(
                f"{at} has a continuous label, and nothing says which of such rows are demonstrations. Add a boolean "
                "column sft_mask, or set sft_threshold: labels of that and above are demonstrations."
            )
        else:
            sft_mask = rules.is_demonstration(label, label_type)
        values = {"label": label, "sft_mask": bool(sft_mask), "label_type": label_type}
        if "log_z" in columns:
            values["log_z"] = _number(columns["log_z"][i], f"{at}: log_z")
        if "weight" in columns:
            values["weight"] = _number(columns["weight"][i], f"{at}: weight")
            if values["weight"] < 0:
                raise ValueError(f"{at}: weight is {values['weight']}; it must be 0 or above.")
        for name, into in read.items():
            into.append(values[name])
    return read


def _number(value: Any, what: str) -> float:
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        raise ValueError(f"{what} is a list of {len(value)}; it must be one number a row.")
    if not isinstance(value, bool | int | float):
        kind = "None" if value is None else f"{shown(value)}, a {type(value).__name__}"
        raise ValueError(f"{what} is {kind}; it must be a number{' or a bool' if what.endswith('label') else ''}.")
    if not abs(value) <= _LARGEST:
        found = "an int of many digits" if isinstance(value, int) else float(value)
        raise ValueError(f"{what} is {found}; it must be finite, and within ±3.4e38, the range of float32.")
    return float(value)


def shown(value: Any) -> str:
    """A value as errors show it: its `repr`, 60 characters of it at most.

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
    """Whether a value is a list of messages, each with a role and, where it has any, content that is text or its parts.

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
    """Raise ValueError unless prompt and completion are both text or both messages, and the completion is not empty.

    Args:
        prompt: text, or a list of messages.
        completion: the same.
        at: the row's name, for errors.
        takes_images: whether the prompt's messages may have places for images.
    """
    for name, value in (("prompt", prompt), ("completion", completion)):
        if isinstance(value, str):
            continue
        if not is_messages(value):
            raise ValueError(
                f"{at}: {name} is {shown(value)}; it must be text, or a list of messages such as "
                '{"role": "user", "content": "Hi"}.'
            )
        if not value:
            raise ValueError(f"{at}: {name} is an empty list; it must hold at least one message.")
        for turn in value:
            for part in turn["content"] if isinstance(turn.get("content"), list) else ():
                kind = part.get("type") if isinstance(part, dict) else None
                if kind == "image" and takes_images and name == "prompt":
                    continue
                if kind == "image":
                    needed = (
                        "images of a row belong to its prompt" if takes_images else "the column `images` is missing"
                    )
                    raise ValueError(f"{at}: {name} has a message with 'image' in it; {needed}.")
                if kind in ("image_url", "video", "audio", "input_audio"):
                    raise ValueError(f"{at}: {name} has a message with {kind!r} in it, which is not supported.")
    if isinstance(prompt, str) != isinstance(completion, str):
        raise ValueError(
            f"{at}: prompt is {'text' if isinstance(prompt, str) else 'a list of messages'} and completion is not; "
            "both must be text, or both messages. (The halves of a pair may be whole conversations: remove the column "
            "prompt then.)"
        )
    if not isinstance(completion, str) and completion[0]["role"] in ASKING_ROLES:
        raise ValueError(
            f"{at}: completion begins with a turn of {completion[0]['role']!r}; it must begin with the assistant's. "
            "Cut off what belongs to the prompt. (Where a pair's halves are whole conversations, remove the column "
            "prompt.)"
        )
    if is_empty(completion):
        raise ValueError(f"{at}: completion is empty, so there is nothing to learn from. Drop the row.")


def is_empty(completion: Any) -> bool:
    """Whether a completion, text or messages, says nothing.

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
    """What is the same in all rows, where labels tell nothing apart; None where they do.

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
