"""Alpaca's layout: an instruction, perhaps with an input, and its output."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from trl_ulma.data.adapters import LABELLED, Adapter, LeftOut, Outcome, labelled


def alpaca(rows: Iterable[Mapping[str, Any]], *, label_type: str = "binary", liked: bool = False) -> Iterator[Outcome]:
    r"""One row an output: the prompt is the instruction and, two lines below, the input.

    Args:
        rows: `instruction`, `output`, and perhaps `input`, `system`, and `history`, a list of questions and answers;
            with a `label` (or `kto_tag`), or without: then outputs are demonstrations.
        label_type: of the labels. Binary labels of 1 are demonstrations.
        liked: binary labels of 1 are no demonstrations.

    Example:
        >>> [outcome] = alpaca([{"instruction": "Add.", "input": "2 + 2", "output": "4"}])
        >>> outcome["prompt"][0]["content"], outcome["sft_mask"]
        ('Add.\n\n2 + 2', True)
    """
    for raw in rows:
        instruction, given = raw["instruction"], raw.get("input") or ""
        history, system = raw.get("history") or [], raw.get("system") or ""
        texts = [instruction, given, raw["output"], system]
        is_history = isinstance(history, list) and all(isinstance(turn, list) and len(turn) == 2 for turn in history)
        if not is_history or not all(
            isinstance(text, str) for text in [*texts, *(t for turn in history for t in turn)]
        ):
            yield LeftOut("its instruction, input, output, system or history is not text")
            continue
        prompt = [{"role": "system", "content": system}] if system else []
        for question, answer in history:
            prompt += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        prompt.append({"role": "user", "content": f"{instruction}\n\n{given}" if given else instruction})
        label = next((raw[name] for name in ("label", "kto_tag") if name in raw), 1.0)
        yield labelled(prompt, raw["output"], label, label_type=label_type, liked=liked)


ALPACA = Adapter(alpaca, needs=(("instruction", "output"),), refuses=("completions", "chosen"), options=LABELLED)
