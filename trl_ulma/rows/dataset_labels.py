"""The labels of a whole dataset: fits and applies transforms, and writes the label report."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, IterableDataset

from trl_ulma.data.columns import READ, number
from trl_ulma.data.directions import words_of
from trl_ulma.data.origins import located, names_in_files, origin
from trl_ulma.data.proposals import as_option, as_value
from trl_ulma.data.unread import UNREAD
from trl_ulma.labels import (
    MOST_RATERS,
    InvalidRow,
    LabelRules,
    check_columns,
    check_texts,
    label_report,
    outliers_in_words,
    parse_transform,
    raters_in_words,
    raw_labels,
    refuse_invalid,
    render_report,
    repeats,
    start_of,
    transform_labels,
    unread,
    with_centered_raters,
)
from trl_ulma.labels.rater_offsets import alike_raters
from trl_ulma.losses import Terms, group_means, is_informative, route
from trl_ulma.metrics import EVALUATED, NEEDED_ROWS, is_chosen, is_of_rewards, is_sided
from trl_ulma.rows.images import as_images, image_column, image_key, undecoded_column
from trl_ulma.rows.notes import left_out_of
from trl_ulma.rows.rendering import OF_TEMPLATES

# The file that is written to the output folder
REPORT_FILE = "label_report.json"
# The command that shows the whole label report and lists all invalid rows, so that this process only logs their
# numbers. None if there is none, as in a script.
SHOWN_BY: ContextVar[str | None] = ContextVar("SHOWN_BY", default=None)
# How a command spells the settings in a text that is printed
SPELLING: ContextVar[Callable[[str], str]] = ContextVar("SPELLING", default=str)
_LABELS = ("label", "label_type")
# Rows that a warning names
_LISTED = 5
# Words in the name of a column of raters
RATER_WORDS = frozenset(
    (
        "rater", "annotator", "worker", "labeler", "labeller", "judge", "reviewer", "evaluator", "assessor", "grader",
        "user", "person", "who", "rated", "annotated", "labeled", "labelled", "judged", "reviewed", "evaluated",
        "assessed", "graded",
    )
)  # fmt: skip
# Rows that are looked at for the number of raters
_FIRST = 1000


@contextmanager
def shown_by(command: str | None, spelling: Callable[[str], str] = str) -> Iterator[None]:
    """Set `SHOWN_BY` and `SPELLING` meanwhile."""
    tokens = SHOWN_BY.set(command), SPELLING.set(spelling)
    try:
        yield
    finally:
        SHOWN_BY.reset(tokens[0])
        SPELLING.reset(tokens[1])


def with_transform(rules: LabelRules, label_transform: str | None, train_dataset: Any) -> LabelRules:
    """`rules` with the transform that the setting names, fitted on the raw rows of the training set.

    Every row counts once, including rows that are left out because of their length, but not rows that are invalid.

    Raises:
        ValueError: if the transform cannot be fitted, because the rows are a stream, are already prepared, or have no
            matching labels.
    """
    if label_transform is None:
        return rules
    transform = parse_transform(label_transform, rules.label_type)
    rules = replace(rules, transform=transform)
    if isinstance(train_dataset, IterableDataset):
        check_stream(rules, "train")
        return rules
    if not len(train_dataset):
        return rules  # preparation raises an error for empty datasets
    names = list(train_dataset[0])
    if "prompt_ids" in names:
        raise ValueError(
            f"The train dataset is already prepared, so it lacks the raw labels that "
            f"label_transform={label_transform!r} reads. Pass the raw rows."
        )
    if check_columns(names, "train", takes_images=True):
        check_pairs(rules, "train")
    if "raters" in transform.reads and "rater" not in names:
        raise ValueError(_lacks_raters(names, train_dataset, label_transform))
    if transform.is_fitted and "prompts" not in transform.reads:
        return rules
    columns = _read(train_dataset, rules, "train")
    # Preparation raises an error for rows with invalid labels, or leaves them out
    invalid = _invalid_texts(train_dataset, "train")
    keys = _prompt_keys(columns, len(train_dataset), rules)
    own, labels, beside = raw_labels(columns, range(len(train_dataset)), "train", rules, invalid, keys)
    if not len(own):
        refuse_invalid(located(sorted(invalid.items()), train_dataset), len(train_dataset), "train")
        raise ValueError(
            f"label_transform={label_transform!r} applies to rows with label_type={rules.label_type!r}, but no row of "
            "the train dataset has this type. Remove label_transform, or set label_type to the other type."
        )
    return replace(rules, transform=transform.fit(labels, **beside))


def _lacks_raters(names: list[str], rows: Dataset, label_transform: str) -> str:
    """The error that rows do not say who gave their labels, with the column that looks like it."""
    said = (
        f"label_transform={label_transform!r} reads a column `rater`, the name or number of the person who gave the "
        f"label, which the train dataset does not have; found {', '.join(sorted(names))}. "
    )
    like = [name for name in names if name not in READ and not RATER_WORDS.isdisjoint(words_of(name))]
    if not like:
        return f"{said}Add it, or name the column that has it, as in --columns rater=NAME."
    option = as_option({**names_in_files(rows), "rater": like[0]})
    return f"{said}If it is the column {like[0]}, rename that to rater (on the command line --columns {option})."


def check_stream(rules: LabelRules, name: str) -> None:
    """Raise ValueError if a transform needs all rows at once, which a stream does not provide."""
    transform = rules.transform
    if transform is None or (transform.is_fitted and "prompts" not in transform.reads):
        return
    remedy = "Load the dataset without streaming"
    if transform.reads <= {"trials"}:
        remedy += ", or give the numbers, as in standardize:2.5,1.2"
    raise ValueError(
        f"label_transform={str(transform)!r} needs all labels at once, but the {name} dataset is a stream. {remedy}."
    )


def check_pairs(rules: LabelRules, name: str) -> None:
    """Raise ValueError if there is a transform for pairs, because the labels of pairs are always 1 and 0."""
    if rules.transform is not None:
        raise ValueError(
            f"The {name} dataset is paired, so its labels are 1 and 0, and not on the scale that "
            f"label_transform={str(rules.transform)!r} reads. Remove label_transform, or convert the pairs to rows."
        )


def transformed_labels(
    dataset: Dataset,
    name: str,
    rules: LabelRules,
    invalid: dict[int, InvalidRow] | None = None,
    note: Callable[[str], None] | None = None,
) -> list[Any] | None:
    """The label of each raw row after the fitted transform. None if there is no transform.

    Errors of rows without a label to transform are added to `invalid`, and if the transform compares rows of a prompt
    or of a rater, also those of rows with an invalid prompt or completion. If it is None, rows without a label raise an
    error. `note` is called with a message about raters that the training set does not have.
    """
    if rules.transform is None:
        return None
    if invalid is not None and rules.transform.reads & {"prompts", "raters"}:
        invalid |= _invalid_texts(dataset, name)
    columns = _read(dataset, rules, name)
    keys = _prompt_keys(columns, len(dataset), rules)
    return transform_labels(columns, range(len(dataset)), name, rules, keys, invalid, note)


def own_labels(dataset: Dataset, name: str, rules: LabelRules, label: np.ndarray) -> np.ndarray:
    """`(N,)` labels on the scale that raw rows carry them on, as far as the transform has a way back to it.

    Args:
        dataset: raw rows.
        name: of the dataset, for errors.
        rules: how labels are read, with the fitted transform.
        label: `(N,)` labels after the transform, which are those of rows of the other type.

    Example:
        >>> from trl_ulma.labels import parse_transform
        >>> rules = LabelRules("continuous", transform=parse_transform("standardize:3,2", "continuous"))
        >>> rows = Dataset.from_dict({"prompt": ["Hi"], "completion": ["Hello!"], "label": [5]})
        >>> own_labels(rows, "test", rules, np.array([1.0]))
        array([5.])
    """
    found = np.array(label, dtype=np.float64)
    if rules.transform is not None:
        columns = _read(dataset, rules, name)
        # Rows that cannot be read are told of elsewhere
        keys = _prompt_keys(columns, len(dataset), rules)
        rows, labels, beside = raw_labels(columns, range(len(dataset)), name, rules, {}, keys)
        if len(rows):
            found[rows] = rules.transform.own_scale(labels, **beside)
    return found


def raters_of(dataset: Dataset, rules: LabelRules) -> list[Any] | None:
    """`(N,)` the raters of raw rows. None if the transform does not read them, or if there are none.

    Example:
        >>> from trl_ulma.labels import parse_transform
        >>> rows = Dataset.from_dict({"label": [5], "rater": ["Ann"]})
        >>> rules = LabelRules("continuous", transform=parse_transform("center_raters", "continuous"))
        >>> raters_of(rows, rules), raters_of(rows, LabelRules("continuous"))
        (['Ann'], None)
    """
    reads = rules.transform is not None and "raters" in rules.transform.reads
    return _read(dataset, rules, "").get("rater") if reads else None


def _prompt_keys(columns: Mapping[str, list], rows: int, rules: LabelRules) -> list[str] | None:
    """The keys of the rows' prompts, if the transform reads them."""
    reads = rules.transform is not None and "prompts" in rules.transform.reads
    return prompt_keys(columns, range(rows)) if reads else None


def _read(dataset: Dataset, rules: LabelRules, where: str) -> dict[str, list]:
    """The columns that a transform reads, as plain values. Images are replaced by their key, one row at a time."""
    wanted = {"label", "label_type", "trials"}
    reads = frozenset() if rules.transform is None else rules.transform.reads
    wanted |= {"prompt", "image", "images", *OF_TEMPLATES} if "prompts" in reads else set()
    wanted |= {"rater"} if "raters" in reads else set()
    images = image_column([name for name in dataset[0] if name in wanted], where)
    if images is not None:
        wanted = wanted - {images}
    if dataset.format["type"] == "custom":  # a transform creates the rows when they are read
        made: list[Any] = [{name: row[name] for name in row if name in wanted or name == images} for row in dataset]
        found = {name: [row.get(name) for row in made] for name in made[0] if name in wanted}
        raw = (row[images] for row in made) if images else ()
    else:
        names = [name for name in dataset.column_names if name in wanted]
        found = dict(dataset.select_columns(names).with_format(None)[:]) if names else {}
        raw = undecoded_column(dataset, images) if images else ()
        if "rater" in found and isinstance(kind := dataset.features["rater"], ClassLabel):
            # The same person can have another number in another dataset
            found["rater"] = [None if each is None or each < 0 else kind.names[each] for each in found["rater"]]
    if images is not None:
        found["image_key"] = [_image_key(row, value) for row, value in enumerate(raw)]
    return found


def _image_key(row: int, value: Any) -> int | str:
    try:
        return image_key(as_images(value))
    except InvalidRow:  # preparation finds it, too. Until then, its prompt is one of its own
        return f"row {row}"


def _invalid_texts(dataset: Dataset, name: str) -> dict[int, InvalidRow]:
    """The errors of rows with an invalid prompt or completion. Their labels must not count in a transform."""
    rows: Any = dataset
    if dataset.format["type"] != "custom":  # otherwise a transform creates the rows when they are read
        names = [column for column in ("prompt", "completion", UNREAD) if column in dataset.column_names]
        rows = dataset.select_columns(names).with_format(None)
    invalid: dict[int, InvalidRow] = {}
    try:
        for i, row in enumerate(rows):
            if row.get(UNREAD) is not None:
                invalid[i] = unread(row[UNREAD]).at(i, name)
                continue
            try:
                check_texts(row.get("prompt"), row.get("completion"), takes_images=True)
            except InvalidRow as error:
                invalid[i] = error.at(i, name).at_prompt(row.get("prompt"))
    except UnicodeDecodeError:  # preparation finds all of these rows
        return {}
    return invalid


def prompt_keys(columns: Mapping[str, list], rows: Any) -> list[str]:
    """What is the same for rows of one prompt: its text or messages, its images, and what its chat template reads."""
    prompts = columns["prompt"]
    keys = [_as_text(prompts[i]) for i in rows]
    if "image_key" in columns:
        keys = [f"{columns['image_key'][i]} {key}" for i, key in zip(rows, keys, strict=True)]
    for name in (name for name in OF_TEMPLATES if name in columns):
        values = [columns[name][i] for i in rows]
        keys = [f"{_as_text(value)} {key}" if value else key for value, key in zip(values, keys, strict=True)]
    return keys


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def is_continuous(rows: Dataset, label_type: str) -> np.ndarray:
    """`(N,)` bool: whether a prepared row's label is continuous, according to its own `label_type` or the setting.

    Example:
        >>> is_continuous(Dataset.from_dict({"label": [0.5, 1.0]}), "binary")
        array([False, False])
    """
    if "label_type" in rows.column_names:
        return np.asarray(rows["label_type"][:]) == "continuous"
    return np.full(len(rows), label_type == "continuous")


def label_center(rows: Dataset | IterableDataset, label_type: str) -> float:
    """The mean of the continuous labels of prepared training rows, by which figures tell chosen rows from rejected
    ones; 0 if there are none. For a stream, it is the mean over the first 64 rows.

    Example:
        >>> label_center(Dataset.from_dict({"label": [1.0, 4.0]}), "continuous")
        2.5
    """
    if isinstance(rows, IterableDataset):
        if label_type != "continuous" and "label_type" not in (rows.column_names or ()):
            return 0.0
        rows = Dataset.from_list([{name: row[name] for name in _LABELS if name in row} for row in rows.take(64)])
    labels = np.asarray(rows["label"][:], dtype=np.float64)[is_continuous(rows, label_type)]
    # Standardized labels have a mean of 1e-17, above or below a label of 0 by chance
    return round(float(labels.mean()), 9) if len(labels) else 0.0


def terms_of(rows: Dataset, label_type: str, cell: tuple[str, str]) -> Terms:
    """The terms that the loss of each prepared row has, see `trl_ulma.losses.route`."""
    label = torch.tensor(rows["label"][:], dtype=torch.float32)
    sft_mask = torch.tensor(rows["sft_mask"][:], dtype=torch.bool)
    continuous = torch.from_numpy(is_continuous(rows, label_type))
    positive, negative = cell
    return route(label, sft_mask, continuous, positive_loss=positive, negative_loss=negative)


def evaluated_figures(rows: Dataset, args: Any, center: float, *, has_rewards: bool) -> list[str]:
    """Names of the figures that an evaluation of prepared rows logs, in the order of `trl_ulma.metrics.EVALUATED`.

    `aux_loss` is among them, because whether a model is a mixture of experts is not known before it is loaded.

    Args:
        center: of the continuous labels of the training set.
    """
    label = torch.tensor(rows["label"][:], dtype=torch.float32)
    continuous = torch.from_numpy(is_continuous(rows, args.label_type))
    terms = terms_of(rows, args.label_type, args.cell)
    compared = terms.compared
    is_there = rewarded = _label_kinds(label, continuous, center)
    if args.log_z == "group":  # rewards are of rows that are compared within their prompt, and centered there
        weight = torch.tensor(rows["weight"][:]) if "weight" in rows.column_names else torch.ones(len(label))
        group = torch.where(compared & (weight > 0), torch.tensor(rows["group"][:]), -1)
        compared = is_informative(label, group, continuous)
        centered = torch.where(continuous, label - group_means(label, group, weight), label)
        rewarded = _label_kinds(centered[compared], continuous[compared], 0.0)
        has_rewards = has_rewards and bool(compared.any())
    is_there |= {
        "demonstrations that are imitated": bool(terms.imitated.any()),
        "rows that are unlearned": bool(terms.unlearned.any()),
        "rows that are compared with the reference": bool(compared.any()),
    }
    found = [name for name in EVALUATED if has_rewards or not is_of_rewards(name)]
    needed = {name: NEEDED_ROWS[name] for name in found if name in NEEDED_ROWS}
    return [n for n in found if n not in needed or (rewarded if is_of_rewards(n) else is_there)[needed[n]]]


def _label_kinds(label: torch.Tensor, continuous: torch.Tensor, center: float) -> dict[str, bool]:
    """Which kinds of rows there are, by the names of `NEEDED_ROWS`."""
    chosen = is_chosen(label, continuous, center)
    sided = is_sided(label, continuous)
    positive, ratings = label[~continuous & sided] > 0.5, label[continuous]
    return {
        "rows with continuous labels": bool(continuous.any()),
        "continuous labels that differ": len(ratings.unique()) > 1,
        "labels other than ½": bool(sided.any()),
        "binary labels above ½, and others below ½": bool(positive.any() and not positive.all()),
        "chosen rows": bool(chosen.any()),
        "rejected rows": not chosen.all(),
        "chosen rows and rejected ones": bool(chosen.any() and not chosen.all()),
    }


def are_demonstrations(rows: Dataset, args: Any) -> np.ndarray:
    """`(N,)` bool: the prepared rows that are imitated, or that are marked as demonstrations and not compared.

    Pointwise DPO has none, because it compares marked rows like all others.
    """
    terms = terms_of(rows, args.label_type, args.cell)
    marked = np.asarray(rows["sft_mask"][:], dtype=bool)
    return terms.imitated.numpy() | (marked & ~terms.compared.numpy())


def labels_before(rows: Dataset, args: Any, raw: Any) -> np.ndarray | None:
    """`(N,)` labels of prepared rows before the label transform, NaN for rows of the other type; None if there is no
    transform, or the rows are a stream.

    Args:
        raw: the rows that they were prepared from.
    """
    if args.label_transform is None or isinstance(raw, IterableDataset):
        return None
    if raw.format["type"] == "custom":  # rows are made as they are read
        read = [row["label"] for row in raw]
    else:
        read = raw.select_columns(["label"]).with_format(None)["label"][:]
    own = is_continuous(rows, args.label_type) == (args.label_type == "continuous")
    numbers = zip(own, rows["row"][:], strict=True)
    return np.array([float(read[row]) if is_own else np.nan for is_own, row in numbers])


def contradictions(trained: tuple[Dataset, Any], evaluated: tuple[Dataset, Any], args: Any, name: str) -> str | None:
    """A warning about rows to evaluate on that are trained on with another label, or None if there are none.

    Rows are the same if prompt, completion and type of label are the same. Labels are compared as they were before the
    label transform, which may depend on the other rows of a dataset.

    Args:
        trained, evaluated: (prepared rows, the rows that they were prepared from) of the two datasets.
        name: the name of the dataset to evaluate on.
    """
    answers = [_identities(rows)[1] for rows, _ in (trained, evaluated)]
    found = []
    for (rows, raw), own, other in zip((trained, evaluated), answers, reversed(answers), strict=True):
        label = _labels_to_show(rows, args, raw)
        kinds, numbers = is_continuous(rows, args.label_type), rows["row"][:]
        shared = np.flatnonzero(np.isin(own, other)).tolist()
        found.append([((int(own[i]), bool(kinds[i])), float(label[i]), numbers[i]) for i in shared])
    labels: dict[tuple[int, bool], set[float]] = {}
    for key, label, _ in found[0]:
        labels.setdefault(key, set()).add(label)
    others = [
        f"{origin(evaluated[1], number) or f'row {number}'} ({label:g}, trained on with {min(labels[key]):g})"
        for key, label, number in found[1]
        if key in labels and label not in labels[key]
    ]
    if not others:
        return None
    are = "1 row" if len(others) == 1 else f"{len(others):,} rows"
    have = "has" if len(others) == 1 else "have"
    listed = ", ".join(others[:_LISTED]) + (", …" if len(others) > _LISTED else "")
    return (
        f"{are} of the {name} dataset {have} the prompt and completion of a training row, but another label: {listed}. "
        "This is expected for votes by several people. Otherwise a label is wrong."
    )


def _labels_to_show(rows: Dataset, args: Any, raw: Any) -> np.ndarray:
    """`(N,)` labels of prepared rows, before the label transform if they have been transformed."""
    label = np.asarray(rows["label"][:])
    # Pairs have no labels, and prepared rows only those after the transform
    has_own = "label" in raw.column_names and "prompt_ids" not in raw.column_names
    before = labels_before(rows, args, raw) if has_own else None
    return label if before is None else np.where(np.isfinite(before), before, label)


def repeats_of(rows: Dataset, args: Any, raw: Any) -> dict[str, Any]:
    """The repeated and contradicting rows of prepared rows, see `trl_ulma.labels.repeats`.

    Args:
        raw: the rows that they were prepared from.
    """
    label, own, kinds = (
        np.asarray(rows["label"][:]),
        _labels_to_show(rows, args, raw),
        is_continuous(rows, args.label_type),
    )
    return repeats(label, own, kinds, _identities(rows)[1], _named(rows, raw))


def outliers_of(trained: tuple[Any, Any], evaluated: tuple[Dataset, Any], args: Any) -> list[str]:
    """Warnings about labels of rows to evaluate on that are far outside those of all rows.

    Args:
        trained, evaluated: as in `contradictions`; the rows to train on can be a stream, which is not read.
    """
    if (args.label_transform or "").startswith("votes"):  # numbers of votes have long tails
        return []
    parts = [evaluated, *([trained] if isinstance(trained[0], Dataset) else [])]
    label = np.concatenate([_labels_to_show(rows, args, raw) for rows, raw in parts])
    continuous = np.concatenate([is_continuous(rows, args.label_type) for rows, _ in parts])
    types = [True] if args.label_transform is None or args.label_type == "continuous" else [True, False]
    return [
        warning
        for kind in types
        for warning in outliers_in_words(
            label,
            np.flatnonzero(continuous == kind),
            _named(*evaluated),
            among=len(evaluated[0]),
            begins=_begins(*evaluated),
        )
    ]


def _named(rows: Dataset, raw: Any) -> Callable[[int], str]:
    """A function that returns the name of the prepared row at a position."""
    numbers = rows["row"]
    return lambda place: origin(raw, numbers[place]) or f"row {numbers[place]}"


def _begins(rows: Dataset, raw: Any) -> Callable[[int], str]:
    """A function that returns the start of the prompt of the prepared row at a position, "" if it is not known."""
    if not isinstance(raw, Dataset) or "prompt" not in raw.column_names:
        return "".format
    numbers = rows["row"]
    return lambda place: start_of(raw[numbers[place]]["prompt"])


def _of_raters(rows: Dataset, raw: Any) -> dict[str, list[Any]]:
    """Column that can name raters → its values, in the order of the prepared rows: an unread one of few texts, or of
    numbers if it is called so. A column `rater` is only read by the label transform "center_raters".
    """
    if not isinstance(raw, Dataset) or raw.format["type"] == "custom":
        return {}
    found = {}
    for name, kind in raw.features.items():
        is_read = name in READ and name != "rater"
        if is_read or getattr(kind, "dtype", None) not in ("string", "large_string", "int64"):
            continue
        values = raw.with_format(None).select_columns(name)
        first = set(values[:_FIRST][name]) - {None}
        are_numbers = all(isinstance(value, int) or number(value) is not None for value in first)
        if len(first) <= MOST_RATERS and not (are_numbers and RATER_WORDS.isdisjoint(words_of(name))):
            found[name] = values.select(rows["row"][:])[name][:]
    return found


def report_labels(
    rows: Dataset, args: Any, raw: np.ndarray | None = None, transform: Any = None, raw_rows: Any = None
) -> dict[str, Any]:
    """The label report of prepared rows, see `trl_ulma.labels.label_report`; with `left_out`, how many raw rows were
    left out for which reason, if any were, and with `raters`, the offset of each rater if the transform has them.

    Args:
        raw: `(N,)` labels before the label transform, see `labels_before`.
        transform: the fitted transform, or None.
        raw_rows: the rows that they were prepared from, whose files and lines warnings name.
    """
    continuous = is_continuous(rows, args.label_type)
    log_z = None if isinstance(args.log_z, str) else args.log_z
    if "log_z" in rows.column_names:
        log_z = np.asarray(rows["log_z"][:])
    prompt, answer, tokens = _identities(rows)
    report = label_report(
        np.asarray(rows["label"][:]),
        continuous,
        are_demonstrations(rows, args),
        prompt=prompt,
        answer=answer,
        tokens=tokens,
        compared=terms_of(rows, args.label_type, args.cell).compared.numpy(),
        weight=np.asarray(rows["weight"][:]) if "weight" in rows.column_names else None,
        log_z=log_z,
        beta=args.beta,
        length_normalize=args.length_normalize,
        class_weights=(args.desirable_weight, args.undesirable_weight),
        raw=raw,
        transform=None if transform is None else str(transform),
        groups_lengths=args.train_sampling_strategy == "group_by_length",
        named=_named(rows, raw_rows),
        begins=_begins(rows, raw_rows),
    )
    if transform is not None and "raters" in transform.reads:
        report["raters"] = transform.offsets
        report["warnings"] += filter(None, [alike_raters(transform.offsets)])
    elif columns := _of_raters(rows, raw_rows) if continuous.all() or not continuous.any() else {}:
        names = names_in_files(raw_rows)
        columns = {names.get(name, name): values for name, values in columns.items()}
        remedy = partial(_remedy_of_raters, args, names)
        report["warnings"] += raters_in_words(_labels_to_show(rows, args, raw_rows), columns, remedy)
    report["warnings"] += _threshold_warnings(rows, args, continuous, raw_rows)
    left_out = left_out_of(rows)
    return report | {"left_out": left_out} if left_out else report


def _remedy_of_raters(args: Any, names: Mapping[str, str], column: str) -> str:
    """The settings that remove the differences between the raters that a column names."""
    found = {"label_transform": with_centered_raters(args.label_transform)}
    try:
        parse_transform(found["label_transform"], args.label_type)
    except ValueError:  # its labels are no longer in [0, 1]
        found = {"label_type": "continuous", **found}
    if column not in ("rater", names.get("rater")):
        named = {**names, "rater": column}
        found = {"columns": as_value(named), **found}
    *others, last = (f'{name}="{value}"' for name, value in found.items())
    return f"{', '.join(others)} and {last}" if others else last


def _threshold_warnings(rows: Dataset, args: Any, continuous: np.ndarray, raw_rows: Any) -> list[str]:
    """A warning if `sft_threshold` does not tell any rows apart."""
    threshold = getattr(args, "sft_threshold", None)  # only ULMA has it
    if threshold is None or "sft_mask" in (getattr(raw_rows, "column_names", None) or ()):
        return []
    if not continuous.any():
        return [f"sft_threshold={threshold:g} is not used, because no row has a continuous label. Remove the setting."]
    label = np.asarray(rows["label"][:])[continuous]
    if 0 < (label >= threshold).mean() < 1:
        return []
    none = label.max() < threshold
    after = " after label_transform" if args.label_transform else ""
    return [
        f"{'No' if none else 'Every'} row with a continuous label reaches sft_threshold={threshold:g}, so "
        f"{'none' if none else 'each'} is a demonstration. The labels are between {label.min():g} and {label.max():g}"
        f"{after}. {'Lower' if none else 'Raise'} sft_threshold, unless this is intended."
    ]


def show_report(
    rows: Dataset | IterableDataset,
    args: Any,
    raw: np.ndarray | None = None,
    transform: Any = None,
    raw_rows: Any = None,
) -> dict[str, Any] | None:
    """Print the label report of the training set, write it into the output folder, and return it; arguments as in
    `report_labels`. If a command shows the whole report (`SHOWN_BY`), print a summary.

    Only the main process does this. A stream has no report, because its rows are not known.
    """
    if not args.label_report or not args.should_save or isinstance(rows, IterableDataset):
        return None
    report = report_labels(rows, args, raw, transform, raw_rows)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REPORT_FILE).write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    command = SHOWN_BY.get()
    whole = f"As JSON: {folder / REPORT_FILE}"
    if command is not None:
        whole = f"The whole report: {folder / REPORT_FILE}, or `{command}` with the same options."
    text = render_report(report, in_short=command is not None, spelling=SPELLING.get())
    print(f"\n{text}\n\n{whole}\n", flush=True)
    return report


def prompt_numbers(rows: Dataset) -> np.ndarray:
    """`(N,)` numbers that are the same for prepared rows of one prompt, counted in the order of the rows.

    Example:
        >>> from datasets import Features, List, Value
        >>> ids = Features({name: List(Value("int32")) for name in ("prompt_ids", "completion_ids")})
        >>> columns = {"prompt_ids": [[5, 6], [7], [5, 6]], "completion_ids": [[1], [2], [3]]}
        >>> prompt_numbers(Dataset.from_dict(columns, features=ids))
        array([0, 1, 0])
    """
    numbers: dict[int, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in _identities(rows)[0].tolist()], dtype=np.int64)


def _identities(rows: Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(hash of the prompt, hash of prompt and completion, number of scored tokens) of each row, `(N,)` each."""
    prompts, answers, tokens = [], [], []
    names = [n for n in ("prompt_ids", "completion_ids", "completion_mask") if n in rows.column_names]
    table: Any = rows.select_columns(names).with_format("arrow")
    for batch in table.iter(10_000):
        prompt, completion = (_lists(batch[name]) for name in ("prompt_ids", "completion_ids"))
        prompts += map(hash, prompt)
        answers += map(hash, zip(prompt, completion, strict=True))
        scored = batch["completion_mask"].to_pylist() if "completion_mask" in names else [None] * len(completion)
        tokens += [len(ids) // 4 if mask is None else sum(mask) for ids, mask in zip(completion, scored, strict=True)]
    if "image_key" in rows.column_names:  # the same question about two images is two prompts
        keys = rows["image_key"][:]
        prompts = [hash(both) for both in zip(prompts, keys, strict=True)]
        answers = [hash(both) for both in zip(answers, keys, strict=True)]
    return np.array(prompts), np.array(answers), np.array(tokens)


def _lists(column: Any) -> list[bytes]:
    """The bytes of each list of an Arrow column of int32 lists."""
    array = column.combine_chunks()
    values = array.values.to_numpy(zero_copy_only=True)
    ends = array.offsets.to_numpy()
    return [values[start:end].tobytes() for start, end in pairwise(ends)]
