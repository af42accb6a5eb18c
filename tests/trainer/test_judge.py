"""The model as a judge: scores against plain log-probabilities, against known labels, and after loading."""

import json
import logging

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset, concatenate_datasets
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from scipy.special import expit, logit
from scipy.stats import norm
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score
from transformers import AutoModelForCausalLM, AutoTokenizer
from world import make_rows, make_trainer, plain_logps

from trl_ulma.data.files import load_rows
from trl_ulma.judge import Judge
from trl_ulma.labels import LabelRules, parse_transform
from trl_ulma.log_z import saved_log_partition
from trl_ulma.predictions import judged
from trl_ulma.saved import SavedSettings
from trl_ulma.scripts.cli import main
from trl_ulma.scripts.score import make_parser

QUIET = {"label_report": False}
FAST = {"optim": "adamw_torch", "learning_rate": 1e-3, "logging_steps": 1000, **QUIET}
LORA = LoraConfig(r=4, target_modules=["c_attn"], task_type="CAUSAL_LM")


def moved(folder, seed=1):
    """The model of a folder with other weights."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def judge_of(folder, rows, tmp_path, seed=1, **kwargs):
    """A trainer whose policy differs from its reference."""
    reference = AutoModelForCausalLM.from_pretrained(folder)
    return make_trainer(moved(folder, seed), rows, tmp_path, ref_model=reference, **QUIET | kwargs)


# The formulas


def test_surprise_is_the_negative_log_likelihood():
    reward, label = np.array([-2.0, 0.0, 1.5, 3.0]), np.array([1.0, 0.0, 0.0, 1.0])
    binary, rules = np.zeros(4, dtype=bool), LabelRules()
    found = judged(reward, label, binary, rules)
    assert found["probability"] == pytest.approx(expit(reward))
    assert found["surprise"].mean() == pytest.approx(log_loss(label, expit(reward)))
    assert judged(reward, np.full(4, 0.3), binary, rules)["surprise"] == pytest.approx(
        -0.3 * np.log(expit(reward)) - 0.7 * np.log(expit(-reward))
    )
    found = judged(reward, label, ~binary, rules)
    assert np.isnan(found["probability"]).all()
    gaussian = -norm.logpdf(label, reward, 0.5**0.5) - 0.5 * np.log(np.pi)
    assert found["surprise"] == pytest.approx(gaussian)
    extreme = judged(np.array([1e4, -1e4]), np.array([0.0, 1.0]), binary[:2], rules)
    assert extreme["surprise"].tolist() == [1e4, 1e4]


def test_the_predicted_label_is_on_the_scale_of_the_rows():
    continuous = np.array([True, True, False])
    rules = LabelRules("continuous", transform=parse_transform("lower_is_better:4,standardize:2,0.5", "continuous"))
    found = judged(np.array([0.0, 1.0, 0.0]), np.zeros(3), continuous, rules)
    # Rows of the other type are not transformed, nor taken back
    assert found["predicted_label"] == pytest.approx([2.0, 1.5, 0.5])
    rules = LabelRules("binary", transform=parse_transform("min_max:1,5", "binary"))
    assert judged(np.zeros(3), np.zeros(3), continuous, rules)["predicted_label"] == pytest.approx([0.0, 0.0, 3.0])


# The scores of a trainer


@pytest.mark.parametrize("length_normalize", [False, True])
def test_rewards_are_those_of_plain_log_probabilities(tiny_gpt2, tmp_path, length_normalize):
    rows = make_rows(11)
    trainer = judge_of(tiny_gpt2, rows, tmp_path, beta=0.3, log_z=0.7, length_normalize=length_normalize)
    policy, counts = plain_logps(tiny_gpt2, rows, trainer.model.double())
    reference, _ = plain_logps(tiny_gpt2, rows)
    trainer.model.float()
    ratio = (policy - reference) / (counts if length_normalize else 1)
    scored = trainer.score(rows)
    expected = 0.3 * (ratio + 0.7)
    assert np.std(expected) > 1e-3
    assert scored["reward"][:] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert scored["probability"][:] == pytest.approx(expit(expected), rel=1e-4)
    assert scored["predicted_label"][:] == scored["probability"][:]
    labels = np.array(rows["label"][:])
    surprise = -labels * np.log(expit(expected)) - (1 - labels) * np.log(expit(-expected))
    assert scored["surprise"][:] == pytest.approx(surprise, rel=1e-4)
    assert scored.column_names[:3] == rows.column_names
    assert scored["row"][:] == list(range(11))


def test_labels_masks_and_weights_change_no_reward(tiny_gpt2, tmp_path):
    rows = make_rows(6)
    trainer = judge_of(tiny_gpt2, rows, tmp_path, per_device_eval_batch_size=4)
    with_all = trainer.score(rows)
    bare = trainer.score(rows.remove_columns("label"))
    assert bare["reward"][:] == with_all["reward"][:]
    assert "surprise" not in bare.column_names
    assert "label" not in bare.column_names
    flagged = rows.add_column("sft_mask", [True] * 6).add_column("weight", [0.0] * 6)
    assert trainer.score(flagged)["reward"][:] == with_all["reward"][:]
    assert trainer.score(flagged)["sft_mask"][:] == [True] * 6


@pytest.mark.parametrize("strategy", ["random", "group_by_length", "batch_rebalance"])
def test_rewards_are_in_the_order_of_the_rows(tiny_gpt2, tmp_path, strategy):
    """Trainer sorts rows by length to evaluate them, too."""
    if strategy == "batch_rebalance" and Version(transformers.__version__) < Version("5.17"):
        pytest.skip(f"transformers {transformers.__version__} has no batch_rebalance")
    rows = make_rows(9)
    trainer = judge_of(tiny_gpt2, rows, tmp_path, beta=1.0, train_sampling_strategy=strategy)
    wanted = plain_logps(tiny_gpt2, rows, trainer.model)[0] - plain_logps(tiny_gpt2, rows)[0]
    assert trainer.score(rows)["reward"][:] == pytest.approx(wanted, abs=1e-3)
    found = trainer.predict(rows)
    assert found.predictions == pytest.approx(wanted, abs=1e-3)
    assert found.label_ids.tolist() == rows["label"][:]


def test_rows_without_tokens_are_left_out_and_the_others_keep_their_numbers(tiny_gpt2, tmp_path, capture):
    trainer = judge_of(tiny_gpt2, make_rows(4), tmp_path, max_length=24)
    rows = make_rows(3, prompt=["Why?", "x y z " * 20, "Why?"], completion=[" a", " b", " c"])
    scored = trainer.score(rows)
    assert scored["row"][:] == [0, 2]
    assert scored["completion"][:] == [" a", " c"]
    assert "Left out 1 of 3 rows of the scored dataset" in capture.text
    assert "has only one class" not in capture.text


@pytest.fixture
def capture(caplog, monkeypatch):
    """The log of transformers, which does not propagate by itself."""
    import logging

    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("trl_ulma"):
            monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    caplog.set_level("WARNING")
    return caplog


def test_types_by_row(tiny_gpt2, tmp_path):
    rows = make_rows(4, label=[1.0, 0.0, 2.5, -1.0], label_type=["binary"] * 2 + ["continuous"] * 2)
    trainer = judge_of(tiny_gpt2, rows, tmp_path, sft_threshold=9.0)
    scored = trainer.score(rows)
    assert scored["probability"][2:] == [None, None]
    assert scored["predicted_label"][2:] == scored["reward"][2:]
    assert scored["surprise"][2] == pytest.approx((2.5 - scored["reward"][2]) ** 2)
    # A mask that training needed is not needed here
    assert judge_of(tiny_gpt2, make_rows(4), tmp_path).score(rows)["reward"][:] == pytest.approx(scored["reward"][:])


@pytest.mark.parametrize(
    ("label", "settings"),
    [
        ([True, None, False, None], {}),
        ([5, None, 1, 3], {"label_type": "continuous", "label_transform": "standardize", "log_z": "prior"}),
        ([4.0, float("nan"), 1.0, 3.0], {"label_type": "binary", "label_transform": "min_max"}),
        ([1.0, None, None, 4.0], {"label_type": "continuous", "label_transform": "prompt_quantile"}),
        ([None, 2, 3, 1], {"label_type": "binary", "label_transform": "votes", "trials": [0, 2, 4, 2]}),
    ],
    ids=["thumbs", "stars", "nan", "by prompt", "votes"],
)
def test_rows_without_a_label_are_scored_among_others(tiny_gpt2, tmp_path, label, settings):
    more = {"trials": settings.pop("trials")} if "trials" in settings else {}
    same = {"prompt": ["Why?"] * 4} if settings.get("label_transform") == "prompt_quantile" else {}
    known = [1.0, 0.0, 1.0, 0.0] if not settings else [1.0, 2.0, 3.0, 4.0]
    rows = make_rows(4, label=known, **same, **({"trials": [4] * 4} if more else {}))
    trainer = judge_of(tiny_gpt2, rows, tmp_path, pointwise=True, **settings)
    mixed = make_rows(4, label=label, **same, **more)
    scored = trainer.score(mixed)
    missing = [each is None or each != each for each in label]
    there = [row for row in range(4) if not missing[row]]
    assert scored["row"][:] == list(range(4))
    assert [each is None for each in scored["surprise"]] == missing
    assert [each is None or each != each for each in scored["label"]] == missing
    # The others are scored as without them, and their rewards are those of rows without any label
    alone = trainer.score(mixed.select(there))
    for name in ("reward", "predicted_label", "surprise"):
        assert [scored[name][row] for row in there] == pytest.approx(alone[name][:], rel=2e-5, abs=2e-5)
    unlabeled = trainer.score(mixed.remove_columns("label"))
    for name in ("reward", "predicted_label"):
        assert scored[name][:] == pytest.approx(unlabeled[name][:], rel=2e-5, abs=2e-5)
    is_binary = settings.get("label_type", "binary") == "binary"
    probability = expit(scored["reward"][:]) if is_binary else [None] * 4
    assert scored["probability"][:] == (pytest.approx(probability) if is_binary else probability)


def test_no_label_at_all_is_as_without_the_column(tiny_gpt2, tmp_path):
    trainer = judge_of(tiny_gpt2, make_rows(3), tmp_path)
    scored = trainer.score(make_rows(3, label=[None] * 3))
    assert scored["label"][:] == [None] * 3
    assert "surprise" not in scored.column_names
    with pytest.raises(ValueError, match="Row 2 of the scored dataset: label is the text 'up'"):
        trainer.score(make_rows(3, label=["up", None, "up"]))


def test_both_halves_of_a_pair_are_scored(tiny_gpt2, tmp_path):
    pairs = Dataset.from_dict({"prompt": ["Why?", "How?"], "chosen": [" a", " b"], "rejected": [" c", " d"]})
    trainer = judge_of(tiny_gpt2, pairs, tmp_path)
    scored = trainer.score(pairs)
    assert scored["row"][:] == [0, 0, 1, 1]
    assert scored["label"][:] == [1.0, 0.0, 1.0, 0.0]
    alone = trainer.score(Dataset.from_dict({"prompt": ["Why?", "How?"], "completion": [" c", " d"]}))
    assert alone["reward"][:] == pytest.approx(scored["reward"][1::2], rel=2e-5, abs=2e-5)


def test_precomputed_references_serve_new_rows(tiny_gpt2, tmp_path):
    rows = make_rows(6)
    live = judge_of(tiny_gpt2, rows, tmp_path).score(rows)
    early = judge_of(tiny_gpt2, rows, tmp_path, precompute_ref_log_probs=True).score(rows)
    assert early["reward"][:] == pytest.approx(live["reward"][:], abs=1e-5)


def test_metrics_of_the_callers_are_not_asked_about_rows_without_labels(tiny_gpt2, tmp_path):
    def fail(prediction):
        raise AssertionError

    trainer = judge_of(tiny_gpt2, make_rows(4), tmp_path, compute_metrics=fail, prediction_loss_only=True)
    assert len(trainer.score(make_rows(3).remove_columns("label"))) == 3
    assert trainer.compute_metrics is fail
    assert trainer.args.prediction_loss_only


def test_what_cannot_be_scored_says_why(tiny_gpt2, tmp_path):
    rows = make_rows(4)
    trainer = judge_of(tiny_gpt2, rows, tmp_path)
    with pytest.raises(TypeError, match="score needs a Dataset, all of whose rows are at hand; got IterableDataset"):
        trainer.score(rows.to_iterable_dataset())
    with pytest.raises(ValueError, match="score takes raw rows, and these are prepared already"):
        trainer.score(trainer.train_dataset)
    with pytest.raises(ValueError, match=r"The rows have columns that score writes: reward\. Rename or remove them"):
        trainer.score(rows.add_column("reward", [1] * 4))
    with pytest.raises(ValueError, match=r"Row 2 of the scored dataset: label is 7\.0, outside"):
        trainer.score(make_rows(4, label=[0, 1, 7, 0]))
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=r"The logits of GPT2LMHeadModel are not finite"):
        trainer.score(rows)
    unchecked = judge_of(tiny_gpt2, rows, tmp_path, startup_checks=False)
    with torch.no_grad():
        next(unchecked.model.parameters()).fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=r"The rewards of these scored rows are not finite: \[0, 1, 2, 3\]"):
        unchecked.score(rows)
    sft = make_trainer(tiny_gpt2, rows, tmp_path, negative_loss="none", **QUIET)
    with pytest.raises(
        ValueError, match="A reward needs a reference model; with positive_loss='sft' and negative_loss="
    ):
        sft.score(rows)


def test_a_column_of_log_z_is_asked_for_where_training_had_one(tiny_gpt2, tmp_path):
    rows = make_rows(4, log_z=[0.0, 1.0, 2.0, 3.0])
    trainer = judge_of(tiny_gpt2, rows, tmp_path, log_z="column", beta=0.5)
    shifted = trainer.score(make_rows(4, log_z=[1.0, 1.0, 1.0, 1.0]))
    difference = np.array(trainer.score(rows)["reward"]) - np.array(shifted["reward"])
    assert difference == pytest.approx(0.5 * np.array([-1, 0, 1, 2]), abs=1e-5)
    with pytest.raises(ValueError, match="log_z='column' needs a column log_z in the scored rows"):
        trainer.score(make_rows(4))
    own = judge_of(tiny_gpt2, make_rows(4), tmp_path, log_z="prior", pointwise=True)
    with pytest.raises(ValueError, match=r"The scored rows have a column log_z, and the model its own \(prior\)"):
        own.score(rows)


# What it learns: held-out rows of known probability

ANSWERS = {" Of course.": 0.9, " I am fine.": 0.7, " No.": 0.3, " Go away.": 0.1}

# Prompts are held out, too
TRAINED = [10 + i % 70 for i in range(800)]
HELD_OUT = [80 + i % 20 for i in range(400)]


def asked(numbers, seed):
    """A row for each number; whether its answer is liked is drawn with the answer's probability."""
    rng = np.random.default_rng(seed)
    answers = [list(ANSWERS)[i] for i in rng.integers(0, 4, len(numbers))]
    rates = np.array([ANSWERS[answer] for answer in answers])
    columns = {
        "prompt": [f"What is {number}?" for number in numbers],
        "completion": answers,
        "label": (rng.random(len(numbers)) < rates).tolist(),
    }
    return Dataset.from_dict(columns), rates


@pytest.fixture(scope="module")
def taught(tiny_gpt2, tmp_path_factory):
    """(trainer after training, held-out rows, their probabilities), binary labels."""
    rows, _ = asked(TRAINED, 0)
    held_out, rates = asked(HELD_OUT, 1)
    folder = tmp_path_factory.mktemp("taught")
    settings = {"pointwise": True, "beta": 1.0, "log_z": "learned_constant", "num_train_epochs": 2, **FAST}
    trainer = make_trainer(tiny_gpt2, rows, folder, per_device_train_batch_size=16, **settings)
    trainer.train()
    trainer.save_model()
    return trainer, held_out, rates


def test_held_out_rows_are_ranked_and_their_probabilities_calibrated(taught):
    trainer, held_out, rates = taught
    scored = trainer.score(held_out)
    label, probability = np.array(held_out["label"][:]), np.array(scored["probability"][:])
    assert roc_auc_score(label, scored["reward"][:]) > roc_auc_score(label, rates) - 0.02
    assert brier_score_loss(label, probability) < brier_score_loss(label, rates) + 0.01
    assert brier_score_loss(label, np.full(len(label), label.mean())) > brier_score_loss(label, probability) + 0.05
    assert np.abs(probability - rates).mean() < 0.1


def test_wrong_labels_are_the_most_surprising(taught):
    trainer, held_out, rates = taught
    sure = np.flatnonzero(np.abs(rates - 0.5) > 0.3)[:60]
    wrong = set(sure[:10].tolist())
    rows = held_out.select(sure)
    label = [bool(rates[row] < 0.5) if row in wrong else bool(rates[row] > 0.5) for row in sure.tolist()]
    scored = trainer.score(rows.remove_columns("label").add_column("label", label)).sort("surprise", reverse=True)
    assert {int(sure[row]) for row in scored["row"][:10]} == wrong


def test_ratings_come_back_on_their_own_scale(tiny_gpt2, tmp_path):
    stars = dict(zip(ANSWERS, (1.0, 2.0, 4.0, 5.0), strict=True))  # here, lower is better
    rng = np.random.default_rng(0)

    def rated(numbers, seed):
        rows, _ = asked(numbers, seed)
        label = [stars[answer] + rng.normal() / 2 for answer in rows["completion"]]
        return rows.remove_columns("label").add_column("label", label)

    rows, held_out = rated(TRAINED, 0), rated(HELD_OUT, 1)
    settings = {"pointwise": True, "label_type": "continuous", "label_transform": "lower_is_better,standardize"}
    settings |= {"beta": 0.5, "log_z": "learned_constant", "num_train_epochs": 2, "per_device_train_batch_size": 16}
    trainer = make_trainer(tiny_gpt2, rows, tmp_path, **settings, **FAST)
    trainer.train()
    found = np.array(trainer.score(held_out)["predicted_label"][:])
    known = np.array([stars[answer] for answer in held_out["completion"]])
    assert np.abs(found - known).mean() < 0.4  # of 1.5 that the mean rating is off
    assert np.corrcoef(found, known)[0, 1] > 0.97


# Saved and loaded


def scored_by_command(tmp_path, model, rows, *options):
    """Rows in their own order, as the command writes them."""
    rows.to_json(tmp_path / "rows.jsonl")
    argv = [
        "--model",
        str(model),
        "--dataset",
        str(tmp_path / "rows.jsonl"),
        "--output",
        str(tmp_path / "scored.jsonl"),
    ]
    assert main(["score", *argv, *options]) == 0
    return [json.loads(line) for line in (tmp_path / "scored.jsonl").read_text().splitlines()]


def test_a_loaded_model_scores_as_its_trainer_did(taught, tiny_gpt2, tmp_path, capsys):
    trainer, held_out, _ = taught
    here = trainer.score(held_out)
    there = scored_by_command(tmp_path, trainer.args.output_dir, held_out, "--ref_model", tiny_gpt2)
    assert "holds 400 scored rows, the most surprising first; 0 of 400 were left out" in capsys.readouterr().out
    assert [row["surprise"] for row in there] == sorted((row["surprise"] for row in there), reverse=True)
    there = sorted(there, key=lambda row: row["row"])
    for name in ("reward", "probability", "predicted_label", "surprise"):
        assert [row[name] for row in there] == pytest.approx(here[name][:], rel=2e-5, abs=2e-5)
    assert [row["completion"] for row in there] == held_out["completion"][:]


def test_a_trainer_knows_which_rows_it_was_not_trained_on(taught, tiny_gpt2, tmp_path):
    trainer, held_out, _ = taught
    rows = concatenate_datasets([held_out.select(range(20)), asked(TRAINED, 2)[0].select(range(20))])
    assert trainer.score(rows)["held_out"][:] == [True] * 20 + [False] * 20
    untrained = make_trainer(tiny_gpt2, rows, tmp_path, pointwise=True)
    assert untrained.score(rows)["held_out"][:] == [None] * 40


@pytest.mark.parametrize("log_z", [0.4, "prior", "running_mean", "learned", "learned_constant"])
def test_an_adapter_is_compared_with_its_base_model(tiny_gpt2, tmp_path, log_z):
    rows = make_rows(8, label=[float(i % 3) for i in range(8)])
    settings = {"label_type": "continuous", "label_transform": "lower_is_better,quantile", "sft_threshold": 9.0}
    settings |= {"log_z": log_z, "max_length": 30, "truncation_mode": "keep_end", "learning_rate": 1e-2}
    trainer = make_trainer(tiny_gpt2, rows, tmp_path / "out", peft_config=LORA, **FAST | settings)
    trainer.train()
    trainer.save_model()
    here = trainer.score(rows)
    assert np.std(here["reward"][:]) > 1e-4
    there = scored_by_command(tmp_path, tmp_path / "out", rows, "--sort", "row", "--batch_size", "3")
    assert [row["row"] for row in there] == list(range(8))
    for name in ("reward", "predicted_label", "surprise"):
        assert [row[name] for row in there] == pytest.approx(here[name][:], rel=2e-5, abs=2e-5)


@pytest.mark.parametrize("saved", [None, "wte"])
def test_an_adapter_on_a_model_whose_embeddings_were_padded(tiny_gpt2, tmp_path, saved):
    rows, model = make_rows(8), AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    model.resize_token_embeddings(pad_to_multiple_of=100)
    adapter = LoraConfig(r=4, target_modules=["c_attn"], task_type="CAUSAL_LM", modules_to_save=saved and [saved])
    settings = FAST | {"learning_rate": 1e-2, "processing_class": AutoTokenizer.from_pretrained(tiny_gpt2)}
    trainer = make_trainer(model, rows, tmp_path, peft_config=adapter, **settings)
    trainer.train()
    trainer.save_model()
    loaded = Judge.from_pretrained(str(tmp_path))
    assert loaded.score(rows)["reward"][:] == pytest.approx(trainer.score(rows)["reward"][:], abs=2e-5)


@pytest.mark.parametrize("size", [{"pad_to_multiple_of": 100}, {"new_num_tokens": 383}, {"new_num_tokens": 385}])
def test_a_full_model_whose_embeddings_were_resized_in_memory(tiny_gpt2, tmp_path, caplog, size):
    rows, tokenizer = make_rows(8), AutoTokenizer.from_pretrained(tiny_gpt2)
    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    if size == {"new_num_tokens": 385}:
        tokenizer.add_tokens(["<|new|>"])
        rows = make_rows(8, prompt=["<|new|>"] * 8)
    model.resize_token_embeddings(**size, mean_resizing=False)
    model.save_pretrained(tmp_path / "resized")
    tokenizer.save_pretrained(tmp_path / "resized")
    settings = FAST | {"learning_rate": 1e-2, "processing_class": tokenizer}
    trainer = make_trainer(model, rows, tmp_path / "out", **settings)
    assert f"other weights than {tiny_gpt2}" in caplog.text
    assert "its embeddings were resized" in caplog.text
    trainer.train()
    trainer.save_model()
    own = trainer.score(rows)["reward"][:]
    with pytest.raises(ValueError, match=rf"has {model.vocab_size} embeddings, but {tiny_gpt2}.* has 384: they were"):
        Judge.from_pretrained(str(tmp_path / "out"))
    caplog.clear()
    judge = Judge.from_pretrained(str(tmp_path / "out"), str(tmp_path / "resized"))
    assert judge.score(rows)["reward"][:] == pytest.approx(own, abs=2e-5)
    make_trainer(AutoModelForCausalLM.from_pretrained(tmp_path / "resized"), rows, tmp_path / "other", **settings)
    assert "other weights" not in caplog.text


def test_an_adapter_whose_training_began_from_one_is_compared_with_that(tiny_gpt2, tmp_path):
    rows = make_rows(6)
    begun = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_gpt2), LORA)
    with torch.no_grad():
        for name, parameter in begun.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    begun.save_pretrained(tmp_path / "begun")
    trainer = make_trainer(
        begun, rows, tmp_path / "out", processing_class=AutoTokenizer.from_pretrained(tiny_gpt2), **FAST
    )
    trainer.train()
    trainer.save_model()
    here = trainer.score(rows)["reward"][:]
    there = scored_by_command(tmp_path, tmp_path / "out", rows, "--sort", "row")
    assert [row["reward"] for row in there] == pytest.approx(here, rel=2e-5, abs=2e-5)
    base = scored_by_command(tmp_path, tmp_path / "out", rows, "--sort", "row", "--ref_model", tiny_gpt2)
    assert np.abs(np.array([row["reward"] for row in base]) - here).max() > 1e-3

    # An evaluation has the same reference
    rows.to_json(tmp_path / "evaluated.jsonl")
    argv = ["evaluate", "--model", str(tmp_path / "out"), "--dataset", str(tmp_path / "evaluated.jsonl")]
    assert main([*argv, "--split", "train", "--output", str(tmp_path / "report")]) == 0
    figures = json.loads((tmp_path / "report" / "report.json").read_text())["models"][0]["implicit_reward"]
    brier = np.mean((1 / (1 + np.exp(-np.array(here))) - np.array(rows["label"])) ** 2)
    assert figures["brier"]["value"] == pytest.approx(brier, rel=2e-5, abs=2e-5)


def test_settings_are_saved_with_the_model_and_its_checkpoints(tiny_gpt2, tmp_path):
    rows = make_rows(4, label=[1.0, 2.0, 4.0, 5.0])
    settings = {"label_type": "continuous", "label_transform": "centre", "sft_threshold": 9.0, "beta": 0.25}
    trainer = make_trainer(
        tiny_gpt2, rows, tmp_path, max_steps=1, save_strategy="steps", save_steps=1, log_z=-1.5, **settings, **QUIET
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    for folder in (tmp_path / "saved", tmp_path / "checkpoint-1"):
        found = SavedSettings.read(folder / "pointwise.json")
        assert (found.beta, found.label_type, found.log_z, found.max_length) == (0.25, "continuous", -1.5, 1024)
        assert str(found.label_transform) == "center:3"
        assert found == trainer.saved_settings()


def test_settings_that_are_none_are_refused(tmp_path):
    file = tmp_path / "pointwise.json"
    for text in (
        "[]",
        "{",
        '{"label_type": "binary"}',
        '{"beta": 1, "bet": 2}',
        '{"beta": 1, "label_transform": [{}]}',
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"pointwise.json does not contain the settings of a pointwise model"):
            SavedSettings.read(file)
    file.write_text('{"beta": 0.5}')
    assert SavedSettings.read(file) == SavedSettings(beta=0.5)


def test_a_log_z_without_its_state_is_refused():
    with pytest.raises(ValueError, match=r"trained with log_z='learned', but the file log_z.safetensors with its"):
        saved_log_partition(SavedSettings(beta=0.1, log_z="learned"), None, "cpu")


# The command


def test_any_format_is_written_and_labels_are_optional(tiny_gpt2, tmp_path, taught):
    folder = taught[0].args.output_dir
    rows = make_rows(5).remove_columns("label")
    rows.to_parquet(tmp_path / "rows.parquet")
    for suffix in ("csv", "parquet", "jsonl"):
        output = tmp_path / "deep" / f"scored.{suffix}"
        argv = ["--model", folder, "--ref_model", tiny_gpt2, "--dataset", str(tmp_path / "rows.parquet")]
        assert main(["score", *argv, "--output", str(output), "--sort", "reward"]) == 0
        found = load_rows(output)["train"]
        reward, probability = (np.array(found[name][:], float) for name in ("reward", "probability"))  # text in CSV
        assert len(reward) == 5
        assert (np.diff(reward) <= 0).all()
        assert logit(probability) == pytest.approx(reward, rel=1e-4, abs=1e-6)
        assert not {"label", "surprise"}.intersection(found.column_names)


def test_rows_without_a_label_come_last_and_are_counted(tiny_gpt2, tmp_path, taught, capsys):
    folder = taught[0].args.output_dir
    (tmp_path / "rows.csv").write_text("prompt,completion,label\nWhy?, No.,1\nHow?, Go away.,\nWhat?, Paris.,0\n")
    argv = ["--model", folder, "--ref_model", tiny_gpt2, "--dataset", str(tmp_path / "rows.csv")]
    assert main(["score", *argv, "--output", str(tmp_path / "scored.jsonl")]) == 0
    found = [json.loads(line) for line in (tmp_path / "scored.jsonl").read_text().splitlines()]
    assert sorted(row["row"] for row in found[:2]) == [0, 2]
    assert (found[2]["row"], found[2]["label"], "surprise" in found[2]) == (1, None, False)
    out = capsys.readouterr().out
    assert "holds 3 scored rows, the most surprising first; 0 of 3 were left out. 1 row has no label." in out
    assert "row 1:" not in out
    (tmp_path / "rows.csv").write_text("prompt,completion,label\nWhy?, No.,\n")
    assert main(["score", *argv, "--output", str(tmp_path / "scored.jsonl")]) == 0
    assert "holds 1 scored row; 0 of 1 were left out.\n" in capsys.readouterr().out
    # A text among the numbers is invalid, and a row without a label is not
    (tmp_path / "rows.csv").write_text("prompt,completion,label\nWhy?, No.,odd\nHow?, Go away.,\nWhat?, Paris.,1\n")
    assert main(["score", *argv, "--output", str(tmp_path / "scored.jsonl")]) == 1
    assert "rows.csv, line 2: label is the text 'odd'" in (said := capsys.readouterr().err)
    assert "line 3" not in said
    assert main(["score", *argv, "--output", str(tmp_path / "scored.jsonl"), "--invalid_rows", "drop"]) == 0
    found = [json.loads(line) for line in (tmp_path / "scored.jsonl").read_text().splitlines()]
    assert [(row["label"], "surprise" in row) for row in found] == [(1, True), (None, False)]


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (["N/A", "", "1"], "1 label is a word for a missing value: 'N/A'."),
        (["n/a", "#N/A", "1"], "2 labels are words for a missing value: 'n/a', '#N/A'."),
        (["-", "null", "."], "3 labels are words for a missing value: '-', 'null', '.'."),
        (["", "", "1"], None),
    ],
)
def test_words_for_a_missing_label_are_no_label_and_told(tiny_gpt2, tmp_path, taught, capsys, caplog, labels, told):
    logging.getLogger("transformers").propagate = True
    lines = [f"Why {i}?, No.,{label}" for i, label in enumerate(labels)]
    (tmp_path / "rows.csv").write_text("\n".join(["prompt,completion,label", *lines, ""]))
    argv = ["--model", taught[0].args.output_dir, "--ref_model", tiny_gpt2, "--dataset", str(tmp_path / "rows.csv")]
    assert main(["score", *argv, "--output", str(tmp_path / "scored.jsonl")]) == 0
    scored = (tmp_path / "scored.jsonl").read_text()
    found = [json.loads(line) for line in scored.splitlines()]
    assert {row["row"]: "surprise" in row for row in found} == {i: each == "1" for i, each in enumerate(labels)}
    assert [message for message in caplog.messages if "for a missing value" in message] == ([told] if told else [])
    assert f"holds 3 scored rows{', the most surprising first' * ('1' in labels)}; 0 of 3" in capsys.readouterr().out
    # The same if other labels are words
    (tmp_path / "rows.csv").write_text((tmp_path / "rows.csv").read_text().replace(",1\n", ",up\n"))
    caplog.clear()
    assert main(["score", *argv, "--label_map", "up=1,down=0", "--output", str(tmp_path / "scored.jsonl")]) == 0
    assert [message for message in caplog.messages if "for a missing value" in message] == ([told] if told else [])
    assert (tmp_path / "scored.jsonl").read_text().replace('"up"', "1") == scored


def test_wrong_options_are_one_line(capsys, tmp_path):
    given = ["--model", "m", "--dataset", "d", "--output", "o.jsonl"]

    def error(*argv):
        capsys.readouterr()
        assert main(["score", *argv]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert error(*given[2:]) == "trl-ulma score: error: the following arguments are required: --model"
    assert "--output o.txt must end in .jsonl, .csv, .parquet" in error(*given[:5], "o.txt")
    assert "--batch_size must be 1 or above; got 0" in error(*given, "--batch_size", "0")
    assert "invalid choice: 'best'" in error(*given, "--sort", "best")
    assert "--mod is not an option. Did you mean --model?" in error(*given, "--mod", "m")
    assert "--ref_model" in make_parser().format_help()


def test_what_is_wrong_with_model_or_data_is_said(capsys, tmp_path, tiny_gpt2):
    make_rows(3).remove_columns("label").to_json(tmp_path / "rows.jsonl")
    output = tmp_path / "scored.jsonl"

    def error(*argv, dataset="rows.jsonl"):
        capsys.readouterr()
        assert main(["score", "--dataset", str(tmp_path / dataset), "--output", str(output), *argv]) == 1
        assert not output.exists()
        return capsys.readouterr().err.splitlines()[-1]

    full = ("--model", tiny_gpt2)
    assert "has no pointwise.json, which PointwiseDPOTrainer.save_model writes" in error(
        *full, "--ref_model", tiny_gpt2
    )
    assert "There is no file or folder" in error(*full, dataset="rosw.jsonl")
    assert "has no split 'test', but train. Set --split" in error(*full, "--split", "test")
    assert "--sort surprise needs labels" in error(*full, "--sort", "surprise")


def test_a_judge_needs_no_trainer(taught, tiny_gpt2, tmp_path):
    trainer = taught[0]
    judge = Judge.from_pretrained(trainer.args.output_dir, tiny_gpt2, dtype="float64")
    assert judge.settings.log_z == "learned_constant"
    rows = make_rows(5)
    assert judge.score(rows)["reward"] == pytest.approx(trainer.score(rows)["reward"], abs=1e-4)


def test_special_tokens_that_are_split_are_split_by_the_saved_tokenizer(tiny_llama, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.split_special_tokens = True
    answers = [f" It ends with {tokenizer.eos_token} here.", " No."] * 2
    rows = make_rows(4, completion=answers)
    trainer = make_trainer(tiny_llama, rows, tmp_path, processing_class=tokenizer, max_steps=4, learning_rate=1e-2)
    trainer.train()
    trainer.save_model()
    found = Judge.from_pretrained(str(tmp_path)).score(rows)["reward"][:]
    assert found == pytest.approx(trainer.score(rows)["reward"][:], abs=1e-5)
    assert np.ptp(found) > 1e-3
