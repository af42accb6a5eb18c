"""The label report, held to numbers worked out by hand."""

import json
import time
from itertools import pairwise

import numpy as np
import pytest

from trl_ulma.evaluation.figures import label_histogram
from trl_ulma.labels import label_report, render_report
from trl_ulma.labels.outliers import outliers, tail_share


def report_of(label, continuous=False, sft_mask=False, **kwargs):
    n = len(label)
    columns = {"prompt": np.zeros(n, dtype=int), "answer": np.arange(n), "tokens": np.ones(n, dtype=int)}
    flags = [np.broadcast_to(np.asarray(flag, dtype=bool), n) for flag in (continuous, sft_mask)]
    return label_report(
        np.array(label, dtype=float), *flags, **{name: np.array(v) for name, v in columns.items()} | kwargs
    )


def test_counts_by_class_and_type():
    report = report_of([1, 1, 0.5, 0, -2, 3], [0, 0, 0, 0, 1, 1], [1, 0, 0, 0, 0, 1])
    assert report["rows"] == 6
    assert report["demonstrations"] == pytest.approx(1 / 3, rel=1e-5)
    assert report["binary"]["classes"] == {"1": 2, "between": 1, "0": 1}
    assert report["continuous"]["classes"] == {"demonstrations": 1, "others": 1}
    assert (report["binary"]["mean"], report["continuous"]["mean"]) == (0.625, 0.5)
    assert report["continuous"]["std"] == 2.5
    assert "continuous" not in report_of([1, 0])
    assert "binary" not in report_of([1, 0], True)


def test_few_labels_are_counted_one_by_one_with_weight_and_length():
    report = report_of([2, 2, 5], True, weight=np.array([0.5, 1.0, 3.0]), tokens=np.array([10, 20, 40]))
    assert report["continuous"]["histogram"] == [
        {"low": 2.0, "high": 2.0, "rows": 2, "weight": 1.5, "tokens": 15.0},
        {"low": 5.0, "high": 5.0, "rows": 1, "weight": 3.0, "tokens": 40.0},
    ]


def test_many_labels_are_counted_in_bins_that_hold_all_rows():
    label = np.random.default_rng(0).normal(size=1000)
    tokens = np.arange(1000)
    bins = report_of(label, True, tokens=tokens)["continuous"]["histogram"]
    counts, edges = np.histogram(label, 10)
    assert [each["rows"] for each in bins] == counts.tolist()
    assert [each["low"] for each in bins] == edges[:-1].tolist()
    assert sum(each["rows"] * each["tokens"] for each in bins) == pytest.approx(tokens.sum(), rel=1e-4)


def test_a_length_bias_is_a_warning_in_its_direction():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 500)
    tokens = 100 + 50 * label + rng.integers(0, 60, 500)
    report = report_of(label, tokens=tokens)
    expected = np.corrcoef(label, tokens)[0, 1]
    assert report["binary"]["length_correlation"] == pytest.approx(expected, rel=1e-5)
    assert any("Better answers are longer (correlation of binary label and tokens +0." in w for w in report["warnings"])
    assert any("are shorter (correlation" in w for w in report_of(1 - label, tokens=tokens)["warnings"])
    fair = report_of(label, tokens=rng.integers(0, 60, 500))
    assert not any("Better answers" in warning for warning in fair["warnings"])
    assert report_of([1, 1])["binary"]["length_correlation"] is None

    def advice(**given):
        (told,) = [w for w in report_of(label, tokens=tokens, **given)["warnings"] if "Better" in w]
        return told.split("lengths")[1]

    assert 100 < tokens.mean() < 249
    times = f"{round(tokens.mean(), -2):.0f} times as large, the mean number of tokens."
    assert advice() == f", or compare with length_normalize=True and β about {times}"
    assert advice(length_normalize=True) == "."

    def warns_of_groups(report):
        return any("group_by_length" in warning for warning in report["warnings"])

    assert not warns_of_groups(report)
    assert warns_of_groups(report_of(label, tokens=tokens, groups_lengths=True))
    assert not warns_of_groups(report_of(label, tokens=rng.integers(0, 60, 500), groups_lengths=True))


def test_targets_are_what_log_ratios_are_drawn_to():
    report = report_of([1.0, -1.0, 0.5], True, beta=0.1, log_z=2.0)
    u = np.array([10 - 2, -10 - 2, 5 - 2])
    targets = report["continuous"]["targets"]
    assert targets["rms"] == pytest.approx(np.sqrt((u**2).mean()), rel=1e-5)
    assert (targets["median"], targets["max"], targets["above_50"]) == (8, 12, 0)
    by_row = report_of([1.0, -1.0, 0.5], True, beta=0.1, log_z=np.array([0.0, 10.0, 0.0]))
    assert by_row["continuous"]["targets"]["max"] == 20
    unknown = report_of([1.0, -1.0, 0.5], True, beta=0.1, log_z=None)
    assert unknown["continuous"]["targets"]["max"] == 10
    assert "without log Z" in render_report(unknown)
    assert "without log Z" not in render_report(report)


def test_targets_outside_1_to_50_nats_are_warned_of_with_a_beta_that_is_better():
    assert report_of([1.0, -1.0], True, beta=0.1)["warnings"] == []
    assert report_of([1.0, -1.0], True, beta=1.0)["warnings"] == []
    assert report_of([1.0, -1.0], True, beta=0.02)["warnings"] == []
    (low,) = report_of([1.0, -1.0], True, beta=2.0)["warnings"]
    assert "are 0.5 nats in root mean square, below 1" in low
    assert low.endswith("With beta=0.1 it would be 10.")
    (high,) = report_of([4.0, -4.0, 1.0], True, beta=0.05)["warnings"]
    assert high.startswith("2 target log-ratios (z − c)/β above 50 nats, up to 80")
    assert high.endswith("With beta=0.33 it would be 10.")
    (nothing,) = report_of([0.0, 0.0], True)["warnings"]
    assert nothing.endswith("There is little to learn at beta=0.1.")


def test_weights_and_shares():
    report = report_of([1, 1, 0, 0], sft_mask=[1, 0, 0, 0], weight=np.array([3.0, 1.0, 0.0, 2.0]))
    weight = report["weight"]
    assert (weight["min"], weight["median"], weight["max"], weight["zero"]) == (0, 1.5, 3, 1)
    assert weight["demonstrations"] == 0.5
    assert weight["effective_rows"] == pytest.approx(36 / 14, rel=1e-5)
    assert "50.0% of weights" in render_report(report)
    assert "of weights" not in render_report(report_of([1, 0]))
    (line,) = (line for line in render_report(report).splitlines() if line.lstrip().startswith("1 █"))
    assert line.split() == ["1", "█" * 24, "2", "50.0%", "66.7%", "1"]


def test_repeated_and_contradicting_rows():
    #              a     a     a     b     b     c: of another type
    label = [1.0, 1.0, 0.0, 1.0, 1.0, 0.5]
    report = report_of(label, [0, 0, 0, 0, 0, 1], answer=np.array([7, 7, 7, 9, 9, 9]))
    # The two rows of the other answer whose labels agree, and the three of the first one: no row counts twice
    assert (report["repeated"], report["contradicting"]) == (2, 3)
    assert any(warning.startswith("3 rows contradict one another") for warning in report["warnings"])
    assert report_of([1, 0, 0.5])["contradicting"] == 0
    later = report_of([1, 1, 1, 0, 0, 1], answer=np.array([5, 5, 6, 6, 7, 7]))
    assert (later["repeated"], later["contradicting"]) == (1, 4)
    apart = report_of([1, 0, 0, 1], [0, 1, 0, 1], answer=np.array([5, 5, 6, 6]))
    assert apart["contradicting"] == 0


def test_repeated_and_contradicting_rows_are_named_with_their_own_labels():
    learned = [-1.0, 1.0, 0.0, 1.0, 1.0, -1.0]
    stars = np.array([1.0, 5.0, 3.0, 5.0, 5.0, 1.0])
    answer = np.array([9, 7, 9, 8, 8, 7])
    names = ["a.csv, line 2", "a.csv, line 3", "b.csv, line 2", "b.csv, line 3", "b.csv, line 4", "b.csv, line 5"]
    report = report_of(learned, True, answer=answer, raw=stars, transform="standardize", named=names.__getitem__)
    (warning,) = (each for each in report["warnings"] if "contradict" in each)
    assert warning.startswith(
        "4 rows contradict one another: the same prompt and completion with different labels, a.csv, line 2 (1) and "
        "b.csv, line 2 (3); a.csv, line 3 (5) and b.csv, line 5 (1). This is expected"
    )
    shown = " ".join(render_report(report).split())
    assert "repeated 1 row, which is kept: b.csv, line 3 and line 4 contradicting 4 rows" in shown
    many = report_of(np.tile([1, 0], 7), answer=np.repeat(np.arange(7), 2))
    (warning,) = (each for each in many["warnings"] if "contradict" in each)
    assert "labels, row 0 (1) and row 1 (0); row 2 (1)" in warning
    assert "row 8 (1) and row 9 (0); …. This" in warning
    shown = " ".join(render_report(many).split())
    assert "contradicting 14 rows" in shown
    assert "repeated" not in shown
    alike = report_of(np.ones(14), answer=np.repeat(np.arange(7), 2))
    assert "row 8 and row 9; …" in " ".join(render_report(alike).split())


def test_repeated_and_swapped_pairs_are_named_once():
    def shown_of(label: list[float], answer: list[int]) -> str:
        report = report_of(label, answer=np.array(answer), named=lambda row: f"row {row // 2}")
        return " ".join(render_report(report).split())

    good, bad = [1.0, 0.0], [0.0, 1.0]
    assert "repeated 2 rows, which are kept: row 0 and row 1 balanced" in shown_of(good * 2, [1, 2] * 2)
    swapped = shown_of(good + bad, [1, 2] * 2)
    assert "different labels, row 0 (1) and row 1 (0). This" in swapped
    five = shown_of(good * 10, [pair * 2 + half for pair in range(5) for _ in range(2) for half in (0, 1)])
    assert "row 8 and row 9 balanced" in five


def test_answers_per_prompt():
    prompts = np.repeat(np.arange(5), [1, 2, 4, 5, 20])
    report = report_of(np.tile([1, 0], 16), prompt=prompts)["prompts"]
    assert (report["count"], report["mean_answers"], report["max_answers"]) == (5, 6.4, 20)
    assert report["with_answers"] == {"1": 1, "2": 1, "3–4": 1, "5–8": 1, "17 or more": 1}


def test_labels_of_a_half_are_counted():
    assert "undecided 2 rows with a label of ½, which accuracy and AUC leave out" in " ".join(
        render_report(report_of([1, 0, 0.5, 0.5])).split()
    )
    assert "undecided" not in render_report(report_of([1, 0, 0.4]))


def test_class_weights_balance_the_classes_and_keep_the_whole():
    label, weight = np.array([1, 1, 1, 0, 0.5]), np.array([2.0, 1.0, 4.0, 1.0, 1.0])
    report = report_of(label, weight=weight)
    advice = report["binary"]["class_weights"]
    desirable = advice["desirable_weight"] * weight[label >= 0.5].sum()
    undesirable = advice["undesirable_weight"] * weight[label < 0.5].sum()
    assert desirable == pytest.approx(undesirable, rel=1e-3)
    assert desirable + undesirable == pytest.approx(weight.sum(), rel=1e-3)
    assert any("weigh 8 to 1. To balance them, set desirable_weight=0.5625" in each for each in report["warnings"])
    assert not report_of(label, weight=weight, class_weights=(0.5625, 4.5))["warnings"]
    assert not report_of([1, 1, 1, 1, 0, 0, 0])["warnings"]
    assert report_of([1, 1, 1, 0, 0])["warnings"]
    assert report_of([1, 1])["binary"]["class_weights"] is None


def test_text_has_80_columns_at_most_and_json_holds_all():
    rng = np.random.default_rng(0)
    n = 5000
    continuous = np.arange(n) % 2 == 0
    report = label_report(
        np.where(continuous, rng.normal(size=n) * 1e3, rng.integers(0, 2, n)),
        continuous,
        rng.random(n) < 0.1,
        prompt=rng.integers(0, 100, n),
        answer=rng.integers(0, 900, n),
        tokens=rng.integers(1, 9999, n),
        weight=rng.random(n) * 1e6,
        log_z=None,
    )
    text = render_report(report, "a-data-set")
    assert max(map(len, text.split("\n"))) <= 80
    assert text.startswith("Labels of the a-data-set dataset: 5,000 rows, 100 prompts\n")
    assert "████████████████████████" in text
    for warning in report["warnings"]:
        assert warning.split()[0] in text
    assert json.loads(json.dumps(report)) == report


def test_it_takes_seconds_for_as_many_rows_as_hh_has():
    rng = np.random.default_rng(0)
    n = 320_000
    start = time.process_time()
    label_report(
        rng.normal(size=n),
        np.ones(n, dtype=bool),
        rng.random(n) < 0.1,
        prompt=rng.integers(-(2**62), 2**62, n),
        answer=rng.integers(-(2**62), 2**62, n),
        tokens=rng.integers(1, 999, n),
    )
    assert time.process_time() - start < 10


def test_what_a_log_z_of_0_would_learn_is_a_warning():
    def said(label, continuous=False, **kwargs):
        found = report_of(label, continuous, **kwargs)["warnings"]
        return [each for each in found if "log_z" in each]

    (share,) = said([1, 1, 1, 0], log_z=0.0)
    assert "good and bad ones weigh 3 to 1. With log_z=0 the model mostly learns that share." in share
    assert "good and bad ones weigh 0.33 to 1" in said([0, 0, 0, 1], log_z=0.0)[0]
    assert said([1, 1, 1, 0, 0], log_z=0.0) == []
    assert said([1, 1, 1, 1], log_z=0.0) == []  # a class alone cannot be taken off
    assert said([1, 1, 1, 0], log_z=1.5) == said([1, 1, 1, 0], log_z=None) == []
    assert said([1, 1, 1, 0], log_z=0.0, class_weights=(1, 3)) == []
    assert len(said([1, 0], log_z=0.0, weight=np.array([1.0, 4.0]))) == 1
    # What is imitated is not compared
    assert said([1, 1, 1, 0], sft_mask=[1, 1, 0, 0], log_z=0.0) == []

    (shift,) = said([1, 2, 3], True, log_z=0.0)
    assert "Continuous labels are 2 on average, 2.4 standard deviations from 0" in shift
    assert "asks every answer to become more likely" in shift
    assert "to become less likely" in said([-1, -2, -3], True, log_z=0.0)[0]
    assert said([-1, 0, 2], True, log_z=0.0) == said([1, 2, 3], True, log_z=None) == []


# The user's scale beside the one that is learned


def test_labels_are_shown_on_both_scales():
    raw = np.repeat([1.0, 2.0, 3.0, 4.0, 5.0], [2, 2, 4, 6, 2])
    mean, std = raw.mean(), raw.std()
    report = report_of((raw - mean) / std, True, raw=raw, transform="standardize:3.25,1.2")["continuous"]
    assert report["raw"]["transform"] == "standardize:3.25,1.2"
    assert (report["raw"]["mean"], report["raw"]["std"]) == pytest.approx((mean, std), rel=1e-5)
    assert [each["low"] for each in report["raw"]["histogram"]] == [1, 2, 3, 4, 5]
    assert [each["rows"] for each in report["raw"]["histogram"]] == [2, 2, 4, 6, 2]
    for each, learned in zip(report["raw"]["histogram"], report["histogram"], strict=True):
        assert each["learned_low"] == each["learned_high"] == pytest.approx((each["low"] - mean) / std, rel=1e-5)
        assert learned["rows"] == each["rows"]
    whole = report_of((raw - mean) / std, True, raw=raw, transform="standardize:3.25,1.2")
    lines = render_report(whole).splitlines()
    assert lines[2] == f"continuous labels: 16 rows, mean {mean:.3g}, standard deviation {std:.3g}"
    assert lines[3] == "after standardize, (label − 3.25) / 1.2: mean 0, standard deviation 1"
    assert lines[4].split() == ["label", "→", "learned", "rows", "tokens"]
    assert [line.split()[:3] for line in lines[5:10]] == [
        [f"{label:g}", "→", f"{(label - mean) / std:+.2f}"] for label in (1, 2, 3, 4, 5)
    ]
    assert lines[8].split()[3:] == ["█" * 24, "6", "37.5%", "1"]
    assert json.loads(json.dumps(whole)) == whole


def test_labels_that_a_transform_spreads_are_shown_as_they_are_learned_too():
    # The same votes are another rate where more were cast
    raw, trials = np.array([1.0, 1.0, 3.0, 3.0]), np.array([2.0, 8.0, 4.0, 4.0])
    label = (raw + 1) / (trials + 2)
    report = report_of(label, raw=raw, transform="votes:1,1")
    first, second = report["binary"]["raw"]["histogram"]
    assert (first["learned_low"], first["learned_high"]) == (0.2, 0.5)
    assert second["learned_low"] == second["learned_high"] == pytest.approx(2 / 3, rel=1e-5)
    text = render_report(report)
    assert "1 → +0.20 … +0.50 ███" in text
    assert "binary labels as they are learned\n" in text
    # A threshold makes one label of several, which one table says
    raw = np.array([1.0, 2.0, 5.0])
    text = render_report(report_of([0, 0, 1], raw=raw, transform="threshold:4"))
    assert [f"{label} → {learned} " in text for label, learned in ((1, "0.00"), (2, "0.00"), (5, "+1.00"))] == [
        True
    ] * 3
    assert "as they are learned" not in text


def test_many_labels_have_bins_on_both_scales_in_80_columns():
    raw = np.random.default_rng(0).normal(3000, 400, 500)
    report = report_of(np.argsort(np.argsort(raw)) / 500, raw=raw, transform="quantile", weight=np.ones(500))
    bins = report["binary"]["raw"]["histogram"]
    assert sum(each["rows"] for each in bins) == 500
    kept = [each for each in bins if each["rows"]]
    assert all(a["learned_high"] < b["learned_low"] for a, b in pairwise(kept))
    assert max(map(len, render_report(report).splitlines())) <= 80


def test_without_a_transform_there_is_one_scale():
    assert "raw" not in report_of([1, 0])["binary"]
    # Rows of the type that the transform is not for
    report = report_of([1, 0, 0.5], [0, 0, 1], raw=np.array([np.nan, np.nan, 3.0]), transform="center:2.5")
    assert "raw" not in report["binary"]
    assert report["continuous"]["raw"]["mean"] == 3


def test_the_picture_shows_both_scales():
    raw = np.repeat([1.0, 4.0], [3, 5])
    both = label_histogram(raw - 2.5, raw > 3, raw=raw)
    before, after = both.axes
    assert (before.get_xlabel(), after.get_xlabel()) == ("label in the data", "label that is learned")
    assert [tick.get_text() for tick in before.get_xticklabels()] == ["1", "4"]
    assert [tick.get_text() for tick in after.get_xticklabels()] == ["-1.5", "1.5"]
    for axes in (before, after):
        assert sorted(bar.get_height() for bar in axes.patches if bar.get_height()) == [3, 5]
    (legend,) = both.legends
    assert [text.get_text() for text in legend.get_texts()] == ["demonstrations (5)", "other rows (3)"]
    assert len(label_histogram(raw, raw > 3).axes) == 1
    assert label_histogram(raw, raw > 3).legends
    assert not label_histogram(raw, raw > 9).legends  # no row is a demonstration, so that there is one kind


STARS = [1, 2, 3, 4, 5, 4, 3, 5, 1, 2, 4, 5]


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        ([*STARS, 55], [55]),
        ([*STARS * 2, 55, 11, -40], [-40, 11, 55]),
        ([*STARS, 999, 99], [99, 999]),
        ([*STARS * 2, 9], [9]),
        ([*STARS, 0, 6], []),
        ([*STARS, 8], []),
        ([*STARS, 55, 55, 55, 55], []),  # so many are a class of their own
        ([1] * 30 + [2] * 6 + [5], []),  # a rare value of the scale
        ([*STARS[:6], 55], []),  # too few to tell
        ([3] * 20 + [55], []),
        # Codes for "no answer"
        ([*STARS, *[99] * 6], [99] * 6),
        ([*STARS * 2, *[-99] * 4, *[9] * 3, 98], [-99] * 4 + [9] * 3 + [98]),
        ([0, 1] * 9 + [9] * 4, [9] * 4),
        ([*range(11)] * 2 + [99] * 4, [99] * 4),
        ([*range(1, 10)] * 3, []),
        ([0, 99] * 9, []),
        ([10, 50, 90, 99] * 9, []),
        ([*np.linspace(0, 1, 40), 7], [7]),
        ([*np.linspace(0, 1, 40), 5], []),
    ],
)
def test_labels_far_outside_the_others_are_found(labels, found):
    labels = np.array(labels, dtype=float)
    order = np.random.default_rng(0).permutation(len(labels))
    assert labels[order][outliers(labels[order])].tolist() == found


@pytest.mark.parametrize("kind", ["normal", "exponential", "lognormal", "stars", "poisson"])
@pytest.mark.parametrize("size", [40, 1000])
def test_few_samples_of_skewed_labels_have_labels_far_outside(kind, size):
    rng = np.random.default_rng(0)
    draw = {"stars": lambda size: rng.choice(5, size, p=[0.02, 0.02, 0.06, 0.1, 0.8]), "poisson": rng.poisson}
    draw = draw.get(kind) or getattr(rng, kind)
    assert sum(len(outliers(draw(size=size))) > 0 for _ in range(200)) <= 4


def test_labels_far_outside_are_named_with_their_rows():
    def warned(label, **settings):
        report = report_of(label, named=lambda row: f"ratings.csv, line {row + 2}", **settings)
        return [warning for warning in report["warnings"] if "far outside" in warning]

    said = "1 label is far outside the others, which are between 1 and 5: 55 (ratings.csv, line 14). Check for typing"
    (warning,) = warned([*STARS, 55], continuous=True)
    assert warning.startswith(said)
    (warning,) = warned([*STARS, *[99] * 6], continuous=True)
    assert warning.endswith("In surveys, such numbers mean that there is no answer: remove these rows.")
    assert "99 (ratings.csv, line 18), and 1 more." in warning
    # The label in the data counts, not what a transform makes of it
    raw = np.array([*STARS, 55.0])
    (warning,) = warned((raw > 3).astype(float), raw=raw, transform="threshold:4")
    assert warning.startswith(said)
    assert warned(raw, continuous=True, raw=raw, transform="votes:1,1") == []
    # Rows of another type do not count, and their positions do
    mixed = np.array([1.0, *STARS, 55.0, 0.0])
    (warning,) = warned(mixed, continuous=np.array([False] + [True] * 13 + [False]))
    assert "55 (ratings.csv, line 15)" in warning
    many = [*STARS * 60, *range(1000, 7000, 1000)]
    (warning,) = warned(many, continuous=True)
    assert warning.startswith("6 labels are far outside the others, which are between 1 and 5: 1000 (")
    assert "5000 (ratings.csv, line 726), and 1 more." in warning


def test_targets_out_of_reach_are_told_beside_a_label_far_outside():
    label = np.r_[np.tile([-2.0, -1.0, 0.0, 1.0, 2.0], 12), 40.0]
    for beta, is_told in ((0.1, False), (0.01, True)):  # at 0.01, all labels but 0 ask for 100 nats and more
        report = report_of(label, True, beta=beta)
        assert [warning for warning in report["warnings"] if "far outside" in warning] == report["outliers"] != []
        told = [warning for warning in report["warnings"] if "cannot move that far" in warning]
        assert bool(told) == is_told
        assert not told or told[0].startswith("48 target log-ratios")
        assert report["continuous"]["targets"]["max"] == pytest.approx(40 / beta)


@pytest.mark.parametrize("slope", [0.0, 3.0])
def test_what_is_usual_is_only_shown_in_detail(slope):
    random = np.random.default_rng(0)
    label = random.normal(size=60)
    tokens = np.round(20 + slope * label + random.normal(size=60)).astype(int)
    report = report_of(label, True, tokens=tokens, raw=3 + random.integers(0, 2, 60) + label / 9, transform="mine")
    detailed, brief = render_report(report), render_report(report, in_detail=False)
    for said in ("labels ask log π to move", "continuous labels as they are learned"):
        assert said in detailed
        assert said not in brief
    assert "label → learned" in brief
    assert "correlation of label and tokens" in detailed
    assert ("correlation of label and tokens" in brief) == bool(slope)
    assert {*brief.splitlines()} < {*detailed.splitlines()}


def counts(sigma: float, rows: int = 400) -> np.ndarray:
    """Numbers of likes: log-normal ones, rounded down."""
    return np.floor(10 * np.exp(np.random.default_rng(0).normal(0, sigma, rows)))


@pytest.mark.parametrize(
    ("label", "is_long"),
    [
        (counts(1.5), True),
        (np.minimum(counts(2.0), 10_000), True),
        (-counts(1.5), True),
        (np.where(np.arange(400) % 3, 0, counts(1.5)), True),
        (np.arange(101.0), False),
        (np.r_[np.arange(101.0), 330], False),  # which may be 33
        (np.random.default_rng(0).normal(size=2_000), False),
        (np.floor(-20 * np.log(np.linspace(1, 0.002, 500))), False),  # exponential
        (np.r_[[5.0] * 980, [1, 2, 3, 4] * 5], False),  # stars, most of which are the best
        (np.r_[[100.0] * 950, np.arange(50) * 2], False),  # of 100 points
        (counts(2.0, rows=40), False),  # too few to see it
        (np.r_[np.random.default_rng(0).normal(85, 4, 190).clip(70, 93), np.arange(10) * 2.0], False),  # of 100 points
        (np.array([5.0, 5.0]), False),
    ],
)
def test_labels_with_a_long_tail(label, is_long):
    assert (tail_share(label) is not None) == is_long


def test_the_warning_about_large_targets_names_the_transform_for_long_tails():
    likes = counts(2.0)
    standardized = (likes - likes.mean()) / likes.std()
    (said,) = [each for each in report_of(standardized, True, beta=0.1)["warnings"] if "above 50 nats" in each]
    assert said.endswith(
        "The root mean square is 10 at beta=0.1. A few of the labels have more than half of their variance. If their "
        'order is what counts, set label_transform="quantile,center".'
    )
    order = likes.argsort().argsort() / len(likes) - 0.5
    assert not any("above 50" in each or "variance" in each for each in report_of(order, True, beta=0.1)["warnings"])
