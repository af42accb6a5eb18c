"""Converts preference pairs, with or without a prompt, to pointwise rows: two consecutive rows per pair."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from trl_ulma.data.adapters import LIKED, SAME, Adapter, LeftOut, Noted, Outcome, row
from trl_ulma.data.conversations import (
    as_messages,
    check_repeats,
    is_transcript,
    is_whole_transcript,
    said,
    spelled,
    split_transcript,
    split_turns,
)
from trl_ulma.data.readable import is_worse, scores_of
from trl_ulma.data.unread import UNREAD
from trl_ulma.labels import ASKING_ROLES, is_empty, is_messages


def split_messages(messages: Sequence[Mapping[str, Any]]) -> tuple[list, list]:
    """A conversation split before the last run of turns that are not the user's: (prompt, completion).

    Raises:
        ValueError: if the conversation does not end in an assistant turn, or in turns that follow one, such as tool
            results.

    Example:
        >>> split_messages([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}])
        ([{'role': 'user', 'content': 'Hi'}], [{'role': 'assistant', 'content': 'Hello!'}])
    """
    cut = len(messages)
    while cut > 0 and messages[cut - 1]["role"] not in ASKING_ROLES:
        cut -= 1
    if cut == len(messages):
        raise ValueError("it does not end in an assistant turn")
    return list(messages[:cut]), list(messages[cut:])


def split_answer(answer: Any, other: Any) -> tuple[Any, Any]:
    r"""The (prompt, completion) of one half of a pair without a prompt. `other` is the other half.

    Each half of a conversation or transcript is split at its own last assistant turn, so that a common beginning of the
    two answers stays in the answers. Other texts have no marker to split at. Their prompt consists of the words that
    both begin with, as in TRL's `extract_prompt`.

    Raises:
        ValueError: if the half has no answer.

    Example:
        >>> split_answer("\n\nHuman: Hi\n\nAssistant: I do.", "\n\nHuman: Hi\n\nAssistant: I don't.")
        ('\n\nHuman: Hi\n\nAssistant:', ' I do.')
        >>> split_answer("The sky is blue.", "The sky is green.")
        ('The sky is', ' blue.')
    """
    if not isinstance(answer, str):
        return split_messages(answer)
    other = other if isinstance(other, str) else ""
    if is_transcript(answer) or is_transcript(other):
        return split_transcript(answer)
    differ = (i for i, (a, b) in enumerate(zip(answer, other, strict=False)) if a != b)
    alike = next(differ, min(len(answer), len(other)))
    cut = max(answer.rfind(" ", 0, alike), 0)
    return answer[:cut], answer[cut:]


def pairs_to_rows(batch: Mapping[str, Sequence[Any]]) -> dict[str, list]:
    r"""The pointwise rows of a batch of pairs: chosen (label 1), rejected (label 0), chosen, …

    Both halves keep the columns `sft_mask` (which applies to the chosen half), `log_z`, `weight`, `eos`, `tools`,
    `chat_template_kwargs` and `unread_line`. All other columns are dropped. `pair` is the index of the pair in the
    batch. `left_out` is the reason why a half is not valid for training, or None.

    Example:
        >>> rows = pairs_to_rows({"prompt": ["Hi"], "chosen": [" Hello!"], "rejected": [""]})
        >>> rows["completion"], rows["label"], rows["left_out"]
        ([' Hello!', ''], [1.0, 0.0], [None, 'its answer is empty'])
    """
    along = [name for name in _ALONG if name in batch]
    names = ("prompt", "completion", "label", "pair", "left_out", *along)
    rows: dict[str, list] = {name: [] for name in names}
    for pair, (chosen, rejected) in enumerate(zip(batch["chosen"], batch["rejected"], strict=True)):
        for answer, other, label in ((chosen, rejected, 1.0), (rejected, chosen, 0.0)):
            left_out = None
            if "prompt" in batch:
                prompt, completion = batch["prompt"][pair], answer
            elif not _is_answer(answer):
                prompt, completion = "", answer
            else:
                try:
                    prompt, completion = split_answer(answer, other)
                except ValueError as error:
                    prompt, completion, left_out = answer, answer, str(error)
            if left_out is None and _is_answer(completion) and is_empty(completion):
                left_out = "its answer is empty"
            values = {"prompt": prompt, "completion": completion, "label": label, "pair": pair, "left_out": left_out}
            for name in along:
                values[name] = batch[name][pair]
            if label == 0 and "sft_mask" in values:
                values["sft_mask"] = False
            for name, into in rows.items():
                into.append(values[name])
    return rows


# Columns that both halves of a pair keep
_ALONG = ("sft_mask", "log_z", "weight", "eos", "tools", "chat_template_kwargs", UNREAD)


def _is_answer(value: Any) -> bool:
    return isinstance(value, str) or is_messages(value)


WORSE = "its {} is below its {}, so its chosen answer is not the better one"


def pairs(rows: Iterable[Mapping[str, Any]], *, liked: bool = False) -> Iterator[Outcome]:
    """Two rows per pair: chosen with label 1 and rejected with label 0.

    Chosen answers are demonstrations unless `sft_mask` or `liked` says otherwise. Both rows keep `log_z` and `weight`.

    Args:
        rows: `chosen` and `rejected`, with or without `prompt`, as texts, transcripts or messages. Halves that are
            whole conversations are split at their last answer, and do not need a `prompt`. System turns that only the
            `prompt` has are put before them. If they do not repeat the rest of the `prompt`, they are left out.
        liked: chosen answers are liked, and not demonstrations.

    Raises:
        ValueError: if `liked` is set and the rows have their own `sft_mask`.

    Example:
        >>> [outcome["label"] for outcome in pairs([{"prompt": "Hi", "chosen": "Hello!", "rejected": "Go."}])]
        [1.0, 0.0]
    """
    for raw in rows:
        if liked and "sft_mask" in raw:
            raise ValueError("The pairs have an `sft_mask`, which marks the demonstrations. Remove `liked`.")
        if raw["chosen"] == raw["rejected"]:
            yield from [LeftOut(SAME)] * 2
            continue
        if any(raw.get(name) for name in ("tools", "chat_template_kwargs")):
            yield from [LeftOut("it has tools or chat_template_kwargs: train on the pairs without conversion")] * 2
            continue
        scores = scores_of([*raw])
        if scores and is_worse(*(raw[name] for name in scores)):
            yield Noted(WORSE.format(*scores))
        try:
            columns = _without_needless_prompt(raw)
        except ValueError as error:
            yield from [LeftOut(str(error))] * 2
            continue
        halves = pairs_to_rows({name: [value] for name, value in columns.items()})
        for half, why in enumerate(halves["left_out"]):
            try:
                if why is not None:
                    raise ValueError(why)
                prompt, completion = as_messages(halves["prompt"][half], halves["completion"][half])
            except ValueError as error:
                yield LeftOut(str(error))
                continue
            label = halves["label"][half]
            is_demonstration = halves["sft_mask"][half] if "sft_mask" in halves else label == 1 and not liked
            along = {name: halves[name][half] for name in ("log_z", "weight") if name in halves}
            yield row(prompt, completion, label, demonstration=is_demonstration) | along


def _without_needless_prompt(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a pair without a prompt that the halves repeat. A transcript's prompt is added to the halves.

    So are the system turns of a prompt that only the prompt has.

    Raises:
        ValueError: if both halves are whole conversations and one of them does not repeat the prompt.
    """
    columns = dict(raw)
    prompt, chosen, rejected = columns.get("prompt"), columns["chosen"], columns["rejected"]
    if all(is_messages(half) and half and half[0]["role"] in ASKING_ROLES for half in (chosen, rejected)):
        if prompt:
            columns |= {"chosen": _with_prompt(chosen, prompt), "rejected": _with_prompt(rejected, prompt)}
        columns.pop("prompt", None)
    elif "prompt" in columns and is_whole_transcript(chosen) and is_whole_transcript(rejected):
        for half in (chosen, rejected):
            check_repeats(half, prompt)
        del columns["prompt"]
    elif isinstance(prompt, str) and is_transcript(prompt) and isinstance(chosen, str) and isinstance(rejected, str):
        columns |= {"chosen": prompt + chosen, "rejected": prompt + rejected}
        del columns["prompt"]
    return columns


def _with_prompt(conversation: list[dict[str, Any]], prompt: Any) -> list[dict[str, Any]]:
    """A whole conversation that repeats its prompt, with the system turns that only the prompt has.

    Raises:
        ValueError: if it does not repeat its prompt.
    """
    there = [said(turn) for turn in conversation]
    if isinstance(prompt, str) and not is_transcript(prompt):
        if any(turn["role"] in ASKING_ROLES and turn["content"] == spelled(prompt) for turn in there):
            return conversation
    elif isinstance(prompt, str) or is_messages(prompt):
        turns = split_turns(prompt)[0] if isinstance(prompt, str) else prompt
        asked = [said(turn) for turn in turns]
        system = next((place for place, turn in enumerate(asked) if turn["role"] == "user"), len(asked))
        if any(there[place : place + len(asked)] == asked for place in range(len(there))):
            return conversation
        if there[0]["role"] == "user" and there[: len(asked) - system] == asked[system:]:
            return [*turns[:system], *conversation]
    raise ValueError("it is a whole conversation that does not contain its prompt")


PAIRS = Adapter(
    pairs,
    needs=(("chosen", "rejected"),),
    refuses=("completion", "conversations"),
    options=LIKED,
    also=("prompt", "score_chosen", "score_rejected", *_ALONG),
)
