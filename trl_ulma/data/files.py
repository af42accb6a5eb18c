"""Data sets by name: a file, a folder or the hub; and their split by prompt."""

import difflib
import gzip
import hashlib
import json
import os
import zlib
from collections import defaultdict
from os import PathLike
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDatasetDict, load_dataset, load_dataset_builder, load_from_disk
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from trl_ulma.data.pairs import pairs_to_rows

_BUILDERS = {
    ".jsonl": "json",
    ".jsonl.gz": "json",
    ".json": "json",
    ".json.gz": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}
# In a folder, what can say which its data files are
_NAME_FILES = ("README.md", ".huggingface.yaml")
ACCEPTED = ".jsonl[.gz], .json[.gz], .csv or .parquet"

# Bytes of JSON that are read at once where a smaller chunk does not tell the types
_WHOLE = 1 << 30

# What the builders of `datasets` raise on a file that they cannot read; StopIteration is an empty array's
_UNREADABLE = (DatasetGenerationError, EOFError, OSError, StopIteration, TypeError, ValueError, zlib.error)


def load_rows(
    name: str | PathLike, *, config: str | None = None, streaming: bool = False
) -> DatasetDict | IterableDatasetDict:
    """The splits of a data set: a file's are one, "train".

    Args:
        name: a `.jsonl[.gz]`, `.json[.gz]`, `.csv` or `.parquet` file; a folder of such files, or one written by
            `save_to_disk`; or a name on the hub. Whether JSON is an array or lines is seen from the content.
        config: the configuration of a data set that has several.
        streaming: read rows as they are asked for.

    Raises:
        FileNotFoundError: where nothing has that name.
        ValueError: where a file cannot be read, naming the line that is wrong, or holds no rows.

    Example:
        >>> load_rows("feedback.jsonl")["train"]  # doctest: +SKIP
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return _load_folder(path, config, streaming)
    if path.exists():
        return _load_file(path, config, streaming)
    if _looks_local(str(name)):
        raise FileNotFoundError(missing(path))
    try:
        return load_dataset(str(name), name=config, streaming=streaming)
    except (DatasetNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(f"{missing(path)} Nor could it be had from the hub: {error}") from error


def data_files(folder: Path) -> list[Path]:
    """The files in a folder, and in folders below, that are read as its data."""
    return [file for file in sorted(folder.rglob("*")) if _suffix(file) in _BUILDERS]


def missing(path: Path) -> str:
    """A sentence that says that `path` does not exist, with the names nearest to it that do."""
    name, folder = path.name, path.parent
    while not folder.is_dir():
        name, folder = folder.name, folder.parent
    there = sorted(entry.name for entry in folder.iterdir())
    near = [entry for entry in there if entry.startswith(name)][:3] or difflib.get_close_matches(name, there)
    hint = f" Did you mean {' or '.join(str(folder / entry) for entry in near)}?" if near else ""
    return f"There is no file or folder {path} (looked in {folder.resolve()}).{hint}"


def _looks_local(name: str) -> bool:
    is_path = name.startswith(("/", ".", "~")) or "\\" in name or name.count("/") > 1
    return is_path or name.endswith((*_BUILDERS, ".gz"))


def _suffix(path: Path) -> str:
    inner = Path(path.stem).suffix if path.suffix == ".gz" else ""
    return (inner + path.suffix).lower()


def _load_file(path: Path, config: str | None, streaming: bool) -> DatasetDict | IterableDatasetDict:
    builder = _BUILDERS.get(_suffix(path))
    if builder is None:
        raise ValueError(f"{path} ends in {_suffix(path) or 'nothing'!r}; a data file must be {ACCEPTED}.")
    if config is not None:
        raise ValueError(f"{path} is a file, which has no configurations. Leave the configuration {config!r} out.")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty; at least one row is needed.")
    try:
        try:
            splits = load_dataset(builder, data_files=str(path), streaming=streaming)
        except DatasetGenerationError as error:
            if builder != "json" or "Couldn't cast" not in str(error.__cause__):
                raise
            # The first 10 MB decide on the types, so that a column that is null there and a list further on is refused
            splits = load_dataset(builder, data_files=str(path), chunksize=_WHOLE)
        if streaming:
            next(iter(splits["train"]))  # else nothing has been read yet
    except _UNREADABLE as error:
        raise ValueError(_why_unreadable(path, error)) from error
    return splits


def _load_folder(path: Path, config: str | None, streaming: bool) -> DatasetDict | IterableDatasetDict:
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        if config is not None:
            raise ValueError(f"{path} was written by save_to_disk, and has no configurations. Leave {config!r} out.")
        _check_saved(path)
        saved = load_from_disk(str(path))
        splits = saved if isinstance(saved, DatasetDict) else DatasetDict({"train": saved})
        if not streaming:
            return splits
        return IterableDatasetDict({split: rows.to_iterable_dataset() for split, rows in splits.items()})
    files = data_files(path)
    if not files:
        raise FileNotFoundError(f"The folder {path} holds no data file; at least one {ACCEPTED} file is needed.")
    try:
        for about in (name for name in _NAME_FILES if (path / name).exists()):
            named = load_dataset_builder(str(path), name=config).config.data_files or {}
            for file in (str(file) for split in named.values() for file in split):
                _check_inside(path, file, about)
        return load_dataset(str(path), name=config, streaming=streaming)
    except _UNREADABLE as error:
        for file in files:
            fault = _json_fault(file)
            if fault is not None:
                raise ValueError(f"{file} {fault}") from error
        raise ValueError(f"The folder {path} cannot be read: {error.__cause__ or error}") from error


def _check_saved(path: Path) -> None:
    """Raise ValueError where what `save_to_disk` wrote about a data set names a file in another folder."""
    about = path / "dataset_dict.json"
    splits = json.loads(about.read_text())["splits"] if about.exists() else [""]
    for split in splits:
        _check_inside(path, path / split, about.name)
        state = path / split / "state.json"
        for file in json.loads(state.read_text())["_data_files"] if state.exists() else []:
            _check_inside(path, path / split / file["filename"], f"{state.relative_to(path)}")


def _check_inside(folder: Path, file: str | Path, named_by: str) -> None:
    if not Path(os.path.abspath(file)).is_relative_to(folder.absolute()):
        raise ValueError(
            f"{folder / named_by} names {file}, which is not in {folder}: a data set reads the files of its own folder "
            "only. Move the file there, or name it itself as the data set."
        )


def _why_unreadable(path: Path, error: BaseException) -> str:
    fault = _json_fault(path)
    if fault is None and (isinstance(error, StopIteration) or "corresponds to no data" in str(error)):
        fault = "holds no rows; at least one is needed."
    if fault is None:
        while error.__cause__ is not None:
            error = error.__cause__
        fault = f"cannot be read as {_suffix(path)[1:]}: {error}"
    return f"{path} {fault}"


def _json_fault(path: Path) -> str | None:
    """What is wrong with a JSON file, or None where nothing is (or it is none): read only after loading it failed."""
    suffix = _suffix(path)
    if _BUILDERS.get(suffix) != "json":
        return None
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if suffix.endswith(".gz") else content).decode("utf-8-sig")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        return f"is a broken gzip file ({error}). Write or copy it anew."
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        return f"is not UTF-8 text: byte 0x{error.object[error.start]:02x} in line {line}. Save it as UTF-8."
    if not text.strip():
        return "is empty; at least one row is needed."
    is_whole = text.lstrip().startswith("[") or text.split("\n")[0].strip() == "{"
    for number, line in enumerate([text] if is_whole else text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            at = error.lineno if is_whole else number
            return f"is broken JSON in line {at}, column {error.colno}: {error.msg}. Mend or remove that row."
        if not is_whole and not isinstance(row, dict):
            return f"holds {line.strip()[:40]!r} in line {number}, where an object with a row's columns is needed."
    return None


def split_by_prompt(dataset: Dataset, *, test_size: float, seed: int) -> DatasetDict:
    """Splits "train" and "test" with no prompt on both sides; about `test_size` of the rows are test rows.

    Which prompts are held out follows from `seed` and the prompts themselves: every process, and any order of the
    rows, gives the same. Pairs without a prompt are split by the prompts that they are cut into.

    Args:
        dataset: rows with `prompt` (text or messages), or pairs of `chosen` and `rejected`.
        test_size: a fraction between 0 and 1, or a whole number of rows.
        seed: another seed holds out other prompts.

    Raises:
        ValueError: without a prompt column, with fewer than two prompts, or where `test_size` leaves one side empty.

    Example:
        >>> rows = Dataset.from_dict({"prompt": ["a", "b", "a", "c"], "completion": ["1", "2", "3", "4"]})
        >>> splits = split_by_prompt(rows, test_size=0.25, seed=0)
        >>> len(splits["train"]), len(splits["test"])
        (3, 1)
    """
    whole = test_size >= 1
    if not (0 < test_size < 1 or (whole and test_size == int(test_size) and test_size < len(dataset))):
        raise ValueError(
            f"test_split_size is {test_size}; it must be a fraction between 0 and 1, or a whole number of rows below "
            f"the {len(dataset)} that there are."
        )
    groups = _groups_by_prompt(dataset)
    if len(groups) < 2:
        raise ValueError(
            f"A split by prompt needs two different prompts; the {len(dataset)} rows have {len(groups)}. Bring a test "
            "split along, or switch the evaluation off."
        )

    def rank(prompt: str) -> bytes:
        return hashlib.sha256(f"{seed}\n{prompt}".encode()).digest()

    target = max(1, round(test_size if whole else test_size * len(dataset)))
    test: list[int] = []
    for prompt in sorted(groups, key=rank):
        if len(test) + len(groups[prompt]) <= target:
            test += groups[prompt]
    if not test:
        test = groups[min(groups, key=lambda prompt: (len(groups[prompt]), rank(prompt)))]
    held_out = set(test)
    train = [row for row in range(len(dataset)) if row not in held_out]
    return DatasetDict({"train": dataset.select(train), "test": dataset.select(sorted(test))})


def _groups_by_prompt(dataset: Dataset) -> dict[str, list[int]]:
    """The row numbers of each set of rows that have a prompt in common, under the first of its prompts."""
    keys = [[_key(prompt) for prompt in prompts] for prompts in _prompts(dataset)]
    parent = {key: key for row in keys for key in row}

    def root(key: str) -> str:
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    # A pair's halves may have two prompts. Both belong on one side, and the smaller one names the set.
    for first, *others in keys:
        for other in others:
            low, high = sorted((root(first), root(other)))
            parent[high] = low
    groups = defaultdict(list)
    for number, row in enumerate(keys):
        groups[root(row[0])].append(number)
    return dict(groups)


def _prompts(dataset: Dataset) -> list[list[Any]]:
    names = dataset.column_names
    if "prompt" in names:
        return [[prompt] for prompt in dataset["prompt"]]
    if {"chosen", "rejected"} <= set(names):
        pairs = dataset.select_columns(["chosen", "rejected"])
        prompts = [prompt for batch in pairs.iter(1000) for prompt in pairs_to_rows(dict(batch))["prompt"]]
        return [prompts[first : first + 2] for first in range(0, len(prompts), 2)]
    raise ValueError(
        f"A split by prompt needs a column `prompt`, or `chosen` and `rejected`; the columns are {', '.join(names)}."
    )


def _key(prompt: Any) -> str:
    return json.dumps(prompt, sort_keys=True, ensure_ascii=False, default=str)
