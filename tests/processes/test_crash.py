"""A run that is killed again and again, and resumed each time, ends with the weights of one that was not, bit for bit.

Real processes and real SIGKILLs, see `crash_run.py`; where each run dies is drawn from a seed.
"""

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import world
from forks import python_path
from safetensors import safe_open
from world import make_rows

from trl_ulma.checkpoints import WHOLE, checkpoints

STEPS = 16
SETTINGS = {"eval_steps": 2, "eval_strategy": "steps", "max_steps": STEPS, "save_steps": 1, "save_total_limit": 2}
# (phase, what the moment's description holds): what has to be killed at, whatever is drawn
PARTS = ("model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json")
HALF_WRITTEN = [("saving", f"writing {name}") for name in PARTS]
AT_THE_END = [("saving", "calling mark_whole"), ("saving", "calling rotate_checkpoints"), ("saving", "os.rmdir")]


@dataclass
class Server:
    """The process that forks the runs."""

    process: subprocess.Popen
    model: str
    rows: Path

    def __call__(self, folder: Path, **settings: Any) -> dict[str, Any]:
        """What came of a run in a folder, that of earlier ones perhaps, and what it printed."""
        folder.mkdir(exist_ok=True)
        printed = folder / f"printed-{len(list(folder.glob('printed-*')))}"
        run = {
            "model": self.model,
            "rows": str(self.rows),
            "cache": str(folder / "cache"),
            "output_dir": str(folder / "out"),
            "weights": str(folder / "weights.safetensors"),
            "printed": str(printed),
            "args": SETTINGS,
            **settings,
        }
        self.process.stdin.write(json.dumps(run) + "\n")
        self.process.stdin.flush()
        found = json.loads(self.process.stdout.readline())
        return {"printed": printed.read_text(), **found}


@pytest.fixture(scope="module")
def start(tiny_gpt2, tmp_path_factory) -> Iterator[Server]:
    rows = tmp_path_factory.mktemp("crashes") / "rows.jsonl"
    make_rows(50).to_json(rows)
    environment = {**os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
    script = str(Path(world.__file__).with_name("crash_run.py"))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, script], env=environment, **pipes) as process:
        yield Server(process, tiny_gpt2, rows)
        process.stdin.close()


def result(folder: Path) -> tuple[dict[str, bytes], list[dict[str, float]]]:
    """The trained weights by name, bit for bit, and what was logged."""
    with safe_open(folder / "weights.safetensors", "pt") as file:
        weights = {name: file.get_tensor(name).numpy().tobytes() for name in file.keys()}  # noqa: SIM118
        return weights, json.loads(file.metadata()["logs"])


def anywhere(draw: random.Random, moments: dict[str, int], phase: str) -> dict[str, Any]:
    """Death at a moment drawn from all of what happens once, or from two steps."""
    most = moments[phase] if phase in ("preparing", "precomputing") else 2 * moments[phase] // STEPS
    return {"phase": phase, "moment": draw.randint(1, most), "share": draw.random()}


def survive(start: Server, folder: Path, deaths: list[dict[str, Any]], **settings: Any) -> list[str]:
    """Run until done, dying as planned; where it died."""
    places = []
    for death in deaths:
        found = start(folder, **settings, **death)
        if found["exit_code"] == 0:
            return places  # it was done before the moment came
        assert found["killed"], (death, found["exit_code"], found["printed"][-3000:])
        places.append(found["at"])
        newest = next(iter(checkpoints(folder / "out")), None)
        if newest is not None and not (newest / WHOLE).exists():
            places.append(f"{newest.name} half-written")
    last = start(folder, **settings)
    assert last["exit_code"] == 0, (places, last["printed"][-3000:])
    assert last["at"] == "done"
    return places


def killed(places: list[str]) -> Counter:
    """How often it was killed in each phase."""
    return Counter(place.split(":")[0] for place in places if ":" in place)


def assert_alike(found: Path, wanted: Path) -> None:
    """The same weights bit for bit, and the same logs."""
    assert result(found)[0] == result(wanted)[0]
    assert result(found)[1] == result(wanted)[1]


def test_a_run_that_is_killed_fifteen_times_ends_with_the_weights_of_one_that_is_not(start, tmp_path):
    unbroken, folder = tmp_path / "unbroken", tmp_path / "killed"
    args = SETTINGS | {"precompute_ref_log_probs": True}
    whole = start(unbroken, args=args, resume=False)
    assert whole["exit_code"] == 0, whole["printed"][-3000:]
    draw = random.Random(4)
    once = [
        anywhere(draw, whole["moments"], "preparing"),
        {"phase": "preparing", "at": "writing", "share": draw.random()},
        # In this order: dying in the last of its moments leaves nothing to write
        {"phase": "precomputing", "at": "writing", "share": draw.random()},
        anywhere(draw, whole["moments"], "precomputing"),
        anywhere(draw, whole["moments"], "preparing"),  # of what is left to prepare
    ]
    often = [{"phase": phase, "at": at, "share": draw.random()} for phase, at in HALF_WRITTEN + AT_THE_END]
    often += [anywhere(draw, whole["moments"], "step") for _ in range(3)]
    draw.shuffle(often)
    places = survive(start, folder, once + often, args=args)
    print(*places, sep="\n")
    assert sum(killed(places).values()) == 15
    assert min(killed(places)[phase] for phase in ("preparing", "precomputing", "step", "saving")) >= 2
    assert sum("half-written" in place for place in places) >= 4
    printed = "".join(path.read_text() for path in folder.glob("printed-*"))
    assert "There is no complete checkpoint in" in printed
    assert "is incomplete and is skipped" in printed
    assert_alike(folder, unbroken)


KINDS = {
    "all weights, precomputed": {"args": SETTINGS | {"precompute_ref_log_probs": True}},
    "all weights, live": {"args": SETTINGS | {"gradient_accumulation_steps": 2, "share_prompts": True}},
    "adapter, precomputed": {"args": SETTINGS | {"precompute_ref_log_probs": True}, "lora": True},
    "adapter, live": {"args": SETTINGS | {"save_steps": 2, "padding_free": True}, "lora": True},
    "stream": {"args": SETTINGS, "stream": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(2))
def test_killed_at_moments_and_after_times_that_are_drawn(start, tmp_path, kind, seed):
    unbroken, folder = tmp_path / "unbroken", tmp_path / "killed"
    started = time.monotonic()
    whole = start(unbroken, resume=False, **KINDS[kind])
    seconds = time.monotonic() - started
    assert whole["exit_code"] == 0, whole["printed"][-3000:]
    draw = random.Random(f"{kind} {seed}")
    phases = [phase for phase in whole["moments"] if phase in ("preparing", "precomputing")] * 2
    phases += draw.sample(["step", "saving"] * 4, 8)
    deaths = [anywhere(draw, whole["moments"], phase) for phase in phases]
    draw.shuffle(deaths)
    deaths += [{"seconds": draw.uniform(0.1, seconds)} for _ in range(4)]  # of which one may be too late
    places = survive(start, folder, deaths, **KINDS[kind])
    print(f"{sum(killed(places).values())} kills", *places, sep="\n")
    assert sum(killed(places).values()) >= 8
    assert_alike(folder, unbroken)
