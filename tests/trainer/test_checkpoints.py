"""Runs that are broken off go on where they were, from what was written to its end."""

import copy
import os
import signal
from typing import Any

import pytest
import torch
import transformers
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainerState
from world import has_own_adapters, make_rows, make_trainer, weights

from trl_ulma.checkpoints import checkpoints, last_whole, stream_position

EVERY_STEP = {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-3}


def run(folder, tmp_path, *, resume=None, **kwargs):
    trainer = make_trainer(folder, make_rows(12), tmp_path, max_steps=5, **EVERY_STEP | kwargs)
    trainer.train(resume_from_checkpoint=resume)
    return weights(trainer.model)


def test_a_half_written_checkpoint_is_not_taken_for_a_whole_one(tiny_gpt2, tmp_path):
    whole = run(tiny_gpt2, tmp_path)
    newest = tmp_path / "checkpoint-5"
    (newest / "whole").unlink()  # as if killed while it was written
    (newest / "model.safetensors").write_bytes(b"half")
    assert last_whole(tmp_path) == tmp_path / "checkpoint-4"
    assert torch.equal(run(tiny_gpt2, tmp_path, resume=True), whole)
    assert last_whole(tmp_path) == newest


def test_without_a_whole_checkpoint_training_starts_afresh(tiny_gpt2, tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    fresh = run(tiny_gpt2, tmp_path, resume=True)
    assert torch.equal(run(tiny_gpt2, tmp_path / "other"), fresh)


def test_a_checkpoint_that_is_named_and_has_no_mark_is_said(tiny_gpt2, tmp_path, caplog):
    whole = run(tiny_gpt2, tmp_path)
    named = tmp_path / "checkpoint-3"
    assert torch.equal(run(tiny_gpt2, tmp_path, resume=str(named)), whole)
    assert "not marked" not in caplog.text
    (named / "whole").unlink()
    assert torch.equal(run(tiny_gpt2, tmp_path, resume=str(named)), whole)
    assert "checkpoint-3 is not marked as complete" in caplog.text


def test_older_checkpoints_go_only_when_the_newer_is_whole(tiny_gpt2, tmp_path):
    run(tiny_gpt2, tmp_path, save_total_limit=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-5"]
    assert last_whole(tmp_path) == tmp_path / "checkpoint-5"


def test_a_full_disk_is_said_and_leaves_the_last_checkpoint(tiny_gpt2, tmp_path, monkeypatch):
    trainer = make_trainer(tiny_gpt2, make_rows(12), tmp_path, max_steps=5, save_total_limit=1, **EVERY_STEP)
    save = trainer._save_optimizer_and_scheduler

    def full_from_the_third(output_dir):
        if trainer.state.global_step == 3:
            raise OSError(28, "No space left on device")
        save(output_dir)

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", full_from_the_third)
    with pytest.raises(
        OSError, match=r"could not be written .*No space left.*last complete checkpoint is .*checkpoint-2"
    ):
        trainer.train()
    assert torch.equal(run(tiny_gpt2, tmp_path, resume=True), run(tiny_gpt2, tmp_path / "other"))


def test_what_is_pushed_while_training_is_whole(tiny_gpt2, tmp_path, monkeypatch):
    pushed = []

    def push(self, checkpoint_folder):
        pushed.append({*os.listdir(checkpoint_folder)} & {"whole", "optimizer.pt"})
        for name in ("pointwise.json", "log_z.safetensors"):
            beside = tmp_path / f"checkpoint-{self.state.global_step}" / name
            assert (tmp_path / name).read_bytes() == beside.read_bytes()

    monkeypatch.setattr(Trainer, "_push_from_checkpoint", push)
    trainer = make_trainer(
        tiny_gpt2, make_rows(6), tmp_path, max_steps=2, pointwise=True, log_z="learned_constant", **EVERY_STEP
    )
    trainer.args.push_to_hub = True
    trainer.train()
    assert pushed == [{"whole", "optimizer.pt"}] * 2


class PressCtrlC(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_ends_with_a_saved_state_that_goes_on(tiny_gpt2, tmp_path):
    trainer = make_trainer(
        tiny_gpt2, make_rows(12), tmp_path, max_steps=5, callbacks=[PressCtrlC(2)], **EVERY_STEP | {"save_steps": 100}
    )
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert signal.getsignal(signal.SIGINT) is handler
    # The step that was running when it came, or the next one: its rows were chosen already
    assert trainer.state.global_step in (3, 4)
    assert last_whole(tmp_path) == tmp_path / f"checkpoint-{trainer.state.global_step}"
    assert torch.equal(run(tiny_gpt2, tmp_path, resume=True), run(tiny_gpt2, tmp_path / "other"))


@pytest.fixture(scope="module", params=[1, 2])
def streamed(request, tiny_gpt2, tmp_path_factory):
    """(resume, weights of the unbroken run, folder) of trainings on a shuffled stream, in three passes and more."""
    folder = tmp_path_factory.mktemp("streamed")

    def train(out, resume=None):
        stream = make_rows(5).to_iterable_dataset().shuffle(seed=0, buffer_size=5)
        settings = EVERY_STEP | {"max_steps": 8, "gradient_accumulation_steps": request.param}
        trainer = make_trainer(tiny_gpt2, stream, out, **settings)
        trainer.train(resume_from_checkpoint=resume)
        return weights(trainer.model)

    return train, train(folder), folder


in_any_pass = pytest.mark.skipif(
    not hasattr(Trainer, "_init_training_state"),
    reason=f"transformers {transformers.__version__} only resumes in the first pass of a stream",
)


@in_any_pass
@pytest.mark.parametrize("step", [2, 3, 4, 6, 7])
def test_a_stream_resumes_in_any_pass(streamed, tmp_path, step):
    train, unbroken, folder = streamed
    assert torch.equal(train(tmp_path, str(folder / f"checkpoint-{step}")), unbroken)


@pytest.mark.parametrize(
    ("epoch", "position"),
    [
        (0.5, (0, 8)),
        (1.0, (0, 16)),
        pytest.param(1.25, (1, 4), marks=in_any_pass),
        pytest.param(2.875, (2, 14), marks=in_any_pass),
    ],
)
def test_the_position_in_a_stream_of_unknown_length(tmp_path, epoch, position):
    state = TrainerState(epoch=epoch, max_steps=8)
    state.save_to_json(str(tmp_path / "trainer_state.json"))
    assert stream_position(tmp_path, 2) == position


def test_an_older_transformers_refuses_to_resume_in_a_later_pass(streamed, tmp_path, monkeypatch):
    train, _, folder = streamed
    monkeypatch.delattr(Trainer, "_init_training_state", raising=False)
    with pytest.raises(ValueError, match=r"in pass [2-9] over a stream.* Install a newer transformers"):
        train(tmp_path, str(folder / "checkpoint-7"))


# The place in the rows


class StopAt(TrainerCallback):
    """Saves a checkpoint at a step and stops there."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def resumed_with(folder: str, out, caplog, rows: int = 12, **changes) -> list[str]:
    """The warnings of a training that is resumed at step 3 of 6 in its epoch, with other settings."""
    settings = {"num_train_epochs": 2, "per_device_train_batch_size": 2, "disable_tqdm": True}
    make_trainer(folder, make_rows(12), out, callbacks=[StopAt(3)], **settings).train()
    caplog.clear()
    make_trainer(folder, make_rows(rows), out, **settings | changes).train(resume_from_checkpoint=True)
    return [record.getMessage() for record in caplog.records if "training resumes at epoch" in record.getMessage()]


@pytest.mark.parametrize(
    "changes",
    [{"per_device_train_batch_size": 4}, {"gradient_accumulation_steps": 2}, {"rows": 6}],
    ids=["batch", "accumulation", "rows"],
)
def test_a_resume_in_another_place_of_the_epoch_is_told(tiny_gpt2, tmp_path, caplog, changes):
    (warning,) = resumed_with(tiny_gpt2, tmp_path, caplog, **changes)
    assert "written at epoch 0.50" in warning
    assert "resumes at epoch 1.00" in warning


@pytest.mark.parametrize(
    "changes",
    [{}, {"learning_rate": 1e-3}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}],
    ids=["nothing", "rate", "split"],
)
def test_a_resume_in_the_same_place_is_not_told(tiny_gpt2, tmp_path, caplog, changes):
    assert not resumed_with(tiny_gpt2, tmp_path, caplog, **changes)


# Settings that have changed


def told_of_changes(folder: str, out, caplog, *, rows=None, first=None, **changes) -> str:
    """What is logged about other settings when a training is resumed at step 3 of 6 in its epoch."""
    settings = {"num_train_epochs": 2, "per_device_train_batch_size": 2, "disable_tqdm": True, "beta": 0.5}
    settings |= first or {}
    make_trainer(folder, make_rows(12), out, callbacks=[StopAt(3)], **settings).train()
    caplog.clear()
    trainer = make_trainer(folder, make_rows(12) if rows is None else rows, out, **settings | changes)
    trainer.train(resume_from_checkpoint=True)
    found = [record.getMessage() for record in caplog.records if "other settings" in record.getMessage()]
    assert len(found) <= 1
    return "".join(found)


ORDER = "some rows of this epoch are skipped or repeated"
LOSS = "minimize another loss"
CHANGES = {
    "seed": ({"seed": 7}, "data_seed or seed was 42 and is 7", ORDER),
    "data_seed": ({"data_seed": 3}, "data_seed or seed was 42 and is 3", ORDER),
    "batch": ({"per_device_train_batch_size": 4}, "rows per step was 2 and is 4", ORDER),
    "accumulation": ({"gradient_accumulation_steps": 2}, "rows per step was 2 and is 4", ORDER),
    "share_prompts": ({"share_prompts": True}, "share_prompts was False and is True", ORDER),
    "strategy": (
        {"train_sampling_strategy": "sequential"},
        "train_sampling_strategy was random and is sequential",
        ORDER,
    ),
    "rows": ({"rows": make_rows(12, label=[1.0] * 6 + [0.0] * 6)}, "training rows was 12 (", ORDER),
    "beta": ({"beta": 0.1}, "beta was 0.5 and is 0.1", LOSS),
    "method": ({"negative_loss": "unlearning"}, "negative_loss was pointwise_dpo and is unlearning", LOSS),
    "length": (
        {"num_train_epochs": 3},
        "max_steps or num_train_epochs was 2 epochs and is 3 epochs",
        "have other learning rates",
    ),
    "rate": ({"learning_rate": 1e-3}, "learning_rate was 1e-06 and is 0.001", "keeps its own learning_rate"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_resume_with_other_settings_is_told_what_changed(tiny_gpt2, tmp_path, caplog, change):
    changes, what, effect = CHANGES[change]
    told = told_of_changes(tiny_gpt2, tmp_path, caplog, **changes)
    assert what in told
    assert effect in told
    # "was written", and the one change; labels also decide on sft_mask
    assert told.count(" was ") == (3 if change == "rows" else 2)


def test_a_resume_with_several_changes_is_told_all_of_them(tiny_gpt2, tmp_path, caplog):
    told = told_of_changes(tiny_gpt2, tmp_path, caplog, seed=7, beta=0.1)
    assert "data_seed or seed was 42 and is 7; beta was 0.5 and is 0.1" in told
    assert ORDER in told
    assert LOSS in told


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
        {"data_seed": 42},
        {"logging_steps": 5},
        {"seed": 7, "ignore_data_skip": True},
    ],
    ids=["nothing", "split", "same-seed", "logging", "not-skipped"],
)
def test_a_resume_with_the_same_order_and_loss_is_not_told(tiny_gpt2, tmp_path, caplog, changes):
    assert not told_of_changes(tiny_gpt2, tmp_path, caplog, **changes)


def test_a_split_that_changes_groups_of_lengths_is_told(tiny_gpt2, tmp_path, caplog):
    told = told_of_changes(
        tiny_gpt2,
        tmp_path,
        caplog,
        first={"train_sampling_strategy": "group_by_length"},
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
    )
    assert "per_device_train_batch_size was 2 and is 1" in told


@pytest.mark.parametrize("is_adapter", [True, False])
def test_a_checkpoint_of_another_shape_is_named_with_what_to_do(tiny_gpt2, tmp_path, is_adapter):
    def trainer_of(size):
        model, settings = AutoModelForCausalLM.from_pretrained(tiny_gpt2), {}
        if is_adapter:
            settings["peft_config"] = LoraConfig(r=size, task_type="CAUSAL_LM")
        else:
            model.resize_token_embeddings(model.config.vocab_size + size)
        return make_trainer(model, make_rows(8), tmp_path, max_steps=2, save_steps=1, save_strategy="steps", **settings)

    trainer_of(2).train()
    fault = (
        r"The checkpoint \S+checkpoint-2 does not fit the model: \S+ has the shape \[\d+, \d+\] in the checkpoint and "
    )
    with pytest.raises(ValueError, match=fault + r"\[\d+, \d+\] in the model. Resume with the model of the checkpoint"):
        trainer_of(4).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("length", [{"max_steps": 2}, {"num_train_epochs": 1.5}], ids=["steps", "epochs"])
def test_a_training_that_is_complete_makes_no_further_step(tiny_gpt2, tmp_path, caplog, length):
    settings = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant", "learning_rate": 0.01}
    first = make_trainer(tiny_gpt2, make_rows(12), tmp_path, **settings | length)  # an epoch has 3 steps or more
    first.train()
    again = make_trainer(tiny_gpt2, make_rows(12), tmp_path, **settings | length)
    if not hasattr(Trainer, "_init_training_state"):
        with pytest.raises(ValueError, match="has made all"):
            again.train(resume_from_checkpoint=True)
        return
    assert again.train(resume_from_checkpoint=True).global_step == first.state.global_step
    assert f"has made all {first.state.global_step} steps of this training" in caplog.text
    assert torch.equal(weights(again.model), weights(first.model))


def trains_only(folder: str, part: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder)
    for name, p in model.named_parameters():
        p.requires_grad_(part in name)
    return model


def test_a_checkpoint_of_other_trained_weights_of_the_same_shapes_is_refused(tiny_llama, tmp_path):
    settings = {
        "processing_class": AutoTokenizer.from_pretrained(tiny_llama),
        "save_strategy": "steps",
        "save_steps": 1,
    }
    make_trainer(trains_only(tiny_llama, "q_proj"), make_rows(6), tmp_path, max_steps=1, **settings).train()
    other = make_trainer(trains_only(tiny_llama, "o_proj"), make_rows(6), tmp_path, max_steps=2, **settings)
    message = r"training of other parameters: 2 tensors, such as .*q_proj.*; here 2, such as .*o_proj"
    with pytest.raises(ValueError, match=message):
        other.train(resume_from_checkpoint=True)
    assert other.state.global_step == 1  # of the checkpoint


@pytest.mark.parametrize(
    "config", [LoraConfig(target_modules=["o_proj"]), LoraConfig(use_dora=True, target_modules=["q_proj"]), None]
)
def test_a_checkpoint_of_another_adapter_is_refused_in_one_line(tiny_llama, tmp_path, config):
    settings = {"save_strategy": "steps", "save_steps": 1}
    first = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    make_trainer(tiny_llama, make_rows(6), tmp_path, max_steps=1, peft_config=first, **settings).train()
    other = make_trainer(tiny_llama, make_rows(6), tmp_path, max_steps=2, peft_config=config, **settings)
    with pytest.raises(ValueError, match=r"(training of other parameters: 4 tensors|does not fit).*its settings\.$"):
        other.train(resume_from_checkpoint=True)


class Freezes(TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model.get_input_embeddings().requires_grad_(False)


def test_weights_that_a_callback_freezes_are_no_other_parameters(tiny_llama, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "callbacks": [Freezes()]}
    make_trainer(tiny_llama, make_rows(12), tmp_path, max_steps=1, **settings).train()
    resumed = make_trainer(tiny_llama, make_rows(12), tmp_path, max_steps=2, **settings)
    assert resumed.train(resume_from_checkpoint=True).global_step == 2


def test_a_checkpoint_without_states_is_told(tiny_gpt2, tmp_path, caplog):
    run(tiny_gpt2, tmp_path, save_only_model=True)
    assert "no states" not in caplog.text
    run(tiny_gpt2, tmp_path, resume=str(tmp_path / "checkpoint-3"), save_only_model=True)
    assert "checkpoint-3 has no states of the optimizer" in caplog.text


def test_tokens_are_counted_on_after_a_resume(tiny_gpt2, tmp_path):
    def counted(resume):
        trainer = make_trainer(tiny_gpt2, make_rows(12), tmp_path, max_steps=5, **EVERY_STEP)
        trainer.train(resume_from_checkpoint=resume)
        return [log["num_tokens"] for log in trainer.state.log_history if "num_tokens" in log]

    assert counted(None) == counted(str(tmp_path / "checkpoint-3"))


class Averaging(torch.optim.SGD):
    """Evaluates the mean of the weights of all steps, as schedule-free optimizers do in another way."""

    is_training = True

    def step(self, closure=None):
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            state["steps"] = state.get("steps", 0) + 1
            mean = state.setdefault("mean", torch.zeros_like(p))
            mean += (p.detach() - mean) / state["steps"]

    def _swap(self, is_training: bool) -> None:
        if self.is_training != is_training:
            self.is_training = is_training
            for p in self.param_groups[0]["params"]:
                if "mean" in self.state[p]:
                    held = p.detach().clone()
                    p.data.copy_(self.state[p]["mean"])
                    self.state[p]["mean"].copy_(held)

    def train(self):
        self._swap(True)

    def eval(self):
        self._swap(False)


class Keeps(TrainerCallback):
    def __init__(self):
        self.found = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.found.append(weights(model))


@pytest.mark.parametrize("saves", [False, True])
def test_weights_that_an_optimizer_evaluates_are_those_that_are_saved(tiny_gpt2, tmp_path, saves):
    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    optimizer, kept = Averaging(model.parameters(), lr=0.05), Keeps()
    settings = {"optimizers": (optimizer, None), "callbacks": [kept], "lr_scheduler_type": "constant"}
    settings |= EVERY_STEP if saves else {"per_device_train_batch_size": 2}
    trainer = make_trainer(model, make_rows(12), tmp_path, max_steps=4, **settings)
    trainer.train()
    mean = torch.stack(kept.found).mean(0)
    assert (weights(trainer.model) - mean).abs().max() < 1e-6
    assert (kept.found[-1] - mean).abs().max() > 1e-3
    trainer.save_model(tmp_path / "saved")
    folders = [("saved", 4), *([("checkpoint-2", 2), ("checkpoint-4", 4)] if saves else [])]
    for folder, steps in folders:
        found = weights(AutoModelForCausalLM.from_pretrained(tmp_path / folder))
        assert (found - torch.stack(kept.found[:steps]).mean(0)).abs().max() < 1e-6


def test_the_best_weights_are_not_taken_for_those_of_the_optimizer(tiny_gpt2, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    optimizer = Averaging(model.parameters(), lr=0.05)
    settings = {"optimizers": (optimizer, None), "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "best"}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "per_device_train_batch_size": 2}
    trainer = make_trainer(model, make_rows(12), tmp_path, max_steps=5, eval_dataset=make_rows(4), **settings)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, abs=1e-6)


@has_own_adapters
@pytest.mark.parametrize(
    "adapter",
    [
        LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], bias="lora_only"),
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ],
)
def test_an_adapter_that_transformers_has_added_is_resumed_and_its_best_state_found(tiny_llama, tmp_path, adapter):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "learning_rate": 0.02}
    settings |= {"processing_class": AutoTokenizer.from_pretrained(tiny_llama), "eval_dataset": make_rows(6)}
    settings |= {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}

    def trainer(folder: str, **more: Any):
        model = AutoModelForCausalLM.from_pretrained(tiny_llama)
        model.add_adapter(copy.deepcopy(adapter))
        return make_trainer(model, make_rows(6), tmp_path / folder, **settings | more)

    # The largest loss is that of the first evaluation
    whole = trainer("whole", metric_for_best_model="loss", greater_is_better=True)
    whole.train()
    log = [entry["eval_loss"] for entry in whole.state.log_history if "eval_loss" in entry]
    assert log.index(max(log)) < 3
    assert whole.evaluate()["eval_loss"] == pytest.approx(max(log), abs=1e-6)
    resumed = trainer("resumed", load_best_model_at_end=False)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert [entry["eval_loss"] for entry in resumed.state.log_history if "eval_loss" in entry] == log


def test_the_best_adapter_is_found_whatever_its_name(tiny_llama, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"]), adapter_name="mine")
    settings = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "learning_rate": 0.05}
    # The largest loss, so that it is not that of the last step
    settings |= {"greater_is_better": True}
    settings |= {"metric_for_best_model": "loss", "ref_model": AutoModelForCausalLM.from_pretrained(tiny_llama)}
    trainer = make_trainer(
        model, make_rows(12), tmp_path, max_steps=4, eval_dataset=make_rows(4), **EVERY_STEP | settings
    )
    trainer.train()
    assert trainer.state.best_global_step < 4
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, abs=1e-6)
