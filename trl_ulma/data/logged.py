"""Rows from what an application logged: its input, its output, and scores by name."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from statistics import fmean
from typing import Any

from trl_ulma.data.adapters import LABELED, LeftOut, Noted, Outcome, as_bool, as_number, labeled
from trl_ulma.data.columns import Names
from trl_ulma.data.payloads import messages_in, texts_in

OPTIONS = LABELED | {
    "--score": {"help": "the name of the score to use as the label. Required if answers have several"},
    "--prompt_key": {"help": "where the question is in an input that has several texts, such as question"},
    "--answer_key": {"help": "where the answer is in an output that has several texts"},
}
AVERAGED = "its scores of the same name are averaged"

# The input, the output, and the values of each score
Logged = tuple[Any, Any, Mapping[str, list]]


def logged(
    answers: Iterable[Logged],
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
        answers: inputs, outputs and scores.
        score: the name of the score. By default, the only one that an answer has, which must be the same for all.
        prompt_key: where the question is in an input that is an object.
        answer_key: where the answer is in an output that is an object.
        label_type: the type of the score.
        liked: answers with the binary label 1 are not demonstrations.
        label_map: score, as text → number.

    Example:
        >>> [outcome] = logged([("Hi", "Hello!", {"helpful": [1]})])
        >>> outcome["completion"], outcome["label"]
        ([{'role': 'assistant', 'content': 'Hello!'}], 1.0)
    """
    names = Names(label_map=label_map or {})
    for given, reply, scores in answers:
        there = {name: values for name, values in scores.items() if values}
        if score is None and len(there) > 1:
            yield LeftOut(f"it has several scores ({', '.join(there)}): say which with --score")
            continue
        if score is None and there:
            [score] = there
        values = there.get(score or "")
        if not values:
            yield LeftOut(f"it has no score{f' {score}' if score else ''}")
            continue
        try:
            prompt, answer = messages_in(given, "user", prompt_key), messages_in(reply, "assistant", answer_key)
        except ValueError as error:
            yield LeftOut(str(error))
            continue
        for what, value, key in (("prompt", given, prompt_key), ("answer", reply, answer_key)):
            if key is None and (texts := texts_in(value)):
                yield Noted(f"its {what} is the text of `{texts[0]}`")
        label = values[0]
        if len(values) > 1:
            read = [number for value in values if (number := _number(names, value)) is not None]
            if len(read) < len(values):
                yield LeftOut("one of its scores is not a number")
                continue
            label = fmean(read)
            yield Noted(AVERAGED)
        mapped = label_map if len(values) == 1 else None
        yield labeled(prompt, answer, label, label_type=label_type, liked=liked, label_map=mapped)


def _number(names: Names, value: Any) -> float | None:
    value = names.label(value, Counter())
    found = as_number(value)
    truth = as_bool(value) if found is None else None
    return float(truth) if truth is not None else found
