"""`check` suggests a method and settings that suit the rows, if none is named, and training runs with them."""

import json
import logging
import re
import shlex
import sys

import pytest
from datasets import Dataset, DatasetDict
from family_samples import SAMPLES
from transformers.utils import logging as transformers_logging

from trl_ulma.scripts import check, pointwise_dpo
from trl_ulma.scripts.cli import main
from trl_ulma.scripts.needed_options import needed
from trl_ulma.scripts.suggestions import suggest

STARS = [5, 4, 1, 2, 3, 5]


def options(file, *words: str) -> dict[str, str]:
    """The suggested options: name → value."""
    found: dict[str, str] = {}
    name = ""
    for word in (word for each in suggest(["--dataset", str(file), *words]) for word in each.options):
        if word.startswith("--"):
            name = word
            found[name] = ""
        else:
            found[name] = word
    return found


def write(tmp_path, columns: dict[str, list], name: str = "rows.jsonl"):
    file = tmp_path / name
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def answers(labels: list, **others: list) -> dict[str, list]:
    numbers = range(len(labels))
    rows = {"prompt": [f"Why {i // 2}?" for i in numbers], "completion": [f" So {i}." for i in numbers]}
    return {**rows, "label": labels, **others}


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (STARS, {"--label_type": "continuous", "--label_transform": "standardize"}),
        ([-0.3, 2.5, 0.1], {"--label_type": "continuous", "--label_transform": "standardize"}),
        ([1, 0, 1], {}),
        ([True, False, None], {}),
        ([0.25, 0.5, 1.0], {}),
        ([-1, 1, 1], {"--label_transform": "threshold:1"}),
        ([1, 5, 5], {"--label_transform": "threshold:5"}),
        (["up", "down", "up"], {"--label_map": "up=1,down=0"}),
        (["4 stars", "1 star", "5 stars"], {"--label_type": "continuous", "--label_transform": "standardize"}),
        (["great", "poor", "fair"], {}),  # which only the user can put in order
        ([3, 3, 3], {}),
        ([0, 1] * 10 + [11], {}),  # a mistake, which check lists
    ],
)
def test_labels_decide_their_settings(tmp_path, labels, expected):
    found = options(write(tmp_path, answers(labels)))
    assert {name: value for name, value in found.items() if name.startswith("--label")} == expected
    assert found["--method"] == "pointwise-dpo"


def test_counts_with_a_long_tail_are_read_by_their_order(tmp_path):
    likes = [round(1.05**i) for i in range(180)]
    file = write(tmp_path, answers(likes))
    found = options(file)
    assert (found["--label_type"], found["--label_transform"]) == ("continuous", "quantile,center")
    (reason,) = (each.reason for each in suggest(["--dataset", str(file)]) if each.options[0] == "--label_type")
    assert reason == (
        "labels are numbers from 1 to 6,207; a few of them have more than half of the variance, so only their order is "
        "learned"
    )
    rows = {"errors" if name == "label" else name: values for name, values in answers(likes).items()}
    assert options(write(tmp_path, rows))["--label_transform"] == "lower_is_better,quantile,center"


def test_ratings_are_standardized_however_skewed_they_are(tmp_path):
    for number, labels in enumerate(
        (
            [5] * 95 + STARS,
            [*STARS * 20, 33],
            list(range(101)),
            [*range(101), 750],
            [100] * 95 + [*range(20)],
            [900, 1, 0, 3, 2],
        )
    ):
        assert options(write(tmp_path, answers(labels), f"{number}.jsonl"))["--label_transform"] == "standardize"


@pytest.mark.parametrize(
    ("labels", "name", "expected"),
    [
        ([0, 1, 0], "toxic", {"--label_transform": "lower_is_better"}),
        (STARS, "harm_score", {"--label_type": "continuous", "--label_transform": "lower_is_better,standardize"}),
        ([0.1, 0.5, 0.9], "error_rate", {"--label_transform": "lower_is_better"}),
        ([0.3, 0.5, 1.9], "wer", {"--label_type": "continuous", "--label_transform": "lower_is_better,standardize"}),
        (
            [3.1, 9, 20.5],
            "perplexity",
            {"--label_type": "continuous", "--label_transform": "lower_is_better,standardize"},
        ),
        (STARS, "nps", {"--label_type": "continuous", "--label_transform": "standardize"}),
        (STARS, "csat", {"--label_type": "continuous", "--label_transform": "standardize"}),
        (STARS, "satisfaction", {"--label_type": "continuous", "--label_transform": "standardize"}),
        (STARS, "score_0_100", {"--label_type": "continuous", "--label_transform": "standardize"}),
        (STARS, "rank", {"--label_type": "continuous", "--label_transform": "lower_is_better,prompt_quantile"}),
    ],
)
def test_the_name_of_a_column_says_which_numbers_are_better(tmp_path, labels, name, expected):
    rows = answers(labels)
    rows[name] = rows.pop("label")
    file = write(tmp_path, rows)
    found = options(file)
    assert found["--columns"] == f"label={name}"
    reasons = " ".join(each.reason for each in suggest(["--dataset", str(file)]))
    better = "low" if "lower_is_better" in expected["--label_transform"] else "high"
    assert f"a {better} `{name}` {'is read as' if better == 'high' else 'looks'} better" in reasons
    assert {name: value for name, value in found.items() if name.startswith("--label")} == expected


@pytest.mark.parametrize("name", ["who", "rater", "reviewed by"])
def test_strict_raters_are_centered(tmp_path, name):
    labels = [1, 2, 2, 3] * 5 + [4, 5, 4, 5] * 5
    found = options(write(tmp_path, answers(labels, **{name: ["Tom"] * 20 + ["Ann"] * 20})))
    assert found["--label_transform"] == "center_raters,standardize"
    assert found.get("--columns") == (None if name == "rater" else f"rater={name}")
    alike = options(write(tmp_path, answers(labels, **{name: ["Tom", "Ann"] * 20}), "alike.jsonl"))
    assert alike["--label_transform"] == "standardize"
    models = options(write(tmp_path, answers(labels, model=["a"] * 20 + ["b"] * 20), "models.jsonl"))
    assert models["--label_transform"] == "standardize"  # one model may be better than the other


def test_other_columns_decide(tmp_path):
    votes = options(write(tmp_path, answers([3, 0, 2], trials=[4, 2, 9])))
    assert votes["--label_transform"] == "votes:1,1"
    shown = options(write(tmp_path, answers([1, 0, 1], sft_mask=[True, False, False])))
    assert shown["--method"] == "ulma"
    typed = options(write(tmp_path, answers([1, 4, 3], label_type=["binary", "continuous", "continuous"])))
    assert not {"--label_type", "--label_transform"} & set(typed)
    pairs = options(write(tmp_path, {"prompt": ["Hi", "Ho"], "chosen": [" a", " b"], "rejected": [" c", " d"]}))
    assert (pairs["--method"], pairs["--share_prompts"]) == ("pointwise-dpo", "True")
    assert "--label_type" not in pairs


@pytest.mark.parametrize(
    ("labels", "label_map", "transform"),
    [
        (["4/5", "1/5", "n/a", "2/5", "4/5"], "1/5=1,2/5=2,4/5=4", "standardize"),
        (["★★★☆☆", "★☆☆☆☆", "★★★★★"], "★☆☆☆☆=1,★★★☆☆=3,★★★★★=5", "standardize"),
        (["3 of 4", "2.5 of 4", "1 of 4"], "1 of 4=1,2.5 of 4=2.5,3 of 4=3", "standardize"),
        (["⭐⭐⭐", "⭐", "⭐⭐⭐", "⭐"], "⭐=1,⭐⭐⭐=3", "threshold:3"),
        (["pass", "fail", "pass"], "pass=1,fail=0", None),
        (["4/5", "8/10"], None, None),
        (["7/5", "4/5"], None, None),
        (["4/5", "good"], None, None),
    ],
)
def test_scales_as_text_become_numbers(tiny_gpt2, tmp_path, capfd, labels, label_map, transform):
    file = write(tmp_path, answers(labels))
    found = options(file)
    assert (found.get("--label_map"), found.get("--label_transform")) == (label_map, transform)
    if label_map is not None:  # and the suggested options are accepted
        words = ["--model", tiny_gpt2, "--dataset", str(file), "--bf16", "False", "--invalid_rows", "drop"]
        assert check.main([*words, "--eval_strategy", "no"]) == 0
        assert f"{len(labels) - ('n/a' in labels)} rows, " in capfd.readouterr().out


def test_a_column_that_may_mark_demonstrations_is_named(tmp_path):
    file = write(tmp_path, answers(STARS, is_gold=[True, False, False, True, False, None], golden_age=STARS))
    [reason] = [each.reason for each in suggest(["--dataset", str(file)]) if each.options[0] == "--method"]
    assert (
        "if `is_gold` marks answers to imitate, add sft_mask=is_gold to --columns, and choose --method ulma" in reason
    )
    given = ["--columns", "sft_mask=is_gold"]
    assert options(file, *given)["--method"] == "ulma"


def test_a_typing_mistake_is_not_an_end_of_the_scale(tmp_path):
    file = write(tmp_path, answers([*STARS * 5, 33]))
    assert "labels are numbers from 1 to 5" in [each.reason for each in suggest(["--dataset", str(file)])]


def test_what_is_given_is_not_suggested(tmp_path):
    file = write(tmp_path, answers(STARS))
    given = ["--label_transform=min_max", "--learning-rate", "1e-5", "--do_eval", "--output_dir", "here"]
    assert options(file, *given) == {"--method": "pointwise-dpo"}
    assert options(file, "--sft_threshold", "4")["--method"] == "ulma"
    assert "--eval_strategy" not in options(write(tmp_path, answers([5, 1]), "one_prompt.jsonl"))


@pytest.mark.parametrize("text", ["", "prompt,completion\nHi,Ho\n", "when,where\n1,2\n"])
def test_nothing_is_suggested_for_what_cannot_be_trained_on(tmp_path, text):
    file = tmp_path / "rows.csv"
    file.write_text(text)
    assert suggest(["--dataset", str(file)]) == []


def test_a_dataset_that_is_not_there_is_told_once(tmp_path, capfd):
    assert check.main(["--dataset", str(tmp_path / "none.csv"), "--model", "m"]) == 1
    assert capfd.readouterr().err.startswith("trl-ulma check: error: There is no file or folder")


def test_check_trains_as_it_suggests(tiny_gpt2, tmp_path, monkeypatch, capfd, caplog):
    monkeypatch.chdir(tmp_path)
    lines = [f"Why {i // 2}?;So {i}.;{i % 5 + 1}\n" for i in range(12)]
    (tmp_path / "my ratings.csv").write_text("question;reply;stars\n" + "".join(lines))
    assert main(["check", "--model", tiny_gpt2, "--dataset", "my ratings.csv", "--max_steps", "2"]) == 0
    said = capfd.readouterr().out
    assert said.startswith("Suggested settings (to choose your own, name a --method):\n  --method pointwise-dpo")
    assert caplog.text.count("the fields are separated by semicolons") == 1  # though the file is read more than once
    words = shlex.split(said.split("To train:\n")[1].replace("\\\n", ""))
    assert words[:2] == ["trl-ulma", "pointwise-dpo"]
    settings = pointwise_dpo.make_parser().parse_settings(words[2:])
    assert settings[0].columns == "prompt=question,completion=reply,label=stars"
    assert (settings[1].label_type, settings[1].label_transform) == ("continuous", "standardize")
    assert (settings[2].use_peft, settings[1].learning_rate) == (True, 1e-4)
    settings[1].report_to = []
    pointwise_dpo.main(*settings)
    shown = capfd.readouterr().out
    assert "The model is in out." in shown
    saved = json.loads((tmp_path / "out" / "data_options.json").read_text())
    assert saved["columns"] == settings[0].columns


def test_rows_to_correct_are_shown_before_suggestions(tiny_gpt2, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    lines = [f"Why {i // 2}?,So {i}.,{'none' if i == 3 else i % 5 + 1}\n" for i in range(12)]
    (tmp_path / "rows.csv").write_text("question,reply,stars\n" + "".join(lines))
    words = ["check", "--model", tiny_gpt2, "--dataset", "rows.csv"]
    assert main(words) == 1
    out, err = capfd.readouterr()
    assert "Suggested settings" not in out
    assert "rows.csv, line 5: stars is the text 'none'" in err
    again = shlex.join(["trl-ulma", *words, "--invalid_rows", "drop"])
    assert err.replace(" \\\n       ", "").endswith(
        f"To leave this row out:\n\n    {again}\n\nOr correct it, and check again.\n"
    )
    assert main(shlex.split(again)[1:]) == 0
    assert capfd.readouterr().out.startswith("Suggested settings")
    # Another error can be about a suggested setting
    assert main([*words, "--invalid_rows", "drop", "--eval_strategy", "epoch", "--dataset_test_split", "none"]) == 1
    out, err = capfd.readouterr()
    assert out.startswith("Suggested settings")
    assert "has no split 'none'" in err


@pytest.mark.parametrize(
    ("label", "options", "is_told"), [("4", [], True), ("none", [], False), ("4", ["--log_z", "group"], True)]
)
def test_how_rows_are_read_is_told_after_the_suggestions(
    tiny_llama, tmp_path, monkeypatch, capfd, label, options, is_told
):
    lines = [f"Why {i}?,So {i}.,{i % 5 + 1}\n" for i in range(12)]
    file = tmp_path / "rows.csv"
    file.write_text("".join(["prompt,completion,label\n", *lines, f"Who?,I.,{label}\n"]))
    transformers_logging.warning_once.cache_clear()
    monkeypatch.setattr(logging.root, "handlers", [])  # pytest's handlers would take the messages
    monkeypatch.setattr(sys, "stderr", sys.stdout)
    code = main(["check", "--model", tiny_llama, "--dataset", str(file), *options])
    assert code == (not is_told or bool(options))  # each prompt has one answer, so there are no groups
    said = capfd.readouterr().out
    assert said.count("files become conversations") == said.count("Suggested settings") == is_told
    if is_told:
        assert said.index("Suggested settings") < said.index("files become conversations")
        assert ("check: error: " in said.partition("files become conversations")[2]) == bool(options)


def test_a_named_method_gets_no_suggestions(tiny_gpt2, tmp_path, capfd):
    file = write(tmp_path, answers([1, 0, 1, 0]))
    words = ["--model", tiny_gpt2, "--dataset", str(file), "--bf16", "False"]
    assert check.main(["--method", "ulma", *words]) == 0
    said = capfd.readouterr().out
    assert "Suggested" not in said
    assert re.search(r"trl-ulma ulma .*--output out\n$", said.replace(" \\\n", ""))
    config = tmp_path / "run.yaml"
    config.write_text("beta: 0.2\n")
    assert check.main([*words, "--config", str(config)]) == 0  # the file is a whole plan
    assert "Suggested" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("words", "name", "expected"),
    [
        (["yes", "no"], "harmful", "yes=0,no=1"),  # yes, it is harmful
        (["no", "yes"], "thumbs_down", "no=1,yes=0"),
        (["safe", "unsafe"], "harmful", "safe=1,unsafe=0"),
        (["yes", "safe", "no"], "harmful", None),  # of which only the user knows what it means
        (["yes", "no"], "helpful", "yes=1,no=0"),
        (["-", "+"], "label", "+=1,-=0"),  # --label_map -=0 would be an option
    ],
)
def test_words_are_read_by_the_name_of_their_column(tmp_path, words, name, expected):
    rows = answers(words)
    rows[name] = rows.pop("label")
    assert options(write(tmp_path, rows)).get("--label_map") == expected


def test_a_text_beside_the_prompt_is_not_left_out(tiny_gpt2, tmp_path, capsys):
    rows = {"instruction": ["Add."] * 4, "input": ["1", "2", "3", "4"], "output": ["a"] * 4, "rating": [1, 2, 3, 4]}
    file = write(tmp_path, rows)
    assert suggest(["--dataset", str(file)]) == []
    assert check.main(["--model", tiny_gpt2, "--dataset", str(file)]) == 1
    assert "`rating` looks like the label of alpaca data: trl-ulma prepare alpaca" in capsys.readouterr().err


@pytest.mark.parametrize(
    "columns",
    [
        {"answer_a": ["x", "y"], "answer_b": ["z", "w"], "preference": [0, 1]},
        {"response_a": ["x", "y"], "response_b": ["z", "w"], "label": [0, 1]},
        {"response_1": ["x", "y"], "response_2": ["z", "w"], "preference_strength": [-3, 2]},
        {"response_0": ["x", "y"], "response_1": ["z", "w"], "better": ["response_0", "tie"]},
    ],
    ids=lambda columns: list(columns)[-1],
)
def test_a_comparison_of_two_answers_is_not_taken_for_the_rating_of_one(tiny_gpt2, tmp_path, capsys, columns):
    file = write(tmp_path, {"prompt": ["Why?", "How?"], **columns})
    assert suggest(["--dataset", str(file)]) == []
    assert check.main(["--model", tiny_gpt2, "--dataset", str(file)]) == 1
    first, second, _ = columns
    error = capsys.readouterr().err
    assert f"`{first}` and `{second}` look like answers to one prompt" in error
    assert "`chosen`" in error
    assert "--columns completion" not in error


def test_a_rated_response_can_have_another_column_with_a_number(tmp_path):
    rows = {"prompt": ["Why?", "How?"], "response": ["x", "y"], "response_2": ["a", "b"], "rating": [1, 5]}
    assert options(write(tmp_path, rows))["--columns"] == "completion=response,label=rating"


@pytest.mark.parametrize("family", SAMPLES)
def test_rows_of_a_known_dataset_are_looked_at_without_a_traceback(tmp_path, family):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(SAMPLES[family](i)) + "\n" for i in range(4)))
    for each in suggest(["--dataset", str(file)]):
        assert each.options


@pytest.mark.parametrize("label", [[1, 0], {"value": 4}], ids=["list", "object"])
def test_labels_that_are_no_values_suggest_no_scale(tmp_path, label):
    assert options(write(tmp_path, answers([label] * 4))).get("--label_map") is None


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"likes": STARS, "dislikes": STARS}, "guessed from the names of the columns; `dislikes` stays unread"),
        ({"rating_1": STARS, "rating_2": STARS}, "`rating_2` stays unread. To keep all ratings, write one row per"),
        ({"stars": STARS, "note": STARS}, "guessed from the names of the columns"),
    ],
)
def test_labels_that_stay_unread_are_named(tmp_path, columns, said):
    rows = answers(STARS)
    del rows["label"]
    (reason,) = (
        each.reason
        for each in suggest(["--dataset", str(write(tmp_path, {**rows, **columns}))])
        if each.options[0] == "--columns"
    )
    assert said in reason
    assert reason.endswith(said) or "rating" in said


def test_a_sorted_file_is_read_beyond_its_first_labels(tmp_path, monkeypatch):
    labels = sorted([1, 2, 3, 4, 5] * 800)
    found = options(write(tmp_path, answers(labels)))
    assert (found["--label_type"], found["--label_transform"]) == ("continuous", "standardize")
    # Two labels decide nothing if others may follow
    monkeypatch.setattr("trl_ulma.scripts.suggestions._MOST_ROWS", 1_500)
    told = suggest(["--dataset", str(tmp_path / "rows.jsonl")])
    (reason,) = (each.reason for each in told if each.options[0] == "--label_type")
    assert reason == "labels are numbers from 1 to 2 in the first 1,500 rows"


def test_numbers_beside_words_are_not_the_whole_scale(tmp_path):
    found = options(write(tmp_path, answers(["1,234", "5", "17", "2,001"])))
    assert "--label_transform" not in found


def test_shares_are_no_votes(tmp_path):
    assert "--label_transform" not in options(write(tmp_path, answers([0.25, 0.5, 1.0], trials=[4, 2, 9])))


def test_raters_can_be_numbers_beside_empty_cells(tmp_path):
    labels = [1, 2, 2, 3] * 5 + [4, 5, 4, 5] * 5
    raters = [17.0] * 19 + [None] + [23.0] * 20
    found = options(write(tmp_path, answers(labels, rater=raters)))
    assert found["--label_transform"] == "center_raters,standardize"


def test_no_suggestion_contradicts_what_is_given(tmp_path):
    turns = [[{"role": "user", "content": "Why?"}, {"role": "assistant", "content": said}] for said in "abcd"]
    pairs = write(tmp_path, {"chosen": turns[:2], "rejected": turns[2:]}, "pairs.jsonl")
    assert "--eval_strategy" not in options(pairs)  # all have one prompt
    assert "--share_prompts" not in options(pairs, "--padding_free")
    rows = write(tmp_path, answers(STARS))
    assert "--use_peft" not in options(rows, "--sync_ref_model")
    assert options(rows, "--label_type", "continuous")["--label_transform"] == "standardize"
    assert "--label_transform" not in options(rows, "--label_type", "binary")
    threshold = options(rows, "--sft_threshold", "4")  # of labels as they are
    assert threshold["--label_type"] == "continuous"
    assert "--label_transform" not in threshold
    assert "--eval_strategy" not in options(rows, "--test_split_size", "0.0")
    assert options(rows, "--test_split_size", "0.2")["--eval_strategy"] == "epoch"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("--load_in_4bit", "--use_peft --learning_rate 1e-4"),
        ("--load-in-8bit True --learning_rate 1e-5", "--use_peft"),
        ("--load_in_4bit --use_peft", "--learning_rate 1e-4"),
        ("--load_in_4bit False", ""),
        ("--load_in_4bit --use_peft False", ""),  # which the command refuses
        ("--lora_r 8", "--use_peft --learning_rate 1e-4"),
        ("--bnb_4bit_quant_type nf4", "--load_in_4bit --use_peft --learning_rate 1e-4"),
        ("--load_best_model_at_end", "--eval_strategy epoch --save_strategy epoch"),
        ("--load_best_model_at_end False", ""),
        ("--load_best_model_at_end --save_strategy steps", "--eval_strategy steps"),
        ("--load_best_model_at_end --save_strategy best", "--eval_strategy epoch"),
        ("--load_best_model_at_end --save_steps 20", "--eval_strategy steps --eval_steps 20"),
        ("--load_best_model_at_end --eval_steps 30", "--eval_strategy steps --save_steps 30"),
        ("--load_best_model_at_end --eval_steps 20 --save_steps 40", "--eval_strategy steps"),
        ("--load_best_model_at_end --eval_strategy epoch", "--save_strategy epoch"),
        ("--load_best_model_at_end --eval_strategy steps --eval_steps 30", "--save_steps 30"),
        (
            "--metric_for_best_model eval_rewards/spearman",
            "--load_best_model_at_end --eval_strategy epoch --save_strategy epoch",
        ),
        ("--save_strategy best", "--eval_strategy epoch --metric_for_best_model eval_loss"),
        ("--lr_scheduler_type reduce_lr_on_plateau", "--eval_strategy epoch"),
        ("--eval_steps 20", "--eval_strategy steps"),
        ("--eval_strategy no", ""),
        ("--label_transform standardize", "--label_type continuous"),
        ("--label_transform threshold:4", ""),
        ("--label_transform standardise:1,2,3", ""),
        ("--beta 0.1", ""),
    ],
)
def test_options_come_with_those_that_they_need(given, expected):
    words = given.split()
    more = [word for each in needed(words) for word in each.options]
    assert " ".join(more) == expected
    if "False" not in words and "standardise:1,2,3" not in words:  # the command accepts them together
        pointwise_dpo.make_parser().parse_settings(["--model", "m", "--dataset", "d.csv", *words, *more])


def test_check_accepts_an_option_without_the_one_that_it_needs(tiny_gpt2, tmp_path, capfd):
    file = write(tmp_path, answers(STARS * 2))
    words = ["--model", tiny_gpt2, "--dataset", str(file), "--bf16", "False"]
    assert check.main([*words, "--load_best_model_at_end"]) == 0
    said = capfd.readouterr().out
    assert "--save_strategy epoch              saves a checkpoint after each evaluation" in said
    following = said.split("To train:\n")[1]
    assert all(following.count(option) == 1 for option in ("--eval_strategy epoch", "--save_strategy epoch"))


def test_no_rows_are_held_out_with_a_test_split_of_size_0(tiny_gpt2, tmp_path, capfd):
    file = write(tmp_path, answers(STARS * 2))
    words = ["--model", tiny_gpt2, "--dataset", str(file), "--bf16", "False", "--test_split_size", "0"]
    assert check.main(words) == 0
    said = capfd.readouterr().out
    assert "--eval_strategy" not in said
    assert "12 rows make" in said
    assert check.main([*words, "--eval_steps", "5"]) == 0
    assert "--eval_strategy epoch" not in capfd.readouterr().out
    assert check.main([*words, "--eval_strategy", "epoch"]) == 1
    assert (
        "has no test split, and --test_split_size 0 holds out no rows, so there is nothing to evaluate on. Leave "
        "--test_split_size out to hold out some, or switch the evaluation off: --eval_strategy no, without "
        "--eval_steps and --load_best_model_at_end."
    ) in capfd.readouterr().err


def test_options_may_have_dashes(tmp_path):
    rows = answers(STARS)
    rows["stars"] = rows.pop("label")
    DatasetDict({"fit": Dataset.from_dict(rows)}).save_to_disk(tmp_path / "saved")
    found = options(tmp_path / "saved", "--dataset-train-split", "fit")
    assert (found["--columns"], found["--label_type"]) == ("label=stars", "continuous")
