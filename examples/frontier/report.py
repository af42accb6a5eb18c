"""python examples/frontier/report.py [--write]

Prints what `run.py` has measured: the reward of each method at equal KL, differences within seeds with their intervals,
and which cells are missing. `--write` writes RESULTS.md and its pictures. They show the methods that have every β and
seed, in parts where the methods that the plan begins with have. While there is no such part, nothing is written.
"""

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from contenders import METHODS, Method
from plan import PARTS, Cell, betas_of, first, methods, part, seeds_of
from pool import TEMPERATURE
from regimes import REGIMES
from scipy import stats

matplotlib.use("Agg")
from matplotlib import pyplot

BUDGETS = (0.5, 1.0, 1.5)
LEAST_SEEDS = 3
FEW = 6
# (one method, another, what the difference answers)
QUESTIONS = (
    ("ratings-prior", "dpo", "ratings against pairs"),
    ("ratings-prior", "thumbs-prior", "ratings against thumbs"),
    ("thumbs-prior", "dpo", "thumbs against pairs"),
    ("thumbs-prior", "kto", "pointwise DPO against KTO"),
    ("thumbs-prior", "bco", "the prior against BCO's shift"),
    ("thumbs-prior", "thumbs-0", "thumbs: the prior against log Z 0"),
    ("thumbs-learned", "thumbs-prior", "thumbs: a learned log Z against the prior"),
    ("ratings-prior", "ratings-0", "ratings: the prior against log Z 0"),
    ("ratings-learned", "ratings-prior", "ratings: a learned log Z against the prior"),
    ("rounds", "ratings-prior", "three rounds against as many answers of the reference"),
    ("qrpo", "ratings-prior", "quantiles against ratings"),
    ("ulma-ratings-beta", "ratings-prior", "ULMA (β) against no demonstrations, ratings"),
    ("ulma-ratings-1", "ulma-ratings-beta", "ULMA, ratings: sft_weight 1 against β"),
    ("ulma-thumbs-beta", "thumbs-0", "ULMA (β) against no demonstrations, thumbs"),
    ("ulma-thumbs-1", "ulma-thumbs-beta", "ULMA, thumbs: sft_weight 1 against β"),
    ("ulma-thumbs-1", "thumbs-prior", "ULMA (1), thumbs, against the prior without demonstrations"),
    ("ulma-thumbs-1", "sft", "ULMA (1), thumbs, against SFT"),
    ("ulma-thumbs-beta", "sft", "ULMA (β), thumbs, against SFT"),
    ("ulma-thumbs-beta", "thumbs-prior", "ULMA (β), thumbs, against the prior without demonstrations"),
    ("thumbs-prior", "sft", "thumbs with the prior against SFT"),
)
Record = dict[str, Any]
Curves = dict[str, dict[int, np.ndarray]]


class Records:
    """What is stored in a folder of results.

    Args:
        folder: with `cells/` and `reference.json`.
    """

    def __init__(self, folder: Path):
        read = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / "cells").glob("*.json"))]
        names = ("reward", "regime", "method", "beta", "seed")
        self.of = {Cell(**{name: record[name] for name in names}): record for record in read}
        path = folder / "reference.json"
        self.reference: Record | None = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def missing(self, reward: str, regime: str) -> list[Cell]:
        """The cells of a part that are not measured."""
        return [cell for cell in part(reward, regime) if cell not in self.of]

    def whole(self, reward: str, regime: str) -> list[str]:
        """The methods of a part with every β and seed, if those that the plan begins with are among them; else none."""
        missing = {cell.method for cell in self.missing(reward, regime)}
        found = [method for method in methods(regime) if method not in missing]
        return found if set(first(regime)) <= set(found) else []

    def curves(self, reward: str, regime: str) -> Curves:
        """Of each method and seed with every β, its points `(n, 2)` (KL, reward) by KL, the reference first."""
        assert self.reference is not None
        start = (0.0, float(np.mean(self.reference[reward])))
        found: Curves = defaultdict(dict)
        for method in methods(regime):
            for seed in seeds_of(reward, regime, method):
                betas = betas_of(reward, regime, method)
                own = [self.of.get(Cell(reward, regime, method, beta, seed)) for beta in betas]
                points = [(np.mean(each["kl"]), np.mean(each[reward])) for each in own if each is not None]
                if len(points) == len(own):
                    found[method][seed] = np.array([start, *sorted(points)])
        return found


def at(points: np.ndarray, budget: float) -> float | None:
    """The reward at a KL of `budget` on the line through (√KL, reward); None if the line ends before.

    Near the reference the best reward of a KL grows with its root, so that a line over KL itself would be too low
    wherever a method's β leave a gap.
    """
    kl, reward = points.T
    return float(np.interp(budget**0.5, kl**0.5, reward)) if kl[-1] >= budget else None


def interval(values: Sequence[float]) -> tuple[float, float, float] | None:
    """(mean, low, high): the mean and its 95 % t-interval over seeds; None for fewer than two values."""
    if len(values) < 2:
        return None
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    return float(np.mean(values)), float(low), float(high)


def shown(values: Sequence[float | None], sign: str = "") -> str:
    """The mean and its interval as text; says if a seed does not come so far."""
    inside = [value for value in values if value is not None]
    if not inside:
        return "not reached" if values else "–"
    found = interval(inside)
    # z: no minus before a zero
    text = f"{np.mean(inside):{sign}z.2f}" + (f" [{found[1]:{sign}z.2f}, {found[2]:{sign}z.2f}]" if found else "")
    return text if len(inside) == len(values) else f"{text} ({len(inside)} of {len(values)} seeds reach it)"


def difference(curves: Curves, one: str, other: str, budget: float) -> list[float]:
    """Seed by seed, the reward of `one` less that of `other` at a KL of `budget`, of seeds where both reach it."""
    found = []
    for seed in sorted(set(curves.get(one, {})) & set(curves.get(other, {}))):
        a, b = at(curves[one][seed], budget), at(curves[other][seed], budget)
        if a is not None and b is not None:
            found.append(a - b)
    return found


def verdict(values: Sequence[float]) -> str:
    """What the differences allow to say: nothing of fewer than three seeds."""
    found = interval(values)
    if found is None or len(values) < LEAST_SEEDS:
        return f"nothing is concluded from {len(values)} seed{'' if len(values) == 1 else 's'}"
    return "better" if found[1] > 0 else "worse" if found[2] < 0 else "no difference shown"


def frontier_table(records: Records, reward: str, regime: str, named: Sequence[str]) -> str:
    """Each named method's reward at each budget, its sweep, and what it did to the language."""
    curves = records.curves(reward, regime)
    head = ["", "seeds", *(f"KL {budget:g}" for budget in BUDGETS), "β → KL, reward", "perplexity", "different"]
    lines = [f"| {' | '.join(head)} |", f"|---|{'--:|' * (1 + len(BUDGETS))}---|--:|--:|"]
    for method in named:
        own = curves.get(method, {})
        sweep, language = [], []
        for beta in betas_of(reward, regime, method):
            stored = [each for cell, each in records.of.items() if _is(cell, reward, regime, method, beta)]
            if stored:
                kl, earned = (np.mean([np.mean(each[name]) for each in stored]) for name in ("kl", reward))
                of = f"{beta or 1:g} of the steps" if METHODS[method].kind == "sft" else f"{beta:g}"
                sweep.append(f"{of} → {kl:.2f}, {earned:.2f}")
                language.append([np.mean([each[name] for each in stored]) for name in ("perplexity", "different")])
        cells = [shown([at(points, budget) for points in own.values()]) for budget in BUDGETS]
        last = [f"{language[-1][0]:.1f}", f"{language[-1][1]:.2f}"] if language else ["–", "–"]
        line = [METHODS[method].name, str(len(own)), *cells, "; ".join(sweep) or "not measured", *last]
        lines.append(f"| {' | '.join(line)} |")
    return "\n".join(lines)


def _is(cell: Cell, reward: str, regime: str, method: str, beta: float | None) -> bool:
    return (cell.reward, cell.regime, cell.method, cell.beta) == (reward, regime, method, beta)


def question_table(records: Records, reward: str, regime: str, named: Sequence[str]) -> str:
    """The differences of named methods that were asked for, within seeds, with what they allow to say; "" for none."""
    curves = records.curves(reward, regime)
    lines = []
    for one, other, question in QUESTIONS:
        if one not in named or other not in named:
            continue
        cells = []
        for budget in BUDGETS:
            values = difference(curves, one, other, budget)
            cells.append(f"{shown(values, '+')}: {verdict(values)}" if values else "not measured")
        lines.append(f"| {question} | {' | '.join(cells)} |")
    head = [f"| | {' | '.join(f'KL {budget:g}' for budget in BUDGETS)} |", f"|---|{'---|' * len(BUDGETS)}"]
    return "\n".join(head + lines) if lines else ""


def bends(records: Records, reward: str, regime: str, named: Sequence[str]) -> str:
    """How far the points of larger β are from the lines through those of the smallest β and the reference."""
    found = []
    for method, seeds in records.curves(reward, regime).items():
        if method in named and METHODS[method].kind != "sft" and all(len(points) == 3 for points in seeds.values()):
            lines = [(points[1, 1], at(points[[0, 2]], points[1, 0])) for points in seeds.values()]
            found.append(f"{METHODS[method].name} {shown([own - line for own, line in lines if line], '+')}")
    if not found:
        return ""
    listed = "; ".join(found)
    return f"What the larger β earns, less what the line through the reference and the smaller β says: {listed}.\n"


def conclusions(records: Records, reward: str, regime: str, named: Sequence[str]) -> str:
    """Which named method earns most at each budget, and which do not differ from it, over three seeds and more."""
    curves = {method: seeds for method, seeds in records.curves(reward, regime).items() if method in named}
    lines = []
    for budget in BUDGETS:
        means: dict[str, float] = {}
        for method, seeds in curves.items():
            earned = [at(points, budget) for points in seeds.values()]
            inside = [value for value in earned if value is not None]
            if len(inside) == len(earned) >= LEAST_SEEDS:
                means[method] = float(np.mean(inside))
        if len(means) < 2:
            lines.append(
                f"- **At {budget:g} nats** the methods are not ranked, because fewer than two of them reach it in "
                f"every seed (of at least {LEAST_SEEDS}). The second table compares the seeds in which both methods do."
            )
            continue
        first = max(means, key=means.__getitem__)
        tied = [
            each for each in means if each != first and verdict(difference(curves, first, each, budget)) != "better"
        ]
        behind = [each for each in means if each != first and each not in tied]
        lines.append(
            f"- **At {budget:g} nats** {METHODS[first].name} earns most ({means[first]:.2f}). "
            + (f"No different, as far as intervals tell: {_listed(tied, means)}. " if tied else "")
            + (f"Behind it: {_listed(behind, means)}." if behind else "")
        )
    return "\n".join(lines)


def _listed(names: list[str], means: dict[str, float]) -> str:
    ordered = sorted(names, key=means.__getitem__, reverse=True)
    return "; ".join(f"{METHODS[name].name} ({means[name]:.2f})" for name in ordered)


def _color(method: Method, shades: dict[str, int]) -> Any:
    """Blue for ratings, red for thumbs, in shades; pairs are black, SFT is gray, KTO green."""
    plain = {"dpo": "black", "sft": "gray", "kto": "green"}
    if method.kind in plain:
        return plain[method.kind]
    name = "Blues" if method.continuous else "Reds"
    shades[name] += 1
    return pyplot.colormaps[name](1.1 - 0.1 * shades[name])


def picture(records: Records, reward: str, regime: str, named: Sequence[str], path: Path) -> None:
    """Reward against KL, a line per named method through the means over its seeds, and a small point per cell."""
    figure, axes = pyplot.subplots(figsize=(11, 6), layout="constrained")
    assert records.reference is not None
    start = float(np.mean(records.reference[reward]))
    axes.axhline(start, color="gray", linewidth=0.8, linestyle=":", label="reference")
    styles = {"pointwise": "o-", "ulma": "^--", "sft": "s-", "dpo": "D-", "kto": "v-"}
    shades: dict[str, int] = defaultdict(int)
    for method in METHODS:
        color = _color(METHODS[method], shades)
        if method not in named:
            continue
        means = [(0.0, start)]
        for beta in betas_of(reward, regime, method):
            stored = [each for cell, each in records.of.items() if _is(cell, reward, regime, method, beta)]
            if stored:
                points = np.array([(np.mean(each["kl"]), np.mean(each[reward])) for each in stored])
                means.append(tuple(points.mean(0)))
                axes.plot(*points.T, ".", color=color, markersize=4, alpha=0.5)
        if len(means) > 1:
            axes.plot(
                *np.array(sorted(means)).T,
                styles[METHODS[method].kind],
                color=color,
                label=METHODS[method].name,
                markersize=5,
                linewidth=1.2,
            )
    # The tables read rewards off straight lines over the root
    axes.set_xscale("function", functions=(lambda kl: np.sqrt(np.maximum(kl, 0)), np.square))
    axes.set_xlim(0)
    axes.set_xticks([tick for tick in (0, 0.1, 0.5, 1, 2, 3, 5, 10, 15, 20) if tick <= axes.get_xlim()[1]])
    axes.set_xlabel("KL(π ‖ π_ref), nats per answer (root scale)")
    axes.set_ylabel(f"true reward ({reward})")
    axes.set_title(f"{regime}, {reward}")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


INTRODUCTION = """\
# Reward and KL on a language model

Written by `report.py` from the records in `results/`. SmolLM2-135M-Instruct at temperature {temperature} is the
reference. It answers "Write one simple sentence about …"; its answers are rated by a known reward, plus noise; every
method learns from the same answers for {steps} steps of 16 rows, with LoRA of rank {rank} and a learning rate of
{rate:g} (linear decay). What is measured is the true reward of fresh answers to 64 held-out prompts ({answers}
answers to each), and their KL(π ‖ π_ref). The reward at a KL is read off the line through a method's β over √KL, which
begins at the reference. Only the first comparison has two β: its points lie on such a line. ULMA's β is 0.1, so
`sft_weight` β is 0.1, too. SFT has no β; its line goes through trainings of a quarter of the steps and of all.

Brackets are 95 % t-intervals over seeds. Each seed has its own prompts, answers, noise, adapters and order of rows, and
differences are taken within seeds. The intervals are not corrected for the number of comparisons. Ratings, pairs and
thumbs of the first part have five seeds: two were added after three had shown no difference. "perplexity" is that
of prose that people wrote (the reference's: {perplexity:.1f}), and "different" is the share of answers that differ from
all before them, both at the smallest β. Nothing is concluded from fewer than {least} seeds.

    python examples/frontier/run.py
    python examples/frontier/report.py --write

Measured on {devices}, {hours:.1f} hours of training and sampling for {count} cells.
"""


def status(records: Records) -> str:
    """How many cells of each part are measured, and which are missing: by name if they are few, else per method."""
    lines = ["| reward | regime | cells | missing |", "|---|---|--:|---|"]
    for reward, regime in PARTS:
        whole = list(part(reward, regime))
        missing = records.missing(reward, regime)
        by_method = Counter(cell.method for cell in missing)
        if len(missing) == len(whole):
            named = "all"
        elif len(missing) <= FEW:
            named = ", ".join(cell.name for cell in missing) or "nothing"
        else:
            named = ", ".join(f"{name} ({count})" for name, count in by_method.items())
        lines.append(f"| {reward} | {regime} | {len(whole) - len(missing)} of {len(whole)} | {named} |")
    return "\n".join(lines)


def page(records: Records, pictures: Path | None, *, only_whole: bool) -> str:
    """The page of what is measured; pictures go into a folder if one is given.

    With `only_whole`, of methods with every β and seed, in parts where those that the plan begins with are whole.
    """
    if records.reference is None or not records.of:
        return f"Nothing is measured yet.\n\n{status(records)}\n"
    some = next(iter(records.of.values()))
    text = [
        INTRODUCTION.format(
            temperature=TEMPERATURE,
            steps=some["steps"],
            rank=some["rank"],
            rate=some["learning_rate"],
            answers=" or ".join(map(str, sorted({each["answers"] for each in records.of.values()}))),
            perplexity=records.reference["perplexity"],
            least=LEAST_SEEDS,
            devices=" and ".join(sorted({each["device"] for each in records.of.values()})),
            hours=sum(each["seconds"] for each in records.of.values()) / 3600,
            count=len(records.of),
        ),
        "## What is measured\n",
        status(records),
        "",
    ]
    for number, (reward, regime) in enumerate(PARTS):
        named = records.whole(reward, regime) if only_whole else methods(regime)
        if not named or len(records.missing(reward, regime)) == len(list(part(reward, regime))):
            continue
        earned = np.mean(records.reference[reward])
        text += [
            f"## {regime.capitalize()}, {reward}\n",
            f"{REGIMES[regime]} The reference earns {earned:.2f}.\n",
            conclusions(records, reward, regime, named),
            "",
            frontier_table(records, reward, regime, named),
            "",
            question_table(records, reward, regime, named),
            "",
            bends(records, reward, regime, named),
        ]
        if pictures is not None:
            name = f"frontier-{number + 1}.png"
            picture(records, reward, regime, named, pictures / name)
            text.append(f"![{regime}, {reward}]({pictures.name}/{name})\n")
    return "\n".join(text)


def main() -> None:
    """Print the page, or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="Of run.py.")
    parser.add_argument("--write", action="store_true", help="Write RESULTS.md beside the results, of what is whole.")
    parser.add_argument("--pictures", type=Path, default=None, help="Draw pictures of what there is into this folder.")
    options = parser.parse_args()
    records = Records(options.results)
    if not options.write:
        if options.pictures is not None:
            options.pictures.mkdir(parents=True, exist_ok=True)
        print(page(records, options.pictures, only_whole=False), end="")
        return
    if not any(records.whole(*each) for each in PARTS):
        sys.exit(
            "Nothing is written: no part has every β and seed of the methods that it begins with. `run.py` goes on "
            f"where it was.\n\n{status(records)}"
        )
    target = options.results.parent / "RESULTS.md"
    target.write_text(page(records, options.results, only_whole=True), encoding="utf-8")
    print(f"Wrote {target}")


if __name__ == "__main__":
    main()
