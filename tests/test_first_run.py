"""What one runs before anything else: `trl-ulma env`, `trl-ulma completion`."""

import json
import subprocess
import sys

import pytest

from trl_ulma.scripts import env
from trl_ulma.scripts.cli import COMMANDS, main

# Environment


def test_this_environment_is_said_and_works(capsys):
    assert main(["env"]) == 0
    said = capsys.readouterr().out
    for name in ("trl-ulma", "trl ", "torch", "cores, memory", "GPUs", "Nothing is known not to work together."):
        assert name in said
    assert main(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["problems"] == []
    assert facts["packages"]["trl"].startswith("1.")


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
        ({"has_nvidia_driver": True}, "There is an NVIDIA driver, and torch, built for CPU, sees no GPU"),
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


# Completion

COMPLETE = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
_shtab_trl_ulma
echo "${COMPREPLY[@]}"
"""


def test_bash_completes_commands_options_and_choices(tmp_path):
    file = tmp_path / "completion.bash"
    command = [sys.executable, "-m", "trl_ulma", "completion", "bash"]
    file.write_text(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

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
