"""UltraFeedback in its original form: an instruction and four completions, each rated in several aspects."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from trl_ulma.data.adapters import Adapter, LeftOut, Noted, Outcome, as_number, compared, labeled

OVERALL = {"overall": "overall_score", "fine-grained": "fine-grained_score"}
ASPECTS = ("instruction_following", "truthfulness", "honesty", "helpfulness")
# The first releases multiplied ratings of 1 by 10: https://github.com/OpenBMB/UltraFeedback/issues/8
TEN_IS_ONE = (
    "its overall_score is 10 and the mean of its aspects at most 2, as where early releases of UltraFeedback wrote 10 "
    "instead of 1: it is read as 1"
)
TEN_MAY_BE_ONE = (
    "its overall_score is 10, but the mean of its aspects is below 4. It can be one of the 1s that early releases of "
    "UltraFeedback wrote as 10. It is kept; --aspect fine-grained avoids such scores"
)

SYSTEM_PROMPT = "its answer was written under a custom_system_prompt, which is left out"


def ultrafeedback(rows: Iterable[Mapping[str, Any]], *, aspect: str = "overall") -> Iterator[Outcome]:
    """One row per completion, with one of its scores as a continuous label.

    Args:
        rows: `instruction` and `completions`, each with `response`, `overall_score`, `fine-grained_score` and
            `annotations`, in which each aspect has a `Rating` from 1 to 5, or "N/A".
        aspect: "overall" (1 to 10), "fine-grained" (the mean of the aspects), or an aspect. An overall score of 10 is
            read as 1 if the mean of the aspects is at most 2.

    Example:
        >>> answer = {"response": "Hello!", "overall_score": 7.5, "annotations": {"honesty": {"Rating": "5"}}}
        >>> [row["label"] for row in ultrafeedback([{"instruction": "Hi", "completions": [answer]}])]
        [7.5]
    """
    if aspect not in (*OVERALL, *ASPECTS):
        raise ValueError(f"aspect is {aspect!r}; it must be one of {(*OVERALL, *ASPECTS)}.")
    for raw in rows:
        answers = raw["completions"]
        if not isinstance(answers, list) or not answers:
            yield LeftOut("its instruction has no completions")
            continue
        found: list[Outcome] = []
        for answer in answers:
            if not isinstance(answer, Mapping):
                found.append(LeftOut("its completion is not an object with a `response`"))
                continue
            rating = answer.get(OVERALL[aspect]) if aspect in OVERALL else _rating(answer, aspect)
            if aspect == "overall" and as_number(rating) == 10:
                mean = _mean(answer)
                if mean is not None and mean < 4:
                    found.append(Noted(TEN_IS_ONE if mean <= 2 else TEN_MAY_BE_ONE))
                    rating = 1 if mean <= 2 else rating
            if answer.get("custom_system_prompt"):
                found.append(Noted(SYSTEM_PROMPT))
            scale = (1, 10 if aspect == "overall" else 5)
            text = answer.get("response")
            found.append(labeled(raw["instruction"], text, rating, label_type="continuous", scale=scale))
        yield from compared(found)


def _rating(answer: Mapping[str, Any], aspect: str) -> Any:
    annotations = answer.get("annotations")
    annotation = annotations.get(aspect) if isinstance(annotations, Mapping) else None
    return annotation.get("Rating") if isinstance(annotation, Mapping) else None


def _mean(answer: Mapping[str, Any]) -> float | None:
    """The mean of the aspects: the stored one, or else that of their ratings."""
    stored = as_number(answer.get(OVERALL["fine-grained"]))
    found = [number for aspect in ASPECTS if (number := as_number(_rating(answer, aspect))) is not None]
    return stored if stored is not None else sum(found) / len(found) if found else None


ULTRAFEEDBACK = Adapter(
    ultrafeedback,
    needs=(("instruction", "completions"),),
    options={
        "--aspect": {
            "choices": (*OVERALL, *ASPECTS),
            "default": "overall",
            "help": "the score to use: overall, fine-grained (the mean of the aspects), or an aspect (default: "
            "%(default)s)",
        },
    },
)
