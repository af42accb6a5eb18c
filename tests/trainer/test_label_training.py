"""Transforms and the report inside a trainer: fitted once, applied everywhere, saved with the model."""

import json

import numpy as np
import pytest
from datasets import Dataset
from world import make_rows, make_trainer

from trl_ulma import PointwiseDPOConfig, PointwiseDPOTrainer
from trl_ulma.judge import Judge
from trl_ulma.labels.rater_offsets import rater_offsets
from trl_ulma.rows.dataset_labels import report_labels
from trl_ulma.saved import SavedSettings

RATINGS = [4.0, 0.0, 1.0, 2.0, 0.0, 3.0]
QUIET = {"label_report": False}


def rated(labels=RATINGS, **columns):
    return make_rows(len(labels), **{"label": list(labels)} | columns)


def continuous(model, rows, folder, transform, **kwargs):
    settings = {"label_type": "continuous", "sft_threshold": 1e9, **QUIET}
    return make_trainer(model, rows, folder, label_transform=transform, **settings | kwargs)


# Chosen and rejected ratings

STARS = [5.0, 1.0, 4.0, 2.0, 5.0, 4.0, 1.0, 5.0]


@pytest.mark.parametrize("transform", [None, "standardize"])
def test_stars_are_split_at_the_center_of_the_training_labels(tiny_gpt2, tmp_path, transform):
    held_out = [5.0, 3.0, 4.0, 1.0]
    trainer = make_trainer(
        tiny_gpt2,
        rated(STARS),
        tmp_path,
        pointwise=True,
        eval_dataset=rated(held_out),
        label_type="continuous",
        label_transform=transform,
        learning_rate=1e-2,
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_rewards/margins",
        **QUIET,
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    evaluated = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert len(logs) == len(evaluated) == 3
    for name in ("chosen", "rejected", "margins", "accuracies", "mean", "mse"):
        assert all(f"rewards/{name}" in log for log in logs)
        assert all(f"eval_rewards/{name}" in log for log in evaluated)
    assert trainer.state.best_metric == max(log["eval_rewards/margins"] for log in evaluated)

    found = trainer.evaluate()
    reward = np.array(trainer.score(rated(held_out))["reward"][:])
    labels = np.array(held_out)
    center = np.mean(STARS)  # 3.375, so that three stars are rejected
    chosen = labels >= center
    assert chosen.tolist() == [True, False, True, False]
    wanted = {
        "chosen": reward[chosen].mean(),
        "rejected": reward[~chosen].mean(),
        "margins": reward[chosen].mean() - reward[~chosen].mean(),
        "accuracies": ((reward > (0 if transform else center)) == chosen).mean(),
        "mean": reward.mean(),
    }
    for name, value in wanted.items():
        assert found[f"eval_rewards/{name}"] == pytest.approx(value, abs=1e-5), name


def test_the_center_of_a_stream_is_that_of_its_first_rows(tiny_gpt2, tmp_path):
    labels = [4.0] * 32 + [2.0] * 32 + [100.0] * 6
    for name, center in (("continuous", 3.0), ("binary", 0.0)):
        rows = rated(labels if name == "continuous" else [1.0] * 70).to_iterable_dataset()
        settings = {"label_type": name, "max_steps": 1, "pointwise": True, **QUIET}
        trainer = make_trainer(tiny_gpt2, rows, tmp_path, **settings)
        assert trainer._plan.label_center == center


# The transform


def test_it_is_fitted_on_the_training_set_and_applied_to_the_others(tiny_gpt2, tmp_path):
    trainer = continuous(
        tiny_gpt2,
        rated(),
        tmp_path,
        "lower_is_better,standardize",
        eval_dataset={"a": rated([10.0]), "b": rated([0.0])},
    )
    labels = np.array(RATINGS)
    assert trainer.train_dataset["label"][:] == pytest.approx((labels.mean() - labels) / labels.std())
    assert trainer.eval_dataset["a"]["label"][:] == pytest.approx([(labels.mean() - 10) / labels.std()])
    assert trainer.eval_dataset["b"]["label"][:] == pytest.approx([labels.mean() / labels.std()])
    assert trainer.predict(rated([10.0])).label_ids == pytest.approx([(labels.mean() - 10) / labels.std()])


def test_red_team_ratings_need_no_script(tiny_gpt2, tmp_path):
    trainer = continuous(tiny_gpt2, rated(), tmp_path, "lower_is_better", sft_threshold=0)
    assert trainer.train_dataset["label"][:] == [-rating for rating in RATINGS]
    assert trainer.train_dataset["sft_mask"][:] == [rating == 0 for rating in RATINGS]


def test_real_red_team_ratings(shared_data, tiny_gpt2, tmp_path):
    from trl_ulma.data.files import load_rows

    raw = load_rows(shared_data / "red_team_sample.jsonl.gz")["train"]
    rows = Dataset.from_dict(
        {"prompt": ["Hi"] * len(raw), "completion": [" No."] * len(raw), "label": raw["rating"][:]}
    )
    trainer = continuous(tiny_gpt2, rows, tmp_path, "lower_is_better:4,min_max:0,4", label_type="binary")
    assert trainer.train_dataset["label"][:] == pytest.approx([1 - rating / 4 for rating in raw["rating"]])


@pytest.mark.parametrize("transform", [None, "votes:1,1"])
def test_trials_that_no_setting_reads_are_told(tiny_gpt2, tmp_path, caplog, transform):
    settings = {"label_type": "binary", "label_transform": transform}
    make_trainer(tiny_gpt2, make_rows(4, trials=[10, 3, 2, 5]), tmp_path, **settings)
    told = [message for message in caplog.messages if "has a column `trials`" in message]
    assert len(told) == (transform is None)


def test_thresholds_and_votes_make_binary_labels(tiny_gpt2, tmp_path):
    trainer = continuous(tiny_gpt2, rated(), tmp_path, "threshold:2", label_type="binary")
    assert trainer.train_dataset["label"][:] == [float(rating >= 2) for rating in RATINGS]
    assert trainer.train_dataset["sft_mask"][:] == [rating >= 2 for rating in RATINGS]
    rows = rated(trials=[4, 0, 2, 2, 9, 3])
    trainer = continuous(tiny_gpt2, rows, tmp_path, "votes", label_type="binary")
    assert trainer.train_dataset["label"][:] == pytest.approx([5 / 6, 1 / 2, 2 / 4, 3 / 4, 1 / 11, 4 / 5])
    assert "trials" not in trainer.train_dataset.column_names


def test_prompt_quantiles_know_texts_and_conversations(tiny_llama, tmp_path):
    prompts = [[{"role": "user", "content": name}] for name in "aabbbb"]
    rows = rated(prompt=prompts, completion=[[{"role": "assistant", "content": f"{i}"}] for i in range(6)])
    trainer = continuous(tiny_llama, rows, tmp_path, "prompt_quantile", eval_dataset=rows.select(range(2)))
    assert trainer.train_dataset["label"][:] == pytest.approx([3 / 4, 1 / 4, 3 / 8, 5 / 8, 1 / 8, 7 / 8])
    assert trainer.eval_dataset["label"][:] == pytest.approx([3 / 4, 1 / 4])


# Raters

RATERS = ["Ann", "Tom", "Ann", "Tom", "Tom", "Ann"]


def test_offsets_of_raters_are_those_of_the_training_set(tiny_gpt2, tmp_path, caplog):
    held_out = rated([2.0, 2.0, 2.0, 2.0], rater=["Ann", "Tom", "Zoe", None])
    trainer = continuous(
        tiny_gpt2, rated(rater=RATERS), tmp_path, "center_raters", eval_dataset={"a": held_out, "b": rated([2.0])}
    )
    offsets = rater_offsets(np.array(RATINGS), RATERS)
    assert offsets["Tom"] < 0 < offsets["Ann"]
    wanted = [label - offsets[rater] for label, rater in zip(RATINGS, RATERS, strict=True)]
    assert trainer.train_dataset["label"][:] == pytest.approx(wanted)
    assert trainer.eval_dataset["a"]["label"][:] == pytest.approx([2 - offsets["Ann"], 2 - offsets["Tom"], 2, 2])
    assert trainer.eval_dataset["b"]["label"][:] == [2]
    assert [message for message in caplog.messages if "rater" in message] == [
        "1 of 4 rows of the a dataset has no rater. 1 of 4 has a rater that the training does not have: 'Zoe'. Such "
        "labels are read as those of an average rater.",
        "1 of 1 rows of the b dataset has no rater. Such labels are read as those of an average rater.",
    ]
    assert "rater" not in trainer.train_dataset.column_names
    assert trainer.predict(held_out).label_ids[:2] == pytest.approx([2 - offsets["Ann"], 2 - offsets["Tom"]])
    scored = trainer.score(held_out)
    own = [offsets["Ann"], offsets["Tom"], 0, 0]
    assert scored["predicted_label"][:] == pytest.approx(np.array(scored["reward"][:]) + own)
    assert scored["surprise"][1] == pytest.approx((2 - offsets["Tom"] - scored["reward"][1]) ** 2, rel=1e-4)
    trainer.save_model(str(tmp_path / "saved"))
    saved = SavedSettings.read(tmp_path / "saved" / "pointwise.json")
    assert saved.label_transform == trainer._plan.rules.transform
    judge = Judge.from_pretrained(str(tmp_path / "saved"), tiny_gpt2)
    assert judge.score(held_out)["surprise"][:] == pytest.approx(scored["surprise"][:], rel=1e-4)
    # Files of earlier versions have no raters
    text = (tmp_path / "saved" / "pointwise.json").read_text()
    old = json.loads(text) | {"label_transform": [{"name": "standardize", "numbers": [3, 2]}]}
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert str(SavedSettings.read(tmp_path / "old.json").label_transform) == "standardize:3,2"


def test_a_stream_to_evaluate_on_is_read_by_its_raters(tiny_gpt2, tmp_path, caplog):
    held_out = rated([2.0] * 70, rater=["Ann"] * 3 + ["Zoe"] * 67).to_iterable_dataset()
    trainer = continuous(tiny_gpt2, rated(rater=RATERS), tmp_path, "center_raters", eval_dataset=held_out)
    caplog.clear()
    found = [row["label"] for row in trainer.eval_dataset]
    assert found == pytest.approx([2 - rater_offsets(np.array(RATINGS), RATERS)["Ann"]] * 3 + [2.0] * 67)
    assert len([message for message in caplog.messages if "Later rows of the stream are not counted." in message]) <= 1
    with pytest.raises(ValueError, match=r"is a stream\. Load the dataset without streaming\.$"):
        continuous(tiny_gpt2, rated(rater=RATERS).to_iterable_dataset(), tmp_path, "center_raters", max_steps=1)


def test_a_column_of_raters_that_no_transform_reads_changes_nothing(tiny_gpt2, tmp_path, caplog):
    values = [{"id": i} for i in range(6)]  # what the column is called by chance
    trainer = continuous(tiny_gpt2, rated(rater=values), tmp_path, "center")
    assert trainer.train_dataset["label"][:] == pytest.approx(np.array(RATINGS) - np.mean(RATINGS))
    assert "rater" not in caplog.text


def test_raters_of_invalid_rows_do_not_count(tiny_gpt2, tmp_path, caplog):
    rows = rated([*RATINGS, 55.0], rater=[*RATERS, "Eve"], completion=[*rated()["completion"][:], ""])
    found = continuous(tiny_gpt2, rows, tmp_path / "a", "center_raters", invalid_rows="drop").train_dataset
    right = continuous(tiny_gpt2, rated(rater=RATERS), tmp_path / "b", "center_raters").train_dataset
    assert found["label"][:] == right["label"][:]
    assert "Eve" not in caplog.text
    with pytest.raises(
        ValueError, match=r"Row 2 of the train dataset: rater is 0\.5; it must be text or a whole number"
    ):
        continuous(tiny_gpt2, rated(rater=[1.0, 2.0, 0.5, 1.0, 2.0, 2.0]), tmp_path, "center_raters")


@pytest.mark.parametrize("transform", ["center_raters", "quantile"])
def test_another_fit_is_not_served_from_the_cache_and_prepared_rows_know_theirs(tiny_gpt2, tmp_path, transform):
    rated(rater=RATERS).to_json(tmp_path / "rows.jsonl")
    held_out = Dataset.from_json(str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "cache"))

    def trained_on(labels):
        return continuous(tiny_gpt2, rated(labels, rater=RATERS), tmp_path, transform, eval_dataset=held_out)

    first, other, again = map(trained_on, (RATINGS, [0.0, 9.0, 1.0, 7.0, 8.0, 1.0], RATINGS))
    assert first.eval_dataset["label"][:] != other.eval_dataset["label"][:]
    assert first.eval_dataset["label"][:] == again.eval_dataset["label"][:]
    assert str(first._plan.rules.transform) == str(other._plan.rules.transform) == transform
    with pytest.raises(ValueError, match=f"label_transform={transform} was fitted on other rows .*Pass the raw rows"):
        other.evaluate(first.eval_dataset)
    assert first.evaluate(again.eval_dataset)["eval_loss"] == again.evaluate()["eval_loss"]


def test_the_report_has_one_label_of_several_raters(tiny_gpt2, tmp_path, capsys):
    rows = rated([3.0, 3.0, 5.0, 1.0, 2.0, 4.0], rater=RATERS)
    continuous(tiny_gpt2, rows, tmp_path, "center_raters,standardize", label_report=True)
    report = json.loads((tmp_path / "label_report.json").read_text())
    three = next(each for each in report["continuous"]["raw"]["histogram"] if each["low"] == 3)
    assert three["learned_low"] < three["learned_high"]
    assert report["raters"] == pytest.approx(rater_offsets(np.array(rows["label"][:]), RATERS))
    assert "2, whose strictness is removed. Compared with an average rater: Tom -" in " ".join(
        capsys.readouterr().out.split()
    )


def test_rows_that_name_the_other_type_are_taken_as_they_are(tiny_gpt2, tmp_path):
    rows = rated([5.0, 1.0, 1.0, 3.0], label_type=["continuous", "binary", "continuous", "continuous"])
    trainer = continuous(tiny_gpt2, rows, tmp_path, "center")
    assert trainer.train_dataset["label"][:] == [2.0, 1.0, -2.0, 0.0]


def test_rows_that_are_made_as_they_are_read_are_transformed_too(tiny_gpt2, tmp_path):
    rows = rated().with_transform(lambda batch: {**batch, "label": [2 * label for label in batch["label"]]})
    trainer = continuous(tiny_gpt2, rows, tmp_path, "center")
    assert trainer.train_dataset["label"][:] == pytest.approx([2 * r - 2 * np.mean(RATINGS) for r in RATINGS])


def test_streams_take_transforms_that_need_no_fitting(tiny_gpt2, tmp_path):
    stream = rated().to_iterable_dataset()
    trainer = continuous(tiny_gpt2, stream, tmp_path, "lower_is_better:4,standardize:2,0.5", max_steps=1)
    assert [row["label"] for row in trainer.train_dataset] == pytest.approx([(4 - r - 2) / 0.5 for r in RATINGS])
    # What was fitted on rows at hand serves a stream, too
    trainer = continuous(tiny_gpt2, rated(), tmp_path, "center", eval_dataset=stream)
    assert [row["label"] for row in trainer.eval_dataset] == pytest.approx([r - np.mean(RATINGS) for r in RATINGS])


@pytest.mark.parametrize("transform", ["center", "prompt_quantile", "min_max,center"])
def test_streams_refuse_transforms_that_need_all_labels(tiny_gpt2, tmp_path, transform):
    stream = rated().to_iterable_dataset()
    with pytest.raises(
        ValueError, match=f"label_transform='{transform}' needs all labels at once, but the train datas"
    ):
        continuous(tiny_gpt2, stream, tmp_path, transform, max_steps=1)


def test_an_evaluation_stream_has_no_prompt_quantiles(tiny_gpt2, tmp_path):
    rows = rated(prompt=["a"] * 6)
    with pytest.raises(ValueError, match=r"but the eval dataset is a stream\. Load the dataset without streaming\."):
        continuous(tiny_gpt2, rows, tmp_path, "prompt_quantile", eval_dataset=rows.to_iterable_dataset())


def test_a_wrong_setting_is_refused_by_the_config(tmp_path):
    with pytest.raises(ValueError, match="'center,nothing': 'nothing' is not a transform"):
        PointwiseDPOConfig(str(tmp_path), label_type="continuous", label_transform="center,nothing")


@pytest.mark.parametrize(
    ("columns", "transform", "message"),
    [
        (
            {"label": [1.0] * 6},
            "standardize",
            "standardize needs labels that differ, but all 6 labels that it is given are 1",
        ),
        (
            {"label": [1.0] * 5 + [float("nan")]},
            "center",
            "Row 5 of the train dataset: label is nan; it must be finite",
        ),
        ({"label": ["1"] * 6}, "lower_is_better", "Row 0 of the train dataset: label is the text '1'"),
        ({"label_type": ["binary"] * 6, "label": [1] * 6}, "center", "no row of the train dataset has this type"),
        ({"label_type": [None] * 6}, "lower_is_better", "label_type is None; it must be one of"),
    ],
)
def test_labels_that_cannot_be_transformed(tiny_gpt2, tmp_path, columns, transform, message):
    with pytest.raises(ValueError, match=message):
        continuous(tiny_gpt2, rated(**columns), tmp_path, transform)


def test_pairs_and_prepared_rows_have_no_raw_labels(tiny_gpt2, tmp_path):
    pairs = Dataset.from_dict({"prompt": ["a"], "chosen": [" b"], "rejected": [" c"]})
    for transform in ("center", "lower_is_better"):
        with pytest.raises(
            ValueError, match="The train dataset is paired, so its labels are 1 and 0, and not on the scale"
        ):
            continuous(tiny_gpt2, pairs, tmp_path, transform)
    with pytest.raises(ValueError, match="The eval dataset is paired"):
        continuous(tiny_gpt2, rated(), tmp_path, "center", eval_dataset=pairs)
    prepared = continuous(tiny_gpt2, rated(), tmp_path, None).train_dataset
    with pytest.raises(ValueError, match="The train dataset is already prepared, so it lacks the raw labels"):
        continuous(tiny_gpt2, prepared, tmp_path, "center")
    assert continuous(tiny_gpt2, prepared, tmp_path, None).train_dataset["label"][:] == RATINGS


def test_a_label_out_of_the_training_range_is_named(tiny_gpt2, tmp_path):
    message = r"Row 1 of the eval dataset: label is 1.25 after label_transform='min_max:0,4', outside \[0, 1\]"
    with pytest.raises(ValueError, match=message):
        continuous(tiny_gpt2, rated(), tmp_path, "min_max", label_type="binary", eval_dataset=rated([4.0, 5.0]))


def test_another_transform_is_not_served_from_the_cache(tiny_gpt2, tmp_path):
    rated().to_json(tmp_path / "rows.jsonl")
    rows = Dataset.from_json(str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "cache"))
    found = [
        continuous(tiny_gpt2, rows, tmp_path, transform).train_dataset["label"][0]
        for transform in ("center:1", "center:2", None, "center:1")
    ]
    assert found == [3.0, 2.0, 4.0, 3.0]


# The report


def test_the_report_is_of_the_rows_that_are_trained_on(tiny_gpt2, tmp_path, capsys):
    rows = make_rows(
        5,
        prompt=["a", "a", "b", "c", "c"],
        completion=[" x", " x", " x", " yy", " z"],
        label=[1.0, 0.0, 1.0, 1.0, 0.5],
        weight=[1.0, 1.0, 2.0, 4.0, 0.0],
        sft_mask=[True, False, False, True, False],
    )
    make_trainer(tiny_gpt2, rows, tmp_path / "out")
    shown = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "label_report.json").read_text())
    assert report["binary"]["classes"] == {"1": 3, "between": 1, "0": 1}
    assert (report["prompts"]["count"], report["repeated"], report["contradicting"]) == (3, 0, 2)
    assert report["weight"]["demonstrations"] == 5 / 8
    assert [each["tokens"] for each in report["binary"]["histogram"]] == [3, 3, pytest.approx(10 / 3, rel=1e-5)]
    assert shown.count("Labels of the train dataset: 5 rows, 3 prompts") == 1
    assert "! 2 rows contradict one another" in shown
    assert f"As JSON: {tmp_path / 'out' / 'label_report.json'}" in shown


@pytest.mark.parametrize("transform", [None, "prompt_quantile"])
def test_rows_to_evaluate_on_that_contradict_training_rows_are_counted(tiny_gpt2, tmp_path, caplog, transform):
    train = make_rows(5, prompt=["a", "a", "b", "b", "c"], completion=[" x", " y", " x", " y", " x"])
    train = train.remove_columns("label").add_column("label", [1.0, 5.0, 2.0, 3.0, 2.0])
    held_out = make_rows(4, prompt=["a", "b", "a", "d"], completion=[" x", " x", " y", " x"])
    held_out = held_out.remove_columns("label").add_column("label", [4.0, 2.0, 1.0, 1.0])
    args = PointwiseDPOConfig(str(tmp_path), bf16=False, label_type="continuous", label_transform=transform)
    PointwiseDPOTrainer.dry_run(tiny_gpt2, args, train, held_out)
    assert [message for message in caplog.messages if "another label" in message] == [
        "2 rows of the eval dataset have the prompt and completion of a training row, but another label: "
        "row 0 (4, trained on with 1), row 2 (1, trained on with 5). "
        "This is expected for votes by several people. Otherwise a label is wrong."
    ]
    caplog.clear()
    PointwiseDPOTrainer.dry_run(tiny_gpt2, args, train, {"same": train, "other": held_out.select([1, 3])})
    assert "another label" not in caplog.text


def test_point_wise_dpo_has_no_demonstrations(tiny_gpt2, tmp_path, capsys):
    rows = make_rows(40, label=[1.0] * 36 + [0.0] * 4)
    make_trainer(tiny_gpt2, rows, tmp_path / "pointwise", pointwise=True)
    shown = capsys.readouterr().out
    assert "Among the compared rows, good and bad ones weigh 9 to 1." in shown
    report = json.loads((tmp_path / "pointwise" / "label_report.json").read_text())
    assert report["demonstrations"] == 0
    # ULMA imitates them, and compares the others alone
    make_trainer(tiny_gpt2, rows, tmp_path / "ulma")
    assert "good and bad ones weigh" not in capsys.readouterr().out
    report = json.loads((tmp_path / "ulma" / "label_report.json").read_text())
    assert report["demonstrations"] == 0.9


def test_the_report_can_be_left_out_and_a_stream_has_none(tiny_gpt2, tmp_path, capsys):
    make_trainer(tiny_gpt2, make_rows(4), tmp_path / "a", label_report=False)
    make_trainer(tiny_gpt2, make_rows(4).to_iterable_dataset(), tmp_path / "b", max_steps=1)
    assert "Labels of" not in capsys.readouterr().out
    assert not list(tmp_path.glob("*/label_report.json"))
    with pytest.raises(ValueError, match="label_report must be True or False; got 'yes'"):
        make_trainer(tiny_gpt2, make_rows(4), tmp_path, label_report="yes")


@pytest.mark.parametrize(
    ("settings", "factor"),
    [({}, 1.0), ({"log_z": 0.7}, 1.0), ({"log_z": "running_mean"}, 1.0), ({"length_normalize": True}, None)],
)
def test_targets_follow_the_settings(tiny_gpt2, tmp_path, settings, factor):
    trainer = continuous(tiny_gpt2, rated(), tmp_path, "center", beta=0.5, **settings)
    targets = report_labels(trainer.train_dataset, trainer.args)["continuous"]["targets"]
    log_z = settings.get("log_z", 0.0)
    u = np.abs(np.array(trainer.train_dataset["label"][:]) / 0.5 - (0 if isinstance(log_z, str) else log_z))
    if factor is None:
        u *= [len(ids) for ids in trainer.train_dataset["completion_ids"]]
    assert targets["rms"] == pytest.approx(np.sqrt((u**2).mean()), rel=1e-5)
    assert targets["log_z_is_known"] != isinstance(log_z, str)


def test_columns_of_log_z_and_types_are_in_the_report(tiny_gpt2, tmp_path):
    rows = rated([1.0, 0.0, 3.0, -3.0], log_z=[9.0, 9.0, 1.0, 2.0], label_type=["binary"] * 2 + ["continuous"] * 2)
    trainer = continuous(tiny_gpt2, rows, tmp_path, None, beta=1.0)
    report = report_labels(trainer.train_dataset, trainer.args)
    assert report["binary"]["rows"] == 2
    assert report["continuous"]["targets"]["max"] == 5
    selected = trainer.train_dataset.select([3, 1])  # rows by index, as a filter leaves them
    assert report_labels(selected, trainer.args)["continuous"]["targets"]["max"] == 5
    assert report_labels(selected, trainer.args)["prompts"]["count"] == 2


def test_a_threshold_that_tells_no_rows_apart_is_a_warning(tiny_gpt2, tmp_path):
    trainer = continuous(tiny_gpt2, rated([1.0, 2.0, 3.0]), tmp_path, "center", sft_threshold=2.5)

    def warnings(threshold, raw=None):
        trainer.args.sft_threshold = threshold
        report = report_labels(trainer.train_dataset, trainer.args, raw_rows=raw)
        return [warning for warning in report["warnings"] if "sft_threshold" in warning]

    assert warnings(2.5) == [
        "No row with a continuous label reaches sft_threshold=2.5, so none is a demonstration. The labels are between "
        "-1 and 1 after label_transform. Lower sft_threshold, unless this is intended."
    ]
    assert warnings(-1)[0].startswith("Every row with a continuous label reaches sft_threshold=-1, so each is a demo")
    assert warnings(0) == warnings(1) == warnings(None) == []
    assert warnings(9, rated([1.0, 2.0, 3.0], sft_mask=[True, False, False])) == []
    trainer.args.label_type = "binary"
    assert warnings(0) == ["sft_threshold=0 is not used, because no row has a continuous label. Remove the setting."]


def test_class_weights_that_are_set_are_known_to_the_report(tiny_gpt2, tmp_path):
    rows = make_rows(8, label=[1.0] * 7 + [0.0])
    trainer = make_trainer(tiny_gpt2, rows, tmp_path)
    assert any("weigh 7 to 1" in warning for warning in report_labels(trainer.train_dataset, trainer.args)["warnings"])
    trainer = make_trainer(tiny_gpt2, rows, tmp_path, undesirable_weight=7.0)
    assert not any("weigh" in warning for warning in report_labels(trainer.train_dataset, trainer.args)["warnings"])


def test_the_report_of_a_training_has_the_scale_of_the_data(tiny_gpt2, tmp_path, capsys):
    rows = rated([1.0, 2.0, None, 4.0, 5.0])
    trainer = continuous(tiny_gpt2, rows, tmp_path, "standardize", invalid_rows="drop", label_report=True)
    assert trainer.raw_labels.tolist() == [1, 2, 4, 5]
    report = json.loads((tmp_path / "label_report.json").read_text())["continuous"]
    std = np.std([1, 2, 4, 5])
    assert [each["low"] for each in report["raw"]["histogram"]] == [1, 2, 4, 5]
    assert [each["learned_low"] for each in report["raw"]["histogram"]] == pytest.approx(
        [(label - 3) / std for label in (1, 2, 4, 5)], rel=1e-5
    )
    assert report["raw"]["transform"].startswith("standardize:3,")
    assert f" 4 → {1 / std:+.2f} " in capsys.readouterr().out
    # Rows of the other type are not on that scale
    mixed = rated([1.0, 0.0, 4.0, 2.0], label_type=["binary", "binary", "continuous", "continuous"])
    trainer = continuous(tiny_gpt2, mixed, tmp_path / "mixed", "center")
    assert trainer.raw_labels.tolist()[2:] == [4, 2]
    assert np.isnan(trainer.raw_labels[:2]).all()
    assert continuous(tiny_gpt2, rated(), tmp_path / "none", None).raw_labels is None


# The command line


@pytest.mark.parametrize("spec", ["votes:1,1", "lower_is_better,min_max:0,4", "threshold:0.5"])
def test_yaml_and_options_carry_a_transform(tmp_path, spec):
    from trl_ulma.scripts import ulma

    needed = ["--model_name_or_path", "m", "--dataset_name", "rows.jsonl", "--output_dir", str(tmp_path)]
    settings = ulma.make_parser().parse_settings([*needed, "--label_transform", spec, "--no_label_report"])[1]
    assert (settings.label_transform, settings.label_report) == (spec, False)
    (tmp_path / "run.yaml").write_text(f"label_transform: {spec}\nlabel_report: false\n")
    settings = ulma.make_parser().parse_settings([*needed, "--config", str(tmp_path / "run.yaml")])[1]
    assert (settings.label_transform, settings.label_report) == (spec, False)


def test_a_wrong_transform_on_the_command_line_is_one_line(tmp_path, capsys):
    from trl_ulma.scripts import ulma

    needed = ["--model_name_or_path", "m", "--dataset_name", "rows.jsonl", "--output_dir", str(tmp_path)]
    with pytest.raises(SystemExit):
        ulma.make_parser().parse_settings([*needed, "--label_transform", "threshhold:1"])
    (line,) = capsys.readouterr().err.splitlines()
    assert "'threshhold' is not a transform; known are center" in line
    assert line.endswith("Did you mean threshold?")


# Rows that are left out do not count


@pytest.mark.parametrize("empty", ["", None])
@pytest.mark.parametrize("transform", ["standardize", "center", "prompt_quantile"])
def test_labels_of_invalid_rows_do_not_count_in_a_transform(tiny_gpt2, tmp_path, transform, empty):
    rows = make_rows(6, label=[1.0, 2.0, 3.0, 4.0, 5.0, 55.0])
    rows = Dataset.from_list([{**row, "prompt": "How are you?"} for row in rows])
    broken = Dataset.from_list([*rows.select(range(5)), {**rows[5], "completion": empty}])
    found = continuous(tiny_gpt2, broken, tmp_path / "dropped", transform, invalid_rows="drop")
    right = continuous(tiny_gpt2, rows.select(range(5)), tmp_path / "right", transform)
    assert found.train_dataset["label"][:] == right.train_dataset["label"][:]
    with pytest.raises(ValueError, match="Row 5 of the train dataset: completion is"):
        continuous(tiny_gpt2, broken, tmp_path / "refused", transform)


@pytest.mark.parametrize("how", ["error", "drop"])
def test_ratings_are_not_dropped_until_only_the_low_ones_are_left(tiny_gpt2, tmp_path, how):
    rows = make_rows(6, label=[1.0, 2.0, 3.0, 4.0, 5.0, 1.0])
    with pytest.raises(ValueError, match=r'(?s)Row 1 .*Many labels .* ratings .*label_type="continuous".* count as'):
        make_trainer(tiny_gpt2, rows, tmp_path, pointwise=True, invalid_rows=how)
    few = make_rows(6, label=[1.0, 0.0, 1.0, 0.0, 0.0, 9.0])
    with pytest.raises(ValueError, match='Fix these rows, or set invalid_rows="drop"'):
        make_trainer(tiny_gpt2, few, tmp_path, pointwise=True)
    assert len(make_trainer(tiny_gpt2, few, tmp_path, pointwise=True, invalid_rows="drop").train_dataset) == 5
