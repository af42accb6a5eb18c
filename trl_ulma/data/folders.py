"""Reads a folder of data files, or one that was written by `save_to_disk`."""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from datasets import DatasetDict, IterableDatasetDict, load_dataset, load_dataset_builder, load_from_disk
from datasets.data_files import SPLIT_KEYWORDS, DataFilesDict, get_data_patterns, sanitize_patterns
from datasets.packaged_modules.csv.csv import Csv
from datasets.packaged_modules.json.json import Json
from datasets.packaged_modules.parquet.parquet import Parquet
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCardData
from huggingface_hub.repocard import metadata_load

from trl_ulma.data.columns import READ, say
from trl_ulma.data.csv_rows import DELIMITERS
from trl_ulma.data.file_rows import ACCEPTED, KINDS, OTHER_FILES, check_downloaded, missing, suffix_of
from trl_ulma.data.known_types import renamed_splits
from trl_ulma.data.names import Names
from trl_ulma.data.read_files import UNREADABLE, as_splits, read_files

# Files in a folder that can declare its data files
NAME_FILES = ("README.md", ".huggingface.yaml")
READ_BY_DATASETS = (
    "the files are read by the library datasets, because they are on another server or the README sets how to read "
    "them, so the type of a column depends on its first rows"
)


def data_files(folder: Path) -> list[Path]:
    """The data files in a folder and its subfolders, without hidden ones, such as checkpoints of notebooks."""
    return [
        file
        for file in sorted(folder.rglob("*"))
        if suffix_of(file) in KINDS and file.is_file() and not _is_hidden(file, folder)
    ]


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith((".", "~")) or part == "__MACOSX" for part in file.relative_to(folder).parts)


def _look_like_data(folder: Path) -> list[Path]:
    """Files in a folder that no reader supports, but that hold data by their names, such as `rows.jsonl.zst`."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and suffix_of(file) not in KINDS]
    return [
        file
        for file in files
        if not _is_hidden(file, folder)
        and (suffix_of(file) in OTHER_FILES or set(map(str.lower, file.suffixes)) & set(KINDS))
    ]


def _unread_links(folder: Path) -> list[str]:
    """What to say about links that are not read: to data files that do not exist, and to folders of data files."""
    found = []
    for link in sorted(entry for entry in folder.rglob("*") if entry.is_symlink() and not _is_hidden(entry, folder)):
        if not link.exists() and suffix_of(link) in KINDS:
            found.append(missing(link).removesuffix("."))
        is_outside = not link.resolve().is_relative_to(folder.resolve())
        if is_outside and link.is_dir() and not folder.resolve().is_relative_to(link.resolve()) and data_files(link):
            found.append(f"{link} is a link to a folder, whose files are not read. Copy the folder itself")
    return found


def _named(files: Sequence[Path]) -> str:
    return f"{', '.join(file.name for file in files[:3])}{' and others' * (len(files) > 3)}"


# The name of one of several files of a dataset, such as train-00000-of-00002.parquet
_SHARD = re.compile(r"(.*)-(\d{3,})-of-(\d{3,})(\D.*)")


def _missing_shards(files: Iterable[Path]) -> list[str]:
    """What to say about files that are missing by the names of others, such as train-00000-of-00002.parquet."""
    found: dict[tuple[Path, str, int], set[int]] = {}
    for file in files:
        if (name := _SHARD.fullmatch(file.name)) is not None:
            key = (file.parent, f"{name[1]}-*-of-{name[3]}{name[4]}", int(name[3]))
            found.setdefault(key, set()).add(int(name[2]))
    return [
        f"{total - len(numbers):,} of {total:,} files {names} are missing. Download them, too"
        for (_, names, total), numbers in sorted(found.items())
        if len(numbers) < total
    ]


def load_folder(
    path: Path, config: str | None, streaming: bool, names: Names, invalid_rows: str
) -> DatasetDict | IterableDatasetDict:
    """The splits of a folder. For the arguments, see `trl_ulma.data.files.load_rows`.

    Raises:
        FileNotFoundError: if there is no data file.
        ValueError: if the folder cannot be read.
    """
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        if config is not None:
            raise ValueError(f"{path} was written by save_to_disk, so it has no configurations. Remove {config!r}.")
        _check_saved(path)
        saved: Any = load_from_disk(str(path)).with_format(None)  # a format can hide columns
        splits: Any = renamed_splits(
            saved if isinstance(saved, DatasetDict) else {"train": saved}, names, str(path), invalid_rows
        )
        if not streaming:
            return splits
        return IterableDatasetDict({split: rows.to_iterable_dataset() for split, rows in splits.items()})
    if not data_files(path):
        there = [file for file in sorted(path.rglob("*")) if file.is_file() and not file.name.startswith((".", "~"))]
        found = f" It contains {_named(there)}." if there else ""
        remedy = "".join(dict.fromkeys(OTHER_FILES.get(suffix_of(file), "") for file in there))
        remedy += "".join(f" {each}." for each in _unread_links(path))
        raise FileNotFoundError(
            f"The folder {path} contains no data file.{found} Add at least one {ACCEPTED} file.{remedy}"
        )
    _check_partitions(path, names)
    declared = _declared(path)
    try:
        builder: Any = load_dataset_builder(str(path), name=config)
    except UNREADABLE as error:
        if (declared or config is not None) and not is_of_several_kinds(error):
            raise ValueError(f"The folder {path} cannot be read: {one_line(error)}") from error
        named = _declared_files(path, config, declared)
    else:
        if declared:
            named = {str(split): list(map(str, files)) for split, files in (builder.config.data_files or {}).items()}
        else:  # `datasets` would drop the files of a split that are of another kind than most
            named = _by_name(path)
        _check_all_inside(path, named, _names_files(path) if declared else ".")
        if not isinstance(builder, Json | Csv | Parquet) or (declared and not is_plain(builder.config)):
            try:
                splits = load_dataset(str(path), name=config, streaming=streaming)
            except UNREADABLE as error:
                raise ValueError(f"The folder {path} cannot be read: {one_line(error)}") from error
            if isinstance(builder, Json | Csv):
                say({READ_BY_DATASETS: 1}, str(path))
            return renamed_splits(splits, names, str(path), invalid_rows)
    files = {split: [Path(f) for f in found if suffix_of(Path(f)) in KINDS] for split, found in named.items()}
    files = {split: found for split, found in files.items() if found}
    read = {file.resolve() for found in files.values() for file in found}
    others = [] if declared else [file for file in data_files(path) if file.resolve() not in read]
    if others:
        say({f"{_named(others)} is not in a split and is ignored": 1}, str(path))
    for lost in [*([] if declared else _missing_shards(read)), *_unread_links(path)]:
        say({lost: 1}, str(path))
    other_kinds = [] if declared else _look_like_data(path)
    if other_kinds:
        are = "1 file is" if len(other_kinds) == 1 else f"{len(other_kinds):,} files are"
        say({f"{are} ignored, because no reader supports the ending: {_named(other_kinds)}": 1}, str(path))
    return as_splits(
        {split: read_files(found, streaming, names, invalid_rows) for split, found in files.items()}, streaming
    )


# In the error of `datasets` for a folder with files of several kinds
_OF_SEVERAL_KINDS = "infer the same data file format"


def is_of_several_kinds(error: BaseException) -> bool:
    """Whether `datasets` raised this error because splits are files of different kinds, such as CSV and JSON."""
    return _OF_SEVERAL_KINDS in str(error)


def _names_files(path: Path) -> str:
    """The file that declares the data files of a folder."""
    return next(name for name in reversed(NAME_FILES) if (path / name).exists())


def _declared(path: Path) -> MetadataConfigs:
    """The configurations that the README of a folder declares, by name. {} if there are none."""
    about: dict[str, Any] = {}
    try:
        if (path / NAME_FILES[0]).is_file():
            about |= metadata_load(path / NAME_FILES[0]) or {}
        if (path / NAME_FILES[1]).is_file():
            about |= yaml.safe_load((path / NAME_FILES[1]).read_text(encoding="utf-8")) or {}
        return MetadataConfigs.from_dataset_card_data(DatasetCardData(**about))
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path / _names_files(path)} cannot be read: {one_line(error)}") from error


def _declared_files(path: Path, config: str | None, declared: MetadataConfigs) -> dict[str, list[str]]:
    """The files of each split of a folder with files of several kinds, which `datasets` cannot read."""
    if not declared:
        if config is not None:
            raise ValueError(f"The folder {path} has no configurations. Remove the configuration {config!r}.")
        return _by_name(path)
    name = config or declared.get_default_config_name()
    if name is None or name not in declared:
        fault = f"has no configuration {name!r}" if name else "has several configurations. Choose one"
        raise ValueError(f"The folder {path} {fault}; its configurations are {', '.join(declared)}.")
    about = declared[name]
    unread = sorted(set(about) - {"data_files", "data_dir", "default", "description", "version"})
    if unread:
        raise ValueError(
            f"{path / _names_files(path)} sets {', '.join(unread)} for files of several kinds. Such files can only be "
            "read as they are. Remove the setting, or convert the files to one kind."
        )
    base = path / about.get("data_dir", "")
    given = sanitize_patterns(about["data_files"]) if "data_files" in about else get_data_patterns(str(base))
    named = _found(base, given)
    _check_all_inside(path, named, _names_files(path))
    return named


# A word in a name that names a split, as `datasets` finds it, but in any case, with "=" before it, or as in "testset"
_SPLITS = {
    str(split): re.compile(rf"(?<![a-z])({'|'.join(words)})(set|data)?(?![a-z])")
    for split, words in SPLIT_KEYWORDS.items()
}


def _by_name(path: Path) -> dict[str, list[str]]:
    """The files of each split of a folder, by the names of files and subfolders.

    `datasets` finds most of them. It would read TEST.jsonl, testset.jsonl and split=test/rows.jsonl as training rows.
    """
    found = _found(path, get_data_patterns(str(path)))
    if not any(suffix_of(Path(file)) in KINDS for files in found.values() for file in files):
        found = {"train": [os.path.abspath(file) for file in data_files(path)]}  # such as test.py beside rows.jsonl
    for file in data_files(path):
        name, parts = os.path.abspath(file), file.relative_to(path).parts
        words = [[split for split, word in _SPLITS.items() if word.search(part.lower())] for part in parts]
        now = [split for split, files in found.items() if name in files]
        meant = next((each for each in words if len(each) == 1), [])
        if len(now) > 1 and not meant:
            raise ValueError(
                f"{file} names several splits ({', '.join(sorted(now))}), so each of them would have its rows. Rename "
                "it, or the folder."
            )
        if meant and (len(now) > 1 or meant[0] not in now):
            for split in now:
                found[split].remove(name)
            found.setdefault(meant[0], []).append(name)
            say({f"{'/'.join(parts)} is read as the split {meant[0]}, because of its name": 1}, str(path))
        elif now and words[-1] and not set(words[-1]) & set(now):
            say({f"{'/'.join(parts)} is read as the split {now[0]}, because of its folder": 1}, str(path))
    return {split: found[split] for split in sorted(found, key=[*_SPLITS, *found].index) if found[split]}


def _check_partitions(path: Path, names: Names) -> None:
    """Raise ValueError if a column that trainers read is only in the names of subfolders, such as `label=1`."""
    wanted = ({*READ} - {"rater"}) | {*names.columns.values()}  # few trainings read raters
    parts = {part for file in data_files(path) for part in file.relative_to(path).parts[:-1]}
    found = sorted(part for part in parts if part.partition("=")[0] in wanted and "=" in part)
    if found:
        raise ValueError(
            f"The folder {path} has the column {found[0].partition('=')[0]} in the names of its subfolders "
            f"({', '.join(found[:3])}), which are not read. Write the column into the rows, for example with "
            'pandas.read_parquet(FOLDER).to_json("rows.jsonl", orient="records", lines=True) for Parquet files. If the '
            "rows have the column, rename the subfolders."
        )


def _found(base: Path, patterns: Any) -> dict[str, list[str]]:
    """The files of each split that match patterns."""
    found = DataFilesDict.from_patterns(patterns, base_path=str(base))
    return {
        str(split): [str(file) for file in files if "__MACOSX" not in Path(file).parts]
        for split, files in found.items()
    }


def one_line(error: BaseException) -> str:
    """The message of an error of `datasets`, in one line."""
    return " ".join(str(error.__cause__ or error).split())


def is_plain(config: Any) -> bool:
    """Whether a folder's README only names its files, and does not change how they are read."""
    usual = type(config)()
    ours = {"name", "version", "data_dir", "data_files", "description", "sep", "delimiter"}
    return getattr(config, "sep", ",") in DELIMITERS and all(
        getattr(config, f.name) == getattr(usual, f.name) for f in fields(config) if f.name not in ours
    )


def _check_saved(path: Path) -> None:
    """Raise ValueError if the metadata that `save_to_disk` wrote names a file in another folder."""
    about = path / "dataset_dict.json"
    splits = json.loads(about.read_text())["splits"] if about.exists() else [""]
    for split in splits:
        _check_inside(path, path / split, about.name)
        state = path / split / "state.json"
        for file in json.loads(state.read_text())["_data_files"] if state.exists() else []:
            _check_inside(path, path / split / file["filename"], f"{state.relative_to(path)}")
            check_downloaded(path / split / file["filename"])


def _check_all_inside(folder: Path, named: Mapping[str, Sequence[str]], named_by: str) -> None:
    for file in (file for files in named.values() for file in files):
        _check_inside(folder, file, named_by)


def _check_inside(folder: Path, file: str | Path, named_by: str) -> None:
    if not Path(os.path.abspath(file)).is_relative_to(folder.absolute()):
        raise ValueError(
            f"{folder / named_by} names {file}, which is not in {folder}. A dataset can only read files of its own "
            "folder. Move the file there, or load the file itself as a dataset."
        )
