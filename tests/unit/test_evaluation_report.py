"""Pictures that are drawn of what they say, the same each time; and the report's text."""

import itertools
import json
import math

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from trl_ulma.evaluation import figures, report
from trl_ulma.evaluation.implicit_reward import CalibrationBin
from trl_ulma.evaluation.intervals import Estimate
from trl_ulma.evaluation.judges import Verdict
from trl_ulma.evaluation.pictures import training_log
from trl_ulma.evaluation.rates import rates

SHARES = rates([Verdict.WIN] * 50 + [Verdict.TIE] * 30 + [Verdict.LOSE] * 20)
SWEEP = {
    "ULMA": {0.01: Estimate(3.0, 2.0, 4.0, 3), 0.1: Estimate(2.0, 1.5, 2.5, 3)},
    "SFT": {0.01: Estimate(5.0, None, None, 1), 0.1: Estimate(4.0, None, None, 1)},
}
HISTORY = {
    "a": [{"step": i, "loss": 1 / (i + 1), "eval_loss": 0.5} for i in range(20)],
    "b": [{"step": i, "loss": 2 / (i + 1)} for i in range(20)],
}
BINS = [CalibrationBin(0.2, 0.1, 10), CalibrationBin(0.8, 0.9, 10)]
DRAWN = {
    "win_rates": lambda: figures.win_rates({"ULMA": SHARES, "base": SHARES}, "Harmless"),
    "sweep": lambda: figures.sweep(SWEEP, x_label="β", y_label="perplexity", title="β", log_x=True),
    "training": lambda: figures.training_curves(HISTORY, ["loss", "eval_loss"]),
    "labels": lambda: figures.label_histogram(np.array([0.0, 1.0, 1.0]), np.array([False, True, False])),
    "calibration": lambda: figures.calibration({"ULMA": BINS}),
}


def luminance(color) -> float:
    return float(np.dot(to_rgb(color), (0.2126, 0.7152, 0.0722)))


@pytest.mark.parametrize("name", DRAWN)
def test_a_picture_is_light_full_and_the_same_each_time(name, tmp_path, monkeypatch):
    contents = []
    for place, settings in (
        ("a", {}),
        ("b", {"figure.facecolor": "black", "axes.facecolor": "black", "font.size": 30}),
    ):
        (tmp_path / place).mkdir()
        with matplotlib.rc_context(settings):
            files = figures.save(DRAWN[name](), tmp_path / place, name)
        assert files == [f"{name}.png", f"{name}.svg"]
        contents.append([(tmp_path / place / file).read_bytes() for file in files])
    assert contents[0] == contents[1]
    picture = imread(tmp_path / "a" / f"{name}.png")[..., :3]
    assert (picture[0] == 1).all()
    assert (picture[:, 0] == 1).all()
    assert 0.5 < (picture == 1).all(-1).mean() < 0.99


def test_bars_are_as_long_as_their_shares():
    axes = DRAWN["win_rates"]().axes[0]
    bars = [patch for patch in axes.patches if patch.get_width() > 0]
    assert [round(bar.get_width(), 6) for bar in bars] == [0.5, 0.3, 0.2] * 2
    assert [bar.get_x() for bar in bars[:3]] == pytest.approx([0, 0.5, 0.8])
    low, high = axes.lines[0].get_xdata()
    assert (low, high) == (SHARES["win"].low, SHARES["win"].high)
    assert [text.get_text() for text in axes.texts[:3]] == ["50%", "30%", "20%"]
    assert len({bar.get_hatch() for bar in bars}) == 3


def test_lines_are_the_values_and_told_apart_without_colour():
    figure = DRAWN["sweep"]()
    axes = figure.axes[0]
    assert [list(line.get_ydata()) for line in axes.lines] == [[3, 2], [5, 4]]
    assert [round(float(x), 2) for x in axes.lines[0].get_xdata()] == [0.01, 0.1]
    assert len(axes.collections) == 1  # intervals where there are any
    segments = axes.collections[0].get_segments()
    assert [[segment[0, 1], segment[1, 1]] for segment in segments] == [[2, 4], [1.5, 2.5]]
    styles = [figures._line_style(i) for i in range(7)]
    assert len({(style["marker"], style["color"]) for style in styles}) == 7
    tones = sorted(luminance(style["color"]) for style in figures.VERDICT_STYLES.values())
    assert min(b - a for a, b in itertools.pairwise(tones)) > 0.2
    assert axes.get_xscale() == "log"


def test_histograms_count_all_rows():
    axes = DRAWN["labels"]().axes[0]
    assert sum(patch.get_height() for patch in axes.patches) == 3
    many = figures.label_histogram(np.linspace(-1, 1, 200), np.linspace(-1, 1, 200) > 0).axes[0]
    assert sum(patch.get_height() for patch in many.patches) == 200
    alone = figures.label_histogram(np.zeros(4), np.zeros(4, dtype=bool)).axes[0]
    assert [patch.get_height() for patch in alone.patches] == [4]


def test_calibration_stands_against_the_diagonal():
    diagonal, line = DRAWN["calibration"]().axes[0].lines
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata())
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([0.2, 0.8], [0.1, 0.9])


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: figures.win_rates({}, "x"), "win rates needs a model"),
        (lambda: figures.sweep({}, x_label="", y_label="", title=""), "a method at least, and a point for each"),
        (
            lambda: figures.sweep({"a": {0.0: Estimate(1, 1, 1, 1)}}, x_label="", y_label="", title="", log_x=True),
            "no place for 0.0",
        ),
        (lambda: figures.training_curves(HISTORY, ["nothing"]), "No run has logged nothing"),
        (lambda: figures.training_curves(HISTORY, []), "needs a metric"),
        (lambda: figures.label_histogram(np.zeros(0), np.zeros(0, dtype=bool)), "needs a row"),
        (lambda: figures.calibration({}), "calibration needs a model"),
    ],
)
def test_a_picture_of_nothing_is_refused(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()


# The report


def test_a_training_log_is_the_last_checkpoints(tmp_path):
    assert training_log(tmp_path) == []
    for step in (5, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        logs = [{"step": step, "loss": 1.0}]
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"log_history": logs}))
    assert training_log(tmp_path) == [{"step": 10, "loss": 1.0}]
    (tmp_path / "trainer_state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"trainer_state.json is no trainer state \(KeyError"):
        training_log(tmp_path)


def test_means_over_seeds_are_of_runs_with_one_name():
    def model(value):
        perplexity = {"demonstrations": Estimate(value, 0.0, 99.0, 10)}
        return {"perplexity": perplexity, "implicit_reward": {}, "judged": {"j": {"helpful": {"rates": SHARES}}}}

    found = report.over_runs(["a", "b", "a", "a"], [model(value) for value in (1.0, 50.0, 2.0, 3.0)])
    assert list(found) == ["a"]
    estimate = found["a"]["perplexity, demonstrations"]
    assert (estimate.value, estimate.n) == (2.0, 3)
    assert estimate.high - 2 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert found["a"]["j, helpful, win"] == Estimate(0.5, 0.5, 0.5, 3)


def test_the_commit_is_that_of_the_checkout(monkeypatch, tmp_path):
    found = report.commit()
    assert found is None or len(found.rstrip("+")) == 40
    monkeypatch.setattr(report, "__file__", str(tmp_path / "report.py"))
    assert report.commit() is None


def test_a_number_that_is_not_finite_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        report.write(tmp_path, {"figure": float("nan")}, {})
