"""What would fail in the first step, or never, is an error before training that names it and says what to do."""

import copy
import re
from typing import Any

import accelerate
import pytest
import torch
from datasets import Dataset
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from tiny import CHAT_TEMPLATE, make_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    LlamaForSequenceClassification,
    RwkvConfig,
    RwkvForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
    default_data_collator,
)
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling as TRLDataCollatorForLanguageModeling
from world import has_own_adapters, make_rows, make_trainer, mixed_rows, weights

from trl_ulma import (
    DataCollatorForPointwisePreference,
    PointwiseDPOConfig,
    PointwiseDPOTrainer,
    ULMAConfig,
    ULMATrainer,
)

STEPS = {"max_steps": 2, "per_device_train_batch_size": 4}


def load(folder: str):
    return AutoModelForCausalLM.from_pretrained(folder)


# Nothing to train

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
IA3 = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
CELLS = {
    "ulma": {},
    "sft": {"positive_loss": "sft", "negative_loss": "none"},
    "sft-with-checkpointing": {"positive_loss": "sft", "negative_loss": "none", "gradient_checkpointing": True},
    "precomputed": {"precompute_ref_log_probs": True},
}


@pytest.mark.parametrize("settings", CELLS.values(), ids=CELLS)
@pytest.mark.parametrize("config", [LORA, IA3], ids=["lora", "ia3"])
def test_an_adapter_that_was_loaded_for_inference(tiny_llama, tmp_path, config, settings):
    get_peft_model(load(tiny_llama), copy.deepcopy(config)).save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(load(tiny_llama), tmp_path / "adapter")
    with pytest.raises(ValueError, match="is_trainable=True"):
        make_trainer(model, make_rows(6), tmp_path / "out", **STEPS | settings).train()
    assert not list((tmp_path / "out").glob("checkpoint-*"))


@pytest.mark.parametrize("given", [False, True], ids=["own-reference", "given-reference"])
def test_a_model_whose_weights_are_all_frozen(tiny_llama, tmp_path, given):
    model = load(tiny_llama).requires_grad_(False)
    reference = {"ref_model": load(tiny_llama)} if given else {}
    with pytest.raises(ValueError, match="no trainable parameter"):
        make_trainer(model, make_rows(6), tmp_path, **STEPS, **reference).train()


def test_one_trainable_parameter_is_enough(tiny_llama, tmp_path):
    model = load(tiny_llama).requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    trainer = make_trainer(model, make_rows(6), tmp_path, learning_rate=0.1, **STEPS)
    before = weights(trainer.model)
    assert len(before) == model.config.hidden_size
    trainer.train()
    assert (weights(trainer.model) - before).abs().max() > 0


def test_weights_that_are_frozen_after_the_trainer_was_made(tiny_llama, tmp_path):
    trainer = make_trainer(load(tiny_llama), make_rows(6), tmp_path, gradient_checkpointing=True, **STEPS)
    trainer.model.enable_input_require_grads()
    trainer.model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        trainer.train()


def test_weights_that_are_unfrozen_after_the_trainer_was_made(tiny_llama, tmp_path):
    trainer = make_trainer(tiny_llama, make_rows(6), tmp_path, peft_config=copy.deepcopy(LORA), **STEPS)
    trainer.model.requires_grad_(True)
    with pytest.raises(ValueError, match="outside the adapter"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("peft", [False, True], ids=["another-models", "below-a-new-adapter"])
def test_an_optimizer_of_other_parameters(tiny_llama, tmp_path, peft):
    model = load(tiny_llama)
    optimizer = torch.optim.SGD((model if peft else load(tiny_llama)).parameters(), 0.1)
    with pytest.raises(ValueError, match=r"(?s)optimizer .* none of the model's trainable parameters"):
        make_trainer(
            model,
            make_rows(6),
            tmp_path,
            optimizers=(optimizer, None),
            peft_config=copy.deepcopy(LORA) if peft else None,
            **STEPS,
        )


def test_an_optimizer_of_a_part_of_the_parameters(tiny_llama, tmp_path):
    model = load(tiny_llama)
    optimizer = torch.optim.SGD(model.model.norm.parameters(), 0.1)
    trainer = make_trainer(model, make_rows(6), tmp_path, optimizers=(optimizer, None), **STEPS)
    before = weights(model.model.norm)
    trainer.train()
    assert (weights(model.model.norm) - before).abs().max() > 0


@pytest.mark.parametrize("when", ["in-a-callback", "between-trainings"])
@pytest.mark.parametrize("kind", ["whole", "lora"])
def test_weights_that_are_unfrozen_after_the_optimizer_was_created(tiny_llama, tmp_path, kind, when):
    model = load(tiny_llama).requires_grad_(False)
    model.lm_head.requires_grad_(True)
    callbacks = [Does(lambda model: model.requires_grad_(True))] if when == "in-a-callback" else []
    adapter = {"peft_config": copy.deepcopy(LORA), "precompute_ref_log_probs": True} if kind == "lora" else {}
    trainer = make_trainer(model, make_rows(8), tmp_path, callbacks=callbacks, **adapter, **STEPS)
    if not callbacks:
        trainer.train()
        trainer.model.requires_grad_(True)
    embeddings = trainer.model.get_input_embeddings().weight
    before = embeddings.detach().clone()
    with pytest.raises(ValueError, match=r"became trainable after the optimizer .*embed_tokens.* and \d+ others"):
        trainer.train()
    if not callbacks:
        trainer.optimizer = None
        trainer.train()
        assert not torch.equal(embeddings, before)


# Tokens without an embedding


def with_new_token(folder: str):
    """The tokenizer with a token that the model has no embedding for."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|new|>"])
    assert len(tokenizer) == load(folder).get_input_embeddings().num_embeddings + 1
    return tokenizer


def rows_with(column: str, text: str = " <|new|> again") -> Dataset:
    rows = make_rows(6)
    return Dataset.from_list([{**row, column: row[column] + text} if i == 4 else row for i, row in enumerate(rows)])


NO_EMBEDDING = r"(?s)(?=.*384)(?=.*resize_token_embeddings)"


@pytest.mark.parametrize("column", ["prompt", "completion"])
@pytest.mark.parametrize("in_memory", [False, True], ids=["folder", "in-memory"])
def test_a_token_that_the_model_has_no_embedding_for(tiny_gpt2, tmp_path, in_memory, column):
    model = load(tiny_gpt2) if in_memory else tiny_gpt2
    tokenizer = with_new_token(tiny_gpt2)
    with pytest.raises(ValueError, match=NO_EMBEDDING):
        make_trainer(model, rows_with(column), tmp_path, processing_class=tokenizer, **STEPS).train()


@pytest.mark.parametrize("in_memory", [False, True], ids=["folder", "in-memory"])
def test_a_dry_run_finds_it_too(tiny_gpt2, in_memory):
    model = load(tiny_gpt2) if in_memory else tiny_gpt2
    args = ULMAConfig("out", bf16=False, report_to="none")
    with pytest.raises(ValueError, match=NO_EMBEDDING):
        ULMATrainer.dry_run(
            model, args, train_dataset=rows_with("completion"), processing_class=with_new_token(tiny_gpt2)
        )


def test_in_the_evaluated_rows(tiny_gpt2, tmp_path):
    tokenizer = with_new_token(tiny_gpt2)
    settings = STEPS | {"processing_class": tokenizer}
    with pytest.raises(ValueError, match=NO_EMBEDDING):
        make_trainer(
            tiny_gpt2, make_rows(6), tmp_path, eval_dataset=rows_with("completion"), eval_strategy="epoch", **settings
        ).train()
    trainer = make_trainer(tiny_gpt2, make_rows(6), tmp_path, **settings)
    for ask in (trainer.evaluate, trainer.predict, trainer.score):
        with pytest.raises(ValueError, match=NO_EMBEDDING):
            ask(rows_with("prompt"))


def test_a_padding_token_without_an_embedding(tiny_gpt2, tmp_path):
    """Padding is read by the model, too."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    tokenizer.add_special_tokens({"pad_token": "<|padding|>"})
    with pytest.raises(ValueError, match=NO_EMBEDDING):
        make_trainer(tiny_gpt2, make_rows(6), tmp_path, processing_class=tokenizer, **STEPS).train()


def test_a_new_token_that_no_row_has_is_no_fault(tiny_gpt2, tmp_path):
    trainer = make_trainer(tiny_gpt2, make_rows(6), tmp_path, processing_class=with_new_token(tiny_gpt2), **STEPS)
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_new_token_with_an_embedding_is_no_fault(tiny_gpt2, tmp_path):
    tokenizer = with_new_token(tiny_gpt2)
    model = load(tiny_gpt2)
    model.resize_token_embeddings(len(tokenizer))
    trainer = make_trainer(model, rows_with("completion"), tmp_path, processing_class=tokenizer, **STEPS)
    trainer.train()
    assert trainer.state.global_step == 2


def test_in_prepared_rows(tiny_gpt2, tmp_path):
    rows = [{"prompt_ids": [5, 6], "completion_ids": [7, 400 + i], "label": float(i % 2)} for i in range(4)]
    with pytest.raises(ValueError):
        make_trainer(tiny_gpt2, Dataset.from_list(rows), tmp_path, **STEPS).train()


def test_a_negative_id_in_prepared_rows(tiny_gpt2, tmp_path):
    rows = make_trainer(tiny_gpt2, make_rows(4), tmp_path, **STEPS).train_dataset.to_list()
    rows[2]["completion_ids"][0] = -100
    with pytest.raises(ValueError, match="Row 2 of the train dataset has the token id -100, which is no token"):
        make_trainer(tiny_gpt2, Dataset.from_list(rows), tmp_path, **STEPS)


def test_in_a_stream(tiny_gpt2, tmp_path):
    """Its rows are seen one by one: the row is named when it comes, and no IndexError."""
    rows = rows_with("completion").to_iterable_dataset()
    with pytest.raises(ValueError, match=NO_EMBEDDING):
        make_trainer(tiny_gpt2, rows, tmp_path, processing_class=with_new_token(tiny_gpt2), **STEPS).train()


# Models that are none, or that cannot read the rows


@pytest.mark.parametrize(
    "other",
    [
        lambda model: model.model,
        lambda model: LlamaForSequenceClassification(model.config),
        lambda model: T5ForConditionalGeneration(
            T5Config(vocab_size=384, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=2, decoder_start_token_id=0)
        ),
        torch.nn.DataParallel,
    ],
    ids=["backbone", "classifier", "encoder-decoder", "wrapped"],
)
def test_what_is_no_causal_language_model(tiny_llama, tmp_path, other):
    model = other(load(tiny_llama))
    processing = AutoTokenizer.from_pretrained(tiny_llama)
    with pytest.raises(TypeError, match=rf"model is a {type(model).__name__}, which is not a causal language model"):
        make_trainer(model, make_rows(6), tmp_path, processing_class=processing, **STEPS)


@pytest.mark.parametrize("kind", ["backbone", "classifier", "encoder-decoder"])
def test_the_folder_of_what_is_no_causal_language_model(tiny_llama, tmp_path, kind):
    sizes = {"vocab_size": 384, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 2}
    model = {
        "backbone": lambda: load(tiny_llama).model,
        "classifier": lambda: LlamaForSequenceClassification(load(tiny_llama).config),
        "encoder-decoder": lambda: T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)),
    }[kind]()
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "model")
    with pytest.raises(TypeError, match=rf"model is a {type(model).__name__}, which is not a causal language model"):
        make_trainer(str(tmp_path / "model"), make_rows(6), tmp_path, **STEPS)
    with pytest.raises(TypeError, match=rf"ref_model is a {type(model).__name__}, which is not a causal"):
        make_trainer(tiny_llama, make_rows(6), tmp_path, ref_model=model, **STEPS)


def test_a_compiled_model_is_refused_because_its_weights_get_other_names(tiny_llama, tmp_path):
    compiled = torch.compile(load(tiny_llama))
    with pytest.raises(ValueError, match=r"model is compiled .*set torch_compile=True"):
        make_trainer(compiled, make_rows(6), tmp_path, processing_class=AutoTokenizer.from_pretrained(tiny_llama))


def test_a_model_with_the_layers_of_an_adapter_is_refused_unless_they_are_taken_out(tiny_llama, tmp_path):
    model, tokenizer = load(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)
    adapted = get_peft_model(model, LORA)
    with pytest.raises(ValueError, match=r"layers of an adapter \(model\.layers\.0\.self_attn\.q_proj\).*unload\(\)"):
        make_trainer(model, make_rows(6), tmp_path, processing_class=tokenizer, **STEPS)
    model = adapted.unload().requires_grad_(True)
    make_trainer(model, make_rows(6), tmp_path, processing_class=tokenizer, **STEPS).train()


@pytest.mark.parametrize("rescale_every", [1, 0])
def test_weights_that_an_evaluation_would_change(tiny_llama, tmp_path, rescale_every):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "context_length": 128}
    torch.manual_seed(0)
    model = RwkvForCausalLM(RwkvConfig(**sizes, rescale_every=rescale_every))
    before = weights(model)
    settings = STEPS | {"processing_class": tokenizer, "learning_rate": 1e-30}
    if rescale_every:
        with pytest.raises(ValueError, match=r"rescale_every=1 changes its weights .*Load it with rescale_every=0"):
            make_trainer(model, make_rows(6), tmp_path, **settings)
        return
    trainer = make_trainer(model, make_rows(6), tmp_path, **settings)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.allclose(weights(saved), before, rtol=0, atol=1e-20)


@pytest.mark.parametrize(
    ("rows", "settings", "repeats"), [(9, {}, 1), (10, {}, 0), (9, {"dataloader_drop_last": True}, 0)]
)
def test_rows_that_count_twice_are_told(tiny_llama, tmp_path, caplog, rows, settings, repeats):
    settings = {"train_sampling_strategy": "batch_rebalance", "gradient_accumulation_steps": 2, **settings}
    try:
        trainer = make_trainer(
            tiny_llama, make_rows(rows), tmp_path, per_device_train_batch_size=2, num_train_epochs=1, **settings
        )
    except ValueError as problem:
        pytest.skip(f"this version of transformers has no such sampler: {problem}")
    seen: list[int] = []
    step = trainer.training_step

    def counted(model, inputs, *args, **kwargs):
        seen.extend(inputs["row"].tolist())
        return step(model, inputs, *args, **kwargs)

    trainer.training_step = counted
    trainer.train()
    assert len(seen) - len(set(seen)) == repeats
    assert ("adds 1 row of earlier steps, counted twice" in caplog.text) == bool(repeats)


def smaller(folder: str, **sizes):
    config = load(folder).config
    for name, value in sizes.items():
        setattr(config, name, value)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [({"vocab_size": 300}, r"embeddings? for ids below 300"), ({"n_positions": 8}, "8 positions")],
    ids=["vocabulary", "positions"],
)
def test_a_reference_that_cannot_read_the_rows(tiny_gpt2, tmp_path, sizes, message):
    reference = smaller(tiny_gpt2, **sizes)
    with pytest.raises(ValueError, match=message):
        make_trainer(tiny_gpt2, make_rows(6), tmp_path, ref_model=reference, **STEPS)


def test_a_reference_with_fewer_embeddings_that_reads_the_rows(tiny_gpt2, tmp_path):
    tokenizer = with_new_token(tiny_gpt2)
    model = load(tiny_gpt2)
    model.resize_token_embeddings(len(tokenizer))
    settings = {"ref_model": load(tiny_gpt2), "processing_class": tokenizer}
    trainer = make_trainer(model, make_rows(6), tmp_path, **settings, **STEPS)
    trainer.train()
    assert trainer.state.global_step == 2


def test_the_name_of_a_reference(tiny_gpt2, tmp_path):
    with pytest.raises(TypeError, match=r"(?s)ref_model must be a model; got str.*from_pretrained"):
        make_trainer(tiny_gpt2, make_rows(6), tmp_path, ref_model=tiny_gpt2, **STEPS)


def test_the_folder_of_an_adapter(tiny_llama, tmp_path):
    adapter = str(tmp_path / "adapter")
    get_peft_model(load(tiny_llama), copy.deepcopy(LORA)).save_pretrained(adapter)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(adapter)
    with pytest.raises(ValueError, match=r"(?s)folder of an adapter.*is_trainable=True"):
        make_trainer(adapter, make_rows(6), tmp_path / "out", **STEPS)


# Rows that another trainer has prepared


def test_rows_prepared_under_other_label_rules(tiny_gpt2, tmp_path):
    rows = make_rows(6, label=[2.0, -1.0] * 3, sft_mask=[False] * 6)
    prepared = make_trainer(tiny_gpt2, rows, tmp_path, label_type="continuous", **STEPS).train_dataset
    with pytest.raises(ValueError, match=r"(?i)label|prepared"):
        make_trainer(tiny_gpt2, prepared, tmp_path, **STEPS).train()
    with pytest.raises(ValueError, match=r"(?i)label|prepared"):
        make_trainer(tiny_gpt2, make_rows(6), tmp_path, eval_dataset=prepared, **STEPS).evaluate()


@pytest.mark.parametrize(
    ("columns", "settings"),
    [
        ({"label": [float("nan")] * 6}, {}),
        ({"label": [1.5, 0.0] * 3}, {}),
        ({"weight": [-1.0] * 6}, {}),
        ({"weight": [float("inf")] * 6}, {}),
        ({"log_z": [float("nan")] * 6}, {}),
        ({"label_type": ["stars"] * 6}, {}),
        ({}, {"log_z": "column"}),
        ({"label_type": ["continuous"] * 6}, {"positive_loss": "none", "negative_loss": "unlearning"}),
    ],
    ids=["label-nan", "label-above-1", "weight-negative", "weight-infinite", "log_z-nan", "label_type", "no-log_z",
         "unlearned-ratings"],
)  # fmt: skip
def test_prepared_rows_are_checked_as_raw_ones(tiny_gpt2, tmp_path, columns, settings):
    rows = make_trainer(tiny_gpt2, make_rows(6), tmp_path, **STEPS).train_dataset
    changed = Dataset.from_dict({**rows.to_dict(), **columns})
    with pytest.raises(ValueError):
        make_trainer(tiny_gpt2, changed, tmp_path, **STEPS | settings).train()


# Changes of row 3 of 6 prepared rows, and the messages
BY_HAND = {
    "empty": ({"completion_ids": []}, r"completion_ids is empty"),
    "no-completion": ({"completion_ids": None}, r"completion_ids is None"),
    "no-prompt": ({"prompt_ids": None}, r"prompt_ids is None"),
    "too-large": ({"completion_ids": [5, 400, 401]}, r"id 400, but the model only has embeddings for ids below 384"),
    "negative": ({"prompt_ids": [5, -100]}, r"has the token id -100, which is no token"),
    "mask-too-short": ({"completion_mask": [1]}, r"completion_mask has 1 values, but completion_ids has \d+"),
    "mask-too-long": ({"completion_mask": [1] * 99}, r"completion_mask has 99 values, but completion_ids has \d+"),
    "mask-of-zeros": ({"completion_ids": [5, 6], "completion_mask": [0, 0]}, r"completion_mask has only zeros"),
    "no-mask": ({"completion_ids": [5, 6], "completion_mask": [1, 2]}, r"completion_mask has values other than 0 and"),
    "no-label": ({"label": None}, r"label is None"),
    "label-nan": ({"label": float("nan")}, r"label is nan"),
    "label-beyond": ({"label": 3.0}, r"label is 3"),
}


def prepared_rows(folder: str, out, n: int = 6) -> list[dict]:
    rows = make_trainer(folder, make_rows(n), out, **STEPS).train_dataset.to_list()
    return [{**row, "completion_mask": None} for row in rows]


@pytest.mark.parametrize("stream", [False, True], ids=["table", "stream"])
@pytest.mark.parametrize("fault", BY_HAND)
def test_a_prepared_row_that_was_changed_by_hand(tiny_gpt2, tmp_path, fault, stream):
    change, message = BY_HAND[fault]
    rows = prepared_rows(tiny_gpt2, tmp_path)
    rows[3] |= change
    changed = Dataset.from_list(rows)
    with pytest.raises(ValueError, match=rf"Row 3 of the train dataset.*{message}"):
        make_trainer(tiny_gpt2, changed.to_iterable_dataset() if stream else changed, tmp_path, **STEPS)


def test_all_prepared_rows_that_were_changed_are_listed_at_once_or_dropped(tiny_gpt2, tmp_path):
    rows = prepared_rows(tiny_gpt2, tmp_path, 2 * len(BY_HAND))
    for i, (change, _) in enumerate(BY_HAND.values()):
        rows[2 * i] |= change
    with pytest.raises(ValueError, match=f"{len(BY_HAND)} of {len(rows)} rows of the train dataset are inv") as error:
        make_trainer(tiny_gpt2, Dataset.from_list(rows), tmp_path, **STEPS)
    for i, (_, message) in enumerate(BY_HAND.values()):
        assert re.search(rf"Row {2 * i} of the train dataset.*{message}", str(error.value))
    trainer = make_trainer(tiny_gpt2, Dataset.from_list(rows), tmp_path, invalid_rows="drop", **STEPS)
    assert trainer.train_dataset["row"][:] == list(range(1, len(rows), 2))
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("stream", [False, True], ids=["table", "stream"])
@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("completion_ids", ["5", "6"], r"column completion_ids .*lists of whole numbers; it holds list<.*string"),
        ("completion_ids", [5.0, 6.0], r"column completion_ids .*it holds list<.*double"),
        ("prompt_ids", "5 6", r"column prompt_ids .*it holds string"),
        ("label", "good", r"label is the text 'good'"),
        ("sft_mask", "yes", r"sft_mask"),
    ],
    ids=["text", "floats", "string", "label", "sft_mask"],
)
def test_a_prepared_column_of_another_kind(tiny_gpt2, tmp_path, column, value, message, stream):
    rows = Dataset.from_list([{**row, column: value} for row in prepared_rows(tiny_gpt2, tmp_path)])
    with pytest.raises(ValueError, match=message) as error:
        make_trainer(tiny_gpt2, rows.to_iterable_dataset() if stream else rows, tmp_path, **STEPS)
    if column in ("label", "sft_mask"):
        # A table is known to have no other rows
        listed = range(6 if stream else 1)
        assert all(f"Row {i} of the train dataset" in str(error.value) for i in listed)
        assert ("All 6 rows of the train dataset are invalid for the same reason" in str(error.value)) != stream


def test_prepared_rows_that_lack_columns_or_have_others(tiny_gpt2, tmp_path):
    rows = Dataset.from_list(prepared_rows(tiny_gpt2, tmp_path))
    for changed, message in [
        (rows.remove_columns("label"), r"are prepared .*lack the columns label\."),
        (rows.remove_columns(["label", "length"]), r"lack the columns label, length"),
        (rows.add_column("source", ["x"] * 6), r"have other columns, too: source"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_trainer(tiny_gpt2, changed, tmp_path, **STEPS)


def test_the_length_of_changed_prepared_rows_is_that_of_their_ids(tiny_gpt2, tmp_path):
    """Rows are grouped and truncated by it."""
    rows = prepared_rows(tiny_gpt2, tmp_path)
    rows[3]["completion_ids"] = [5] * 40
    trainer = make_trainer(tiny_gpt2, Dataset.from_list(rows), tmp_path, **STEPS)
    lengths = [len(row["prompt_ids"]) + len(row["completion_ids"]) for row in trainer.train_dataset]
    assert trainer.train_dataset["length"][:] == lengths
    assert max(lengths) > 40
    short = make_trainer(tiny_gpt2, Dataset.from_list(rows), tmp_path, max_length=16, **STEPS)
    assert max(short.train_dataset["length"][:]) <= 16


def test_rows_prepared_with_unlearning_in_mind(tiny_gpt2, tmp_path):
    """Prepared for one method, trained with another: as from raw rows, or refused."""
    raw = mixed_rows(6).remove_columns("log_z")
    prepared = make_trainer(tiny_gpt2, raw, tmp_path, **STEPS).train_dataset
    with pytest.raises(ValueError):
        make_trainer(tiny_gpt2, prepared, tmp_path, positive_loss="none", negative_loss="unlearning", **STEPS).train()


def chats(answers: int = 1) -> Dataset:
    """The rows as conversations; with two answers, there is a user's turn in between."""
    more = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": " No."}]
    columns = {
        "prompt": [[{"role": "user", "content": row["prompt"]}] for row in make_rows(6)],
        "completion": [
            [{"role": "assistant", "content": row["completion"]}, *more[: 2 * answers - 2]] for row in make_rows(6)
        ],
    }
    return make_rows(6, **columns)


def other_tokenizer(change: str):
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    if change == "vocabulary":
        tokenizer.add_tokens(["<|new|>"])
    elif change == "EOS token":
        tokenizer.eos_token = "<|system|>"
    else:
        tokenizer.chat_template = CHAT_TEMPLATE.replace("<|end|>", "!<|end|>")
    return tokenizer


@pytest.mark.parametrize(
    ("rows", "settings", "changed"),
    [
        (make_rows(6), lambda: {"processing_class": other_tokenizer("vocabulary")}, "vocabulary"),
        (make_rows(6), lambda: {"processing_class": other_tokenizer("EOS token")}, "EOS token"),
        (chats(), lambda: {"processing_class": other_tokenizer("chat template")}, "chat template"),
        (chats(), lambda: {"system_message": "Be kind."}, "system_message"),
        (chats(answers=2), lambda: {"assistant_only_loss": False}, "assistant_only_loss"),
    ],
    ids=["vocabulary", "eos", "template", "system", "turns"],
)
def test_rows_prepared_with_other_tokens(tiny_llama, tmp_path, rows, settings, changed):
    prepared = make_trainer(tiny_llama, rows, tmp_path, **STEPS).train_dataset
    prepared.save_to_disk(tmp_path / "prepared")
    for again in (prepared, Dataset.load_from_disk(tmp_path / "prepared")):
        with pytest.raises(ValueError, match=rf"prepared with another {changed}.*Pass the raw rows"):
            make_trainer(tiny_llama, again, tmp_path, **STEPS, **settings())
        assert len(make_trainer(tiny_llama, again, tmp_path, **STEPS).train_dataset) == len(prepared)


def test_what_the_tokens_of_prepared_text_do_not_depend_on(tiny_llama, tmp_path):
    prepared = make_trainer(tiny_llama, make_rows(6), tmp_path, **STEPS).train_dataset
    other = {"processing_class": other_tokenizer("chat template"), "assistant_only_loss": False}
    assert len(make_trainer(tiny_llama, prepared, tmp_path, **STEPS, **other).train_dataset) == len(prepared)


# Arguments


@pytest.mark.parametrize("trainer", [ULMATrainer, PointwiseDPOTrainer])
def test_no_rows_to_train_on(tiny_gpt2, trainer):
    with pytest.raises((TypeError, ValueError), match=r"train_dataset is None. Pass rows"):
        trainer(model=tiny_gpt2)


def collators(tokenizer):
    """Name → a collator that makes other batches than these trainers need."""
    return {
        "DataCollatorForPreference": DataCollatorForPreference(pad_token_id=0),
        "TRL's DataCollatorForLanguageModeling": TRLDataCollatorForLanguageModeling(pad_token_id=0),
        "DataCollatorForLanguageModeling": DataCollatorForLanguageModeling(tokenizer, mlm=False),
        "DataCollatorForSeq2Seq": DataCollatorForSeq2Seq(tokenizer),
        "DataCollatorWithPadding": DataCollatorWithPadding(tokenizer),
        "default_data_collator": default_data_collator,
    }


@pytest.mark.parametrize("name", collators(None))
def test_a_collator_of_another_trainer_is_refused_by_name(tiny_gpt2, tmp_path, name):
    collator = collators(AutoTokenizer.from_pretrained(tiny_gpt2))[name]
    wanted = rf"(?s)(?=.*{name.split()[-1]})(?=.*DataCollatorForPointwisePreference)"
    with pytest.raises((TypeError, ValueError), match=wanted):
        make_trainer(tiny_gpt2, make_rows(6), tmp_path, data_collator=collator, **STEPS).train()


def test_a_collator_of_ones_own_is_taken(tiny_gpt2, tmp_path):
    class Mine(DataCollatorForPointwisePreference):
        """Does what its base does."""

    def plain(examples):
        return Mine(pad_token_id=0)(examples)

    for collator in (Mine(pad_token_id=0), plain):
        trainer = make_trainer(tiny_gpt2, make_rows(6), tmp_path, data_collator=collator, **STEPS)
        trainer.train()
        assert trainer.state.global_step == 2


USES = {
    "folder": {},
    "loading": {"model_init_kwargs": {"dtype": "float32"}},
    "precomputed": {"precompute_ref_log_probs": True},
    "sft": {"positive_loss": "sft", "negative_loss": "none"},
    "packed": {"padding_free": True},
    "shared": {"share_prompts": True},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "ratings": {"label_type": "continuous", "label_transform": "standardize"},
    "learned": {"log_z": "learned_constant"},
    "stream": {},
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("trains", [False, True], ids=["constructed", "trained"])
def test_the_callers_config_stays_as_it_was(tiny_gpt2, tmp_path, use, trains):
    quiet = {"bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "label_report": False}
    args = ULMAConfig(str(tmp_path), **{"gradient_checkpointing": False} | quiet | STEPS | USES[use])
    before, held = copy.deepcopy(args.to_dict()), copy.deepcopy(args.model_init_kwargs)
    rows: Any = make_rows(8, sft_mask=[i % 4 == 0 for i in range(8)])
    rows = rows.to_iterable_dataset() if use == "stream" else rows
    found = []
    for _ in range(2):
        trainer = ULMATrainer(model=tiny_gpt2, args=args, train_dataset=rows)
        assert args.to_dict() == before
        assert args.model_init_kwargs == held
        if trains:
            trainer.train()
            found.append(weights(trainer.model))
            assert args.to_dict() == before
    assert not trains or (found[0] == found[1]).all()


@pytest.mark.parametrize("config", [ULMAConfig, PointwiseDPOConfig])
@pytest.mark.parametrize("value", ["kto", ["kto"]])
def test_ktos_loss_is_given_the_line_that_replaces_it(config, value):
    with pytest.raises(ValueError, match=r"Set preset='kto'") as error:
        config("out", bf16=False, report_to="none", loss_type=value)
    assert not re.search(r"pair-?wise losses", str(error.value)), "KTO's loss is none of pairs"


# Parallelism

ParallelismConfig = getattr(accelerate.utils, "ParallelismConfig", None)
of_parallelism = pytest.mark.skipif(
    ParallelismConfig is None, reason=f"accelerate {accelerate.__version__} has no ParallelismConfig; 1.10 has"
)


@of_parallelism
@pytest.mark.parametrize("size", ["tp_size", "cp_size", "sp_size"])
def test_parallelism_within_a_row_is_refused_by_name(tiny_llama, tmp_path, size):
    parallel = ParallelismConfig(**{size: 2})
    with pytest.raises(ValueError, match=size):
        make_trainer(tiny_llama, make_rows(6), tmp_path, parallelism_config=parallel, **STEPS)


@of_parallelism
@pytest.mark.parametrize("size", ["TP_SIZE", "CP_SIZE", "SP_SIZE"])
def test_parallelism_that_the_launcher_sets_is_refused_too(tiny_llama, tmp_path, monkeypatch, size):
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{size}", "2")
    with pytest.raises(ValueError, match=size.lower()):
        make_trainer(tiny_llama, make_rows(6), tmp_path, **STEPS)


@of_parallelism
def test_parallelism_of_data_is_no_fault(tiny_llama, tmp_path):
    trainer = make_trainer(tiny_llama, make_rows(6), tmp_path, parallelism_config=ParallelismConfig(), **STEPS)
    trainer.train()
    assert trainer.state.global_step == 2


# An adapter that takes no part


@pytest.mark.parametrize("settings", CELLS.values(), ids=CELLS)
@pytest.mark.parametrize("how", ["merged", "switched-off"])
def test_an_adapter_that_takes_no_part_is_refused_or_trained(tiny_llama, tmp_path, how, settings):
    """With gradient checkpointing, PEFT has inputs require gradients, so that a backward pass does not fail."""
    model = get_peft_model(load(tiny_llama), copy.deepcopy(LORA))
    if how == "merged":
        model.merge_adapter()
    else:
        model.base_model.disable_adapter_layers()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora" in name)
    before = weights(model)
    trainer = make_trainer(model, make_rows(6), tmp_path, learning_rate=0.1, **STEPS | settings)
    if settings.get("positive_loss") == "sft":
        with pytest.raises(ValueError, match=r"do not depend on any trainable parameter.*unmerge_adapter"):
            trainer.train()
        assert torch.equal(weights(model), before)
        return
    try:
        trainer.train()  # PEFT switches adapters on again once the reference has run
    except ValueError as error:
        assert "do not depend on any trainable parameter" in str(error)  # noqa: PT017
    else:
        assert not torch.equal(weights(model), before)


class Does(TrainerCallback):
    """Does something to the model before the second step."""

    def __init__(self, what):
        self.what = what

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            self.what(model)


def with_two_adapters(folder: str, kind: str) -> Any:
    model = load(folder)
    if kind == "transformers":
        model.add_adapter(LORA, "default")
        model.add_adapter(LoraConfig(target_modules=["o_proj"], init_lora_weights=False), "other")
    else:
        model = get_peft_model(model, LORA)
        model.add_adapter("other", LoraConfig(target_modules=["o_proj"], init_lora_weights=False))
    model.set_adapter("default")
    return model


@pytest.mark.parametrize("kind", ["peft", pytest.param("transformers", marks=has_own_adapters)])
def test_another_adapter_that_is_made_active(tiny_llama, tmp_path, kind):
    wanted = r"computes with the adapter other instead of default.*model\.set_adapter\('default'\)"
    callback = Does(lambda model: model.set_adapter("other"))
    model = with_two_adapters(tiny_llama, kind)
    trainer = make_trainer(model, make_rows(6), tmp_path, callbacks=[callback], startup_checks=False, **STEPS)
    with pytest.raises(ValueError, match=wanted):
        trainer.train()
    assert trainer.state.global_step == 1
    for call in (trainer.train, lambda: trainer.evaluate(make_rows(2)), lambda: trainer.score(make_rows(2))):
        with pytest.raises(ValueError, match=wanted):
            call()
    model.set_adapter("default")
    trainer.evaluate(make_rows(2))


@pytest.mark.parametrize("how", ["merged", "switched-off"])
def test_an_adapter_that_a_callback_takes_out_of_the_model(tiny_llama, tmp_path, how):
    take_out = {
        "merged": lambda model: model.merge_adapter(),
        "switched-off": lambda model: model.base_model.disable_adapter_layers(),
    }[how]
    callback = Does(take_out)
    trainer = make_trainer(tiny_llama, make_rows(6), tmp_path, callbacks=[callback], peft_config=LORA, **STEPS)
    with pytest.raises(ValueError, match="switched off or merged into the model in the middle of a training"):
        trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_weights_that_a_callback_freezes(tiny_llama, tmp_path, checkpointing):
    callback = Does(lambda model: model.requires_grad_(False))
    settings = STEPS | {"gradient_checkpointing": checkpointing}
    trainer = make_trainer(tiny_llama, make_rows(6), tmp_path, callbacks=[callback], peft_config=LORA, **settings)
    with pytest.raises(ValueError, match="no trainable parameters any more"):
        trainer.train()
    assert trainer.state.global_step == 1


def test_a_forward_without_gradients(tiny_llama, tmp_path):
    model = load(tiny_llama)
    model.lm_head.requires_grad_(False)
    model.model.forward = torch.no_grad()(model.model.forward)
    with pytest.raises(ValueError, match="do not depend on any trainable parameter"):
        make_trainer(model, make_rows(6), tmp_path, ref_model=load(tiny_llama), **STEPS).train()


# What is changed after the trainer was made


@pytest.mark.parametrize(
    "changed",
    [
        {"log_z": 0.7},
        {"label_type": "continuous", "max_length": 8},
        {"padding_free": True},
        {"negative_loss": "none"},
        {"precompute_ref_log_probs": True},
        {"sync_ref_model": True},
        {"neftune_noise_alpha": 5.0},
        {"per_device_train_batch_size": 2},
    ],
    ids=lambda changed: "-".join(changed),
)
def test_settings_that_are_changed_too_late(tiny_gpt2, tmp_path, changed):
    trainer = make_trainer(tiny_gpt2, make_rows(6), tmp_path, **STEPS)
    for name, value in changed.items():
        setattr(trainer.args, name, value)
    wanted = "(?s)" + "".join(f"(?=.*{name} from )" for name in changed) + ".*another trainer"
    for call in (trainer.train, lambda: trainer.evaluate(make_rows(2)), lambda: trainer.predict(make_rows(2))):
        with pytest.raises(ValueError, match=wanted):
            call()


def test_settings_that_may_be_changed(tiny_gpt2, tmp_path):
    args = {"learning_rate": 1e-2, "beta": 0.5, "num_train_epochs": 1, "max_steps": -1}
    made = make_trainer(tiny_gpt2, make_rows(6), tmp_path / "made", per_device_train_batch_size=4, **args)
    changed = make_trainer(tiny_gpt2, make_rows(6), tmp_path / "changed", per_device_train_batch_size=4)
    for name, value in args.items():
        setattr(changed.args, name, value)
    made.train()
    changed.train()
    assert torch.equal(weights(changed.model), weights(made.model))


@pytest.mark.parametrize(
    "changed", [{"gradient_accumulation_steps": 2}, {"learning_rate": 1.0}, {"max_steps": 9}], ids=str
)
def test_settings_that_a_callback_changes_after_they_were_read(tiny_gpt2, tmp_path, changed):
    class Changes(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            vars(args).update(changed)

    trainer = make_trainer(tiny_gpt2, make_rows(8), tmp_path, callbacks=[Changes()], **STEPS)
    with pytest.raises(ValueError, match=f"in the middle of a training.*{next(iter(changed))} from "):
        trainer.train()
    assert trainer.state.global_step == 1


def test_the_next_training_has_the_settings_of_its_optimizer(tiny_gpt2, tmp_path):
    """Trainer keeps the optimizer, with the learning rate that it was created with."""

    def first_rate(trainer):
        trainer.train()
        return next(log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log)

    settings = STEPS | {"learning_rate": 1e-3}
    trainer = make_trainer(tiny_gpt2, make_rows(8), tmp_path, **settings)
    assert first_rate(trainer) == first_rate(trainer) == 1e-3
    trainer.args.learning_rate, trainer.args.weight_decay, trainer.args.num_train_epochs = 1e-4, 0.5, 2
    with pytest.raises(
        ValueError, match=r"learning_rate from 0\.001 to 0\.0001; weight_decay .*trainer\.optimizer = None"
    ):
        trainer.train()
    trainer.optimizer = None
    assert first_rate(trainer) == 1e-4


def of_other_weights() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=7.0)


@pytest.mark.parametrize("how", ["set", "create_optimizer"])
def test_an_optimizer_of_other_weights_that_is_not_passed(tiny_gpt2, tmp_path, how, monkeypatch):
    trainer = make_trainer(tiny_gpt2, make_rows(6), tmp_path, **STEPS)
    if how == "set":
        trainer.optimizer = of_other_weights()
    else:
        monkeypatch.setattr(trainer, "create_optimizer", lambda *_: setattr(trainer, "optimizer", of_other_weights()))
    with pytest.raises(ValueError, match=r"optimizer has none of the model's trainable parameters, .*get_peft_model"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_schedule_of_another_optimizer_that_is_not_passed(tiny_gpt2, tmp_path):
    trainer = make_trainer(tiny_gpt2, make_rows(6), tmp_path, **STEPS)
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(of_other_weights(), lambda step: 1.0)
    with pytest.raises(ValueError, match="sets the learning rates of another optimizer"):
        trainer.train()


def test_a_schedule_of_an_optimizer_that_wraps_another(tiny_gpt2, tmp_path):
    class Lookahead(torch.optim.Optimizer):
        def __init__(self, optimizer):
            super().__init__(optimizer.param_groups, {})
            self.optimizer = optimizer

        def step(self, closure=None):
            return self.optimizer.step(closure)

    model = load(tiny_gpt2)
    optimizer = Lookahead(torch.optim.SGD(model.parameters(), lr=0.1))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    settings = STEPS | {"processing_class": AutoTokenizer.from_pretrained(tiny_gpt2)}
    trainer = make_trainer(model, make_rows(6), tmp_path, optimizers=(optimizer, schedule), **settings)
    assert trainer.train().global_step > 0


@pytest.mark.parametrize("what", ["optimizer", "lr_scheduler"])
def test_a_callback_that_replaces_the_optimizer_or_its_schedule(tiny_gpt2, tmp_path, what):
    trainer = make_trainer(tiny_gpt2, make_rows(12), tmp_path, **STEPS | {"max_steps": 3})

    class Replaces(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
            setattr(trainer, what, {"optimizer": optimizer, "lr_scheduler": schedule}[what])

    trainer.add_callback(Replaces())
    with pytest.raises(ValueError, match=rf"trainer\.{what} was replaced .*optimizers=\(optimizer, scheduler\)"):
        trainer.train()
    assert trainer.state.global_step == 1


def test_raw_rows_in_the_place_of_the_training_set(tiny_gpt2, tmp_path):
    trainer = make_trainer(tiny_gpt2, make_rows(6), tmp_path, **STEPS)
    trainer.train_dataset = make_rows(8)
    with pytest.raises(ValueError, match=r"trainer\.train_dataset was replaced .*another trainer"):
        trainer.train()


@pytest.mark.parametrize("settings", [{}, {"log_z": "prior"}, {"label_type": "continuous"}], ids=str)
def test_a_part_of_the_training_set_in_its_place(tiny_gpt2, tmp_path, settings):
    rows = make_rows(8, label=[0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    settings = {"pointwise": True, **STEPS, **settings}
    part = make_trainer(tiny_gpt2, rows, tmp_path / "part", **settings)
    part.train_dataset = part.train_dataset.select(range(5))
    made = make_trainer(tiny_gpt2, rows.select(range(5)), tmp_path / "made", **settings)
    for trainer in (part, made):
        trainer.train()
        trainer.save_model()
    assert torch.equal(weights(part.model), weights(made.model))
    for file in ("label_report.json", "pointwise.json"):
        assert (tmp_path / "part" / file).read_text() == (tmp_path / "made" / file).read_text()


@pytest.mark.parametrize("kind", ["one", "dict", "none-before"])
@pytest.mark.parametrize("precompute", [False, True])
def test_raw_rows_in_the_place_of_the_evaluation_set(tiny_gpt2, tmp_path, kind, precompute):
    first = None if kind == "none-before" else {"a": make_rows(2)} if kind == "dict" else make_rows(2)
    settings = {"eval_dataset": first, "precompute_ref_log_probs": precompute, **STEPS}
    trainer = make_trainer(tiny_gpt2, make_rows(6), tmp_path, **settings)
    rows = make_rows(4)
    wanted = trainer.evaluate(rows)["eval_loss"]
    trainer.eval_dataset = {"a": rows} if kind == "dict" else rows
    assert trainer.evaluate()["eval_a_loss" if kind == "dict" else "eval_loss"] == wanted
    assert trainer.evaluate(rows)["eval_loss"] == wanted


@pytest.mark.parametrize("kind", ["one", "dict"])
def test_rows_of_another_trainer_in_the_place_of_the_evaluation_set(tiny_gpt2, tmp_path, kind):
    """They have the log-probabilities of the other trainer's reference."""
    rows, moved = make_rows(6), load(tiny_gpt2)
    with torch.no_grad():
        moved.get_input_embeddings().weight.mul_(1.5)
    settings = {"eval_dataset": {"a": rows} if kind == "dict" else rows, "precompute_ref_log_probs": True}
    settings["pointwise"] = True
    other = make_trainer(moved, rows, tmp_path / "other", **settings, **STEPS)
    trainer = make_trainer(tiny_gpt2, rows, tmp_path, **settings, **STEPS)
    wanted = trainer.evaluate()
    trainer.eval_dataset = other.eval_dataset
    found = trainer.evaluate()
    losses = [name for name in wanted if name.endswith("_loss")]
    assert [found[name] for name in losses] == [wanted[name] for name in losses]
    own = trainer.train_dataset["ref_logps"][:]
    trainer.train_dataset = other.train_dataset
    trainer.train()
    assert trainer.train_dataset["ref_logps"][:] == own


def backwards(row):
    return {"completion_ids": row["completion_ids"][::-1]}


OTHER_ROWS = {
    "more": lambda rows, more: more,
    "changed": lambda rows, more: rows.map(lambda row: backwards(row) if row["row"] == 5 else {}),
    "relabeled": lambda rows, more: rows.map(lambda row: {"label": 1 - row["label"]} if row["row"] == 5 else {}),
    "demonstrations": lambda rows, more: rows.map(lambda row: {"sft_mask": row["row"] == 5 or row["sft_mask"]}),
    "weighted": lambda rows, more: rows.add_column("weight", [0.5] * 6),
    "stream": lambda rows, more: rows.to_iterable_dataset(),
}
FOUND = {"more": r"2 of 8, such as row 6", "weighted": r"6 of 6, such as row 0", "stream": "of a stream"}


@pytest.mark.parametrize("others", OTHER_ROWS)
@pytest.mark.parametrize("precompute", [False, True])
def test_rows_that_the_trainer_has_not_read_in_the_place_of_the_training_set(tiny_gpt2, tmp_path, precompute, others):
    settings = {"precompute_ref_log_probs": precompute, **STEPS}
    rows = make_rows(8, label=[1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0], sft_mask=[True] + 7 * [False])
    more = make_trainer(tiny_gpt2, rows, tmp_path, **settings).train_dataset
    trainer = make_trainer(tiny_gpt2, rows.select(range(6)), tmp_path, **settings)
    trainer.train_dataset = OTHER_ROWS[others](trainer.train_dataset, more)
    which = FOUND.get(others, r"1 of 6, such as row 5")
    with pytest.raises(ValueError, match=rf"trainer\.train_dataset was replaced by rows .*{which}.*another trainer"):
        trainer.train()


def test_changed_rows_to_evaluate_are_not_compared_with_what_they_were(tiny_gpt2, tmp_path):
    settings = {"eval_dataset": make_rows(4), "pointwise": True, "precompute_ref_log_probs": True, **STEPS}
    trainer = make_trainer(tiny_gpt2, make_rows(6), tmp_path, **settings)
    trainer.eval_dataset = trainer.eval_dataset.map(backwards)
    # The model as it is before training is its reference
    assert trainer.evaluate()["eval_loss"] == pytest.approx(0.693147, abs=1e-4)
    trainer.train()
    trainer.eval_dataset = trainer.eval_dataset.map(lambda row: {"completion_ids": row["completion_ids"][:-1]})
    with pytest.raises(ValueError, match="the reference no longer exists after training has begun"):
        trainer.evaluate()


@pytest.mark.parametrize("settings", [{"precompute_ref_log_probs": True}, {"log_z": "group"}], ids=str)
def test_a_part_of_the_trainers_own_rows_is_evaluated_after_training(tiny_gpt2, tmp_path, settings):
    rows = make_rows(8, prompt=["Hi"] * 4 + ["Why?"] * 4)
    trainer = make_trainer(tiny_gpt2, rows, tmp_path, pointwise=True, eval_dataset=rows, **settings, **STEPS)
    trainer.train()
    part = trainer.eval_dataset.select(range(4, 8))
    own = trainer.evaluate(part)["eval_loss"]
    whole = trainer.evaluate(trainer.eval_dataset)["eval_loss"]
    other = trainer.evaluate(trainer.eval_dataset.select(range(4)))["eval_loss"]
    assert own + other == pytest.approx(2 * whole, abs=1e-5)
    trainer.eval_dataset = part
    assert trainer.evaluate()["eval_loss"] == own
    trainer.train_dataset = trainer.train_dataset.select(range(4, 8))
    trainer.train()


def test_a_reference_in_the_place_of_the_first(tiny_gpt2, tmp_path):
    trainer = make_trainer(load(tiny_gpt2), make_rows(6), tmp_path, **STEPS)
    trainer.ref_model = load(tiny_gpt2)
    with pytest.raises(ValueError, match=r"trainer\.ref_model was replaced .*another trainer"):
        trainer.train()


@pytest.mark.parametrize("is_adapted", [False, True])
def test_a_model_in_the_place_of_the_first(tiny_llama, tmp_path, is_adapted):
    """Trainer would step the new model's weights, with gradients of the first one's."""
    trainer = make_trainer(load(tiny_llama), make_rows(6), tmp_path, **STEPS)
    trainer.model = get_peft_model(trainer.model, copy.deepcopy(LORA)) if is_adapted else load(tiny_llama)
    with pytest.raises(ValueError, match=r"trainer\.model was replaced .*another trainer.*peft_config"):
        trainer.train()


def test_a_tokenizer_in_the_place_of_the_first(tiny_gpt2, tmp_path):
    trainer = make_trainer(tiny_gpt2, make_rows(6), tmp_path, **STEPS)
    trainer.processing_class = AutoTokenizer.from_pretrained(tiny_gpt2)
    for call in (trainer.train, lambda: trainer.evaluate(make_rows(2))):
        with pytest.raises(ValueError, match=r"trainer\.processing_class was replaced .*another trainer"):
            call()


class WithoutWeight(DataCollatorForPointwisePreference):
    def torch_call(self, examples):
        return {name: value for name, value in super().torch_call(examples).items() if name != "weight"}


def test_a_collator_in_the_place_of_the_first(tiny_gpt2, tmp_path):
    rows = make_rows(6, weight=[0.5] * 6)
    trainer = make_trainer(tiny_gpt2, rows, tmp_path, **STEPS)
    trainer.data_collator = WithoutWeight(pad_token_id=0)
    with pytest.raises(ValueError, match="data_collator is WithoutWeight, whose batches lack weight"):
        trainer.train()
    trainer.data_collator = DataCollatorForPointwisePreference(pad_token_id=0)
    trainer.train()
    precomputed = make_trainer(tiny_gpt2, rows, tmp_path, precompute_ref_log_probs=True, **STEPS)
    precomputed.data_collator = DataCollatorForPointwisePreference(pad_token_id=0)
    with pytest.raises(ValueError, match=r"trainer\.data_collator was replaced after .*precomputed"):
        precomputed.train()


class SetsBeta(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.beta = 0.1 * (state.global_step + 1)


def test_beta_may_be_changed_while_training(tiny_gpt2, tmp_path):
    """DPOTrainer reads its attribute `beta` in each step."""
    settings = STEPS | {"per_device_train_batch_size": 6, "learning_rate": 0.01}
    trainer = make_trainer(tiny_gpt2, make_rows(6), tmp_path, pointwise=True, **settings)
    callback = SetsBeta()
    callback.trainer = trainer
    trainer.add_callback(callback)
    trainer.train()
    logged = [log for log in trainer.state.log_history if "kl" in log and "loss" in log][-1]
    rewards = (logged["rewards/chosen"] + logged["rewards/rejected"]) / 2
    assert trainer.beta == trainer.args.beta == 0.2
    assert rewards == pytest.approx(0.2 * logged["kl"], abs=1e-5)


# Nothing is left


def test_the_last_batch_of_a_stream_cannot_be_dropped(tiny_gpt2, tmp_path):
    stream = make_rows(5).to_iterable_dataset()
    trainer = make_trainer(tiny_gpt2, stream, tmp_path, dataloader_drop_last=True, **STEPS)
    with pytest.raises(ValueError, match="dataloader_drop_last=True has no effect on a stream"):
        trainer.train()


def test_the_column_of_lengths_is_the_trainers(tmp_path):
    with pytest.raises(ValueError, match=r"length_column_name='tokens' is not used.*Leave it at 'length'"):
        PointwiseDPOConfig(str(tmp_path), bf16=False, length_column_name="tokens")


def test_a_last_batch_that_is_dropped_and_was_the_only_one(tiny_gpt2, tmp_path):
    settings = {"dataloader_drop_last": True, "per_device_train_batch_size": 8}
    trainer = make_trainer(tiny_gpt2, make_rows(3), tmp_path, **settings)
    with pytest.raises(ValueError, match="dataloader_drop_last=True leaves no rows of the train dataset: it has 3"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_no_row_of_an_evaluation_is_dropped(tiny_gpt2, tmp_path):
    rows = make_rows(11)
    settings = {"dataloader_drop_last": True, "per_device_eval_batch_size": 8}
    trainer = make_trainer(tiny_gpt2, rows, tmp_path, eval_dataset={"a": rows, "b": make_rows(3)}, **settings)
    found = trainer.evaluate()
    assert len(trainer.evaluated) == 3
    assert len(trainer.predict(rows).predictions) == len(trainer.score(rows)) == 11
    assert trainer.args.dataloader_drop_last
    trainer.args.dataloader_drop_last = False
    assert trainer.evaluate()["eval_a_loss"] == pytest.approx(found["eval_a_loss"])


def test_smoothed_labels_of_another_loss():
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0\.1 .*soften the labels in the data"):
        ULMAConfig("out", label_smoothing_factor=0.1)


@pytest.mark.parametrize(("tokens", "is_told"), [("zzzq", True), ("?", False), (None, False)])
def test_it_is_told_if_no_gradient_reaches_a_trained_weight(tiny_llama, tmp_path, caplog, tokens, is_told):
    """An adapter that waits for tokens which no row has trains nothing, at a loss that looks as always."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    waits = {} if tokens is None else {"alora_invocation_tokens": tokenizer(tokens)["input_ids"]}
    adapter = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], **waits)
    trainer = make_trainer(tiny_llama, make_rows(12), tmp_path, peft_config=adapter, max_steps=5)
    before = weights(trainer.model)
    trainer.train()
    assert torch.equal(weights(trainer.model), before) == is_told
    told = [message for message in caplog.messages if "No gradient has reached" in message]
    assert len(told) == is_told
    assert not is_told or "alora_invocation_tokens" in told[0]


def test_steps_without_rows_to_learn_from_may_come_first(tiny_gpt2, tmp_path, caplog):
    """Dislikes alone, at which nothing is learned, and a like in the third step."""
    rows = make_rows(8, label=[0.0] * 5 + [1.0] * 3)
    settings = {"positive_loss": "sft", "negative_loss": "none", "train_sampling_strategy": "sequential"}
    trainer = make_trainer(tiny_gpt2, rows, tmp_path, per_device_train_batch_size=2, max_steps=4, **settings)
    before = weights(trainer.model)
    trainer.train()
    assert not torch.equal(weights(trainer.model), before)
    assert not [message for message in caplog.messages if "No gradient has reached" in message]


@pytest.mark.parametrize("is_trained", [False, True])
def test_a_deep_copy_of_a_trainer_trains_by_itself(tiny_gpt2, tmp_path, is_trained):
    rows = make_rows(8, label=[1.0, 1.0, 1.0, 0.0] * 2)
    first = make_trainer(tiny_gpt2, rows, tmp_path, pointwise=True, log_z="learned_constant", max_steps=1)
    if is_trained:
        first.train()
    log_z, before = first.log_partition.weights.clone(), weights(first.model)
    copied = copy.deepcopy(first)
    copied.train()
    assert torch.equal(first.log_partition.weights, log_z)
    assert not torch.equal(copied.log_partition.weights, log_z)
    assert torch.equal(weights(first.model), before)
    assert not torch.equal(weights(copied.model), before)


@pytest.mark.parametrize("model", [None, 3])
def test_what_is_no_model(tmp_path, model):
    with pytest.raises(TypeError, match=f"model must be a causal language model.*got {type(model).__name__}"):
        make_trainer(model, make_rows(4), tmp_path)


def test_a_schedule_of_another_optimizer(tiny_llama, tmp_path):
    model = load(tiny_llama)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    for own in (None, torch.optim.SGD(model.parameters(), lr=1.0)):
        with pytest.raises(ValueError, match="rates would be logged and not used"):
            make_trainer(model, make_rows(4), tmp_path, optimizers=(own, schedule))
    trainer = make_trainer(model, make_rows(4), tmp_path, optimizers=(optimizer, schedule), max_steps=1)
    before = weights(model)
    trainer.train()
    assert torch.equal(before, weights(model))
