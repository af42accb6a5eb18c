"""PEFT's methods, each with the reference and the log-probabilities that it must have, or refused in one line.

LoRA and its options, IA3, VeRA, LoHa, OFT, AdaLoRA, LN tuning and virtual tokens are in `test_reference.py`.
"""

from typing import Any

import peft
import pytest
import torch
from packaging.version import Version
from peft import get_peft_model
from references import MOVING, hold, in_memory, load, lora, losses
from transformers import TrainerCallback
from world import make_rows, make_trainer, several_answers, weights

from trl_ulma.likelihood.table import forward_inputs

QV = {"target_modules": ["q_proj", "v_proj"]}

# Name → (PEFT's class, settings). Classes that the installed PEFT lacks are skipped.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lokr": ("LoKrConfig", QV | {"r": 4}),
    "boft": ("BOFTConfig", QV | {"boft_block_size": 4}),
    "fourierft": ("FourierFTConfig", QV | {"n_frequency": 50}),
    "hra": ("HRAConfig", QV | {"r": 4}),
    "miss": ("MissConfig", QV | {"r": 4}),
    "bone": ("BoneConfig", QV | {"r": 4}),
    "randlora": ("RandLoraConfig", QV | {"r": 4}),
    "shira": ("ShiraConfig", QV | {"r": 4}),
    "c3a": ("C3AConfig", QV | {"block_size": 16}),
    "trainable-tokens": ("TrainableTokensConfig", {"token_indices": [5, 6, 7, 40, 41, 42]}),
    "vblora": ("VBLoRAConfig", QV | {"vector_length": 16, "num_vectors": 8}),
    "road": ("RoadConfig", QV | {"group_size": 8}),
    "delora": ("DeloraConfig", QV | {"r": 4}),
    "gralora": ("GraloraConfig", QV | {"r": 4}),
    "waveft": ("WaveFTConfig", QV | {"n_frequency": 50}),
    "osf": ("OSFConfig", QV),
    "lily": ("LilyConfig", QV),
    "poly": ("PolyConfig", QV | {"r": 4, "n_tasks": 1, "n_skills": 2}),
    "lora-bias-of-targets": ("LoraConfig", QV | {"r": 4, "bias": "lora_only"}),
    "lora-bias-of-its-own": ("LoraConfig", QV | {"r": 4, "lora_bias": True}),
    "lora-replicated-layers": ("LoraConfig", QV | {"r": 4, "layer_replication": [[0, 2], [0, 2]]}),
    "lora-patterns": ("LoraConfig", QV | {"r": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}}),
    "lora-gaussian": ("LoraConfig", QV | {"r": 4, "init_lora_weights": "gaussian"}),
    "lora-orthogonal": ("LoraConfig", QV | {"r": 4, "init_lora_weights": "orthogonal"}),
    "lora-pissa": ("LoraConfig", QV | {"r": 4, "init_lora_weights": "pissa"}),
    "lora-olora": ("LoraConfig", QV | {"r": 4, "init_lora_weights": "olora"}),
    "lora-eva": ("LoraConfig", QV | {"r": 4, "init_lora_weights": "eva"}),
    "lora-loftq": (
        "LoraConfig",
        QV | {"r": 4, "init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}},
    ),
    "lora-activated": ("LoraConfig", QV | {"r": 4, "alora_invocation_tokens": [5]}),
    "lora-saved-embeddings": ("LoraConfig", QV | {"r": 4, "modules_to_save": ["embed_tokens", "lm_head"]}),
}
QUICK = ("lokr", "fourierft", "trainable-tokens", "lora-bias-of-targets", "lora-activated")
# Untrained, they change the model, so the reference of a new adapter is not the model without it
CHANGE_THE_MODEL = r"init_lora_weights.*Wrap the model with get_peft_model.*ref_model"
REFUSED_NEW: dict[str, str] = {
    "fourierft": CHANGE_THE_MODEL,
    "c3a": CHANGE_THE_MODEL,
    "vblora": CHANGE_THE_MODEL,
    "lora-pissa": CHANGE_THE_MODEL,
    "lora-olora": CHANGE_THE_MODEL,
    "lora-loftq": CHANGE_THE_MODEL,
    "lily": r"LILY .*later tokens",
    "poly": "task_ids",
}
REFUSED_TRAINED: dict[str, str] = {
    "lily": r"LILY .*later tokens",
    "poly": "task_ids",
    "lora-bias-of-targets": r"one adapter with bias='lora_only' .*precompute_ref_log_probs=True.*ref_model",
}
if Version(peft.__version__) < Version("0.19"):  # in which only one adapter of a model is activated by its tokens
    REFUSED_TRAINED["lora-activated"] = r"reference \(adapter\) differs from the model by .*ref_model"
CASES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]


def config_of(name: str) -> Any:
    cls, settings = METHODS[name]
    if not hasattr(peft, cls):
        pytest.skip(f"this version of PEFT has no {cls}")
    if name == "lora-loftq" and not torch.cuda.is_available():
        pytest.skip("LoftQ quantizes on a GPU")
    return getattr(peft, cls)(task_type="CAUSAL_LM", **settings)


def held_or_refused(make, folder: str, message: str | None) -> None:
    """Train, and assert what must hold, or that the training is refused with this message in one line."""
    rows = make_rows(6)
    if message is not None:
        with pytest.raises((TypeError, ValueError), match=message) as error:
            make(rows).train()
        assert "\n" not in str(error.value)
        return
    trainer = make(rows)
    hold(trainer, rows, folder)
    assert losses(trainer)[0] == pytest.approx(0.693147, abs=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_a_new_adapter(tiny_llama, tmp_path, name):
    config = config_of(name)
    held_or_refused(
        lambda rows: make_trainer(load(tiny_llama), rows, tmp_path, peft_config=config, **MOVING),
        tiny_llama,
        REFUSED_NEW.get(name),
    )


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_that_was_trained_before(tiny_llama, tmp_path, name):
    config = config_of(name)
    held_or_refused(
        lambda rows: make_trainer(in_memory(tiny_llama, config), rows, tmp_path, **MOVING),
        tiny_llama,
        REFUSED_TRAINED.get(name),
    )


@pytest.mark.parametrize("is_new", [True, False], ids=["new", "wrapped"])
def test_a_mixture_of_adapters_is_refused(tiny_llama, tmp_path, is_new):
    in_memory(tiny_llama, lora()).save_pretrained(tmp_path / "expert")
    adapters = {"0": str(tmp_path / "expert"), "1": str(tmp_path / "expert")}
    config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=64, xlora_depth=1, adapters=adapters)
    model = load(tiny_llama)
    model.config.use_cache = False
    model = model if is_new else get_peft_model(model, config)
    with pytest.raises(ValueError, match=r"XLORA adapters run the model twice .*Train another adapter"):
        make_trainer(model, make_rows(6), tmp_path, peft_config=config if is_new else None, **MOVING)


def test_an_adapter_of_several_kinds_is_refused(tiny_llama, tmp_path):
    model = get_peft_model(load(tiny_llama), lora(), mixed=True)
    model.add_adapter("other", peft.LoHaConfig(r=4, target_modules=["o_proj"]))
    with pytest.raises(TypeError, match="PeftMixedModel"):
        make_trainer(model, make_rows(6), tmp_path, **MOVING)


class MovesRanks(TrainerCallback):
    """What PEFT's documentation has a training loop do."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        model.base_model.update_and_allocate(state.global_step)


@pytest.mark.parametrize("moves", [False, True])
def test_adalora_moves_its_ranks_with_the_callback_that_the_warning_names(tiny_llama, tmp_path, caplog, moves):
    adapter = peft.AdaLoraConfig(
        task_type="CAUSAL_LM", init_r=4, target_r=2, tinit=1, tfinal=1, deltaT=1, total_step=6, **QV
    )
    callbacks = [MovesRanks()] if moves else []
    trainer = make_trainer(tiny_llama, make_rows(8), tmp_path, peft_config=adapter, callbacks=callbacks, max_steps=6)
    assert "model.base_model.update_and_allocate(state.global_step)" in caplog.text
    trainer.train()
    ranks = [int(p.any(1).sum()) for name, p in trainer.model.named_parameters() if "lora_E" in name]
    assert sum(ranks) == (2 if moves else 4) * len(ranks)


NOISY: dict[str, tuple[str, dict[str, Any]]] = {
    "loha-modules": ("LoHaConfig", {"r": 4, "module_dropout": 0.5}),
    "loha-ranks": ("LoHaConfig", {"r": 4, "rank_dropout": 0.5}),
    "lokr-modules": ("LoKrConfig", {"r": 4, "module_dropout": 0.5}),
    "boft": ("BOFTConfig", {"boft_block_size": 4, "boft_dropout": 0.5}),
    "lora": ("LoraConfig", {"r": 4, "lora_dropout": 0.5}),
}


@pytest.mark.parametrize("name", NOISY)
def test_an_adapter_has_no_dropout_of_its_own_unless_it_is_asked_for(tiny_llama, tmp_path, name):
    cls, settings = NOISY[name]
    config = getattr(peft, cls)(task_type="CAUSAL_LM", **QV, **settings)
    make = {"peft_config": config, "learning_rate": 3e-2, "max_steps": 3}
    trainer = make_trainer(load(tiny_llama), make_rows(8), tmp_path, **make)
    trainer.train()
    model, batch = trainer.model, forward_inputs(next(iter(trainer.get_train_dataloader())))
    with torch.no_grad():
        quiet = trainer._scorer(model.eval(), batch).logps
        assert not torch.allclose(quiet, trainer._reference.logps(model, batch), atol=1e-2)  # it was trained
        for _ in range(3):
            assert torch.equal(trainer._scorer(model.train(), batch).logps, quiet)
    noisy = make_trainer(load(tiny_llama), make_rows(8), tmp_path, disable_dropout=False, **make)
    noisy.train()
    with torch.no_grad():
        first, *others = (noisy._scorer(noisy.model.train(), batch).logps for _ in range(10))
    assert not all(torch.equal(other, first) for other in others)


def test_noise_that_an_untrained_adapter_hides_is_found(tiny_llama, tmp_path):
    if not hasattr(peft, "PveraConfig"):
        pytest.skip("this version of PEFT has no adapter that samples")
    model = get_peft_model(load(tiny_llama), peft.PveraConfig(task_type="CAUSAL_LM", r=4, **QV))
    before = weights(model)
    with pytest.raises(ValueError, match=r"in training mode gives different .*config of the model or the adapter"):
        make_trainer(model, make_rows(8), tmp_path, **MOVING).train()
    assert torch.equal(weights(model), before)


@pytest.mark.parametrize("layout", ["padding_free", "share_prompts"])
def test_an_adapter_that_begins_at_its_tokens_is_padded(tiny_llama, tmp_path, caplog, layout):
    trained = []
    for settings in ({}, {layout: True}):
        torch.manual_seed(0)
        trainer = make_trainer(
            load(tiny_llama), several_answers(), tmp_path, peft_config=config_of("lora-activated"), **MOVING, **settings
        )
        trainer.train()
        trained.append(losses(trainer))
    assert "an aLoRA adapter begins at the last invocation tokens" in caplog.text
    assert trained[0] == trained[1] or layout == "share_prompts"  # which has another order of rows
    assert trainer._scorer.layout == "padded"


@pytest.mark.parametrize("precompute", [False, True])
def test_an_adapter_that_keeps_the_forward_of_the_model_is_refused(tiny_llama, tmp_path, precompute):
    adapter = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=1)
    with pytest.raises(ValueError, match=r"AdaptionPrompt|precompute_ref_log_probs") as told:
        make_trainer(
            load(tiny_llama), make_rows(6), tmp_path, peft_config=adapter, precompute_ref_log_probs=precompute, **MOVING
        ).train()
    assert "NoneType" not in str(told.value)
    assert not precompute or "Train another adapter" in str(told.value)


def test_an_adapter_of_another_task_is_refused(tiny_llama, tmp_path):
    adapter = peft.LoraConfig(task_type="SEQ_CLS", **QV)
    with pytest.raises(ValueError, match=r"task_type='SEQ_CLS'.*Set task_type='CAUSAL_LM'"):
        make_trainer(tiny_llama, make_rows(6), tmp_path, peft_config=adapter)
