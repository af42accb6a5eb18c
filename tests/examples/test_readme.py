"""What README says runs as it is printed."""

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[2] / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
MODEL = "HuggingFaceTB/SmolLM2-135M"


@pytest.mark.parametrize("example", EXAMPLES, ids=["pairs", "demonstrations and thumbs"])
def test_an_example_runs_with_a_tiny_model(example, tiny_gpt2, tmp_path, monkeypatch, capsys):
    assert MODEL in example
    assert len(example.strip().splitlines()) <= 18
    monkeypatch.chdir(tmp_path)
    exec(compile(example.replace(MODEL, tiny_gpt2), "README.md", "exec"), {})
    assert "'train_loss'" in capsys.readouterr().out


def test_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 250


def test_the_links_of_readme_lead_to_files():
    text = README.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert len(links) > 20
    for link in links:
        assert (README.parent / link).exists(), link
