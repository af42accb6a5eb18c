"""Servers as they are: what each refuses is done without, and what it sends beside its answer is kept apart."""

import itertools
import json
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
import servers
import transformers
from packaging.version import Version
from servers import LoopbackServer, openai_error, said

from trl_ulma.evaluation.model_names import is_same_model
from trl_ulma.evaluation.refusals import Why, is_other_endpoint, refused_parameter, why
from trl_ulma.evaluation.server import Refusal, Reply, Server, ServerError
from trl_ulma.evaluation.turns import answer_text, as_text, for_server, split_reasoning

CHAT = [{"role": "user", "content": "Hi"}]
DRAWN = {"max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "seed": 3}


@pytest.fixture
def strict(request):
    """A server that refuses what the function of the test's parameter says, and the notices about it."""
    server = LoopbackServer(lambda messages: said("Hello!"))
    notes: list[str] = []
    yield server, Server("m", server.url, retries=0, note=notes.append), notes
    server.stop()


# Which model answers


@pytest.mark.parametrize(
    ("asked", "answered"),
    [
        ("gpt-4o", "gpt-4o-2024-08-06"),
        ("gpt-4", "gpt-4-0613"),
        ("gpt-4", "gpt-4-1106-preview"),
        ("gemini-1.5-pro", "models/gemini-1.5-pro-002"),
        ("gemini-2.5-flash", "gemini-2.5-flash-preview-05-20"),
        ("claude-3-5-sonnet-latest", "claude-3-5-sonnet-20241022"),
        ("anthropic/claude-sonnet", "claude-sonnet-20250514-v1:0"),
        ("llama3", "llama3:latest"),
        ("/models/tiny.gguf", "tiny.gguf"),
        ("tiny", r"C:\models\tiny.gguf"),
        ("Qwen/Qwen3-0.6B", "qwen/qwen3-0.6b"),
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B@main"),
        ("/home/me/out/judge", "out/judge"),
    ],
)
def test_a_name_that_is_only_spelled_longer_or_shorter_is_the_same_model(asked, answered):
    assert is_same_model(asked, answered)
    assert is_same_model(answered, asked)


@pytest.mark.parametrize(
    ("asked", "answered"),
    [
        ("gpt-4o", "gpt-4o-mini"),
        ("gpt-4", "gpt-4.1"),
        ("gpt-4", "gpt-4o"),
        ("o1", "o1-preview"),
        ("llama-3", "llama-3-8b"),
        ("gpt-4o-2024-05-13", "gpt-4o-2024-08-06"),
        ("meta/llama", "other/llama"),
        ("judge", "/models/llama.gguf"),
    ],
)
def test_another_model_is_not_the_same(asked, answered):
    assert not is_same_model(asked, answered)
    assert not is_same_model(answered, asked)


def as_if_by(*models):
    """Answers by these models, one after the other. None is what does not say who it is."""
    names = itertools.cycle(models)

    def answer(messages):
        status, body = said("Hello!")
        return status, {**body, "model": next(names)}

    return answer


def test_another_model_that_answers_is_told_once(strict):
    server, client, notes = strict
    server.answer = as_if_by("m", "llama-3-8b", "llama-3-70b")
    answered = [client.ask(CHAT, **DRAWN).answered_by for _ in range(6)]
    assert answered == ["", "llama-3-8b", "llama-3-70b"] * 2
    assert notes == [f"{server.url}, m: the server answers with another model, llama-3-8b. Is m the right name?"]


@pytest.mark.parametrize("model", ["m-2024-08-06", "/models/m.gguf"])
def test_a_name_that_extends_the_one_that_was_asked_is_kept_and_not_told(strict, model):
    server, client, notes = strict
    server.answer = as_if_by(model)
    assert (client.ask(CHAT, **DRAWN).answered_by, notes) == (model, [])


@pytest.mark.parametrize("model", [None, "", " m ", 3, ["m"]])
def test_a_server_need_not_say_which_model_answers(strict, model):
    server, client, notes = strict
    server.answer = as_if_by(model)
    assert (client.ask(CHAT, **DRAWN).answered_by, notes) == ("", [])


def test_a_key_in_the_name_of_a_model_is_hidden(strict, monkeypatch):
    server, _, notes = strict
    server.answer = as_if_by("for sk-planted")
    monkeypatch.setenv("THEIRS", "sk-planted")
    client = Server("m", server.url, key_variable="THEIRS", note=notes.append)
    assert client.ask(CHAT, **DRAWN).answered_by == "for [THEIRS]"
    assert "planted" not in "".join(notes)


# Parameters


@pytest.mark.parametrize(
    ("refuse", "taken", "dropped"),
    [
        (servers.reasoning_model, {"max_completion_tokens": 7, "seed": 3}, ["temperature", "top_p"]),
        (servers.mistral, {"max_tokens": 7, "temperature": 0.5, "top_p": 0.9}, ["seed"]),
        (servers.groq, {"max_tokens": 7, "temperature": 0.5}, ["top_p", "seed"]),
        (servers.claude, {"max_tokens": 7, "temperature": 0.5, "seed": 3}, ["top_p"]),
        (servers.transformers_strict, {"max_tokens": 7, "temperature": 0.5, "top_p": 0.9}, ["seed"]),
        (lambda path, request: None, DRAWN, []),
    ],
)
def test_what_a_server_refuses_is_left_out_once(strict, refuse, taken, dropped):
    server, client, notes = strict
    server.refuse = refuse
    changes = tuple(f"{name} is left out" for name in dropped)
    reply = client.ask(CHAT, **DRAWN)
    assert (reply.text, reply.finished, reply.changes) == ("Hello!", True, changes)
    sent = {name: value for name, value in server.requests[-1].items() if name not in ("model", "messages")}
    assert sent == taken
    before = len(server.requests)
    client.each(lambda i: client.ask(CHAT, **DRAWN), range(20))
    assert len(server.requests) == before + 20  # it is remembered
    renamed = "max_completion_tokens" in taken
    assert len(notes) == len(dropped) + renamed
    told = [f"{name} is left out of all requests" for name in dropped] + ["in place of max_tokens"] * renamed
    assert all(sum(each in note for note in notes) == 1 for each in told)
    assert all(note.startswith(f'{server.url}, m: "') for note in notes)


def test_nothing_is_sent_that_is_none(strict):
    server, client, _ = strict
    client.ask(CHAT, max_tokens=7, temperature=None)
    assert set(server.requests[0]) == {"model", "messages", "max_tokens"}


def test_parameters_are_found_out_by_one_request_and_not_by_all_at_once(strict):
    server, client, _ = strict
    server.refuse = servers.reasoning_model
    client.each(lambda i: client.ask(CHAT, **DRAWN), range(20))
    assert len(server.requests) == 20 + 3


@pytest.mark.parametrize(
    "message", ["max_tokens is too large: 99999. This model supports at most 16384 completion tokens", "no such limit"]
)
def test_the_limit_is_never_left_out(strict, message):
    server, client, _ = strict
    server.refuse = lambda path, request: openai_error(
        400, message, "max_tokens" if "max_tokens" in request else "max_completion_tokens", None
    )
    with pytest.raises(Refusal, match=message[:20]):
        client.ask(CHAT, **DRAWN)
    assert all({"max_tokens", "max_completion_tokens"} & set(request) for request in server.requests)
    assert len(server.requests) == (1 if "too large" in message else 2)


@pytest.mark.parametrize(
    "message",
    [
        "This endpoint does not let you set {}",
        "{} is disabled",
        "{}=0.9 is out of range, only 1 is possible",
        "Bad request. Look at: {}",
    ],
)
@pytest.mark.parametrize("names", [("temperature",), ("seed", "top_p"), ("max_tokens", "seed")])
def test_a_parameter_that_is_named_in_whatever_words_is_left_out_if_that_helps(strict, message, names):
    server, client, notes = strict

    def refuse(path, request):
        name = next((name for name in names if name in request), None)
        return None if name is None else (400, {"message": message.format(name)})

    server.refuse = refuse
    assert client.ask(CHAT, **DRAWN).text == "Hello!"
    assert not set(names) & set(server.requests[-1])
    assert ("max_completion_tokens" in server.requests[-1]) == ("max_tokens" in names)
    before = len(server.requests)
    assert before == 1 + len(names)
    client.ask(CHAT, **DRAWN)
    assert len(server.requests) == before + 1  # it is remembered
    assert len(notes) == len(names)
    assert all(any(f'"{message.format(name)}", so ' in note for note in notes) for name in names)


def test_a_word_that_is_not_the_reason_costs_one_request_and_nothing_else(strict):
    server, client, notes = strict
    body = {"message": "Your text on how to plant a seed at a low temperature could not be read."}
    server.answer = lambda messages: (400, body) if messages[0]["content"] == "bad" else said("Hello!")
    with pytest.raises(Refusal, match="Your text on how to plant") as caught:
        client.ask([{"role": "user", "content": "bad"}], **DRAWN)
    assert caught.value.why == "refused"
    assert len(server.requests) == 3
    assert client.ask(CHAT, **DRAWN).changes == ()
    assert set(DRAWN) < set(server.requests[-1])
    assert notes == []


def test_a_parameter_that_is_refused_with_status_200_is_left_out(strict):
    server, client, notes = strict
    server.refuse = lambda path, request: (
        (200, {"error": {"message": "Unsupported parameter: 'seed'", "code": 400}}) if "seed" in request else None
    )
    assert client.ask(CHAT, **DRAWN).changes == ("seed is left out",)
    assert len(notes) == 1


def test_texts_have_one_name_of_the_limit(strict):
    server, client, _ = strict
    server.refuse = lambda path, request: openai_error(400, "'max_tokens' is not supported", "max_tokens", None)
    with pytest.raises(Refusal, match="'max_tokens' is not supported"):
        client.ask("Hi", **DRAWN)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("status", "body", "found"),
    [
        # What is repeated of the request is not what is said of it
        (422, {"detail": [{"loc": ["body", "messages"], "msg": "too few", "input": "temperature not allowed"}]}, None),
        (400, {"message": "Unsupported: my_seed"}, None),
        (400, {"message": "temperature is fine"}, None),
        (401, {"message": "'seed' is not supported"}, None),
        (400, {"message": "'seed' is not supported: content filter"}, None),
        (400, {"message": "[{'type': 'extra_forbidden', 'loc': ('body', 'seed'), 'msg': 'Extra inputs'}]"}, "seed"),
        (422, '{"detail":[{"loc":["body","top_p"],"msg":"Extra inputs are not permitted"}]}', "top_p"),
        (400, {"message": "litellm.UnsupportedParamsError: m does not support parameters: {'seed': 1}"}, "seed"),
        (400, {"message": "Unknown field", "param": "temperature"}, "temperature"),
        (422, {"error": {"message": "Unrecognized request argument supplied: seed"}}, "seed"),
    ],
)
def test_which_parameter_is_refused_is_read_from_what_is_said(status, body, found):
    assert refused_parameter(status, body, ["seed", "top_p", "temperature", "max_tokens"]) == found


# Single requests


@pytest.mark.parametrize("name", servers.REFUSALS)
def test_a_refusal_is_of_its_request_and_says_why(strict, name):
    about, refusal = servers.REFUSALS[name]
    server, client, notes = strict
    server.answer = lambda messages: refusal if messages[0]["content"] == "bad" else said("Hello!")
    for _ in range(20):  # however many there are, and before any answer
        with pytest.raises(Refusal) as caught:
            client.ask([{"role": "user", "content": "bad"}], **DRAWN)
        assert caught.value.why == about
        if about == "refused":
            break
    assert client.ask(CHAT, **DRAWN).text == "Hello!"
    assert notes == []
    assert all(set(DRAWN) < set(request) for request in server.requests)


@pytest.mark.parametrize(
    ("answer", "about"),
    [
        ((200, {"choices": []}), "failed"),
        ((200, {"choices": None, "error": "model overloaded"}), "failed"),
        ((200, {"error": {"message": "Provider returned error", "code": 502}}), "failed"),
        ((200, {"error": {"message": "bad words", "code": 400}}), "refused"),
        ((200, {"choices": [], "prompt_filter_results": [{"hate": {"filtered": True}}]}), "filtered"),
        ((200, {"choices": [], "promptFeedback": {"blockReason": "SAFETY"}}), "filtered"),
        ((200, {"choices": [{"index": 0, "message": None, "finish_reason": "stop"}]}), "failed"),
        (said("I thi", "SAFETY"), "filtered"),
        (said(None, "content_filter"), "filtered"),
        (said("", "error"), "failed"),
        (said("I thi", "content-filter"), "filtered"),
        (said("I thi", "ERROR_TOXIC"), "filtered"),
        (said("I thi", "USER_CANCEL"), "failed"),
        ((200, {"error": {"message": "Cut off", "code": 502}, "choices": said("I thi", None)[1]["choices"]}), "failed"),
        ((200, 'data: {"choices": [{"delta": {"content": "I thi"}}]}\n\n'), "failed"),
        ((200, 'data: {"choices": [{"delta": {"content": "I thi"}}]}\n\ndata: {"error": {"code": 1}}\n\n'), "failed"),
    ],
)
def test_an_answer_that_is_none_is_counted_even_if_it_is_the_first(strict, answer, about):
    server, client, _ = strict
    server.answer = lambda messages: answer if messages[0]["content"] == "bad" else said("Hello!")
    with pytest.raises(Refusal) as caught:
        client.ask([{"role": "user", "content": "bad"}], **DRAWN)
    assert caught.value.why == about
    assert client.ask(CHAT, **DRAWN).text == "Hello!"


@pytest.mark.parametrize(
    "reason", ["length", "MAX_TOKENS", "model_length", "token_limit", "ERROR_LIMIT", "model_context_window_exceeded"]
)
def test_an_answer_that_reached_the_limit_is_not_finished_whatever_the_limit_is_called(strict, reason):
    server, client, _ = strict
    server.answer = lambda messages: said("<think>Hm, hm", reason)
    reply = client.ask(CHAT, **DRAWN)
    assert (reply.text, reply.reasoning, reply.finished) == ("", "Hm, hm", False)


def test_an_answer_that_is_streamed_unasked_is_read(strict):
    server, client, _ = strict
    call = {"index": 0, "id": "x", "function": {"name": "now", "arguments": '{"zone"'}}
    deltas = [{"role": "assistant", "reasoning_content": "Hm."}, {"content": "Hel"}, {"content": "lo!"}]
    deltas += [{"tool_calls": [call]}, {"tool_calls": [{"index": 0, "function": {"arguments": ': "CET"}'}}]}]
    events = [{"id": "1", "choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    events += [{"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]}]
    events += [{"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 7}}]
    lines = [f"data: {json.dumps(event)}" for event in events]
    server.answer = lambda messages: (200, "\n\n".join([": keep-alive", *lines, "data: [DONE]\n"]))
    reply = client.ask(CHAT, **DRAWN)
    assert reply == Reply('Hello!\n\n[tool call] now({"zone": "CET"})', False, "Hm.", tokens=(5, 7))
    text = json.dumps({"choices": [{"text": "Hello!", "finish_reason": "stop"}]})
    server.answer = lambda messages: (200, f"data: {text}\n\ndata: [DONE]")
    assert client.ask("Hi", **DRAWN) == Reply("Hello!", True)
    thought = {"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}
    for key, content, expected in (
        ("message", "Hel\u2028lo!", Reply("Hel\u2028lo!", True)),
        ("delta", [thought, {"type": "text", "text": "Hello!"}], Reply("Hello!", True, "Hm.")),
        ("message", [{"type": "refusal", "refusal": "No."}], Reply("No.", True)),
    ):
        text = json.dumps({"choices": [{key: {"content": content}}]}, ensure_ascii=False)
        server.answer = lambda messages, text=text: (200, f"data: {text}\r\n\r\ndata: [DONE]\r\n")
        assert client.ask(CHAT, **DRAWN) == expected
    server.answer = lambda messages: (200, 'data: {"error": {"message": "overloaded"}}\n\n')
    with pytest.raises(Refusal, match='gave no answer, but "overloaded"'):
        client.ask(CHAT, **DRAWN)


def test_a_servers_date_to_try_again_is_waited_for(strict):
    server, _, _ = strict
    client = Server("m", server.url, retries=1)
    asked: list[float] = []

    def answer(messages):
        asked.append(time.monotonic())
        server.wait = {"Retry-After": format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)}
        return (429, {"error": {"message": "slow down"}}) if len(asked) == 1 else said("Hello!")

    server.answer = answer
    assert client.ask(CHAT, **DRAWN).text == "Hello!"
    assert asked[1] - asked[0] > 0.9  # a date has whole seconds


def test_failures_one_after_the_other_end_the_run_and_single_ones_do_not(strict):
    server, client, _ = strict
    broken = {"bad"}
    server.answer = lambda messages: (500, "oops") if messages[0]["content"] in broken else said("Hello!")
    bad = [{"role": "user", "content": "bad"}]
    with pytest.raises(ServerError, match='answered 500: "oops"') as caught:
        client.ask(bad, **DRAWN)
    assert not isinstance(caught.value, Refusal)  # it has not answered anything yet
    client.ask(CHAT, **DRAWN)
    for _ in range(10):
        with pytest.raises(Refusal) as caught:
            client.ask(bad, **DRAWN)
        assert caught.value.why is Why.FAILED
        client.ask(CHAT, **DRAWN)
    broken.add("Hi")
    kinds = []
    for _ in range(8):
        with pytest.raises(ServerError) as caught:
            client.ask(CHAT, **DRAWN)
        kinds.append(type(caught.value))
    assert kinds == [Refusal] * 7 + [ServerError]


def test_a_server_that_refuses_all_is_given_up(strict):
    server, client, _ = strict
    server.answer = lambda messages: (400, {"detail": "no"})
    kinds = []
    for _ in range(8):
        with pytest.raises(ServerError, match='answered 400: "no"') as caught:
            client.ask(CHAT, **DRAWN)
        kinds.append(type(caught.value))
    assert kinds == [Refusal] * 7 + [ServerError]


@pytest.mark.parametrize(
    "answer",
    [
        openai_error(429, "You exceeded your quota", None, "insufficient_quota"),
        (402, {"error": {"message": "Insufficient Balance", "type": "unknown_error"}}),
        (402, {"error": {"message": "This request requires more credits, or fewer max_tokens.", "code": 402}}),
        (400, {"error": {"message": "Your credit balance is too low to access the API."}}),
        (403, {"error": {"message": "Insufficient balance. Please recharge."}}),
        (200, {"error": {"message": "Insufficient credits", "code": 402}}),
    ],
)
def test_a_quota_that_is_used_up_ends_the_run(strict, answer):
    server, client, _ = strict
    client.ask(CHAT, **DRAWN)
    server.answer = lambda messages: answer
    with pytest.raises(ServerError, match=answer[1]["error"]["message"]) as caught:
        client.ask(CHAT, **DRAWN)
    assert not isinstance(caught.value, Refusal)


def test_a_server_can_be_behind_a_path_and_a_slash(strict):
    server, _, _ = strict
    for url in (server.url.replace("/v1", "/team/llm/v1"), server.url.replace("/v1", "/team/llm/v1/")):
        client = Server("m", url, retries=0)
        client.check()
        assert client.ask(CHAT, **DRAWN).text == client.ask("Hi", **DRAWN).text == "Hello!"
    assert set(server.paths) == {"/team/llm/v1/chat/completions", "/team/llm/v1/completions"}


def test_a_server_that_still_loads_its_model_is_waited_for(strict):
    server, _, notes = strict
    loading = {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}
    answers = iter([(503, loading)] * 3)
    server.models = lambda: next(answers, (200, {"object": "list", "data": []}))
    Server("m", server.url, timeout=2, note=notes.append).check()
    assert next(answers, None) is None
    assert notes == [f'{server.url}, m: "Loading model". Waiting for up to 2 seconds (--timeout).']
    server.models = lambda: (503, loading)
    server.answer = lambda messages: (503, loading)
    client = Server("m", server.url, timeout=0.2, retries=0, note=notes.append)
    client.check()
    with pytest.raises(ServerError, match='answered 503: "Loading model"'):
        client.ask(CHAT, **DRAWN)


# Chats and texts


def no_chats(path, request):
    return (404, {"detail": "Not Found"}) if path.endswith("/chat/completions") else None


def no_texts(path, request):
    return (405, "<html>Method Not Allowed</html>") if path.endswith("/v1/completions") else None


@pytest.mark.parametrize("refuse", [no_texts, servers.mistral, servers.reasoning_model])
def test_texts_are_asked_as_chats_where_there_is_nothing_else(strict, refuse):
    server, client, notes = strict
    server.refuse = refuse
    reply = client.ask("The capital of France is", max_tokens=7)
    assert (reply.text, reply.changes) == (
        "Hello!",
        ("it takes chats only, so each text is asked as a user's message",),
    )
    assert server.requests[-1]["messages"] == [{"role": "user", "content": "The capital of France is"}]
    client.ask("\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Why?\n\nAssistant:", max_tokens=7)
    assert [turn["content"] for turn in server.requests[-1]["messages"]] == ["Hi", "Hello!", "Why?"]
    assert sum("takes chats only" in note for note in notes) == 1
    assert sum(path.endswith("/v1/completions") for path in server.paths) == 1


@pytest.mark.parametrize("refuse", [no_chats, servers.vllm_base_model])
def test_chats_are_asked_as_texts_where_there_is_nothing_else(strict, refuse):
    server, client, notes = strict
    server.refuse = refuse
    reply = client.ask([*CHAT, {"role": "assistant", "content": "Hello!"}, *CHAT], max_tokens=7)
    assert reply.text == "Hello!"
    assert "it takes no chats" in reply.changes[0]
    assert server.requests[-1]["prompt"] == "User: Hi\n\nAssistant: Hello!\n\nUser: Hi\n\nAssistant:"
    client.ask(CHAT, max_tokens=7)
    assert len(server.requests) == 3
    assert len(notes) == 1


@pytest.mark.parametrize("prompt", ["Hi", CHAT])
def test_a_model_that_is_not_there_is_named(strict, prompt):
    server, client, notes = strict
    server.refuse = lambda path, request: openai_error(404, "The model `m` does not exist", None, "model_not_found")
    for _ in range(2):
        with pytest.raises(ServerError, match=r"The model `m` does not exist.*It has no model 'm'") as caught:
            client.ask(prompt, max_tokens=7)
        assert not isinstance(caught.value, Refusal)
    assert notes == []
    server.refuse = lambda path, request: None
    assert client.ask(prompt, max_tokens=7).changes == ()


@pytest.mark.parametrize(
    "body",
    [
        {"object": "error", "message": "Invalid model: m", "type": "invalid_model", "code": "1500"},
        {"error": {"message": "m is not a valid model ID", "code": 400}},
        {"detail": "Server is pinned to 'other'; requested 'm'."},
        {"error": {"message": "The model `m` does not exist or you do not have access to it.", "code": "x"}},
    ],
)
def test_a_model_that_is_not_there_ends_the_run_whatever_the_status(strict, body):
    server, client, _ = strict
    client.ask(CHAT, max_tokens=7)
    server.answer = lambda messages: (400, body)
    with pytest.raises(ServerError, match="It has no model 'm'") as caught:
        client.ask(CHAT, max_tokens=7)
    assert not isinstance(caught.value, Refusal)


def test_the_other_form_can_be_refused_for_a_reason_of_its_own(strict):
    server, client, _ = strict
    server.refuse = no_texts
    server.answer = lambda messages: servers.REFUSALS["azure"][1]
    with pytest.raises(Refusal) as caught:
        client.ask("bad", max_tokens=7)
    assert caught.value.why is Why.FILTERED


# Real ones


DRAWN_GREEDILY = {"max_tokens": 16, "temperature": 0.0}


@pytest.fixture(scope="module")
def parrot(tmp_path_factory):
    return servers.make_parrot(tmp_path_factory.mktemp("parrot"), "VERDICT: 1")


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.15"),
    reason=f"transformers {transformers.__version__} does not serve completions of text",
)
def test_transformers_serve_is_asked_chats_and_texts(parrot):
    notes: list[str] = []
    with servers.transformers_serve(parrot) as url:
        client = Server(parrot, url, note=notes.append, timeout=120)
        client.check()
        reply = client.ask(CHAT, **DRAWN_GREEDILY)
        assert (reply.text, reply.finished, reply.changes) == ("VERDICT: 1", True, ())
        assert min(reply.tokens) > 0
        assert client.ask("<|user|>Hi<|end|><|assistant|>", **DRAWN_GREEDILY).text == "VERDICT: 1"
        assert not client.ask(CHAT, max_tokens=1, temperature=0.0).finished
        assert client.ask(CHAT, **DRAWN).text
        with pytest.raises(ServerError, match=r"answered [45]"):
            Server("no-such-model", url, retries=0).ask(CHAT, max_tokens=1)
    assert notes == []


@pytest.mark.skipif(not servers.has_llama_cpp(), reason="llama-cpp-python[server] is not installed")
def test_llama_cpps_server_is_asked_chats_and_texts(parrot):
    notes: list[str] = []
    with servers.llama_cpp_serve(servers.make_gguf(parrot), n_ctx=256) as url:
        client = Server("parrot", url, note=notes.append, timeout=120, retries=0, concurrency=1)
        client.check()
        reply = client.ask(CHAT, **DRAWN_GREEDILY)
        assert (reply.text, reply.finished, reply.changes) == ("VERDICT: 1", True, ())
        assert not client.ask(CHAT, max_tokens=1, temperature=0.0).finished  # it knows no max_completion_tokens
        assert client.ask("<|user|>Hi<|end|><|assistant|>", **DRAWN_GREEDILY).text == "VERDICT: 1"
        assert client.ask(CHAT, **DRAWN).text
        with pytest.raises(Refusal) as caught:
            client.ask([{"role": "user", "content": "cat " * 400}], **DRAWN_GREEDILY)
        assert caught.value.why is Why.TOO_LONG
        assert client.ask(CHAT, **DRAWN_GREEDILY).text == "VERDICT: 1"
    assert notes == []


def test_other_endpoints_are_not_seen_everywhere():
    assert not is_other_endpoint(400, "max_tokens is not supported")
    assert not is_other_endpoint(401, "chat model")
    assert why(404, "content filter") is None


# Answers


CALL = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}


@pytest.mark.parametrize(
    ("answer", "text", "reasoning"),
    [
        (said("<think>\nHm.\n</think>\n\nHello!"), "Hello!", "Hm."),
        (said("Hm.\n</think>\n\nHello!"), "Hello!", "Hm."),
        (said("[THINK]Hm.[/THINK]Hello!"), "Hello!", "Hm."),
        (said("<think>Hm, hm", "length"), "", "Hm, hm"),
        (said("Hello!", reasoning_content="Hm."), "Hello!", "Hm."),
        (said("Hello!", reasoning="Hm."), "Hello!", "Hm."),
        (said("\n\nHello!", reasoning="Hm.", reasoning_content=None), "\n\nHello!", "Hm."),
        (said(None, "length", reasoning_content="Hm."), "", "Hm."),
        (
            said(
                [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}, {"type": "text", "text": "Yes"}]
            ),
            "Yes",
            "Hm.",
        ),
        (said("Hello!", reasoning={"effort": "low"}), "Hello!", ""),
        (said(None, "tool_calls", tool_calls=[CALL]), '[tool call] weather({"city": "Oslo"})', ""),
        (
            said("Wait.", "tool_calls", tool_calls=[CALL], reasoning="Hm."),
            'Wait.\n\n[tool call] weather({"city": "Oslo"})',
            "Hm.",
        ),
        (
            said('<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'),
            '[tool call] weather({"city": "Oslo"})',
            "",
        ),
        (said(None, refusal="I can't."), "I can't.", ""),
        (said("<think>Hm.</think>\n<think>Well.</think>\n\nHello!"), "Hello!", "Hm.\n\nWell."),
        (said({"type": "text", "text": "Yes"}), "Yes", ""),
        (said([{"type": "refusal", "refusal": "I can't."}]), "I can't.", ""),
        (said("Cut \ud83d, whole \ud83d\ude00"), "Cut \ufffd, whole \U0001f600", ""),
        (said(None, "function_call", function_call=CALL["function"]), '[tool call] weather({"city": "Oslo"})', ""),
        (said("Use the </think> tag."), "Use the </think> tag.", ""),
        (said(None), "", ""),
    ],
)
def test_answers_are_kept_apart_from_reasoning_and_calls_are_shown(strict, answer, text, reasoning):
    server, client, _ = strict
    server.answer = lambda messages: answer
    reply = client.ask(CHAT, max_tokens=7)
    assert (reply.text, reply.reasoning) == (text, reasoning)
    assert reply.finished == (answer[1]["choices"][0]["finish_reason"] != "length")


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (json.dumps(said("Grün")[1], ensure_ascii=False), "Grün"),
        ("\ufeff" + json.dumps(said("Yes.")[1]), "Yes."),
        (json.dumps(said("One-Two")[1]).replace("-", "\n"), "One\nTwo"),
        (json.dumps(said("Yes.<|im_end|>")[1]), "Yes."),
        (json.dumps(said("<think>Hm.</think>Yes.<|eot_id|>\n")[1]), "Yes."),
        (json.dumps(said("VERDICT: 1</s>")[1]), "VERDICT: 1"),
        (json.dumps({**said("Yes.")[1], "usage": {"prompt_tokens": "seven"}}), "Yes."),
        (json.dumps({**said("Yes.")[1], "usage": {"prompt_tokens": float("nan")}}), "Yes."),
    ],
)
def test_answers_are_read_whatever_a_server_puts_around_them(strict, body, text):
    server, client, _ = strict
    server.wait = {"Content-Type": "text/plain; charset=ISO-8859-1"}
    server.answer = lambda messages: (200, body)
    assert client.ask(CHAT, max_tokens=7).text == text


def test_a_refusal_is_marked_as_one_where_the_server_says_so(strict):
    server, client, _ = strict
    parts = [{"type": "refusal", "refusal": "I can't."}]
    for answer, is_refusal in (
        (said(None, refusal="I can't."), True),
        (said(parts), True),
        (said([{"type": "text", "text": "Yes."}, *parts]), False),
        (said("I can't.", refusal=None), False),
    ):
        server.answer = lambda messages, answer=answer: answer
        assert client.ask(CHAT, max_tokens=7).is_refusal is is_refusal


def test_tokens_are_counted_where_the_server_does(strict):
    server, client, _ = strict
    status, body = said("Hello!")
    server.answer = lambda messages: (status, body | {"usage": {"prompt_tokens": 5, "completion_tokens": 2}})
    assert client.ask(CHAT, max_tokens=7) == Reply("Hello!", True, tokens=(5, 2))


def test_a_gateway_that_answers_without_choices_is_quoted(strict):
    server, client, _ = strict
    server.answer = lambda messages: (200, {"error": {"message": "Upstream is down", "code": 502}, "choices": None})
    with pytest.raises(Refusal, match='gave no answer, but "Upstream is down"'):
        client.ask(CHAT, max_tokens=7)


def test_a_data_sets_messages_are_sent_without_nulls_and_with_ids(strict):
    server, client, _ = strict
    server.refuse = servers.mistral
    call = {"type": "function", "id": None, "function": {"name": "add", "arguments": {"a": 1, "b": None}}}
    turns = [
        {"role": "user", "content": "1 and 2?", "tool_calls": None, "name": None},
        {"role": "assistant", "content": None, "tool_calls": [call, call], "name": None},
        {"role": "tool", "content": "3", "tool_calls": None, "name": "add"},
        {"role": "tool", "content": "3", "tool_calls": None, "name": "add"},
        {"role": "user", "content": "Thanks", "tool_calls": [], "name": None},
    ]
    client.ask(turns, max_tokens=7)
    sent = server.requests[-1]["messages"]
    assert "null" not in json.dumps(sent)
    assert [call["id"] for call in sent[1]["tool_calls"]] == [turn["tool_call_id"] for turn in sent[2:4]]
    assert sent[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 1}'}
    assert "tool_calls" not in sent[4]
    assert turns[1]["tool_calls"][0]["id"] is None  # the caller's own are left as they are
    assert for_server(sent) == sent


def test_conversations_are_shown_with_their_calls_and_without_reasoning():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None}}}
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "1 and 2?"}]},
        {"role": "assistant", "content": "<think>Add.</think>Wait.", "tool_calls": [call], "reasoning_content": "Add."},
        {"role": "tool", "content": "3", "name": "add"},
    ]
    assert as_text(turns) == 'User: [image]1 and 2?\n\nAssistant: Wait.\n\n[tool call] add({"a": 1})\n\nTool: 3'
    assert answer_text(turns[1:2]) == 'Wait.\n\n[tool call] add({"a": 1})'
    assert answer_text(" <think>a</think> b") == "b"
    assert answer_text(" Hello") == " Hello"
    assert split_reasoning("<reasoning>a</reasoning> b") == ("a", "b")
    assert split_reasoning("a</think>b", is_open=True) == ("a", "b")


FINAL = "<|end|><|start|>assistant<|channel|>final<|message|>4"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"<|channel|>analysis<|message|>Hm.{FINAL}<|return|>", ("Hm.", "4")),
        (f"<|start|>assistant<|channel|>analysis<|message|>Hm.{FINAL}", ("Hm.", "4")),
        (f"<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>So:{FINAL}",
         ("Hm.\n\nSo:", "4")),
        ("<|channel|>analysis<|message|>Hm, hm", ("Hm, hm", "")),
        ("<|channel|>final<|message|>4", ("", "4")),
        ("<|channel|>commentary to=functions.now <|constrain|>json<|message|>{}<|call|>", ("", "[tool call] now({})")),
        ("analysisHm.assistantfinal4", ("Hm.", "4")),
        ("analysis of the assistant: final", ("", "analysis of the assistant: final")),
        ("Write <|channel|>final.", ("", "Write <|channel|>final.")),
        ("<seed:think>Hm.</seed:think>4", ("Hm.", "4")),
        ("<|START_THINKING|>Hm.<|END_THINKING|>4", ("Hm.", "4")),
    ],
)  # fmt: skip
def test_only_the_final_channel_is_the_answer(text, expected):
    assert split_reasoning(text) == expected
    assert answer_text([{"role": "assistant", "content": text}]) == expected[1]


def test_a_tag_without_an_end_is_reasoning_only_if_the_text_was_cut():
    html = "<thinking> is a tag in HTML. Use it."
    assert split_reasoning(html) == ("", html)
    assert answer_text(html) == answer_text([{"role": "assistant", "content": html}]) == html
    assert split_reasoning("<think>Hm", is_cut=True) == split_reasoning("<think>Hm", is_open=True) == ("Hm", "")
    assert split_reasoning("<think>a</think><think>b", is_cut=True) == ("a\n\nb", "")
    server = Server("m", "http://localhost:1/v1", timeout=1)
    for reason, expected in (("stop", ("", html)), ("length", (html.removeprefix("<thinking>").strip(), ""))):
        reply = server._reply(html, "", {"finish_reason": reason}, {})
        assert (reply.reasoning, reply.text) == expected
