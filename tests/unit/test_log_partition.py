"""The choices for log Z, held to enumeration, closed forms and gradients."""

import itertools
import math

import numpy as np
import pytest
import torch

from trl_ulma.log_partition import (
    BatchKL,
    Learned,
    LogPartition,
    Observed,
    Prior,
    RunningMean,
    estimate_log_z,
    quantile_labels,
    quantile_log_z,
)
from trl_ulma.losses import pointwise_dpo_loss, reward_slope

BINARY = torch.tensor([False, False, False])
MIXED = torch.tensor([False, True, False])


def seen(compared, log_ratio, slope=(0.0, 0.0, 0.0)) -> Observed:
    return Observed(torch.tensor(compared), torch.tensor(log_ratio), torch.tensor(slope))


def step(estimator: LogPartition, *micro_batches, rate: float = 1.0) -> None:
    for rows, continuous, states in micro_batches:
        estimator.observe(rows, continuous, states)
    sums = estimator.take_sums()
    assert sums is not None
    estimator.update(sums, rate)


def test_a_number_stays_as_it_is():
    constant = LogPartition(0.7)
    constant.observe(seen([True] * 3, [1.0] * 3), BINARY)
    assert constant.take_sums() is None
    assert constant.state_dict() == {}
    assert constant(MIXED).tolist() == [0.7] * 3


def test_the_prior_calibrates_the_start_of_both_kinds_of_labels():
    label = np.array([1.0, 1.0, 0.0, 0.2, 3.0, -1.0])
    weight = np.array([1.0, 2.0, 1.0, 0.5, 1.0, 3.0])
    prior = Prior(label, np.arange(6) > 3, weight, beta=0.25)
    start = 0.25 * prior(torch.tensor([False, True]))
    mean = (1 + 2 + 0.2 * 0.5) / 4.5
    assert torch.sigmoid(start[0]).item() == pytest.approx(mean)
    assert start[1].item() == pytest.approx((3 - 3) / 4)


def test_the_prior_makes_the_mean_slope_zero_at_the_start():
    label = torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    prior = Prior(label.numpy(), np.zeros(4, bool), np.ones(4), beta=0.1)
    none = torch.zeros(4, dtype=torch.bool)
    assert reward_slope(0.1 * prior(none), label, none).sum().item() == pytest.approx(0)


def test_another_beta_keeps_c_and_divides_it_anew():
    prior = Prior(np.array([1.0, 1.0, 0.0, 1.0]), np.zeros(4, bool), np.ones(4), beta=0.1)
    learned, mean = Learned(0, beta=0.1, learning_rate=0.1), RunningMean()
    step(learned, (seen([True] * 3, [0.0] * 3, [-1.0] * 3), BINARY, None))
    step(mean, (seen([True] * 3, [2.0] * 3), BINARY, None))
    for estimator, factor in ((prior, 0.5), (learned, 0.5), (mean, 1.0), (LogPartition(0.3), 1.0)):
        before = estimator(BINARY)
        estimator.set_beta(0.2)
        torch.testing.assert_close(estimator(BINARY), factor * before)
        assert before.all()


def test_the_prior_needs_both_classes():
    with pytest.raises(ValueError, match=r"of both classes; the mean label of the compared rows is 1\.0\."):
        Prior(np.ones(3), np.zeros(3, bool), np.ones(3), beta=0.1)


def test_the_running_mean_is_minus_the_moving_average_of_compared_rows():
    mean = RunningMean()
    micro = [
        (seen([True, True, False], [4.0, 1.0, math.nan]), MIXED, None),
        (seen([True, False, True], [2.0, math.nan, 6.0]), MIXED, None),
    ]
    step(mean, *micro)
    assert mean.log_z.tolist() == pytest.approx([-0.1 * (4 + 2 + 6) / 3, -0.1 * 1.0])
    step(mean, (seen([True, False, False], [1.0, math.nan, math.nan]), MIXED, None))
    # No row with a continuous label: its mean stays
    assert mean.log_z.tolist() == pytest.approx([-0.9 * 0.4 - 0.1, -0.1])


def test_the_batch_kl_is_cut_at_zero_and_stays_where_nothing_was_seen():
    kl = BatchKL()
    kl.set_kl(torch.tensor(3.0), torch.tensor(2.0))
    assert kl(BINARY).tolist() == [-1.5] * 3
    kl.set_kl(torch.tensor(5.0), torch.tensor(0.0))
    assert kl(BINARY).tolist() == [-1.5] * 3
    kl.set_kl(torch.tensor(-3.0), torch.tensor(2.0))
    assert kl(BINARY).tolist() == [0.0] * 3


def test_the_learned_one_takes_adams_steps_along_its_losses_gradient():
    torch.manual_seed(0)
    states, slope = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    compared = torch.tensor([True, True, False, True, True])
    continuous = torch.tensor([False, True, False, False, True])
    learned = Learned(4, beta=0.2, learning_rate=0.05)
    assert learned.needs_prompt_states

    # The same by autograd and torch's Adam: c = w·h/‖h‖ + b of the label's kind, and dℓ/dc = slope
    w, b = torch.zeros(4, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    adam = torch.optim.Adam([w.requires_grad_(), b.requires_grad_()], lr=0.05)
    for rate in (1.0, 0.5):
        adam.param_groups[0]["lr"] = 0.05 * rate
        adam.zero_grad()
        c = (states / states.norm(dim=1, keepdim=True)) @ w + torch.where(continuous, b[1], b[0])
        (c * slope)[compared].mean().backward()
        adam.step()
        parts = [slice(0, 2), slice(2, 5)]
        micro = [
            (Observed(compared[p], torch.full((5,), math.nan)[p], slope[p]), continuous[p], states[p]) for p in parts
        ]
        step(learned, *micro, rate=rate)
    torch.testing.assert_close(learned.weights.detach(), torch.cat([w, b]).detach())
    c = (states / states.norm(dim=1, keepdim=True)) @ w + torch.where(continuous, b[1], b[0])
    torch.testing.assert_close(learned(continuous, states), c.detach() / 0.2)


def test_a_learned_state_goes_on_where_it_was():
    one, other = (Learned(0, beta=0.2, learning_rate=0.05) for _ in range(2))
    rows = (seen([True, True, False], [0.0] * 3, [0.3, -1.0, 9.0]), MIXED, None)
    step(one, rows)
    other.load_state_dict({name: value.clone() for name, value in one.state_dict().items()})
    step(one, rows)
    step(other, rows)
    assert torch.equal(one.weights, other.weights)
    assert one.weights.abs().min() > 0.05


def test_a_step_without_compared_rows_moves_nothing():
    learned = Learned(0, beta=0.2, learning_rate=0.05)
    step(learned, (seen([False] * 3, [math.nan] * 3, [math.nan] * 3), MIXED, None))
    assert learned.weights.tolist() == [0.0, 0.0]


def test_a_state_of_another_choice_is_refused():
    message = r"state of log Z is {'log_z': \(2,\)}, but this log_z needs none\. Set log_z to the value that"
    with pytest.raises(ValueError, match=message):
        LogPartition().load_state_dict(RunningMean().state_dict())
    with pytest.raises(ValueError, match=r"state of log Z is empty, but this log_z needs {'log_z': \(2,\)}"):
        RunningMean().load_state_dict({})


def test_the_learned_one_says_what_it_lacks():
    with pytest.raises(ValueError, match="needs prompt_states"):
        Learned(4, beta=0.2, learning_rate=0.05)(BINARY)


def test_the_estimate_is_z_where_every_answer_is_there_as_often_as_the_reference_gives_it():
    rewards = np.array([0.3, -1.0, 2.0, 0.5])
    counts = [1, 4, 2, 3]  # the reference: tenths
    label = np.repeat(rewards, counts)
    found = estimate_log_z(["x"] * 10, label, beta=0.7)
    exact = math.log(sum(n / 10 * math.exp(r / 0.7) for n, r in zip(counts, rewards, strict=True)))
    assert found.log_z == pytest.approx([exact] * 10)


def test_the_estimates_error_and_bias_are_those_of_sampling():
    random = np.random.default_rng(0)
    n, beta, samples = 20, 1.0, 20_000
    label = random.choice([0.0, 1.0, 2.0], size=n * samples, p=[0.5, 0.3, 0.2])
    exact = math.log(0.5 + 0.3 * math.e + 0.2 * math.e**2)
    found = estimate_log_z(np.repeat(np.arange(samples), n).tolist(), label, beta=beta)
    estimates = found.log_z[::n]
    assert estimates.std() == pytest.approx(found.standard_error[::n].mean(), rel=0.05)
    bias = estimates.mean() - exact
    assert bias < 0
    assert bias == pytest.approx(found.bias[::n].mean(), rel=0.15)


def test_a_single_answer_tells_nothing_of_its_error():
    found = estimate_log_z(["a", "b", "b"], [1.0, 0.0, 0.0], beta=0.5)
    assert found.standard_error.tolist() == [math.inf, 0.0, 0.0]
    assert found.log_z.tolist() == [2.0, 0.0, 0.0]


def test_large_labels_do_not_overflow():
    assert estimate_log_z(["a", "a"], [1e4, 1e4], beta=0.1).log_z.tolist() == [1e5, 1e5]
    assert quantile_log_z(1e-3) == pytest.approx(1e3 + math.log(1e-3))


def test_quantiles_are_mean_ranks_within_a_prompt():
    prompts, label = ["a", "b", "a", "a", "a"], [5.0, 0.0, 1.0, 5.0, 9.0]
    assert quantile_labels(prompts, label).tolist() == [0.5, 0.5, 0.125, 0.5, 0.875]


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_log_z_of_quantiles_is_that_of_a_uniform_label(beta):
    labels = quantile_labels(["x"] * 20_000, np.random.default_rng(0).normal(size=20_000))
    estimate = estimate_log_z(["x"] * 20_000, labels, beta=beta)
    assert quantile_log_z(beta) == pytest.approx(estimate.log_z[0], rel=1e-6)


def test_the_joint_minimizer_over_all_answers_is_the_optimum_and_its_log_z():
    """What `Learned` rests on: a normalized policy cannot take up a constant, so that c ends at β·log Z."""
    beta, rewards = 0.5, torch.tensor([1.0, -0.5, 0.3, -2.0], dtype=torch.float64)
    reference = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64)
    label = torch.sigmoid(rewards)
    logits = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    c = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits, c], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        log_z = (c / beta).expand(4)
        rows = pointwise_dpo_loss(logits.log_softmax(0), reference.log(), label, beta=beta, log_z=log_z)
        total = (reference * rows).sum()
        total.backward()
        return total

    for _ in range(5):
        optimizer.step(loss)
    weights = reference * (rewards / beta).exp()
    torch.testing.assert_close(logits.softmax(0).detach(), weights / weights.sum(), atol=1e-5, rtol=0)
    assert c.item() == pytest.approx(beta * weights.sum().log().item(), abs=1e-4)


def test_errors_name_what_is_wrong():
    for function in (lambda b: estimate_log_z(["a"], [0.0], beta=b), quantile_log_z):
        for beta in (0.0, math.nan):
            with pytest.raises(ValueError, match=f"beta must be above 0; got {beta}"):
                function(beta)
    for function, lengths in itertools.product((quantile_labels, lambda p, v: estimate_log_z(p, v, beta=1)), (1, 3)):
        with pytest.raises(ValueError, match=f"as many values as label, 2; got {lengths}"):
            function(["a"] * lengths, [0.0, 1.0])
