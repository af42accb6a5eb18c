"""The layouts in which public datasets are published: what becomes of each answer, and what is left out."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, IterableDataset
from family_samples import SAMPLES

from trl_ulma.data.adapters import FAMILIES, SAME, LeftOut, Noted, find
from trl_ulma.data.convert import convert
from trl_ulma.data.detect import detected
from trl_ulma.data.files import load_rows

USER, GOOD = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}


def outcomes(family, *raw, **options):
    """(prompt, completion, label, demonstration) of rows with their texts alone; the reason of what is left out."""

    def texts(value):
        return value if isinstance(value, str) else [turn["content"] for turn in value]

    def shown(each):
        if isinstance(each, LeftOut):
            return each.why
        if isinstance(each, Noted):
            return each.what
        answer = texts(each["completion"])
        return texts(each["prompt"]), answer if isinstance(answer, str) else answer[-1], each["label"], each["sft_mask"]

    return [shown(each) for each in find(family).read(raw, **options)]


def labels(family, *raw, **options):
    found = (each for each in find(family).read(raw, **options) if not isinstance(each, Noted))
    return [each["label"] if isinstance(each, dict) else each.why for each in found]


@pytest.mark.parametrize("family", SAMPLES)
def test_every_answer_of_a_family_is_a_row(family, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    raw = [SAMPLES[family](i) for i in range(8)]
    direct, account = convert(family, IterableDataset.from_generator(lambda: iter(raw)))
    assert (account.rows_in, account.left_out) == (8, {})
    assert account.answers == account.rows_out == len(direct)
    # Through a file, in which Arrow gives each object the keys of all, they are the same
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps(each) + "\n" for each in raw))
    read, _ = convert(family, load_rows(tmp_path / "raw.jsonl")["train"])
    assert list(read) == list(direct)
    assert set(direct["label_type"]) <= {"binary", "continuous"}
    assert family in [each.family for each in detected(raw)]


@pytest.mark.parametrize("family", SAMPLES)
def test_rows_of_nothing_are_counted_and_do_not_stop_the_rest(family):
    good = SAMPLES[family](0)
    bad = dict.fromkeys(good)
    rows, account = convert(family, IterableDataset.from_generator(lambda: iter([good, bad, good])))
    assert account.rows_in == 3
    assert sum(each.count for each in account.left_out.values()) >= 1
    assert account.answers == account.rows_out + sum(each.count for each in account.left_out.values())
    assert len(rows) == account.rows_out >= 2


def test_the_sample_rows_of_the_documentation_are_read():
    page = (Path(__file__).resolve().parents[2] / "docs" / "rows.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| `([\w-]+)` \| `(\{.*?\})` \| .+ \|$", page, re.MULTILINE)
    assert {family for family, _ in table} == set(FAMILIES)
    for family, raw in table:
        row = json.loads(raw)
        _, account = convert(family, IterableDataset.from_generator(lambda row=row: iter([row])))
        assert account.answers == account.rows_out >= 1, family


# Labels of one's own


def test_answers_with_labels():
    raw = {"prompt": "Hi", "completion": "Hello!"}
    assert outcomes("kto", raw | {"label": True}, raw | {"label": 0.3}, raw | {"label": "0"}) == [
        (["Hi"], "Hello!", 1.0, True),
        (["Hi"], "Hello!", 0.3, False),
        (["Hi"], "Hello!", 0.0, False),
    ]
    assert outcomes("kto", raw | {"label": 1}, liked=True) == [(["Hi"], "Hello!", 1.0, False)]
    assert outcomes("kto", raw | {"label": 4}, label_type="continuous") == [(["Hi"], "Hello!", 4.0, False)]
    assert outcomes("kto", raw | {"label": 4}, raw | {"label": "up"}, raw | {"label": None}) == [
        "its label is outside [0, 1], the range of binary labels: set --label_type continuous",
        "its label is not a number",
        "its label is not a number",
    ]


def test_the_last_turn_of_a_conversation_is_the_answer():
    turns = [USER, GOOD, {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "Bye."}]
    assert outcomes("messages", {"messages": turns, "label": 0}) == [(["Hi", "Hello!", "Bye"], "Bye.", 0.0, False)]
    assert outcomes("messages", {"messages": turns[:3], "label": 0}, {"messages": "Hi", "label": 0}) == [
        "it does not end in an assistant turn",
        "its conversation is not a list of turns with a role and content, or with `from` and `value`",
    ]


def test_each_turn_has_its_label():
    turns = [USER, GOOD | {"label": 1}, {"role": "user", "content": "Bye"}, GOOD, USER, GOOD | {"label": 0.0}]
    assert outcomes("turns", {"messages": turns}) == [
        (["Hi"], "Hello!", 1.0, True),
        "its turn has no label",
        (["Hi", "Hello!", "Bye", "Hello!", "Hi"], "Hello!", 0.0, False),
    ]


# ShareGPT, Alpaca, steps


def test_sharegpt():
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]
    good, bad = {"from": "gpt", "value": "Yes"}, {"from": "gpt", "value": "No"}
    assert outcomes("sharegpt", {"conversations": turns, "system": "Be kind."}) == [
        (["Be kind.", "Hi"], "Hello!", 1.0, True)
    ]
    assert outcomes("sharegpt", {"conversations": turns, "kto_tag": False}) == [(["Hi"], "Hello!", 0.0, False)]
    assert outcomes("sharegpt", {"conversations": turns[:1], "chosen": good, "rejected": bad}) == [
        (["Hi"], "Yes", 1.0, True),
        (["Hi"], "No", 0.0, False),
    ]
    odd = [[{"from": "observation", "value": "{}"}], [{"from": "human", "value": None}], "Hi", turns[:1]]
    assert [outcomes("sharegpt", {"conversations": each})[0] for each in odd] == [
        "one of its turns is from 'observation', which is neither a user, an assistant nor a system",
        "one of its turns is not text",
        "its conversation is not a list of turns with a role and content, or with `from` and `value`",
        "it does not end in an assistant turn",
    ]


def test_alpaca():
    raw = {"instruction": "Add.", "input": "", "output": "4"}
    assert outcomes("alpaca", raw, raw | {"input": "2 + 2"}, raw | {"label": 0}) == [
        (["Add."], "4", 1.0, True),
        (["Add.\n\n2 + 2"], "4", 1.0, True),
        (["Add."], "4", 0.0, False),
    ]
    empty = [raw | {"input": given} for given in ("<noinput>", "<No Input>", " noinput\n", " ", None)]
    assert outcomes("alpaca", *empty) == [(["Add."], "4", 1.0, True)] * 5
    # The four spellings in Alpaca's data, and spaces, beside the other column
    for given in ("<noinput>", "<no input>", "noinput", "No input", " ", "", None):
        for both in ({"input": given, "context": "2 + 2"}, {"input": "2 + 2", "context": given}):
            assert outcomes("alpaca", raw | both) == [(["Add.\n\n2 + 2"], "4", 1.0, True)]
        assert outcomes("alpaca", raw | {"input": given, "context": given}) == [(["Add."], "4", 1.0, True)]
    assert outcomes("alpaca", raw | {"input": "1", "context": "2"}) == ["it has both an input and a context"]
    assert outcomes("alpaca", raw | {"instruction": "", "input": "2 + 2"})[0][0] == ["2 + 2"]
    # No established marker
    assert outcomes("alpaca", raw | {"input": "N/A"})[0][0] == ["Add.\n\nN/A"]
    assert outcomes("alpaca", raw | {"input": "", "context": 3}) == outcomes(
        "alpaca", raw | {"input": 3, "context": "x"}
    )
    assert outcomes("alpaca", raw | {"input": "<noinput> is a tag"})[0][0] == ["Add.\n\n<noinput> is a tag"]
    assert outcomes("alpaca", raw | {"output": "<nooutput>"}) == ["its output is a marker of an empty one"]
    assert outcomes("alpaca", raw | {"output": "No output"})[0][1] == "No output"
    history = {"system": "Be kind.", "history": [["Hi", "Hello!"]]}
    assert outcomes("alpaca", raw | history) == [(["Be kind.", "Hi", "Hello!", "Add."], "4", 1.0, True)]
    reason = "its instruction, input, output, system or history is not text"
    assert outcomes("alpaca", raw | {"output": 4}, raw | {"history": [["Hi"]]}) == [reason] * 2


def test_steps():
    raw = {"prompt": "2 + 3 + 4?", "completions": ["5", "9", "10"], "labels": [True, True, False]}
    assert outcomes("stepwise", raw) == [
        ("2 + 3 + 4?\n", "5\n", 1.0, True),
        ("2 + 3 + 4?\n5\n", "9\n", 1.0, True),
        ("2 + 3 + 4?\n5\n9\n", "10", 0.0, False),
    ]
    assert outcomes("stepwise", raw, separator="\\n\\n", liked=True)[1] == (
        "2 + 3 + 4?\n\n5\n\n",
        "9\n\n",
        1.0,
        False,
    )
    assert (
        labels("stepwise", raw | {"labels": [True]}) == ["its question has different numbers of steps and labels"] * 3
    )
    assert labels("stepwise", raw | {"labels": [True, None, 2]}) == [
        1.0,
        "its label is not a number",
        "its label is outside [0, 1]: set --label_map, such as --label_map=-1=0,0=0.5,1=1",
    ]
    rows, _ = convert("stepwise", Dataset.from_list([raw]))
    assert rows[1]["prompt"] == "2 + 3 + 4?\n5\n"
    assert rows["eos"][:] == [False, False, True]


# Ratings


def test_helpsteer():
    raw = SAMPLES["helpsteer"](3)
    assert labels("helpsteer", raw) == [3.0]
    assert labels("helpsteer", raw, aspect="verbosity") == [1.0]
    marked = "Hi\n<extra_id_1>Assistant\nHello!\n<extra_id_1>User\nBye"
    [row] = find("helpsteer").read([raw | {"prompt": marked}])
    assert [(turn["role"], turn["content"]) for turn in row["prompt"]] == [
        ("user", "Hi"),
        ("assistant", "Hello!"),
        ("user", "Bye"),
    ]
    assert labels("helpsteer", raw | {"helpfulness": None}) == ["its label is not a number"]
    with pytest.raises(ValueError, match="aspect is 'tone'"):
        list(find("helpsteer").read([raw], aspect="tone"))


def test_ultrafeedback():
    raw = SAMPLES["ultrafeedback"](2)
    for answer in raw["completions"]:
        assert answer.pop("custom_system_prompt")  # which would be told before each row
    assert outcomes("ultrafeedback", raw) == [
        (["Say 2."], "alpaca-7b says 2.", 7.5, False),
        (["Say 2."], "gpt-4 says 2.", 9.0, False),
    ]
    assert labels("ultrafeedback", raw, aspect="fine-grained") == [3.75, 4.5]
    assert labels("ultrafeedback", raw, aspect="honesty") == [3.0, 3.0]
    assert labels("ultrafeedback", raw, aspect="instruction_following") == ["its label is not a number"] * 2
    assert labels("ultrafeedback", raw | {"completions": []}) == ["its instruction has no completions"]
    with pytest.raises(ValueError, match="aspect is 'tone'"):
        list(find("ultrafeedback").read([raw], aspect="tone"))


TURNS = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]


@pytest.mark.parametrize(
    ("family", "raw", "other"),
    [
        ("alpaca", {"instruction": "Hi", "output": "Hello!"}, "alpaca"),
        ("sharegpt", {"conversations": TURNS}, "sharegpt"),
        ("demonstrations", {"prompt": "Hi", "completion": "Hello!"}, "kto"),
        ("demonstrations", {"messages": [USER, GOOD]}, "messages"),
    ],
)
def test_a_rating_beside_demonstrations_is_noted(family, raw, other):
    rated = [raw | {"Score": None}, raw | {"Score": 1.0}, raw | {"Score": 0.0}]
    rows, account = convert(family, Dataset.from_list(rated))
    [(what, found)] = account.noted.items()
    assert (found.count, found.first_row, rows["label"][:]) == (2, 1, [1.0] * 3)
    assert f"is not read, so the answer is a demonstration. To learn from it, run trl-ulma prepare {other} with" in what
    renamed = [{"label": each["Score"], **raw} for each in rated[1:]]
    assert convert(other, Dataset.from_list(renamed))[0]["label"][:] == [1.0, 0.0]
    assert not convert(family, Dataset.from_list([raw | {"id": 7, "score_count": 9}]))[1].noted


@pytest.mark.parametrize(
    ("family", "raw"),
    [
        ("kto", {"prompt": "Hi", "completion": "Hello!", "label": 1}),
        ("messages", {"messages": [USER, GOOD], "label": 1}),
        ("stack-exchange-paired", {"question": "Hi", "response_j": "Hello!", "response_k": "Go."}),
    ],
)
def test_columns_that_mean_something_and_are_not_read_are_noted(family, raw):
    empty = {"system": "", "tools": None, "weight": None, "sft_mask": None, "source": "web"}
    full = {"system": "Be brief.", "tools": "[]", "weight": 0.0, "sft_mask": False, "source": "web"}
    _, account = convert(family, Dataset.from_list([raw | empty, raw | full]))
    names = ("system", "tools", "weight", "sft_mask")
    assert {what: (found.count, found.first_row) for what, found in account.noted.items() if "column" in what} == {
        f"its column `{name}` is not read, and is not in the rows": (1, 1) for name in names
    }
    alpaca = {"instruction": "Hi", "output": "Hello!", "system": "Be brief."}
    assert not convert("alpaca", Dataset.from_list([alpaca]))[1].noted


def test_an_overall_score_of_10_that_was_a_1_in_ultrafeedback():
    def read(score, mean, *aspects):
        names = ("honesty", "helpfulness")[: len(aspects)]
        annotations = {name: {"Rating": rating} for name, rating in zip(names, aspects, strict=True)}
        answer = {"response": "Hello!", "overall_score": score, "fine-grained_score": mean, "annotations": annotations}
        rows, account = convert("ultrafeedback", Dataset.from_list([{"instruction": "Hi", "completions": [answer]}]))
        return rows["label"][0], [what.rpartition(" ")[2] for what in account.noted]

    assert read(10, 1.25) == read("10", 2) == read(10.0, None, "1", "N/A") == (1.0, ["1"])
    assert read(10, 3.5) == (10.0, ["scores"])
    assert read(10, 4.75) == read(10, None) == read(10, None, "5", "4") == (10.0, [])
    assert read(9, 1.25) == (9.0, [])


def test_answers_under_a_custom_system_prompt_are_told():
    answers = [
        {"response": text, "overall_score": 7.0, "annotations": {}, "custom_system_prompt": system}
        for text, system in (("Hello!", "Be honest."), ("Yes?", ""), ("Hi!", None))
    ]
    rows, account = convert("ultrafeedback", Dataset.from_list([{"instruction": "Hi", "completions": answers}]))
    assert rows["prompt"] == [[{"role": "user", "content": "Hi"}]] * 3
    [(what, noted)] = account.noted.items()
    assert "written under a custom_system_prompt" in what
    assert noted.count == 1


def test_a_missing_rating_of_a_parquet_file_is_no_rating_off_the_scale():
    """pandas and Parquet have NaN for it."""
    nan, no = float("nan"), "its label is not a number"
    assert labels("kto", {"prompt": "Hi", "completion": "Yes", "label": nan}) == [no]
    assert labels("helpsteer", SAMPLES["helpsteer"](0) | {"helpfulness": nan}) == [no]
    assert labels("webgpt", SAMPLES["webgpt"](0) | {"score_0": nan})[0] == no
    raw = [SAMPLES["helpsteer"](0) | {"prompt": f"{i}?", "helpfulness": nan if i % 2 else 3.0} for i in range(20)]
    _, account = convert("helpsteer", Dataset.from_list(raw))
    assert (account.rows_out, account.left_out[no].count) == (10, 10)


def test_ratings_off_the_scale_of_a_family_are_left_out_and_many_are_an_error():
    def why(low, high):
        return [f"its label is outside [{low}, {high}], the scale of this rating"]

    helpsteer, webgpt, oasst = (SAMPLES[family](0) for family in ("helpsteer", "webgpt", "oasst"))
    assert labels("helpsteer", *(helpsteer | {"helpfulness": each} for each in (5, "-1", 4))) == why(0, 4) * 2 + [4.0]
    assert labels("webgpt", webgpt | {"score_0": 2.0})[:1] == why(-1, 1)
    answer = {"response": "Yes", "overall_score": 11, "fine-grained_score": 5.5}
    answer |= {"annotations": {"honesty": {"Rating": "0"}}}
    rated = {"instruction": "Hi", "completions": [answer]}
    assert labels("ultrafeedback", rated) == why(1, 10)
    for aspect in ("fine-grained", "honesty"):
        assert labels("ultrafeedback", rated, aspect=aspect) == why(1, 5)
    rated = {"info": {"article": "News."}, "summary": {"text": "Short.", "axes": {"overall": 8}}, "worker": "w"}
    assert labels("tldr", rated) == why(1, 7)
    oasst["prompt"]["replies"][0]["labels"]["quality"]["value"] = 4
    assert labels("oasst", oasst)[0] == why(0, 1)[0]

    raw = [helpsteer | {"prompt": f"{i}?", "helpfulness": i % 10} for i in range(100)]
    with pytest.raises(
        ValueError, match=r"50 of 100 answers .* outside \[0, 4\], .* \(first in raw row 5\)\. .*one end"
    ):
        convert("helpsteer", Dataset.from_list(raw))
    assert len(convert("helpsteer", Dataset.from_list(raw[:5] * 8 + raw[5:6]))[0]) == 40


def flattened(message, parent=None, labels_as_lists=True):
    labels = message["labels"]
    if labels_as_lists:
        labels = {"name": [*labels], "value": [each["value"] for each in labels.values()], "count": [3] * len(labels)}
    yield {key: value for key, value in message.items() if key != "replies"} | {"parent_id": parent, "labels": labels}
    for reply in message["replies"]:
        yield from flattened(reply, message["message_id"], labels_as_lists)


@pytest.mark.parametrize("as_lists", [False, True])
def test_openassistant_trees_and_their_messages(as_lists):
    tree = SAMPLES["oasst"](1)
    expected = [
        (["1?"], "Yes 1", 0.75, False),
        (["1?", "Yes 1", "Thanks 1."], "You are welcome, 1.", 1.0, True),
        (["1?"], "No 1", 0.25, False),
    ]
    assert outcomes("oasst", tree) == expected
    flat = list(flattened(tree["prompt"], labels_as_lists=as_lists))
    assert outcomes("oasst", *flat) == expected
    assert outcomes("oasst", *reversed(flat)) == expected[::-1]
    assert labels("oasst", tree, label="rank") == [0.0, 0.0, -1.0]
    [*_, row] = find("oasst").read([tree], label="rank")
    assert (row["label"], row["label_type"]) == (-1.0, "continuous")


def test_openassistant_messages_that_are_left_out():
    tree = SAMPLES["oasst"](1)
    flat = list(flattened(tree["prompt"]))
    flat[1] |= {"deleted": True}
    flat[3] |= {"parent_id": "gone"}
    flat[4] |= {"labels": None, "review_result": None}
    assert labels("oasst", *flat) == [
        "it was deleted, or rejected in review",
        "a message before it is missing",
        "it has no quality",
    ]
    assert labels("oasst", {"message_tree_id": "1", "prompt": None}) == ["its tree has no first message"]


# Safety


def test_safety():
    raw = SAMPLES["pku-saferlhf"](1)
    assert outcomes("pku-saferlhf", raw) == [(["Harm 1!"], "No.", 1.0, True), (["Harm 1!"], "Sure.", 0.0, False)]
    assert labels("pku-saferlhf", raw, label="better") == [0.0, 1.0]
    assert labels("pku-saferlhf", raw, label="safer") == [1.0, 0.0]
    assert (
        labels("pku-saferlhf", raw | {"safer_response_id": -1}, label="safer")
        == ["it is not known whether it is safer"] * 2
    )
    assert labels("pku-saferlhf", raw | {"is_response_1_safe": None}) == [1.0, "it is not known whether it is safe"]
    tails = SAMPLES["beavertails"](0)
    assert labels("beavertails", tails, tails | {"is_safe": 0}, tails | {"is_safe": None}) == [
        1.0,
        0.0,
        "it is not known whether it is safe",
    ]


# Comparisons


def test_votes_of_the_arena():
    assert [labels("arena", SAMPLES["arena"](i)) for i in range(4)] == [[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.0, 0.0]]
    assert labels("arena", SAMPLES["arena"](2), ties="leave_out") == ["its vote is a tie"] * 2
    assert labels("arena", SAMPLES["arena"](0) | {"winner": None})[0].startswith(
        "its vote is not one of model_a, model_b"
    )
    lists = {"prompt": '["Hi", "Bye"]', "response_a": '["Hello!", "Bye."]', "response_b": ["Hey!", "Ciao."]}
    vote = {"winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0}
    assert outcomes("arena", lists | vote) == [
        (["Hi", "Hello!", "Bye"], "Bye.", 1.0, True),
        (["Hi", "Hey!", "Bye"], "Ciao.", 0.0, False),
    ]
    assert labels("arena", lists | vote | {"winner_model_a": "0", "winner_tie": "1"}) == [0.5, 0.5]
    texts = {"prompt": "Hi", "response_a": "Hello!", "response_b": "Go."}  # as a table has them
    for winner in ("model_b", "B", " response_b "):
        assert outcomes("arena", texts | {"winner": winner}) == [
            (["Hi"], "Hello!", 0.0, False),
            (["Hi"], "Go.", 1.0, True),
        ]
    assert labels("arena", texts | {"winner": "tie"}) == [0.5, 0.5]
    listed = outcomes("arena", texts | {"response_a": '["red"]', "response_b": '["red", "blue"]', "winner": "tie"})
    assert [answer for _, answer, *_ in listed] == ['["red"]', '["red", "blue"]']
    assert labels("arena", lists | vote | {"prompt": "[]"})[0].endswith("different numbers of questions and answers")
    assert labels("arena", texts | {"winner": "c"})[0].startswith("its vote is not one of")
    [why, _] = labels("arena", lists | vote | {"response_a": "[null]"})
    assert why == "its question or answer is not text"


def test_ranks():
    assert labels("nectar", SAMPLES["nectar"](0)) == [-1.0, -2.0, -3.0]
    raw = SAMPLES["nectar"](0) | {"prompt": "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Bye\n\nAssistant: "}
    assert outcomes("nectar", raw)[0][0] == ["Hi", "Hello!", "Bye"]
    raw["answers"][1] = {"answer": "Yes", "rank": None}
    assert labels("nectar", raw) == [-1.0, "its rank is not a number", -3.0]
    raw["answers"][1]["rank"] = 0
    assert labels("nectar", raw) == [-1.0, "its label is outside [1, inf], the scale of this rating", -3.0]


def test_equal_answers_with_different_scores_are_left_out():
    turn = {"role": "model", "parts": [{"text": "Yes"}]}
    for score, expected in ((0.0, [SAME] * 2), (1.0, [1.0] * 2)):
        answers = [{"score": each, "completion": turn} for each in (1.0, score)]
        assert labels("gemini", SAMPLES["gemini"](1) | {"completions": answers}) == expected
    same = {"answer_0": "Yes", "answer_1": "Yes"}
    assert labels("webgpt", SAMPLES["webgpt"](1) | same) == [SAME] * 2
    assert labels("webgpt", SAMPLES["webgpt"](1) | same | {"score_0": 0.0, "score_1": 0.0}) == [0.0] * 2
    ranked = [{"answer": text, "rank": rank} for text, rank in (("Yes", 1), ("No", 2), ("Yes", 3))]
    assert labels("nectar", {"prompt": "Hi", "answers": ranked}) == [SAME, -2.0, SAME]
    texts = ["Yes", "No", "Yes"]
    rated = {"instruction": "Hi", "generations": texts, "ratings": [5, 2, 1]}
    assert labels("distilabel", rated) == labels("distilabel", rated | {"ratings": [5, 2, 4]}) == [SAME, 2.0, SAME]
    completions = [{"response": text, "overall_score": score} for text, score in zip(texts, (9, 2, 3), strict=True)]
    assert labels("ultrafeedback", {"instruction": "Hi", "completions": completions}) == [SAME, 2.0, SAME]
    voted = [{"text": text, "score": score} for text, score in zip(texts, (7, 1, 7), strict=True)]
    assert labels("votes", {"question": "Hi", "answers": voted}) == [3.0, 1.0, 3.0]
    voted.append({"text": "No", "score": -1})
    assert labels("votes", {"question": "Hi", "answers": voted}) == [3.0, SAME, 3.0, SAME]


def test_webgpt():
    raw = SAMPLES["webgpt"](1)
    assert outcomes("webgpt", raw) == [
        (["An egg 1?"], "Boil it 0 [1].", 0.5, False),
        (["An egg 1?"], "Boil it 1 [1].", -0.5, False),
    ]
    [first, _] = outcomes("webgpt", raw, quotes=True)
    assert first[0] == ["Eggs (egg.com)\nAn egg is boiled.\n\nAn egg 1?"]
    assert (
        labels("webgpt", raw | {"quotes_0": None}, quotes=True)[0] == "its quotes are not lists of titles and extracts"
    )


def test_summaries():
    raw = SAMPLES["tldr"](1)
    prompt = "SUBREDDIT: r/tea\n\nTITLE: Hot\n\nPOST: It was 1.\n\nTL;DR:"
    assert outcomes("tldr", raw) == [([prompt], "sup1 1", 0.0, False), ([prompt], "ref 1", 1.0, True)]
    assert labels("tldr", raw | {"choice": 2}) == ["its choice is not one of the summaries"] * 2
    axes = {"overall": 5, "accuracy": 7, "coverage": None, "coherence": 6}
    rated = {"info": {"article": "News."}, "summary": {"text": "Short.", "policy": "ref", "axes": axes}, "worker": "w"}
    assert outcomes("tldr", rated) == [(["News.\n\nTL;DR:"], "Short.", 5.0, False)]
    assert labels("tldr", rated, aspect="coverage") == ["its label is not a number"]
    assert labels("tldr", rated | {"info": None}) == ["its post is empty or not text"]


def test_answers_that_are_the_same_are_not_better_and_worse():
    arena, openai, pku, tldr = (SAMPLES[family](0) for family in ("arena", "openai", "pku-saferlhf", "tldr"))
    arena["conversation_b"] = arena["conversation_a"]
    assert labels("arena", arena) == [SAME] * 2
    assert labels("arena", arena | {"winner": "tie"}) == [0.5] * 2
    assert labels("openai", openai | {"non_preferred_output": openai["preferred_output"]}) == [SAME] * 2
    assert labels("pku-saferlhf", pku | {"response_1": pku["response_0"]}, label="better") == [SAME] * 2
    assert labels("tldr", tldr | {"summaries": tldr["summaries"][:1] * 2}) == [SAME] * 2
    helpsteer3 = SAMPLES["helpsteer3"](0) | {"response1": "Yes", "response2": "Yes"}
    assert [labels("helpsteer3", helpsteer3 | {"overall_preference": each}) for each in (2, 0)] == [
        [SAME] * 2, [0.5] * 2,
    ]  # fmt: skip


def test_pairs_of_stack_exchange():
    raw = SAMPLES["stack-exchange-paired"](1)
    assert outcomes("stack-exchange-paired", raw, raw | {"response_j": "Dunno.", "response_k": "Fry it."}) == [
        (["An egg 1?"], "Boil it.", 1.0, True),
        (["An egg 1?"], "Dunno.", 0.0, False),
        "an answer that is in several pairs: each pair adds a row with it",
        (["An egg 1?"], "Dunno.", 1.0, True),
        (["An egg 1?"], "Fry it.", 0.0, False),
    ]
    assert Counter(labels("stack-exchange-paired", raw | {"response_k": "Boil it."})) == {
        "both halves of its pair are the same": 2
    }


def test_ratings_on_another_scale_are_not_left_out_at_one_end():
    talk = "\n\nHuman: Harm!\n\nAssistant: No "
    attempts = [{"transcript": f"{talk}{i}.", "rating": i % 5 + 1} for i in range(20)]
    answers = [{"answer": f"No {rank}", "rank": rank} for rank in range(7)]
    ranked = [{"prompt": f"{i}?", "answers": answers} for i in range(5)]
    preferred = [SAMPLES["helpsteer3"](i) | {"overall_preference": i % 11 - 5} for i in range(22)]
    for family, raw in (("red-team", attempts), ("nectar", ranked), ("helpsteer3", preferred)):
        with pytest.raises(ValueError, match=rf"Convert the ratings to the scale of {family} data"):
            convert(family, Dataset.from_list(raw))


def test_an_article_beside_an_empty_post_is_the_text_that_is_summarized():
    raw = SAMPLES["tldr"](1)
    article = raw | {"info": {"post": "", "title": None, "article": "News."}}
    assert [prompt for [prompt], *_ in outcomes("tldr", article)] == ["News.\n\nTL;DR:"] * 2
    assert labels("tldr", raw | {"info": {"post": " ", "title": "So"}}) == ["its post is empty or not text"] * 2


def test_a_question_that_is_an_object_as_text_is_no_question():
    raw = SAMPLES["webgpt"](1)
    for text in (str({"dataset": "eli5", "full_text": "Why?"}), json.dumps({"full_text": "Why?"})):
        assert labels("webgpt", raw | {"question": text}) == ["its question is not text"] * 2
    assert labels("webgpt", raw | {"question": "{'a': 1} is what?"}) == labels("webgpt", raw)
    quotes = {"quotes_0": {"title": ["Tea"], "extract": [None]}}
    assert labels("webgpt", raw | quotes, quotes=True)[0] == "its quotes are not lists of titles and extracts"


def test_accepted_answers_are_found_if_the_mark_is_a_number_or_text():
    answers = [{"text": f"{mark}", "score": 1, "selected": mark} for mark in (1, "true", 0, "false")]
    found = outcomes("votes", {"question": "An egg?", "answers": answers}, accepted=True)
    assert [demonstration for *_, demonstration in found] == [True, True, False, False]


def test_an_answer_without_votes_does_not_hide_its_next_pair():
    post = {"post_id": "p", "history": "Hi?", "human_ref_B": "No", "score_B": 1, "human_ref_A": "Yes"}
    found = labels("votes", post | {"score_A": None}, post | {"score_A": 3})
    assert found == ["its votes are not a number", 1.0, 2.0, "an earlier pair has the same answer"]


def test_markers_of_turns_in_helpsteer():
    def prompts(prompt):
        return outcomes("helpsteer", SAMPLES["helpsteer"](3) | {"prompt": prompt})

    turns = ["Hi", "Hello!", "Bye"]
    opened = "Hi\n<extra_id_1>Assistant\nHello!\n<extra_id_1>User\nBye"
    for prompt in (opened, f"{opened}\n<extra_id_1>Assistant\n", f"{opened}\n<extra_id_1>Assistant"):
        for ends in (prompt, prompt.replace("\n", "\r\n")):
            assert prompts(ends)[0][0] == turns
    assert prompts("<extra_id_0>System\nBe brief.")[0].startswith("a prompt with <extra_id_ in its text")


def test_a_label_of_a_step_that_the_map_lacks_is_named():
    raw = {"prompt": "2 + 3?", "completions": ["5.", "So 5."], "labels": ["good", "fair"]}
    found = labels("stepwise", raw, label_map={"good": 1, "bad": 0})
    assert found == [1.0, "its label is 'fair', which label_map does not contain"]


# Files of text


def test_classes_go_by_their_names():
    """A label "good" of the classes good and bad was 0, its number."""
    rows = Dataset.from_dict({"prompt": ["Hi"], "completion": ["Go."], "label": [0]})
    with pytest.raises(ValueError, match="The dataset has labels of the classes good, bad"):
        convert("kto", rows.cast_column("label", ClassLabel(names=["good", "bad"])))
    rows = rows.cast_column("label", ClassLabel(names=["1", "0"]))
    for raw in (rows, rows.to_iterable_dataset()):
        assert convert("kto", raw)[0]["label"][:] == [1]


def test_numbers_of_a_csv_file(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "rated.csv").write_text(
        "prompt,response,helpfulness,correctness,coherence,complexity,verbosity\nHi,Hello!,3,4,4,1,1\nHi,Go.,none,0,0,0,0\n"
    )
    rows, account = convert("helpsteer", load_rows(tmp_path / "rated.csv")["train"])
    assert (rows["label"][:], account.answers) == ([3.0], 2)
    (tmp_path / "shp.csv").write_text("post_id,history,human_ref_A,human_ref_B,score_A,score_B\na,Hi?,Yes,No,7,3\n")
    rows, _ = convert("votes", load_rows(tmp_path / "shp.csv")["train"])
    assert rows["label"][:] == [3.0, 2.0]


def test_turns_with_other_names(tmp_path):
    turns = [{"role": "human", "content": "Hi"}, {"role": "Model", "content": "Hello!"}]
    named = [{"from": "Human", "value": "Hi"}, {"from": "bot", "value": "Hello!"}]
    for each in (turns, named, [USER, GOOD]):
        assert outcomes("messages", {"messages": each, "label": 0}) == [(["Hi"], "Hello!", 0.0, False)]
        assert outcomes("sharegpt", {"conversations": each, "label": 0}) == [(["Hi"], "Hello!", 0.0, False)]
        assert outcomes("demonstrations", {"messages": each}) == [(["Hi"], "Hello!", 1.0, True)]
        labeled = [each[0], each[1] | {"label": 0}]
        assert outcomes("turns", {"messages": labeled}) == [(["Hi"], "Hello!", 0.0, False)]
    [row] = find("messages").read([{"messages": turns, "label": 0}])
    assert [turn["role"] for turn in row["prompt"] + row["completion"]] == ["user", "assistant"]


def test_variants_of_public_datasets():
    conversations = {f"conversation_{half}": [USER, GOOD] for half in "ab"}
    assert labels("arena", {"winner": "both_bad"} | conversations) == [0.0, 0.0]
    raw = {"instruction": "Sum up.", "context": "It was hot.", "output": "Hot."}
    assert outcomes("alpaca", raw) == [(["Sum up.\n\nIt was hot."], "Hot.", 1.0, True)]
    answer = {"response": "Hello!", "annotations": [{"aspect": "honesty", "Rating": "5"}]}
    raw = {"instruction": "Hi", "completions": [answer]}
    assert labels("ultrafeedback", raw, aspect="honesty") == ["its label is not a number"]
    raw = {"info": {"post": "It was hot."}, "summary": {"text": "Hot.", "axes": [7]}, "worker": "a"}
    assert labels("tldr", raw) == ["its label is not a number"]
