"""Invalid rows and the rendering of rows, as the commands take and show them."""

import json

import numpy as np
import pytest
from datasets import Dataset
from world import make_rows, make_trainer

from trl_ulma.evaluation.held_out import HeldOut
from trl_ulma.labels import LabelRules
from trl_ulma.scripts import check
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


def test_check_lists_all_invalid_rows_or_leaves_them_out(tiny_gpt2, file, capsys):
    command = ["--model", tiny_gpt2, "--dataset", file, "--eval_strategy", "no", "--max_length", "64"]
    assert check.main(command) == 1
    said = capsys.readouterr().err
    assert "error: 3 of 5 rows of the train dataset are invalid:" in said
    for row in (1, 2, 4):
        assert f"  Row {row} of the train dataset" in said
    assert "Prompt: 'What is this?'" in said
    assert "1 × label is missing; 1 × completion is empty; 1 × label outside [0, 1]" in said

    assert check.main([*command, "--invalid_rows", "drop"]) == 0
    shown = capsys.readouterr().out
    assert "Labels of the train dataset: 2 rows" in shown
    assert "left out" in shown
    assert "1: invalid: label is missing" in shown


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
    assert caplog.messages[0].startswith("Left out 3 of 5 rows, which are invalid.\n3 of 5 rows of the test dataset")
    with pytest.raises(ValueError, match=r"^3 of 3 rows"):
        HeldOut.of(rows.select([1, 2, 4]), "test", LabelRules(), "drop")


@pytest.mark.parametrize("parser", [evaluate_parser, score_parser])
def test_the_commands_have_the_option(parser, capsys):
    words = ["--model", "m", "--dataset", "d", "--output", "o.jsonl"]
    assert parser().parse_args(words).invalid_rows == "error"
    assert parser().parse_args([*words, "--invalid_rows", "drop"]).invalid_rows == "drop"
    with pytest.raises(SystemExit):
        parser().parse_args([*words, "--invalid_rows", "skip"])
