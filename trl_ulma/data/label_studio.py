"""Label Studio: its JSON export of tasks with annotations."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from trl_ulma.data.adapters import LABELED, Adapter, LeftOut, Outcome, labeled
from trl_ulma.data.payloads import messages_in

_PROMPTS = ("prompt", "instruction", "question", "input", "dialogue", "messages")
_SIDES = ("left", "right")


def label_studio(
    rows: Iterable[Mapping[str, Any]],
    *,
    control: str | None = None,
    prompt_key: str | None = None,
    answer_key: str | None = None,
    label_type: str = "binary",
    liked: bool = False,
    label_map: Mapping[str, Any] | None = None,
) -> Iterator[Outcome]:
    """The rows of each annotation. A rating or a choice is the label of the task's answer. A comparison labels the two
    answers of the task, and a written answer is a demonstration.

    Args:
        rows: `data`, the fields of a task, and `annotations`.
        control: the `from_name` of the control to read. By default, the only one of the four kinds.
        prompt_key: the field with the prompt. By default, the first of prompt, instruction, question, input, dialogue
            and messages.
        answer_key: the field with the answer, or two, separated by a comma, for comparisons. By default, the other
            fields with text.
        label_type: the type of ratings and choices.
        liked: answers with the binary label 1 are not demonstrations.
        label_map: choice → number.

    Example:
        >>> result = {"from_name": "stars", "type": "rating", "value": {"rating": 4}}
        >>> raw = {"data": {"prompt": "Hi", "answer": "Hello!"}, "annotations": [{"result": [result]}]}
        >>> [outcome] = label_studio([raw], label_type="continuous")
        >>> outcome["completion"], outcome["label"]
        ([{'role': 'assistant', 'content': 'Hello!'}], 4.0)
    """
    for raw in rows:
        annotations = raw["annotations"]
        if not isinstance(annotations, list) or not all(isinstance(each, Mapping) for each in annotations):
            yield LeftOut("its annotations are not a list of objects")
            continue
        if not annotations:
            yield LeftOut("it has no annotation")
        for annotation in annotations:
            if annotation.get("was_cancelled"):
                yield LeftOut("its annotation was skipped")
                continue
            try:
                kind, value = _result(annotation, control)
                prompt, answers = _texts(raw["data"], prompt_key, answer_key)
                if kind == "textarea":
                    written = value.get("text")
                    yield labeled(prompt, written[0] if isinstance(written, list) and written else written, 1.0)
                    continue
                if kind == "pairwise":
                    if len(answers) != 2:
                        raise ValueError(f"it compares {len(answers)} answers, not 2: name them with --answer_key")
                    if value.get("selected") not in _SIDES:
                        raise ValueError("it does not say which answer is better")
                    for side, answer in zip(_SIDES, answers, strict=True):
                        yield labeled(prompt, answer, float(value["selected"] == side), liked=liked)
                    continue
                if len(answers) != 1:
                    raise ValueError(f"it has {len(answers)} answers, not 1: name one with --answer_key")
                label = value.get("rating")
                if kind == "choices":
                    chosen = value.get("choices")
                    if not isinstance(chosen, list) or len(chosen) != 1:
                        raise ValueError("it has not exactly one choice")
                    [label] = chosen
                yield labeled(prompt, answers[0], label, label_type=label_type, liked=liked, label_map=label_map)
            except ValueError as error:
                yield LeftOut(str(error))


def _result(annotation: Mapping[str, Any], control: str | None) -> tuple[str, Mapping[str, Any]]:
    results = annotation.get("result")
    results = [each for each in results if isinstance(each, Mapping)] if isinstance(results, list) else []
    if control is not None:
        found = [each for each in results if each.get("from_name") == control]
    else:
        found = [each for each in results if each.get("type") in ("rating", "choices", "pairwise", "textarea")]
    names = sorted({str(each.get("from_name")) for each in found})
    if len(names) > 1:
        raise ValueError(f"it has several controls ({', '.join(names)}): say which with --control")
    if len(found) != 1 or not isinstance(found[0].get("value"), Mapping):
        raise ValueError(f"its annotation has {len(found)} results{f' of {control}' if control else ''}, not 1")
    return found[0].get("type", ""), found[0]["value"]


def _texts(data: Any, prompt_key: str | None, answer_key: str | None) -> tuple[list[dict], list[list[dict]]]:
    if not isinstance(data, Mapping):
        raise ValueError("its data are not an object")
    there = {name: value for name, value in data.items() if isinstance(value, str | list) and value}
    prompt = prompt_key or next((name for name in _PROMPTS if name in there), None)
    if prompt not in there:
        raise ValueError(f"it has no field {prompt or 'with the prompt'}: name it with --prompt_key")
    answers = [name.strip() for name in answer_key.split(",")] if answer_key else [n for n in there if n != prompt]
    missing = [name for name in answers if name not in there]
    if missing:
        raise ValueError(f"it has no field {missing[0]}, which --answer_key names")
    return messages_in(there[prompt], "user"), [messages_in(there[name], "assistant") for name in answers]


LABEL_STUDIO = Adapter(
    label_studio,
    needs=(("data", "annotations"),),
    options=LABELED
    | {
        "--control": {"help": "the name of the control to read, if annotations have several"},
        "--prompt_key": {"help": "the field with the prompt (default: prompt, instruction, question, …)"},
        "--answer_key": {"help": "the field with the answer; two for comparisons: answer1,answer2"},
    },
    maps_labels=True,
)
