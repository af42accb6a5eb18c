"""log_z="group": the rows of a prompt stay together, are compared with each other only, and log Z cancels."""

import json

import numpy as np
import oracle
import pytest
import torch
from accelerate import PartialState
from datasets import Dataset, concatenate_datasets
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer
from world import ANSWERS, PROMPTS, make_trainer, plain_logps, trains_with_trl, weights

from trl_ulma import PointwiseDPOConfig, PointwiseDPOTrainer
from trl_ulma.rows.collator import DataCollatorForPointwisePreference
from trl_ulma.rows.sampler import GroupSampler
from trl_ulma.scripts.cli import main

SETTINGS = {"beta": 0.5, "learning_rate": 1e-2, "log_z": "group", "pointwise": True, "optim": "sgd"}
SETTINGS |= {"lr_scheduler_type": "constant", "per_device_train_batch_size": 8}


@pytest.fixture(autouse=True)
def state() -> None:
    PartialState()  # loggers ask it which process is the main one; in use, a trainer has made it


def group_rows(prompts=4, answers=4, **columns):
    """The rows of all prompts in turn, so that none of a prompt follow each other; a quarter or half are liked."""
    pairs = [(prompt, answer) for answer in range(answers) for prompt in range(prompts)]
    rows = {
        "prompt": [PROMPTS[prompt % 5] + " x" * (prompt // 5) for prompt, _ in pairs],
        "completion": [ANSWERS[(answer + prompt) % 5] * (1 + answer % 2) for prompt, answer in pairs],
        "label": [float((answer + prompt) % answers < 1 + prompt % 2) for prompt, answer in pairs],
    }
    return Dataset.from_dict(rows | columns)


@pytest.fixture
def other(tiny_gpt2):
    """A reference that differs from the policy, so that log-ratios are not 0."""
    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn_like(weight)
    return model


def log_ratios(folder, rows, other):
    policy, ref = plain_logps(folder, rows)[0], plain_logps(folder, rows, other.double())[0]
    other.float()
    return policy, ref


def numbers(rows):
    known = list(dict.fromkeys(rows["prompt"]))
    return [known.index(prompt) for prompt in rows["prompt"]]


# The order of the rows


@pytest.mark.parametrize(("size", "multiple"), [(4, 1), (6, 2), (8, 3), (5, 1)])
def test_the_sampler_keeps_groups_in_a_micro_batch_and_visits_each_row_once(size, multiple):
    random = np.random.default_rng(0)
    groups = [*random.integers(0, 40, 100).tolist(), *[-1] * 13]
    sampler = GroupSampler(groups, random.random(113).tolist(), size=size, multiple=multiple, seed=0)
    first = list(sampler)
    assert len(first) == len(sampler)
    assert len(first) % (size * multiple) == 0
    assert sorted(row for row in first if row < 113) == list(range(113))
    batches = [[groups[row] for row in first[i : i + size] if row < 113] for i in range(0, len(first), size)]
    count = {group: groups.count(group) for group in groups if group >= 0}
    for group in count:
        in_batches = [batch.count(group) for batch in batches if group in batch]
        assert len(in_batches) == -(-count[group] // size)  # whole, unless a group is larger than a micro-batch
        assert max(in_batches) - min(in_batches) <= 1
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert len(list(sampler)) == len(first)


def test_rows_without_a_group_fill_the_gaps_before_fillers_do():
    sampler = GroupSampler([0, 0, 0, 1, 1, 1, -1, -1], [1] * 8, size=4, multiple=1, seed=0)
    assert sampler.fillers == 0
    assert GroupSampler([0, 0, 0, 1, 1, 1, -1], [1] * 7, size=4, multiple=1, seed=0).fillers == 1


def test_a_group_that_is_too_large_is_split_into_parts_with_both_classes():
    label = [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    sampler = GroupSampler([5] * 9, label, size=4, multiple=1, seed=0)
    for epoch in range(5):
        sampler.set_epoch(epoch)
        rows = list(sampler)
        for start in range(0, 12, 4):
            part = [label[row] for row in rows[start : start + 4] if row < 9]
            assert sorted(part) == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("layout", [{}, {"share_prompts": True}, {"padding_free": True}])
def test_a_micro_batch_has_all_rows_of_its_prompts(tiny_llama, tmp_path, layout):
    rows, seen = group_rows(prompts=6, answers=4), []

    class Spy(DataCollatorForPointwisePreference):
        def torch_call(self, examples):
            seen.append([tuple(each["prompt_ids"]) for each in examples])
            return super().torch_call(examples)

    trainer = make_trainer(
        tiny_llama, rows, tmp_path, data_collator=Spy(pad_token_id=0), num_train_epochs=1, **SETTINGS, **layout
    )
    seen.clear()
    batches = list(trainer.get_train_dataloader())
    assert len(batches) == 3
    for prompts in seen:
        assert sorted(map(prompts.count, set(prompts))) == [4, 4]
    trainer.train()


# The numbers


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_the_loss_of_an_evaluation_is_the_oracle_s_however_its_rows_are_split(tiny_gpt2, tmp_path, other, batch_size):
    rows = group_rows()
    trainer = make_trainer(
        tiny_gpt2, rows, tmp_path, ref_model=other, per_device_eval_batch_size=batch_size, max_steps=1, **SETTINGS
    )
    found = trainer.evaluate(rows)
    policy, ref = log_ratios(tiny_gpt2, rows, other)
    losses, _ = oracle.conditional(policy, ref, rows["label"], numbers(rows), beta=0.5)
    assert found["eval_loss"] == pytest.approx(losses.mean(), rel=1e-4)
    assert found["eval_loss/preference"] == pytest.approx(losses.mean(), rel=1e-4)
    rewards = 0.5 * oracle.centered(policy - ref, numbers(rows), [1.0] * 16)
    liked = np.array(rows["label"]) == 1
    assert found["eval_rewards/chosen"] == pytest.approx(rewards[liked].mean(), rel=1e-3, abs=1e-4)
    assert found["eval_rewards/accuracies"] == pytest.approx(((rewards > 0) == liked).mean())
    assert found["eval_log_z"] == pytest.approx(-(policy - ref).mean(), rel=1e-3)
    np.testing.assert_allclose(trainer.evaluated[:, 0], rewards, rtol=1e-3, atol=1e-3)


def test_ratings_are_centered_within_the_prompt(tiny_gpt2, tmp_path, other):
    random = np.random.default_rng(0)
    rows = group_rows(label=random.normal(3, 1, 16).tolist(), weight=random.choice([0.5, 1.0, 3.0], 16).tolist())
    settings = SETTINGS | {"label_type": "continuous"}
    trainer = make_trainer(tiny_gpt2, rows, tmp_path, ref_model=other, max_steps=1, **settings)
    found = trainer.evaluate(rows)
    policy, ref = log_ratios(tiny_gpt2, rows, other)
    label, log_ratio = (oracle.centered(each, numbers(rows), rows["weight"]) for each in (rows["label"], policy - ref))
    error = (label - 0.5 * log_ratio) ** 2
    assert found["eval_loss"] == pytest.approx((rows["weight"] * error).mean(), rel=1e-3)
    assert found["eval_rewards/mse"] == pytest.approx(error.mean(), rel=1e-3)
    correlation = np.corrcoef(label, log_ratio)[0, 1]
    assert found["eval_rewards/pearson"] == pytest.approx(correlation, abs=1e-3)
    # A constant that all answers of a prompt share, in the label, is not noticed
    shifted = rows.remove_columns("label").add_column(
        "label", [z + 5 * g for z, g in zip(rows["label"], numbers(rows), strict=True)]
    )
    assert trainer.evaluate(shifted)["eval_loss"] == pytest.approx(found["eval_loss"], rel=1e-3)


def test_the_first_step_is_that_of_the_oracle(tiny_gpt2, tmp_path, other):
    rows = group_rows(prompts=2)
    trainer = make_trainer(tiny_gpt2, rows, tmp_path, ref_model=other, max_steps=1, **SETTINGS)
    trainer.train()
    policy, ref = log_ratios(tiny_gpt2, rows, other)
    losses, _ = oracle.conditional(policy, ref, rows["label"], numbers(rows), beta=0.5)
    [log] = [log for log in trainer.state.log_history if "loss" in log]
    assert log["loss"] == pytest.approx(losses.mean(), rel=1e-3)
    assert log["log_z"] == pytest.approx(-(policy - ref).mean(), rel=1e-3)


@trains_with_trl
def test_on_pairs_it_is_dpo(tiny_gpt2, tmp_path, other):
    """The weights after three steps are those of TRL's DPO, whose loss is per pair instead of per row.

    Gradients are therefore half as large, so the learning rate is twice as large and they are not clipped.
    """
    pairs = Dataset.from_dict(
        {
            "prompt": list(PROMPTS[:4]),
            "chosen": list(ANSWERS[:4]),
            "rejected": [ANSWERS[(i + 2) % 5] for i in range(4)],
        }
    )
    ours = make_trainer(
        tiny_gpt2,
        pairs,
        tmp_path / "a",
        ref_model=other,
        max_steps=3,
        **SETTINGS | {"learning_rate": 2e-3, "max_grad_norm": 0.0},
    )
    ours.train()
    own = ("log_z", "pointwise", "per_device_train_batch_size", "learning_rate")
    args = DPOConfig(
        str(tmp_path / "b"),
        **{name: value for name, value in SETTINGS.items() if name not in own},
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        max_grad_norm=0.0,
        max_steps=3,
        logging_steps=1,
        bf16=False,
        report_to="none",
        save_strategy="no",
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
    )
    theirs = DPOTrainer(model=tiny_gpt2, ref_model=other, args=args, train_dataset=pairs)
    theirs.train()
    logs = [[log for log in each.state.log_history if "loss" in log] for each in (ours, theirs)]
    for mine, other_log in zip(*logs, strict=True):
        assert 2 * mine["loss"] == pytest.approx(other_log["loss"], rel=1e-3)
        assert mine["rewards/margins"] == pytest.approx(other_log["rewards/margins"], rel=1e-2, abs=1e-3)
        assert mine["rewards/accuracies"] == other_log["rewards/accuracies"]
    torch.testing.assert_close(weights(ours.model), weights(theirs.model), rtol=1e-4, atol=1e-6)


def test_accumulated_micro_batches_are_one_large_one(tiny_gpt2, tmp_path, other):
    rows, trained = group_rows(prompts=2), []
    for size, accumulation in ((8, 1), (4, 2)):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        trainer = make_trainer(tiny_gpt2, rows, tmp_path, ref_model=other, max_steps=3, **SETTINGS | sizes)
        trainer.train()
        trained.append(weights(trainer.model))
    torch.testing.assert_close(trained[0], trained[1], rtol=1e-4, atol=1e-6)


def test_likes_gain_on_dislikes_of_their_prompt(tiny_gpt2, tmp_path):
    rows = group_rows()
    settings = SETTINGS | {"optim": "adamw_torch", "learning_rate": 1e-3}
    trainer = make_trainer(tiny_gpt2, rows, tmp_path, num_train_epochs=8, **settings)
    before = trainer.evaluate(rows)
    trainer.train()
    after = trainer.evaluate(rows)
    assert before["eval_loss"] == pytest.approx(np.log([4, 6, 4, 6]).mean() / 4, abs=1e-4)  # log(4 over k) / 4
    assert after["eval_loss"] < before["eval_loss"] - 0.05
    assert after["eval_rewards/margins"] > 0.3


def test_fillers_and_rows_without_weight_change_nothing(tiny_gpt2, tmp_path, other):
    """Eleven rows in micro-batches of eight have five fillers; a row of weight 0 is as if it were not there."""
    rows = group_rows(prompts=3)
    weight = [1.0] * 11 + [0.0]
    logs = []
    for given in (rows.add_column("weight", weight), rows.select(range(11)).add_column("weight", weight[:11])):
        trainer = make_trainer(
            tiny_gpt2, given, tmp_path, ref_model=other, max_steps=1, **SETTINGS | {"per_device_train_batch_size": 16}
        )
        trainer.train()
        [log] = [log for log in trainer.state.log_history if "loss" in log]
        logs.append((log["loss"] * len(given), log["rewards/margins"], weights(trainer.model)))
    assert logs[0][0] == pytest.approx(logs[1][0], rel=1e-4)
    assert logs[0][1] == pytest.approx(logs[1][1], rel=1e-4)


def test_demonstrations_of_ulma_are_in_no_group(tiny_gpt2, tmp_path, other):
    rows = group_rows(prompts=2, answers=4, sft_mask=[True] * 2 + [False] * 6)
    settings = SETTINGS | {"pointwise": False}
    trainer = make_trainer(tiny_gpt2, rows, tmp_path, ref_model=other, max_steps=1, **settings)
    trainer.train()
    policy, ref = log_ratios(tiny_gpt2, rows, other)
    group = [-1 if mask else number for mask, number in zip(rows["sft_mask"], numbers(rows), strict=True)]
    losses, _ = oracle.conditional(policy, ref, rows["label"], group, beta=0.5)
    [log] = [log for log in trainer.state.log_history if "loss" in log]
    assert log["loss"] == pytest.approx((losses.sum() - policy[:2].sum()) / 8, rel=1e-3)


def test_a_saved_model_scores_with_log_z_0(tiny_gpt2, tmp_path, other):
    rows = group_rows()
    trainer = make_trainer(tiny_gpt2, rows, tmp_path, ref_model=other, max_steps=1, **SETTINGS)
    policy, ref = log_ratios(tiny_gpt2, rows, other)
    soft = rows.remove_columns("label").add_column("label", [0.3] * 16)
    scored = trainer.score(soft)
    np.testing.assert_allclose(scored["reward"], 0.5 * (policy - ref), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["binary", "continuous"])
def test_an_evaluation_compares_rows_within_their_prompt_as_training_does(tiny_gpt2, tmp_path, caplog, kind):
    stars = {"label": [float(1 + i * 7 % 5) for i in range(16)]} if kind == "continuous" else {}
    rows = group_rows(**stars)
    alone = Dataset.from_list([{**rows[0], "prompt": "Who?"}])  # without another row of its prompt
    settings = SETTINGS | {"label_type": kind, "max_steps": 2}
    trainer = make_trainer(tiny_gpt2, rows, tmp_path, eval_dataset=concatenate_datasets([rows, alone]), **settings)
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    logged = trainer.evaluate()
    concatenate_datasets([rows, alone]).to_json(tmp_path / "rows.jsonl")
    argv = ["--model", str(tmp_path / "out"), "--dataset", str(tmp_path / "rows.jsonl")]
    assert main(["evaluate", *argv, "--split", "train", "--output", str(tmp_path / "report"), "--examples", "0"]) == 0
    facts = json.loads((tmp_path / "report" / "report.json").read_text())
    model = facts["models"][0]
    found = {f"eval_rewards/{name}": each["value"] for name, each in model["implicit_reward"].items()}
    found["eval_rewards/accuracies"] = found.pop("eval_rewards/accuracy", logged["eval_rewards/accuracies"])
    assert found == pytest.approx({name: logged[name] for name in found}, abs=1e-4)
    assert len(found) == (2 if kind == "binary" else 4)
    assert model["ranked_rows"] == 16
    assert not {"own_scale", "calibration", "surprises"} & set(model)
    assert any(
        "within the prompt, and no labels are predicted. 1 of 17 rows have no other" in n for n in facts["notes"]
    )
    assert main(["score", *argv, "--output", str(tmp_path / "scored.jsonl")]) == 0
    assert any("so only the rewards of one prompt can be compared" in said for said in caplog.messages)


# What is refused, and what is told


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"per_device_train_batch_size": 1}, "set per_device_train_batch_size to 2 or more"),
        ({"train_sampling_strategy": "group_by_length"}, "leave train_sampling_strategy='group_by_length' at 'random'"),
        ({"binary_loss": "kto"}, "leave binary_loss='kto' at 'cross_entropy'"),
        ({"desirable_weight": 2.0}, "leave desirable_weight=2 and undesirable_weight=1 at 1"),
        ({"preset": "bco"}, "preset='bco' stands for log_z='running_mean'"),
    ],
)
def test_settings_that_contradict_groups_are_refused(tiny_gpt2, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tiny_gpt2, group_rows(), tmp_path, **SETTINGS | settings)


def test_an_order_of_a_subclass_that_groups_would_not_follow_is_refused(tiny_gpt2, tmp_path):
    class InOrder(PointwiseDPOTrainer):
        def _get_train_sampler(self, train_dataset=None):
            return SequentialSampler(self.train_dataset)

    def make(**settings):
        args = PointwiseDPOConfig(str(tmp_path), bf16=False, report_to="none", max_steps=1, **settings)
        return InOrder(model=tiny_gpt2, args=args, train_dataset=group_rows())

    make().train()
    with pytest.raises(ValueError, match=r"_get_train_sampler of InOrder would not be used.*get_train_dataloader"):
        make(log_z="group").train()


def test_all_settings_that_contradict_groups_are_named_at_once(tiny_gpt2, tmp_path):
    wrong = {"per_device_train_batch_size": 1, "binary_loss": "squared_error"}
    with pytest.raises(ValueError, match=r"set per_device_train_batch_size .*leave binary_loss='squared_error'"):
        make_trainer(tiny_gpt2, group_rows(), tmp_path, **SETTINGS | wrong)


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (group_rows(label=[0.5, 1.0] * 8), {}, r"8 rows of the train dataset have others. The first is row 0 with 0.5"),
        (group_rows(answers=1), {}, r"each of the 4 compared rows has a prompt of one compared row"),
        (group_rows(label=[1.0] * 16), {}, r"with binary labels of one class only"),
        (group_rows(log_z=[0.0] * 16), {}, r"log_z='group' contradicts the column log_z"),
        (group_rows().to_iterable_dataset(), {"max_steps": 2}, r"the train dataset is a stream"),
    ],
)
def test_rows_that_cannot_be_compared_are_refused(tiny_gpt2, tmp_path, rows, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tiny_gpt2, rows, tmp_path, **SETTINGS | settings)


def test_rows_that_say_nothing_are_counted_once(tiny_gpt2, tmp_path, caplog):
    rows = group_rows(prompts=3, answers=4, label=[1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0])
    make_trainer(tiny_gpt2, rows, tmp_path, **SETTINGS | {"per_device_train_batch_size": 2}).train()
    told = [message for message in caplog.messages if "log_z='group'" in message]
    assert sum("4 of the 12 compared rows have a prompt of one compared row" in each for each in told) == 1
    assert sum("2 prompts have up to 4 rows, and a micro-batch has 2" in each for each in told) == 1


def test_places_that_remain_empty_are_counted(tiny_gpt2, tmp_path, caplog):
    trainer = make_trainer(tiny_gpt2, group_rows(), tmp_path, **SETTINGS | {"per_device_train_batch_size": 6})
    trainer.get_train_dataloader()
    assert "8 of the 24 places remain empty" in caplog.text


@pytest.mark.parametrize("best", ["eval_rewards/auc", "eval_rewards/accuracies", "eval_kl", "eval_loss/preference"])
def test_a_best_metric_of_rows_that_cannot_be_compared_is_refused_at_the_start(tiny_gpt2, tmp_path, best):
    alone = group_rows(answers=4).select(range(4))
    settings = SETTINGS | {"metric_for_best_model": best}
    with pytest.raises(ValueError, match=f"'{best}' will not be logged: it needs .* among the rows of a prompt, which"):
        make_trainer(tiny_gpt2, group_rows(), tmp_path, eval_dataset=alone, **settings)


@pytest.mark.parametrize("kind", ["thumbs", "stars", "same-stars", "alone"])
def test_the_figures_that_a_best_metric_may_be_are_those_that_are_logged(tiny_gpt2, tmp_path, other, kind):
    rows = group_rows()
    if kind != "thumbs":
        label = [4.0 if kind == "same-stars" else float(i // 4) for i in range(16)]
        rows = group_rows(label=label, label_type=["continuous"] * 16)
    rows = rows.select(range(4)) if kind == "alone" else rows
    trained = group_rows(label_type=["binary" if kind == "thumbs" else "continuous"] * 16)
    trainer = make_trainer(tiny_gpt2, trained, tmp_path, ref_model=other, eval_dataset=rows, **SETTINGS)
    logged = {name.removeprefix("eval_") for name in trainer.evaluate()}
    wanted = {*trainer._plan.figures_of(trainer.eval_dataset), "runtime", "samples_per_second", "steps_per_second"}
    assert logged - {"epoch", "model_preparation_time", "rewards/rows"} == wanted - {"aux_loss"}
