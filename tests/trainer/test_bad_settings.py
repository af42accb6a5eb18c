"""Bad settings: each ends, before a model is loaded, in an error that says which, what was found and what to do."""

import re
import shutil
import warnings
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from datasets import DatasetDict, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PrefixTuningConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from trl import DPOConfig, SFTConfig
from world import make_rows, make_trainer

from trl_ulma import PointwiseDPOTrainer, ULMAConfig, ULMATrainer
from trl_ulma.rows.rendering import own_processing_class

NAN, INFINITY = float("nan"), float("inf")
QUIET = {"bf16": False, "report_to": "none"}
TYPES = "label_type must be one of ('binary', 'continuous'); got"
LOSSES = {
    "positive_loss": "positive_loss must be one of ('sft', 'pointwise_dpo', 'none'); got",
    "negative_loss": "negative_loss must be one of ('pointwise_dpo', 'unlearning', 'none'); got",
}
BEST_OF_NONE = (
    "The best model is found by evaluations, but with eval_strategy='no' there are none, so no checkpoint would be the "
    "best. Set eval_strategy to 'steps' or 'epoch', or leave out load_best_model_at_end=True and save_strategy='best'."
)


def config(cls: type = ULMAConfig, **changes: Any) -> Any:
    return cls("out", **QUIET | changes)


def pair_only(option: str, default: Any, instead: str) -> str:
    return (
        f"{option} is a setting of pairwise losses that ULMAConfig does not support. Leave it at {default!r}; "
        f"{instead}."
    )


VALUES = {
    "beta 0": ({"beta": 0}, "beta must be above 0; got 0."),
    "beta negative": ({"beta": -0.1}, "beta must be above 0; got -0.1."),
    "beta NaN": ({"beta": NAN}, "beta must be above 0; got nan."),
    "beta infinite": ({"beta": INFINITY}, "beta must be above 0; got inf."),
    "beta beyond float32": (
        {"beta": 1e-300},
        "beta is 1e-300, which float32 rounds to 0 or to infinity. Choose another value.",
    ),
    "log_z beyond any float": (
        {"log_z": 10**400},
        f"log_z is {10**400}, which float32 rounds to 0 or to infinity. Choose another value.",
    ),
    "weight beyond float32": (
        {"desirable_weight": 1e40},
        "desirable_weight is 1e+40, which float32 rounds to 0 or to infinity. Choose another value.",
    ),
    "a share above 1": (
        {"ref_model_mixup_alpha": 2.0},
        "ref_model_mixup_alpha must be above 0, and at most 1; got 2.0.",
    ),
    "a share that is NaN": (
        {"ref_model_mixup_alpha": NAN},
        "ref_model_mixup_alpha must be above 0, and at most 1; got nan.",
    ),
    "beta text": ({"beta": "0.1"}, "beta must be above 0; got '0.1'."),
    "beta None": ({"beta": None}, "beta must be above 0; got None."),
    "beta True": ({"beta": True}, "beta must be above 0; got True."),
    "beta a list": ({"beta": [0.1]}, "beta must be above 0; got [0.1]."),
    "sft_weight negative": ({"sft_weight": -1}, "sft_weight must be 0 or above; got -1."),
    "sft_weight NaN": ({"sft_weight": NAN}, "sft_weight must be 0 or above; got nan."),
    "sft_weight None": ({"sft_weight": None}, "sft_weight must be 0 or above; got None."),
    "sft_threshold NaN": ({"sft_threshold": NAN}, "sft_threshold must be a number; got nan."),
    "sft_threshold text": ({"sft_threshold": "4"}, "sft_threshold must be a number; got '4'."),
    "log_z infinite": ({"log_z": INFINITY}, "log_z must be a number; got inf."),
    "log_z None": ({"log_z": None}, "log_z must be a number; got None."),
    "desirable_weight negative": ({"desirable_weight": -1}, "desirable_weight must be 0 or above; got -1."),
    "undesirable_weight NaN": ({"undesirable_weight": NAN}, "undesirable_weight must be 0 or above; got nan."),
    "learning_rate negative": ({"learning_rate": -1e-4}, "learning_rate must be 0 or above; got -0.0001."),
    "learning_rate text": ({"learning_rate": "fast"}, "learning_rate must be 0 or above; got 'fast'."),
    "weight_decay negative": ({"weight_decay": -0.1}, "weight_decay must be 0 or above; got -0.1."),
    "max_grad_norm negative": ({"max_grad_norm": -1.0}, "max_grad_norm must be 0 or above; got -1.0."),
    "max_grad_norm NaN": ({"max_grad_norm": NAN}, "max_grad_norm must be 0 or above; got nan."),
    "adam_beta1 1": ({"adam_beta1": 1.0}, "adam_beta1 must be 0 or above, and below 1; got 1.0."),
    "adam_beta2 infinite": ({"adam_beta2": INFINITY}, "adam_beta2 must be 0 or above, and below 1; got inf."),
    "adam_epsilon negative": ({"adam_epsilon": -1e-8}, "adam_epsilon must be 0 or above; got -1e-08."),
    "num_train_epochs negative": ({"num_train_epochs": -1}, "num_train_epochs must be 0 or above; got -1."),
    "num_train_epochs 0": (
        {"num_train_epochs": 0},
        "num_train_epochs=0 with max_steps=-1 trains no step. Set either above 0. To evaluate, leave them as they are "
        "and do not call train().",
    ),
    "label_type unknown": ({"label_type": "stars"}, f"{TYPES} 'stars'."),
    "label_type None": ({"label_type": None}, f"{TYPES} None."),
    "label_type a list": ({"label_type": ["binary"]}, f"{TYPES} ['binary']."),
    "positive_loss in capitals": ({"positive_loss": "SFT"}, f"{LOSSES['positive_loss']} 'SFT'."),
    "positive_loss None": ({"positive_loss": None}, f"{LOSSES['positive_loss']} None."),
    "negative_loss unknown": ({"negative_loss": "dpo"}, f"{LOSSES['negative_loss']} 'dpo'."),
    "negative_loss a list": ({"negative_loss": ["none"]}, f"{LOSSES['negative_loss']} ['none']."),
    "max_length 0": ({"max_length": 0}, "max_length must be a whole number, 2 or above; got 0."),
    "max_length 1": ({"max_length": 1}, "max_length must be a whole number, 2 or above; got 1."),
    "max_length negative": ({"max_length": -5}, "max_length must be a whole number, 2 or above; got -5."),
    "max_length a fraction": ({"max_length": 1.5}, "max_length must be a whole number, 2 or above; got 1.5."),
    "max_length text": ({"max_length": "512"}, "max_length must be a whole number, 2 or above; got '512'."),
    "max_length True": ({"max_length": True}, "max_length must be a whole number, 2 or above; got True."),
    "truncation_mode unknown": (
        {"truncation_mode": "middle"},
        "truncation_mode must be 'keep_start' or 'keep_end'; got 'middle'.",
    ),
    # Each version of transformers has its own
    "train_sampling_strategy unknown": (
        {"train_sampling_strategy": "by_length"},
        "train_sampling_strategy must be one of "
        f"{DPOConfig.__dataclass_fields__['train_sampling_strategy'].metadata['choices']}; got 'by_length'.",
    ),
    "pad_to_multiple_of 0": (
        {"pad_to_multiple_of": 0},
        "pad_to_multiple_of must be a whole number, 1 or above; got 0.",
    ),
    "dataset_num_proc text": (
        {"dataset_num_proc": "all"},
        "dataset_num_proc must be a whole number, 0 or above; got 'all'.",
    ),
    "precompute_ref_batch_size 0": (
        {"precompute_ref_batch_size": 0},
        "precompute_ref_batch_size must be a whole number, 1 or above; got 0.",
    ),
    "ref_model_sync_steps 0": (
        {"ref_model_sync_steps": 0},
        "ref_model_sync_steps must be a whole number, 1 or above; got 0.",
    ),
    "no row a batch": (
        {"per_device_train_batch_size": 0},
        "per_device_train_batch_size must be a whole number, 1 or above; got 0.",
    ),
    "no batch a step": (
        {"gradient_accumulation_steps": 0},
        "gradient_accumulation_steps must be a whole number, 1 or above; got 0.",
    ),
    "length_normalize text": ({"length_normalize": "no"}, "length_normalize must be True or False; got 'no'."),
    "padding_free None": ({"padding_free": None}, "padding_free must be True or False; got None."),
    "share_prompts a number": ({"share_prompts": 1}, "share_prompts must be True or False; got 1."),
}

CONTRADICTIONS = {
    "no loss": (
        {"positive_loss": "none", "negative_loss": "none"},
        "positive_loss and negative_loss are both 'none', so every loss would be 0. Set one of them.",
    ),
    "not a method": (
        {"positive_loss": "pointwise_dpo", "negative_loss": "unlearning"},
        "positive_loss='pointwise_dpo' with negative_loss='unlearning' is not a method: the first keeps the policy "
        "close to the reference, the second drives it away without bound. Use negative_loss='pointwise_dpo', or "
        "positive_loss='sft' (unlikelihood).",
    ),
    "unlearning of ratings": (
        {"label_type": "continuous", "negative_loss": "unlearning"},
        "negative_loss='unlearning' needs binary labels: a continuous label rates an answer, but does not say that the "
        "model should unlearn it. Use negative_loss='pointwise_dpo' or label_type='binary'.",
    ),
    "SFT of weight 0": (
        {"sft_weight": 0, "negative_loss": "none"},
        "sft_weight is 0 and negative_loss is 'none', so the loss of every row would be 0. Change one of them.",
    ),
    "no class has a weight": (
        {"desirable_weight": 0, "undesirable_weight": 0.0},
        "desirable_weight and undesirable_weight are both 0, so the loss of every row would be 0. Raise one of them.",
    ),
    "a best checkpoint without evaluations": (
        {"load_best_model_at_end": True, "save_strategy": "no"},
        BEST_OF_NONE,
    ),
    "only the best checkpoint without evaluations": (
        {"save_strategy": "best", "metric_for_best_model": "eval_loss"},
        BEST_OF_NONE,
    ),
    "clipping at None": (
        {"max_grad_norm": None},
        "max_grad_norm=None is not a number. Set it to 0.0 to train without clipping gradients.",
    ),
    "LOMO with accumulation": (
        {"optim": "lomo", "gradient_accumulation_steps": 2},
        "LOMO changes the weights in each backward pass, so each of the gradient_accumulation_steps=2 micro-batches "
        "would be a step of its own. Set it to 1, and a larger per_device_train_batch_size, or another optim.",
    ),
    "two layouts": (
        {"padding_free": True, "share_prompts": True},
        "padding_free and share_prompts exclude each other: both lay out a batch. Set only one.",
    ),
    "a reference that moves and is asked once": (
        {"sync_ref_model": True, "precompute_ref_log_probs": True},
        "sync_ref_model=True changes the reference during training, but precompute_ref_log_probs=True runs it only "
        "once, before training. Set only one of them.",
    ),
}

CELLS = "positive_loss and negative_loss of ULMAConfig choose the method"
REVERSE_KL = "only the reverse KL divergence defines an implicit reward for single rows"
OF_PAIRS = {
    "loss_type": ({"loss_type": "hinge"}, pair_only("loss_type='hinge'", ["sigmoid"], CELLS)),
    "loss_types": (
        {"loss_type": ["sigmoid", "sft"]},
        pair_only("loss_type=['sigmoid', 'sft']", ["sigmoid"], CELLS),
    ),
    "loss_weights": (
        {"loss_weights": [1.0]},
        pair_only(
            "loss_weights=[1.0]",
            None,
            "use sft_weight for demonstrations, and desirable_weight and undesirable_weight for the classes",
        ),
    ),
    "ld_alpha": (
        {"ld_alpha": 0.5},
        pair_only("ld_alpha=0.5", None, "use length_normalize=True to divide by the completion's length"),
    ),
    "f_divergence_type": (
        {"f_divergence_type": "js_divergence"},
        pair_only("f_divergence_type='js_divergence'", "reverse_kl", REVERSE_KL),
    ),
    "f_alpha_divergence_coef": (
        {"f_alpha_divergence_coef": 0.9},
        pair_only("f_alpha_divergence_coef=0.9", 0.5, REVERSE_KL),
    ),
    "label_smoothing": (
        {"label_smoothing": 0.1},
        pair_only("label_smoothing=0.1", 0.0, "soften the labels in the data: use 0.9 and 0.1 instead of 1 and 0"),
    ),
    "use_weighting": (
        {"use_weighting": True},
        pair_only("use_weighting=True", False, "add a weight column to the rows"),
    ),
    "discopop_tau": ({"discopop_tau": 1.0}, pair_only("discopop_tau=1.0", 0.05, CELLS)),
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [*VALUES.values(), *CONTRADICTIONS.values(), *OF_PAIRS.values()],
    ids=[*VALUES, *CONTRADICTIONS, *OF_PAIRS],
)
def test_a_config_is_refused_when_it_is_made_and_when_it_is_changed(changes, message):
    with pytest.raises(ValueError) as error:
        config(**changes)
    assert str(error.value) == message
    changed = config()
    for name, value in changes.items():
        setattr(changed, name, value)
    with pytest.raises(ValueError) as error:
        changed.check()
    assert str(error.value) == message


@pytest.mark.parametrize(
    "changes",
    [
        {"max_grad_norm": INFINITY},
        {"num_train_epochs": INFINITY, "max_steps": 3},
        {"learning_rate": np.float32(1e-4), "max_grad_norm": np.float64(1), "num_train_epochs": np.int64(2)},
    ],
    ids=["no clipping", "endless epochs", "numpy"],
)
def test_settings_that_other_scripts_have_are_read(changes):
    made = config(**changes)
    assert {name: getattr(made, name) for name in changes} == changes


def test_a_trainer_that_makes_its_own_optimizer_reads_its_own_arguments(tiny_gpt2, tmp_path):
    class Own(ULMATrainer):
        @staticmethod
        def get_optimizer_cls_and_kwargs(args, model=None):
            return torch.optim.AdamW, {"lr": args.learning_rate, "amsgrad": args.optim_args == "amsgrad=True"}

    args = ULMAConfig(str(tmp_path), **QUIET, optim_args="amsgrad=True")
    assert Own(model=tiny_gpt2, args=args, train_dataset=make_rows(4)).args.optim_args == "amsgrad=True"


def test_steps_are_counted_without_epochs():
    assert config(num_train_epochs=0, max_steps=3).max_steps == 3


@pytest.mark.parametrize(
    ("optim", "arguments", "unread"),
    [
        ("adafactor", "scale_parameter=True,relative_step=False", "scale_parameter, relative_step"),
        ("adamw_torch", "amsgrad=True", "amsgrad"),
        ("sgd", "momentum=0.9, nesterv=True", "nesterv"),
        ("sgd", "momentum=0.9,nesterov=True", None),
        ("sgd", "momentum=0", None),
        ("rmsprop", "centered=False", None),
    ],
)
def test_arguments_that_the_optimizer_does_not_read_are_refused(
    tiny_gpt2, without_weights, tmp_path, optim, arguments, unread
):
    settings = {"max_steps": 1, "optim": optim, "optim_args": arguments}
    _, of_sgd = Trainer.get_optimizer_cls_and_kwargs(TrainingArguments("out", optim="sgd", optim_args="momentum=0.9"))
    if "momentum" not in of_sgd and optim in ("sgd", "rmsprop"):
        pytest.skip("transformers 5.2 reads no arguments of these")
    if unread is None:
        make_trainer(tiny_gpt2, make_rows(4), tmp_path, **settings).train()
        return
    message = f"optim={optim!r} does not read {unread} of optim_args={arguments!r}, so the training would ignore it."
    with pytest.raises(ValueError, match=re.escape(message)):
        make_trainer(without_weights, make_rows(4), tmp_path, **settings)


@pytest.mark.parametrize("option", ["betta", "group_by_length", "max_prompt_length", "rpo_alpha"])
def test_an_option_that_does_not_exist_is_named(option):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
        config(**{option: 1})


# The trainer's arguments


@pytest.fixture(scope="module")
def without_weights(tiny_gpt2, tmp_path_factory) -> str:
    """A model's folder that has a configuration and a tokenizer, so that loading the model fails."""
    folder = tmp_path_factory.mktemp("checkpoints") / "without-weights"
    shutil.copytree(tiny_gpt2, folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    return str(folder)


def stream(n: int = 4, **columns: Any) -> IterableDataset:
    return make_rows(n, **columns).to_iterable_dataset()


SFT = {"positive_loss": "sft", "negative_loss": "none"}
NO_REFERENCE = "with positive_loss='sft' and negative_loss='none' no row is compared with"
CLASS_WEIGHTS = (
    "For continuous labels, desirable_weight applies to demonstrations and undesirable_weight to all other rows, but "
    "no row is marked as a demonstration. Add a boolean column sft_mask, or set the weight of each row in a column "
    "weight."
)
PRECOMPUTE = (
    "precompute_ref_log_probs=True needs all rows at the start, but a dataset is a stream. Set it to False, or load "
    "the dataset without streaming."
)
WITH_THE_DATA = {
    "best rewards without a reference": (
        make_rows(4),
        SFT | {"metric_for_best_model": "eval_rewards/margins"},
        f"metric_for_best_model='eval_rewards/margins' needs a reference model; {NO_REFERENCE} one, so none is "
        "loaded. Use eval_loss or eval_loss/sft.",
    ),
    "best kl without a reference": (
        make_rows(4),
        SFT | {"metric_for_best_model": "kl"},
        f"metric_for_best_model='kl' needs a reference model; {NO_REFERENCE} one, so none is loaded. Use "
        "eval_loss or eval_loss/sft.",
    ),
    "sync without a reference": (
        make_rows(4),
        SFT | {"sync_ref_model": True},
        f"sync_ref_model=True has no effect: {NO_REFERENCE} a reference. Set it to False.",
    ),
    "sync with LoRA": (
        make_rows(4),
        {"sync_ref_model": True, "peft_config": LoraConfig(target_modules=["c_attn"])},
        "sync_ref_model=True needs a separate reference model, but with PEFT the reference is the model without its "
        "adapter. Set it to False, or fine-tune the whole model.",
    ),
    "an adapter for inference": (
        make_rows(4),
        {"peft_config": LoraConfig(target_modules=["c_attn"], inference_mode=True)},
        "peft_config has inference_mode=True, as the config of a saved adapter does, so the new adapter would be "
        "frozen. Set peft_config.inference_mode = False. To train a saved adapter further, load it with "
        "PeftModel.from_pretrained(..., is_trainable=True) and pass it as the model.",
    ),
    "class weights of unmarked ratings": (
        make_rows(4),
        {"pointwise": True, "label_type": "continuous", "desirable_weight": 2.0},
        CLASS_WEIGHTS,
    ),
    "class weights of unmarked ratings in a stream": (
        stream(),
        {"pointwise": True, "label_type": "continuous", "undesirable_weight": 0.5, "max_steps": 1},
        CLASS_WEIGHTS,
    ),
    "class weights where no rating is marked": (
        make_rows(4, label=[0.1, 0.2, 0.3, 0.4]),
        {"label_type": "continuous", "sft_threshold": 0.5, "desirable_weight": 2.0},
        CLASS_WEIGHTS,
    ),
    "ULMA on ratings without a mask": (
        make_rows(4),
        {"label_type": "continuous"},
        "Row 0 of the train dataset has a continuous label, and nothing says which of these rows are demonstrations. "
        "Add a boolean column sft_mask, or set sft_threshold: rows with labels at or above it are demonstrations.",
    ),
    "unlearning of rows that are ratings": (
        make_rows(2, label_type=["binary", "continuous"], sft_mask=[True, False]),
        {"negative_loss": "unlearning"},
        "Row 1 of the train dataset has a continuous label, but negative_loss='unlearning' needs binary labels: a "
        "continuous label does not say whether to unlearn an answer. Use negative_loss='pointwise_dpo'.",
    ),
    "a max_length that no prompt is below": (
        make_rows(4),
        {"max_length": 2},
        "All 4 rows of the train dataset were left out. Reason: its prompt alone fills max_length (4 rows). Raise "
        "max_length.",
    ),
    "rows beyond the model's positions": (
        make_rows(2, completion=[" a" * 600, " b"]),
        {"max_length": None},
        "Row 0 of the train dataset has 606 tokens, but the model only has 512 positions. Set max_length=512, or "
        "remove the row.",
    ),
    "rows of a stream beyond the model's positions": (
        stream(2, completion=[" b", " a" * 600]),
        {"max_length": 1024, "max_steps": 1},
        "Row 1 of the train dataset has 613 tokens, but the model only has 512 positions. Set max_length=512, or "
        "remove the row.",
    ),
    "evaluation beyond the model's positions": (
        make_rows(4),
        {"max_length": None, "eval_dataset": make_rows(2, completion=[" a" * 600, " b"])},
        "Row 0 of the eval dataset has 606 tokens, but the model only has 512 positions. Set max_length=512, or remove "
        "the row.",
    ),
    "a stream of unknown length": (
        stream(),
        {},
        "train_dataset is a stream, so its length is unknown. Set max_steps.",
    ),
    "a stream asked at the start": (stream(), {"max_steps": 1, "precompute_ref_log_probs": True}, PRECOMPUTE),
    "a stream asked at the start for evaluation": (
        make_rows(4),
        {"precompute_ref_log_probs": True, "eval_dataset": {"thumbs": stream()}},
        PRECOMPUTE,
    ),
}


@pytest.mark.parametrize(("rows", "options", "message"), WITH_THE_DATA.values(), ids=WITH_THE_DATA)
def test_what_the_data_contradicts_is_told_before_a_model_is_loaded(without_weights, tmp_path, rows, options, message):
    with pytest.raises(ValueError) as error:
        make_trainer(without_weights, rows, tmp_path, **options)
    assert message in str(error.value)


def test_a_pretrained_adapter_has_no_reference_to_synchronize(tiny_gpt2, tmp_path):
    from peft import get_peft_model

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_gpt2), LoraConfig(target_modules=["c_attn"]))
    with pytest.raises(ValueError, match=r"^sync_ref_model=True needs a separate reference model, but with PEFT"):
        make_trainer(model, make_rows(4), tmp_path, sync_ref_model=True)


def test_rotary_positions_have_no_end(tiny_llama, tmp_path):
    trainer = make_trainer(tiny_llama, make_rows(2, completion=[" a" * 600, " b"]), tmp_path, max_length=None)
    assert max(trainer.train_dataset["length"]) > 600


def test_an_evaluation_stream_does_not_hide_the_training_streams_mask(tiny_gpt2, tmp_path):
    rows = stream(sft_mask=[False] * 4)
    trainer = make_trainer(tiny_gpt2, rows, tmp_path, max_steps=1, eval_dataset=stream(), **SFT)
    assert trainer.ref_model is not None


@pytest.mark.parametrize(
    ("args", "name"),
    [
        (SFTConfig("out", **QUIET), "SFTConfig"),
        (TrainingArguments("out"), "TrainingArguments"),
        ({"beta": 0.1}, "dict"),
        ("out", "str"),
    ],
)
def test_arguments_of_another_trainer(without_weights, args, name):
    for trainer, own in ((ULMATrainer, "ULMAConfig"), (PointwiseDPOTrainer, "PointwiseDPOConfig")):
        with pytest.raises(TypeError) as error:
            trainer(model=without_weights, args=args, train_dataset=make_rows(2))
        assert str(error.value) == f"args must be a {own}, a trl.DPOConfig or a trl.KTOConfig; got {name}."


def test_the_pointwise_trainer_takes_no_ulma_config(without_weights):
    with pytest.raises(TypeError) as error:
        PointwiseDPOTrainer(model=without_weights, args=config(), train_dataset=make_rows(2))
    assert str(error.value) == (
        "PointwiseDPOTrainer has only one method and takes a PointwiseDPOConfig; got a ULMAConfig, which selects a "
        "method. Use ULMATrainer."
    )


@pytest.mark.parametrize("rows", [[{"prompt": "Hi"}], DatasetDict(train=make_rows(2)), "rows.jsonl"])
def test_what_is_no_training_set(without_weights, tmp_path, rows):
    with pytest.raises(TypeError) as error:
        make_trainer(without_weights, rows, tmp_path)
    assert str(error.value) == (
        f"train_dataset must be a Dataset or an IterableDataset; got {type(rows).__name__}. If it is a dict of splits, "
        "pass one of them, such as dataset['train']."
    )


def test_a_dict_without_evaluation_sets(without_weights, tmp_path):
    with pytest.raises(ValueError, match="eval_dataset is an empty dict, so nothing would be evaluated"):
        make_trainer(without_weights, make_rows(2), tmp_path, eval_dataset={}, eval_strategy="epoch")


@pytest.mark.parametrize("name", ["eval", "thumbs"])
def test_what_is_no_evaluation_set(without_weights, tmp_path, name):
    rows = [{"prompt": "Hi"}]
    with pytest.raises(TypeError) as error:
        make_trainer(without_weights, make_rows(2), tmp_path, eval_dataset=rows if name == "eval" else {name: rows})
    assert str(error.value) == (
        f"The {name} dataset must be a Dataset or an IterableDataset; got list. Use Dataset.from_list for a list of "
        "rows."
    )


def test_the_reference_is_another_model(tiny_gpt2, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    with pytest.raises(ValueError) as error:
        make_trainer(model, make_rows(2), tmp_path, ref_model=model)
    assert str(error.value) == (
        "model and ref_model are the same object, so training would also change the reference. Leave out ref_model: "
        "the reference is then the model as it is before training."
    )


def test_a_reference_that_no_row_needs_is_a_warning(tiny_gpt2, tmp_path):
    reference = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    with pytest.warns(UserWarning, match=f"^ref_model is not used: {NO_REFERENCE} it"):
        make_trainer(tiny_gpt2, make_rows(2), tmp_path, ref_model=reference, **SFT)


# Tokenizers


def take(tokenizer: Any, pad_token: str | None = None) -> Any:
    return own_processing_class(tokenizer, "", pad_token, revision=None, trust_remote_code=False)


def test_a_tokenizer_without_pad_and_eos(tiny_gpt2):
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    tokenizer.pad_token = None
    assert take(tokenizer).pad_token == tokenizer.eos_token
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ValueError) as error:
        take(tokenizer)
    assert str(error.value) == "The tokenizer has neither a padding nor an EOS token. Set tokenizer.pad_token."


def test_a_pad_token_that_is_not_there(tiny_gpt2, without_weights, tmp_path):
    message = "The pad_token '<nope>' is not in the tokenizer's vocabulary. Set one that is."
    with pytest.raises(ValueError) as error:
        take(AutoTokenizer.from_pretrained(tiny_gpt2), "<nope>")
    assert str(error.value) == message
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of newer versions of TRL
        with pytest.raises(ValueError) as error:
            make_trainer(without_weights, make_rows(2), tmp_path, pad_token="<nope>")
    assert str(error.value) == message


@pytest.mark.parametrize("processor", ["gpt2", object(), AutoTokenizer])
def test_what_is_no_tokenizer(processor):
    with pytest.raises(TypeError) as error:
        take(processor)
    assert str(error.value) == (
        "processing_class must be a tokenizer, or a processor of images and text; got "
        f"{type(processor).__name__}. To train on text alone, pass the processor's `tokenizer`."
    )


def test_a_model_in_a_subfolder(tiny_gpt2, without_weights, tmp_path):
    shutil.copytree(tiny_gpt2, tmp_path / "models" / "tiny")
    with pytest.raises(ValueError, match=r"'subfolder': 'tiny'.* is not supported.*Pass the folder .*models/tiny as"):
        make_trainer(str(tmp_path / "models"), make_rows(4), tmp_path / "out", model_init_kwargs={"subfolder": "tiny"})


def test_a_prefix_in_the_cache_and_gradient_checkpointing(tiny_gpt2, without_weights, tmp_path):
    prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match=r"PREFIX_TUNING adapters .*Set gradient_checkpointing=False"):
        make_trainer(tiny_gpt2, make_rows(4), tmp_path, peft_config=prefix, gradient_checkpointing=True)


def test_an_adapter_that_is_activated_by_tokens_and_gradient_checkpointing(without_weights, tmp_path):
    activated = LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], alora_invocation_tokens=[5])
    with pytest.raises(ValueError, match=r"aLoRA adapters .*Set gradient_checkpointing=False"):
        make_trainer(without_weights, make_rows(4), tmp_path, peft_config=activated, gradient_checkpointing=True)


# The figure by which the best checkpoint is chosen


@pytest.mark.parametrize(
    ("best", "several", "message"),
    [
        (
            "eval_rewards/margin",
            False,
            r"'eval_rewards/margin' is not an eval metric\. Did you mean eval_rewards/margins\?",
        ),
        (
            "rewards/sensitivity",
            False,
            r"'rewards/sensitivity' is not an eval metric\. Choices: loss, .*rewards/auc",
        ),
        ("eval_los", False, r"Did you mean eval_loss\?"),
        ("eval_loss", True, r"'eval_loss' is not an eval metric\. Choices: thumbs_loss, .*"),
        ("eval_thumbs_rewards/aucs", True, r"Did you mean eval_thumbs_rewards/auc\?"),
        (
            "eval_rewards/spearman",
            False,
            r"'eval_rewards/spearman' will not be logged: it needs continuous labels that differ, which the eval "
            r"dataset does not have\. It logs loss, loss/sft, .*rewards/auc\.",
        ),
        ("thumbs_rewards/mse", True, r"needs rows with continuous labels, which the thumbs dataset does not have"),
        ("my_own", False, r"'my_own' is not an eval metric\. .* \(Metrics of your own come from compute_metrics"),
    ],
)
def test_a_misspelt_best_metric_is_refused_at_the_start(tiny_gpt2, tmp_path, best, several, message):
    evaluated = {"thumbs": make_rows(4)} if several else make_rows(4)
    with pytest.raises(ValueError, match=message):
        make_trainer(tiny_gpt2, make_rows(4), tmp_path, eval_dataset=evaluated, metric_for_best_model=best)


@pytest.mark.parametrize(
    ("best", "several"),
    [
        *(("loss", False), ("eval_rewards/auc", False), ("my_own", False)),
        *(("eval_thumbs_kl", True), ("thumbs_runtime", True)),
    ],
)
def test_a_best_metric_that_can_exist_is_taken(tiny_gpt2, tmp_path, best, several):
    evaluated = {"thumbs": make_rows(4)} if several else make_rows(4)
    own = {"compute_metrics": lambda prediction: {"my_own": 1.0}} if best == "my_own" else {}
    make_trainer(tiny_gpt2, make_rows(4), tmp_path, eval_dataset=evaluated, metric_for_best_model=best, **own)


@pytest.mark.parametrize(
    "labels", [[1.0, 0.0] * 3, [5.0, 4.0, 1.0, 2.0, 3.0, 5.0], [4.0] * 6, [1.0] * 6], ids=["thumbs", "stars", "4", "1"]
)
def test_the_figures_that_a_best_metric_may_be_are_those_that_are_logged(tiny_gpt2, tmp_path, labels):
    kind = "binary" if labels[:2] == [1.0, 0.0] else "continuous"
    rows = make_rows(6, label=[5.0, 4.0, 1.0, 2.0, 3.0, 5.0], label_type=["continuous"] * 6)
    evaluated = make_rows(6, label=labels, label_type=[kind] * 6)
    model, reference = (AutoModelForCausalLM.from_pretrained(tiny_gpt2) for _ in range(2))
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(1.1)
    trainer = make_trainer(model, rows, tmp_path, ref_model=reference, eval_dataset=evaluated, sft_threshold=5.0)
    logged = {name.removeprefix("eval_") for name in trainer.evaluate()}
    wanted = {*trainer._plan.figures_of(trainer.eval_dataset), "runtime", "samples_per_second", "steps_per_second"}
    assert logged - {"epoch", "model_preparation_time"} == wanted - {"aux_loss"}


def test_a_liked_row_in_a_stream_is_refused_where_no_reference_is(tiny_gpt2, tmp_path):
    def stream(labels):
        mask = [False] * len(labels)
        return make_rows(len(labels), label=labels, sft_mask=mask).to_iterable_dataset()

    rows = make_rows(4, label=[1.0, 1.0, 0.0, 0.0], sft_mask=[True, True, False, False])
    trainer = make_trainer(tiny_gpt2, rows, tmp_path, **SFT)
    with pytest.raises(ValueError, match="The evaluated dataset has rows that are compared with the reference"):
        trainer.evaluate(stream([0.0, 1.0]))
    assert trainer.evaluate(stream([0.0, 0.0]))["eval_loss"] == 0.0


# Any settings at all

ANYTHING = st.one_of(
    *(st.none(), st.booleans(), st.integers(-3, 3), st.integers(), st.floats(), st.text(max_size=4)),
    *(st.lists(st.floats(), max_size=2), st.sampled_from(["sft", "pointwise_dpo", "unlearning", "none", "continuous"])),
)
OPTIONS = [
    *(f.name for f in fields(ULMAConfig) if f.name not in DPOConfig.__dataclass_fields__),
    *("beta", "loss_type", "ld_alpha", "label_smoothing", "max_length", "truncation_mode", "pad_to_multiple_of"),
    *("padding_free", "sync_ref_model", "precompute_ref_log_probs", "dataset_num_proc", "metric_for_best_model"),
]


def check_any_settings(changes: dict[str, Any]) -> None:
    """Settings are refused by an error that names one of them, or are numbers to compute with."""
    changed = config()
    for name, value in changes.items():
        setattr(changed, name, value)
    refusal = ""
    try:
        changed.check()
    except ValueError as error:
        refusal = str(error)
    assert not refusal or any(name in refusal for name in changes)
    if not refusal:
        assert 0 < changed.beta < INFINITY
        assert 0 <= changed.sft_weight < INFINITY
        assert changed.cell != ("none", "none")
        assert changed.max_length is None or changed.max_length >= 2


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.dictionaries(st.sampled_from(OPTIONS), ANYTHING, min_size=1, max_size=3))
def test_any_settings(changes):
    check_any_settings(changes)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None, derandomize=True, database=None)
@given(st.dictionaries(st.sampled_from(OPTIONS), ANYTHING, min_size=1, max_size=3))
def test_any_settings_at_length(changes):
    check_any_settings(changes)


def test_a_training_set_is_required(without_weights, tmp_path):
    with pytest.raises(
        TypeError, match=r"train_dataset is None\. Pass rows with prompt, completion and label, or pairs"
    ):
        make_trainer(without_weights, None, tmp_path)
