"""A cached value is used only if everything that it depends on is unchanged."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, CohereConfig, Gemma2Config
from world import make_rows, make_trainer

from trl_ulma import DataCollatorForPointwisePreference
from trl_ulma.labels import LabelRules
from trl_ulma.rows.preparation import Preparation

STILL = {"max_steps": 1, "learning_rate": 1e-12, "per_device_train_batch_size": 8, "beta": 1.0, "pointwise": True}


@pytest.fixture
def stored_rows(tmp_path) -> Dataset:
    """Rows in a file, whose derived datasets are cached from one trainer to the next."""
    make_rows(8).to_json(tmp_path / "rows.jsonl")
    rows = Dataset.from_json(str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "cache"))
    assert rows.cache_files
    return rows


def ref_logps(model, rows, out, **settings) -> list[float]:
    """Precomputed reference log-probabilities of the rows."""
    trainer = make_trainer(model, rows, out, precompute_ref_log_probs=True, **STILL | settings)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.693147, abs=1e-4), "the reference is a stale one"
    return trainer.train_dataset["ref_logps"][:]


def changed(folder: str, target: Path, **settings) -> str:
    """A checkpoint with the same weights and another configuration."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder).save_pretrained(target)
    model.save_pretrained(target)
    config = json.loads((target / "config.json").read_text())
    for name, value in settings.items():
        if isinstance(value, dict):
            config[name] = {**(config.get(name) or {}), **value}
        else:
            config[name] = value
    (target / "config.json").write_text(json.dumps(config))
    return str(target)


def small(folder: str, target: Path, config_class, **settings) -> str:
    """A checkpoint of another architecture with the tokenizer of `folder`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": len(tokenizer), "initializer_range": 0.2}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**sizes, **special, **settings))
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return str(target)


# What changes a model's numbers, and none of its weights
CHANGES = {
    "eps": {"rms_norm_eps": 0.5},
    "rotary": {"rope_parameters": {"rope_theta": 10.0, "rope_type": "default"}},
    "activation": {"hidden_act": "relu"},
}


@pytest.mark.parametrize("in_memory", [False, True], ids=["folder", "in-memory"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_another_configuration_with_the_same_weights(tiny_llama, tmp_path, stored_rows, change, in_memory):
    other = changed(tiny_llama, tmp_path / "other", **change)
    models = [AutoModelForCausalLM.from_pretrained(folder) if in_memory else folder for folder in (tiny_llama, other)]
    found = [ref_logps(model, stored_rows, tmp_path, max_length=256) for model in models]
    assert found[0] != pytest.approx(found[1], abs=1e-2)


@pytest.mark.parametrize(
    ("config", "setting", "values"),
    [(CohereConfig, "logit_scale", (0.1, 2.0)), (Gemma2Config, "final_logit_softcapping", (1.0, 30.0))],
    ids=["scale", "softcap"],
)
def test_another_scale_of_the_logits_with_the_same_weights(tiny_gpt2, tmp_path, stored_rows, config, setting, values):
    found = []
    for value in values:
        folder = small(tiny_gpt2, tmp_path / f"{setting}-{value}", config, **{setting: value})
        found.append(ref_logps(folder, stored_rows, tmp_path))
    assert found[0] != pytest.approx(found[1], abs=1e-2)


def test_another_scale_of_an_adapter_with_the_same_weights(tiny_llama, tmp_path, stored_rows):
    found = []
    for alpha in (4, 64):
        torch.manual_seed(0)
        config = LoraConfig(
            r=4, lora_alpha=alpha, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
        )
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), config)
        found.append(ref_logps(model, stored_rows, tmp_path))
    assert found[0] != pytest.approx(found[1], abs=1e-2)


def test_another_given_reference_with_the_same_weights(tiny_llama, tmp_path, stored_rows):
    other = changed(tiny_llama, tmp_path / "other", rms_norm_eps=0.5)
    found = []
    for folder in (tiny_llama, other):
        trainer = make_trainer(
            tiny_llama,
            stored_rows,
            tmp_path,
            ref_model=AutoModelForCausalLM.from_pretrained(folder),
            precompute_ref_log_probs=True,
            **STILL,
        )
        found.append(trainer.train_dataset["ref_logps"][:])
    assert found[0] != pytest.approx(found[1], abs=1e-2)


def test_another_attention_of_long_rows_with_the_same_weights(tiny_llama, tmp_path, stored_rows):
    """What other code changes in memory is not in the config, and the rows that identify a reference are short."""
    found = []
    for scale in (1.0, 2.0):
        model = AutoModelForCausalLM.from_pretrained(tiny_llama)

        def scaled(_, inputs, scale=scale):
            far = torch.arange(inputs[0].size(1)) >= 8
            return (inputs[0] * torch.where(far, scale, 1.0)[:, None],)

        model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(scaled)
        found.append(ref_logps(model, stored_rows, tmp_path))
    assert found[0] != pytest.approx(found[1], abs=1e-2)


class WithoutTheEnd(DataCollatorForPointwisePreference):
    """Leaves out the last token of each row."""

    def torch_call(self, examples):
        return super().torch_call([{**row, "completion_ids": row["completion_ids"][:-1]} for row in examples])


@pytest.mark.parametrize("kind", ["class", "function"])
def test_another_collator(tiny_llama, tmp_path, stored_rows, kind):
    """A collator can shorten rows: the reference is that of the rows as they are trained on."""
    short = WithoutTheEnd(pad_token_id=0)
    found = [ref_logps(tiny_llama, stored_rows, tmp_path)]
    collator = short if kind == "class" else lambda examples: short(examples)
    found.append(ref_logps(tiny_llama, stored_rows, tmp_path, data_collator=collator))
    assert found[0] != pytest.approx(found[1], abs=1e-2)


def test_what_a_killed_process_wrote_half_is_removed(tiny_llama, tmp_path, stored_rows):
    folder = Path(stored_rows.cache_files[0]["filename"]).parent
    old, new = folder / "cache-1.2.half.npy", folder / "cache-1.3.half.npy"
    for file in (old, new):
        file.touch()
    day_before = old.stat().st_mtime - 86_400
    os.utime(old, (day_before, day_before))
    ref_logps(tiny_llama, stored_rows, tmp_path)
    assert list(folder.glob("*.half.npy")) == [new]  # another process may be writing it


def test_the_same_once_more_is_read_from_the_cache(tiny_llama, tmp_path, stored_rows):
    """Another learning rate is no other reference."""
    forwards, found = [], []
    for rate in (1e-3, 1e-4):
        model = AutoModelForCausalLM.from_pretrained(tiny_llama)
        count: list[int] = []
        model.model.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        settings = STILL | {"learning_rate": rate, "precompute_ref_log_probs": True, "precompute_ref_batch_size": 1}
        trainer = make_trainer(model, stored_rows, tmp_path, **settings)
        found.append(trainer.train_dataset["ref_logps"][:])
        forwards.append(len(count))
    assert found[0] == found[1]
    assert forwards[1] <= forwards[0] - len(stored_rows)


# Tokens


def test_rows_are_tokenized_once_whatever_becomes_of_invalid_ones(tiny_llama, tmp_path):
    good = {"prompt": "Why?", "completion": " So.", "label": 1.0}
    lines = [json.dumps(good | {"label": label}) for label in (1.0, 0.0, 7.0)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    rows = Dataset.from_json(str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "cache"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    with pytest.raises(ValueError, match="label is 7"):
        Preparation(tokenizer, LabelRules())(rows, "train")
    folder = Path(rows.cache_files[0]["filename"]).parent
    tokenized = set(folder.iterdir())
    assert Preparation(tokenizer, LabelRules(), invalid_rows="drop")(rows, "train")["label"][:] == [1.0, 0.0]
    assert set(folder.iterdir()) == tokenized


TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer_with(folder: str, **changes):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.bos_token = "<|system|>"
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def shouting(folder: str):
    """A tokenizer that reads everything in lower case: the same vocabulary, another normalizer."""
    from tokenizers import normalizers

    tokenizer = tokenizer_with(folder)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


TOKENIZERS = {
    "bos": lambda folder: tokenizer_with(folder, bos_token="<|user|>"),
    "eos": lambda folder: tokenizer_with(folder, eos_token="<|user|>"),
    "template": lambda folder: tokenizer_with(folder, chat_template=TEMPLATE.replace("<|assistant|>", "<|user|>")),
    "normalizer": shouting,
}


def test_other_code_prepares_anew(tiny_llama, tmp_path, monkeypatch):
    make_rows(6).to_json(tmp_path / "rows.jsonl")

    def files() -> set[str]:
        rows = Dataset.from_json(str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "cache"))
        prepared = make_trainer(tiny_llama, rows, tmp_path, **STILL).train_dataset
        return {file["filename"] for file in prepared.cache_files}

    first = files()
    assert files() == first
    monkeypatch.setattr("trl_ulma.rows.identity.code_hash", lambda: "other")
    assert not files() & first


@pytest.mark.parametrize("change", TOKENIZERS)
def test_another_tokenizer_gives_its_own_tokens(tiny_llama, tmp_path, change):
    texts = make_rows(6)
    chats = Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": text}] for text in texts["prompt"]],
            "completion": [[{"role": "assistant", "content": text.strip()}] for text in texts["completion"]],
            "label": texts["label"][:],
        }
    )
    chats.to_json(tmp_path / "chats.jsonl")

    def ids(tokenizer, cache):
        rows = Dataset.from_json(str(tmp_path / "chats.jsonl"), cache_dir=str(tmp_path / cache))
        prepared = make_trainer(tiny_llama, rows, tmp_path, processing_class=tokenizer, **STILL).train_dataset
        return prepared["prompt_ids"][:], prepared["completion_ids"][:]

    first = ids(tokenizer_with(tiny_llama), "cache")
    second = ids(TOKENIZERS[change](tiny_llama), "cache")
    wanted = ids(TOKENIZERS[change](tiny_llama), "another-cache")
    assert wanted != first
    assert second == wanted


def test_two_runs_that_compute_the_same_rows_at_the_same_time(tiny_gpt2, tmp_path, stored_rows, monkeypatch):
    """The second one writes while the first one does."""
    save, found = np.save, []

    def write(file, values):
        save(file, values)
        if not found:
            found.append(None)
            found.append(ref_logps(tiny_gpt2, stored_rows, tmp_path / "second", seed=2))

    monkeypatch.setattr(np, "save", write)
    first = ref_logps(tiny_gpt2, stored_rows, tmp_path / "first", seed=1)
    assert first == found[1]
