"""Requests and replies as OpenAI, Anthropic, Gemini, LangChain, Langfuse and others log them."""

import json

import pytest
from test_data_families import labels, outcomes

from trl_ulma.data.payloads import messages_in

SYSTEM, HI = {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": "Hello!"}


def lang_chain(kind, **kwargs):
    return {"lc": 1, "type": "constructor", "id": ["langchain_core", "messages", kind], "kwargs": kwargs}


@pytest.mark.parametrize(
    "value",
    [
        # Anthropic
        {"model": "m", "system": "Be kind.", "messages": [HI]},
        {"system": [{"type": "text", "text": "Be kind.", "cache_control": {}}], "messages": [HI]},
        # Gemini
        {
            "model": "m",
            "contents": [{"role": "user", "parts": ["Hi"]}],
            "config": {"system_instruction": {"parts": {"text": "Be kind."}}},
        },
        # OpenAI: the role of newer models, and parts of the Responses API
        {"messages": [SYSTEM | {"role": "developer"}, HI], "tools": []},
        [SYSTEM, {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}],
        # LangChain: pairs, and a prompt object
        {"messages": [["system", "Be kind."], ["human", "Hi"]]},
        lang_chain(
            "ChatPromptValue",
            messages=[lang_chain("SystemMessage", content="Be kind."), lang_chain("ChatMessage", **HI)],
        ),
        # A single field, at any depth, and the arguments of a Python function
        {"input": {"messages": [SYSTEM, HI]}},
        {"args": [[SYSTEM, HI]], "kwargs": {}},
    ],
)
def test_a_request_with_a_system_prompt(value):
    assert messages_in(value, "user") == [SYSTEM, HI]
    assert messages_in(json.dumps(value), "user") == [SYSTEM, HI]


@pytest.mark.parametrize(
    "value",
    [
        {"candidates": [{"content": {"role": "model", "parts": [{"text": "Hello!"}]}, "finishReason": "STOP"}]},
        {"choices": [{"text": "Hello!", "index": 0, "finish_reason": "stop"}], "model": "m"},
        {"generations": [[{"text": "Hello!", "generation_info": None}]]},
        {"model": "m", "created_at": "now", "message": HELLO, "done": True},
        {"id": "x", "type": "message", "role": "assistant", "content": [{"type": "text", "text": "Hello!"}]},
        {"output": {"content": "Hello!", "type": "ai", "tool_calls": [], "additional_kwargs": {}}},
    ],
)
def test_a_reply(value):
    assert messages_in(value, "assistant") == [HELLO]


def test_what_would_be_dropped_is_refused():
    for value, why in (
        ({"messages": [HI], "tools": [{"type": "function"}]}, "it has tools"),
        ({"input": "Hi", "chat_history": [HELLO]}, r"several fields \(input, chat_history\)$"),
        ({"status": "ok", "output": ""}, r"several fields \(status, output\)"),
        ([HI, {"page_content": "So.", "type": "Document"}], r"no message \(Document\)"),
        ([{"text": "a"}, {"text": "b"}], "no message"),
        ([lang_chain("FunctionMessage", content="4", name="add")], r"several fields \(content, name\)"),
        ("[{'role': 'user', 'content': 'Hi'}]", "a Python object as text: write it as JSON"),
    ):
        with pytest.raises(ValueError, match=why):
            messages_in(value, "user")


def test_keys_are_read_in_the_order_in_which_they_are_named():
    value = {"question": "Hi", "chat_history": [["human", "Hey"], ["ai", "Hello!"]], "system": "Be kind."}
    assert messages_in(value, "user", "system, chat_history,question") == [SYSTEM, HI | {"content": "Hey"}, HELLO, HI]
    assert messages_in(value, "user", "question") == [HI]
    assert messages_in({"args": ["Hi", 3], "kwargs": {"mood": "good"}}, "user", "0") == [HI]


def test_answers_that_are_json_stay_text():
    for answer in ([{"name": "Bob"}], [[1, 2], [3, 4]], {"message": "Hi"}, {"role": "admin"}, {"content": ["a"]}):
        text = json.dumps(answer)
        assert messages_in(text, "assistant") == [HELLO | {"content": text}]


def trace(given, reply):
    return {"timestamp": "now", "input": given, "output": reply, "helpful": [1]}


def test_what_is_more_than_text_is_not_lost():
    image, tool = HI | {"images": ["aGk="]}, HI | {"content": [{"type": "image_url", "image_url": {"url": "…"}}]}
    for given in ([image], [tool]):
        assert labels("langfuse", trace(given, HELLO)) == [
            "one of its turns contains more than text, such as tool calls or images"
        ]
    # Reasoning is removed, as in Open WebUI
    thought = {"type": "thinking", "thinking": "Hm.", "signature": "s"}
    for reply in (
        HELLO | {"reasoning_content": "Hm."},
        HELLO | {"reasoning": "Hm."},
        HELLO | {"content": [thought, {"type": "text", "text": "Hello!"}]},
        lang_chain("AIMessage", content="Hello!", additional_kwargs={"reasoning_content": "Hm."}),
    ):
        assert outcomes("langfuse", trace("Hi", reply)) == [
            "the reasoning in one of its turns is removed", (["Hi"], "Hello!", 1.0, True),
        ]  # fmt: skip


def test_a_json_answer_is_noted():
    noted, row = outcomes("langfuse", trace("Hi", '{"answer": "Hello!"}'))
    assert (noted[:35], row[1]) == ("its answer is JSON, which is kept a", '{"answer": "Hello!"}')
    assert outcomes("langfuse", trace("Hi", '{"answer": "Hello!"}'), answer_key="answer") == [
        (["Hi"], "Hello!", 1.0, True)
    ]
    # In a CSV file or in a Parquet file with JSON text, too
    assert (
        outcomes("langfuse", trace('{"question": "Hi", "k": 3}', "Hello!"))[0] == "its prompt is the text of `question`"
    )


def test_an_output_that_repeats_the_conversation():
    """LangGraph's output is its whole state, which can begin before the input."""
    earlier = [HI | {"content": "Hey"}, HELLO | {"content": "Hey!"}]
    for given, reply, prompt in (
        ([HI], [HI, HELLO], ["Hi"]),
        ([HI], [*earlier, HI, HELLO], ["Hey", "Hey!", "Hi"]),
        ([SYSTEM, HI], [*earlier, HI, HELLO], ["Be kind.", "Hey", "Hey!", "Hi"]),
        ([SYSTEM, HI], [SYSTEM, HI, HELLO], ["Be kind.", "Hi"]),
    ):
        raw = trace({"messages": given}, {"messages": [turn | {"id": "x"} for turn in reply]})
        assert outcomes("langfuse", raw) == [(prompt, "Hello!", 1.0, True)]
    for reply in ([HI | {"content": "Ho"}, HELLO], [HI], [HELLO, HI]):
        assert labels("langfuse", trace([HI], reply)) == [
            "its output is a conversation that does not continue its input"
        ]
