"""The offsets of strict and lenient raters: they equal those of the mixed model's equations, and help."""

import json

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ulma.labels import InvalidRow, LabelRules, LabelTransform, parse_transform, raw_labels, transform_labels
from trl_ulma.labels.rater_offsets import rater_name, rater_offsets
from trl_ulma.labels.transforms import with_centered_raters
from trl_ulma.rows.dataset_labels import transformed_labels, with_transform


def oracle(labels: np.ndarray, raters: list[str]) -> dict[str, float]:
    """The offsets from dense matrices: variances by equating quadratic forms to their expectations (Henderson's first
    method), and the prediction B·Z'V⁻¹(z − μ) with the generalized least squares mean μ.
    """
    names = sorted(set(raters))
    design = np.array([[float(rater == name) for name in names] for rater in raters])
    n, ones = len(labels), np.ones((len(labels), 1))
    onto_all = ones @ ones.T / n
    onto_raters = design @ np.linalg.pinv(design)
    forms = [onto_raters - onto_all, np.eye(n) - onto_raters]
    expected = [[np.trace(form), np.trace(form @ design @ design.T)] for form in forms]
    within, between = np.linalg.solve(expected, [labels @ form @ labels for form in forms])
    if between <= 0:
        return dict.fromkeys(names, 0.0)
    inverse = np.linalg.inv(within * np.eye(n) + between * design @ design.T)
    mean = (ones.T @ inverse @ labels).item() / (ones.T @ inverse @ ones).item()
    return dict(zip(names, between * design.T @ inverse @ (labels - mean), strict=True))


def several(seed: int, people: int = 6, rows: int = 90, spread: float = 1.0):
    """Ratings = quality + offset of the rater + noise: (qualities, labels, raters)."""
    random = np.random.default_rng(seed)
    share = random.dirichlet(np.full(people, 2.0))
    who = np.r_[np.arange(people), np.arange(people), random.choice(people, rows - 2 * people, p=share)]
    quality = random.normal(0, 1, rows)
    offset = random.normal(0, spread, people)
    return quality, 3 + quality + offset[who] + random.normal(0, 0.5, rows), [f"person {each}" for each in who]


# What they are


@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.floats(-50, 50)), min_size=4, max_size=25).filter(
        lambda rows: 1 < len({rater for rater, _ in rows}) < len(rows)
    )
)
@settings(max_examples=60)
def test_offsets_are_those_of_the_mixed_models_equations(rows):
    raters, labels = [rater for rater, _ in rows], np.array([label for _, label in rows])
    means = np.array([labels[[each == rater for each in raters]].mean() for rater in raters])
    if ((labels - means) ** 2).sum() < 1e-3:  # the dense matrix has no inverse
        return
    found, wanted = rater_offsets(labels, raters), oracle(labels, raters)
    assert list(found) == list(wanted)
    assert list(found.values()) == pytest.approx(list(wanted.values()), rel=1e-5, abs=1e-5)


def test_numbers_by_hand():
    # W = (1 + 0 + 1 + 1 + 0 + 1) / 4 = 1; the mean square between raters is (3 · 1² + 3 · 1²) / 1 = 6; n₀ = 3
    labels, raters = np.array([1.0, 2, 3, 3, 4, 5]), ["Tom"] * 3 + ["Ann"] * 3
    between = (6 - 1) / 3
    trust = 3 / (3 + 1 / between)
    assert rater_offsets(labels, raters) == pytest.approx({"Ann": trust, "Tom": -trust})
    # Without noise all of a rater's mean is known, and raters count alike, whatever their rows
    labels = np.array([1.0, 1, 1, 1, 5, 5])
    assert rater_offsets(labels, list("aaaabb")) == pytest.approx({"a": -2, "b": 2})


def test_raters_who_do_not_differ_by_more_than_chance_stay_as_they_are():
    labels, raters = np.array([1.0, 5, 2, 4, 3, 3.1]), list("aabbcc")
    assert rater_offsets(labels, raters) == {"a": 0, "b": 0, "c": 0}
    transform = parse_transform("center_raters", "continuous").fit(labels, raters=raters)
    assert transform.apply(labels, raters=raters).tolist() == labels.tolist()


def test_a_rater_with_one_row_is_hardly_moved_and_keeps_its_information():
    _, labels, raters = several(0, spread=0.7)
    labels, raters = np.r_[labels, 5.0], [*raters, "new"]
    offsets = rater_offsets(labels, raters)
    assert 0 < offsets["new"] < 0.5 * (5 - labels.mean())
    counts = {rater: raters.count(rater) for rater in offsets}
    most = max(counts, key=counts.__getitem__)
    mean = labels[[rater == most for rater in raters]].mean() - labels.mean()
    assert abs(offsets[most]) > 0.8 * abs(mean)


# Whether they help


def test_labels_without_the_raters_offsets_say_more_about_quality():
    gains, of_new = [], []
    for seed in range(100):
        quality, labels, raters = several(seed)
        transform = parse_transform("center_raters,standardize", "continuous").fit(labels, raters=raters)
        learned = transform.apply(labels, raters=raters)
        gains.append(np.corrcoef(quality, learned)[0, 1] - np.corrcoef(quality, labels)[0, 1])
        alike = several(seed, spread=0.0)
        transform = parse_transform("center_raters", "continuous").fit(alike[1], raters=alike[2])
        after = transform.apply(alike[1], raters=alike[2])
        of_new.append(np.corrcoef(alike[0], after)[0, 1] - np.corrcoef(alike[0], alike[1])[0, 1])
    gains, of_new = np.array(gains), np.array(of_new)
    assert gains.mean() - 2 * gains.std() / 10 > 0.1
    assert (gains > 0).mean() > 0.95
    assert abs(of_new.mean()) < 0.005  # and cost nothing if raters are alike


def test_shrinking_is_better_than_plain_means_if_many_rated_little():
    differences = []
    for seed in range(60):
        random = np.random.default_rng(seed)
        who = np.repeat(np.arange(40), 2)
        quality = random.normal(0, 1, 80)
        labels = quality + 0.5 * random.normal(0, 1, 40)[who]
        shrunk = parse_transform("center_raters", "continuous").fit(labels, raters=who).apply(labels, raters=who)
        plain = labels - (np.bincount(who, labels) / 2)[who]
        differences.append(np.corrcoef(quality, shrunk)[0, 1] - np.corrcoef(quality, plain)[0, 1])
    assert np.mean(differences) > 0.1


# The step


def fitted(spec="center_raters,standardize", label_type="continuous"):
    _, labels, raters = several(1)
    return parse_transform(spec, label_type).fit(labels, raters=raters), labels, raters


def test_unknown_raters_are_average_and_the_scale_stays():
    transform, labels, raters = fitted("center_raters")
    offset = transform.offsets["person 2"]
    found = transform.apply(np.full(4, 3.0), raters=["person 2", " person 2 ", "nobody", None])
    assert found == pytest.approx([3 - offset, 3 - offset, 3, 3])
    assert transform.invert(labels).tolist() == transform.own_scale(labels, raters=raters).tolist() == labels.tolist()
    chain = fitted()[0]
    learned = chain.apply(labels, raters=raters)
    assert (learned.mean(), learned.std()) == pytest.approx((0, 1))
    assert chain.invert(learned) == pytest.approx(transform.apply(labels, raters=raters))


def test_the_ends_of_a_quantile_are_wide_enough_for_every_rater():
    transform, labels, _ = fitted("lower_is_better,center_raters,quantile")
    low, high = transform.ends
    assert low <= labels.min() <= labels.max() <= high
    assert high - low < np.ptp(labels) + 2 * np.ptp(list(transform.offsets.values()))


def test_json_keeps_names_and_offsets_and_the_text_is_short():
    transform, labels, raters = fitted()
    again = LabelTransform.from_json(json.loads(json.dumps(transform.to_json())))
    assert again == transform
    assert (again.apply(labels, raters=raters) == transform.apply(labels, raters=raters)).all()
    assert str(transform).startswith("center_raters,standardize:")
    assert str(parse_transform(str(transform), "continuous")) == str(transform)
    assert transform.to_json()[0]["raters"] == sorted(set(raters))
    for wrong in (
        {"name": "center_raters", "numbers": [1.0], "raters": ["a", "b"]},
        {"name": "center_raters", "numbers": [1.0, 2.0], "raters": ["a", "a"]},
        {"name": "center_raters", "numbers": [1.0], "raters": [1]},
        {"name": "center_raters", "numbers": [], "raters": []},
    ):
        with pytest.raises(ValueError, match="is no label transform"):
            LabelTransform.from_json([wrong])
    assert LabelTransform.from_json([{"name": "center", "numbers": [3]}]).offsets == {}


@pytest.mark.parametrize(
    ("spec", "label_type", "message"),
    [
        ("center_raters:1", "continuous", "center_raters:1 has 1 numbers; center_raters takes no numbers"),
        ("standardize,center_raters", "continuous", "reads labels as raters gave them, not after standardize. Put it"),
        ("threshold:3,center_raters", "continuous", "not after threshold. Put it first; only lower_is_better and vote"),
        ("center_raters,center_raters", "continuous", "has center_raters twice. Keep one"),
        ("lower_is_better,standardize,lower_is_better", "continuous", "has lower_is_better twice. Keep one"),
        ("center_raters", "binary", r"center_raters makes labels outside \[0, 1\]. Set label_type='continuous'"),
    ],
)
def test_a_wrong_setting_is_told_what_is_right(spec, label_type, message):
    with pytest.raises(ValueError, match=message):
        parse_transform(spec, label_type)


@pytest.mark.parametrize(
    ("spec", "label_type"),
    [
        ("lower_is_better:4,center_raters,quantile", "binary"),
        ("votes:1,1,center_raters,standardize", "continuous"),
        ("centre_raters,threshold:3", "binary"),
    ],
)
def test_what_may_be_before_and_after(spec, label_type):
    assert parse_transform(spec, label_type).reads >= {"raters"}


@pytest.mark.parametrize(
    ("labels", "raters", "message"),
    [
        ([1, 2, 3], ["", None, " "], "none of the 3 rows has a rater. Fill the column `rater`"),
        ([1, 2, 3], ["a", "a", ""], "needs two or more raters, .* all rows have the rater 'a'"),
        ([1, 2, 3], ["a", "b", "c"], "each of the 3 raters has one row"),
        ([2, 2, 2], ["a", "b", "b"], "needs labels that differ, but all 3 labels that it is given are 2"),
        ([0.1, 0.1, 0.7, 0.7], list("aabb"), r"makes all 4 labels 0.4, because no rater gave different labels"),
        ([1, 2], None, "center_raters needs the rows' raters"),
    ],
)
def test_raters_that_say_nothing_are_refused(labels, raters, message):
    with pytest.raises(ValueError, match=message):
        parse_transform("center_raters", "continuous").fit(np.array(labels), raters=raters)


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        (None, "center_raters,standardize"),
        ("standardize:3,1", "center_raters,standardize:3,1"),
        ("lower_is_better:4", "lower_is_better:4,center_raters"),
        ("votes:1,2,lower_is_better,standardize", "votes:1,2,lower_is_better,center_raters,standardize"),
    ],
)
def test_the_step_finds_its_place_in_a_setting(spec, wanted):
    assert with_centered_raters(spec) == wanted
    parse_transform(wanted, "continuous")


# Rows


@pytest.mark.parametrize("value", [0.5, ["Ann"], {"name": "Ann"}])
def test_what_names_nobody_is_an_invalid_row(value):
    with pytest.raises(InvalidRow, match=r"rater is .*; it must be text or a whole number that says who gave"):
        rater_name(value)
    rules = LabelRules("continuous", transform=fitted()[0])
    with pytest.raises(ValueError, match="Row 8 of the train dataset: rater is"):
        raw_labels({"label": [1, 2], "rater": ["a", value]}, [7, 8], "train", rules)


def test_numbers_bools_and_texts_name_raters():
    assert [rater_name(value) for value in (7, 7.0, "7", "7.0", np.int64(7))] == ["7"] * 5
    assert [rater_name(value) for value in (True, "True")] == ["True"] * 2
    assert rater_name(" Ann Lee ") == "Ann Lee"


def test_rows_whose_rater_is_not_known_are_counted_and_named():
    rules = LabelRules("continuous", transform=fitted("center_raters")[0])
    raters = ["person 1", None, "", "x", "y", "x", "z", "w", "other"]
    columns = {"label": [3.0] * 9, "rater": raters, "label_type": ["continuous"] * 8 + ["binary"]}
    told = []
    assert transform_labels(columns, range(9), "eval", rules, note=told.append)[1:8] == [3.0] * 7
    assert told == [
        "2 of 8 rows of the eval dataset have no rater. 5 of 8 have a rater that the training does not have: 'x', 'y', "
        "'z' and 1 more. Such labels are read as those of an average rater."
    ]
    told.clear()
    transform_labels({"label": [3.0, 4.0]}, range(2), "eval", rules, note=told.append)
    assert told == ["2 of 2 rows of the eval dataset have no rater. Such labels are read as those of an average rater."]


def table(**columns) -> Dataset:
    rows = {"prompt": [f"Why {i}?" for i in range(6)], "completion": [" So."] * 6, "label": [1.0, 2, 3, 3, 4, 5]}
    return Dataset.from_dict(rows | columns)


def test_a_missing_column_is_named_with_one_that_looks_like_it():
    rules, rest = LabelRules("continuous"), "which the train dataset does not have; found completion, label, prompt"
    with pytest.raises(ValueError, match=rf"reads a column `rater`.*{rest}\. Add it.* --columns rater=NAME"):
        with_transform(rules, "center_raters", table())
    with pytest.raises(ValueError, match=r"If it is the column annotator_id, .*\(on the command line --columns rater="):
        with_transform(rules, "center_raters", table(annotator_id=[1, 1, 1, 2, 2, 2]))
    with pytest.raises(ValueError, match="none of the 6 rows has a rater"):
        with_transform(rules, "center_raters", table(rater=[None] * 6))


def test_classes_are_read_by_their_names():
    rules = with_transform(LabelRules("continuous"), "center_raters", table(rater=["Tom"] * 3 + ["Ann"] * 3))
    plain = transformed_labels(table(rater=["Ann"] * 6), "eval", rules)
    classes = (
        table(rater=[1] * 6).cast_column("rater", Value("int64")).cast_column("rater", ClassLabel(2, ["Tom", "Ann"]))
    )
    assert transformed_labels(classes, "eval", rules) == plain != table()["label"][:]
