"""Trainers take the architectures that once were computed wrongly, and refuse those that are not causal."""

import functools
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from architectures import ARCHITECTURES, NOT_CAUSAL, skip_unless_it_works, tiny_model
from tiny import make_tokenizer
from transformers import MixtralForCausalLM
from world import make_rows, make_trainer, plain_logps

# What the trainers once computed wrongly or not at all, and others of their kind
IN_A_TRAINER = (
    "modernbert-decoder",
    "recurrent_gemma-softcap",
    "gemma2-softcap",
    "granite-scaling",
    "falcon_h1",
    "opt-projected",
)
ROUTERS = ("granitemoe-router", "mixtral-router", "gpt_oss-router", "jamba-router")


def tokenizer_and_model(name: str):
    """A tokenizer, and a small model of an architecture with its vocabulary."""
    tokenizer = make_tokenizer()
    model_type, settings = ARCHITECTURES[name]
    sizes = {"vocab_size": len(tokenizer)}
    if name.startswith("gemma3n"):
        sizes["vocab_size_per_layer_input"] = len(tokenizer)
    return tokenizer, tiny_model(model_type, settings | sizes)


def saved(tokenizer, folder) -> str:
    tokenizer.save_pretrained(folder)
    return str(folder)


# Steps that change nothing
STANDING_STILL: dict[str, Any] = {"pointwise": True, "learning_rate": 1e-12, "per_device_train_batch_size": 4}


@pytest.mark.parametrize("name", IN_A_TRAINER)
def test_a_trainer_takes_it_and_starts_at_log_2(tmp_path, name):
    skip_unless_it_works(name)
    tokenizer, model = tokenizer_and_model(name)
    rows = make_rows(4)
    model.config.use_cache = False  # recurrent layers alone do not fill a cache
    logps, _ = plain_logps(saved(tokenizer, tmp_path / "tokenizer"), rows, model)
    trainer = make_trainer(model, rows, tmp_path, processing_class=tokenizer, max_steps=2, **STANDING_STILL)
    found = trainer.evaluate(rows)
    label = np.array(rows["label"][:])
    assert found["eval_logps/chosen"] == pytest.approx(logps[label == 1].mean(), rel=1e-4)
    assert found["eval_logps/rejected"] == pytest.approx(logps[label == 0].mean(), rel=1e-4)
    trainer.train()
    logged = [log["loss/preference"] for log in trainer.state.log_history if "loss/preference" in log]
    assert logged == pytest.approx([np.log(2)] * len(logged), abs=1e-4)


@pytest.mark.parametrize("name", ROUTERS)
def test_a_mixture_of_experts_starts_at_log_2_with_its_own_auxiliary_loss(tmp_path, name):
    tokenizer, model = tokenizer_and_model(name)
    trainer = make_trainer(model, make_rows(4), tmp_path, processing_class=tokenizer, max_steps=1, **STANDING_STILL)
    batch = next(iter(trainer.get_train_dataloader()))
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        own = model.eval()(**inputs, output_router_logits=True, use_cache=False).aux_loss
    if not isinstance(own, torch.Tensor):
        pytest.skip(f"{name} of transformers {transformers.__version__} returns no load-balancing loss")
    trainer.train()
    (log,) = [log for log in trainer.state.log_history if "loss/preference" in log]
    assert log["loss/preference"] == pytest.approx(np.log(2), abs=1e-4)
    assert log["aux_loss"] == pytest.approx(own.item(), rel=1e-4)
    assert log["loss"] == pytest.approx(log["loss/preference"] + 0.5 * own.item(), rel=1e-4)


def test_a_mixture_of_experts_that_returns_no_auxiliary_loss(tmp_path, monkeypatch, caplog):
    """As many do in some versions of transformers: None, or the number 0."""
    tokenizer, model = tokenizer_and_model("mixtral-router")
    monkeypatch.setattr(MixtralForCausalLM, "forward", without_auxiliary_loss(MixtralForCausalLM.forward))
    settings = {"processing_class": tokenizer, "max_steps": 2, **STANDING_STILL}
    trainer = make_trainer(model, make_rows(8), tmp_path, **settings)
    trainer.train()
    assert caplog.text.count("does not return this loss") == 1
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 2
    for log in logs:
        assert "aux_loss" not in log
        assert log["loss"] == pytest.approx(log["loss/preference"], rel=1e-6)
    trainer = make_trainer(model, make_rows(8), tmp_path, router_aux_loss_coef=0.1, **settings)
    with pytest.raises(ValueError, match=r"router_aux_loss_coef is 0\.1, but MixtralForCausalLM .* does not return"):
        trainer.train()


def without_auxiliary_loss(forward):
    """A forward whose output has the number 0 as its auxiliary loss."""

    @functools.wraps(forward)
    def changed(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.aux_loss = 0
        return output

    return changed


def test_experts_that_are_drawn_at_random_need_dropout_allowed(tmp_path):
    """PhiMoE draws its experts in training mode, and its router's "jitter" is a threshold in evaluation mode, too."""
    tokenizer, model = tokenizer_and_model("phimoe-router")
    rows = make_rows(4)
    logps, _ = plain_logps(saved(tokenizer, tmp_path / "tokenizer"), rows, model)
    settings = {"processing_class": tokenizer, "pointwise": True, "max_steps": 1, "per_device_train_batch_size": 4}
    trainer = make_trainer(model, rows, tmp_path, **settings)
    chosen = np.array(rows["label"][:]) == 1
    assert trainer.evaluate(rows)["eval_logps/chosen"] == pytest.approx(logps[chosen].mean(), rel=1e-4)
    with pytest.raises(ValueError, match=r"\d nats.*disable_dropout=False"):
        trainer.train()
    trainer = make_trainer(model, rows, tmp_path, disable_dropout=False, **settings)
    trainer.train()
    (log,) = [log for log in trainer.state.log_history if "loss/preference" in log]
    assert log["aux_loss"] > 0
    assert trainer.evaluate(rows)["eval_loss"] > 0


@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_a_model_whose_tokens_see_later_ones_is_refused(tmp_path, name):
    tokenizer = make_tokenizer()
    model_type, settings = NOT_CAUSAL[name]
    model = tiny_model(model_type, settings | {"vocab_size": len(tokenizer)})
    with pytest.raises(ValueError, match=r"later tokens.*\d"):
        make_trainer(model, make_rows(4), tmp_path, processing_class=tokenizer, max_steps=1).train()


def test_a_model_that_scores_several_tokens_at_a_position_is_refused(tmp_path):
    tokenizer = make_tokenizer()
    sizes = {"num_encoder_layers": 1, "num_decoder_layers": 2, "num_hidden_layers": None}
    model = tiny_model("prophetnet", sizes | {"vocab_size": len(tokenizer)})
    with pytest.raises(ValueError, match="ProphetNet"):
        make_trainer(model, make_rows(4), tmp_path, processing_class=tokenizer, max_steps=1).train()
