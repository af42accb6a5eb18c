"""Invalid rows and the rendering of rows, as the commands take and show them."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import yaml
from datasets import Dataset
from world import make_rows, make_trainer

from trl_ulma.evaluation.held_out import HeldOut
from trl_ulma.labels import LabelRules
from trl_ulma.scripts import check, pointwise_dpo
from trl_ulma.scripts.cli import main
from trl_ulma.scripts.command_line import VERBOSE
from trl_ulma.scripts.evaluate import make_parser as evaluate_parser
from trl_ulma.scripts.score import make_parser as score_parser

GOOD = {"prompt": "How are you today?", "completion": " Fine.", "label": 1}
ROWS = [
    GOOD,
    GOOD | {"label": None},
    GOOD | {"prompt": "What is this?", "completion": ""},
    GOOD | {"completion": " Go away.", "label": 0},
    GOOD | {"label": 3},
]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def test_check_lists_all_invalid_rows_or_leaves_them_out(tiny_gpt2, file, capsys, caplog, monkeypatch):
    command = ["--method", "ulma", "--model", tiny_gpt2, "--dataset", file, "--eval_strategy", "no"]
    command += ["--max_length", "64"]
    assert check.main([*command[:-4], "--eval_strategy", "epoch"]) == 1
    assert "held out" not in capsys.readouterr().out  # the split is shown after the rows are corrected
    assert check.main(command) == 1
    shown, said = capsys.readouterr()
    assert shown.strip() == ""  # the other rows are shown when these are corrected or left out
    assert "error: 3 of 5 rows of the train dataset are invalid:" in said
    for line in (2, 3, 5):
        assert said.count(f"{file}, line {line}") == 1
    assert "line 2: label is None;" in said  # JSON has null, and no empty cells
    assert "Prompt: 'What is this?'" in said
    without = shlex.join(["trl-ulma", "check", *command, "--invalid_rows", "drop"])
    assert said.replace(" \\\n       ", "").endswith(
        f"\n\nTo leave these 3 rows out:\n\n    {without}\n\nOr correct them, and check again. "
        "If you delete rows, begin with the last one, because the lines below it move up.\n"
    )
    assert check.main([*command, "--invalid_rows=error"]) == 1
    assert "--invalid_rows drop" in (said := capsys.readouterr().err)
    assert "--invalid_rows=error" not in said

    assert check.main([*command, "--invalid_rows", "drop"]) == 0
    shown = capsys.readouterr().out
    assert "Ready." in shown
    assert "invalid." not in shown
    assert "Labels of the train dataset: 2 rows" in shown
    assert "left out" not in shown  # a warning says it, with the lines
    assert f"label is missing (1 row: {file}, line 2)" in caplog.text
    monkeypatch.setenv(VERBOSE, "1")
    assert check.main([*command, "--invalid_rows", "drop"]) == 0
    assert "invalid: label is missing (1 row)" in capsys.readouterr().out
    monkeypatch.delenv(VERBOSE)
    assert "--length_normalize True" in shown
    assert "Rows as the model sees them" in shown


def test_training_counts_what_check_lists(tiny_gpt2, file, tmp_path, capsys, caplog, monkeypatch):
    words = ["--model", tiny_gpt2, "--dataset", file, "--max_length", "64", "--invalid_rows", "drop", "--max_steps=1"]
    words += ["--output", str(tmp_path / "out"), "--report_to", "none"]
    pointwise_dpo.main(*pointwise_dpo.make_parser().parse_settings(words))
    kinds = (("label is missing", 2), ("completion is empty", 3), ("label outside [0, 1]", 5))
    reasons = "; ".join(f"{kind} (1 row: {file}, line {line})" for kind, line in kinds)
    command = "`trl-ulma check --method pointwise-dpo`"
    # All of them are named
    assert f"Left out 3 of 5 rows of the train dataset. Reasons: {reasons}." in caplog.messages
    said = capsys.readouterr().out
    assert "Labels of the train dataset: 2 rows, 1 prompt\nbinary labels: 2 rows, mean 0.5" in said
    assert f"The whole report: {tmp_path / 'out' / 'label_report.json'}, or {command} with the same options." in said
    assert "answers per prompt" not in said
    assert "! Better answers are longer" in said
    assert "--length_normalize True" in said

    monkeypatch.setenv(VERBOSE, "1")
    pointwise_dpo.main(*pointwise_dpo.make_parser().parse_settings(words))
    assert "answers per prompt" in capsys.readouterr().out
    assert f"  {file}, line 2: label is None;" in caplog.text


def test_errors_of_settings_and_ratings_do_not_hide_invalid_rows(tiny_gpt2, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    command = ["--method", "pointwise-dpo", "--model", tiny_gpt2, "--dataset", str(path), "--max_length", "64"]
    command += ["--eval_strategy", "no"]
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    # The rows that are valid cannot be compared within their prompt
    assert check.main([*command, "--log_z", "group"]) == 1
    assert "error: 3 of 5 rows of the train dataset are invalid:" in capsys.readouterr().err
    path.write_text("".join(json.dumps(GOOD | {"label": stars}) + "\n" for stars in (1, 3, 4, 5)))
    assert check.main(command) == 1
    shown, said = capsys.readouterr()
    assert "Labels of the train dataset" not in shown
    assert "error: 3 of 4 rows of the train dataset are invalid:" in said
    assert "--label_type continuous" in said


def test_more_than_twenty_invalid_rows_have_their_lines(tiny_gpt2, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS[:1], *[ROWS[1]] * 23, ROWS[3]]))
    assert check.main(["--model", tiny_gpt2, "--dataset", str(path), "--eval_strategy", "no"]) == 1
    said = capsys.readouterr().err
    assert f"  {path}, line 21: " in said
    assert f"  … and 3 more: {path}, lines 22, 23, 24." in said


def test_check_shows_what_becomes_of_text_and_what_is_scored(tiny_llama, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD | {"label": 0}) + "\n")
    command = ["--model", tiny_llama, "--dataset", str(path), "--eval_strategy", "no", "--max_length", "64"]
    assert check.main([*command, "--chat", "true", "--system_message", "No."]) == 0
    shown = " ".join(capsys.readouterr().out.split())  # lines are as long as the terminal is wide
    assert "<|system|>No.<|end|><|user|>How are you today?<|end|><|assistant|>⟦Fine.<|end|>⟧" in shown
    assert check.main([*command, "--chat", "false"]) == 0
    assert "How are you today?⟦ Fine.<|end|>⟧" in " ".join(capsys.readouterr().out.split())

    turns = [{"role": "assistant", "content": "The cat."}, {"role": "user", "content": "No."}]
    turns.append({"role": "assistant", "content": "Paris."})
    row = {"prompt": [{"role": "user", "content": "What?"}], "completion": turns, "label": 1}
    path.write_text(json.dumps(row) + "\n" + json.dumps(row | {"label": 0}) + "\n")
    assert check.main(command) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "⟦The cat.<|end|>⟧<|user|>No.<|end|><|assistant|>⟦Paris.<|end|>⟧" in shown


def test_scoring_leaves_invalid_rows_out(tiny_gpt2, tmp_path):
    trainer = make_trainer(tiny_gpt2, make_rows(4), tmp_path, invalid_rows="drop")
    scored = trainer.score(Dataset.from_list(ROWS))
    assert scored["row"][:] == [0, 1, 3]  # a label is optional
    trainer.args.invalid_rows = "error"
    with pytest.raises(ValueError, match=r"^2 of 5 rows of the scored dataset are invalid:"):
        trainer.score(Dataset.from_list(ROWS))


def test_evaluation_leaves_invalid_rows_out(caplog):
    rows = Dataset.from_list(ROWS)
    with pytest.raises(ValueError, match=r"(?s)^3 of 5 rows of the test dataset .*Row 1 .*Row 2 .*Row 4 "):
        HeldOut.of(rows, "test", LabelRules())
    held_out = HeldOut.of(rows, "test", LabelRules(), "drop")
    assert np.array_equal(held_out.label, [1.0, 0.0])
    assert len(held_out.rows) == len(held_out.prompt) == 2
    assert caplog.messages[0].startswith("Left out 3 of 5 rows of the test dataset. They are invalid.\n3 of 5 rows of")
    with pytest.raises(ValueError, match=r"^3 of 3 rows"):
        HeldOut.of(rows.select([1, 2, 4]), "test", LabelRules(), "drop")


RAGGED = """prompt,completion,label
How are you?,Fine.,1
What is 2 + 2?,Well, numbers are hard.,0
Who are you?,A bot.,maybe
Why?
Where?,Here.,0
"""
WRONG = ("line 3 has 4 fields, but 3 columns", "line 4: label is the text 'maybe'", "line 5 has 1 field, but 3 columns")


@pytest.fixture
def ragged(tmp_path):
    path = tmp_path / "ragged.csv"
    path.write_text(RAGGED)
    return str(path)


def test_lines_that_cannot_be_read_are_invalid_rows(tiny_gpt2, ragged, tmp_path, capsys, caplog):
    out = tmp_path / "out"
    model = ["--model", tiny_gpt2, "--dataset", ragged]
    training = [*model, "--eval_strategy", "no", "--max_length", "64", "--bf16", "false", "--report_to", "none"]
    training += ["--max_steps", "1", "--use_cpu", "true", "--disable_tqdm", "true"]
    assert check.main(training) == 1
    said = capsys.readouterr().err
    assert "error: 3 of 5 rows of the train dataset are invalid:" in said
    for what in WRONG:
        assert f"  {ragged}, {what}" in said
    assert "By kind" not in said  # a list of few rows is not counted

    training += ["--output", str(out), "--invalid_rows", "drop"]
    pointwise_dpo.main(*pointwise_dpo.make_parser().parse_settings(training))
    found = json.loads((out / "label_report.json").read_text())
    assert found["left_out"] == {"invalid: a row that cannot be read": 2, "invalid: label is no number": 1}

    scored, report = str(tmp_path / "scored.jsonl"), str(tmp_path / "report")
    commands = (["score", "--output", scored], ["evaluate", "--split", "train", "--output", report])
    for command, *words in commands:
        words += ["--model", str(out), "--dataset", ragged]
        assert main([command, *words, "--invalid_rows", "error"]) == 1
        said = capsys.readouterr().err
        for what in WRONG:
            assert what in said, command
        caplog.clear()
        assert main([command, *words]) == 0  # as in training
        (counted,) = [each for each in caplog.messages if each.startswith("Left out")]
        assert f"a row that cannot be read (2 rows: {ragged}, lines 3, 5)" in counted
        assert "lists all invalid rows" not in counted  # they are all named
        assert "\n" not in counted
    written = [json.loads(line) for line in Path(scored).read_text().splitlines()]
    assert sorted(row["row"] for row in written) == [0, 4]
    assert "unread_line" not in written[0]


def test_labels_that_label_map_lacks_are_invalid_rows(tiny_gpt2, ragged, capsys):
    Path(ragged).write_text("prompt,completion,label\nHi,Yo,up\nHo,No,meh\nHe,Ya,down\nHu\n")
    words = ["--model", tiny_gpt2, "--dataset", ragged, "--label_map", "up=1,down=0", "--max_length", "64"]
    assert check.main([*words, "--eval_strategy", "no"]) == 1
    said = capsys.readouterr().err
    assert "2 of 4 rows of the train dataset are invalid:" in said
    assert f"  {ragged}, line 3 has the label 'meh', which --label_map does not contain" in said
    assert "Prompt: 'Ho'" in said
    assert check.main([*words, "--eval_strategy", "no", "--invalid_rows", "drop"]) == 0


def test_prepare_counts_lines_that_cannot_be_read(tmp_path, capsys):
    raw = tmp_path / "rows.jsonl"
    good = {"prompt": "Hi", "completion": "Hello!", "label": True}
    raw.write_text(
        "".join(f"{line}\n" for line in ("{oops", json.dumps(good), "[1]", json.dumps(good | {"prompt": "Ho"})))
    )
    words = ["prepare", "kto", "--input", str(raw), "--output", str(tmp_path / "out.jsonl")]
    assert main(words) == 1
    assert "rows.jsonl is invalid JSON in line 1" in capsys.readouterr().err
    assert main([*words, "--invalid_rows", "drop", "--report", str(tmp_path / "report.json")]) == 0
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["left_out"] == {"it cannot be read": {"count": 2, "first_row": 0}}
    assert (found["rows_in"], found["rows_out"]) == (4, 2)


@pytest.mark.parametrize("streaming", [False, True])
def test_lines_that_cannot_be_read_in_streams_pairs_and_mixtures(tiny_gpt2, tmp_path, ragged, streaming, capsys):
    pairs, chats = tmp_path / "pairs.csv", tmp_path / "rows.jsonl"
    pairs.write_text("prompt,chosen,rejected\nHi,Hello!,Go.\nHo,Hello!,\nHe,Hello!\n,,\nHm,No,Yes\n")
    chats.write_text("{oops\n" + json.dumps(GOOD) + "\n" + json.dumps(GOOD | {"label": 7}) + "\n")
    words = ["--model", tiny_gpt2, "--eval_strategy", "no", "--max_length", "64", "--bf16", "false", "--max_steps", "1"]
    config = tmp_path / "run.yaml"
    parts = [{"path": str(path)} for path in (pairs, ragged, chats)]
    config.write_text(yaml.safe_dump({"datasets": parts, "streaming": streaming}))
    own = ["--dataset", str(pairs), *(["--dataset_streaming", "true"] if streaming else [])]
    for command, wrong in (
        (own, [(pairs, 4)]),
        (["--config", str(config)], [(pairs, 4), (ragged, 3), (ragged, 4), (ragged, 5), (chats, 1), (chats, 3)]),
    ):
        assert check.main([*command, *words]) == 1
        said = capsys.readouterr().err
        for file, line in wrong:
            assert re.search(rf"{re.escape(str(file))}, line {line}\b", said), (file, line, said)
        assert check.main([*command, *words, "--invalid_rows", "drop"]) == 0
        capsys.readouterr()


@pytest.mark.parametrize("parser", [evaluate_parser, score_parser])
def test_the_commands_have_the_option(parser, capsys):
    words = ["--model", "m", "--dataset", "d", "--output", "o.jsonl"]
    assert parser().parse_args(words).invalid_rows is None  # as in training
    assert parser().parse_args([*words, "--invalid_rows", "drop"]).invalid_rows == "drop"
    with pytest.raises(SystemExit):
        parser().parse_args([*words, "--invalid_rows", "skip"])
