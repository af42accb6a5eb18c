"""The exact world is exact, and in it the method's claims about log Z hold."""

import dataclasses
import itertools
import json
import math
import re
import sys
import types
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import trl
from world import trains_with_trl

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "exact_world"
sys.path.insert(0, str(FOLDER))

import report  # noqa: E402
import run  # noqa: E402
from exact_world import World, WorldConfig  # noqa: E402
from feedback import Feedback, FeedbackConfig, draw, population  # noqa: E402
from methods import Recipe, train  # noqa: E402

SMALL = WorldConfig(symbols=6, prompts=3)
BETA = 0.5
CONVERGES = Recipe(steps=400, batch_size=None, learning_rate=1e-2, log_z_learning_rate=0.1)


@pytest.fixture(autouse=True)
def _one_quiet_thread(monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def world() -> World:
    return World(SMALL)


def hand_world() -> World:
    """One prompt, four completions: probabilities ½, ¼, ⅛, ⅛ and rewards 0, log 2, log 4, −log 2."""
    world = World(WorldConfig(symbols=2, prompts=1))
    world.log_ref = torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=torch.float64).log()
    world.reward = torch.tensor([[1.0, 2.0, 4.0, 0.5]], dtype=torch.float64).log()
    return world


# Enumeration


@pytest.mark.parametrize("prompt_length", [1, 3])
def test_log_probs_are_products_of_conditionals_and_sum_to_one(prompt_length):
    world = World(WorldConfig(symbols=3, prompt_length=prompt_length, completion_length=3, prompts=3))
    torch.testing.assert_close(world.log_ref.exp().sum(1), torch.ones(3, dtype=torch.float64))
    model = world.policy()
    for p, a in [(0, 0), (1, 5), (2, 26)]:
        context, expected = world.prompts[p].tolist(), 0.0
        for symbol in world.completions[a].tolist():
            with torch.no_grad():
                expected += torch.log_softmax(model(torch.tensor([context])).logits[0, -1], 0)[symbol].item()
            context = [*context, symbol]
        assert world.log_ref[p, a].item() == pytest.approx(expected, abs=1e-12)
    assert world.completions.tolist() == [list(y) for y in itertools.product(range(3), repeat=3)]
    assert model.dtype == torch.float64


def test_z_and_the_optimum_of_a_world_done_by_hand():
    world = hand_world()
    # β = 1: Z = ½·1 + ¼·2 + ⅛·4 + ⅛·½; β = ½ squares the factors
    assert world.log_z(1.0).item() == pytest.approx(math.log(1.5625))
    assert world.log_z(0.5).item() == pytest.approx(math.log(0.5 + 1 + 2 + 0.03125))
    assert world.log_z(1.0, world.reward + 3).item() == pytest.approx(math.log(1.5625) + 3)
    best = world.optimum(1.0)
    torch.testing.assert_close(best.exp()[0] * 1.5625, torch.tensor([0.5, 0.5, 0.5, 0.0625], dtype=torch.float64))
    assert world.expected_reward(world.log_ref) == pytest.approx(math.log(2) * (0.25 + 0.25 - 0.125))
    assert world.kl(world.log_ref) == 0
    assert world.kl(best) == pytest.approx(world.expected_reward(best) - math.log(1.5625))
    assert world.total_variation(best, world.log_ref) == pytest.approx(0.5 - 0.32 + 0.125 - 0.04)


@pytest.mark.parametrize("beta", [0.2, 1.0])
def test_no_other_policy_earns_more_than_the_optimum(world, beta):
    def value(log_probs):
        return world.expected_reward(log_probs) - beta * world.kl(log_probs)

    best = world.optimum(beta)
    assert value(best) == pytest.approx(beta * world.log_z(beta).mean().item())
    generator = torch.Generator().manual_seed(0)
    for size in (0.01, 0.3, 3.0):
        for _ in range(20):
            noise = size * torch.randn(best.shape, generator=generator, dtype=torch.float64)
            other = torch.log_softmax(best + noise, 1)
            assert value(other) < value(best)
            assert world.expected_reward(other) < world.best_reward(world.kl(other))
    assert world.best_reward(world.kl(best)) == pytest.approx(world.expected_reward(best))


def test_more_prompts_than_there_are_is_refused():
    with pytest.raises(ValueError, match=r"prompts=9: of 8 symbols there are only 8 prompts of length 1\. Ask for"):
        WorldConfig(prompts=9)


def test_rewards_have_the_scale_and_spread_asked_for():
    world = World(WorldConfig(prompt_length=2, prompts=64, reward_scale=1.5, prompt_spread=0.7))
    torch.testing.assert_close(world.reward.std(1, correction=0), torch.full((64,), 1.5, dtype=torch.float64))
    assert world.reward.mean(1).std(correction=0).item() == pytest.approx(0.7)
    assert world.reward.mean().item() == pytest.approx(0, abs=1e-12)


# Feedback


def test_answers_come_from_the_reference_and_labels_from_the_reward(world):
    drawn = draw(world, FeedbackConfig(rows=30_000, answers=10_000))
    shares = np.bincount(drawn.answer[drawn.prompt == 1], minlength=36) / 10_000
    np.testing.assert_allclose(shares, world.log_ref[1].exp().numpy(), atol=0.015)
    chance = world.reward.sigmoid().numpy()[drawn.prompt, drawn.answer]
    likely = chance > 0.5
    assert drawn.label[likely].mean() == pytest.approx(chance[likely].mean(), abs=0.015)
    assert drawn.label[~likely].mean() == pytest.approx(chance[~likely].mean(), abs=0.015)
    assert not drawn.demonstration.any()
    assert (drawn.imitated == (drawn.label == 1)).all()


def test_ratings_have_scale_offset_and_noise(world):
    config = FeedbackConfig(rows=9000, answers=3000, label_type="continuous", scale=2.0, offset=5.0, noise=0.3)
    drawn = draw(world, config)
    truth = world.reward.numpy()[drawn.prompt, drawn.answer]
    slope, intercept = np.polyfit(truth, drawn.label, 1)
    assert (slope, intercept) == (pytest.approx(2, abs=0.02), pytest.approx(5, abs=0.02))
    assert (drawn.label - 2 * truth - 5).std() == pytest.approx(0.3, abs=0.01)
    torch.testing.assert_close(drawn.reward, 2 * world.reward + 5)
    assert drawn.imitated.mean() == pytest.approx(0.25)
    assert drawn.is_good.mean() == pytest.approx(0.5)


def test_a_thinned_class_adds_a_constant_to_the_log_odds(world):
    drawn = draw(world, FeedbackConfig(rows=9000, answers=3000, positive_share=0.9))
    assert len(drawn.label) == 9000
    assert drawn.label.mean() == 0.9
    chance = drawn.reward.sigmoid().numpy()[drawn.prompt, drawn.answer]
    for part in (chance > np.median(chance), chance <= np.median(chance)):
        assert drawn.label[part].mean() == pytest.approx(chance[part].mean(), abs=0.015)
    assert (drawn.reward - world.reward).std() < 1e-12


def test_demonstrations_are_as_many_and_as_good_as_asked(world):
    found = {}
    for quality in (0.0, 0.5, 1.0):
        drawn = draw(world, FeedbackConfig(rows=9000, answers=3000, demonstrations=0.25, quality=quality))
        own = drawn.demonstration
        assert own.mean() == pytest.approx(0.25, abs=0.015)
        assert (drawn.label[own] == 1).all()
        assert (drawn.imitated == own).all()
        found[quality] = world.reward.numpy()[drawn.prompt, drawn.answer][own].mean()
    bad, good = world.expected_reward(world.log_ref), world.expected_reward(world.optimum(0.3))
    assert found[0.0] == pytest.approx(bad, abs=0.1)
    assert found[0.5] == pytest.approx((bad + good) / 2, abs=0.1)
    assert found[1.0] == pytest.approx(good, abs=0.1)


def test_the_best_of_many_answers_are_better_demonstrations(world):
    found = {}
    for best_of in (1, 4, 64):
        drawn = draw(world, FeedbackConfig(rows=9000, answers=3000, demonstrations=0.25, best_of=best_of))
        own = drawn.demonstration
        assert own.mean() == pytest.approx(0.25, abs=0.015)
        found[best_of] = world.reward.numpy()[drawn.prompt, drawn.answer]
        rest = found[best_of][~own].mean()
        assert rest == pytest.approx(world.expected_reward(world.log_ref), abs=0.1)
        found[best_of] = found[best_of][own].mean()
    # The exact mean of the greatest of n draws, from the probability of each reward to be the greatest
    order = world.reward.argsort(1)
    at_most = world.log_ref.exp().gather(1, order).cumsum(1)
    prompts = sorted(set(drawn.prompt))
    for best_of, mean in found.items():
        powers = at_most[prompts] ** best_of
        chance = torch.cat([powers[:, :1], powers.diff(dim=1)], 1)
        exact = (chance * world.reward.gather(1, order)[prompts]).sum(1).mean()
        assert mean == pytest.approx(float(exact), abs=0.1)


@pytest.mark.parametrize("label_type", ["binary", "continuous"])
def test_pairs_hold_the_better_answer_of_one_prompt(world, label_type):
    drawn = draw(world, FeedbackConfig(rows=60, answers=20, label_type=label_type))
    labels = {}
    for p, a, label in zip(drawn.prompt, drawn.answer, drawn.label, strict=True):
        labels.setdefault((*world.prompts[p].tolist(), *world.completions[a].tolist()), []).append(label)
    pairs = drawn.pairs()
    assert len(pairs) >= 20
    for pair in pairs:
        better = labels[tuple(pair["prompt_ids"] + pair["chosen_ids"])]
        worse = labels[tuple(pair["prompt_ids"] + pair["rejected_ids"])]
        assert max(better) > min(worse)


def test_one_answer_a_prompt_makes_no_pair_and_dpo_nothing_to_learn(world):
    drawn = draw(world, FeedbackConfig(rows=3, answers=1))
    assert drawn.pairs() is None
    assert train(drawn, "dpo", BETA) is None


def test_kto_rows_rotate_completions_within_each_batch(world):
    rows = draw(world, FeedbackConfig(rows=6, answers=2)).kto_rows(4)
    own, other = rows["completion_ids"][:], rows["KL_completion_ids"][:]
    assert other == [own[3], own[0], own[1], own[2], own[5], own[4]]


def test_bad_settings_are_refused(world, monkeypatch):
    with pytest.raises(ValueError, match=r"positive_share=0.9 with label_type='continuous': it is the share of"):
        FeedbackConfig(label_type="continuous", positive_share=0.9)
    with pytest.raises(ValueError, match=r"40 rows of 4 answers a prompt are 10 prompts, and the world has 3\."):
        draw(world, FeedbackConfig(rows=40, answers=4))
    with pytest.raises(ValueError, match=r"There is no method 'ppo'\. Methods are sft, dpo, kto, pointwise_dpo, ulma"):
        train(population(world), "ppo", BETA)
    monkeypatch.setattr(trl, "__version__", "1.7.1")
    with pytest.raises(ValueError, match=r"KTO of TRL 1\.7\.1 takes no token ids\. Install TRL 1\.8 or newer\."):
        train(population(world), "kto", BETA)


# What the method claims


@pytest.mark.parametrize(
    ("label_type", "log_z", "most"),
    [("binary", "column", 0.002), ("continuous", "column", 0.002), ("binary", "learned", 0.05)],
)
def test_the_whole_population_leads_to_the_optimum(world, label_type, log_z, most):
    best = world.optimum(BETA)
    assert world.total_variation(world.log_ref, best) > 0.3
    trainer = train(population(world, label_type), "pointwise_dpo", BETA, log_z, CONVERGES)
    assert world.total_variation(world.log_probs(trainer.model), best) <= most
    if log_z == "learned":
        states = trainer.model(world.prompts, output_hidden_states=True).hidden_states[-1][:, -1]
        found = trainer.log_partition(torch.zeros(len(states), dtype=torch.bool), states.detach())
        torch.testing.assert_close(found, world.log_z(BETA), atol=0.1, rtol=0)


def test_a_wrong_log_z_leads_elsewhere(world):
    """With 1 nat too much the optimum is missed, by more than steps could make up for."""
    feedback = population(world)
    wrong = dataclasses.replace(feedback, reward=feedback.reward + BETA)  # log Z + 1 nat
    trainer = train(wrong, "pointwise_dpo", BETA, "column", dataclasses.replace(CONVERGES, steps=150))
    assert world.total_variation(world.log_probs(trainer.model), world.optimum(BETA)) > 0.1


def part_of(feedback: Feedback, rows: np.ndarray, **changed) -> Feedback:
    names = ("prompt", "answer", "label", "demonstration")
    part = {name: getattr(feedback, name)[rows] for name in names}
    return dataclasses.replace(feedback, **part | {"weight": None} | changed)


def test_of_few_answers_a_prompt_log_z_is_not_identified():
    """Ratings of 4 of 36 completions are fitted with log Z = 1 as well as with 2: what is seen moves by the difference,
    and the mass goes to, or comes from, what was not seen."""
    world = World(dataclasses.replace(SMALL, reward_scale=0.3))
    everything = population(world, "continuous")
    seen = part_of(everything, everything.answer < 4)
    ratios = []
    for log_z in (1.0, 2.0):
        trainer = train(seen, "pointwise_dpo", BETA, log_z, dataclasses.replace(CONVERGES, steps=250))
        log_probs = world.log_probs(trainer.model)
        ratios.append((log_probs - world.log_ref)[:, :4])
        torch.testing.assert_close(BETA * (ratios[-1] + log_z), world.reward[:, :4], atol=5e-3, rtol=0)
    torch.testing.assert_close(ratios[0] - ratios[1], torch.ones(3, 4, dtype=torch.float64), atol=2e-2, rtol=0)


def test_one_class_everywhere_says_nothing(world):
    """All labels 1 and log Z = 0: by Jensen's inequality E_ref[log σ(r)] is greatest at the reference itself. Of half
    of the completions, the same labels make these more likely."""
    liked = population(world)
    liked = dataclasses.replace(liked, label=np.ones_like(liked.label))
    half = part_of(liked, liked.answer < 18, weight=liked.weight[liked.answer < 18])
    recipe = dataclasses.replace(CONVERGES, steps=60, learning_rate=1e-3)
    everywhere, on_half = (
        world.log_probs(train(feedback, "pointwise_dpo", BETA, 0.0, recipe).model) for feedback in (liked, half)
    )
    assert world.total_variation(everywhere, world.log_ref) < 0.005
    assert (on_half.exp() - world.log_ref.exp())[:, :18].sum(1).min() > 0.05


@pytest.mark.parametrize("log_z", ["prior", "learned", "learned_constant"])
def test_one_class_is_refused_where_log_z_would_fit_it(world, log_z):
    liked = population(world)
    liked = dataclasses.replace(liked, label=np.ones_like(liked.label))
    with pytest.raises(ValueError, match=rf"log_z='{log_z}' needs compared rows of both classes: all 108 rows that"):
        train(liked, "pointwise_dpo", BETA, log_z, CONVERGES)


@pytest.mark.parametrize("log_z", [0.0, "learned"])
def test_one_answer_a_prompt_is_learned_from_where_prompts_share(log_z):
    world = World(WorldConfig(prompt_length=3, prompts=512, reward_scale=1.5))
    drawn = draw(world, FeedbackConfig(rows=512, answers=1))
    recipe = Recipe(steps=60, batch_size=128, log_z_learning_rate=0.1)
    trainer = train(drawn, "pointwise_dpo", BETA, log_z, recipe)
    gained = world.expected_reward(world.log_probs(trainer.model)) - world.expected_reward(world.log_ref)
    assert gained > 0.1


# The scripts


@trains_with_trl
def test_a_run_resumes(tmp_path, monkeypatch, capsys):
    def more(cells: int) -> list[dict]:
        options = ["--only", "frontier", "--cells", str(cells), "--results", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["run.py", *options])
        run.main()
        return json.loads((tmp_path / "frontier.json").read_text())

    first = more(1)
    second = more(1)
    assert second[:1] == first
    assert [row["method"] for row in second] == ["sft", "dpo"]
    assert all(0 < row["reward"] < row["best"] and row["kl"] > 0 for row in second)
    assert "frontier: 1 cells" in capsys.readouterr().out
    assert "Not all methods are measured yet." in report.page(tmp_path)


def test_every_regime_is_measured_with_every_method_and_beta():
    cells = list(run.frontier_cells(5))
    assert len(cells) == 5 * 5 * (1 + 8 * len(run.BETAS))
    assert len({tuple(cell.items()) for cell in cells}) == len(cells)
    assert len(list(run.approximation_cells(5))) == 5 * 3 * 7
    assert len(list(run.demonstrations_cells(5))) == 5 * 3 * 2 * (3 + 4 * 3)


def test_of_demonstrations_beside_thumbs_each_method_is_trained_as_named(monkeypatch):
    seen: list[tuple] = []

    def train(feedback, method, beta, log_z=0.0, recipe=None, sft_weight=1.0, start=None):
        share = float(feedback.demonstration.mean())
        model = feedback.world.policy()
        seen.append((method, beta, recipe.steps, sft_weight, start, round(share, 2), model))
        return types.SimpleNamespace(model=model)

    monkeypatch.setattr(run, "train", train)
    cells = list(run.demonstrations_cells(1))[-15:]
    found = [run.demonstrations(cell) for cell in cells]
    assert all(abs(each["reward"]) < 1e-9 and abs(each["kl"]) < 1e-9 for each in found)
    assert [share for *_, share, _ in seen] == pytest.approx([0.25] * len(seen), abs=0.02)
    assert [(steps, start) for method, _, steps, _, start, *_ in seen[:3]] == [(6, None), (24, None), (96, None)]
    assert [each[:4] for each in seen[3:6]] == [("pointwise_dpo", beta, 96, 1.0) for beta in (0.1, 0.3, 1.0)]
    for first, second in zip(seen[6:12:2], seen[7:12:2], strict=True):
        assert (first[0], first[2], second[0], second[2]) == ("sft", 48, "pointwise_dpo", 48)
        assert second[4] is first[-1]
    assert [each[:4] for each in seen[12:15]] == [("ulma", beta, 96, 1.0) for beta in (0.1, 0.3, 1.0)]
    assert [each[:4] for each in seen[15:]] == [("ulma", beta, 96, beta) for beta in (0.1, 0.3, 1.0)]


def test_the_report_of_demonstrations_compares_ulma_with_each_other_learner(tmp_path):
    gains = {("ulma", 1.0): 0.6, ("sft", 1.0): 0.4, ("pointwise_dpo", 1.0): 0.6, ("ulma", "beta"): 0.7}
    rows = []
    for cell in run.demonstrations_cells(3):
        kl = cell["steps"] / 24 if cell["method"] == "sft" else 0.3 / cell["beta"]
        # Differences between learners vary from seed to seed, and cancel over the seeds
        gain = gains.get((cell["method"], cell["sft_weight"]), 0.5)
        gain += 0.01 * (cell["seed"] - 1) * (1 if (cell["method"], cell["sft_weight"]) == ("ulma", 1.0) else -1)
        rows.append({**cell, "kl": kl, "reward": gain * kl, "best": 2 * kl**0.5})
    part = tmp_path / "demonstrations.json"
    part.write_text(json.dumps(rows[:50]))
    assert "Demonstrations" not in report.page(tmp_path)
    part.write_text(json.dumps(rows))
    page = report.page(tmp_path)
    assert "- Within 1 nat, ULMA, sft_weight 1 earns more than SFT in 6 and less in 0;" in page
    assert "more than SFT, then pointwise DPO in 6 and less in 0;" in page
    assert "more than ULMA, sft_weight β in 0 and less in 6 of 6 kinds of data." in page
    line = next(each for each in page.splitlines() if each.startswith("| ULMA, sft_weight 1, less SFT |"))
    assert line.count("**+0.20 [") == 6
    line = next(each for each in page.splitlines() if "ULMA, sft_weight 1, less pointwise DPO |" in each)
    assert "**" not in line
    assert "ULMA, sft_weight β earns more than pointwise DPO in 6 and less in 0 of 6 kinds of data." in page
    # A third of the fourth seed changes nothing
    part.write_text(json.dumps([*rows, *({**row, "seed": 3, "reward": 9.0} for row in rows[:30])]))
    assert report.page(tmp_path) == page
    assert (tmp_path / "demonstrations.png").stat().st_size > 10_000


def stored_frontier(folder: Path, gains: dict[tuple, float], seeds: int = 3) -> None:
    """Seeds of the first and second regime: reward is `gains` × KL plus a seed's own; the second has no pairs."""
    rows = []
    random = np.random.default_rng(0)
    for regime, seed in itertools.product(list(run.REGIMES)[:2], range(seeds)):
        for key in run.CONTENDERS:
            for beta in run.BETAS:
                row = {"regime": regime, "method": key[0], "log_z": key[1], "beta": beta, "seed": seed}
                if key[0] != "dpo" or regime == "many answers a prompt":
                    kl = 0.4 / beta
                    reward = gains.get(key, 0.3) * kl + 0.001 * random.standard_normal()
                    row |= {"kl": kl, "reward": reward, "best": 2 * kl**0.5}
                rows.append(row)
    (folder / "frontier.json").write_text(json.dumps(rows))


def test_the_report_says_what_the_numbers_say(tmp_path):
    gains = {("kto", 0.0): 0.5, ("pointwise_dpo", "learned"): 0.45, ("pointwise_dpo", "prior"): 0.2, ("dpo", 0.0): 0.6}
    stored_frontier(tmp_path, gains)
    page = report.page(tmp_path)
    paired, single = page.split("### ")[1:3]
    assert "**What to use**: DPO (TRL) earns most within 1 nat (0.60), ahead of all others." in paired
    assert "**Pairs**: DPO (TRL) is better than pointwise DPO, log Z learned (+0.15" in paired
    assert "prior worse (-0.10" in paired
    assert "learned better (+0.15" in paired
    assert re.search(r"learned constant not significantly different \([+-]0\.00", paired)
    assert "**What to use**: KTO (TRL) earns most within 1 nat (0.50), ahead of all others." in single
    assert "there are none: no prompt has two answers" in single
    assert re.search(r"ULMA\*\* is not significantly different from SFT \([+-]0\.00", single)
    assert (tmp_path / "frontier-1.png").stat().st_size > 10_000


def test_nothing_is_concluded_from_one_seed(tmp_path):
    stored_frontier(tmp_path, {("dpo", 0.0): 0.6}, seeds=1)
    page = report.page(tmp_path)
    assert "One seed is measured: without intervals, nothing is said" in page
    assert "What to use" not in page
    assert "| DPO (TRL) | 0.30 | 0.60 |" in page


def test_the_report_of_the_approximation(tmp_path):
    far = {"column": 0.001, 0.0: 0.4, "learned": 0.02}
    rows = [
        {
            "labels": labels,
            "log_z": choice,
            "seed": seed,
            "tv": far.get(choice, 0.3) + 0.001 * seed,
            "tv_reference": 0.6,
        }
        for labels, choice, seed in itertools.product(run.POPULATIONS, run.CHOICES, (-1, 0, 1))
    ]
    (tmp_path / "approximation.json").write_text(json.dumps(rows))
    page = report.page(tmp_path)
    assert "| 0 (the paper's) | 0.400 [0.398, 0.402] |" in page
    assert "after the exact one (0.0010) comes learned (0.020)" in page
    assert "With log Z = 0 it is 0.40, 20 times as far as the first." in page
    assert (tmp_path / "approximation.png").stat().st_size > 10_000


def test_reward_within_a_budget_is_read_off_the_line_between_two_policies():
    points = np.array([(0.0, 0.0), (0.5, 1.0), (1.5, 0.8), (2.0, 2.0)])
    assert report.within(points, 0.25) == pytest.approx(0.5)
    assert report.within(points, 1.0) == 1.0
    assert report.within(points, 1.75) == pytest.approx(1.4)
    assert report.within(points, 9.0) == 2.0


def test_intervals_are_those_of_the_t_distribution():
    mean, low, high = report.interval([1.0, 2.0, 3.0])
    assert (mean, high - mean, mean - low) == (2, pytest.approx(4.302653 / 3**0.5), pytest.approx(4.302653 / 3**0.5))
    assert report.shown([1.0]) == "1.00"
    assert report.shown([]) == "–"
