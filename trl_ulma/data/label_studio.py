"""Label Studio: its JSON export of tasks with annotations."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from trl_ulma.data.adapters import LABELED, Adapter, LeftOut, Noted, Outcome, compared, labeled, refuse_several
from trl_ulma.data.directions import noted_direction
from trl_ulma.data.pairs import split_messages
from trl_ulma.data.payloads import messages_in

_PROMPTS = ("prompt", "instruction", "question", "input", "dialogue", "messages")
_SIDES = ("left", "right")
_KINDS = ("rating", "number", "choices", "pairwise", "textarea")


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
    """The rows of each annotation. A rating, a number or a choice is the label of the task's answer. A comparison
    labels the two answers of the task, and a written answer is a demonstration.

    Args:
        rows: `data`, the fields of a task, and `annotations`.
        control: the `from_name` of the control to read. By default, the only one of these kinds that the annotations
            have. A written text beside an answer can be a comment, so it is only read if this names it.
        prompt_key: the field with the prompt. By default, the first of prompt, instruction, question, input, dialogue
            and messages.
        answer_key: the field with the answer, or two, the left one and the right one, for comparisons. By default, the
            only other field with text or a list, and for comparisons the two that the result names.
        label_type: the type of ratings and choices.
        liked: answers with the binary label 1 are not demonstrations.
        label_map: choice → number.

    Raises:
        ValueError: after the last task, if several controls or fields could be read and none is named.

    Example:
        >>> result = {"from_name": "stars", "type": "rating", "value": {"rating": 4}}
        >>> raw = {"data": {"prompt": "Hi", "answer": "Hello!"}, "annotations": [{"result": [result]}]}
        >>> *_, outcome = label_studio([raw], label_type="continuous")
        >>> outcome["completion"], outcome["label"]
        ([{'role': 'assistant', 'content': 'Hello!'}], 4.0)
    """
    controls: Counter[str] = Counter()
    fields: Counter[str] = Counter()
    kinds: set[str] = set()
    for raw in rows:
        annotations = raw["annotations"]
        if not isinstance(annotations, list) or not all(isinstance(each, Mapping) for each in annotations):
            yield LeftOut("its annotations are not a list of objects")
            continue
        if not annotations:
            yield LeftOut("it has no annotation")
        for annotation in annotations:
            if annotation.get("was_cancelled") or annotation.get("skipped"):
                yield LeftOut("its annotation was skipped")
                continue
            if _is_rejected(annotation):
                yield LeftOut("its annotation was rejected in review")
                continue
            kind = ""
            try:
                results = annotation.get("result")
                results = [each for each in results if isinstance(each, Mapping)] if isinstance(results, list) else []
                controls.update({str(each.get("from_name")) for each in results if each.get("type") in _KINDS})
                kind, value, between = _result(results, control)
                kinds.add(kind)
                there, prompt_name = _prompt(raw["data"], prompt_key)
                prompt = messages_in(there[prompt_name], "user")
                names = [name.strip() for name in answer_key.split(",")] if answer_key else [*there][1:]
                for name in names:
                    if name not in there:
                        raise ValueError(f"it has no field {name}, which --answer_key names")
                if kind == "textarea":
                    if names and control is None:
                        raise ValueError("its text can be an answer or a comment: if it is the answer, say --control")
                    yield labeled(prompt, _written(value), 1.0)
                    continue
                if kind == "pairwise":
                    if value.get("selected") not in _SIDES:
                        raise ValueError("it does not say which answer is better")
                    if not answer_key:
                        names = between
                    if len(names) != 2 or not there.keys() >= set(names):
                        raise ValueError("it does not say what is left and right: --answer_key LEFT_FIELD,RIGHT_FIELD")
                    answers = [messages_in(there[name], "assistant") for name in names]
                    yield from compared(
                        labeled(prompt, answer, float(value["selected"] == side), liked=liked)
                        for side, answer in zip(_SIDES, answers, strict=True)
                    )
                    continue
                if names:
                    if len(names) != 1:
                        raise ValueError(f"its answer can be in {' or '.join(names)}: name one field with --answer_key")
                    fields[names[0]] += 1
                    answer = messages_in(there[names[0]], "assistant")
                else:
                    prompt, answer = split_messages(prompt)
                label = value.get("number" if kind == "number" else "rating")
                if kind == "choices":
                    chosen = value.get("choices")
                    if not isinstance(chosen, list) or len(chosen) != 1:
                        raise ValueError("it has not exactly one choice")
                    [label] = chosen
                if names and not answer_key:
                    yield Noted(f"its answer is the field {names[0]}")
                read = control or next(str(each.get("from_name")) for each in results if each.get("type") in _KINDS)
                imitates = label_type == "binary" and not liked
                if not label_map and (said := noted_direction(read, imitates=imitates)):
                    yield Noted(said)
                yield labeled(prompt, answer, label, label_type=label_type, liked=liked, label_map=label_map)
            except ValueError as error:
                yield from [LeftOut(str(error))] * (2 if kind == "pairwise" else 1)
    if control is None:
        refuse_several(controls, "controls", "--control")
    refuse_several(fields, "fields with the answer", "--answer_key")
    if kinds and kinds <= {"pairwise", "textarea"} and (label_map or label_type != "binary"):
        raise ValueError(
            "The annotations are comparisons or written answers, whose labels are binary. Remove --label_type and "
            "--label_map, which are for ratings, numbers and choices."
        )


def _is_rejected(annotation: Mapping[str, Any]) -> bool:
    """Whether a reviewer has rejected an annotation, and nobody has changed it since."""
    if annotation.get("last_action") is not None:
        return annotation["last_action"] == "rejected"
    reviews = annotation.get("reviews")
    return (
        isinstance(reviews, list)
        and bool(reviews)
        and isinstance(reviews[-1], Mapping)
        and (reviews[-1].get("accepted") is False)
    )


def _result(results: list[Mapping[str, Any]], control: str | None) -> tuple[str, Mapping[str, Any], list[str]]:
    """The kind and value of the result to read, and the names of what it is about."""
    key, values = ("type", _KINDS) if control is None else ("from_name", (control,))
    found = [each for each in results if each.get(key) in values]
    if not found and results and control is None:
        kinds = ", ".join(sorted({str(each.get("type")) for each in results}))
        raise ValueError(f"its annotation has no {', '.join(_KINDS)}, but {kinds}")
    if len(found) != 1 or not isinstance(found[0].get("value"), Mapping):
        raise ValueError(f"its annotation has {len(found)} results{f' of {control}' if control else ''}, not 1")
    if found[0].get("type") not in _KINDS:
        raise ValueError(f"its result is a {found[0].get('type')}, which is none of {', '.join(_KINDS)}")
    about = found[0].get("to_name")
    about = about.split(",") if isinstance(about, str) else about if isinstance(about, list) else []
    return found[0]["type"], found[0]["value"], [str(name).strip() for name in about]


def _written(value: Mapping[str, Any]) -> Any:
    written = value.get("text")
    if isinstance(written, list):
        if len(written) != 1:
            raise ValueError(f"it has {len(written)} written texts, not 1")
        [written] = written
    return written


def _prompt(data: Any, prompt_key: str | None) -> tuple[dict[str, Any], str]:
    """The fields with text or lists, with that of the prompt as the first, and its name."""
    if not isinstance(data, Mapping):
        raise ValueError("its data are not an object")
    there = {name: value for name, value in data.items() if isinstance(value, str | list)}
    prompt = prompt_key or next((name for name in _PROMPTS if there.get(name)), None)
    if prompt is None or prompt not in there:
        raise ValueError(f"it has no field {prompt or 'with the prompt'}: name it with --prompt_key")
    return {prompt: there[prompt]} | there, prompt


LABEL_STUDIO = Adapter(
    label_studio,
    needs=(("data", "annotations"),),
    options=LABELED
    | {
        "--control": {"help": "the name of the control to read, if annotations have several"},
        "--prompt_key": {"help": "the field with the prompt (default: prompt, instruction, question, …)"},
        "--answer_key": {
            "help": "the field with the answer; for comparisons the left and the right one: answer1,answer2"
        },
    },
    maps_labels=True,
)
