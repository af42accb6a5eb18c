"""What trackers are given: figures by step, and pictures; and what a log file is not."""

import json
import os
import sqlite3
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from transformers.integrations import WandbCallback
from trl import DPOConfig
from world import make_rows, make_trainer

from trl_ulma import PointwiseDPOConfig
from trl_ulma.tracking import TracksPictures, add_pictures


def run(model, tmp_path, **settings):
    """A trainer after two steps with an evaluation each, and one after training."""
    rows = make_rows(12)
    settings |= {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 1e-3}
    trainer = make_trainer(model, rows, tmp_path, pointwise=True, eval_dataset=rows, **settings)
    assert add_pictures(trainer) == ""
    trainer.train()
    trainer.evaluate()
    return trainer


def test_evaluated_rows_are_kept_for_pictures(tiny_gpt2, tmp_path):
    rows = make_rows(7)
    trainer = make_trainer(tiny_gpt2, rows, tmp_path, pointwise=True, learning_rate=1e-2, max_steps=2)
    trainer.train()
    trainer.evaluate(rows)
    reward, label, continuous = trainer.evaluated.T
    assert label.tolist() == rows["label"][:]
    assert not continuous.any()
    assert np.abs(reward).max() > 1e-3
    assert reward == pytest.approx(trainer.predict(rows).predictions, abs=1e-6)


def test_tensorboard_has_figures_by_step_and_pictures(tiny_gpt2, tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    drawn = []
    figures = __import__("trl_ulma.evaluation.figures", fromlist=["calibration"])
    draw = figures.calibration
    monkeypatch.setattr(figures, "calibration", lambda models: drawn.append(models) or draw(models))
    trainer = run(tiny_gpt2, tmp_path / "out", report_to=["tensorboard"])
    events = accumulator.EventAccumulator(str(tmp_path / "events"), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    tags = events.Tags()
    assert {"train/loss", "train/rewards/margins", "eval/loss", "eval/rewards/auc"} <= set(tags["scalars"])
    logged = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [event.value for event in events.Scalars("eval/loss")] == pytest.approx(logged)
    assert set(tags["images"]) == {"train/labels", "eval/calibration"}
    assert [event.step for event in events.Images("train/labels")] == [0]
    assert [event.step for event in events.Images("eval/calibration")] == [1, 2, 2]
    for event in (*events.Images("train/labels"), *events.Images("eval/calibration")):
        assert event.encoded_image_string.startswith(b"\x89PNG")
        assert min(event.width, event.height) > 300
    # σ(r) of the rows, and their labels, in bins that hold all of them
    [(name, bins)] = drawn[-1].items()
    assert name == "step 2"
    assert sum(each.rows for each in bins) == 12
    reward, label, _ = trainer.evaluated.T
    assert sum(each.rows * each.observed for each in bins) == pytest.approx(label.sum())
    assert sum(each.rows * each.predicted for each in bins) == pytest.approx((1 / (1 + np.exp(-reward))).sum())


def test_trackio_has_figures_and_pictures(tiny_gpt2, tmp_path):
    trackio = pytest.importorskip("trackio")
    trainer = run(tiny_gpt2, tmp_path / "out", report_to=["trackio"], project="pictures", run_name="one")
    trackio.finish()
    folder = Path(os.environ["TRACKIO_DIR"])
    [database] = folder.glob("pictures*.db")
    with sqlite3.connect(database) as connection:
        entries = [json.loads(text) for (text,) in connection.execute("SELECT metrics FROM metrics ORDER BY id")]
    found = [entry["eval/loss"] for entry in entries if "eval/loss" in entry]
    assert found == pytest.approx([log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log])
    pictures = [name for entry in entries for name in ("train/labels", "eval/calibration") if name in entry]
    assert pictures == ["train/labels", *["eval/calibration"] * 3]
    assert len([picture for picture in folder.rglob("*.png") if "pictures" in picture.parts]) == 4


def test_trackio_does_not_upload_unless_it_is_asked_to(tmp_path):
    """With older versions of transformers, the default was a public Space."""
    assert PointwiseDPOConfig(str(tmp_path), report_to="trackio", bf16=False).trackio_space_id is None
    theirs = DPOConfig(str(tmp_path), report_to="trackio", bf16=False)
    assert PointwiseDPOConfig.from_dpo_config(theirs).trackio_space_id is None
    theirs.trackio_space_id = "me/runs"
    assert PointwiseDPOConfig.from_dpo_config(theirs).trackio_space_id == "me/runs"


def test_wandb_is_given_the_same_pictures(tiny_gpt2, tmp_path):
    logged = []
    wandb = types.SimpleNamespace(Image=lambda pixels: pixels, log=logged.append)
    rows = make_rows(4)
    trainer = make_trainer(tiny_gpt2, rows, tmp_path, pointwise=True, max_steps=1)

    class Quiet(WandbCallback):
        def __init__(self):
            self._wandb = wandb

        on_train_begin = on_log = on_train_end = on_save = lambda *args, **kwargs: None

    trainer.add_callback(Quiet())
    trainer.add_callback(TracksPictures(trainer))
    trainer.train()
    trainer.evaluate(rows, metric_key_prefix="eval_held_out")
    assert [(set(entry), entry["train/global_step"]) for entry in logged] == [
        ({"train/labels", "train/global_step"}, 0),
        ({"eval_held_out/calibration", "train/global_step"}, 1),
    ]
    for entry in logged:
        [pixels] = [value for value in entry.values() if isinstance(value, np.ndarray)]
        assert pixels.dtype == np.uint8
        assert pixels.shape[2] == 3
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 5


def test_no_picture_where_there_is_nothing_to_draw(tiny_gpt2, tmp_path, monkeypatch):
    drawn = []
    rows = make_rows(4, label=[1.0, 0.5, -1.0, 0.2])
    trainer = make_trainer(tiny_gpt2, rows, tmp_path, pointwise=True, label_type="continuous", max_steps=1)
    pictures = TracksPictures(trainer)
    monkeypatch.setattr(pictures, "_log", lambda name, *args: drawn.append(name))
    trainer.add_callback(pictures)
    trainer.train()
    trainer.evaluate(rows)
    assert drawn == ["train/labels"]
    imitated = make_trainer(tiny_gpt2, make_rows(4), tmp_path, negative_loss="none")
    assert not imitated.has_rewards
    pictures = TracksPictures(imitated)
    monkeypatch.setattr(pictures, "_log", lambda name, *args: drawn.append(name))
    imitated.add_callback(pictures)
    imitated.evaluate(make_rows(4))
    assert drawn == ["train/labels"]


def test_without_matplotlib_it_is_said(tiny_gpt2, tmp_path, monkeypatch):
    trainer = make_trainer(tiny_gpt2, make_rows(2), tmp_path)
    assert add_pictures(trainer) == "", "no tracker, no word"
    monkeypatch.setitem(sys.modules, "trl_ulma.evaluation.figures", None)
    monkeypatch.delattr("trl_ulma.evaluation.figures", raising=False)
    with pytest.raises(ImportError) as error:
        TracksPictures(trainer)
    message = "Plots require matplotlib, which is not installed. Run `pip install 'trl-ulma[evaluation]'`."
    assert str(error.value) == message
    trainer.args.report_to = ["tensorboard"]
    assert add_pictures(trainer) == f"No plots are logged. {message}"


@pytest.mark.parametrize(
    ("terminal", "notebook", "asked", "wanted"),
    [(False, False, None, True), (True, False, None, False), (False, True, None, False), (False, False, False, False)],
)
def test_a_bar_is_for_terminals_and_notebooks(tmp_path, monkeypatch, terminal, notebook, asked, wanted):
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
    monkeypatch.setattr("trl_ulma.config.is_in_notebook", lambda: notebook)
    args = PointwiseDPOConfig(str(tmp_path), report_to="none", bf16=False, disable_tqdm=asked)
    assert args.disable_tqdm is wanted
