"""The recipes for published results run through all their stages on a tiny model, and go on where they were stopped."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "anchors" / "run.py"


def run(recipe: str, folder: Path, *options: str) -> str:
    command = [sys.executable, str(SCRIPT), recipe, "--output", str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("recipe", ["qrpo-magpie-air", pytest.param("kto-ultrafeedback", marks=pytest.mark.slow)])
def test_all_stages_run(recipe, tmp_path):
    said = run(recipe, tmp_path, "--dry_run")
    assert "The reward model prefers the tuned model's answer" in said
    assert "On 1 H100, roughly: training" in said
    rows = [json.loads(line) for line in (tmp_path / "rated.jsonl").read_text().splitlines()]
    assert len(rows) == 16
    if recipe == "qrpo-magpie-air":
        scores = [float(line) for line in (tmp_path / "scores.txt").read_text().split()]
        reference = [(tmp_path / f"scores-{seed}.txt").read_text().split() for seed in range(3)]
        # Two rows a prompt, three answers of the reference: the label is the share of these that is rated no higher
        expected = [sum(float(each[i // 2]) <= scores[i] for each in reference) / 3 for i in range(16)]
        assert [row["label"] for row in rows] == pytest.approx(expected)
    # What is there is not made again
    made = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.jsonl")}
    weights = (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns
    run(recipe, tmp_path, "--dry_run")
    assert made == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.jsonl")}
    assert weights == (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns


def test_other_settings_need_another_folder(tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: another\n")
    command = [sys.executable, str(SCRIPT), "kto-ultrafeedback", "--output", str(tmp_path), "--dry_run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert "is a run of other settings" in done.stderr
