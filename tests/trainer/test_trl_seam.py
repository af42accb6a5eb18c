"""Each private thing of TRL, transformers and accelerate that is relied on; a failure says what moved."""

import inspect

import pytest
import torch
from accelerate.state import GradientState
from transformers import AutoModelForCausalLM, Trainer
from transformers.modeling_utils import PreTrainedModel
from trl import DPOConfig, DPOTrainer, data_utils
from trl.trainer import utils
from vlm import image_rows
from world import make_rows, make_trainer

from trl_ulma import PointwiseDPOTrainer


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    ("owner", "name", "wanted"),
    [
        (DPOTrainer, "_prepare_dataset", ["self", "dataset", "processing_class", "args", "dataset_name"]),
        (DPOTrainer, "_precompute_ref_logps", ["self", "dataset", "name", "batch_size"]),
        (DPOTrainer, "compute_ref_log_probs", ["self", "model", "inputs"]),
        (DPOTrainer, "_compute_loss", ["self", "model", "inputs", "return_outputs"]),
        (DPOTrainer, "_set_signature_columns_if_needed", ["self"]),
        (Trainer, "get_batch_samples", ["self", "epoch_iterator", "num_batches", "device"]),
        (Trainer, "get_tp_size", ["self"]),
        (Trainer, "_get_train_sampler", ["self", "train_dataset"]),
        (Trainer, "_push_from_checkpoint", ["self", "checkpoint_folder"]),
        (Trainer, "predict", ["self", "test_dataset", "ignore_keys", "metric_key_prefix"]),
        (data_utils, "prepare_multimodal_messages", ["messages", "images"]),
        (utils, "use_adapter", ["model", "adapter_name"]),
        (utils, "global_then_local_main_first", []),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_method_that_is_overridden_or_called_takes_what_it_did(owner, name, wanted):
    assert hasattr(owner, name), f"{owner.__name__}.{name} is gone"
    assert parameters(getattr(owner, name)) == wanted, f"{owner.__name__}.{name} takes other arguments"


def test_the_trainers_take_dpo_trainers_arguments_in_its_order():
    assert parameters(PointwiseDPOTrainer.__init__) == parameters(DPOTrainer.__init__), (
        "DPOTrainer.__init__ takes other arguments: pass them through PointwiseDPOTrainer.__init__"
    )


def test_the_pair_only_settings_are_those_of_dpo_config():
    pair_only = {"loss_type", "loss_weights", "ld_alpha", "f_divergence_type", "f_alpha_divergence_coef"}
    pair_only |= {"label_smoothing", "use_weighting", "discopop_tau"}
    taken = {"learning_rate", "model_init_kwargs", "trust_remote_code", "router_aux_loss_coef", "disable_dropout"}
    taken |= {"dataset_num_proc", "max_length", "truncation_mode", "padding_free", "pad_to_multiple_of"}
    taken |= {"precompute_ref_log_probs", "precompute_ref_batch_size", "beta", "activation_offloading"}
    taken |= {"sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps", "pad_token"}
    own = set(DPOConfig.__annotations__)
    assert own == pair_only | taken, "DPOConfig has other settings: decide for each new one whether points have it"


def test_rows_with_images_are_not_what_dpo_trainer_calls_vision(tiny_llava, tmp_path):
    trainer = make_trainer(tiny_llava, image_rows(2), tmp_path)
    assert trainer._is_vlm
    assert not trainer._is_vision_dataset, "DPOTrainer finds images by another column, and would refuse our collator's"


def test_training_divides_the_loss_unless_told_that_it_is_scaled():
    assert "loss_is_scaled_for_ga" in inspect.getsource(Trainer.training_step), (
        "Trainer.training_step no longer reads loss_is_scaled_for_ga, by which the step's loss is left undivided"
    )


def test_the_data_loaders_end_and_remainder_are_told():
    state = GradientState()
    for name in ("remainder", "end_of_dataloader"):
        assert hasattr(state, name), f"GradientState.{name} is gone, by which repeated rows are found"


def test_the_fused_head_scores_given_hidden_states_against_shifted_labels(tiny_gpt2):
    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    assert isinstance(PreTrainedModel.base_model, property), "the backbone is no longer `base_model`"
    model.base_model.register_forward_hook(
        lambda module, args, output: setattr(output, "last_hidden_state", output.last_hidden_state[:, [2, 4]]) or output
    )
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    with torch.no_grad():
        found = model(input_ids=ids, shift_labels=ids[:, [3, 5]], fused_lm_head=True)
        plain = AutoModelForCausalLM.from_pretrained(tiny_gpt2)(ids).logits[0].log_softmax(-1)
    wanted = torch.stack([plain[2, 8], plain[4, 10]])
    assert torch.allclose(found.log_probs[0], wanted, atol=1e-5), (
        "the fused LM head no longer takes the hidden states that a hook on the backbone returns"
    )
    for name in ("entropy", "mean_logits", "is_top1"):
        assert found[name].shape == (1, 2), f"the fused LM head's {name} is not per token"


def test_a_precomputed_reference_is_the_one_way_to_load_no_reference_model(tiny_gpt2, tmp_path):
    trainer = make_trainer(tiny_gpt2, make_rows(4), tmp_path, negative_loss="none")
    assert trainer.ref_model is None, "DPOTrainer loads a reference model though precompute_ref_log_probs is set"


def test_what_the_trainer_reads_off_dpo_trainer_is_there(tiny_gpt2, tmp_path):
    trainer = make_trainer(tiny_gpt2, make_rows(4), tmp_path)
    for name in ("beta", "ref_model", "aux_loss_enabled", "router_aux_loss_coef", "_total_train_tokens"):
        assert hasattr(trainer, name), f"DPOTrainer no longer sets {name}"
