"""Callbacks without a training."""

from types import SimpleNamespace

import pytest

from trl_ulma import callbacks


@pytest.mark.parametrize(
    ("first", "steps", "seconds", "said"),
    [
        (
            0,
            30,
            20.0,
            [
                "Training begins: 30 steps.",
                "Step 1 of 30: about 10 minutes left.",
                "Step 3 of 30: about 9 minutes left.",
                "Step 7 of 30: about 8 minutes left.",
                "Step 15 of 30: about 5 minutes left.",
                "Step 22 of 30: about 3 minutes left.",
            ],
        ),
        (
            10,
            30,
            4.0,
            [
                "Training begins: 20 steps.",
                "Step 11 of 30: about 76 seconds left.",
                "Step 12 of 30: about 72 seconds left.",
                "Step 15 of 30: about 60 seconds left.",
                "Step 20 of 30: about 40 seconds left.",
                "Step 25 of 30: about 20 seconds left.",
            ],
        ),
        (0, 1, 5.0, ["Training begins: 1 step."]),
        (
            0,
            5,
            3600.0,
            ["Training begins: 5 steps.", *(f"Step {i} of 5: about {5 - i}.0 hours left." for i in (1, 2, 3))],
        ),
    ],
)
def test_the_time_that_is_left_is_said_early(monkeypatch, first, steps, seconds, said):
    clock = [0.0]
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    lines: list[str] = []
    callback = callbacks.TimeLeft(lines.append)
    state = SimpleNamespace(global_step=first, max_steps=steps)
    callback.on_train_begin(None, state, None)
    while state.global_step < steps:
        clock[0] += seconds
        state.global_step += 1
        callback.on_step_end(SimpleNamespace(eval_strategy="no"), state, None)
    assert lines == said


def test_the_first_time_left_does_not_contain_evaluations():
    lines: list[str] = []
    callback = callbacks.TimeLeft(lines.append)
    state = SimpleNamespace(global_step=0, max_steps=10)
    callback.on_train_begin(None, state, None)
    state.global_step = 1
    callback.on_step_end(SimpleNamespace(eval_strategy="epoch"), state, None)
    assert lines[-1].endswith("seconds left, plus evaluations.")


def test_an_evaluation_after_the_training_is_shown_without_a_bar(capsys):
    state = SimpleNamespace(is_world_process_zero=True, global_step=3, max_steps=3)
    callback = callbacks.FewFiguresAboveBar()
    callback.on_log(SimpleNamespace(metric_for_best_model=None), state, None, logs={"eval_loss": 0.5})
    assert capsys.readouterr().out == "Evaluation at step 3 of 3: eval_loss 0.5\n"
