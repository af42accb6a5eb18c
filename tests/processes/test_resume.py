"""A run of two processes that is resumed ends with the weights of the unbroken one, bit for bit.

Real processes with DDP on CPU, started once for all cases, see `resume_run.py`.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import resume_run
import torch
import transformers
from forks import run_processes
from packaging.version import Version
from safetensors.torch import load_file
from transformers import Trainer
from world import PROMPTS, make_rows

SECONDS = 300
pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.19"),
    reason=f"transformers {transformers.__version__} loads optimizers of several processes to cpu:0, unknown to torch",
)
LAUNCH = [
    *("--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"),
    *("--dynamo_backend", "no", "--multi_gpu"),
]
SHARED = {"share_prompts": True}
# 13 rows, two processes with two rows each: three steps of 4 rows, and one of 1 row that is filled up
CASES: dict[str, dict[str, Any]] = {
    "inside an epoch": {"resume": 2},
    "before an epoch's last step": {"resume": 3},
    "at an epoch's end": {"resume": 4},
    "in the second epoch": {"resume": 6},
    "accumulated": {"resume": 1, "args": {"gradient_accumulation_steps": 2}},
    "accumulated, in the second epoch": {"resume": 3, "args": {"gradient_accumulation_steps": 2}},
    "an adapter with dropout": {"resume": 2, "lora": True, "args": {"disable_dropout": False}},
    "precomputed": {"resume": 6, "args": {"precompute_ref_log_probs": True}},
    "shared prompts": {"resume": 2, "args": SHARED},
    "shared prompts, in the second epoch": {"resume": 6, "args": SHARED},
    "shared prompts, accumulated": {"resume": 3, "args": SHARED | {"gradient_accumulation_steps": 2}},
    "grouped by length": {"resume": 6, "args": {"train_sampling_strategy": "group_by_length"}},
    "in order": {"resume": 6, "args": {"train_sampling_strategy": "sequential"}},
    "the last rows dropped": {"resume": 4, "args": {"dataloader_drop_last": True}},
    "a running mean": {"resume": 6, "args": {"log_z": "running_mean"}},
    "a stream, in its first pass": {"resume": 3, "stream": True, "args": {"max_steps": 8}},
}
if hasattr(Trainer, "_init_training_state"):  # older transformers are refused
    CASES["a stream, at the end of a pass"] = {"resume": 4, "stream": True, "args": {"max_steps": 8}}
    CASES["a stream, in its second pass"] = {"resume": 6, "stream": True, "args": {"max_steps": 8}}


@pytest.fixture(scope="module")
def out(tiny_gpt2, tmp_path_factory) -> Path:
    """The folder with the results of all cases."""
    folder = tmp_path_factory.mktemp("resumes")
    rows = make_rows(13, prompt=[PROMPTS[i % 4] for i in range(13)], sft_mask=[i % 6 == 0 for i in range(13)])
    rows.to_json(folder / "rows.jsonl")
    shared = {"model": tiny_gpt2, "rows": str(folder / "rows.jsonl"), "args": {}}
    (folder / "runs.json").write_text(json.dumps([shared | {"name": name} | case for name, case in CASES.items()]))
    run = partial(resume_run.main, str(folder / "runs.json"), str(folder), SECONDS)
    run_processes(run, LAUNCH, folder / "printed", SECONDS + 60)
    return folder


def figures(path: Path) -> dict[int, dict[str, float]]:
    """What was logged of each step, without times and what is counted from where a run went on."""
    left_out = ("runtime", "per_second", "total_flos", "num_tokens")
    logs = [log for log in json.loads(path.read_text()) if "loss" in log]
    return {log["step"]: {k: v for k, v in log.items() if not any(part in k for part in left_out)} for log in logs}


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_is_the_unbroken_one(out, name):
    paths = [out / f"{name}-{kind}.safetensors" for kind in ("unbroken", "resumed")]
    assert all(path.exists() for path in paths), (out / "printed").read_text()[-3000:]
    unbroken, resumed = (figures(path.with_suffix(".json")) for path in paths)
    assert set(unbroken) == set(resumed)
    for step in unbroken:
        assert resumed[step] == unbroken[step], f"step {step}"
    weights, again = map(load_file, paths)
    assert all(torch.equal(value, again[part]) for part, value in weights.items())
