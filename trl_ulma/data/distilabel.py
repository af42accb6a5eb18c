"""distilabel's tasks that rate answers: several generations per instruction, with a rating each."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from trl_ulma.data.adapters import Adapter, LeftOut, Outcome, compared, labeled


def distilabel(rows: Iterable[Mapping[str, Any]]) -> Iterator[Outcome]:
    """One row per generation, with its rating as a continuous label. Equal generations with different ratings are left
    out.

    Args:
        rows: `instruction` (text or messages), `generations` (a list of texts) and `ratings` (a list of numbers, of the
            same length), and optionally `system_prompt`.

    Example:
        >>> raw = {"instruction": "Hi", "generations": ["Hello!", "Go."], "ratings": [5, 1]}
        >>> [row["label"] for row in distilabel([raw])]
        [5.0, 1.0]
    """
    for raw in rows:
        answers, ratings = raw["generations"], raw["ratings"]
        if not isinstance(answers, list) or not isinstance(ratings, list) or len(answers) != len(ratings):
            count = len(answers) if isinstance(answers, list) else 1
            yield from [LeftOut("its generations and ratings are not two lists of the same length")] * max(count, 1)
            continue
        prompt = raw["instruction"]
        if raw.get("system_prompt"):
            asked = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
            prompt = [{"role": "system", "content": raw["system_prompt"]}, *asked]
        yield from compared(
            labeled(prompt, answer, rating, label_type="continuous")
            for answer, rating in zip(answers, ratings, strict=True)
        )


DISTILABEL = Adapter(distilabel, needs=(("instruction", "generations", "ratings"),), also=("system_prompt",))
