"""The choices for log Z in the trainers: what a row is given, how it moves, where its state goes, what is refused."""

import math

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig, OPTForCausalLM, TrainerCallback
from world import make_rows, make_trainer, mixed_rows, weights

from trl_ulma import PointwiseDPOConfig, PointwiseDPOTrainer
from trl_ulma.judge import Judge
from trl_ulma.log_partition import LOG_Z_CHOICES
from trl_ulma.log_z import mismatched

MOVING = ("running_mean", "batch_kl", "learned", "learned_constant")
SETTINGS = {"beta": 0.5, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "lr_scheduler_type": "linear"}


def rows_for(choice, n=12):
    rows = mixed_rows(n)
    if choice == "group":  # three rows a prompt, and no soft labels
        columns = {"prompt": [f"Prompt {i % (n // 3)}" for i in range(n)], "label_type": ["continuous"] * n}
        return make_rows(n, label=rows["label"], sft_mask=rows["sft_mask"], weight=rows["weight"], **columns)
    return rows if choice == "column" else rows.remove_columns("log_z")


def column(trainer, name):
    return [log[name] for log in trainer.state.log_history if name in log]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("choice", LOG_Z_CHOICES)
def test_every_choice_trains_saves_and_resumes_bit_for_bit(tiny_gpt2, tmp_path, choice, lora):
    def run(resume):
        trainer = make_trainer(
            tiny_gpt2,
            rows_for(choice),
            tmp_path,
            log_z=choice,
            max_steps=5,
            save_strategy="steps",
            save_steps=3,
            eval_dataset=rows_for(choice, 6),
            eval_strategy="steps",
            eval_steps=3,
            peft_config=LoraConfig(r=4, target_modules=["c_attn"], task_type="CAUSAL_LM") if lora else None,
            **SETTINGS,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    unbroken = run(None)
    resumed = run(str(tmp_path / "checkpoint-3"))
    assert torch.equal(weights(unbroken.model), weights(resumed.model))
    state = unbroken.log_partition.state_dict()
    assert all(torch.equal(value, resumed.log_partition.state_dict()[name]) for name, value in state.items())
    saved = tmp_path / "checkpoint-5" / "log_z.safetensors"
    assert saved.exists() == bool(state)
    assert all(torch.equal(value, load_file(saved)[name]) for name, value in state.items())
    if choice in MOVING:
        # batch_kl is cut at 0, where one step may leave it
        assert any(value.abs().max() > 0 for value in state.values()) or choice == "batch_kl"
    evaluated = column(unbroken, "eval_log_z")
    assert evaluated
    assert all(math.isfinite(value) for value in evaluated)


@pytest.mark.parametrize("choice", MOVING)
def test_evaluation_leaves_it_as_it_is(tiny_gpt2, tmp_path, choice):
    trainer = make_trainer(tiny_gpt2, rows_for(choice), tmp_path, log_z=choice, max_steps=2, **SETTINGS)
    trainer.train()
    before = {name: value.clone() for name, value in trainer.log_partition.state_dict().items()}
    first = trainer.evaluate(rows_for(choice, 6))
    assert trainer.evaluate(rows_for(choice, 6))["eval_loss"] == first["eval_loss"]
    after = trainer.log_partition.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_the_prior_starts_calibrated(tiny_gpt2, tmp_path):
    rows = make_rows(12, label=[float(i % 4 > 0) for i in range(12)])
    trainer = make_trainer(tiny_gpt2, rows, tmp_path, pointwise=True, log_z="prior", max_steps=1, **SETTINGS)
    # The policy is the reference: every reward is c, and σ(c) the mean label
    rewards = torch.from_numpy(trainer.predict(rows).predictions)
    torch.testing.assert_close(torch.sigmoid(rewards), torch.full((12,), 0.75), atol=1e-5, rtol=0)


class Sets(TrainerCallback):
    """Sets attributes of a trainer, or of its args, after the first step."""

    trainer: PointwiseDPOTrainer

    def __init__(self, *, of_args: bool = True, **values):
        self.of_args, self.values = of_args, values

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            for name, value in self.values.items():
                setattr(self.trainer.args if self.of_args else self.trainer, name, value)


@pytest.mark.parametrize("choice", ["prior", "learned_constant"])
def test_log_z_follows_a_beta_that_a_callback_changes(tiny_gpt2, tmp_path, choice):
    rows = make_rows(12, label=[float(i % 4 > 0) for i in range(12)])
    sets = Sets(of_args=False, beta=0.1)
    settings = SETTINGS | {"log_z": choice, "max_steps": 2, "learning_rate": 1e-9, "save_strategy": "steps"}
    trainer = make_trainer(
        tiny_gpt2, rows, tmp_path, pointwise=True, callbacks=[sets], save_steps=1, log_z_learning_rate=0.3, **settings
    )
    sets.trainer = trainer
    trainer.train()
    first, second = column(trainer, "log_z")
    if choice == "prior":
        assert first * 0.5 == pytest.approx(math.log(3))
        assert second * 0.1 == pytest.approx(math.log(3))
    else:
        assert (first, second * 0.1) == (0.0, pytest.approx(0.3, rel=0.01))  # after one step of Adam
    # The file has log Z for the β that is saved beside it, and a resume with the first β returns to c
    judge = Judge.from_pretrained(tmp_path / "checkpoint-2")
    rewards = trainer.predict(rows).predictions
    assert judge.score(rows)["reward"] == pytest.approx(rewards.tolist(), abs=1e-4)
    resumed = make_trainer(tiny_gpt2, rows, tmp_path, pointwise=True, log_z_learning_rate=0.3, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert 0.5 * resumed.log_partition(torch.tensor([False])).item() == pytest.approx(
        0.1 * trainer.log_partition(torch.tensor([False])).item()
    )


@pytest.mark.parametrize(
    ("log_z", "sets", "message"),
    [
        ("prior", Sets(desirable_weight=2.0), "desirable_weight from 1.0 to 2.0. The trainer has read them before"),
        ("learned_constant", Sets(log_z="prior"), "log_z from 'learned_constant' to 'prior'"),
        (0.0, Sets(label_smoothing=0.1), "label_smoothing from 0.0 to 0.1"),
        (0.0, Sets(of_args=False, label_smoothing=0.1), "trainer.label_smoothing was changed from 0.0 to 0.1"),
        (0.0, Sets(beta=0.0), "beta must be above 0; got 0.0"),
        (0.0, Sets(of_args=False, args=PointwiseDPOConfig(".", bf16=False)), "trainer.args was replaced"),
    ],
    ids=lambda value: "".join(getattr(value, "values", "")),
)
def test_what_cannot_change_in_a_training_is_an_error_in_the_next_step(tiny_gpt2, tmp_path, log_z, sets, message):
    sets.trainer = make_trainer(
        tiny_gpt2, make_rows(8), tmp_path, pointwise=True, log_z=log_z, callbacks=[sets], max_steps=3
    )
    with pytest.raises(ValueError, match=message):
        sets.trainer.train()
    assert sets.trainer.state.global_step == 1


def test_a_preset_that_follows_from_beta_keeps_it(tiny_gpt2, tmp_path):
    rows = make_rows(8, label=[0.1 * i for i in range(8)])
    trainer = make_trainer(tiny_gpt2, rows, tmp_path, pointwise=True, preset="sppo", max_steps=3)
    trainer.beta = 0.2
    with pytest.raises(ValueError, match=r"beta from 0\.1 to 0\.2"):
        trainer.train()


def test_the_prior_weighs_as_the_loss_does(tiny_gpt2, tmp_path):
    rows = make_rows(12, weight=[3.0 if i % 2 == 0 else 1.0 for i in range(12)])
    trainer = make_trainer(
        tiny_gpt2, rows, tmp_path, pointwise=True, log_z="prior", undesirable_weight=2.0, max_steps=1, **SETTINGS
    )
    assert torch.sigmoid(0.5 * trainer.log_partition.log_z[0]).item() == pytest.approx(3 / (3 + 2))


@pytest.mark.parametrize("layout", [{}, {"share_prompts": True}, {"padding_free": True}])
def test_the_first_step_of_a_learned_one_is_along_the_gradient(tiny_llama, tmp_path, layout):
    """Adam's first step is its learning rate, against the gradient's sign."""
    rows = make_rows(8, label=[1.0, 1.0, 1.0, 0.0] * 2)
    settings = SETTINGS | {"per_device_train_batch_size": 8, "lr_scheduler_type": "constant"}
    settings |= {"log_z": "learned", "log_z_learning_rate": 0.02, "max_steps": 1}
    trainer = make_trainer(tiny_llama, rows, tmp_path, pointwise=True, **settings, **layout)
    states = []
    for row in trainer.train_dataset:
        with torch.no_grad():
            hidden = trainer.model.base_model(torch.tensor([row["prompt_ids"]])).last_hidden_state[0, -1]
        states.append(torch.nn.functional.normalize(hidden.double(), dim=0))
    slope = torch.tensor([0.5 - label for label in rows["label"]], dtype=torch.float64)
    gradient = torch.cat([slope @ torch.stack(states), slope.sum()[None]]) / 8
    trainer.train()
    sure = gradient.abs() > 1e-4
    moved = trainer.log_partition.weights.detach()[:-1]
    torch.testing.assert_close(moved[sure], -0.02 * gradient.sign()[sure], atol=1e-5, rtol=0)
    assert trainer.log_partition.weights[-1] == 0  # no row with a continuous label


def test_a_learned_constant_follows_an_imbalance(tiny_gpt2, tmp_path):
    rows = make_rows(16, label=[float(i % 4 > 0) for i in range(16)])
    settings = SETTINGS | {"learning_rate": 1e-9, "lr_scheduler_type": "constant", "per_device_train_batch_size": 16}
    trainer = make_trainer(
        tiny_gpt2,
        rows,
        tmp_path,
        pointwise=True,
        log_z="learned_constant",
        log_z_learning_rate=0.05,
        max_steps=80,
        **settings,
    )
    trainer.train()
    # The policy stays, so that c alone is left to fit the mean label
    assert trainer.log_partition.weights[0].item() == pytest.approx(math.log(3), abs=0.02)


def test_the_learned_rate_follows_the_schedule(tiny_gpt2, tmp_path):
    moved = []
    for schedule in ("constant", "linear"):
        trainer = make_trainer(
            tiny_gpt2,
            make_rows(12, label=[1.0, 1.0, 1.0, 0.0] * 3),
            tmp_path,
            pointwise=True,
            log_z="learned_constant",
            max_steps=10,
            **SETTINGS | {"lr_scheduler_type": schedule, "learning_rate": 1e-9, "per_device_train_batch_size": 12},
        )
        trainer.train()
        moved.append(trainer.log_partition.weights[0].item())
    assert moved[0] == pytest.approx(0.1, rel=0.02)
    assert moved[1] == pytest.approx(0.055, rel=0.02)  # 0.01·(1 + 0.9 + … + 0.1)


@pytest.mark.parametrize("schedule", ["one cycle", "cyclic"])
def test_the_learned_rate_is_that_of_the_peak_of_a_schedule_that_begins_below(tiny_gpt2, tmp_path, schedule):
    def make(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9)
        if schedule == "one cycle":
            return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-9, total_steps=10)
        return optimizer, torch.optim.lr_scheduler.CyclicLR(optimizer, 1e-11, 1e-9, 4, cycle_momentum=False)

    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    rows, tokenizer = make_rows(12, label=[1.0, 1.0, 1.0, 0.0] * 3), AutoTokenizer.from_pretrained(tiny_gpt2)
    settings = SETTINGS | {"per_device_train_batch_size": 12, "log_z": "learned_constant", "max_steps": 10}
    own = {"processing_class": tokenizer, "optimizers": make(model)}
    trainer = make_trainer(model, rows, tmp_path, pointwise=True, **settings, **own)
    trainer.train()
    rates = [rate / 1e-9 for rate in column(trainer, "learning_rate")]
    assert max(rates) == pytest.approx(1.0, rel=0.1)
    assert trainer.log_partition.weights[0].item() == pytest.approx(0.01 * sum(rates), rel=0.05)


def evaluated_each_step(model, folder, **settings):
    return make_trainer(
        model,
        make_rows(12, label=[1.0, 1.0, 1.0, 0.0] * 3),
        folder,
        pointwise=True,
        log_z="learned_constant",
        eval_dataset=make_rows(2),
        eval_strategy="steps",
        eval_steps=1,
        **SETTINGS | {"learning_rate": 1e-9} | settings,
    )


def test_the_learned_rate_follows_a_schedule_that_is_not_known_beforehand(tiny_gpt2, tmp_path):
    def run(resume=None):
        trainer = evaluated_each_step(
            tiny_gpt2,
            tmp_path,
            metric_for_best_model="loss",
            lr_scheduler_kwargs={"patience": 0, "factor": 0.1, "threshold": 10.0, "threshold_mode": "abs", "eps": 0.0},
            max_steps=4,
            save_strategy="steps",
            save_steps=2,
            lr_scheduler_type="reduce_lr_on_plateau",
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    trainer = run()
    rates = [1.0, 1.0, 0.1, 0.01]  # the first evaluation is the best one, and each later one a plateau
    assert trainer.log_partition.weights[0].item() == pytest.approx(0.01 * sum(rates), rel=0.02)
    resumed = run(str(tmp_path / "checkpoint-2"))
    assert torch.equal(resumed.log_partition.weights, trainer.log_partition.weights)


def test_the_learned_rate_follows_a_schedule_with_a_bound_that_is_no_peak(tiny_gpt2, tmp_path):
    try:
        trainer = evaluated_each_step(tiny_gpt2, tmp_path, lr_scheduler_type="greedy", max_steps=3)
    except ValueError as error:
        pytest.skip(f"this version of transformers has no such schedule: {error}")
    trainer.train()
    assert trainer.log_partition.weights[0].item() == pytest.approx(0.01 * 3, rel=0.02)


def test_a_prompts_log_z_is_read_off_states_of_the_output_embeddings_width(tiny_gpt2, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    config = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        word_embed_proj_dim=16,
        ffn_dim=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
        do_layer_norm_before=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    for each in (tokenizer, OPTForCausalLM(config)):
        each.save_pretrained(tmp_path / "opt")
    trainer = make_trainer(
        str(tmp_path / "opt"), rows_for("learned"), tmp_path, log_z="learned", max_steps=1, **SETTINGS
    )
    trainer.train()
    assert trainer.log_partition.weights.shape == (16 + 2,)
    assert trainer.log_partition.weights[:16].any()


def test_the_running_mean_is_that_of_the_steps_log_ratios(tiny_gpt2, tmp_path):
    trainer = make_trainer(
        tiny_gpt2, make_rows(12), tmp_path, pointwise=True, log_z="running_mean", max_steps=6, **SETTINGS
    )
    trainer.train()
    expected, found = 0.0, []
    for kl in column(trainer, "kl"):
        found.append(expected)
        expected = 0.9 * expected - 0.1 * kl
    assert column(trainer, "log_z") == pytest.approx(found, abs=1e-6)
    assert trainer.log_partition.log_z[0].item() == pytest.approx(expected, abs=1e-6)
    assert abs(expected) > 1e-3


def test_rows_of_weight_0_do_not_move_the_running_mean(tiny_gpt2, tmp_path):
    """It is that of a training on the other rows alone."""
    rows = make_rows(8, label=[1.0, 0.0, 1.0, 1.0] * 2, weight=[0.0, 1.0] * 4)
    found = []
    for given in (rows, rows.select([1, 3, 5, 7])):
        settings = SETTINGS | {"per_device_train_batch_size": len(given), "log_z": "running_mean", "max_steps": 3}
        trainer = make_trainer(tiny_gpt2, given, tmp_path, pointwise=True, **settings)
        trainer.train()
        found.append(trainer.log_partition(torch.tensor([False])).item())
    assert abs(found[1]) > 1e-3
    assert found[0] == pytest.approx(found[1], rel=0.2)


def test_mismatched_rows_have_another_prompts_completion():
    rows = [([1, 2], [3, 4]), ([1, 2], [5]), ([6], [7, 8, 9])]
    batch = {name: torch.zeros(3, 4, dtype=torch.long) for name in ("input_ids", "attention_mask", "completion_mask")}
    for i, (prompt, completion) in enumerate(rows):
        width = len(prompt) + len(completion)
        batch["input_ids"][i, :width] = torch.tensor(prompt + completion)
        batch["attention_mask"][i, :width] = 1
        batch["completion_mask"][i, len(prompt) : width] = 1
    made, counts = mismatched(batch, torch.tensor([True, True, True]))
    assert made["input_ids"].tolist() == [[1, 2, 7, 8], [1, 2, 7, 8], [6, 3, 4, 0]]
    assert made["completion_mask"].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [0, 1, 1, 0]]
    assert made["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]]
    assert counts.tolist() == [True, True, True]
    made, counts = mismatched(batch, torch.tensor([True, True, False]))
    assert counts.tolist() == [False, False, False]  # the third is a repeated row
    assert torch.equal(made["input_ids"][:2], batch["input_ids"][:2])


def test_the_batch_kl_is_that_of_mismatched_rows(tiny_gpt2, tmp_path):
    policy = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    reference = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    rows = make_rows(4)
    trainer = make_trainer(
        policy, rows, tmp_path, pointwise=True, ref_model=reference, log_z="batch_kl", max_steps=1, **SETTINGS
    )
    (batch,) = trainer.get_train_dataloader()
    made, counts = mismatched(
        {name: batch[name] for name in ("input_ids", "attention_mask", "completion_mask")}, torch.ones(4, dtype=bool)
    )
    assert counts.all()

    def logps(model):
        with torch.no_grad():
            scored = model.eval()(input_ids=made["input_ids"], attention_mask=made["attention_mask"]).logits
        each = scored[:, :-1].log_softmax(-1).gather(2, made["input_ids"][:, 1:, None])[..., 0]
        return (each * made["completion_mask"][:, 1:]).sum(1)

    kl = (logps(policy) - logps(reference)).mean().item()
    trainer.model.train()
    batches, number = trainer.get_batch_samples(iter([batch]), 1, trainer.accelerator.device)
    trainer.compute_loss(trainer.model.train(), batches[0], num_items_in_batch=number)
    assert trainer.log_partition.log_z.tolist() == pytest.approx([-max(kl, 0.0)] * 2, abs=1e-3)


@pytest.mark.parametrize("max_steps", [1, 4])
def test_a_batch_kl_without_two_prompts_in_a_micro_batch_is_told(tiny_gpt2, tmp_path, caplog, max_steps):
    settings = {"pointwise": True, "log_z": "batch_kl", "max_steps": max_steps} | SETTINGS
    for prompts in (["Hi"], ["Hi", "Why?"]):
        caplog.clear()
        make_trainer(tiny_gpt2, make_rows(8, prompt=prompts * (8 // len(prompts))), tmp_path, **settings).train()
        told = [message for message in caplog.messages if "every micro-batch had one prompt only" in message]
        assert len(told) == (len(prompts) == 1)


ONE_CLASS = (
    r"log_z='{}' needs compared rows of both classes: all 6 rows that are compared with the reference have the label 0"
)
REFUSED = [
    ({"log_z": "sometimes"}, None, r"log_z must be a number or one of .*'group'\); got 'sometimes'\."),
    ({"log_z": math.nan}, None, r"log_z must be a number; got nan\."),
    ({"log_z_learning_rate": 0}, None, r"log_z_learning_rate must be above 0; got 0\."),
    ({"log_z": "batch_kl", "precompute_ref_log_probs": True}, None, r"runs the reference on new rows in each step"),
    ({"log_z": "batch_kl", "per_device_train_batch_size": 1}, None, r"needs at least two rows per micro-batch"),
    ({"log_z": "column"}, None, r"needs a column log_z, in nats, but the train dataset has none\."),
    ({"log_z": "learned"}, [0.0] * 12, r"contradicts the column log_z in the train dataset"),
    ({"log_z": "learned", "negative_loss": "none"}, None, r"log_z='learned' only affects rows that are compared"),
    # ULMA takes rows with label 1 as demonstrations, so that only rows with label 0 are compared
    ({"log_z": "learned"}, None, ONE_CLASS.format("learned")),
    ({"log_z": "learned_constant"}, None, ONE_CLASS.format("learned_constant")),
    ({"log_z": "prior"}, None, ONE_CLASS.format("prior")),
]


@pytest.mark.parametrize(("settings", "log_z", "message"), REFUSED)
def test_what_cannot_be_is_refused_at_the_start(tiny_gpt2, tmp_path, settings, log_z, message):
    rows = make_rows(12, **({"log_z": log_z} if log_z else {}))
    with pytest.raises(ValueError, match=message):
        make_trainer(tiny_gpt2, rows, tmp_path, **settings)


@pytest.mark.parametrize("log_z", ["prior", "learned_constant", "column"])
def test_what_the_rows_contradict_is_told_before_a_model_is_loaded(tiny_gpt2, tmp_path, log_z):
    args = PointwiseDPOConfig(str(tmp_path), log_z=log_z, report_to="none", bf16=False)
    with pytest.raises(ValueError, match=f"log_z='{log_z}' needs"):
        PointwiseDPOTrainer.dry_run(tiny_gpt2, args, make_rows(4, label=[1.0] * 4))


def test_evaluation_rows_have_the_column_that_training_rows_have(tiny_gpt2, tmp_path):
    rows, plain = make_rows(8, log_z=[5.0] * 8), make_rows(8)
    lacks = "log_z='column' needs a column log_z, in nats, but the {} dataset has none"
    with pytest.raises(ValueError, match=lacks.format("eval")):
        make_trainer(tiny_gpt2, rows, tmp_path, log_z="column", eval_dataset=plain)
    trainer = make_trainer(tiny_gpt2, rows, tmp_path, log_z="column", eval_dataset=rows, pointwise=True)
    assert trainer.evaluate()["eval_log_z"] == 5
    for ask in (trainer.evaluate, trainer.predict):
        with pytest.raises(ValueError, match=r"needs a column log_z, in nats, but the \w+ dataset"):
            ask(plain)
    stream = plain.to_iterable_dataset()
    with pytest.raises(ValueError, match="needs a column log_z"):
        trainer.evaluate(stream)
    with pytest.raises(ValueError, match=r"log_z='prior' contradicts the column log_z in the eval dataset"):
        make_trainer(tiny_gpt2, plain, tmp_path, log_z="prior", eval_dataset=rows, pointwise=True)


@pytest.mark.parametrize("settings", [{"log_z": 20.0}, {"preset": "sppo"}])
def test_a_number_and_a_column_contradict_each_other(tiny_gpt2, tmp_path, settings):
    rows = make_rows(8, log_z=[0.0] * 8)
    with pytest.raises(ValueError, match=r"log_z=\S+ contradicts the column log_z in the train dataset"):
        make_trainer(tiny_gpt2, rows, tmp_path, pointwise=True, **settings)


def test_a_column_that_only_training_or_evaluation_rows_have(tiny_gpt2, tmp_path):
    rows, plain = make_rows(8, log_z=[5.0] * 8), make_rows(8)
    for train, other, message in (
        (rows, plain, "The train dataset has a column log_z, but the eval dataset has none"),
        (plain, rows, "The eval dataset has a column log_z, but the train dataset has none"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(tiny_gpt2, train, tmp_path, pointwise=True, eval_dataset=other)
        trainer = make_trainer(tiny_gpt2, train, tmp_path, pointwise=True, eval_dataset=train)
        assert trainer.evaluate()["eval_log_z"] == (5 if train is rows else 0)
        for ask in (trainer.evaluate, trainer.predict, trainer.score):
            with pytest.raises(ValueError, match=r"has a column log_z, but the \w+ dataset has none"):
                ask(other)


def test_streams_and_virtual_tokens_are_refused_where_they_do_not_serve(tiny_gpt2, tmp_path):
    stream = make_rows(12).to_iterable_dataset()
    with pytest.raises(ValueError, match="needs the mean label of all rows, which is unknown for a stream"):
        make_trainer(tiny_gpt2, stream, tmp_path, pointwise=True, log_z="prior", max_steps=1)
    adapter = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="prompt-learning adapters put virtual tokens before the rows"):
        make_trainer(tiny_gpt2, make_rows(12), tmp_path, pointwise=True, log_z="learned", peft_config=adapter)


def test_a_checkpoint_of_another_choice_is_refused(tiny_gpt2, tmp_path):
    settings = {**SETTINGS, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    make_trainer(tiny_gpt2, make_rows(12), tmp_path, pointwise=True, **settings).train()
    trainer = make_trainer(tiny_gpt2, make_rows(12), tmp_path, pointwise=True, log_z="learned", **settings)
    with pytest.raises(ValueError, match="The checkpoint's state of log Z is empty, but this log_z needs"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_number_on_the_command_line_and_a_name(capsys):
    from trl import TrlParser

    from trl_ulma import ULMAConfig

    for text, value in (("0.5", 0.5), ("-1e-1", -0.1), ("learned", "learned")):
        arguments = ["--output_dir", "out", "--report_to", "none", f"--log_z={text}"]
        (args,) = TrlParser(ULMAConfig).parse_args_and_config(arguments)
        assert args.log_z == value
