"""Rows from what an application logged: its input, its output, and scores by name."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from statistics import fmean
from typing import Any

from trl_ulma.data.adapters import LABELED, LeftOut, Noted, Outcome, as_label, labeled, refuse_several
from trl_ulma.data.directions import noted_direction
from trl_ulma.data.names import Names
from trl_ulma.data.payloads import REASONED, Unclear, is_json_object, messages_in, text_key, without_reasoning
from trl_ulma.labels import ASKING_ROLES

OPTIONS = LABELED | {
    "--score": {"help": "the name of the score to use as the label. Required if answers have several"},
    "--prompt_key": {
        "help": "where the question is in an input that has several fields, such as question; or several keys, which "
        "are read in this order: chat_history,question"
    },
    "--answer_key": {"help": "where the answer is in an output that has several fields"},
}
JSON_ANSWER = "its answer is JSON, which is kept as text: --answer_key names the field with the answer, if it has one"
AVERAGED = "its scores of the same name are averaged"

# The input, the output, and the values of each score
Logged = tuple[Any, Any, Mapping[str, list]]


def logged(
    answers: Iterable[Logged | LeftOut],
    *,
    score: str | None = None,
    prompt_key: str | None = None,
    answer_key: str | None = None,
    label_type: str = "binary",
    liked: bool = False,
    label_map: Mapping[str, Any] | None = None,
) -> Iterator[Outcome]:
    """One row per answer that has the score.

    Args:
        answers: inputs, outputs and scores, or why there are none.
        score: the name of the score. By default, the only one that the answers have.
        prompt_key: where the question is in an input that is an object.
        answer_key: where the answer is in an output that is an object.
        label_type: the type of the score.
        liked: answers with the binary label 1 are not demonstrations.
        label_map: score, as text → number.

    Raises:
        ValueError: after the last answer, if no score is named and the answers have several.

    Example:
        >>> [outcome] = logged([("Hi", "Hello!", {"helpful": [1]})])
        >>> outcome["completion"], outcome["label"]
        ([{'role': 'assistant', 'content': 'Hello!'}], 1.0)
    """
    names = Names(label_map=label_map or {})
    scored: Counter[str] = Counter()
    for found in answers:
        if isinstance(found, LeftOut):
            yield found
            continue
        given, reply, scores = found
        there = {name: values for name, values in scores.items() if values}
        scored.update(there.keys())
        name = score or next(iter(there), None)
        values = there.get(name or "")
        if not values:
            yield LeftOut(f"it has no score{f' {name}' if name else ''}")
            continue
        try:
            prompt, answer = messages_in(given, "user", prompt_key), messages_in(reply, "assistant", answer_key)
            prompt, answer = _last(prompt, answer)
        except Unclear as error:
            yield LeftOut(f"{error}: say where it is with --{error.what}_key")
            continue
        except ValueError as error:
            yield LeftOut(str(error))
            continue
        for role, what, value, key in (
            ("user", "prompt", given, prompt_key),
            ("assistant", "answer", reply, answer_key),
        ):
            if key is None and (field := text_key(value, role)):
                yield Noted(f"its {what} is the text of `{field}`")
        if answer_key is None and answer[0]["content"] == reply and is_json_object(reply):
            yield Noted(JSON_ANSWER)
        (prompt, _), (answer, is_reasoned) = without_reasoning(prompt), without_reasoning(answer)
        if is_reasoned:
            yield Noted(REASONED)
        label = values[0]
        if len(values) > 1:
            read = [as_label(names.label(value, Counter())) for value in values]
            read = [number for number in read if number is not None]
            if len(read) < len(values):
                yield LeftOut("one of its scores is not a number")
                continue
            label = fmean(read)
            yield Noted(AVERAGED)
        mapped = label_map if len(values) == 1 else None
        imitates = label_type == "binary" and not liked
        if not label_map and (said := noted_direction(str(name), imitates=imitates)):
            yield Noted(said)
        yield labeled(prompt, answer, label, label_type=label_type, liked=liked, label_map=mapped)
    if score is None:
        refuse_several(scored, "scores", "--score")


def _last(prompt: list[dict[str, Any]], answer: list[dict[str, Any]]) -> tuple[list, list]:
    """The prompt and the answer, if the answer repeats the prompt, or the whole conversation, as in LangGraph.

    Raises:
        ValueError: if the answer contains questions, but not the prompt.
    """
    cut = max((i + 1 for i, turn in enumerate(answer) if turn["role"] in ASKING_ROLES), default=0)
    if not cut:
        return prompt, answer
    said = [(turn["role"], turn["content"]) for turn in answer[:cut]]
    system = [turn for turn in prompt if turn["role"] == "system"]
    asked = [(turn["role"], turn["content"]) for turn in prompt if turn["role"] != "system"]
    if cut == len(answer) or said[len(said) - len(asked) :] != asked:
        raise ValueError("its output is a conversation that does not continue its input")
    return ([] if said[0][0] == "system" else system) + answer[:cut], answer[cut:]
