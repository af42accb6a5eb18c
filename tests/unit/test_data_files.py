"""Files, folders and the hub by name; the split by prompt."""

import gzip
import json
import os
import random
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from types import SimpleNamespace

import datasets
import pytest
from datasets import Dataset, DatasetDict, IterableDatasetDict, load_dataset, load_dataset_builder
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version

from trl_ulma.data.files import check_splits, load_rows, split_by_prompt
from trl_ulma.data.mixture import load_mixture
from trl_ulma.data.origins import origin
from trl_ulma.scripts.options import PartConfig

ROWS = [{"prompt": f"question {i}", "completion": f" answer {i}", "label": i % 2 == 0} for i in range(5)]
LINES = "\n".join(json.dumps(row) for row in ROWS) + "\n"
CSV = "prompt,completion,label\n" + "".join(f"question {i}, answer {i},{i % 2 == 0}\n" for i in range(5))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, text):
    path.parent.mkdir(exist_ok=True, parents=True)
    content = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def test_columns_about_labels_may_be_missing_if_no_label_is_needed(tmp_path):
    file = tmp_path / "rows.parquet"
    names = {"prompt": "q", "completion": "a", "label": "up", "trials": "cast", "log_z": "z"}
    rows = Dataset.from_dict({"q": ["Hi"], "a": ["Hello"], "z": [0.5]})
    rows.to_parquet(file)
    assert load_rows(file, columns=names, needs_label=False)["train"].column_names == ["prompt", "completion", "log_z"]
    with pytest.raises(ValueError, match="has no column up"):
        load_rows(file, columns=names)
    rows.remove_columns("z").to_parquet(file)
    with pytest.raises(ValueError, match="has no column z"):  # scores depend on it
        load_rows(file, columns=names, needs_label=False)
    rows.add_column("up", [3]).to_parquet(file)
    with pytest.raises(ValueError, match="has no column cast"):  # the label has no meaning without it
        load_rows(file, columns=names, needs_label=False)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.jsonl", LINES),
        ("rows.jsonl.gz", LINES),
        ("rows.JSONL", LINES),
        ("rows.json", json.dumps(ROWS)),
        ("rows.json.gz", json.dumps(ROWS, indent=1)),
        ("rows.csv", CSV),
    ],
)
def test_a_file_is_one_split(tmp_path, name, text, streaming):
    splits = load_rows(write(tmp_path / name, text), streaming=streaming)
    assert isinstance(splits, IterableDatasetDict if streaming else DatasetDict)
    assert list(splits) == ["train"]
    assert list(splits["train"]) == ROWS


def test_parquet(tmp_path):
    Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    assert list(load_rows(str(tmp_path / "rows.parquet"))["train"]) == ROWS


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("array.jsonl", json.dumps(ROWS)),
        pytest.param(
            "array.jsonl.gz",
            "\n " + json.dumps(ROWS, indent=2),
            marks=pytest.mark.skipif(
                Version(datasets.__version__) < Version("5.2"), reason="datasets below 5.2 says that it cannot be read"
            ),
        ),
        ("lines.json", LINES),
        ("lines.json.gz", "\ufeff" + LINES.replace("\n", "\n\n")),
    ],
)
def test_json_is_recognized_by_content(tmp_path, name, text):
    assert list(load_rows(write(tmp_path / name, text))["train"]) == ROWS


def test_a_folder_of_files(tmp_path):
    write(tmp_path / "train.jsonl.gz", LINES)
    write(tmp_path / "test.jsonl.gz", LINES)
    splits = load_rows(tmp_path)
    assert list(splits) == ["train", "test"]
    assert list(splits["test"]) == ROWS


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "name", ["TEST.jsonl", "Test.csv", "split=test/rows.jsonl", "a/testset.jsonl", "Test data/train.jsonl"]
)
def test_a_file_is_of_the_split_that_its_name_says(tmp_path, monkeypatch, name, streaming, caplog):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows/train.jsonl", LINES)
    write(tmp_path / "rows" / name, CSV if name.endswith("csv") else LINES)
    splits = load_rows("rows", streaming=streaming)
    assert {split: len(list(rows)) for split, rows in splits.items()} == {"train": 5, "test": 5}
    assert f"{name} is read as the split test, because of its name" in caplog.text


@pytest.mark.parametrize("names", [["latest.jsonl", "contest.jsonl"], ["training data/test.jsonl"]])
def test_other_names_are_read_as_datasets_reads_them(tmp_path, names, caplog):
    for name in names:
        write(tmp_path / "rows" / name, LINES)
    assert load_dataset(str(tmp_path / "rows")).num_rows == {"train": 5 * len(names)}
    write(tmp_path / "rows/test.py", "")
    assert {split: len(rows) for split, rows in load_rows(tmp_path / "rows").items()} == {"train": 5 * len(names)}
    assert ("test.jsonl is read as the split train, because of its folder" in caplog.text) == (len(names) == 1)


def test_a_file_that_names_two_splits_is_refused_and_not_read_twice(tmp_path):
    write(tmp_path / "rows/train_val.jsonl", LINES)
    with pytest.raises(ValueError, match=r"train_val\.jsonl names several splits \(train, validation\), .* Rename it"):
        load_rows(tmp_path / "rows")
    for name in ("train", "test"):
        write(tmp_path / f"halves/train-test-split/{name}.jsonl", LINES)
    assert load_rows(tmp_path / "halves").num_rows == {"train": 5, "test": 5}


@pytest.mark.parametrize("names", [("train.jsonl", "train.jsonl.gz"), ("train.csv", "train.jsonl"), "Parquet"])
def test_copies_of_a_file_are_named(tmp_path, monkeypatch, names, caplog):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    if names == "Parquet":
        names = ("train.parquet", "train_2.parquet")
        for name in names:
            write(tmp_path / "rows" / name, "")
            Dataset.from_list(ROWS).to_parquet(tmp_path / "rows" / name)
    else:
        for name in names:
            write(tmp_path / "rows" / name, CSV if name.endswith("csv") else LINES)
    write(tmp_path / "rows/test.jsonl", LINES)  # another split
    load_rows("rows")
    assert caplog.text.count("counts twice. Remove one of the files") == 1
    assert f"{names[1]}: the rows are those of" in caplog.text


def test_other_files_with_as_many_rows_are_no_copies(tmp_path, caplog):
    write(tmp_path / "train_1.jsonl", LINES)
    write(tmp_path / "train_2.jsonl", LINES.replace("4", "5"))
    assert len(load_rows(tmp_path)["train"]) == 10
    assert "counts twice" not in caplog.text


def test_a_split_with_other_columns_is_named(tmp_path):
    write(tmp_path / "train.jsonl", LINES)
    write(tmp_path / "test.jsonl", LINES.replace("prompt", "question"))
    with pytest.raises(ValueError, match=r"^The split 'test' differs from 'train': .* lacks the column prompt"):
        check_splits(load_rows(tmp_path), str(tmp_path))


def test_a_column_in_the_names_of_subfolders_is_refused(tmp_path):
    for label in (0, 1):
        write(tmp_path / f"label={label}/rows.jsonl", LINES)
    with pytest.raises(ValueError, match=r"has the column label in the names .* \(label=0, label=1\), .* not read"):
        load_rows(tmp_path)
    with pytest.raises(ValueError, match="has the column label in the names"):
        load_rows(tmp_path, columns={"weight": "label"})
    (tmp_path / "other").mkdir()
    write(tmp_path / "other/language=en/rows.jsonl", LINES)
    assert len(load_rows(tmp_path / "other")["train"]) == 5


def test_files_in_a_folder_that_are_ignored_are_counted(tmp_path, caplog):
    write(tmp_path / "rows" / "train.jsonl", LINES)
    for name in ("README.txt", ".cache/train.jsonl.metadata", "~$rows.xlsx"):
        write(tmp_path / "rows" / name, "nothing")
    load_rows(tmp_path / "rows")
    assert not caplog.text
    for name in ("more.xlsx", "more.jsonl.zst", "old.csv.bak"):
        write(tmp_path / "rows" / name, "nothing")
    load_rows(tmp_path / "rows")
    assert "3 files are ignored, because no reader supports the ending: more.jsonl.zst, more.xlsx, old" in caplog.text


def test_missing_files_of_a_numbered_dataset_are_counted(tmp_path, caplog):
    for name in ("train-00000-of-00003", "train-00002-of-00003", "test-00000-of-00001", "train-3-of-4"):
        write(tmp_path / "rows" / f"{name}.jsonl", LINES.replace("answer", name))
    load_rows(tmp_path / "rows")
    [said] = caplog.messages
    assert said.endswith("rows: 1 of 3 files train-*-of-00003.jsonl are missing. Download them, too.")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_saved_to_disk(tmp_path, streaming):
    rows = Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "one")
    DatasetDict(train=rows, test=rows.select([0])).save_to_disk(tmp_path / "two")
    one, two = (load_rows(tmp_path / name, streaming=streaming) for name in ("one", "two"))
    assert isinstance(one, IterableDatasetDict if streaming else DatasetDict)
    assert list(one) == ["train"]
    assert list(one["train"]) == ROWS
    assert list(two) == ["train", "test"]
    assert list(two["test"]) == ROWS[:1]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_saved_to_disk_with_a_format_has_all_columns(tmp_path, streaming):
    Dataset.from_list(ROWS).with_format("numpy", columns=["label"]).save_to_disk(tmp_path / "saved")
    assert list(load_rows(tmp_path / "saved", streaming=streaming)["train"]) == ROWS


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "rows.jsonl", LINES)
    assert list(load_rows("~/rows.jsonl")["train"]) == ROWS


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", b"", r"empty\.jsonl is empty\. It must contain at least one row"),
        ("blank.jsonl", b"\n \n", r"blank\.jsonl is empty\. It must contain"),
        ("empty.csv", b"", r"empty\.csv is empty\. It must contain"),
        (
            "header.csv",
            b"prompt,completion,label\n",
            r"header\.csv contains no rows\. It must contain at least one row",
        ),
        ("none.json", b"[]", r"none\.json contains no rows\. It must contain at least one row"),
        ("rows.txt", b"hello", r"rows\.txt ends in '\.txt'; a data file must be \.jsonl\[\.gz\], .* or \.parquet"),
        ("rows", b"hello", r"rows ends in 'nothing'; a data file must be"),
        ("rows.txt.gz", b"hello", r"ends in '\.txt\.gz'; a data file must be"),
        ("plain.jsonl.gz", b"hello", r"plain\.jsonl\.gz is a broken gzip file \(.*\)\. Write or copy it again"),
        ("cut.json.gz", gzip.compress(LINES.encode(), mtime=0)[:-20], r"cut\.json\.gz is a broken gzip file"),
        (
            "cut.jsonl",
            LINES[:-9].encode(),
            r"cut\.jsonl is invalid JSON in line 5, column \d+: .* Correct or remove this row",
        ),
        ("bad.jsonl", b'{"prompt": "a"}\n\n{oops}\n', r"bad\.jsonl is invalid JSON in line 3, column 2: "),
        ("bad.json", b'[{"prompt": "a"},\n{"prompt" "b"}]', r"bad\.json is invalid JSON in line 2, column 11: "),
        ("object.json", b'{\n"prompt": "a"\n"label": 1}', r"object\.json is invalid JSON in line 3, column 1: "),
        ("numbers.jsonl", b"1\n2\n", r"numbers\.jsonl has '1' in line 1; each row must be an object"),
        ("latin.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n', r"latin\.jsonl is not UTF-8 text: byte 0xe9 in line 2\. Save"),
        ("bad.parquet", b"PAR1", r"bad\.parquet cannot be read as parquet: "),
        (
            "ragged.csv",
            b"prompt,label\na,1\nb,2,3\n",
            r"ragged\.csv has 3 fields in line 3, but 2 columns \(prompt, label\)",
        ),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path, name, content, message, streaming):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_rows(tmp_path / name, streaming=streaming)


def test_a_corrupt_gzip_file(tmp_path):
    content = bytearray(gzip.compress(LINES.encode() * 500, mtime=0))
    content[30:60] = bytes(30)
    (tmp_path / "rows.jsonl.gz").write_bytes(content)
    with pytest.raises(ValueError, match=r"rows\.jsonl\.gz is a broken gzip file"):
        load_rows(tmp_path / "rows.jsonl.gz")


def test_a_broken_file_in_a_folder(tmp_path):
    write(tmp_path / "train.jsonl", LINES)
    write(tmp_path / "test.jsonl", '{"prompt": }\n')
    with pytest.raises(ValueError, match=r"test\.jsonl is invalid JSON in line 1, column 12"):
        load_rows(tmp_path)


def test_a_folder_without_data(tmp_path):
    write(tmp_path / "notes.txt", "hello")
    with pytest.raises(FileNotFoundError, match=r"no data file\. It contains notes\.txt\. Add at least one \.jsonl"):
        load_rows(tmp_path)
    write(tmp_path / "rows.xlsx", "cells")
    with pytest.raises(FileNotFoundError, match=r"contains notes\.txt, rows\.xlsx\. .* Save the sheet as CSV"):
        load_rows(tmp_path)


def test_other_faults_in_a_folder_are_told_as_they_are(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="Parquet"):
        load_rows(tmp_path)


@pytest.mark.parametrize("name", ["row.jsonl", "./row", "nowhere/row.csv"])
def test_a_file_that_does_not_exist(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl", LINES)
    (tmp_path / "nowhere2").mkdir()
    near = "nowhere2" if name.startswith("nowhere") else r"rows\.jsonl"
    with pytest.raises(FileNotFoundError, match=rf"There is no file or folder .*row.* Did you mean .*{near}\?"):
        load_rows(name)


def test_a_name_that_is_neither_here_nor_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "thumbs.jsonl", LINES)

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'thumbs' on the Hub")

    monkeypatch.setattr("trl_ulma.data.hub.load_dataset_builder", unreachable)
    with pytest.raises(
        FileNotFoundError, match=r"no file or folder thumbs .*thumbs\.jsonl.*from the Hub either: Couldn't"
    ):
        load_rows("thumbs")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder that stands for the repository org/name, the folder that it is downloaded to, and what is downloaded."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    remote, local, patterns = tmp_path / "remote", tmp_path / "local", []
    remote.mkdir()
    load_builder = load_dataset_builder

    def builder(path, **kwargs):
        if path != "org/name":
            return load_builder(path, **kwargs)
        found = load_builder(str(remote), **kwargs)
        for files in (found.config.data_files or {}).values():
            files[:] = [f"hf://datasets/org/name@0a1b{file.removeprefix(str(remote))}" for file in files]
        return found

    def download(name, *, repo_type, allow_patterns, revision="0a1b"):
        assert revision == "0a1b"
        assert (name, repo_type) == ("org/name", "dataset")
        patterns.append(allow_patterns)
        local.mkdir(exist_ok=True)
        for file in remote.rglob("*"):
            path = file.relative_to(remote)
            if file.is_file() and any(fnmatch(str(path), pattern) for pattern in allow_patterns):
                (local / path).parent.mkdir(exist_ok=True, parents=True)
                shutil.copy(file, local / path)
        return str(local)

    monkeypatch.setattr("trl_ulma.data.hub.load_dataset_builder", builder)
    monkeypatch.setattr("trl_ulma.data.hub.snapshot_download", download)
    return SimpleNamespace(remote=remote, local=local, patterns=patterns)


CARD = """---
configs:
- config_name: thumbs
  data_files:
  - {split: train, path: "thumbs/[t]rain*.csv"}
  - {split: test, path: thumbs/test.csv}
- config_name: stars
  data_files: stars.json
---
"""


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_on_the_hub_is_read_like_a_folder(hub, streaming, caplog):
    write(hub.remote / "thumbs" / "train-0.csv", "prompt,completion,label\nNA,4,1\n")
    write(hub.remote / "thumbs" / "train-1.csv", 'prompt,completion,label\nnull,"4,5",0.5\n')
    write(hub.remote / "thumbs" / "test.csv", "prompt,completion,label\na,b,0.25\n")
    write(hub.remote / "stars.json", '[{"prompt": "a", "completion": "b", "label": 4.5}]')
    write(hub.remote / "README.md", CARD)
    rows = {
        "train": [
            {"prompt": "NA", "completion": "4", "label": 1},
            {"prompt": "null", "completion": "4,5", "label": 0.5},
        ],
        "test": [{"prompt": "a", "completion": "b", "label": 0.25}],
    }
    with pytest.raises(ValueError, match=r"^The dataset org/name cannot be read: Config name is missing"):
        load_rows("org/name")
    found = load_rows("org/name", config="thumbs", streaming=streaming)
    assert {split: list(each) for split, each in found.items()} == rows
    folder = load_rows(hub.remote, config="thumbs", streaming=streaming)
    assert {split: list(each) for split, each in folder.items()} == rows
    assert not (hub.local / "stars.json").exists()
    assert ("downloaded, and then streamed" in caplog.text) is streaming
    if not streaming:
        assert origin(found["train"], 1) == f"{hub.local / 'thumbs' / 'train-1.csv'}, line 2"
        assert origin(found["test"], 0) == f"{hub.local / 'thumbs' / 'test.csv'}, line 2"
    # A mixture can name files of the repository
    part = PartConfig(path="org/name", data_files="stars.json")
    assert list(load_mixture([part], streaming=streaming)[0]["train"]) == [
        {"prompt": "a", "completion": "b", "label": 4.5}
    ]


def test_a_dataset_on_the_hub_without_a_readme_is_whole(hub):
    write(hub.remote / "data" / "train.csv", "prompt,completion,label\na,b,1\n")
    write(hub.remote / "data" / "train-more.csv", "prompt,completion,label\nb,c,0.5\n")
    write(hub.remote / "script.py", "raise ValueError")
    assert load_rows("org/name")["train"]["label"][:] == load_rows(hub.remote)["train"]["label"][:]
    assert len(load_rows("org/name")["train"]) == 2
    assert not (hub.local / "script.py").exists()
    write(hub.remote / "data" / "test.jsonl", LINES)
    write(hub.remote / "data" / "train-more.csv", "prompt,completion,label\nb,c,0.5\n")
    assert {split: len(rows) for split, rows in load_rows("org/name").items()} == {"train": 2, "test": 5}


MIXED_CARD = """---
configs:
- config_name: thumbs
  data_files:
  - {split: train, path: [train.csv, more.jsonl]}
  - {split: test, path: test.jsonl}
- config_name: stars
  data_files: stars.tsv
---
"""


@pytest.mark.parametrize("where", ["hub", "folder"])
def test_a_readme_can_name_files_of_several_kinds(hub, where):
    write(hub.remote / "train.csv", "prompt,completion,label\na,b,1\n")
    write(hub.remote / "more.jsonl", '{"prompt": "b", "completion": "c", "label": 0.5}\n')
    write(hub.remote / "test.jsonl", '{"prompt": "c", "completion": "d", "label": 0.25}\n')
    write(hub.remote / "stars.tsv", "prompt\tcompletion\tlabel\na\tb\t4\n")
    write(hub.remote / "README.md", MIXED_CARD)
    name = "org/name" if where == "hub" else hub.remote
    found = load_rows(name, config="thumbs")
    assert {split: rows["label"][:] for split, rows in found.items()} == {"train": [1, 0.5], "test": [0.25]}
    assert load_rows(name, config="stars")["train"]["label"][:] == [4]
    for config in (None, "votes"):
        with pytest.raises(ValueError, match=r"thumbs.*stars"):
            load_rows(name, config=config)
    # A README that declares no files changes nothing
    write(hub.remote / "README.md", "# Ratings\n")
    assert sorted(load_rows(name)) == ["test", "train"]
    with pytest.raises(ValueError, match="has no configurations"):
        load_rows(name, config="thumbs")


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ("  sep: ';'", r"README\.md sets sep for files of several kinds"),
        ("  data_dir: ../other", r"README\.md names .*other.*, which is not in"),
        ("  default: [", r"README\.md cannot be read: while parsing"),
    ],
)
def test_a_readme_of_files_of_several_kinds_that_is_refused(tmp_path, card, message):
    folder = tmp_path / "rows"
    for place in (folder, tmp_path / "other"):
        place.mkdir()
        write(place / "train.csv", "prompt,completion,label\na,b,1\n")
        write(place / "test.jsonl", '{"prompt": "c", "completion": "d", "label": 0.25}\n')
    files = (
        ""
        if "data_dir" in card
        else "  data_files: [{split: train, path: train.csv}, {split: test, path: test.jsonl}]\n"
    )
    write(folder / "README.md", f"---\nconfigs:\n- config_name: default\n{files}{card}\n---\n")
    with pytest.raises(ValueError, match=message):
        load_rows(folder)


def test_what_datasets_reads_from_the_hub_is_said(hub, monkeypatch, caplog):
    write(hub.remote / "a.csv", "prompt~label\na~1\n")
    write(hub.remote / "README.md", "---\nconfigs:\n- config_name: default\n  data_files: a.csv\n  sep: '~'\n---\n")
    monkeypatch.setattr("trl_ulma.data.hub.load_dataset", lambda path, **kwargs: load_dataset(str(hub.remote)))
    assert load_rows("org/name")["train"][0] == {"prompt": "a", "label": 1}
    assert "org/name: the files are read by the library datasets" in caplog.text
    caplog.clear()
    assert load_rows(hub.remote)["train"][0] == {"prompt": "a", "label": 1}
    assert f"{hub.remote}: the files are read by the library datasets" in caplog.text


def test_parquet_on_the_hub_is_read_by_datasets(hub, monkeypatch, caplog):
    (hub.remote / "rows").mkdir()
    Dataset.from_list(ROWS).to_parquet(str(hub.remote / "rows" / "train.parquet"))
    seen = {}

    def load(path, **kwargs):
        seen.update(kwargs, path=path)
        return load_dataset(str(hub.remote), **kwargs)

    monkeypatch.setattr("trl_ulma.data.hub.load_dataset", load)
    assert list(load_rows("org/name", streaming=True)["train"]) == ROWS
    assert seen == {"path": "org/name", "name": None, "streaming": True}
    assert not caplog.records
    assert not hub.patterns


def test_a_loading_script_is_refused_in_a_line(monkeypatch):
    def refused(path, **kwargs):
        raise RuntimeError("Dataset scripts are no longer supported, but found name.py")

    monkeypatch.setattr("trl_ulma.data.hub.load_dataset_builder", refused)
    with pytest.raises(ValueError, match=r"^The dataset org/name cannot be read: Dataset scripts are no longer"):
        load_rows("org/name")


def test_a_dataset_in_the_cache_of_the_hub_is_read_offline(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    load_builder = load_dataset_builder

    def builder(path, **kwargs):
        if path == "org/name":
            raise ConnectionError("Couldn't reach 'org/name' on the Hub (OfflineModeIsEnabled)")
        return load_builder(path, **kwargs)

    monkeypatch.setattr("trl_ulma.data.hub.load_dataset_builder", builder)
    with pytest.raises(FileNotFoundError, match=r"from the Hub either: Couldn't reach 'org/name'"):
        load_rows("org/name")
    repository = tmp_path / "hub" / "datasets--org--name"
    write(repository / "refs" / "main", "0a1b")
    write(repository / "blobs" / "b0", "prompt,completion,label\nNA,4,1\n")
    snapshot = repository / "snapshots" / "0a1b"
    snapshot.mkdir(parents=True)
    (snapshot / "train.csv").symlink_to(repository / "blobs" / "b0")
    assert list(load_rows("org/name")["train"]) == [{"prompt": "NA", "completion": "4", "label": 1}]
    assert f"org/name: the Hub cannot be reached, so the files in {snapshot} are read" in caplog.text


def test_a_configuration_is_for_data_sets_that_have_some(tmp_path):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"is a file, so it has no configurations\. Remove the configuration 'main'"):
        load_rows(write(tmp_path / "rows.jsonl", LINES), config="main")
    with pytest.raises(ValueError, match=r"was written by save_to_disk, so it has no configurations"):
        load_rows(tmp_path / "saved", config="main")


# The split by prompt


def by_prompt(splits):
    return {name: {json.dumps(prompt) for prompt in rows["prompt"]} for name, rows in splits.items()}


@settings(deadline=None)  # the machine can be busy
@given(
    prompts=st.lists(st.integers(0, 20), min_size=2, max_size=60).filter(lambda p: len(set(p)) > 1),
    seed=st.integers(0, 5),
    messages=st.booleans(),
    shuffle=st.randoms(use_true_random=False),
)
def test_no_prompt_is_on_both_sides_and_order_does_not_matter(prompts, seed, messages, shuffle):
    texts = [[{"role": "user", "content": str(p)}] if messages else f"p{p}" for p in prompts]
    splits = split_by_prompt(Dataset.from_dict({"prompt": texts}), test_size=0.3, seed=seed)
    sides = by_prompt(splits)
    assert sides["train"]
    assert sides["test"]
    assert not sides["train"] & sides["test"]
    assert len(splits["train"]) + len(splits["test"]) == len(prompts)
    shuffle.shuffle(texts)
    assert by_prompt(split_by_prompt(Dataset.from_dict({"prompt": texts}), test_size=0.3, seed=seed)) == sides


def test_the_size_is_as_asked_and_rows_keep_their_order():
    rows = Dataset.from_dict({"prompt": [f"p{i // 3}" for i in range(300)], "row": list(range(300))})
    for test_size, expected in ((0.1, 30), (0.5, 150), (60.0, 60)):
        splits = split_by_prompt(rows, test_size=test_size, seed=0)
        assert len(splits["test"]) == expected
        assert all(splits[name]["row"][:] == sorted(splits[name]["row"][:]) for name in splits)


def test_a_prompt_with_most_of_the_rows_stays_in_training():
    rows = Dataset.from_dict({"prompt": ["much"] * 90 + [f"p{i}" for i in range(10)]})
    for seed in range(10):
        assert len(split_by_prompt(rows, test_size=0.05, seed=seed)["test"]) == 5


def test_a_split_without_training_rows_is_an_error():
    rows = Dataset.from_dict({"prompt": [f"p{i}" for i in range(100)]})
    with pytest.raises(ValueError, match=r"test_split_size 0\.999 leaves none of the 100 rows to train on"):
        split_by_prompt(rows, test_size=0.999, seed=0)
    assert len(split_by_prompt(rows, test_size=0.99, seed=0)["train"]) == 1


def test_the_seed_matters():
    rows = Dataset.from_dict({"prompt": [f"p{i}" for i in range(100)]})
    sides = [tuple(split_by_prompt(rows, test_size=0.1, seed=seed)["test"]["prompt"]) for seed in (0, 0, 1)]
    assert sides[0] == sides[1] != sides[2]


def test_spellings_of_a_prompt_are_on_one_side():
    def turn(content, **keys):
        return [{**keys, "content": content, "role": "user", "name": keys.get("name")}]

    spellings = [
        lambda text: [text, f" {text}\n", text.replace("é", "e\u0301")],
        lambda text: [turn(text), turn(f"{text} "), turn(text, name="Ann"), turn(text.replace("é", "e\u0301"))],
    ]
    for spelled in spellings:
        rows = [{"prompt": prompt, "number": i} for i in range(12) for prompt in spelled(f"A café, no. {i}?")]
        splits = split_by_prompt(Dataset.from_list(rows), test_size=0.25, seed=0)
        assert set(splits["train"]["number"]).isdisjoint(splits["test"]["number"])


def test_every_process_finds_the_same():
    code = (
        "from datasets import Dataset; from trl_ulma.data.files import split_by_prompt\n"
        "rows = Dataset.from_dict({'prompt': [f'p{i % 40}' for i in range(100)]})\n"
        "print(split_by_prompt(rows, test_size=0.2, seed=3)['test']['prompt'][:])"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1


def transcripts(number):
    prompts = [f"\n\nHuman: question {i % 7}\n\nAssistant:" for i in range(number)]
    return prompts, [f"{p} Yes {i}." for i, p in enumerate(prompts)], [f"{p} No {i}." for i, p in enumerate(prompts)]


@pytest.mark.parametrize("messages", [False, True])
def test_pairs_without_a_prompt_are_split_by_what_comes_before_the_answer(messages):
    prompts, chosen, rejected = transcripts(40)
    if messages:
        chosen, rejected = (
            [
                [{"role": "user", "content": p}, {"role": "assistant", "content": text.removeprefix(p)}]
                for p, text in zip(prompts, side, strict=True)
            ]
            for side in (chosen, rejected)
        )
    rows = Dataset.from_dict({"chosen": chosen, "rejected": rejected, "prompt_": prompts})
    splits = split_by_prompt(rows, test_size=0.3, seed=1)
    assert len(splits["test"]) + len(splits["train"]) == 40
    assert not set(splits["train"]["prompt_"]) & set(splits["test"]["prompt_"])


def test_both_halves_of_a_pair_count():
    number = 30
    prompts = [f"\n\nHuman: {i}\n\nAssistant:" for i in range(number + 1)]
    rows = Dataset.from_dict(
        {"chosen": [f"{p} Yes." for p in prompts[:-1]], "rejected": [f"{p} No." for p in prompts[1:]]}
    )
    with pytest.raises(ValueError, match=r"needs two different prompts; the 30 rows have 1"):
        split_by_prompt(rows, test_size=0.1, seed=0)
    order = list(range(number))
    random.Random(0).shuffle(order)
    half = rows.select([i for i in order if i != 14])
    splits = split_by_prompt(half, test_size=0.5, seed=0)
    assert {len(splits["train"]), len(splits["test"])} == {14, 15}


def test_real_transcripts(shared_data):
    rows = load_rows(shared_data / "hh_harmless.jsonl.gz")["train"]
    splits = split_by_prompt(rows, test_size=0.1, seed=42)
    assert (len(splits["train"]), len(splits["test"])) == (1620, 180)
    opening = {name: {text.rpartition("\n\nAssistant:")[0] for text in splits[name]["chosen"]} for name in splits}
    assert not opening["train"] & opening["test"]


@pytest.mark.parametrize("test_size", [0, -0.1, 1.5, 4, 40, float("nan")])
def test_a_size_that_is_none(test_size):
    rows = Dataset.from_dict({"prompt": list("abcd")})
    with pytest.raises(ValueError, match=r"test_split_size is .*; it must be a fraction between 0 and 1, or a whole"):
        split_by_prompt(rows, test_size=test_size, seed=0)


def test_one_prompt_cannot_be_split():
    with pytest.raises(ValueError, match=r"needs two different prompts; the 3 rows have 1\. Provide a test split"):
        split_by_prompt(Dataset.from_dict({"prompt": ["a"] * 3}), test_size=0.5, seed=0)


def test_rows_without_a_prompt():
    with pytest.raises(ValueError, match=r"needs a column `prompt`, or `chosen` and `rejected`; .* text, label"):
        split_by_prompt(Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}), test_size=0.5, seed=0)


def test_hidden_files_and_those_of_a_mac_are_no_data(tmp_path):
    for name in ("train", "test"):
        write(tmp_path / f"{name}.csv", f"prompt,completion,label\n{name},b,1\n")
        (tmp_path / ".ipynb_checkpoints").mkdir(exist_ok=True)
        write(tmp_path / ".ipynb_checkpoints" / f"{name}-checkpoint.csv", "prompt,completion,label\nold,b,1\n")
        (tmp_path / "__MACOSX").mkdir(exist_ok=True)
        write(tmp_path / "__MACOSX" / f"{name}.csv", "no data")
        write(tmp_path / f"._{name}.csv", "no data")
    splits = load_rows(str(tmp_path))
    assert {split: rows["prompt"][:] for split, rows in splits.items()} == {"train": ["train"], "test": ["test"]}
    (hidden := tmp_path / ".cache").mkdir()
    write(hidden / "rows.csv", "prompt,completion,label\na,b,1\n")
    assert load_rows(str(hidden))["train"]["prompt"][:] == ["a"]
