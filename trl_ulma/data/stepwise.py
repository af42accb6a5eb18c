"""TRL's stepwise supervision: a label for each step of an answer."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from trl_ulma.data.adapters import LIKED, OFF_SCALE, Adapter, LeftOut, Outcome, as_label
from trl_ulma.data.names import Names


def stepwise(
    rows: Iterable[Mapping[str, Any]],
    *,
    separator: str = "\n",
    liked: bool = False,
    label_map: Mapping[str, Any] | None = None,
) -> Iterator[Outcome]:
    r"""One row of text per step. Its prompt is the question and the previous steps, each followed by the separator.

    As in TRL's `PRMTrainer`, a step includes the separator after it. Only the last step ends the answer, so the others
    do not get the EOS token: `eos` is False. The log-probabilities of the steps add up to that of the answer.

    Args:
        rows: `prompt`, `completions` (the steps) and `labels` from 0 to 1, one per step.
        separator: the text after the question and after each step but the last.
        liked: steps with label 1 are not demonstrations.
        label_map: label, as text → number.

    Example:
        >>> raw = {"prompt": "2 + 3 + 4?", "completions": ["2 + 3 = 5.", "5 + 4 = 8."], "labels": [True, False]}
        >>> [(row["prompt"], row["completion"], row["label"]) for row in stepwise([raw])]
        [('2 + 3 + 4?\n', '2 + 3 = 5.\n', 1.0), ('2 + 3 + 4?\n2 + 3 = 5.\n', '5 + 4 = 8.', 0.0)]
    """
    separator, names = separator.replace("\\n", "\n"), Names(label_map=label_map or {})
    for raw in rows:
        steps, labels = raw["completions"], raw["labels"]
        if not isinstance(steps, list) or not isinstance(labels, list) or len(steps) != len(labels):
            count = len(steps) if isinstance(steps, list) else 1
            yield from [LeftOut("its question has different numbers of steps and labels")] * max(count, 1)
            continue
        if not steps:
            yield LeftOut("its question has no steps")
        prompt = raw["prompt"]
        is_text = isinstance(prompt, str) and all(isinstance(step, str) for step in steps)
        if is_text:
            prompt += separator
            steps = [step + separator for step in steps[:-1]] + steps[-1:]
        for place, (step, label) in enumerate(zip(steps, labels, strict=True), start=1):
            unknown: Counter = Counter()
            value = as_label(names.label(label, unknown))
            if not is_text:
                yield LeftOut("its question or one of its steps is not text")
            elif unknown:
                yield LeftOut(f"its label is {next(iter(unknown))!r}, which label_map does not contain")
            elif value is None:
                yield LeftOut("its label is not a number")
            elif not 0 <= value <= 1:
                yield LeftOut(f"{OFF_SCALE} [0, 1]: set --label_map, such as --label_map=-1=0,0=0.5,1=1")
            else:
                yield {
                    "prompt": prompt,
                    "completion": step,
                    "label": value,
                    "sft_mask": value == 1 and not liked,
                    "label_type": "binary",
                    "eos": place == len(steps),
                }
            if is_text:
                prompt += step


STEPWISE = Adapter(
    stepwise,
    maps_labels=True,
    needs=(("prompt", "completions", "labels"),),
    options=LIKED
    | {
        "--separator": {
            "default": "\\n",
            "help": r"the text before and after each step but the last (default: \n, a line break)",
        }
    },
)
