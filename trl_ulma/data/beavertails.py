"""BeaverTails: responses, and whether each is safe."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from trl_ulma.data.adapters import LIKED, Adapter, LeftOut, Outcome, as_bool, labeled


def beavertails(rows: Iterable[Mapping[str, Any]], *, liked: bool = False) -> Iterator[Outcome]:
    """One row per response, with label 1 if it is safe, else 0.

    Args:
        rows: `prompt`, `response` and `is_safe`.
        liked: safe responses are not demonstrations.

    Example:
        >>> [outcome] = beavertails([{"prompt": "Harm!", "response": "Sure.", "is_safe": False}])
        >>> outcome["label"]
        0.0
    """
    for raw in rows:
        is_safe = as_bool(raw["is_safe"])
        if is_safe is None:
            yield LeftOut("it is not known whether it is safe")
            continue
        yield labeled(raw["prompt"], raw["response"], is_safe, liked=liked)


BEAVERTAILS = Adapter(beavertails, needs=(("prompt", "response", "is_safe"),), options=LIKED)
