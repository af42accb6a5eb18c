"""Callbacks of a training: Ctrl-C, and the checks at its start and end."""

import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from trl_ulma.main_process import get_logger

logger = get_logger(__name__)


class Interruption(TrainerCallback):
    """Stops training after Ctrl-C once the current optimizer step has finished, and saves a checkpoint.

    A second Ctrl-C stops immediately. Use the callback as a context manager around the training. Processes can notice
    the signal in different steps, so they have to agree: `noticed` is what this process knows, `agreed` what all know.
    """

    def __init__(self, accelerator: Any):
        self._accelerator = accelerator
        self.noticed = False
        self.agreed = False
        self.is_training = False
        self._previous: Any = None

    def __enter__(self) -> "Interruption":
        self.noticed = self.agreed = False
        self.is_training = True
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._notice)
        return self

    def __exit__(self, *exception: object) -> None:
        self.is_training = False
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def _notice(self, number: int, frame: FrameType | None) -> None:
        if self.noticed:
            raise KeyboardInterrupt
        self.noticed = True
        # print is not safe here, because the signal can interrupt another print
        os.write(
            2, b"\nInterrupted: finishing this step and writing a checkpoint. Press Ctrl-C again to stop immediately.\n"
        )

    def agree(self) -> bool:
        """Tell all processes if one of them has noticed the signal."""
        noticed = torch.tensor(float(self.noticed), device=self._accelerator.device)
        self.agreed = bool(self._accelerator.reduce(noticed, "sum") > 0)
        return self.agreed

    def on_step_end(self, args, state, control, **kwargs):
        """Request a checkpoint and the end of the training."""
        self._stop(args, state, control)

    def on_epoch_end(self, args, state, control, **kwargs):
        """The same, for a signal after the last step of an epoch. Training that stops ends without an evaluation."""
        if self.agreed:
            control.should_evaluate = control.should_save = False
        self._stop(args, state, control)

    def on_evaluate(self, args, state, control, **kwargs):
        """The same, for a signal during an evaluation in training."""
        if self.is_training:
            self._stop(args, state, control)

    def on_save(self, args, state, control, **kwargs):
        """The end of the training, for a signal while the checkpoint of this step was written."""
        self._stop(args, state, control)
        control.should_save = False

    def _stop(self, args: Any, state: Any, control: Any) -> None:
        if self.agreed or not self.agree():
            return
        control.should_save = control.should_training_stop = True
        control.should_evaluate = False
        folder = f"{args.output_dir}/checkpoint-{state.global_step}"
        logger.warning(
            f"Interrupted: saving step {state.global_step} to {folder}. Resume with resume_from_checkpoint=True (on "
            "the command line --resume_from_checkpoint True)."
        )


class LooksForGradients(TrainerCallback):
    """Warns if no gradient reaches any trained weight of the model in the first steps."""

    STEPS = 3

    def __init__(self):
        self._left = self.STEPS

    def on_train_begin(self, args, state, control, **kwargs):
        """Look again in each training."""
        self._left = self.STEPS

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        """Look at the gradients of this step, until some are found."""
        if self._left <= 0 or model is None:
            return
        # Of sharded weights, those on this process. DeepSpeed keeps its gradients to itself
        found = [p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad for p in model.parameters()]
        found = [grad for grad in found if grad is not None]
        if not found or any(bool(grad.any()) for grad in found):
            self._left = 0
            return
        self._left -= 1
        if self._left == 0:
            logger.warning(
                f"No gradient has reached a trained weight in the first {self.STEPS} steps: the model learns nothing. "
                'Look for rows that do not count (weight 0, or the loss "none"), trained weights that the forward does '
                "not use, or an adapter that waits for tokens which no row has (alora_invocation_tokens)."
            )


# The figures that the terminal shows, of a training and, with "eval_", of an evaluation
_SHOWN = (
    *("loss", "loss/sft", "rewards/margins", "rewards/accuracies", "rewards/auc", "rewards/spearman"),
    *("kl", "learning_rate"),
)


def in_words(logs: Mapping[str, Any], state: Any, best: str | None = None) -> str:
    """The most important figures of a log, in one line. All of them if it has none of these.

    Args:
        logs: the figures by name.
        state: the trainer's state.
        best: the metric for the best model, which is shown, too.

    Example:
        >>> from types import SimpleNamespace
        >>> state = SimpleNamespace(global_step=20, max_steps=81)
        >>> in_words({"loss": 0.71668, "grad_norm": 7.6, "learning_rate": 7.654e-05, "kl": 0.771}, state)
        'Step 20 of 81: loss 0.7167, kl 0.771, learning_rate 7.654e-05'
        >>> in_words({"eval_loss": 0.656, "eval_rewards/mse": 0.5}, state, "rewards/mse")
        'Evaluation at step 20 of 81: eval_loss 0.656, eval_rewards/mse 0.5'
        >>> in_words({"train_loss": 0.6, "train_runtime": 26.0, "kl": 1.1}, state)
        'Trained for 26 seconds: train_loss 0.6'
    """
    if "train_loss" in logs:  # also has the figures of the steps since the last log
        return f"Trained for {_duration(logs['train_runtime'])}: train_loss {logs['train_loss']:.4g}"
    shown: dict[str, None] = dict.fromkeys([*_SHOWN, *([best.removeprefix("eval_")] if best else [])])
    names: list[str] = [name for each in shown for name in (each, f"eval_{each}") if name in logs] or list(logs)
    figures = (
        f"{name} {logs[name]:.4g}" if isinstance(logs[name], float) else f"{name} {logs[name]}" for name in names
    )
    begin = "Evaluation at step" if names[0].startswith("eval_") else "Step"
    return f"{begin} {state.global_step:,} of {state.max_steps:,}: {', '.join(figures)}"


class FewFigures(PrinterCallback):
    """Prints the most important figures of each log, in place of transformers' callback that prints all."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Print a line."""
        if state.is_local_process_zero and logs:
            print(in_words(logs, state, args.metric_for_best_model), flush=True)


class FewFiguresAboveBar(ProgressCallback):
    """The same, above the progress bar of a training. An evaluation after the training has none."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Print a line."""
        if state.is_world_process_zero and logs:
            say = print if self.training_bar is None else self.training_bar.write
            say(in_words(logs, state, args.metric_for_best_model))


def print_few_figures(trainer: Any) -> None:
    """Replace the callback that prints all figures of a log. Logs, trackers and files keep all of them."""
    for theirs, own in ((PrinterCallback, FewFigures), (ProgressCallback, FewFiguresAboveBar)):
        if trainer.pop_callback(theirs) is not None:
            trainer.add_callback(own)


class TimeLeft(TrainerCallback):
    """Says how many steps there are, and after the first ones how long the others will take, without a progress bar.

    Args:
        say: called with a line of text.
    """

    def __init__(self, say: Callable[[str], None]):
        self._say = say
        self._first = 0
        self._begun = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        """Say the number of steps."""
        self._first, self._begun = state.global_step, time.monotonic()
        left = state.max_steps - state.global_step
        self._say(f"Training begins: {left:,} step{'' if left == 1 else 's'}.")

    def on_step_end(self, args, state, control, **kwargs):
        """Say the time that is left, after the first step, a tenth, a quarter, a half and three quarters of them."""
        done, left = state.global_step - self._first, state.max_steps - state.global_step
        total = done + left
        if left and done in (1, total // 10, total // 4, total // 2, total * 3 // 4):
            seconds = (time.monotonic() - self._begun) / done * left
            # Later, the time so far contains some of them
            more = ", plus evaluations" if done == 1 and args.eval_strategy != "no" else ""
            self._say(f"Step {state.global_step:,} of {state.max_steps:,}: about {_duration(seconds)} left{more}.")


def _duration(seconds: float) -> str:
    """The time in words.

    Example:
        >>> _duration(40), _duration(700), _duration(20_000)
        ('40 seconds', '12 minutes', '5.6 hours')
    """
    if seconds < 100:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"


class Calls(TrainerCallback):
    """Calls functions at the events of a training, with the trainer's state.

    Args:
        **functions: by the names of the events, such as `on_train_begin`.
    """

    def __init__(self, **functions: Callable[[Any], None]):
        for event, function in functions.items():
            # Unlike a function, copy.deepcopy copies a partial, and with a trainer the methods to call
            setattr(self, event, functools.partial(_call_with_state, function))


class OnSave(Calls):
    """Calls a function after a checkpoint was saved. transformers warns if a trainer has two callbacks of one class."""

    def __init__(self, function: Callable[[Any], None]):
        super().__init__(on_save=function)


def _call_with_state(function: Callable[[Any], None], args: Any, state: Any, control: Any, **kwargs: Any) -> None:
    function(state)
