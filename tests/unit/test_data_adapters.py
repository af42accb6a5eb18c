"""Raw rows of each family as pointwise rows: what they become, what is left out, and that nothing else happens."""

import gzip
import json
import re
from collections import Counter

import pytest
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ulma.data.adapters import FAMILIES, SAME, LeftOut, Noted, find
from trl_ulma.data.conversations import ASSISTANT, HUMAN, parse_transcript, split_transcript, split_turns
from trl_ulma.data.convert import SAME_SPEAKER, convert
from trl_ulma.data.demonstrations import demonstrations
from trl_ulma.data.files import check_splits, load_rows
from trl_ulma.data.hh import NAME_IN_TEXT, PREFIX, golden_hh, hh
from trl_ulma.data.logged import logged
from trl_ulma.data.mix import mix
from trl_ulma.data.pairs import WORSE, pairs
from trl_ulma.data.qa_feedback import (
    CHANGES_NOTHING,
    NO_CORRECTION,
    NO_PASSAGES,
    NONE_CITED,
    NOTHING_WRONG,
    qa_feedback,
)
from trl_ulma.data.red_team import red_team
from trl_ulma.data.summary import summarize
from trl_ulma.data.votes import SEEN, votes

HI = "\n\nHuman: Hi\n\nAssistant:"
HUMAN_LAST, EMPTY, NO_TURN = "it ends in a human turn", "its answer is empty", "it is not a transcript with `Human:`"


def turns(*contents):
    """Turns of user and assistant, in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def as_transcript(messages) -> str:
    marker = {"user": HUMAN, "assistant": ASSISTANT}
    return "".join(f"{marker[turn['role']]} {turn['content']}" for turn in messages)


def shape(outcomes):
    """(completion, label, demonstration) of rows, the reason or finding of all else."""
    return [
        each.why
        if isinstance(each, LeftOut)
        else each.what
        if isinstance(each, Noted)
        else (each["completion"][-1]["content"], each["label"], each["sft_mask"])
        for each in outcomes
    ]


def counts(found) -> dict[str, int]:
    return {what: each.count for what, each in found.items()}


# Transcripts

PIECES = st.sampled_from(
    [
        "a",
        "é",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "Human",
        "Human:",
        " Human: b",
        "\nAssistant:",
        "Assistant",
        ":",
        "\u2028",
    ]
)
TEXTS = st.lists(PIECES, max_size=8).map("".join).filter(lambda text: not re.search("\n\n(Human|Assistant):", text))
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": TEXTS}), min_size=1, max_size=6
)


@settings(deadline=None, derandomize=True, database=None)
@given(MESSAGES)
def test_any_transcript_built_from_turns_parses_back_to_them(messages):
    assert parse_transcript(as_transcript(messages)) == messages


@settings(deadline=None, derandomize=True, database=None)
@given(MESSAGES)
def test_the_cut_is_where_the_trainers_cut(messages):
    transcript = as_transcript(messages)
    try:
        prompt, completion = split_turns(transcript)
    except ValueError as error:
        with pytest.raises(ValueError, match=re.escape(str(error))):
            split_transcript(transcript)
        assert messages[-1]["role"] == "user"
        return
    assert prompt + completion == messages
    assert split_transcript(transcript) == (as_transcript(prompt) + ASSISTANT, f" {completion[0]['content']}")


@pytest.mark.parametrize(
    ("transcript", "messages"),
    [
        ("\n\nHuman:Hi\n\nAssistant:Hello", turns("Hi", "Hello")),
        ("\n\nHuman:  Hi \n\n\nAssistant: Hello\n", turns(" Hi \n", "Hello\n")),
        ("Human: Hi\n\nAssistant: Hello", turns("Hi", "Hello")),
        ("\n\n\n Human: Hi\n\nAssistant: Hello", turns("Hi", "Hello")),
        ("\n\nHuman: So?\nAssistant: no turn\n\nAssistant: Hello", turns("So?\nAssistant: no turn", "Hello")),
        ("\n\nHuman: Hi\n\nAssistant:", turns("Hi", "")),
    ],
)
def test_what_a_marker_is(transcript, messages):
    assert parse_transcript(transcript) == messages


@pytest.mark.parametrize(
    ("transcript", "message"),
    [
        ("Hello", NO_TURN),
        ("", NO_TURN),
        ("Once:\n\nHuman: Hi\n\nAssistant: Hello", "it has text before its first turn"),
        (HI + " Hello\n\nHuman: Bye", HUMAN_LAST),
        ("\n\nHuman: Hi", "it has no assistant turn"),
        (None, "it is not text"),
        ([turns("Hi")], "it is not text"),
    ],
)
def test_a_transcript_without_an_answer(transcript, message):
    with pytest.raises(ValueError, match=message):
        split_turns(transcript)


# HH


def test_a_pair_is_two_rows():
    raw = {
        "chosen": f"{HI} Hello!\n\nHuman: Bye\n\nAssistant: Bye.",
        "rejected": f"{HI} Go.\n\nHuman: ?\n\nAssistant: No",
    }
    good, bad = hh([raw])
    assert good == {
        "prompt": turns("Hi", "Hello!", "Bye"),
        "completion": [{"role": "assistant", "content": "Bye."}],
        "label": 1.0,
        "sft_mask": True,
        "label_type": "binary",
    }
    assert bad["prompt"] == turns("Hi", "Go.", "?")
    assert (bad["label"], bad["sft_mask"]) == (0.0, False)
    assert list(golden_hh([raw])) == [good, bad]
    assert list(hh([raw], liked=True)) == [good | {"sft_mask": False}, bad]


@pytest.mark.parametrize(
    ("chosen", "rejected", "outcomes"),
    [
        (f"{HI} A", f"{HI} A\n\nHuman: b\n\nAssistant: C", [PREFIX, ("A", 1.0, True), ("C", 0.0, False)]),
        (f"{HI} A\n\nHuman: b", f"{HI} C", [HUMAN_LAST, ("C", 0.0, False)]),
        (f"{HI} A", f"{HI} A", [SAME, SAME]),
        (None, f"{HI} A", ["it is not text", ("A", 0.0, False)]),
        (f"{HI} A  Human: b", f"{HI} C", [NAME_IN_TEXT, ("A  Human: b", 1.0, True), ("C", 0.0, False)]),
    ],
)
def test_oddities_of_a_pair(chosen, rejected, outcomes):
    assert shape(hh([{"chosen": chosen, "rejected": rejected}])) == outcomes


def test_empty_answers_and_missing_prompts_are_left_out_and_counted():
    raw = [
        {"chosen": f"{HI} Yes", "rejected": f"{HI} "},
        {"chosen": f"{HI}\n\nHuman: \n\nAssistant: Y", "rejected": "\n\nAssistant: N"},
        {"chosen": "\n\nHuman:  \n\nAssistant: Y", "rejected": f"{HI} \n\n"},
    ]
    rows, account = convert("hh", Dataset.from_list(raw))
    assert [row["completion"][0]["content"] for row in rows] == ["Yes", "Y"]
    assert (account.rows_in, account.answers, account.rows_out) == (3, 6, 2)
    assert counts(account.left_out) == {EMPTY: 2, "its prompt is empty": 2}
    assert account.left_out["its prompt is empty"].first_row == 1


ODD_HALVES = st.none() | st.sampled_from(["", "x", HI, f"{HI} A"]) | MESSAGES.map(as_transcript)


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(st.lists(st.fixed_dictionaries({"chosen": ODD_HALVES, "rejected": ODD_HALVES}), min_size=1, max_size=8))
def test_every_half_is_a_row_or_counted_and_no_text_is_changed(raw):
    raw.append({"chosen": f"{HI} Yes", "rejected": f"{HI} No"})
    rows, account = convert("hh", Dataset.from_list(raw))
    assert account.rows_in == len(raw)
    assert account.answers == 2 * len(raw)
    assert account.rows_out == len(rows)
    halves = {half for pair in raw for half in pair.values() if half is not None}
    assert {as_transcript(row["prompt"] + row["completion"]) for row in rows} <= halves | {h + " " for h in halves}


def test_one_speaker_twice_is_noted_or_left_out():
    raw = {"chosen": f"{HI} A\n\nAssistant: B", "rejected": f"{HI} C"}
    rows, account = convert("hh", Dataset.from_list([raw]))
    assert rows[0]["prompt"] == turns("Hi", "A")
    assert (counts(account.noted), account.left_out) == ({SAME_SPEAKER: 1}, {})
    rows, account = convert("hh", Dataset.from_list([raw]), alternating=True)
    assert [row["completion"][0]["content"] for row in rows] == ["C"]
    assert counts(account.left_out) == {SAME_SPEAKER: 1}


# Red team


@pytest.mark.parametrize(
    ("transcript", "rating", "outcome"),
    [
        (f"{HI} No.\n", 0.0, ("No.\n", 0.0, True)),
        (f"{HI} Sure.", 3, ("Sure.", -3.0, False)),
        (f"{HI} Sure.", 4.0, ("Sure.", -4.0, False)),
        (f"{HI} Sure.", "4.0", ("Sure.", -4.0, False)),
        (f"{HI} Sure.\n\nHuman: Thanks", 4.0, HUMAN_LAST),
        *((f"{HI} Sure.", rating, "its rating is not a number") for rating in (None, "much", True)),
        *((f"{HI} Sure.", rating, "its label is outside [0, 4], the scale of this rating") for rating in (5, -1)),
    ],
)
def test_a_rated_transcript(transcript, rating, outcome):
    [row] = raw = list(red_team([{"transcript": transcript, "rating": rating, "tags": None}]))
    assert shape(raw) == [outcome]
    if isinstance(row, dict):
        assert row["label_type"] == "continuous"
        assert str(row["label"]) != "-0.0"


def test_an_array_in_a_jsonl_file_with_null_tags(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    raw = [{"transcript": f"{HI} No {i}.", "rating": i % 5, "num_params": "52B", "tags": None} for i in range(6)]
    raw[4]["tags"] = ["Theft"]
    for name, text in (("array.jsonl", json.dumps(raw)), ("lines.jsonl", "\n".join(map(json.dumps, raw)))):
        (tmp_path / name).write_text(text)
        rows, account = convert("red-team", load_rows(tmp_path / name)["train"])
        assert (account.answers, account.rows_out, account.rows_in) == (6, 6, 6)
        assert rows["label"][:] == [0, -1, -2, -3, -4, 0]


def test_tags_that_are_null_for_ten_megabytes(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    row = {"transcript": f"{HI} {'No. ' * 50_000}", "rating": 1.0}
    lines = [json.dumps(row | {"tags": None})] * 60 + [json.dumps(row | {"tags": ["Theft"]})]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    rows = load_rows(tmp_path / "rows.jsonl")["train"]
    assert (len(rows), rows[0]["tags"], rows[60]["tags"]) == (61, None, ["Theft"])


# QA-feedback

CITED = {"error type": "Missing-Answer", "passage_id": 2, "sentence_id": [1]}
QUESTION = {
    "question": "Capital?",
    "passages": [["France", "It is in Europe.", "Lyon is big."], ["Paris", "Paris\n\nIt is the capital."]],
    "gold": "Paris.",
    "prediction 1": "Lyon.",
    "prediction 2": "Paris, I think.",
    "prediction 3": "Europe.",
    "prediction 4": "Rome.",
    "feedback": {
        "errors": [{"error type": "Irrelevant", "start": 0, "end": 4}],
        "missing-info": [CITED],
        "corrected-prediction": "Paris. ",
    },
    "preference": [2, 0, 1, 1, 1, 2],
}


def question(**feedback):
    return QUESTION | {"feedback": QUESTION["feedback"] | feedback}


def test_a_correction_and_a_flawed_prediction():
    good, bad = qa_feedback([QUESTION])
    prompt = "France\nIt is in Europe. Lyon is big.\n\nParis\nParis\n\nIt is the capital.\n\nCapital?"
    assert good["prompt"] == bad["prompt"] == turns(prompt)
    assert shape([good, bad]) == [("Paris. ", 1.0, True), ("Lyon.", 0.0, False)]
    assert good["label_type"] == bad["label_type"] == "binary"


def test_a_question_with_an_empty_passage_or_equal_predictions_does_not_stop_the_rest():
    found = list(qa_feedback([QUESTION | {"passages": [[]]}, QUESTION]))
    assert [isinstance(each, LeftOut) for each in found] == [True, True, False, False]
    same = list(qa_feedback([QUESTION | {"prediction 2": "Rome."}], wins=True))
    assert [isinstance(each, LeftOut) for each in same] == [False, False, True, False, True]


def test_passages_that_are_cited_or_none():
    [good, _] = qa_feedback([QUESTION], passages="cited")
    assert good["prompt"] == turns("Paris\nParis\n\nIt is the capital.\n\nCapital?")
    note, good, _ = qa_feedback([question(**{"missing-info": []})], passages="cited")
    assert note.what == NONE_CITED
    assert good["prompt"][0]["content"].startswith("France\n")
    [good, _] = qa_feedback([QUESTION], passages="none")
    assert good["prompt"] == turns("Capital?")
    note, good, _ = qa_feedback([QUESTION | {"passages": []}])
    assert (note.what, good["prompt"]) == (NO_PASSAGES, turns("Capital?"))


@pytest.mark.parametrize(
    ("feedback", "outcomes"),
    [
        ({"errors": [], "missing-info": [], "corrected-prediction": "Lyon. "}, [NOTHING_WRONG] * 2),
        ({"errors": [], "missing-info": [], "corrected-prediction": ""}, [NOTHING_WRONG] * 2),
        ({"corrected-prediction": " Lyon."}, [CHANGES_NOTHING] * 2),
        ({"corrected-prediction": " "}, [NO_CORRECTION, ("Lyon.", 0.0, False)]),
        ({"errors": []}, [("Paris. ", 1.0, True), ("Lyon.", 0.0, False)]),
        ({"errors": [], "missing-info": []}, [("Paris. ", 1.0, True), ("Lyon.", 0.0, False)]),
    ],
)
def test_what_was_wrong(feedback, outcomes):
    assert shape(qa_feedback([question(**feedback)])) == outcomes


def test_wins_are_continuous_labels():
    rows = list(qa_feedback([QUESTION], wins=True))
    assert len(rows) == 5
    # 2 beats 1, 3 and 4; 3 ties with 1, and loses to 2 and 4; 4 loses to 1 and 2, and beats 3
    assert shape(rows[2:]) == [
        ("Paris, I think.", 1.0, False),
        ("Europe.", pytest.approx(-2 / 3), False),
        ("Rome.", pytest.approx(-1 / 3), False),
    ]
    assert [row["label_type"] for row in rows] == ["binary"] * 2 + ["continuous"] * 3


@pytest.mark.parametrize(
    ("broken", "wins"),
    [
        ({"feedback": None}, False),
        ({"question": None}, False),
        ({"prediction 1": None}, False),
        ({"preference": [1, 2]}, True),
        ({"preference": [1, 2, 3, 0, 0, 0]}, True),
        ({"prediction 3": None}, True),
        ({"feedback": QUESTION["feedback"] | {"missing-info": [CITED | {"passage_id": 3}]}}, False),
    ],
)
def test_broken_questions_are_left_out(broken, wins):
    outcomes = shape(qa_feedback([QUESTION | broken], wins=wins, passages="cited"))
    assert outcomes == ["a field of its question is missing or invalid"] * (5 if wins else 2)


def test_an_unknown_choice_of_passages():
    with pytest.raises(ValueError, match=r"passages is 'gold'; it must be one of \('all', 'cited', 'none'\)"):
        list(qa_feedback([QUESTION], passages="gold"))


# Votes


def test_stack_exchange():
    answers = [
        {"text": "Boil it.", "pm_score": 4, "selected": True, "author": "a"},
        {"text": "Dunno.", "pm_score": -1, "selected": False},
        {"text": "Fry it.", "pm_score": None, "selected": False},
        {"text": None, "pm_score": 2, "selected": False},
    ]
    raw = {"qid": 1, "question": "An egg?", "answers": answers}
    rows, account = convert("votes", Dataset.from_list([raw, raw | {"answers": []}, raw | {"answers": None}]))
    assert shape(rows) == [("Boil it.", 4.0, False), ("Dunno.", -1.0, False)]
    assert set(rows["label_type"]) == {"continuous"}
    assert rows[0]["prompt"] == turns("An egg?")
    assert counts(account.left_out) == {
        "its votes are not a number": 1,
        "its answer is not text": 1,
        "its question has no answers": 2,
    }
    assert [row["sft_mask"] for row in votes([raw], accepted=True) if isinstance(row, dict)] == [True, False, False]


@pytest.mark.parametrize(("count", "log"), [(0, 0.0), (1, 1.0), (7, 3.0), (-7, -3.0)])
def test_votes_as_they_are_and_their_logarithm(count, log):
    raw = {"question": "An egg?", "answers": [{"text": "Boil it.", "score": count}]}
    assert shape(votes([raw])) == [("Boil it.", log, False)]
    assert shape(votes([raw], label="votes")) == [("Boil it.", count, False)]


def shp(post, a, b, **other):
    texts = {"human_ref_A": a, "human_ref_B": b, "score_A": len(a or ""), "score_B": 15, "labels": 1}
    return {"post_id": post, "history": f"post {post}", **texts, **other}


def test_shp_answers_are_not_repeated():
    raw = [
        shp("p", "one", "two"),
        shp("p", "one", "three"),
        shp("q", "one", "two"),
        shp("q", None, "four", score_B=None),
    ]
    rows, account = convert("votes", IterableDataset.from_generator(lambda: iter(raw)))
    assert [(row["prompt"][0]["content"], row["completion"][0]["content"], row["label"]) for row in rows] == [
        ("post p", "one", 2.0),
        ("post p", "two", 4.0),
        ("post p", "three", 4.0),
        ("post q", "one", 2.0),
        ("post q", "two", 4.0),
    ]
    assert (account.rows_in, account.answers) == (4, 8)
    assert counts(account.left_out) == {SEEN: 1, "its answer is not text": 1, "its votes are not a number": 1}


@pytest.mark.parametrize(
    ("raw", "options", "message"),
    [
        ({"question": "?", "answers": [{"text": "a", "pm_score": 1}]}, {"label": "votes"}, "have a `pm_score`"),
        (
            {"question": "?", "answers": [{"text": "a", "pm_score": 1}]},
            {"accepted": True},
            "have no information on accepted answers",
        ),
        (shp("p", "a", "b"), {"accepted": True}, "SHP has no information on accepted answers"),
        (shp("p", "a", "b"), {"label": "ln"}, r"label is 'ln'; it must be one of \('log', 'votes'\)"),
    ],
)
def test_options_that_the_votes_cannot_serve(raw, options, message):
    with pytest.raises(ValueError, match=message):
        list(votes([raw], **options))


# Pairs and demonstrations

SYSTEM = [{"role": "system", "content": "Be kind."}]
GOOD, BAD = [{"role": "assistant", "content": "Hello!"}], [{"role": "assistant", "content": "Go."}]


@pytest.mark.parametrize(
    ("raw", "prompt"),
    [
        ({"prompt": "Hi", "chosen": "Hello!", "rejected": "Go."}, turns("Hi")),
        ({"prompt": turns("Hi"), "chosen": GOOD, "rejected": BAD}, turns("Hi")),
        ({"prompt": turns("Hi"), "chosen": "Hello!", "rejected": "Go."}, turns("Hi")),
        ({"chosen": SYSTEM + turns("Hi") + GOOD, "rejected": SYSTEM + turns("Hi") + BAD}, SYSTEM + turns("Hi")),
        ({"prompt": "Hi", "chosen": turns("Hi") + GOOD, "rejected": turns("Hi") + BAD}, turns("Hi")),
        ({"prompt": " Hi", "chosen": turns("Hi ") + GOOD, "rejected": turns("Hi ") + BAD}, turns("Hi ")),
        ({"prompt": HI, "chosen": turns("Hi") + GOOD, "rejected": turns("Hi") + BAD}, turns("Hi")),
        ({"prompt": SYSTEM + turns("Hi"), "chosen": turns("Hi") + GOOD, "rejected": turns("Hi") + BAD},
         SYSTEM + turns("Hi")),
        ({"prompt": SYSTEM, "chosen": turns("Hi") + GOOD, "rejected": turns("Hi") + BAD}, SYSTEM + turns("Hi")),
        ({"prompt": turns("Hi"), "chosen": SYSTEM + turns("Hi") + GOOD, "rejected": SYSTEM + turns("Hi") + BAD},
         SYSTEM + turns("Hi")),
        ({"chosen": f"{HI} Hello!", "rejected": f"{HI} Go."}, turns("Hi")),
        ({"prompt": HI, "chosen": " Hello!", "rejected": " Go."}, turns("Hi")),
        ({"prompt": HI, "chosen": f"{HI} Hello!", "rejected": f"{HI} Go."}, turns("Hi")),
        ({"prompt": "Hi", "chosen": f"{HI} Hello!", "rejected": f"{HI} Go."}, turns("Hi")),
        ({"prompt": "Hi", "chosen": f"{HI} Hello!".strip(), "rejected": f"{HI} Go.".strip()}, turns("Hi")),
        ({"prompt": f"{HI} A{HUMAN} B", "chosen": f"{ASSISTANT} Hello!", "rejected": f"{ASSISTANT} Go."},
         turns("Hi", "A", "B")),
        ({"prompt": "Hi", "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "Hello!"}]}],
          "rejected": [BAD[0] | {"tool_calls": None}]}, turns("Hi")),
    ],
)  # fmt: skip
def test_layouts_of_pairs(raw, prompt):
    good, bad = pairs([raw])
    assert (good["prompt"], good["completion"], good["label"], good["sft_mask"]) == (prompt, GOOD, 1.0, True)
    assert (bad["prompt"], bad["completion"], bad["label"], bad["sft_mask"]) == (prompt, BAD, 0.0, False)


def test_texts_without_a_prompt_are_cut_where_they_part():
    rows = list(pairs([{"chosen": "The sky is blue.", "rejected": "The sky is green."}]))
    assert [row["prompt"] for row in rows] == [turns("The sky is")] * 2
    assert shape(rows) == [(" blue.", 1.0, True), (" green.", 0.0, False)]


def test_columns_of_pairs_that_go_along():
    raw = {"prompt": "Hi", "chosen": "Hello!", "rejected": "Go.", "weight": 2, "log_z": 0.5, "sft_mask": False, "id": 7}
    rows, _ = convert("pairs", Dataset.from_list([raw]))
    assert rows["weight"][:] == [2.0, 2.0]
    assert rows["log_z"][:] == [0.5, 0.5]
    assert rows["sft_mask"][:] == [False, False]
    assert "id" not in rows.column_names
    assert shape(pairs([{"prompt": "Hi", "chosen": "A", "rejected": "B"}], liked=True))[0] == ("A", 1.0, False)
    with pytest.raises(ValueError, match="The pairs have an `sft_mask`"):
        list(pairs([raw], liked=True))


def test_the_label_of_a_pair_is_ignored_with_a_note():
    pair = {"prompt": "Hi", "chosen": "Hello!", "rejected": "Go."}
    [said] = check_splits({"train": Dataset.from_list([pair | {"label": 0}])}, "pairs.jsonl")
    assert said.startswith("pairs.jsonl: the column label is ignored, because of each pair the chosen answer is good")
    assert check_splits({"train": Dataset.from_list([pair | {"label": None}])}, "pairs.jsonl") == []


@pytest.mark.parametrize("names", [("score_chosen", "score_rejected"), ("chosen-rating", "rejected-rating")])
@pytest.mark.parametrize("as_text", [False, True])
def test_pairs_whose_scores_say_the_opposite_are_counted(names, as_text):
    pair = {"prompt": "Hi", "chosen": "Hello!", "rejected": "Go."}
    both = ((5, 1), (2, 2), (1, 5), (None, 1))
    both = [[each if each is None or not as_text else str(each) for each in scores] for scores in both]
    scored = [pair | dict(zip(names, scores, strict=True)) for scores in both]
    _, account = convert("pairs", Dataset.from_list(scored))
    assert counts(account.noted) == {WORSE.format(*names): 1}
    [said] = check_splits({"train": Dataset.from_list(scored)}, "pairs.jsonl")
    assert said.startswith("pairs.jsonl: 1 of its first 4 pairs have a {} below their {}".format(*names))
    assert not check_splits({"train": Dataset.from_list(scored[:2])}, "pairs.jsonl")


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        ({"rejected": "Hello!"}, {SAME: 2}),
        ({"rejected": " "}, {EMPTY: 1}),
        ({"prompt": ""}, {"its prompt is empty": 2}),
        ({"prompt": None}, {"its prompt is neither text nor messages": 2}),
        ({"weight": None}, {"its weight is not a finite number": 2}),
        ({"weight": float("nan")}, {"its weight is not a finite number": 2}),
        ({"sft_mask": None}, {"its sft_mask is neither true nor false": 1}),
        ({"tools": ["search"]}, {"it has tools or chat_template_kwargs: train on the pairs without conversion": 2}),
    ],
)
def test_pairs_that_are_left_out(change, reasons):
    usual = {"prompt": "Hi", "chosen": "Hello!", "rejected": "Go.", "weight": 1.0, "sft_mask": True, "tools": None}
    good = {name: usual[name] for name in ("prompt", "chosen", "rejected", *change)}
    rows, account = convert("pairs", IterableDataset.from_generator(lambda: iter([good, good | change])))
    assert counts(account.left_out) == reasons
    assert account.answers == 4
    assert len(rows) == 4 - sum(reasons.values())


@pytest.mark.parametrize("prompt", ["Be kind.", turns("Ho"), [SYSTEM[0] | {"content": "Be cruel."}, *turns("Ho")]])
@pytest.mark.parametrize("system", [[], SYSTEM])
def test_conversations_that_do_not_repeat_their_prompt_are_left_out(prompt, system):
    halves = {"chosen": system + turns("Hi") + GOOD, "rejected": system + turns("Hi") + BAD}
    if prompt == "Be kind." and system:
        assert len(list(pairs([halves | {"prompt": prompt}]))) == 2
    else:
        why = "it is a whole conversation that does not contain its prompt"
        assert shape(pairs([halves | {"prompt": prompt}])) == [why] * 2


def test_transcripts_that_do_not_repeat_their_prompt_are_left_out():
    [why] = shape(demonstrations([{"prompt": "Ho", "completion": f"{HI} Hello!"}]))
    assert why == "it is a whole transcript that does not contain its prompt"
    assert shape(pairs([{"prompt": "Ho", "chosen": f"{HI} Hello!", "rejected": f"{HI} Go."}])) == [why] * 2
    # Answers that begin alike keep what they begin with
    alike = {"chosen": "Human: Hi\n\nAssistant: I do.", "rejected": "Human: Hi\n\nAssistant: I don't."}
    assert [each[0] for each in shape(pairs([{"prompt": "Hi", **alike}]))] == ["I do.", "I don't."]


def test_turns_that_hold_more_than_text():
    call = [{"role": "assistant", "content": None, "tool_calls": [{"name": "search"}]}]
    picture = [{"role": "assistant", "content": [{"type": "image", "image": "x"}]}]
    outcomes = shape(pairs([{"prompt": turns("Hi"), "chosen": call, "rejected": picture}]))
    assert outcomes == ["one of its turns contains more than text, such as tool calls or images"] * 2
    thought = [{"role": "assistant", "content": "Yes", "reasoning_content": "Hm."}]
    assert shape(demonstrations([{"prompt": turns("Hi"), "completion": thought}])) == outcomes[:1]
    outcomes = shape(pairs([{"prompt": turns("Hi"), "chosen": turns("Ho"), "rejected": BAD}]))
    assert outcomes == ["its answer begins with a turn of 'user'", ("Go.", 0.0, False)]


@pytest.mark.parametrize(
    "raw",
    [
        {"prompt": "Hi", "completion": "Hello!"},
        {"prompt": turns("Hi"), "completion": GOOD},
        {"messages": turns("Hi") + GOOD},
        {"prompt": HI, "completion": " Hello!"},
        {"prompt": HI, "completion": f"{HI} Hello!"},
        {"prompt": "Hi", "completion": f"{HI} Hello!"},
    ],
)
def test_layouts_of_demonstrations(raw):
    [row] = demonstrations([raw])
    assert (row["prompt"], row["completion"]) == (turns("Hi"), GOOD)
    assert (row["label"], row["sft_mask"], row["label_type"]) == (1.0, True, "binary")


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        ({"messages": turns("Hi")}, "it does not end in an assistant turn"),
        (
            {"messages": [*turns("Hi"), GOOD[0] | {"label": 0}]},
            "its turns have labels, so it is turns data and not demonstrations",
        ),
        (
            {"messages": None},
            "its conversation is not a list of turns with a role and content, or with `from` and `value`",
        ),
        ({"prompt": 5, "completion": "a"}, "its prompt is neither text nor messages"),
    ],
)
def test_demonstrations_that_are_left_out(raw, why):
    assert shape(demonstrations([raw])) == [why]


@pytest.mark.parametrize("family", ["sharegpt", "demonstrations"])
@pytest.mark.parametrize("names", [("from", "value"), ("role", "content")])
def test_marks_of_turns_are_not_dropped(family, names):
    who, what = names
    asked = {who: "user", what: "Hi"}
    column = "conversations" if family == "sharegpt" else "messages"

    def converted(**marks):
        return shape(find(family).read([{column: [asked, {who: "assistant", what: "Go.", **marks}]}]))

    assert converted() == [("Go.", 1.0, True)]
    assert converted(label=0) == ["its turns have labels, so it is turns data and not demonstrations"]
    noted, row = converted(weight=0)
    assert noted.startswith("a message of its answer is marked as not to be learned")
    assert row == ("Go.", 1.0, True)
    for mark in ("train", "training", "loss"):  # of Axolotl and others
        assert converted(**{mark: False}) == [noted, row]
        assert converted(**{mark: True}) == [row]
    [last] = find("turns").read([{"messages": [asked, {who: "assistant", what: "Go.", "label": 0}]}])
    assert (last["label"], last["completion"]) == (0.0, [{"role": "assistant", "content": "Go."}])


def test_a_label_below_a_scale_is_not_left_out_for_being_low():
    raw = [{"prompt": "q", "completions": ["a", "b", "c"], "labels": [1, 0, -1]}] * 4
    with pytest.raises(
        ValueError, match=r"4 of 12 answers are left out because its label is outside \[0, 1\].*label_map"
    ):
        convert("stepwise", raw)
    rows, _ = convert("stepwise", raw, label_map={"-1": 0, "0": 0.5, "1": 1})
    assert rows["label"][:3] == [1.0, 0.5, 0.0]


@pytest.mark.parametrize(
    ("given", "prompt"),
    [({"input": "", "context": "2+2"}, "Add\n\n2+2"), ({"input": "2+2"}, "Add\n\n2+2"), ({"context": None}, "Add")],
)
def test_an_empty_input_does_not_hide_a_context(given, prompt):
    [row] = find("alpaca").read([{"instruction": "Add", "output": "4", **given}])
    assert row["prompt"][-1]["content"] == prompt
    both = {"instruction": "Add", "output": "4", "input": "2", "context": "3"}
    assert shape(find("alpaca").read([both])) == ["it has both an input and a context"]


def test_a_score_that_is_better_if_it_is_low_is_told():
    def noted(name, **options):
        answers = [(f"{i}?", "So.", {name: [i % 2]}) for i in range(4)]
        return [found.what for found in logged(answers, **options) if isinstance(found, Noted)]

    first, *others = noted("hallucination")
    assert others == [first] * 3
    assert "a low `hallucination` looks better" in first
    assert "--liked" in first
    assert "--liked" not in noted("hallucination", liked=True)[0]
    assert noted("correctness") == noted("hallucination", label_map={"0": 1, "1": 0}) == []


def test_a_map_of_labels_has_words_as_people_write_them():
    raw = {"prompt": "Hi", "completions": ["a", "b"], "labels": ["Yes", "NO"]}
    rows, _ = convert("stepwise", Dataset.from_list([raw]), label_map={"Yes": 1, "No": 0})
    assert rows["label"][:] == [1.0, 0.0]


# Messages with further keys


def test_further_keys_of_messages_are_kept():
    first = [{"role": "user", "content": "Hi", "name": "Ann"}, {"role": "assistant", "content": "Hello!", "weight": 0}]
    second = [{"role": "user", "content": "Hi", "id": 7}, {"role": "assistant", "content": "Yes", "language": "en"}]
    rows, account = convert(
        "demonstrations", IterableDataset.from_generator(lambda: iter([{"messages": m} for m in (first, second)]))
    )
    assert (account.answers, account.rows_out) == (2, 2)
    [(noted, found)] = account.noted.items()
    assert (noted.startswith("a message of its answer is marked as not to be learned"), found.count) == (True, 1)
    found = [
        {key: value for key, value in turn.items() if value is not None}
        for turn in rows[0]["prompt"] + rows[0]["completion"]
    ]
    assert found == first
    assert rows[1]["completion"][0]["language"] == "en"
    assert rows[1]["prompt"][0]["id"] == 7


def test_empty_lists_in_messages_are_no_more_than_text():
    """Replies of OpenAI have `annotations: []`, and their rows were left out for images or tool calls."""
    answer = {"role": "assistant", "content": "Yes", "refusal": None, "annotations": [], "tool_calls": []}
    part = {"type": "text", "text": "Yes", "citations": []}
    for content in ("Yes", [part]):
        [row] = demonstrations([{"prompt": turns("Hi"), "completion": [answer | {"content": content}]}])
        assert row["completion"] == [{"role": "assistant", "content": "Yes"}]


def test_further_keys_of_messages_may_differ(monkeypatch):
    monkeypatch.setattr("trl_ulma.data.convert._CHUNK", 1)
    raw = [
        {"messages": [{"role": "user", "content": "Hi", **more}, *GOOD]}
        for more in ({}, {"id": 1}, {"id": "a"}, {"n": 0.5})
    ]
    rows, _ = convert("demonstrations", IterableDataset.from_generator(lambda: iter(raw)))
    found = [{k: v for k, v in row["prompt"][0].items() if v is not None} for row in rows]
    assert [{k: v for k, v in turn.items() if k not in ("role", "content")} for turn in found] == [
        {},
        {"id": "1"},
        {"id": "a"},
        {"n": 0.5},
    ]


# All families


def test_the_columns_tell_the_family():
    with pytest.raises(ValueError) as caught:
        convert("votes", Dataset.from_list([{"transcript": "x", "rating": 1}]))
    assert str(caught.value) == (
        "votes data must have the columns question, answers or post_id, history, human_ref_A, human_ref_B, score_A, "
        "score_B; found transcript, rating. It looks like red-team."
    )
    with pytest.raises(ValueError, match=r"hh data must not have the column prompt; found .*\. It looks like pairs\.$"):
        convert("hh", Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]))
    with pytest.raises(ValueError, match=r"These are already pointwise rows\. Train on them directly\.$"):
        convert("demonstrations", Dataset.from_list([{"prompt": "a", "completion": "b", "label": 1}]))
    with pytest.raises(ValueError, match=r"red-team data must have the columns transcript, rating; found text\.$"):
        convert("red-team", Dataset.from_list([{"text": "a"}]))


def test_data_of_which_nothing_is_left():
    message = (
        r"None of the 2 raw rows could be converted: 4 times it is not a transcript.* \(first in raw row 0\)\. "
        r"Check that this is hh"
    )
    with pytest.raises(ValueError, match=message):
        convert("hh", Dataset.from_list([{"chosen": "a", "rejected": "b"}] * 2))
    with pytest.raises(ValueError, match="contains no rows"):
        convert("hh", Dataset.from_dict({"chosen": [], "rejected": []}))


def test_chunks_are_one_data_set(monkeypatch):
    monkeypatch.setattr("trl_ulma.data.convert._CHUNK", 3)
    raw = [{"prompt": f"p{i}", "completion": "c"} for i in range(7)]
    rows, account = convert("demonstrations", Dataset.from_list(raw))
    assert [row["prompt"][0]["content"] for row in rows] == [f"p{i}" for i in range(7)]
    assert account.rows_out == 7


def test_every_family_has_its_adapter():
    for name, (where, what) in FAMILIES.items():
        adapter = find(name)
        assert adapter.needs, where
        assert not what.endswith(".")
        for flag, arguments in adapter.options.items():
            assert flag.startswith("--")
            assert arguments["help"]


# The summary


def test_the_summary():
    raw = [{"transcript": f"{HI} {'x' * n}", "rating": rating} for n, rating in ((1, 0), (3, 2.5), (5, 2.5), (7, 4))]
    rows, _ = convert("red-team", Dataset.from_list(raw))
    summary = summarize(rows)
    assert (summary["rows"], summary["demonstrations"], summary["demonstration_share"]) == (4, 1, 0.25)
    assert summary["labels"] == {
        "continuous": [
            {"from": -4.0, "to": -4.0, "rows": 1},
            {"from": -2.5, "to": -2.5, "rows": 2},
            {"from": 0.0, "to": 0.0, "rows": 1},
        ]
    }
    assert summary["characters"]["prompt"]["0.5"] == 2
    assert [summary["characters"]["completion"][q] for q in ("0", "0.25", "0.5", "1")] == [1, 2.5, 4, 7]


def test_label_types_are_counted_apart():
    rows, _ = convert("qa-feedback", Dataset.from_list([QUESTION]), wins=True)
    labels = summarize(rows)["labels"]
    assert {kind: sum(each["rows"] for each in bins) for kind, bins in labels.items()} == {"binary": 2, "continuous": 3}


def test_many_labels_are_binned():
    raw = {"question": "?", "answers": [{"text": f"a{n}", "score": n} for n in range(101)]}
    rows, _ = convert("votes", Dataset.from_list([raw]), label="votes")
    bins = summarize(rows)["labels"]["continuous"]
    assert [each["rows"] for each in bins] == [10] * 9 + [11]
    assert (bins[0]["from"], bins[0]["to"], bins[-1]["to"]) == (0, 10, 100)


# Mixtures


def part(name, n, **columns):
    rows = {"prompt": [turns(f"{name} {i // 2}") for i in range(n)], "completion": [GOOD] * n}
    return Dataset.from_dict(rows | {"label": [i % 2 for i in range(n)]} | columns)


def test_a_mixture_takes_whole_prompts_once_and_says_what_it_made():
    ratings = part("b", 20, sft_mask=[False] * 20, label_type=["continuous"] * 20)
    parts = {"a": part("a", 40), "b": ratings}
    mixture = mix(parts, {"a": 0.5, "b": 1.0}, seed=3)
    assert str(mixture) == "40 rows (seed 3): 20 of 40 rows of a (50.0%), 20 of 20 rows of b (50.0%)."
    found = Counter((row["part"], row["prompt"][0]["content"]) for row in mixture.rows)
    assert set(found.values()) == {2}
    assert all(name == prompt[0] for name, prompt in found)
    kinds = {(row["part"], row["label"], row["sft_mask"], row["label_type"]) for row in mixture.rows}
    assert kinds == {
        ("a", 1.0, True, "binary"),
        ("a", 0.0, False, "binary"),
        ("b", 1.0, False, "continuous"),
        ("b", 0.0, False, "continuous"),
    }
    order = mixture.rows["part"][:]
    assert order != sorted(order)
    assert mix(parts, {"a": 0.5, "b": 1.0}, seed=3).rows[:] == mixture.rows[:]
    other = mix(parts, {"a": 0.5, "b": 1.0}, seed=4).rows
    assert {json.dumps(p) for p in other["prompt"]} != {json.dumps(p) for p in mixture.rows["prompt"]}


def test_nearly_all_of_a_small_part_is_all_of_it():
    assert len(mix({"a": part("a", 4)}, {"a": 0.99}, seed=0).rows) == len(part("a", 4))


@pytest.mark.parametrize(
    ("change", "fractions", "message"),
    [
        ({}, {"a": 1}, "fractions are given for a, but the parts are a, b. Give each part a fraction"),
        ({}, {"a": 1, "b": 1.5}, "The fraction of b is 1.5; it must be above 0 and at most 1"),
        ({}, {"a": 0, "b": 1}, "The fraction of a is 0; it must be above 0"),
        ({"b": part("b", 4, weight=[1.0] * 4)}, {"a": 1, "b": 1}, "need the same columns; found a: "),
        (
            {"b": part("b", 4, other=[1.0] * 4)},
            {"a": 1, "b": 1},
            "The part b must have at least one row, .* found prompt, .*other",
        ),
        ({"b": part("b", 0)}, {"a": 1, "b": 1}, "The part b must have at least one row, .*, 0 rows"),
        ({"b": part("b", 4).remove_columns("label")}, {"a": 1, "b": 1}, "The part b must have at least one row"),
        (
            {"b": Dataset.from_dict({"prompt": ["x"], "completion": ["y"], "label": [1]})},
            {"a": 1, "b": 1},
            "Prompts are text in b, but messages elsewhere",
        ),
        (
            {"b": part("b", 4, label_type=["continuous"] * 4)},
            {"a": 1, "b": 1},
            "Row 0 of the b dataset has a continuous label, and nothing says which of these rows are demonstrations",
        ),
    ],
)
def test_mixtures_that_cannot_be_made(change, fractions, message):
    with pytest.raises(ValueError, match=message):
        mix({"a": part("a", 4), "b": part("b", 4)} | change, fractions, seed=0)


# The real samples


@pytest.fixture
def real(shared_data, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def load(name, family, **options):
        rows, account = convert(family, load_rows(shared_data / name)["train"], **options)
        assert account.rows_out == len(rows)
        assert account.answers == account.rows_out + sum(counts(account.left_out).values())
        return rows, account

    return load


def test_all_hh_pairs(real, shared_data):
    rows, account = real("hh_harmless.jsonl.gz", "hh")
    assert (account.rows_in, account.answers, account.rows_out) == (1800, 3600, 3596)
    assert counts(account.left_out) == {EMPTY: 4}
    assert counts(account.noted) == {PREFIX: 5, NAME_IN_TEXT: 54, SAME_SPEAKER: 11}
    assert Counter(rows["label"]) == {1.0: 1796, 0.0: 1800}
    with gzip.open(shared_data / "hh_harmless.jsonl.gz", "rt", encoding="utf-8") as lines:
        raw = [json.loads(line) for line in lines]
    empty = [pair["chosen"] for pair in raw if not split_transcript(pair["chosen"])[1].strip()]
    assert len(empty) == 4
    halves = [half for pair in raw for half in (pair["chosen"], pair["rejected"]) if half not in empty]
    assert [as_transcript(row["prompt"] + row["completion"]) for row in rows] == halves
    in_pairs, _ = real("hh_harmless.jsonl.gz", "pairs")
    assert in_pairs[:] == rows[:]


def test_all_qa_feedback_questions(real):
    rows, account = real("qa_feedback.json.gz", "qa-feedback")
    assert (account.rows_in, account.answers, account.rows_out) == (400, 800, 779)
    assert counts(account.left_out) == {NOTHING_WRONG: 12, NO_CORRECTION: 9}
    assert Counter(zip(rows["label"], rows["sft_mask"], strict=True)) == {(1.0, True): 385, (0.0, False): 394}
    rows, account = real("qa_feedback.json.gz", "qa-feedback", wins=True, passages="cited")
    assert (account.rows_in, account.answers, account.rows_out) == (400, 2000, 1979)
    assert counts(account.left_out) == {NOTHING_WRONG: 12, NO_CORRECTION: 9}
    assert counts(account.noted) == {NONE_CITED: 96, NO_PASSAGES: 1}
    assert Counter(rows["label_type"]) == {"binary": 779, "continuous": 1200}


def test_all_red_team_transcripts(real):
    rows, account = real("red_team_sample.jsonl.gz", "red-team")
    assert (account.rows_in, account.answers, account.rows_out, account.left_out) == (5, 5, 5, {})
    assert rows["label"][:] == [0.0, -4.0, -2.0, -4.0, -4.0]
    assert rows["sft_mask"][:] == [True, False, False, False, False]
