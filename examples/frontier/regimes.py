"""The feedback of each regime, made of the reference's answers and their true rewards, as each trainer takes it."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Dataset
from pool import Pool, Scored
from prompts import prompt

ROWS = 960  # at most: a batch of 16 for each of 60 steps
NOISE = 1.0  # standard deviation of a rating's error; the rewards' own is about 1.7
THUMB_NOISE = 3.0  # of the thumbs beside demonstrations
OFFSET = 2.0  # standard deviation of a prompt's offset
DISLIKED = 0.1  # share of thumbs down of a lenient public
# How many, each the best of how many draws: the share and the quality of demonstrations
DEMONSTRATIONS = {"demonstrations": (48, 64), "few demonstrations": (12, 64), "fair demonstrations": (48, 4)}
# The stream of random numbers; regimes that share one have the same noise and order
STREAMS = {"one thumb": 3, **dict.fromkeys(("ratings", "nine likes", "offset"), 4), **dict.fromkeys(DEMONSTRATIONS, 0)}

REGIMES = {
    "ratings": "90 prompts with about ten rated answers each, of 16 drawn; a rating is the reward plus noise (σ = 1).",
    "one thumb": "One answer and one thumb per prompt: up if its rating is above the median.",
    "nine likes": "The prompts and answers of the first regime, but only thumbs, and 9 of 10 are up: the worst-rated "
    "tenth is disliked.",
    "offset": "As the first regime, but every prompt's ratings have an offset of their own (σ = 2): lenient and "
    "strict raters.",
    "demonstrations": "48 demonstrations, each the best of 64 draws by true reward, and about 900 thumbs from "
    "ratings with noise of σ = 3.",
    "few demonstrations": "The same with 12 demonstrations.",
    "fair demonstrations": "The same with 48 demonstrations, each the best of 4 draws.",
}


@dataclass(frozen=True)
class Feedback:
    """Rows of feedback in random order.

    Attributes:
        question: `(N,)` questions.
        answer: `(N,)` answers.
        rating: `(N,)` noisy ratings; a method may read them only if `rated`.
        thumb: `(N,)` bool, liked.
        demonstration: `(N,)` bool.
        reward: `(N,)` true rewards, which no method reads.
        rated: whether the ratings are part of the feedback; otherwise thumbs are.
    """

    question: list[str]
    answer: list[str]
    rating: np.ndarray
    thumb: np.ndarray
    demonstration: np.ndarray
    reward: np.ndarray
    rated: bool

    @property
    def imitated(self) -> np.ndarray:
        """`(N,)` bool, what SFT and ULMA imitate: demonstrations; without any, the best-rated quarter, or the likes."""
        if self.demonstration.any():
            return self.demonstration
        return self.rating >= np.quantile(self.rating, 0.75) if self.rated else self.thumb

    def rows(self, *, continuous: bool, imitate: bool) -> Dataset:
        """Rows for this package's trainers: ratings (continuous) or thumbs, with the imitated rows marked if asked."""
        mask = self.imitated if imitate else np.zeros(len(self.answer), bool)
        return Dataset.from_dict(
            {
                "prompt": [prompt(question) for question in self.question],
                "completion": self.answer,
                "label": (self.rating if continuous else self.thumb.astype(float)).tolist(),
                "sft_mask": mask.tolist(),
            }
        )

    def thumbs(self) -> Dataset:
        """Rows for TRL's KTOTrainer."""
        return Dataset.from_dict(
            {
                "prompt": [prompt(question) for question in self.question],
                "completion": self.answer,
                "label": self.thumb.tolist(),
            }
        )

    def pairs(self) -> Dataset | None:
        """Pairs for TRL's DPOTrainer from the same rows; None if no prompt has two answers that differ.

        Ratings are paired as drawn, neighbors within a prompt, so that 2N rows make about N pairs. Of thumbs each
        answer of a prompt's larger class has a partner in the smaller one, whose answers take turns; a demonstration
        counts as liked.
        """
        by_question: defaultdict[str, list[int]] = defaultdict(list)
        for row, question in enumerate(self.question):
            by_question[question].append(row)
        found: list[tuple[int, int]] = []
        for rows in by_question.values():
            if self.rated:
                for a, b in zip(rows[0::2], rows[1::2], strict=False):
                    if self.rating[a] != self.rating[b]:
                        found.append((a, b) if self.rating[a] > self.rating[b] else (b, a))
                continue
            good, bad = [r for r in rows if self.thumb[r]], [r for r in rows if not self.thumb[r]]
            if good and bad:
                longest = max(len(good), len(bad))
                found += zip(np.resize(good, longest).tolist(), np.resize(bad, longest).tolist(), strict=True)
        if not found:
            return None
        return Dataset.from_dict(
            {
                "prompt": [prompt(self.question[a]) for a, _ in found],
                "chosen": [self.answer[a] for a, _ in found],
                "rejected": [self.answer[b] for _, b in found],
            }
        )


def groups(regime: str, seed: int) -> list[str]:
    """The groups of answers that a regime's feedback is made of."""
    if regime == "one thumb":
        return [f"single-{seed}"]
    return [f"train-{seed}", *([f"demonstrations-{seed}"] if regime in DEMONSTRATIONS else [])]


def draw(regime: str, reward: str, seed: int, pool: Pool) -> Feedback:
    """The feedback of a regime; the same for every method of a seed.

    Args:
        regime: one of `REGIMES`.
        reward: name of the true reward, one of `answers.REWARDS`.
        seed: of topics, noise and the order of rows.
        pool: where the answers come from.

    Raises:
        ValueError: for an unknown regime.
    """
    if regime not in REGIMES:
        raise ValueError(f"There is no regime {regime!r}. Regimes are {', '.join(REGIMES)}.")
    random = np.random.default_rng([seed, STREAMS[regime]])
    drawn = pool.group(groups(regime, seed)[0])
    best: list[Scored] = []
    if regime in DEMONSTRATIONS:
        count, draws = DEMONSTRATIONS[regime]
        for first, more in zip(drawn, pool.group(f"demonstrations-{seed}")[:count], strict=False):
            usable = [each for each in [*first, *more][:draws] if each.usable]
            best += [max(usable, key=lambda each: each.rewards[reward])] if usable else []
    found = _first([[each for each in answers if each.usable] for answers in drawn], ROWS - len(best))
    rows = [each for answers in found for each in answers]
    order = random.permutation(len(rows))
    noise = random.standard_normal(len(rows))[np.argsort(order)]
    truth = np.array([each.rewards[reward] for each in rows])
    rating = truth + noise * (THUMB_NOISE if regime in DEMONSTRATIONS else NOISE)
    if regime == "offset":
        place = np.repeat(np.arange(len(found)), [len(answers) for answers in found])
        rating += OFFSET * random.standard_normal(len(found))[place]
    thumb = rating > np.quantile(rating, DISLIKED if regime == "nine likes" else 0.5)
    rows, rating, thumb, truth = [rows[i] for i in order], rating[order], thumb[order], truth[order]
    demonstration = np.zeros(len(rows) + len(best), bool)
    if best:
        # The best of 64 is a fact, not a rating: it is liked, and stands among the others in random order
        rows = [*rows, *best]
        own = np.array([each.rewards[reward] for each in best])
        rating, thumb = np.append(rating, own), np.append(thumb, np.ones(len(best), bool))
        truth, demonstration[-len(best) :] = np.append(truth, own), True
        order = random.permutation(len(rows))
        rows, rating, thumb = [rows[i] for i in order], rating[order], thumb[order]
        truth, demonstration = truth[order], demonstration[order]
    return Feedback(
        question=[each.question for each in rows],
        answer=[each.text for each in rows],
        rating=rating,
        thumb=thumb,
        demonstration=demonstration,
        reward=truth,
        rated=regime in ("ratings", "offset"),
    )


def _first(found: Sequence[list[Scored]], count: int) -> list[list[Scored]]:
    """The first `count` answers, prompt after prompt, of prompts in the order given."""
    kept: list[list[Scored]] = []
    for answers in found:
        kept.append(answers[: count - sum(map(len, kept))])
    return [answers for answers in kept if answers]
