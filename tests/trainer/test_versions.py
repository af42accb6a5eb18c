"""What the trainers do about TRL's patches of a model's forward."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer
from world import make_rows, make_trainer, plain_logps

ROWS = make_rows(6)
PAIRS = [{"prompt": "Hi", "chosen": " Yes.", "rejected": " No."}] * 4


@pytest.mark.parametrize("peft", [None, LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"])])
def test_the_models_forward_is_as_before(tiny_gpt2, tmp_path, peft):
    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    trainer = make_trainer(model, ROWS, tmp_path, max_steps=1, peft_config=peft)
    trainer.train()
    assert "forward" not in vars(model)
    assert trainer.ref_model is None or "forward" not in vars(trainer.ref_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    theirs = DPOConfig(str(tmp_path), report_to="none", bf16=False, max_steps=1, use_cpu=True)
    dpo = DPOTrainer(model, args=theirs, train_dataset=Dataset.from_list(PAIRS))
    patched = vars(model).get("forward")
    make_trainer(model, ROWS, tmp_path, max_steps=1)
    assert vars(model).get("forward") is patched  # which the other trainer still needs
    dpo.train()


def test_copies_of_models_that_other_trainers_have_patched_run_their_own_weights(tiny_gpt2, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    theirs = DPOConfig(str(tmp_path), report_to="none", bf16=False, max_steps=1, use_cpu=True)
    DPOTrainer(model, args=theirs, train_dataset=Dataset.from_list(PAIRS))
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    trainer = make_trainer(copied, ROWS, tmp_path / "own", max_steps=3, learning_rate=1e-3, beta=0.5)
    trainer.train()  # and its reference, a copy of the copy, stays where it was
    own = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    wanted, _ = plain_logps(tiny_gpt2, ROWS, own.double())
    policy, _ = plain_logps(tiny_gpt2, ROWS, copy.deepcopy(trainer.model).double())
    assert abs(policy - wanted).max() > 0.1
    assert trainer.score(ROWS)["reward"][:] == pytest.approx(0.5 * (policy - wanted), abs=1e-3)
    again = make_trainer(trainer.model, ROWS, tmp_path / "again", max_steps=2, learning_rate=1e-3)
    again.train()
