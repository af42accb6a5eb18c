"""What `trl-ulma score` writes and says of scored rows, whatever scored them."""

import csv
import json
from pathlib import Path

from datasets import Dataset
from world import make_trainer

from trl_ulma.data.files import load_rows
from trl_ulma.scripts.cli import main
from trl_ulma.scripts.score import most_surprising, summary, write

TURNS = [{"role": "user", "content": "Hi"}]
CALL = {"type": "function", "function": {"name": "now", "arguments": {"zone": "CET"}}}
ROWS = [
    {
        "prompt": TURNS,
        "completion": [{"role": "assistant", "content": f"It's “{i}”,\\nsir", "tool_calls": [CALL]}],
        "label": float(i % 2),
        "row": i,
        "reward": 0.1 * i,
        "predicted_label": 0.5,
        "surprise": float(i),
    }
    for i in range(7)
]


def test_cells_of_conversations_are_json(tmp_path):
    scored = Dataset.from_list(ROWS)
    write(scored, tmp_path / "scored.csv")
    with open(tmp_path / "scored.csv", newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert [json.loads(row["prompt"]) for row in found] == [TURNS] * 7
    assert [json.loads(row["completion"]) for row in found] == scored["completion"][:]
    assert [float(row["reward"]) for row in found] == scored["reward"][:]
    assert list(found[0]) == scored.column_names
    write(scored, tmp_path / "scored.jsonl")
    assert Dataset.from_json(str(tmp_path / "scored.jsonl"))["completion"][:] == scored["completion"][:]
    plain = Dataset.from_dict({"prompt": ["a", "b"], "completion": ["[1]", None], "row": [0, 1]})
    write(plain, tmp_path / "plain.csv")
    with open(tmp_path / "plain.csv", newline="", encoding="utf-8") as file:
        assert [row["completion"] for row in csv.DictReader(file)] == ["[1]", ""]


def test_halves_of_pairs_are_counted_as_answers():
    rows = Dataset.from_dict({"prompt": ["a", "b"], "chosen": ["c", "d"], "rejected": ["e", ""]})
    scored = Dataset.from_dict({"row": [0, 0, 1], "surprise": [3.0, 2.0, 1.0]})
    said = "out.csv holds 3 scored answers of 2 pairs, the most surprising first; 1 of 4 were left out."
    assert summary(Path("out.csv"), rows, scored, "surprise") == said
    rows = Dataset.from_dict({"prompt": ["a"] * 4, "completion": ["b"] * 4})
    assert summary(Path("o"), rows, scored, "row") == "o holds 3 scored rows; 1 of 4 were left out."


def test_the_five_most_surprising_rows_are_shown():
    lines = most_surprising(Dataset.from_list(ROWS))
    assert len(lines) == 6
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["row 6", "row 5", "row 4", "row 3", "row 2"]
    assert lines[2].startswith("  row 5: label 1, predicted 0.50: ")
    pairs = Dataset.from_dict(
        {
            "chosen": ["good " * 30] * 2,
            "rejected": ["bad"] * 2,
            "label": [1.0, 0.0],
            "row": [0, 0],
            "predicted_label": [0.5, 0.5],
            "surprise": [1.0, 2.0],
        }
    )
    first, second = most_surprising(pairs)[1:]
    assert first.endswith(": bad")
    assert second.endswith("…")
    assert len(second) < 130
    assert most_surprising(pairs.remove_columns("surprise")) == []


def test_rows_have_the_rewards_of_the_format_trained_on_whatever_file_they_come_from(tiny_llama, tmp_path):
    texts = [{"prompt": f"What is {i}?", "completion": f"It is {i}.", "label": i % 2} for i in range(8)]
    Dataset.from_list(texts).to_csv(tmp_path / "rows.csv")
    Dataset.from_list(texts).to_json(tmp_path / "rows.jsonl")
    found = {}
    for trained_on in ("csv", "jsonl"):  # which become conversations, and which stay text
        trainer = make_trainer(
            tiny_llama, load_rows(tmp_path / f"rows.{trained_on}")["train"], tmp_path / trained_on, max_steps=3
        )
        trainer.train()
        trainer.save_model()
        for scored in ("csv", "jsonl"):
            output = tmp_path / f"{trained_on}-{scored}.jsonl"
            argv = ["--model", str(tmp_path / trained_on), "--dataset", str(tmp_path / f"rows.{scored}")]
            assert main(["score", *argv, "--ref_model", tiny_llama, "--sort", "row", "--output", str(output)]) == 0
            found[trained_on, scored] = [json.loads(line)["reward"] for line in output.read_text().splitlines()]
        assert found[trained_on, "csv"] == found[trained_on, "jsonl"]
    assert found["csv", "csv"] != found["jsonl", "csv"]
