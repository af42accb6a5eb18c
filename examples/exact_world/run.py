"""python examples/exact_world/run.py [--only approximation frontier demonstrations] [--seeds 5] [--results FOLDER]

Trains every method in worlds where the optimum is known, and stores what each cell measures as it comes; a run that was
stopped goes on where it was. `report.py` makes RESULTS.md and the pictures of what is stored.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from exact_world import World, WorldConfig
from feedback import Feedback, FeedbackConfig, draw, population
from methods import Recipe, train
from tqdm.auto import tqdm
from transformers import PreTrainedModel

CHOICES = ("column", 0.0, "prior", "running_mean", "batch_kl", "learned_constant", "learned")
Cell = dict[str, Any]

# Approximation error: the whole population as data, so that what is left is the choice of log Z
POPULATIONS = {
    "binary": {"label_type": "binary"},
    "ratings": {"label_type": "continuous"},
    "ratings + 2": {"label_type": "continuous", "offset": 2.0},
}
APPROXIMATION_BETA = 0.5
APPROXIMATION_RECIPE = Recipe(steps=400, batch_size=None, learning_rate=1e-2, log_z_learning_rate=0.1)

# The frontier: rewards that differ by 1.5 within a prompt and by 0.7 between prompts
BETAS = (0.1, 0.3, 1.0, 3.0)
FRONTIER_RECIPE = Recipe(steps=96, batch_size=128, learning_rate=5e-3, log_z_learning_rate=0.1)
FEW_PROMPTS = WorldConfig(prompt_length=2, prompts=64, reward_scale=1.5, prompt_spread=0.7, initializer_range=0.2)
MANY_PROMPTS = dataclasses.replace(FEW_PROMPTS, prompt_length=4, prompts=2048)


@dataclass(frozen=True)
class Regime:
    """A kind of feedback: the world it comes from and how it is drawn."""

    world: WorldConfig
    feedback: FeedbackConfig


REGIMES = {
    "many answers a prompt": Regime(FEW_PROMPTS, FeedbackConfig(rows=2048, answers=32)),
    "one answer a prompt": Regime(MANY_PROMPTS, FeedbackConfig(rows=2048, answers=1)),
    "nine likes to a dislike": Regime(FEW_PROMPTS, FeedbackConfig(rows=2048, answers=32, positive_share=0.9)),
    "ratings with an offset": Regime(
        FEW_PROMPTS, FeedbackConfig(rows=2048, answers=32, label_type="continuous", noise=1.5, offset=2.0)
    ),
    "noisy demonstrations": Regime(
        FEW_PROMPTS, FeedbackConfig(rows=2048, answers=32, demonstrations=0.25, quality=0.5)
    ),
}
CONTENDERS = (
    ("sft", 0.0),
    ("dpo", 0.0),
    ("kto", 0.0),
    *(("pointwise_dpo", log_z) for log_z in (0.0, "prior", "learned_constant", "learned", "column")),
    ("ulma", 0.0),
)

# What the paper claims for ULMA: good demonstrations beside many noisy thumbs, few or many, very good or fairly good
SHARES, BEST_OF = (1 / 64, 1 / 16, 1 / 4), (64, 4)
TWO_STAGES = "sft, then pointwise_dpo"
# (method, sft_weight, values of β); SFT has no β, and is stopped earlier or later instead
LEARNERS = (
    ("sft", 1.0, (0.0,)),
    ("pointwise_dpo", 1.0, (0.1, 0.3, 1.0)),
    (TWO_STAGES, 1.0, (0.1, 0.3, 1.0)),
    ("ulma", 1.0, (0.1, 0.3, 1.0)),
    ("ulma", "beta", (0.1, 0.3, 1.0)),
)
SFT_STEPS = (6, 24, 96)


# A cell's world is mostly that of the cell before
world_of = functools.lru_cache(maxsize=2)(World)


def approximation_cells(seeds: int) -> Iterator[Cell]:
    """Each kind of labels × choice of log Z × seed."""
    for seed in range(seeds):
        for labels in POPULATIONS:
            yield from ({"labels": labels, "log_z": log_z, "seed": seed} for log_z in CHOICES)


def approximation(cell: Cell) -> dict[str, float]:
    """Total variation from π* after training on the whole population."""
    world = world_of(WorldConfig(seed=cell["seed"]))
    feedback = population(world, **POPULATIONS[cell["labels"]])
    trainer = train(feedback, "pointwise_dpo", APPROXIMATION_BETA, cell["log_z"], APPROXIMATION_RECIPE)
    best = world.optimum(APPROXIMATION_BETA)
    found = world.log_probs(trainer.model)
    return {"tv": world.total_variation(found, best), "tv_reference": world.total_variation(world.log_ref, best)}


def frontier_cells(seeds: int) -> Iterator[Cell]:
    """Each regime × method × β × seed; SFT has no β."""
    for seed in range(seeds):
        for regime in REGIMES:
            for method, log_z in CONTENDERS:
                for beta in BETAS[:1] if method == "sft" else BETAS:
                    yield {"regime": regime, "method": method, "log_z": log_z, "beta": beta, "seed": seed}


def frontier(cell: Cell) -> dict[str, float] | None:
    """Expected reward and KL after training, beside what the best policy of the same KL earns; None without pairs."""
    regime = REGIMES[cell["regime"]]
    world = world_of(dataclasses.replace(regime.world, seed=cell["seed"]))
    feedback: Feedback = draw(world, dataclasses.replace(regime.feedback, seed=cell["seed"]))
    recipe = dataclasses.replace(FRONTIER_RECIPE, seed=cell["seed"])
    trainer = train(feedback, cell["method"], cell["beta"], cell["log_z"], recipe)
    return None if trainer is None else figures(world, trainer.model)


def demonstrations_cells(seeds: int) -> Iterator[Cell]:
    """Each share and quality of the demonstrations × method × β or steps × seed."""
    for seed, share, best_of in itertools.product(range(seeds), SHARES, BEST_OF):
        for method, weight, betas in LEARNERS:
            for beta, steps in itertools.product(betas, SFT_STEPS if method == "sft" else (FRONTIER_RECIPE.steps,)):
                settings = {"method": method, "sft_weight": weight, "beta": beta, "steps": steps}
                yield {"share": share, "best_of": best_of, **settings, "seed": seed}


def demonstrations(cell: Cell) -> dict[str, float]:
    """As `frontier`, of rows of which a share are demonstrations and the others have thumbs.

    In two stages, half of the steps are SFT, and its result is the reference of the other half.
    """
    world = world_of(dataclasses.replace(FEW_PROMPTS, seed=cell["seed"]))
    of_feedback = FeedbackConfig(2048, 32, demonstrations=cell["share"], best_of=cell["best_of"], seed=cell["seed"])
    feedback = draw(world, of_feedback)
    recipe = dataclasses.replace(FRONTIER_RECIPE, steps=cell["steps"], seed=cell["seed"])
    beta, method, start = cell["beta"] or BETAS[0], cell["method"], None
    if method == TWO_STAGES:
        method = "pointwise_dpo"
        recipe = dataclasses.replace(recipe, steps=recipe.steps // 2)
        start = train(feedback, "sft", beta, recipe=recipe).model
    weight = beta if cell["sft_weight"] == "beta" else cell["sft_weight"]
    return figures(world, train(feedback, method, beta, recipe=recipe, sft_weight=weight, start=start).model)


def figures(world: World, policy: PreTrainedModel) -> dict[str, float]:
    """A policy's expected reward above the reference's and its KL, beside what the best policy of the same KL earns."""
    found = world.log_probs(policy)
    kl = world.kl(found)
    start = world.expected_reward(world.log_ref)
    return {"reward": world.expected_reward(found) - start, "kl": kl, "best": world.best_reward(kl) - start}


PARTS: dict[str, tuple[Callable[[int], Iterator[Cell]], Callable[[Cell], dict[str, float] | None]]] = {
    "approximation": (approximation_cells, approximation),
    "frontier": (frontier_cells, frontier),
    "demonstrations": (demonstrations_cells, demonstrations),
}


class Results:
    """The cells of a part that have been measured, in a JSON file which is whole at any time."""

    def __init__(self, path: Path):
        self.path = path
        self.rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []

    def __contains__(self, cell: Cell) -> bool:
        return any(cell.items() <= row.items() for row in self.rows)

    def add(self, cell: Cell, found: dict[str, float] | None) -> None:
        """Store what a cell measured; None where it has nothing to learn from."""
        measured = {name: round(value, 6) for name, value in (found or {}).items()}
        self.rows.append({**cell, **measured})
        lines = ",\n".join(json.dumps(row) for row in self.rows)
        part = self.path.with_suffix(".part")
        part.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        os.replace(part, self.path)


def main() -> None:
    """Measure the cells that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="Parts to run.")
    parser.add_argument("--seeds", type=int, default=5, help="Worlds, with their rows and order of rows.")
    parser.add_argument("--cells", type=int, default=None, help="Stop each part after so many cells.")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="Where JSON files go.")
    options = parser.parse_args()
    os.environ.setdefault("TQDM_DISABLE", "1")  # of the trainers' own bars; this one says disable=False
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    options.results.mkdir(parents=True, exist_ok=True)
    for part in options.only:
        cells_of, measure = PARTS[part]
        results = Results(options.results / f"{part}.json")
        cells = [cell for cell in cells_of(options.seeds) if cell not in results][: options.cells]
        start = time.perf_counter()
        for cell in tqdm(cells, desc=part, disable=False):
            results.add(cell, measure(cell))
        print(f"{part}: {len(cells)} cells in {time.perf_counter() - start:.0f} s, {len(results.rows)} stored")


if __name__ == "__main__":
    main()
