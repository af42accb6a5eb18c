"""PKU-SafeRLHF: two responses to a prompt, whether each is safe, and which is better and safer."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from trl_ulma.data.adapters import LIKED, Adapter, LeftOut, Outcome, as_bool, as_number, compared, labeled

# label: the column with the number of the preferred response
PREFERRED = {"better": "better_response_id", "safer": "safer_response_id"}
LABELS = ("safe", *PREFERRED)


def pku_saferlhf(rows: Iterable[Mapping[str, Any]], *, label: str = "safe", liked: bool = False) -> Iterator[Outcome]:
    """Two rows per prompt, with binary labels.

    Args:
        rows: `prompt`, `response_0`, `response_1`, `is_response_0_safe`, `is_response_1_safe`, and for the other labels
            `better_response_id` and `safer_response_id`.
        label: "safe" labels whether a response is safe. "better" and "safer" label whether it is the better or the
            safer of the two.
        liked: responses with label 1 are not demonstrations.

    Example:
        >>> raw = {"prompt": "Harm!", "response_0": "No.", "response_1": "Sure."}
        >>> raw |= {"is_response_0_safe": True, "is_response_1_safe": False, "better_response_id": 1}
        >>> [row["label"] for row in pku_saferlhf([raw])], [row["label"] for row in pku_saferlhf([raw], label="better")]
        ([1.0, 0.0], [0.0, 1.0])
    """
    if label not in LABELS:
        raise ValueError(f"label is {label!r}; it must be one of {LABELS}.")
    for raw in rows:
        preferred = as_number(raw.get(PREFERRED[label])) if label in PREFERRED else None
        found: list[Outcome] = []
        for number in (0, 1):
            if label == "safe":
                value = as_bool(raw[f"is_response_{number}_safe"])
            else:
                value = number == preferred if preferred in (0, 1) else None
            if value is None:
                found.append(LeftOut(f"it is not known whether it is {label}"))
                continue
            found.append(labeled(raw["prompt"], raw[f"response_{number}"], value, liked=liked))
        yield from compared(found)


PKU_SAFERLHF = Adapter(
    pku_saferlhf,
    needs=(("prompt", "response_0", "response_1", "is_response_0_safe", "is_response_1_safe"),),
    also=tuple(PREFERRED.values()),
    options=LIKED
    | {
        "--label": {
            "choices": LABELS,
            "default": "safe",
            "help": "the label to use: whether a response is safe, or whether it is the better or the safer of the two "
            "(default: %(default)s)",
        },
    },
)
