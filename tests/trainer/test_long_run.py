"""Two thousand steps of a tiny model, with evaluation and saving, hold no more memory than two hundred do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import world

import trl_ulma

STEPS = 2000
WARM = 200
SCRIPT = """
import json, sys
import psutil, torch
from transformers import TrainerCallback
from world import make_trainer, mixed_rows

torch.set_num_threads(1)
model, out, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
curve = []

class Memory(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % 50 == 0:
            curve.append((state.global_step, psutil.Process().memory_info().rss))

trainer = make_trainer(
    model, mixed_rows(48), out, max_steps=steps, per_device_train_batch_size=4, per_device_eval_batch_size=4,
    eval_dataset=mixed_rows(12), eval_strategy="steps", eval_steps=50, save_strategy="steps", save_steps=50,
    save_total_limit=2, logging_steps=10, callbacks=[Memory()],
)
trainer.train()
print(json.dumps(curve))
"""


@pytest.mark.slow
def test_memory_stays_where_it_was_after_the_first_steps(tiny_gpt2, tmp_path):
    root = Path(trl_ulma.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(Path(world.__file__).parent)])}
    command = [sys.executable, "-c", SCRIPT, tiny_gpt2, str(tmp_path / "out"), str(STEPS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    curve = [tuple(point) for point in json.loads(done.stdout.splitlines()[-1])]
    for step, size in curve:
        print(f"{step:6,} {size / 2**20:8.1f} MiB")
    assert curve[-1][0] == STEPS
    warm = [size for step, size in curve if step >= WARM]
    assert max(warm) / min(warm) < 1.02
    assert len(list((tmp_path / "out").glob("checkpoint-*"))) == 2
