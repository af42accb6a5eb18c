"""stack-exchange-paired: a question, an answer with more votes and one with fewer."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from trl_ulma.data.adapters import LIKED, SAME, Adapter, LeftOut, Noted, Outcome, labeled

AGAIN = "an answer that is in several pairs: each pair adds a row with it"


def stack_exchange_paired(rows: Iterable[Mapping[str, Any]], *, liked: bool = False) -> Iterator[Outcome]:
    """Two rows per pair: `response_j` with label 1 and `response_k` with label 0.

    An answer that is better than some answers and worse than others has rows with both labels, in proportion.

    Args:
        rows: `question`, `response_j` and `response_k`.
        liked: better answers are not demonstrations.

    Example:
        >>> raw = {"question": "An egg?", "response_j": "Boil it.", "response_k": "Dunno."}
        >>> [row["label"] for row in stack_exchange_paired([raw])]
        [1.0, 0.0]
    """
    seen: set[int] = set()
    for raw in rows:
        if raw["response_j"] == raw["response_k"]:
            yield from [LeftOut(SAME)] * 2
            continue
        for name, label in (("response_j", 1.0), ("response_k", 0.0)):
            key = hash((str(raw["question"]), str(raw[name])))
            if key in seen:
                yield Noted(AGAIN)
            seen.add(key)
            yield labeled(raw["question"], raw[name], label, liked=liked)


STACK_EXCHANGE_PAIRED = Adapter(stack_exchange_paired, needs=(("question", "response_j", "response_k"),), options=LIKED)
