"""What feedback tools export: requests and replies in several forms, named scores, branches, annotations."""

import copy
import json

import pytest
from family_samples import SAMPLES
from test_data_families import labels, outcomes

from trl_ulma.data.adapters import SAME
from trl_ulma.data.payloads import messages_in
from trl_ulma.scripts.prepare import main

HI, HELLO = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}
TOOL = {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "function": {"name": "f"}}]}


def lang_chain(kind, content, **more):
    return {"lc": 1, "type": "constructor", "id": ["langchain", kind], "kwargs": {"content": content, **more}}


@pytest.mark.parametrize(
    "value",
    [
        "Hi",
        HI,
        [HI],
        {"messages": [HI]},
        {"question": "Hi", "history": [], "top_k": 3},
        {"input": "Hi", "language": None, "documents": []},
        json.dumps({"messages": [HI]}),
        json.dumps([HI]),
        json.dumps({"question": "Hi"}),
        {"messages": [[lang_chain("HumanMessage", "Hi", additional_kwargs={})]]},
        [{"type": "human", "content": "Hi"}],
        [{"type": "human", "data": {"content": "Hi"}}],
        [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}],
        [{"role": "user", "parts": [{"text": "Hi", "inlineData": None}]}],
        {"parts": [{"text": "Hi"}]},
    ],
)
def test_a_request_is_read_in_every_form(value):
    assert messages_in(value, "user") == [HI]


@pytest.mark.parametrize(
    "value",
    [
        "Hello!",
        HELLO | {"refusal": None, "annotations": [], "audio": None},
        {"choices": [{"index": 0, "message": HELLO, "finish_reason": "stop"}, {"message": HELLO | {"content": "No"}}]},
        {"generations": [[{"text": "Hello!", "message": lang_chain("AIMessageChunk", "Hello!")}]]},
        {"generations": [[{"text": "Hello!", "type": "Generation"}]]},
        {"output": "Hello!"},
        {"output": HELLO} | {"message": HELLO},
    ],
)
def test_a_reply_is_read_in_every_form(value):
    assert messages_in(value, "assistant") == [HELLO]


def test_an_answer_that_is_json_stays_text():
    for text in ('{"answer": 4}', "[1, 2]", "{not json}", "[]"):
        assert messages_in(text, "assistant") == [HELLO | {"content": text}]


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (None, "neither text nor messages"),
        (3, "neither text nor messages"),
        ([], "neither text nor messages"),
        ([1], "a list with something that is no message"),
        ({}, "its prompt has no text or messages"),
        ({"question": "Hi", "context": "So."}, r"its prompt has several fields \(question, context\)$"),
    ],
)
def test_what_is_no_request_is_told(value, why):
    with pytest.raises(ValueError, match=why):
        messages_in(value, "user")
    assert messages_in({"question": "Hi", "context": "So."}, "user", "question") == [HI]
    with pytest.raises(ValueError, match="has no `ask`"):
        messages_in({"question": "Hi"}, "user", "ask")


def trace(**more):
    return {"timestamp": "now", "input": "Hi", "output": "Hello!"} | more


def test_scores_of_langfuse():
    assert labels("langfuse", trace(helpful=[1]), trace(helpful=[0], tags=[])) == [1.0, 0.0]
    assert labels("langfuse", trace(helpful=[1], tone=["ok"]), score="helpful") == [1.0]
    assert labels("langfuse", trace(helpful=[1]), trace(tone=["ok"]), score="helpful") == [
        1.0, "it has no score helpful",
    ]  # fmt: skip
    assert labels("langfuse", trace(helpful=None)) == ["it has no score"]
    assert labels("langfuse", trace(stars=[5]))[0].startswith("its label is outside [0, 1]")
    assert labels("langfuse", trace(stars=[5]), label_type="continuous") == [5.0]
    # As text, in a CSV file
    assert labels("langfuse", trace(helpful="[1]", metadata="[2]")) == [1.0]
    # From the API
    scores = [
        {"name": "helpful", "value": 1, "stringValue": "True", "dataType": "BOOLEAN"},
        {"name": "tone", "value": 0, "stringValue": "good", "dataType": "CATEGORICAL"},
    ]
    assert labels("langfuse", trace(scores=scores), score="helpful") == [1.0]
    assert labels("langfuse", trace(scores=scores), score="tone") == ["its label is not a number"]
    assert labels("langfuse", trace(scores=scores), score="tone", label_map={"good": 1}) == [1.0]
    assert labels("langfuse", trace(scores=scores), score="tone", label_map={"bad": 0}) == [
        "its label is 'good', which label_map does not contain"
    ]
    # A JSON answer and an object with one text look alike in an export, so what is read is noted
    assert outcomes("langfuse", trace(helpful=[1], output={"output": "Hello!", "score": 3})) == [
        "its answer is the text of `output`",
        (["Hi"], "Hello!", 1.0, True),
    ]
    # Several people
    averaged = ["its scores of the same name are averaged", ("Hi", "Hello!", 0.5, False)]
    expected = [averaged[0], (["Hi"], "Hello!", 0.5, False)]
    assert outcomes("langfuse", trace(helpful=[1, 0])) == expected
    assert outcomes("langfuse", trace(helpful=["up", "down"]), label_map={"up": 1, "down": 0}) == expected
    assert labels("langfuse", trace(helpful=["up", 1])) == ["one of its scores is not a number"]
    assert labels("langfuse", trace(helpful=[1], input=[HI, TOOL])) == [
        "one of its turns contains more than text, such as tool calls or images"
    ]


def test_which_of_several_scores_is_the_label_is_not_decided_by_the_order_of_the_rows():
    several = r"scores of several names: helpful \(2 answers\), tone \(1 answer\)\. Set --score to the one to read"
    one, both = trace(helpful=[1]), trace(helpful=[1], tone=[5])
    for rows in ([one, both], [both, one]):
        with pytest.raises(ValueError, match=several):
            labels("langfuse", *rows)
    with pytest.raises(ValueError, match=r"helpful \(1 answer\), tone \(1 answer\)"):
        labels("langfuse", trace(helpful=[1]), trace(tone=[1]))
    stats = {"feedback_stats": {name: {"n": 1, "avg": 1.0} for name in ("up", "latency")}}
    with pytest.raises(ValueError, match=r"up \(1 answer\), latency \(1 answer\)"):
        labels("langsmith", {"inputs": {"question": "Hi"}, "outputs": {"output": "Hello!"}} | stats)

    good, stars = result("choices", {"choices": ["1"]}), result("rating", {"rating": 4}, "stars")
    for rows in ([annotated(good, stars)], [annotated(stars), annotated(good)]):
        with pytest.raises(ValueError, match=r"controls of several names: .*stars \(1 answer\).* Set --control to"):
            labels("label-studio", *rows)
    with pytest.raises(ValueError, match=r"fields with the answer of several names: answer \(1 answer\), model \("):
        labels("label-studio", annotated(good), annotated(good, data={"prompt": "Hi", "model": "m"}))


def test_detection_says_which_option_is_missing(tmp_path, capsys):
    rows = [trace(helpful=[1]), trace(tone=["ok"])]
    (tmp_path / "traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["--detect", "--input", str(tmp_path / "traces.jsonl")]) == 1
    found = capsys.readouterr().out.splitlines()[1:]
    assert len(found) == 1
    assert found[0].startswith("  langfuse               has these columns, but: The answers have scores of several")


def test_lists_of_langfuse_that_are_no_scores():
    # Columns of observations, and scores that are free text: a correction has the name "output" and the value 0
    assert labels("langfuse", trace(traceTags=["web"], toolCallNames=["f"], helpful=[1])) == [1.0]
    texts = [
        {"name": "output", "value": 0, "stringValue": "Good day!", "dataType": "CORRECTION"},
        {"name": "note", "value": 0, "stringValue": "So.", "dataType": "TEXT"},
    ]
    assert labels("langfuse", trace(scores=texts)) == ["it has no score"]
    assert labels("langfuse", trace(scores=[*texts, {"name": "helpful", "value": 1, "dataType": "NUMERIC"}])) == [1.0]
    # In newer replies, the value of a category is its word
    word = {"name": "tone", "value": "good", "dataType": "CATEGORICAL"}
    assert labels("langfuse", trace(scores=[word]), label_map={"good": 1}) == [1.0]
    # Arrow gives both spellings to all scores
    both = {"name": "tone", "value": 3.0, "stringValue": None, "string_value": "good", "dataType": None}
    assert labels("langfuse", trace(scores=[both | {"data_type": "CATEGORICAL"}]), label_map={"good": 1}) == [1.0]
    assert labels("langfuse", trace(scores=["a1", "b2"])) == [
        "its scores are only their ids: export the table, or get the traces one by one"
    ]


def test_texts_of_langsmith_that_are_no_objects():
    run = {"inputs": '{"question": "Hi"}', "outputs": '{"output": "Hello!"}', "feedback_stats": '{"up": {"avg": 1.0}}'}
    assert labels("langsmith", run) == [1.0]
    assert labels("langsmith", run | {"outputs": "null"}) == ["its answer is neither text nor messages"]
    why = "its inputs, outputs or feedback_stats are text that is not JSON: use json.dumps"
    assert labels("langsmith", *(run | {name: "{'question': 'Hi'}"} for name in run)) == [why] * 3


def test_feedback_of_langsmith():
    run = {"inputs": {"question": "Hi", "context": "So."}, "outputs": {"output": "Hello!"}}
    score = {"feedback_stats": {"user_score": {"n": 1, "avg": 1.0}}}
    assert labels("langsmith", run | score) == [
        "its prompt has several fields (question, context): say where it is with --prompt_key"
    ]
    assert labels("langsmith", run | score, prompt_key="question") == [1.0]
    assert labels("langsmith", {name: json.dumps(each) for name, each in (run | score).items()}, prompt_key="question")
    words = {"feedback_stats": {"tone": {"n": 3, "avg": None, "values": {"good": 2, "bad": 1}}}}
    found = outcomes("langsmith", run | words, prompt_key="question", label_map={"good": 1, "bad": 0})
    assert found[-1] == (["Hi"], "Hello!", pytest.approx(2 / 3), False)
    assert labels("langsmith", run | {"feedback_stats": None}) == ["it has no score"]


def webui(i=1, **message):
    raw = copy.deepcopy(SAMPLES["open-webui"](i))
    chat = raw["snapshot"]["chat"]["chat"]
    chat["history"]["messages"][f"{i}-assistant"] |= message
    return raw, chat


def test_feedback_of_open_webui():
    raw, chat = webui()
    assert outcomes("open-webui", raw) == [(["1?"], "Yes", 1.0, True)]
    assert outcomes("open-webui", raw, feedback="rating", liked=True) == [(["1?"], "Yes", 2.0, False)]
    assert labels("open-webui", SAMPLES["open-webui"](2)) == [0.0]
    assert labels("open-webui", raw | {"data": {"rating": 0}}, raw | {"data": {}}) == [0.5, "it has no thumb"]
    assert labels("open-webui", raw | {"data": {"rating": 4}}) == ["its thumb is not −1, 0 or 1"]
    assert labels("open-webui", raw | {"data": {"details": {"rating": 11}}}, feedback="rating") == [
        "its label is outside [1, 10], the scale of this rating"
    ]
    assert labels("open-webui", raw | {"data": None}, feedback="rating") == ["it has no rating"]
    with pytest.raises(ValueError, match="feedback is 'stars'"):
        labels("open-webui", raw, feedback="stars")
    chat["params"] = {"system": "Be kind."}
    assert outcomes("open-webui", raw) == [(["Be kind.", "1?"], "Yes", 1.0, True)]
    # A list of messages, and a snapshot without a chat in the chat
    history = {"messages": list(chat["history"]["messages"].values())}
    assert outcomes("open-webui", raw | {"snapshot": {"history": history}}) == [(["1?"], "Yes", 1.0, True)]

    thought = '<details type="reasoning" done="true" duration="3">\n<summary>Thought</summary>\n> Hm.\n</details>\nYes'
    assert outcomes("open-webui", webui(content=thought)[0]) == [
        "the reasoning in one of its turns is removed", (["1?"], "Yes", 1.0, True),
    ]  # fmt: skip
    assert outcomes("open-webui", webui(content="<think>\nHm.\n</think>\n\nYes")[0])[1] == (["1?"], "Yes", 1.0, True)
    pipe = "<details>\n<summary>Thinking</summary>Hm.</details>Yes"
    assert outcomes("open-webui", webui(content=pipe)[0])[0].startswith("one of its turns contains a <details> block")
    output = [{"type": "reasoning"}, {"type": "message"}]
    assert labels("open-webui", webui(output=output)[0]) == [1.0]
    assert labels("open-webui", webui(output=[{"type": "function_call"}, *output])[0]) == [
        "one of its turns contains function_call"
    ]
    assert outcomes("open-webui", webui(sources=[{"document": ["So."]}])[0])[0].startswith("one of its answers used")
    for message, why in (
        ({"files": [{"type": "image"}]}, "one of its turns has files, whose content is not in the export"),
        ({"content": '<details type="tool_calls">f</details>Yes'}, "one of its turns contains tool_calls"),
        ({"content": None}, "one of its turns is not text"),
        ({"role": "user"}, "the rated message is not an answer"),
        ({"parentId": "1-assistant"}, "its snapshot does not contain all messages before the rated one"),
        ({"parentId": "gone"}, "its snapshot does not contain all messages before the rated one"),
    ):
        assert labels("open-webui", webui(**message)[0]) == [why]
    assert labels("open-webui", raw | {"meta": {"message_id": "gone"}}) == [
        "its snapshot does not contain the rated message"
    ]


def test_earlier_answers_of_open_webui_are_as_the_model_read_them():
    raw, chat = webui(parentId="thanks")
    messages = chat["history"]["messages"]
    messages["thanks"] = {"role": "user", "content": "Thanks.", "parentId": "1-other"}
    assert outcomes("open-webui", raw)[-1] == (["1?", "No", "Thanks."], "Yes", 1.0, True)
    messages["1-other"]["merged"] = {"status": True, "content": "No, and yes"}
    assert outcomes("open-webui", raw)[-1] == (["1?", "No, and yes", "Thanks."], "Yes", 1.0, True)
    # An answer that failed is not sent
    messages["1-other"] |= {"merged": None, "content": "", "error": {"content": "500"}}
    assert outcomes("open-webui", raw)[-1] == (["1?", "Thanks."], "Yes", 1.0, True)
    # The rated answer is not the merged one
    messages["1-assistant"] |= {"merged": {"content": "Both"}}
    assert outcomes("open-webui", raw)[-1] == (["1?", "Thanks."], "Yes", 1.0, True)


def annotated(*results, data=None, **more):
    return {"data": data or {"prompt": "Hi", "answer": "Hello!"}, "annotations": [{"result": list(results), **more}]}


def result(kind, value, name="it"):
    return {"from_name": name, "type": kind, "value": value}


def test_annotations_of_label_studio():
    good, stars = result("choices", {"choices": ["Good"]}), result("rating", {"rating": 4}, "stars")
    assert labels("label-studio", annotated(good)) == ["its label is not a number"]
    assert labels("label-studio", annotated(good), label_map={"good": 1, "bad": 0}) == [1.0]
    assert labels("label-studio", annotated(stars), label_type="continuous") == [4.0]
    both = annotated(good, stars)
    assert labels("label-studio", both, control="stars", label_type="continuous") == [4.0]
    assert labels("label-studio", both, control="tone") == ["its annotation has 0 results of tone, not 1"]
    assert labels("label-studio", annotated(stars, was_cancelled=True)) == ["its annotation was skipped"]
    rejected, accepted = ({"accepted": each} for each in (False, True))
    for review in ({"reviews": [accepted, rejected]}, {"last_action": "rejected", "reviews": []}):
        assert labels("label-studio", annotated(stars, **review)) == ["its annotation was rejected in review"]
    for review in ({"reviews": [rejected, accepted]}, {"last_action": "updated", "reviews": [rejected]}):
        assert labels("label-studio", annotated(stars, **review), label_type="continuous") == [4.0]
    assert labels("label-studio", annotated()) == ["its annotation has 0 results, not 1"]
    assert labels("label-studio", annotated() | {"annotations": []}) == ["it has no annotation"]
    # Each annotator is a row
    two = annotated(stars) | {"annotations": annotated(stars)["annotations"] * 2}
    assert labels("label-studio", two, label_type="continuous") == [4.0, 4.0]
    written = annotated(result("textarea", {"text": ["Good day!"]}), data={"prompt": "Hi"})
    assert outcomes("label-studio", written) == [(["Hi"], "Good day!", 1.0, True)]

    data = {"prompt": "Hi", "answer1": "Hello!", "answer2": "Go."}
    left = annotated(result("pairwise", {"selected": "left"}) | {"to_name": "answer1,answer2"}, data=data)
    assert outcomes("label-studio", left, liked=True) == [
        (["Hi"], "Hello!", 1.0, False), (["Hi"], "Go.", 0.0, False),
    ]  # fmt: skip
    assert labels("label-studio", left, answer_key="answer2,answer1") == [1.0, 0.0]
    for unused in ({"label_type": "continuous"}, {"label_map": {"left": 1}}):
        with pytest.raises(ValueError, match=r"whose labels are binary\. Remove --label_type and --label_map"):
            labels("label-studio", left, **unused)
    assert (
        labels("label-studio", annotated(result("pairwise", {"selected": None}), data=data))
        == ["it does not say which answer is better"] * 2
    )
    more = data | {"note": "So."}
    # The order of the fields says nothing about left and right
    unclear = annotated(result("pairwise", {"selected": "left"}) | {"to_name": "text1,text2"}, data=more)
    assert (
        labels("label-studio", unclear)
        == ["it does not say what is left and right: --answer_key LEFT_FIELD,RIGHT_FIELD"] * 2
    )
    assert labels("label-studio", left | {"data": data | {"answer2": "Hello!"}}) == [SAME] * 2
    assert outcomes("label-studio", unclear, answer_key="answer2,answer1")[0] == (["Hi"], "Go.", 1.0, True)
    for names in ("answer2,answer1", ["answer2", "answer1"]):
        right = result("pairwise", {"selected": "right"}) | {"to_name": names}
        assert outcomes("label-studio", annotated(right, data=more))[1] == (["Hi"], "Hello!", 1.0, True)
    assert labels("label-studio", annotated(stars, data=data)) == [
        "its answer can be in answer1 or answer2: name one field with --answer_key"
    ]
    assert labels("label-studio", annotated(stars, data=data), answer_key="answer1", label_type="continuous") == [4.0]
    assert labels("label-studio", annotated(stars), answer_key="reply") == [
        "it has no field reply, which --answer_key names"
    ]
    assert labels("label-studio", annotated(stars, data={"text": "Hello!"})) == [
        "it has no field with the prompt: name it with --prompt_key"
    ]


def test_fields_of_label_studio():
    good = result("choices", {"choices": ["1"]})
    assert labels("label-studio", annotated(result("number", {"number": 7})), label_type="continuous") == [7.0]
    assert outcomes("label-studio", annotated(good)) == [
        "its answer is the field answer",
        (["Hi"], "Hello!", 1.0, True),
    ]
    # An empty answer is no reason to take another field
    assert labels("label-studio", annotated(good, data={"prompt": "Hi", "answer": "", "model": "m"})) == [
        "its answer can be in answer or model: name one field with --answer_key"
    ]
    # The answer can be the last message
    talk = {"messages": [HI, HELLO]}
    assert outcomes("label-studio", annotated(good, data=talk)) == [(["Hi"], "Hello!", 1.0, True)]
    assert labels("label-studio", annotated(good, data={"prompt": "Hi"})) == ["it does not end in an assistant turn"]
    # A comment is no answer
    comment = annotated(result("textarea", {"text": ["Too short."]}, "comment"))
    assert labels("label-studio", comment) == [
        "its text can be an answer or a comment: if it is the answer, say --control"
    ]
    assert labels("label-studio", comment, control="comment") == [1.0]
    several = annotated(result("textarea", {"text": ["a", "b"]}), data={"prompt": "Hi"})
    assert labels("label-studio", several) == ["it has 2 written texts, not 1"]
    ranked = annotated(result("ranker", {"ranker": {"rank": ["a", "b"]}}, "rank"))
    assert labels("label-studio", ranked) == [
        "its annotation has no rating, number, choices, pairwise, textarea, but ranker"
    ]
    assert labels("label-studio", ranked, control="rank") == [
        "its result is a ranker, which is none of rating, number, choices, pairwise, textarea"
    ]
    assert labels("label-studio", annotated(good, skipped=True)) == ["its annotation was skipped"]


def test_preferences_of_helpsteer3_and_gemini():
    sample = SAMPLES["helpsteer3"](0)
    assert [labels("helpsteer3", sample | {"overall_preference": p}) for p in (-1, 0, "2")] == [
        [1.0, 0.0], [0.5, 0.5], [0.0, 1.0],
    ]  # fmt: skip
    assert (
        labels("helpsteer3", sample | {"overall_preference": 4})
        == ["its label is outside [-3, 3], the scale of this rating"] * 2
    )
    as_text = sample | {"context": json.dumps([HELLO, HI])}
    assert outcomes("helpsteer3", as_text)[1] == (["Hello!", "Hi"], "No", 0.0, False)
    assert (
        labels("helpsteer3", sample | {"context": "[{'role': 'user', 'content': 'Hi'}]"})
        == ["its prompt is a Python object as text: write it as JSON, with json.dumps"] * 2
    )
    image = {"role": "user", "parts": [{"text": "Hi"}, {"inlineData": {"data": "…"}}]}
    assert (
        labels("gemini", SAMPLES["gemini"](0) | {"contents": [image]})
        == ["one of its turns contains more than text, such as tool calls or images"] * 2
    )
    assert labels("gemini", SAMPLES["gemini"](0) | {"contents": [HI | {"parts": ["Hi"]}]}) == [1.0, 0.0]
    tools = {"tools": [{"functionDeclarations": []}]}
    assert labels("gemini", SAMPLES["gemini"](0) | tools) == ["it has tools, which prepared rows do not support"] * 2
    system = SAMPLES["distilabel"](0) | {"system_prompt": "Be kind.", "instruction": [HI]}
    assert outcomes("distilabel", system)[0][:2] == (["Be kind.", "Hi"], "Yes")
    unrated = SAMPLES["distilabel"](0) | {"ratings": [None, "N/A"], "generations": ["Yes", None]}
    assert labels("distilabel", unrated) == ["its label is not a number"] * 2
    assert (
        labels("openai", SAMPLES["openai"](0) | {"input": {"messages": [HI], "tools": [{"type": "function"}]}})
        == ["it has tools, which prepared rows do not support"] * 2
    )


def test_labels_inside_turns_and_steps_are_mapped(tmp_path, capsys):
    answers = [HELLO | {"label": word} for word in ("up", "down", "meh")]
    turns = {"messages": [HI, answers[0], HI, answers[1], HI, answers[2]]}
    meh = "its label is 'meh', which label_map does not contain"
    assert labels("turns", turns, label_map={"up": 1, "down": 0}) == [1.0, 0.0, meh]
    steps = {"prompt": "2 + 2?", "completions": ["a", "b"], "labels": ["+", "-"]}
    assert labels("stepwise", steps, label_map={"+": 1, "-": 0}) == [1.0, 0.0]

    (tmp_path / "turns.jsonl").write_text((json.dumps(turns) + "\n") * 30)
    command = ["turns", "--input", str(tmp_path / "turns.jsonl"), "--output", str(tmp_path / "rows.jsonl")]
    assert main([*command, "--label_map", "up=1,down=0", "--report", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["rows_out"], report["left_out"][meh]["count"]) == (60, 30)
    assert report["options"]["label_map"] == {"up": 1, "down": 0}
    assert "30 × its label is 'meh'" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert sorted({row["label"] for row in rows}) == [0.0, 1.0]


def test_an_export_in_csv(tmp_path, capsys):
    lines = ["id,timestamp,name,input,output,tags,user-feedback"]
    lines += [f'{i},2026-01-01,chat,"{{""question"":""{i}?""}}",Yes,[],[{i % 2}]' for i in range(20)]
    (tmp_path / "traces.csv").write_text("\n".join(lines) + "\n")
    assert main(["--detect", "--input", str(tmp_path / "traces.csv")]) == 0
    assert "langfuse" in capsys.readouterr().out
    command = ["langfuse", "--input", str(tmp_path / "traces.csv"), "--output", str(tmp_path / "rows.jsonl")]
    assert main([*command, "--prompt_key", "ask"]) == 1
    assert "20 times its prompt has no `ask`" in capsys.readouterr().err
    assert main(command) == 0
    [row, *others] = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(others) == 19
    assert row["prompt"] == [{"role": "user", "content": "0?"}]


def test_a_reply_of_an_api_as_a_file_says_where_its_rows_are(tmp_path, capsys):
    (tmp_path / "reply.json").write_text(json.dumps({"data": [trace(helpful=[1])] * 3, "meta": {"page": 1}}))
    command = ["langfuse", "--input", str(tmp_path / "reply.json"), "--output", str(tmp_path / "rows.jsonl")]
    assert main(command) == 1
    assert "whose `data` is a list of 3 objects. If they are the rows, write this list" in capsys.readouterr().err
