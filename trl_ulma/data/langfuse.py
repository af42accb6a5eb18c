"""Langfuse: exported traces or observations, with their scores."""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from trl_ulma.data.adapters import Adapter, LeftOut, Outcome
from trl_ulma.data.logged import OPTIONS, Logged, logged

# Columns of the exports that hold lists but no scores
_OTHERS = frozenset(
    (
        "input", "output", "metadata", "tags", "comments", "observations", "scores", "usage", "cost", "traceTags",
        "trace_tags", "toolCalls", "tool_calls", "toolCallNames", "tool_call_names", "toolDefinitions",
    )
)  # fmt: skip
# Types of scores that are free text, such as a corrected output
_TEXTS = ("TEXT", "CORRECTION")


def langfuse(rows: Iterable[Mapping[str, Any]], **options: Any) -> Iterator[Outcome]:
    """One row per trace or observation with a score.

    Args:
        rows: `input`, `output`, and scores: a column with a list of values for each (export of a table), or the column
            `scores` with a list of objects (the API, or the export of a trace).
        options: the keyword arguments of `logged`.

    Example:
        >>> [outcome] = langfuse([{"timestamp": "now", "input": "Hi", "output": "Hello!", "user-feedback": [1]}])
        >>> outcome["label"]
        1.0
    """
    return logged(map(_logged, rows), **options)


def _logged(raw: Mapping[str, Any]) -> Logged | LeftOut:
    scores: dict[str, list] = {}
    listed = _list(raw.get("scores")) or []
    if any(isinstance(each, str) for each in listed):
        return LeftOut("its scores are only their ids: export the table, or get the traces one by one")
    for each in listed:
        kind = _first(each, "dataType", "data_type") if isinstance(each, Mapping) else None
        if isinstance(each, Mapping) and isinstance(each.get("name"), str) and kind not in _TEXTS:
            word, value = _first(each, "stringValue", "string_value"), each.get("value")
            # The value of a score that is a word can be its number among the words
            if word is not None and (kind == "CATEGORICAL" or value is None):
                value = word
            scores.setdefault(each["name"], []).extend([] if value is None else [value])
    for name, value in raw.items():
        values = None if name in _OTHERS else _list(value)
        if values and all(isinstance(each, str | int | float) for each in values):
            scores[name] = values
    return raw["input"], raw["output"], scores


def _first(value: Mapping[str, Any], *names: str) -> Any:
    return next((value[name] for name in names if value.get(name) is not None), None)


def _list(value: Any) -> list | None:
    """A list, also if it is the text of a CSV field. None for other values."""
    if isinstance(value, str) and value.startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    return value if isinstance(value, list) else None


LANGFUSE = Adapter(
    langfuse,
    needs=tuple(("input", "output", name) for name in ("timestamp", "startTime", "start_time", "traceId", "scores")),
    refuses=("prompt", "completion", "instruction"),
    options=OPTIONS,
    also=None,
    maps_labels=True,
)
