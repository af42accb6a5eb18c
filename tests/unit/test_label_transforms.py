"""Label transforms: what each makes, that it comes back, and what is refused."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import rankdata

from trl_ulma.labels import LabelRules, LabelTransform, parse_transform, raw_labels, read_labels, transform_labels

LABELS = np.array([4.0, 0.0, 1.0, 1.0, 3.0, 0.0])


def fitted(spec, labels=LABELS, label_type="continuous", **columns):
    return parse_transform(spec, label_type).fit(labels, **columns)


# What they make


@pytest.mark.parametrize(
    ("spec", "label_type", "expected"),
    [
        ("center", "continuous", LABELS - 1.5),
        ("center:3", "continuous", LABELS - 3),
        ("standardize", "continuous", (LABELS - 1.5) / np.sqrt(np.mean((LABELS - 1.5) ** 2))),
        ("standardize:1,2", "continuous", (LABELS - 1) / 2),
        ("min_max", "binary", LABELS / 4),
        ("min_max:-1,4", "binary", (LABELS + 1) / 5),
        ("lower_is_better", "continuous", -LABELS),
        ("lower_is_better:4", "continuous", 4 - LABELS),
        ("threshold:1", "binary", [1, 0, 1, 1, 1, 0]),
        ("threshold:1,lower_is_better", "binary", [0, 1, 0, 0, 0, 1]),
        ("center,threshold:0", "binary", [1, 0, 0, 0, 1, 0]),
        ("lower_is_better,min_max", "binary", 1 - LABELS / 4),
        ("lower_is_better,standardize", "continuous", -(LABELS - 1.5) / LABELS.std()),
        ("quantile", "binary", (rankdata(LABELS) - 0.5) / 6),
        ("lower_is_better,quantile", "binary", 1 - (rankdata(LABELS) - 0.5) / 6),
    ],
)
def test_each_makes_what_it_says(spec, label_type, expected):
    assert fitted(spec, label_type=label_type).apply(LABELS) == pytest.approx(np.array(expected))


def test_lower_is_better_leaves_no_negative_zero():
    assert not np.signbit(fitted("lower_is_better").apply(np.array([0.0])))[0]


def test_votes_are_the_posterior_mean_of_a_rate():
    votes, trials = np.array([0.0, 3.0, 10.0]), np.array([0.0, 4.0, 10.0])
    rates = fitted("votes", votes, "binary", trials=trials).apply(votes, trials)
    assert rates == pytest.approx([1 / 2, 4 / 6, 11 / 12])
    rates = fitted("votes:0.5,2", votes, "binary", trials=trials).apply(votes, trials)
    assert rates == pytest.approx([0.5 / 2.5, 3.5 / 6.5, 10.5 / 12.5])


def test_a_quantile_of_a_prompt_is_that_among_its_own_answers():
    prompts = ["a", "b", "a", "b", "a", "c"]
    found = fitted("prompt_quantile", prompts=prompts).apply(LABELS, prompts=prompts)
    for prompt in "abc":
        rows = np.array(prompts) == prompt
        assert found[rows] == pytest.approx((rankdata(LABELS[rows]) - 0.5) / rows.sum())


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(-2, 2)), min_size=1, max_size=20).filter(
        lambda rows: any(a[0] == b[0] and a[1] != b[1] for a in rows for b in rows)
    )
)
def test_prompt_quantiles_have_mean_one_half_in_every_prompt(rows):
    prompts, labels = zip(*rows, strict=True)
    labels = np.array(labels, dtype=float)
    found = fitted("prompt_quantile", labels, prompts=prompts).apply(labels, prompts=prompts)
    for prompt in set(prompts):
        assert found[np.array(prompts) == prompt].mean() == pytest.approx(0.5)


def test_other_rows_are_transformed_with_the_training_sets_numbers():
    assert fitted("standardize,center:1").apply(np.array([100.0])) == pytest.approx([(100 - 1.5) / LABELS.std() - 1])
    # Between known labels a quantile is interpolated, beyond them it is theirs
    assert fitted("quantile").apply(np.array([-9.0, 3.5, 9.0])) == pytest.approx([1 / 6, (4.5 + 5.5) / 12, 5.5 / 6])


def test_a_distribution_of_many_labels_is_kept_by_a_thousand_points():
    labels = np.random.default_rng(0).normal(size=50_000)
    transform = fitted("quantile", labels)
    assert len(transform.steps[0].numbers) == 2000
    assert transform.apply(labels) == pytest.approx((rankdata(labels) - 0.5) / len(labels), abs=1e-3)
    assert transform.invert(transform.apply(labels)) == pytest.approx(labels, abs=1e-9)


# And back


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=20).filter(lambda labels: max(labels) - min(labels) > 1e-3))
@pytest.mark.parametrize(
    "spec",
    ["center", "standardize", "min_max", "lower_is_better", "lower_is_better:4,standardize", "min_max,lower_is_better"],
)
def test_what_was_transformed_comes_back(spec, labels):
    transform = fitted(spec, np.array(labels))
    assert transform.invert(transform.apply(labels)) == pytest.approx(labels, abs=1e-4)


def test_the_way_back_ends_at_what_has_none():
    assert fitted("threshold:1,lower_is_better", label_type="binary").invert([0.2]) == pytest.approx([0.8])
    assert fitted("center,threshold:1", label_type="binary").invert([0.2]) == pytest.approx([0.2])
    prompts = ["a", "b", "a", "b", "a", "c"]
    transform = fitted("lower_is_better,prompt_quantile,center", prompts=prompts)
    assert transform.invert([0.25]) == pytest.approx([0.75])


@pytest.mark.parametrize(
    "spec", ["lower_is_better,standardize", "quantile", "min_max:0,4", "center,threshold:0.5", "votes:1,2", "center"]
)
def test_json_keeps_all_of_it(spec):
    label_type = "continuous" if spec.endswith(("standardize", "quantile", "center")) else "binary"
    trials = np.full(6, 5.0)
    transform = fitted(spec, label_type=label_type, trials=trials)
    again = LabelTransform.from_json(json.loads(json.dumps(transform.to_json())))
    assert again == transform
    assert (again.apply(LABELS, trials) == transform.apply(LABELS, trials)).all()


@pytest.mark.parametrize("step", [{"name": "cube", "numbers": []}, {"name": "center", "numbers": []}])
def test_what_is_no_step_is_not_read_from_json(step):
    with pytest.raises(ValueError, match=r"is no label transform\. The known ones are center"):
        LabelTransform.from_json([step])


# The setting


def test_the_grammar():
    steps = parse_transform(" votes:1, 2 , lower_is_better ", "binary").steps
    assert [(step.name, step.numbers) for step in steps] == [("votes", (1.0, 2.0)), ("lower_is_better", (1.0,))]
    assert str(parse_transform("min_max:0,4,lower_is_better", "binary")) == "min_max:0,4,lower_is_better:1"
    assert parse_transform("threshold:-1e-3", "binary").steps[0].numbers == (-0.001,)
    assert not parse_transform("center", "continuous").is_fitted
    assert parse_transform("center:0,threshold:1,lower_is_better", "binary").is_fitted


@pytest.mark.parametrize(
    ("spec", "label_type", "message"),
    [
        ("centered", "continuous", "'centered' is not a transform; known are center.*Did you mean center?"),
        ("", "continuous", "'' is not a transform; known are center"),
        ("center,", "continuous", "'' is not a transform"),
        ("3,center", "continuous", "'3' is not a transform"),
        ("center:x", "continuous", "'x' is not a number, which center needs"),
        ("center:nan", "continuous", "'nan' is not a number"),
        ("center:1,2", "continuous", "center:1,2 has 2 numbers; center takes the mean"),
        ("quantile:3", "continuous", "quantile:3 has 1 numbers; quantile takes no numbers"),
        ("standardize:1", "continuous", "takes mean and standard deviation"),
        ("threshold", "binary", "threshold has 0 numbers; threshold takes least good"),
        ("standardize:1,0", "continuous", "the standard deviation must be above 0; got 0"),
        ("min_max:4,0", "binary", "the least label must be below the greatest; got 4 and 0"),
        ("votes:0,0", "binary", "a and b of the Beta prior must be 0 or above, and one of them above 0"),
        ("votes:-1,2", "binary", "a and b of the Beta prior"),
        ("center,votes", "binary", "votes reads the vote counts of the rows. Put it first"),
        ("lower_is_better,threshold:2", "binary", "Put threshold first"),
        ("threshold:2", "continuous", "threshold makes labels 0 and 1. Set label_type='binary'"),
        ("standardize", "binary", "standardize makes labels outside \\[0, 1\\]. Set label_type='continuous'"),
        ("center,lower_is_better", "binary", "center makes labels outside"),
        (3, "binary", "label_transform must be text such as"),
    ],
)
def test_a_wrong_setting_is_told_what_is_right(spec, label_type, message):
    with pytest.raises(ValueError, match=message):
        parse_transform(spec, label_type)


@pytest.mark.parametrize("spec", ["standardize", "min_max", "quantile"])
def test_labels_that_do_not_differ_are_refused_where_they_must(spec):
    with pytest.raises(ValueError, match=f"{spec} needs labels that differ, but all 3 labels that it is given are 2"):
        fitted(spec, np.full(3, 2.0))
    with pytest.raises(ValueError, match="all 3 labels that it is given are 1"):
        fitted("threshold:0," + spec, np.array([0.5, 1.0, 2.0]))
    assert (fitted("center", np.full(3, 2.0)).apply(np.full(3, 2.0)) == 0).all()


def test_prompt_quantiles_that_tell_nothing_apart_are_refused():
    with pytest.raises(
        ValueError, match=r"prompt_quantile makes all 6 labels 0\.5, because no prompt has answers with diff"
    ):
        fitted("prompt_quantile", prompts=list("abcdef"))


def test_what_is_not_given_or_not_fitted_is_not_applied():
    with pytest.raises(ValueError, match="center has not been fitted"):
        parse_transform("center", "continuous").apply(LABELS)
    with pytest.raises(ValueError, match="votes needs the rows' trials"):
        parse_transform("votes", "binary").apply(LABELS)
    with pytest.raises(ValueError, match="prompt_quantile needs the rows' prompts"):
        parse_transform("prompt_quantile", "binary").apply(LABELS)


# Rows


def rules(spec, label_type="continuous", **kwargs):
    return LabelRules(label_type, transform=parse_transform(spec, label_type), **kwargs)


def test_only_rows_of_the_settings_type_are_transformed():
    columns = {"label": [4, True, 0], "label_type": ["continuous", "binary", "continuous"]}
    assert transform_labels(columns, [0, 1, 2], "train", rules("lower_is_better:3")) == [-1.0, True, 3.0]
    columns["label_type"] = ["binary", "binary", "continuous"]
    assert transform_labels(columns, [0, 1, 2], "train", rules("threshold:2", "binary")) == [1.0, 0.0, 0]
    assert transform_labels({"label": [4], "label_type": ["binary"]}, [0], "train", rules("center:3")) == [4]


def test_demonstrations_are_named_by_the_transformed_label():
    red_team = rules("lower_is_better", need_mask=True, sft_threshold=0)
    columns = {"label": [0.0, 1.0, 4.0]}
    labels = transform_labels(columns, [0, 1, 2], "train", red_team)
    assert read_labels({"label": labels}, [0, 1, 2], "train", red_team) == {
        "label": [0.0, -1.0, -4.0],
        "sft_mask": [True, False, False],
    }


def test_a_label_that_is_wrong_after_the_transform_says_so():
    how = rules("min_max:0,4", "binary")
    columns = {"label": transform_labels({"label": [1, 5]}, [7, 8], "eval", how)}
    with pytest.raises(
        ValueError, match=r"Row 8 of the eval dataset: label is 1.25 after label_transform='min_max:0,4'"
    ):
        read_labels(columns, [7, 8], "eval", how)
    how = rules("threshold:2", "binary")
    columns = {"label": transform_labels({"label": [1]}, [3], "train", how), "sft_mask": [True]}
    with pytest.raises(
        ValueError, match=r"marked sft_mask=True but has label 0\.0 after label_transform='threshold:2'"
    ):
        read_labels(columns, [3], "train", how)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": [1, None]}, "Row 6 of the train dataset: label is None; it must be a number"),
        (
            {"label": [1, 2]},
            "votes reads a column `trials`, the number of votes cast, which the train dataset does not",
        ),
        (
            {"label": [1, 2], "trials": [1, "2"]},
            "Row 6 of the train dataset: trials is the text '2'; it must be a number",
        ),
        (
            {"label": [1, 3], "trials": [1, 2]},
            "Row 6 of the train dataset: label is 3 and trials 2; votes for an answer",
        ),
        ({"label": [1, -1], "trials": [1, 2]}, "label is -1 and trials 2"),
    ],
)
def test_votes_that_are_none_name_their_row(columns, message):
    with pytest.raises(ValueError, match=message):
        raw_labels(columns, [5, 6], "train", rules("votes", "binary"))


def test_british_spellings_are_read():
    british, american = (parse_transform(f"lower_is_better:4,{a},{b}:2", "continuous") for a, b in SPELLINGS)
    assert british == american
    saved = [{"name": "standardise", "numbers": [3, 2]}, {"name": "centre", "numbers": [1]}]
    assert str(LabelTransform.from_json(saved)) == "standardize:3,2,center:1"


SPELLINGS = (("standardise", "centre"), ("standardize", "center"))


def test_a_label_that_is_the_threshold_reaches_it_after_rounding():
    labels = np.array([0.1, 0.7, 0.9])
    for spec, threshold in (("lower_is_better:1", 0.1), ("min_max", 0.75), ("center", 0.0)):
        given = np.array([0.1, 0.2, 0.3]) if spec == "center" else labels
        learned = parse_transform(spec, "continuous").fit(given).apply(given)
        assert sum(LabelRules("continuous", threshold).is_demonstration(label) for label in learned) >= 2
    assert LabelRules("continuous", 0.7).is_demonstration(float(np.float32(0.7)))
    steps = parse_transform("threshold:0.7", "binary")
    assert steps.apply(np.array([0.7, 0.69], dtype=np.float32)).tolist() == [1.0, 0.0]
