"""A training on a GPU logs what the same training logs on the CPU in float32.

CUDA_VISIBLE_DEVICES=0 pytest tests/gpu     # on a machine with a GPU: all members
pytest tests/gpu                            # elsewhere: the members that a CPU has
"""

import importlib.util
import math

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from world import make_trainer, several_answers

from trl_ulma import ULMAConfig, ULMATrainer
from trl_ulma.judge import Judge

HAS_GPU = torch.cuda.is_available()
HAS_FLASH = HAS_GPU and importlib.util.find_spec("flash_attn") is not None
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")]
needs_flash = [pytest.mark.gpu, pytest.mark.skipif(not HAS_FLASH, reason="needs a GPU and flash-attn")]
FLASH = {"padding_free": True, "bf16": True, "attention": "flash_attention_2"}
# Settings, and by how much what is logged may be off, relative to 1 + its size
MEMBERS = [
    pytest.param({}, 1e-3, id="float32"),
    pytest.param({"share_prompts": True}, 1e-3, id="shared-prompts"),
    pytest.param({"padding_free": True}, 1e-3, id="packed"),
    pytest.param({"precompute_ref_log_probs": True}, 1e-3, id="precomputed"),
    pytest.param({"gradient_checkpointing": True}, 1e-3, id="checkpointing"),
    pytest.param({"dataloader_pin_memory": True, "dataloader_num_workers": 1}, 1e-3, id="pinned", marks=needs_gpu),
    pytest.param({"activation_offloading": True}, 1e-3, id="offloading", marks=needs_gpu),
    pytest.param({"torch_compile": True}, 1e-3, id="compiled", marks=needs_gpu),
    pytest.param({"tf32": True}, 0.02, id="tf32", marks=needs_gpu),
    pytest.param({"bf16": True}, 0.05, id="bfloat16"),
    pytest.param({"bf16": True, "share_prompts": True}, 0.05, id="bfloat16-shared-prompts"),
    pytest.param({"fp16": True}, 0.05, id="float16", marks=needs_gpu),
    pytest.param(FLASH, 0.05, id="flash-packed", marks=needs_flash),
    pytest.param(FLASH | {"padding_free": False}, 0.05, id="flash-padded", marks=needs_flash),
    pytest.param({"4bit": True, "bf16": True}, 0.05, id="4-bit"),
]
# Times, and what counts rows, where rounding can move a whole row
NOT_COMPARED = ("runtime", "_per_second", "_flos", "accuracies", "accuracy", "auc", "spearman", "mse")
RUN = {"max_grad_norm": 0.0, "optim": "sgd", "max_steps": 4, "beta": 0.5}
RUN |= {"per_device_train_batch_size": 6, "train_sampling_strategy": "sequential"}


@pytest.fixture(autouse=True)
def settings_of_the_process_stay():
    """`tf32` sets a switch of torch, for all that runs in the process."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def logged(folder, out, *, lora: bool, use_cpu: bool, **settings) -> list[dict[str, float]]:
    """What each step logs, and the evaluation after them."""
    attention = settings.pop("attention", "sdpa")
    init = {"attn_implementation": attention, "dtype": torch.float32}
    kwargs = {"learning_rate": 0.02 if lora else 3e-4}
    if settings.pop("4bit", False):
        nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
        init |= {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **nf4)}
        init |= {"device_map": "cpu" if use_cpu or not HAS_GPU else "cuda"}
    if lora:
        kwargs["peft_config"] = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    # By its name, TRL would load the model to the GPU, whose random numbers begin another adapter
    model = AutoModelForCausalLM.from_pretrained(folder, **init)
    torch.manual_seed(5)
    rows = several_answers(8, 3)
    trainer = make_trainer(
        model, rows, out, eval_dataset=rows, use_cpu=use_cpu or not HAS_GPU, **kwargs, **RUN | settings
    )
    trainer.train()
    assert trainer.model.device.type == ("cpu" if use_cpu or not HAS_GPU else "cuda")
    trainer.evaluate()
    return trainer.state.log_history


@pytest.fixture(scope="module")
def on_cpu(folder, tmp_path_factory):
    """What a run in float32 on the CPU logs, with an adapter or all weights, 4-bit or not."""
    found: dict[tuple, list[dict[str, float]]] = {}

    def run(lora: bool, settings: dict) -> list[dict[str, float]]:
        # Precomputed, fewer rows have a reward: demonstrations have none
        same = {name: settings[name] for name in ("4bit", "precompute_ref_log_probs") if name in settings}
        key = (lora, *same)
        if key not in found:
            same |= {"bf16": True} if "4bit" in same else {}
            found[key] = logged(folder, tmp_path_factory.mktemp("out"), lora=lora, use_cpu=True, **same)
        return found[key]

    return run


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(("settings", "tolerance"), MEMBERS)
def test_what_is_logged_is_that_of_the_cpu(folder, tmp_path, on_cpu, settings, tolerance, lora):
    if "4bit" in settings and not lora:
        pytest.skip("4-bit weights are trained by an adapter")
    wanted = on_cpu(lora, settings)
    found = logged(folder, tmp_path, lora=lora, use_cpu=False, **settings)
    assert [log["step"] for log in found] == [log["step"] for log in wanted]
    # In float16, the first steps look for the scale and change no weights
    compared = 1 if settings.get("fp16") else len(wanted)
    for log, other in list(zip(found, wanted, strict=True))[:compared]:
        for name in sorted(name for name in other if not name.endswith(NOT_COMPARED)):
            if name == "grad_norm" and settings.get("fp16"):
                continue
            limit = tolerance * (1 + abs(other[name]))
            assert abs(log[name] - other[name]) <= limit, (log["step"], name, log[name], other[name])
    assert all(math.isfinite(log["loss"]) for log in found if "loss" in log)
    assert abs(wanted[-1]["eval_kl"]) > 0.01  # the policy has moved


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_training_with_the_defaults_saves_what_a_judge_scores(folder, tmp_path, lora):
    """As a user begins: a name, TRL's defaults (bfloat16 and gradient checkpointing on a GPU), rows."""
    rows = several_answers(8, 3)
    config = ULMAConfig(str(tmp_path), report_to="none", max_steps=4, use_cpu=not HAS_GPU, learning_rate=1e-3)
    adapter = LoraConfig(r=4, target_modules=["q_proj"]) if lora else None
    trainer = ULMATrainer(model=folder, args=config, train_dataset=rows, peft_config=adapter)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    scores = Judge.from_pretrained(str(tmp_path / "saved")).score(rows)
    own = trainer.score(rows)
    assert len(scores) == len(own) == len(rows)
    off = max(abs(a["reward"] - b["reward"]) for a, b in zip(scores, own, strict=True))
    # β times 0.08 nats for each of at most 25 tokens, in bfloat16
    assert off < 0.2
    assert max(abs(each["reward"]) for each in scores) > 0


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(folder, tmp_path):
    rows = several_answers(8, 3)
    settings = {"save_strategy": "steps", "save_steps": 2, "use_cpu": not HAS_GPU, "learning_rate": 3e-4, **RUN}

    def run(name, **kwargs):
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        trainer = make_trainer(model, rows, tmp_path / name, **settings)
        trainer.train(**kwargs)
        return trainer.state.log_history, trainer.model.state_dict()

    log, whole = run("whole")
    log_2, resumed = run("resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for entry, entry_2 in zip(log[:-1], log_2[:-1], strict=True):
        assert entry["loss"] == pytest.approx(entry_2["loss"], rel=1e-5)
    for name, value in whole.items():
        assert torch.allclose(value, resumed[name], rtol=0, atol=1e-5), name
