"""Sample answers, with the exact KL divergence from a reference along the way, and score them."""

import importlib.resources
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

TARGET_WORDS = 12
REWARDS = ("sentiment", "length")


@dataclass(frozen=True)
class Answer:
    """A sampled answer.

    Attributes:
        ids: its tokens, the EOS token included if it was drawn.
        ended: whether the EOS token was drawn; otherwise the answer was cut off.
        logp: log π(y|x) in nats of the model that drew it, summed over `ids`.
        log_ratio: log π(y|x) − log π_ref(y|x) in nats, summed over `ids`; 0 without a reference.
        kl: the sum over positions of KL(π(·|x, y<t) ‖ π_ref(·|x, y<t)) in nats; 0 without a reference. Its mean over
            answers estimates the same KL(π ‖ π_ref) as the mean of `log_ratio`, with less variance.
    """

    ids: list[int]
    ended: bool
    logp: float
    log_ratio: float = 0.0
    kl: float = 0.0


@torch.inference_mode()
def sample(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    answers: int,
    eos: int,
    max_tokens: int,
    seed: int,
    reference: PreTrainedModel | None = None,
) -> list[list[Answer]]:
    """`answers` answers to each prompt, drawn from the model's own distribution (temperature 1) in one batch.

    Answers that have ended leave the batch, so that the time grows with the number of tokens drawn.

    Args:
        model: the policy, in eval mode, with rotary or other relative positions given by `position_ids`.
        prompts: token ids of each prompt, one or more.
        answers: per prompt.
        eos: the token that ends an answer.
        max_tokens: answers are cut off after so many tokens.
        seed: of the draws.
        reference: the model that log-ratios and KL are taken against.
    """
    device = model.device
    models = [model] if reference is None else [model, reference]
    width = max(map(len, prompts))
    ids = torch.tensor([[eos] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    caches = [DynamicCache() for _ in models]
    logits = []
    for each, cache in zip(models, caches, strict=True):
        found = each(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1
        )
        logits.append(found.logits[:, -1].repeat_interleave(answers, 0))
        cache.batch_repeat_interleave(answers)
    mask = mask.repeat_interleave(answers, 0)
    position = mask.sum(1)
    total = len(prompts) * answers
    drawn: list[list[int]] = [[] for _ in range(total)]
    logp, log_ratio, kl = (torch.zeros(total, dtype=torch.float64, device=device) for _ in range(3))
    ended = torch.zeros(total, dtype=torch.bool, device=device)
    running = torch.arange(total, device=device)  # the answers that are still in the batch
    generator = torch.Generator().manual_seed(seed)
    for step in range(max_tokens):
        log_probs = torch.log_softmax(logits[0].float(), 1)
        probs = log_probs.exp()
        cumulated = probs.cumsum(1, dtype=torch.float64)
        uniform = torch.rand(len(running), 1, generator=generator, dtype=torch.float64).to(device)
        token = torch.searchsorted(cumulated, uniform * cumulated[:, -1:]).clamp(max=probs.size(1) - 1)
        own = log_probs.gather(1, token)[:, 0]
        logp[running] += own
        if reference is not None:
            other = torch.log_softmax(logits[1].float(), 1)
            log_ratio[running] += own - other.gather(1, token)[:, 0]
            kl[running] += (probs * (log_probs - other)).sum(1)
        for place, value in zip(running.tolist(), token[:, 0].tolist(), strict=True):
            drawn[place].append(value)
        is_end = token[:, 0] == eos
        ended[running[is_end]] = True
        stay = (~is_end).nonzero()[:, 0]
        if not len(stay) or step + 1 == max_tokens:
            break
        if len(stay) < len(running):
            running, token, mask, position = running[stay], token[stay], mask[stay], position[stay]
            for cache in caches:
                cache.batch_select_indices(stay)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        logits = [
            each(input_ids=token, attention_mask=mask, position_ids=position[:, None], past_key_values=cache).logits[
                :, -1
            ]
            for each, cache in zip(models, caches, strict=True)
        ]
        position = position + 1
    found = [Answer(drawn[i], bool(ended[i]), float(logp[i]), float(log_ratio[i]), float(kl[i])) for i in range(total)]
    return [found[start : start + answers] for start in range(0, total, answers)]


_VADER = SentimentIntensityAnalyzer()


def rewards(text: str) -> dict[str, float]:
    """The true rewards of an answer, each from −4 to 4.

    "sentiment" is four times VADER's compound score. "length" is 4 at `TARGET_WORDS` words and falls by 1 for every
    word more or less.

    Example:
        >>> rewards("What a wonderful day!")["sentiment"] > 2
        True
        >>> rewards("one two three four five six seven eight nine ten eleven twelve thirteen")["length"]
        3.0
    """
    words = len(text.split())
    return {
        "sentiment": 4 * _VADER.polarity_scores(text)["compound"],
        "length": float(max(4 - abs(words - TARGET_WORDS), -4)),
    }


def human_texts(least_words: int = 25) -> list[str]:
    """Paragraphs of prose from scikit-learn's descriptions of its datasets: text that people wrote, at hand offline."""
    folder = importlib.resources.files("sklearn.datasets.descr")
    texts = []
    for file in sorted(folder.iterdir(), key=lambda each: each.name):
        if not file.name.endswith(".rst"):
            continue
        for paragraph in re.split(r"\n\s*\n", file.read_text(encoding="utf-8")):
            text = " ".join(paragraph.split())
            if (
                text[:1].isupper()
                and len(text.split()) >= least_words
                and not re.search(r"[=|`>*]|::|http|\d{4}", text)
            ):
                texts.append(text)
    return texts


@torch.inference_mode()
def perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> float:
    """exp of the mean −log π per token over all texts, each read from its second token on, at most 96 tokens long."""
    total, count = 0.0, 0
    encoded: list[Any] = [tokenizer(text, add_special_tokens=False)["input_ids"][:96] for text in texts]
    encoded.sort(key=len)
    for start in range(0, len(encoded), 8):
        rows = [torch.tensor(ids) for ids in encoded[start : start + 8]]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
        ones = [torch.ones_like(row) for row in rows]
        mask = torch.nn.utils.rnn.pad_sequence(ones, batch_first=True).to(model.device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        total += float((losses * mask[:, 1:]).double().sum())
        count += int(mask[:, 1:].sum())
    return float(torch.tensor(total / count).exp())
