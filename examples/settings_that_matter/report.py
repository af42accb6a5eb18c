"""python examples/settings_that_matter/report.py examples/settings_that_matter/results > RESULTS.md

Writes what `run.py` has measured as tables and a figure: means over seeds with 95 % intervals (Student's t).
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from run import ARMS
from scipy import stats

matplotlib.use("Agg")
from matplotlib import pyplot

FIGURES = {
    "auc": "AUC",
    "pair_accuracy": "pairs in order",
    "brier": "Brier",
    "accuracy": "reward's sign right",
    "chosen": "Δ log π, good answers (nats)",
    "rejected": "Δ log π, bad answers (nats)",
    "perplexity": "perplexity, good answers",
}
# What the others are compared with, seed by seed
BASELINE = "log_z=0"
INTRODUCTION = """\
# Settings that matter, on real data

{model}, LoRA of rank 16, {rows} rows of training ({steps} steps of {batch} rows, learning rate {rate}, linear decay,
β = 0.1), {held_out} held-out rows, with good and bad answers to the same prompts. The reference is the model before
training. The numbers are means over {seeds} seeds (rows, their order, adapters), with 95 % intervals (Student's t). The
last column has intervals of differences within seeds. Δ is the change of the log-probability of held-out answers in
training.

- `log_z=…` is pointwise DPO.
- `mean` is pointwise DPO with the mean of the tokens' log-probabilities, and β multiplied by the mean length.
- `sft_weight=…` is ULMA, with the good answers as demonstrations.

`report.py` wrote this page from the JSON files beside it, which `run.py` wrote:

    trl-ulma prepare hh --input hh_harmless.jsonl.gz --output hh.parquet
    trl-ulma prepare qa-feedback --input qa_feedback.json.gz --passages none --output qa.parquet
    python examples/settings_that_matter/run.py --hh hh.parquet --qa qa.parquet {options}
    python examples/settings_that_matter/report.py examples/settings_that_matter/results > RESULTS.md

`hh` is from 1,800 pairs of HH (harmless). `hh 7:1` is the same with seven good answers to a bad one in training. Its
held-out rows are balanced, so a calibrated model is wrong about their share. `qa` has QA-feedback's corrections and
flawed predictions, asked without the passages. Prompts with a row of more than {max_tokens} tokens are left out. Run
with {threads} thread on CPU, torch {torch}.
"""


def read(folder: Path) -> dict[str, dict[str, dict[int, dict[str, Any]]]]:
    """dataset → setting → seed → result."""
    found: dict[str, dict[str, dict[int, dict[str, Any]]]] = defaultdict(lambda: defaultdict(dict))
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        found[result["data"]][result["arm"]][result["seed"]] = result
    return found


def figures(result: dict[str, Any], untrained: dict[str, Any]) -> dict[str, float]:
    """The figures of a run; changes are from the untrained model's on the same rows."""
    test, before = result["test"], untrained["test"]
    found = {name: test[name] for name in ("auc", "pair_accuracy", "brier", "accuracy")}
    if ARMS.get(result["arm"], ("", {}))[1].get("length_normalize"):
        # What is stored are means over tokens, of which no sum can be made
        return found | dict.fromkeys(("chosen", "rejected", "perplexity"), float("nan"))
    return {
        **found,
        "chosen": test["logps_chosen"] - before["logps_chosen"],
        "rejected": test["logps_rejected"] - before["logps_rejected"],
        "perplexity": float(np.exp(-test["logps_chosen"] / test["chosen_tokens"])),
    }


def interval(values: list[float]) -> str:
    """The mean and its 95 % interval."""
    if np.isnan(values).any():
        return "–"
    if len(values) < 2:
        return f"{values[0]:.3g}"
    mean, half = np.mean(values), stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
    return f"{mean:.3g} ± {half:.2g}"


def table(arms: dict[str, dict[int, dict[str, Any]]]) -> tuple[str, dict[str, dict[str, list[float]]]]:
    """The figures of a dataset's settings, and their values seed by seed."""
    heads = ["setting", "seeds", *FIGURES.values(), f"AUC less {BASELINE}'s"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    values: dict[str, dict[str, list[float]]] = {}
    for arm in ("untrained", *ARMS):
        seeds = sorted(set(arms.get(arm, {})) & set(arms["untrained"]))
        if not seeds:
            continue
        rows = [figures(arms[arm][seed], arms["untrained"][seed]) for seed in seeds]
        values[arm] = {name: [row[name] for row in rows] for name in FIGURES}
        beside = [seed for seed in seeds if seed in arms.get(BASELINE, {}) and arm not in ("untrained", BASELINE)]
        gained = [arms[arm][seed]["test"]["auc"] - arms[BASELINE][seed]["test"]["auc"] for seed in beside]
        cells = [arm, str(len(seeds)), *(interval(values[arm][name]) for name in FIGURES)]
        lines.append(f"| {' | '.join([*cells, interval(gained) if gained else ''])} |")
    return "\n".join(lines), values


def draw(values: dict[str, dict[str, dict[str, list[float]]]], path: Path) -> None:
    """AUC, Brier score and the change of good answers' log-probability, a column a dataset."""
    shown = ("auc", "brier", "chosen")
    figure, grid = pyplot.subplots(
        len(values), len(shown), figsize=(11, 0.6 + 2.6 * len(values)), squeeze=False, layout="constrained"
    )
    for line, (data, arms) in zip(grid, values.items(), strict=True):
        names = [arm for arm in arms if arm != "untrained"]
        for axes, name in zip(line, shown, strict=True):
            for place, arm in enumerate(names):
                found = arms[arm][name]
                color = "#0072B2" if arm.startswith("log_z") else "#D55E00" if arm == "mean" else "#009E73"
                axes.plot([np.mean(found)], [place], "o", color=color)
                axes.plot(found, [place] * len(found), "|", color=color, markersize=9)
            untrained = np.mean(arms["untrained"][name])
            axes.axvline(untrained, color="#767676", linewidth=0.8, linestyle=":")
            axes.set_xlabel(f"{FIGURES[name]} ({data})")
            axes.set_yticks(range(len(names)), names if axes is line[0] else [])
            axes.invert_yaxis()
            axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    """Print the page, and draw its figure into the folder."""
    folder = Path(sys.argv[1])
    found = read(folder)
    first = next(iter(next(iter(found.values())).values()))
    settings = next(iter(first.values()))
    counts = [len(seeds) for arms in found.values() for seeds in arms.values()]
    seeds = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    options = f"--rows {settings['rows']} --test_rows {settings['held_out']} --batch_size {settings['batch_size']}"
    options += f" --learning_rate {settings['learning_rate']} --max_tokens {settings['max_tokens']}"
    print(
        INTRODUCTION.format(
            model="SmolLM2-135M-Instruct in bfloat16 (autocast)" if settings["bf16"] else "SmolLM2-135M-Instruct",
            rows=settings["rows"],
            steps=settings["rows"] // settings["batch_size"],
            batch=settings["batch_size"],
            rate=settings["learning_rate"],
            held_out=settings["held_out"],
            seeds=seeds,
            max_tokens=settings["max_tokens"],
            threads=settings["threads"],
            torch=settings["torch"],
            options=options + (" --bf16 True" if settings["bf16"] else ""),
        )
    )
    values = {}
    for data, arms in found.items():
        text, values[data] = table(arms)
        print(f"## {data}\n\n{text}\n")
    draw(values, folder / "settings.png")
    print(f"![AUC, Brier score and drift of each setting]({folder.name}/settings.png)\n")
    print("Dots are means, strokes the seeds, the dotted line the model before training.")


if __name__ == "__main__":
    main()
