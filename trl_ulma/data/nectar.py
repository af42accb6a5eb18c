"""Nectar: several answers to a conversation, ranked."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from trl_ulma.data.adapters import Adapter, LeftOut, Outcome, as_number, compared, labeled, off_scale
from trl_ulma.data.conversations import ASSISTANT, is_transcript, parse_transcript


def nectar(rows: Iterable[Mapping[str, Any]]) -> Iterator[Outcome]:
    r"""One row per answer. The continuous label is minus the rank, so −1 is the best.

    Args:
        rows: `prompt`, which is text or a transcript with an open assistant turn at its end, and `answers`, each with
            `answer` and `rank`.

    Example:
        >>> answers = [{"answer": "Hello!", "rank": 1.0}, {"answer": "Go.", "rank": 2.0}]
        >>> rows = list(nectar([{"prompt": "\n\nHuman: Hi\n\nAssistant: ", "answers": answers}]))
        >>> rows[0]["prompt"], [row["label"] for row in rows]
        ([{'role': 'user', 'content': 'Hi'}], [-1.0, -2.0])
    """
    for raw in rows:
        answers, prompt = raw["answers"], raw["prompt"]
        if not isinstance(answers, list) or not answers:
            yield LeftOut("its prompt has no answers")
            continue
        if isinstance(prompt, str) and (is_transcript(prompt) or prompt.rstrip().endswith(ASSISTANT.strip())):
            try:
                turns = parse_transcript(prompt)
                if turns[-1]["role"] == "assistant" and not turns[-1]["content"].strip():
                    turns = turns[:-1]
                prompt = turns
            except ValueError as error:
                yield from [LeftOut(str(error))] * len(answers)
                continue
        found: list[Outcome] = []
        for answer in answers:
            rank = as_number(answer.get("rank")) if isinstance(answer, Mapping) else None
            if rank is None or rank < 1:
                found.append(LeftOut("its rank is not a number") if rank is None else off_scale(1, math.inf))
                continue
            found.append(labeled(prompt, answer.get("answer"), 0.0 - rank, label_type="continuous"))
        yield from compared(found)


NECTAR = Adapter(nectar, needs=(("prompt", "answers"),), refuses=("question",))
