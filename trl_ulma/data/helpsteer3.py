"""HelpSteer3: two responses to a conversation, and which of them is better."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from trl_ulma.data.adapters import LIKED, Adapter, LeftOut, Outcome, as_number, compared, labeled, off_scale
from trl_ulma.data.payloads import messages_in


def helpsteer3(rows: Iterable[Mapping[str, Any]], *, liked: bool = False) -> Iterator[Outcome]:
    """Two rows per preference, with binary labels: 1 for the better response and 0 for the other. A tie is ½ and ½.

    Args:
        rows: `context` (messages), `response1`, `response2` and `overall_preference`, from −3 (the first is much
            better) to 3 (the second is much better).
        liked: the better response is not a demonstration.

    Example:
        >>> raw = {"context": [{"role": "user", "content": "Hi"}], "response1": "Hello!", "response2": "Go."}
        >>> [row["label"] for row in helpsteer3([raw | {"overall_preference": -2}])]
        [1.0, 0.0]
    """
    for raw in rows:
        preference = as_number(raw["overall_preference"])
        if preference is None or not -3 <= preference <= 3:
            yield from [LeftOut("its preference is not a number") if preference is None else off_scale(-3, 3)] * 2
            continue
        try:
            context = messages_in(raw["context"], "user")  # as JSON text in a CSV file
        except ValueError as error:
            yield from [LeftOut(str(error))] * 2
            continue
        second = 0.5 if preference == 0 else float(preference > 0)
        labels = (("response1", 1 - second), ("response2", second))
        yield from compared(labeled(context, raw[name], label, liked=liked) for name, label in labels)


HELPSTEER3 = Adapter(helpsteer3, needs=(("context", "response1", "response2", "overall_preference"),), options=LIKED)
