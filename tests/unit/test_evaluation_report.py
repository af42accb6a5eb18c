"""Pictures that are drawn of what they say, the same each time; and the report's text."""

import base64
import copy
import functools
import itertools
import json
import math
import re
from argparse import Namespace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from scipy import stats
from world import make_rows

from trl_ulma.evaluation import figures, report
from trl_ulma.evaluation.document import Quote, Table, Text, to_html, to_markdown, to_text
from trl_ulma.evaluation.findings import changed, on_own_scale, surprises
from trl_ulma.evaluation.held_out import HeldOut
from trl_ulma.evaluation.implicit_reward import CalibrationBin, continuous_figures, split_figures
from trl_ulma.evaluation.intervals import Estimate
from trl_ulma.evaluation.judges import Verdict
from trl_ulma.evaluation.likelihoods import Likelihoods
from trl_ulma.evaluation.pictures import pictures, training_log
from trl_ulma.evaluation.rates import counts, rates
from trl_ulma.evaluation.report_seeds import over_runs
from trl_ulma.labels import LabelRules, parse_transform
from trl_ulma.predictions import alike, beyond_training

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
BY_LABEL = [
    {"label": 1.0, "rows": 9, "predicted": Estimate(2.0, 1.5, 2.5, 9)},
    {"label": 5.0, "rows": 9, "predicted": Estimate(4.0, None, None, 9)},
]
DRAWN = {
    "win_rates": lambda **page: figures.win_rates({"ULMA": SHARES, "base": SHARES}, "Harmless", **page),
    "sweep": lambda **page: figures.sweep(SWEEP, x_label="β", y_label="perplexity", title="β", log_x=True, **page),
    "training": lambda **page: figures.training_curves(HISTORY, ["loss", "eval_loss"], **page),
    "labels": lambda **page: figures.label_histogram(np.array([0.0, 1.0, 1.0]), np.array([False, True, False]), **page),
    "calibration": lambda **page: figures.calibration({"ULMA": BINS}, **page),
    "calibration_in_stars": lambda **page: figures.calibration({"ULMA": BINS}, own_scale=True, **page),
    "predicted": lambda **page: figures.predicted_by_label({"ULMA": BY_LABEL, "base": BY_LABEL}, **page),
}


def luminance(color) -> float:
    return float(np.dot(to_rgb(color), (0.2126, 0.7152, 0.0722)))


def contrast(one, other) -> float:
    """WCAG's ratio of two colors."""
    linear = [
        np.where((c := np.array(to_rgb(each))) <= 0.03928, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
        for each in (one, other)
    ]
    low, high = sorted(float(np.dot(each, (0.2126, 0.7152, 0.0722))) for each in linear)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.parametrize("dark", [False, True])
def test_all_that_is_written_and_drawn_can_be_read_on_its_page(name, dark):
    figure = DRAWN[name](dark=dark)
    figure.draw_without_rendering()  # which makes the ticks' labels
    paper = figure.get_facecolor()
    assert contrast(paper, figures.PAPER_DARK if dark else figures.PAPER) == pytest.approx(1)
    texts = [text for text in figure.findobj(matplotlib.text.Text) if text.get_text() and text.get_bbox_patch() is None]
    assert len(texts) > 8
    assert min(contrast(text.get_color(), paper) for text in texts) > 4.5
    lines = [line for axes in figure.axes for line in axes.get_lines()]
    assert all(contrast(line.get_color(), paper) > 2.2 for line in lines)


@pytest.mark.parametrize("dark", [False, True])
def test_lines_of_a_palette_are_told_from_the_page(dark):
    palette, paper = (figures.COLORS_ON_DARK, figures.PAPER_DARK) if dark else (figures.COLORS, figures.PAPER)
    assert len(set(palette)) == 7
    assert min(contrast(color, paper) for color in palette) > 2.2


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


@pytest.mark.parametrize(
    "name", ["_final", "$\\foo$", "a$b$c", "/home/somebody/experiments/ratings/seed-1/" * 3, "%s {x}", "a\nb"]
)
@pytest.mark.filterwarnings("error")
def test_each_model_is_named_in_pictures_whatever_its_name(name, tmp_path):
    for draw, names in (
        (lambda: figures.win_rates({name: SHARES, "b": SHARES}, f"Harmless\njudge: {name[:45]}"), 2),
        (lambda: figures.training_curves({name: HISTORY["a"], "b": HISTORY["b"]}, ["loss"]), 2),
        (lambda: figures.calibration({name: BINS, "b": BINS}), 3),
        (lambda: figures.predicted_by_label({name: BY_LABEL, "b": BY_LABEL}), 3),
    ):
        figure = draw()
        figures.save(figure, tmp_path, "picture")
        ticks = [label.get_text() for label in figure.axes[0].get_yticklabels()]
        shown = [text.get_text() for legend in figure.legends for text in legend.get_texts()] or ticks
        assert len(shown) == names
        assert any("".join(name.split()) in re.sub(r"[\s\u200b]", "", each) for each in shown)


def test_bars_are_as_long_as_their_shares():
    axes = DRAWN["win_rates"]().axes[0]
    bars = [patch for patch in axes.patches if patch.get_width() > 0]
    assert [round(bar.get_width(), 6) for bar in bars] == [0.5, 0.3, 0.2] * 2
    assert [bar.get_x() for bar in bars[:3]] == pytest.approx([0, 0.5, 0.8])
    low, high = axes.lines[0].get_xdata()
    assert (low, high) == (SHARES["win"].low, SHARES["win"].high)
    assert [text.get_text() for text in axes.texts[:3]] == ["50%", "30%", "20%"]
    assert len({bar.get_hatch() for bar in bars}) == 3


def test_lines_are_the_values_and_told_apart_without_color():
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


def test_predicted_labels_stand_at_their_labels():
    axes = DRAWN["predicted"]().axes[0]
    right, line, _ = axes.lines
    assert (list(right.get_xdata()), list(right.get_ydata())) == ([1, 5], [1, 5])
    assert list(line.get_ydata()) == [2, 4]
    assert list(line.get_xdata()) == pytest.approx([1, 5], abs=0.05)
    assert [[y for _, y in segment] for segment in axes.collections[0].get_segments()] == [[1.5, 2.5]]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "5"]


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
        (lambda: figures.predicted_by_label({}), "predicted labels needs a model"),
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

    found = over_runs(["a", "b", "a", "a"], [model(value) for value in (1.0, 50.0, 2.0, 3.0)])
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


# What a report says


@functools.cache
def models_of(rows, strength):
    """The facts of a model that was tuned on stars, and of its base, as `run` makes them."""
    rng = np.random.default_rng(0)
    rules = LabelRules("continuous", transform=parse_transform("standardize:3,1.4", "continuous"))
    stars = rng.integers(1, 6, rows).astype(float)
    label, prompt, continuous = rules.transform.apply(stars), np.arange(rows), np.ones(rows, dtype=bool)
    texts = [{"prompt": f"Question {i}", "completion": f" Answer | {i} <b>"} for i in range(rows)]
    models = []
    for name, reward in (("tuned", strength * label + rng.normal(size=rows)), ("m (base)", np.zeros(rows))):
        model = {
            "name": name,
            "source": "nowhere",
            "rows": rows,
            "ranked_rows": rows,
            "is_base": name != "tuned",
            "perplexity": {"demonstrations": Estimate(3.14159, 3.0, 3.3, rows)},
            "implicit_reward": continuous_figures(reward, label, prompt),
            "split": split_figures(reward, label, continuous, prompt, 0.0),
            "own_scale": on_own_scale(reward, stars, continuous, prompt, rules),
            "judged": {
                "j": {
                    "helpful": {
                        "counts": counts([Verdict.WIN] * 30 + [Verdict.REFUSED] * 3 + [Verdict.CUT]),
                        "rates": SHARES,
                        "points": None,
                        "unanswered": 1,
                        "unjudged": {"first": {"filtered": 2}, "second": {"cut": 1}},
                    }
                }
            },
        }
        models.append(model)
    models[0]["surprises"] = surprises(strength * label, label, stars, continuous, rules, texts, prompt)
    example = {"prompt": "Hi", "before": "<script>alert(1)</script>", "after": "# Hello!", "chosen": "Hi!"}
    models[0]["changed"] = {"base": "m (base)", "answers": 9, "others": 5, "examples": [example]}
    return models


def facts_of(rows=200, strength=0.5, judge_points=0.2):
    """The facts of an evaluation."""
    models = copy.deepcopy(models_of(rows, strength))
    points = Estimate(judge_points, judge_points - 0.1, judge_points + 0.1, rows)
    return {
        "settings": {"model": "nowhere"},
        "versions": {"trl": "1"},
        "commit": None,
        "data": {
            **{"dataset": "d", "split": "test", "rows": rows, "prompts": rows, "demonstrations": 0},
            **{"label_center": 3.0, "is_reversed": False},
        },
        "models": models,
        "judges": [
            {
                "judge": "j",
                "criterion": "helpful",
                "agreement": Estimate(0.8, 0.7, 0.9, 50),
                "replies": {"first": 60, "second": 40, "tie": 7},
                "comparisons": 60,
                "judged": 53,
                "orders_disagree": 12,
                "changes": ["temperature is left out"],
            }
        ],
        "differences": [
            {
                "judge": "j",
                "criterion": "helpful",
                "one": "tuned",
                "other": "m (base)",
                "points": points,
                "comparisons": 1,
            }
        ],
        "over_seeds": {},
        "notes": ["A note."],
        "not_drawn": ["labels (3 of 20 rows)"],
    }


def test_length_alone_is_a_row_of_the_table_of_rewards_and_one_per_tokenizer():
    facts = facts_of()
    for model in facts["models"]:
        model["length_alone"] = {"spearman": Estimate(0.25, 0.125, 0.375, 200)}
    text = to_markdown(report.document(facts | {"pictures": []}))
    main, details = text.split("<details>", 1)
    assert main.count("| length alone") == details.count("| length alone") == 1
    assert "| length alone | 0.250 [0.125, 0.375] | – |" in main
    assert "Length alone: the figures if answers are ranked by their number of tokens" in details
    facts["models"][1]["length_alone"] = {"spearman": Estimate(0.5, 0.4, 0.6, 200)}
    assert "| length alone, m (base) | 0.500 [" in to_markdown(report.document(facts | {"pictures": []}))


@pytest.mark.parametrize(
    ("difference", "told"),
    [
        (Estimate(0.2, 0.1, 0.3, 200), "better than chance. Spearman"),
        (Estimate(0.2, 0.1, 0.3, 200), "It also ranks them better than their length does, by 0.200 [0.100, 0.300]."),
        (Estimate(0.1, -0.1, 0.3, 200), "was found (+0.100 [-0.100, +0.300]), so the model may have learned"),
        (Estimate(-0.2, -0.3, -0.1, 200), "Their length ranks them better than it does (-0.200 [-0.300, -0.100])."),
        (Estimate(0.0, None, None, 200), ""),
        (None, ""),
    ],
)
def test_the_conclusion_says_whether_the_model_ranks_better_than_length(difference, told):
    facts = facts_of()
    facts["models"][0]["over_length"] = {"spearman": difference} if difference else {}
    (said, *_) = report.conclusions(facts)
    assert "better than chance" in said
    assert told in said
    assert ("length" in said) == bool(told)
    facts["models"][0]["implicit_reward"]["spearman"] = Estimate(0.1, -0.1, 0.3, 200)
    assert "length" not in report.conclusions(facts)[0]  # nothing better than chance to compare


@pytest.mark.parametrize(("learned", "is_told"), [(0.1, True), (1.0, False), (4.0, False), (0.0, False)])
def test_rewards_of_a_short_training_are_said_to_be_too_close_to_one_another(learned, is_told):
    random = np.random.default_rng(0)
    stars, prompt = random.integers(1, 6, 120).astype(float), np.arange(120) // 2
    rules = LabelRules("continuous", transform=parse_transform("standardize:3,2", "continuous"))
    reward = learned * (rules.transform.apply(stars) + random.normal(0, 0.2, 120))
    facts = facts_of()
    facts["models"][0]["own_scale"] = on_own_scale(reward, stars, np.ones(120, bool), prompt, rules)
    text = to_markdown(report.document(facts | {"pictures": []}))
    told = "The predicted labels of the model are too close to one another: where two of them differ by 1, the labels "
    told += "differ by 9."
    assert (told in text) == is_told
    are_few = is_told or not learned
    assert ("mostly the labels farthest from the mean. The list does not point to mistakes" in text) == are_few
    assert ("Check these labels for mistakes first" in text) == (not are_few)
    # A model that cannot know the labels is right to predict nearly the mean
    noise = on_own_scale(np.full(120, 0.1) + random.normal(0, 0.01, 120), stars, np.ones(120, bool), prompt, rules)
    facts["models"][0]["own_scale"] = noise
    text = to_markdown(report.document(facts | {"pictures": []}))
    assert "too close to one another" not in text
    said = (
        "hardly better than the mean label of the evaluated rows, so these are mostly the labels farthest from the mean"
    )
    assert said in text


def test_noise_of_a_correlation_does_not_fill_its_axis():
    logs = [{"step": step, "eval_rewards/spearman": 0.73 + 0.001 * (step % 3), "loss": 0.73} for step in range(9)]
    spearman, loss = figures.training_curves({"run": logs}, ["eval_rewards/spearman", "loss"]).axes
    assert np.diff(spearman.get_ylim()) == pytest.approx(0.2)
    assert np.mean(spearman.get_ylim()) == pytest.approx(0.731)
    assert np.diff(loss.get_ylim()) < 0.2
    small = [{"step": step, "eval_loss": 0.7528 + 0.0001 * step, "kl": 0.001 * step} for step in range(4)]
    loss, kl = figures.training_curves({"run": small}, ["eval_loss", "kl"]).axes
    assert np.diff(loss.get_ylim()) == pytest.approx(0.05 * 0.753, rel=1e-3)
    assert np.diff(kl.get_ylim()) < 0.004
    wide = [{"step": step, "rewards/auc": step / 10} for step in range(9)]
    assert np.diff(figures.training_curves({"run": wide}, ["rewards/auc"]).axes[0].get_ylim()) > 0.8


@pytest.mark.parametrize(("learned", "rows", "is_told"), [(0.3, 60, True), (0.3, 20, False), (1.0, 60, False)])
def test_scores_that_are_too_close_to_one_another_are_told(learned, rows, is_told):
    random = np.random.default_rng(0)
    stars = random.integers(1, 6, rows).astype(float)
    predicted = 3 + learned * (stars - 3) + random.normal(0, 0.05, rows)
    said = alike(predicted - 3, predicted, stars)
    assert (said is not None) == is_told
    slope = f"where two of them differ by 1, the labels differ by {np.polyfit(predicted, stars, 1)[0]:.1f} on average"
    assert said is None or f"too close to one another: {slope}" in said
    assert alike(predicted - 3, predicted, random.permutation(stars)) is None  # the mean is the best to predict then


@pytest.mark.parametrize(
    ("trained_on", "rows", "ends"),
    [
        (0, "the 40 held-out rows", " `trl-ulma evaluate` gives its interval."),
        (
            7,
            "the 40 rows",
            " This includes 7 that were trained on; `trl-ulma evaluate` measures held-out ones.",
        ),
        (None, "the 40 rows", " `trl-ulma evaluate` gives its interval."),
    ],
)
def test_the_order_of_predictions_that_are_nearly_alike_is_measured(trained_on, rows, ends):
    random = np.random.default_rng(0)
    stars, noise = random.integers(1, 6, 40).astype(float), random.normal(0, 1, 40)
    for sign in (1, -1):
        predicted = 3 + 0.01 * (sign * stars + noise)
        said = alike(predicted - 3, predicted, stars, trained_on=trained_on)
        assert f"The predicted labels of {rows} are nearly alike" in said
        order = f"{stats.spearmanr(predicted, stars).statistic:.2f}".replace("-", "−")
        ranked = f"Their order has a rank correlation of {order} with that of the labels (Spearman; 0 by chance)."
        assert said.endswith(ranked + ends)
    likes = (stars > 3).astype(float)
    predicted = 0.5 + 0.001 * (likes + noise)
    said = alike(predicted - 0.5, predicted, likes, continuous=False, trained_on=trained_on)
    wins = stats.mannwhitneyu(predicted[likes == 1], predicted[likes == 0]).statistic
    area = wins / (likes.sum() * (1 - likes).sum())
    assert (
        f"Their order puts a good answer above a bad one with a probability of {area:.2f} (AUC; 0.5 by chance).{ends}"
        in said
    )


def test_tables_are_the_records_digit_for_digit(tmp_path):
    facts = facts_of()
    drawings, _ = pictures(facts["models"], np.arange(200.0), np.zeros(200, dtype=bool))
    report.write(tmp_path, facts, drawings)
    record = json.loads((tmp_path / "report.json").read_text())
    text = (tmp_path / "report.md").read_text()
    page = (tmp_path / "report.html").read_text().replace("\xa0", " ")  # which keeps intervals on one line
    for model in record["models"]:
        of_rewards = [(each, ".3f") for each in model["split"].values()]
        of_rewards += [(each["predicted"], ".2f") for each in model["own_scale"]["by_label"]]
        of_rewards += [(model["own_scale"][name], ".2f") for name in ("error", "error_of_mean")]
        for figure, form in (
            (model["perplexity"]["demonstrations"], ".2f"),
            *((each, ".3f") for each in model["implicit_reward"].values()),
            *([] if model.get("is_base") else of_rewards),
        ):
            known = report.shown(Estimate(**figure), form)
            assert known in text
            assert known in page
    for each in record["models"][0]["surprises"]:
        row = f" | {each['label']:g} | {each['predicted']:.2f} | 3.00 | Question {each['row']} |"
        assert re.search(rf"\| row {each['row']}( \(counted from 0\))?{re.escape(row)}", text)
    assert len(record["models"][0]["surprises"]) == 10
    # Both models in each table, but for those of rewards, which are 0 before training
    for heading in ("## Main figures", "## Helpful"):
        section = text.split(heading)[1].split("\n## ")[0]
        assert "tuned" in section
        assert "m (base)" in section
    for heading, has_base in (
        *[("More figures: rewards and labels", True), ("More figures: perplexity of the given answers", True)],
        ("Rows at or above the mean label of the training rows, and below", False),
        ("More figures: predicted labels", False),
        ("More figures: calibration", False),
    ):
        section = text.split(f"<summary>{heading}</summary>")[1].split("</details>")[0]
        assert "tuned" in section
        assert ("m (base)" in section) == has_base
    assert record["pictures"] == ["labels", "calibration", "predicted-labels", "verdicts-1-helpful"]
    whose = "the mean label of the training rows"
    assert f"The mean reward of rows with a label of 3 ({whose}) or above, and of the others." in text
    assert "| model | at or above | below | difference | accuracy, all rows |" in text
    assert "3 refused, 1 cut" in text
    assert "| tuned | the model's answer first | 2 | filtered |" in text
    assert "60.0% of them name the one shown first" in text
    assert "temperature is left out" in text


def test_a_reader_sees_the_main_figures_first_and_opens_the_others(tmp_path):
    facts = facts_of() | {"command": "trl-ulma evaluate --model 'my model'", "how_read": ["Labels are read as stars."]}
    facts["judges"], facts["differences"], facts["not_drawn"] = [], [], ["labels (3 of 20 rows)"]
    facts["data"]["left_out"] = {"invalid: stars is empty": 2}
    drawings, _ = pictures(facts["models"], np.arange(200.0), np.zeros(200, dtype=bool))
    report.write(tmp_path, facts, drawings)
    page = (tmp_path / "report.html").read_text()
    sections = ("More pictures", "The most surprising labels", "Answers before and after", "Settings")
    parts = ("better than chance", "<h2>Main figures", "<summary>What the figures", "<img")
    places = [page.index(each) for each in (*parts, *(f"<summary>{section}" for section in sections))]
    assert places == sorted(places)
    assert "<details open" not in page
    closed = re.findall(r"<details>.*?</details>", page, re.S)
    assert len(closed) == page.count("<details>") > 5
    hidden, shown = "".join(closed), re.sub(r"<details>.*?</details>", "", page, flags=re.S)
    assert "2 left out. Brackets hold 95% intervals." in shown
    for told in (
        "Labels are read as stars.",
        "<pre><code>trl-ulma evaluate --model 'my model'</code></pre>",
        "Versions: trl 1.<",
        "2 rows were left out.",
        "Pictures that need more data: labels",
        "(bootstrap over prompts)",
    ):
        assert told in hidden
        assert told not in shown
    assert "commit" not in page  # it is not known
    assert "@media print { details:not([open])::details-content { content-visibility: visible" in page
    report.write(tmp_path, facts | {"commit": "abc"}, {})
    assert "Versions: trl 1; commit abc." in (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "report.json").read_text())["settings"] == {"model": "nowhere"}


def test_likes_are_split_into_chosen_and_rejected_rows_and_reversed_stars_at_their_mean():
    facts = facts_of() | {"pictures": []}
    facts["data"]["is_reversed"] = True
    text = to_markdown(report.document(facts))
    assert "<summary>Rows at or below the mean label of the training rows, and above</summary>" in text
    facts["data"]["is_training_center"] = False
    text = to_markdown(report.document(facts))
    assert "<summary>Rows at or below the mean label of the evaluated rows, and above</summary>" in text
    assert "Good and bad: a label at or below the mean label of the evaluated rows (3) is good." in text
    assert "| model | at or below | above |" in text
    facts["data"]["label_center"] = None
    text = to_markdown(report.document(facts))
    assert "<summary>More figures: rewards of chosen and rejected rows</summary>" in text
    assert "| model | chosen | rejected |" in text


class Page(HTMLParser):
    """The tags of a page, and what it loads from elsewhere."""

    def __init__(self):
        super().__init__()
        self.tags, self.loaded = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loaded += [value for name, value in attrs if name in ("src", "href", "srcset")]


def test_the_page_is_one_file_that_runs_nothing(tmp_path):
    facts = facts_of()
    drawings, _ = pictures(facts["models"], np.arange(200.0), np.zeros(200, dtype=bool))
    report.write(tmp_path, facts, drawings)
    text = (tmp_path / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert len(page.loaded) == 2 * len(facts["pictures"])
    for value in page.loaded:
        kind, content = value.split(",")
        assert kind == "data:image/svg+xml;base64"
        assert base64.b64decode(content).startswith(b"<?xml")
    assert len(set(page.loaded)) == len(page.loaded)  # a dark one beside each light one
    assert page.tags.count("table") == len(re.findall(r"^\| :--", (tmp_path / "report.md").read_text(), re.M))
    markdown = (tmp_path / "report.md").read_text()
    assert "<script>" not in markdown
    assert "> \\# Hello!" in markdown
    assert 'srcset="calibration-dark.png"' in markdown
    assert (tmp_path / "calibration-dark.png").is_file()


@pytest.mark.parametrize(
    ("rows", "strength", "said"),
    [
        (15, 0.5, "15 prompts are too few for a conclusion about how well the model ranks answers. Use 30 or more. "),
        (2, 0.5, "2 prompts are too few for a conclusion about how well the model ranks answers. Use 30 or more. "),
        (200, 0.0, "Nothing can be concluded about how well the model ranks answers. "),
        (200, 0.5, "The model's reward ranks answers better than chance. "),
        (200, -0.5, "The model's reward ranks answers worse than chance. "),
    ],
)
def test_what_can_be_concluded_is_said_first(rows, strength, said):
    facts = facts_of(rows, strength)
    sentence = report.conclusions(facts)[0]
    assert sentence.startswith(f"{said}Spearman's correlation of reward and label (1: the same order, 0: chance) is ")
    figure = facts["models"][0]["implicit_reward"].get("spearman")
    s = "s" if rows > 1 else ""
    ends = "" if figure.low is None else f" [{figure.low:.3f}, {figure.high:.3f}]"
    where = {"Nothing": " includes 0", "better": " is above 0", "worse": " is below 0"}
    where = f"{ends}{next((each for word, each in where.items() if word in said), '')}"
    if rows < 30:
        where = f" is{ends}"
    interval = f" The 95% interval{where}." if ends else ""
    assert f"is {figure.value:.3f} on {rows} row{s} of {rows} prompt{s}.{interval}" in sentence
    parts = report.document({**facts, "pictures": []})
    assert next(part.text for part in parts if isinstance(part, Text) and part.strong) == sentence
    is_open = "includes" in sentence
    for is_short in (False, True):
        parts = report.document({**facts, "pictures": [], "judges": []}, is_short=is_short)
        assert any("What to do next: " in part.text for part in parts if isinstance(part, Text)) == is_open


def test_one_model_is_the_model_and_several_have_their_names(tmp_path):
    facts = facts_of(strength=0.0)
    facts["models"][0] |= {"accuracy_in_training": 0.9, "trained_on": 0, "length_alone": {}}
    report.write(tmp_path, facts, {})
    text = (tmp_path / "report.md").read_text()
    sentences = "\n".join(line for line in text.splitlines() if not line.startswith("|"))
    assert sentences.count("tuned") == 1  # in the title
    assert "tuned" not in report.in_terminal(facts | {"judges": []}).split("\n\nmodel")[0]
    assert "Nothing can be concluded about how well the model ranks held-out answers." in text
    assert "The model's answers do better than before training. The difference in points" in text
    assert "the model has learned the training rows" in text
    assert "| tuned |" in text
    other = copy.deepcopy(facts["models"][0]) | {"name": "other"}
    facts["models"].append(other)
    text = to_markdown(report.document(facts | {"pictures": []}))
    for each in (
        "tuned: nothing can be concluded about how well it ranks held-out answers. Spearman's correlation of reward "
        "and label (1: the same order, 0: chance) is",
        "other: nothing can be concluded about how well it ranks held-out answers. Spearman's correlation of reward "
        "and label is",
        "tuned: its answers do better than those of m (base).",
        "tuned has learned the training rows",
        "<summary>The most surprising labels, for the model tuned</summary>",
        "<summary>Answers before and after training, for the model other: 5 of 9 answers changed</summary>",
        "After, by other:",
    ):
        assert each in text


@pytest.mark.parametrize(
    ("own", "said"),
    [
        (
            0.9,
            "because the model has learned the training rows: its reward tells good from bad in 90% of them, and "
            "in 51% of the rows here.",
        ),
        (0.5, "train for more epochs, or with 3 times the learning rate. The model has learned little: its reward"),
        (None, "What to do next: rate answers to more prompts"),
    ],
)
def test_an_open_evaluation_has_one_advice_by_what_was_learned_in_training(own, said):
    facts = facts_of(200, 0.0)
    facts["models"][0] |= {"accuracy_in_training": own, "split": {"accuracies": Estimate(0.51, 0.4, 0.6, 200)}}
    texts = [part.text for part in report.document({**facts, "pictures": []}) if isinstance(part, Text)]
    [text] = [text for text in texts if "to do next" in text]
    assert said in text
    assert ("more epochs" in text.replace("no more epochs", "")) == (own != 0.9)


def test_an_open_comparison_of_answers_says_nothing_against_a_reward_that_ranks_well():
    facts = facts_of(200, 0.5)
    facts["models"][0] |= {"accuracy_in_training": 0.5, "split": {"accuracies": Estimate(0.6, 0.5, 0.7, 200)}}
    facts["differences"][0]["points"] = Estimate(0.0, -0.1, 0.1, 200)
    assert facts["models"][0]["implicit_reward"]["spearman"].low > 0
    said = report.what_next(facts)
    assert "rate answers to more prompts" in said
    assert "learned little" not in said


def test_the_middle_of_an_order_is_not_called_a_mean():
    facts = facts_of(200, 0.5)
    for transform, called in (("quantile,center", "middle"), ("standardize", "mean")):
        facts["data"] |= {"label_transform": transform, "label_center": 2.3}
        text = to_markdown(report.document(facts | {"pictures": []}))
        assert f"the {called} label of the training rows (2.3)" in text


def test_a_figure_without_an_interval_is_not_said_to_include_chance():
    facts = facts_of(200, 0.5)
    facts["models"][0]["implicit_reward"]["spearman"] = Estimate(1.0, None, None, 200)
    sentence = report.conclusions(facts)[0]
    assert sentence.startswith("Nothing can be concluded about how well the model ranks answers: there is no interval,")
    assert "includes" not in sentence


@pytest.mark.parametrize("missing", ["all", "spearman"])
def test_a_model_whose_rewards_rank_nothing_has_a_conclusion_too(missing):
    facts = facts_of(200, 0.5)
    figures = facts["models"][0]["implicit_reward"]
    for name in list(figures) if missing == "all" else ["spearman"]:
        del figures[name]
    said = "Nothing can be concluded about how well the model ranks answers, because all labels are on one side, or all"
    assert report.conclusions(facts)[0].startswith(said) == (missing == "spearman")  # without rewards, a note says why


@pytest.mark.parametrize(("liked", "ranked"), [((0.0, 1.0, 0.5), 2), ((1.0, 1.0, 0.5), 5), ((), 5)])
def test_the_rows_of_a_conclusion_are_those_of_its_figure(liked, ranked):
    kinds = ["binary"] * len(liked) + ["continuous"] * 5
    rows = make_rows(len(kinds), label=[*liked, 1.0, 2.0, 3.0, 4.0, 5.0], label_type=kinds)
    held_out = HeldOut.of(rows, "test", LabelRules("continuous"))
    reading = SimpleNamespace(held_out=held_out, how=SimpleNamespace(rules=LabelRules("continuous")), center=3.0)
    likelihoods = Likelihoods(Namespace(seed=0), reading, print, Path)
    found = likelihoods._of_rewards(np.arange(len(rows)) / 7, None, np.arange(len(rows)), None)
    assert found["ranked_rows"] == ranked


def test_a_judge_is_counted_by_what_it_has_judged():
    facts = facts_of()
    facts["judges"][0]["agreement"] = Estimate(1.0, 0.6, 1.0, 6)
    text = to_markdown(report.document({**facts, "pictures": []}))
    shown = text.split("<summary>More figures")[0]
    more = text.split("<summary>More about the judge: j, helpful</summary>")[1]
    assert "which are too few to show that it is above chance: no ranking is claimed" in shown
    assert "disagree in 12 of 53 comparisons with both verdicts" in more


def test_the_seen_rows_are_part_of_the_conclusion():
    facts = facts_of(200, 0.5)
    for trained_on, said in ((0, "reward ranks held-out answers better"), (3, "reward ranks answers better")):
        facts["models"][0]["trained_on"] = trained_on
        sentence = report.conclusions(facts)[0]
        assert said in sentence
        assert ("Training saw the prompts of 3 rows." in sentence) == (trained_on > 0)


def test_of_long_answers_the_part_is_shown_in_which_they_differ():
    same, rest = "The same words. " * 60, " and so on" * 90
    texts = [f"{same}{word}{rest}" for word in ("yes", "no")]
    found = changed(["Hi"], texts[:1], texts[1:], ["Good."])
    (example,) = found["examples"]
    assert found["others"] == 1
    for name, word in (("before", "yes"), ("after", "no")):
        assert f"words. {word} and so on" in example[name]
        assert 580 <= len(example[name]) <= 602
        assert re.fullmatch(r"…(words\.|same|The) .* (and|so|on)…", example[name])
    facts = facts_of(5)
    facts["models"][0]["changed"] = {"base": "base", **found}
    quotes = [part.text for part in report.document({**facts, "pictures": []}) if isinstance(part, Quote)]
    assert "(the same)" not in quotes
    # Answers of the usual length are whole
    whole = changed(["Hi"], ["a" * 599], ["a" * 598 + "b"], ["Good."])["examples"][0]
    assert (whole["before"], whole["after"]) == ("a" * 599, "a" * 598 + "b")


@pytest.mark.parametrize(
    ("points", "said"),
    [
        (0.2, "The model's answers do better than before training. "),
        (0.05, "Nothing can be concluded about whether the model's answers do better than before training. "),
        (-0.2, "The model's answers do worse than before training. "),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_judged_answers_are_concluded_from_against_the_base(points, said, turned):
    facts = facts_of(judge_points=points)
    if turned:  # the base can be the first of the two
        found = facts["differences"][0]
        estimate = found["points"]
        turned_points = Estimate(-estimate.value, -estimate.high, -estimate.low, estimate.n)
        facts["differences"] = [{**found, "one": "m (base)", "other": "tuned", "points": turned_points}]
    sentence = report.conclusions(facts)[1]
    assert sentence.startswith(said)
    assert f"The difference in points per prompt (1 for a win, ½ for a tie) is {points:+.3f} on 200 prompts" in sentence
    assert f"The 95% interval [{points - 0.1:+.3f}, {points + 0.1:+.3f}] " in sentence


def test_differences_of_several_runs_say_that_they_are_corrected():
    facts = facts_of(judge_points=0.2)
    assert "Bonferroni" not in report.conclusions(facts)[1]
    facts["differences"] = [each | {"comparisons": 3} for each in facts["differences"]]
    assert "judge j, corrected for 3 comparisons (Bonferroni)" in report.conclusions(facts)[1]


def test_stars_are_shown_as_stars():
    rules = LabelRules("continuous", transform=parse_transform("lower_is_better:0,standardize:-3,2", "continuous"))
    stars, prompt, continuous = np.array([1.0, 2.0, 5.0]), np.arange(3), np.ones(3, dtype=bool)
    label = rules.transform.apply(stars)
    found = on_own_scale(label, stars, continuous, prompt, rules)
    assert found["error"].value == pytest.approx(0)
    assert [(each["label"], each["predicted"].value) for each in found["by_label"]] == [
        (star, pytest.approx(star)) for star in (1, 2, 5)
    ]
    half = on_own_scale(np.zeros(3), stars, continuous, prompt, rules)  # a reward that says nothing is the mean
    assert [each["predicted"].value for each in half["by_label"]] == [3, 3, 3]
    assert half["error_of_mean"].value == pytest.approx(np.abs(stars - stars.mean()).mean())
    assert (half["slope"], found["slope"].value) == (None, pytest.approx(1))
    # Stars that no training row had are stars, too, though the transform takes them for the last that it knows
    ranks = LabelRules("continuous", transform=parse_transform("quantile", "continuous").fit(np.arange(1.0, 5.0)))
    rows = make_rows(4, label=[0, 1, 2, 9], label_type=["continuous"] * 3 + ["binary"])
    with pytest.raises(ValueError, match="outside"):
        HeldOut.of(rows, "test", ranks)
    rows = make_rows(4, label=[0, 1, 7, 1], label_type=["continuous"] * 3 + ["binary"])
    held_out = HeldOut.of(rows, "test", ranks)
    assert held_out.own_label.tolist() == [0, 1, 7, 1]
    assert held_out.label.tolist() == [0.125, 0.125, 0.875, 1]
    said = beyond_training(held_out.own_label[:3], ranks)
    assert said.startswith("2 of 3 labels are outside the range of the training labels, 1 to 4.")
    assert beyond_training(np.array([1.0, 4.0]), ranks) is None
    # Votes have no way back
    votes = LabelRules("binary", transform=parse_transform("votes:1,1,lower_is_better", "binary"))
    held_out = HeldOut.of(make_rows(2, label=[1, 2]).add_column("trials", [2, 2]), "test", votes)
    assert held_out.own_label.tolist() == [0.5, 0.75]
    assert held_out.label.tolist() == [0.5, 0.25]


def test_many_labels_are_shown_in_tenths():
    rng = np.random.default_rng(0)
    label = rng.normal(size=500)
    found = on_own_scale(label, label, np.ones(500, bool), np.arange(500), LabelRules("continuous"))
    assert [each["rows"] for each in found["by_label"]] == [50] * 10
    assert all(each["label"] == pytest.approx(each["predicted"].value) for each in found["by_label"])


def test_the_most_surprising_rows_come_first():
    texts = [{"prompt": [{"role": "user", "content": f"Q{i}"}], "completion": "x" * 1000} for i in range(30)]
    reward = np.linspace(-3, 3, 20)
    numbers = np.arange(10, 30)  # the first ten were left out
    found = surprises(reward, np.ones(20), np.ones(20), np.zeros(20, bool), LabelRules(), texts, numbers)
    assert [each["row"] for each in found] == list(range(10, 20))
    assert found[0]["prompt"] == "User: Q10"
    assert len(found[0]["answer"]) < 310
    assert found[0]["surprise"] == pytest.approx(np.log(1 + np.exp(3)))
    mixed = surprises(reward, np.ones(20), np.ones(20), np.arange(20) < 15, LabelRules(), texts, numbers)
    assert {each["row"] for each in mixed} <= set(range(10, 25))


def test_the_name_of_a_row_is_not_broken_within_a_word():
    page = to_html([Table(["row", "answer"], [["answers.csv, line 161", "x" * 900]], is_text=True)], Path())
    style = page.split("@media (max-width")[0]
    breaking = [rule.split("{")[0] for rule in style.split("}") if "overflow-wrap: anywhere" in rule]
    selectors = [selector.strip() for rule in breaking for selector in rule.split(",")]
    assert ".text td:not(:first-child)" in selectors  # a long answer does not widen the page
    assert not {"td", ".text td", "td:first-child", ".text td:first-child", "table", ".text", "body"} & set(selectors)


def test_rows_that_were_left_out_are_counted_and_the_first_are_named(tmp_path):
    facts = facts_of()
    facts["data"] |= {
        "left_out": {"invalid: stars is empty": 2},
        "invalid_rows": ["answers.csv, line 161: stars is empty; it must be a number, true or false."],
    }
    facts["models"][0] |= {
        "left_out": 1,
        "left_out_reasons": {"its prompt alone fills max_length": 1},
        "left_out_rows": ["answers.csv, line 9"],
    }
    report.write(tmp_path, facts, {})
    text = (tmp_path / "report.md").read_text()
    for part in (
        "2 rows were left out. Reason: invalid: stars is empty (2 rows).",
        "- answers.csv, line 161: stars is empty; it must be a number, true or false.",
        "tuned: 1 row was left out. Reason: its prompt alone fills max_length (1 row). The first: answers.csv, line 9.",
    ):
        assert f"\n\n{part}\n\n" in text
    assert "line 161: stars is empty" in (tmp_path / "report.html").read_text()
    report.write(tmp_path, facts_of(), {})
    assert "left out" not in (tmp_path / "report.md").read_text().replace("temperature is left out", "")


def test_pictures_of_too_few_points_are_not_drawn(tmp_path):
    facts = facts_of(rows=15)
    for model in facts["models"]:
        model["judged"]["j"]["helpful"]["rates"] = rates([Verdict.WIN] * 5)
    drawn, not_drawn = pictures(facts["models"], np.arange(15.0), np.zeros(15, dtype=bool))
    assert drawn == {}
    assert not_drawn == [
        "labels (15 of 20 rows)",
        "calibration (15 of 100 rows)",
        "predicted labels (15 of 20 rows)",
        "verdicts (5 of 20 comparisons)",
    ]
    report.write(tmp_path, facts | {"not_drawn": not_drawn}, drawn)
    assert "Pictures that need more data: labels (15 of 20 rows); calibration" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("width", [60, 80, 100])
def test_a_terminal_shows_the_figures_within_its_width(tmp_path, width):
    facts = facts_of()
    facts["models"][0]["surprises"][0]["answer"] = "a \x1b[31mred\n answer " * 9
    report.write(tmp_path, facts, {})
    text = report.in_terminal(facts, width)
    assert max(map(len, text.splitlines())) <= width
    assert text.startswith("The model's reward ranks ")
    words = " ".join(text.split())
    for model in facts["models"]:
        assert report.shown(model["implicit_reward"].get("spearman")) in words
        assert report.shown(model["own_scale"]["error"], ".2f") in words
    assert "\nHelpful: " in text
    others = ("Settings", "Versions", "A note.", "Pictures", "&lt;", "| ", "Before, by", "most surprising")
    for left_out in (*others, "alibration", "pearson", "Training logs these figures", "mean label", "Training changed"):
        assert left_out not in text.replace("Answer | ", "")


def short_facts():
    """The facts of an evaluation that concludes nothing, without judges."""
    facts = facts_of(strength=0.0) | {"judges": [], "differences": [], "notes": []}
    facts["models"][0] |= {
        "length_alone": {"spearman": Estimate(0.25, 0.125, 0.375, 200)},
        "accuracy_in_training": 0.9,
        "trained_on": 0,
    }
    facts["models"][1]["name"] = "SmolLM2-135M-Instruct (base)"
    return facts


def test_the_terminal_shows_a_report_on_one_screen():
    text = report.in_terminal(short_facts(), 80)
    assert "What to do next: " in text
    assert "\nlength alone" in text
    assert text.count("\n") <= 18 - 2  # the command adds an empty line and where the page is
    assert len(text.split()) <= 130 - 8
    # The rows that were left out are always shown
    facts = short_facts()
    facts["models"][0]["left_out"] = 3
    assert "3 left out for tuned. Brackets hold 95% intervals." in " ".join(report.in_terminal(facts, 80).split())


def seen_words(page: str) -> list[str]:
    """The words that a browser shows before a reader opens a section. Sections are not nested."""
    body = page.split("<body>")[1]
    closed = re.sub(r"<details>\s*(<summary>.*?</summary>).*?</details>", r"\1", body, flags=re.S)
    return re.sub(r"<[^>]+>", " ", closed).split()


def test_a_page_shows_what_a_decision_needs_and_the_rest_in_closed_sections(tmp_path):
    facts = short_facts()
    drawings, _ = pictures(facts["models"], np.arange(200.0), np.zeros(200, dtype=bool))
    report.write(tmp_path, facts, drawings)
    page = (tmp_path / "report.html").read_text()
    assert len(seen_words(page)) <= 220
    shown = re.sub(r"<details>.*?</details>", "", page, flags=re.S)
    assert shown.count("<table") == 1
    assert shown.count("<img") == shown.count('<img alt="Bar chart of verdicts') == 1
    assert page.count("<img") == len(facts["pictures"]) > 2


def test_a_picture_has_a_sentence_on_what_to_look_at_and_its_numbers_in_words(tmp_path):
    facts = facts_of()
    facts["models"][0]["source"] = str(tmp_path)
    logs = [{"step": step, "loss": 1 / step, "eval_loss": 0.5} for step in (1, 2, 4)]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": logs}))
    stars = np.repeat([1.0, 5.0], [150, 50])
    drawings, _ = pictures(facts["models"], stars, np.zeros(200, dtype=bool))
    report.write(tmp_path, facts, drawings)
    page, text = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    names = ["labels", "training", "calibration", "predicted-labels", "verdicts-1-helpful"]
    assert facts["pictures"] == names
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert len(captions) == len(names)
    for caption in captions:
        assert re.fullmatch(r"[A-Z][^.]*\.", caption), "one sentence"
        assert caption in text
    said = re.findall(r'<img alt="([^"]*)"', page)
    assert said == re.findall(r'<img alt="([^"]*)"', text)
    verdicts, labels, training, calibrated, predicted = said  # the one that says most comes first
    assert labels == "Bar chart of the labels. 200 rows: 150 rows with label 1, 50 rows with label 5."
    assert "loss: 1 at step 1, 0.25 at step 4. eval_loss: 0.5 at step 1, 0.5 at step 4." in training
    first, groups = facts["models"][0]["own_scale"]["calibration"][0], facts["models"][0]["own_scale"]["by_label"]
    assert f"the model after training: {first.predicted:.2f} for {first.observed:.2f}, " in calibrated
    for each in groups:
        assert f"{report.shown(each['predicted'], '.2f')} for label {each['label']:g}" in predicted
    assert "the model before training: 3.00" in predicted
    assert "the model after training: win 50.0%, tie 30.0%, lose 20.0% of 100 comparisons." in verdicts
    assert "how strict the rater" not in page
    facts["models"][0]["own_scale"]["knows_raters"] = True
    caption = pictures(facts["models"], stars, np.zeros(200, dtype=bool))[0]["predicted-labels"].caption
    assert caption.endswith("than the line before training; all predictions include how strict the rater of a row is.")
    # Legends say who is who
    names = [text.get_text() for text in drawings["predicted-labels"].draw().legends[0].get_texts()]
    assert names == ["perfect prediction", "the model after training", "the model before training"]


def test_words_for_a_picture_cannot_break_out(tmp_path):
    facts = facts_of()
    facts["models"].append(copy.deepcopy(facts["models"][0]) | {"name": '"><b>\n\nx'})
    drawings, _ = pictures(facts["models"], np.arange(200.0), np.arange(200) < 20)
    report.write(tmp_path, facts, drawings)
    page, text = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    assert "<b>" not in page
    (said,) = [each for each in re.findall(r'<img alt="([^"]*)"', page) if "predicted label" in each]
    assert "&quot;&gt;&lt;b&gt; x: " in said
    assert "tuned: " in said
    assert said in text
    (said,) = [each for each in re.findall(r'<img alt="([^"]*)"', page) if "of the labels" in each]
    assert "20 demonstrations: labels from 0 to 19, half of them from 4.75 to 14.25, median 9.5." in said
    assert "180 other rows: labels from 20 to 199" in said


@pytest.mark.parametrize(("words", "space"), [(" many words", " "), (" 字", ""), ("\nlines", " ")])
def test_texts_are_cut_between_words(words, space):
    text = "Question" + words * 400
    rows = [{"prompt": text, "completion": text}]
    zeros = np.zeros(1)
    (found,) = surprises(zeros, zeros, zeros, zeros.astype(bool), LabelRules(), rows, [0])
    (example,) = changed([text], [f"Yes. {text}"], [f"No. {text}"], [text])["examples"]
    known = set(f"Yes. No. {text}".split())
    for each in (found["prompt"], found["answer"], *example.values()):
        assert len(each) <= 602
        assert "…" in each
        assert set(each.replace("…", " ").split()) <= known
    # A text without spaces is cut at the limit
    (found,) = surprises(
        zeros, zeros, zeros, zeros.astype(bool), LabelRules(), [{"prompt": "字" * 900, "completion": "x"}], [0]
    )
    assert len(found["prompt"]) == 301


def test_rows_have_their_line_or_a_number_that_says_how_it_is_counted():
    facts = facts_of()
    rows = facts["models"][0]["surprises"]
    for number, each in enumerate(rows[:-3]):
        each["file_line"] = f"a.csv, line {number + 2}"
    text = to_markdown(report.document(facts | {"pictures": []}))
    names = re.findall(r"^\| ([^|]*) \| [0-9.]* \| [0-9.]* \| 3.00 \|", text, re.M)
    assert names[:-3] == [f"a.csv, line {number + 2}" for number in range(len(rows) - 3)]
    assert names[-3:] == [f"row {rows[-3]['row']} (counted from 0)", *(f"row {each['row']}" for each in rows[-2:])]
    assert text.count("counted from 0") == 1
    assert "numbered from 0" not in text


def test_text_is_in_columns_of_letters_of_any_width():
    lines = to_text([Table(["model", "auc"], [["模型", "0.5"], ["é", "0.75"]])]).splitlines()
    assert lines == ["model   auc", "模型    0.5", "é      0.75"]
    block = to_text([Table(["row", "label", "answer"], [["1", "5", "one two three four"]], is_text=True)], 16)
    assert block.splitlines() == ["row 1", "  label: 5", "  answer", "    one two", "    three four"]


def test_one_row_is_one_row():
    facts = facts_of(2)
    facts["models"][0]["implicit_reward"]["spearman"] = Estimate(1.0, None, None, 1)
    facts["models"][0]["ranked_rows"] = facts["data"]["rows"] = facts["data"]["prompts"] = 1
    text = report.in_terminal(facts, 200)
    assert "1 prompt is too few for a conclusion about how well the model ranks answers. Use 30 or more." in text
    assert "is 1.000 on 1 row of 1 prompt." in text
    text = to_markdown(report.document(facts | {"pictures": []}))
    assert "1 row of 1 prompt from d (test). Brackets hold 95% intervals." in text


def test_the_terminal_shows_what_the_data_and_the_judges_make_of_interest():
    facts = facts_of()
    assert "perplexity" not in report.in_terminal(facts)  # nothing is imitated
    text = to_markdown(report.document(facts | {"pictures": []}))
    assert "<summary>More figures: perplexity of the given answers</summary>" in text
    assert "95% intervals (bootstrap over prompts, Wilson for shares)." in text
    facts["judges"], facts["data"]["demonstrations"] = [], 3
    assert "perplexity of demonstrations" in report.in_terminal(facts)
    assert "200 prompts from d (test), 3 of them demonstrations. Brackets" in report.in_terminal(facts, 200)
    assert "95% intervals (bootstrap over prompts)." in to_markdown(report.document(facts | {"pictures": []}))
    for model in facts["models"]:  # without rewards, it is all that is known
        model |= {"implicit_reward": {}, "split": {}, "own_scale": None}
    facts["data"]["demonstrations"] = 0
    assert "perplexity of demonstrations" in report.in_terminal(facts)


def test_answers_that_training_did_not_change_are_shown_last():
    found = changed(["a", "b", "c", "d"], ["1", "2", None, "4"], ["1", "x", "y", "z"], list("efgh"), 3)
    assert [(each["prompt"], each["after"]) for each in found["examples"]] == [("b", "x"), ("d", "z"), ("a", "1")]
    assert (found["answers"], found["others"]) == (3, 2)
    facts = facts_of()
    facts["models"][0]["changed"] = {"base": "m (base)", **found}
    text = to_text(report.document(facts | {"pictures": []}))
    assert "Answers before and after training: 2 of 3 answers changed" in text
    assert "Training changed 2 of 3 answers of m (base)." in text
    assert "After training:\n  (the same)" in text


def test_cells_and_quotes_cannot_break_out():
    parts = [Table(["a"], [["x|y\n<i>`z`"]]), Quote("Q", "1. a\n\n> b"), Text("`<ok>` & <no>")]
    text = to_markdown(parts)
    assert "| x\\|y &lt;i>`z` |" in text
    assert "> 1\\. a" in text
    shown = to_markdown([Quote("Q", "![x](http://a) **b** `c`"), Table(["a", "b"], [["x", "<![y](z)|"]], is_text=True)])
    assert "> !\\[x\\](http://a) \\*\\*b\\*\\* \\`c\\`" in shown
    assert "| &lt;!\\[y\\](z)\\| |" in shown
    assert "`<ok>` &amp; &lt;no>" in text
    page = to_html(parts, None)
    assert '<td data-label="a">x|y\n&lt;i&gt;<code>z</code></td>' in page
    assert "<code>&lt;ok&gt;</code> &amp; &lt;no&gt;" in page


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_cell_of_several_lines_is_one_line_of_a_markdown_table(end):
    # Markdown ends a line, and with it the table, also at a carriage return, as in texts from Windows
    written = to_markdown([Table(["row", "answer"], [["1", f"one{end}two"]], is_text=True)])
    assert written.splitlines()[-1] == "| 1 | one two |"
