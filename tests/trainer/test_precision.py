"""Number formats, extreme log-ratios, and the shortest and longest completions."""

import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset, load_from_disk
from peft import LoraConfig
from transformers import AutoTokenizer, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from world import make_rows, make_trainer, mixed_rows, plain_logps, weights

from trl_ulma.judge import Judge
from trl_ulma.likelihood.scorer import is_exact, rounds_float32
from trl_ulma.losses import grid_loss, route

FORMATS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def losses_at(log_ratio: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(losses, gradients by the policy's log-probability) of a disliked, a soft, a liked and a rated row."""
    policy = torch.full((4,), log_ratio, dtype=dtype, requires_grad=True)
    label = torch.tensor([0.0, 0.5, 1.0, 1.0])
    sft_mask = torch.zeros(4, dtype=torch.bool)
    continuous = torch.tensor([False, False, False, True])
    terms = route(label, sft_mask, continuous, positive_loss="sft", negative_loss="pointwise_dpo")
    losses = grid_loss(policy, torch.zeros(4, dtype=dtype), label, terms, continuous, beta=0.1, log_z=0.0)
    losses.total.sum().backward()
    return losses.total.detach(), policy.grad


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("log_ratio", [1e4, -1e4, 1.0, 0.0])
def test_losses_and_gradients_at_extreme_log_ratios(log_ratio, dtype):
    losses, gradients = losses_at(log_ratio, dtype)
    reward = 0.1 * log_ratio
    sigma = 1 / (1 + math.exp(-reward)) if reward > -700 else 0.0
    at_zero = math.log1p(math.exp(-abs(reward))) + max(reward, 0.0)  # −log σ(−r)
    wanted = [at_zero, at_zero - 0.5 * reward, at_zero - reward, (1 - reward) ** 2]
    slopes = [0.1 * sigma, 0.1 * (sigma - 0.5), 0.1 * (sigma - 1), -0.2 * (1 - reward)]
    tolerance = {"rel": 4 * FORMATS[dtype], "abs": 4 * FORMATS[dtype]}
    assert losses.double().tolist() == pytest.approx(wanted, **tolerance)
    assert gradients.double().tolist() == pytest.approx(slopes, **tolerance)


def first_step(folder, tmp_path, **kwargs) -> tuple[dict[str, float], torch.Tensor]:
    """What a step of SGD logs, and how far it moves each weight."""
    settings = {"learning_rate": 0.01, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "optim": "sgd"}
    trainer = make_trainer(
        folder, mixed_rows(8), tmp_path, max_steps=1, per_device_train_batch_size=8, **settings | kwargs
    )
    before = weights(trainer.model)
    trainer.train()
    return trainer.state.log_history[0], weights(trainer.model) - before


def test_bf16_learns_what_fp32_does(tiny_gpt2, tmp_path):
    wanted, moved = first_step(tiny_gpt2, tmp_path)
    for kwargs in (
        {"bf16": True, "use_cpu": True},
        {"model_init_kwargs": {"dtype": torch.bfloat16}, "learning_rate": 1.0},
    ):
        found, change = first_step(tiny_gpt2, tmp_path, **kwargs)
        assert found["loss"] == pytest.approx(wanted["loss"], rel=0.02)
        assert found["loss"] != wanted["loss"]
        cosine = torch.nn.functional.cosine_similarity(change, moved, dim=0)
        assert cosine > 0.98


def test_references_precomputed_in_bf16_are_not_taken_for_those_in_fp32(tiny_gpt2, tmp_path):
    make_rows(4).save_to_disk(tmp_path / "rows")  # so that what is computed is kept beside them
    found = []
    for bf16 in (True, False, True):
        trainer = make_trainer(
            tiny_gpt2,
            load_from_disk(tmp_path / "rows"),
            tmp_path,
            bf16=bf16,
            use_cpu=True,
            precompute_ref_log_probs=True,
            pointwise=True,
        )
        found.append(trainer.train_dataset["ref_logps"][:])
    wanted, _ = plain_logps(tiny_gpt2, make_rows(4))
    assert found[1] == pytest.approx(wanted, rel=1e-5)
    assert found[0] == found[2] != found[1]


@pytest.mark.parametrize("own", ["bf16", "no"])
def test_the_precision_is_the_trainers_own_also_after_another_was_created(tiny_gpt2, tmp_path, own):
    def make(is_bf16):
        return make_trainer(tiny_gpt2, make_rows(4), tmp_path, pointwise=True, bf16=is_bf16, use_cpu=True, max_steps=1)

    trainer = make(own == "bf16")
    other = make(own != "bf16")
    for made, precision in ((trainer, own), (other, {"bf16": "no", "no": "bf16"}[own])):
        made.save_model(str(tmp_path / precision))
        made.train()
        assert made.accelerator.mixed_precision == made.saved_settings().mixed_precision == precision
        assert json.loads((tmp_path / precision / "pointwise.json").read_text())["mixed_precision"] == precision


@pytest.fixture
def rounded():
    """Products of float32 are rounded, as TF32 does on a GPU."""
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


def test_rounded_products_are_not_taken_for_exact_ones(tiny_gpt2, rounded):
    assert rounds_float32("cuda")
    assert rounds_float32("cpu")
    model = GPT2LMHeadModel.from_pretrained(tiny_gpt2)
    assert not is_exact(model, "no")
    assert is_exact(model.double(), "no")
    torch.set_float32_matmul_precision("highest")
    assert is_exact(model.float(), "no")


def test_a_training_with_rounded_products_is_recognized_without(tiny_gpt2, tmp_path, rounded):
    trainer = make_trainer(tiny_gpt2, make_rows(4), tmp_path / "model", max_steps=1, learning_rate=1e-12)
    trainer.train()
    trainer.save_model()
    torch.set_float32_matmul_precision("highest")
    file = tmp_path / "model" / "pointwise.json"
    settings = json.loads(file.read_text())
    settings["reference"]["logps"] = [logps + 0.1 for logps in settings["reference"]["logps"]]  # of 7 tokens
    file.write_text(json.dumps(settings))
    Judge.from_pretrained(str(tmp_path / "model"))
    file.write_text(json.dumps(settings | {"rounds_float32": False}))
    with pytest.raises(ValueError, match="was trained against another reference"):
        Judge.from_pretrained(str(tmp_path / "model"))
    file.write_text(json.dumps(settings | {"rounds_float32": False, "dtype": "bfloat16"}))
    with pytest.raises(ValueError, match="trained in bfloat16, and is loaded in float32: leave out dtype"):
        Judge.from_pretrained(str(tmp_path / "model"), dtype="float32")


def test_half_precision_weights_give_rewards_in_float32(tiny_gpt2, tmp_path):
    rows = make_rows(8)
    for dtype, error in ((torch.bfloat16, 0.02), (torch.float16, 0.003)):
        trainer = make_trainer(tiny_gpt2, rows, tmp_path, negative_loss="none", model_init_kwargs={"dtype": dtype})
        predicted = trainer.predict(rows).predictions  # log π where no reference is
        assert predicted.dtype == np.float32
        assert predicted == pytest.approx(plain_logps(tiny_gpt2, rows)[0], rel=error)


@pytest.fixture(scope="module")
def long_llama(tiny_llama, tmp_path_factory) -> str:
    """A one-layer Llama with rotary positions up to 8,192."""
    folder = str(tmp_path_factory.mktemp("checkpoints") / "long-llama")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=8192,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("settings", [{}, {"padding_free": True}, {"share_prompts": True}], ids=str)
def test_completions_of_one_token_and_of_4096(long_llama, tmp_path, settings):
    rows = Dataset.from_dict(
        {
            "prompt": ["Why?", "Why?"],
            "completion": ["<|end|>", "x" * 4095],  # the shortest is the end alone; the longest gets one
            "label": [True, False],
        }
    )
    logps, tokens = plain_logps(long_llama, Dataset.from_dict({**rows[:], "completion": ["", "x" * 4095]}))
    assert tokens.tolist() == [1, 4096]
    model = LlamaForCausalLM.from_pretrained(long_llama)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.9)  # so that rewards are not 0
    moved, _ = plain_logps(long_llama, Dataset.from_dict({**rows[:], "completion": ["", "x" * 4095]}), model.double())
    trainer = make_trainer(
        model.float(),
        rows,
        tmp_path,
        pointwise=True,
        ref_model=LlamaForCausalLM.from_pretrained(long_llama),
        max_length=None,
        per_device_train_batch_size=2,
        max_steps=1,
        **settings,
    )
    assert trainer.predict(rows).predictions == pytest.approx(0.1 * (moved - logps), rel=1e-4, abs=1e-3)
    trainer.train()
    log = trainer.state.log_history[0]
    rewards = 0.1 * (moved - logps)
    wanted = np.logaddexp(0, [-rewards[0], rewards[1]]).mean()
    assert log["loss"] == pytest.approx(wanted, rel=1e-4)
    assert math.isfinite(log["grad_norm"])


@pytest.mark.parametrize("hides", [True, False])
def test_a_nan_loss_ends_the_run_though_it_would_be_left_out_of_the_logs(tiny_gpt2, tmp_path, hides):
    rows = make_rows(8)
    settings = {"per_device_train_batch_size": 4, "train_sampling_strategy": "sequential"}
    trainer = make_trainer(tiny_gpt2, rows, tmp_path, max_steps=4, logging_nan_inf_filter=hides, **settings)
    scored = trainer._objective.__call__

    def broken(policy, *args, **kwargs):
        if trainer.model.training and trainer.state.global_step == 1:
            spoiled = policy.log_probs * torch.tensor([[1.0], [math.nan], [1.0], [math.nan]])
            policy = policy._replace(log_probs=spoiled)
        return scored(policy, *args, **kwargs)

    trainer._objective = broken
    broken.terms = scored.__self__.terms
    with pytest.raises(FloatingPointError, match=r"loss of step 2 is nan. Rows of the train dataset .*: \[5, 7\]\."):
        trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("log_z", [0.0, "group"])
def test_rows_whose_loss_is_not_finite_are_named_by_an_evaluation(tiny_llama, tmp_path, caplog, log_z):
    columns = {"prompt": ["Hi", "Why?"] * 6, "label": [1.0, 1.0, 0.0, 0.0] * 3}
    rows = make_rows(12, **columns)
    trainer = make_trainer(tiny_llama, rows, tmp_path, pointwise=True, log_z=log_z, per_device_eval_batch_size=5)
    assert math.isfinite(trainer.evaluate(rows)["eval_loss"])
    assert "NaN" not in caplog.text
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight[trainer.processing_class("Z")["input_ids"]] = math.inf
    spoiled = make_rows(12, **columns, completion=["Zebra" if i in (3, 7) else "No" for i in range(12)])
    assert math.isnan(trainer.evaluate({"other": spoiled})["eval_other_loss"])
    assert "'eval_other', the loss of 2 of 12 rows is NaN or infinite, and so are eval_other_loss" in caplog.text
    assert "The rows of the dataset are: 3, 7. Check" in caplog.text


@pytest.mark.parametrize("keeps_copies", [True, False])
def test_a_training_within_autocast_learns_or_is_refused(tiny_llama, tmp_path, keeps_copies):
    """Autocast keeps rounded copies of the weights until it ends, which no step changes."""
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    settings = {"per_device_train_batch_size": 8, "max_steps": 3, "learning_rate": 1e-2, "pointwise": True}
    trainer = make_trainer(tiny_llama, make_rows(8), tmp_path, peft_config=adapter, **settings)
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=keeps_copies):
        if keeps_copies:
            with pytest.raises(ValueError, match=r"within torch\.autocast.*set bf16=True"):
                trainer.train()
            return
        trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[2] < losses[1] - 0.01 < losses[0] - 0.02


@pytest.mark.parametrize("precomputed", [True, False])
def test_an_evaluation_within_autocast_is_named(tiny_llama, tmp_path, precomputed):
    rows, settings = make_rows(4), {"max_steps": 1, "precompute_ref_log_probs": precomputed, "pointwise": True}
    trainer = make_trainer(tiny_llama, rows, tmp_path, **settings)
    trainer.train()
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match=r"called within torch\.autocast"):
        trainer.evaluate(trainer.train_dataset)
    mixed = make_trainer(tiny_llama, rows, tmp_path, bf16=True, use_cpu=True, **settings)
    mixed.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # as the trainer itself does
        mixed.evaluate(mixed.train_dataset)


def test_weights_that_the_last_step_makes_nan_end_the_run(tiny_gpt2, tmp_path):
    """The loss is that of before the step. In float16, Adam's epsilon is 0."""
    settings = {
        "model_init_kwargs": {"dtype": "float16"},
        "learning_rate": 1e-2,
        "optim": "adamw_torch",
        "max_steps": 1,
    }
    with pytest.raises(FloatingPointError, match="The last step has made the model's log-probabilities NaN"):
        make_trainer(tiny_gpt2, make_rows(4), tmp_path, **settings).train()
