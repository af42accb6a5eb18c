"""HelpSteer and HelpSteer2: responses with five ratings from 0 to 4."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from trl_ulma.data.adapters import Adapter, LeftOut, Noted, Outcome, labeled

ASPECTS = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
# The markers of turns in HelpSteer2 prompts that are conversations
_TURN = re.compile(r"(?:\r?\n)?<extra_id_1>(User|Assistant)(?:\r?\n|$)")
_MARKER = "<extra_id_"
MARKED = "a prompt with <extra_id_ in its text, which is not the marker of a turn"


def helpsteer(rows: Iterable[Mapping[str, Any]], *, aspect: str = "helpfulness") -> Iterator[Outcome]:
    """One row per response, with one of its ratings as a continuous label.

    Args:
        rows: `prompt`, `response` and the ratings.
        aspect: the rating to use.

    Example:
        >>> [outcome] = helpsteer([{"prompt": "Hi", "response": "Hello!", "helpfulness": 3}])
        >>> outcome["label"], outcome["label_type"]
        (3.0, 'continuous')
    """
    if aspect not in ASPECTS:
        raise ValueError(f"aspect is {aspect!r}; it must be one of {ASPECTS}.")
    for raw in rows:
        if not isinstance(raw["prompt"], str):
            yield LeftOut("its prompt is not text")
            continue
        first, *marked = _TURN.split(raw["prompt"])
        prompt = [{"role": "user", "content": first}]
        for role, text in zip(marked[::2], marked[1::2], strict=True):
            prompt.append({"role": role.lower(), "content": text})
        if len(prompt) > 1 and prompt[-1] == {"role": "assistant", "content": ""}:
            del prompt[-1]  # the turn of the response, which the prompt opens
        if any(_MARKER in turn["content"] for turn in prompt):
            yield Noted(MARKED)
        yield labeled(prompt, raw["response"], raw.get(aspect), label_type="continuous", scale=(0, 4))


HELPSTEER = Adapter(
    helpsteer,
    needs=(("prompt", "response", "helpfulness", "correctness"),),
    also=ASPECTS,
    options={
        "--aspect": {"choices": ASPECTS, "default": "helpfulness", "help": "the rating to use (default: %(default)s)"},
    },
)
