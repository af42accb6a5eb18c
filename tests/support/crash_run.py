"""Runs trainings that kill themselves with SIGKILL at a chosen moment: a server that imports once and forks each run.

    python crash_run.py < runs.jsonl

Each line of its input is a `Run`; for each it prints a line of JSON: `killed` (whether by SIGKILL), `exit_code`, `at`
(where the run was when it died) and `moments` (how many moments it passed in each phase). A moment is a call of one of
the functions in `CALLS`, a change that Python makes to a file, or the end of a file's writing by one of `WRITERS`, of
which a run that dies there leaves a part.
"""

import dataclasses
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import datasets.arrow_writer
import numpy as np
import safetensors.torch
import torch
import transformers.modeling_utils
import transformers.trainer
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import TrainerState
from transformers.utils.logging import disable_progress_bar
from trl import DPOTrainer

import trl_ulma.checkpoints
from trl_ulma import ULMAConfig, ULMATrainer
from trl_ulma.likelihood.reference import Reference
from trl_ulma.rows.batches import RawBatches
from trl_ulma.rows.preparation import Preparation

PHASES = ("preparing", "precomputing", "step", "saving")
ONCE = ("preparing", "precomputing")

CALLS = (
    (RawBatches, "__call__"),
    (Preparation, "__call__"),
    (ULMATrainer, "get_batch_samples"),
    (Reference, "logps"),
    (ULMATrainer, "compute_loss"),
    (ULMATrainer, "prediction_step"),
    (accelerate.Accelerator, "backward"),
    (torch.optim.AdamW, "step"),
    (trl_ulma.checkpoints, "mark_whole"),
    (trl_ulma.checkpoints, "rotate_checkpoints"),
)
# Functions that write a file which Python does not see opened, and how to find its path among their arguments
WRITERS: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
    (datasets.arrow_writer.ArrowWriter, "write_table", lambda writer, *_, **__: writer._path),
    (datasets.arrow_writer.ArrowWriter, "finalize", lambda writer, *_, **__: writer._path),
    (transformers.modeling_utils, "safe_save_file", lambda _, path, **__: path),
    (safetensors.torch, "save_file", lambda _, path, **__: path),
    (torch, "save", lambda _, path, **__: path),
    (np, "save", lambda path, _: path),
    (TrainerState, "save_to_json", lambda _, path: path),
)
CHANGES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.chmod", "os.utime"}


@dataclasses.dataclass
class Run:
    """One training run.

    Attributes:
        model: folder of the checkpoint.
        rows: JSON-lines file; every fifth row is evaluated on.
        cache: folder of the datasets' caches.
        output_dir: where checkpoints go.
        weights: file that the trained weights and the logs are written to when it is done.
        printed: file for what it prints.
        args: settings of the trainer's config.
        lora: train an adapter only.
        stream: read the rows as a stream.
        phase: where to die: one of `PHASES`, or none.
        at: count only moments whose description holds this.
        moment: at which of the phase's moments, counted from 1.
        share: how much of a file that is being written is left, 0 … 1.
        resume: go on from the last whole checkpoint.
        seconds: die after so long, wherever the run is.
    """

    model: str
    rows: str
    cache: str
    output_dir: str
    weights: str
    printed: str
    args: dict[str, Any] = dataclasses.field(default_factory=dict)
    lora: bool = False
    stream: bool = False
    phase: str = ""
    at: str = ""
    moment: int = 1
    share: float = 0.0
    resume: bool = True
    seconds: float = 0.0


class Crash:
    """Counts the moments of a run, and ends it at the one that was chosen.

    Args:
        run: says which.
        told: file descriptor that takes where the run died, or its counts.
    """

    def __init__(self, run: Run, told: int):
        self.run = run
        self.told = told
        self.phase = PHASES[0]
        self.moments = Counter[str]()

    def watch(self) -> None:
        """Begin to count, in a process that does nothing but this run."""
        for owner, name in CALLS:
            self._replace(owner, name, counts=True)
        for owner, name, path_of in WRITERS:
            self._replace(owner, name, path_of=path_of)
        self._replace(DPOTrainer, "__init__", phase="setting up")
        self._replace(ULMATrainer, "_precompute_ref_logps", phase="precomputing", then="setting up")
        self._replace(ULMATrainer, "train", phase="step", then="done")
        self._replace(ULMATrainer, "_save_checkpoint", phase="saving", then="step")
        sys.addaudithook(self._audit)

    def passed(self, what: str, path: Any = None) -> None:
        """A moment; at the chosen one cut the file at `path`, and die."""
        self.moments[self.phase] += 1
        if self.phase != self.run.phase or self.run.at not in what:
            return
        self.run.moment -= 1
        if self.run.moment > 0:
            return
        self.run.phase = ""  # what is done from here on is no moment
        if path is not None:
            os.truncate(path, int(os.path.getsize(path) * self.run.share))
        self.die(what if path is None else f"{what}, {self.run.share:.0%} written")

    def die(self, what: str) -> None:
        """End the process as the system does that runs out of memory."""
        self.tell(at=f"{self.phase}: {what}")
        os.kill(os.getpid(), signal.SIGKILL)

    def tell(self, at: str) -> None:
        """Hand on what is known of the run."""
        os.write(self.told, json.dumps({"at": at, "moments": self.moments}).encode())

    def enter(self, phase: str) -> None:
        """Go into a phase. What happens once cannot be waited for any longer than to its end."""
        if phase == "step" and self.run.phase in ONCE:
            self.die(f"after {self.run.phase}")
        self.phase = phase

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[0], str) and isinstance(args[2], int):
            written = args[2] & (os.O_WRONLY | os.O_RDWR)
            if written and not args[0].startswith(("/dev/", "/proc/")):
                self.passed(f"opening {Path(args[0]).name}")
        elif event in CHANGES:
            self.passed(f"{event} {Path(os.fsdecode(args[0])).name if not isinstance(args[0], int) else ''}")

    def _replace(
        self,
        owner: Any,
        name: str,
        *,
        counts: bool = False,
        path_of: Callable[..., Any] | None = None,
        phase: str = "",
        then: str = "",
    ) -> None:
        original = getattr(owner, name)

        def replacement(*args: Any, **kwargs: Any) -> Any:
            if counts:
                self.passed(f"calling {name}")
            if phase:
                self.enter(phase)
            result = original(*args, **kwargs)
            path = path_of(*args, **kwargs) if path_of is not None else None
            if path is not None:
                self.passed(f"writing {Path(path).name}", path)
            if then:
                self.enter(then)
            return result

        setattr(owner, name, replacement)


def train(run: Run, crash: Crash) -> None:
    """Train, and write the weights and what was logged."""
    disable_progress_bar()
    torch.set_num_threads(1)
    if run.seconds:
        signal.setitimer(signal.ITIMER_REAL, run.seconds)
        signal.signal(signal.SIGALRM, lambda *_: crash.die("wherever it was"))
    crash.watch()
    rows = Dataset.from_json(run.rows, cache_dir=run.cache)
    test = [row for row in range(len(rows)) if row % 5 == 0]
    train_rows: Any = rows.select([row for row in range(len(rows)) if row % 5])
    settings = {
        "bf16": False,
        "dataloader_pin_memory": False,
        "disable_dropout": False,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "per_device_eval_batch_size": 4,
        "per_device_train_batch_size": 2,
        "report_to": "none",
        "save_strategy": "steps",
        "use_cpu": True,
    }
    trainer = ULMATrainer(
        model=run.model,
        args=ULMAConfig(run.output_dir, **settings | run.args),
        train_dataset=train_rows.to_iterable_dataset() if run.stream else train_rows,
        eval_dataset=rows.select(test),
        peft_config=LoraConfig(r=4, target_modules=["c_attn"], task_type="CAUSAL_LM", lora_dropout=0.1)
        if run.lora
        else None,
    )
    trainer.train(resume_from_checkpoint=run.resume)
    # transformers counts the last, and TRL the one before it, from where the run went on
    times = ("runtime", "per_second", "total_flos", "num_tokens", "train_loss")
    logs = [{k: v for k, v in log.items() if not any(t in k for t in times)} for log in trainer.state.log_history]
    save_file(
        {name: weight.detach().clone() for name, weight in trainer.model.named_parameters() if weight.requires_grad},
        run.weights,
        {"logs": json.dumps(logs)},
    )


def child(run: Run, told: int) -> None:
    """What the forked process does, and nothing after it."""
    code = 1
    try:
        printed = os.open(run.printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        crash = Crash(run, told)
        train(run, crash)
        crash.tell(at="done")
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """Fork a process for each line of the input."""
    for line in sys.stdin:
        run = Run(**json.loads(line))
        reads, writes = os.pipe()
        pid = os.fork()
        if pid == 0:
            child(run, writes)
        os.close(writes)
        with os.fdopen(reads) as pipe:
            told = pipe.read()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        found = {"killed": status == -signal.SIGKILL, "exit_code": status, **json.loads(told or "{}")}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
