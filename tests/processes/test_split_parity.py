"""However an optimizer step is split into micro-batches and processes, the same is learned and logged.

Real processes on CPU: one, two with DDP, two with FSDP2. Each kind is started once and does all its runs, see
`split_run.py`. The two with DDP are launched, so that their hash seeds differ as in use; the others are forks.
Everything is compared with one process that takes a step's eight rows at once, in float64, with SGD, since Adam would
hide a gradient of a wrong scale. A split "2x4" is two rows in a micro-batch of each process, and four micro-batches in
a step.
"""

import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import pytest
import split_run
import torch
from forks import HAS_FSDP2, free_port, python_path, run_processes
from safetensors.torch import load_file
from transformers import Trainer

TOLERANCE = 1e-5
SECONDS = 400  # for all runs of a kind of processes
ROWS_IN_STEP = 8
HAS_FINALIZE = hasattr(Trainer, "_finalize_training")
WHOLE = ("one", f"{ROWS_IN_STEP}x1")
SENTENCE = "the cat sat on mat how are you today fine thank please write a short letter to my landlord"

LAUNCH = [
    *("--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"),
    *("--dynamo_backend", "no"),
]
KINDS = {
    "one": [],
    "ddp": [*LAUNCH, "--multi_gpu"],
    "fsdp2": [
        *(*LAUNCH, "--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"),
        *("--fsdp_state_dict_type", "FULL_STATE_DICT"),
    ],
}


@dataclass
class Setting:
    """What is trained, and in which splits: "ddp 2x2" is two DDP processes, see the module."""

    splits: str
    args: dict[str, Any] = field(default_factory=dict)
    columns: tuple[str, ...] = ()
    rows: int = 37
    test_rows: int = 11
    run: dict[str, Any] = field(default_factory=dict)


PRECOMPUTED = {"precompute_ref_log_probs": True}
TWICE = {"num_train_epochs": 2}
SETTINGS = {
    "all weights, live reference": Setting(
        "one 2x4, one 1x8, ddp 4x1, ddp 2x2, ddp 1x4, fsdp2 4x1, fsdp2 2x2, fsdp2 1x4", TWICE
    ),
    "all weights, precomputed reference": Setting("one 1x8, ddp 1x4, fsdp2 2x2", PRECOMPUTED | TWICE),
    "LoRA, live reference": Setting("one 1x8, ddp 2x2, ddp 1x4, fsdp2 2x2, fsdp2 1x4", run={"lora": True}),
    "LoRA, precomputed reference": Setting("ddp 2x2, fsdp2 1x4", PRECOMPUTED, run={"lora": True}),
    "precomputed reference of rows in memory": Setting("ddp 2x2", PRECOMPUTED, run={"in_memory": True}),
    "clipped gradients": Setting("one 1x8, ddp 2x2, fsdp2 1x4", {"max_grad_norm": 1.0, "learning_rate": 0.1}),
    "weighted rows and classes": Setting(
        "one 1x8, ddp 1x4, fsdp2 2x2",
        {"desirable_weight": 2.0, "undesirable_weight": 0.5},
        ("sft_mask", "weight"),
    ),
    "binary and continuous labels": Setting("one 1x8, ddp 4x1, fsdp2 1x4", columns=("sft_mask", "label_type", "log_z")),
    "pointwise DPO, continuous labels": Setting(
        "one 1x8, ddp 1x4", {"label_type": "continuous", "learning_rate": 0.1}, run={"method": "pointwise"}
    ),
    # Rows four by four, in order: in "4x1" one process has all demonstrations. Two of three steps are not logged, and
    # ask the reference for the rows only whose loss contains it. The last step is not logged, and counts in
    # `train_loss`. Older versions of transformers only count one process's loss of it.
    "one process has all demonstrations": Setting(
        "ddp 4x1, fsdp2 4x1",
        {"train_sampling_strategy": "sequential", "logging_steps": 3 if HAS_FINALIZE else 2} | TWICE,
        ("four by four",),
    ),
    # Rows are grouped by the rows of one process's step, and 37 rows make the same groups for 8 and for 4 of them
    "grouped by length": Setting("one 2x4, ddp 2x2, fsdp2 2x2", {"train_sampling_strategy": "group_by_length"}),
    "fewer rows than a step": Setting("one 1x8, ddp 4x1, fsdp2 2x2", rows=3, test_rows=3),
    "the last rows dropped": Setting("ddp 2x2", {"dataloader_drop_last": True}, rows=33, test_rows=16),
    "rows without padding": Setting("one 2x4, ddp 2x2", {"padding_free": True}),
    "prompts run once": Setting("one 2x4, ddp 2x2", {"share_prompts": True}, ("few prompts",)),
    "learned log Z": Setting(
        "one 2x4, ddp 2x2, fsdp2 1x4",
        {"log_z": "learned", "log_z_learning_rate": 0.1},
        ("sft_mask", "label_type"),
    ),
    "running mean of log Z": Setting("one 1x8, ddp 2x2", {"log_z": "running_mean", "beta": 0.5}, ("sft_mask",)),
    # Two prompts of four rows, so that a step compares the same rows however it is split
    "rows of a prompt compared": Setting(
        "one 4x2, ddp 4x1, fsdp2 4x1",
        {"log_z": "group", "learning_rate": 0.1},
        ("two prompts",),
        rows=8,
        run={"method": "pointwise"},
    ),
    "prior log Z": Setting("ddp 2x2", {"log_z": "prior"}, ("sft_mask", "weight")),
    "demonstrations alone": Setting(
        "one 1x8, ddp 2x2, fsdp2 2x2", {"positive_loss": "sft", "negative_loss": "none"}, run={"method": "ulma"}
    ),
    "demonstrations, and comparisons to evaluate": Setting("ddp 2x2, fsdp2 2x2", columns=("demonstrations",)),
    "given reference": Setting("ddp 2x2, fsdp2 2x2", run={"given": True}),
    "given reference, precomputed": Setting("one 1x8, ddp 2x2, fsdp2 2x2", PRECOMPUTED, run={"given": True}),
    "float32": Setting("one 1x8, ddp 2x2", run={"dtype": "float32"}),
    "a stream": Setting("one 1x8, ddp 4x1, ddp 1x4, fsdp2 2x2", {"max_steps": 8}, run={"stream": 1}),
    "a stream of pairs": Setting("ddp 2x2", {"max_steps": 8}, ("pairs",), run={"stream": 1}),
    "a stream in shards": Setting("ddp 1x4", {"max_steps": 8}, run={"stream": 2}),
    "a stream shorter than a step": Setting(
        "one 1x8, ddp 4x1, ddp 1x4", {"max_steps": 3}, rows=3, test_rows=3, run={"stream": 1}
    ),
}
CASES = [(name, *split.split()) for name, setting in SETTINGS.items() for split in setting.splits.split(", ")]
EXACT = [case for case in CASES if case[0] != "float32"]


def make_rows(number: int, columns: tuple[str, ...], seed: int) -> list[dict[str, Any]]:
    """Rows of a few words each, the same for the same arguments."""
    words = random.Random(seed)
    vocabulary = SENTENCE.split()

    def text(most: int) -> str:
        return " ".join(words.choices(vocabulary, k=words.randint(1, most)))

    rows = []
    for i in range(number):
        row: dict[str, Any] = {"prompt": text(8), "completion": f" {text(12)}", "label": words.choice([0.0, 1.0])}
        if "few prompts" in columns:
            row["prompt"] = f"{vocabulary[i % 9]} {vocabulary[i % 9 + 9]}"
        if "two prompts" in columns:
            row["prompt"], row["label"] = vocabulary[i % 2], float(i < 3)
        if "four by four" in columns:
            row["label"] = float(i % ROWS_IN_STEP < 4)
        if "demonstrations" in columns:
            row["label"] = 1.0 if seed == 1 else row["label"]
            row["sft_mask"] = seed == 1
        if "sft_mask" in columns:
            row["sft_mask"] = row["label"] == 1 and words.random() < 0.6
        if "weight" in columns:
            row["weight"] = words.choice([0.0, 0.5, 1.0, 3.0])
        if "label_type" in columns:
            row["label_type"] = words.choice(["binary", "continuous"])
            row["label"] = words.uniform(-2, 2) if row["label_type"] == "continuous" else row["label"]
        if "log_z" in columns:
            row["log_z"] = words.uniform(-3, 3)
        if "pairs" in columns:
            row = {"prompt": row["prompt"], "chosen": row["completion"], "rejected": f" {text(12)}"}
        rows.append(row)
    return rows


@dataclass
class Found:
    """What came out of a run: how many processes there were, whether they sharded, their logs, the trained weights, how
    many models were loaded, and how many were in memory before and after training."""

    processes: int
    sharded: bool
    logs: list[dict[str, float]]
    loaded: int
    kept: list[int]
    before: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor]

    def changes(self) -> dict[str, torch.Tensor]:
        """How far each weight moved."""
        return {name: weight - self.before[name] for name, weight in self.after.items()}

    def figures(self) -> list[dict[str, float]]:
        """The logs without times and the like, which are no matter of numbers."""
        parts = ("runtime", "per_second", "epoch", "total_flos")
        return [{k: v for k, v in log.items() if not any(part in k for part in parts)} for log in self.logs]


class Runs:
    """Starts the processes of a kind once, for all its runs, when the first is asked for."""

    def __init__(self, model: str, folder: Path):
        self.model = model
        self.folder = folder
        self._ended: dict[str, str] = {}

    def __call__(self, name: str, kind: str, split: str) -> Found:
        """What came out of a run."""
        ended = self.ended(kind)
        file = self.folder / kind / _file_name(name, split)
        if not file.with_suffix(".safetensors").exists():
            pytest.fail(ended)
        tensors = load_file(file.with_suffix(".safetensors"))
        when = {
            part: {name.removeprefix(f"{part}."): weight for name, weight in tensors.items() if name.startswith(part)}
            for part in ("before", "after")
        }
        return Found(**json.loads(file.with_suffix(".json").read_text()), **when)

    def ended(self, kind: str) -> str:
        """How the processes of a kind ended, with the last that they printed."""
        if kind not in self._ended:
            self._ended[kind] = self._start(kind, self.folder / kind)
        return self._ended[kind]

    def _start(self, kind: str, out: Path) -> str:
        if kind == "fsdp2" and not hasattr(torch.cpu.Stream, "record_event"):
            pytest.skip(f"FSDP2 on CPUs needs streams that record events, which torch {torch.__version__} has not")
        if kind == "fsdp2" and not HAS_FSDP2:
            pytest.skip(f"accelerate {accelerate.__version__} has no FSDP2")
        out.mkdir()
        splits = [(name, split) for name, a_kind, split in CASES if a_kind == kind]
        if kind == "one":
            splits += [(name, WHOLE[1]) for name in SETTINGS]
        runs = [self._run(name, split, out) for name, split in splits]
        (out / "runs.json").write_text(json.dumps(runs))
        if kind == "ddp":
            code = self._launch(out)
        else:
            run = partial(split_run.main, str(out / "runs.json"), str(out), SECONDS)
            code = run_processes(run, KINDS[kind], out / "printed", SECONDS + 30)
        return f"code {code}, having printed …{(out / 'printed').read_text()[-5000:]}"

    def _launch(self, out: Path) -> int:
        script = [split_run.__file__, str(out / "runs.json"), str(out), str(SECONDS)]
        environment = {
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": python_path(),
            "TQDM_DISABLE": "1",
        }
        with (out / "printed").open("w") as printed:
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "accelerate.commands.launch",
                    *KINDS["ddp"],
                    "--main_process_port",
                    str(free_port()),
                    *script,
                ],
                env=environment,
                stdout=printed,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                # They end themselves before that, unless they do not even start
                return process.wait(SECONDS + 30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                return process.wait()

    def _run(self, name: str, split: str, out: Path) -> dict[str, Any]:
        setting = SETTINGS[name]
        micro, accumulation = split.split("x")
        files = {}
        for part, number, seed in (("train_rows", setting.rows, 1), ("test_rows", setting.test_rows, 2)):
            files[part] = str(out / f"{_file_name(name, split)}-{part}.jsonl")
            rows = make_rows(number, setting.columns, seed)
            Path(files[part]).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {
            "name": _file_name(name, split),
            "model": self.model,
            "micro": int(micro),
            "accumulation": int(accumulation),
            "args": setting.args,
            **files,
            **setting.run,
        }


def _file_name(name: str, split: str) -> str:
    return f"{name.replace(',', '').replace(' ', '-')}-{split}"


@pytest.fixture(scope="module")
def runs(tiny_gpt2, tmp_path_factory) -> Runs:
    return Runs(tiny_gpt2, tmp_path_factory.mktemp("runs"))


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, relative to the largest number."""
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_no_process_hangs_or_fails(runs, kind):
    assert runs.ended(kind).startswith("code 0")


@pytest.mark.parametrize(("name", "kind", "split"), EXACT, ids=lambda part: part.replace(" ", "-"))
def test_a_split_changes_neither_what_is_logged_nor_how_weights_move(runs, name, kind, split, record_property):
    whole, found = runs(name, *WHOLE), runs(name, kind, split)
    assert found.processes == (1 if kind == "one" else 2)
    assert found.sharded == (kind == "fsdp2")
    changes, wanted = found.changes(), whole.changes()
    errors = {name: difference(changes[name], change) for name, change in wanted.items()}
    record_property("largest relative difference of a weight's change", max(errors.values()))
    assert changes.keys() == wanted.keys()
    assert max(errors.values()) < TOLERANCE, errors
    # Rewards are 0 but for rounding before the first step
    assert found.figures() == [pytest.approx(log, rel=TOLERANCE, abs=1e-9) for log in whole.figures()]


@pytest.mark.parametrize("name", SETTINGS, ids=lambda name: name.replace(" ", "-"))
def test_weights_move_a_hundred_times_as_far_as_the_tolerance(runs, name):
    whole = runs(name, *WHOLE)
    moved = torch.cat([change.flatten() for change in whole.changes().values()]).norm()
    start = torch.cat([weight.flatten() for weight in whole.before.values()]).norm()
    assert moved / start > 100 * TOLERANCE


def models_needed(name: str, kind: str) -> tuple[int, int]:
    """How many models a training has to load, and how many it has to keep."""
    if name.startswith("LoRA") or name == "demonstrations alone":
        return 1, 1  # the reference is the model without its adapter, or there is none
    setting = SETTINGS[name]
    # A given reference can be asked later about rows that come to be evaluated
    if "precompute_ref_log_probs" not in setting.args or setting.run.get("given"):
        return 2, 2
    # Sharded, the policy cannot be asked before training. Some versions of TRL ask it before it is sharded
    return (2 if kind == "fsdp2" else 1), 1


@pytest.mark.parametrize(("name", "kind", "split"), CASES, ids=lambda part: part.replace(" ", "-"))
def test_no_model_is_loaded_or_kept_that_is_not_needed(runs, name, kind, split):
    found = runs(name, kind, split)
    loaded, kept = models_needed(name, kind)
    assert 1 <= found.loaded <= loaded
    assert found.kept == [kept, kept]


@pytest.mark.parametrize("name", ["all weights", "LoRA"])
def test_a_precomputed_reference_is_the_live_one(runs, name):
    changes = runs(f"{name}, precomputed reference", *WHOLE).changes()
    for weight, change in runs(f"{name}, live reference", *WHOLE).changes().items():
        assert difference(changes[weight], change) < TOLERANCE


@pytest.mark.parametrize(("name", "kind", "split"), [case for case in CASES if case[0] == "float32"])
def test_in_float32_a_split_changes_no_more_than_rounding_does(runs, name, kind, split, record_property):
    changes, wanted = runs(name, kind, split).changes(), runs(name, *WHOLE).changes()
    error = max(difference(changes[name], change) for name, change in wanted.items())
    print(f"largest relative difference of a weight's change in float32, {kind} {split}: {error:.1e}")
    record_property("largest relative difference of a weight's change", error)
    assert error < 1e-3
