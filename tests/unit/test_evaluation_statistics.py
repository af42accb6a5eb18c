"""Intervals, perplexity, implicit rewards and rates against values known from elsewhere."""

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import calibration as sklearn_calibration
from sklearn.metrics import brier_score_loss, roc_auc_score

from trl_ulma.evaluation.implicit_reward import (
    binary_figures,
    calibration_curve,
    continuous_figures,
    implicit_reward,
    length_figures,
    over_length,
    split_figures,
)
from trl_ulma.evaluation.intervals import Estimate, bootstrap, mean_of, over_seeds, wilson
from trl_ulma.evaluation.judges import Verdict
from trl_ulma.evaluation.judging import is_above_chance
from trl_ulma.evaluation.perplexity import perplexity
from trl_ulma.evaluation.rates import counts, difference, mean_points, rates
from trl_ulma.metrics import is_chosen, reward_ratios
from trl_ulma.ranking import auc, pearson, ranking_figures, spearman

WIN, TIE, LOSE, UNPARSABLE = Verdict.WIN, Verdict.TIE, Verdict.LOSE, Verdict.UNPARSABLE
RNG = np.random.default_rng(0)


# Intervals


@pytest.mark.parametrize(
    ("count", "n", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_is_newcombes(count, n, low, high):
    share = wilson(count, n)
    assert (round(share.low, 4), round(share.high, 4), share.value, share.n) == (low, high, count / n, n)


@pytest.mark.parametrize(("count", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_a_share_of_nothing_is_refused(count, n):
    with pytest.raises(ValueError, match=f"a count between 0 and n, and n of 1 or above; got {count} of {n}"):
        wilson(count, n)


def test_students_interval_over_three_seeds():
    # t(0.975, 2) = 4.302653; the standard error of 10, 12, 14 is 2/√3
    found = over_seeds([10.0, 12.0, 14.0])
    assert found.value == 12
    assert found.high - found.value == pytest.approx(4.302653 * 2 / 3**0.5, rel=1e-6)
    assert found.value - found.low == pytest.approx(found.high - found.value)
    assert over_seeds([3.0]) == Estimate(3.0, None, None, 1)
    assert over_seeds([2.0, 2.0]) == Estimate(2.0, 2.0, 2.0, 2)
    with pytest.raises(ValueError, match="needs one run at least"):
        over_seeds([])


def test_the_bootstrap_of_a_mean_is_near_the_normal_interval():
    values = RNG.normal(5, 2, 400)
    found = bootstrap(mean_of(values), np.arange(400), seed=0)
    half = 1.96 * values.std() / 20
    assert found.low == pytest.approx(values.mean() - half, abs=0.03)
    assert found.high == pytest.approx(values.mean() + half, abs=0.03)
    assert found == bootstrap(mean_of(values), np.arange(400), seed=0)
    assert found != bootstrap(mean_of(values), np.arange(400), seed=1)


def test_prompts_of_different_sizes_keep_all_their_rows():
    found = bootstrap(lambda copies: copies.sum(-1), np.array([7, 3, 7]), seed=0)
    assert (found.value, found.low, found.high) == (3.0, 2.0, 4.0)


def test_the_bootstrap_draws_whole_prompts():
    # Ten copies of a prompt's row say no more than one: by row, the interval would be √10 narrower
    values = np.repeat(RNG.normal(size=100), 10)
    of = mean_of(values)
    copies, once = bootstrap(of, np.repeat(np.arange(100), 10), seed=0), bootstrap(of, np.arange(1000), seed=0)
    assert copies.n == 100
    assert (copies.high - copies.low) / (once.high - once.low) == pytest.approx(10**0.5, rel=0.1)
    # and rows of one prompt need not stand side by side
    order = RNG.permutation(1000)
    shuffled = bootstrap(mean_of(values[order]), np.repeat(np.arange(100), 10)[order], seed=0)
    assert (shuffled.low, shuffled.high) == pytest.approx((copies.low, copies.high))


def _mean_if_any(known, copies):
    share = mean_of(known.astype(float))(copies)
    return np.where(share > 0, share, np.nan)


def test_figures_of_many_resamples_are_those_of_each():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 6, 50).astype(float), rng.integers(0, 5, 50).astype(float)
    assert auc(a, b > 2) == pytest.approx(roc_auc_score(b > 2, a))
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b)[0])
    assert pearson(a, b) == pytest.approx(stats.pearsonr(a, b)[0])
    copies = rng.multinomial(50, np.full(50, 1 / 50), size=20).astype(float)
    for i, drawn in enumerate(np.repeat(np.arange(50), each.astype(int)) for each in copies):
        assert auc(a, b > 2, copies)[i] == pytest.approx(roc_auc_score(b[drawn] > 2, a[drawn]))
        assert spearman(a, b, copies)[i] == pytest.approx(stats.spearmanr(a[drawn], b[drawn])[0])
        assert pearson(a, b, copies)[i] == pytest.approx(stats.pearsonr(a[drawn], b[drawn])[0])
    # undefined where all that was drawn is alike, whatever the other rows are
    alike = np.where(a == a[0], copies, 0)
    alike[:, 0] += 1
    assert np.isnan(spearman(a, b, alike)).all()
    assert np.isnan(pearson(0.1 * a, b, alike)).all()
    assert np.isnan(auc(b, a == a[0], alike)).all()


def test_a_large_dataset_is_drawn_in_parts_as_at_once(monkeypatch):
    rng = np.random.default_rng(0)
    values, groups = rng.normal(size=500), rng.integers(0, 101, 500)
    at_once = bootstrap(mean_of(values), groups, seed=0)
    monkeypatch.setattr("trl_ulma.bootstrap._AT_ONCE", 500 * 7)
    assert bootstrap(mean_of(values), groups, seed=0) == at_once


@pytest.mark.parametrize("comparisons", [1, 5, 6, 60, 500])
def test_resamples_lie_beyond_both_ends_however_many_intervals_hold_together(comparisons):
    values = np.random.default_rng(0).normal(size=100)
    mean, figures = mean_of(values), []

    def statistic(copies):
        figures.append(np.atleast_1d(mean(copies)))
        return mean(copies)

    found = bootstrap(statistic, np.arange(100), 0, comparisons)
    of_resamples = np.concatenate(figures[1:])  # the first is of all rows
    assert min((of_resamples < found.low).sum(), (of_resamples > found.high).sum()) >= 10
    assert len(of_resamples) == max(2000, 400 * comparisons)
    # The ends of a mean's interval are nearly those of a normal distribution
    half = stats.norm.isf(0.025 / comparisons) * values.std() / 10
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.12 * half)


def test_no_interval_without_two_prompts_nor_where_a_resample_is_undefined():
    assert bootstrap(mean_of(np.ones(5)), np.zeros(5), seed=0) == Estimate(1.0, None, None, 1)
    undefined = bootstrap(lambda copies: np.where(copies[..., 0] > 0, 1.0, np.nan), np.arange(3), seed=0)
    assert undefined == Estimate(1.0, None, None, 3)
    # Nearly all resamples of a hundred prompts contain one of the first five
    known = np.arange(100) < 5
    rare = bootstrap(lambda copies: _mean_if_any(known, copies), np.arange(100), seed=0)
    assert 0 < rare.low < rare.value == 0.05 < rare.high < 0.15
    with pytest.raises(ValueError, match="The figure of all 2 rows is nan"):
        bootstrap(mean_of(np.full(2, np.nan)), np.arange(2), seed=0)


def test_no_interval_where_all_resamples_are_alike():
    found = bootstrap(lambda copies: 0.1 + 1e-17 * (copies[..., 0] - 1), np.arange(30), seed=0)  # but for rounding
    assert found == Estimate(0.1, None, None, 30)
    assert perplexity(np.full(3, -2.0), np.full(3, 4), np.arange(3)).low is None
    assert binary_figures(np.array([5.0, -5.0] * 4), np.array([1.0, 0.0] * 4), np.arange(8))["accuracy"].low is None
    close = bootstrap(mean_of(1 + 1e-6 * np.arange(30)), np.arange(30), seed=0)
    assert close.low < close.value < close.high


def test_a_judge_of_few_agreements_is_not_above_chance():
    assert mean_points([WIN] * 2) == wilson(2, 2)
    assert mean_points([LOSE] * 2) == wilson(0, 2)
    assert mean_points([TIE] * 9) == Estimate(0.5, None, None, 9)
    above = {n: is_above_chance(mean_points([WIN] * n)) for n in (1, 2, 29, 30, 200)}
    assert above == {1: False, 2: False, 29: False, 30: True, 200: True}


# Perplexity


def test_perplexity_weighs_tokens_not_rows():
    logps, tokens = np.array([-9 * np.log(2), -np.log(32)]), np.array([9, 1])
    found = perplexity(logps, tokens, np.array([0, 1]))
    assert found.value == pytest.approx(2 ** (14 / 10))
    assert (found.low, found.high) == pytest.approx((2, 32))


@pytest.mark.parametrize(
    ("logps", "tokens", "message"),
    [
        (np.zeros(2), np.ones(3), "must have one shape"),
        (np.zeros(2), np.array([1, 0]), "a token in every row"),
        (np.zeros(0), np.zeros(0), "needs a row at least"),
    ],
)
def test_perplexity_of_nothing_is_refused(logps, tokens, message):
    with pytest.raises(ValueError, match=message):
        perplexity(logps, tokens, np.zeros(len(logps)))


# Implicit rewards


def test_the_reward_is_equation_4():
    policy, ref, log_z = np.array([-1.0, -2.0]), np.array([-3.0, -1.0]), np.array([0.5, -0.5])
    assert implicit_reward(policy, ref, 0.1, log_z) == pytest.approx([0.25, -0.15])
    with pytest.raises(ValueError, match="beta must be above 0; got 0"):
        implicit_reward(policy, ref, 0)
    with pytest.raises(ValueError, match="must have one shape"):
        implicit_reward(policy, ref[:1], 0.1)


def test_binary_figures_by_hand():
    rewards = np.array([2.0, 0.0, -1.0, 1.0])
    label = np.array([1.0, 1.0, 0.0, 0.0])
    found = binary_figures(rewards, label, np.arange(4))
    assert found["auc"].value == 3 / 4  # of four pairs, 0 against 1 is wrong
    assert found["accuracy"].value == 2.5 / 4  # the reward of 0 is half right
    sigmoid = 1 / (1 + np.exp(-rewards))
    assert found["brier"].value == pytest.approx(((sigmoid - label) ** 2).mean())
    turned = binary_figures(-rewards, label, np.arange(4))
    assert turned["auc"].value == 1 / 4
    assert turned["accuracy"].value == 1.5 / 4


def test_length_alone_ranks_as_the_libraries_say():
    tokens, label = RNG.integers(1, 30, 300), RNG.integers(0, 3, 300) / 2
    continuous = np.arange(300) % 3 == 0
    found = length_figures(tokens, label, continuous, np.arange(300) // 2)
    sided = ~continuous & (label != 0.5)
    assert found["auc"].value == pytest.approx(roc_auc_score(label[sided], tokens[sided]))
    assert found["spearman"].value == pytest.approx(stats.spearmanr(tokens[continuous], label[continuous])[0])
    assert found["auc"].low < found["auc"].value < found["auc"].high
    assert length_figures(np.full(300, 7), label, continuous, np.arange(300)) == {}
    assert length_figures(tokens, np.ones(300), continuous, np.arange(300)) == {}


@pytest.mark.parametrize("sign", [1, -1])
def test_rewards_are_compared_with_lengths_on_the_same_resampled_rows(sign):
    label, tokens = RNG.normal(size=300), RNG.integers(1, 30, 300)
    tokens = tokens + (sign * 9 * label).astype(int)
    everything, prompt = np.ones(300, dtype=bool), np.arange(300) // 2
    rewards = label + RNG.normal(size=300)

    def over(rewards, tokens, label=label, continuous=everything):
        alone = length_figures(tokens, label, continuous, prompt)
        return over_length(rewards, tokens, label, continuous, prompt, alone)

    found = over(rewards, tokens)["spearman"]
    length = sign * stats.spearmanr(tokens, label)[0]
    assert found.value == pytest.approx(stats.spearmanr(rewards, label)[0] - length)
    assert found.n == 150
    assert found.low < found.value < found.high
    # Rewards that are the lengths differ from them in no resample, so that no interval is claimed
    same = over(sign * tokens, tokens)["spearman"]
    assert (same.value, same.low) == (0, None)
    liked = (label > 0).astype(float)
    auc = over(rewards, tokens, liked, ~everything)["auc"]
    assert auc.value == pytest.approx(roc_auc_score(liked, rewards) - roc_auc_score(liked, sign * tokens))
    assert over(rewards, np.full(300, 7)) == {}


def test_figures_are_the_libraries():
    rewards, label = RNG.normal(size=200).round(1), RNG.integers(0, 2, 200).astype(float)
    found = binary_figures(rewards, label, np.arange(200))
    assert found["auc"].value == pytest.approx(roc_auc_score(label, rewards))
    assert found["brier"].value == pytest.approx(brier_score_loss(label, 1 / (1 + np.exp(-rewards))))
    assert found["auc"].low < found["auc"].value < found["auc"].high
    ratings = RNG.integers(-2, 3, 200) / 2
    found = continuous_figures(rewards, ratings, np.arange(200))
    assert found["spearman"].value == pytest.approx(stats.spearmanr(rewards, ratings).statistic)
    assert found["pearson"].value == pytest.approx(stats.pearsonr(rewards, ratings).statistic)


def test_soft_labels_have_a_brier_score_and_one_class_has_no_auc():
    found = binary_figures(np.zeros(2), np.array([0.75, 0.5]), np.arange(2))
    assert found["brier"].value == pytest.approx((0.25**2 + 0) / 2)
    assert "auc" not in found


def test_a_label_of_a_half_is_on_no_side():
    """A tie is neither right nor wrong, and scikit-learn has no AUC of it."""
    rewards, label = np.array([2.0, 0.5, -1.0, 1.0, 3.0, -3.0]), np.array([1.0, 0.75, 0.0, 0.25, 0.5, 0.5])
    sided, continuous, prompt = label != 0.5, np.zeros(6, bool), np.arange(6)
    auc, accuracy = roc_auc_score(label[sided] > 0.5, rewards[sided]), 3 / 4
    found = binary_figures(rewards, label, prompt)
    assert (found["auc"].value, found["accuracy"].value) == (auc, accuracy)
    assert split_figures(rewards, label, continuous, prompt, 0.0)["accuracies"].value == accuracy
    logged = [torch.from_numpy(each) for each in (rewards, label, continuous)]
    assert ranking_figures(*logged) == {"rewards/auc": auc}
    chosen = is_chosen(logged[1], logged[2])
    of, rows = reward_ratios(logged[0], logged[0], logged[0], logged[1], chosen, logged[2])["rewards/accuracies"]
    assert float(of.sum() / rows.sum()) == accuracy
    assert set(binary_figures(rewards[4:], label[4:], prompt[4:])) == {"brier"}
    assert "accuracies" not in split_figures(rewards[4:], label[4:], continuous[4:], prompt[4:], 0.0)


def test_continuous_figures_by_hand():
    rewards, label = np.array([1.0, 3.0, 2.0, 10.0]), np.array([1.0, 2.0, 3.0, 4.0])
    found = continuous_figures(rewards, label, np.arange(4))
    assert found["spearman"].value == pytest.approx(0.8)  # 1 − 6·2/(4·15)
    assert found["pearson"].value == pytest.approx(np.corrcoef(rewards, label)[0, 1])
    assert found["mse"].value == pytest.approx((0 + 1 + 1 + 36) / 4)
    assert list(continuous_figures(np.ones(3), np.arange(3.0), np.arange(3))) == ["mse"]


@pytest.mark.parametrize("of", [binary_figures, continuous_figures])
def test_broken_rewards_are_named(of):
    with pytest.raises(ValueError, match="Reward 1 is nan"):
        of(np.array([0.0, np.nan]), np.array([0.0, 1.0]), np.arange(2))
    with pytest.raises(ValueError, match="must have one shape"):
        of(np.zeros(2), np.zeros(3), np.arange(2))
    with pytest.raises(ValueError, match="N above 0"):
        of(np.zeros(0), np.zeros(0), np.zeros(0))


def test_binary_figures_refuse_ratings():
    with pytest.raises(ValueError, match=r'Set label_type="continuous" for others'):
        binary_figures(np.zeros(2), np.array([0.0, 4.0]), np.arange(2))


def test_calibration_is_scikit_learns_and_takes_soft_labels():
    probability = RNG.random(500)
    label = (RNG.random(500) < probability).astype(float)
    bins = calibration_curve(probability, label)
    observed, predicted = sklearn_calibration.calibration_curve(label, probability, n_bins=10, strategy="quantile")
    assert [each.observed for each in bins] == pytest.approx(observed)
    assert [each.predicted for each in bins] == pytest.approx(predicted)
    assert [each.rows for each in bins] == [50] * 10
    alike = calibration_curve(np.full(4, 0.5), np.array([0.25, 0.75, 1.0, 0.0]))
    assert [(each.predicted, each.observed, each.rows) for each in alike] == [(0.5, 0.5, 4)]


# Rates


def test_rates_leave_what_could_not_be_parsed_out():
    verdicts = [WIN] * 5 + [TIE] * 3 + [LOSE] * 2 + [UNPARSABLE] * 7
    found = rates(verdicts)
    assert {name: share.value for name, share in found.items()} == pytest.approx(
        {"win": 0.5, "tie": 0.3, "lose": 0.2, "win_or_tie": 0.8}
    )
    assert found["win"] == wilson(5, 10)
    missing = {"unparsable": 7, "cut": 0, "refused": 0, "unread": 0}
    assert counts(verdicts) == {"win": 5, "tie": 3, "lose": 2} | missing
    assert rates([*verdicts, Verdict.CUT, Verdict.REFUSED]) == found
    assert mean_points(verdicts).value == pytest.approx(0.65)
    assert rates([UNPARSABLE]) == {}
    assert mean_points([UNPARSABLE]) is None


def test_a_difference_is_paired_by_prompt():
    one = {"a": WIN, "b": TIE, "c": WIN, "d": UNPARSABLE, "e": WIN}
    other = {"a": LOSE, "b": TIE, "c": TIE, "d": WIN}
    found = difference(one, other)
    assert (found.value, found.n) == (pytest.approx(0.5), 3)
    assert difference(other, one).value == pytest.approx(-0.5)
    assert difference(one, {"z": WIN}) is None
    many = dict(enumerate([WIN, TIE, LOSE, WIN] * 25))
    none = dict.fromkeys(many, TIE)
    alone, of_three = difference(many, none), difference(many, none, comparisons=3)
    assert of_three.low < alone.low < alone.value < alone.high < of_three.high
    # Where two models do alike on every prompt, however different the prompts are, nothing tells how sure that is
    alike = dict(enumerate([WIN, LOSE] * 50))
    assert difference(alike, alike) == Estimate(0.0, None, None, 100)
