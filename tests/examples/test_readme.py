"""What README says, runs as it is printed."""

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[2] / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
TINY = {"HuggingFaceTB/SmolLM2-135M": "tiny_gpt2", "Qwen/Qwen2.5-VL-3B-Instruct": "tiny_llava"}


@pytest.mark.parametrize("example", EXAMPLES, ids=["thumbs", "ratings", "demonstrations and thumbs", "pairs", "images"])
def test_an_example_runs_with_a_model_that_is_at_hand(example, request, tmp_path, monkeypatch, capsys):
    [model] = [name for name in TINY if name in example]
    assert len(example.strip().splitlines()) <= 18
    monkeypatch.chdir(tmp_path)
    folder = request.getfixturevalue(TINY[model])
    exec(compile(example.replace(model, folder), "README.md", "exec"), {})
    assert "'train_loss'" in capsys.readouterr().out


def test_the_commands_of_readme_are_commands(tiny_gpt2):
    from trl_ulma.scripts import pointwise_dpo, score, ulma

    text = README.read_text(encoding="utf-8")
    options = re.findall(r"^trl-ulma ulma (.*)$", text, re.MULTILINE)[0].split()
    assert ulma.make_parser().parse_settings(options)[1].eval_strategy == "steps"
    options = re.findall(r"^trl-ulma pointwise-dpo --config run.yaml (.*)$", text, re.MULTILINE)[0].split()
    needed = ["--model_name_or_path", tiny_gpt2, "--dataset_name", "x.jsonl"]
    assert pointwise_dpo.make_parser().parse_settings([*options, *needed])[2].load_in_4bit
    options = re.findall(r"^trl-ulma score (.*)$", text, re.MULTILINE)[0].split()
    assert score.make_parser().parse_args(options).model == "out"


def test_the_transforms_of_readme_are_those_that_there_are():
    from trl_ulma.labels import TRANSFORMS, parse_transform

    steps = re.findall(
        r"^\| (`.*`) \| [^|]* \|$", README.read_text(encoding="utf-8").split("| step |")[1], re.MULTILINE
    )
    named = [spec for step in steps for spec in re.findall(r"`([^`]*)`", step)]
    assert {spec.partition(":")[0] for spec in named} == set(TRANSFORMS)
    for spec in named:
        binary = spec.startswith(("threshold", "votes"))
        parse_transform(spec, "binary" if binary else "continuous")
