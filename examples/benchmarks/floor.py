"""What no trainer can save: the policy's forward and backward on a step's real tokens, without padding."""

from pathlib import Path
from typing import Any

import torch
from methods import World
from torch.nn.functional import cross_entropy
from transformers import Trainer
from turns import Lap, clocks, wait_for_device

FLOORS = ("floor", "floor-shared")


class Floor:
    """Takes turns as `turns.Turns` does: per step, each sequence alone through the policy, forward and backward.

    A sequence is a row, or, for `floor-shared`, a prompt followed by all its completions. The head runs on the
    positions that are scored. There is no reference, metric, optimizer or log.

    Args:
        world: of the run.
        method: one of `FLOORS`.
        folder: for the trainer that is asked for the batches, the policy and its adapters.
        steps: of the run.
    """

    def __init__(self, world: World, method: str, folder: Path, steps: int):
        trainer: Trainer = world.trainer("pointwise-dpo", folder / method, steps)
        self._shared = method == "floor-shared"
        model: Any = trainer.model
        self._model = model.get_base_model() if world.settings.lora_rank else model
        self._autocast = trainer.compute_loss_context_manager
        self._batches = self._forever(trainer)
        self._device = trainer.args.device

    @staticmethod
    def _forever(trainer: Trainer):
        while True:
            yield from trainer.get_train_dataloader()

    def steps(self, count: int) -> list[Lap]:
        """The laps of `count` steps."""
        return [self._step() for _ in range(count)]

    def finish(self) -> None:
        """As of a trainer: there is nothing to wait for."""

    def _step(self) -> Lap:
        batch = next(self._batches)
        sequences = self._sequences(batch)
        tokens = int(batch["attention_mask"].sum())
        wait_for_device()
        began = clocks()
        with self._autocast():
            for ids, scored in sequences:
                hidden = self._model.base_model(input_ids=ids[None], use_cache=False)[0][0, :-1]
                logits = self._model.get_output_embeddings()(hidden[scored[1:]])
                cross_entropy(logits.float(), ids[1:][scored[1:]], reduction="sum").backward()
        wait_for_device()
        spent = {name: now - began[name] for name, now in clocks().items()}
        self._model.zero_grad()
        return spent | {"policy": sum(len(ids) for ids, _ in sequences), "tokens": tokens}

    def _sequences(self, batch: dict[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(token ids, which of them are scored) of each sequence."""
        found: dict[Any, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        rows = zip(batch["input_ids"], batch["attention_mask"].bool(), batch["completion_mask"].bool(), strict=True)
        for number, (ids, real, scored) in enumerate(rows):
            ids, scored = ids[real], scored[real]
            prompt = int(scored.int().argmax())
            key = tuple(ids[:prompt].tolist()) if self._shared else number
            start = prompt if key in found else 0
            found.setdefault(key, []).append((ids[start:], scored[start:]))
        return [
            tuple(torch.cat(parts).to(self._device) for parts in zip(*each, strict=True)) for each in found.values()
        ]
