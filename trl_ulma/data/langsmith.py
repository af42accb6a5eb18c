"""LangSmith: exported runs, with the statistics of their feedback."""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from trl_ulma.data.adapters import Adapter, LeftOut, Outcome
from trl_ulma.data.logged import OPTIONS, Logged, logged


def langsmith(rows: Iterable[Mapping[str, Any]], **options: Any) -> Iterator[Outcome]:
    """One row per run with feedback. The label is the mean of the feedback with the key `score`.

    Args:
        rows: `inputs`, `outputs` and `feedback_stats`, as objects or as JSON text.
        options: the keyword arguments of `logged`.

    Example:
        >>> raw = {"inputs": {"question": "Hi"}, "outputs": {"output": "Go."}}
        >>> *_, outcome = langsmith([raw | {"feedback_stats": {"user_score": {"n": 2, "avg": 0.5}}}])
        >>> outcome["label"]
        0.5
    """
    return logged(map(_logged, rows), **options)


def _logged(raw: Mapping[str, Any]) -> Logged | LeftOut:
    try:
        given, reply, stats = (_object(raw[name]) for name in ("inputs", "outputs", "feedback_stats"))
    except ValueError as error:
        return LeftOut(str(error))
    scores: dict[str, list] = {}
    for name, each in (stats or {}).items():
        if isinstance(each, Mapping) and each.get("avg") is not None:
            scores[name] = [each["avg"]]
        elif isinstance(each, Mapping) and isinstance(each.get("values"), Mapping):
            # The number of times that each word was given
            scores[name] = [word for word, count in each["values"].items() for _ in range(count or 0)]
    return given, reply, scores


def _object(value: Any) -> Mapping[str, Any] | None:
    """An object, or the JSON text of one. None for an empty value.

    Raises:
        ValueError: for other text, such as that of a Python object.
    """
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(
                "its inputs, outputs or feedback_stats are text that is not JSON: use json.dumps"
            ) from error
    return value if isinstance(value, Mapping) else None


LANGSMITH = Adapter(langsmith, needs=(("inputs", "outputs", "feedback_stats"),), options=OPTIONS, maps_labels=True)
