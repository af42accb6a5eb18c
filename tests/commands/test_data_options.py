"""Later commands read a dataset as the training of their model did."""

import json
import shlex
import shutil
from types import SimpleNamespace

import pytest
from datasets import Dataset

from trl_ulma.data.convert import convert
from trl_ulma.data.files import load_rows
from trl_ulma.data.seen_prompts import hashes_of
from trl_ulma.scripts import data_options, pointwise_dpo
from trl_ulma.scripts.cli import main

COLUMNS = "prompt=question,completion=reply,label=stars"


@pytest.fixture(scope="module")
def trained(tiny_gpt2, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    rows = [f"Why {i // 2}?,answer {i},{'n/a' if i in (3, 8) else i % 5 + 1}" for i in range(24)]
    file = folder / "own rows.csv"
    file.write_text("\n".join(["question,reply,stars", *rows, ""]))
    words = ["--model", tiny_gpt2, "--dataset", str(file), "--columns", COLUMNS, "--label_type", "continuous"]
    words += ["--invalid_rows", "drop", "--test_split_size", "0.5", "--seed", "5", "--output", str(folder / "out")]
    words += ["--max_steps", "1", "--bf16", "false", "--report_to", "none", "--save_steps", "1"]
    pointwise_dpo.main(*pointwise_dpo.make_parser().parse_settings(words))
    return folder / "out", file


def test_an_evaluation_takes_the_rows_that_training_held_out(trained, tmp_path, capsys, caplog, monkeypatch):
    model, file = trained
    command = ["evaluate", "--model", str(model), "--dataset", str(file), "--output", str(tmp_path)]
    assert main(command) == 0
    said = capsys.readouterr().err
    facts = json.loads((tmp_path / "report.json").read_text())
    data, left_out = facts["data"], sum(facts["data"]["left_out"].values())
    assert data["split"] == "0.5 of its rows, by prompt, seed 5"
    assert data["rows"] + left_out == 12
    # One sentence says it, and the report has the rest
    rows = f" ({left_out} invalid row{'s' * (left_out > 1)} left out)" if left_out else ""
    usual = f"{file} is read as in training, and only its {data['rows']} held-out rows are evaluated{rows}.\n"
    assert usual in said
    options = f"--columns {COLUMNS} --invalid_rows drop --test_split_size 0.5 --split_seed 5"
    beginnings = [f"{file} is read as in training: {options}", f"{file} has no test split, so 12 of its 24 rows are"]
    seen = f"Rows whose prompt was in the training data of the model out: 0 of {data['rows']}. Held out:"
    how_read = facts["how_read"]
    assert [how_read[0], how_read[1][: len(beginnings[1])], how_read[-1][: len(seen)]] == [*beginnings, seen]
    assert not [each for each in how_read if each in said]
    assert facts["notes"] == []
    assert not [each for each in caplog.messages if each.startswith("Left out")]
    assert shlex.split(facts["command"].replace("\\\n", "")) == ["trl-ulma", *command]
    text = (tmp_path / "report.md").read_text()
    assert all(each in text for each in how_read)
    # Each is printed if another part, or an option that reads labels, is asked for
    for options in (["--split_seed", "6"], ["--max_length", "900"], ["--split", "train"]):
        assert main([*command, *options]) == 0
        said = capsys.readouterr().err
        assert "held-out rows are evaluated" not in said
        assert f"{file} is read as in training: --columns {COLUMNS} --invalid_rows drop" in said
    # And with --verbose, whose error comes with it, too
    monkeypatch.setenv("TRL_ULMA_VERBOSE", "1")
    assert main(command) == 0
    said = capsys.readouterr().err
    assert usual not in said
    assert beginnings[0] in said
    assert main([*command, "--split", "typo"]) == 1
    assert beginnings[0] in capsys.readouterr().err


def test_a_checkpoint_is_evaluated_on_the_rows_that_training_held_out(trained, tmp_path, capsys):
    model, file = trained
    command = ["evaluate", "--model", str(model / "checkpoint-1"), "--dataset", str(file), "--output", str(tmp_path)]
    assert main([*command, "--examples", "0"]) == 0
    assert f"{file} is read as in training, and only its " in capsys.readouterr().err
    assert json.loads((tmp_path / "report.json").read_text())["models"][0]["trained_on"] == 0


@pytest.mark.parametrize("was_trained", [True, False])
def test_both_hold_out_as_many_prompts_as_an_evaluation_needs(tiny_gpt2, tmp_path, capsys, was_trained):
    file = tmp_path / "rows.csv"
    file.write_text("\n".join(["prompt,completion,label", *(f"Why {i}?,answer {i},{i % 2}" for i in range(120)), ""]))
    words = ["--model", tiny_gpt2, "--dataset", str(file)]
    model = tmp_path / "out"
    if was_trained:
        training = [*words, "--do_eval", "--max_steps", "1", "--bf16", "false", "--report_to", "none"]
        pointwise_dpo.main(*pointwise_dpo.make_parser().parse_settings([*training, "--output", str(model)]))
        assert "30 of its 120 rows are held out" in capsys.readouterr().out
    evaluated = ["evaluate", "--model", str(model) if was_trained else tiny_gpt2, "--dataset", str(file)]
    assert main([*evaluated, "--output", str(tmp_path / "report")]) == 0
    data = json.loads((tmp_path / "report" / "report.json").read_text())["data"]
    assert (data["rows"], data["split"]) == (30, "0.25 of its rows, by prompt, seed 42")
    assert "trained on" not in capsys.readouterr().err


def test_the_next_commands_run_as_they_are_printed(tiny_gpt2, trained, capsys):
    model, file = trained
    words = ["score", "--model", str(model), "--dataset", str(file), "--output", str(model / "scored.jsonl")]
    assert main(words) == 0
    said = capsys.readouterr()
    assert "holds 24 scored rows" in said.out
    assert "2 rows have no label." in said.out
    assert f"{file} is read as in training.\n" in said.err
    assert "split" not in said.err
    assert "--columns" not in said.err


def test_the_model_card_scores_answers_in_the_columns_of_the_training(trained, tmp_path, monkeypatch):
    model, _ = trained
    card = (model / "README.md").read_text()
    assert "`answers.jsonl` has columns `question` and `reply`, as the training data had.\n" in card
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model, model.name)
    (tmp_path / model.name / data_options.FILE).unlink()  # as after a training in Python
    answer = {"question": "Why?", "reply": "So."}
    (tmp_path / "answers.jsonl").write_text(json.dumps(answer) + "\n")
    command = next(line for line in card.splitlines() if line.startswith("trl-ulma score"))
    assert main(shlex.split(command)[1:]) == 0
    scored = json.loads((tmp_path / "scored.jsonl").read_text())
    assert answer.items() <= scored.items()
    assert isinstance(scored["reward"], float)


def test_options_that_are_given_win(trained, tmp_path, capsys):
    model, file = trained
    words = ["--model", str(model), "--dataset", str(file), "--output", str(tmp_path), "--test_split_size", "0.25"]
    assert main(["evaluate", *words, "--invalid_rows", "error", "--split_seed", "1"]) in (0, 1)
    assert f"is read as in training: --columns {COLUMNS}\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("columns", "is_read"),
    [
        ("question,reply", True),  # to be scored
        ("question,reply,stars,rater", True),
        ("prompt,completion,stars", True),  # by our own names
        ("query,answer,stars", False),
        ("question,reply,prompt", False),
    ],
)
def test_another_file_is_read_by_the_names_of_the_training_if_it_has_them(
    trained, tmp_path, capsys, caplog, columns, is_read
):
    model, _ = trained
    file = tmp_path / "other.csv"
    cells = ["Why?", "because", "4", "me"][: columns.count(",") + 1]
    file.write_text(f"{columns.replace(',', ';')}\n{';'.join(cells)}\n")
    code = main(["score", "--model", str(model), "--dataset", str(file), "--output", str(tmp_path / "o.csv")])
    said = capsys.readouterr()
    assert code == (0 if is_read else 1)
    assert ("lacks the column" in said.err) == (not is_read)
    has_names = is_read and columns.startswith("question")
    assert (f"{file} is read as in training: --columns {COLUMNS}\n" in said.err) == has_names
    assert ("holds 1 scored row" in said.out) == is_read
    if is_read:  # and written by the names and with the separators of the file
        first = ";".join(f'"{name}"' for name in columns.split(",")[:2])
        assert (tmp_path / "o.csv").read_text().startswith(first)
        assert f"o.csv has semicolons and decimal commas, as {file} has." in said.err
    assert caplog.text.count("fields are separated") == 1  # also where it is looked at first


def test_labels_of_a_config_with_commas_are_read_later_as_in_training(tiny_gpt2, tmp_path):
    file = tmp_path / "rows.jsonl"
    labels = ["Yes, please", "no", "a=1,b"] * 4
    rows = [{"prompt": f"Why {i}?", "completion": "So.", "label": label} for i, label in enumerate(labels)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"model_name_or_path": tiny_gpt2, "dataset_name": str(file), "output_dir": str(tmp_path / "out")}
    config |= {"max_steps": 1, "bf16": False, "report_to": "none"}
    config["label_map"] = {"yes, please": 1, "no": 0, "a=1,b": 0.5}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    words = ["--config", str(tmp_path / "config.yaml")]
    pointwise_dpo.main(*pointwise_dpo.make_parser().parse_settings(words))
    scored = tmp_path / "scored.jsonl"
    argv = ["--model", str(tmp_path / "out"), "--dataset", str(file), "--sort", "row", "--output", str(scored)]
    assert main(["score", *argv]) == 0
    saved = json.loads((tmp_path / "out" / "data_options.json").read_text())
    assert saved["label_map"] == '"yes, please"=1,no=0,"a=1,b"=0.5'
    found = [json.loads(line) for line in scored.read_text().splitlines()]
    assert [row["label"] for row in found] == [label.lower() for label in labels]


NAMED = {"question": "Why?", "reply": "So."}


@pytest.mark.parametrize(
    ("name", "rows", "columns", "has_them"),
    [
        ("a.jsonl", [{" question": "Why?", "reply\u200b": "So."}], "prompt=question,completion=reply", True),
        ("a.jsonl", [{"reply": "So."}, NAMED], "prompt=question,completion=reply", True),  # an empty value is left out
        ("a.csv", [{"\ufeffquestion ": "Why?", "reply": "So."}], "prompt=question,completion=reply", True),
        ("a.parquet", [{"question ": "Why?", "reply": "So."}], "prompt=question,completion=reply", True),
        ("a.jsonl", [{"don’t know": "Why?", "reply": "So."}], "prompt=don't know,completion=reply", True),
        ("a.jsonl", [{"question": "Why?", "completion": "So."}], "prompt=question,completion=completion", True),
        ("a.jsonl", [{"Question": "Why?", "reply": "So."}], "prompt=question,completion=reply", False),
        ("a.jsonl", [NAMED | {"prompt": "How?"}], "prompt=question,completion=reply", False),
        (
            "a.jsonl",
            [{"question": "Why?", "question ": "How?", "reply": ""}],
            "prompt=question ,completion=reply",
            True,
        ),
        ("a.jsonl", [NAMED], "label=stars", False),
    ],
)
def test_a_file_has_the_columns_of_the_training_if_reading_finds_them(tmp_path, name, rows, columns, has_them):
    file = tmp_path / name
    table = Dataset.from_list(rows)
    if name.endswith("jsonl"):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        table.to_csv(file, index=False) if name.endswith("csv") else table.to_parquet(file)
    assert data_options._has_columns(str(file), columns) == has_them
    if has_them:
        assert set(load_rows(file, columns=columns, needs_label=False)["train"].column_names) >= {
            "prompt",
            "completion",
        }


def test_a_file_without_the_column_of_labels_is_scored_with_a_notice(trained, tmp_path, capsys):
    model, _ = trained
    file = tmp_path / "own rows.csv"  # read as the file of the training, by its name
    words = ["score", "--model", str(model), "--dataset", str(file), "--output", str(tmp_path / "scored.jsonl")]
    file.write_text("question,reply\nWhy?,because\nHow?,so\n")
    assert main(words) == 0
    said = capsys.readouterr()
    assert f"{file} has no column stars, so its rows are scored without labels." in said.err
    assert "holds 2 scored rows; 0 of 2 were left out." in said.out
    file.write_text("question,reply,star\nWhy?,because,4\n")
    assert main(words) == 1
    assert "has no column stars; its columns are question, reply, star. Did you mean star?" in capsys.readouterr().err


def test_models_of_different_trainings_have_no_options_in_common(trained, tmp_path, monkeypatch):
    model, file = trained
    for name, seed in (("a", 5), ("b", 6)):
        known = json.loads((model / data_options.FILE).read_text()) | {"split_seed": seed}
        (tmp_path / name).mkdir()
        (tmp_path / name / data_options.FILE).write_text(json.dumps(known))
    args = data_options.argparse.Namespace(dataset=str(file), columns=None, split_seed=None)
    note = data_options.fill(args, [str(tmp_path / "a"), str(tmp_path / "b")])
    assert note is not None
    assert "different options" in note
    assert (args.columns, args.split_seed) == (known["columns"], 42)


def test_seeds_of_one_training_keep_its_other_options(tmp_path, monkeypatch):
    file = tmp_path / "rows.csv"
    file.write_text("question,answer,rating,label\n")
    for seed in (1, 2):
        known = {"dataset": "rows.csv", "columns": "label=rating", "label_map": None, "split_seed": seed}
        (tmp_path / str(seed)).mkdir()
        (tmp_path / str(seed) / data_options.FILE).write_text(json.dumps(known))
    args = data_options.argparse.Namespace(dataset=str(file), columns=None, label_map=None, split_seed=None)
    note = data_options.fill(args, [str(tmp_path / "1"), str(tmp_path / "2")])
    assert (args.columns, args.label_map, args.split_seed) == ("label=rating", None, 42)
    assert note is not None
    assert "is read as in training: --columns label=rating. The models" in note
    assert note.endswith("of which none is used here: --split_seed 1, 2.")


def test_a_mixture_leaves_no_options_of_an_earlier_training(tmp_path):
    (tmp_path / data_options.FILE).write_text("{}")
    data_options.save(str(tmp_path), None, None, SimpleNamespace(datasets=["a", "b"]))
    assert not (tmp_path / data_options.FILE).exists()


@pytest.mark.parametrize("content", ["{", "[]", "", '"a"'])
def test_options_that_cannot_be_read_are_named(tmp_path, capsys, content):
    file = tmp_path / data_options.FILE
    file.write_text(content)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "a", "completion": "b", "label": 1}))
    assert main(["score", "--model", str(tmp_path), "--dataset", str(rows), "--output", f"{tmp_path}/o.csv"]) == 1
    assert f"{file} does not contain the options with which training read its data" in capsys.readouterr().err


def test_no_path_of_the_machine_is_saved(trained):
    model, _ = trained
    assert json.loads((model / data_options.FILE).read_text())["dataset"] == "own rows.csv"


def test_prompts_are_the_same_whatever_else_their_messages_hold():
    plain = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    other = [
        {"role": "system", "content": "Be kind. ", "name": None},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}], "name": "Bob"},
    ]
    called = [*plain[:1], {"role": "user", "content": "Hi", "tool_calls": [{"function": {"name": "f"}}]}]
    one, two, three = hashes_of([plain, other, called])
    assert one == two != three


def test_a_transcript_has_the_prompt_of_its_messages_and_line_ends_do_not_count():
    transcript = "\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: A\nb"
    turns = [("user", "Hi"), ("assistant", "Ho"), ("user", "A\nb")]
    messages = [{"role": role, "content": content} for role, content in turns]
    windows = transcript.replace("\n", "\r\n")
    crlf = [messages[0], messages[1], {"role": "user", "content": "A\r\nb"}]
    ends = "\n\nAssistant:"
    assert len(set(hashes_of([transcript + ends, windows + ends, messages, crlf]))) == 1
    # A text with the words of a transcript, but without an answer to give, is one text
    assert len(set(hashes_of([transcript, messages, "Human: Hi", "Hi"]))) == 4


@pytest.mark.parametrize("labels", [[1, 2, 3, 4, 5, 5], [-1, 1, 1, -1, 1, -1]])
def test_ratings_are_not_converted_into_demonstrations_of_the_worst(labels):
    rows = [{"prompt": "Hi", "completion": f"No {i}", "label": label} for i, label in enumerate(labels)]
    with pytest.raises(ValueError, match=r"of 6 answers have labels outside \[0, 1\].*--label_type continuous"):
        convert("kto", Dataset.from_list(rows))
    assert convert("kto", Dataset.from_list(rows), label_type="continuous")[1].rows_out == 6


@pytest.mark.parametrize("command", ["score", "evaluate", "pointwise-dpo"])
def test_nothing_is_written_into_the_folder_of_the_data(tiny_gpt2, tmp_path, capsys, monkeypatch, command):
    # The next command would read it as rows: each row twice, and answers and rewards as rows
    row = {"prompt": "a", "completion": "b", "label": 1}
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.chdir(tmp_path / "data")
    for data, output in (("../data", "scored.jsonl"), (".", f"{tmp_path}/data/new/scored.jsonl")):
        assert main([command, "--model", tiny_gpt2, "--dataset", data, "--output", output]) == 1
        said = capsys.readouterr().err
        assert f"--output {output} is in the folder of the data, {data}, so the next command would read it" in said
    assert [file.name for file in (tmp_path / "data").rglob("*")] == ["rows.jsonl"]
    data_options.check_output("scored.jsonl", "rows.jsonl")
    data_options.check_output("../data2/scored.jsonl", ".")


def test_a_training_command_has_one_callback_of_a_class(tiny_gpt2, tmp_path, monkeypatch):
    # transformers warns about two of them in every training
    def train(trainer, **_):
        kinds = [type(each) for each in trainer.callback_handler.callbacks]
        assert len(set(kinds)) == len(kinds)
        raise ValueError("as far as this")

    monkeypatch.setattr("trl_ulma.trainer.PointwiseDPOTrainer.train", train)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{i}", "completion": "b", "label": i % 2}) + "\n" for i in range(4)))
    words = ["--model", tiny_gpt2, "--dataset", str(file), "--output", str(tmp_path / "out"), "--bf16", "false"]
    with pytest.raises(ValueError, match="as far as this"):
        pointwise_dpo.main(*pointwise_dpo.make_parser().parse_settings([*words, "--report_to", "none"]))
