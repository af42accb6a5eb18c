"""Rewards on the scale of the labels in the data: calibration, errors, and the most surprising rows."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from trl_ulma.data.sheet_rows import with_sheet_row
from trl_ulma.evaluation.implicit_reward import BINS, calibration_curve
from trl_ulma.evaluation.intervals import Estimate, bootstrap, mean_of, ratio_of
from trl_ulma.evaluation.turns import answer_text, as_text
from trl_ulma.labels import LabelRules
from trl_ulma.predictions import judged

SURPRISES = 10
# Characters of a text that is shown
_LONGEST, _LONGEST_ANSWER = 300, 600


def on_own_scale(
    reward: np.ndarray,
    label: np.ndarray,
    continuous: np.ndarray,
    prompt: np.ndarray,
    rules: LabelRules,
    raters: Sequence[Any] | None = None,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare the predictions of rewards with the labels, both on the scale of the data.

    Args:
        reward: `(N,)` r.
        label: `(N,)` labels as the rows carry them, see `HeldOut.own_label`.
        continuous: `(N,)` bool.
        prompt: `(N,)` numbers of the prompts.
        rules: rules for labels, with their transform.
        raters: `(N,)` raters, see `judged`.
        seed: seed of the bootstrap.

    Returns:
        `error`, the mean absolute difference of predicted and given labels; `error_of_mean`, the same if the mean label
        of these rows were predicted for every row; `slope`, how much more the labels of rows differ than their
        predictions (least squares; None if all predictions are the same); `by_label`, for each label (or each tenth of
        many distinct labels) the number of rows, their mean label and the mean prediction; `calibration`, bins of rows
        with similar predictions; `knows_raters`, whether predictions depend on who rated.

    Example:
        >>> found = on_own_scale(np.array([0.0, 2.0]), np.array([0.0, 1.0]), np.ones(2, bool), np.arange(2),
        ...                      LabelRules("continuous"))
        >>> found["error"].value, found["error_of_mean"].value, [each["predicted"].value for each in found["by_label"]]
        (0.5, 0.5, [0.0, 2.0])
        >>> found["slope"].value
        0.5
    """
    predicted = judged(reward, label, continuous, rules, raters)["predicted_label"]
    wrong, of_mean = np.abs(predicted - label), np.abs(label.mean() - label)
    apart = predicted - predicted.mean()
    values = np.unique(label)
    if len(values) <= BINS:
        groups = [label == value for value in values]
    else:
        edges = np.quantile(label, np.linspace(0, 1, BINS + 1))
        place = np.searchsorted(edges[1:-1], label)
        groups = [place == each for each in range(BINS) if (place == each).any()]
    return {
        "error": bootstrap(mean_of(wrong), prompt, seed),
        "error_of_mean": bootstrap(mean_of(of_mean), prompt, seed),
        "slope": None
        if np.allclose(apart, 0)
        else bootstrap(ratio_of(apart * (label - label.mean()), apart**2), prompt, seed),
        "by_label": [
            {
                "label": float(label[rows].mean()),
                "rows": int(rows.sum()),
                "predicted": _mean(predicted[rows], prompt[rows], seed),
            }
            for rows in groups
        ],
        "calibration": calibration_curve(predicted, label),
        "knows_raters": raters is not None,
    }


def surprises(
    reward: np.ndarray,
    label: np.ndarray,
    given: np.ndarray,
    continuous: np.ndarray,
    rules: LabelRules,
    rows: Any,
    numbers: np.ndarray | Sequence[int],
    places: Sequence[str | None] | None = None,
    raters: Sequence[Any] | None = None,
) -> list[dict[str, Any]]:
    """Return the rows whose labels surprise a model most, most surprising first. Check these for mistakes.

    Args:
        reward: `(N,)` r.
        label: `(N,)` z after the transform.
        given: `(N,)` labels on the rows' own scale.
        continuous: `(N,)` bool. Only the kind with more rows is used, because the two cannot be compared.
        rules: rules for labels, with their transform.
        rows: rows with `prompt` and `completion`, by number: a list or a `Dataset`.
        numbers: `(N,)` numbers of the rows.
        places: the file and line of each row by its number, or None where it is not known.
        raters: `(N,)` raters, see `judged`.

    Example:
        >>> rows = [{"prompt": "Hi", "completion": " Hello!"}, {"prompt": "Hi", "completion": " Go away!"}]
        >>> reward, label = np.array([-3.0, -3.0]), np.array([1.0, 0.0])
        >>> found = surprises(reward, label, label, np.zeros(2, bool), LabelRules(), rows, [0, 1])
        >>> [(each["row"], each["answer"], round(each["predicted"], 3)) for each in found]
        [(0, 'Hello!', 0.047), (1, 'Go away!', 0.047)]
    """
    told = judged(reward, label, continuous, rules, raters)
    before = judged(np.zeros_like(reward), label, continuous, rules, raters)["predicted_label"]
    kind = continuous == (continuous.mean() > 0.5)
    order = np.flatnonzero(kind)[np.argsort(-told["surprise"][kind], kind="stable")][:SURPRISES]
    return [
        {
            "row": int(numbers[i]),
            "file_line": with_sheet_row(places[int(numbers[i])] or "") or None if places else None,
            "prompt": shortened(as_text(rows[int(numbers[i])]["prompt"])),
            "answer": shortened(answer_text(rows[int(numbers[i])]["completion"])),
            "label": float(given[i]),
            "predicted": float(told["predicted_label"][i]),
            "predicted_before": float(before[i]),
            "reward": float(reward[i]),
            "surprise": float(told["surprise"][i]),
        }
        for i in order
    ]


def changed(
    prompts: Sequence[Any],
    before: Sequence[str | None],
    after: Sequence[str | None],
    chosen: Sequence[str],
    examples: int = 3,
) -> dict[str, Any]:
    """Return how many answers training changed, and examples from before and after it, changed answers first.

    Args:
        prompts: `(N,)` text or messages.
        before, after: `(N,)` answers of the base and of the tuned model; None if there is no answer.
        chosen: `(N,)` good answers in the data.
        examples: number of examples.

    Example:
        >>> changed(["Hi", "Bye"], ["Go.", "Bye."], ["Hello!", "Bye."], ["Hi!", "Bye!"], examples=1)
        {'answers': 2, 'others': 1, 'examples': [{'prompt': 'Hi', 'before': 'Go.', 'after': 'Hello!', 'chosen': 'Hi!'}]}
    """
    both = [i for i in range(len(prompts)) if before[i] is not None and after[i] is not None]
    others = [i for i in both if str(before[i]).strip() != str(after[i]).strip()]
    shown = []
    for i in [*others, *(i for i in both if i not in others)][:examples]:
        old, new = where_they_differ(str(before[i]), str(after[i]))
        prompt, good = (shortened(text, _LONGEST_ANSWER) for text in (as_text(prompts[i]), chosen[i]))
        shown.append({"prompt": prompt, "before": old, "after": new, "chosen": good})
    return {"answers": len(both), "others": len(others), "examples": shown}


def where_they_differ(one: str, other: str, most: int = _LONGEST_ANSWER) -> tuple[str, str]:
    """Return two texts, of long ones the part from shortly before their first difference. Words stay whole.

    Example:
        >>> where_they_differ("The cat sat on the mat.", "The cat sat on the roof.", 8)
        ('…mat.', '…roof.')
        >>> where_they_differ("The cat", "The dog", 8)
        ('The cat', 'The dog')
    """
    one, other = one.strip(), other.strip()
    if one == other or max(len(one), len(other)) <= most:
        return shortened(one, most), shortened(other, most)
    shorter = min(len(one), len(other))
    same = next((place for place in range(shorter) if one[place] != other[place]), shorter)
    # The word of the first difference is whole, unless it is very long
    own_word = max((place.end() for place in re.finditer(r"\s", one[:same])), default=0)
    start = max(0, same - most // 4)
    start = next((place.end() for place in re.finditer(r"\s+", one[:same]) if place.start() >= start - 1), start)
    if start > own_word >= same - most // 2:
        start = own_word
    before = "…" if start else ""
    return before + whole_words(one[start:], most), before + whole_words(other[start:], most)


def shortened(text: str, most: int = _LONGEST) -> str:
    """Return a text, shortened in the middle if it is too long for a table. Words stay whole.

    Example:
        >>> shortened("One two three four five", 14), shortened("0123456789", 7), shortened(" short ", 7)
        ('One two…five', '012…789', 'short')
    """
    text = text.strip()
    half = most // 2
    if len(text) <= most:
        return text
    end = whole_words(text[::-1], half)[::-1].removeprefix("…")
    return whole_words(text, half) + end


def whole_words(text: str, most: int) -> str:
    """Return the beginning of a text up to the end of a word, with "…" if it is not all of it.

    A text without spaces is cut at `most` characters.

    Example:
        >>> whole_words("One two three", 10), whole_words("0123456789", 4), whole_words("One two", 7)
        ('One two…', '0123…', 'One two')
    """
    if len(text) <= most:
        return text
    part = text[:most]
    if not text[most].isspace():
        spaces = [place.start() for place in re.finditer(r"\s", part)]
        # A long part of one word is shown, because texts of some languages have no spaces
        part = part[: spaces[-1]] if spaces and spaces[-1] >= most // 2 else part
    return f"{part.rstrip()}…"


def without_part_of_word(text: str) -> str:
    """Return an answer that a limit of tokens ended, without the part of a word at its end, and with "…".

    Example:
        >>> without_part_of_word("It is a mista"), without_part_of_word("It is."), without_part_of_word("")
        ('It is a…', 'It is.…', '')
    """
    text = text.rstrip()
    return whole_words(f"{text}x", len(text)) if text[-1:].isalnum() else text and f"{text}…"


def _mean(values: np.ndarray, prompt: np.ndarray, seed: int) -> Estimate:
    return bootstrap(mean_of(values), prompt, seed)
