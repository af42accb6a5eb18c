"""Reads a dataset on the Hub."""

import glob
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from datasets import DatasetDict, IterableDatasetDict, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetNotFoundError
from datasets.packaged_modules.csv.csv import Csv
from datasets.packaged_modules.json.json import Json
from huggingface_hub import snapshot_download

from trl_ulma.data import folders
from trl_ulma.data.columns import say
from trl_ulma.data.file_rows import KINDS, missing
from trl_ulma.data.folders import NAME_FILES, READ_BY_DATASETS, is_of_several_kinds, is_plain, load_folder, one_line
from trl_ulma.data.known_types import renamed_splits
from trl_ulma.data.names import Names
from trl_ulma.data.read_files import UNREADABLE, as_splits, read_files


def load_hub(
    name: str,
    *,
    config: str | None = None,
    streaming: bool = False,
    columns: str | Mapping[str, str] | None = None,
    label_map: str | Mapping[Any, float] | None = None,
    invalid_rows: str = "error",
    needs_label: bool = True,
    data_dir: str | None = None,
    data_files: Any = None,
) -> DatasetDict | IterableDatasetDict:
    """Load the splits of a dataset on the Hub.

    CSV, TSV and JSON files are downloaded to the cache of the Hub, also for a stream, and are read like a local folder
    with the same files. Offline, the files in this cache are read. All other datasets are read by
    `datasets.load_dataset`. If it can choose other types than `load_rows`, a warning is logged.

    Args:
        name: the name on the Hub, or the name of a builder of `datasets`.
        config: see `load_rows`. So are `streaming`, `columns`, `label_map`, `invalid_rows` and `needs_label`.
        data_dir: a folder of the repository, as in `datasets.load_dataset`.
        data_files: files of the repository, as in `datasets.load_dataset`.

    Raises:
        FileNotFoundError: if there is no such dataset.
        ValueError: if it cannot be read.
    """
    names = Names.of(columns, label_map, needs_label=needs_label)
    given = {"data_dir": data_dir, "data_files": data_files}
    which: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    try:
        builder: Any = load_dataset_builder(name, name=config, **which)
    except (DatasetNotFoundError, ConnectionError) as error:
        folder = None if which else _in_hub_cache(name)
        if folder is None:
            raise FileNotFoundError(
                f"{missing(Path(name))} It could not be loaded from the Hub either: {error}"
            ) from error
        say({f"the Hub cannot be reached, so the files in {folder} are read": 1}, name)
        return load_folder(folder, config, streaming, names, invalid_rows)
    except (*UNREADABLE, RuntimeError) as error:  # a RuntimeError if the repository has a loading script
        if is_of_several_kinds(error) and not which:
            folder = _whole(partial(snapshot_download, name, repo_type="dataset"))
            return load_folder(folder, config, streaming, names, invalid_rows)
        raise ValueError(f"The dataset {name} cannot be read: {one_line(error)}") from error
    is_ours = isinstance(builder, Json | Csv)
    places = {
        str(split): [_in_repository(str(file)) for file in files]
        for split, files in (builder.config.data_files or {}).items()
    }
    found = [place for each in places.values() for place in each if place is not None]
    if is_ours and is_plain(builder.config) and found and len(found) == sum(map(len, places.values())):
        if streaming:
            say({"the files are downloaded, and then streamed": 1}, name)
        folder = _downloaded(found, is_whole=not which)
        if not which:
            return load_folder(folder, config, streaming, names, invalid_rows)
        files = {split: [folder / place[2] for place in each if place is not None] for split, each in places.items()}
        return as_splits(
            {split: read_files(each, streaming, names, invalid_rows) for split, each in files.items()}, streaming
        )
    try:
        splits: Any = load_dataset(name, name=config, streaming=streaming, **which)
    except UNREADABLE as error:
        raise ValueError(f"The dataset {name} cannot be read: {one_line(error)}") from error
    if is_ours:
        say({READ_BY_DATASETS: 1}, name)
    return renamed_splits(splits, names, name, invalid_rows)


def _in_repository(url: str) -> tuple[str, str, str] | None:
    """(repository, revision, path) of a file on the Hub, or None.

    Example:
        >>> _in_repository("hf://datasets/org/name@0a1b/data/train.csv")
        ('org/name', '0a1b', 'data/train.csv')
    """
    found = re.fullmatch(r"hf://datasets/(.+?)@([^/]+)/(.+)", url)
    return None if found is None else (found[1], unquote(found[2]), found[3])


def _downloaded(places: Sequence[tuple[str, str, str]], *, is_whole: bool) -> Path:
    """A folder with these files of a Hub repository, and with the files that declare its data files.

    Args:
        places: see `_in_repository`.
        is_whole: whether the repository is read as it is. If no file declares its data files, it is read like a folder,
            so all of them are downloaded.
    """
    repository, revision, _ = places[0]
    download = partial(snapshot_download, repository, repo_type="dataset", revision=revision)
    folder = Path(download(allow_patterns=list(NAME_FILES)))
    if is_whole and not any((folder / about).exists() for about in NAME_FILES):
        return _whole(download)
    return Path(download(allow_patterns=[*NAME_FILES, *(glob.escape(path) for _, _, path in places)]))


def _whole(download: Callable[..., str]) -> Path:
    """A folder with all files of a Hub repository that the readers support."""
    return Path(download(allow_patterns=[*NAME_FILES, *(f"*{suffix}" for suffix in KINDS)]))


def _in_hub_cache(name: str) -> Path | None:
    """The folder of a repository in the cache of the Hub, or None."""
    try:
        folder = Path(snapshot_download(name, repo_type="dataset", local_files_only=True))
    except (OSError, ValueError):
        return None
    return folder if folders.data_files(folder) else None
