"""The label report says whether labels differ by a column that is not read, such as that of raters."""

import numpy as np
import pytest

from trl_ulma.labels import raters_in_words
from trl_ulma.scripts.cli import main

NAMES = ("mira", "tom", "jo")


def ratings(shift: float, rows: int = 120, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    """Ratings from 1 to 5 by three people, of whom one is stricter than another by twice the shift."""
    random = np.random.default_rng(seed)
    who = random.integers(0, 3, rows)
    label = np.clip(np.round(3 + shift * np.array([1, -1, 0])[who] + random.normal(0, 1, rows)), 1, 5)
    return label, [NAMES[each] for each in who]


def test_strict_raters_are_named_with_their_means_also_beside_a_typing_mistake():
    label, who = ratings(0.7)
    (said,) = raters_in_words(label, {"who": who})
    means = {name: label[np.array(who) == name].mean() for name in NAMES}
    listed = ", ".join(f"{name} {mean:.3g}" for name, mean in sorted(means.items(), key=lambda each: each[1]))
    assert said.startswith(f"Labels differ by the column who, which is not read: {listed} on average. ")
    wrong = np.r_[label, 500.0]
    (again,) = raters_in_words(wrong, {"who": [*who, "tom"]})
    assert f"tom {means['tom']:.3g}" in again
    assert raters_in_words(np.full(120, np.nan), {"who": who}) == []


def test_raters_who_are_alike_are_hardly_ever_named():
    assert sum(len(raters_in_words(*_as_columns(0.0, seed))) for seed in range(300)) <= 3
    assert sum(len(raters_in_words(*_as_columns(0.7, seed))) for seed in range(50)) >= 48


def _as_columns(shift: float, seed: int) -> tuple[np.ndarray, dict[str, list[str]]]:
    label, who = ratings(shift, seed=seed)
    return label, {"who": who}


@pytest.mark.parametrize(
    "values",
    [
        ["same"] * 120,
        [f"each {i}" for i in range(120)],  # texts, times
        [None] * 120,
        ["rare"] * 7 + ["others"] * 113,
        [[i] for i in range(120)],
    ],
)
def test_columns_that_name_nobody_say_nothing(values):
    assert raters_in_words(np.r_[np.ones(7), 2 + np.arange(113) % 3], {"column": values}) == []


@pytest.mark.parametrize(
    ("column", "values", "is_told"),
    [
        ("who", ("tom", "mira"), True),
        ("rater_id", (7, 9), True),
        ("helpfulness", (0, 4), False),  # another rating
        ("label_type", ("continuous", "continuous"), False),
    ],
)
def test_check_looks_at_columns_that_are_not_read(tiny_gpt2, tmp_path, capsys, column, values, is_told):
    lines = [f"Why {i}?,answer {i},{1 + i % 3 + 2 * (i % 2)},{values[i % 2]}" for i in range(60)]
    (tmp_path / "rows.csv").write_text("\n".join([f"prompt,completion,label,{column}", *lines, ""]))
    argv = ["--model", tiny_gpt2, "--dataset", str(tmp_path / "rows.csv"), "--label_type", "continuous"]
    assert main(["check", "--method", "pointwise-dpo", *argv, "--bf16", "false"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    told = f"! Labels differ by the column {column}, which is not read: {values[0]} 2, {values[1]} 4"
    assert (told in said) == is_told
    assert ("Labels differ" in said) == is_told


def test_numbers_beside_empty_cells_name_raters():
    label = np.array([1.0, 2.0] * 10 + [4.0, 5.0] * 10)
    (said,) = raters_in_words(label, {"who": [17.0] * 19 + [None] + [23.0] * 20})
    assert "17 1.47, 23 4.5 on average" in said
    assert raters_in_words(label, {"share": [0.5] * 20 + [0.7] * 20}) == []
