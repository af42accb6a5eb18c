"""Finds the characters of a rendered conversation that the assistant wrote, if a completion has several turns."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from trl_ulma.rows.messages import REASONING

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
Span = tuple[int, int]


def has_generation_markers(template: str) -> bool:
    """Whether a chat template marks the text that the assistant generates.

    Example:
        >>> has_generation_markers("{% generation %}{{ message.content }}{% endgeneration %}")
        True
    """
    return _GENERATION.search(template) is not None


def marked_spans(render: Callable[..., tuple[str, list[Span]]], start: int, whole: str) -> list[Span] | None:
    """The spans that the template marks as generated, from character `start` on. None if it marks nothing.

    Args:
        start: the index of the first character of the completion.
        whole: the rendering without markers.
    """
    rendered, spans = render()
    if rendered != whole:
        return None
    return [(max(begin, start), end) for begin, end in spans if end > start] or None


def rendered_spans(
    render: Callable[..., str],
    messages: Sequence[Mapping[str, Any]],
    first: int,
    whole: str,
    ends: re.Pattern,
) -> list[Span] | None:
    """The spans of a rendering that the assistant wrote, found by rendering turn by turn. None if unknown.

    A turn starts at the end of the rendering of all previous turns with the generation prompt. It ends at the end of
    the rendering up to and including the turn. Templates that render the last turn differently break this rule.
    Therefore the text of each turn is also located by rendering the conversation with this text replaced. If the start
    or end by the first rule does not fit, the turn starts after the text of the generation prompt, and ends after the
    token that ends a turn.

    Args:
        render: renders messages, with or without `add_generation_prompt`.
        messages: the messages of prompt and completion.
        first: the index of the first message of the completion.
        whole: the rendering of the messages.
        ends: matches the tokens that can end a turn.
    """
    texts = [_text_span(render, messages, number, whole) for number in range(len(messages))]
    found = []
    for number in range(first, len(messages)):
        if messages[number]["role"] != "assistant":
            continue
        own = texts[number]
        if own is None:
            return None
        before = max((span[1] for span in texts[:number] if span is not None and span[1] <= own[0]), default=0)
        after = min((s[0] for s in texts[number + 1 :] if s is not None and s[0] >= own[1]), default=len(whole))
        start = _start(render, messages[:number], whole, before, own[0])
        if number == len(messages) - 1:
            end = len(whole)
        else:
            end = _common(_try(render, messages[: number + 1]), whole)
            if not own[1] <= end <= after:
                token = ends.search(whole, own[1], after)
                end = own[1] if token is None else token.end()
            # Text that is only rendered at the end of a conversation can begin like the token of the next turn
            end = next(
                (token.start() for token in ends.finditer(whole, own[1]) if token.start() < end < token.end()), end
            )
        found.append((start, end))
    return found


def ends_of_answers(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: those of the model's `generation_config`, the tokenizer's EOS token, and the one
    with which the chat template ends the assistant's turn."""
    known = {*ends_in_config(model), *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])}
    turn = end_of_turn(tokenizer, known)
    return sorted(known if turn is None else {*known, turn})


def ends_in_config(model: Any) -> list[int]:
    """The tokens with which `model.generate` ends by default."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return [end for end in (ends if isinstance(ends, list) else [ends]) if isinstance(end, int)]


def end_of_turn(tokenizer: Any, ends: Iterable[int]) -> int | None:
    """The token with which a chat template ends the assistant's turn, if it is none of the known `ends`. None without
    one.

    Base models with a chat template often have an EOS token that ends documents, and another token that ends turns.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"<eos>": 0, "<end>": 1}))
        >>> tokenizer = PreTrainedTokenizerFast(
        ...     tokenizer_object=words, eos_token="<eos>", extra_special_tokens=["<end>"],
        ...     chat_template="{% for message in messages %}{{ message.content }}<end>{% endfor %}")
        >>> end_of_turn(tokenizer, [0])
        1
    """
    if not tokenizer.chat_template:
        return None
    answer = "\u2600\u2600\u2600"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}]
    _, is_found, after = _try(partial(tokenizer.apply_chat_template, tokenize=False), turns).rpartition(answer)
    added = {str(token): number for number, token in tokenizer.added_tokens_decoder.items()}
    known = {str(tokenizer.convert_ids_to_tokens(end)) for end in ends}
    if not is_found or any(token in after for token in known):
        return None
    first = max((token for token in added if token and after.lstrip().startswith(token)), key=len, default=None)
    return None if first is None else added[first]


def _start(render: Callable[..., str], messages: Sequence[Mapping[str, Any]], whole: str, least: int, most: int) -> int:
    prompt = _try(render, messages, add_generation_prompt=True)
    start = _common(prompt, whole)
    if least <= start <= most:
        return start
    marker = prompt[_common(prompt, _try(render, messages)) :]
    while marker:
        place = whole.rfind(marker, least, most)
        if place >= 0:
            return place + len(marker)
        marker = marker.rstrip("\n").rpartition("\n")[0]
    return most


def _text_span(
    render: Callable[..., str], messages: Sequence[Mapping[str, Any]], number: int, whole: str
) -> Span | None:
    """The span from the first to the last character that depends on the texts of a message."""
    mark = next(chr(code) for code in range(0x2600, 0x10000) if chr(code) not in whole) * 3
    changed = _replaced(messages[number], mark)
    other = _try(render, [*messages[:number], changed, *messages[number + 1 :]])
    start = _common(whole, other)
    if not other or start == len(whole) == len(other):
        return None
    same_end = _common(whole[start:][::-1], other[start:][::-1])
    return start, len(whole) - same_end


def _replaced(turn: Mapping[str, Any], mark: str) -> dict[str, Any]:
    """The message with its texts replaced."""
    made = dict(turn)
    for name in ("content", *REASONING):
        value = made.get(name)
        if isinstance(value, str) and value.strip():
            made[name] = mark
        elif isinstance(value, list):
            made[name] = [{**p, "text": mark} if isinstance(p, dict) and p.get("text") else p for p in value]
    calls = made.get("tool_calls")
    if isinstance(calls, list):
        made["tool_calls"] = [_other_call(call, mark) for call in calls]
    return made


def _other_call(call: Any, mark: str) -> Any:
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _other_call(call["function"], mark)}
    arguments = call.get("arguments")
    other = {mark: mark} if isinstance(arguments, dict) else mark
    return {**call, "name": mark} | ({"arguments": other} if "arguments" in call else {})


def _common(a: str, b: str) -> int:
    """The length of the common prefix of two texts."""
    if b.startswith(a):
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _try(render: Callable[..., str], messages: Sequence[Mapping[str, Any]], **how: Any) -> str:
    """The rendering, or "" if the template does not support a part of a conversation."""
    try:
        return render(list(messages), **how) if messages else ""
    except Exception:  # templates can raise any exception
        return ""
