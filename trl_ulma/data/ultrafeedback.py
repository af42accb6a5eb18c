"""UltraFeedback in its original form: an instruction and four completions, each rated in several aspects."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from trl_ulma.data.adapters import Adapter, LeftOut, Outcome, labeled

OVERALL = {"overall": "overall_score", "fine-grained": "fine-grained_score"}
ASPECTS = ("instruction_following", "truthfulness", "honesty", "helpfulness")


def ultrafeedback(rows: Iterable[Mapping[str, Any]], *, aspect: str = "overall") -> Iterator[Outcome]:
    """One row per completion, with one of its scores as a continuous label.

    Args:
        rows: `instruction` and `completions`, each with `response`, `overall_score`, `fine-grained_score` and
            `annotations`, in which each aspect has a `Rating` from 1 to 5, or "N/A".
        aspect: "overall" (1 to 10), "fine-grained" (the mean of the aspects), or an aspect.

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
        for answer in answers:
            if not isinstance(answer, Mapping):
                yield LeftOut("its completion is not an object with a `response`")
                continue
            if aspect in OVERALL:
                rating = answer.get(OVERALL[aspect])
            else:
                annotations = answer.get("annotations")
                annotation = annotations.get(aspect) if isinstance(annotations, Mapping) else None
                rating = annotation.get("Rating") if isinstance(annotation, Mapping) else None
            yield labeled(raw["instruction"], answer.get("response"), rating, label_type="continuous")


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
