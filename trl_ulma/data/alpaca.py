"""Alpaca's layout: an instruction, an optional input, and an output."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from trl_ulma.data.adapters import LABELED, Adapter, LeftOut, Outcome, labeled

# What Alpaca's generator and its successors wrote in the place of an empty field: its prompt asks for "<noinput>", and
# https://github.com/gururise/AlpacaDataCleaned counts four spellings
_NONE = re.compile(r"\s*(?:<\s*no[ _-]?(?:in|out)put\s*>|no[ _-]?input)\s*", re.IGNORECASE)


def alpaca(rows: Iterable[Mapping[str, Any]], *, label_type: str = "binary", liked: bool = False) -> Iterator[Outcome]:
    r"""One row per output. The prompt is the instruction, followed by an empty line and the input. An input of
    spaces, or of a marker such as `<noinput>`, is empty.

    Args:
        rows: `instruction` and `output`. Optional columns are `input` (or `context`), `system`, `history` (a list of
            questions and answers), and `label` or `kto_tag`. Without a label, outputs are demonstrations.
        label_type: the type of the labels. Answers with the binary label 1 are demonstrations.
        liked: answers with the binary label 1 are not demonstrations.

    Example:
        >>> [outcome] = alpaca([{"instruction": "Add.", "input": "2 + 2", "output": "4"}])
        >>> outcome["prompt"][0]["content"], outcome["sft_mask"]
        ('Add.\n\n2 + 2', True)
    """
    for raw in rows:
        there = [raw[name] for name in ("input", "context") if not _is_empty(raw.get(name))]
        instruction, given = raw["instruction"], there[0] if there else ""
        history, system = raw.get("history") or [], raw.get("system") or ""
        texts = [instruction, *there, raw["output"], system]
        is_history = isinstance(history, list) and all(isinstance(turn, list) and len(turn) == 2 for turn in history)
        if not is_history or not all(
            isinstance(text, str) for text in [*texts, *(t for turn in history for t in turn)]
        ):
            yield LeftOut("its instruction, input, output, system or history is not text")
            continue
        if len(there) > 1:
            yield LeftOut("it has both an input and a context")
            continue
        prompt = [{"role": "system", "content": system}] if system else []
        for question, answer in history:
            prompt += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        prompt.append({"role": "user", "content": "\n\n".join(filter(None, (instruction, given)))})
        if _NONE.fullmatch(raw["output"]):
            yield LeftOut("its output is a marker of an empty one")
            continue
        label = next((raw[name] for name in ("label", "kto_tag") if name in raw), 1.0)
        yield labeled(prompt, raw["output"], label, label_type=label_type, liked=liked)


def _is_empty(text: Any) -> bool:
    """Whether an input is missing, or is only spaces or a marker of an empty one."""
    return not text or (isinstance(text, str) and (not text.strip() or _NONE.fullmatch(text) is not None))


ALPACA = Adapter(
    alpaca,
    needs=(("instruction", "output"),),
    refuses=("completions", "chosen"),
    options=LABELED,
    rated="alpaca",
    also=("input", "context", "history", "system", "label", "kto_tag"),
)
