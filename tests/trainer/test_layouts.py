"""Packed rows and shared prompts compute what padded rows do, or are refused."""

import copy
import itertools

import numpy as np
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from world import make_rows, make_trainer, several_answers, weights

from trl_ulma.likelihood import parts, scorer
from trl_ulma.likelihood.layouts import shared
from trl_ulma.rows.sampler import PromptSampler

LAYOUTS = {"padding_free": True}, {"share_prompts": True}


def train(model, rows, tmp_path, **kwargs):
    settings = {"optim": "sgd", "learning_rate": 1e-2, "max_grad_norm": 0.0, "num_train_epochs": 1, "beta": 0.5}
    settings |= {"model_init_kwargs": {"dtype": torch.float64}, "train_sampling_strategy": "sequential"}
    settings |= {"per_device_train_batch_size": 6, "eval_dataset": rows, "eval_strategy": "epoch"}
    trainer = make_trainer(model, rows, tmp_path, **settings | kwargs)
    before = weights(trainer.model)
    trainer.train()
    return before, weights(trainer.model), trainer.state.log_history


@pytest.mark.parametrize("precompute", [False, True], ids=["live", "precomputed"])
@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("model", ["tiny_gpt2", "tiny_llama"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: next(iter(layout)))
def test_a_run_is_the_padded_one(request, tmp_path, model, layout, peft, precompute):
    folder = request.getfixturevalue(model)
    rows = several_answers()
    kwargs = {"precompute_ref_log_probs": precompute}
    if peft:
        targets = ["c_attn"] if model == "tiny_gpt2" else ["q_proj", "v_proj"]
        kwargs |= {"peft_config": LoraConfig(r=4, target_modules=targets), "learning_rate": 0.02}
    before, after, log = train(folder, rows, tmp_path, **kwargs)
    before_2, after_2, log_2 = train(folder, rows, tmp_path, **kwargs, **layout)
    assert torch.equal(before, before_2)
    assert (after - before).norm() > 1e-3
    assert (after_2 - after).norm() <= 1e-5 * (after - before).norm()
    for entry, entry_2 in zip(log[:-1], log_2[:-1], strict=True):
        for name in entry.keys() - {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}:
            assert entry[name] == pytest.approx(entry_2[name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("log_z", ["prior", "learned"])
@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("shares", [False, True], ids=["padded", "share_prompts"])
def test_a_run_with_divided_batches_is_that_with_whole_ones(monkeypatch, tiny_llama, tmp_path, shares, peft, log_z):
    rows = several_answers().remove_columns("log_z")
    kwargs = {"share_prompts": shares, "log_z": log_z}
    if peft:
        kwargs |= {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), "learning_rate": 0.02}
    before, after, log = train(tiny_llama, rows, tmp_path, **kwargs)
    monkeypatch.setattr(parts, "_TOKENS", 0)
    monkeypatch.setattr(parts, "_PARAMETERS", 0)
    divided = []
    divide = parts.parts
    monkeypatch.setattr(scorer, "parts", lambda *args: divided.append(divide(*args)) or divided[-1])
    _, after_2, log_2 = train(tiny_llama, rows, tmp_path, **kwargs)
    assert max(map(len, divided)) > 2
    assert (after - before).norm() > 1e-3
    assert (after_2 - after).norm() <= 1e-6 * (after - before).norm()
    for entry, entry_2 in zip(log[:-1], log_2[:-1], strict=True):
        for name in entry.keys() - {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}:
            assert entry[name] == pytest.approx(entry_2[name], rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("bf16", [False, True])
def test_the_startup_proof_divides_its_batches_where_this_is_exact(monkeypatch, tiny_llama, tmp_path, bf16):
    divided = []
    divide = parts.parts
    monkeypatch.setattr(scorer, "parts", lambda *args: divided.append(divide(*args)) or divided[-1])
    train(tiny_llama, several_answers(), tmp_path, bf16=bf16, use_cpu=True, model_init_kwargs={"dtype": "float32"})
    assert divided
    assert (max(map(len, divided)) > 1) != bf16


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: next(iter(layout)))
def test_eager_and_sdpa_attention_are_exact(tiny_llama, tmp_path, layout, attention):
    init = {"attn_implementation": attention, "dtype": torch.float32}
    rows = several_answers()
    wanted = make_trainer(tiny_llama, rows, tmp_path, model_init_kwargs=init).evaluate(rows)
    found = make_trainer(tiny_llama, rows, tmp_path, model_init_kwargs=init, **layout).evaluate(rows)
    assert found["eval_loss"] == pytest.approx(wanted["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: next(iter(layout)))
def test_half_precision_passes_the_probe(tiny_llama, tmp_path, layout):
    rows = several_answers()
    wanted = make_trainer(tiny_llama, rows, tmp_path, bf16=True, use_cpu=True).evaluate(rows)
    found = make_trainer(tiny_llama, rows, tmp_path, bf16=True, use_cpu=True, **layout).evaluate(rows)
    assert found["eval_loss"] == pytest.approx(wanted["eval_loss"], rel=1e-2)


def make_bloom(tokenizer):
    torch.manual_seed(0)
    return BloomForCausalLM(
        BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=2, initializer_range=0.2)
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: next(iter(layout)))
def test_an_alibi_model_is_refused(tiny_gpt2, tmp_path, layout):
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    make_bloom(tokenizer).save_pretrained(tmp_path / "bloom")
    tokenizer.save_pretrained(tmp_path / "bloom")
    trainer = make_trainer(str(tmp_path / "bloom"), several_answers(), tmp_path, max_steps=1, **layout)
    name = next(iter(layout))
    with pytest.raises(ValueError, match=f"{name}=True is not (exact with|supported by) this model.*Set {name}=False"):
        trainer.train()


def test_sliding_windows_fall_back_and_say_so(tiny_llama, tmp_path, capsys):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        sliding_window=8,
    )
    torch.manual_seed(0)
    MistralForCausalLM(config).save_pretrained(tmp_path / "mistral")
    tokenizer.save_pretrained(tmp_path / "mistral")
    trainer = make_trainer(str(tmp_path / "mistral"), several_answers(), tmp_path, max_steps=1, share_prompts=True)
    trainer.train()
    assert trainer._scorer.layout == "padded"


def test_tables_by_the_place_in_the_sequence_fall_back(tiny_llama, tmp_path, caplog):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    config = GPTNeoConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global", "local"], 1]],
        window_size=8,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    model, rows = GPTNeoForCausalLM(config), several_answers()
    found = []
    for layout in ({}, *LAYOUTS):
        trainer = make_trainer(
            copy.deepcopy(model), rows, tmp_path, processing_class=tokenizer, learning_rate=1e-12, max_steps=1, **layout
        )
        trainer.train()
        assert trainer._scorer.layout == "padded"
        found.append(trainer.predict(rows).predictions)
    assert caplog.text.count("a gpt_neo model has tables by the place in the sequence") == 2
    assert np.allclose(found[0], found[1:], atol=1e-5)


@pytest.mark.parametrize("empty", [[0], [0, 1, 2], [3]])
def test_a_first_prompt_that_is_empty_shares_nothing(tiny_llama, tmp_path, empty):
    prompts = ["" if i in empty else "Why is it?" for i in range(6)]
    rows = make_rows(6, prompt=prompts)
    trained = []
    for layout in ({}, {"share_prompts": True}):
        settings = {"max_steps": 1, "per_device_train_batch_size": 6, "learning_rate": 1e-2}
        trainer = make_trainer(tiny_llama, rows, tmp_path, **settings, **layout)
        trainer.train()
        trained.append(trainer.state.log_history[0]["loss"])
    assert trained[0] == pytest.approx(trained[1], rel=1e-5)


def test_adapters_with_virtual_tokens_are_padded(tiny_gpt2, tmp_path):
    peft = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)
    rows = several_answers()
    torch.manual_seed(0)  # of the virtual tokens
    trainer = make_trainer(tiny_gpt2, rows, tmp_path, max_steps=2, peft_config=peft, learning_rate=0.1)
    before = trainer.evaluate(rows)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(rows)["eval_loss"] != before
    torch.manual_seed(0)
    shared_trainer = make_trainer(tiny_gpt2, rows, tmp_path, peft_config=peft, share_prompts=True)
    assert shared_trainer.evaluate(rows)["eval_loss"] == pytest.approx(before, rel=1e-6)


def test_both_layouts_at_once_contradict(tiny_gpt2, tmp_path):
    with pytest.raises(ValueError, match="padding_free and share_prompts exclude each other"):
        make_trainer(tiny_gpt2, make_rows(4), tmp_path, padding_free=True, share_prompts=True)


def test_a_shared_prompt_is_there_once():
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, 3, 0], [5, 4, 2, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]),
        "completion_mask": torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 1, 0], [0, 0, 1, 0, 0]]),
    }
    layout = shared(batch)
    assert layout.inputs["input_ids"].tolist() == [[5, 6, 7, 8, 7], [5, 4, 0, 0, 0]]
    assert layout.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 2], [0, 1, 0, 0, 0]]
    assert layout.positions.tolist() == [2, 3, 4, 6]
    sees = layout.inputs["attention_mask"][0, 0].int().tolist()
    assert sees == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]]


def test_prompts_keep_together_and_micro_batches_are_of_both_classes(tiny_gpt2, tmp_path):
    prompts = [i // 3 for i in range(120)]  # of three answers each
    good = [i // 3 % 4 == 0 for i in range(120)]  # a quarter of the prompts has good answers only
    sampler = PromptSampler(prompts, good, seed=0)
    orders = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        order = list(sampler)
        orders.append(order)
        assert sorted(order) == list(range(120))
        assert len(list(itertools.groupby(prompts[row] for row in order))) == 40
        batches = np.array([good[row] for row in order]).reshape(-1, 12)
        assert ((batches.sum(1) > 0) & (batches.sum(1) < 12)).all()
    assert orders[0] != orders[1]
    assert orders[1] == list(sampler)


def test_an_order_by_length_depends_on_the_seed_and_the_epoch_alone(tiny_gpt2, tmp_path):
    rows = several_answers(prompts=16, answers=1)
    settings = {"train_sampling_strategy": "group_by_length", "per_device_train_batch_size": 2}
    trainer = make_trainer(tiny_gpt2, rows, tmp_path, **settings)
    orders = []
    for epoch, drawn in ((0, 0), (1, 1), (0, 2), (1, 3)):
        torch.manual_seed(drawn)  # as another process, or one that has resumed
        sampler = trainer._get_train_sampler()
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[:2] == orders[2:]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == list(range(16))


def test_the_trainer_samples_by_prompt(tiny_gpt2, tmp_path):
    rows = several_answers(prompts=5, answers=4).shuffle(seed=0)
    trainer = make_trainer(tiny_gpt2, rows, tmp_path, share_prompts=True, per_device_train_batch_size=4)
    for batch in trainer.get_train_dataloader():
        lengths = batch["completion_mask"].argmax(1).tolist()
        assert len({tuple(ids[:n]) for ids, n in zip(batch["input_ids"].tolist(), lengths, strict=True)}) == 1
    resumed = make_trainer(tiny_gpt2, rows, tmp_path, share_prompts=True, per_device_train_batch_size=4)
    first = [batch["row"].tolist() for batch in trainer.get_train_dataloader()]
    assert first == [batch["row"].tolist() for batch in resumed.get_train_dataloader()]


def test_the_head_scores_completion_tokens_only(tiny_gpt2, tmp_path):
    rows = make_rows(4)
    trainer = make_trainer(tiny_gpt2, rows, tmp_path, per_device_eval_batch_size=4)
    trainer.evaluate(rows)
    seen, head = [], trainer.model.get_output_embeddings()
    forward = head.forward

    def spy(hidden):
        seen.append(hidden.shape)
        return forward(hidden)

    head.forward = spy
    trainer.evaluate(rows)
    tokens = sum(len(ids) for ids in trainer.train_dataset["completion_ids"])
    assert [shape[-2] for shape in seen] == [tokens]
    assert head.forward is spy


@pytest.mark.parametrize("layout", LAYOUTS, ids=["packed", "shared"])
def test_an_adapter_that_goes_by_the_place_in_the_sequence_is_found_before_it_has_an_effect(
    tiny_llama, tmp_path, layout
):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_llama), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    matrices = [module for name, module in model.named_modules() if name.endswith("lora_B.default")]
    for module in matrices:
        module.register_forward_hook(lambda module, given, output: output * torch.arange(output.size(-2))[:, None])
    settings = {"max_steps": 1, "processing_class": AutoTokenizer.from_pretrained(tiny_llama)}
    make_trainer(model, several_answers(), tmp_path, learning_rate=0.0, **settings).train()
    with pytest.raises(ValueError, match=r"=True is not exact with this model"):
        make_trainer(model, several_answers(), tmp_path, **settings, **layout).train()
    assert matrices
    assert not any(module.weight.any() for module in matrices)  # which are zeros again
