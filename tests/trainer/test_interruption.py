"""Ctrl-C in any phase, out-of-memory retries, and moved references: what was learned is kept, and nothing is mixed."""

import os
import re
import signal

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import make_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    TrainerCallback,
)
from world import make_rows, make_trainer, mixed_rows, weights

from trl_ulma.checkpoints import WHOLE, checkpoints, last_whole

SETTINGS = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "save_strategy": "steps",
    "save_steps": 100,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "learning_rate": 1e-3,
}


@pytest.fixture(autouse=True)
def listens_to_ctrl_c():
    """Shells start background jobs, such as a test run under nohup, with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class PressCtrlC(TrainerCallback):
    """Sends itself SIGINT once, at the nth time of an event, and keeps what was printed right then.

    Args:
        event: a method of `TrainerCallback`.
        step: how many steps are done by then.
        read: gives what has been printed since it was last called.
    """

    def __init__(self, event: str, step: int, read):
        self.step, self.read, self.said, self.steps = step, read, None, 0
        setattr(self, event, self._press)

    def on_step_end(self, args, state, control, **kwargs):
        self.steps = state.global_step

    def _press(self, args, state, control, **kwargs):
        self.steps = state.global_step
        if self.said is None and state.global_step == self.step:
            self.read()
            os.kill(os.getpid(), signal.SIGINT)
            self.said = self.read()


# Event, steps done by then, the step that is saved
PHASES = {
    "first-step": ("on_step_begin", 0, 1),
    "between-micro-batches": ("on_substep_end", 0, 1),
    "before-the-optimizer": ("on_pre_optimizer_step", 1, 2),
    "a-steps-end": ("on_step_end", 1, 1),
    "evaluation": ("on_prediction_step", 2, 2),
    "evaluations-end": ("on_evaluate", 2, 2),
    "logging": ("on_log", 1, (1, 2)),  # between two steps
    "last-step": ("on_step_begin", 3, 4),
    "last-micro-batch": ("on_substep_end", 3, 4),
    "last-steps-end": ("on_step_end", 4, 4),
    "last-evaluation": ("on_prediction_step", 4, 4),
    "last-evaluations-end": ("on_evaluate", 4, 4),
    "epochs-end": ("on_epoch_end", 4, 4),
}


@pytest.mark.parametrize("phase", PHASES)
def test_ctrl_c_ends_the_step_saves_it_and_ends_the_run(tiny_gpt2, tmp_path, capfd, phase):
    event, done, allowed = PHASES[phase]
    rows = make_rows(16)

    def make(callbacks):
        return make_trainer(
            tiny_gpt2,
            rows,
            tmp_path,
            eval_dataset=make_rows(3),
            gradient_accumulation_steps=2,
            callbacks=callbacks,
            **SETTINGS,
        )

    press = PressCtrlC(event, done, lambda: "".join(capfd.readouterr()))
    trainer = make([press])
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert signal.getsignal(signal.SIGINT) is handler
    # Told at once, in one line
    assert press.said is not None, "the moment never came"
    assert len(re.findall(r"(?im)^.*interrupt.*$", press.said)) == 1
    # The step that was running is the last one, and whole
    saved = trainer.state.global_step
    assert saved in (allowed if isinstance(allowed, tuple) else (allowed,))
    assert (tmp_path / f"checkpoint-{saved}" / "model.safetensors").exists()
    assert len(list(tmp_path.glob("checkpoint-*"))) == 1
    # One goes on with it as if nothing had been
    unbroken = make([])
    unbroken.args.output_dir = str(tmp_path / "unbroken")
    unbroken.train()
    resumed = make([])
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert torch.equal(weights(unbroken.model), weights(resumed.model))


def test_ctrl_c_ends_without_the_evaluation_of_an_epoch_and_the_card_says_it(tiny_gpt2, tmp_path, capfd):
    each = {"eval_strategy": "epoch", "save_strategy": "epoch", "eval_steps": None, "max_steps": -1}
    settings = {**SETTINGS, **each, "num_train_epochs": 2}
    press = PressCtrlC("on_step_begin", 0, lambda: "".join(capfd.readouterr()))
    trainer = make_trainer(tiny_gpt2, make_rows(16), tmp_path, eval_dataset=make_rows(3), callbacks=[press], **settings)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not [logs for logs in trainer.state.log_history if "eval_loss" in logs]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    card = (tmp_path / "README.md").read_text()
    total = trainer.state.max_steps
    assert total > 1
    assert f"not finished**: it stopped, or still runs, after step 1 of {total}" in card
    assert f'from_pretrained("{tmp_path.name}/checkpoint-1")' in card
    trainer = make_trainer(tiny_gpt2, make_rows(16), tmp_path, eval_dataset=make_rows(3), **settings)
    trainer.train(resume_from_checkpoint=True)
    trainer.create_model_card()
    assert len([logs for logs in trainer.state.log_history if "eval_loss" in logs]) == 2
    assert "not finished" not in (tmp_path / "README.md").read_text()


def test_ctrl_c_while_the_reference_is_precomputed(tiny_gpt2, tmp_path):
    """Nothing is learned yet: the constructor ends at once."""
    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    forwards = []

    def press(*args):
        forwards.append(1)
        os.kill(os.getpid(), signal.SIGINT)

    model.transformer.register_forward_pre_hook(press)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        make_trainer(model, make_rows(6), tmp_path, precompute_ref_log_probs=True, max_steps=1)
    assert signal.getsignal(signal.SIGINT) is handler
    assert len(forwards) == 1


def test_ctrl_c_before_the_first_step(tiny_gpt2, tmp_path, capfd):
    press = PressCtrlC("on_train_begin", 0, lambda: "".join(capfd.readouterr()))
    trainer = make_trainer(tiny_gpt2, make_rows(8), tmp_path, callbacks=[press], **SETTINGS | {"eval_strategy": "no"})
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step <= 1


def pressing(times: int, read, said: list[str]):
    """A function that presses Ctrl-C, as often as given, the first time that it is called."""

    def press(*args, **kwargs):
        if not said:
            read()
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
            said.append(read())

    return press


def lines_of(said: str) -> int:
    return len(re.findall(r"(?im)^.*interrupt.*$", said))


def test_ctrl_c_in_the_startup_proof(tiny_gpt2, tmp_path, capfd):
    """It is told at once, and the first step is finished and saved."""
    settings = SETTINGS | {"eval_strategy": "no"}
    trainer, said = make_trainer(tiny_gpt2, make_rows(8), tmp_path, **settings), []
    trainer.model.get_input_embeddings().register_forward_pre_hook(
        pressing(1, lambda: "".join(capfd.readouterr()), said)
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert lines_of(said[0]) == 1
    assert last_whole(tmp_path) == tmp_path / "checkpoint-1"
    resumed = make_trainer(tiny_gpt2, make_rows(8), tmp_path, **settings)
    resumed.train(resume_from_checkpoint=True)
    unbroken = make_trainer(tiny_gpt2, make_rows(8), tmp_path / "unbroken", **settings)
    unbroken.train()
    assert torch.equal(weights(unbroken.model), weights(resumed.model))


@pytest.mark.parametrize("step", [2, 4], ids=["between", "last"])
def test_ctrl_c_while_a_checkpoint_is_written(tiny_gpt2, tmp_path, monkeypatch, capfd, step):
    """The checkpoint is finished, and no further step is run."""
    settings = SETTINGS | {"eval_strategy": "no", "save_steps": step}
    trainer, said = make_trainer(tiny_gpt2, make_rows(8), tmp_path, **settings), []
    save, press = trainer._save_optimizer_and_scheduler, pressing(1, lambda: "".join(capfd.readouterr()), said)
    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", lambda folder: (press(), save(folder)))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert lines_of(said[0]) == 1
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{step}"]
    assert last_whole(tmp_path) == tmp_path / f"checkpoint-{step}"
    assert trainer.state.global_step == step
    resumed = make_trainer(tiny_gpt2, make_rows(8), tmp_path, **settings)
    resumed.train(resume_from_checkpoint=True)
    unbroken = make_trainer(tiny_gpt2, make_rows(8), tmp_path / "unbroken", **settings)
    unbroken.train()
    assert torch.equal(weights(unbroken.model), weights(resumed.model))


def test_a_second_ctrl_c_while_a_checkpoint_is_written(tiny_gpt2, tmp_path, monkeypatch, capfd):
    """What is half written is not taken for a checkpoint."""
    settings = SETTINGS | {"eval_strategy": "no", "save_steps": 1}
    trainer, said = make_trainer(tiny_gpt2, make_rows(8), tmp_path, **settings), []
    save, press = trainer._save_optimizer_and_scheduler, pressing(2, lambda: "".join(capfd.readouterr()), said)
    monkeypatch.setattr(
        trainer,
        "_save_optimizer_and_scheduler",
        lambda folder: (press() if trainer.state.global_step == 2 else None, save(folder)),
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert (tmp_path / "checkpoint-2" / "model.safetensors").exists()
    assert last_whole(tmp_path) == tmp_path / "checkpoint-1"


# What is left on the model

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


def traces(model: torch.nn.Module) -> dict:
    """What is set on a model besides its weights and modes: hooks, forwards, what is trained, the active adapter."""
    found: dict = {
        name: ([len(getattr(module, kind)) for kind in _HOOKS], vars(module).get("forward"))
        for name, module in model.named_modules()
    }
    found |= {f"{name} is trained": p.requires_grad for name, p in model.named_parameters()}
    return found | {"adapters": list(getattr(model, "active_adapters", [])) if hasattr(model, "peft_config") else []}


def answers(model: torch.nn.Module) -> tuple[torch.Tensor, list[int]]:
    """(logits, generated tokens) of a prompt."""
    ids = torch.arange(5, 13)[None]
    training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        said = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    model.train(training)
    return logits, said[0].tolist()


def assert_nothing_is_left(model: torch.nn.Module, before: dict, answered: tuple) -> None:
    after = traces(model)
    assert after.keys() == before.keys()
    assert {name: after[name] for name in after if after[name] != before[name]} == {}
    assert len({module.training for module in model.modules()}) == 1
    logits, said = answers(model)
    assert torch.allclose(logits, answered[0], atol=1e-4)
    assert said == answered[1]


STILL = SETTINGS | {"learning_rate": 1e-12, "save_steps": 2, "beta": 0.5}
MODELS = {
    "full": ({}, False),
    "lora": ({"peft_config": LoraConfig(r=4, target_modules=["c_attn"], task_type="CAUSAL_LM")}, False),
    "adapter": ({}, True),
    "shared": ({"share_prompts": True}, False),
    "chunks": ({"log_z": "batch_kl"}, False),
}


def to_be_interrupted(folder: str, out, kind: str, **more):
    """A trainer, the state of its model, and what its model answers."""
    settings, has_adapter = MODELS[kind]
    model = AutoModelForCausalLM.from_pretrained(folder)
    if has_adapter:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["c_attn"], init_lora_weights=False))
    answered = answers(model)
    tokenizer = {"processing_class": AutoTokenizer.from_pretrained(folder)}
    trainer = make_trainer(model, make_rows(8), out, eval_dataset=make_rows(3), **tokenizer, **STILL | settings | more)
    return trainer, answered


@pytest.mark.parametrize("kind", MODELS)
def test_a_keyboard_interrupt_in_any_forward_leaves_nothing_on_the_model(tiny_gpt2, tmp_path, kind):
    """In the proof, in the forward of the policy and of the reference, in the evaluation."""
    trainer, answered = to_be_interrupted(tiny_gpt2, tmp_path, kind)
    calls, at = [0], [0]

    def interrupt(*args):
        calls[0] += 1
        if calls[0] == at[0]:
            raise KeyboardInterrupt

    model = trainer.model.train()  # PEFT makes adapters in training mode, whatever mode the model is in
    model.get_input_embeddings().register_forward_pre_hook(interrupt)
    before, ended, interrupted = traces(model), False, 0
    while not ended:
        at[0] += 1 + at[0] // 4
        calls[0] = 0
        try:
            trainer.train()
            ended = True
        except KeyboardInterrupt:
            interrupted += 1
        calls[0] = -(10**6)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert_nothing_is_left(model, before, answered)
        assert all((path / WHOLE).exists() for path in checkpoints(tmp_path))
    assert interrupted >= 8


class Mine(Exception):
    """The error of a user's own callback."""


class Raises(TrainerCallback):
    """Raises in an event, once a step is done."""

    def __init__(self, event: str):
        setattr(self, event, self._raise)

    def _raise(self, args, state, control, **kwargs):
        raise Mine


EVENTS = ["on_train_begin", "on_epoch_begin", "on_step_begin", "on_substep_end", "on_pre_optimizer_step"]
EVENTS += ["on_optimizer_step", "on_step_end", "on_prediction_step", "on_evaluate", "on_log", "on_save"]
EVENTS += ["on_epoch_end", "on_train_end"]


@pytest.mark.parametrize("event", EVENTS)
def test_a_callback_that_raises_leaves_nothing_on_the_model(tiny_gpt2, tmp_path, event):
    settings = {"gradient_accumulation_steps": 2, "callbacks": [Raises(event)]}
    trainer, answered = to_be_interrupted(tiny_gpt2, tmp_path, "adapter", **settings)
    model = trainer.model
    before = traces(model)
    with pytest.raises(Mine):
        trainer.train()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert_nothing_is_left(model, before, answered)
    assert all((path / WHOLE).exists() for path in checkpoints(tmp_path))
    trainer.remove_callback(Raises)
    trainer.train()
    assert trainer.state.global_step == 4
    assert_nothing_is_left(model, before, answered)


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_an_interrupted_precomputation_leaves_nothing_on_the_model(tiny_gpt2, tmp_path, kind):
    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    if kind == "adapter":
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["c_attn"], init_lora_weights=False))
    answered, calls = answers(model.train()), []

    def interrupt(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    hook = model.get_input_embeddings().register_forward_pre_hook(interrupt)
    before = traces(model)
    settings = {"processing_class": AutoTokenizer.from_pretrained(tiny_gpt2), "max_steps": 1}
    with pytest.raises(KeyboardInterrupt):
        make_trainer(model, make_rows(6), tmp_path, precompute_ref_log_probs=True, **settings)
    assert len(calls) == 3
    assert_nothing_is_left(model, before, answered)
    assert model.training
    hook.remove()
    make_trainer(model, make_rows(6), tmp_path, precompute_ref_log_probs=True, **settings).train()


def test_a_second_ctrl_c_ends_at_once(tiny_gpt2, tmp_path, capfd):
    class Twice(PressCtrlC):
        def _press(self, args, state, control, **kwargs):
            super()._press(args, state, control, **kwargs)
            if self.said is not None:
                os.kill(os.getpid(), signal.SIGINT)

    press = Twice("on_step_begin", 1, lambda: "".join(capfd.readouterr()))
    trainer = make_trainer(tiny_gpt2, make_rows(8), tmp_path, callbacks=[press], **SETTINGS | {"eval_strategy": "no"})
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == 1
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_run_without_ctrl_c_returns(tiny_gpt2, tmp_path):
    trainer = make_trainer(tiny_gpt2, make_rows(8), tmp_path, eval_dataset=make_rows(2), **SETTINGS)
    assert trainer.train().global_step == 4


# Out of memory


class OutOfMemory(TrainerCallback):
    """The first try ends before its nth optimizer step."""

    def __init__(self, step: int = 0):
        self.step, self.is_over = step, False

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if not self.is_over and state.global_step == self.step:
            self.is_over = True
            raise RuntimeError("CUDA out of memory.")


@pytest.mark.parametrize("log_z", ["running_mean", "batch_kl", "learned_constant", 0.0])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_retry_after_running_out_of_memory_starts_clean(tiny_gpt2, tmp_path, log_z, accumulation):
    rows = mixed_rows(24)
    if isinstance(log_z, str):
        rows = rows.remove_columns("log_z")
    settings = {
        "max_steps": 2,
        "gradient_accumulation_steps": accumulation,
        "train_sampling_strategy": "sequential",
        "learning_rate": 1e-3,
        "log_z": log_z,
        "beta": 0.5,
    }
    callback = OutOfMemory()
    retried = make_trainer(
        tiny_gpt2,
        rows,
        tmp_path / "retried",
        callbacks=[callback],
        auto_find_batch_size=True,
        per_device_train_batch_size=8,
        **settings,
    )
    retried.train()
    assert callback.is_over
    size = retried._train_batch_size
    assert size < 8
    clean = make_trainer(tiny_gpt2, rows, tmp_path / "clean", per_device_train_batch_size=size, **settings)
    clean.train()
    wanted = [log for log in clean.state.log_history if "loss" in log]
    found = [log for log in retried.state.log_history if "loss" in log]
    assert len(found) == len(wanted) == 2
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            assert one[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    assert (weights(retried.model) - weights(clean.model)).abs().max() < 1e-6


# A reference that moves


@pytest.mark.parametrize("alpha", [1.0, 0.6])
def test_a_moved_reference_is_restored_or_the_resume_is_refused(tiny_gpt2, tmp_path, alpha):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "sync_ref_model": True, "beta": 0.5}
    settings |= {"ref_model_sync_steps": 2, "ref_model_mixup_alpha": alpha, "learning_rate": 1e-2}
    settings |= {"per_device_train_batch_size": 4}
    unbroken = make_trainer(tiny_gpt2, make_rows(12), tmp_path, **settings)
    unbroken.train()
    resumed = make_trainer(tiny_gpt2, make_rows(12), tmp_path, **settings)
    try:
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    except ValueError as refusal:
        assert "sync_ref_model" in str(refusal)  # noqa: PT017
        return
    assert torch.equal(weights(unbroken.model), weights(resumed.model))
    assert unbroken.evaluate(make_rows(6))["eval_loss"] == resumed.evaluate(make_rows(6))["eval_loss"]


# Figures


def test_a_logs_figures_are_of_the_rows_that_its_loss_is_of(tiny_gpt2, tmp_path):
    """A figure is of the rows that the loss is of, or the log says of how many rows it is."""
    rows = make_rows(16, sft_mask=[i % 4 != 3 for i in range(16)], label=[float(i % 4 != 3) for i in range(16)])
    trainer = make_trainer(
        tiny_gpt2,
        rows,
        tmp_path,
        max_steps=4,
        logging_steps=4,
        per_device_train_batch_size=4,
        train_sampling_strategy="sequential",
        learning_rate=1e-3,
        beta=1.0,
    )
    trainer.train()
    each = make_trainer(
        tiny_gpt2,
        rows,
        tmp_path,
        max_steps=4,
        logging_steps=1,
        per_device_train_batch_size=4,
        train_sampling_strategy="sequential",
        learning_rate=1e-3,
        beta=1.0,
    )
    each.train()
    (log,) = [log for log in trainer.state.log_history if "loss" in log]
    logs = [log for log in each.state.log_history if "loss" in log]
    # One row of each step is compared: the mean over four steps is the mean of the steps'
    for name in ("loss", "loss/preference", "logps/rejected"):
        assert float(log[name]) == pytest.approx(np.mean([float(step[name]) for step in logs]), rel=1e-4)
    # Demonstrations have rewards in the logged step only, and the log says of how many rows rewards are
    assert log["rewards/rows"] == 4
    for name in ("rewards/rejected", "rewards/chosen", "kl"):
        assert float(log[name]) == pytest.approx(float(logs[-1][name]), rel=1e-4)
    assert not any("rewards/rows" in step for step in logs)


def test_an_error_in_a_sharded_stream_names_the_row(tiny_gpt2, tmp_path):
    rows = make_rows(40, completion=[" fine"] * 39 + [""])
    stream = rows.to_iterable_dataset(num_shards=2)
    settings = {"max_steps": 20, "dataloader_num_workers": 2, "startup_checks": False}
    with pytest.raises(Exception, match=r"(?s)shard|Row 39\b"):
        make_trainer(tiny_gpt2, stream, tmp_path, **settings).train()


def longrope(tokenizer):
    """A model whose rotary positions change if the longest row of a batch has more than 16 tokens."""
    torch.manual_seed(0)
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 16,
    }
    config = Phi3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        original_max_position_embeddings=16,
        rope_parameters=rope,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    return Phi3ForCausalLM(config)


def test_rotary_positions_that_change_with_the_longest_row(tmp_path):
    """Longrope encodes positions beyond the original length differently, for the policy and the reference alike."""
    tokenizer = make_tokenizer()
    # The long rows are demonstrations: the reference is asked for the short ones alone
    texts = [" on and on" * 12 if i % 2 else " yes" for i in range(8)]
    rows = make_rows(
        8, completion=texts, sft_mask=[bool(i % 2) for i in range(8)], label=[float(i % 2) for i in range(8)]
    )
    trainer = make_trainer(
        longrope(tokenizer),
        rows,
        tmp_path,
        processing_class=tokenizer,
        max_steps=4,
        logging_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-12,
        beta=1.0,
    )
    trainer.train()
    found = [log["loss/preference"] for log in trainer.state.log_history if "loss/preference" in log]
    assert found == pytest.approx([0.693147] * len(found), abs=1e-4)


def test_a_reference_that_depends_on_the_batch_is_not_precomputed(tmp_path):
    tokenizer = make_tokenizer()
    rows = make_rows(4, prompt=["a"] * 4, completion=[" on and on" * 12, " yes", " no", " it"])
    settings = {"processing_class": tokenizer, "precompute_ref_log_probs": True, "max_steps": 1}
    with pytest.raises(ValueError, match=r"(?s)more than 16 tokens .*max_length=16"):
        make_trainer(longrope(tokenizer), rows, tmp_path, **settings)
    trainer = make_trainer(longrope(tokenizer), rows, tmp_path, max_length=16, learning_rate=1e-12, **settings)
    trainer.train()
    assert trainer.state.log_history[0]["loss/preference"] == pytest.approx(0.693147, abs=1e-4)


def test_rotary_positions_that_depend_on_earlier_batches_are_refused(tmp_path):
    tokenizer = make_tokenizer()
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=4, max_position_embeddings=16, rope_parameters=rope)
    rows = make_rows(4, prompt=["a"] * 4, completion=[" on and on" * 12, " yes", " no", " it"])
    settings = {"processing_class": tokenizer, "max_steps": 1}
    with pytest.raises(ValueError, match=r"(?s)only has 16 positions.*max_length=16"):
        make_trainer(LlamaForCausalLM(config), rows, tmp_path, **settings)
    make_trainer(LlamaForCausalLM(config), rows, tmp_path, max_length=16, **settings).train()
