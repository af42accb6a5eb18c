"""Rows are named by the file and line that the user sees in an editor, whichever part of a split they are in."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from tiny import make_tokenizer

from trl_ulma.data.files import load_files, load_rows, split_by_prompt
from trl_ulma.data.origins import StreamOrigins, located, origin, origins, places_of, with_origins
from trl_ulma.evaluation.findings import surprises
from trl_ulma.evaluation.held_out import HeldOut
from trl_ulma.judge import Judge
from trl_ulma.labels import InvalidRow, LabelRules, list_invalid
from trl_ulma.saved import SavedSettings
from trl_ulma.scripts import check
from trl_ulma.scripts.command_line import VERBOSE
from trl_ulma.scripts.score import most_notable

PROMPTS = ["How are\nyou?", "Where?", "Why?", "Who?", "When?", "How?"]
# The line on which each row begins: the first one has two
LINES = [2, 4, 5, 6, 7, 8]


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [f'"{prompt}",answer {i},{i % 2}' for i, prompt in enumerate(PROMPTS)]
    (tmp_path / "rows.csv").write_text("\n".join(["prompt,completion,label", *lines, ""]))
    return "rows.csv"


def test_rows_keep_their_lines_when_they_are_selected(file):
    rows = load_rows(file)["train"]
    assert origins(rows.select([4, 0])) == ["rows.csv, line 7", "rows.csv, line 2"]
    assert (
        with_origins([0, -1, 1], rows.select([4, 0]))
        == "0 (rows.csv, line 7 (row 6 in a spreadsheet)), -1, 1 (rows.csv, line 2)"
    )


# (text of a file, row → the row that LibreOffice and Excel show)
SHEETS = {
    "no line breaks": ("prompt,completion,label\na,b,1\nc,d,0\n", [2, 3]),
    "line breaks": ('prompt,completion,label\n"a\n\nb","c\nd",1\ne,"f\ng",0\nh,i,1\n', [2, 3, 4]),
    "in the header": ('prompt,completion,label,"a\nnote"\na,b,1,\nc,d,0,\n', [2, 3]),
    "blank lines": ('prompt,completion,label\n\n"a\nb",c,1\n\nd,e,0\n', [3, 5]),
    "a declaration": ('sep=;\nprompt;completion;label\n"a\nb";c;1\nd;e;0\n', [2, 3]),
    "lines that end as on Windows": ('prompt,completion,label\r\n"a\r\nb",c,1\r\nd,e,0\r\n', [2, 3]),
}


@pytest.mark.parametrize(("text", "rows"), SHEETS.values(), ids=SHEETS)
@pytest.mark.parametrize("name", ["rows.csv", "rows.csv.gz"])
def test_a_row_is_also_named_as_a_spreadsheet_shows_it(tmp_path, monkeypatch, name, text, rows):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    found = load_rows(name)["train"]
    lines = [int(place.rpartition(" ")[2]) for place in origins(found)]
    for i, (line, row) in enumerate(zip(lines, rows, strict=True)):
        told = "" if line == row else f" (row {row} in a spreadsheet)"
        assert origin(found, i) == f"{name}, line {line}{told}"
    stream = StreamOrigins(places_of(load_rows(name, streaming=True)["train"]))
    assert [stream(i) for i in range(len(rows))] == [origin(found, i) for i in range(len(rows))]


def test_notices_about_values_name_the_row_of_a_spreadsheet_too(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    Path("rows.csv").write_text('prompt,completion,label\n"a\nb",c &amp; d,4 stars\n,,\ne,f &amp; g,5 stars\n')
    load_rows("rows.csv")
    assert "(2 values: '4 stars' in line 2, '5 stars' in line 5 (row 4 in a spreadsheet))" in caplog.text
    assert "'&amp;' in line 5 (row 4 in a spreadsheet)" in caplog.text
    assert "rows whose fields are all empty, as in line 4 (row 3 in a spreadsheet), are left out" in caplog.text
    caplog.clear()
    other = Path("other.csv")
    other.write_text('prompt,completion,label\n"a\nb",c,4 stars\ne,f,5 stars\n')
    load_files([Path("rows.csv"), other])
    assert "'5 stars' in rows.csv, line 5 (row 4 in a spreadsheet), '4 stars' in other.csv, line 2" in caplog.text


def test_an_unclear_number_is_named_by_the_row_of_a_spreadsheet_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.csv").write_text('prompt;completion;label\n"a\nb";c;4\ne;f;1.000\n')
    with pytest.raises(
        ValueError, match=r"rows\.csv, line 4 \(row 3 in a spreadsheet\): label is '1\.000'\. Semicolons"
    ):
        load_rows("rows.csv")


def test_a_file_that_is_gone_has_lines_only(file):
    rows = load_rows(file)["train"]
    Path(file).unlink()
    assert origin(rows, 1) == "rows.csv, line 4"


def test_lines_that_cannot_be_read_are_also_named_as_a_spreadsheet_shows_them(file):
    with Path(file).open("a") as more:
        more.write("only one\nand one\n")
    with pytest.raises(
        ValueError, match=r"1 field in line 9 \(row 8 in a spreadsheet\), .* 10 \(1 field; row 9 in a spreadsheet\)"
    ):
        load_rows(file)


def test_invalid_rows_beyond_those_listed_are_also_named_as_a_spreadsheet_shows_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.csv").write_text('prompt,completion,label\n"a\nb",c,1\n' + "d,e,\n" * 25)
    rows = load_rows("rows.csv")["train"]
    errors = [
        (row, InvalidRow("is None; set it.", "label is missing", "label").at(row, "x")) for row in range(25, 0, -1)
    ]
    told = list_invalid(located(errors, rows), 26, "x")
    assert "  rows.csv, line 4 (row 3 in a spreadsheet): label is empty; set it." in told
    assert "… and 5 more: rows.csv, lines 24, 25, 26, 27, 28 (rows 23, 24, 25, 26, 27 in a spreadsheet)." in told


def test_check_names_the_line_of_each_row_that_it_shows(tiny_gpt2, file, capsys, monkeypatch):
    monkeypatch.setenv(VERBOSE, "1")  # which shows a good answer and a bad one
    assert check.main(["--model", tiny_gpt2, "--dataset", file, "--eval_strategy", "epoch", "--bf16", "false"]) == 0
    said = capsys.readouterr().out
    shown = [line.split(":")[0] for line in said.splitlines() if line.startswith("rows.csv, line")]
    assert len(shown) == 2
    for place in shown:
        row = LINES.index(int(place.split()[2]))
        assert f"⟦answer {row}<|end|>⟧" in said
    assert "Row 0" not in said


QUESTIONS = ["Why?", "Where?", "Who?", "When?", "How?", "What?"] * 2
STARS = ["5", "", "1", "2", "4,5", "3", "1", "", "5", "2", "4", "3"]


@pytest.fixture
def answers(tmp_path, monkeypatch):
    """A file whose columns have other names, with invalid rows in both halves of the split."""
    monkeypatch.chdir(tmp_path)
    rows = [f'{question},{"" if i == 2 else f"answer {i}"},"{STARS[i]}"' for i, question in enumerate(QUESTIONS)]
    (tmp_path / "answers.csv").write_text("\n".join(["question,reply,stars", *rows, ""]))
    return ["--dataset", "answers.csv", "--columns", "prompt=question,completion=reply,label=stars"]


FOUND = [
    "  answers.csv, line 3: stars is empty; it must be a number. Prompt: 'Where?'",
    "  answers.csv, line 4: reply is empty, so there is nothing to learn. Fill it in, or drop the row. Prompt: 'Who?'",
    "  answers.csv, line 6: stars is the text '4,5'; it must be a number. Did you mean 4.5? Write it "
    "as in 0.5 or 1234, with a decimal point and without separators. Prompt: 'How?'",
    "  answers.csv, line 9: stars is empty; it must be a number. Prompt: 'Where?'",
]


def test_check_lists_the_invalid_rows_of_both_halves_of_a_split_as_one_file(tiny_gpt2, answers, capsys):
    halves = split_by_prompt(load_rows("answers.csv", columns=answers[3])["train"], test_size=0.5, seed=0)
    for half in halves.values():
        assert {origin(half, row)[-1] for row in range(len(half))} & {"3", "4", "6", "9"}
    words = ["--method", "pointwise-dpo", "--label_type", "continuous", "--bf16", "false", "--seed", "0"]
    assert check.main(["--model", tiny_gpt2, *answers, *words, "--test_split_size", "0.5"]) == 1
    said, remedy = capsys.readouterr().err.split("\n\nTo leave these 4 rows out:\n")
    first, *lines = said.splitlines()[-5:]
    assert first.endswith("error: 4 of 12 rows are invalid:")
    assert lines == FOUND
    assert remedy.count("--invalid_rows drop") == 1


def test_invalid_rows_of_one_half_keep_the_name_of_the_dataset(tiny_gpt2, answers, capsys, caplog):
    words = ["--method", "pointwise-dpo", "--label_type", "continuous", "--bf16", "false", "--eval_strategy", "no"]
    assert check.main(["--model", tiny_gpt2, *answers, *words]) == 1
    first, *lines = capsys.readouterr().err.split("\n\nTo leave these 4 rows out")[0].splitlines()[-5:]
    assert first.endswith("error: 4 of 12 rows of the train dataset are invalid:")
    assert lines == FOUND
    assert check.main(["--model", tiny_gpt2, *answers, *words, "--invalid_rows", "drop"]) == 0
    kinds = (("stars is empty (2 rows", "lines 3, 9"), ("reply is empty (1 row", "line 4"))
    kinds += (("stars is no number (1 row", "line 6"),)
    reasons = "; ".join(f"{kind}: answers.csv, {lines})" for kind, lines in kinds)
    assert f"Left out 4 of 12 rows of the train dataset. Reasons: {reasons}." in caplog.messages


def test_scored_rows_have_their_line(file):
    settings = SavedSettings(beta=0.1)
    judge = Judge(settings, make_tokenizer(), lambda rows: np.arange(len(rows), dtype=float))
    rows = load_rows(file)["train"].select([5, 3, 1])
    scored = judge.score(rows)
    assert scored["file_line"][:] == ["rows.csv, line 8", "rows.csv, line 6", "rows.csv, line 4"]
    assert scored.column_names[3:6] == ["row", "file_line", "reward"]
    (first, *_) = most_notable(scored.sort("surprise", reverse=True))[1:]
    assert first.startswith("  rows.csv, line 8 (row 7 in a spreadsheet): label 1, predicted 0.50")
    assert "file_line" not in judge.score(Dataset.from_dict({"prompt": ["Hi"], "completion": ["Ho"]})).column_names


def test_surprising_rows_of_an_evaluation_have_their_line(file, tmp_path):
    (tmp_path / file).write_text((tmp_path / file).read_text().replace("answer 2", ""))
    rows = load_rows(file, invalid_rows="mark")["train"].select([5, 2, 0])
    held_out = HeldOut.of(rows, "test", LabelRules(), "drop")
    assert held_out.places == ["rows.csv, line 8", "rows.csv, line 2"]
    label = held_out.label
    found = surprises(
        np.array([0.0, 9.0]), label, label, label > 1, LabelRules(), held_out.rows, [0, 1], held_out.places
    )
    assert [each["file_line"] for each in found] == [
        "rows.csv, line 2",
        "rows.csv, line 8 (row 7 in a spreadsheet)",
    ]
    json.dumps(found)


def test_check_names_the_line_of_a_label_far_outside_the_others(tiny_gpt2, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [f"Why {i}?,answer {i},{55 if i == 7 else i % 5 + 1}" for i in range(20)]
    (tmp_path / "stars.csv").write_text("\n".join(["prompt,completion,label", *rows, ""]))
    argv = ["--method", "pointwise-dpo", "--model", tiny_gpt2, "--dataset", "stars.csv", "--label_type", "continuous"]
    assert check.main([*argv, "--label_transform", "standardize", "--eval_strategy", "no", "--bf16", "false"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "which are between 1 and 5: 55 (stars.csv, line 9, prompt 'Why 7?')." in said


def test_check_names_a_held_out_label_far_outside_the_others(tiny_gpt2, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    Path("rows").mkdir()
    for name, extra in (("train", ["Who 7?,So.,66"]), ("test", ["Who?,So.,-44", "Who?,No.,5"])):
        rows = [f"{name} {i}?,answer {i},{i % 5 + 1}" for i in range(20 if name == "train" else 2)]
        (Path("rows") / f"{name}.csv").write_text("\n".join(["prompt,completion,label", *rows, *extra, ""]))
    argv = ["--method", "pointwise-dpo", "--model", tiny_gpt2, "--dataset", "rows", "--bf16", "false"]
    argv += ["--eval_strategy", "epoch"]
    for settings in (
        ["continuous", "--label_transform", "standardize"],
        ["binary", "--label_transform", "threshold:4"],
    ):
        caplog.clear()
        assert check.main([*argv, "--label_type", *settings]) == 0
        (warned,) = [message for message in caplog.messages if "far outside" in message]
        assert warned.startswith(
            "The eval dataset: 1 label is far outside the others, which are between 1 and 5: -44 ("
        )
        assert "rows/test.csv, line 4, prompt 'Who?')." in warned


def test_check_names_repeated_and_contradicting_held_out_rows(tiny_gpt2, tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    folder, file = Path("rows"), "rows/test.csv"
    folder.mkdir()
    text = "prompt,completion,label\n" + "".join(f"{each}\n" for each in ("Why?,So.,5", "Why?,No.,1"))
    (folder / "train.csv").write_text(text)
    Path(file).write_text(text.replace("Why", "Who") + "Who?,So.,4\nWho?,No.,1\n")
    argv = ["--method", "pointwise-dpo", "--model", tiny_gpt2, "--dataset", "rows", "--bf16", "false"]
    argv += ["--label_type", "continuous", "--label_transform", "standardize", "--eval_strategy", "epoch"]
    assert check.main(argv) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "The eval dataset: 4 rows repeated 1 row, which is kept: " in said
    assert f"{file}, line 3 and line 5 contradicting 2 rows" in said
    (warned,) = [message for message in caplog.messages if "contradict" in message]
    assert warned.startswith("The eval dataset: 2 rows contradict one another: the same prompt and completion with")
    assert f"{file}, line 2 (5) and line 4 (4). This is expected" in warned
