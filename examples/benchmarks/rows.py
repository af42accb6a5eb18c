"""The same rows in the form that each trainer takes: pairs of random words with given lengths, or HH transcripts."""

import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from trl_ulma.data.pairs import pairs_to_rows

WORDS = (
    *("the", "of", "and", "to", "in", "is", "that", "it", "was", "for", "on", "are", "as", "with", "his", "they"),
    *("at", "be", "this", "from", "have", "or", "by", "one", "had", "not", "but", "what", "all", "were", "when"),
    *("we", "there", "can", "an", "your", "which", "their", "said", "if", "do", "will", "each", "about", "how"),
    *("up", "out", "them", "then", "she", "many", "some", "so", "these", "would", "other", "into", "has", "more"),
    *("her", "two", "like", "him", "see", "time", "could", "no", "make", "than", "first", "been", "its", "who"),
    *("now", "people", "my", "made", "over"),
)


def synthetic_pairs(
    count: int,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt_tokens: float,
    completion_tokens: float,
    spread: float,
    seed: int,
) -> list[dict[str, str]]:
    """`count` pairs of random words: `prompt`, `chosen`, `rejected`.

    Args:
        count: of pairs.
        tokenizer: counts the tokens.
        prompt_tokens: mean length.
        completion_tokens: mean length, the end token included.
        spread: standard deviation of the lengths' logarithm; lengths are log-normal.
        seed: of lengths and words.
    """
    random = np.random.default_rng(seed)
    size_of = {word: len(tokenizer(" " + word, add_special_tokens=False)["input_ids"]) for word in WORDS}

    def text(mean: float) -> str:
        words, left = [], max(round(mean * math.exp(random.normal(-(spread**2) / 2, spread))), 1)
        while left > 0:
            words.append(str(random.choice(WORDS)))
            left -= size_of[words[-1]]
        return " ".join(words)

    return [
        {
            "prompt": text(prompt_tokens),
            "chosen": " " + text(completion_tokens - 1),
            "rejected": " " + text(completion_tokens - 1),
        }
        for _ in range(count)
    ]


def hh_pairs(path: Path) -> list[dict[str, str]]:
    """The pairs of a file of HH transcripts (JSON lines of `chosen` and `rejected`, also gzipped) whose halves have one
    prompt and an answer each."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    pairs = [json.loads(line) for line in content.decode("utf-8").splitlines()]
    rows = pairs_to_rows({name: [pair[name] for pair in pairs] for name in ("chosen", "rejected")})
    halves = [
        {name: rows[name][i] for name in ("prompt", "completion", "left_out")} for i in range(len(rows["prompt"]))
    ]
    return [
        {"prompt": chosen["prompt"], "chosen": chosen["completion"], "rejected": rejected["completion"]}
        for chosen, rejected in zip(halves[::2], halves[1::2], strict=True)
        if chosen["prompt"] == rejected["prompt"] and not (chosen["left_out"] or rejected["left_out"])
    ]


def short_enough(
    pairs: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[dict[str, str]]:
    """The pairs that no trainer has to cut or drop."""
    ends = str(tokenizer.eos_token)
    texts = [pair["prompt"] + pair[half] + ends for pair in pairs for half in ("chosen", "rejected")]
    lengths = [len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]] if texts else []
    return [pair for i, pair in enumerate(pairs) if max(lengths[2 * i : 2 * i + 2]) <= max_length]


def demonstrations(count: int, share: float) -> list[bool]:
    """Which of `count` rows are demonstrations, spread evenly; where half are, the first of each pair.

    Example:
        >>> demonstrations(4, 0.5)
        [True, False, True, False]
    """
    return [math.ceil((i + 1) * share) > math.ceil(i * share) for i in range(count)]


def as_rows(pairs: list[dict[str, str]], share: float | None = None) -> Dataset:
    """Both halves of each pair, side by side: `prompt`, `completion`, `label`; with `sft_mask` where a share of
    demonstrations is given, whose labels are 1 then."""
    halves = [(pair["prompt"], pair[half], half == "chosen") for pair in pairs for half in ("chosen", "rejected")]
    columns: dict[str, list[Any]] = {
        name: list(values)
        for name, values in zip(("prompt", "completion", "label"), zip(*halves, strict=True), strict=True)
    }
    if share is not None:
        columns["sft_mask"] = demonstrations(len(halves), share)
        columns["label"] = [label or mask for label, mask in zip(columns["label"], columns["sft_mask"], strict=True)]
    return Dataset.from_dict(columns)
