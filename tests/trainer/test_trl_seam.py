"""Each private thing of TRL, transformers and accelerate that is relied on; a failure says what moved."""

import copy
import inspect
import math
from dataclasses import replace
from typing import Any

import pytest
from accelerate.state import GradientState
from transformers import Trainer
from trl import DPOConfig, DPOTrainer, ModelConfig, ScriptArguments, TrlParser, data_utils
from trl.trainer import utils
from vlm import image_rows
from world import make_rows, make_trainer

from trl_ulma import PointwiseDPOTrainer, ULMAConfig, versions
from trl_ulma.scripts.options import OptionParser
from trl_ulma.scripts.training import loading


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    ("owner", "name", "wanted"),
    [
        (DPOTrainer, "_prepare_dataset", ["self", "dataset", "processing_class", "args", "dataset_name"]),
        (DPOTrainer, "_precompute_ref_logps", ["self", "dataset", "name", "batch_size"]),
        (DPOTrainer, "_compute_loss", ["self", "model", "inputs", "return_outputs"]),
        (DPOTrainer, "_set_signature_columns_if_needed", ["self"]),
        (Trainer, "get_batch_samples", ["self", "epoch_iterator", "num_batches", "device"]),
        (Trainer, "_get_train_sampler", ["self", "train_dataset"]),
        (Trainer, "_get_eval_sampler", ["self", "eval_dataset"]),
        (Trainer, "_push_from_checkpoint", ["self", "checkpoint_folder"]),
        (Trainer, "predict", ["self", "test_dataset", "ignore_keys", "metric_key_prefix"]),
        (data_utils, "prepare_multimodal_messages", ["messages", "images"]),
        (utils, "get_config_model_id", ["config"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_method_that_is_overridden_or_called_takes_what_it_did(owner, name, wanted):
    assert hasattr(owner, name), f"{owner.__name__}.{name} is gone"
    assert parameters(getattr(owner, name)) == wanted, f"{owner.__name__}.{name} takes other arguments"


def test_the_trainers_take_dpo_trainers_arguments_in_its_order():
    own = parameters(PointwiseDPOTrainer.__init__)
    if not versions.TAKES_QUANTIZATION:
        own.remove("quantization_config")
    assert own == parameters(DPOTrainer.__init__), (
        "DPOTrainer.__init__ takes other arguments: pass them through PointwiseDPOTrainer.__init__"
    )


def test_the_pair_only_settings_are_those_of_dpo_config():
    pair_only = {"loss_type", "loss_weights", "ld_alpha", "f_divergence_type", "f_alpha_divergence_coef"}
    pair_only |= {"label_smoothing", "use_weighting", "discopop_tau"}
    taken = {"learning_rate", "model_init_kwargs", "trust_remote_code", "router_aux_loss_coef", "disable_dropout"}
    taken |= {"dataset_num_proc", "max_length", "truncation_mode", "padding_free", "pad_to_multiple_of"}
    taken |= {"precompute_ref_log_probs", "precompute_ref_batch_size", "beta", "activation_offloading"}
    taken |= {"sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps", "pad_token"}
    newer = {"trust_remote_code", "router_aux_loss_coef"}  # which older versions of TRL do not have
    own = set(DPOConfig.__annotations__) | newer
    assert own == pair_only | taken, "DPOConfig has other settings: decide for each new one whether points have it"


def test_rows_with_images_are_not_what_dpo_trainer_calls_vision(tiny_llava, tmp_path):
    trainer = make_trainer(tiny_llava, image_rows(2), tmp_path)
    assert trainer._is_vlm
    assert not trainer._is_vision_dataset, "DPOTrainer finds images by another column, and would refuse our collator's"


@pytest.mark.parametrize("accumulation", [1, 4])
def test_training_divides_the_loss_of_a_step_once(tiny_gpt2, tmp_path, accumulation):
    settings = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 8 // accumulation}
    trainer = make_trainer(tiny_gpt2, make_rows(8), tmp_path, pointwise=True, max_steps=1, **settings)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), rel=1e-4), (
        "Trainer.training_step does not divide by the number of micro-batches: see trl_ulma.versions.divide_loss_once"
    )


def test_the_data_loaders_end_is_told():
    assert hasattr(GradientState(), "end_of_dataloader"), (
        "GradientState.end_of_dataloader is gone, by which an epoch's last step is known to be logged"
    )


def test_a_precomputed_reference_is_the_one_way_to_load_no_reference_model(tiny_gpt2, tmp_path):
    trainer = make_trainer(tiny_gpt2, make_rows(4), tmp_path, negative_loss="none")
    assert trainer.ref_model is None, "DPOTrainer loads a reference model though precompute_ref_log_probs is set"


def test_what_the_trainer_reads_off_dpo_trainer_is_there(tiny_gpt2, tmp_path):
    trainer = make_trainer(tiny_gpt2, make_rows(4), tmp_path)
    for name in ("beta", "ref_model", "aux_loss_enabled", "router_aux_loss_coef", "_total_train_tokens"):
        assert hasattr(trainer, name), f"DPOTrainer no longer sets {name}"


@pytest.mark.parametrize("word", [[], ["--trust_remote_code"], ["--trust_remote_code", "True"]])
def test_a_script_parses_the_config_beside_model_config(tmp_path, word):
    types: Any = (ScriptArguments, ULMAConfig, ModelConfig)
    parser = TrlParser(types)
    words = ["--output_dir", str(tmp_path), "--dataset_name", "d", "--report_to", "none", "--model_name_or_path", "m"]
    _, args, model_args = parser.parse_args_and_config([*words, *word])
    asked = getattr(model_args, "trust_remote_code", False)  # TRL before 1.7 has the option there
    assert bool(word) == (args.trust_remote_code or asked)
    args.trust_remote_code = True
    for copied in (args, copy.copy(args), copy.deepcopy(args), replace(args), ULMAConfig.from_dpo_config(args)):
        assert copied.trust_remote_code is True


@pytest.mark.parametrize("word", [[], ["--trust_remote_code", "True"]])
def test_the_command_line_has_the_option_once(tmp_path, word):
    parser = OptionParser(ULMAConfig, "trl-ulma ulma", "")
    words = ["--output_dir", str(tmp_path), "--dataset", "d", "--report_to", "none", "--model", "m"]
    _, args, model_args, _ = parser.parse_settings([*words, *word])
    assert args.trust_remote_code is bool(word)
    assert loading(args, model_args)["trust_remote_code"] is bool(word)
