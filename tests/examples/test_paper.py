"""The paper's experiments: every cell's settings, two steps of some, and tables that follow from stored records."""

import doctest
import importlib.metadata
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from sklearn.metrics import roc_auc_score
from transformers import AutoModelForSequenceClassification
from world import trains_with_trl

PAPER = Path(__file__).resolve().parents[2] / "examples" / "paper"
sys.path.append(str(PAPER))

import grid  # noqa: E402
import judge  # noqa: E402
import preparing  # noqa: E402
import reproduce  # noqa: E402
import stages  # noqa: E402
import tables  # noqa: E402
import trial  # noqa: E402
from stored import differing  # noqa: E402

LOSSES = {
    "sft": ("sft", "none"),
    "unlearning": ("none", "unlearning"),
    "unlikelihood": ("sft", "unlearning"),
    "positive-dpo": ("pointwise_dpo", "none"),
    "negative-dpo": ("none", "pointwise_dpo"),
    "pointwise-dpo": ("pointwise_dpo", "pointwise_dpo"),
    "ulma": ("sft", "pointwise_dpo"),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(trial.make_model(tmp_path_factory.mktemp("paper") / "model"))


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return trial.write_rows(tmp_path_factory.mktemp("raw"))


def run(*options):
    return reproduce.main([*options])


def record(folder, name):
    return json.loads((folder / "records" / f"{name}.json").read_text())


@pytest.mark.parametrize("module", ["comparing", "estimating_time", "grid", "records", "reproduce", "stored", "tables"])
def test_examples_in_docstrings(module):
    assert doctest.testmod(importlib.import_module(module), optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0


# The grid


def test_which_cells_there_are():
    for scale in grid.SCALES:
        red_team = grid.methods_of(scale, "red-team")
        assert not {"dpo", "rlhf", "unlearning", "unlikelihood", "authors-code"} & set(red_team)
        assert {"sft", "pointwise-rlhf", "ulma"} <= set(red_team)
        for data in ("hh", "golden-hh", "qa-feedback"):
            assert set(grid.METHODS) <= set(grid.methods_of(scale, data))
    assert "authors-code" in grid.methods_of("paper", "hh")
    assert "authors-code" not in grid.methods_of("small", "hh")
    found = grid.cells("small", ["hh"], ["ulma", "base"], 3)
    assert [(cell.method, cell.seed) for cell in found] == [("base", 0), ("ulma", 0), ("ulma", 1), ("ulma", 2)]


def test_each_fold_has_its_untrained_model():
    found = grid.cells("small", ["qa-feedback"], ["sft"], 2)
    assert [(cell.method, cell.seed) for cell in found] == [("base", 0), ("base", 1), ("sft", 0), ("sft", 1)]
    assert [grid.settings(cell)["rows"]["fold"] for cell in found] == [0, 1, 0, 1]


def test_a_sweep_over_beta_leaves_out_what_has_none():
    methods = ["sft", "unlikelihood", "negative-dpo", "dpo", "rlhf"]
    found = grid.cells("small", ["hh"], methods, 1, swept="beta", values=[0.05, 0.5])
    assert [cell.name for cell in found if cell.method != "base"] == [
        "small/hh/negative-dpo/beta-0.05_seed-0",
        "small/hh/negative-dpo/beta-0.5_seed-0",
        "small/hh/dpo/beta-0.05_seed-0",
        "small/hh/dpo/beta-0.5_seed-0",
        "small/hh/rlhf/beta-0.05_seed-0",
        "small/hh/rlhf/beta-0.5_seed-0",
    ]
    betas = [[stage["options"].get("beta") for stage in grid.settings(cell)["stages"]] for cell in found]
    assert betas == [[], [0.05], [0.5], [0.05], [0.5], [None, 0.05], [None, 0.5]]


def test_a_sweep_over_learning_rates_or_sizes_changes_that_alone():
    plain = grid.settings(grid.Cell("small", "hh", "rlhf"))
    swept = grid.cells("small", ["hh"], ["rlhf"], 1, swept="learning_rate", values=[1e-3])[1]
    assert swept.name == "small/hh/rlhf/learning_rate-0.001_seed-0"
    found = grid.settings(swept, changed={"learning_rate": 5.0})
    assert [stage["options"]["learning_rate"] for stage in found["stages"]] == [1e-3, 1e-3]
    for stage, other in zip(found["stages"], plain["stages"], strict=True):
        assert {**stage["options"], "learning_rate": 0} == {**other["options"], "learning_rate": 0}
    assert found["rows"] == plain["rows"]
    swept = grid.cells("small", ["hh"], ["rlhf"], 1, swept="train_rows", values=[64])[1]
    assert swept.name == "small/hh/rlhf/train_rows-64_seed-0"
    found = grid.settings(swept, rows={"train_rows": 480})
    assert found["rows"] == plain["rows"] | {"train_rows": 64}
    assert found["stages"] == plain["stages"]


def test_what_is_not_set_is_as_what_was_not_there_yet():
    stored = {"cell": {"seed": 0}, "rows": {"folds": None}, "quality": 0.5}
    assert differing(stored, {"cell": {"seed": 0, "train_rows": None}, "rows": {"folds": 4}}) == ["rows", "quality"]
    # As YAML 1.1 reads 3e-4
    stages = [{"options": {"learning_rate": "3e-4"}}]
    assert differing({"stages": stages}, {"stages": [{"options": {"learning_rate": 3e-4}}]}) == []


def test_commands_are_kept_without_folders_and_can_be_pasted(tmp_path):
    words = ["--input", "hh=/data/hh.gz", "--judge", "reward:/my/judge", "--set", "lora_target_modules=[a, b]"]
    reproduce.remember(tmp_path, "reproduce.py", [*words, "--judge_url", "http://host/v1", "--output", "/my/runs"])
    command = json.loads((tmp_path / "commands.json").read_text())[0]
    assert command == (
        "python examples/paper/reproduce.py --input hh=hh.gz --judge reward:judge --set 'lora_target_modules=[a, b]' "
        "--judge_url http://host/v1 --output runs"
    )


@pytest.mark.parametrize("scale", grid.SCALES)
def test_every_cell_is_parsed(scale, tmp_path):
    for cell in grid.cells(scale, grid.DATA, None, 1):
        settings = grid.settings(cell)
        for stage in settings["stages"]:
            file = tmp_path / f"{cell.data}-{cell.method}.yaml"
            stages.write_options(stage, file, tmp_path / "rows", tmp_path / "out")
            _, training, model, _ = stages.parse(stage["trainer"], file)
            if stage["trainer"] == "ulma":
                losses = LOSSES[cell.method.replace("authors-code", "ulma")]
                assert (training.positive_loss, training.negative_loss) == losses
                assert training.label_type == ("continuous" if cell.data == "red-team" else "binary")
            if stage["trainer"] in ("ulma", "dpo", "rloo"):
                assert training.beta == 0.1
            answers = training.per_device_train_batch_size * (1 + (stage["trainer"] in ("dpo", "reward")))
            batch = settings["processes"] * training.per_device_train_batch_size * training.gradient_accumulation_steps
            if scale == "paper":
                assert (batch, training.learning_rate, training.lr_scheduler_type) == (64, 1e-5, "cosine")
                assert (model.lora_r, model.lora_alpha, model.lora_dropout) == (8, 32, 0.1)
                assert training.num_train_epochs == (3 if cell.method == "authors-code" else 1)
            else:
                assert answers == 8
            assert model.lora_task_type == ("SEQ_CLS" if "reward" in stage["trainer"] else "CAUSAL_LM")


def test_the_authors_settings_are_those_of_their_code():
    from trl_ulma.scripts.ulma import make_parser

    file = str(grid.CONFIGS / "authors-code.yaml")
    command = ["--config", file, "--dataset_name", "rows", "--output_dir", "out"]
    options = command if torch.cuda.is_available() else [*command, "--use_cpu", "true", "--fp16", "false"]
    _, training, model, _ = make_parser().parse_settings(options)
    assert (training.length_normalize, training.beta, training.log_z) == (True, 0.1, 0.0)
    assert (training.desirable_weight, training.undesirable_weight, training.num_train_epochs) == (2.0, 2.0, 3)
    assert (model.lora_target_modules, training.disable_dropout) == (["q_proj", "v_proj"], True)
    assert "What remains different" in Path(file).read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "hhh"], "There is no data 'hhh'. Did you mean hh?"),
        (["--methods", "umla"], "There is no method 'umla'. Did you mean ulma?"),
        (["--data", "red-team", "--methods", "dpo"], "dpo is not for red-team at the small scale."),
        (["--seeds", "0"], "seeds must be 1 or above; got 0."),
        (["--betas", "0.1,0.1"], "A sweep has each value once; got 0.1, 0.1."),
        (["--learning_rates", "0"], "A learning rate is above 0; got 0."),
        (["--dry_run", "--sizes", "38"], "hh has 38 rows to train on, too few for a size of 38 with some left."),
        (["--qualities", "1.5"], "A share of demonstrations is between 0 and 1; got 1.5."),
        (["--qualities", "0.5"], "hh has no ordinary demonstrations"),
        (
            ["--data", "qa-feedback", "--held_out_prompts", "9"],
            "--held_out_prompts is not for qa-feedback at the small",
        ),
        (["--set", "beta=0.3"], "--set beta is not possible"),
        (["--input", "hhh=x"], "--input hhh is no family"),
        (["--dry_run", "--judge", "gpt"], "'gpt' is no judge; it must be llm:MODEL"),
        (["--dry_run", "--data", "qa-feedback", "--judge", "profanity"], "judges harmless, which no data ask for"),
        (["--dry_run", "--data", "hh,qa-feedback", "--judge", "reward:x"], "A reward model judges by one thing"),
        (["--dry_run", "--held_out_prompts", "24"], "too few to hold 24 of them out"),
        (["--dry_run", "--max_length", "3"], "No row is left of 48, each because a row of its prompt is longer"),
        (["--data", "red-team", "--model", "x"], "give --input red-team=FILE"),
    ],
)
def test_what_is_wrong_is_said_before_work_starts(options, message, tmp_path, capsys):
    assert run(*options, "--output", str(tmp_path / "out")) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "records").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--betas", "0.1", "--qualities", "1"], "argument --qualities: not allowed with argument --betas"),
        (["--sizes", "1e3"], "argument --sizes: '1e3' is no list of numbers, as 1,2,3"),
    ],
)
def test_a_sweep_is_one_list_of_numbers(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*options, "--output", str(tmp_path))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_misspelt_option_ends_in_its_name(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run("--dry_run", "--methods", "ulma", "--set", "sft_wieght=1", "--output", str(tmp_path))
    assert stop.value.code == 2
    assert "sft_wieght is not an option. Did you mean sft_weight?" in capsys.readouterr().err


def test_settings_are_printed_and_nothing_is_run(tmp_path, capsys):
    assert run("--print", "--methods", "ulma", "--seeds", "1", "--output", str(tmp_path / "out")) == 0
    assert "positive_loss: sft" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


# Rows


def prepared(folder, tiny, raw, scale, data, *, cell=None, **rows):
    chosen = grid.settings(cell or grid.Cell(scale, data, "ulma"), rows={**trial.ROWS_TAKEN, **rows})["rows"]
    facts = preparing.prepare(folder, chosen, tiny, raw)
    files = {name: folder / f"{name}.parquet" for name in preparing.FILES}
    found = {n: load_dataset("parquet", data_files=str(f))["train"] for n, f in files.items() if f.exists()}
    return facts, found


def keys(rows):
    return [json.dumps(prompt, sort_keys=True) for prompt in rows["prompt"]]


@pytest.mark.parametrize("scale", grid.SCALES)
def test_rows_of_all_trainers_have_the_same_prompts_and_none_is_held_out(scale, tiny, raw, tmp_path):
    facts, rows = prepared(tmp_path / "rows", tiny, raw, scale, "hh")
    assert set(keys(rows["train"])) == set(keys(rows["pairs"])) == set(keys(rows["prompts"]))
    assert not set(keys(rows["train"])) & set(keys(rows["test"]))
    assert (facts["train_rows"], facts["test_rows"], facts["train_prompts"]) == (16, 10, 8)
    assert facts["answers"] == 48 == 16 + 10 + sum(facts["left_out"].values())
    answers = {
        (key, row["label"]): row["completion"] for key, row in zip(keys(rows["train"]), rows["train"], strict=True)
    }
    for key, pair in zip(keys(rows["pairs"]), rows["pairs"], strict=True):
        assert (pair["chosen"], pair["rejected"]) == (answers[key, 1.0], answers[key, 0.0])
    assert isinstance(rows["train"][0]["prompt"], str) == (scale == "paper")
    if scale == "paper":
        row = next(row for row in rows["train"] if row["label"] == 0)
        assert row["prompt"].startswith("A chat between a curious user")
        assert row["prompt"].endswith("words. ASSISTANT:")
        assert row["completion"] == " Go away."


def test_folds_hold_every_prompt_out_once(tiny, raw, tmp_path):
    held_out = []
    for fold in range(3):
        cell = grid.Cell("small", "qa-feedback", "ulma", seed=fold)
        _, rows = prepared(tmp_path / str(fold), tiny, raw, "small", "qa-feedback", cell=cell, folds=3, train_rows=None)
        assert not set(keys(rows["train"])) & set(keys(rows["test"]))
        held_out += sorted(set(keys(rows["test"])))
    assert len(held_out) == len(set(held_out)) == trial.ROWS


@pytest.mark.parametrize(
    ("data", "ordinary", "bad"),
    [("golden-hh", "Gladly", "Go away."), ("qa-feedback", "It is thing 2.", "It is thing 1.")],
)
def test_a_share_of_the_demonstrations_is_good(data, ordinary, bad, tiny, raw, tmp_path):
    kept, tests = [], []
    for share in (0.0, 0.25, 1.0):
        cell = grid.Cell("small", data, "ulma", quality=share)
        _, rows = prepared(tmp_path / str(share), tiny, raw, "small", data, cell=cell, train_rows=None, folds=None)
        train = rows["train"]
        texts = [
            (key, row["sft_mask"], row["completion"][0]["content"]) for key, row in zip(keys(train), train, strict=True)
        ]
        demonstrations = {key: text for key, is_demonstration, text in texts if is_demonstration}
        kept.append({key for key, text in demonstrations.items() if ordinary not in text})
        assert len(kept[-1]) == round(share * len(demonstrations))
        assert {text for _, is_demonstration, text in texts if not is_demonstration} == {bad}
        tests.append(rows["test"][:])
    assert kept[0] < kept[1] < kept[2]
    assert tests[0] == tests[1] == tests[2]


def test_an_ordinary_demonstration_is_the_best_that_is_short_enough(tiny, tmp_path):
    raw = trial.raw_rows("qa-feedback")
    for row in raw[1:]:
        row["prediction 2"] += " long" * 200  # the one that wins most comparisons
    for number in (2, 3, 4):
        raw[0][f"prediction {number}"] += " long" * 200
    (tmp_path / "qa.json").write_text(json.dumps(raw))
    cell = grid.Cell("small", "qa-feedback", "ulma", quality=0.0)
    inputs = {"qa-feedback": str(tmp_path / "qa.json")}
    options = {"cell": cell, "train_rows": None, "folds": None, "held_out_prompts": 1}
    facts, rows = prepared(tmp_path / "rows", tiny, inputs, "small", "qa-feedback", **options)
    found = {row["completion"][0]["content"] for row in rows["train"] if row["sft_mask"]}
    assert found == {"It is thing 3."}
    assert facts["left_out"] == {preparing.NO_ORDINARY: 2}


def test_rows_of_other_settings_are_not_taken_for_these(tiny, raw, tmp_path):
    prepared(tmp_path / "rows", tiny, raw, "small", "hh")
    with pytest.raises(ValueError, match="were prepared with another max_length"):
        prepared(tmp_path / "rows", tiny, raw, "small", "hh", max_length=100)


def test_the_real_samples_give_enough_rows(shared_data, tiny, tmp_path):
    chosen = grid.settings(grid.Cell("small", "hh", "ulma"))["rows"] | {"max_length": 1500}
    facts = preparing.prepare(tmp_path / "hh", chosen, tiny, {"hh": str(shared_data / "hh_harmless.jsonl.gz")})
    assert (facts["train_rows"], facts["test_prompts"]) == (1200, 200)
    assert facts["answers"] == 3600 == facts["train_rows"] + facts["test_rows"] + sum(facts["left_out"].values())


# Trainings


@pytest.mark.parametrize("kind", ["binary", "continuous"])
def test_the_pointwise_reward_model_has_equations_7_and_9(kind, tiny, raw, tmp_path):
    data = "hh" if kind == "binary" else "red-team"
    _, rows = prepared(tmp_path / "rows", tiny, raw, "small", data)
    args = stages.RewardConfig(str(tmp_path / "out"), use_cpu=True, bf16=False, report_to="none", max_length=200)
    args.model_init_kwargs = {}
    trainer = stages.PointwiseRewardTrainer(tiny, args, rows["train"].select(range(5)))
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, dict(batch)).item()
        r = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0].numpy()
    z = batch["labels"][:, 0].numpy()
    assert len(set(z)) > 1
    if kind == "binary":
        probability = 1 / (1 + np.exp(-r.astype(float)))
        wanted = -np.mean(z * np.log(probability) + (1 - z) * np.log(1 - probability))
    else:
        wanted = np.mean((z - r) ** 2)
    assert loss == pytest.approx(wanted, rel=1e-5)
    tokens = trainer.processing_class
    assert tokens.decode(batch["input_ids"][0][batch["attention_mask"][0].bool()]).endswith("</s>")


def test_the_pointwise_reward_model_refuses_labels_of_two_types(tiny, raw, tmp_path):
    _, rows = prepared(tmp_path / "rows", tiny, raw, "small", "hh")
    mixed = rows["train"].map(lambda row, i: {"label_type": ["binary", "continuous"][i % 2]}, with_indices=True)
    args = stages.RewardConfig(str(tmp_path / "out"), use_cpu=True, bf16=False, report_to="none")
    with pytest.raises(ValueError, match="needs labels of one type; the rows have binary and continuous"):
        stages.PointwiseRewardTrainer(tiny, args, mixed)


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """A dry run of a few cells."""
    folder = tmp_path_factory.mktemp("dry")
    options = ["--dry_run", "--seeds", "1", "--output", str(folder)]
    assert run(*options, "--methods", "ulma,dpo,rlhf") == 0
    assert run(*options, "--scale", "paper", "--data", "red-team", "--methods", "pointwise-rlhf") == 0
    return folder


@trains_with_trl
def test_two_steps_of_a_cell_are_stored_with_all_that_the_tables_need(dry):
    found = record(dry, "small/hh/ulma/seed-0")
    measured = found["measured"]
    logps, tokens = np.array(measured["logps"]), np.array(measured["tokens"])
    mask = np.array(measured["demonstration"])
    assert measured["perplexity"]["value"] == pytest.approx(math.exp(-logps[mask].sum() / tokens[mask].sum()))
    assert measured["perplexity"]["low"] < measured["perplexity"]["value"] < measured["perplexity"]["high"]
    gained = logps - np.array(record(dry, "small/hh/base/seed-0")["measured"]["logps"])
    assert abs(gained).max() > 0
    assert measured["implicit_reward"]["auc"]["value"] == pytest.approx(roc_auc_score(mask, gained))
    brier = np.mean((1 / (1 + np.exp(-0.1 * gained)) - mask) ** 2)  # β = 0.1
    assert measured["implicit_reward"]["brier"]["value"] == pytest.approx(brier)
    assert [stage["trainer"] for stage in found["trained"]] == ["ulma"]
    assert found["trained"][0]["steps"] == 2
    assert [entry["step"] for entry in found["trained"][0]["log"] if "loss" in entry] == [1, 2]
    assert len(measured["answers"]) == found["rows"]["test_prompts"] == 5
    assert found["versions"]["torch"] == importlib.metadata.version("torch")
    assert {"machine", "cores", "threads", "gpus"} == set(found["hardware"])
    # Files by their names: records are made to be handed on
    assert str(dry) not in json.dumps(found)
    pairwise, pointwise = (record(dry, f"{name}/seed-0") for name in ("small/hh/rlhf", "paper/red-team/pointwise-rlhf"))
    assert [stage["trainer"] for stage in pairwise["trained"]] == ["reward", "rloo"]
    assert [stage["trainer"] for stage in pointwise["trained"]] == ["pointwise-reward", "rloo"]
    assert {"spearman", "mse"} <= set(pointwise["measured"]["implicit_reward"])


@trains_with_trl
def test_what_is_finished_is_not_run_again_but_a_judge_can_come_later(dry, tmp_path, capsys):
    folder = shutil.copytree(dry, tmp_path / "run")
    shutil.rmtree(folder / "work" / "cells")
    before = record(folder, "small/hh/ulma/seed-0")
    shutil.rmtree(folder / "work" / "rows")
    options = ["--dry_run", "--seeds", "1", "--methods", "ulma,dpo", "--output", str(folder), "--judge", "profanity"]
    assert run(*options) == 0
    assert "3 cells, 3 of them finished." in capsys.readouterr().out
    after = record(folder, "small/hh/ulma/seed-0")
    assert before.pop("judged") == {}
    assert after.pop("judged")["alt-profanity-check"]["verdicts"] == ["tie"] * 5
    assert after == before
    assert not (folder / "work" / "cells" / "small" / "hh" / "ulma" / "seed-0" / "1-ulma").exists()
    stored = json.loads((folder / "agreement/small/hh/alt-profanity-check.json").read_text())
    assert stored["agreement"]["n"] == 5
    text = (folder / "RESULTS.md").read_text()
    assert "near chance, so no ranking by it is claimed" in text
    assert "**Inconclusive**: 16 training rows, where 400 are needed. No ranking is claimed." in text
    assert run(*options, "--set", "learning_rate=0.5") == 2
    assert "was made with another stages. Choose another --output." in capsys.readouterr().err


@trains_with_trl
def test_a_judge_learns_from_pairs_that_the_run_has_not_seen(dry, tiny, raw, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(dry, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    options = [str(folder), "--model", tiny, "--input", f"hh={raw['hh']}", "--output", "judge", "--set", "max_steps=2"]
    options += ["--set", "save_steps=1"]
    assert judge.main(options) == 2  # rows at the paper's scale are text
    assert "are written otherwise than the judge's (hh at the small scale)" in capsys.readouterr().err
    shutil.rmtree(folder / "work" / "rows" / "paper")
    assert judge.main(options) == 0
    prompts = [keys(Dataset.from_parquet(str(file))) for file in folder.rglob("t*.parquet")]
    own = keys(Dataset.from_parquet("judge/work/pairs.parquet"))
    assert len(prompts) == 2
    assert own
    assert not set(own) & {prompt for each in prompts for prompt in each}
    assert "the run has 13 prompts" in capsys.readouterr().out
    ran = json.loads((folder / "commands.json").read_text())[-1]
    assert ran.startswith("python examples/paper/judge.py run --model model --input hh=hh.json --output judge ")
    judged = ["--dry_run", "--seeds", "1", "--methods", "ulma", "--output", str(folder), "--judge", "reward:judge"]
    assert run(*judged) == 0
    first = record(folder, "small/hh/ulma/seed-0")["judged"]["judge"]
    assert len(first["verdicts"]) == 5
    assert judge.main([*options, "--set", "learning_rate=0.5"]) == 2
    assert "The judge in judge was begun with other settings." in capsys.readouterr().err

    # Another one in its place judges anew
    scorer = AutoModelForSequenceClassification.from_pretrained("judge")
    scorer.score.weight.data.neg_()
    scorer.save_pretrained("judge")
    file = folder / "agreement/small/hh/judge.json"
    verdicts = json.loads(file.read_text())["verdicts"]
    assert run(*judged) == 0
    opposite = {"win": "lose", "lose": "win", "tie": "tie"}
    second = record(folder, "small/hh/ulma/seed-0")["judged"]["judge"]
    assert second["verdicts"] == [opposite[verdict] for verdict in first["verdicts"]]
    assert json.loads(file.read_text())["verdicts"] == [opposite[verdict] for verdict in verdicts]
    assert set(first["verdicts"]) != {"tie"}
    written = file.stat().st_mtime_ns
    assert run(*judged) == 0
    assert file.stat().st_mtime_ns == written

    # What the run has seen is not for the judge
    part = shutil.copytree(folder / "work" / "rows" / "small" / "hh", folder / "work" / "rows" / "small" / "hh-more")
    pairs = Dataset.from_parquet("judge/work/pairs.parquet")
    pairs.select(range(2)).to_parquet(part / "train.parquet")
    assert judge.main(options) == 2
    assert "The judge in judge learned from other pairs. Choose another --output." in capsys.readouterr().err
    pairs.to_parquet(part / "train.parquet")
    assert judge.main(options) == 2
    assert "The run has seen all pairs of" in capsys.readouterr().err
    assert judge.main([*options, "--set", "seed=3"]) == 2
    assert "--set seed is not possible" in capsys.readouterr().err
    assert judge.main([*options, "--data", "nope"]) == 2
    assert judge.main(["nowhere", *options[1:]]) == 2
    assert "so what the judge may not see is not known" in capsys.readouterr().err


@trains_with_trl
@pytest.mark.parametrize(("method", "stage"), [("ulma", "1-ulma"), ("dpo", "1-dpo")])
def test_training_goes_on_from_the_last_whole_checkpoint(method, stage, dry, tmp_path):
    folder = shutil.copytree(dry, tmp_path / "run")
    work = folder / "work" / "cells" / "small" / "hh" / method / "seed-0"
    wanted = record(folder, f"small/hh/{method}/seed-0")
    for file in (folder / "records" / "small" / "hh" / method / "seed-0.json", work / f"{stage}.json"):
        file.unlink()
    # As if it had been killed while the second checkpoint was written
    (work / stage / "checkpoint-2" / "whole").unlink()
    (work / stage / "checkpoint-2" / "trainer_state.json").unlink()
    (work / stage / "adapter_model.safetensors").unlink()
    first = (work / stage / "checkpoint-1" / "adapter_model.safetensors").stat().st_mtime_ns
    assert run("--dry_run", "--seeds", "1", "--methods", method, "--output", str(folder)) == 0
    assert (work / stage / "checkpoint-1" / "adapter_model.safetensors").stat().st_mtime_ns == first
    found = record(folder, f"small/hh/{method}/seed-0")
    np.testing.assert_allclose(found["measured"]["logps"], wanted["measured"]["logps"], rtol=1e-5)
    assert found["trained"][0]["steps"] == 2


@trains_with_trl
def test_a_cell_that_fails_leaves_the_others_their_turn(dry, tmp_path, capsys):
    folder = shutil.copytree(dry, tmp_path / "run")
    shutil.rmtree(folder / "work" / "cells")
    for method in ("ulma", "dpo"):
        (folder / "records" / "small" / "hh" / method / "seed-0.json").unlink()
    broken = folder / "work" / "cells" / "small" / "hh" / "dpo" / "seed-0" / "1-dpo"
    broken.parent.mkdir(parents=True)
    broken.write_text("a file where a folder is to be")
    assert run("--dry_run", "--seeds", "1", "--methods", "dpo,ulma", "--output", str(folder)) == 1
    assert "small/hh/dpo/seed-0 failed; see" in capsys.readouterr().err
    assert (folder / "records" / "small" / "hh" / "ulma" / "seed-0.json").exists()
    assert not (folder / "records" / "small" / "hh" / "dpo" / "seed-0.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("scale", grid.SCALES)
def test_two_steps_of_every_cell(scale, tmp_path):
    options = ["--dry_run", "--scale", scale, "--data", ",".join(grid.DATA), "--seeds", "1", "--output", str(tmp_path)]
    assert run(*options) == 0
    assert len(list((tmp_path / "records").rglob("*.json"))) == len(grid.cells(scale, grid.DATA, None, 1))
    sweep = ["--dry_run", "--scale", scale, "--data", "golden-hh,qa-feedback", "--seeds", "1", "--methods", "ulma"]
    assert run(*sweep, "--qualities", "0,1", "--output", str(tmp_path)) == 0
    assert run(*sweep, "--betas", "0.05,0.5", "--output", str(tmp_path)) == 0
    assert "Figure 3: against β, Golden HH" in (tmp_path / "RESULTS.md").read_text()


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_as_if_nothing_had_happened(tiny, raw, tmp_path):
    def command(folder):
        options = ["--model", tiny, "--input", f"hh={raw['hh']}", "--methods", "ulma", "--seeds", "1"]
        options += ["--train_rows", "32", "--held_out_prompts", "5", "--max_new_tokens", "4", "--max_length", "192"]
        for name in ("bf16=false", "save_steps=1", "logging_steps=1", "per_device_train_batch_size=2"):
            options += ["--set", name]
        return [sys.executable, str(PAPER / "reproduce.py"), *options, "--output", str(folder)]

    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(command(tmp_path / "whole"), check=True, timeout=300, **quiet)
    process = subprocess.Popen(command(tmp_path / "killed"), start_new_session=True, **quiet)
    output = tmp_path / "killed" / "work" / "cells" / "small" / "hh" / "ulma" / "seed-0" / "1-ulma"
    deadline = time.monotonic() + 200
    while not list(output.glob("checkpoint-[3-9]/whole")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "records" / "small" / "hh" / "ulma").exists()
    subprocess.run(command(tmp_path / "killed"), check=True, timeout=300, **quiet)
    wanted, found = (record(tmp_path / name, "small/hh/ulma/seed-0")["measured"] for name in ("whole", "killed"))
    np.testing.assert_allclose(found["logps"], wanted["logps"], rtol=1e-5)
    assert found["answers"] == wanted["answers"]


# Tables


def stored(
    folder, method, seed, *, shift=0.0, verdicts=None, data="hh", prompts=250, rows=500, left_out=None, **varied
):
    """A record of `prompts` prompts with a demonstration of 10 tokens and another answer each; `shift` in nats."""
    from trl_ulma.evaluation.intervals import Estimate

    rng = np.random.default_rng(0)
    logps = -20 + rng.normal(0, 2, 2 * prompts) + shift
    # Too little to be seen, and enough for an interval
    logps += 1e-5 * np.random.default_rng([seed, *f"{method} {varied}".encode()]).normal(size=2 * prompts)
    value = math.exp(-logps[::2].sum() / (10 * prompts))
    settings = grid.settings(grid.Cell("small", data, method, seed, **varied))
    settings["rows"] |= {"folds": None, "fold": None}
    answers = [{"row": 2 * i, "answer": "x", "finished": True} for i in range(prompts)]
    found = {
        "cell": settings["cell"],
        "settings": settings,
        "rows": {
            "settings": settings["rows"],
            "answers": 2000,
            "left_out": left_out or {"a reason": 3},
            "train_rows": varied.get("train_rows", rows),
            "test_prompts": prompts,
        },
        "trained": []
        if method == "base"
        else [{"seconds": 1.0, "log": [{"loss": 2.0 - i, "step": i} for i in (1, 2)]}],
        "measured": {
            "logps": logps.tolist(),
            "tokens": [10] * (2 * prompts),
            "demonstration": [True, False] * prompts,
            "prompt": [i // 2 for i in range(2 * prompts)],
            "perplexity": vars(Estimate(value, value - 1, value + 1, prompts)),
            "answers": answers,
            "seconds": {"scoring": 1.0, "answering": 1.0},
        },
        "judged": {} if verdicts is None else {"a judge": {"criterion": "harmless", "verdicts": verdicts}},
        "versions": {"torch": "0"},
        "commit": "c",
        "hardware": {"machine": "m"},
    }
    cell = grid.Cell(**settings["cell"])
    file = folder / "records" / f"{cell.name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found))
    return value


def agreed(folder, wins, losses, data="hh"):
    file = folder / "agreement" / "small" / data / "a-judge.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    told = {"judge": "a judge", "criterion": "harmless", "verdicts": ["win"] * wins + ["lose"] * losses}
    file.write_text(json.dumps(told))


def line(text, start):
    return next(line for line in text.splitlines() if line.startswith(start))


@pytest.fixture
def results(tmp_path):
    """Two seeds: ULMA is better than SFT by perplexity, and worse by the judge."""
    wins = ["win"] * 150 + ["tie"] * 50 + ["lose"] * 49 + ["unparsable"]
    losses = ["lose"] * 200 + ["tie"] * 50
    perplexities = [stored(tmp_path, "ulma", seed, shift=seed + 1.0, verdicts=losses) for seed in range(2)]
    for seed in range(2):
        stored(tmp_path, "sft", seed, verdicts=wins)
    stored(tmp_path, "base", 0, shift=-5.0)
    agreed(tmp_path, 175, 75)
    return tmp_path, perplexities


def test_tables_have_means_over_seeds_and_say_whether_the_paper_is_met(results):
    folder, perplexities = results
    text = tables.write(folder).read_text()
    mean = np.mean(perplexities)
    half = 12.706204736 * np.std(perplexities, ddof=1) / math.sqrt(2)  # Student's t, one degree of freedom
    assert half > 1
    assert f"| ULMA | 2 | {mean:.2f} [{mean - half:.2f}, {mean + half:.2f}] |" in text
    # The same over seeds leaves the interval over prompts: as it is stored of perplexities, of shares Wilson's
    sft = line(text, "| SFT | 2").split("|")[3].strip()
    assert re.fullmatch(r"(\S+) \[(\S+), (\S+)\]", sft)
    value, low, high = map(float, re.findall(r"[\d.]+", sft))
    assert (round(value - low, 2), round(high - value, 2)) == (1.0, 1.0)
    assert "| 20.0% [15.5%, 25.4%] | 0.0% [0.0%, 1.5%] |" in line(text, "| ULMA | 2")
    assert f"{200 / 249:.1%}" in line(text, "| SFT | 2")
    claims = [each for each in text.splitlines() if each.startswith("| ULMA better than SFT")]
    # ULMA's log-probabilities are 1 and 2 nats above SFT's, of 10 tokens: 0.1 and 0.2, which two seeds leave undecided
    assert "| ln perplexity saved | +0.1500 [-0.4853, +0.7853] | undecided |" in claims[0]
    assert "| points, a judge |" in claims[1]
    assert claims[1].endswith("**against the paper** |")
    assert "a judge (harmless) agrees with the data's own labels on 70.0% [64.4%, 75.2%] of 250 pairs" in text
    assert "2 of its 1000 comparisons were not judged and are in no share." in text
    assert "Inconclusive" not in text


def test_what_holds_of_all_seeds_is_said_of_the_paper(tmp_path):
    for seed, shift in enumerate((0.9, 1.0, 1.1)):
        stored(tmp_path, "ulma", seed, shift=shift)
        stored(tmp_path, "sft", seed)
    half = 4.302652730 * 0.01 / math.sqrt(3)  # Student's t, two degrees of freedom
    expected = f"+0.1000 [{0.1 - half:+.4f}, {0.1 + half:+.4f}] | as in the paper |"
    assert expected in line(tables.write(tmp_path).read_text(), "| ULMA better than SFT")


def test_agreement_is_that_of_all_folds(tmp_path):
    for fold in range(4):
        agreed(tmp_path, 40, 28, data=f"qa-feedback-fold-{fold}")
    agreed(tmp_path, 0, 68, data="qa-feedback-2")
    for method in ("base", "ulma"):
        stored(tmp_path, method, 0, data="qa-feedback", verdicts=["win"] * 250)
    text = tables.write(tmp_path).read_text()
    assert "agrees with the data's own labels on 58.8% [52.9%, 64.3%] of 272 pairs" in text


def test_no_ranking_by_a_judge_near_chance(results):
    folder, _ = results
    agreed(folder, 137, 113)
    text = tables.write(folder).read_text()
    assert "near chance, so no ranking by it is claimed." in text
    assert "points, a judge" not in text
    assert "ln perplexity saved" in text
    shutil.rmtree(folder / "agreement")
    text = tables.write(folder).read_text()
    assert "its agreement with known labels is not known, so no ranking is claimed." in text
    assert "points, a judge" not in text


@pytest.mark.parametrize(
    ("few", "why"),
    [
        ({"prompts": 199}, "199 held-out prompts, where 200 are needed"),
        ({"rows": 399}, "399 training rows, where 400 are needed"),
    ],
)
def test_few_rows_are_inconclusive(few, why, tmp_path):
    for method in ("base", "sft", "ulma"):
        stored(tmp_path, method, 0, shift=3.0 if method == "ulma" else 0.0, **few)
    text = tables.write(tmp_path).read_text()
    assert f"**Inconclusive**: {why}. No ranking is claimed." in text
    assert "better than" not in text


def test_results_regenerate_digit_for_digit(results):
    folder, _ = results
    for beta in (0.05, 0.5):
        stored(folder, "ulma", 0, shift=beta, beta=beta)
    for quality in (0.0, 1.0):
        stored(folder, "ulma", 0, shift=quality, quality=quality, data="qa-feedback")
    stored(folder, "base", 0, data="qa-feedback")
    command = [sys.executable, str(PAPER / "tables.py"), str(folder), str(folder / "again" / "RESULTS.md")]
    (folder / "again").mkdir()
    text = tables.write(folder).read_text()
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (folder / "again" / "RESULTS.md").read_text() == text
    pictures = sorted((folder / "figures").iterdir())
    assert {"appendix-d-small-hh-1.svg", "figure-2-small-qa-feedback-0.png", "figure-3-small-hh-0.svg"} <= {
        each.name for each in pictures
    }
    for picture in pictures:
        assert picture.read_bytes() == (folder / "again" / "figures" / picture.name).read_bytes()
    assert line(text, "| perplexity, β =").startswith("| perplexity, β = | 0.05 | 0.1 | 0.5 |")


def test_what_is_in_no_sweep_is_a_point_of_each(tmp_path):
    stored(tmp_path, "base", 0)
    for method, shift in (("sft", 0.0), ("ulma", 1.0), ("dpo", -1.0)):
        stored(tmp_path, method, 0, shift=shift)
    for method, shift in (("sft", 2.0), ("ulma", 2.5)):
        stored(tmp_path, method, 0, shift=shift, learning_rate=1e-3)
        for seed in range(2):
            stored(tmp_path, method, seed, shift=2 * shift, train_rows=1000)
    text = tables.write(tmp_path).read_text()
    assert line(text, "| perplexity, learning rate =") == "| perplexity, learning rate = | 0.0001 | 0.001 |"
    assert "Seeds, column by column: SFT 1, 2; ULMA 1, 2." in text
    assert "500 to 1,000 training rows, 250 held-out prompts. Left out of 2,000 answers: 3 because a reason." in text
    rate, size = text.split("### Learning rate: HH")[1].split("### Size: against training rows, HH")
    # ULMA's shift over SFT's, of 10 tokens; DPO is in no sweep
    for section, value in ((rate, 0.05), (size, 0.1)):
        row = line(section, "| ULMA better than SFT (5.2 (ii)) |")
        assert row.split("|")[3].strip() == "+0.1000 [+0.1000, +0.1000]"
        assert row.split("|")[4].strip() == f"+{value:.4f} [+{value:.4f}, +{value:.4f}]"
        assert "DPO" not in section.split("### Training")[0]
    assert (tmp_path / "figures" / "learning-rate-small-hh-0.png").is_file()
    assert (tmp_path / "figures" / "size-small-hh-0.png").is_file()


def test_a_point_of_few_rows_is_in_no_comparison(tmp_path):
    stored(tmp_path, "base", 0)
    for method in ("sft", "ulma"):
        for value in (1e-4, 1e-3):
            few = method == "sft" and value == 1e-4
            stored(tmp_path, method, 0, shift=float(few), learning_rate=value, prompts=199 if few else 250)
    text = tables.write(tmp_path).read_text()
    few = "**Inconclusive**, and in no comparison: SFT at 0.0001: 199 held-out prompts, where 200 are needed."
    assert few in text
    compared = line(text.split("The same, point by point")[1], "| ULMA better than SFT")
    assert compared.split("|")[3].strip() == "–"
    assert compared.split("|")[4].strip().startswith("-0.0000 [") or compared.split("|")[4].strip().startswith(
        "+0.0000 ["
    )


@pytest.mark.parametrize("left_out", [{"a reason": 3}, {"a reason": 3, "its prompt has no ordinary demonstration": 1}])
def test_gains_from_better_demonstrations_are_compared(left_out, tmp_path):
    stored(tmp_path, "base", 0, data="qa-feedback")
    shifts = {("sft", 0.0): 1.0, ("sft", 1.0): 2.0, ("ulma", 0.0): 1.0, ("ulma", 1.0): 2.5}
    for (method, quality), shift in shifts.items():
        stored(tmp_path, method, 0, shift=shift, quality=quality, data="qa-feedback", left_out=left_out)
    for method in ("dpo", "ulma"):
        stored(tmp_path, method, 0, shift=9.0, data="qa-feedback")
    stored(tmp_path, "dpo", 0, shift=0.0, quality=0.0, data="qa-feedback", left_out=left_out)
    text = tables.write(tmp_path).read_text()
    section = text.split("### Figure 2")[1].split("###")[0]
    gain = "| ULMA gains more than SFT (5.2) | ln perplexity saved | +0.0500 [+0.0500, +0.0500] | as in the paper |"
    assert gain in section
    # From 1 to 2.5 nats of 10 tokens, and from 1 to 2
    assert "| ULMA | ln perplexity saved | +0.1500 [+0.1500, +0.1500] |" in section
    assert "| SFT | ln perplexity saved | +0.1000 [+0.1000, +0.1000] |" in section
    # Runs in no sweep have a share of 1, unless other prompts were left out of them
    same = len(left_out) == 1
    assert ("| ULMA gains more than DPO (pair-wise) (5.2) |" in section) is same


def test_published_results_are_those_of_their_records(tmp_path):
    made = tables.write(PAPER / "results", tmp_path / "RESULTS.md")
    assert made.read_text() == (PAPER / "RESULTS.md").read_text()
    for picture in re.findall(r"\]\((figures/.*?)\)", made.read_text()):
        assert (PAPER / picture).is_file()


def test_golden_hh_is_figure_1(tmp_path):
    for method in ("base", "ulma"):
        stored(tmp_path, method, 0, data="golden-hh", verdicts=["win"] * 250)
    assert "### Figure 1: win, tie and lose rates, Golden HH" in tables.write(tmp_path).read_text()


def test_without_records_there_are_no_results(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no record in"):
        tables.write(tmp_path)
