"""Unpaired preferences in TRL's layout, as of kto-mix: an answer and its label."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from trl_ulma.data.adapters import LABELLED, Adapter, Outcome, labelled


def kto(rows: Iterable[Mapping[str, Any]], *, label_type: str = "binary", liked: bool = False) -> Iterator[Outcome]:
    """One row an answer.

    Args:
        rows: `prompt` and `completion`, text or messages, and `label`.
        label_type: of the labels. Binary labels of 1 are demonstrations.
        liked: binary labels of 1 are no demonstrations.

    Example:
        >>> [outcome] = kto([{"prompt": "Hi", "completion": "Go.", "label": False}])
        >>> outcome["label"], outcome["sft_mask"]
        (0.0, False)
    """
    for raw in rows:
        yield labelled(raw["prompt"], raw["completion"], raw["label"], label_type=label_type, liked=liked)


KTO = Adapter(kto, needs=(("prompt", "completion", "label"),), refuses=("chosen", "rejected"), options=LABELLED)
