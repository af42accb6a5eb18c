"""Strict and lenient raters on the command line: the warning, a training, its evaluation and scores."""

import csv
import json
import shlex

import numpy as np
import pytest

from trl_ulma.labels.rater_offsets import rater_offsets
from trl_ulma.scripts import pointwise_dpo
from trl_ulma.scripts.cli import main

COLUMNS = "prompt=question,completion=reply,label=stars"
TRANSFORM = "center_raters,standardize"
PEOPLE = {"mira": -1.0, "tom": 1.0, "jo": 0.0}


def cells(rows: int = 120) -> list[tuple[str, str, int, str]]:
    random = np.random.default_rng(0)
    who = [*PEOPLE] * (rows // 3)
    stars = [int(np.clip(np.round(3 + PEOPLE[each] + random.normal()), 1, 5)) for each in who]
    return [(f"Why {i // 2}?", f"answer {i}", stars[i], who[i]) for i in range(rows)]


def write(path, rows) -> str:
    path.write_text("\n".join(["question,reply,stars,who", *(",".join(map(str, row)) for row in rows), ""]))
    return str(path)


@pytest.fixture(scope="module")
def trained(tiny_gpt2, tmp_path_factory):
    """(folder of the model, its file, whose last row has no rater)."""
    folder = tmp_path_factory.mktemp("raters")
    file = write(folder / "rows.csv", [*cells(), ("Who?", "nobody", 3, "")])
    words = ["--model", tiny_gpt2, "--dataset", file, "--columns", f"{COLUMNS},rater=who", "--label_type", "continuous"]
    words += ["--label_transform", TRANSFORM, "--max_steps", "1", "--bf16", "false", "--report_to", "none"]
    words += ["--output", str(folder / "out"), "--learning_rate", "1e-3", "--eval_strategy", "no"]
    pointwise_dpo.main(*pointwise_dpo.make_parser().parse_settings(words))
    return folder / "out", file


def test_check_prints_the_options_that_remove_the_difference(tiny_gpt2, tmp_path, capsys):
    file = write(tmp_path / "rows.csv", cells())
    argv = ["check", "--method", "pointwise-dpo", "--model", tiny_gpt2, "--dataset", file, "--bf16", "false"]
    assert main([*argv, "--columns", COLUMNS, "--label_type", "continuous"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    options = f"--columns {COLUMNS},rater=who and --label_transform {TRANSFORM}"
    assert "! Labels differ by the column who, which is not read: mira" in said
    assert f"If it names raters, set {options}. If it names what was rated, such as" in said
    # They are right as they are printed, and nothing is left to warn of
    words = shlex.split(options.replace(" and ", " "))
    assert main([*argv, "--label_type", "continuous", *words]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Labels differ" not in said
    assert "raters 3, whose strictness is removed. Compared with an average rater: mira -" in said
    assert " 3 → " in said
    # With the column named, but without the transform, the warning is the same
    assert main([*argv, "--label_type", "continuous", "--columns", f"{COLUMNS},rater=who"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Labels differ by the column who, which is not read: mira" in said
    assert f"If it names raters, set --label_transform {TRANSFORM}. If it names what" in said


def test_names_that_are_nearly_alike_are_told(tiny_gpt2, tmp_path, capsys):
    rows = [(*row, f" {who} " if i % 2 else who.upper()) for i, (*row, who) in enumerate(cells())]
    file = write(tmp_path / "rows.csv", rows)
    argv = ["check", "--method", "pointwise-dpo", "--model", tiny_gpt2, "--dataset", file, "--bf16", "false"]
    options = ["--columns", f"{COLUMNS},rater=who", "--label_type", "continuous", "--label_transform", TRANSFORM]
    assert main([*argv, *options]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "count as different ones: 'JO' and 'jo'; 'MIRA' and 'mira'; 'TOM' and 'tom'. If they are the same" in said


def test_thumbs_and_other_transforms_have_options_of_their_own(tiny_gpt2, tmp_path, capsys):
    thumbs = [(prompt, reply, int(stars > 3), who) for prompt, reply, stars, who in cells()]
    file = write(tmp_path / "thumbs.csv", thumbs)
    argv = ["check", "--method", "pointwise-dpo", "--model", tiny_gpt2, "--bf16", "false", "--columns", COLUMNS]
    assert main([*argv, "--dataset", file]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"rater=who, --label_type continuous and --label_transform {TRANSFORM}. If" in said
    file = write(tmp_path / "rows.csv", cells())
    assert main([*argv, "--dataset", file, "--label_transform", "lower_is_better:5,min_max"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "rater=who and --label_transform lower_is_better:5,center_raters,min_max. If" in said


def test_a_column_that_is_not_named_is_proposed(tiny_gpt2, tmp_path, capsys):
    file = write(tmp_path / "rows.csv", cells())
    argv = ["check", "--method", "pointwise-dpo", "--model", tiny_gpt2, "--dataset", file, "--bf16", "false"]
    options = ["--columns", COLUMNS, "--label_type", "continuous", "--label_transform", TRANSFORM]
    assert main([*argv, *options]) == 1
    assert f"the column who, rename that to rater (on the command line --columns {COLUMNS},rater=who)." in (
        capsys.readouterr().err
    )


def test_offsets_are_saved_and_the_card_is_short(trained):
    model, _ = trained
    steps = json.loads((model / "pointwise.json").read_text())["label_transform"]
    wanted = rater_offsets(np.array([float(row[2]) for row in cells()]), [row[3] for row in cells()])
    assert steps[0] == {"name": "center_raters", "numbers": pytest.approx([*wanted.values()]), "raters": [*wanted]}
    assert wanted["mira"] < wanted["jo"] < wanted["tom"]
    card = (model / "README.md").read_text()
    assert "| `label_transform` | center_raters,standardize:" in card
    assert "mira" not in card
    assert json.loads((model / "label_report.json").read_text())["raters"] == pytest.approx(wanted)


@pytest.fixture
def later(tmp_path):
    """A file with a known, an unseen and no rater."""
    rows = [("New 1?", "one", 4, "mira"), ("New 2?", "two", 4, "zoe"), ("New 3?", "three", 4, ""), ("a", "b", 2, "tom")]
    return write(tmp_path / "later.csv", rows)


def test_score_reads_labels_by_their_rater(trained, later, tmp_path, capsys, caplog):
    model, _ = trained
    output = tmp_path / "scored.jsonl"
    assert main(["score", "--model", str(model), "--dataset", later, "--output", str(output), "--sort", "row"]) == 0
    assert "1 of 4 rows of the scored dataset has no rater. 1 of 4 has a rater that the training does no" in caplog.text
    scored = [json.loads(line) for line in output.read_text().splitlines()]
    raters, standardize = json.loads((model / "pointwise.json").read_text())["label_transform"]
    offsets, (mean, std) = dict(zip(raters["raters"], raters["numbers"], strict=True)), standardize["numbers"]
    for row in scored:
        learned = (row["stars"] - offsets.get(row["who"] or "", 0.0) - mean) / std
        assert row["surprise"] == pytest.approx((learned - row["reward"]) ** 2, rel=1e-5)
        # What this rater is expected to give, so that it can be compared with the label in the file
        expected = row["reward"] * std + mean + offsets.get(row["who"] or "", 0.0)
        assert row["predicted_label"] == pytest.approx(expected)
    # Rows without labels need no raters
    (tmp_path / "answers.csv").write_text("question,reply\nWhy?,So.\n")
    caplog.clear()
    argv = ["score", "--model", str(model), "--dataset", str(tmp_path / "answers.csv"), "--output", str(output)]
    assert main(argv) == 0
    assert "rater" not in caplog.text


def test_evaluate_reads_labels_by_their_rater_and_its_report_says_it(trained, later, tmp_path, capsys):
    model, _ = trained
    argv = ["evaluate", "--model", str(model), "--dataset", later, "--split", "train", "--output", str(tmp_path / "e")]
    assert main(argv) == 0
    facts = json.loads((tmp_path / "e" / "report.json").read_text())
    (note,) = [note for note in facts["notes"] if "rater" in note and "Labels are read" not in note]
    assert note == (
        "1 of 4 rows of the train dataset has no rater. 1 of 4 has a rater that the training does not have: 'zoe'. "
        "Such labels are read as those of an average rater."
    )
    assert facts["data"]["labels"] == {"2": 1, "4": 3}
    raters, standardize = json.loads((model / "pointwise.json").read_text())["label_transform"]
    offsets = dict(zip(raters["raters"], raters["numbers"], strict=True))
    with open(later, newline="") as file:
        whose = [offsets.get(row["who"], 0.0) + standardize["numbers"][0] for row in csv.DictReader(file)]
    assert any(offsets.values())
    assert facts["models"][0]["own_scale"]["knows_raters"]
    assert sorted(row["predicted_before"] for row in facts["models"][0]["surprises"]) == pytest.approx(sorted(whose))
    found = facts["models"][0]["implicit_reward"]["mse"]["value"]
    # The transform as it was printed is the saved one
    printed = facts["data"]["label_transform"]
    assert printed.startswith("center_raters,standardize:")
    assert main([*argv, "--label_transform", printed]) == 0
    again = json.loads((tmp_path / "e" / "report.json").read_text())
    assert again["models"][0]["implicit_reward"]["mse"]["value"] == pytest.approx(found, abs=1e-9)
    assert main([*argv, "--label_transform", TRANSFORM]) == 1
    assert "(quantile and center_raters take none)" in capsys.readouterr().err


def test_parts_of_a_mixture_name_their_own_columns_of_raters(tiny_gpt2, tmp_path, capsys):
    write(tmp_path / "a.csv", cells())
    answers = [{"prompt": f"How {i}?", "completion": "So.", "label": 3.0 + (i == 5), "by": 7} for i in range(6)]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    (tmp_path / "c.jsonl").write_text(json.dumps({"prompt": "Hi", "completion": "Hm.", "label": 4.0}) + "\n")
    names = dict(each.split("=") for each in f"{COLUMNS},rater=who".split(","))
    parts = [
        {"path": str(tmp_path / "a.csv"), "columns": names},
        {"path": str(tmp_path / "b.jsonl"), "columns": {"rater": "by"}},
        {"path": str(tmp_path / "c.jsonl")},
    ]
    settings = {"datasets": parts, "label_type": "continuous", "label_transform": TRANSFORM, "bf16": False}
    (tmp_path / "run.yaml").write_text(json.dumps({"model_name_or_path": tiny_gpt2, "chat": "false", **settings}))
    assert main(["check", "--method", "pointwise-dpo", "--config", str(tmp_path / "run.yaml")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "raters 4, whose strictness is removed. Compared with an average rater: mira -" in said
    assert " 7 " in said
