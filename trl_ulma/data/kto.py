"""Unpaired preferences in TRL's layout, such as kto-mix: an answer and its label."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from trl_ulma.data.adapters import LABELED, Adapter, Outcome, labeled


def kto(rows: Iterable[Mapping[str, Any]], *, label_type: str = "binary", liked: bool = False) -> Iterator[Outcome]:
    """One row per answer.

    Args:
        rows: `prompt` and `completion`, text or messages, and `label`.
        label_type: the type of the labels. Answers with the binary label 1 are demonstrations.
        liked: answers with the binary label 1 are not demonstrations.

    Example:
        >>> [outcome] = kto([{"prompt": "Hi", "completion": "Go.", "label": False}])
        >>> outcome["label"], outcome["sft_mask"]
        (0.0, False)
    """
    for raw in rows:
        yield labeled(raw["prompt"], raw["completion"], raw["label"], label_type=label_type, liked=liked)


KTO = Adapter(kto, needs=(("prompt", "completion", "label"),), refuses=("chosen", "rejected"), options=LABELED)
