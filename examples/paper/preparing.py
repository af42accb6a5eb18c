"""Rows of a cell: the same prompts for all methods, in the layout that each trainer takes."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets
from grid import CONFIGS, read
from stored import differing, load, write
from transformers import AutoTokenizer

from trl_ulma.data.convert import Account, convert
from trl_ulma.data.files import load_rows, split_by_prompt

SPLIT_SEED = 42
FILES = ("train", "test", "pairs", "prompts")
NOT_BOTH = "its prompt has not both a good and a bad answer (or has more of the one than of the other)"
TOO_LONG = "a row of its prompt is longer than max_length"
NO_ORDINARY = "its prompt has no ordinary demonstration"
NOT_TAKEN = "train_rows are enough"


def prepare(folder: Path, chosen: Mapping[str, Any], model: str, inputs: Mapping[str, str]) -> dict[str, Any]:
    """Write a cell's rows into a folder, unless they are there, and say what became of the raw rows.

    The folder then holds `train.parquet` and `test.parquet` (pointwise rows; no prompt is in both), `pairs.parquet`
    (the training rows in pairs, where all have a partner), `prompts.parquet` (their prompts) and `facts.json`.

    Args:
        folder: for the files.
        chosen: `rows` of a cell's settings.
        model: whose tokens are counted.
        inputs: family → file or name on the hub, which comes before that of the settings.

    Returns:
        `settings`, `answers` in the raw rows, `left_out` (reason → answers), and of both parts `…_rows`, `…_prompts`
        and `…_tokens`.

    Raises:
        FileNotFoundError, ValueError: for data that are not there, not what they should be, or too few.
    """
    settings = {**chosen, "input": source(chosen["family"], chosen["input"], inputs), "model": model}
    if chosen["quality"] is not None and chosen["ordinary"] == "hh":
        settings["ordinary_input"] = source("hh", read("data", "hh")["input"], inputs)
    done = folder / "facts.json"
    if done.exists():
        facts = load(done)
        differ = differing(facts["settings"], settings)
        if differ:
            raise ValueError(
                f"The rows in {folder} were prepared with another {', '.join(differ)}. Choose another --output."
            )
        return facts
    rows, account = converted(settings["family"], settings["input"], settings["options"])
    left_out = {why: found.count for why, found in account.left_out.items()}
    by_prompt = _by_prompt(rows)
    if settings["pairs"]:
        label = rows["label"][:]
        kept = [each for numbers in by_prompt.values() for each in _partners(label, numbers)]
        rows = _kept(rows, kept, left_out, NOT_BOTH)
    tokenizer = AutoTokenizer.from_pretrained(model)
    template = settings["chat_template"]
    if template is not None:
        rows = as_text(rows, tokenizer, (CONFIGS / template).read_text(encoding="utf-8"))
    elif tokenizer.chat_template is None:
        raise ValueError(f"The tokenizer of {model} has no chat template. Give the scale one, as paper.yaml does.")
    rows = short_enough(rows, tokenizer, settings["max_length"], left_out)
    train, test = _split(rows, settings)
    if settings["quality"] is not None:
        train = _with_quality(train, settings, tokenizer, left_out)
    if settings["train_rows"] is not None and settings["train_rows"] < len(train):
        taken = split_by_prompt(train, test_size=settings["train_rows"], seed=SPLIT_SEED)["test"]
        left_out[NOT_TAKEN] = len(train) - len(taken)
        train = taken
    facts = {
        "settings": settings,
        "answers": account.answers,
        "left_out": left_out,
        **{f"{name}_rows": len(each) for name, each in (("train", train), ("test", test))},
        **{f"{name}_prompts": len(_by_prompt(each)) for name, each in (("train", train), ("test", test))},
        **{f"{name}_tokens": sum(_lengths(each, tokenizer)) for name, each in (("train", train), ("test", test))},
    }
    _write(folder, train, test, facts)
    return facts


def source(family: str, of_config: str | None, inputs: Mapping[str, str]) -> str:
    """Where a family's raw rows are.

    Raises:
        ValueError: where nobody has said it.
    """
    found = inputs.get(family, of_config)
    if found is None:
        raise ValueError(
            f"The data {family} are not on the hub in a form that can be named: give --input {family}=FILE."
        )
    return found


def converted(family: str, name: str, options: Mapping[str, Any]) -> tuple[Dataset, Account]:
    """A family's raw rows as pointwise rows, and what became of them."""
    splits = load_rows(name)
    return convert(family, splits["train" if "train" in splits else next(iter(splits))], **options)


def prompt_key(prompt: Any) -> str:
    """A prompt as text, the same for equal ones."""
    return json.dumps(prompt, sort_keys=True)


def _by_prompt(rows: Dataset) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for number, prompt in enumerate(rows["prompt"]):
        found.setdefault(prompt_key(prompt), []).append(number)
    return found


def _partners(label: Sequence[float], numbers: list[int]) -> list[int]:
    """A prompt's rows as good and bad ones in turn, as many of each."""
    good, bad = ([i for i in numbers if (label[i] >= 0.5) is wanted] for wanted in (True, False))
    return [i for pair in zip(good, bad, strict=False) for i in pair]


def _kept(rows: Dataset, numbers: list[int], left_out: dict[str, int], why: str) -> Dataset:
    if not numbers:
        raise ValueError(f"No row is left of {len(rows)}, each because {why}.")
    if len(numbers) < len(rows):
        left_out[why] = left_out.get(why, 0) + len(rows) - len(numbers)
    return rows.select(numbers)


def as_text(rows: Dataset, tokenizer: Any, template: str) -> Dataset:
    """Conversations as a template writes them: text that ends where the answer is to begin, and the answer.

    Raises:
        ValueError: where the template writes the conversation in another way than its prompt.
    """

    def written(row: dict[str, Any]) -> dict[str, str]:
        render = {"chat_template": template, "tokenize": False}
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, **render)
        whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], **render)
        if not whole.startswith(prompt):
            raise ValueError(f"The template writes {prompt[-80:]!r} otherwise when an answer follows.")
        # Trainers write the end of the answer themselves
        return {"prompt": prompt, "completion": whole[len(prompt) :].removesuffix("</s>")}

    features = {name: feature for name, feature in rows.features.items() if name not in ("prompt", "completion")}
    texts = [written(row) for row in rows]
    text = Dataset.from_dict({name: [each[name] for each in texts] for name in ("prompt", "completion")})
    return concatenate_datasets([text, rows.select_columns(list(features))], axis=1)


def short_enough(rows: Dataset, tokenizer: Any, max_length: int, left_out: dict[str, int]) -> Dataset:
    """The rows of prompts of which no row is too long."""
    lengths = _lengths(rows, tokenizer)
    kept = [i for each in _by_prompt(rows).values() if max(lengths[i] for i in each) <= max_length for i in each]
    return _kept(rows, kept, left_out, f"{TOO_LONG} ({max_length})")


def _lengths(rows: Dataset, tokenizer: Any) -> list[int]:
    """Tokens of each row, its end included."""
    whole = [
        row["prompt"] + row["completion"] + (tokenizer.eos_token or "")
        if isinstance(row["prompt"], str)
        else tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
        for row in rows
    ]
    # One more, for the token that some tokenizers begin texts with
    return [len(ids) + 1 for ids in tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"]]


def _split(rows: Dataset, settings: Mapping[str, Any]) -> tuple[Dataset, Dataset]:
    """(training rows, held-out rows), by prompt: a fold of them, or the number that is asked for."""
    prompts = _by_prompt(rows)
    order = sorted(prompts, key=lambda prompt: hashlib.sha256(f"{SPLIT_SEED}\n{prompt}".encode()).digest())
    folds, wanted = settings["folds"], settings["held_out_prompts"]
    held_out = order[settings["fold"] :: folds] if folds else order[:wanted]
    if not 0 < len(held_out) < len(order):
        raise ValueError(
            f"{len(order)} prompts of {settings['family']} can be learned from, too few to hold {wanted} of them out. "
            "Lower --held_out_prompts, or bring more rows."
        )
    out = set(held_out)
    return tuple(
        rows.select([i for prompt, numbers in prompts.items() if (prompt in out) is wanted for i in numbers])
        for wanted in (False, True)
    )  # type: ignore[return-value]


def _with_quality(train: Dataset, settings: Mapping[str, Any], tokenizer: Any, left_out: dict[str, int]) -> Dataset:
    """Training rows with a share of the prompts' demonstrations as they are, and ordinary ones for the others.

    Which prompts keep theirs follows from the prompts: those of a smaller share are among those of a larger one.
    Prompts without an ordinary demonstration are left out, whatever the share.
    """
    ordinary = _ordinary(settings, tokenizer)
    prompts = {prompt: numbers for prompt, numbers in _by_prompt(train).items() if prompt in ordinary}
    train = _kept(train, [i for numbers in prompts.values() for i in numbers], left_out, NO_ORDINARY)
    order = sorted(prompts, key=lambda prompt: hashlib.sha256(f"quality\n{prompt}".encode()).digest())
    others = set(order[round(settings["quality"] * len(order)) :])

    def exchanged(row: dict[str, Any]) -> dict[str, Any]:
        key = prompt_key(row["prompt"])
        return {"completion": ordinary[key]} if row["sft_mask"] and key in others else {}

    return train.map(exchanged, load_from_cache_file=False)


def _ordinary(settings: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Prompt → the ordinary demonstration: HH's chosen answer, or the QA prediction that wins most comparisons.

    Of those that are short enough.
    """
    if settings["ordinary"] == "hh":
        rows, _ = converted("hh", settings["ordinary_input"], {})
        label = {i: value for i, value in enumerate(rows["label"]) if value == 1}
    else:
        rows, _ = converted(settings["family"], settings["input"], {**settings["options"], "wins": True})
        kinds = zip(rows["label_type"], rows["label"], strict=True)
        label = {i: value for i, (kind, value) in enumerate(kinds) if kind == "continuous"}
    if settings["chat_template"] is not None:
        rows = as_text(rows, tokenizer, (CONFIGS / settings["chat_template"]).read_text(encoding="utf-8"))
    # Not longer than what is taken otherwise
    lengths = _lengths(rows, tokenizer)
    best: dict[str, int] = {}
    for i in sorted(label, key=lambda i: (-label[i], i)):
        if lengths[i] <= settings["max_length"]:
            best.setdefault(prompt_key(rows[i]["prompt"]), i)
    return {prompt: rows[i]["completion"] for prompt, i in best.items()}


def pairs_of(rows: Dataset) -> list[dict[str, Any]]:
    """Each prompt's good and bad answers as pairs; what has no partner is in none."""
    pairs, label = [], rows["label"][:]
    for numbers in _by_prompt(rows).values():
        found = [rows[i] for i in _partners(label, numbers)]
        pairs += [
            {"prompt": good["prompt"], "chosen": good["completion"], "rejected": bad["completion"]}
            for good, bad in zip(found[::2], found[1::2], strict=True)
        ]
    return pairs


def _write(folder: Path, train: Dataset, test: Dataset, facts: dict[str, Any]) -> None:
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    by_prompt = _by_prompt(train)
    train.to_parquet(part / "train.parquet")
    test.to_parquet(part / "test.parquet")
    Dataset.from_list([{"prompt": train[each[0]]["prompt"]} for each in by_prompt.values()]).to_parquet(
        part / "prompts.parquet"
    )
    if facts["settings"]["pairs"]:
        Dataset.from_list(pairs_of(train)).to_parquet(part / "pairs.parquet")
    write(part / "facts.json", facts)
    os.replace(part, folder)
