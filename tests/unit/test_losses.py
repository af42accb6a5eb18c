"""The row losses against hand numbers, the float64 oracle, their closed-form gradients and each other."""

import math
import os
import re

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from trl_ulma.losses import (
    BINARY_LOSSES,
    Terms,
    conditional_dpo_loss,
    grid_loss,
    group_means,
    is_informative,
    kto_loss,
    pointwise_dpo_loss,
    pointwise_mse_loss,
    reward_slope,
    route,
    squared_error_loss,
    ulma_loss,
)

# flip_signs.py runs this file once a mutation: there, few and always the same examples, none of them shrunk.
if os.environ.get("TRL_ULMA_FEW_EXAMPLES"):
    examples = settings(
        max_examples=10, derandomize=True, deadline=None, database=None, phases=(Phase.explicit, Phase.generate)
    )
else:
    examples = settings(deadline=None)

POINTWISE = {
    "dpo": (pointwise_dpo_loss, oracle.pointwise_dpo),
    "mse": (pointwise_mse_loss, oracle.pointwise_mse),
    "una": (squared_error_loss, oracle.una),
    "kto": (kto_loss, oracle.kto),
}
LABEL_TYPES = ("binary", "continuous")
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-6}


@st.composite
def batches(draw, kinds=LABEL_TYPES):
    """One to eight rows, ordinary or with log-ratios of up to ±1e5 nats, each with a kind of label of `kinds`."""
    size = draw(st.integers(1, 8))

    def column(values):
        return draw(st.lists(values, min_size=size, max_size=size))

    logps = st.one_of(st.floats(-300.0, 0.0), st.floats(-1e5, 0.0))
    labels = {
        "binary": st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0.0, 1.0)),
        "continuous": st.one_of(st.sampled_from([0.0, 1.0]), st.floats(-20.0, 20.0)),
    }
    kind = column(st.sampled_from(kinds))
    return {
        "policy": column(logps),
        "ref": column(logps),
        "kind": kind,
        "label": [draw(labels[word]) for word in kind],
        "mask": column(st.booleans()),
        "log_z": draw(st.one_of(st.floats(-50.0, 50.0), st.lists(st.floats(-50, 50), min_size=size, max_size=size))),
        "beta": draw(st.floats(0.01, 1.0)),
        "sft_weight": draw(st.sampled_from([0.0, 0.5, 1.0, 3.0])),
    }


def rounded(batch, dtype):
    """The batch as tensors of `dtype`, and as float64 arrays with the very same values."""
    tensors = {name: torch.tensor(batch[name], dtype=dtype) for name in ("policy", "ref", "label")}
    tensors["policy"].requires_grad_()
    tensors["mask"] = torch.tensor(batch["mask"])
    tensors["continuous"] = torch.tensor([kind == "continuous" for kind in batch["kind"]])
    log_z = batch["log_z"]
    tensors["log_z"] = torch.tensor(log_z, dtype=dtype) if isinstance(log_z, list) else log_z
    exact = {k: v.detach().double().numpy() if isinstance(v, torch.Tensor) else v for k, v in tensors.items()}
    return tensors, exact


def assert_equal_to_oracle(losses, policy, expected, batch, dtype):
    """Losses and gradients equal the oracle's, but for what rounding the reward to `dtype` must cost."""
    values, gradients = expected
    (gradient,) = torch.autograd.grad(losses.sum(), policy)
    assert losses.dtype == gradient.dtype == dtype
    log_ratio = np.abs(np.subtract(batch["policy"], batch["ref"])) + np.abs(batch["log_z"])
    size = 1 + batch["beta"] * log_ratio + np.abs(batch["label"])
    rounding = 4 * torch.finfo(dtype).eps * size
    slope = np.where(np.equal(batch["kind"], "continuous"), size, 1)
    value_error = np.abs(losses.detach().numpy() - values)
    gradient_error = np.abs(gradient.numpy() - gradients)
    assert np.all(value_error <= TOLERANCE[dtype] * (1 + np.abs(values)) + rounding * slope)
    assert np.all(gradient_error <= TOLERANCE[dtype] * (1 + np.abs(gradients)) + rounding)


def grid(tensors, batch, positive_loss, negative_loss):
    """`route`, then `grid_loss`."""
    terms = route(
        tensors["label"],
        tensors["mask"],
        tensors["continuous"],
        positive_loss=positive_loss,
        negative_loss=negative_loss,
    )
    return grid_loss(
        tensors["policy"],
        tensors["ref"],
        tensors["label"],
        terms,
        tensors["continuous"],
        beta=batch["beta"],
        log_z=tensors["log_z"],
        sft_weight=batch["sft_weight"],
    )


# Hand numbers. log π = −10 and log π_ref = −30 with β = 0.1 make r = 2; 5 nats of log Z make it 2.5.


def hand_rows(*labels):
    size = len(labels)
    return torch.full((size,), -10.0), torch.full((size,), -30.0), torch.tensor(labels)


def test_pointwise_dpo_gives_the_hand_numbers():
    losses = pointwise_dpo_loss(*hand_rows(1.0, 0.0, 0.25))
    assert losses.tolist() == pytest.approx([0.126928, 2.126928, 1.626928], abs=1e-6)


def test_pointwise_mse_gives_the_hand_numbers():
    assert pointwise_mse_loss(*hand_rows(3.0, -1.0, 2.0)).tolist() == pytest.approx([1.0, 9.0, 0.0], abs=1e-6)


def test_log_z_is_in_nats_and_raises_the_reward():
    rows = hand_rows(1.0, 0.0)
    for log_z in (5.0, torch.tensor([5.0, 5.0])):
        assert pointwise_dpo_loss(*rows, log_z=log_z).tolist() == pytest.approx([0.078889, 2.578889], abs=1e-6)
        assert pointwise_mse_loss(*rows, log_z=log_z).tolist() == pytest.approx([2.25, 6.25], abs=1e-5)
    by_row = pointwise_mse_loss(*rows, log_z=torch.tensor([5.0, -5.0]))
    assert by_row.tolist() == pytest.approx([2.25, 2.25], abs=1e-5)


def test_ulma_on_binary_labels_gives_the_hand_numbers():
    mask = torch.tensor([True, False, False])
    losses = ulma_loss(*hand_rows(1.0, 1.0, 0.0), mask)
    assert losses.tolist() == pytest.approx([10.0, 0.126928, 2.126928], abs=1e-6)
    losses = ulma_loss(*hand_rows(1.0, 1.0, 0.0), mask, log_z=5.0, sft_weight=0.5)
    assert losses.tolist() == pytest.approx([5.0, 0.078889, 2.578889], abs=1e-6)


def test_ulma_on_continuous_labels_gives_the_hand_numbers():
    mask = torch.tensor([True, False, False])
    losses = ulma_loss(*hand_rows(3.0, 3.0, -1.0), mask, label_type="continuous")
    assert losses.tolist() == pytest.approx([11.0, 1.0, 9.0], abs=1e-5)
    losses = ulma_loss(*hand_rows(3.0, 3.0, -1.0), mask, label_type="continuous", log_z=5.0, sft_weight=0.5)
    assert losses.tolist() == pytest.approx([5.25, 0.25, 12.25], abs=1e-5)


def test_the_parts_of_a_row_loss_give_the_hand_numbers():
    policy, ref, label = hand_rows(1.0, 1.0, 0.0)
    mask, continuous = torch.tensor([True, False, False]), torch.zeros(3, dtype=torch.bool)
    terms = route(label, mask, continuous, negative_loss="unlearning")
    losses = grid_loss(policy, ref, label, terms, continuous, log_z=5.0, sft_weight=0.5)
    assert losses.sft.tolist() == pytest.approx([10.0, 0.0, 0.0])
    assert losses.unlearning.tolist() == pytest.approx([0.0, 0.0, -10.0])
    assert losses.preference.tolist() == pytest.approx([0.0, 0.078889, 0.0], abs=1e-6)
    assert losses.total.tolist() == pytest.approx([5.0, 0.078889, -10.0], abs=1e-6)
    assert losses.rewards.tolist() == pytest.approx([2.5, 2.5, 2.5])


# The oracle itself.


@examples
@given(batches())
def test_the_oracle_of_ulma_is_the_ulma_cell_of_its_grid(batch):
    arguments = [batch[name] for name in ("policy", "ref", "label", "mask")]
    options = {name: batch[name] for name in ("beta", "log_z", "sft_weight")}
    by_rule = oracle.ulma(*arguments, label_type=batch["kind"], **options)
    by_cell = oracle.grid(*arguments, label_type=batch["kind"], **options)
    np.testing.assert_allclose(by_rule, by_cell, rtol=1e-14)


@pytest.mark.parametrize(("positive_loss", "negative_loss"), oracle.CELLS)
def test_the_gradients_of_the_oracle_are_its_finite_differences(positive_loss, negative_loss):
    kinds = ["binary"] * 5 if negative_loss == "unlearning" else ["binary"] * 3 + ["continuous"] * 2
    cell = {"positive_loss": positive_loss, "negative_loss": negative_loss}
    policy, step = np.array([-3.0, -4.0, -5.0, -6.0, -7.0]), 1e-5
    ref, label, mask = [-5.0] * 5, [1.0, 1.0, 0.3, 0.9, 0.2], [True, False, False, True, False]

    def at(moved):
        return oracle.grid(moved, ref, label, mask, label_type=kinds, beta=0.3, log_z=1.0, sft_weight=0.7, **cell)

    slope = (at(policy + step)[0] - at(policy - step)[0]) / (2 * step)
    np.testing.assert_allclose(at(policy)[1], slope, atol=1e-8)


def test_the_oracle_of_the_step_loss_weighs_rows_and_classes_and_divides_by_all_rows():
    kinds, mask = ["binary", "binary", "continuous", "continuous"], [False, False, True, False]
    options = {"label_type": kinds, "desirable_weight": 2.0, "undesirable_weight": 3.0}
    classes = oracle.class_weights([0.5, 0.4, -7.0, 9.0], mask, **options)
    assert classes.tolist() == [2.0, 3.0, 2.0, 3.0]
    losses, gradients = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 1.0, -1.0, 0.5])
    loss, gradient = oracle.step_loss(losses, gradients, weight=[1.0, 0.5, 0.0, 2.0], class_weight=classes)
    assert loss == pytest.approx((2 + 3 + 0 + 24) / 4)
    assert gradient == pytest.approx([0.5, 0.375, 0.0, 0.75])


# The package against the oracle.


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", POINTWISE)
@examples
@given(data=st.data())
def test_pointwise_losses_and_gradients_equal_the_oracle(name, dtype, data):
    batch = data.draw(batches(kinds=("continuous",) if name == "mse" else ("binary",)))
    loss, expected = POINTWISE[name]
    tensors, exact = rounded(batch, dtype)
    losses = loss(tensors["policy"], tensors["ref"], tensors["label"], beta=batch["beta"], log_z=tensors["log_z"])
    values = expected(exact["policy"], exact["ref"], exact["label"], beta=batch["beta"], log_z=exact["log_z"])
    assert_equal_to_oracle(losses, tensors["policy"], values, batch, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("label_type", LABEL_TYPES)
@examples
@given(data=st.data())
def test_ulma_losses_and_gradients_equal_the_oracle(label_type, dtype, data):
    batch = data.draw(batches(kinds=(label_type,)))
    options = {"beta": batch["beta"], "label_type": label_type, "sft_weight": batch["sft_weight"]}
    tensors, exact = rounded(batch, dtype)
    names = ("policy", "ref", "label", "mask")
    losses = ulma_loss(*(tensors[name] for name in names), log_z=tensors["log_z"], **options)
    values = oracle.ulma(*(exact[name] for name in names), log_z=exact["log_z"], **options)
    assert_equal_to_oracle(losses, tensors["policy"], values, batch, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("positive_loss", "negative_loss"), oracle.CELLS)
@examples
@given(data=st.data())
def test_every_cell_of_the_grid_equals_the_oracle_on_mixed_labels(positive_loss, negative_loss, dtype, data):
    batch = data.draw(batches(kinds=("binary",) if negative_loss == "unlearning" else LABEL_TYPES))
    tensors, exact = rounded(batch, dtype)
    losses = grid(tensors, batch, positive_loss, negative_loss)
    values = oracle.grid(
        *(exact[name] for name in ("policy", "ref", "label", "mask")),
        positive_loss=positive_loss,
        negative_loss=negative_loss,
        label_type=batch["kind"],
        beta=batch["beta"],
        log_z=exact["log_z"],
        sft_weight=batch["sft_weight"],
    )
    assert_equal_to_oracle(losses.total, tensors["policy"], values, batch, dtype)
    parts = batch["sft_weight"] * losses.sft + losses.unlearning + losses.preference
    assert torch.equal(losses.total, parts)


@examples
@given(batches(), st.data())
def test_weighted_row_losses_over_all_rows_equal_the_step_loss_of_the_oracle(batch, data):
    size = len(batch["policy"])
    weight = data.draw(st.lists(st.floats(0.0, 5.0), min_size=size, max_size=size))
    tensors, exact = rounded(batch, torch.float64)
    names = ("policy", "ref", "label", "mask")
    options = {"beta": batch["beta"], "sft_weight": batch["sft_weight"], "label_type": batch["kind"]}
    rows = oracle.ulma(*(exact[name] for name in names), log_z=exact["log_z"], **options)
    value, gradient = oracle.step_loss(*rows, weight=weight)
    loss = (torch.tensor(weight, dtype=torch.float64) * grid(tensors, batch, "sft", "pointwise_dpo").total).sum() / size
    loss.backward()
    assert loss.item() == pytest.approx(value, rel=1e-9, abs=1e-9)
    np.testing.assert_allclose(tensors["policy"].grad.numpy(), gradient, rtol=1e-9, atol=1e-9)


# Gradients.


def gradient_rows(label, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    policy, ref, log_z = (torch.randn(len(label), generator=generator, dtype=dtype) * 4 for _ in range(3))
    return policy.requires_grad_(), ref, torch.tensor(label, dtype=dtype), log_z.requires_grad_()


def test_the_gradient_of_pointwise_dpo_is_minus_beta_times_label_less_sigmoid():
    policy, ref, label, log_z = gradient_rows([1.0, 0.0, 0.3, 1.0, 0.0, 0.8])
    pointwise_dpo_loss(policy, ref, label, beta=0.7, log_z=log_z).sum().backward()
    expected = -0.7 * (label - torch.sigmoid(0.7 * (policy - ref + log_z)))
    torch.testing.assert_close(policy.grad, expected.detach())
    torch.testing.assert_close(log_z.grad, expected.detach())


def test_the_gradient_of_pointwise_mse_is_minus_two_beta_times_label_less_reward():
    policy, ref, label, log_z = gradient_rows([4.0, -2.0, 0.3, 1.0, 0.0, 0.8])
    pointwise_mse_loss(policy, ref, label, beta=0.7, log_z=log_z).sum().backward()
    expected = -2 * 0.7 * (label - 0.7 * (policy - ref + log_z))
    torch.testing.assert_close(policy.grad, expected.detach())
    torch.testing.assert_close(log_z.grad, expected.detach())


def test_the_gradient_of_sft_is_minus_its_weight_and_leaves_log_z_alone():
    policy, ref, label, log_z = gradient_rows([1.0, 1.0, 1.0])
    ulma_loss(policy, ref, label, label == 1, log_z=log_z, sft_weight=0.25).sum().backward()
    assert policy.grad.tolist() == [-0.25] * 3
    assert log_z.grad.tolist() == [0.0] * 3


def test_the_gradient_of_unlearning_is_plus_one_whatever_the_weight_of_sft():
    policy, ref, label, log_z = gradient_rows([0.0, 0.4])
    nowhere = torch.zeros(2, dtype=torch.bool)
    terms = route(label, nowhere, nowhere, positive_loss="none", negative_loss="unlearning")
    losses = grid_loss(policy, ref, label, terms, nowhere, log_z=log_z, sft_weight=0.25)
    losses.total.sum().backward()
    assert policy.grad.tolist() == [1.0, 1.0]
    assert log_z.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("label_type", LABEL_TYPES)
def test_gradcheck_agrees_with_every_loss(label_type):
    policy, ref, label, log_z = gradient_rows([1.0, 0.0, 0.3, 1.0])
    mask = torch.tensor([True, False, False, False])
    of_kind = [pointwise_mse_loss] if label_type == "continuous" else BINARY_LOSSES.values()
    for pointwise in of_kind:
        assert gradcheck(lambda p, c, loss=pointwise: loss(p, ref, label, beta=0.5, log_z=c), (policy, log_z))
    assert gradcheck(
        lambda p, c: ulma_loss(p, ref, label, mask, beta=0.5, log_z=c, label_type=label_type, sft_weight=0.5),
        (policy, log_z),
    )


def test_a_row_without_a_term_is_exactly_zero_and_still_in_the_graph():
    policy, ref, label, _ = gradient_rows([0.0, 0.5])
    nowhere = torch.zeros(2, dtype=torch.bool)
    terms = route(label, nowhere, nowhere, negative_loss="none")
    losses = grid_loss(policy, ref, label, terms, nowhere)
    losses.total.sum().backward()
    assert losses.total.tolist() == policy.grad.tolist() == [0.0, 0.0]


def test_rewards_are_figures_outside_the_graph():
    policy, ref, label, log_z = gradient_rows([1.0, 0.0])
    nowhere = torch.zeros(2, dtype=torch.bool)
    losses = grid_loss(policy, ref, label, route(label, nowhere, nowhere), nowhere, beta=0.7, log_z=log_z)
    assert not losses.rewards.requires_grad
    torch.testing.assert_close(losses.rewards, (0.7 * (policy - ref + log_z)).detach())


# Identities.


@examples
@given(batches(kinds=("binary",)))
def test_liking_a_reward_costs_what_disliking_its_opposite_costs(batch):
    tensors, _ = rounded(batch, torch.float64)
    policy, ref, label, log_z = (tensors[name] for name in ("policy", "ref", "label", "log_z"))
    liked, disliked = torch.ones_like(label), torch.zeros_like(label)
    there = pointwise_dpo_loss(policy, ref, liked, beta=batch["beta"], log_z=log_z)
    back = pointwise_dpo_loss(ref, policy, disliked, beta=batch["beta"], log_z=-log_z)
    torch.testing.assert_close(there, back, rtol=1e-12, atol=1e-12)


@examples
@given(batches(), st.randoms(use_true_random=False))
def test_a_permutation_of_rows_permutes_the_losses(batch, random):
    order = list(range(len(batch["policy"])))
    random.shuffle(order)
    moved = {k: [v[i] for i in order] if isinstance(v, list) else v for k, v in batch.items()}
    for cell in (("sft", "pointwise_dpo"), ("pointwise_dpo", "none")):
        losses = grid(rounded(batch, torch.float64)[0], batch, *cell).total
        assert torch.equal(grid(rounded(moved, torch.float64)[0], moved, *cell).total, losses[order])


@pytest.mark.parametrize("label_type", LABEL_TYPES)
@examples
@given(data=st.data())
def test_without_demonstrations_ulma_is_pointwise_dpo(label_type, data):
    batch = data.draw(batches(kinds=(label_type,)))
    tensors, _ = rounded(batch, torch.float32)
    rows = [tensors[name] for name in ("policy", "ref", "label")]
    options = {"beta": batch["beta"], "log_z": tensors["log_z"]}
    pointwise = pointwise_mse_loss if label_type == "continuous" else pointwise_dpo_loss
    nowhere = torch.zeros_like(tensors["mask"])
    losses = ulma_loss(*rows, nowhere, label_type=label_type, sft_weight=batch["sft_weight"], **options)
    assert torch.equal(losses, pointwise(*rows, **options))


@examples
@given(batches(kinds=("binary",)))
def test_with_nothing_but_demonstrations_ulma_is_sft(batch):
    tensors, _ = rounded(batch, torch.float32)
    rows = [tensors[name] for name in ("policy", "ref", "label")]
    everywhere = torch.ones_like(tensors["mask"])
    losses = ulma_loss(*rows, everywhere, log_z=tensors["log_z"], sft_weight=batch["sft_weight"])
    assert torch.equal(losses, -batch["sft_weight"] * tensors["policy"])


@examples
@given(batches(kinds=("binary",)), batches(kinds=("binary",)))
def test_bco_pair_is_twice_the_mean_of_the_two_pointwise_row_losses(chosen, rejected):
    size, beta = min(len(chosen["policy"]), len(rejected["policy"])), chosen["beta"]
    (chosen_logps, ref_chosen_logps), (rejected_logps, ref_rejected_logps) = (
        [torch.tensor(rows[name][:size], dtype=torch.float64) for name in ("policy", "ref")]
        for rows in (chosen, rejected)
    )
    # TRL, DPOTrainer with loss_type="bco_pair".
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
    bco_pair = -F.logsigmoid(chosen_rewards) - F.logsigmoid(-rejected_rewards)

    liked, disliked = torch.ones(size), torch.zeros(size)
    rows = (
        pointwise_dpo_loss(chosen_logps, ref_chosen_logps, liked, beta=beta),
        pointwise_dpo_loss(rejected_logps, ref_rejected_logps, disliked, beta=beta),
    )
    torch.testing.assert_close(bco_pair, 2 * torch.stack(rows).mean(dim=0))


# Dtypes and extremes.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("log_ratio", [1e4, -1e4])
@pytest.mark.parametrize("label_type", LABEL_TYPES)
def test_rewards_of_ten_thousand_keep_losses_and_gradients_finite_and_right(label_type, log_ratio, dtype):
    low, high = torch.full((4,), -1e4, dtype=dtype), torch.zeros(4, dtype=dtype)
    policy, ref = (high, low) if log_ratio > 0 else (low, high)
    policy = policy.clone().requires_grad_()
    label, mask = torch.tensor([1.0, 1.0, 0.0, 0.5]), torch.tensor([True, False, False, False])
    losses = ulma_loss(policy, ref, label, mask, beta=1.0, label_type=label_type)
    losses.sum().backward()
    values, gradients = oracle.ulma(
        policy.detach().double().numpy(), ref.double().numpy(), label.numpy(), mask.numpy(), beta=1.0,
        label_type=label_type,
    )  # fmt: skip
    np.testing.assert_allclose(losses.detach().numpy(), values, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(policy.grad.double().numpy(), gradients, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize(
    ("given_dtype", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_losses_come_back_in_at_least_float32(given_dtype, expected):
    policy, ref, label = (rows.to(given_dtype) for rows in hand_rows(1.0, 0.0))
    mask = label == 1
    assert pointwise_dpo_loss(policy, ref, label).dtype == expected
    assert pointwise_mse_loss(policy, ref, label).dtype == expected
    assert ulma_loss(policy, ref, label, mask).dtype == expected
    losses = grid_loss(policy, ref, label, route(label, mask, ~mask), ~mask)
    assert {part.dtype for part in losses} == {expected}


def test_half_precision_inputs_lose_nothing_in_the_arithmetic():
    rows = [value.to(torch.bfloat16) for value in hand_rows(1.0, 0.0, 0.25)]
    losses = pointwise_dpo_loss(*rows)
    assert losses.tolist() == pytest.approx([0.126928, 2.126928, 1.626928], abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_bool_int_and_float_labels_are_the_same_labels(dtype):
    policy, ref, label = hand_rows(1.0, 1.0, 0.0)
    mask, same = torch.tensor([True, False, False]), label.to(dtype)
    assert torch.equal(pointwise_dpo_loss(policy, ref, same), pointwise_dpo_loss(policy, ref, label))
    assert torch.equal(pointwise_mse_loss(policy, ref, same), pointwise_mse_loss(policy, ref, label))
    assert torch.equal(ulma_loss(policy, ref, same, mask), ulma_loss(policy, ref, label, mask))


# Rows and their terms.


@pytest.mark.parametrize(
    ("method", "positive_loss", "negative_loss", "binary", "continuous"),
    [
        ("ULMA", "sft", "pointwise_dpo", "imitated compared compared compared", "both compared"),
        ("unlikelihood", "sft", "unlearning", "imitated compared unlearned unlearned", None),
        ("SFT", "sft", "none", "imitated compared nothing nothing", "imitated nothing"),
        (
            "pointwise DPO",
            "pointwise_dpo",
            "pointwise_dpo",
            "compared compared compared compared",
            "compared compared",
        ),
        ("positive DPO", "pointwise_dpo", "none", "compared compared nothing nothing", "compared nothing"),
        ("negative DPO", "none", "pointwise_dpo", "nothing compared compared compared", "nothing compared"),
        ("unlearning", "none", "unlearning", "nothing compared unlearned unlearned", None),
    ],
)
def test_each_method_gives_each_kind_of_row_its_terms(method, positive_loss, negative_loss, binary, continuous):
    names = {
        (1, 0, 0): "imitated",
        (0, 1, 0): "unlearned",
        (0, 0, 1): "compared",
        (1, 0, 1): "both",
        (0, 0, 0): "nothing",
    }

    def terms_of(label, mask, continuous):
        rows = torch.tensor(label), torch.tensor(mask), torch.full((len(label),), continuous)
        terms = route(*rows, positive_loss=positive_loss, negative_loss=negative_loss)
        return " ".join(names[row] for row in zip(*(term.int().tolist() for term in terms), strict=True))

    # A demonstration, a liked row, a soft label, a disliked row.
    assert terms_of([1.0, 1.0, 0.5, 0.0], [True, False, False, False], False) == binary, method
    if continuous is not None:
        for label in ([1.0, 1.0], [-4.0, 9.0], [0.0, 0.0]):
            assert terms_of(label, [True, False], True) == continuous, method


@pytest.mark.parametrize(("positive_loss", "negative_loss"), oracle.CELLS)
def test_a_row_that_is_not_compared_may_have_no_reference(positive_loss, negative_loss):
    label, mask = torch.tensor([1.0, 1.0, 0.5, 0.0, 1.5, 0.2]), torch.tensor([True, False, False, False, True, False])
    continuous = torch.tensor([False] * 4 + [negative_loss != "unlearning"] * 2)
    terms = route(label, mask, continuous, positive_loss=positive_loss, negative_loss=negative_loss)
    ref = torch.tensor([-2.0, -3.0, -4.0, -5.0, -6.0, -7.0])
    results = []
    for known in (ref, torch.where(terms.compared, ref, torch.nan)):
        policy = torch.tensor([-3.0, -1.0, -6.0, -4.0, -5.0, -9.0], requires_grad=True)
        losses = grid_loss(policy, known, label, terms, continuous)
        losses.total.sum().backward()
        results.append((losses.total.detach(), policy.grad))
        assert torch.equal(losses.rewards.isnan(), known.isnan())
    (values, gradients), (values_without, gradients_without) = results
    assert values.isfinite().all()
    assert gradients.isfinite().all()
    assert torch.equal(values_without, values)
    assert torch.equal(gradients_without, gradients)


def test_binary_demonstrations_of_ulma_need_no_reference():
    policy = torch.tensor([-3.0, -1.0], requires_grad=True)
    ref, label = torch.tensor([math.nan, -2.0]), torch.tensor([1.0, 0.0])
    losses = ulma_loss(policy, ref, label, torch.tensor([True, False]))
    losses.sum().backward()
    assert losses[0].item() == 3.0
    assert losses.isfinite().all()
    assert policy.grad.isfinite().all()


@pytest.mark.parametrize("loss", [pointwise_mse_loss, *BINARY_LOSSES.values()])
def test_a_missing_reference_of_a_compared_row_is_not_made_silent(loss):
    label = torch.ones(2)
    losses = loss(torch.tensor([-3.0, -1.0]), torch.tensor([math.nan, -2.0]), label)
    assert losses.isnan().tolist() == [True, False]
    losses = ulma_loss(torch.tensor([-3.0, -1.0]), torch.tensor([math.nan, -2.0]), label, label == 0)
    assert losses.isnan().tolist() == [True, False]


# What is refused.


@pytest.mark.parametrize("name", ["ref_logps", "label", "log_z"])
@pytest.mark.parametrize("loss", [pointwise_mse_loss, *BINARY_LOSSES.values(), ulma_loss])
def test_rows_of_another_shape_are_refused(loss, name):
    rows = {name: torch.zeros(8) for name in ("policy_logps", "ref_logps", "label", "log_z")}
    if loss is ulma_loss:
        rows["sft_mask"] = torch.zeros(8, dtype=torch.bool)
    for shape in ((8, 1), (1,), (7,), ()):
        message = f"{name} must have shape (8,), like policy_logps; got {shape}."
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            loss(**{**rows, name: torch.zeros(shape)})


def test_policy_logps_must_be_one_value_a_row():
    message = "policy_logps must have shape (B,), one value per row; got (2, 3)."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        pointwise_dpo_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3))


@pytest.mark.parametrize("shape", [(8, 1), (1,), (7,)])
def test_masks_of_another_shape_are_refused(shape):
    label, right, wrong = torch.zeros(8), torch.zeros(8, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    with pytest.raises(ValueError, match=re.escape(f"sft_mask must have shape (8,), like label; got {shape}.")):
        route(label, wrong, right)
    with pytest.raises(ValueError, match=re.escape(f"continuous must have shape (8,), like label; got {shape}.")):
        route(label, right, wrong)
    with pytest.raises(ValueError, match=r"sft_mask must have shape \(8,\)"):
        ulma_loss(label, label, label, wrong)


@pytest.mark.parametrize("name", ["imitated", "unlearned", "compared", "continuous"])
def test_terms_of_another_shape_are_refused(name):
    rows, right = torch.zeros(8), torch.zeros(8, dtype=torch.bool)
    flags = {"imitated": right, "unlearned": right, "compared": right, "continuous": right} | {name: right[:, None]}
    continuous = flags.pop("continuous")
    with pytest.raises(ValueError, match=re.escape(f"{name} must have shape (8,), like policy_logps; got (8, 1).")):
        grid_loss(rows, rows, rows, Terms(**flags), continuous)


@pytest.mark.parametrize("beta", [0.0, -0.1, math.nan])
def test_a_beta_that_is_not_above_zero_is_refused(beta):
    rows = hand_rows(1.0, 0.0)
    for loss in (pointwise_dpo_loss, pointwise_mse_loss):
        with pytest.raises(ValueError, match=re.escape(f"beta must be above 0; got {beta}.")):
            loss(*rows, beta=beta)
    with pytest.raises(ValueError, match=re.escape(f"beta must be above 0; got {beta}.")):
        ulma_loss(*rows, rows[2] == 1, beta=beta)


@pytest.mark.parametrize("sft_weight", [-0.5, math.nan])
def test_a_negative_weight_of_sft_is_refused(sft_weight):
    rows = hand_rows(1.0, 0.0)
    with pytest.raises(ValueError, match=re.escape(f"sft_weight must be 0 or above; got {sft_weight}.")):
        ulma_loss(*rows, rows[2] == 1, sft_weight=sft_weight)


def test_an_unknown_word_is_refused_and_the_known_ones_are_named():
    rows = hand_rows(1.0, 0.0)
    mask = rows[2] == 1
    with pytest.raises(ValueError, match=r"label_type must be 'binary' or 'continuous'; got 'soft'\."):
        ulma_loss(*rows, mask, label_type="soft")
    with pytest.raises(ValueError, match=r"positive_loss must be one of \('sft', .*'none'\); got 'mse'\."):
        route(rows[2], mask, mask, positive_loss="mse")
    with pytest.raises(ValueError, match=r"negative_loss must be one of \('pointwise_dpo', .*'none'\); got 'sft'\."):
        route(rows[2], mask, mask, negative_loss="sft")


@pytest.mark.parametrize(
    ("positive_loss", "negative_loss", "message"),
    [
        ("none", "none", "positive_loss and negative_loss are both 'none'"),
        (
            "pointwise_dpo",
            "unlearning",
            "positive_loss='pointwise_dpo' with negative_loss='unlearning' is not a method",
        ),
    ],
)
def test_the_two_cells_that_are_no_method_are_refused(positive_loss, negative_loss, message):
    label, mask = torch.tensor([1.0]), torch.tensor([True])
    assert (positive_loss, negative_loss) in oracle.REFUSED_CELLS
    with pytest.raises(ValueError, match=message):
        route(label, mask, ~mask, positive_loss=positive_loss, negative_loss=negative_loss)


@pytest.mark.parametrize("loss", [pointwise_mse_loss, *BINARY_LOSSES.values()])
def test_the_slope_is_the_losses_derivative(loss):
    torch.manual_seed(0)
    policy, ref, label = torch.randn(3, 9, dtype=torch.float64)
    label = label.abs().clamp(max=1)
    log_z = torch.randn(9, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(policy, ref, label, beta=0.3, log_z=log_z).sum(), log_z)
    continuous = torch.full((9,), loss is pointwise_mse_loss)
    name = next((name for name, each in BINARY_LOSSES.items() if each is loss), "cross_entropy")
    slope = reward_slope(0.3 * (policy - ref + log_z.detach()), label, continuous, binary_loss=name)
    torch.testing.assert_close(0.3 * slope, gradient)


@pytest.mark.parametrize("name", BINARY_LOSSES)
def test_the_grid_compares_binary_rows_by_the_chosen_loss_and_continuous_ones_by_the_squared_error(name):
    policy, ref, label, log_z = gradient_rows([1.0, 0.0, 0.3, 2.5])
    continuous = torch.tensor([False, False, False, True])
    nowhere = torch.zeros(4, dtype=torch.bool)
    terms = route(label, nowhere, continuous)
    found = grid_loss(policy, ref, label, terms, continuous, beta=0.7, log_z=log_z, binary_loss=name).total
    wanted = BINARY_LOSSES[name](policy, ref, label, beta=0.7, log_z=log_z)
    assert found[:3].tolist() == wanted[:3].tolist()
    assert found[3] == pointwise_mse_loss(policy, ref, label, beta=0.7, log_z=log_z)[3]


def test_an_unknown_binary_loss_is_refused():
    rows = torch.zeros(1)
    terms = Terms(*torch.zeros(3, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"binary_loss must be one of \('cross_entropy', .*; got 'hinge'"):
        grid_loss(rows, rows, rows, terms, terms.imitated, binary_loss="hinge")
    with pytest.raises(ValueError, match="got 'hinge'"):
        reward_slope(rows, rows, terms.imitated, binary_loss="hinge")


def test_the_losses_of_kto_and_una_by_hand():
    # σ(2) = 0.880797, σ(2.5) = 0.924142
    assert kto_loss(*hand_rows(1.0, 0.0, 0.25)).tolist() == pytest.approx([0.119203, 0.880797, 0.690399], abs=1e-6)
    assert squared_error_loss(*hand_rows(1.0, 0.0)).tolist() == pytest.approx([0.014209, 0.775803], abs=1e-6)
    assert kto_loss(*hand_rows(1.0), log_z=5.0).tolist() == pytest.approx([0.075858], abs=1e-6)
    assert squared_error_loss(*hand_rows(0.0), log_z=5.0).tolist() == pytest.approx([0.854038], abs=1e-6)


# Rows that are compared within their group, so that log Z cancels.


@st.composite
def groups(draw, kinds=LABEL_TYPES):
    """A batch with labels 0 and 1 where they are binary, a group per row (negative for none), and a weight."""
    batch = draw(batches(kinds))
    size = len(batch["policy"])
    batch["label"] = [
        float(round(z)) if k == "binary" else z for z, k in zip(batch["label"], batch["kind"], strict=True)
    ]
    batch["group"] = draw(st.lists(st.integers(-2, 2), min_size=size, max_size=size))
    batch["weight"] = draw(st.lists(st.floats(0.1, 5.0), min_size=size, max_size=size))
    return batch


def test_the_conditional_loss_gives_the_hand_numbers():
    # With equal rewards, each choice of k among n rows is as likely: log(4 over 2) / 4, log(3 over 1) / 3
    logps = torch.full((8,), -10.0)
    group = torch.tensor([0, 0, 0, 0, 7, 7, 7, -1])
    label = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0])
    expected = [math.log(6) / 4] * 4 + [math.log(3) / 3] * 3 + [0.0]
    assert conditional_dpo_loss(logps, logps, label, group).tolist() == pytest.approx(expected, abs=1e-6)
    # r = 2 and 0, 0 with the first liked: −2 + log(e² + 2)
    policy = torch.tensor([-10.0, -30.0, -30.0])
    losses = conditional_dpo_loss(policy, torch.full((3,), -30.0), torch.tensor([1.0, 0.0, 0.0]), torch.zeros(3).long())
    assert losses.sum().item() == pytest.approx(-2 + math.log(math.exp(2) + 2), abs=1e-6)


@examples
@given(st.floats(-300.0, 0.0), st.floats(-300.0, 0.0), st.floats(0.01, 1.0))
def test_the_conditional_loss_of_a_like_and_a_dislike_is_the_loss_of_dpo(chosen, rejected, beta):
    policy = torch.tensor([rejected, chosen], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-40.0, -50.0], dtype=torch.float64)
    loss = conditional_dpo_loss(policy, ref, torch.tensor([0.0, 1.0]), torch.tensor([3, 3]), beta=beta).sum()
    margin = (policy[1] - ref[1]) - (policy[0] - ref[0])
    dpo = -F.logsigmoid(beta * margin)
    assert loss.item() == pytest.approx(dpo.item(), rel=1e-12, abs=1e-12)
    for ours, theirs in zip(torch.autograd.grad(loss, policy)[0], torch.autograd.grad(dpo, policy)[0], strict=True):
        assert ours.item() == pytest.approx(theirs.item(), abs=1e-12)


def test_two_centered_ratings_have_half_the_loss_of_rebel():
    policy, ref, label, _ = gradient_rows([4.0, -2.0])
    group, beta = torch.zeros(2, dtype=torch.long), 0.3
    log_ratio = (policy - ref).detach()
    losses = pointwise_mse_loss(
        policy, ref, label - group_means(label, group), beta=beta, log_z=-group_means(log_ratio, group)
    )
    rebel = (beta * (log_ratio[0] - log_ratio[1]) - (label[0] - label[1])) ** 2
    assert losses.sum().item() == pytest.approx(rebel.item() / 2)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@examples
@given(data=st.data())
def test_conditional_losses_and_gradients_equal_the_oracle(dtype, data):
    batch = data.draw(groups(("binary",)))
    tensors, exact = rounded(batch | {"log_z": 0.0}, dtype)
    arguments = (tensors["policy"], tensors["ref"], tensors["label"], torch.tensor(batch["group"]))
    losses = conditional_dpo_loss(*arguments, beta=batch["beta"])
    values = oracle.conditional(exact["policy"], exact["ref"], exact["label"], batch["group"], beta=batch["beta"])
    # A group's loss has the rounding of the rewards of all its rows, and its softmax multiplies it
    largest = np.max(np.abs(np.subtract(batch["policy"], batch["ref"])))
    rounding = 16 * torch.finfo(dtype).eps * (1 + batch["beta"] * largest) * len(batch["label"])
    (gradient,) = torch.autograd.grad(losses.sum(), tensors["policy"])
    assert losses.dtype == gradient.dtype == dtype
    assert np.all(np.abs(losses.detach().numpy() - values[0]) <= 4 * TOLERANCE[dtype] * (1 + values[0]) + rounding)
    assert np.all(np.abs(gradient.numpy() - values[1]) <= 4 * TOLERANCE[dtype] + rounding)


@examples
@given(groups(("continuous",)))
def test_centered_ratings_equal_the_oracle_and_a_constant_makes_no_difference_to_their_gradient(batch):
    tensors, exact = rounded(batch | {"log_z": 0.0}, torch.float64)
    group, weight = torch.tensor(batch["group"]), torch.tensor(batch["weight"], dtype=torch.float64)
    policy, ref, beta = tensors["policy"], tensors["ref"], batch["beta"]

    def weighted_loss(log_ratio):
        label = tensors["label"] - group_means(tensors["label"], group, weight)
        return weight * pointwise_mse_loss(policy, ref, label, beta=beta, log_z=-group_means(log_ratio, group, weight))

    losses = weighted_loss((policy - ref).detach())
    rows = np.array(batch["group"]) >= 0
    of = {name: oracle.centered(exact[name], batch["group"], batch["weight"]) for name in ("policy", "ref", "label")}
    error = of["label"] - beta * (of["policy"] - of["ref"])
    size = 1 + np.max(np.abs(exact["policy"] - exact["ref"])) + np.max(np.abs(exact["label"]))
    np.testing.assert_allclose(
        losses.detach().numpy()[rows], (batch["weight"] * error**2)[rows], rtol=1e-9, atol=1e-12 * size**2
    )
    (gradient,) = torch.autograd.grad(losses.sum(), policy)
    np.testing.assert_allclose(
        gradient.numpy()[rows], (-2 * beta * np.array(batch["weight"]) * error)[rows], rtol=1e-9, atol=1e-12 * size
    )
    (attached,) = torch.autograd.grad(weighted_loss(policy - ref).sum(), policy)
    np.testing.assert_allclose(attached.numpy()[rows], gradient.numpy()[rows], rtol=1e-9, atol=1e-12 * size)
    assert np.all(attached.numpy()[~rows] == 0)


@examples
@given(groups(("binary",)), st.floats(-50.0, 50.0))
def test_what_all_rows_of_a_group_share_cancels(batch, shift):
    tensors, _ = rounded(batch | {"log_z": 0.0}, torch.float64)
    group, beta = torch.tensor(batch["group"]), batch["beta"]
    moved = tensors["ref"] + shift * group
    kept = group >= 0
    before, after = (
        conditional_dpo_loss(tensors["policy"], ref, tensors["label"], group, beta=beta)[kept]
        for ref in (tensors["ref"], moved)
    )
    torch.testing.assert_close(before, after, rtol=1e-6, atol=1e-6)


def test_large_rewards_of_a_group_keep_their_digits_in_float32():
    near = torch.tensor([0.0, 0.5, 1.0, 2.0])
    label, group = torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.zeros(4, dtype=torch.long)
    far = conditional_dpo_loss(near + 1e6, torch.zeros(4), label, group, beta=1.0)
    torch.testing.assert_close(far, conditional_dpo_loss(near, torch.zeros(4), label, group, beta=1.0))


def test_gradcheck_agrees_with_the_conditional_loss():
    policy, ref, label, _ = gradient_rows([1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    group = torch.tensor([0, 0, 0, 0, 5, 5, -1])
    assert gradcheck(lambda p: conditional_dpo_loss(p, ref, label, group, beta=0.5), (policy,))


def test_a_group_is_informative_if_its_rows_can_differ():
    label = torch.tensor([1.0, 1.0, 0.0, 3.0, 3.0, 5.0, 1.0, 0.0])
    group = torch.tensor([0, 0, 1, 2, 2, 3, -1, -1])
    continuous = torch.tensor([False, False, False, True, True, True, False, False])
    assert is_informative(label, group, continuous).tolist() == [False] * 3 + [True] * 2 + [False] * 3


def test_the_grid_compares_binary_rows_within_their_group_and_continuous_ones_as_before():
    policy, ref, label, log_z = gradient_rows([1.0, 0.0, 2.0, 1.0, 1.0])
    continuous = torch.tensor([False, False, True, False, False])
    mask, group = torch.tensor([False, False, False, True, False]), torch.tensor([1, 1, 1, -1, -1])
    terms = route(label, mask, continuous)
    losses = grid_loss(policy, ref, label, terms, continuous, beta=0.5, log_z=log_z, group=group)
    pair = conditional_dpo_loss(policy[:2], ref[:2], label[:2], group[:2], beta=0.5)
    rating = pointwise_mse_loss(policy[2:3], ref[2:3], label[2:3], beta=0.5, log_z=log_z[2:3])
    torch.testing.assert_close(losses.preference, torch.cat([pair, rating, torch.zeros(2, dtype=torch.float64)]))
    assert losses.total[3] == -policy[3]


def test_the_conditional_loss_checks_shapes_and_beta():
    rows = torch.zeros(2), torch.zeros(2), torch.tensor([0.0, 1.0])
    with pytest.raises(ValueError, match=re.escape("group must have shape (2,), like policy_logps; got (1,)")):
        conditional_dpo_loss(*rows, torch.tensor([0]))
    with pytest.raises(ValueError, match="beta must be above 0"):
        conditional_dpo_loss(*rows, torch.tensor([0, 0]), beta=0)
