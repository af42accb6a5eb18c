"""The recipes for published results run through all their stages on a tiny model, and go on where they were stopped."""

import json
import subprocess
from importlib import import_module
from pathlib import Path

import pytest
from forks import run_script

from trl_ulma.scripts import cli, training

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "anchors" / "run.py"


def train_without_a_launch() -> None:
    """The recipe trains in its own process: accelerate's launch, which other tests try, is left out."""

    def launch(module: str, parser, argv: list[str]) -> int:
        words = parser.parse_for_launch(argv)[1]
        import_module(module).main(*parser.parse_settings(words))
        return 0

    def run_command(command: list[str], **_) -> subprocess.CompletedProcess:
        assert command[1:3] == ["-m", "trl_ulma.scripts.cli"]
        return subprocess.CompletedProcess(command, cli.main(command[3:]))

    training.launch = launch
    subprocess.run = run_command


def run(recipe: str, folder: Path, *options: str) -> str:
    done = run_script(SCRIPT, recipe, "--output", str(folder), *options, prepare=train_without_a_launch)
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
    done = run_script(SCRIPT, "kto-ultrafeedback", "--output", str(tmp_path), "--dry_run")
    assert done.returncode == 2
    assert "is a run of other settings" in done.stderr
