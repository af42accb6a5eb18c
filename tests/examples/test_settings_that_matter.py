"""The ablation of settings runs, goes on where it was, and writes its page."""

import json
import re
from pathlib import Path

from datasets import Dataset
from forks import run_script

FOLDER = Path(__file__).parents[2] / "examples" / "settings_that_matter"


def python(script: str, *arguments: str) -> str:
    run = run_script(FOLDER / script, *arguments)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_settings_are_run_once_and_reported(tiny_llama, tmp_path):
    rows = [
        {
            "prompt": [{"role": "user", "content": f"How are you {'today ' * (i % 5)}{i}?"}],
            "completion": [{"role": "assistant", "content": answer}],
            "label": label,
        }
        for i in range(40)
        for answer, label in (("I am fine, thank you!", 1.0), ("Go away.", 0.0))
    ]
    Dataset.from_list(rows).to_parquet(tmp_path / "hh.parquet")
    arguments = ["--hh", str(tmp_path / "hh.parquet"), "--model", tiny_llama, "--output", str(tmp_path / "results")]
    arguments += ["--rows", "16", "--test_rows", "12", "--seeds", "1", "--arms", "log_z=0,log_z=learned,mean"]
    python("run.py", *arguments)
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "results").glob("*.json")}
    assert len(written) == 7  # untrained and three settings, and of 7:1 untrained and the two choices of log Z
    python("run.py", *arguments)
    assert written == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "results").glob("*.json")}

    page = python("report.py", str(tmp_path / "results"))
    assert (tmp_path / "results" / "settings.png").stat().st_size > 10_000
    lines = dict(re.findall(r"^\| (\S+) \| 1 \| ([\d.]+) \|", page.split("## hh\n")[1], re.MULTILINE))
    assert list(lines) == ["untrained", "log_z=0", "log_z=learned", "mean"]
    found = json.loads((tmp_path / "results" / "hh_log_z=0_0.json").read_text())
    assert float(lines["log_z=0"]) == round(found["test"]["auc"], 3)
    assert lines["untrained"] == "0.5"
