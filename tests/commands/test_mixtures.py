"""Mixtures in YAML: parts of any kind mix, and an error names the part; columns and labels are mapped everywhere."""

import json

import pytest
import yaml
from datasets import Dataset, DatasetDict

from trl_ulma.data.mixture import load_mixture
from trl_ulma.scripts import check, pointwise_dpo, ulma
from trl_ulma.scripts.cli import main
from trl_ulma.scripts.options import PartConfig
from trl_ulma.scripts.training import load_splits


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def rows(name, labels, **columns):
    made = [{"prompt": f"{name} {i}", "completion": f" answer {i}", "label": label} for i, label in enumerate(labels)]
    return [{**row, **columns} for row in made]


def write(path, content):
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content))
    return str(path)


def mixture(tmp_path, parts, script=pointwise_dpo, **settings):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"datasets": parts, **settings}))
    argv = [
        "--config",
        str(file),
        "--model_name_or_path",
        "m",
        "--output_dir",
        str(tmp_path / "out"),
        "--bf16",
        "false",
    ]
    script_args, training_args, _, dataset_args = script.make_parser().parse_settings(argv)
    return load_splits(script_args, training_args, dataset_args)[0]


@pytest.mark.parametrize("streaming", [False, True])
def test_parts_of_all_kinds_mix(tmp_path, monkeypatch, streaming):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "ints.jsonl", rows("int", [0, 1], id=7))
    write(tmp_path / "folder" / "train-0.jsonl", rows("float", [0.0, 1.0]))
    write(tmp_path / "folder" / "train-1.csv", "prompt,completion,label,note\ncsv 0, yes,true,\ncsv 1, no,0.25,x\n")
    DatasetDict(train=Dataset.from_list(rows("saved", [True, False]))).save_to_disk(tmp_path / "saved")
    write(tmp_path / "named.csv", "question;response;vote\nnamed 0; yes;up\nnamed 1; no;down\n")
    write(tmp_path / "array.json", json.dumps(rows("array", [0.5], weight=2)))
    names = {"prompt": "question", "completion": "response", "label": "vote"}
    parts = [
        {"path": str(tmp_path / "ints.jsonl")},
        {"path": "~/folder"},
        {"path": str(tmp_path / "saved")},
        {"path": "~/named.csv", "columns": names, "label_map": {"up": 1, "down": 0}},
        {"path": "json", "data_files": str(tmp_path / "arr*.json")},
    ]
    found = list(mixture(tmp_path, parts, streaming=streaming, max_steps=1))
    assert [row["prompt"] for row in found] == [
        *("int 0", "int 1", "float 0", "float 1", "csv 0", "csv 1", "saved 0", "saved 1", "named 0", "named 1"),
        "array 0",
    ]
    assert [row["label"] for row in found] == [0, 1, 0, 1, 1, 0.25, 1, 0, 1, 0, 0.5]
    assert [row["weight"] for row in found] == [1] * 10 + [2]
    assert {frozenset(row) for row in found} == {frozenset({"prompt", "completion", "label", "weight"})}


def test_what_a_part_lacks_is_filled_in_as_trainers_read_it(tmp_path):
    marked = write(tmp_path / "marked.jsonl", rows("a", [1, 0], sft_mask=False, label_type="binary", log_z=0.5))
    plain = write(tmp_path / "plain.jsonl", rows("b", [0.9, 0.1]))
    settings = {"label_type": "continuous", "sft_threshold": 0.5}
    found = mixture(tmp_path, [{"path": marked}, {"path": plain}], ulma, **settings)
    assert found["sft_mask"][:] == [False, False, True, False]
    assert found["label_type"][:] == ["binary"] * 2 + ["continuous"] * 2
    assert found["log_z"][:] == [0.5, 0.5, 0, 0]
    for log_z in (0.25, "prior"):
        with pytest.raises(ValueError, match=r"has no column log_z, but another part has one\. Add it, or leave"):
            mixture(tmp_path, [{"path": marked}, {"path": plain}], ulma, log_z=log_z, **settings)


@pytest.mark.parametrize("column", [{"weight": 5.0}, {"sft_mask": False}, {"tools": [{"name": "lamp"}]}])
def test_a_column_that_the_first_row_of_a_stream_lacks_is_not_dropped(tmp_path, column):
    late = write(tmp_path / "late.jsonl", [*rows("a", [1, 0]), *rows("b", [1], **column)])
    other = write(tmp_path / "other.jsonl", rows("c", [1, 0], **column))
    [name] = column
    for parts in ([late, other], [late, write(tmp_path / "plain.jsonl", rows("d", [0]))]):
        found = mixture(tmp_path, [{"path": part} for part in parts], streaming=True, max_steps=1)
        with pytest.raises(ValueError, match=rf"part 1 .*: row 2 has the column {name}, but the first row does not\. "):
            list(found)
        value = mixture(tmp_path, [{"path": part} for part in parts])[2][name]
        assert (json.loads(value) if name == "tools" else value) == column[name]  # tools are read as JSON text
    named = [{"path": part, "columns": ["prompt", "completion", "label"]} for part in (late, other)]
    assert len(list(mixture(tmp_path, named, streaming=True, max_steps=1))) == 5
    assert len(list(mixture(tmp_path, named[:1], streaming=True, max_steps=1))[2]) == 3


def test_an_unread_column_that_the_first_pair_of_a_stream_lacks_does_not_matter(tmp_path):
    pair = {"prompt": "a", "chosen": " yes", "rejected": " no"}
    parts = [write(tmp_path / "pairs.jsonl", [pair, {**pair, "note": 1}]), write(tmp_path / "b.jsonl", rows("b", [1]))]
    found = list(mixture(tmp_path, [{"path": part} for part in parts], streaming=True, max_steps=1))
    assert [row["completion"] for row in found] == [" yes", " no", " yes", " no", " answer 0"]


def test_pairs_among_rows_become_rows(tmp_path):
    pairs = write(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": " yes", "rejected": " no", "note": 1}])
    stars = write(tmp_path / "stars.jsonl", rows("b", [4, 1]))
    found = mixture(tmp_path, [{"path": pairs}, {"path": stars}], label_type="continuous")
    assert [(row["completion"], row["label"], row["label_type"]) for row in found] == [
        (" yes", 1, "binary"),
        (" no", 0, "binary"),
        (" answer 0", 4, "continuous"),
        (" answer 1", 1, "continuous"),
    ]


def test_fractions_splits_and_columns(tmp_path):
    DatasetDict(
        train=Dataset.from_list(rows("a", [1, 0] * 10)), extra=Dataset.from_list(rows("b", [1.0] * 4))
    ).save_to_disk(tmp_path / "saved")
    parts = [
        {"path": str(tmp_path / "saved"), "split": "train[:50%]", "fraction": 3.0},
        {"path": str(tmp_path / "saved"), "split": "extra", "fraction": 1.0},
    ]
    prompts = mixture(tmp_path, parts)["prompt"][:]
    assert prompts == [f"a {i}" for i in range(10)] + ["b 0", "b 1", "b 2"]
    parts = [{"path": str(tmp_path / "saved"), "split": "train+extra", "columns": ["prompt", "completion", "label"]}]
    assert len(mixture(tmp_path, parts)) == 24


def test_fractions_are_of_the_rows_that_pairs_become(tmp_path):
    pairs = [{"prompt": f"a {i}", "chosen": " yes", "rejected": " no"} for i in range(6)]
    parts = [
        {"path": write(tmp_path / "pairs.jsonl", pairs), "fraction": 0.5},
        {"path": write(tmp_path / "rows.jsonl", rows("b", [1, 0] * 3)), "fraction": 0.5},
    ]
    prompts = mixture(tmp_path, parts)["prompt"][:]
    assert [sum(prompt.startswith(name) for prompt in prompts) for name in "ab"] == [6, 6]
    assert len(mixture(tmp_path, [parts[0], parts[0]])) == 12


def test_a_fraction_of_sorted_rows_has_one_label_and_a_warning(tmp_path):
    def warnings(labels, fraction=0.5):
        sorted_rows = PartConfig(path=write(tmp_path / "sorted.jsonl", rows("a", labels)), fraction=fraction)
        few = PartConfig(path=write(tmp_path / "few.jsonl", rows("b", [1, 0] * 2)), fraction=0.5)
        return load_mixture([sorted_rows, few])[1]

    [said] = warnings([1] * 10 + [0] * 10)
    assert said.endswith(
        "takes its first 4 of 20 rows, which all have the label 1. The others do not. Shuffle the file."
    )
    assert warnings([1, 0] * 10) == warnings([1] * 20) == warnings([1, 0] * 10, fraction=0.125) == []


@pytest.mark.parametrize("streaming", [False, True])
def test_tables_keep_their_mark(tmp_path, streaming):
    table = write(tmp_path / "a.csv", "prompt,completion,label\n Hi , Yes ,1\nWho?,Me,0\n")
    more = write(tmp_path / "b.tsv", "prompt\tcompletion\tlabel\nHo\tNo\t0.5\n")
    text = write(tmp_path / "c.jsonl", rows("c", [1, 0]))
    chat = write(tmp_path / "d.jsonl", [{"prompt": MESSAGES, "completion": ANSWER, "label": 0.5, "weight": 2}])
    how = {"streaming": streaming, "max_steps": 1}

    def mixed(*paths, **settings):
        return mixture(tmp_path, [{"path": path} for path in paths], **how, **settings)

    assert mixed(table, more).info.builder_name == "csv"
    assert mixed(table, text).info.builder_name == "csv and others"
    assert mixed(text, text).info.builder_name is None
    # Beside conversations, the text of tables becomes messages
    found = list(mixed(table, chat))
    assert found[0]["prompt"] == [{"role": "user", "content": "Hi"}]
    assert found[0]["completion"] == [{"role": "assistant", "content": "Yes"}]
    assert [row["weight"] for row in found] == [1, 1, 2]
    pairs = write(tmp_path / "e.csv", "prompt,chosen,rejected\nHi,Yes,No\n")
    assert [row["completion"][0]["content"] for row in mixed(pairs, chat)] == ["Yes", "No", "Hello!"]
    chats = [{"prompt": MESSAGES, "chosen": ANSWER, "rejected": MESSAGES}]
    [first, _] = mixed(pairs, write(tmp_path / "f.jsonl", chats))
    assert (first["prompt"], first["rejected"]) == (MESSAGES, [{"role": "assistant", "content": "No"}])
    for paths, settings in (((table, text, chat), {}), ((table, chat), {"chat": False})):
        with pytest.raises(ValueError, match=r"are text, but those of the other parts are messages\. Set chat=True"):
            mixed(*paths, **settings)
    assert len({type(row["prompt"]) for row in mixed(table, text, chat, chat=True)}) == 1


def test_text_that_becomes_messages_is_said(tmp_path, tiny_llama, capsys):
    table = write(tmp_path / "a.csv", "prompt,completion,label\n" + "".join(f"q{i},a{i},{i % 2}\n" for i in range(4)))
    chat = write(tmp_path / "d.jsonl", [{"prompt": MESSAGES, "completion": ANSWER, "label": 1}] * 2)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"datasets": [{"path": table}, {"path": chat}]}))
    argv = ["--config", str(tmp_path / "run.yaml"), "--model", tiny_llama, "--bf16", "false", "--eval_strategy", "no"]
    assert check.main(argv) == 0
    said = capsys.readouterr().out
    assert f"The text of part 1 of the mixture ({table}) becomes messages" in said
    assert "<|user|>q0<|end|><|assistant|>⟦a0<|end|>⟧" in "".join(said.split("\n"))


def test_invalid_rows_are_listed_with_their_file_and_line(tmp_path, tiny_gpt2, capsys):
    table = write(tmp_path / "a.csv", 'prompt,completion,label\n"two\nlines",a,1\nb,,0\n')
    stars = write(tmp_path / "b.jsonl", rows("b", [0, 1.5], weight=2))
    Dataset.from_list(rows("c", [1, 7])).save_to_disk(tmp_path / "saved")
    pairs = write(tmp_path / "d.jsonl", "\n" + json.dumps({"prompt": None, "chosen": "a", "rejected": "b"}) + "\n")
    Dataset.from_list(rows("e", [1, 9])).to_parquet(str(tmp_path / "e.parquet"))
    parts = [table, stars, str(tmp_path / "saved"), pairs, str(tmp_path / "e.parquet")]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"datasets": [{"path": path} for path in parts]}))
    argv = ["--config", str(tmp_path / "run.yaml"), "--model", tiny_gpt2, "--bf16", "false", "--eval_strategy", "no"]
    assert check.main(argv) == 1
    said = capsys.readouterr().err
    places = [
        f"{table}, line 4 (row 3 in a spreadsheet)",
        f"{stars}, line 2",
        f"part 3 of the mixture ({tmp_path / 'saved'}), row 1",
    ]
    places += [f"{pairs}, line 2", f"{tmp_path / 'e.parquet'}, row 1"]
    for place in places:
        assert f"\n  {place}: " in said, place
    assert check.main(["--method", "ulma", "--dataset", parts[2], *argv[2:]]) == 1
    assert f"{tmp_path / 'saved' / 'data-00000-of-00001.arrow'}, row 1: " in capsys.readouterr().err
    assert check.main(["--dataset", table, *argv[2:], "--invalid_rows", "drop"]) == 0
    capsys.readouterr()
    parts = [{"path": table}, {"path": stars}]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"datasets": parts, "streaming": True, "max_steps": 1}))
    assert check.main(argv) == 1
    said = capsys.readouterr().err
    assert f"\n  {table}, line 4 (row 3 in a spreadsheet): " in said
    assert f"\n  {stars}, line 2: " in said


MESSAGES = [{"role": "user", "content": "Hi"}]
ANSWER = [{"role": "assistant", "content": "Hello!"}]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([{"path": "a.jsonl"}, {"path": "none.jsonl"}], r"part 2 of the mixture \(.*none\.jsonl\): There is no file"),
        ([{"path": "a.jsonl"}, {"path": "ragged.csv"}], r"part 2 .*ragged\.csv\): .* has 4 fields in line 2"),
        (
            [{"path": "a.jsonl"}, {"path": "words.csv"}],
            r"part 2 .* labels that are words \('up'\)\. .*: label_map: up=1",
        ),
        (
            [{"path": "a.jsonl"}, {"path": "named.csv", "columns": {"prompt": "question"}}],
            r"part 2 .*; found question, answer, stars\. .*: columns: prompt=question,completion=answer,label=stars$",
        ),
        ([{"path": "a.jsonl", "split": "tests"}], r"part 1 .*: it has no split 'tests'; its splits are train"),
        (
            [{"path": "a.jsonl", "split": "tests[:2]"}],
            r"part 1 .*: it has no split 'tests\[:2\]'; its splits are train",
        ),
        (
            [{"path": "a.jsonl", "columns": ["prompts"]}],
            r"part 1 .*: it has no column prompts; its columns are prompt, completion",
        ),
        ([{"path": "a.jsonl", "columns": {"label": "stars"}}], r"part 1 .* has no column stars; its columns are"),
        ([{"path": "a.jsonl", "name": "main"}], r"part 1 .* so it has no configurations"),
        (
            [{"path": "a.jsonl"}, {"path": "chat.jsonl"}],
            r"The rows of part 1 .*a\.jsonl\) are text, but those of the other",
        ),
        (
            [{"path": "a.jsonl", "fraction": 1.0}, {"path": "a.jsonl"}],
            "fraction must be above 0, and either all parts of the mixture or none",
        ),
        (
            [{"path": "a.jsonl", "fraction": 0.99}, {"path": "a.jsonl", "fraction": 0.01}],
            r"part 2 .*: its fraction is 0\.01 of a mixture of 2 rows, which is none of its 2 rows\. Raise",
        ),
        (
            [{"path": "masked.jsonl"}, {"path": "stars.jsonl"}],
            r"part 2 .* has no column sft_mask, but another part has one",
        ),
        ([{"path": "p1.jsonl"}, {"path": "p2.jsonl"}], r"The pairs of part 2 .*p2\.jsonl\) have no prompt"),
        ([{"path": "json", "data_files": "no*.jsonl"}], r"part 1 .*: no file matches"),
    ],
)
def test_an_error_names_the_part(tmp_path, parts, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", rows("a", [1, 0]))
    write(tmp_path / "ragged.csv", "prompt,completion,label\na,b,c,1\n")
    write(tmp_path / "words.csv", "prompt,completion,label\na,b,up\n")
    write(tmp_path / "named.csv", "question,answer,stars\na,b,1\n")
    write(tmp_path / "chat.jsonl", [{"prompt": MESSAGES, "completion": MESSAGES, "label": 1}])
    write(tmp_path / "masked.jsonl", rows("a", [1], sft_mask=True, label_type="binary"))
    write(tmp_path / "stars.jsonl", rows("a", [4.5], label_type="continuous"))
    write(tmp_path / "p1.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    write(tmp_path / "p2.jsonl", [{"chosen": "b", "rejected": "c"}])
    with pytest.raises((OSError, ValueError), match=message) as caught:
        mixture(tmp_path, parts)
    assert "\n" not in str(caught.value)


def test_entries_that_are_wrong(tmp_path, capsys):
    for part, message in (
        ({"path": "a", "label_map": 3}, "label_map is 3; it must be a mapping or text or null"),
        (
            {"path": "a", "columns": {"prompt": 3}},
            "columns is {'prompt': 3}; it must be a list (text each) or a mapping",
        ),
    ):
        with pytest.raises(SystemExit):
            mixture(tmp_path, [part])
        assert message in capsys.readouterr().err


# Names and labels on the command line

VOTES = "question,response,rating\n" + "".join(f"q{i},a{i},{('up', 'down')[i % 2]}\n" for i in range(20))
NAMES = ["--columns", "prompt=question,completion=response,label=rating", "--label_map", "up=1,down=0"]


@pytest.mark.parametrize("in_yaml", [False, True])
def test_check_takes_names_and_labels(tmp_path, tiny_gpt2, capsys, in_yaml):
    file = write(tmp_path / "votes.csv", VOTES)
    options = ["--method", "ulma", "--model", tiny_gpt2, "--dataset", file, "--bf16", "false"]
    assert check.main(options) == 1
    assert (
        "`question` looks like the prompt, `response` like the completion and `rating` like the label: --columns "
        "prompt=question,completion=response,label=rating"
    ) in capsys.readouterr().err
    assert check.main([*options, *NAMES[:2]]) == 1
    assert "labels that are words ('up', 'down'). Map them to numbers: --label_map" in capsys.readouterr().err
    if in_yaml:
        names = {"columns": {"prompt": "question", "completion": "response", "label": "rating"}}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump({**names, "label_map": {"up": 1, "down": 0}}))
        assert check.main([*options, "--config", str(tmp_path / "run.yaml")]) == 0
    else:
        assert check.main([*options, *NAMES]) == 0
    assert "20 rows" in capsys.readouterr().out


def test_training_takes_names_and_labels(tmp_path):
    argv = ["--model_name_or_path", "m", "--output_dir", str(tmp_path), "--bf16", "false", *NAMES]
    argv += ["--dataset_name", write(tmp_path / "votes.csv", VOTES), "--eval_strategy", "steps"]
    script_args, training_args, _, dataset_args = ulma.make_parser().parse_settings(argv)
    train, evaluation, _ = load_splits(script_args, training_args, dataset_args)
    assert (len(train), len(evaluation)) == (18, 2)
    assert {row["prompt"]: row["label"] for row in train}.items() >= {"q0": 1, "q1": 0}.items() - {
        (row["prompt"], row["label"]) for row in evaluation
    }


@pytest.mark.parametrize(
    ("column", "more", "is_said"),
    [
        ("rank", [], True),
        ("rank", ["--label_transform", "lower_is_better,standardize"], False),
        ("rank", ["--label_map", "0=1,1=0"], False),
        ("stars", [], False),
        ("error_free", [], False),
    ],
)
def test_labels_that_look_better_if_they_are_low_are_cautioned_about(tmp_path, column, more, is_said):
    file = write(
        tmp_path / "ranks.csv", f"prompt,completion,{column}\n" + "".join(f"q{i},a,{i % 2}\n" for i in range(9))
    )
    argv = ["--model_name_or_path", "m", "--output_dir", str(tmp_path), "--bf16", "false", "--label_type", "continuous"]
    argv += ["--dataset_name", file, "--columns", f"label={column}", "--sft_threshold", "1", *more]
    script_args, training_args, _, dataset_args = ulma.make_parser().parse_settings(argv)
    said = load_splits(script_args, training_args, dataset_args)[2]
    assert (f"{file}: A low `{column}` looks better, so train with --label_type continuous" in said) == is_said
    if not more:
        part = {"path": file, "columns": {"label": column}}
        mixed = load_mixture([PartConfig(**part)], rules=None)[1]
        assert any("looks better" in note for note in mixed) == is_said


def test_prepare_takes_names_and_labels(tmp_path, capsys):
    file = write(tmp_path / "pairs.csv", "question,better,worse\n" + "".join(f"q{i},a,b\n" for i in range(10)))
    argv = ["prepare", "pairs", "--input", file, "--output", str(tmp_path / "out.jsonl")]
    assert main(argv) == 1
    assert "--columns prompt=question,chosen=better,rejected=worse" in capsys.readouterr().err
    assert main([*argv, "--columns", "prompt=question,chosen=better,rejected=worse"]) == 0
    assert "rows out            20" in capsys.readouterr().out


def test_options_of_a_single_dataset_are_refused_beside_a_mixture(tmp_path):
    write(tmp_path / "a.jsonl", rows("a", [0, 1]))
    with pytest.raises(ValueError, match=r"--label_map, --dataset_train_split: a mixture \(`datasets`\) does not read"):
        mixture(
            tmp_path, [{"path": str(tmp_path / "a.jsonl")}], label_map={"1": 0, "0": 1}, dataset_train_split="nosuch"
        )
