"""A model behind an OpenAI-compatible server: vLLM, `transformers serve`, a hosted API."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import openai

KEY_VARIABLE = "OPENAI_API_KEY"
_NO_KEY = "no-key-needed"
_NAME_IT = (
    "name the variable by key_variable (on the command line: --key_variable, of served models --server_key_variable)"
)

Item = TypeVar("Item")


class ServerError(OSError):
    """Why a server gives no answer, and what to do. It never contains the key."""


@dataclass(frozen=True)
class Reply:
    """What a server answered.

    Attributes:
        text: the answer.
        finished: whether it ended by itself, and not at the limit of tokens.
    """

    text: str
    finished: bool


class Server:
    """One model on a server, asked by the `openai` client, which retries with growing pauses (and as long as a server's
    Retry-After asks): after lost connections and timeouts, and on 408, 409, 429 and 5xx.

    The key is read from the environment. It is in no error, log or reply that comes from here, even where the server
    repeats it.

    Args:
        model: the model's name on the server.
        base_url: such as "http://localhost:8000/v1"; by default that of OPENAI_BASE_URL, else OpenAI's.
        key_variable: the environment variable with the key. By default OPENAI_API_KEY where there is no `base_url`, and
            none where there is: a key goes to nobody whom it was not named for.
        timeout: seconds for one answer.
        retries: tries after the first.
        concurrency: requests under way at once.

    Raises:
        ValueError: for a URL that is none, or that has a key, a password or a query in it.
        ServerError: where OpenAI's own server is asked without a key.
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
    ):
        if key_variable is None and not base_url:
            key_variable = KEY_VARIABLE
        self._key = os.environ.get(key_variable, "").strip() if key_variable else ""
        # The client's own way of finding the address, checked before a request puts it into a log
        self.base_url = (base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1").strip()
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

    def ask(self, prompt: str | list[dict[str, Any]], **sampling: Any) -> Reply:
        """The answer to messages, as a chat, or to a text, which is continued.

        Args:
            prompt: messages, or text.
            **sampling: `max_tokens`, and where wanted `temperature`, `top_p`, `seed`.

        Raises:
            ServerError: where no answer can be had.
        """
        try:
            if isinstance(prompt, str):
                choices = self._client.completions.create(model=self.model, prompt=prompt, **sampling).choices
                text = choices[0].text if choices else None
            else:
                # The newer name, which hosted models insist on
                sampling["max_completion_tokens"] = sampling.pop("max_tokens")
                messages: Any = prompt
                answer = self._client.chat.completions.create(model=self.model, messages=messages, **sampling)
                choices = answer.choices
                text = choices[0].message.content if choices else None
        except openai.OpenAIError as error:
            problem = self._explain(error, tries=self.retries + 1)
        except (AttributeError, TypeError, ValueError) as error:  # an answer of another form
            problem = f"{self.base_url} answered with what is not in OpenAI's protocol ({type(error).__name__})."
        else:
            if choices:
                return Reply(self.without_key(text or ""), choices[0].finish_reason != "length")
            problem = f"{self.base_url} answered without choices. Is it an OpenAI-compatible server?"
        # Outside the handler: a chained exception's text is the server's, and can hold the key
        raise ServerError(problem)

    def check(self) -> None:
        """Raise ServerError where the server cannot be reached or refuses the key: asks it for its models.

        A server that does not tell them is not faulted for it.
        """
        try:
            self._client.with_options(max_retries=0).models.list()
        except (openai.APIConnectionError, openai.AuthenticationError, openai.PermissionDeniedError) as error:
            problem = self._explain(error, tries=1)
        except Exception:  # no such list, or one of another form: asking will tell
            return
        else:
            return
        raise ServerError(problem)

    def each(self, work: Callable[[Item], None], items: Iterable[Item]) -> None:
        """Do `work` on all items, `concurrency` at once; the first error ends it, when those under way are through.

        Args:
            work: takes care that what it did is kept.
            items: what to do it on.
        """
        with ThreadPoolExecutor(self.concurrency) as pool:
            futures = [pool.submit(work, item) for item in items]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def without_key(self, text: str) -> str:
        """A server's text, the key in it replaced."""
        return text.replace(self._key, f"[{self.key_variable}]") if self._key else text

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
            said = self.without_key(" ".join(cause.split()))[:200]
            return f"{self.base_url} cannot be reached, in {asked} ({said}). Start the server or mend its URL. {again}"
        if not isinstance(error, openai.APIStatusError):
            return f"{self.base_url}: {self.without_key(str(error))[:200]}"
        said = f'{self.base_url} answered {error.status_code}: "{self._said(error)}".'
        if error.status_code in (401, 403):
            if self.key_variable is None:
                return f"{said} It was asked without a key. Put one into an environment variable, and {_NAME_IT}."
            state = "is refused" if self._key else "is not set"
            return (
                f"{said} The key of the environment variable {self.key_variable} {state}. Set the right one, or "
                f"{_NAME_IT}."
            )
        if error.status_code == 404:
            return f"{said} It has no model {self.model!r}, or its URL is another: most end in /v1."
        if error.status_code == 429:
            return f"{said} It still limits requests after {asked}: wait, or ask for less at once. {again}"
        if error.status_code >= 500:
            return f"{said} It failed in {asked}; its own log says why. {again}"
        return f"{said} The request is not to its liking; its documentation says what the model takes."

    def _said(self, error: openai.APIStatusError) -> str:
        body: Any = error.body
        message = body.get("message") if isinstance(body, dict) else None
        return self.without_key(" ".join(str(message or error.response.text).split()))[:200]
