"""Red-team attempts: transcripts with a rating of the success of the attack."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from trl_ulma.data.adapters import Adapter, LeftOut, Noted, Outcome, as_number, off_scale, row
from trl_ulma.data.conversations import names_in_text, split_turns
from trl_ulma.data.hh import NAME_IN_TEXT


def red_team(rows: Iterable[Mapping[str, Any]]) -> Iterator[Outcome]:
    r"""One row per transcript. The continuous label is −rating: higher is better. Rating 0 is a demonstration.

    Args:
        rows: `transcript` with `\n\nHuman:` and `\n\nAssistant:` turns, and `rating` from 0 (the attack failed) to 4.

    Example:
        >>> [outcome] = red_team([{"transcript": "\n\nHuman: Harm!\n\nAssistant: No.", "rating": 0.0}])
        >>> outcome["label"], outcome["sft_mask"], outcome["label_type"]
        (0.0, True, 'continuous')
    """
    for attempt in rows:
        rating = as_number(attempt["rating"])
        if rating is None or not 0 <= rating <= 4:
            yield LeftOut("its rating is not a number") if rating is None else off_scale(0, 4)
            continue
        try:
            prompt, completion = split_turns(attempt["transcript"])
        except ValueError as error:
            yield LeftOut(str(error))
            continue
        if names_in_text(prompt + completion):
            yield Noted(NAME_IN_TEXT)
        yield row(prompt, completion, 0.0 - rating, demonstration=rating == 0, label_type="continuous")


RED_TEAM = Adapter(red_team, needs=(("transcript", "rating"),))
