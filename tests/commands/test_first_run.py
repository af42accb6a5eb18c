"""What one runs before anything else: `trl-ulma env`, `trl-ulma check`, `trl-ulma completion`."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trl
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from trl import ModelConfig, RewardConfig
from world import make_rows, make_trainer

from trl_ulma.scripts import env
from trl_ulma.scripts.cli import COMMANDS, main
from trl_ulma.scripts.memory import estimate_memory
from trl_ulma.scripts.training import small_learning_rate

# Environment


def test_this_environment_is_said_and_works(capsys):
    assert main(["env"]) == 0
    said = capsys.readouterr().out
    for name in ("trl-ulma", "trl ", "torch", "cores, memory", "GPUs"):
        assert name in said
    last = "Everything else is known to work." if "\n- " in said else "No known incompatibilities."
    assert said.splitlines()[-1] == last
    assert main(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["problems"] == []
    assert facts["packages"]["trl"] == trl.__version__


def test_what_does_not_work_with_older_versions_is_said():
    found = env.limits({"transformers": "5.16.1", "peft": "0.20.0", "accelerate": None})
    assert [line.split(":")[0] for line in found] == ["transformers 5.16.1"] * 3
    assert "Doge" in found[0]
    oldest = {"trl": "0.29.0", "transformers": "5.2.0", "peft": "0.18.0", "accelerate": "1.4.0"}
    assert len(env.limits(oldest)) == len(env.LIMITS)
    assert env.limits({name: "99" for name, _, _ in env.LIMITS}) == []
    facts = env.gather()
    for version, last in (("5.2.0", "Everything else is known to work."), ("99", "No known incompatibilities.")):
        facts["packages"] = dict.fromkeys(facts["packages"], "99") | {"transformers": version}
        assert env.render(facts, []).splitlines()[-1] == last
        assert ("- transformers 5.2.0: " in env.render(facts, [])) == (version == "5.2.0")


FACTS = {"packages": {}, "requirements": [], "broken": {}, "devices": [], "has_nvidia_driver": False}
FACTS |= {"torch_is_built_for": "CPU"}
OLD_GPU = {"name": "Tesla T4", "memory_gib": 15.0, "has_bf16": False}


@pytest.mark.parametrize(
    ("facts", "problem"),
    [
        (
            {"packages": {"transformers": "5.19.0"}, "requirements": ["transformers>=5.23"]},
            'transformers 5.19.0 is installed, and transformers>=5.23 is needed: pip install "transformers>=5.23"',
        ),
        (
            {"packages": {"bitsandbytes": "0.40"}, "requirements": ['bitsandbytes>=0.46.1; extra == "quantization"']},
            'bitsandbytes 0.40 is installed, and bitsandbytes>=0.46.1 is needed: pip install "bitsandbytes>=0.46.1"',
        ),
        ({"broken": {"flash-attn": "ImportError: undefined symbol"}}, "flash-attn cannot be imported"),
        (
            {"has_nvidia_driver": True, "torch_is_built_for": "CPU", "devices": []},
            "There is an NVIDIA driver, but torch is built for CPU and sees no GPU",
        ),
        ({"devices": [OLD_GPU]}, "Tesla T4 has no bfloat16, TRL's default: train with --bf16 False --fp16 True"),
    ],
)
def test_known_bad_combinations_are_named_with_what_to_do(facts, problem, monkeypatch, capsys):
    (found,) = env.problems(FACTS | facts)
    assert problem in found
    whole = env.gather()
    whole["packages"] |= facts.get("packages", {})
    monkeypatch.setattr(env, "gather", lambda: whole | {k: v for k, v in facts.items() if k != "packages"})
    assert main(["env"]) == 1
    assert f"! {found}" in capsys.readouterr().out


def test_good_combinations_are_not_complained_about():
    good = {"packages": {"trl": "1.16.0", "bitsandbytes": None}, "requirements": ["trl<2,>=1.16", "bitsandbytes>=1"]}
    gpu = {"name": "A100", "memory_gib": 80.0, "has_bf16": True}
    assert env.problems(FACTS | good | {"has_nvidia_driver": True, "devices": [gpu]}) == []


# A dry run


@pytest.fixture
def launched(monkeypatch):
    """What `accelerate launch` would have been given, on a machine with two GPUs."""
    calls = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", calls.append)
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 2)
    return calls


@pytest.fixture
def ratings(tmp_path) -> str:
    """Rows of each kind: demonstrations, likes, dislikes."""
    file = tmp_path / "ratings.jsonl"
    rows = make_rows(20, sft_mask=[i % 4 == 0 for i in range(20)])
    rows.to_json(file)
    return str(file)


@pytest.fixture
def without_weights(tiny_llama, tmp_path) -> str:
    """The checkpoint's configuration and tokenizer alone."""
    folder = tmp_path / "configuration"
    shutil.copytree(tiny_llama, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return str(folder)


def test_all_that_is_known_is_shown_and_no_weight_is_read(without_weights, ratings, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    there = sorted(tmp_path.rglob("*"))
    words = ["--model", without_weights, "--dataset", ratings, "--bf16", "False"]
    assert main(["check", "--method", "ulma", *words]) == 0
    said = capfd.readouterr().out.replace(" \\\n       ", "")
    assert "Labels of the train dataset: 20 rows" in said
    assert "The rows" not in said
    for kind in ("label 1, imitated", "label 0, compared"):
        assert kind in said
    assert "label 1, compared" not in said
    rows = [json.loads(line) for line in Path(ratings).read_text().splitlines()]
    for number in (0, 1):
        assert f"{ratings}, line {number + 1}: " in said
        assert f"{rows[number]['prompt']}⟦{rows[number]['completion']}<|end|>⟧" in said.replace("\n  ", " ")
    assert "20 rows make 3 steps per epoch; 9 steps in total (3 epochs)." in said
    assert re.search(
        r"The longest row has \d+ tokens\. Training needs about \S+ MiB of memory on each device\. \w+", said
    )
    assert said.endswith(
        "Ready. To train:\n\n"
        f"    trl-ulma ulma --model {without_weights} --dataset {ratings} --bf16 False --output out\n"
    )
    assert sorted(tmp_path.rglob("*")) == there
    assert main(["check", "--method", "ulma", *words, "--verbose"]) == 0
    said = capfd.readouterr().out
    assert "label 1, compared" in said
    assert re.search(r"completion of \d+ tokens", said)
    assert re.search(r"Training needs about \S+ MiB of memory on each device: weights .*, gradients", said)


@pytest.mark.parametrize("is_invalid", [True, False])
def test_odd_labels_are_named_once_more_beside_what_has_to_be_corrected(without_weights, tmp_path, capfd, is_invalid):
    labels = [*"1234512345123451234", 9, "N/A" if is_invalid else 4]
    rows = "".join(f"Why {i}?,answer {i},{label}\n" for i, label in enumerate(labels))
    (tmp_path / "rows.csv").write_text(f"prompt,completion,label\n{rows}")
    argv = ["--model", without_weights, "--dataset", str(tmp_path / "rows.csv"), "--label_type", "continuous"]
    assert main(["check", "--method", "pointwise-dpo", *argv, "--bf16", "False"]) == is_invalid
    out, err = capfd.readouterr()
    before, end = out.split("\nLook at this before you train: ")
    assert end.startswith("1 label is far outside the others, which are between 1 and 5: 9 (")
    assert "rows.csv, line 21, prompt 'Why 19?')" in end
    assert "far outside" not in before
    assert "labels ask log π" not in before  # only with --verbose
    assert ("of memory on each device" in before) == (not is_invalid)
    if is_invalid:  # the rows are looked at once more before the training
        assert "trl-ulma check --method pointwise-dpo" in err
        assert err.endswith("--invalid_rows drop\n\nOr correct it, and check again.\n")
    assert ("rows.csv, line 22: label is the text 'N/A'" in err) == is_invalid == ("Ready." not in end)


@pytest.mark.parametrize(
    ("options", "is_said"),
    [
        (["--method", "ulma", "--use_peft"], True),
        (["--method", "ulma", "--use_peft", "--learning_rate", "1e-4"], False),
        (["--use_peft"], False),  # it is suggested
        ([], False),
    ],
)
def test_loras_learning_rate_is_named_if_it_is_trls_default(without_weights, ratings, capfd, options, is_said):
    assert main(["check", "--model", without_weights, "--dataset", ratings, "--bf16", "False", *options]) == 0
    said = " ".join(capfd.readouterr().out.split())
    note = "The learning rate is 1e-06, TRL's default, which is meant for training all weights."
    assert (note in said) == ("Begin with --learning_rate 1e-4." in said) == is_said


def test_a_reward_models_own_default_is_no_small_learning_rate(tmp_path):
    lora, settings = ModelConfig(use_peft=True), {"report_to": "none", "bf16": False}
    assert small_learning_rate(RewardConfig(str(tmp_path), **settings), lora) == ""
    assert "1e-06" in small_learning_rate(RewardConfig(str(tmp_path), learning_rate=1e-6, **settings), lora)


def test_a_terminal_shows_completions_in_color(without_weights, ratings):
    # In a process of its own, because what a test before it has imported can make rich take it for a notebook
    command = [sys.executable, "-m", "trl_ulma", "check", "--model", without_weights, "--dataset", ratings]
    environment = os.environ | {"FORCE_COLOR": "1", "TERM": "xterm"}
    said = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert "⟦" not in said
    assert "\x1b[1;32m" in said  # good answers are green
    assert "\x1b[1;31m" in said


def test_what_cannot_be_learned_from_is_told(without_weights, tmp_path, capfd):
    file = tmp_path / "stars.csv"
    file.write_text("prompt,completion,label\nHi, Hello!,5\n")
    command = ["check", "--model", without_weights, "--dataset", str(file)]
    assert main(command) == 1
    assert "label is 5" in capfd.readouterr().err
    assert main([*command, "--label_type", "continuous", "--sft_threshold", "5"]) == 0
    assert main([*command, "--label_tipe", "continuous"]) == 2
    assert "Did you mean --label_type" in capfd.readouterr().err
    assert main([*command, "--method", "pointwise-dpo", "--sft_weight", "1"]) == 2
    assert "--sft_weight is not an option" in capfd.readouterr().err


@pytest.mark.parametrize("method", [[], ["--method", "pointwise-dpo"]])
def test_an_adapter_is_told_from_a_model(tiny_gpt2, ratings, tmp_path, capfd, method):
    adapter = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_gpt2), LoraConfig(task_type="CAUSAL_LM"))
    adapter.save_pretrained(tmp_path / "adapter")
    assert main(["check", *method, "--model", str(tmp_path / "adapter"), "--dataset", ratings]) == 1
    said = capfd.readouterr().err
    assert f"error: --model {tmp_path / 'adapter'} is an adapter of {tiny_gpt2}. To train it further, use Py" in said


def test_help_of_a_dry_run_has_its_own_options_and_those_of_training(capsys):
    assert main(["check", "--help"]) == 0
    said = capsys.readouterr().out
    for option in ("--method", "--dataset ", "--dataset_name", "--sft_weight"):
        assert option in said
    assert main(["check", "--help", "--method", "pointwise-dpo"]) == 0
    assert "--sft_weight" not in capsys.readouterr().out


def test_one_of_a_kind_is_not_said_in_the_plural(tiny_gpt2, ratings, capfd):
    command = ["check", "--method", "ulma", "--model", tiny_gpt2, "--dataset", ratings, "--num_train_epochs", "1"]
    command += ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "20", "--save_steps", "1"]
    assert main(command) == 0
    said = capfd.readouterr().out
    assert "Each step takes 20 rows: 1 row per micro-batch × 20 micro-batches." in said
    assert "20 rows make 1 step per epoch; 1 step in total (1 epoch). A checkpoint after each step." in said


def test_the_next_command_keeps_the_options_and_can_be_run(tiny_gpt2, tmp_path, capfd, launched):
    folder = tmp_path / "my files"
    folder.mkdir()
    (folder / "stars.csv").write_text("prompt,completion,label\n" + "".join(f"q{i},a{i},{i}\n" for i in range(5)))
    words = ["--model_name_or_path", tiny_gpt2, f"--dataset={folder / 'stars.csv'}", "--label_type=continuous"]
    words += ["--label_transform", "threshold:2", "--label_type", "binary", "--output_dir", str(folder / "out")]
    assert main(["check", "--method", "pointwise-dpo", *words]) == 0
    printed = capfd.readouterr().out.split("To train:\n\n")[1]
    shell = subprocess.run(["sh", "-c", f"printf '%s\\n' {printed}"], capture_output=True, text=True, check=True)
    following = shell.stdout.splitlines()
    assert following == ["trl-ulma", "pointwise-dpo", *words]
    assert main(following[1:]) == 0
    assert launched[0].training_script_args == words
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("settings", "processes"),
    [
        ({"per_device_train_batch_size": 3, "num_train_epochs": 2}, 1),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "num_train_epochs": 1.5}, 1),
        ({"per_device_train_batch_size": 8, "gradient_accumulation_steps": 8, "num_train_epochs": 1}, 1),
        ({"per_device_train_batch_size": 3, "max_steps": 4}, 1),
        ({"per_device_train_batch_size": 3, "num_train_epochs": 1, "dataloader_drop_last": True}, 1),
    ],
)
def test_the_steps_are_those_that_training_makes(settings, processes, tiny_llama, ratings, tmp_path, capfd):
    options = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    assert main(["check", "--method", "ulma", "--model", tiny_llama, "--dataset", ratings, *options]) == 0
    said = capfd.readouterr().out
    trainer = make_trainer(tiny_llama, make_rows(20), tmp_path / "out", **settings)
    trainer.train()
    steps = trainer.state.global_step
    assert f" {steps} step{'' if steps == 1 else 's'} in total" in said


@pytest.mark.parametrize("is_adapter", [False, True])
def test_memory_of_weights_gradients_and_optimizer_is_exact(is_adapter, tiny_llama, tmp_path):
    peft_config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if is_adapter else None
    trainer = make_trainer(tiny_llama, make_rows(8), tmp_path / "out", max_steps=1, peft_config=peft_config)
    estimated = estimate_memory(trainer.model, tokens=100, has_reference=not is_adapter)

    kept = {}

    def keep(optimizer, *_):
        kept["gradients"] = [p.grad for group in optimizer.param_groups for p in group["params"]]

    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(keep)
    trainer.train()
    states = [value for state in trainer.optimizer.state.values() for value in state.values() if value.ndim > 0]
    for name, tensors in (
        ("weights", trainer.model.parameters()),
        ("gradients", kept["gradients"]),
        ("optimizer", states),
    ):
        assert estimated[name] == sum(tensor.nbytes for tensor in tensors)
    reference = [] if is_adapter else trainer.ref_model.parameters()
    assert estimated["reference"] == sum(tensor.nbytes for tensor in reference)


@pytest.mark.parametrize(
    ("optimizer", "bytes_per_weight"),
    [
        ("adamw_torch", 4), ("stable_adamw", 4), ("schedule_free_adamw", 4), ("lion_8bit", 1), ("sgd", 0),
        ("adamw_torch_4bit", 1), ("paged_adamw_8bit", 2), ("rmsprop_bnb_8bit", 1), ("rmsprop", 2), ("muon", 2),
        ("paged_adamw_32bit", 8), ("paged_lion_32bit", 4), ("ademamix", 12), ("paged_ademamix_8bit", 3),
        ("adafactor", 0), ("galore_adamw", 0),
    ],
)  # fmt: skip
def test_memory_of_optimizers_of_bfloat16_weights(optimizer, bytes_per_weight):
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    found = estimate_memory(model, tokens=1, optimizer=optimizer)["optimizer"]
    assert found == bytes_per_weight * model.num_parameters()


@pytest.mark.parametrize("width", [64, 256])
def test_memory_of_activations_is_about_what_autograd_keeps(width):
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model(torch.zeros(2, 96, dtype=torch.long))
    found = estimate_memory(model, tokens=2 * 96, gradient_checkpointing=False)["activations"]
    assert 0.6 < found / sum(kept.values()) < 1.6
    assert estimate_memory(model, tokens=2 * 96)["activations"] < 0.5 * found


def test_memory_counts_four_bits_of_linear_layers_only(tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    model.requires_grad_(False)
    linear = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    )
    whole, four = (estimate_memory(model, tokens=1, bits=bits)["weights"] for bits in (None, 4))
    assert whole - four == pytest.approx(linear * (2 - 0.5 - 4 / 64), abs=20)


# Completion

COMPLETE = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
_shtab_trl_ulma
echo "${COMPREPLY[@]}"
"""


def test_bash_completes_commands_options_and_choices(tmp_path, capsys):
    file = tmp_path / "completion.bash"
    assert main(["completion", "bash"]) == 0
    file.write_text(capsys.readouterr().out)

    def complete(*words: str) -> list[str]:
        run = ["bash", "-c", COMPLETE, "bash", str(file), "trl-ulma", *words]
        return subprocess.run(run, capture_output=True, text=True, check=True).stdout.split()

    assert set(complete("")) == set(COMMANDS)
    assert complete("ulma", "--positive_l") == ["--positive_loss"]
    assert complete("ulma", "--positive_loss", "") == ["sft", "pointwise_dpo", "none"]
    assert complete("prepare", "qa-feedback", "--pass") == ["--passages"]


def test_completion_without_its_library_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "zsh"]) == 2
    assert "pip install 'trl-ulma[completion]'" in capsys.readouterr().err
