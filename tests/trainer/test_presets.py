"""Presets of published methods, configs of TRL's KTO, and what a swap of the trainer is told."""

import logging
import math

import pytest
import torch
from trl import KTOConfig
from world import make_rows, make_trainer

from trl_ulma import PointwiseDPOConfig, PointwiseDPOTrainer, ULMAConfig
from trl_ulma.log_partition import quantile_log_z
from trl_ulma.presets import PRESETS

QUIET = {"report_to": "none", "use_cpu": True, "bf16": False}


@pytest.mark.parametrize("config_class", [PointwiseDPOConfig, ULMAConfig])
@pytest.mark.parametrize(
    ("preset", "settings"),
    [
        ("qrpo", {"label_type": "continuous", "label_transform": "prompt_quantile", "log_z": quantile_log_z(0.02)}),
        ("sppo", {"label_type": "continuous", "log_z": 25.0}),
        ("bco", {"log_z": "running_mean"}),
        ("una", {"binary_loss": "squared_error"}),
        ("kto", {"binary_loss": "kto", "log_z": "batch_kl"}),
    ],
)
def test_a_preset_sets_the_options_of_its_method(config_class, preset, settings):
    config = config_class("out", preset=preset, beta=0.02, **QUIET)
    for name, value in settings.items():
        assert getattr(config, name) == value
    plain = config_class("out", beta=0.02, **settings, **QUIET)
    differing = {name for name, value in vars(config).items() if vars(plain)[name] != value}
    assert differing <= {"preset", "distributed_state"}
    config.check()  # as a trainer does again
    assert config_class("out", preset=preset, beta=0.02, **settings, **QUIET).log_z == config.log_z
    assert set(PRESETS) == {"qrpo", "sppo", "bco", "una", "kto"}


def test_an_option_that_contradicts_a_preset_is_refused_and_all_are_named():
    with pytest.raises(
        ValueError, match=r"preset='kto' stands for binary_loss='kto', log_z='batch_kl', and the config "
    ):
        PointwiseDPOConfig("out", preset="kto", log_z=3.0, binary_loss="squared_error", **QUIET)
    with pytest.raises(ValueError, match=r"preset must be one of \('qrpo', .*; got 'dpo'"):
        PointwiseDPOConfig("out", preset="dpo", **QUIET)


def test_a_beta_that_is_changed_after_a_preset_has_read_it():
    config = PointwiseDPOConfig("out", preset="sppo", beta=0.1, **QUIET)
    told = r"stands for log_z=2\.5, and the config has log_z=5\.0\. .*beta was changed: create .* with beta=0\.2"
    with pytest.raises(ValueError, match=told):
        PointwiseDPOConfig.from_dpo_config(config, beta=0.2)
    config.beta = 0.2
    with pytest.raises(ValueError, match=told):
        config.check()


@pytest.mark.parametrize(
    ("settings", "first_loss"),
    [
        ({}, math.log(2)),
        ({"preset": "una"}, 0.25),
        ({"preset": "kto"}, 0.5),
        ({"binary_loss": "kto"}, 0.5),
        ({"preset": "bco"}, math.log(2)),
    ],
)
def test_the_trainer_learns_by_the_chosen_loss(tiny_gpt2, tmp_path, settings, first_loss):
    rows = make_rows(16)
    trainer = make_trainer(
        tiny_gpt2, rows, tmp_path, pointwise=True, max_steps=8, learning_rate=1e-2, beta=0.5, **settings
    )
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[0] == pytest.approx(first_loss, abs=1e-5)  # the policy is its reference
    after = trainer.evaluate(rows)
    assert after["eval_loss"] < first_loss - 0.01
    assert after["eval_rewards/auc"] > 0.6


def test_sppo_regresses_on_the_probability_to_win_less_a_half(tiny_gpt2, tmp_path):
    rows = make_rows(8).remove_columns("label").add_column("label", [0.0, 1.0, 0.25, 0.5] * 2)
    trainer = make_trainer(tiny_gpt2, rows, tmp_path, pointwise=True, max_steps=1, beta=0.5, preset="sppo")
    trainer.train()
    wanted = sum((label - 0.5) ** 2 for label in rows["label"][:]) / 8
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(wanted, abs=0.05)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(wanted, rel=1e-4)


def test_a_config_of_kto_is_taken_over(tiny_gpt2, tmp_path, caplog):
    theirs = KTOConfig(
        str(tmp_path),
        beta=0.3,
        desirable_weight=2.0,
        undesirable_weight=0.5,
        max_length=64,
        max_steps=1,
        logging_steps=1,
        **QUIET,
    )
    before = dict(vars(theirs))
    with caplog.at_level(logging.WARNING):
        trainer = PointwiseDPOTrainer(tiny_gpt2, args=theirs, train_dataset=make_rows(8))
    args = trainer.args
    assert (args.beta, args.desirable_weight, args.undesirable_weight, args.max_length) == (0.3, 2.0, 0.5, 64)
    assert args.train_sampling_strategy == "random"  # KTO's own default is for its mismatched pairs
    assert dict(vars(theirs)) == before
    assert trainer.args is not theirs
    trainer.train()
    logged = trainer.state.log_history[0]["loss"]
    labels = torch.tensor(make_rows(8)["label"][:])
    weights = torch.where(labels >= 0.5, 2.0, 0.5)
    assert logged == pytest.approx(float(weights.mean()) * math.log(2), rel=1e-4)


def test_settings_that_only_kto_has_are_refused_all_at_once(tiny_gpt2, tmp_path):
    theirs = KTOConfig(str(tmp_path), loss_type="apo_zero_unpaired", **QUIET)
    with pytest.raises(ValueError, match=r"loss_type='apo_zero_unpaired': set binary_loss='kto' in the PointwiseDPOC"):
        PointwiseDPOTrainer(tiny_gpt2, args=theirs, train_dataset=make_rows(4))


@pytest.mark.parametrize(
    ("settings", "is_told"),
    [
        ({}, True),
        ({"sft_weight": 0.001}, False),
        ({"positive_loss": "pointwise_dpo"}, False),
        ({"negative_loss": "none"}, False),  # SFT alone: there is nothing to dominate
    ],
)
def test_a_dominant_sft_term_is_told_once_with_the_measured_ratio(tiny_gpt2, tmp_path, caplog, settings, is_told):
    rows = make_rows(8).add_column("sft_mask", [label == 1 for label in make_rows(8)["label"]])
    trainer = make_trainer(tiny_gpt2, rows, tmp_path, max_steps=3, **settings)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    told = [record.getMessage() for record in caplog.records if "The SFT term dominates" in record.getMessage()]
    assert len(told) == is_told
    if told:
        first = trainer.state.log_history[0]
        assert f"{first['loss/sft'] / first['loss/preference']:.0f} to 1" in told[0]
        ratio = first["loss/sft"] / first["loss/preference"]
        assert f"for example to {min(0.1, 10 / ratio):.2g}," in told[0]
