"""What the trainers do about TRL's patches of a model's forward."""

import copy

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from world import NEEDS_TRITON, make_rows, make_trainer, plain_logps, trains_with_trl

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
    if not NEEDS_TRITON:
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


@trains_with_trl
def test_copies_are_mended_below_what_accelerate_wraps_a_forward_in(tiny_gpt2, tmp_path):
    rows = Dataset.from_list([{"text": "Hi there. How are you?"}] * 4)
    settings = {"report_to": "none", "bf16": True, "max_steps": 1, "use_cpu": True, "save_strategy": "no"}
    theirs = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(tiny_gpt2), args=SFTConfig(str(tmp_path), **settings), train_dataset=rows
    )
    theirs.train()
    trainer = make_trainer(theirs.model, ROWS, tmp_path / "own", max_steps=2, bf16=True, use_cpu=True)
    trainer.train()
    again = make_trainer(
        AutoModelForCausalLM.from_pretrained(tiny_gpt2),
        ROWS,
        tmp_path / "again",
        max_steps=2,
        bf16=True,
        use_cpu=True,
        ref_model=copy.deepcopy(trainer.ref_model),
    )
    again.train()


def test_forwards_with_accelerates_hooks_are_left_alone(tiny_gpt2, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    add_hook_to_module(model, ModelHook())
    DPOTrainer(
        model,
        args=DPOConfig(str(tmp_path), report_to="none", bf16=False, use_cpu=True),
        train_dataset=Dataset.from_list(PAIRS),
    )
    make_trainer(model, ROWS, tmp_path, max_steps=1).train()


def test_a_second_trainer_takes_the_adapter_as_the_first_one_left_it(tiny_gpt2, tmp_path):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_gpt2), LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"])
    )
    first = make_trainer(model, ROWS, tmp_path / "1", max_steps=2, learning_rate=1e-2)
    first.train()
    second = make_trainer(first.model, ROWS, tmp_path / "2", max_steps=1)
    # The policy is its reference again
    assert second.score(ROWS)["reward"][:] == pytest.approx([0.0] * len(ROWS), abs=1e-5)
    second.train()
