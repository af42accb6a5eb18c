"""The comparison of the migration page runs, goes on where it was, and the page has its table."""

import json
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from transformers.utils import logging
from world import trains_with_trl

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def compare():
    sys.path.insert(0, str(DOCS))
    try:
        import compare_with_dpo
    finally:
        sys.path.remove(str(DOCS))
    return compare_with_dpo


@pytest.fixture
def run(compare, capsys):
    """Runs the script in this process, and returns what it prints."""
    verbosity, threads = logging.get_verbosity(), torch.get_num_threads()

    def run(*arguments: str) -> str:
        compare.main([*map(str, arguments)])
        return capsys.readouterr().out

    yield run
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()
    datasets.enable_progress_bars()
    torch.set_num_threads(threads)


@trains_with_trl
def test_the_trainers_are_compared_once_and_reported(tiny_llama, tmp_path, compare, run, capsys):
    arguments = ["--model", tiny_llama, "--output", tmp_path, "--seeds", "1", "--pairs"]
    printed = run(*arguments, 4)
    kept = json.loads((tmp_path / "swap.json").read_text())["runs"]
    assert list(kept) == list(compare.RUNS)
    first = {name: kept[name]["1"]["log"][0] for name in kept}
    assert all(log["loss/preference"] == 0.6931 for log in first.values())  # the policy is the reference
    assert all(log["rewards/margins"] == 0 for log in first.values())
    # The same pairs in every run: what the SFT term adds to the loss follows its weight
    heavy, light = (first[name]["loss"] - 0.6931 / 2 for name in list(kept)[2:])
    assert heavy == pytest.approx(10 * light, rel=1e-3)
    for name in kept:
        margin = 0.1 * np.mean(np.subtract(kept[name]["1"]["chosen"], kept[name]["1"]["rejected"]))
        (line,) = [line for line in printed.splitlines() if line.startswith(f"| {name} |")]
        assert f"| {margin:.2f} [" in line
    assert (tmp_path / "swap.png").stat().st_size > 10_000

    written = (tmp_path / "swap.json").stat().st_mtime_ns
    assert printed.endswith(run(*arguments, 4))
    assert (tmp_path / "swap.json").stat().st_mtime_ns == written
    with pytest.raises(SystemExit):
        run(*arguments, 6)
    assert "holds runs with other settings. Choose another --output, or delete it." in capsys.readouterr().err


def test_the_pages_table_is_that_of_the_kept_runs(compare):
    kept = json.loads((DOCS / "pictures" / "swap.json").read_text())
    assert kept["settings"] == {"model": "SmolLM2-135M-Instruct", "pairs": 20, **compare.SETTINGS}
    assert compare.complete(kept["runs"]) == [str(seed) for seed in compare.SEEDS]
    assert compare.table(kept["runs"]) in (DOCS / "migrating.md").read_text(encoding="utf-8")
