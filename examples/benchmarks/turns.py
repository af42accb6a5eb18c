"""Trainers that take turns: each one's own `train()`, which waits at the end of a step while the others make theirs."""

import ctypes
import platform
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import psutil
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import Trainer, TrainerCallback

Lap = dict[str, float]
_M_ARENA_MAX = -8


class Meter:
    """Counts what a trainer's steps cost.

    A lap is a dict of one step's figures: seconds of `cpu` (all threads), of `wall`, of the training `thread`, and of
    what it spends `around` the forwards (`compute_loss` and `get_batch_samples` less the models' forwards: collation,
    layout, loss, metrics); positions run by the `policy` with gradients, by the policy without (`policy_no_grad`) and
    by the `reference`; `padding` among the first of these; and real `tokens` of the batch.
    """

    def __init__(self, trainer: Trainer):
        self._lap: Counter = Counter()
        self._is_around = False
        self._masks: list[tuple[str, torch.Tensor | None]] = []
        model: Any = trainer.model
        self._adapter = next((module for module in model.modules() if isinstance(module, BaseTunerLayer)), None)
        self._watch(model, model.base_model if self._adapter is None else model.get_base_model().base_model)
        reference: Any = getattr(trainer, "ref_model", None)
        if reference is not None:
            self._watch(reference, reference.base_model, is_reference=True)
        trainer.compute_loss = self._around(trainer.compute_loss)
        trainer.get_batch_samples = self._around(self._counted(trainer.get_batch_samples))

    def start(self) -> None:
        """Begin a lap."""
        wait_for_device()
        self._lap, self._masks = Counter(), []
        self._clocks = clocks()

    def stop(self) -> Lap:
        """The lap that `start` began."""
        wait_for_device()
        spent = {name: now - self._clocks[name] for name, now in clocks().items()}
        # Masks are counted when the clocks have stopped
        for name, mask in self._masks:
            self._lap[name] += _padding(mask) if name == "padding" else int(mask.sum())
        return spent | dict(self._lap)

    def _watch(self, model: Any, backbone: Any, *, is_reference: bool = False) -> None:
        def subtract(sign: int) -> None:
            if self._is_around:  # checks of the reference after a step run forwards, too
                self._lap["around"] += sign * time.thread_time()

        model.register_forward_pre_hook(lambda *_: subtract(1))
        model.register_forward_hook(lambda *_: subtract(-1))

        def count(module, args, kwargs):
            given = kwargs.get("input_ids")
            if given is None:
                given = args[0] if args else kwargs["inputs_embeds"][..., 0]
            size = given.numel()
            if is_reference or (self._adapter is not None and self._adapter.disable_adapters):
                self._lap["reference"] += size
            elif torch.is_grad_enabled():
                self._lap["policy"] += size
                self._masks.append(("padding", kwargs.get("attention_mask")))
            else:
                self._lap["policy_no_grad"] += size

        backbone.register_forward_pre_hook(count, with_kwargs=True)

    def _around(self, function: Callable) -> Callable:
        def timed(*args, **kwargs):
            self._lap["around"] -= time.thread_time()
            self._is_around = True
            try:
                return function(*args, **kwargs)
            finally:
                self._is_around = False
                self._lap["around"] += time.thread_time()

        return timed

    def _counted(self, get_batch_samples: Callable) -> Callable:
        def counted(*args, **kwargs):
            batches, number = get_batch_samples(*args, **kwargs)
            # The latter is that of TRL's KTO before 1.8
            names = ("attention_mask", "completion_attention_mask")
            self._masks += [("tokens", batch[name]) for batch in batches for name in names if name in batch]
            return batches, number

        return counted


def clocks() -> dict[str, float]:
    """Seconds of all threads, of the wall, and of this thread."""
    return {"cpu": time.process_time(), "wall": time.perf_counter(), "thread": time.thread_time()}


def _padding(mask: torch.Tensor | None) -> int:
    """Positions that are padding, of an attention mask as the backbone is given it."""
    if mask is None:
        return 0
    if mask.dim() == 2:
        return int((mask == 0).sum())
    # In a mask over pairs of positions, padding sees itself alone, as each sequence's first position does
    allowed = mask if mask.dtype == torch.bool else mask == 0
    return int((allowed.sum(-1) == 1).sum()) - mask.size(0)


class Turns(TrainerCallback):
    """Runs a trainer's `train()` in a thread, which works when it is told to and otherwise waits.

    Only one of several such threads works at a time.

    Args:
        trainer: not begun.
        threads: of torch, in that thread; 0 leaves them as they are.
    """

    def __init__(self, trainer: Trainer, threads: int = 0):
        self._trainer = trainer
        self._threads = threads
        self._meter = Meter(trainer)
        self._may_work, self._waits = threading.Semaphore(0), threading.Semaphore(0)
        self._laps: list[Lap] = []
        self._left = 0
        self._failure: BaseException | None = None
        trainer.add_callback(self)
        self._thread = threading.Thread(target=self._train, daemon=True)
        self._thread.start()
        self._let_work()  # up to the first step

    def steps(self, count: int) -> list[Lap]:
        """Make `count` optimiser steps and return their laps."""
        self._laps, self._left = [], count
        self._let_work(release=True)
        return self._laps

    def finish(self) -> None:
        """Let `train()` end, once it has made all its steps."""
        self._may_work.release()
        self._thread.join()

    def _let_work(self, release: bool = False) -> None:
        if release:
            self._may_work.release()
        self._waits.acquire()
        if self._failure is not None:
            raise self._failure

    def _train(self) -> None:
        try:
            if self._threads:
                torch.set_num_threads(self._threads)
            self._trainer.train()
        except BaseException as failure:  # told in the thread that waits for this one
            self._failure = failure
        self._waits.release()

    def _wait(self) -> None:
        self._waits.release()
        self._may_work.acquire()
        self._meter.start()

    def on_epoch_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self._wait()

    def on_step_end(self, args, state, control, **kwargs):
        self._laps.append(self._meter.stop())
        self._left -= 1
        if self._left == 0:
            self._wait()
        else:
            self._meter.start()


def share_freed_memory() -> None:
    """Have threads use the memory that other threads freed, which glibc keeps for each thread by itself."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


class PeakMemory(TrainerCallback):
    """Bytes in use before the first step and at most: of the GPU's allocator, or the process's resident set."""

    def __init__(self):
        self.before = self.peak = 0
        self._is_over = threading.Event()

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.before:
            return
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return
        process = psutil.Process()
        self.before = self.peak = process.memory_info().rss

        def watch():
            while not self._is_over.wait(0.002):
                self.peak = max(self.peak, process.memory_info().rss)

        threading.Thread(target=watch, daemon=True).start()

    def on_train_end(self, args, state, control, **kwargs):
        self._is_over.set()
        if torch.cuda.is_available():
            self.peak = torch.cuda.max_memory_allocated()


def wait_for_device() -> None:
    """Until a GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
