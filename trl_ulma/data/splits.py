"""Splits a dataset by prompt."""

import hashlib
import json
from collections import defaultdict
from contextlib import suppress
from typing import Any

from datasets import Dataset, DatasetDict

from trl_ulma.bootstrap import ENOUGH_PROMPTS
from trl_ulma.data.conversations import is_whole_transcript, said, spelled, split_turns
from trl_ulma.data.pairs import pairs_to_rows


def split_by_prompt(dataset: Dataset, *, test_size: float, seed: int) -> DatasetDict:
    """Split a dataset into "train" and "test" without a prompt in both. About `test_size` of the rows are test rows.

    The held-out prompts only depend on `seed` and the prompts themselves, so they are the same on every process and for
    any order of the rows. Prompts that only differ in surrounding whitespace, line ends, Unicode form or further keys
    of messages are the same, and so are a transcript and its messages. Pairs without a prompt are split by the prompts
    that are extracted from them.

    Args:
        dataset: rows with `prompt` (text or messages), or pairs of `chosen` and `rejected`.
        test_size: a fraction between 0 and 1, or a whole number of rows.
        seed: the seed of the choice. Another seed holds out other prompts.

    Raises:
        ValueError: if there is no prompt column, if there are fewer than two prompts, or if `test_size` leaves one
            split empty.

    Example:
        >>> rows = Dataset.from_dict({"prompt": ["a", "b", "a", "c"], "completion": ["1", "2", "3", "4"]})
        >>> splits = split_by_prompt(rows, test_size=0.25, seed=0)
        >>> len(splits["train"]), len(splits["test"])
        (3, 1)
    """
    test = rows_of_prompts(dataset, test_size=test_size, seed=seed)
    held_out = set(test)
    train = [row for row in range(len(dataset)) if row not in held_out]
    if not train:
        raise ValueError(
            f"test_split_size {test_size:g} leaves none of the {len(dataset):,} rows to train on. Lower it."
        )
    return DatasetDict({"train": dataset.select(train), "test": dataset.select(test)})


def rows_of_prompts(dataset: Dataset, *, test_size: float, seed: int) -> list[int]:
    """The sorted numbers of the test rows of `split_by_prompt`, which can be all rows.

    Example:
        >>> rows_of_prompts(Dataset.from_dict({"prompt": ["a", "b", "a"]}), test_size=0.99, seed=0)
        [0, 1, 2]
    """
    whole = test_size >= 1
    if not (0 < test_size < 1 or (whole and test_size == int(test_size) and test_size < len(dataset))):
        raise ValueError(
            f"test_split_size is {test_size}; it must be a fraction between 0 and 1, or a whole number of rows below "
            f"{len(dataset)}, the number of rows."
        )
    groups = _groups_to_split(dataset)
    target = test_size if whole else test_size * len(dataset)
    return sorted(row for prompt in _held_out(groups, target, seed) for row in groups[prompt])


def part_with_enough(dataset: Dataset, *, seed: int, up_to: float) -> float | None:
    """The smallest part of the rows that holds out `ENOUGH_PROMPTS` prompts, in steps of 1/20 from a tenth.

    Args:
        dataset: the rows.
        seed: the seed of the choice.
        up_to: the largest part.

    Returns:
        A fraction of the rows, or None if `up_to` is not enough.

    Example:
        >>> rows = Dataset.from_dict({"prompt": list(map(str, range(120)))})
        >>> part_with_enough(rows, seed=0, up_to=0.3), part_with_enough(rows, seed=0, up_to=0.2)
        (0.25, None)
    """
    groups = _groups_to_split(dataset)
    for twentieths in range(2, round(20 * up_to) + 1):
        size = twentieths / 20
        if len(_held_out(groups, size * len(dataset), seed)) >= ENOUGH_PROMPTS:
            return size
    return None


def default_part(dataset: Dataset, *, seed: int) -> float:
    """The part of the rows to hold out if none is chosen: a tenth, or as much as `ENOUGH_PROMPTS` prompts need, up to
    three tenths.

    Example:
        >>> of = lambda n: default_part(Dataset.from_dict({"prompt": list(map(str, range(n)))}), seed=0)
        >>> of(300), of(120), of(90)
        (0.1, 0.25, 0.1)
    """
    return part_with_enough(dataset, seed=seed, up_to=0.3) or 0.1


def count_prompts(dataset: Dataset) -> int:
    """The number of different prompts.

    Example:
        >>> count_prompts(Dataset.from_dict({"prompt": ["a", "b", "a"], "completion": ["1", "2", "3"]}))
        2
    """
    return len(_groups_by_prompt(dataset))


def _groups_to_split(dataset: Dataset) -> dict[str, list[int]]:
    """`_groups_by_prompt`. Raises ValueError if there are fewer than two."""
    groups = _groups_by_prompt(dataset)
    if len(groups) < 2:
        raise ValueError(
            f"A split by prompt needs two different prompts; the {len(dataset)} rows have {len(groups)}. Provide a "
            "test split, or switch off the evaluation."
        )
    return groups


def _held_out(groups: dict[str, list[int]], target: float, seed: int) -> list[str]:
    """The prompts to hold out: in an order that depends on the seed, those with which at most `target` rows are held
    out. At least one.
    """

    def rank(prompt: str) -> bytes:
        return hashlib.sha256(f"{seed}\n{prompt}".encode()).digest()

    left = max(1, round(target))
    chosen = []
    for prompt in sorted(groups, key=rank):
        if len(groups[prompt]) <= left:
            chosen.append(prompt)
            left -= len(groups[prompt])
    return chosen or [min(groups, key=lambda prompt: (len(groups[prompt]), rank(prompt)))]


def _groups_by_prompt(dataset: Dataset) -> dict[str, list[int]]:
    """The row numbers of each set of rows that share a prompt, by the first prompt of the set."""
    keys: list[list[str]] = []
    first_of: dict[str, str] = {}  # prompts that only differ in spelling are one prompt
    for prompts in prompts_of(dataset):
        own = [_key(prompt) for prompt in prompts]
        keys.append(own + [first_of.setdefault(canonical(p), key) for p, key in zip(prompts, own, strict=True)])
    parent = {key: key for row in keys for key in row}

    def root(key: str) -> str:
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    # The halves of a pair can have different prompts. All must be in the same split. The smaller one names the set.
    for first, *others in keys:
        for other in others:
            low, high = sorted((root(first), root(other)))
            parent[high] = low
    groups = defaultdict(list)
    for number, row in enumerate(keys):
        groups[root(row[0])].append(number)
    return dict(groups)


def prompts_of(dataset: Dataset) -> list[list[Any]]:
    """`(N,)` the prompts of each row: one, or of a pair without a prompt, those of its two halves."""
    names = dataset.column_names
    if "prompt" in names:
        return [[prompt] for prompt in dataset["prompt"]]
    if {"chosen", "rejected"} <= set(names):
        pairs = dataset.select_columns(["chosen", "rejected"])
        prompts = [prompt for batch in pairs.iter(1000) for prompt in pairs_to_rows(dict(batch))["prompt"]]
        return [prompts[first : first + 2] for first in range(0, len(prompts), 2)]
    raise ValueError(
        f"A split by prompt needs a column `prompt`, or `chosen` and `rejected`; found {', '.join(names)}."
    )


def _key(prompt: Any) -> str:
    return json.dumps(prompt, sort_keys=True, ensure_ascii=False, default=str)


def canonical(prompt: Any) -> str:
    r"""What is the same for two spellings of a prompt: text or one user message, or a transcript or its messages.

    Whitespace around texts and the kind of line ends do not count.

    Example:
        >>> canonical("Hi ") == canonical([{"content": "Hi", "role": "user", "name": "Ann"}])
        True
        >>> canonical("\n\nHuman: Hi\n\nAssistant:") == canonical("Hi")
        True
    """
    if isinstance(prompt, str):
        prompt = spelled(prompt)
        if is_whole_transcript(prompt):
            with suppress(ValueError):  # it does not end in an assistant turn, so it stays one text
                prompt = split_turns(prompt)[0]
    if isinstance(prompt, list):
        prompt = [said(turn) for turn in prompt]
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], dict):
        turn = prompt[0]
        if turn.get("role") == "user" and isinstance(turn.get("content"), str):
            prompt = turn["content"]
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, default=str, ensure_ascii=False)
    return spelled(text)
