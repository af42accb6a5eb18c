"""What is decided about the micro-batches of an optimiser step before they are run."""

from typing import Any

import torch
from accelerate import Accelerator


class RepeatedRows:
    """Tells the rows that a sampler repeats, so that all processes have as many, from the real ones; one an epoch.

    Args:
        accelerator: of the trainer.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self._last_row = -1

    def real(self, batch: dict[str, Any], *, is_last: bool) -> torch.Tensor:
        """`(B,)` bool on the CPU, False for repeated rows.

        Args:
            batch: a micro-batch, with `label` and, of a stream, `row`.
            is_last: whether it is the newest that the data loader gave.
        """
        size = len(batch["label"])
        real = torch.ones(size, dtype=torch.bool)
        if self.accelerator.num_processes == 1:
            return real
        state = self.accelerator.gradient_state
        if state.remainder > 0 and is_last and state.end_of_dataloader:
            return torch.arange(size) + self.accelerator.process_index * size < state.remainder
        if state.remainder < 0 and "row" in batch:
            # A stream's rows come in their order, and what comes again is a repetition
            for i, row in enumerate(batch["row"].tolist()):
                real[i] = row > self._last_row
                self._last_row = max(row, self._last_row)
        return real


def plan_references(batches: list[dict[str, Any]], compared: list[torch.Tensor], *, at_least_one: bool) -> None:
    """Give each micro-batch, as `asked`, the rows that the reference is asked for and the width of the longest.

    All micro-batches of a step are planned together, since reading them off the device synchronises.

    Args:
        batches: micro-batches with `attention_mask` `(B, T)`; written to.
        compared: of each, `(B,)` bool: whether the row's loss contains the reference.
        at_least_one: ask for a row even where none needs it, since other processes' forwards wait for this one's.
    """
    if not batches:  # a stream that ended with the last step
        return
    plans = []
    for batch, rows in zip(batches, compared, strict=True):
        positions = torch.arange(1, batch["attention_mask"].size(1) + 1, device=rows.device)
        plans.append(torch.stack([rows, (batch["attention_mask"] * positions).amax(1)]))
    sizes = [plan.size(1) for plan in plans]
    for batch, (needed, widths) in zip(batches, torch.cat(plans, 1).cpu().split(sizes, 1), strict=True):
        asked = needed.nonzero()[:, 0].tolist() or ([0] if at_least_one else [])
        batch["asked"] = (asked, int(widths[asked].max()) if asked else 0)
