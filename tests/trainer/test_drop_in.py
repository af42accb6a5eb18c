"""An existing DPO script with one class name changed: all of TRL's plumbing goes on working."""

import copy
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import trl
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer, LogCompletionsCallback
from world import make_rows, make_trainer, mixed_rows, plain_logps, weights

from trl_ulma import PointwiseDPOConfig, PointwiseDPOTrainer, ULMAConfig, ULMATrainer
from trl_ulma.training_reference import widen_adapters

LORA = LoraConfig(r=4, target_modules=["c_attn"], init_lora_weights="gaussian")

ROLES = {"prompt": "user", "completion": "assistant"}
BAD_CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No."}]


def make_pairs(n: int) -> Dataset:
    rows = make_rows(n)
    return Dataset.from_dict(
        {
            "prompt": rows["prompt"][:],
            "chosen": rows["completion"][:],
            "rejected": [f" Nothing of the sort {i}." for i in range(n)],
        }
    )


def test_the_trainers_are_trls():
    assert issubclass(PointwiseDPOTrainer, DPOTrainer)
    assert issubclass(ULMATrainer, PointwiseDPOTrainer)
    assert issubclass(PointwiseDPOConfig, DPOConfig)
    assert issubclass(ULMAConfig, DPOConfig)


def test_a_dpo_config_is_taken_over_and_left_alone(tiny_gpt2, tmp_path):
    args = DPOConfig(str(tmp_path), bf16=False, beta=0.3, report_to="none", gradient_checkpointing_kwargs={})
    before = copy.deepcopy(args.to_dict())
    stream = IterableDataset.from_generator(lambda: iter(make_rows(4)))
    args.max_steps = before["max_steps"] = 1
    trainer = ULMATrainer(model=tiny_gpt2, args=args, train_dataset=stream)
    assert isinstance(trainer.args, ULMAConfig)
    assert (trainer.args.beta, trainer.args.positive_loss, trainer.beta) == (0.3, "sft", 0.3)
    assert args.to_dict() == before
    assert type(args) is DPOConfig


def test_settings_are_the_callers_again_where_the_trainer_fails(tiny_gpt2, tmp_path):
    args = ULMAConfig(str(tmp_path), padding_free=True, negative_loss="none", report_to="none", bf16=False)
    with pytest.raises(TypeError, match="peft_config"):
        ULMATrainer(model=tiny_gpt2, args=args, train_dataset=make_rows(4), peft_config="none")
    assert args.padding_free
    assert not args.precompute_ref_log_probs


def test_taking_a_config_over_does_not_set_it_up_again(tmp_path, monkeypatch):
    args = DPOConfig(str(tmp_path), bf16=False)
    monkeypatch.setattr(ULMAConfig, "__post_init__", lambda self: pytest.fail("__post_init__ ran"))
    assert ULMAConfig.from_dpo_config(args).output_dir == str(tmp_path)


@pytest.mark.parametrize(
    ("option", "value", "advice"),
    [
        ("loss_type", "ipo", "positive_loss"),
        ("loss_weights", [1.0], "sft_weight"),
        ("ld_alpha", 0.5, "length_normalize"),
        ("label_smoothing", 0.1, "soften the labels"),
        ("f_divergence_type", "forward_kl", "reverse KL"),
        ("f_alpha_divergence_coef", 0.7, "reverse KL"),
        ("use_weighting", True, "weight column"),
        ("discopop_tau", 0.1, "positive_loss"),
    ],
)
def test_a_pair_only_option_is_refused_by_name(tmp_path, option, value, advice):
    with pytest.raises(ValueError, match=rf"{option}=.* is a setting of pairwise losses.*{advice}"):
        ULMAConfig(str(tmp_path), bf16=False, **{option: value})
    with pytest.raises(ValueError, match=rf"{option}=.* is a setting of pairwise losses.*{advice}"):
        ULMAConfig.from_dpo_config(DPOConfig(str(tmp_path), bf16=False, **{option: value}))


def test_a_pair_only_option_at_its_default_is_no_error(tmp_path):
    assert ULMAConfig(str(tmp_path), bf16=False, loss_type="sigmoid").loss_type == ["sigmoid"]


def test_bf16_is_the_default_where_there_is_support_for_it(tmp_path, monkeypatch):
    assert ULMAConfig(str(tmp_path)).bf16 is False
    assert ULMAConfig(str(tmp_path), use_cpu=True).bf16 is True  # TRL's default
    with pytest.raises(ValueError, match="bf16"):
        ULMAConfig(str(tmp_path), bf16=True)
    monkeypatch.setattr("trl_ulma.config.is_torch_bf16_gpu_available", lambda: True)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    assert ULMAConfig(str(tmp_path)).bf16 is True


def test_pairs_become_two_rows_side_by_side(tiny_gpt2, tmp_path):
    trainer = make_trainer(
        tiny_gpt2, make_pairs(4), tmp_path, per_device_train_batch_size=2, train_sampling_strategy="sequential"
    )
    batches = list(trainer.get_train_dataloader())
    assert [batch["label"].tolist() for batch in batches] == [[1.0, 0.0]] * 4
    assert [batch["sft_mask"].tolist() for batch in batches] == [[True, False]] * 4


def test_a_prompt_cut_out_of_transcripts_leaves_the_answers_their_shared_opening(tiny_gpt2, tmp_path):
    head = "\n\nHuman: Hi\n\nAssistant:"
    pairs = Dataset.from_dict({"chosen": [head + " I am fine."], "rejected": [head + " I am not."]})
    rows = make_trainer(tiny_gpt2, pairs, tmp_path).train_dataset
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_gpt2)
    assert [tokenizer.decode(ids) for ids in rows["prompt_ids"]] == [head, head]
    assert [tokenizer.decode(ids) for ids in rows["completion_ids"]] == [" I am fine.<|end|>", " I am not.<|end|>"]


def test_conversations_without_a_prompt_are_cut_at_the_last_assistant_turn(tiny_llama, tmp_path):
    asked = [{"role": "user", "content": "Hi"}]
    pairs = Dataset.from_dict(
        {
            "chosen": [[*asked, {"role": "assistant", "content": "I am fine."}]],
            "rejected": [[*asked, {"role": "assistant", "content": "I am not."}]],
        }
    )
    rows = make_trainer(tiny_llama, pairs, tmp_path).train_dataset
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    assert [tokenizer.decode(ids) for ids in rows["prompt_ids"]] == ["<|user|>Hi<|end|><|assistant|>"] * 2
    assert [tokenizer.decode(ids) for ids in rows["completion_ids"]] == ["I am fine.<|end|>", "I am not.<|end|>"]


def test_tools_and_template_kwargs_reach_the_chat_template(tiny_llama, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = (
        "{% if tools %}{{ tools[0]['name'] }}{% endif %}{% if loud %}LOUD{% endif %}" + tokenizer.chat_template
    )
    rows = Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": "Hi"}]] * 2,
            "completion": [[{"role": "assistant", "content": "No"}]] * 2,
            "label": [0, 1],
            "tools": ['[{"name": "lamp"}]'] * 2,
            "chat_template_kwargs": [{"loud": True}] * 2,
        }
    )
    trainer = make_trainer(tiny_llama, rows, tmp_path, processing_class=tokenizer)
    assert tokenizer.decode(trainer.train_dataset[0]["prompt_ids"]) == "lampLOUD<|user|>Hi<|end|><|assistant|>"


def test_trls_own_dpo_script_runs_with_its_trainer_replaced(tiny_gpt2, tmp_path, monkeypatch):
    folder = tmp_path / "pairs"
    folder.mkdir()
    make_pairs(8).to_json(folder / "train.jsonl")
    make_pairs(4).to_json(folder / "test.jsonl")
    script = Path(trl.__file__).parent / "scripts" / "dpo.py"
    out = tmp_path / "out"
    argv = ["dpo.py", "--model_name_or_path", tiny_gpt2, "--dataset_name", str(folder), "--output_dir", str(out)]
    argv += ["--max_steps", "2", "--per_device_train_batch_size", "2", "--eval_strategy", "steps", "--eval_steps", "1"]
    argv += ["--report_to", "none", "--bf16", "False", "--use_cpu", "--learning_rate", "1e-3"]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(trl, "DPOTrainer", ULMATrainer)
    # `trainer.end()` ends the process group, which the rest of the session does not have either
    runpy.run_path(str(script), run_name="__main__")
    trained = AutoModelForCausalLM.from_pretrained(out)
    untrained = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    assert not torch.equal(weights(trained), weights(untrained))
    assert "ULMA" in (out / "README.md").read_text()


def test_evaluation_sets_by_name_have_figures_by_name(tiny_gpt2, tmp_path):
    sets = DatasetDict(first=make_rows(6), second=make_pairs(3))
    trainer = make_trainer(
        tiny_gpt2, make_rows(8), tmp_path, eval_dataset=sets, eval_strategy="steps", eval_steps=1, max_steps=1
    )
    trainer.train()
    names = {name for entry in trainer.state.log_history for name in entry}
    assert {"eval_first_rewards/margins", "eval_second_rewards/margins", "eval_first_loss", "eval_second_loss"} <= names
    found = trainer.evaluate()
    assert found["eval_second_loss"] != found["eval_first_loss"]


def test_an_evaluation_set_may_be_called_train(tiny_gpt2, tmp_path):
    sets = {"train": make_rows(6), "test": make_rows(6)}
    settings = {"precompute_ref_log_probs": True, "max_steps": 1, "learning_rate": 1e-2}
    trainer = make_trainer(tiny_gpt2, make_rows(8), tmp_path, eval_dataset=sets, peft_config=LORA, **settings)
    trainer.train()
    found = trainer.evaluate()
    for name in ("loss", "kl", "rewards/chosen", "rewards/margins", "rewards/accuracies"):
        assert found[f"eval_train_{name}"] == found[f"eval_test_{name}"]
    assert np.isfinite(trainer.predict(make_rows(6), metric_key_prefix="train").predictions).all()


def test_the_best_model_is_chosen_by_reward_margins(tiny_gpt2, tmp_path):
    trainer = make_trainer(
        tiny_gpt2,
        make_rows(8),
        tmp_path,
        eval_dataset=make_rows(6),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        max_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="eval_rewards/margins",
        learning_rate=1e-3,
    )
    trainer.train()
    margins = [log["eval_rewards/margins"] for log in trainer.state.log_history if "eval_rewards/margins" in log]
    assert trainer.state.best_metric == max(margins)
    assert len(margins) == 3


def test_trls_callback_logs_completions_of_the_evaluated_prompts(tiny_gpt2, tiny_llama, tmp_path):
    chats = Dataset.from_list(
        [{name: [{"role": role, "content": "Hi"}] for name, role in ROLES.items()} | {"label": i} for i in range(2)]
    )
    transcripts = Dataset.from_list([{"chosen": chats[0]["prompt"] + chats[0]["completion"], "rejected": BAD_CHAT}])
    for model, rows, prompts in (
        (tiny_gpt2, make_rows(4), make_rows(4)["prompt"][:]),
        (tiny_gpt2, make_pairs(1), make_rows(1)["prompt"][:] * 2),
        (tiny_llama, chats, ["<|user|>Hi<|end|><|assistant|>"] * 2),
        (tiny_llama, transcripts, ["<|user|>Hi<|end|><|assistant|>"] * 2),
    ):
        trainer = make_trainer(model, rows, tmp_path, eval_dataset=rows, max_steps=1, precompute_ref_log_probs=True)
        callback = LogCompletionsCallback(trainer, GenerationConfig(max_new_tokens=2), freq=1)
        trainer.add_callback(callback)
        trainer.train()
        assert [row[1] for row in callback.table] == prompts
        assert "prompt" not in trainer.train_dataset.column_names
        assert np.isfinite(trainer.evaluate()["eval_loss"])


@pytest.mark.parametrize("precompute", [False, True])
def test_evaluate_and_predict_take_raw_rows_after_training(tiny_gpt2, tmp_path, precompute):
    trainer = make_trainer(
        tiny_gpt2, make_rows(8), tmp_path, max_steps=2, peft_config=LORA, precompute_ref_log_probs=precompute
    )
    trainer.train()
    raw = mixed_rows(6).remove_columns("log_z")
    assert np.isfinite(trainer.evaluate(raw)["eval_loss"])
    assert trainer.predict(raw).predictions.shape == (6,)


def test_a_precomputed_reference_that_is_gone_is_said_to_be(tiny_gpt2, tmp_path):
    trainer = make_trainer(tiny_gpt2, make_rows(8), tmp_path, max_steps=1, precompute_ref_log_probs=True)
    trainer.train()
    with pytest.raises(ValueError, match="the reference no longer exists after training has begun"):
        trainer.predict(make_rows(4))
    with pytest.raises(ValueError, match="the reference no longer exists after training has begun"):
        trainer.evaluate(make_rows(4))


def test_a_trainers_own_rows_can_be_evaluated_with_its_precomputed_reference(tiny_gpt2, tmp_path):
    rows = make_rows(6)
    kwargs = {"pointwise": True, "max_steps": 1, "eval_dataset": make_rows(4), "learning_rate": 1e-2}
    live = make_trainer(tiny_gpt2, rows, tmp_path, **kwargs)
    trainer = make_trainer(tiny_gpt2, rows, tmp_path, precompute_ref_log_probs=True, **kwargs)
    for _ in range(2):  # before training and after
        for own, raw in ((trainer.train_dataset, rows), (trainer.eval_dataset, make_rows(4))):
            wanted = live.predict(raw)
            assert trainer.predict(own).predictions == pytest.approx(wanted.predictions, abs=1e-5)
            assert trainer.evaluate(own)["eval_loss"] == pytest.approx(wanted.metrics["test_loss"], rel=1e-4)
        live.train()
        trainer.train()


def test_rows_of_another_trainer_are_compared_with_ones_own_reference(tiny_gpt2, tiny_llama, tmp_path):
    other = make_trainer(tiny_llama, make_rows(6), tmp_path, pointwise=True, precompute_ref_log_probs=True)
    for precompute in (False, True):
        trainer = make_trainer(
            tiny_gpt2, other.train_dataset, tmp_path, pointwise=True, precompute_ref_log_probs=precompute
        )
        # The model as it is before training is its reference
        assert trainer.predict(other.train_dataset).predictions == pytest.approx(0, abs=1e-5)
        assert trainer.predict(trainer.train_dataset).predictions == pytest.approx(0, abs=1e-5)


def test_demonstrations_of_the_training_set_get_a_reference_once_they_are_evaluated(tiny_gpt2, tmp_path):
    trainer = make_trainer(tiny_gpt2, make_rows(6), tmp_path, precompute_ref_log_probs=True, max_steps=1)
    assert np.isnan(trainer.train_dataset["ref_logps"][:]).any()
    assert trainer.predict(trainer.train_dataset).predictions == pytest.approx(0, abs=1e-5)
    trainer.train()
    with pytest.raises(ValueError, match="the reference no longer exists after training has begun"):
        trainer.predict(trainer.train_dataset)


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_a_resumed_run_ends_where_an_unbroken_one_does(tiny_gpt2, tmp_path, peft):
    kwargs = {
        "num_train_epochs": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "per_device_train_batch_size": 3,
        "learning_rate": 1e-3,
    }
    kwargs |= {"peft_config": LORA} if peft else {}
    whole = make_trainer(tiny_gpt2, mixed_rows(11), tmp_path / "whole", **kwargs)
    whole.train()
    broken = make_trainer(tiny_gpt2, mixed_rows(11), tmp_path / "whole", **kwargs)
    broken.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(weights(whole.model), weights(broken.model))
    untrained = make_trainer(tiny_gpt2, mixed_rows(11), tmp_path / "none", **kwargs)
    assert not torch.equal(weights(untrained.model), weights(whole.model))


def test_a_saved_model_gives_the_predicted_log_probabilities(tiny_gpt2, tmp_path):
    trainer = make_trainer(tiny_gpt2, make_rows(8), tmp_path, max_steps=2, negative_loss="none", learning_rate=1e-3)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64)
    # Without a reference the predictions are log-probabilities
    wanted, _ = plain_logps(tiny_gpt2, make_rows(8), saved)
    assert trainer.predict(make_rows(8)).predictions == pytest.approx(wanted, rel=1e-4)


def test_adapters_are_saved_and_loaded(tiny_gpt2, tmp_path):
    trainer = make_trainer(tiny_gpt2, make_rows(8), tmp_path, max_steps=2, peft_config=LORA, learning_rate=1e-2)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").double()
    policy, _ = plain_logps(tiny_gpt2, make_rows(8), model)
    reference, _ = plain_logps(tiny_gpt2, make_rows(8))
    assert trainer.predict(make_rows(8)).predictions == pytest.approx(0.1 * (policy - reference), abs=1e-4)


def test_a_pretrained_adapter_is_its_own_reference(tiny_gpt2, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_gpt2), LORA)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    assert isinstance(model, PeftModel)
    model.save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_gpt2), tmp_path / "adapter", is_trainable=True
    )
    trainer = make_trainer(model, make_rows(8), tmp_path, max_steps=2, learning_rate=1e-2)
    before = trainer.predict(make_rows(8)).predictions
    assert before == pytest.approx(np.zeros(8), abs=1e-5)  # not the base model's
    trainer.train()
    assert np.abs(trainer.predict(make_rows(8)).predictions).max() > 1e-3


def test_the_adapter_that_is_trained_is_the_one_that_its_reference_copies(tiny_gpt2, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_gpt2), LORA)
    model.add_adapter("other", LORA)
    model.set_adapter("other")
    with pytest.raises(ValueError, match="trains the adapter other, but the reference would be a copy of the adapter"):
        make_trainer(model, make_rows(8), tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    assert make_trainer(model, make_rows(8), tmp_path, ref_model=reference).ref_model is not None
    alone = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_gpt2), LORA, adapter_name="policy")
    with pytest.raises(ValueError, match="trains the adapter policy"):
        make_trainer(alone, make_rows(8), tmp_path)


def test_virtual_tokens_of_a_model_in_memory_take_positions(tiny_gpt2, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    adapter = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=base.config.n_positions - 5)
    rows = make_rows(4, prompt=["How are you?" * 9] * 4)
    for model, peft_config in ((tiny_gpt2, adapter), (get_peft_model(base, adapter), None)):
        with pytest.raises(ValueError, match="5 positions"):
            make_trainer(model, rows, tmp_path, peft_config=peft_config, max_length=None)


@pytest.mark.parametrize("precompute", [False, True])
def test_the_reference_of_a_model_in_memory_is_that_model(tiny_gpt2, tmp_path, precompute):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    settings = {"max_steps": 2, "learning_rate": 1e-2, "precompute_ref_log_probs": precompute}
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    rows = make_rows(8)
    trainer = make_trainer(model, rows, tmp_path, eval_dataset=rows, processing_class=tokenizer, **settings)
    assert trainer.predict(trainer.eval_dataset).predictions == pytest.approx(np.zeros(8), abs=1e-5)
    trainer.train()
    assert np.abs(trainer.predict(trainer.eval_dataset).predictions).max() > 1e-3


def test_a_model_without_a_name_has_a_reference(tiny_gpt2, tmp_path):
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_gpt2))
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    trainer = make_trainer(model, make_rows(8), tmp_path, max_steps=1, processing_class=tokenizer)
    trainer.train()
    assert trainer.ref_model is not trainer.model


@pytest.mark.parametrize("layout", [{}, {"share_prompts": True}, {"padding_free": True}], ids=str)
def test_four_bit_qlora_trains_on_the_cpu(layout, tiny_llama, tmp_path):
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    trainer = make_trainer(
        tiny_llama,
        make_rows(8, prompt=["Write a letter."] * 8),
        tmp_path,
        max_steps=3,
        learning_rate=1e-2,
        quantization_config=quantization,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        **layout,
    )
    assert trainer.model.is_loaded_in_4bit
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert np.isfinite(losses).all()
    rewards = trainer.predict(make_rows(8)).predictions
    assert np.abs(rewards).max() > 1e-3


def test_adapters_of_a_quantized_model_are_in_float32_for_fp16(tiny_llama, tmp_path):
    """TRL makes them bfloat16, whose gradients the scaler of fp16 cannot unscale. There is none on a CPU."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float16
    )
    adapter = LoraConfig(r=4, target_modules=["q_proj"])
    trainer = make_trainer(
        tiny_llama, make_rows(4), tmp_path, max_steps=1, quantization_config=quantization, peft_config=adapter
    )
    trained = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    before = [weight.clone() for weight in trained]
    assert {weight.dtype for weight in trained} == {torch.bfloat16}
    widen_adapters(trainer.model)
    assert {weight.dtype for weight in trained} == {torch.float32}
    assert all(torch.equal(weight, was.float()) for weight, was in zip(trained, before, strict=True))


def test_four_bit_weights_have_gradients_after_an_evaluation(tiny_llama, tmp_path):
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=quantization)
    with torch.no_grad():
        model(torch.ones(1, 4, dtype=torch.long))  # before the trainer has seen it
    trainer = make_trainer(
        model,
        make_rows(8),
        tmp_path,
        max_steps=4,
        learning_rate=1e-2,
        eval_dataset=make_rows(4),
        eval_strategy="steps",
        eval_steps=1,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    )
    trainer.evaluate()
    trainer.train()
    norms = [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log]
    assert len(norms) == 4
    assert min(norms) > 0.1


def test_a_stream_of_rows_trains_and_evaluates(tiny_gpt2, tmp_path):
    def stream(n):
        return IterableDataset.from_generator(lambda: iter(mixed_rows(n)))

    trainer = make_trainer(
        tiny_gpt2,
        stream(12),
        tmp_path,
        max_steps=4,
        per_device_train_batch_size=4,
        eval_dataset=stream(5),
        eval_strategy="steps",
        eval_steps=2,
        max_length=64,
    )
    trainer.train()
    assert trainer.state.global_step == 4
    wanted = make_trainer(tiny_gpt2, mixed_rows(12), tmp_path).evaluate(mixed_rows(5))["eval_loss"]
    fresh = make_trainer(tiny_gpt2, stream(12), tmp_path, max_steps=1)
    assert fresh.evaluate(stream(5))["eval_loss"] == pytest.approx(wanted, rel=1e-5)


def test_the_reference_is_synchronized(tiny_gpt2, tmp_path):
    trainer = make_trainer(
        tiny_gpt2,
        make_rows(8),
        tmp_path,
        max_steps=2,
        sync_ref_model=True,
        ref_model_sync_steps=1,
        ref_model_mixup_alpha=1.0,
        learning_rate=1e-3,
    )
    trainer.train()
    both = zip(trainer.model.parameters(), trainer.ref_model.parameters(), strict=True)
    assert all(torch.equal(policy, reference) for policy, reference in both)


@pytest.mark.parametrize("cell", [("sft", "none"), ("sft", "unlearning"), ("none", "unlearning")])
def test_no_reference_is_loaded_where_none_is_needed(tiny_gpt2, tmp_path, cell):
    positive, negative = cell
    trainer = make_trainer(
        tiny_gpt2,
        make_rows(8),
        tmp_path,
        positive_loss=positive,
        negative_loss=negative,
        max_steps=2,
        eval_dataset=make_rows(4),
        eval_strategy="steps",
        eval_steps=1,
    )
    assert trainer.ref_model is None
    assert trainer.args.precompute_ref_log_probs is False
    trainer.train()
    names = {name for entry in trainer.state.log_history for name in entry}
    assert not [name for name in names if "rewards/" in name or name in ("kl", "eval_kl")]
    assert "eval_logps/rejected" in names


def test_a_liked_row_needs_the_reference_in_every_cell(tiny_gpt2, tmp_path):
    rows = make_rows(4, label=[1.0, 1.0, 0.0, 0.0], sft_mask=[True, False, False, False])
    assert make_trainer(tiny_gpt2, rows, tmp_path, negative_loss="none").ref_model is not None


def test_reward_metrics_without_a_reference_fail_at_the_start(tiny_gpt2, tmp_path):
    with pytest.raises(ValueError, match=r"metric_for_best_model='eval_rewards/margins' needs a reference model"):
        make_trainer(
            tiny_gpt2, make_rows(4), tmp_path, negative_loss="none", metric_for_best_model="eval_rewards/margins"
        )


def test_gradient_checkpointing_changes_nothing(tiny_gpt2, tmp_path):
    ends = []
    for checkpointing in (False, True):
        trainer = make_trainer(
            tiny_gpt2, mixed_rows(8), tmp_path, max_steps=2, gradient_checkpointing=checkpointing, optim="sgd"
        )
        trainer.train()
        ends.append(weights(trainer.model))
    assert torch.allclose(*ends, atol=1e-7)


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_a_micro_batch_of_one_row_and_of_one_class_works(tiny_gpt2, tmp_path, label, caplog):
    rows = make_rows(3, label=[label] * 3)
    trainer = make_trainer(tiny_gpt2, rows, tmp_path, per_device_train_batch_size=1, max_steps=3, learning_rate=1e-3)
    before = weights(trainer.model)
    trainer.train()
    assert not torch.equal(before, weights(trainer.model))
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert ("logps/rejected" in last, "logps/chosen" in last) == (label == 0, label == 1)


def test_compute_metrics_is_given_rewards_and_labels(tiny_gpt2, tmp_path):
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction)
        return {"rows": len(prediction.predictions)}

    trainer = make_trainer(tiny_gpt2, make_rows(6), tmp_path, compute_metrics=compute_metrics)
    assert trainer.evaluate(make_rows(5))["eval_rows"] == 5
    assert seen[0].label_ids.tolist() == [1.0, 0.0, 1.0, 0.0, 1.0]


def test_compute_metrics_with_names_of_the_trainers_own_is_kept_beside_them(tiny_gpt2, tmp_path, caplog):
    own = {"rewards/auc": 7.0, "eval_loss": 8.0, "mine": 9.0}
    trainer = make_trainer(tiny_gpt2, make_rows(6), tmp_path, compute_metrics=lambda prediction: dict(own))
    found = trainer.evaluate(make_rows(6))
    assert found["eval_compute_metrics/rewards/auc"] == 7.0
    assert found["eval_compute_metrics/loss"] == 8.0
    assert found["eval_mine"] == 9.0
    assert found["eval_rewards/auc"] <= 1
    assert "compute_metrics returns rewards/auc, eval_loss, which the trainer logs itself" in caplog.text


def test_length_grouping_reads_the_rows_lengths(tiny_gpt2, tmp_path):
    n = 400
    lengths = [" mat" * (1 + 37 * i % 40) for i in range(n)]
    rows = make_rows(n, completion=lengths, label=[float(i // 40 % 2) for i in range(n)])
    kwargs = {"per_device_train_batch_size": 4, "max_steps": 2}
    trainer = make_trainer(tiny_gpt2, rows, tmp_path, train_sampling_strategy="group_by_length", **kwargs)

    def spread(trainer) -> float:
        lengths = [batch["attention_mask"].sum(1) for batch in trainer.get_train_dataloader()]
        return float(np.mean([(one.max() - one.min()).item() for one in lengths]))

    assert spread(trainer) < spread(make_trainer(tiny_gpt2, rows, tmp_path, **kwargs)) / 4
    labels = [batch["label"].mean().item() for batch in trainer.get_train_dataloader()]
    assert np.mean([0 < label < 1 for label in labels]) > 0.7  # classes stay mixed
    trainer.train()


def test_rows_are_prepared_by_several_processes(tiny_gpt2, tmp_path):
    rows = mixed_rows(30)
    one = make_trainer(tiny_gpt2, rows, tmp_path).train_dataset
    two = make_trainer(tiny_gpt2, rows, tmp_path, dataset_num_proc=2).train_dataset
    assert one.to_dict() == two.to_dict()


def test_the_real_transcripts_train_as_they_are(tiny_gpt2, tmp_path, shared_data, caplog):
    pairs = load_dataset("json", data_files=str(shared_data / "hh_harmless.jsonl.gz"), split="train[:60]")
    assert set(pairs.column_names) == {"chosen", "rejected"}
    trainer = make_trainer(tiny_gpt2, pairs, tmp_path, max_steps=2, max_length=256)
    trainer.train()
    log = next(log for log in trainer.state.log_history if "loss" in log)
    assert {"loss/sft", "loss/preference"} <= log.keys()


def test_an_evaluation_called_train_leaves_the_figures_of_training_alone(tiny_gpt2, tmp_path):
    class Evaluates(TrainerCallback):
        def __init__(self, is_on):
            self.is_on = is_on

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % 2 == 1 and self.is_on:
                trainer.evaluate(rows, metric_key_prefix="train")

    rows, found = make_rows(16), []
    for evaluates in (False, True):
        settings = {"max_steps": 4, "logging_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
        trainer = make_trainer(tiny_gpt2, rows, tmp_path, callbacks=[Evaluates(evaluates)], **settings)
        trainer.train()
        [log] = [log for log in trainer.state.log_history if "loss" in log]
        found.append({name: value for name, value in log.items() if name.startswith(("rewards/", "kl", "loss", "num"))})
    assert found[0] == pytest.approx(found[1])


def test_scores_do_not_depend_on_how_evaluation_gathers_batches(tiny_gpt2, tmp_path):
    rows = make_rows(5)
    found = [
        make_trainer(
            tiny_gpt2, rows, tmp_path, eval_do_concat_batches=concatenates, per_device_eval_batch_size=2
        ).score(rows)["reward"][:]
        for concatenates in (True, False)
    ]
    assert found[0] == found[1]


def test_workers_that_stay_do_not_serve_other_rows(tiny_gpt2, tmp_path):
    """Trainer keeps the data loader of the rows that were evaluated first for all rows without a name."""
    rows, other = make_rows(4), make_rows(4, completion=[" No. Go away."] * 4)
    found = []
    for workers in ({}, {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}):
        trainer = make_trainer(tiny_gpt2, make_rows(4), tmp_path, eval_dataset=rows, **workers)
        figures = [trainer.evaluate(), trainer.evaluate(other), trainer.evaluate({"a": rows, "b": other})]
        trainer.eval_dataset = {"a": other}
        figures += [trainer.evaluate(), trainer.evaluate(rows)]
        found.append([value for each in figures for name, value in each.items() if name.endswith("logps/chosen")])
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]
