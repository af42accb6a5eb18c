"""One number: the rewards of the same 15 rows by every way to them, for models of every kind and storage format.

`pytest tests/commands/test_one_number.py -s -k every_way` prints the rewards, and the table of docs/evaluation.md.
"""

import json
import logging
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from vlm import image_rows
from world import binary_rows, make_rows, make_trainer, mixed_rows

from trl_ulma.evaluation.held_out import HeldOut
from trl_ulma.judge import Judge
from trl_ulma.labels import LabelRules
from trl_ulma.scripts.cli import main

ROWS = make_rows(15)
SAME = 1e-4
# By how much rewards in half precision may depend on the batch
BATCHING = 0.05
KINDS = ("full", "adapter", "merged", "quantized")
FORMATS = {
    "by default": {"bf16": None},  # on a CPU float32
    "bf16 mixed precision": {"bf16": True, "use_cpu": True},
    "bfloat16": {"bf16": False, "model_init_kwargs": {"dtype": "bfloat16"}},
}
CASES = [(kind, dtype, "by default") for kind in KINDS for dtype in ("float32", "bfloat16", "float16")]
CASES += [(kind, "bfloat16", "bf16 mixed precision") for kind in ("adapter", "quantized")]
CASES += [(kind, "bfloat16", "bfloat16") for kind in ("full", "merged")]
IN_TRAINING = ("trainer.evaluate", "trainer.predict", "trainer.score")


@pytest.fixture(scope="module")
def stored(tiny_llama, tmp_path_factory):
    """Folders with the same model, stored in three formats."""
    folders = {}
    for dtype in ("float32", "bfloat16", "float16"):
        folders[dtype] = str(tmp_path_factory.mktemp(dtype))
        AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=dtype).save_pretrained(folders[dtype])
        AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folders[dtype])
    return folders


def lora():
    """For the trainer, which writes the base model's name into it."""
    return {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"])}


def of_kind(kind):
    """What the trainer is given for a kind of model."""
    if kind == "quantized":
        how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
        return lora() | {"quantization_config": BitsAndBytesConfig(**how)}
    return {} if kind == "full" else lora()


def trained(folder, tmp_path, rows=ROWS, **settings):
    """A trainer after a few steps, and the folder that it was saved in."""
    trainer = make_trainer(
        folder,
        rows,
        tmp_path / "run",
        beta=0.5,
        learning_rate=1e-2,
        max_steps=3,
        label_report=False,
        optim="adamw_torch",
        **settings,
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    return trainer, tmp_path / "saved"


def merge(trainer, saved, folder):
    """The model of a trained adapter, merged and saved with what goes with it."""
    trainer.model.merge_and_unload().save_pretrained(folder)
    for file in saved.iterdir():
        if not file.name.startswith("adapter") and file.is_file():
            shutil.copy(file, folder / file.name)


def rewards_of_saved(folder, tmp_path, rows=ROWS):
    """way → `(N,)` rewards, of what reads a saved model, by default settings."""
    data = tmp_path / "rows.parquet"
    rows.to_parquet(data)
    argv = ["--model", str(folder), "--dataset", str(data)]
    assert main(["score", *argv, "--output", str(tmp_path / "scored.jsonl"), "--sort", "row"]) == 0
    assert main(["evaluate", *argv, "--split", "train", "--output", str(tmp_path / "report")]) == 0
    files = {"trl-ulma score": tmp_path / "scored.jsonl"}
    files["trl-ulma evaluate"] = tmp_path / "report" / "rewards" / f"{folder.name}.jsonl"
    found = {"Judge.score": np.array(Judge.from_pretrained(str(folder)).score(rows)["reward"][:])}
    for name, file in files.items():
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert [line["row"] for line in lines] == list(range(len(rows)))
        found[name] = np.array([line["reward"] for line in lines])
    return found


def rewards_in_training(trainer, rows=ROWS):
    """way → `(N,)` rewards, of what a trainer offers."""
    trainer.evaluate(rows)
    return {
        "trainer.evaluate": trainer.evaluated[:, 0],
        "trainer.predict": trainer.predict(rows).predictions,
        "trainer.score": np.array(trainer.score(rows)["reward"][:]),
    }


def show(title, found):
    """Print the first rows and the largest difference of each way."""
    first = next(iter(found.values()))
    print(f"\n{title}")
    for way, rewards in found.items():
        cells = " ".join(f"{reward:9.5f}" for reward in rewards[:5])
        print(f"  {way:18} {cells} …  largest difference {np.abs(rewards - first).max():.1e}")


@pytest.fixture(scope="module")
def table():
    """Takes rows of a table, which is printed at the end."""
    rows = []
    yield rows
    print("\n\n| model | stored in | trained in | first three rewards | largest difference |")
    print("|---|---|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


@pytest.fixture
def warned(monkeypatch):
    """What is warned of."""
    said = []

    class Keep(logging.Handler):
        def emit(self, record):
            said.append(record.getMessage())

    handler = Keep(level=logging.WARNING)
    logging.getLogger("transformers").addHandler(handler)
    logger = logging.getLogger("trl_ulma")
    logger.addHandler(handler)
    yield said
    logging.getLogger("transformers").removeHandler(handler)
    logger.removeHandler(handler)


@pytest.mark.parametrize(("kind", "dtype", "number_format"), CASES)
def test_rewards_are_the_same_by_every_way(stored, tmp_path, warned, table, kind, dtype, number_format):
    trainer, folder = trained(stored[dtype], tmp_path, **of_kind(kind), **FORMATS[number_format])
    found = rewards_in_training(trainer)
    if kind == "merged":
        (tmp_path / "merged").mkdir()
        merge(trainer, folder, tmp_path / "merged")
        folder = tmp_path / "merged"
    found |= rewards_of_saved(folder, tmp_path)
    show(f"{kind}, stored in {dtype}, trained in {number_format}", found)
    print(*warned, sep="\n")
    first, loaded = found["trainer.evaluate"], found["Judge.score"]
    assert np.abs(first).max() > 0.1
    for way, rewards in found.items():
        assert rewards == pytest.approx(first if way in IN_TRAINING else loaded, abs=SAME), way
    # Loaded models in the formats that round: equal, or the effect is measured and told
    told = [text for text in warned if "is not computed as when it was saved" in text]
    depends = [text for text in warned if "in which rewards depend on the rows that are computed together" in text]
    largest = max(np.abs(rewards - first).max() for rewards in found.values())
    rewards = " ".join(f"{reward:.4f}" for reward in first[:3])
    table.append((kind, dtype, number_format, rewards, f"{largest:.0e}{', warns' if told or depends else ''}"))
    if number_format == "by default":
        assert loaded == pytest.approx(first, abs=SAME)
        assert not told
        assert not depends or kind == "quantized"
    elif kind == "merged":  # into weights that are rounded
        off = np.abs(loaded - first).max()
        assert off > SAME
        figure = float(re.search(r"by up to about ([\d.e-]+)\. Possible", told[0])[1])
        assert off < figure < 100 * off
    else:
        assert depends
        assert not told
        assert loaded == pytest.approx(first, abs=BATCHING)


@pytest.fixture(scope="module")
def tied(tiny_llama, tmp_path_factory):
    """A folder with a model whose output embeddings are its input embeddings."""
    folder = str(tmp_path_factory.mktemp("tied"))
    config = AutoConfig.from_pretrained(tiny_llama, tie_word_embeddings=True)
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    return folder


def on(*modules, **settings):
    return {"peft_config": LoraConfig(r=4, target_modules=list(modules), task_type="CAUSAL_LM", **settings)}


# What else a training can have: whether the embeddings are tied, settings, and where in the run's folder the model is
OTHERS = {
    "tied": (True, lambda folder: {}, None),
    "tied, output embeddings saved": (True, lambda folder: on("q_proj", modules_to_save=["lm_head"]), None),
    "both embeddings saved": (False, lambda folder: on("q_proj", modules_to_save=["lm_head", "embed_tokens"]), None),
    "an adapter on the input embeddings": (True, lambda folder: on("q_proj", "embed_tokens"), None),
    "single tokens": (False, lambda folder: on("q_proj", trainable_token_indices=[5, 6]), None),
    "DoRA": (False, lambda folder: on("q_proj", "v_proj", use_dora=True, lora_dropout=0.1), None),
    "prompt tuning": (
        False,
        lambda folder: {"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)},
        None,
    ),
    "another attention": (False, lambda folder: {"model_init_kwargs": {"attn_implementation": "eager"}}, None),
    "a precomputed reference": (False, lambda folder: {"precompute_ref_log_probs": True, **on("q_proj")}, None),
    "another reference": (
        False,
        lambda folder: {"ref_model": AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)},
        None,
    ),
    "another reference of an adapter": (
        False,
        lambda folder: {"ref_model": AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), **on("q_proj")},
        None,
    ),
    "a checkpoint": (False, lambda folder: {"save_strategy": "steps", "save_steps": 3}, "checkpoint-3"),
    "an adapter's checkpoint": (
        False,
        lambda folder: {"save_strategy": "steps", "save_steps": 3, **on("q_proj")},
        "checkpoint-3",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_rewards_are_the_same_whatever_was_trained(tiny_llama, tied, tmp_path, warned, name):
    is_tied, settings, inside = OTHERS[name]
    base, other = (tied, tiny_llama) if is_tied else (tiny_llama, tied)
    trainer, folder = trained(base, tmp_path, **settings(other))
    first = np.array(trainer.score(ROWS)["reward"][:])
    assert np.abs(first).max() > 0.05
    if inside is not None:
        folder = tmp_path / "run" / inside
    elsewhere = tmp_path / "elsewhere"
    shutil.move(folder, elsewhere)
    warned.clear()
    assert Judge.from_pretrained(str(elsewhere)).score(ROWS)["reward"][:] == pytest.approx(first, abs=SAME)
    assert not [text for text in warned if "is not computed as when it was saved" in text]


STARS = make_rows(15, label=[float(1 + i % 5) for i in range(15)])
LONG_PROMPTS = make_rows(15, prompt=[f"Why {'x ' * (3 * (i % 4))}?" for i in range(15)])
LONG_ANSWERS = make_rows(15, prompt=[f"Why {i}?" for i in range(15)], completion=[" I am" * (3 + i) for i in range(15)])
# Rows and settings that change how rows are read or laid out
READ = {
    "demonstrations": (binary_rows(12).remove_columns("log_z"), {}),
    "several types, a column of log Z": (mixed_rows(12), {"log_z": "column"}),
    "shared prompts": (ROWS, {"share_prompts": True}),
    "cut at the end": (LONG_ANSWERS, {"max_length": 16}),
    "cut at the start": (LONG_PROMPTS, {"max_length": 16, "truncation_mode": "keep_end"}),
    "quantiles": (STARS, {"pointwise": True, "label_type": "continuous", "label_transform": "quantile"}),
    "conversations": (ROWS, {"chat": "true", "system_message": "Be kind."}),
}


@pytest.mark.parametrize("name", READ)
def test_rewards_are_the_same_however_rows_are_read(tiny_llama, tmp_path, name):
    rows, settings = READ[name]
    trainer, folder = trained(tiny_llama, tmp_path, rows, **settings, **on("q_proj"))
    found = rewards_in_training(trainer, rows) | rewards_of_saved(folder, tmp_path, rows)
    show(name, found)
    first = found["trainer.evaluate"]
    assert np.abs(first).max() > 0.05
    for way, rewards in found.items():
        assert rewards == pytest.approx(first, abs=SAME), way
    scored = trainer.score(rows)
    again = [json.loads(line) for line in (tmp_path / "scored.jsonl").read_text().splitlines()]
    for column in ("predicted_label", "surprise"):
        assert [row[column] for row in again] == pytest.approx(scored[column][:], abs=SAME)


def test_a_reference_that_is_a_name_is_refused(tiny_llama, tied, tmp_path):
    with pytest.raises(TypeError, match=r"ref_model must be a model; got str\. Load it with"):
        make_trainer(tiny_llama, ROWS, tmp_path, ref_model=tied)


def test_a_reference_that_moved_during_training_is_not_taken_for_the_first(tiny_llama, tmp_path, warned):
    trainer, folder = trained(tiny_llama, tmp_path, sync_ref_model=True, ref_model_sync_steps=1)
    with pytest.raises(ValueError, match=r"was trained against a reference that had no name \(copy\)\. Pass it as"):
        Judge.from_pretrained(str(folder))
    first = trainer.score(ROWS)["reward"][:]
    trainer.ref_model.save_pretrained(tmp_path / "moved")
    found = Judge.from_pretrained(str(folder), str(tmp_path / "moved")).score(ROWS)["reward"][:]
    assert found == pytest.approx(first, abs=SAME)
    assert not [text for text in warned if "against another reference" in text]
    wrong = Judge.from_pretrained(str(folder), tiny_llama).score(ROWS)["reward"][:]
    assert wrong != pytest.approx(first, abs=0.05)
    assert [text for text in warned if "against another reference" in text]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("part", ["policy", "reference"])
def test_what_was_stored_in_another_format_since_is_told_with_an_upper_limit(stored, tmp_path, warned, part, dtype):
    (tmp_path / "base").mkdir()
    for file in Path(stored["float32"]).iterdir():
        shutil.copy(file, tmp_path / "base")
    trainer, folder = trained(str(tmp_path / "base"), tmp_path)
    first = np.array(trainer.score(ROWS)["reward"][:])
    changed = {"policy": folder, "reference": tmp_path / "base"}[part]
    AutoModelForCausalLM.from_pretrained(changed, dtype=dtype).save_pretrained(changed)
    warned.clear()
    if (part, dtype) == ("reference", "bfloat16"):  # so different that it cannot be the reference
        with pytest.raises(ValueError, match="was trained against another reference"):
            Judge.from_pretrained(str(folder))
        return
    found = np.array(Judge.from_pretrained(str(folder)).score(ROWS)["reward"][:])
    off = np.abs(found - first).max()
    assert off > SAME
    told = [text for text in warned if "is not computed as when it was saved" in text]
    figure = float(re.search(r"by up to about ([\d.e-]+)\. Possible", told[0])[1])
    assert off < figure < 100 * off


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_rows_with_images_have_the_same_rewards_by_every_way(tiny_llava, tmp_path, kind):
    rows = image_rows(9)
    settings = {"beta": 0.5, "learning_rate": 1e-2, "max_steps": 3, "label_report": False, "max_length": None}
    trainer = make_trainer(tiny_llava, rows, tmp_path / "run", **settings, **of_kind(kind))
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    found = rewards_in_training(trainer, rows) | rewards_of_saved(tmp_path / "saved", tmp_path, rows)
    show(f"{kind}, images", found)
    first = found["trainer.evaluate"]
    assert np.abs(first).max() > 0.01
    for way, rewards in found.items():
        assert rewards == pytest.approx(first, abs=SAME), way


def test_what_cannot_be_done_with_images_is_refused_before_a_model_is_loaded(
    tiny_llava, tiny_llama, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("trl_ulma.evaluation.run.load_model", None)
    image_rows(3).to_parquet(tmp_path / "rows.parquet")
    argv = ["evaluate", "--dataset", str(tmp_path / "rows.parquet"), "--split", "train", "--output", str(tmp_path)]
    assert main([*argv, "--model", tiny_llava, "--generate"]) == 1
    assert "answers to rows with images are not generated. Leave out --judge" in capsys.readouterr().err
    assert main([*argv, "--model", tiny_llama]) == 1
    assert f"has images, and {tiny_llama} was saved with a tokenizer alone" in capsys.readouterr().err


def test_pairs_with_images_are_numbered_by_prompt_and_image(tiny_llava):
    rows = image_rows(4, counts=(1,), prompt=[[{"role": "user", "content": "What is this?"}]] * 4)
    rows = rows.rename_column("completion", "chosen").remove_columns("label")
    rows = rows.add_column("rejected", [[{"role": "assistant", "content": "Never."}]] * 4)
    held_out = HeldOut.of(rows, "test", LabelRules(), takes_images=True)
    assert held_out.label.tolist() == [1.0, 0.0] * 4
    assert [held_out.prompt.tolist().count(number) for number in range(4)] == [2] * 4
    assert held_out.rows[2]["images"] == held_out.rows[3]["images"] == rows[1]["images"]
