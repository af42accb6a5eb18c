"""Loads a mixture of datasets, the list `datasets` of a YAML file, as one dataset. Parts can be of different kinds."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    IterableDatasetDict,
    ReadInstruction,
    concatenate_datasets,
)

from trl_ulma.data.columns import READ, TEXTS, Truths, say_once
from trl_ulma.data.conversations import as_chat, is_transcript
from trl_ulma.data.directions import check_direction
from trl_ulma.data.files import check_splits, labels_of, load_files, load_rows
from trl_ulma.data.hub import load_hub
from trl_ulma.data.origins import Places, joined_origins, note_places, origin, places_of
from trl_ulma.data.pairs import pairs_to_rows
from trl_ulma.data.read_files import SOME_TABLES, TABLES, marked
from trl_ulma.data.tables import as_dataset
from trl_ulma.data.unread import UNREAD
from trl_ulma.labels import LabelRules

# Builders of `datasets`. TRL's mixtures use their names to declare the kind of files.
_BUILDERS = ("json", "csv", "parquet")
_OF_PAIRS = (
    "prompt",
    "chosen",
    "rejected",
    "sft_mask",
    "log_z",
    "weight",
    "eos",
    "tools",
    "chat_template_kwargs",
    UNREAD,
)

# `concatenate_datasets` and `DatasetDict` accept datasets and streams, but their annotations only allow one of them
Rows = Any


def load_mixture(
    parts: Sequence[Any],
    *,
    streaming: bool = False,
    rules: LabelRules | None = None,
    log_z: Any = None,
    chat: str = "auto",
) -> tuple[DatasetDict | IterableDatasetDict, list[str]]:
    """Load the parts, one after the other, as the split "train". Also returns warnings.

    If some parts lack a column, it is filled in: `weight` with 1, `eos` with True, `log_z` with 0 if the setting is 0,
    and `label_type` and `sft_mask` according to the settings. If there are pairs and rows of single answers, each pair
    becomes two rows. Columns that the trainers do not read are dropped. If some parts are text and others are messages,
    the text of CSV and TSV files becomes messages.

    Args:
        parts: the parts, each with `path`, the fields of TRL's `DatasetConfig` (`name`, `data_dir`, `data_files`,
            `split`, `columns`, `fraction`), and `label_map`. `columns` is a list of the columns to keep, or has the
            names of columns as in `load_rows`.
        streaming: whether to read rows only when they are needed.
        rules: how to read labels of rows without their own settings.
        log_z: the setting `log_z`. Unless it is 0, all parts must have the column `log_z`, or none.
        chat: "auto", "true" or "false", see `trl_ulma.rows.chat`.

    Raises:
        FileNotFoundError: if a part does not exist.
        ValueError: if a part cannot be read, or if it does not fit the others. The message names the part.

    Example:
        >>> load_mixture([DatasetConfig(path="thumbs.csv"), DatasetConfig(path="~/stars")])  # doctest: +SKIP
    """
    if not parts:
        raise ValueError("The mixture has no parts. Add at least one.")
    loaded: list[tuple[str, Rows]] = []
    said: list[str] = []
    for number, part in enumerate(parts, start=1):
        name = f"part {number} of the mixture ({part.path})"
        try:
            rows = _load(part, streaming)
            if isinstance(part.columns, list):
                there = rows.column_names or list(next(iter(rows), {}))
                absent = [column for column in part.columns if column not in there]
                if absent:
                    shown = ", ".join(name for name in there if name != UNREAD)
                    raise ValueError(f"it has no column {', '.join(absent)}; its columns are {shown}")
                all_names = dict.fromkeys([*there, *(() if rows.column_names else READ)])  # also of later rows
                rows = rows.remove_columns([name for name in all_names if name not in (*part.columns, UNREAD)])
            renamed = None if isinstance(part.columns, list) else part.columns
            notes = check_splits({"": rows}, str(part.path), columns=renamed)
            transform = None if rules is None else rules.transform
            notes += check_direction(str(part.path), renamed, getattr(part, "label_map", None), transform)
            said += [each for each in map(_in_entry, notes) if each not in said]
        except (OSError, ValueError) as error:
            kind = type(error if isinstance(error, FileNotFoundError) else ValueError())
            raise kind(f"{name}: {_in_entry(str(error))}") from error
        loaded.append((name, rows))
    loaded = _taken(parts, loaded, streaming, said.append)
    mixed = marked(
        _mixed(loaded, rules or LabelRules(), log_z, chat, said.append),
        [rows.info.builder_name in (TABLES, SOME_TABLES) for _, rows in loaded],
    )
    return (IterableDatasetDict if streaming else DatasetDict)({"train": mixed}), said


def _in_entry(message: str) -> str:
    """A message that proposes options, with their spelling in the entry of a part, where a mixture reads them."""
    return message.replace("--columns ", "columns: ").replace("--label_map ", "label_map: ")


def _load(part: Any, streaming: bool) -> Rows:
    names: dict[str, Any] = {"label_map": getattr(part, "label_map", None)}
    names["columns"] = None if isinstance(part.columns, list) else part.columns
    names["invalid_rows"] = "mark"
    folder = Path(part.path).expanduser()
    if part.data_files is None and part.data_dir is None:
        return _split(load_rows(part.path, config=part.name, streaming=streaming, **names), part.split)
    is_builder = part.path in _BUILDERS and not folder.exists()
    if part.data_files is None and (is_builder or folder.is_dir()):
        inner = Path(part.data_dir).expanduser() if is_builder else folder / part.data_dir
        return _split(load_rows(inner, streaming=streaming, **names), part.split)
    if is_builder or folder.is_dir():
        base = Path(part.data_dir or "").expanduser() if is_builder else folder / (part.data_dir or "")
        given: Any = part.data_files if isinstance(part.data_files, Mapping) else {"train": part.data_files}
        files = {split: _files(base, each) for split, each in given.items()}
        if all(found is not None for found in files.values()):
            splits = {split: load_files(found or [], streaming=streaming, **names) for split, found in files.items()}
            return _split(splits, part.split)
    which = {"data_dir": part.data_dir, "data_files": part.data_files}
    return _split(load_hub(part.path, config=part.name, streaming=streaming, **names, **which), part.split)


def _files(base: Path, given: str | list[str]) -> list[Path] | None:
    """The files that match names and patterns. None if they are not local."""
    found = []
    for name in [given] if isinstance(given, str) else given:
        if "://" in name:
            return None
        path = base / Path(name).expanduser()
        matches = sorted(path.parent.glob(path.name)) if set("*?[") & set(path.name) and not path.exists() else [path]
        if not matches:
            raise FileNotFoundError(f"no file matches {path}")
        found += matches
    return found


def _split(splits: Mapping[Any, Any], split: str) -> Rows:
    """A split by its name, or by an expression of `datasets`: `train[:10%]`, `train+test`."""
    if split in splits:
        return splits[split]
    there = ", ".join(map(str, splits))
    if not all(isinstance(rows, Dataset) for rows in splits.values()) or not set("[+") & set(split):
        raise ValueError(f"it has no split {split!r}; its splits are {there}")
    lengths = {str(name): len(rows) for name, rows in splits.items()}
    try:
        parts = ReadInstruction.from_spec(split).to_absolute(lengths)
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(f"it has no split {split!r}; its splits are {there}: {error}") from error
    chosen = [splits[part.splitname].select(range(part.from_, part.to)) for part in parts]
    if all(rows.features == chosen[0].features for rows in chosen):
        return concatenate_datasets(chosen)
    return _together([(dict, rows) for rows in chosen], split)


def _taken(
    parts: Sequence[Any], loaded: list[tuple[str, Rows]], streaming: bool, warn: Callable[[str], None]
) -> list[tuple[str, Rows]]:
    """The first rows of each part, according to TRL's `fraction`, in the largest mixture that repeats no row.

    A pair counts as the two rows that it becomes if there are rows of single answers.
    """
    # TRL before 1.9 does not have it
    fractions = [fraction for part in parts if (fraction := getattr(part, "fraction", None)) is not None]
    if not fractions:
        return loaded
    if len(fractions) < len(parts) or streaming or any(fraction <= 0 for fraction in fractions):
        raise ValueError(
            "fraction must be above 0, and either all parts of the mixture or none must have it. It does not support "
            "streaming."
        )
    weights = [fraction / sum(fractions) for fraction in fractions]
    paired = ["chosen" in rows.column_names for _, rows in loaded]
    halves = [2 if is_paired and not all(paired) else 1 for is_paired in paired]
    total = min(len(rows) * count / weight for (_, rows), count, weight in zip(loaded, halves, weights, strict=True))
    made = []
    for (name, rows), count, weight in zip(loaded, halves, weights, strict=True):
        taken = rows.select(range(round(weight * total / count)))
        if not len(taken):
            raise ValueError(
                f"{name}: its fraction is {weight:.3g} of a mixture of {total:,.0f} rows, which is none of its "
                f"{len(rows):,} rows. Raise its fraction, or remove the part."
            )
        labels = [str(label) for label in rows["label"]] if "label" in rows.column_names else []
        if len(taken) > 1 and len(set(labels[: len(taken)])) == 1 < len(set(labels)):
            warn(
                f"{name}: fraction takes its first {len(taken):,} of {len(rows):,} rows, which all have the label "
                f"{labels[0]}. The others do not. Shuffle the file."
            )
        made.append((name, taken))
    return made


def _mixed(
    loaded: list[tuple[str, Rows]], rules: LabelRules, log_z: Any, chat: str, warn: Callable[[str], None]
) -> Rows:
    first = {name: next(iter(rows), {}) for name, rows in loaded}
    if all({"prompt_ids", "completion_ids"} <= set(row) for row in first.values()) or len(loaded) == 1:
        return concatenate_datasets([rows for _, rows in loaded])
    truths = Truths()
    for name, rows in loaded:
        for row in labels_of(rows):  # the other rows of a stream are looked at when they are read
            truths.add(row, name)
    found = truths.found | truths.sources
    for what in found:
        warn(f"{what}.")
    prompts = {name: _first_prompt(rows) for name, rows in loaded}
    texts = [name for name, prompt in prompts.items() if isinstance(prompt, str)]
    made_chat: set[str] = set()
    if texts and any(isinstance(prompt, list) for prompt in prompts.values()):
        has_prompt = [name for name in texts if "prompt" in first[name] and not is_transcript(prompts[name])]
        made_chat = {name for name, rows in loaded if name in has_prompt and _becomes_chat(rows, chat)}
        stay = [name for name in texts if name not in made_chat]
        if stay:
            raise ValueError(
                f"The rows of {', '.join(stay)} are text, but those of the other parts are messages. Set chat=True "
                "(--chat true) to convert prompts and completions to messages, or convert all parts to the same form."
            )
        warn(
            f"The text of {', '.join(texts)} becomes messages, because the other parts are messages: each prompt a "
            "user message, and each completion an assistant message, without surrounding whitespace."
        )
    paired = {name: "chosen" in row for name, row in first.items()}
    if len(set(paired.values())) > 1:
        if rules.transform is not None and rules.label_type == "binary":
            raise ValueError(
                "label_transform needs labels, but a part of the mixture has pairs. Remove label_transform or the "
                "pairs."
            )
        loaded = [(name, _single(name, rows) if paired[name] else rows) for name, rows in loaded]
        first = {name: next(iter(rows), {}) for name, rows in loaded}
    elif all(paired.values()) and len({"prompt" in row for row in first.values()}) > 1:
        without = ", ".join(name for name, row in first.items() if "prompt" not in row)
        raise ValueError(
            f"The pairs of {without} have no prompt, but those of the other parts do. Convert all parts to the same "
            "form."
        )
    read = _OF_PAIRS if all(paired.values()) else [name for name in READ if name not in ("chosen", "rejected")]
    columns = [name for name in read if any(name in row for row in first.values())]
    reads_raters = rules.transform is not None and "raters" in rules.transform.reads
    if not reads_raters and {"image", "images"}.intersection(columns):  # whose parts must have columns of one type
        columns = [name for name in columns if name != "rater"]
    needed = [name for name in read if name != UNREAD and (name != "rater" or reads_raters)]
    rows_of = [
        (_Part(name, set(first[name]), needed, columns, rules, log_z, name in made_chat), rows) for name, rows in loaded
    ]
    if isinstance(loaded[0][1], IterableDataset):
        # `concatenate_datasets` would assume that all rows have the types of the first rows
        given = {"rows_of": tuple(rows_of), "known": frozenset(found)}
        stream = IterableDataset.from_generator(_chained_stream, gen_kwargs=given)
        note_places(stream, partial(_chained_places, [rows for _, rows in loaded]))
        return stream
    alike = {str(sorted(rows.features.items())) for _, rows in loaded}
    if not made_chat and (len(alike) == 1 or any(name in columns for name in ("image", "images"))):
        try:
            return concatenate_datasets(
                [rows.select_columns([c for c in columns if c in first[n]]) for n, rows in loaded]
            )
        except ValueError as error:
            raise ValueError(
                f"The parts of the mixture have columns of different types ({error}). Convert all parts to the same "
                "form."
            ) from error
    return _together(rows_of, [columns, str(rules), str(log_z)])


def _together(rows_of: Sequence[tuple[Any, Dataset]], key: Any) -> Dataset:
    """Rows of datasets with different types. Each row is converted by the function of its dataset."""
    named = [(getattr(part, "name", "the mixture"), rows) for part, rows in rows_of]
    key = ["mixture", [rows._fingerprint for _, rows in rows_of], key]
    made = as_dataset(partial(_chained, rows_of), partial(_place, named), key, lambda what: None)
    joined_origins(named).save(made)
    return made


def _chained(rows_of: Sequence[tuple[Any, Any]]) -> Iterator[dict[str, Any]]:
    for part, rows in rows_of:
        for row in rows.with_format(None):
            yield part(row)


def _chained_stream(rows_of: Sequence[tuple[Any, Any]], known: frozenset[str]) -> Iterator[dict[str, Any]]:
    """Like `_chained`. Thumbs among ratings are logged when they are met, except those of the first rows."""
    truths = Truths()
    for part, rows in rows_of:
        for number, row in enumerate(rows):
            truths.add(row, part.name)
            for what in truths.found.keys() - known:
                say_once(what, f"{part.name}, row {number}")
                known |= {what}
            if late := part.late(row):
                raise ValueError(
                    f"{part.name}: row {number} has the column{'s' * (len(late) > 1)} {', '.join(late)}, but the first "
                    "row does not. All rows of a stream must have the same columns. Write null for a value that is "
                    "missing."
                )
            yield part(row)
    for what in truths.sources.keys() - known:
        say_once(what, "the mixture")


def _chained_places(parts: Sequence[Rows]) -> Iterator[str | None]:
    for rows in parts:
        places = places_of(rows)
        yield from (None for _ in rows) if places is None else places()


def _place(loaded: list[tuple[str, Any]], row: int) -> str:
    for name, rows in loaded:
        if row < len(rows):
            return f"{name}, {origin(rows, row) or f'row {row}'}"
        row -= len(rows)
    raise IndexError(row)


def _first_prompt(rows: Rows) -> Any:
    """The first prompt (for pairs without prompts, the first chosen half) that is not missing or empty, or None."""
    values = (row.get("prompt", row.get("chosen")) for row in islice(rows, 64))
    return next((value for value in values if isinstance(value, str | list) and value), None)


def _becomes_chat(rows: Rows, chat: str) -> bool:
    """Whether text with prompts becomes messages, because other parts are messages."""
    return chat == "true" or (chat == "auto" and rows.info.builder_name == TABLES)


def _single(name: str, rows: Any) -> Any:
    """Pairs as rows of single answers, without halves that have no answer."""
    names = rows.column_names or list(next(iter(rows), {}))

    def halves(batch: dict[str, list], numbers: list[int]) -> dict[str, list]:
        made = pairs_to_rows(batch)
        made["label_type"] = ["binary"] * len(made["label"])
        made["pair"] = [numbers[pair] for pair in made["pair"]]
        kept = [i for i, why in enumerate(made["left_out"]) if why is None]
        # Columns that the first row of a stream lacks are not removed by `map`, so they must have the same length
        late = dict.fromkeys(set(batch).difference(names), [None] * len(kept))
        return late | {name: [values[i] for i in kept] for name, values in made.items() if name != "left_out"}

    made = rows.map(halves, batched=True, with_indices=True, remove_columns=names)
    if isinstance(made, Dataset):
        whole, pair = joined_origins([(name, rows)]), np.asarray(made["pair"][:], dtype=int)
        replace(whole, source=whole.source[pair], line=whole.line[pair]).save(made)
    single = made.remove_columns("pair")
    places = None if isinstance(rows, Dataset) else places_of(rows)
    if places is not None:
        note_places(single, partial(_places_of_halves, rows, places))
    return single


def _places_of_halves(pairs: Rows, places: Places) -> Iterator[str | None]:
    for pair, place in zip(pairs, places(), strict=False):
        halves = pairs_to_rows({name: [value] for name, value in pair.items()})
        yield from (place for why in halves["left_out"] if why is None)


class _Part:
    """Converts a row of a part to the columns of the mixture."""

    def __init__(
        self,
        name: str,
        own: set[str],
        read: Sequence[str],
        columns: Sequence[str],
        rules: LabelRules,
        log_z: Any,
        is_made_chat: bool,
    ):
        self.name, self.own, self.read, self.columns = name, own, read, columns
        self.rules, self.log_z, self.is_made_chat = rules, log_z, is_made_chat

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        if row.get(UNREAD) is not None:
            return dict.fromkeys(self.columns) | {UNREAD: row[UNREAD]}
        made = {column: row.get(column) if column in self.own else self._filled(column, row) for column in self.columns}
        for answer in ("completion", "chosen", "rejected") if self.is_made_chat else ():
            if answer in self.own:
                [prompt], [made[answer]] = as_chat([row.get("prompt")], [row.get(answer)])
                made["prompt"] = prompt
        return made

    def late(self, row: Mapping[str, Any]) -> list[str]:
        """The columns that the trainers read in this row, but not in the part, because its first row lacks them."""
        return [name for name in self.read if name not in self.own and row.get(name) is not None]

    def _filled(self, column: str, row: Mapping[str, Any]) -> Any:
        if column == "weight":
            return 1.0
        if column == "eos":
            return True
        label_type = row.get("label_type") or self.rules.label_type
        if column == "label_type":
            return label_type
        if column == "log_z":
            if self.log_z == 0:
                return 0.0
            raise ValueError(f"{self.name} has no column log_z, but another part has one. Add it, or leave log_z at 0.")
        if column in TEXTS:
            raise ValueError(
                f"{self.name} has no column {column}, but another part has one. Convert all parts to the same form."
            )
        if column != "sft_mask":
            return None
        if "chosen" in row:
            return True
        is_transformed = self.rules.transform is not None and label_type == self.rules.label_type
        if is_transformed or (label_type == "continuous" and self.rules.sft_threshold is None):
            remedy = "" if is_transformed else ", or set sft_threshold"
            raise ValueError(f"{self.name} has no column sft_mask, but another part has one. Add it{remedy}.")
        label = row.get("label")
        return isinstance(label, bool | int | float) and self.rules.is_demonstration(label, label_type)
