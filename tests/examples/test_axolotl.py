"""axolotl trains with both trainers from its YAML, on rows and on pairs.

`AXOLOTL_PYTHON` names the Python of an environment that has axolotl and this package:

    AXOLOTL_PYTHON=axolotl-env/bin/python pytest tests/examples/test_axolotl.py -m slow
"""

import importlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml
from world import make_rows

import trl_ulma

PYTHON = os.environ.get("AXOLOTL_PYTHON", "")
EXAMPLE = Path(trl_ulma.__file__).parents[1] / "examples" / "axolotl" / "run.yaml"
IS_THERE = pytest.mark.skipif(not PYTHON, reason="AXOLOTL_PYTHON does not name a Python that has axolotl")


def axolotl(folder: Path, model: str, rows: list[dict], **settings) -> subprocess.CompletedProcess:
    """Train by a YAML file that is the example's, but for these settings."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = yaml.safe_load(EXAMPLE.read_text())
    small = {"base_model": model, "micro_batch_size": 4, "logging_steps": 1, "lora_r": 4, "sequence_len": 128}
    small |= {"bf16": False, "fp16": False, "tf32": False, "device": "cpu", "gradient_checkpointing": False}
    small |= {"special_tokens": {"pad_token": "<pad>"}, "max_steps": 3, "save_strategy": "no", "num_epochs": 1}
    (folder / "run.yaml").write_text(yaml.safe_dump(run | small | settings))
    environment = {
        **os.environ,
        "AXOLOTL_DO_NOT_TRACK": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(EXAMPLE.parents[2]),
    }
    command = [PYTHON, "-m", "axolotl.cli.main", "train", "run.yaml", "--launcher", "python"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)


def logs(folder: Path) -> list[dict]:
    """What the trainer has logged at each step."""
    state = next((folder / "out").glob("**/trainer_state.json"), None)
    assert state is not None, sorted(folder.rglob("*"))
    return [log for log in json.loads(state.read_text())["log_history"] if "loss" in log]


PAIRS = [{"prompt": f"What is {i}?", "chosen": f" It is {i}.", "rejected": " No."} for i in range(12)]


@pytest.mark.slow
@IS_THERE
@pytest.mark.parametrize("trainer", ["ULMATrainer", "PointwiseDPOTrainer"])
@pytest.mark.parametrize("kind", ["rows", "pairs"])
def test_axolotl_trains_with_our_trainers_and_settings(tiny_llama, tmp_path, trainer, kind):
    rows = [dict(row) for row in make_rows(24)] if kind == "rows" else PAIRS
    pointwise = {"desirable_weight": 2.0, "label_report": False}
    if trainer == "ULMATrainer":
        pointwise["sft_weight"] = 0.5
    done = axolotl(
        tmp_path,
        tiny_llama,
        rows,
        trainer_cls=f"trl_ulma.integrations.axolotl.{trainer}",
        pointwise=pointwise,
        rl_beta=0.3,
        save_strategy="steps",
        save_steps=3,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    found = logs(tmp_path)
    assert len(found) == 3
    assert ("loss/sft" in found[-1]) == (trainer == "ULMATrainer")
    settings = json.loads(next((tmp_path / "out").glob("**/pointwise.json")).read_text())
    assert "0.3" in json.dumps(settings)  # β


@pytest.mark.slow
@IS_THERE
def test_an_unknown_setting_is_refused_before_anything_is_loaded(tiny_llama, tmp_path):
    done = axolotl(tmp_path, tiny_llama, PAIRS, pointwise={"sft_wieght": 0.5})
    assert done.returncode != 0
    assert "ULMAConfig does not have 'sft_wieght' (did you mean 'sft_weight'?)" in (done.stdout + done.stderr)


def test_settings_that_the_config_of_the_trainer_lacks_are_refused(monkeypatch):
    base = types.ModuleType("axolotl.integrations.base")  # all that the plugin imports of axolotl
    base.BasePlugin = type("BasePlugin", (), {})
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, base.__name__, base)
    monkeypatch.delitem(sys.modules, "trl_ulma.integrations.axolotl", raising=False)
    plugin = importlib.import_module("trl_ulma.integrations.axolotl")
    monkeypatch.delitem(sys.modules, plugin.__name__)

    def register(trainer, settings):
        plugin.PointwisePlugin().register({"trainer_cls": f"{plugin.__name__}.{trainer}", "pointwise": settings})
        return plugin._SETTINGS

    assert register("ULMATrainer", {"sft_weight": 0.5}) == {"sft_weight": 0.5}
    assert register("PointwiseDPOTrainer", {"log_z": 1.0}) == {"log_z": 1.0}
    assert register("PointwiseDPOTrainer", None) == {}
    with pytest.raises(
        ValueError,
        match=r"PointwiseDPOConfig does not have 'sft_weight' \(only ULMAConfig does\), 'bata' \(did you mean 'beta'",
    ):
        register("PointwiseDPOTrainer", {"sft_weight": 0.5, "bata": 1})
    with pytest.raises(ValueError, match=r"pointwise is \['x'\]; it must be a mapping of settings"):
        register("ULMATrainer", ["x"])
