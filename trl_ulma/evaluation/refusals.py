"""Finds out why a server refused a request. Servers only agree on the status codes."""

import json
import re
from collections.abc import Iterable, Iterator
from enum import StrEnum
from typing import Any


class Why(StrEnum):
    """The reason why a request got no valid answer.

    FAILED and NOT_ASKED, which is beyond the budget of requests, can be otherwise in the next run; the others come from
    what was asked, and are remembered.
    """

    FILTERED = "filtered"
    TOO_LONG = "too long"
    REFUSED = "refused"
    FAILED = "failed"
    NOT_ASKED = "not asked"
    CUT = "cut"
    UNPARSABLE = "unparsable"


PASSING = (Why.FAILED, Why.NOT_ASKED)

# `finish_reason` of incomplete answers, in lower case with underscores: OpenAI; Mistral; Google, Zhipu, Anthropic,
# Cohere and IBM behind gateways
_AT_LIMIT = (
    *("length", "max_tokens", "max_output_tokens", "model_length", "max_length", "token_limit", "time_limit"),
    *("model_context_window_exceeded", "error_limit", "repetition_truncation"),
)
_AT_FILTER = (
    *("content_filter", "content_filtered", "refusal", "guardrail_intervened", "sensitive", "error_toxic"),
    *("safety", "recitation", "blocklist", "prohibited_content", "spii", "language"),
    *("image_safety", "image_prohibited_content", "image_recitation", "image_other", "model_armor"),
)
_AT_FAILURE = (
    *("error", "network_error", "malformed_function_call", "unexpected_tool_call", "too_many_tool_calls"),
    *("abort", "aborted", "cancelled", "canceled", "user_cancel", "timeout", "insufficient_system_resource", "other"),
)

# Azure and OpenAI; OpenRouter; Alibaba; Google; DeepSeek; Zhipu
_FILTERED = re.compile(
    r"content[ _-]?(?:filter|management|policy|moderation)|responsible ?ai|moderation|was flagged|violat\w+ .*polic|"
    r"data_?inspection_?failed|inappropriate content|prohibited_content|blocked (?:by|for|due)|\bblock_?reason\b|"
    r"content_?blocked|safety system|content exists risk|敏感内容",
    re.IGNORECASE,
)
# OpenAI and vLLM; llama.cpp and llama-cpp-python; Mistral; text-generation-inference; Google; Amazon; Alibaba
_TOO_LONG = re.compile(
    r"context[ _](?:length|size|window)|maximum (?:model|sequence|input|prompt) length|max_model_len|"
    r"(?:prompt|input)s?`? (?:is|are|contains?\b.*) too (?:long|large)|reduce the length|"
    r"inputs`? (?:must have less|tokens \+)|request entity too large|too many input tokens|"
    r"input (?:token count|length).{0,20} exceeds|range of input length|exceeds? (?:the )?max message tokens",
    re.IGNORECASE,
)
# OpenAI, of models that reason
_CUT = re.compile(r"(?:max_tokens|max_completion_tokens|model output limit).* was reached", re.IGNORECASE)
_UNSUPPORTED = re.compile(
    r"unsupported|unexpected|unknown|unrecogni[sz]ed|extra|forbidden|deprecated|not (?:be |yet |currently )?"
    r"(?:support|permit|allow|accept|recogni[sz]|implement|available)|"
    r"(?:does|do) ?n[o'’]t (?:support|accept|allow|take)|only the default|cannot (?:both )?be|must be|should be|"
    r"not have any effect",
    re.IGNORECASE,
)
_OTHER_ENDPOINT = re.compile(
    r"chat[ _]?template|(?:is|not) (?:a )?(?:chat|completion)s? model|v1/(?:chat/)?completions|"
    r"does not support (?:the )?(?:chat|completion)",
    re.IGNORECASE,
)


# OpenAI; Mistral; OpenRouter; `transformers serve`
_NO_MODEL = re.compile(
    r"model_not_found|invalid[_ ]model|not a valid model|unknown model|is pinned to|"
    r"\bmodel\b.{0,80}\b(?:does not exist|not found|is not available)",
    re.IGNORECASE,
)


# OpenAI; Anthropic; DeepSeek and others, which have a status for it
_NO_CREDIT = re.compile(r"insufficient_quota|credit balance is too low|insufficient (?:balance|credits?|funds)", re.I)


def said(body: Any) -> str:
    """The message in the body of a refusal, in one line.

    Example:
        >>> said({"message": {"detail": [{"loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]}})
        'Extra inputs are not permitted'
        >>> said({"message": "No.", "code": "content_filter"}), said("<html>oops</html>")
        ('No.', '<html>oops</html>')
    """
    texts = [text for _, text in _parts(body)]
    return " ".join("; ".join(dict.fromkeys(texts)).split())


def why(status: int, body: Any) -> Why | None:
    """The reason of a refusal: FILTERED, TOO_LONG or CUT. None for other reasons.

    Args:
        status: the HTTP status.
        body: the body, JSON or text. In OpenAI's form, the value of "error".

    Example:
        >>> why(400, {"message": "The response was filtered", "code": "content_filter"})
        <Why.FILTERED: 'filtered'>
        >>> why(500, {"message": "Context size has been exceeded.", "type": "server_error"})
        <Why.TOO_LONG: 'too long'>
        >>> why(401, "content filter") is None
        True
    """
    if status in (401, 404, 405, 429):
        return None
    text = f"{said(body)} {_codes(body)}"
    if _FILTERED.search(text):
        return Why.FILTERED
    if status == 403:
        return None
    if _CUT.search(text):
        return Why.CUT
    return Why.TOO_LONG if status == 413 or _TOO_LONG.search(text) else None


def refused_parameter(status: int, body: Any, sent: Iterable[str]) -> str | None:
    """The parameter of a request that the server does not accept. None if the reason is another one.

    Args:
        status: the HTTP status.
        body: see `why`.
        sent: the names of the parameters, in the order in which they can be omitted.

    Example:
        >>> body = {"message": "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
        ...                    "'max_completion_tokens' instead.", "param": "max_tokens"}
        >>> refused_parameter(400, body, ["temperature", "max_tokens"])
        'max_tokens'
        >>> refused_parameter(422, {"detail": [{"loc": ["body", "seed"], "msg": "Extra inputs"}]}, ["seed"])
        'seed'
        >>> refused_parameter(400, "`temperature` and `top_p` cannot both be specified", ["top_p", "temperature"])
        'top_p'
    """
    if status not in (400, 422, 500, 501) or why(status, body) is not None:
        return None
    sent = list(sent)
    param = body.get("param") if isinstance(body, dict) else None
    places = [place for place, _ in _parts(body) if place is not None]
    for name in sent:
        if param == name or any(place and place[-1] == name for place in places):
            return name
    if places:  # it says where, and that is none of these
        return None
    text = said(body)
    return next(iter(_named(text, sent)), None) if _UNSUPPORTED.search(text) else None


def named_parameters(status: int, body: Any, sent: Iterable[str]) -> list[str]:
    """The parameters of a request that a refusal mentions.

    Args:
        status: the HTTP status.
        body: see `why`.
        sent: see `refused_parameter`.

    Example:
        >>> named_parameters(400, "This endpoint does not let you set temperature", ["seed", "temperature"])
        ['temperature']
        >>> named_parameters(400, "The sampling_temperature is odd", ["temperature"])
        []
    """
    if status not in (400, 422) or why(status, body) is not None:
        return []
    return _named(said(body), sent)


def ended(finish_reason: Any) -> tuple[bool, Why | None]:
    """Returns (whether an answer ended before the limit of tokens, why it is not valid or None).

    Example:
        >>> ended("stop"), ended("MAX_TOKENS"), ended("content_filter")
        ((True, None), (False, None), (True, <Why.FILTERED: 'filtered'>))
        >>> [ended(reason)[1].value for reason in ("guardrail_intervened", "abort", "content-filter")]
        ['filtered', 'failed', 'filtered']
    """
    reason = str(finish_reason).lower().replace("-", "_")
    about = Why.FILTERED if reason in _AT_FILTER else Why.FAILED if reason in _AT_FAILURE else None
    return reason not in _AT_LIMIT, about


def is_other_endpoint(status: int, body: Any) -> bool:
    """Whether a refusal can mean that a model only accepts chats, or only texts.

    Example:
        >>> is_other_endpoint(400, "default chat template is no longer allowed"), is_other_endpoint(404, "Not Found")
        (True, True)
        >>> is_other_endpoint(400, "temperature must be 1")
        False
    """
    return status in (404, 405, 501) or (status in (400, 422, 500) and bool(_OTHER_ENDPOINT.search(said(body))))


def is_unknown_model(status: int, body: Any) -> bool:
    """Whether a refusal says that the server does not have the model.

    Example:
        >>> is_unknown_model(400, {"message": "Invalid model: m", "type": "invalid_model"}), is_unknown_model(400, "no")
        (True, False)
    """
    return status in (400, 404, 422) and bool(_NO_MODEL.search(f"{said(body)} {_codes(body)}"))


def is_used_up(status: int, body: Any) -> bool:
    """Whether a refusal says that the account has no credit left, so that no request will be answered.

    Example:
        >>> is_used_up(402, "Payment required"), is_used_up(400, "Your credit balance is too low to access the API.")
        (True, True)
        >>> is_used_up(429, "Slow down")
        False
    """
    return status == 402 or (status in (400, 403, 429) and bool(_NO_CREDIT.search(f"{said(body)} {_codes(body)}")))


def _named(text: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if re.search(rf"(?<!\w){name}(?!\w)", text)]


def _parts(body: Any) -> Iterator[tuple[list[Any] | None, str]]:
    """Pairs of (place in the request, message). Some servers send the request back. It is left out, because it can
    contain any words."""
    if isinstance(body, str):
        text = body.strip()
        inner = None
        if text[:1] in ("{", "["):
            try:
                inner = json.loads(text)
            except ValueError:
                inner = None
        if isinstance(inner, (dict, list)):
            yield from _parts(inner)
        elif text:
            yield None, text
    elif isinstance(body, list):
        for each in body:
            yield from _parts(each)
    elif isinstance(body, dict):
        place = body.get("loc")
        found = False
        for key in ("message", "msg", "detail", "error", "errors"):
            for inner_place, text in _parts(body.get(key)):
                found = True
                yield (list(place) if isinstance(place, (list, tuple)) else inner_place), text
        if not found and body:
            yield None, json.dumps(body, ensure_ascii=False, default=str)


def _codes(body: Any) -> str:
    """The codes and types in a body."""
    if isinstance(body, list):
        return " ".join(map(_codes, body))
    if not isinstance(body, dict):
        return ""
    own = [str(body[key]) for key in ("code", "type") if isinstance(body.get(key), (str, int))]
    return " ".join([*own, *(_codes(body.get(key)) for key in ("error", "innererror", "message", "detail"))])
