"""Feedback of several rounds: train, rate the policy's own answers, and train anew on all answers so far."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
from answers import rewards, sample
from contenders import METHODS, Recipe, train
from pool import MAX_TOKENS, batch_size, read_back
from prompts import prompt
from regimes import NOISE, Feedback
from transformers import PreTrainedModel, PreTrainedTokenizerBase

SPARE = 1.5  # answers that are drawn for each one that is needed, because not all are usable
DRAWS = 4  # how often, at most


def closed(
    method: str,
    beta: float | None,
    offline: Feedback,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    reward: str,
    seed: int,
    recipe: Recipe,
) -> Feedback:
    """As many rated answers as `offline` has, drawn in as many rounds as the method has.

    Those of the first round are the first of `offline`. Those of each other round are drawn from a policy that was
    trained on all before, with its share of the steps, and rated with the same noise.

    Args:
        method: one of `METHODS`.
        beta: β.
        offline: ratings of the reference's answers.
        reference: the model that each training begins with.
        tokenizer: its tokenizer.
        reward: the true reward's name.
        seed: of draws, noise and trainings.
        recipe: of the last training, which the caller runs.
    """
    rounds = METHODS[method].rounds
    asked = sorted(set(offline.question))
    shares = [len(part) for part in np.array_split(np.arange(len(offline.answer)), rounds)]
    feedback = _some(offline, np.arange(shares[0]))
    for number in range(1, rounds):
        part = replace(recipe, steps=max(recipe.steps * number // rounds, 1))
        policy, _ = train(method, beta, feedback, reference, tokenizer, seed=seed, recipe=part)
        random = np.random.default_rng([seed, 5, number])
        answers = math.ceil(SPARE * shares[number] / len(asked))
        at_a_time = max(batch_size(reference) // answers, 1)
        drawn: list[tuple[int, str, str]] = []
        for draw in range(DRAWS):
            if len(drawn) < shares[number]:
                of_draw = 100_000 * draw + 1000 * (seed + 1) + 100 * number
                more = _drawn(policy, tokenizer, asked, answers, at_a_time, seed=of_draw)
                drawn += [(draw * answers + place, question, text) for place, question, text in more]
        # The first answer to each prompt, then the second, so that all prompts have about as many
        order = sorted(range(len(drawn)), key=lambda i: (drawn[i][0], random.random()))[: shares[number]]
        if len(order) < shares[number]:
            raise ValueError(f"Round {number + 1} of seed {seed} has {len(order)} usable answers of {shares[number]}.")
        truth = np.array([rewards(drawn[i][2])[reward] for i in order])
        rating = truth + NOISE * random.standard_normal(len(order))
        feedback = Feedback(
            question=[*feedback.question, *(drawn[i][1] for i in order)],
            answer=[*feedback.answer, *(drawn[i][2] for i in order)],
            rating=np.append(feedback.rating, rating),
            thumb=np.append(feedback.thumb, rating > np.median(rating)),
            demonstration=np.zeros(len(feedback.answer) + len(order), bool),
            reward=np.append(feedback.reward, truth),
            rated=offline.rated,
        )
        feedback = _some(feedback, random.permutation(len(feedback.answer)))
    return feedback


def _drawn(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: list[str],
    answers: int,
    at_a_time: int,
    *,
    seed: int,
) -> list[tuple[int, str, str]]:
    """Usable answers: (which of its prompt's, the question, the answer)."""
    found = []
    eos: Any = tokenizer.eos_token_id
    for start in range(0, len(asked), at_a_time):
        batch = asked[start : start + at_a_time]
        ids: list[Any] = [tokenizer(prompt(each), add_special_tokens=False)["input_ids"] for each in batch]
        sampled = sample(policy, ids, answers=answers, eos=eos, max_tokens=MAX_TOKENS, seed=seed + start)
        for question, of_question in zip(batch, sampled, strict=True):
            texts = [read_back(tokenizer, prompt(question), answer) for answer in of_question]
            usable = [text for text, is_usable in texts if is_usable]
            found += [(number, question, text) for number, text in enumerate(usable)]
    return found


def _some(feedback: Feedback, rows: np.ndarray) -> Feedback:
    return replace(
        feedback,
        question=[feedback.question[i] for i in rows],
        answer=[feedback.answer[i] for i in rows],
        rating=feedback.rating[rows],
        thumb=feedback.thumb[rows],
        demonstration=feedback.demonstration[rows],
        reward=feedback.reward[rows],
    )
