"""Gemini's format for preference tuning: answers with a score."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from trl_ulma.data.adapters import LABELED, Adapter, LeftOut, Outcome, compared, labeled
from trl_ulma.data.payloads import messages_in


def gemini(rows: Iterable[Mapping[str, Any]], *, label_type: str = "binary", liked: bool = False) -> Iterator[Outcome]:
    """One row per completion, with its score as the label. Equal completions with different scores are left out.

    Args:
        rows: `contents` (turns with `role` and `parts`), `completions` (each with a `score` and a `completion`, which
            is a turn), and optionally `systemInstruction`.
        label_type: the type of the scores. Answers with the binary score 1 are demonstrations.
        liked: answers with the binary score 1 are not demonstrations.

    Example:
        >>> turn = {"role": "model", "parts": [{"text": "Hello!"}]}
        >>> raw = {"contents": [{"role": "user", "parts": [{"text": "Hi"}]}]}
        >>> [outcome] = gemini([raw | {"completions": [{"score": 1.0, "completion": turn}]}])
        >>> outcome["prompt"], outcome["label"]
        ([{'role': 'user', 'content': 'Hi'}], 1.0)
    """
    for raw in rows:
        answers = raw["completions"]
        if not isinstance(answers, list) or not all(isinstance(each, Mapping) for each in answers):
            yield LeftOut("its completions are not a list of objects with `score` and `completion`")
            continue
        found: list[Outcome] = []
        request = {name: value for name, value in raw.items() if name != "completions"}
        for each in answers:
            try:
                prompt, answer = messages_in(request, "user"), messages_in(each.get("completion"), "assistant")
            except ValueError as error:
                found.append(LeftOut(str(error)))
                continue
            found.append(labeled(prompt, answer, each.get("score"), label_type=label_type, liked=liked))
        yield from compared(found)


GEMINI = Adapter(gemini, needs=(("contents", "completions"),), options=LABELED, also=None)
