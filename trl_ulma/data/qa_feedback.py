"""QA-feedback: answers from passages, with corrections, and with preferences among four predictions."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations
from typing import Any

from trl_ulma.data.adapters import Adapter, LeftOut, Noted, Outcome, compared, row

PREDICTIONS = (1, 2, 3, 4)
PASSAGES = ("all", "cited", "none")
NOTHING_WRONG = "nothing was wrong with the prediction"
CHANGES_NOTHING = "the correction of its flawed prediction changes nothing"
NO_CORRECTION = "its correction is empty"
NONE_CITED = "no passage is cited as overlooked: all are kept"
NO_PASSAGES = "the question has no passages"


def qa_feedback(rows: Iterable[Mapping[str, Any]], *, passages: str = "all", wins: bool = False) -> Iterator[Outcome]:
    """Two rows per question: the correction is a demonstration (label 1), the flawed first prediction has label 0.

    If nothing was wrong with the prediction, there is no row. A prediction with an empty correction still counts as
    flawed.

    Args:
        rows: `question`, `passages` (each with a title and sentences), `prediction 1`, and `feedback` with `errors`,
            `missing-info` and `corrected-prediction`. For `wins` also `prediction 2` to `4` and `preference`, which
            compares (1, 2), (1, 3), (1, 4), (2, 3), (2, 4) and (3, 4): 1 for the first, 2 for the second, 0 for a tie.
        passages: the passages in the prompt. "all" keeps all of them. "cited" keeps those with information that, in the
            annotator's view, the prediction lacks, or all if there are none. "none" keeps none. The data does not say
            which passages the rest of an answer comes from.
        wins: whether to add predictions 2 to 4. Their continuous label is (wins − losses) / 3 in [−1, 1], over the
            comparisons with all three others.

    Example:
        >>> feedback = {"errors": [{}], "missing-info": [], "corrected-prediction": "Paris."}
        >>> raw = {"question": "Capital?", "passages": [["France", "Its capital is Paris."]], "prediction 1": "Lyon."}
        >>> good, bad = qa_feedback([raw | {"feedback": feedback}])
        >>> print(good["prompt"][0]["content"])
        France
        Its capital is Paris.
        <BLANKLINE>
        Capital?
        >>> good["sft_mask"], bad["completion"][0]["content"], bad["label"]
        (True, 'Lyon.', 0.0)
    """
    if passages not in PASSAGES:
        raise ValueError(f"passages is {passages!r}; it must be one of {PASSAGES}.")
    for raw in rows:
        feedback, answers = raw["feedback"], 5 if wins else 2
        try:
            kept, note = _passages(raw, passages)
            prompt = "\n\n".join([*kept, raw["question"]])
            correction, prediction = feedback["corrected-prediction"], raw["prediction 1"]
            flawed = bool(feedback["errors"] or feedback["missing-info"])
            labels = _wins(raw["preference"]) if wins else {}
            texts = [prompt, correction, prediction, *(raw[f"prediction {number}"] for number in labels)]
            if not all(isinstance(text, str) for text in texts):
                raise TypeError
        except (IndexError, KeyError, TypeError, ValueError):
            yield from [LeftOut("a field of its question is missing or invalid")] * answers
            continue
        if note:
            yield Noted(note)
        if correction.strip() in ("", prediction.strip()) and not flawed:
            yield from [LeftOut(NOTHING_WRONG)] * 2
        elif correction.strip() == prediction.strip():
            yield from [LeftOut(CHANGES_NOTHING)] * 2
        else:
            yield row(prompt, correction, 1.0, demonstration=True) if correction.strip() else LeftOut(NO_CORRECTION)
            yield row(prompt, prediction, 0.0)
        yield from compared(
            row(prompt, raw[f"prediction {number}"], label, label_type="continuous") for number, label in labels.items()
        )


def _passages(raw: Mapping[str, Any], which: str) -> tuple[list[str], str | None]:
    """The passages, each as a title line and a paragraph, and a note or None."""
    passages, note = raw["passages"], None
    if which == "none":
        return [], None
    if not passages:
        return [], NO_PASSAGES
    if which == "cited":
        cited = {missing["passage_id"] - 1 for missing in raw["feedback"]["missing-info"]}
        if not cited <= set(range(len(passages))):
            raise IndexError
        if cited:
            passages = [passages[i] for i in sorted(cited)]
        else:
            note = NONE_CITED
    return [f"{title}\n{' '.join(sentences)}" for title, *sentences in passages], note


def _wins(preference: list[int]) -> dict[int, float]:
    """(wins − losses) / 3 of predictions 2 to 4. Each is compared with three others."""
    pairs = list(combinations(PREDICTIONS, 2))
    if len(preference) != len(pairs) or not set(preference) <= {0, 1, 2}:
        raise IndexError
    balance = dict.fromkeys(PREDICTIONS, 0)
    for (first, second), preferred in zip(pairs, preference, strict=True):
        if preferred:
            balance[first] += 1 if preferred == 1 else -1
            balance[second] += 1 if preferred == 2 else -1
    return {number: balance[number] / 3 for number in PREDICTIONS[1:]}


QA_FEEDBACK = Adapter(
    qa_feedback,
    needs=(("question", "passages", "prediction 1", "feedback"),),
    also=("preference", *(f"prediction {number}" for number in PREDICTIONS)),
    options={
        "--passages": {
            "choices": PASSAGES,
            "default": "all",
            "help": "the passages in the prompt; cited keeps only passages with information that the prediction lacks, "
            "which makes prompts shorter (default: %(default)s)",
        },
        "--wins": {
            "action": "store_true",
            "help": "add predictions 2 to 4 with continuous labels, (wins − losses) / 3 in [−1, 1]",
        },
    },
)
