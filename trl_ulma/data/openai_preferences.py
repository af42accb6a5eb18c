"""OpenAI's format for preference fine-tuning."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from trl_ulma.data.adapters import LIKED, Adapter, LeftOut, Outcome, compared, labeled
from trl_ulma.data.payloads import messages_in


def openai(rows: Iterable[Mapping[str, Any]], *, liked: bool = False) -> Iterator[Outcome]:
    """Two rows per preference: label 1 for the preferred output, which is a demonstration, and label 0.

    Args:
        rows: `input` with `messages`, `preferred_output` and `non_preferred_output` (messages).
        liked: preferred outputs are not demonstrations.

    Example:
        >>> answers = ([{"role": "assistant", "content": text}] for text in ("Hello!", "Go."))
        >>> raw = {"input": {"messages": [{"role": "user", "content": "Hi"}]}}
        >>> raw |= zip(("preferred_output", "non_preferred_output"), answers)
        >>> [(row["completion"][0]["content"], row["label"]) for row in openai([raw])]
        [('Hello!', 1.0), ('Go.', 0.0)]
    """
    for raw in rows:
        found: list[Outcome] = []
        for name, label in (("preferred_output", 1.0), ("non_preferred_output", 0.0)):
            try:
                prompt, answer = messages_in(raw["input"], "user"), messages_in(raw[name], "assistant")
            except ValueError as error:
                found.append(LeftOut(str(error)))
                continue
            found.append(labeled(prompt, answer, label, liked=liked))
        yield from compared(found)


OPENAI = Adapter(openai, needs=(("input", "preferred_output", "non_preferred_output"),), options=LIKED)
