"""Conversations in the form for people, judges and servers, with text, tool calls and reasoning separated."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from trl_ulma.data.conversations import is_transcript

# Keys of reasoning in servers and datasets
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_TAGS = tuple((f"<{name}>", f"</{name}>") for name in ("think", "thinking", "thought", "reasoning"))
_TAGS += (("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"), ("◁think▷", "◁/think▷"))
_TAGS += (("<|START_THINKING|>", "<|END_THINKING|>"),)
# gpt-oss: channel, recipient and text of a message; and the same of a whole answer if special tokens are removed
_CHANNEL = re.compile(
    r"<\|channel\|>\s*(\w+)(.*?)<\|message\|>(.*?)(?=<\|(?:end|return|call|start|channel)\|>|\Z)", re.DOTALL
)
_BARE_CHANNELS = re.compile(r"\s*analysis(.*?)assistant(?:commentary.*?assistant)?final(.*)", re.DOTALL)
# Tokens that end a turn. Some servers leave them in the answer
_ENDS = re.compile(
    r"(?:\s*(?:<\|(?:im_end|eot_id|eom_id|end|endoftext|end_of_text|return)\|>|</s>|<end_of_turn>|<｜end▁of▁sentence｜>))+\s*\Z"
)
_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)


def split_reasoning(text: str, *, is_open: bool = False, is_cut: bool = False) -> tuple[str, str]:
    """Returns (reasoning, answer) of a generated text. The answer follows the reasoning block at its start.

    If the block has no end because the text was cut off, all of the text is reasoning. In a whole text, such a tag is
    part of the answer. If the block has no beginning, the prompt opened it, as some chat templates do.

    Args:
        text: the generated text.
        is_open: whether the prompt ends with the start of a reasoning block.
        is_cut: whether the text was cut off, so that the end of a block can be missing.

    Example:
        >>> split_reasoning("<think>Two and two.</think>\\n\\n4")
        ('Two and two.', '4')
        >>> split_reasoning("Two and two.\\n</think>\\n4"), split_reasoning("Write </think>4.")
        (('Two and two.', '4'), ('', 'Write </think>4.'))
        >>> split_reasoning("<think>Hm, hm", is_cut=True), split_reasoning("Hm, hm", is_open=True)
        (('Hm, hm', ''), ('Hm, hm', ''))
        >>> split_reasoning("<thinking> is a tag.")
        ('', '<thinking> is a tag.')
        >>> split_reasoning("<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>4")
        ('Hm.', '4')
    """
    start = text.lstrip()
    if (channels := _split_channels(start)) is not None:
        return channels
    for begin, end in _TAGS:
        if start.startswith(begin) or is_open:
            reasoning, found, answer = start.removeprefix(begin).partition(end)
            if found or (start.startswith(begin) and (is_cut or is_open)):
                # Some think in several blocks
                more, answer = split_reasoning(answer.lstrip(), is_cut=is_cut) if found else ("", "")
                return "\n\n".join(filter(None, (reasoning.strip(), more))), answer
        # A tag inside a line is part of the answer
        elif (reasoning := text.partition(f"\n{end}"))[1] and begin not in reasoning[0]:
            return reasoning[0].strip(), reasoning[2].lstrip()
    return (text.strip(), "") if is_open else ("", text)


def _split_channels(text: str) -> tuple[str, str] | None:
    """(reasoning, answer) of a text of gpt-oss, whose answer is in the channel "final". None for other texts."""
    if not text.removeprefix("<|start|>assistant").startswith("<|channel|>"):
        found = _BARE_CHANNELS.fullmatch(text)
        return found and (found[1].strip(), found[2].strip())
    reasoning, answer = [], []
    for channel, about, said in _CHANNEL.findall(text):
        called = re.search(r"to=(?:functions\.)?(\S+?)(?=\s|<|$)", about)
        if called:
            answer.append(calls_text([{"name": called[1], "arguments": said.strip()}]))
        else:
            (answer if channel == "final" else reasoning).append(said.strip())
    return "\n\n".join(reasoning), "\n\n".join(answer)


def without_end(text: str) -> str:
    """An answer of a server without the special token that ended it.

    Example:
        >>> without_end("Yes.<|im_end|>"), without_end("Yes.</s>"), without_end("Not <s>this</s>")
        ('Yes.', 'Yes.', 'Not <s>this</s>')
    """
    return text if "<s>" in text else _ENDS.sub("", text)


def opens_reasoning(prompt: str) -> bool:
    """Whether a prompt ends with the start of a reasoning block.

    Example:
        >>> opens_reasoning("<|im_start|>assistant\\n<think>\\n")
        True
    """
    return prompt.rstrip().endswith(tuple(begin for begin, _ in _TAGS))


def answer_text(completion: Any) -> str:
    r"""The answer in a completion (text or messages): without reasoning, and with tool calls as text.

    Example:
        >>> answer_text([{"role": "assistant", "content": "Hello!"}])
        'Hello!'
        >>> call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
        >>> answer_text([{"role": "assistant", "content": None, "tool_calls": [call]}])
        '[tool call] weather({"city": "Oslo"})'
        >>> answer_text("<think>Easy.</think>Paris.")
        'Paris.'
    """
    if isinstance(completion, str):
        return show_calls(split_reasoning(completion)[1])
    return "\n\n".join(filter(None, map(_said, completion)))


def as_text(prompt: Any) -> str:
    r"""A prompt in readable form: turns with their roles. Transcripts and text do not change.

    Example:
        >>> as_text([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}])
        'User: Hi\n\nAssistant: Hello!'
        >>> as_text("\n\nHuman: Hi\n\nAssistant:")
        'Human: Hi'
    """
    if isinstance(prompt, str):
        text = prompt.strip()
        return re.sub(r"\s*\n\nAssistant:$", "", text) if is_transcript(prompt) else text
    return "\n\n".join(f"{str(turn['role']).capitalize()}: {_said(turn).strip()}" for turn in prompt)


def calls_text(calls: Sequence[Any] | None) -> str:
    """Tool calls, one per line, with their arguments as JSON.

    Example:
        >>> print(calls_text([{"function": {"name": "add", "arguments": '{"a": 1,  "b": null}'}}, {"name": "now"}]))
        [tool call] add({"a": 1})
        [tool call] now({})
    """
    lines = []
    for call in calls or ():
        function = call.get("function") or call
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError:  # as a model may write it
                lines.append(f"[tool call] {function.get('name')}({arguments})")
                continue
        shown = json.dumps(without_nulls(arguments or {}), ensure_ascii=False, sort_keys=True)
        lines.append(f"[tool call] {function.get('name')}({shown})")
    return "\n".join(lines)


def show_calls(text: str) -> str:
    """A text in which the calls of Hermes and Qwen have the same form as those of messages.

    Example:
        >>> show_calls('Wait.\\n<tool_call>\\n{"name": "now", "arguments": {"zone": "CET"}}\\n</tool_call>')
        'Wait.\\n[tool call] now({"zone": "CET"})'
    """

    def shown(found: re.Match) -> str:
        try:
            return calls_text([json.loads(found[1])])
        except (AttributeError, ValueError):
            return found[0]

    return _CALL.sub(shown, text)


def joined_stream(text: str) -> dict[str, Any] | None:
    r"""The answer in a stream of server-sent events, which some gateways send unasked. None for other texts.

    If the stream broke off, without a reason and without "[DONE]", its `finish_reason` is "aborted".

    Raises:
        ValueError: if an event is not JSON.

    Example:
        >>> part = '{"choices": [{"delta": {"content": "Hel"}}]}', '{"choices": [{"delta": {"content": "lo!"}}]}'
        >>> joined_stream(f"data: {part[0]}\n\ndata: {part[1]}\n\ndata: [DONE]")["choices"][0]["message"]
        {'content': 'Hello!', 'tool_calls': []}
    """
    if not re.match(r"(?:data|event|id|retry)?:", text):
        return None
    # A text within JSON can contain the other separators of `splitlines`
    lines = [line.removeprefix("data:").strip() for line in re.split(r"[\r\n]+", text) if line.startswith("data:")]
    events = [json.loads(line) for line in lines if line and line != "[DONE]"]
    answer: dict[str, Any] = {}
    message: dict[str, Any] = {}
    calls: dict[int, dict[str, str]] = {}
    written, reason = "", None
    for event in events:
        answer |= event
        for choice in (event.get("choices") or ())[:1]:
            written += choice.get("text") or ""
            reason = choice.get("finish_reason") or reason
            delta: dict[str, Any] = choice.get("delta") or choice.get("message") or {}
            thought, content = content_text(delta.get("content"))
            delta |= {"content": content, **({"reasoning": thought} if thought else {})}
            for key in ("content", "refusal", *REASONING_KEYS):
                if delta.get(key) and isinstance(delta[key], str):
                    message[key] = message.get(key, "") + delta[key]
            for number, call in enumerate(delta.get("tool_calls") or ()):
                function = calls.setdefault(call.get("index", number), {"name": "", "arguments": ""})
                for key in function:
                    function[key] += (call.get("function") or {}).get(key) or ""
    if reason is None and not message and not written and not calls:
        return answer or None  # an error, and no part of an answer
    if reason is None and "[DONE]" not in lines:
        reason = "aborted"
    message["tool_calls"] = [{"function": function} for function in calls.values()]
    return {**answer, "choices": [{"message": message, "text": written, "finish_reason": reason}]}


def for_server(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages in the form for servers: without null keys, with arguments of calls as JSON, and an id per call.

    Datasets have null keys because all rows of a table share their columns, and their calls rarely have ids. Ids have
    nine letters and digits, because Mistral requires that.

    Example:
        >>> call = {"function": {"name": "now", "arguments": {"zone": None}}}
        >>> turns = [{"role": "assistant", "content": None, "tool_calls": [call]},
        ...          {"role": "tool", "name": "now", "content": "12:00", "tool_calls": None}]
        >>> for turn in for_server(turns):
        ...     print(turn)
        {'role': 'assistant', 'tool_calls': [{'function': {'name': 'now', 'arguments': '{}'}, 'type': 'function',
        'id': 'call00000'}]}
        {'role': 'tool', 'name': 'now', 'content': '12:00', 'tool_call_id': 'call00000'}
    """
    found, open_calls, number = [], [], 0
    for message in messages:
        turn = without_nulls(dict(message))
        if turn.get("tool_calls"):
            open_calls, calls = [], []
            for call in turn["tool_calls"]:
                function = dict(call.get("function") or call)
                arguments = function.get("arguments", {})
                is_text = isinstance(arguments, str)
                function["arguments"] = arguments if is_text else json.dumps(arguments, ensure_ascii=False)
                each = {**(call if "function" in call else {}), "function": function, "type": "function"}
                each.setdefault("id", f"call{number:05}")
                number += 1
                calls.append(each)
                open_calls.append(each["id"])
            turn["tool_calls"] = calls
        elif "tool_calls" in turn:
            del turn["tool_calls"]
        if turn.get("role") == "tool" and open_calls:
            answered = open_calls.pop(0)
            turn.setdefault("tool_call_id", answered)
        found.append(turn)
    return found


def without_nulls(value: Any) -> Any:
    """A JSON value without keys that are null, at any depth.

    Example:
        >>> without_nulls({"a": None, "b": [{"c": None, "d": 0}]})
        {'b': [{'d': 0}]}
    """
    if isinstance(value, Mapping):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, (list, tuple)) else value


def content_text(content: Any) -> tuple[str, str]:
    """Returns (reasoning, text) of the content of a message: text, or parts.

    Example:
        >>> content_text([{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]},
        ...               {"type": "text", "text": "Yes."}, {"type": "image"}])
        ('Hm.', 'Yes.[image]')
        >>> content_text([{"type": "refusal", "refusal": "I can't."}])
        ('', "I can't.")
    """
    if content is None or isinstance(content, str):
        return "", content or ""
    reasoning, text = "", ""
    for part in [content] if isinstance(content, Mapping) else content:
        if isinstance(part, str):
            text += part
        elif part.get("type") in ("thinking", "reasoning"):
            inner = part.get("thinking") or part.get("reasoning") or part.get("text") or ""
            reasoning += content_text(inner)[1]
        elif part.get("text") or part.get("refusal"):
            text += part.get("text") or part["refusal"]
        elif part.get("type") in ("image", "image_url"):
            text += "[image]"
    return reasoning, text


def refusal_text(message: Mapping[str, Any]) -> str:
    """The model's refusal to answer in a message of a server: its own key, or parts of the content. "" without one.

    Example:
        >>> refusal_text({"content": [{"type": "refusal", "refusal": "I can't."}]}), refusal_text({"content": "Yes."})
        ("I can't.", '')
    """
    content = message.get("content")
    parts = [part for part in content if isinstance(part, Mapping)] if isinstance(content, list) else []
    return message.get("refusal") or "".join(part.get("refusal") or "" for part in parts)


def _said(turn: Mapping[str, Any]) -> str:
    """The text of one message."""
    text = content_text(turn.get("content"))[1]
    if turn.get("role") == "assistant":
        text = show_calls(split_reasoning(text)[1])
    return "\n\n".join(filter(None, (text, calls_text(turn.get("tool_calls")))))
