"""python examples/exact_world/report.py [--results FOLDER] > examples/exact_world/RESULTS.md

Writes what run.py has stored as a page, with its pictures beside the JSON files. Every sentence about what is better
follows from the stored numbers.
"""

import argparse
import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from run import (
    APPROXIMATION_RECIPE,
    BEST_OF,
    BETAS,
    CHOICES,
    CONTENDERS,
    FRONTIER_RECIPE,
    LEARNERS,
    POPULATIONS,
    REGIMES,
    SFT_STEPS,
    SHARES,
    TWO_STAGES,
    demonstrations_cells,
)
from scipy import stats

Row = dict[str, Any]
BUDGETS = (0.5, 1.0, 2.0)
CHOICE_NAMES = {
    "column": "exact",
    0.0: "0 (the paper's)",
    "prior": "prior",
    "running_mean": "running mean",
    "batch_kl": "batch KL",
    "learned_constant": "learned constant",
    "learned": "learned",
}
SAYS = {
    "many answers a prompt": "64 prompts, 32 answers each with a thumb up or down.",
    "one answer a prompt": "2,048 prompts, one answer each with a thumb: nothing to pair.",
    "nine likes to a dislike": "64 prompts, about 32 answers each; nine of ten labels are 1.",
    "ratings with an offset": "64 prompts, 32 answers each with a rating r* + 2 + noise (of deviation 1.5).",
    "noisy demonstrations": "64 prompts, 32 answers each; a quarter are demonstrations, of which half are no better "
    "than the reference's own answers; the others have thumbs.",
}


def named(method: str, log_z: float | str) -> str:
    """A contender's name in tables."""
    names = {"sft": "SFT", "dpo": "DPO (TRL)", "kto": "KTO (TRL)", "ulma": "ULMA"}
    return names.get(method, f"pointwise DPO, log Z {CHOICE_NAMES[log_z]}")


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high): the mean and its 95 % t-interval; infinite of a single value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, -math.inf, math.inf
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    return mean, float(low), float(high)


def shown(values: Sequence[float], digits: int = 2) -> str:
    """The mean with its interval, as text."""
    if not len(values):
        return "–"
    mean, low, high = interval(values)
    spread = f" [{low:.{digits}f}, {high:.{digits}f}]" if math.isfinite(low) else ""
    return f"{mean:.{digits}f}{spread}"


# Approximation error


def approximation_table(rows: list[Row]) -> str:
    """Total variation from π* of each choice of log Z."""
    lines = [f"| log Z | {' | '.join(POPULATIONS)} |", f"|---|{'--:|' * len(POPULATIONS)}"]
    found = defaultdict(list)
    for row in rows:
        found[row["labels"], row["log_z"]].append(row["tv"])
        found[row["labels"], None].append(row["tv_reference"])
    for choice, name in {None: "(the reference, untrained)", **CHOICE_NAMES}.items():
        cells = [shown(found[labels, choice], 3) for labels in POPULATIONS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def approximation_words(rows: list[Row]) -> str:
    """What the table says, of each kind of labels."""
    parts = []
    for labels in POPULATIONS:
        means = {
            choice: np.mean([row["tv"] for row in rows if (row["labels"], row["log_z"]) == (labels, choice)])
            for choice in CHOICES
            if any((row["labels"], row["log_z"]) == (labels, choice) for row in rows)
        }
        if len(means) < len(CHOICES):
            continue
        order = sorted((choice for choice in CHOICES if choice != "column"), key=means.__getitem__)
        parts.append(
            f"- **{labels}**: closest to the optimum after the exact one ({means['column']:.4f}) comes "
            f"{CHOICE_NAMES[order[0]]} ({means[order[0]]:.3f}); then {CHOICE_NAMES[order[1]]} ({means[order[1]]:.2f}). "
            f"With log Z = 0 it is {means[0.0]:.2f}, {means[0.0] / means[order[0]]:.0f} times as far as the first."
        )
    return "\n".join(parts)


def approximation_picture(rows: list[Row], path: Path) -> None:
    """Bars of the table."""
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    width = 0.8 / len(POPULATIONS)
    for i, labels in enumerate(POPULATIONS):
        for j, choice in enumerate(CHOICES):
            values = [row["tv"] for row in rows if (row["labels"], row["log_z"]) == (labels, choice)]
            if values:
                place = j + (i - 1) * width
                axes.bar(place, np.mean(values), width, color=f"C{i}", label=labels if j == 0 else None, alpha=0.6)
                axes.plot([place] * len(values), values, "k.", markersize=3)
    axes.set_xticks(range(len(CHOICES)), CHOICE_NAMES.values(), rotation=15)
    axes.set_ylabel("total variation from π*")
    axes.set_title("The population as data: what is left is the choice of log Z (points are seeds)")
    axes.legend()
    figure.savefig(path, dpi=80)
    plt.close(figure)


# The frontier


def curves(rows: list[Row], regime: str) -> dict[tuple[str, Any], dict[int, np.ndarray]]:
    """Of each contender and seed, the sweep's points `(n, 2)` (KL, reward), by KL, the reference first."""
    points = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["regime"] == regime and "kl" in row:
            points[row["method"], row["log_z"]][row["seed"]].append((row["kl"], row["reward"]))
    return {
        key: {seed: np.array(sorted([(0.0, 0.0), *found])) for seed, found in seeds.items()}
        for key, seeds in points.items()
    }


def within(points: np.ndarray, budget: float) -> float:
    """The greatest reward with a KL of at most `budget` on a polygon of (KL, reward)."""
    kl, reward = points.T
    inside = reward[kl <= budget]
    return float(max(inside.max(), np.interp(budget, kl, reward)))


def best_within(rows: list[Row], regime: str, seed: int, budget: float) -> float:
    """The optimum's reward at a KL of `budget`, from what is stored at the KL of each cell."""
    points = {(0.0, 0.0)}
    points |= {(r["kl"], r["best"]) for r in rows if r["regime"] == regime and r["seed"] == seed and "kl" in r}
    kl, best = np.array(sorted(points)).T
    return float(np.interp(budget, kl, best))


def frontier_table(rows: list[Row], regime: str) -> str:
    """Of each contender, the reward within each budget, and the optimum's."""
    found = curves(rows, regime)
    head = ["", *(f"within {budget:g} nat{'s' * (budget > 1)}" for budget in BUDGETS), "β → KL, reward"]
    lines = [f"| {' | '.join(head)} |", f"|---|{'--:|' * len(BUDGETS)}---|"]
    seeds = sorted({row["seed"] for row in rows if row["regime"] == regime})
    optimum = [shown([best_within(rows, regime, seed, budget) for seed in seeds]) for budget in BUDGETS]
    lines.append(f"| (the optimum) | {' | '.join(optimum)} | |")
    for key in CONTENDERS:
        if key not in found:
            is_run = any(r["regime"] == regime and (r["method"], r["log_z"]) == key for r in rows)
            why = "no pair to learn from" if is_run else "not measured yet"
            lines.append(f"| {named(*key)} | {' | '.join('–' for _ in BUDGETS)} | {why} |")
            continue
        cells = [shown([within(points, budget) for points in found[key].values()]) for budget in BUDGETS]
        sweep = []
        for beta in BETAS:
            own = [r for r in rows if (r["regime"], r["method"], r["log_z"], r["beta"]) == (regime, *key, beta)]
            if own:
                mean_kl, mean_reward = np.mean([r["kl"] for r in own]), np.mean([r["reward"] for r in own])
                sweep.append(f"{'' if key[0] == 'sft' else f'{beta:g} → '}{mean_kl:.2f}, {mean_reward:.2f}")
        lines.append(f"| {named(*key)} | {' | '.join(cells)} | {'; '.join(sweep)} |")
    return "\n".join(lines)


def difference(found: dict, one: tuple, other: tuple, budget: float) -> tuple[float, float, float]:
    """(mean, low, high) of the reward of `one` less that of `other` within the budget, seed by seed."""
    seeds = sorted(set(found[one]) & set(found[other]))
    return interval([within(found[one][s], budget) - within(found[other][s], budget) for s in seeds])


def verdict(found: dict, one: tuple, other: tuple, budget: float, *, against: bool = True) -> str:
    """Whether `one` is better than `other` within the budget, in words; `against` names the other."""
    mean, low, high = difference(found, one, other, budget)
    word, link = (
        ("better", "than") if low > 0 else ("worse", "than") if high < 0 else ("not significantly different", "from")
    )
    named_other = f" {link} {named(*other)}" if against else ""
    return f"{word}{named_other} ({mean:+.2f} [{low:+.2f}, {high:+.2f}])"


def frontier_words(rows: list[Row], regime: str, budget: float = 1.0) -> str:
    """What to use in a regime, when pairs are better, and what log Z and ULMA do there."""
    found = curves(rows, regime)
    if {(row["method"], row["log_z"]) for row in rows if row["regime"] == regime} != set(CONTENDERS):
        return "Not all methods are measured yet."
    if any(len(seeds) < 2 for seeds in found.values()):
        return "One seed is measured: without intervals, nothing is said of what is better."
    # The exact column can not be had outside such a world
    usable = [key for key in CONTENDERS if key in found and key != ("pointwise_dpo", "column")]
    mean = {key: np.mean([within(points, budget) for points in found[key].values()]) for key in usable}
    first = max(usable, key=mean.__getitem__)
    ties = [key for key in usable if key != first and difference(found, first, key, budget)[1] <= 0]
    lines = [
        f"- **What to use**: {named(*first)} earns most within {budget:g} nat ({mean[first]:.2f})"
        + (
            f"; not significantly different from it: {', '.join(named(*key) for key in ties)}."
            if ties
            else ", ahead of all others."
        )
    ]
    points = [key for key in usable if key[0] in ("pointwise_dpo", "ulma")]
    best_point = max(points, key=mean.__getitem__)
    if ("dpo", 0.0) in found:
        lines.append(f"- **Pairs**: {named('dpo', 0.0)} is {verdict(found, ('dpo', 0.0), best_point, budget)}.")
    else:
        lines.append("- **Pairs**: there are none: no prompt has two answers.")
    zero = ("pointwise_dpo", 0.0)
    choices = [key for key in found if key[0] == "pointwise_dpo" and key != zero]
    told = [f"{CHOICE_NAMES[key[1]]} {verdict(found, key, zero, budget, against=False)}" for key in choices]
    lines.append(f"- **log Z**, against 0: {'; '.join(told)}.")
    ulma = ("ulma", 0.0)
    lines.append(
        f"- **ULMA** is {verdict(found, ulma, ('sft', 0.0), budget)}, and {verdict(found, ulma, zero, budget)}."
    )
    return "\n".join(lines)


def frontier_picture(rows: list[Row], regime: str, path: Path) -> None:
    """Reward against KL: the optimum, and each contender's sweep with its intervals."""
    figure, axes = plt.subplots(figsize=(11, 5), layout="constrained")
    found = curves(rows, regime)
    top = max(points[-1, 0] for seeds in found.values() for points in seeds.values())
    grid = np.linspace(0, top, 100)
    seeds = sorted({row["seed"] for row in rows if row["regime"] == regime})
    best = np.mean([[best_within(rows, regime, seed, kl) for kl in grid] for seed in seeds], 0)
    axes.plot(grid, best, "k-", label="optimum π*")
    for i, key in enumerate(CONTENDERS):
        own = [r for r in rows if r["regime"] == regime and (r["method"], r["log_z"]) == key and "kl" in r]
        if not own:
            continue
        sweep = []
        for beta in BETAS:
            at = [r for r in own if r["beta"] == beta]
            if at:
                kl, reward = (interval([r[name] for r in at]) for name in ("kl", "reward"))
                sweep.append((kl[0], kl[0] - kl[1], reward[0], reward[0] - reward[1]))
        kl, kl_error, reward, error = np.array(sorted(sweep)).T
        finite = bool(np.isfinite(error).all())
        axes.errorbar(
            kl,
            reward,
            yerr=error if finite else None,
            xerr=kl_error if finite else None,
            fmt="s" if key[0] == "sft" else "o-" if key[0] == "pointwise_dpo" else "^--",
            color=f"C{i}",
            label=named(*key),
            markersize=8 if key[0] == "sft" else 4,
            zorder=3 if key[0] == "sft" else 2,
            linewidth=1.2,
            elinewidth=0.5,
        )
    axes.set_xlabel("KL(π‖π_ref), nats a completion")
    axes.set_ylabel("E[r*], gained over the reference")
    axes.set_title(regime)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=80)
    plt.close(figure)


# Demonstrations beside thumbs

Learner = tuple[str, float | str]
Kind = tuple[float, int]
KINDS: list[Kind] = [(share, best_of) for share in SHARES for best_of in BEST_OF]
LEARNER_NAMES: dict[Learner, str] = {
    ("sft", 1.0): "SFT",
    ("pointwise_dpo", 1.0): "pointwise DPO",
    (TWO_STAGES, 1.0): "SFT, then pointwise DPO",
    ("ulma", 1.0): "ULMA, sft_weight 1",
    ("ulma", "beta"): "ULMA, sft_weight β",
}
# Each with those that it is compared with
COMPARED: dict[Learner, tuple[Learner, ...]] = {
    ("ulma", 1.0): (("sft", 1.0), ("pointwise_dpo", 1.0), (TWO_STAGES, 1.0), ("ulma", "beta")),
    ("ulma", "beta"): (("pointwise_dpo", 1.0),),
}


def of_kind(rows: list[Row], kind: Kind) -> dict[Learner, dict[int, np.ndarray]]:
    """Of each learner and seed, the points `(n, 2)` (KL, reward) by KL, the reference first."""
    points = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if (row["share"], row["best_of"]) == kind:
            points[row["method"], row["sft_weight"]][row["seed"]].append((row["kl"], row["reward"]))
    return {
        learner: {seed: np.array(sorted([(0.0, 0.0), *found])) for seed, found in seeds.items()}
        for learner, seeds in points.items()
    }


def demonstrations_table(rows: list[Row], budget: float) -> str:
    """Of each learner and kind of demonstrations, the reward within a budget, and how much more ULMA earns."""
    heads = [f"1/{1 / share:g}, best of {best_of}" for share, best_of in KINDS]
    lines = [f"| within {budget:g} nat{'s' * (budget > 1)} | {' | '.join(heads)} |", f"|---|{'--:|' * len(KINDS)}"]
    found = [of_kind(rows, kind) for kind in KINDS]
    for method, weight, _ in LEARNERS:
        learner = (method, weight)
        cells = [shown([within(points, budget) for points in each[learner].values()]) for each in found]
        lines.append(f"| {LEARNER_NAMES[learner]} | {' | '.join(cells)} |")
    for one, others in COMPARED.items():
        for other in others:
            cells = []
            for each in found:
                mean, low, high = difference(each, one, other, budget)
                bold = "**" if low > 0 or high < 0 else ""
                cells.append(f"{bold}{mean:+.2f} [{low:+.2f}, {high:+.2f}]{bold}")
            lines.append(f"| {LEARNER_NAMES[one]}, less {LEARNER_NAMES[other]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def demonstrations_words(rows: list[Row], budget: float) -> str:
    """In how many kinds of data each setting of ULMA earns more, and less, than each of the others within a budget."""
    lines = []
    for one, others in COMPARED.items():
        parts = []
        for other in others:
            found = [difference(of_kind(rows, kind), one, other, budget) for kind in KINDS]
            more, less = sum(low > 0 for _, low, _ in found), sum(high < 0 for *_, high in found)
            parts.append(f"more than {LEARNER_NAMES[other]} in {more} and less in {less}")
        lines.append(
            f"- Within {budget:g} nat{'s' * (budget > 1)}, {LEARNER_NAMES[one]} earns {'; '.join(parts)} of "
            f"{len(KINDS)} kinds of data. In the others, no significant difference was found."
        )
    return "\n".join(lines)


def whole_seeds(rows: list[Row]) -> list[Row]:
    """The rows of the seeds whose sweep is complete; none if there are fewer than two such seeds."""
    cells = len(list(demonstrations_cells(1)))
    counts = Counter(row["seed"] for row in rows)
    seeds = {seed for seed, count in counts.items() if count == cells}
    return [row for row in rows if row["seed"] in seeds] if len(seeds) > 1 else []


def demonstrations_picture(rows: list[Row], path: Path) -> None:
    """Reward against KL for each kind of data: means over seeds at each β or number of steps."""
    figure, all_axes = plt.subplots(
        len(BEST_OF), len(SHARES), figsize=(12, 6.5), layout="constrained", sharex=True, sharey=True
    )
    for (share, best_of), axes in zip(
        [(share, best_of) for best_of in BEST_OF for share in SHARES], all_axes.flat, strict=True
    ):
        for i, (method, weight, _) in enumerate(LEARNERS):
            own = [
                row
                for row in rows
                if (row["share"], row["best_of"], row["method"], row["sft_weight"]) == (share, best_of, method, weight)
            ]
            settings = sorted({(row["beta"], row["steps"]) for row in own})
            at = [[row for row in own if (row["beta"], row["steps"]) == setting] for setting in settings]
            points = sorted(tuple(np.mean([row[name] for row in each]) for name in ("kl", "reward")) for each in at)
            axes.plot(*zip(*points, strict=True), "s:" if method == "sft" else "o-", color=f"C{i}", markersize=4)
        axes.set_title(f"1/{1 / share:g} demonstrations, best of {best_of}", fontsize=10)
        axes.grid(alpha=0.3)
    for axes in all_axes[-1]:
        axes.set_xlabel("KL(π‖π_ref), nats")
    for axes in all_axes[:, 0]:
        axes.set_ylabel("E[r*] gained")
    names = [LEARNER_NAMES[method, weight] for method, weight, _ in LEARNERS]
    figure.legend(all_axes[0, 0].lines, names, loc="outside lower center", ncols=len(names), fontsize=9)
    figure.savefig(path, dpi=80)
    plt.close(figure)


INTRODUCTION = """\
# An exact world

A world is a random one-layer GPT-2 over 8 symbols, whose completions have exactly two symbols. All 64 completions are
enumerated, so the reference, the true reward r*, Z(x), the optimum π* ∝ π_ref·exp(r*/β), expected rewards and KL are
exact. Each seed is another world, with other rows. Brackets are 95 % t-intervals over seeds, and differences are taken
seed by seed. The intervals are not corrected for the number of comparisons.

`python examples/exact_world/run.py` measures everything again (about two hours of one core), and `report.py` writes
this page.
"""


def page(results: Path) -> str:
    """The page of a folder of results; writes the pictures beside them."""
    stored = {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(results.glob("*.json"))
        if path.stem in ("approximation", "frontier", "demonstrations")
    }
    parts = [INTRODUCTION]
    if rows := stored.get("approximation"):
        approximation_picture(rows, results / "approximation.png")
        recipe = APPROXIMATION_RECIPE
        parts += [
            "## Approximation error of log Z\n",
            f"Four prompts, β = 0.5. Every completion is in the data, weighted by π_ref, with its expected label. "
            f"{recipe.steps} steps of AdamW on all rows. The numbers are the total variation from π*, over "
            f"{len({row['seed'] for row in rows})} seeds. The running mean and batch KL average rows without their "
            "weights, which is uniformly over completions here.\n",
            approximation_table(rows),
            "",
            approximation_words(rows),
            f"\n![approximation error]({results.name}/approximation.png)\n",
        ]
    if rows := stored.get("frontier"):
        recipe = FRONTIER_RECIPE
        parts += [
            "## Reward and KL\n",
            f"2,048 labeled answers, {recipe.steps} steps of {recipe.batch_size} rows for every method, "
            f"β of {', '.join(f'{beta:g}' for beta in BETAS)}. All prompts of the world are measured. A number in the "
            "tables is the greatest mean reward above the reference's that a method reaches within so many nats of "
            "KL. Between two β it is read off the line, which a mixture of the two policies reaches.\n",
            "DPO gets the same answers in pairs within a prompt. KTO gets thumbs (ratings are cut at their median) and "
            "class weights that balance them. SFT and the SFT term of ULMA get the demonstrations. If there are none, "
            'they get the likes, or the best-rated quarter. "exact" is log Z(x) of the reward in the labels, which is '
            "known only in such a world.\n",
        ]
        for number, regime in enumerate(REGIMES):
            own = [row for row in rows if row["regime"] == regime]
            if not any("kl" in row for row in own):
                continue
            name = f"frontier-{number + 1}.png"
            frontier_picture(rows, regime, results / name)
            seeds = len({row["seed"] for row in own})
            parts += [
                f"### {regime.capitalize()}\n",
                f"{SAYS[regime]} {seeds} seed{'s' * (seeds > 1)}.\n",
                frontier_words(rows, regime),
                "",
                frontier_table(rows, regime),
                f"\n![{regime}]({results.name}/{name})\n",
            ]
    if rows := whole_seeds(stored.get("demonstrations", [])):
        demonstrations_picture(rows, results / "demonstrations.png")
        parts += [
            "## Demonstrations beside thumbs\n",
            "The paper's claim for ULMA is that it learns good demonstrations and much noisy feedback in one loss. "
            "Here, of 64 prompts with 32 answers each, a share are demonstrations: the best of 64 or of 4 answers of "
            "the reference by the true reward. All other answers have a thumb, drawn with σ(r*), so that many are "
            f"wrong. log Z is 0. {len({row['seed'] for row in rows})} seeds, {FRONTIER_RECIPE.steps} steps; SFT, which "
            f"has no β, is stopped after {', '.join(map(str, SFT_STEPS))}. In two stages, half of the steps are SFT, "
            "and its result is the reference of pointwise DPO; its KL is measured from the first reference like that "
            "of the others. Pointwise DPO takes demonstrations as likes. At β = 1, both settings of ULMA are the "
            "same. Columns: the share of demonstrations, and of how many answers each is the best. Bold: the interval "
            "of a difference leaves out 0.\n",
        ]
        for budget in BUDGETS[1:]:
            parts += [demonstrations_words(rows, budget) + "\n", demonstrations_table(rows, budget) + "\n"]
        parts.append(f"![demonstrations beside thumbs]({results.name}/demonstrations.png)\n")
    return "\n".join(parts)


def main() -> None:
    """Print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="Of run.py.")
    print(page(parser.parse_args().results), end="")


if __name__ == "__main__":
    main()
