"""WebGPT comparisons: two answers to a question, with scores that sum to 0."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from trl_ulma.data.adapters import Adapter, LeftOut, Noted, Outcome, compared, labeled

# The question as an object that a CSV file holds as text, which cannot be told from its quotes
_OBJECT = re.compile(r"""\s*\{["'](dataset|id|full_text)["']:""")
NO_QUOTES = "its answer has no quotes"


def webgpt(rows: Iterable[Mapping[str, Any]], *, quotes: bool = False) -> Iterator[Outcome]:
    """Two rows per question, with the score from −1 to 1 as a continuous label. 0 is a tie.
    Equal answers with different scores are left out.

    Args:
        rows: `question` (text, or an object with `full_text`), `answer_0`, `answer_1`, `score_0`, `score_1`, and for
            `quotes` also `quotes_0` and `quotes_1`, each with lists `title` and `extract`.
        quotes: whether to put the quotes of an answer before the question. Each answer then has its own prompt.

    Example:
        >>> raw = {"question": {"full_text": "Why?"}, "answer_0": "So.", "answer_1": "No.", "score_0": 1.0}
        >>> [row["label"] for row in webgpt([raw | {"score_1": -1.0}])]
        [1.0, -1.0]
    """
    for raw in rows:
        question = raw["question"]
        if isinstance(question, Mapping):
            question = question.get("full_text")
        answers: list[Outcome] = []
        for number in (0, 1):
            prompt = question
            if not isinstance(prompt, str) or _OBJECT.match(prompt):
                answers.append(LeftOut("its question is not text"))
                continue
            if quotes:
                try:
                    found = raw[f"quotes_{number}"]
                    pairs = list(zip(found["title"], found["extract"], strict=True))
                    if not all(isinstance(text, str) for pair in pairs for text in pair):
                        raise TypeError
                    prompt = "\n\n".join([*(f"{title}\n{extract}" for title, extract in pairs), prompt])
                except (KeyError, TypeError, ValueError):
                    answers.append(LeftOut("its quotes are not lists of titles and extracts"))
                    continue
                if not pairs:
                    answers.append(Noted(NO_QUOTES))
            answer, score = raw[f"answer_{number}"], raw[f"score_{number}"]
            answers.append(labeled(prompt, answer, score, label_type="continuous", scale=(-1, 1)))
        yield from compared(answers)


WEBGPT = Adapter(
    webgpt,
    needs=(("question", "answer_0", "answer_1", "score_0", "score_1"),),
    also=("quotes_0", "quotes_1"),
    options={"--quotes": {"action": "store_true", "help": "put the quotes that an answer cites before the question"}},
)
