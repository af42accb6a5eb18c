"""A reference held to what it must be: the model before training, at the start, while training, and after it."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from world import make_rows, make_trainer, weights  # noqa

# Nats by which the sums of two computations of the same row may differ in float32
ROUNDING = 2e-3

BETA = 1.0  # so that an implicit reward is a log-ratio
MOVING = {"beta": BETA, "pointwise": True, "learning_rate": 3e-2, "lr_scheduler_type": "constant", "max_steps": 3}
STILL = MOVING | {"learning_rate": 1e-12}


def load(folder: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder)


def own_logps(model: torch.nn.Module, tokenizer, rows) -> np.ndarray:
    """`(N,)` log π of the rows by the model's logits in evaluation mode; the model is left in its mode."""
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    found = []
    for row in rows:
        start = len(tokenizer(row["prompt"])["input_ids"])
        ids = torch.tensor([tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"]])
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        log_probs = logits[0, -ids.size(1) :].double().log_softmax(-1)[start - 1 : -1]
        found.append(log_probs.gather(1, ids[0, start:, None]).sum().item())
    for module, training in was_training.items():
        module.training = training
    return np.array(found)


def losses(trainer) -> list[float]:
    """The preference loss of each step, without what experts add."""
    return [log["loss/preference"] for log in trainer.state.log_history if "loss" in log]


def hold(trainer, rows, folder, tokenizer=None) -> None:
    """Assert that the reference is the model before training, to the bit the same when asked twice, and stays so."""
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(folder)
    policy = trainer.accelerator.unwrap_model(trainer.model)
    before = own_logps(policy, tokenizer, rows)
    first, again = (trainer.predict(rows).predictions for _ in range(2))
    assert np.array_equal(first, again), "asked twice, the reference gives other values"
    assert np.abs(first).max() < ROUNDING, "the reference is not the model before training"
    trainer.train()
    after = own_logps(trainer.accelerator.unwrap_model(trainer.model), tokenizer, rows)
    assert np.abs(after - before).max() > 0.05, "training moved nothing"
    found = trainer.predict(rows).predictions
    assert found == pytest.approx(after - before, abs=ROUNDING), "the reference has moved"


def lora(**kwargs) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | kwargs)


def in_memory(folder, config, *, seed=1) -> PeftModel:
    """A `PeftModel` whose adapter is away from where it starts, as if it had been trained before."""
    torch.manual_seed(seed)
    model = get_peft_model(load(folder), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model
