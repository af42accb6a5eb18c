"""A model behind an OpenAI-compatible server: vLLM, `transformers serve`, llama.cpp, a hosted API."""

import json
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from typing import Any, TypeVar
from urllib.parse import urlsplit

import openai
from transformers.utils import logging

from trl_ulma.data.conversations import is_transcript, parse_transcript
from trl_ulma.evaluation.model_names import is_same_model
from trl_ulma.evaluation.refusals import (
    Why,
    ended,
    is_other_endpoint,
    is_unknown_model,
    is_used_up,
    named_parameters,
    refused_parameter,
    said,
    why,
)
from trl_ulma.evaluation.turns import (
    REASONING_KEYS,
    as_text,
    calls_text,
    content_text,
    for_server,
    joined_stream,
    refusal_text,
    show_calls,
    split_reasoning,
    without_end,
)

logger = logging.get_logger(__name__)

KEY_VARIABLE = "OPENAI_API_KEY"
_NO_KEY = "no-key-needed"
_NAME_IT = (
    "name the variable by key_variable (on the command line: --key_variable, of served models --server_key_variable)"
)
# After so many failures in a row, the server is not asked again
_GIVE_UP = 8
# Parameters in the order in which they are left out. The limit of an answer has two names and is never left out.
_SAMPLING = ("seed", "top_p", "temperature")
_LIMITS = ("max_tokens", "max_completion_tokens")
# In a refusal of the value of a limit, not of its name
_OF_VALUES = ("too large", "at most", "at least", "greater than", "less than")
_LONGEST_NAME = 200  # characters
# Notices: a text was sent instead of a chat (True), or the reverse
_FORMS = {
    True: "it takes no chats, so conversations are asked as text that it continues, without a chat template",
    False: "it takes chats only, so each text is asked as a user's message",
}

Item = TypeVar("Item")


class ServerError(OSError):
    """A server does not answer. The message says what to do, and never contains the key."""


class _Within(openai.APIStatusError):
    """An error with status 200, which gateways send.

    Attributes:
        is_api: whether the body has the form of OpenAI's protocol, so that other requests may be answered.
    """

    is_api = True


class Refusal(ServerError):
    """One request got no answer, but others may.

    Attributes:
        why: the reason.
    """

    def __init__(self, text: str, why: Why):
        super().__init__(text)
        self.why = why


@dataclass(frozen=True)
class Reply:
    """The answer of a server.

    Attributes:
        text: the answer without reasoning, with tool calls as text.
        finished: whether it ended before the limit of tokens.
        reasoning: the reasoning of the model.
        refused: why there is no answer, or None.
        changes: descriptions of what the server did not accept in the request.
        tokens: the numbers of tokens of request and answer that the server reports; otherwise zeros.
        is_refusal: whether the server marks the text as the model's refusal to answer.
        answered_by: the name of the model that answered, if the server spells it otherwise than it was asked for.
    """

    text: str
    finished: bool
    reasoning: str = ""
    refused: Why | None = None
    changes: tuple[str, ...] = ()
    tokens: tuple[int, int] = (0, 0)
    is_refusal: bool = False
    answered_by: str = ""


class Budget:
    """The largest number of requests to all servers.

    Args:
        most: the number, or None for no limit. Retries after a failure are not counted, because servers do not bill
            them.

    Example:
        >>> budget = Budget(1)
        >>> budget.take(), budget.take(), budget.taken
        (True, False, 1)
    """

    def __init__(self, most: int | None = None):
        self.most, self.taken = most, 0
        self._lock = threading.Lock()

    def take(self) -> bool:
        """Return whether another request is allowed, and count it."""
        with self._lock:
            there = self.most is None or self.taken < self.most
            self.taken += there
        return there


class Server:
    """One model on a server, asked by the `openai` client, which retries with growing pauses (and as long as a server's
    Retry-After asks): after lost connections and timeouts, and on 408, 409, 429 and 5xx.

    What the server does not take is done without, once for all requests, with a notice: a sampling parameter is left
    out, `max_tokens` becomes `max_completion_tokens`, text is asked as a chat, or a chat as text.

    The key is read from the environment. It is in no error, log or reply that comes from here, even where the server
    repeats it.

    Args:
        model: the name of the model on the server.
        base_url: the URL, such as "http://localhost:8000/v1". By default OPENAI_BASE_URL, or else OpenAI's.
        key_variable: the environment variable with the key. By default OPENAI_API_KEY if there is no `base_url`, and
            none otherwise, so that OpenAI's key is not sent to others.
        timeout: the time limit of one answer in seconds.
        retries: the number of retries after a failure.
        concurrency: the number of simultaneous requests.
        note: called with what the server does not accept.
        budget: the limit of requests. None is no limit.

    Raises:
        ValueError: if the URL is invalid, or contains a key, a password or a query.
        ServerError: if there is no key for OpenAI's server.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        *,
        key_variable: str | None = None,
        timeout: float = 60.0,
        retries: int = 5,
        concurrency: int = 8,
        note: Callable[[str], None] = logger.warning,
        budget: Budget | None = None,
    ):
        if key_variable is None and not base_url:
            key_variable = KEY_VARIABLE
        self._key = os.environ.get(key_variable, "").strip() if key_variable else ""
        # The client would use this address, too. It is checked before a request is logged.
        self.base_url = (
            (base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1").strip().rstrip("/")
        )
        parts = urlsplit(self.base_url)
        keys = filter(None, (self._key, os.environ.get(KEY_VARIABLE, "").strip()))
        if "@" in parts.netloc or parts.query or parts.fragment or any(key in self.base_url for key in keys):
            raise ValueError(
                "A server's URL is logged and reported, and must not hold a user, a password or a query. Put the key "
                f"into an environment variable, and {_NAME_IT}."
            )
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{self.base_url!r} is no server's URL; it must be such as http://localhost:8000/v1.")
        if not self._key and parts.hostname == "api.openai.com":
            unset = f"the environment variable {key_variable} is not set" if key_variable else "no variable is named"
            raise ServerError(
                f"{self.base_url} needs a key, and {unset}. Put it into an environment variable, and {_NAME_IT}; or "
                "name another server's URL."
            )
        self.model, self.key_variable = model, key_variable
        self.timeout, self.retries, self.concurrency = timeout, retries, concurrency
        self._client = openai.OpenAI(
            api_key=self._key or _NO_KEY, base_url=self.base_url, timeout=timeout, max_retries=retries
        )
        self._note, self._budget = note, budget or Budget()
        self._lock = threading.Lock()
        # Known of the server: parameters that it refuses, the name of its limit, and whether it accepts chats and texts
        self._dropped: set[str] = set()
        self._limit = _LIMITS[0]
        self._asks_chats: dict[bool, bool] = {True: True, False: False}
        self._told: set[str] = set()
        self._other_model = ""  # the first that answered in place of the one that was asked for
        self._answered = self._failed = 0

    def ask(self, prompt: str | list[dict[str, Any]], **sampling: Any) -> Reply:
        """Return the answer to messages (a chat) or to a text to continue.

        Args:
            prompt: messages or text.
            **sampling: `max_tokens`, and where wanted `temperature`, `top_p`, `seed`. What is None is not sent.

        Raises:
            Refusal: if this request gets no answer, but others may.
            ServerError: if the server does not answer.
        """
        wanted = {name: value for name, value in sampling.items() if value is not None}
        is_chat = not isinstance(prompt, str)
        first: openai.APIStatusError | None = None
        # Parameters that a refusal mentions. If there is an answer without one, it was the reason.
        suspected: dict[str, openai.APIStatusError] = {}
        while True:  # each turn leaves something out, or takes the other form, once
            asks_chat = self._asks_chats[is_chat]
            left_out = self._dropped | (set(suspected) - set(_LIMITS))
            sent = {name: value for name, value in wanted.items() if name not in left_out}
            limit = _LIMITS[1] if asks_chat and _LIMITS[0] in suspected else self._limit
            if _LIMITS[0] in sent:
                sent[limit if asks_chat else _LIMITS[0]] = sent.pop(_LIMITS[0])
            if not self._budget.take():
                raise Refusal(f"The limit of {self._budget.most} requests is reached.", Why.NOT_ASKED)
            reply, problem, about, error, is_up = None, "", None, None, False
            try:
                reply = self._chat(prompt, sent) if asks_chat else self._complete(prompt, sent)
            except openai.APIStatusError as refusal:
                error = refusal
            except openai.OpenAIError as failure:
                problem = self._explain(failure, tries=self.retries + 1)
                about = Why.FAILED if isinstance(failure, openai.APITimeoutError) else None
            except (AttributeError, KeyError, TypeError, ValueError) as failure:  # an answer of another form
                name = type(failure).__name__
                problem = f"{self.base_url} answered with what is not in OpenAI's protocol ({name})."
                about, is_up = Why.FAILED, True
            # Outside the handlers, because a chained exception could contain the key
            if reply is not None:
                break
            if error is None:
                raise self._given_up(problem, about, is_up=is_up)
            name = refused_parameter(error.status_code, self._body(error), self._names(sent))
            if name is not None and self._is_dispensable(name, error, asks_chat):
                self._leave_out(name, error)
                continue
            named = named_parameters(error.status_code, self._body(error), self._names(sent))
            name = next((each for each in named if self._is_dispensable(each, error, asks_chat)), None)
            if name is not None:
                suspected[name] = error
                continue
            if is_other_endpoint(error.status_code, self._body(error)):
                # The error of an unknown model is the same. Only an answer shows whether the other form is accepted.
                if first is None:
                    first, self._asks_chats[is_chat] = error, not asks_chat
                    continue
                error, self._asks_chats[is_chat] = first, is_chat
            raise self._refused(next(iter(suspected.values()), error))
        for name, error in suspected.items():
            self._leave_out(name, error)
        with self._lock:
            self._answered, self._failed = self._answered + 1, 0
            is_other = bool(reply.answered_by) and not is_same_model(self.model, reply.answered_by)
            if is_other and not self._other_model:
                self._other_model = reply.answered_by
        if is_other:
            self._tell(f"the server answers with another model, {self._other_model}. Is {self.model} the right name?")
        if reply.refused is not None:
            raise Refusal(f"{self.base_url} did not finish its answer ({reply.refused.value}).", reply.refused)
        changes = tuple(f"{name} is left out" for name in wanted if name in _SAMPLING and name not in sent)
        if asks_chat != is_chat:
            changes += (_FORMS[is_chat],)
            self._tell(f"{_FORMS[is_chat]}.")
        return replace(reply, changes=changes)

    def check(self) -> None:
        """Raise ServerError if the server cannot be reached or refuses the key. Asks the server for its models.

        A server that has no such list passes. If the server answers 503, as llama.cpp does while it loads a model, this
        waits for up to `timeout` seconds.
        """
        until = time.monotonic() + self.timeout
        while True:
            try:
                self._client.with_options(max_retries=0).models.list()
            except (openai.APIConnectionError, openai.AuthenticationError, openai.PermissionDeniedError) as error:
                problem = self._explain(error, tries=1)
                break
            except openai.InternalServerError as error:
                if error.status_code != 503 or time.monotonic() > until:
                    return  # asking will tell
                self._tell(f'"{self._said(error)}". Waiting for up to {self.timeout:g} seconds (--timeout).')
                time.sleep(min(1.0, self.timeout / 10))
            except Exception:  # no such list, or a list of another form: asking will tell
                return
            else:
                return
        raise ServerError(problem)

    def each(self, work: Callable[[Item], None], items: Iterable[Item]) -> None:
        """Call `work` for all items, `concurrency` at once. It stops at the first error, when running calls have ended.

        The first request to a server is made alone, so that what it does not take is found out, and told, once.

        Args:
            work: the function. It stores its result.
            items: its arguments.
        """
        items = list(items)
        if items and not self._answered:
            work(items.pop(0))
        with ThreadPoolExecutor(self.concurrency) as pool:
            futures = [pool.submit(work, item) for item in items]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def without_key(self, text: str) -> str:
        """The text of a server, without the key. Half of a surrogate pair, which no file can hold, is replaced."""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return text.replace(self._key, f"[{self.key_variable}]") if self._key else text

    # Requests

    def _chat(self, prompt: Any, sent: dict[str, Any]) -> Reply:
        messages: Any = as_messages(prompt) if isinstance(prompt, str) else for_server(prompt)
        create = self._client.chat.completions.with_raw_response.create
        choice, answer = self._choice(create(model=self.model, messages=messages, **sent).http_response)
        message = choice["message"]
        thought, text = content_text(message.get("content"))
        told = (message.get(key) for key in REASONING_KEYS)
        thought = next((each for each in told if isinstance(each, str) and each), thought)
        refusal = refusal_text(message)
        is_refusal = bool(refusal) and text in ("", refusal)
        calls = message.get("tool_calls") or [message.get("function_call")]
        reply = self._reply(text or refusal, thought, choice, answer, filter(None, calls))
        return replace(reply, is_refusal=is_refusal)

    def _complete(self, prompt: Any, sent: dict[str, Any]) -> Reply:
        text = prompt if isinstance(prompt, str) else f"{as_text(prompt)}\n\nAssistant:"
        create = self._client.completions.with_raw_response.create
        choice, answer = self._choice(create(model=self.model, prompt=text, **sent).http_response)
        return self._reply(choice.get("text") or "", "", choice, answer)

    def _choice(self, response: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns (first choice, whole answer).

        Raises:
            _Within: if it is not an answer.
        """
        # JSON is UTF-8, whatever the headers say, and some servers mark it as such or leave line breaks in its texts
        text = response.content.decode("utf-8-sig", "replace").strip()
        try:
            answer = joined_stream(text) or json.loads(text, strict=False)
        except ValueError:
            what = "an HTML page" if text[:1] == "<" else "what is no JSON" if text else "nothing"
            raise self._within(response, 500, f"{what}: {text[:100]}" if text else what, is_api=False) from None
        if isinstance(answer, dict) and answer.get("choices") and not answer.get("error"):
            return answer["choices"][0], answer
        told = answer.get("error") or answer.get("detail") if isinstance(answer, dict) else None
        if told:
            code = str(told.get("code") or told.get("status")) if isinstance(told, dict) else ""
            raise self._within(response, int(code) if code.isdigit() and 400 <= int(code) < 600 else 500, told)
        if '"filtered": true' in json.dumps(answer) or "blockReason" in text:
            raise self._within(response, 400, "no choices, because of a content filter")
        is_api = isinstance(answer, dict) and "choices" in answer
        raise self._within(response, 500, "no choices", is_api=is_api)

    def _within(self, response: Any, status: int, told: Any, *, is_api: bool = True) -> _Within:
        response = type(response)(status, request=response.request)  # of the library that `openai` asks with
        error = _Within(said(told), response=response, body=told)
        error.is_api = is_api
        return error

    def _reply(self, text: str, thought: str, choice: Any, answer: Any, calls: Iterable[Any] = ()) -> Reply:
        finished, about = ended(choice.get("finish_reason"))
        within, text = split_reasoning(without_end(text), is_cut=not finished)
        usage = answer.get("usage")
        model = answer.get("model")
        is_named = isinstance(model, str) and model.strip() != self.model.strip()
        counts = [usage.get(name) if isinstance(usage, dict) else 0 for name in ("prompt_tokens", "completion_tokens")]
        counted = [count if isinstance(count, int) else 0 for count in counts]
        return Reply(
            self.without_key("\n\n".join(filter(None, (show_calls(text), calls_text([*calls]))))),
            finished,
            self.without_key("\n\n".join(filter(None, (thought, within)))),
            about,
            tokens=(counted[0], counted[1]),
            answered_by=self.without_key(model.strip())[:_LONGEST_NAME] if is_named else "",
        )

    # Refusals

    @staticmethod
    def _names(sent: dict[str, Any]) -> list[str]:
        return [name for name in (*_SAMPLING, *_LIMITS) if name in sent]

    def _is_dispensable(self, name: str, error: openai.APIStatusError, asks_chat: bool) -> bool:
        """Return whether a request can omit a parameter, or use its other name."""
        if name not in _LIMITS:
            return True
        return name == _LIMITS[0] and asks_chat and not any(word in self._said(error) for word in _OF_VALUES)

    def _leave_out(self, name: str, error: openai.APIStatusError) -> None:
        """Omit a parameter in all further requests, with a notice."""
        if name in _LIMITS:
            self._limit = _LIMITS[1]
            change = f"{_LIMITS[1]} is sent in place of {name}"
        else:
            self._dropped.add(name)
            change = f"{name} is left out of all requests, and is what the server makes it"
        self._tell(f'"{self._said(error)}", so {change}.')

    def _tell(self, text: str) -> None:
        """Note once what the server does not accept."""
        with self._lock:
            is_new = text not in self._told
            self._told.add(text)
        if is_new:
            self._note(f"{self.base_url}, {self.model}: {text}")

    def _refused(self, error: openai.APIStatusError) -> ServerError:
        status, body = error.status_code, self._body(error)
        about = why(status, body)
        problem = self._explain(error, tries=self.retries + 1)
        is_for_all = status in (401, 403, 404, 405) or is_unknown_model(status, body)
        if is_used_up(status, body) or (about is None and is_for_all):
            return ServerError(problem)
        about = about or (Why.FAILED if status == 429 or status >= 500 else Why.REFUSED)
        return self._given_up(problem, about, is_up=about is Why.REFUSED or getattr(error, "is_api", False))

    def _given_up(self, problem: str, about: Why | None, *, is_up: bool = False) -> ServerError:
        """The error of one request, or of the server if no request gets an answer."""
        if about is not None and about not in (Why.FAILED, Why.REFUSED):
            return Refusal(problem, about)
        with self._lock:
            self._failed += 1
            alone = self._failed < _GIVE_UP and (self._answered > 0 or is_up)
        return Refusal(problem, about) if about is not None and alone else ServerError(problem)

    def _explain(self, error: openai.OpenAIError, *, tries: int) -> str:
        asked = f"{tries} tries" if tries > 1 else "1 try"
        again = "Then run the same command again: the answers so far are kept."
        if isinstance(error, openai.APITimeoutError):
            return (
                f"{self.base_url} gave no answer within {self.timeout:g} seconds, in {asked}. Allow more time, or ask "
                f"for less at once (concurrency {self.concurrency}). {again}"
            )
        if isinstance(error, openai.APIConnectionError):
            cause = f"{type(error.__cause__).__name__}: {error.__cause__}" if error.__cause__ else "no connection"
            quoted = self.without_key(" ".join(cause.split()))[:200]
            return (
                f"{self.base_url} cannot be reached, in {asked} ({quoted}). Start the server or mend its URL. {again}"
            )
        if not isinstance(error, openai.APIStatusError):
            return f"{self.base_url}: {self.without_key(str(error))[:200]}"
        if isinstance(error, _Within) and error.status_code not in (401, 403, 429):
            is_it = "" if error.is_api else " Is it an OpenAI-compatible server?"
            return f'{self.base_url} gave no answer, but "{self._said(error)}".{is_it}'
        told = f'{self.base_url} answered {error.status_code}: "{self._said(error)}".'
        if is_used_up(error.status_code, self._body(error)):
            return f"{told} Its account has no credit left. {again}"
        if error.status_code in (401, 403):
            if self.key_variable is None:
                return f"{told} It was asked without a key. Put one into an environment variable, and {_NAME_IT}."
            state = "is refused" if self._key else "is not set"
            return (
                f"{told} The key of the environment variable {self.key_variable} {state}. Set the right one, or "
                f"{_NAME_IT}."
            )
        if error.status_code == 404 or is_unknown_model(error.status_code, self._body(error)):
            return f"{told} It has no model {self.model!r}, or its URL is another: most end in /v1."
        if error.status_code == 429:
            return f"{told} It still limits requests after {asked}: wait, or ask for less at once. {again}"
        if error.status_code >= 500:
            return f"{told} It failed in {asked}; its own log says why. {again}"
        if why(error.status_code, self._body(error)) is not None:  # which it says itself
            return told
        return f"{told} The server refuses the request. Its documentation says what the model accepts."

    def _said(self, error: openai.APIStatusError) -> str:
        return self.without_key(said(self._body(error)))[:200]

    @staticmethod
    def _body(error: openai.APIStatusError) -> Any:
        return error.body if error.body is not None else error.response.text


def as_messages(text: str) -> list[dict[str, str]]:
    r"""A text as a chat: the turns of a transcript, or one user message.

    Example:
        >>> as_messages("Hi"), as_messages("\n\nHuman: Hi\n\nAssistant:")
        ([{'role': 'user', 'content': 'Hi'}], [{'role': 'user', 'content': 'Hi'}])
    """
    if is_transcript(text) and text.lstrip().startswith("Human:"):
        turns = [{**turn, "content": turn["content"].strip()} for turn in parse_transcript(text)]
        return [turn for i, turn in enumerate(turns) if i < len(turns) - 1 or turn["content"]]
    return [{"role": "user", "content": text}]
