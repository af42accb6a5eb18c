"""The notebooks run with a tiny model in the place of theirs, and keep outputs that name no machine."""

import re
from pathlib import Path

import nbformat
import pytest
import transformers
from forks import python_path
from nbclient import NotebookClient
from packaging.version import Version
from world import trains_with_trl

NOTEBOOKS = Path(__file__).resolve().parents[2] / "examples" / "notebooks"
# What the cell tagged "parameters" is replaced by, besides MODEL
TINY = {
    "quickstart": "TRAIN_ROWS, TEST_ROWS = 16, 20\nLEARNING_RATE = 1e-3",
    "ratings_and_demonstrations": "RATED, DEMONSTRATIONS, TEST_ROWS = 12, 4, 20\nLEARNING_RATE = 1e-3",
    "from_dpo_to_ulma": "PAIRS, TEST_PAIRS = 8, 4\nLEARNING_RATE = 1e-3",
    "colab_t4": "ROWS, EPOCHS = 16, 1\nBATCH, ACCUMULATION = 4, 1",
    # With fewer rows, no thumb is up, and log_z="prior" needs both classes
    "qlora_7b": "ROWS = 32\nMAX_LENGTH = 256\nBATCH, ACCUMULATION = 4, 1",
}
SECONDS = 240
# Outputs a page long at most; a notebook of pictures weighs what its pictures do
LARGEST = 600_000


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def parameters(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    found = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(found) == 1
    return found[0]


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def pictures(notebook: nbformat.NotebookNode) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


def label_reports(notebook: nbformat.NotebookNode) -> set[str]:
    """The lines of all label reports without what the rows decide: numbers, bars, plurals and where a warning wraps."""
    lines: set[str] = set()
    for output in outputs(notebook):
        for report in re.findall(r"Labels of the .*?(?=\n+As JSON)", output.get("text", ""), re.S):
            report = re.sub(r"\n  (?=\S)", " ", report)
            report = re.sub(r"[-+]?\d[\d.,–%]*|\b(longer|shorter|more|less)\b|[█▏▎▍▌▋▊▉]+", "#", report)
            report = re.sub(r"(row|prompt)s", r"\1", report)
            lines |= {" ".join(line.split(";")[0].split()) for line in report.splitlines()}
    return lines


def test_these_are_all():
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(TINY)


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=trains_with_trl if each == "from_dpo_to_ulma" else ()) for each in TINY]
)
def test_a_notebook_runs_with_a_tiny_model(name, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", python_path())
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = read(name)
    drawn, kept = pictures(notebook), label_reports(notebook)
    cell = parameters(notebook)
    names = set(re.findall(r"^(\w[\w, ]*) =", cell.source, re.M))
    cell.source = f"from pathlib import Path\n\nMODEL = {tiny_llama!r}\n{TINY[name]}"
    assert names == set(re.findall(r"^(\w[\w, ]*) =", cell.source, re.M))
    NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert pictures(notebook) == drawn > 0
    # The kept report is in today's words. Other rows may have other warnings.
    today = label_reports(notebook)
    begun = {line[:20] for line in today}
    assert kept
    assert kept - {line for line in kept if line.startswith("!") and line[:20] not in begun} <= today
    # The SFT loss of an untrained model is so large that the trainer warns about it, and it tells no rows apart
    expected = ["The SFT term dominates", "rows are nearly alike"]
    if Version(transformers.__version__) < Version("5.19"):  # they also align a token that the tokenizer does not have
        expected.append("The tokenizer has new PAD/BOS/EOS tokens")
    said = [output.text for output in outputs(notebook) if output.get("name") == "stderr"]
    assert not [text for text in said if not any(each in text for each in expected)]


@pytest.mark.parametrize("name", TINY)
def test_a_notebook_says_what_it_teaches_and_ends_with_a_chat(name):
    cells = read(name).cells
    assert "**You will learn**" in cells[0].source
    assert "**It takes**" in cells[0].source
    assert cells[-2].source.startswith("## Chat with it")
    assert cells[-1].outputs


@pytest.mark.parametrize("name", TINY)
def test_a_notebook_measures_held_out_rows_with_an_interval(name):
    cells = read(name).cells
    measured = [i for i, cell in enumerate(cells) if "bootstrap(" in cell.source]
    assert measured
    printed = "".join(output.get("text", "") for cell in cells[measured[0] :] for output in cell.get("outputs", []))
    assert re.search(r"\d\.\d\d (?:\[|to )-?\d\.\d\d", printed)
    assert "95% interval" in "".join(cell.source for cell in cells)


@pytest.mark.parametrize("name", TINY)
def test_the_outputs_that_are_kept_are_clean(name):
    notebook = read(name)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    # The notebook explains this notice
    said = [output.text for output in outputs(notebook) if output.get("name") == "stderr"]
    assert not [text for text in said if "The SFT term dominates" not in text]
    text = nbformat.writes(notebook)
    assert len(text) < LARGEST
    found = re.findall(r"(?:/(?:tmp|home|root|work|usr|opt|Users)/|Warning)[^\"\\ ]*", text)
    assert not found


@pytest.mark.parametrize("name", ["colab_t4", "qlora_7b"])
def test_a_notebook_for_a_gpu_says_whose_outputs_it_has(name):
    assert "outputs below are those of a tiny model on a CPU" in nbformat.writes(read(name))
