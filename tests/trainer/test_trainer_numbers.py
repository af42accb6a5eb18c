"""What the trainers compute, held to the oracle and to one another."""

import numpy as np
import oracle
import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import DPOTrainer
from world import (
    binary_rows,
    first_step_loss,
    make_rows,
    make_trainer,
    mixed_rows,
    plain_logps,
    trains_with_trl,
    weights,
)

from trl_ulma import DataCollatorForPointwisePreference

BINARY_CELLS = oracle.CELLS
CONTINUOUS_CELLS = [cell for cell in oracle.CELLS if cell[1] != "unlearning"]


def other_model(folder: str, seed: int = 1) -> torch.nn.Module:
    """A model of the same shape with other weights, so that log-ratios differ from 0."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def expected(rows, policy, reference, counts, *, positive_loss, negative_loss, length_normalize=False, beta=0.5):
    """(loss of the step, its gradient with respect to each row's log π) by the oracle."""
    columns = rows.to_dict()
    types = columns.get("label_type", "binary")
    if length_normalize:
        policy, reference = policy / counts, reference / counts
    losses, gradients = oracle.grid(
        policy,
        reference,
        columns["label"],
        columns["sft_mask"],
        positive_loss=positive_loss,
        negative_loss=negative_loss,
        beta=beta,
        log_z=np.array(columns["log_z"]),
        label_type=types,
        sft_weight=0.7,
    )
    classes = oracle.class_weights(
        columns["label"], columns["sft_mask"], label_type=types, desirable_weight=1.3, undesirable_weight=0.6
    )
    return oracle.step_loss(losses, gradients, weight=columns["weight"], class_weight=classes)


@pytest.mark.parametrize("length_normalize", [False, True])
@pytest.mark.parametrize(
    ("cell", "rows"),
    [(cell, mixed_rows()) for cell in CONTINUOUS_CELLS] + [(cell, binary_rows()) for cell in BINARY_CELLS],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "mixed" if len(value) == 0 else str(len(value)),
)
def test_a_step_has_the_oracles_loss_and_gradient(tiny_gpt2, tmp_path, cell, rows, length_normalize):
    model = other_model(tiny_gpt2)
    policy, counts = plain_logps(tiny_gpt2, rows, model.double())
    reference, _ = plain_logps(tiny_gpt2, rows)
    positive, negative = cell
    trainer = make_trainer(
        model.float(),
        rows,
        tmp_path,
        processing_class=None,
        ref_model=AutoModelForCausalLM.from_pretrained(tiny_gpt2),
        positive_loss=positive,
        negative_loss=negative,
        length_normalize=length_normalize,
        beta=0.5,
        sft_weight=0.7,
        desirable_weight=1.3,
        undesirable_weight=0.6,
        per_device_train_batch_size=5,
    )
    loss = first_step_loss(trainer)
    loss.backward()
    kinds = {"positive_loss": positive, "negative_loss": negative, "length_normalize": length_normalize}
    wanted, by_row = expected(rows, policy, reference, counts, **kinds)
    assert loss.item() == pytest.approx(wanted, rel=1e-5, abs=1e-6)

    # The gradient: a small step along it must change the oracle's loss by its squared length
    gradient = [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in trainer.model.parameters()]
    squared = sum(g.double().pow(2).sum().item() for g in gradient)
    shift = 1e-6 / squared**0.5
    ends = []
    for sign in (1, -1):
        moved = AutoModelForCausalLM.from_pretrained(tiny_gpt2).double()
        with torch.no_grad():
            for p, start, g in zip(moved.parameters(), trainer.model.parameters(), gradient, strict=True):
                p.copy_(start.double() + sign * shift * g.double())
        ends.append(expected(rows, plain_logps(tiny_gpt2, rows, moved)[0], reference, counts, **kinds)[0])
    assert (ends[0] - ends[1]) / (2 * shift) == pytest.approx(squared, rel=1e-4)
    assert by_row.shape == (len(rows),)


class Wishes(TrainerCallback):
    """Keeps the weights after each step, and what was logged."""

    def __init__(self):
        self.steps: list[torch.Tensor] = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps.append(weights(model))


def train(folder, rows, tmp_path, **kwargs) -> tuple[torch.Tensor, torch.Tensor, list[dict]]:
    """(weights before, weights after, log) of a short run with SGD."""
    settings = {"optim": "sgd", "learning_rate": 1e-2, "max_grad_norm": 0.0, "num_train_epochs": 1, "seed": 3}
    settings["model_init_kwargs"] = {"dtype": torch.float64}
    trainer = make_trainer(folder, rows, tmp_path, **settings | kwargs)
    before = weights(trainer.model)
    trainer.train()
    return before, weights(trainer.model), [log for log in trainer.state.log_history if "loss" in log]


def assert_same_run(one, other, tolerance=1e-5):
    """Losses and weight changes agree, and the weights moved by at least 100 times the tolerance."""
    (before, after, log), (before_2, after_2, log_2) = one, other
    assert torch.equal(before, before_2)
    change, change_2 = after - before, after_2 - before_2
    assert change.norm() > 100 * tolerance * 1.0
    assert (change - change_2).norm() <= tolerance * change.norm()
    assert [entry["loss"] for entry in log] == pytest.approx([entry["loss"] for entry in log_2], rel=tolerance)


@pytest.mark.parametrize("split", [(2, 4), (4, 2), (1, 8), (3, 3)])
def test_the_step_does_not_depend_on_how_rows_fall_into_micro_batches(tiny_gpt2, tmp_path, split):
    rows = mixed_rows(17)  # 8 + 8 + 1, and 9 + 8 for (3, 3)
    size, accumulation = split
    whole = size * accumulation
    kwargs = {"beta": 0.5, "train_sampling_strategy": "sequential"}
    one = train(tiny_gpt2, rows, tmp_path, per_device_train_batch_size=whole, **kwargs)
    other = train(
        tiny_gpt2, rows, tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, **kwargs
    )
    assert_same_run(one, other)
    for entry, entry_2 in zip(one[2], other[2], strict=True):
        for name in entry.keys() - {"epoch", "step", "learning_rate"}:
            assert entry[name] == pytest.approx(entry_2[name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_precomputed_references_are_the_live_ones(tiny_gpt2, tmp_path, peft):
    rows = mixed_rows(13)
    kwargs = {"beta": 0.5, "per_device_train_batch_size": 4, "eval_dataset": rows, "eval_strategy": "epoch"}
    if peft:
        kwargs["peft_config"] = LoraConfig(r=4, target_modules=["c_attn"], init_lora_weights="gaussian")
        kwargs["learning_rate"] = 0.03
    live = train(tiny_gpt2, rows, tmp_path, **kwargs)
    precomputed = train(tiny_gpt2, rows, tmp_path, precompute_ref_log_probs=True, **kwargs)
    assert_same_run(live, precomputed)


def test_rewards_logged_for_demonstrations_change_nothing_else(tiny_gpt2, tmp_path):
    rows = mixed_rows(16)
    kwargs = {"beta": 0.5, "per_device_train_batch_size": 4}
    each = train(tiny_gpt2, rows, tmp_path, logging_steps=1, **kwargs)
    second = train(tiny_gpt2, rows, tmp_path, logging_steps=2, **kwargs)
    never = train(tiny_gpt2, rows, tmp_path, logging_strategy="no", **kwargs)
    assert (each[1] - second[1]).norm() <= 1e-6 * (each[1] - each[0]).norm()
    assert (each[1] - never[1]).norm() <= 1e-6 * (each[1] - each[0]).norm()
    # The logged step's figures are of all its rows, however many steps the log spans
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "kl", "log_z"):
        assert second[2][0][name] == pytest.approx(each[2][1][name], rel=1e-5), name
    assert second[2][0]["loss/preference"] == pytest.approx(
        (each[2][0]["loss/preference"] + each[2][1]["loss/preference"]) / 2, rel=0.2
    )


def test_the_reference_sees_only_compared_rows_cut_to_their_longest(tiny_gpt2, tmp_path):
    rows = make_rows(8, sft_mask=[True, False] * 4)
    trainer = make_trainer(
        tiny_gpt2,
        rows,
        tmp_path,
        per_device_train_batch_size=4,
        logging_steps=2,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
    )
    seen = []
    forward = trainer.ref_model.forward

    def spy(*args, **kwargs):
        seen.append(tuple(kwargs["input_ids"].shape))
        return forward(*args, **kwargs)

    trainer.evaluate(rows)  # with which the startup checks are done
    seen.clear()
    trainer.ref_model.forward = spy
    trainer.train()
    # The first step is not logged: 2 of 4 rows; the second is: all 4. Before and after are checks
    steps = [shape[0] for shape in seen if shape[1] != 8]
    assert steps[-2:] == [2, 4]


def test_ulma_without_demonstrations_is_pointwise_dpo(tiny_gpt2, tmp_path):
    rows = make_rows(12, sft_mask=[False] * 12)
    kwargs = {"beta": 0.5, "per_device_train_batch_size": 4}
    assert_same_run(
        train(tiny_gpt2, rows, tmp_path, **kwargs), train(tiny_gpt2, rows, tmp_path, pointwise=True, **kwargs)
    )


@trains_with_trl
def test_the_pointwise_loss_on_pairs_is_half_of_bco_pair(tiny_gpt2, tmp_path):
    from datasets import Dataset
    from trl import DPOConfig

    rows = make_rows(6)
    pairs = Dataset.from_dict(
        {
            "prompt": rows["prompt"][:],
            "chosen": rows["completion"][:],
            "rejected": [f" Nothing of the sort {i}." for i in range(6)],
        }
    )
    shared = {
        "bf16": False,
        "report_to": "none",
        "beta": 0.3,
        "gradient_checkpointing": False,
        "optim": "sgd",
        "learning_rate": 1e-2,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        "num_train_epochs": 2,
    }
    dpo = DPOTrainer(
        model=tiny_gpt2,
        args=DPOConfig(str(tmp_path), loss_type="bco_pair", per_device_train_batch_size=6, **shared),
        train_dataset=pairs,
    )
    ours = make_trainer(
        tiny_gpt2, pairs, tmp_path, pointwise=True, per_device_train_batch_size=12, **shared | {"learning_rate": 2e-2}
    )
    dpo.train()
    ours.train()
    theirs = [log["loss"] for log in dpo.state.log_history if "loss" in log]
    halves = [log["loss"] for log in ours.state.log_history if "loss" in log]
    assert len(theirs) == 2
    assert [2 * half for half in halves] == pytest.approx(theirs, rel=1e-5)
    assert (weights(dpo.model) - weights(ours.model)).norm() < 1e-5


def test_evaluation_figures_are_those_of_the_rows(tiny_gpt2, tmp_path):
    from scipy import stats
    from sklearn.metrics import roc_auc_score

    rows = mixed_rows(18)
    model = other_model(tiny_gpt2)
    policy, _ = plain_logps(tiny_gpt2, rows, model.double())
    reference, _ = plain_logps(tiny_gpt2, rows)
    trainer = make_trainer(
        model.float(),
        rows,
        tmp_path,
        ref_model=AutoModelForCausalLM.from_pretrained(tiny_gpt2),
        beta=0.5,
        per_device_eval_batch_size=4,
    )
    found = trainer.evaluate(rows)
    label, mask, log_z = (np.array(rows[name][:]) for name in ("label", "sft_mask", "log_z"))
    continuous = np.array(rows["label_type"][:]) == "continuous"
    reward = 0.5 * (policy - reference + log_z)
    center = label[continuous].mean()
    chosen = np.where(continuous, label >= center, label >= 0.5)
    losses, _ = oracle.grid(policy, reference, label, mask, beta=0.5, log_z=log_z, label_type=rows["label_type"][:])
    wanted = {
        "loss": (losses * np.array(rows["weight"][:])).mean(),
        "loss/sft": -policy[mask].mean(),
        "rewards/chosen": reward[chosen].mean(),
        "rewards/rejected": reward[~chosen].mean(),
        "rewards/margins": reward[chosen].mean() - reward[~chosen].mean(),
        "rewards/accuracies": ((reward > np.where(continuous, center, 0)) == chosen).mean(),
        "rewards/mean": reward[continuous].mean(),
        "rewards/mse": ((label - reward) ** 2)[continuous].mean(),
        "rewards/auc": roc_auc_score(label[~continuous] >= 0.5, reward[~continuous]),
        "rewards/pearson": stats.pearsonr(label[continuous], reward[continuous])[0],
        "rewards/spearman": stats.spearmanr(label[continuous], reward[continuous])[0],
        "logps/chosen": policy[chosen].mean(),
        "logps/rejected": policy[~chosen].mean(),
        "kl": (policy - reference).mean(),
        "log_z": log_z.mean(),
    }
    for name, value in wanted.items():
        assert found[f"eval_{name}"] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_the_last_steps_are_in_the_final_log_and_in_no_other_runs(tiny_gpt2, tmp_path):
    class BreakOff(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            raise InterruptedError

    settings = {"max_steps": 3, "per_device_train_batch_size": 2, "logging_steps": 2}
    trainer = make_trainer(
        tiny_gpt2, make_rows(6), tmp_path, eval_dataset=make_rows(2), eval_strategy="steps", eval_steps=3, **settings
    )
    trainer.add_callback(breaks_off := BreakOff())
    with pytest.raises(InterruptedError):
        trainer.train()
    trainer.remove_callback(breaks_off)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "num_tokens" in log]
    assert [("train_loss" in log, "loss/preference" in log) for log in logs] == [(False, True), (True, True)]
    assert logs[-1]["num_tokens"] == sum(trainer.train_dataset["length"][:])


def test_predict_gives_rewards_and_labels_row_by_row(tiny_gpt2, tmp_path):
    rows = mixed_rows(7)
    model = other_model(tiny_gpt2)
    policy, _ = plain_logps(tiny_gpt2, rows, model.double())
    reference, _ = plain_logps(tiny_gpt2, rows)
    trainer = make_trainer(
        model.float(),
        rows,
        tmp_path,
        ref_model=AutoModelForCausalLM.from_pretrained(tiny_gpt2),
        beta=0.5,
        per_device_eval_batch_size=3,
    )
    found = trainer.predict(rows)
    wanted = 0.5 * (policy - reference + np.array(rows["log_z"][:]))
    assert found.predictions == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    assert found.label_ids == pytest.approx(np.array(rows["label"][:], dtype=np.float32))


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_loss_that_is_not_finite_ends_the_run_and_names_its_rows(tiny_gpt2, tmp_path, accumulation):
    rows = make_rows(12, label=[0.5, -0.5, 1e30, 0.1] * 3, sft_mask=[False] * 12)
    trainer = make_trainer(
        tiny_gpt2,
        rows,
        tmp_path,
        label_type="continuous",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
    )
    with pytest.raises(FloatingPointError, match=r"loss of step 1 is inf. Rows of the train dataset .*: \[2\]\."):
        trainer.train()


def test_a_collator_that_drops_the_precomputed_reference_is_refused(tiny_gpt2, tmp_path):
    class Drops(DataCollatorForPointwisePreference):
        def torch_call(self, examples):
            batch = super().torch_call(examples)
            batch.pop("ref_logps", None)
            return batch

    trainer = make_trainer(
        tiny_gpt2,
        make_rows(4),
        tmp_path,
        precompute_ref_log_probs=True,
        data_collator=Drops(pad_token_id=0),
        max_steps=1,
    )
    with pytest.raises(ValueError, match="the data_collator drops this column"):
        trainer.train()
