"""The same seed gives the same numbers, whatever the caller's random state, and each seed decides what it should."""

import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from world import make_rows, make_trainer, weights

SETTINGS = {"disable_dropout": False, "learning_rate": 1e-3, "max_steps": 4, "per_device_train_batch_size": 2}
KINDS = {
    "all weights": {},
    "adapter": {"lora": True},
    "precomputed": {"precompute_ref_log_probs": True},
    "prompts run once": {"share_prompts": True},
}


def train(folder, tmp_path, *, lora=False, **kwargs) -> tuple[torch.Tensor, torch.Tensor, list[dict]]:
    """(weights before, weights after, logs) of a run that begins in whatever random state the process is in."""
    if lora:
        kwargs["peft_config"] = LoraConfig(r=4, target_modules=["c_attn"], task_type="CAUSAL_LM", lora_dropout=0.2)
    trainer = make_trainer(folder, make_rows(12), tmp_path, **SETTINGS | kwargs)
    before = weights(trainer.model)
    trainer.train()
    times = ("runtime", "per_second", "total_flos")
    logs = [{k: v for k, v in log.items() if not any(t in k for t in times)} for log in trainer.state.log_history]
    return before, weights(trainer.model), logs


def stir(seed: int) -> None:
    """Another random state of the process."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_numbers(tiny_gpt2, tmp_path, kind):
    stir(1)
    before, after, logs = train(tiny_gpt2, tmp_path, **KINDS[kind])
    stir(2)
    again = train(tiny_gpt2, tmp_path, **KINDS[kind])
    assert torch.equal(before, again[0])
    assert torch.equal(after, again[1])
    assert logs == again[2]
    other = train(tiny_gpt2, tmp_path, seed=43, **KINDS[kind])
    assert torch.equal(before, other[0]) == (kind != "adapter")
    assert not torch.equal(after, other[1])


def order(folder, tmp_path, **kwargs) -> list[int]:
    """The rows in the order in which they are trained on."""
    trainer = make_trainer(folder, make_rows(12), tmp_path, per_device_train_batch_size=1, max_steps=12, **kwargs)
    return [int(batch["row"][0]) for batch in trainer.get_train_dataloader()]


def test_data_seed_decides_the_order_of_rows_and_nothing_else(tiny_gpt2, tmp_path):
    by_seed = order(tiny_gpt2, tmp_path, seed=1)
    assert sorted(by_seed) == list(range(12))
    assert order(tiny_gpt2, tmp_path, seed=1) == by_seed != order(tiny_gpt2, tmp_path, seed=2)
    by_data_seed = order(tiny_gpt2, tmp_path, seed=1, data_seed=5)
    assert order(tiny_gpt2, tmp_path, seed=2, data_seed=5) == by_data_seed != by_seed
    first = train(tiny_gpt2, tmp_path, lora=True, data_seed=5)
    assert torch.equal(first[0], train(tiny_gpt2, tmp_path, lora=True, data_seed=6)[0])


def test_dropout_is_decided_by_seed_and_is_off_unless_asked_for(tiny_gpt2, tmp_path):
    alike = Dataset.from_list([make_rows(1)[0]] * 4)  # so that their order does not matter

    def first_loss(**kwargs):
        trainer = make_trainer(tiny_gpt2, alike, tmp_path, max_steps=1, **kwargs)
        trainer.train()
        return trainer.state.log_history[0]["loss"]

    assert first_loss(seed=1) == first_loss(seed=2)
    dropped = first_loss(seed=1, disable_dropout=False)
    assert dropped == first_loss(seed=1, disable_dropout=False)
    assert len({dropped, first_loss(seed=2, disable_dropout=False), first_loss(seed=1)}) == 3
