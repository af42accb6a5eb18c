"""Labeled answers drawn in an exact world, and the same rows as each trainer takes them."""

from dataclasses import dataclass, field

import numpy as np
import torch
from datasets import Dataset
from exact_world import World


@dataclass(frozen=True)
class FeedbackConfig:
    """How answers are drawn and labeled.

    Raises:
        ValueError: for a share outside (0, 1), or class balance of labels that have no classes.
    """

    rows: int = field(default=1024, metadata={"help": "Labeled answers."})
    answers: int = field(default=16, metadata={"help": "Answers a prompt; rows / answers prompts are asked."})
    label_type: str = field(default="binary", metadata={"help": "binary: z ~ Bernoulli(σ(r*)); or continuous."})
    noise: float = field(default=0.5, metadata={"help": "Standard deviation of a continuous label's error."})
    offset: float = field(default=0.0, metadata={"help": "Continuous labels are scale·r* + offset + noise."})
    scale: float = field(default=1.0, metadata={"help": "See offset."})
    positive_share: float | None = field(
        default=None, metadata={"help": "Keep so many of each class that this is the share of label 1."}
    )
    demonstrations: float = field(default=0.0, metadata={"help": "Share of rows that are demonstrations."})
    demonstrator_beta: float = field(default=0.3, metadata={"help": "They are drawn from π* at this β."})
    quality: float = field(default=1.0, metadata={"help": "Share of them that are; the others come from π_ref."})
    best_of: int = field(
        default=0, metadata={"help": "Draw those that are good so instead: the best of so many answers of π_ref."}
    )
    seed: int = field(default=0, metadata={"help": "Of the draws."})

    def __post_init__(self):
        if self.positive_share is not None and (self.label_type != "binary" or not 0 < self.positive_share < 1):
            raise ValueError(
                f"positive_share={self.positive_share} with label_type={self.label_type!r}: it is the share of label 1 "
                "among binary labels, in (0, 1)."
            )


@dataclass(frozen=True)
class Feedback:
    """Rows of feedback.

    Attributes:
        world: where they were drawn.
        prompt: `(N,)` number of the prompt.
        answer: `(N,)` number of the completion.
        label: `(N,)` float64.
        demonstration: `(N,)` bool.
        label_type: "binary" or "continuous".
        reward: `(P, A)`, the reward as the labels say it: z ~ Bernoulli(σ(reward)), or reward plus noise.
        weight: `(N,)`, or None where all are 1.
    """

    world: World
    prompt: np.ndarray
    answer: np.ndarray
    label: np.ndarray
    demonstration: np.ndarray
    label_type: str
    reward: torch.Tensor
    weight: np.ndarray | None = None

    @property
    def imitated(self) -> np.ndarray:
        """`(N,)` bool, what SFT and ULMA imitate: demonstrations; where there are none, answers with label 1, or the
        quarter with the best ratings."""
        if self.demonstration.any():
            return self.demonstration
        return self.label >= (1 if self.label_type == "binary" else np.quantile(self.label, 0.75))

    @property
    def is_good(self) -> np.ndarray:
        """`(N,)` bool labels, for KTO: ratings are cut at their median."""
        return self.label >= (0.5 if self.label_type == "binary" else np.median(self.label))

    def rows(self, *, imitate: bool, beta: float | None = None) -> Dataset:
        """Rows for this package's trainers, of token ids.

        Args:
            imitate: mark the imitated rows in `sft_mask`.
            beta: write the exact log Z(x) at this β, of the reward as the labels say it, into the column `log_z`.
        """
        count = len(self.label)
        columns = {
            **self._ids(np.arange(count)),
            "label": self.label.tolist(),
            "sft_mask": (self.imitated if imitate else np.zeros(count, bool)).tolist(),
            "row": list(range(count)),
            "length": [self.world.config.prompt_length + self.world.config.completion_length] * count,
        }
        if self.weight is not None:
            columns["weight"] = self.weight.tolist()
        if beta is not None:
            columns["log_z"] = self.world.log_z(beta, self.reward)[self.prompt].tolist()
        return Dataset.from_dict(columns)

    def kto_rows(self, batch_size: int) -> Dataset:
        """Rows for TRL's KTOTrainer: with each, the completion before it in its batch."""
        columns = {**self._ids(np.arange(len(self.label))), "label": self.is_good.tolist()}
        completions = columns["completion_ids"]
        batches = [completions[i : i + batch_size] for i in range(0, len(completions), batch_size)]
        rotated = [completion for batch in batches for completion in batch[-1:] + batch[:-1]]
        return Dataset.from_dict({**columns, "KL_completion_ids": rotated})

    def pairs(self) -> Dataset | None:
        """Pairs for TRL's DPOTrainer, from the same rows; None where no prompt has two answers that differ in label.

        Of binary labels each answer of a prompt's larger class has a partner in the smaller, whose answers take turns;
        ratings are paired as drawn, neighbors.
        """
        chosen, rejected = [], []
        for prompt in np.unique(self.prompt):
            rows = np.flatnonzero(self.prompt == prompt)
            if self.label_type == "binary":
                good, bad = rows[self.label[rows] >= 0.5], rows[self.label[rows] < 0.5]
                longest = max(len(good), len(bad)) if len(good) and len(bad) else 0
                pairs = zip(np.resize(good, longest), np.resize(bad, longest), strict=True)
            else:
                pairs = zip(rows[0::2], rows[1::2], strict=False)
            for a, b in pairs:
                if self.label[a] != self.label[b]:
                    better, worse = (a, b) if self.label[a] > self.label[b] else (b, a)
                    chosen.append(better)
                    rejected.append(worse)
        if not chosen:
            return None
        ids, other = self._ids(np.array(chosen)), self._ids(np.array(rejected))
        return Dataset.from_dict(
            {
                "prompt_ids": ids["prompt_ids"],
                "chosen_ids": ids["completion_ids"],
                "rejected_ids": other["completion_ids"],
            }
        )

    def _ids(self, rows: np.ndarray) -> dict[str, list]:
        return {
            "prompt_ids": self.world.prompts[self.prompt[rows]].tolist(),
            "completion_ids": self.world.completions[self.answer[rows]].tolist(),
        }


def population(world: World, label_type: str = "binary", offset: float = 0.0) -> Feedback:
    """Every completion of every prompt, weighted by A·π_ref, so that weights are 1 on average, with its expected label:
    σ(r*), or r* + offset."""
    prompts, answers = world.log_ref.shape
    order = np.random.default_rng(0).permutation(prompts * answers)
    reward = world.reward + offset
    label = world.reward.sigmoid() if label_type == "binary" else reward
    return Feedback(
        world,
        prompt=order // answers,
        answer=order % answers,
        label=label.flatten().numpy()[order],
        demonstration=np.zeros(len(order), bool),
        label_type=label_type,
        reward=world.reward if label_type == "binary" else reward,
        weight=(world.log_ref.exp() * answers).flatten().numpy()[order],
    )


def draw(world: World, config: FeedbackConfig) -> Feedback:
    """Answers drawn from π_ref (demonstrations: from π*), labeled with noise, in random order.

    Raises:
        ValueError: where the world has too few prompts.
    """
    asked = config.rows // config.answers
    if asked > len(world.prompts):
        raise ValueError(
            f"{config.rows} rows of {config.answers} answers a prompt are {asked} prompts, and the world has "
            f"{len(world.prompts)}. Ask for fewer rows, or more prompts in WorldConfig."
        )
    random = np.random.default_rng(config.seed)
    prompt = np.repeat(random.permutation(len(world.prompts))[:asked], config.answers)
    # Of a class that is thinned out there must be enough to choose from
    prompt = np.repeat(prompt, 1 if config.positive_share is None else 20)
    demonstration = random.random(len(prompt)) < config.demonstrations
    is_good = demonstration & (random.random(len(prompt)) < config.quality)
    reward = world.reward
    if config.best_of:
        many = np.stack([_answers(world.log_ref, prompt, random) for _ in range(config.best_of)])
        good = many[reward.numpy()[prompt, many].argmax(0), np.arange(len(prompt))]
    else:
        good = _answers(world.optimum(config.demonstrator_beta), prompt, random)
    answer = np.where(is_good, good, _answers(world.log_ref, prompt, random))
    if config.label_type == "binary":
        label = (random.random(len(prompt)) < reward.sigmoid().numpy()[prompt, answer]).astype(float)
        label[demonstration] = 1.0
    else:
        reward = config.scale * reward + config.offset
        label = reward.numpy()[prompt, answer] + config.noise * random.standard_normal(len(prompt))
    kept = random.permutation(len(prompt))
    if config.positive_share is not None:
        positives = round(config.rows * config.positive_share)
        good, bad = kept[label[kept] == 1][:positives], kept[label[kept] == 0][: config.rows - positives]
        kept = random.permutation(np.concatenate([good, bad]))
        # What is kept of each class, whatever the answer, adds a constant to the log-odds
        mean = label.mean()
        reward = reward + float(np.log(positives / (config.rows - positives)) - np.log(mean / (1 - mean)))
    return Feedback(world, prompt[kept], answer[kept], label[kept], demonstration[kept], config.label_type, reward)


def _answers(log_probs: torch.Tensor, prompt: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A completion for each prompt, by inversion of the cumulated probabilities."""
    cumulated = log_probs.exp().cumsum(1).numpy()[prompt]
    drawn = random.random(len(prompt))[:, None] * cumulated[:, -1:]
    return (cumulated < drawn).sum(1)
