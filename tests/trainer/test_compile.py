"""A compiled model gives the same losses."""

import shutil

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from world import make_rows, make_trainer, mixed_rows

SETTINGS = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "beta": 0.5}
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
KINDS = {
    "full": {},
    "lora": {"peft_config": LORA},
    "sft": {"positive_loss": "sft", "negative_loss": "none"},
    "precomputed": {"precompute_ref_log_probs": True},
    "packed": {"padding_free": True},
    "learned": {"log_z": "learned"},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
}


@pytest.fixture(autouse=True)
def fresh():
    """What one test compiled is not the next one's."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def figures(folder, tmp_path, given: bool = False, **settings) -> list[dict[str, float]]:
    rows = mixed_rows(8) if "log_z" not in settings else make_rows(8, sft_mask=[i % 4 == 0 for i in range(8)])
    if given:
        settings["ref_model"] = AutoModelForCausalLM.from_pretrained(folder)
    trainer = make_trainer(
        folder, rows, tmp_path, eval_dataset=rows, eval_strategy="steps", eval_steps=3, **SETTINGS | settings
    )
    trainer.train()
    trainer.evaluate()
    # An adapter's numbers on the command line come from the same model
    return [
        {name: value for name, value in log.items() if "runtime" not in name and "per_second" not in name}
        for log in trainer.state.log_history
    ]


def assert_alike(compiled, plain):
    assert len(compiled) == len(plain)
    for one, other in zip(compiled, plain, strict=True):
        for name in other.keys() - {"total_flos"}:
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-4), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_model_trains_as_an_uncompiled_one(tiny_llama, tmp_path, kind):
    """With dynamo's own backend, which compiles nothing and traces everything."""
    plain = figures(tiny_llama, tmp_path / "plain", **KINDS[kind])
    compiled = figures(
        tiny_llama, tmp_path / "compiled", torch_compile=True, torch_compile_backend="eager", **KINDS[kind]
    )
    assert_alike(compiled, plain)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_with_inductor(tiny_llama, tmp_path, kind):
    plain = figures(tiny_llama, tmp_path / "plain", **KINDS[kind])
    compiled = figures(tiny_llama, tmp_path / "compiled", torch_compile=True, **KINDS[kind])
    assert_alike(compiled, plain)


def test_against_a_given_reference(tiny_llama, tmp_path):
    compiled = figures(tiny_llama, tmp_path / "compiled", given=True, torch_compile=True, torch_compile_backend="eager")
    assert_alike(compiled, figures(tiny_llama, tmp_path / "plain", given=True))
