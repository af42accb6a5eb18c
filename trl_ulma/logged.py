"""The metrics that a training logs: of the steps since the last log, and of an evaluation."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from transformers.trainer_utils import IntervalStrategy

from trl_ulma.main_process import get_logger
from trl_ulma.metrics import EVALUATED, Ratios, RatioSums, figures
from trl_ulma.objective import BatchLoss
from trl_ulma.ranking import ranking_figures

logger = get_logger(__name__)


class LoggedFigures:
    """Adds up the metrics of batches over micro-batches and processes.

    Attributes:
        evaluated: `(N, 3)` implicit reward, label and whether it is continuous, of the rows of the last evaluation.
    """

    def __init__(self, accelerator: Any, args: Any):
        self.evaluated: np.ndarray = np.empty((0, 3))
        self._accelerator = accelerator
        self._args = args
        self._sums = RatioSums(accelerator.device)
        self._rows: list[torch.Tensor] = []
        self._not_finite: list[int] = []
        self._told_of_sft = False

    def add(
        self, found: BatchLoss, label: torch.Tensor, row: torch.Tensor, real: torch.Tensor, *, is_evaluated: bool
    ) -> None:
        """Add a batch. Rows for which `real` is False are repetitions and are not counted.

        Args:
            row: `(B,)` the rows' numbers in their dataset.
        """
        self._sums.add(found.ratios, real)
        if is_evaluated:
            rows = found.table
            if rows is None:
                rows = torch.stack([found.rewards.double(), label.double(), found.continuous.double()], 1)
            self._rows.append(rows[real].cpu())
            # With log_z="group", losses of batches lack the preference term
            is_finite = found.weighted.isfinite() & found.policy_logps.isfinite()
            self._not_finite += row[real & ~is_finite].tolist()

    def reset(self) -> None:
        """Discard the sums since the last log, for example of an attempt that ran out of memory."""
        self._sums.reset()

    def take(self) -> dict[str, float]:
        """The metrics since the last log. Logs a warning, once, if the SFT term dominates."""
        found = figures(self._accelerator.reduce(self._sums.totals(), "sum"))
        self._sums.reset()
        self._tell_of_dominant_sft(found)
        return found

    @contextmanager
    def of_evaluation(
        self, prefix: str, of_table: Callable[[torch.Tensor], tuple[Ratios, torch.Tensor]] | None = None
    ) -> Iterator[dict[str, float]]:
        """A context for an evaluation. Its metrics are in the dict at the end. Logs a warning if losses of rows are not
        finite.

        Args:
            prefix: of the names of the evaluation's metrics.
            of_table: computes from the tables of all batches the metrics that they lack, and the columns of
                `evaluated`; see `Objective.of_table`.
        """
        training, self._sums = self._sums, RatioSums(self._accelerator.device)
        self._rows, self._not_finite, found = [], [], {}
        try:
            yield found
            totals = self._accelerator.reduce(self._sums.totals(), "sum")
        finally:
            self._sums = training
        everything = torch.cat(gather_object([torch.cat(self._rows)]))
        wrong = sorted(gather_object(self._not_finite))
        if wrong:
            shown = ", ".join(map(str, wrong[:10])) + (f" and {len(wrong) - 10} others" if len(wrong) > 10 else "")
            logger.warning(
                f"In the evaluation {prefix!r}, the loss of {len(wrong):,} of {len(everything):,} rows is NaN or "
                f"infinite, and so are {prefix}_loss and other metrics. The rows of the dataset are: {shown}. Check "
                "them, or compute in float32. If these are all rows, training has broken the weights: lower the "
                "learning rate."
            )
        if of_table is not None:
            ratios, everything = of_table(everything)
            sums = RatioSums(torch.device("cpu"))
            sums.add(ratios, torch.ones(len(everything), dtype=torch.bool))
            totals = totals.cpu() + sums.totals()
        found |= figures(totals)
        found.pop("num_tokens", None)
        self.evaluated = everything.numpy()
        rewards, label, continuous = everything.unbind(1)
        found |= ranking_figures(rewards, label, continuous.bool())

    def _tell_of_dominant_sft(self, found: dict[str, float]) -> None:
        """Warn once if the SFT term of a demonstration is more than ten times a compared row's preference term."""
        sft, preference = found.get("loss/sft"), found.get("loss/preference")
        if self._told_of_sft or sft is None or not preference:
            return
        weight = getattr(self._args, "sft_weight", 1.0)
        ratio = weight * sft / preference
        if ratio > 10:
            self._told_of_sft = True
            lower = min(self._args.beta, 10 * weight / ratio)
            logger.warning(
                f"The SFT term dominates: so far a demonstration's loss is {sft:.3g} nats, and the preference loss of "
                f"a compared row is {preference:.3g}. With sft_weight={weight:g} they are {ratio:.0f} to 1. "
                f"Lower sft_weight, for example to {lower:.2g}, if the feedback is to count as much. If nothing is to "
                "be imitated, use PointwiseDPOTrainer."
            )


def with_own_names(metrics: dict[str, Any], prefix: str) -> dict[str, Any]:
    """What `compute_metrics` returned, with other names for those that the trainer's own metrics have.

    Args:
        prefix: of the evaluation, which names may already begin with.

    Example:
        >>> with_own_names({"accuracy": 0.5}, "eval")
        {'accuracy': 0.5}
    """
    taken = [name for name in metrics if name.removeprefix(f"{prefix}_") in EVALUATED]
    new = {name: f"compute_metrics/{name.removeprefix(f'{prefix}_')}" for name in taken}
    if taken:
        logger.warning(
            f"compute_metrics returns {', '.join(taken)}, which the trainer logs itself. Yours is logged as "
            f"{', '.join(f'{prefix}_{name}' for name in new.values())}. Choose another name to change that."
        )
    return {new.get(name, name): value for name, value in metrics.items()}


def is_logged(args: Any, state: Any, *, ends_epoch: bool) -> bool:
    """Whether the next optimizer step will be logged. The result is the same on all processes.

    Logs that a callback asks for are not known here. They lack the metrics that need the reference on all rows.
    """
    step = state.global_step + 1
    if args.logging_strategy == IntervalStrategy.EPOCH:
        return ends_epoch or step >= state.max_steps  # the last epoch may end early
    first = args.logging_first_step and step == 1
    return first or (args.logging_strategy == IntervalStrategy.STEPS and step % state.logging_steps == 0)
