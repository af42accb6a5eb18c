"""HH-RLHF and Golden HH: pairs of transcripts that end in a better and a worse answer."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from trl_ulma.data.adapters import LIKED, SAME, Adapter, LeftOut, Noted, Outcome, row
from trl_ulma.data.conversations import names_in_text, split_turns

PREFIX = "one half of a pair is the beginning of the other: each is split at its own last answer"
NAME_IN_TEXT = "`Human:` or `Assistant:` within the text of a turn: kept as it is"


def hh(rows: Iterable[Mapping[str, Any]], *, liked: bool = False) -> Iterator[Outcome]:
    r"""Two rows per pair: chosen with label 1 and rejected with label 0, each split at its own last assistant turn.

    Chosen answers are demonstrations, because the paper's ULMA treats all answers with label 1 as demonstrations.

    Args:
        rows: `chosen` and `rejected`, transcripts with `\n\nHuman:` and `\n\nAssistant:` turns.
        liked: chosen answers are liked, and not demonstrations.

    Example:
        >>> human = "\n\nHuman: Hi\n\nAssistant:"
        >>> [row["label"] for row in hh([{"chosen": f"{human} Hello!", "rejected": f"{human} Go."}])]
        [1.0, 0.0]
    """
    for pair in rows:
        chosen, rejected = pair["chosen"], pair["rejected"]
        if isinstance(chosen, str) and isinstance(rejected, str):
            if chosen == rejected:
                yield from [LeftOut(SAME)] * 2
                continue
            if chosen.startswith(rejected) or rejected.startswith(chosen):
                yield Noted(PREFIX)
        for transcript, label in ((chosen, 1.0), (rejected, 0.0)):
            try:
                prompt, completion = split_turns(transcript)
            except ValueError as error:
                yield LeftOut(str(error))
                continue
            if names_in_text(prompt + completion):
                yield Noted(NAME_IN_TEXT)
            yield row(prompt, completion, label, demonstration=label == 1 and not liked)


def golden_hh(rows: Iterable[Mapping[str, Any]]) -> Iterator[Outcome]:
    r"""Like `hh`, but the authors rewrote the chosen answers to be demonstrations.

    Example:
        >>> human = "\n\nHuman: Hi\n\nAssistant:"
        >>> [row["sft_mask"] for row in golden_hh([{"chosen": f"{human} Hello!", "rejected": f"{human} Go."}])]
        [True, False]
    """
    return hh(rows)


HH = Adapter(hh, needs=(("chosen", "rejected"),), refuses=("prompt",), options=LIKED)
GOLDEN_HH = Adapter(golden_hh, needs=(("chosen", "rejected"),), refuses=("prompt",))
