"""No secret is written, no program of others runs, and no dataset reads outside its folder."""

import copy
import json
import logging
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig
from world import make_rows, make_trainer

from trl_ulma import PointwiseDPOConfig, ULMAConfig
from trl_ulma.data.files import load_rows

SECRET = "S3cret"
TOKENS = {"hub_token": f"hf_{SECRET}Hub", "model_init_kwargs": {"token": f"hf_{SECRET}Loading", "subfolder": ""}}


def content(file: Path) -> bytes:
    """A file's bytes, those of an archive unpacked."""
    if not zipfile.is_zipfile(file):
        return file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        return b"".join(archive.read(name) for name in archive.namelist())


def test_secrets_are_in_no_log_checkpoint_report_or_model_card(tiny_gpt2, tmp_path, monkeypatch, capfd, caplog):
    caplog.set_level(logging.DEBUG)
    for name in ("HF_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY"):
        monkeypatch.setenv(name, f"{SECRET}-{name}")
    out = tmp_path / "out"
    saving = {"save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(tiny_gpt2, make_rows(8), out, max_steps=2, **saving, **copy.deepcopy(TOKENS))
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    trainer.create_model_card()
    print(trainer.args, repr(trainer.args))
    files = [file for file in out.rglob("*") if file.is_file()]
    assert {"training_args.bin", "README.md", "trainer_state.json"} <= {file.name for file in files}
    assert [file for file in files if SECRET.encode() in content(file)] == []
    reported = json.dumps([trainer.args.to_dict(), trainer.args.to_sanitized_dict()], default=str)
    printed = "".join(capfd.readouterr())
    assert "ULMAConfig(" in printed
    assert SECRET not in reported + printed + caplog.text
    assert trainer.args.hub_token == TOKENS["hub_token"], "the token is gone where it is needed"


@pytest.mark.parametrize("config", [PointwiseDPOConfig, ULMAConfig])
def test_pickled_settings_hold_no_tokens_and_copies_do(config, tmp_path):
    args = config(str(tmp_path), report_to="none", bf16=False, **copy.deepcopy(TOKENS))
    for copied in (copy.copy(args), copy.deepcopy(args)):
        assert copied.hub_token == TOKENS["hub_token"]
        assert copied.model_init_kwargs == TOKENS["model_init_kwargs"]
        assert copied.beta == args.beta
    assert copied.model_init_kwargs is not args.model_init_kwargs
    written = pickle.dumps(args)
    assert SECRET.encode() not in written
    again = pickle.loads(written)
    assert again.hub_token is None
    assert again.model_init_kwargs == {"subfolder": ""}
    assert again.beta == args.beta


# Weights


def pickle_weights(folder: str, target: Path) -> str:
    """A copy of a checkpoint with its weights in a pickle."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder).save_pretrained(target)
    torch.save(model.state_dict(), target / "pytorch_model.bin")
    return str(target)


def test_pickled_weights_are_refused_unless_asked_for(tiny_gpt2, tmp_path):
    folder = pickle_weights(tiny_gpt2, tmp_path / "pickled")
    with pytest.raises(ValueError, match=r"weights in .*pickled are pickled \(pytorch_model\.bin\)\. They are not"):
        make_trainer(folder, make_rows(4), tmp_path)
    trainer = make_trainer(folder, make_rows(4), tmp_path, model_init_kwargs={"use_safetensors": False})
    assert torch.equal(
        trainer.model.state_dict()["transformer.wte.weight"],
        load_file(f"{tiny_gpt2}/model.safetensors")["transformer.wte.weight"],
    )


def test_a_checkpoint_of_pickled_weights_is_refused(tiny_gpt2, tmp_path):
    folder = pickle_weights(tiny_gpt2, tmp_path / "checkpoint-1")
    trainer = make_trainer(tiny_gpt2, make_rows(4), tmp_path, max_steps=1)
    with pytest.raises(ValueError, match=r"checkpoint-1 are pickled \(pytorch_model\.bin\).*use_safetensors"):
        trainer.train(resume_from_checkpoint=folder)


def test_a_model_of_the_hub_is_asked_for_safetensors(tiny_gpt2, tmp_path):
    assert make_trainer(tiny_gpt2, make_rows(4), tmp_path).args.model_init_kwargs == {"use_safetensors": True}


def test_weights_are_written_as_safetensors(tiny_gpt2, tmp_path):
    trainer = make_trainer(tiny_gpt2, make_rows(4), tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    written = {file.name for file in tmp_path.rglob("*") if file.suffix in (".bin", ".pt", ".pth", ".safetensors")}
    # The last four are transformers' own, and hold no weights
    assert written == {"model.safetensors", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"}


def test_a_models_own_program_does_not_run_unless_asked_for(tiny_gpt2, tmp_path):
    model = tmp_path / "model"
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    AutoModelForCausalLM.from_pretrained(tiny_gpt2).save_pretrained(model)
    tokenizer.save_pretrained(model)
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (model / "config.json").write_text(json.dumps(config))
    mark = tmp_path / "it ran"
    (model / "own.py").write_text(
        f"open({str(mark)!r}, 'w')\n"
        "from transformers import GPT2Config, GPT2LMHeadModel\n"
        "class Config(GPT2Config):\n    model_type = 'own'\n"
        "class Model(GPT2LMHeadModel):\n    config_class = Config\n"
    )
    with pytest.raises(ValueError, match="trust_remote_code"):
        make_trainer(str(model), make_rows(4), tmp_path / "out", processing_class=tokenizer)
    assert not mark.exists()
    trusted: dict[str, Any] = {"trust_remote_code": True}
    if "trust_remote_code" not in DPOConfig.__dataclass_fields__:  # TRL before 1.7
        trusted = {"model_init_kwargs": trusted}
    make_trainer(str(model), make_rows(4), tmp_path / "out", processing_class=tokenizer, **trusted)
    assert mark.exists()


# Folders


def test_the_names_of_evaluated_data_sets_are_no_paths(tiny_gpt2, tmp_path):
    inner = tmp_path / "a" / "b" / "out"
    evaluated = {"../../../escaped": make_rows(4), "/escaped": make_rows(4)}
    trainer = make_trainer(
        tiny_gpt2,
        make_rows(4),
        inner,
        eval_dataset=evaluated,
        max_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        precompute_ref_log_probs=True,
    )
    trainer.train()
    trainer.save_state()
    assert any("eval_../../../escaped_loss" in log for log in trainer.state.log_history)
    assert [path for path in tmp_path.rglob("*") if "escaped" in path.name] == []
    assert {path.name for path in tmp_path.iterdir()} == {"a"}


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_reads_the_files_of_its_own_folder_only(tmp_path, streaming):
    folder = tmp_path / "rows"
    folder.mkdir()
    (tmp_path / "outside.jsonl").write_text('{"prompt": "not yours"}\n')
    (folder / "inside.jsonl").write_text('{"prompt": "yours"}\n')
    readme = "---\nconfigs:\n- config_name: default\n  data_files: {}\n---\n"
    (folder / "README.md").write_text(readme.format("../outside.jsonl"))
    with pytest.raises(ValueError, match=r"README\.md names .*outside\.jsonl, which is not in .*rows\. A dataset"):
        load_rows(folder, streaming=streaming)
    (folder / "README.md").write_text(readme.format("inside.jsonl"))
    assert [row["prompt"] for row in load_rows(folder, streaming=streaming)["train"]] == ["yours"]


def test_a_saved_data_set_reads_the_files_of_its_own_folder_only(tmp_path):
    Dataset.from_dict({"prompt": ["not yours"]}).save_to_disk(tmp_path / "outside")
    rows = Dataset.from_dict({"prompt": ["yours"]})
    rows.save_to_disk(tmp_path / "one")
    DatasetDict(train=rows).save_to_disk(tmp_path / "many")
    for folder in ("one", "many/train"):
        state = tmp_path / folder / "state.json"
        about = json.loads(state.read_text())
        name = about["_data_files"][0]["filename"]
        about["_data_files"][0]["filename"] = f"{'../' * (folder.count('/') + 1)}outside/{name}"
        state.write_text(json.dumps(about))
        with pytest.raises(ValueError, match=r"state\.json names .*outside/data.*, which is not in"):
            load_rows(tmp_path / folder.split("/")[0])
    DatasetDict(train=rows).save_to_disk(tmp_path / "splits")
    (tmp_path / "splits" / "dataset_dict.json").write_text('{"splits": ["../outside"]}')
    with pytest.raises(ValueError, match=r"dataset_dict\.json names .*outside, which is not in"):
        load_rows(tmp_path / "splits")
