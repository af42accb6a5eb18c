"""The frontier on a language model: feedback, sampling, training, resuming and the report."""

import doctest
import gzip
import importlib.util
import itertools
import json
import math
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from world import trains_with_trl

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "frontier"
sys.path.append(str(FOLDER))

import answers  # noqa: E402
import contenders  # noqa: E402
import loop  # noqa: E402
import plan  # noqa: E402
import pool as pools  # noqa: E402
import prompts  # noqa: E402
from answers import Answer, human_texts, perplexity, rewards, sample  # noqa: E402
from contenders import METHODS, Recipe, can_learn, train  # noqa: E402
from regimes import REGIMES, Feedback, draw  # noqa: E402


def script(name: str) -> ModuleType:
    """`run.py` or `report.py` of this example; other examples have scripts of the same names."""
    spec = importlib.util.spec_from_file_location(f"frontier_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


run, report, learning_rate = script("run"), script("report"), script("learning_rate")


@pytest.fixture(autouse=True)
def _one_quiet_thread(monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()
    torch.set_num_threads(threads)


ANSWERS = [
    "I love it, it is wonderful and good.",
    "How awful, a bad and horrible thing.",
    "The cat sat on the mat.",
    "Paris is a great and happy capital.",
    "No. Go away, you are ugly.",
    "Of course, here it is: a letter.",
]


def store(folder: Path, group: str, *, answers: int) -> None:
    """A group of answers as `Pool` stores it, made up: ten of eleven are usable."""
    random = np.random.default_rng(len(group))
    rows = []
    for place, question in enumerate(prompts.questions(group)):
        texts = []
        for i in range(answers):
            words = " ".join(random.choice(ANSWERS) for _ in range(random.integers(1, 3)))
            texts.append([words, (place + i) % 11 != 0])
        rows.append({"question": question, "answers": texts})
    folder.mkdir(parents=True, exist_ok=True)
    with gzip.open(folder / f"{group}.json.gz", "wt") as file:
        json.dump(rows, file)


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("answers")
    for group, count in [("held-out", 2), ("train-0", 16), ("train-1", 16), ("single-0", 1), ("demonstrations-0", 6)]:
        store(folder, group, answers=count)
    return folder


@pytest.fixture(scope="module")
def pool(stored) -> pools.Pool:
    return pools.Pool(stored)


# Prompts and rewards


def test_no_topic_is_in_two_groups():
    assert len(set(prompts.topics())) == len(prompts.topics())
    assert prompts.most_seeds() >= max(plan.SEEDS, plan.FIRST_SEEDS)
    groups = ["held-out", *(f"train-{seed}" for seed in range(plan.FIRST_SEEDS))]
    asked = [question for group in groups for question in prompts.questions(group)]
    assert len(set(asked)) == len(asked) == 64 + plan.FIRST_SEEDS * 90
    single = prompts.questions("single-1")
    assert len(set(single)) == len(single) >= 960
    topics_of_seed = {question.split(" about ")[1] for question in prompts.questions("train-1")}
    assert {question.split(" about ")[1] for question in single} == topics_of_seed
    assert set(prompts.questions("demonstrations-1")) < set(prompts.questions("train-1"))


@pytest.mark.parametrize(("group", "message"), [("train-6", "seed 6 has no topics"), ("test-0", "There is no group")])
def test_unknown_groups_are_refused(group, message):
    with pytest.raises(ValueError, match=message):
        prompts.questions(group)


def test_rewards_say_what_they_are_named_after():
    assert rewards("I love this wonderful day!")["sentiment"] > 2
    assert rewards("I hate this awful day!")["sentiment"] < -2
    for words, length in [(12, 4.0), (10, 2.0), (15, 1.0), (20, -4.0), (1, -4.0), (100, -4.0)]:
        assert rewards(" ".join(["word"] * words))["length"] == length


@pytest.mark.parametrize("module", [answers, prompts])
def test_examples_in_docstrings_run(module):
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0


# Sampling and KL


def small_model(seed: int, vocabulary: int = 5) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.6,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@torch.inference_mode()
def enumerated(model: LlamaForCausalLM, prompt: list[int], most: int) -> dict[tuple[int, ...], float]:
    """log π(y|x) of every answer that ends with token 0, or is cut off after `most` tokens."""
    found: dict[tuple[int, ...], float] = {}
    open_ones = {(): 0.0}
    for step in range(most):
        more = {}
        for answer, logp in open_ones.items():
            log_probs = torch.log_softmax(model(torch.tensor([prompt + list(answer)])).logits[0, -1], 0)
            for token, value in enumerate(log_probs.tolist()):
                whole = (*answer, token)
                (found if token == 0 or step + 1 == most else more)[whole] = logp + value
        open_ones = more
    return found


def test_samples_come_from_the_model_and_kl_is_that_of_all_answers():
    policy, reference = small_model(0), small_model(1)
    asked = [[3, 1, 2], [4]]  # of different lengths: the second is padded
    drawn = sample(policy, asked, answers=4000, eos=0, max_tokens=3, seed=0, reference=reference)
    for prompt, found in zip(asked, drawn, strict=True):
        own, other = enumerated(policy, prompt, 3), enumerated(reference, prompt, 3)
        assert sum(map(math.exp, own.values())) == pytest.approx(1, abs=1e-5)
        shares = dict.fromkeys(own, 0.0)
        for each in found:
            shares[tuple(each.ids)] += 1 / len(found)
            assert each.logp == pytest.approx(own[tuple(each.ids)], abs=1e-4)
            assert each.log_ratio == pytest.approx(each.logp - other[tuple(each.ids)], abs=1e-4)
            assert each.ended == (each.ids[-1] == 0)
        for answer, share in shares.items():
            chance = math.exp(own[answer])
            assert share == pytest.approx(chance, abs=4 * math.sqrt(chance / len(found)) + 1e-3)
        exact = sum(math.exp(logp) * (logp - other[answer]) for answer, logp in own.items())
        kl, log_ratio = (np.array([getattr(each, name) for each in found]) for name in ("kl", "log_ratio"))
        assert exact > 0.2
        assert kl.mean() == pytest.approx(exact, abs=4 * kl.std() / len(kl) ** 0.5)
        assert log_ratio.mean() == pytest.approx(exact, abs=4 * log_ratio.std() / len(kl) ** 0.5)
        assert kl.std() < log_ratio.std()


def test_a_policy_that_is_the_reference_has_no_kl():
    model = small_model(0)
    (found,) = sample(model, [[1, 2]], answers=50, eos=0, max_tokens=6, seed=3, reference=model)
    assert max(abs(each.kl) + abs(each.log_ratio) for each in found) < 1e-5
    assert found == sample(model, [[1, 2]], answers=50, eos=0, max_tokens=6, seed=3, reference=model)[0]
    assert found != sample(model, [[1, 2]], answers=50, eos=0, max_tokens=6, seed=4, reference=model)[0]


def test_perplexity_is_that_of_the_tokens_after_the_first(tiny_llama):
    model, tokenizer = pools.load_reference(tiny_llama)
    texts = ["The cat sat on the mat.", "How are you today? I am fine, thank you!"]
    losses = []
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            log_probs = torch.log_softmax(model(ids).logits[0, :-1], 1)
        losses += (-log_probs.gather(1, ids[0, 1:, None])).flatten().tolist()
    assert perplexity(model, tokenizer, texts) == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)


def test_human_texts_are_prose():
    texts = human_texts()
    assert len(texts) >= 10
    assert all(len(text.split()) >= 25 and text[0].isupper() and "=" not in text for text in texts)


def test_the_reference_is_the_checkpoint_at_its_temperature(tiny_llama):
    model, _ = pools.load_reference(tiny_llama)
    plain = LlamaForCausalLM.from_pretrained(tiny_llama)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits * pools.TEMPERATURE, plain(ids).logits, atol=1e-5, rtol=1e-5)


def test_a_model_whose_logits_are_not_linear_in_a_norm_is_refused(tiny_gpt2):
    with pytest.raises(ValueError, match="is no model such as Llama"):
        pools.load_reference(tiny_gpt2)


def test_answers_are_sampled_once_and_go_on_where_they_were(tiny_llama, tmp_path, monkeypatch):
    model, tokenizer = pools.load_reference(tiny_llama)
    monkeypatch.setattr(pools, "questions", lambda group: [f"Who is {i}?" for i in range(9)])
    monkeypatch.setattr(pools, "MAX_TOKENS", 4)
    lines: list[str] = []
    pools.Pool(tmp_path / "whole", model, tokenizer, lines.append).group("train-0")
    assert lines == [f"train-0: {count} of 9 prompts sampled" for count in (4, 8, 9)]

    def stops(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pools.Pool(tmp_path / "parts", model, tokenizer, stops).group("train-0")
    lines.clear()
    pool = pools.Pool(tmp_path / "parts", model, tokenizer, lines.append)
    found = pool.group("train-0")
    assert lines == ["train-0: 8 of 9 prompts sampled", "train-0: 9 of 9 prompts sampled"]
    assert [len(answers) for answers in found] == [16] * 9
    names = [tmp_path / folder / "train-0.json.gz" for folder in ("whole", "parts")]
    assert names[0].read_bytes() == names[1].read_bytes()
    assert {each.name for each in (tmp_path / "parts").iterdir()} <= {"train-0.json.gz", "train-0.lock"}


def test_answers_that_a_trainer_would_read_otherwise_are_not_used(tiny_llama):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    end = tokenizer.eos_token_id
    ids = tokenizer("The cat sat.", add_special_tokens=False)["input_ids"]
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "cat"]
    assert letters != tokenizer("cat", add_special_tokens=False)["input_ids"]

    def usable(ids: list[int], ended: bool) -> bool:
        return pools.read_back(tokenizer, prompts.prompt("Who?"), Answer(ids, ended, 0.0))[1]

    assert usable([*ids, end], True)
    assert not usable(ids, False)  # cut off
    assert not usable([*letters, end], True)  # tokenized otherwise
    assert not usable([end], True)  # empty


# Feedback


def test_ratings_are_rewards_with_noise_of_one_seed(pool):
    found = draw("ratings", "sentiment", 0, pool)
    assert len(found.answer) == 960
    assert found.rated
    assert set(found.question) <= set(prompts.questions("train-0"))
    assert [rewards(text)["sentiment"] for text in found.answer] == found.reward.tolist()
    error = found.rating - found.reward
    assert abs(error.mean()) < 0.15
    assert error.std() == pytest.approx(1, abs=0.1)
    assert abs(np.corrcoef(error, found.reward)[0, 1]) < 0.15
    assert found.thumb.mean() == 0.5
    assert found.rating[found.thumb].min() > found.rating[~found.thumb].max()
    assert found.imitated.mean() == 0.25
    assert found.rating[found.imitated].min() > found.rating[~found.imitated].max()
    again, other = draw("ratings", "sentiment", 0, pool), draw("ratings", "sentiment", 1, pool)
    assert (again.rating == found.rating).all()
    assert not set(other.question) & set(found.question)
    length = draw("ratings", "length", 0, pool)
    assert (length.answer, length.question) == (found.answer, found.question)
    np.testing.assert_allclose(length.rating - length.reward, error, atol=1e-12)


def test_unusable_answers_are_left_out(pool):
    usable = {(each.question, each.text) for answers in pool.group("train-0") for each in answers if each.usable}
    count = sum(each.usable for answers in pool.group("train-0") for each in answers)
    assert count < 1440
    found = draw("ratings", "sentiment", 0, pool)
    assert set(zip(found.question, found.answer, strict=True)) <= usable


def test_one_thumb_per_prompt(pool):
    found = draw("one thumb", "sentiment", 0, pool)
    assert len(set(found.question)) == len(found.question) == 960
    assert not found.rated
    assert found.pairs() is None
    assert found.thumb.mean() == 0.5
    assert (found.imitated == found.thumb).all()
    assert not can_learn("dpo", found)
    assert not can_learn("ratings-0", found)
    assert can_learn("kto", found)


def test_nine_likes_are_the_first_regimes_ratings_cut_lower(pool):
    found, first = draw("nine likes", "sentiment", 0, pool), draw("ratings", "sentiment", 0, pool)
    assert found.thumb.mean() == pytest.approx(0.9)
    assert (found.answer, found.rating.tolist()) == (first.answer, first.rating.tolist())
    assert first.thumb[~found.thumb].sum() == 0
    assert not found.rated


def test_offsets_are_those_of_prompts(pool):
    found, first = draw("offset", "sentiment", 0, pool), draw("ratings", "sentiment", 0, pool)
    assert found.answer == first.answer
    moved = found.rating - first.rating
    by_prompt = {question: moved[[q == question for q in found.question]] for question in set(found.question)}
    assert max(np.ptp(values) for values in by_prompt.values()) < 1e-9
    assert np.std([values[0] for values in by_prompt.values()]) == pytest.approx(2, abs=0.6)
    assert found.rated
    pairs, first_pairs = found.pairs(), first.pairs()
    assert pairs is not None
    assert first_pairs is not None
    assert pairs[:] == first_pairs[:]  # an offset cancels within a prompt


@pytest.mark.parametrize(
    ("regime", "count", "draws"),
    [("demonstrations", 48, 22), ("few demonstrations", 12, 22), ("fair demonstrations", 48, 4)],
)
def test_demonstrations_are_the_best_of_some_draws(regime, count, draws, pool):
    found = draw(regime, "sentiment", 0, pool)
    assert len(found.answer) == 960
    own = found.demonstration
    assert own.sum() == count
    assert found.thumb[own].all()
    assert (found.imitated == own).all()
    more = dict(zip(prompts.questions("demonstrations-0"), pool.group("demonstrations-0"), strict=True))
    first = dict(zip(prompts.questions("train-0"), pool.group("train-0"), strict=True))
    for question, reward in zip(np.array(found.question)[own], found.reward[own], strict=True):
        drawn = (first[question] + more[question])[:draws]
        assert reward == max(each.rewards["sentiment"] for each in drawn if each.usable)
    error = (found.rating - found.reward)[~own]
    assert error.std() == pytest.approx(3, abs=0.3)
    assert found.thumb[~own].mean() == pytest.approx(0.5, abs=0.001)
    assert 0 < np.flatnonzero(own).mean() / 960 < 1
    assert not found.rated


def test_unknown_regimes_are_refused(pool):
    with pytest.raises(ValueError, match=r"There is no regime 'votes'\. Regimes are ratings, one thumb"):
        draw("votes", "sentiment", 0, pool)


@pytest.mark.parametrize("regime", ["ratings", "nine likes", "demonstrations"])
def test_pairs_hold_the_better_of_two_answers_to_a_prompt(pool, regime):
    found = draw(regime, "sentiment", 0, pool)
    labels: dict[tuple[str, str], list[float]] = {}
    label = found.rating if found.rated else found.thumb
    for question, answer, value in zip(found.question, found.answer, label, strict=True):
        labels.setdefault((prompts.prompt(question), answer), []).append(float(value))
    pairs = found.pairs()
    assert pairs is not None
    if found.rated:
        assert 430 < len(pairs) <= 480
    for pair in pairs:
        assert max(labels[pair["prompt"], pair["chosen"]]) > min(labels[pair["prompt"], pair["rejected"]])


def test_rows_of_the_trainers(pool):
    found = draw("ratings", "sentiment", 0, pool)
    ratings, thumbs = found.rows(continuous=True, imitate=True), found.rows(continuous=False, imitate=False)
    assert ratings["label"][:] == found.rating.tolist()
    assert ratings["sft_mask"][:] == found.imitated.tolist()
    assert thumbs["label"][:] == found.thumb.astype(float).tolist()
    assert not any(thumbs["sft_mask"][:])
    assert found.thumbs()["label"][:] == found.thumb.tolist()
    assert thumbs[0]["prompt"] == prompts.prompt(found.question[0])


# Training


def small(feedback: Feedback, rows: int) -> Feedback:
    """The first rows, and those of the same prompts, so that there are pairs."""
    kept = sorted(range(len(feedback.answer)), key=lambda i: feedback.question[i])[:rows]
    return Feedback(
        [feedback.question[i] for i in kept],
        [feedback.answer[i] for i in kept],
        *(getattr(feedback, name)[kept] for name in ("rating", "thumb", "demonstration", "reward")),
        rated=feedback.rated,
    )


class Given(Exception):
    """Raised in place of a trainer: what it was given."""


def catch(monkeypatch, trainer: str) -> dict[str, Any]:
    """Where the arguments of the trainer will be, which raises `Given` in place of training."""
    given: dict[str, Any] = {}

    def caught(**arguments: Any) -> None:
        given.update(arguments)
        raise Given

    monkeypatch.setattr(contenders, trainer, caught)
    return given


@pytest.mark.parametrize(
    ("method", "trainer", "settings"),
    [
        ("sft", "ULMATrainer", {"positive_loss": "sft", "negative_loss": "none"}),
        ("dpo", "DPOTrainer", {}),
        ("kto", "KTOTrainer", {"undesirable_weight": 1.0, "desirable_weight": 1.0}),
        ("bco", "PointwiseDPOTrainer", {"label_type": "binary", "log_z": "running_mean"}),
        # log Z of labels that are uniform on [0, 1], β = 0.1
        ("qrpo", "PointwiseDPOTrainer", {"label_type": "continuous", "log_z": math.log(0.1 * (math.exp(10) - 1))}),
        ("thumbs-0", "PointwiseDPOTrainer", {"label_type": "binary", "log_z": 0.0}),
        ("thumbs-prior", "PointwiseDPOTrainer", {"label_type": "binary", "log_z": "prior"}),
        ("thumbs-learned", "PointwiseDPOTrainer", {"label_type": "binary", "log_z": "learned"}),
        ("ratings-0", "PointwiseDPOTrainer", {"label_type": "continuous", "log_z": 0.0}),
        ("ratings-prior", "PointwiseDPOTrainer", {"label_type": "continuous", "log_z": "prior"}),
        ("ratings-learned", "PointwiseDPOTrainer", {"label_type": "continuous", "log_z": "learned"}),
        ("ulma-ratings-1", "ULMATrainer", {"label_type": "continuous", "sft_weight": 1.0, "log_z": "prior"}),
        ("ulma-ratings-beta", "ULMATrainer", {"label_type": "continuous", "sft_weight": 0.1, "log_z": "prior"}),
        ("ulma-thumbs-1", "ULMATrainer", {"label_type": "binary", "sft_weight": 1.0, "log_z": 0.0}),
        ("ulma-thumbs-beta", "ULMATrainer", {"label_type": "binary", "sft_weight": 0.1}),
    ],
)
def test_methods_differ_in_what_their_name_says(method, trainer, settings, pool, tiny_llama, monkeypatch):
    reference, tokenizer = pools.load_reference(tiny_llama)
    feedback = draw("ratings", "sentiment", 0, pool)
    given = catch(monkeypatch, trainer)
    with pytest.raises(Given):
        train(method, None if method == "sft" else 0.1, feedback, reference, tokenizer, seed=5)
    args, rows = given["args"], given["train_dataset"]
    assert {name: getattr(args, name) for name in settings} == pytest.approx(settings)
    assert args.max_steps == 60
    assert args.learning_rate == 2e-4
    assert args.seed == 5
    assert args.per_device_train_batch_size == (8 if method == "dpo" else 16)
    if method != "sft":
        assert args.beta == 0.1
    if METHODS[method].kind in ("pointwise", "ulma"):
        assert args.label_transform == ("prompt_quantile" if method == "qrpo" else None)
        expected = feedback.rating if METHODS[method].continuous else feedback.thumb
        assert rows["label"][:] == expected.astype(float).tolist()
        assert sum(rows["sft_mask"][:]) == (240 if METHODS[method].kind == "ulma" else 0)
    if method == "sft":
        assert set(rows["completion"][:]) == {
            answer for answer, good in zip(feedback.answer, feedback.imitated, strict=True) if good
        }
    if method == "kto":
        assert rows["label"][:] == feedback.thumb.tolist()


def test_sft_is_swept_over_its_steps(pool, tiny_llama, monkeypatch):
    reference, tokenizer = pools.load_reference(tiny_llama)
    given = catch(monkeypatch, "ULMATrainer")
    taken = []
    for share in plan.betas_of("sentiment", "ratings", "sft"):
        with pytest.raises(Given):
            train("sft", share, draw("ratings", "sentiment", 0, pool), reference, tokenizer, seed=5)
        taken.append((given["args"].max_steps, given["args"].beta))
    assert taken == [(15, 0.1), (60, 0.1)]  # β is the default, which SFT does not read


def test_kto_gives_both_classes_the_same_weight(pool, tiny_llama, monkeypatch):
    reference, tokenizer = pools.load_reference(tiny_llama)
    given = catch(monkeypatch, "KTOTrainer")
    with pytest.raises(Given):
        train("kto", 0.1, draw("nine likes", "sentiment", 0, pool), reference, tokenizer, seed=0)
    labels = given["train_dataset"]["label"][:]
    liked, disliked = sum(labels), len(labels) - sum(labels)
    args = given["args"]
    assert liked * args.desirable_weight == pytest.approx(disliked * args.undesirable_weight)


@pytest.mark.parametrize(
    "method", [pytest.param(each, marks=trains_with_trl if each in ("dpo", "kto") else ()) for each in METHODS]
)
def test_every_method_trains_and_leaves_the_reference_alone(method, pool, tiny_llama, tmp_path):
    reference, tokenizer = pools.load_reference(tiny_llama)
    weights = {name: value.clone() for name, value in reference.state_dict().items()}
    feedback = small(draw("ratings", "sentiment", 0, pool), 64)
    beta = plan.betas_of("sentiment", "ratings", method)[-1]
    recipe = Recipe(steps=6, learning_rate=3e-3)
    model, loss = train(
        method, beta, feedback, reference, tokenizer, seed=0, recipe=recipe, rows_folder=tmp_path / "rows"
    )
    assert math.isfinite(loss)
    assert not model.training
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in reference.named_parameters()}
    for name, value in reference.state_dict().items():
        assert torch.equal(value, weights[name])
    asked = [tokenizer(prompts.prompt("Who is this?"))["input_ids"]]
    (drawn,) = sample(model, asked, answers=8, eos=-1, max_tokens=4, seed=0, reference=reference)
    assert np.mean([each.kl for each in drawn]) > 1e-4


# Rounds


def test_each_round_rates_answers_of_the_policy_trained_on_all_before(pool, tiny_llama, monkeypatch):
    reference, tokenizer = pools.load_reference(tiny_llama)
    offline = draw("ratings", "sentiment", 0, pool)
    said = ["I love it", "How awful", "The cat"]
    trained: list[tuple[Feedback, int]] = []
    asked: list[Any] = []

    def train_nothing(method, beta, feedback, model, tokenizer, *, seed, recipe):
        assert model is reference
        trained.append((feedback, recipe.steps))
        return f"policy {len(trained)}", 0.0

    def answer(policy, prompts, *, answers, eos, max_tokens, seed):
        asked.append((policy, seed))
        ids = [[*tokenizer(said[i % 3], add_special_tokens=False)["input_ids"], eos] for i in range(answers)]
        return [[Answer(each, ended=i != 3, logp=0.0) for i, each in enumerate(ids)] for _ in prompts]

    monkeypatch.setattr(loop, "train", train_nothing)
    monkeypatch.setattr(loop, "sample", answer)
    # What a word-level tokenizer reads of its own text is not under test here
    monkeypatch.setattr(loop, "read_back", lambda tokenizer, prompt, each: (said[len(asked) % 3], each.ended))
    how: dict[str, Any] = {"reward": "sentiment", "recipe": Recipe(steps=60)}
    found = loop.closed("rounds", 0.1, offline, reference, tokenizer, seed=0, **how)

    rows = len(offline.answer)
    assert [steps for _, steps in trained] == [20, 40]
    assert [len(feedback.answer) for feedback, _ in trained] == [rows / 3, 2 * rows / 3]
    assert {policy for policy, _ in asked} == {"policy 1", "policy 2"}
    assert len(set(asked)) == len(asked)  # other draws in each batch and round
    first, second = trained[0][0], trained[1][0]
    assert (first.question, first.answer) == (offline.question[: rows // 3], offline.answer[: rows // 3])
    assert np.array_equal(first.rating, offline.rating[: rows // 3])
    for before, after in [(first, second), (second, found)]:
        old = {*zip(before.question, before.answer, before.rating, strict=True)}
        new = {*zip(after.question, after.answer, after.rating, strict=True)}
        assert old < new
        fresh = [question for question, _, _ in new - old]
        assert max(map(fresh.count, set(fresh))) - min(map(fresh.count, set(fresh))) <= 1
        assert set(fresh) == set(offline.question)
    assert len(found.answer) == rows
    drawn = [i for i, each in enumerate(found.answer) if each in said]
    assert found.reward[drawn].tolist() == [rewards(found.answer[i])["sentiment"] for i in drawn]
    noise = (found.rating - found.reward)[drawn]
    assert abs(noise.mean()) < 0.2
    assert 0.85 < noise.std() < 1.15
    again = loop.closed("rounds", 0.1, offline, reference, tokenizer, seed=0, **how)
    assert again.rating.tolist() == found.rating.tolist()
    other = loop.closed("rounds", 0.1, offline, reference, tokenizer, seed=1, **how)
    assert other.rating.tolist() != found.rating.tolist()


def test_a_policy_of_which_few_answers_end_is_asked_again(pool, tiny_llama, monkeypatch):
    reference, tokenizer = pools.load_reference(tiny_llama)
    offline = draw("ratings", "sentiment", 0, pool)
    asked = []

    def answer(policy, prompts, *, answers, seed, **_):
        asked.append((policy, seed))
        return [[Answer([len(asked), i], ended=i < answers // 2, logp=0.0) for i in range(answers)] for _ in prompts]

    policies = iter(["one", "two"])
    monkeypatch.setattr(loop, "train", lambda *_, **__: (next(policies), 0.0))
    monkeypatch.setattr(loop, "sample", answer)
    monkeypatch.setattr(loop, "read_back", lambda tokenizer, prompt, each: (f"Fine {each.ids}.", each.ended))
    found = loop.closed(
        "rounds", 0.1, offline, reference, tokenizer, reward="sentiment", seed=0, recipe=Recipe(steps=3)
    )
    assert len(found.answer) == len(offline.answer)
    assert len(set(asked)) == len(asked)
    drawn = [i for i, each in enumerate(found.answer) if each.startswith("Fine [")]
    assert len(drawn) == len(found.answer) - math.ceil(len(found.answer) / 3)
    assert len({(found.question[i], found.answer[i]) for i in drawn}) == len(drawn)
    counts = Counter(found.question[i] for i in drawn)
    assert set(counts) == set(offline.question)
    assert max(counts.values()) - min(counts.values()) <= 2  # at most 1 in each round


def test_a_policy_whose_answers_do_not_end_is_said(pool, tiny_llama, monkeypatch):
    reference, tokenizer = pools.load_reference(tiny_llama)
    monkeypatch.setattr(loop, "train", lambda *_, **__: ("policy", 0.0))
    endless = Answer([1], ended=False, logp=0.0)
    monkeypatch.setattr(loop, "sample", lambda policy, prompts, *, answers, **_: [[endless] * answers for _ in prompts])
    offline = draw("ratings", "sentiment", 0, pool)
    with pytest.raises(ValueError, match=r"Round 2 of seed 0 has 0 usable answers of 320"):
        loop.closed("rounds", 0.1, offline, reference, tokenizer, reward="sentiment", seed=0, recipe=Recipe(steps=3))


# The plan and the runs


def test_the_plan_begins_with_what_settles_most():
    cells = list(plan.cells())
    assert len({cell.name for cell in cells}) == len(set(cells)) == len(cells)
    assert set(cells) == {cell for each in plan.PARTS for cell in plan.part(*each)}
    first = cells[:30]
    assert {(cell.reward, cell.regime) for cell in first} == {("sentiment", "ratings")}
    assert [cell.seed for cell in first] == [seed for _ in range(2) for seed in range(5) for _ in range(3)]
    assert {cell.method for cell in first} == set(plan.FIRST)
    # ULMA, thumbs and SFT seed by seed, then SFT of a quarter of the steps
    second = cells[30:42]
    assert {(cell.reward, cell.regime) for cell in second} == {("sentiment", "demonstrations")}
    assert [cell.seed for cell in second] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 1, 2]
    assert {cell.method for cell in second} == set(plan.FIRST_OF_DEMONSTRATIONS)
    assert {(cell.method, cell.beta) for cell in second[9:]} == {("sft", 0.25)}
    third = cells[42:45]
    assert {(cell.regime, cell.method) for cell in third} == {("ratings", "rounds")}
    assert {cell.method for cell in cells if (cell.reward, cell.regime) == plan.PARTS[0]} == set(METHODS)
    for regime in REGIMES:
        able = plan.methods(regime)
        assert ("dpo" in able) == (regime != "one thumb")
        assert ("qrpo" in able) == (regime in ("ratings", "offset"))
        assert {"kto", "sft", "thumbs-0", "ulma-thumbs-1"} <= set(able)


@pytest.fixture
def folder(tmp_path, stored) -> Path:
    (tmp_path / "answers").symlink_to(stored)
    return tmp_path


def run_script(monkeypatch, folder: Path, model: str, *options: str) -> None:
    arguments = ["--results", str(folder), "--model", model, "--cache", str(folder / "cache"), *options]
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    run.main()


def test_a_run_resumes_and_skips_what_is_there(folder, tiny_llama, monkeypatch, capsys):
    monkeypatch.setattr(run, "questions", lambda group: prompts.questions(group)[:3])
    monkeypatch.setattr(run, "MAX_TOKENS", 3)
    run_script(monkeypatch, folder, tiny_llama, "--cells", "1", "--steps", "1")
    (path,) = (folder / "cells").iterdir()
    assert path.name == "sentiment_ratings_ratings-prior_0.1_0.json"
    record = json.loads(path.read_text())
    assert (record["method"], record["beta"], record["seed"], record["rows"]) == ("ratings-prior", 0.1, 0, 960)
    assert [len(record[name]) for name in ("sentiment", "length", "kl", "log_ratio")] == [3] * 4
    before, written = path.read_bytes(), path.stat().st_mtime_ns
    assert "1 cells measured, 1 of " in capsys.readouterr().out

    run_script(monkeypatch, folder, tiny_llama, "--cells", "1", "--steps", "1", "--share", "1/2")
    assert (path.read_bytes(), path.stat().st_mtime_ns) == (before, written)
    # The second cell is of the other share
    names = {each.name for each in (folder / "cells").iterdir()} - {path.name}
    assert names == {"sentiment_ratings_thumbs-prior_0.1_0.json"}
    output = capsys.readouterr().out
    assert "1 cells measured, 2 of " in output
    assert "cells of this run are missing, about" in output

    run_script(monkeypatch, folder, tiny_llama, "--only", "ment_ratings_ratings-prior_0.1_0", "--list")
    assert capsys.readouterr().out == "measured sentiment_ratings_ratings-prior_0.1_0\n"
    reference = json.loads((folder / "reference.json").read_text())
    assert len(reference["sentiment"]) == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--share", "3/2"], "--share is K/N"),
        (["--share", "half"], "--share is K/N"),
        (["--only", "ppo"], "no cell has"),
    ],
)
def test_options_that_name_nothing_are_refused(folder, monkeypatch, capsys, options, message):
    with pytest.raises(SystemExit):
        run_script(monkeypatch, folder, "unused", *options)
    assert message in capsys.readouterr().err


# The report


def records(folder: Path, gains: dict[str, float], cells: list[plan.Cell]) -> Path:
    """Made-up records: reward is 1 + the method's gain × KL, plus a seed's own part; KL is 1 at the smallest β."""
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for cell in cells:
        smallest = plan.betas_of(cell.reward, cell.regime, cell.method)[-1]
        kl = smallest / cell.beta if smallest and cell.beta else 2.5 * (cell.beta or 1)
        reward = 1 + gains.get(cell.method, 0.3) * kl + 0.05 * cell.seed * kl + 0.002 * random.standard_normal()
        record = {
            **cell.fields(),
            **{name: [reward - 0.5, reward + 0.5] for name in ("sentiment", "length")},
            "kl": [kl - 0.01, kl + 0.01],
            **{"perplexity": 20 + kl, "different": 0.9, "steps": 60, "learning_rate": 2e-4, "rank": 16},
            **{"device": "CPU, threads: 1", "seconds": 36.0},
            "answers": 4 if cell.seed < 3 else 16,
        }
        (folder / "cells" / f"{cell.name}.json").write_text(json.dumps(record))
    reference = {"sentiment": [0.5, 1.5], "length": [0.5, 1.5], "perplexity": 18.25}
    (folder / "reference.json").write_text(json.dumps(reference))
    return folder


def of_part(reward: str, regime: str) -> int:
    return len(list(plan.part(reward, regime)))


def test_the_reports_digits_are_the_records(tmp_path):
    cells = list(plan.part("sentiment", "ratings"))
    gains = {"ratings-prior": 0.7, "dpo": 0.5, "thumbs-prior": 0.8, "thumbs-learned": 0.8 * 0.5**0.5}
    found = report.Records(records(tmp_path, gains, cells))
    page = report.page(found, tmp_path, only_whole=True)
    assert (tmp_path / "frontier-1.png").stat().st_size > 10_000
    assert f"| sentiment | ratings | {len(cells)} of {len(cells)} | nothing |" in page
    assert "the reference's: 18.2" in page
    assert f"{len(cells) * 36 / 3600:.1f} hours of training and sampling for {len(cells)} cells" in page

    def earned(method: str, seed: int, budget: float) -> float:
        points = [(0.0, 1.0)]
        for beta in plan.betas_of("sentiment", "ratings", method):
            record = json.loads((tmp_path / "cells" / f"sentiment_ratings_{method}_{beta:g}_{seed}.json").read_text())
            points.append((sum(record["kl"]) / 2, sum(record["sentiment"]) / 2))
        kl, reward = np.array(sorted(points)).T
        return float(np.interp(budget**0.5, kl**0.5, reward))

    assert "64 held-out prompts (4 or 16\nanswers to each)" in page
    # 2.776: the 97.5 % quantile of Student's t for five seeds
    own = [earned("dpo", seed, 0.5) for seed in range(5)]
    half = 2.776445 * np.std(own, ddof=1) / 5**0.5
    assert (
        f"| DPO (TRL), pairs | 5 | {np.mean(own):.2f} [{np.mean(own) - half:.2f}, {np.mean(own) + half:.2f}] |" in page
    )
    differences = [earned("ratings-prior", seed, 1.0) - earned("dpo", seed, 1.0) for seed in range(5)]
    half = 2.776445 * np.std(differences, ddof=1) / 5**0.5
    mean = np.mean(differences)
    (line,) = [line for line in page.splitlines() if line.startswith("| ratings against pairs |")]
    assert f"| {mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]: better |" in line
    bends = [earned("dpo", seed, 0.5) - 1 - 0.5**0.5 * (earned("dpo", seed, 1.0) - 1) for seed in range(5)]
    assert f"DPO (TRL), pairs {np.mean(bends):+.2f} [" in page
    assert "not reached" in page  # DPO's and KTO's β end at 1 nat
    (at_half,) = [line for line in page.splitlines() if line.startswith("- **At 0.5 nats**")]
    tied, behind = at_half.split("Behind it:")
    assert "No different, as far as intervals tell" in tied
    assert {"prior", "learned"} == set(re.findall(r"thumbs, log Z (\w+) (?:earns most )?\(1\.4", tied))
    assert "DPO (TRL), pairs (1.3" in behind


def test_a_part_with_a_missing_cell_is_named_and_not_published(tmp_path, monkeypatch, capsys):
    cells = list(plan.part("sentiment", "ratings"))
    records(tmp_path / "results", {}, cells[1:])
    monkeypatch.setattr(sys, "argv", ["report.py", "--results", str(tmp_path / "results"), "--write"])
    with pytest.raises(
        SystemExit,
        match=r"(?s)Nothing is written: no part has every β and .*\| sentiment_ratings_ratings-prior_0\.1_0 ",
    ) as refused:
        report.main()
    assert refused.value.code != 0
    assert not (tmp_path / "RESULTS.md").exists()

    records(tmp_path / "results", {}, [*cells[:1], *itertools.islice(plan.part("length", "ratings"), 5)])
    report.main()
    page = (tmp_path / "RESULTS.md").read_text()
    assert "## Ratings, sentiment" in page
    assert "## Ratings, length" not in page
    (line,) = [
        line
        for line in page.splitlines()
        if line.startswith(f"| length | ratings | 5 of {of_part('length', 'ratings')} |")
    ]
    assert {"ratings-prior (1)", "dpo (1)", "thumbs-prior (2)", "qrpo (3)"} < set(re.split(r" \| |, ", line))
    assert f"| sentiment | offset | 0 of {of_part('sentiment', 'offset')} | all |" in page


def test_methods_that_are_not_whole_are_left_out_of_what_is_published(tmp_path, monkeypatch):
    cells = list(plan.part("sentiment", "ratings"))
    kept = [cell for cell in cells if cell.method in plan.FIRST]
    some = [cell for cell in cells if cell.method == "qrpo"][1:]
    records(tmp_path / "results", {}, [*kept, *some])
    monkeypatch.setattr(sys, "argv", ["report.py", "--results", str(tmp_path / "results"), "--write"])
    report.main()
    page = (tmp_path / "RESULTS.md").read_text()
    rows = {line.split(" | ")[0] for line in page.split("## Ratings, sentiment")[1].splitlines() if line[:1] == "|"}
    assert {f"| {METHODS[name].name}" for name in plan.FIRST} < rows
    assert f"| {METHODS['qrpo'].name}" not in rows
    assert "qrpo (1)" in page
    assert f"| {METHODS['qrpo'].name}" in report.page(report.Records(tmp_path / "results"), None, only_whole=False)


def test_nothing_is_concluded_from_two_seeds(tmp_path):
    cells = [cell for cell in plan.part("sentiment", "ratings") if cell.seed < 2]
    found = report.Records(records(tmp_path, {"ratings-prior": 0.9}, cells))
    page = report.page(found, None, only_whole=False)
    assert "nothing is concluded from 2 seeds" in page
    assert "**At 1 nats** the methods are not ranked" in page
    assert "earns most" not in page
    assert ": better" not in page


def test_the_report_of_nothing(tmp_path):
    page = report.page(report.Records(tmp_path), None, only_whole=False)
    assert page.startswith("Nothing is measured yet.")
    assert "| sentiment | ratings | 0 of " in page


def test_reward_at_a_kl_is_on_the_line_and_not_beyond_it():
    points = np.array([(0.0, 1.0), (1.0, 2.0), (4.0, 1.0)])
    assert report.at(points, 0.25) == pytest.approx(1.5)  # half of the way in √KL
    assert report.at(points, 2.25) == pytest.approx(1.5)
    assert report.at(points, 4.0) == pytest.approx(1.0)
    assert report.at(points, 4.1) is None


# The learning rate for LoRA


def test_a_learning_rate_is_measured_on_prompts_that_are_not_trained_on(stored, tiny_llama, tmp_path, monkeypatch):
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "answers").symlink_to(stored)
    (folder / "reference.json").write_text(json.dumps({"perplexity": 100.0}))
    rows, held_out = learning_rate.rated(pools.Pool(stored), 0)
    assert (len(rows), len(set(rows["prompt"])), len(set(held_out["prompt"]))) == (240, 60, 30)
    assert not set(rows["prompt"]) & set(held_out["prompt"])
    assert set(rows["label"]) <= {1.0, 2.0, 3.0, 4.0, 5.0}

    less = {"PROMPTS": 82, "ANSWERS": 1, "SEEDS": (0, 1), "RATES": (1e-4, 3e-2), "EPOCHS": 1, "HERE": tmp_path}
    for name, value in less.items():
        monkeypatch.setattr(learning_rate, name, value)
    monkeypatch.setattr(learning_rate, "fetch_checkpoint", lambda cache: tiny_llama)
    monkeypatch.setattr(learning_rate, "human_texts", lambda: human_texts()[:8])
    monkeypatch.setattr(sys, "argv", ["learning_rate.py", "--results", str(folder)])
    learning_rate.main()
    found = {path.stem: json.loads(path.read_text()) for path in (folder / "learning_rate").glob("*.json")}
    assert set(found) == {"0.0001_0", "0.0001_1", "0.03_0", "0.03_1"}
    for record in found.values():
        assert (record["rows"], record["steps"]) == (82, 11)
        assert -1 <= record["spearman"] <= 1
    assert abs(found["0.0001_0"]["kl"]) < abs(found["0.03_0"]["kl"])
    assert found["0.0001_0"]["error_of_mean"] == found["0.03_0"]["error_of_mean"]

    monkeypatch.setattr(sys, "argv", ["learning_rate.py", "--results", str(folder), "--write"])
    learning_rate.main()
    page = (tmp_path / "LEARNING_RATE.md").read_text()
    (line,) = [line for line in page.splitlines() if line.startswith("| 3e-2 |")]
    values = [found[f"0.03_{seed}"]["spearman"] for seed in (0, 1)]
    half = 12.7062 * np.std(values, ddof=1) / 2**0.5  # Student's t of two seeds
    assert f"| {np.mean(values):.2f} [{np.mean(values) - half:.2f}, {np.mean(values) + half:.2f}] |" in line
