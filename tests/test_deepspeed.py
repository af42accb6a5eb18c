"""ZeRO-2 and ZeRO-3: the configurations that `--accelerate_config` takes parse, and run where DeepSpeed is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from world import make_rows

STAGES = ("zero2", "zero3")


@pytest.mark.parametrize("stage", STAGES)
def test_the_configurations_parse(stage):
    from accelerate.commands.config.config_args import load_config_from_file
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    flag, file = resolve_accelerate_config_argument(["--accelerate_config", stage])
    assert flag == "--config_file"
    settings = yaml.safe_load(Path(file).read_text())
    assert settings["deepspeed_config"]["zero_stage"] == int(stage[-1])
    assert load_config_from_file(file).distributed_type == "DEEPSPEED"


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("settings", [[], ["--use_peft"], ["--precompute_ref_log_probs", "true"]], ids=" ".join)
def test_zero_trains(stage, settings, tiny_llama, tmp_path):
    pytest.importorskip("deepspeed")
    if not torch.cuda.is_available():
        pytest.skip("DeepSpeed's kernels need a GPU")
    rows = tmp_path / "rows.jsonl"
    make_rows(16).to_json(rows)
    command = [
        sys.executable,
        "-m",
        "trl_ulma",
        "ulma",
        "--model_name_or_path",
        tiny_llama,
        "--dataset_name",
        str(rows),
    ]
    command += ["--output_dir", str(tmp_path / "out"), "--accelerate_config", stage, "--num_processes", "1"]
    command += ["--max_steps", "4", "--save_steps", "2", "--logging_steps", "1", "--report_to", "none", *settings]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    state = json.loads((tmp_path / "out" / "checkpoint-4" / "trainer_state.json").read_text())
    losses = [log["loss"] for log in state["log_history"] if "loss" in log]
    assert len(losses) == 4
    assert all(0 < loss < 100 for loss in losses)
    assert (tmp_path / "out" / "checkpoint-4" / "whole").exists()
