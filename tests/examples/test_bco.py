"""The comparison with BCO of TRL 1.13. It runs if `TRL_1_13` is a folder that TRL 1.13 was installed into."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from forks import run_script

HAS_BCO = importlib.util.find_spec("trl.experimental.bco") is not None
SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "bco" / "compare.py"


def run(model, *options, **environment):
    command = [sys.executable, str(SCRIPT), "--model", str(model), *options]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(HAS_BCO, reason="the installed TRL has BCOTrainer")
def test_a_trl_without_bco_is_an_error(tiny_gpt2):
    ran = run_script(SCRIPT, "--model", tiny_gpt2)
    assert ran.returncode == 1
    assert re.search(r"TRL [\d.]+ has no BCOTrainer; put TRL 1\.13 first on the path", ran.stderr)


@pytest.mark.slow
@pytest.mark.skipif("TRL_1_13" not in os.environ, reason="TRL_1_13 does not name a folder with TRL 1.13")
def test_the_first_step_is_that_of_trl_and_only_delta_differs_later(tiny_llama):
    path = os.pathsep.join([os.environ["TRL_1_13"], os.environ.get("PYTHONPATH", "")])
    ran = run(tiny_llama, "--steps", "4", "--seeds", "1", "--learning_rate", "1e-3", PYTHONPATH=path)
    assert ran.returncode == 0, ran.stderr
    rows = [
        [float(cell) for cell in line.split("|")[1:-1]] for line in ran.stdout.splitlines() if re.match(r"\| \d", line)
    ]
    assert len(rows) == 4
    first, second = rows[:2]
    assert first[1] == first[2] == 0.693
    assert first[7] == first[8] == 0.0
    # Both have made the same first step, so β·u agrees at the second, when δ of TRL has seen it and ours has not
    assert second[3] == pytest.approx(second[4], abs=1e-3)
    assert second[5] == pytest.approx(second[6], abs=1e-3)
    assert second[8] == pytest.approx(0.0, abs=1e-3)
