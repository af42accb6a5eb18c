"""ZeRO-2 and ZeRO-3: the configurations of `--accelerate_config` parse, and train where DeepSpeed is installed."""

import json
import os
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


@pytest.fixture(scope="module")
def commands(tiny_llama, tmp_path_factory):
    """Runs `trl-ulma ulma` on 16 rows, 8 a step, and returns what it logged at each of 4 steps, with its folder."""
    rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    make_rows(16).to_json(rows)
    on_cpu = [] if torch.cuda.is_available() else ["--use_cpu", "true"]

    # Several GPUs would be taken for one process without accelerate
    one = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}

    def run(*options: str) -> tuple[Path, list[dict]]:
        out = tmp_path_factory.mktemp("out")
        command = [sys.executable, "-m", "trl_ulma", "ulma", "--model_name_or_path", tiny_llama, "--bf16", "true"]
        command += ["--dataset_name", str(rows), "--output_dir", str(out), "--max_steps", "4", "--save_steps", "2"]
        command += ["--logging_steps", "1", "--report_to", "none", *on_cpu, *options]
        environment = os.environ | ({} if "--accelerate_config" in options else one)
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        state = json.loads((out / "checkpoint-4" / "trainer_state.json").read_text())
        return out, [log for log in state["log_history"] if "loss" in log]

    return run


@pytest.fixture(scope="module")
def whole(commands):
    """What one process logs that takes each step at once, with and without an adapter."""
    return {peft: commands("--per_device_train_batch_size", "8", *peft)[1] for peft in ((), ("--use_peft",))}


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("settings", [[], ["--use_peft"], ["--precompute_ref_log_probs", "true"]], ids=" ".join)
def test_zero_trains_as_one_process_does(stage, settings, commands, whole):
    pytest.importorskip("deepspeed")
    processes = min(2, torch.cuda.device_count() or 2)
    split = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", str(4 // processes)]
    out, logs = commands("--accelerate_config", stage, "--num_processes", str(processes), *split, *settings)
    assert (out / "checkpoint-4" / "whole").exists()
    assert len(logs) == 4
    # A gradient that is scaled wrongly by the split is so by a factor of 2 at least; the rest is bfloat16's rounding
    for found, expected in zip(logs, whole[tuple(settings) if "--use_peft" in settings else ()], strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=0.05)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.1)
