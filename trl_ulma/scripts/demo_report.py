"""The output of the demo: progress bar, figures of held-out answers with intervals, table and plot."""

import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Self

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from transformers import TrainerCallback

from trl_ulma.ranking import auc

RESAMPLES = 2000
KINDS = ("demonstration", "liked", "4–5 stars", "1–2 stars", "disliked")
# Okabe and Ito's blue and vermillion, which color-blind people can tell apart
GOOD, BAD, GRAY = "#0072B2", "#D55E00", "#767676"


@dataclass(frozen=True)
class HeldOut:
    """The held-out rows and their log-probabilities. All arrays are `(N,)`.

    Attributes:
        prompt: the number of the prompt.
        kind: the number of the kind in `KINDS`.
        good: whether the answer is a demonstration, liked, or rated above the middle. Rows that are rated in the middle
            are left out.
        tokens: the number of tokens of the completion.
        before: log π(y|x) before training, in nats. The model is the reference then.
        after: log π(y|x) after training, in nats.
        beta: β of the implicit reward.
    """

    prompt: np.ndarray
    kind: np.ndarray
    good: np.ndarray
    tokens: np.ndarray
    before: np.ndarray
    after: np.ndarray
    beta: float

    @classmethod
    def of(
        cls, rows: list[dict[str, Any]], tokens: np.ndarray, before: np.ndarray, after: np.ndarray, *, beta: float
    ) -> Self:
        """The held-out rows with their log-probabilities."""
        names = [row["prompt"][0]["content"] for row in rows]
        prompt = np.unique(names, return_inverse=True)[1]
        kind = np.array([_kind(row) for row in rows])
        told = kind >= 0
        good = kind < KINDS.index("1–2 stars")
        return cls(*(values[told] for values in (prompt, kind, good, tokens, before, after)), beta=beta)

    def reward(self, logps: np.ndarray) -> np.ndarray:
        """β·(log π − log π_ref), `(N,)`."""
        return self.beta * (logps - self.before)


def _kind(row: dict[str, Any]) -> int:
    if row["label_type"] == "continuous":
        return -1 if row["label"] == 0 else KINDS.index("4–5 stars" if row["label"] > 0 else "1–2 stars")
    if row["label"] == 0:
        return KINDS.index("disliked")
    return KINDS.index("demonstration" if row["sft_mask"] else "liked")


def _auc(score: np.ndarray, good: np.ndarray) -> float:
    value = float(auc(score, good))
    if np.isnan(value):
        raise ValueError("The AUC needs a good and a bad answer.")
    return value


def _accuracy(reward: np.ndarray, good: np.ndarray) -> float:
    return float(np.where(reward == 0, 0.5, (reward > 0) == good).mean())


# name, key, format, of (held-out rows, log π, the rows to count)
FIGURES: list[tuple[str, str, str, Callable[[HeldOut, np.ndarray, np.ndarray], float]]] = [
    (
        "AUC, implicit reward",
        "reward_auc",
        ".3f",
        lambda held, logps, rows: _auc(held.reward(logps)[rows], held.good[rows]),
    ),
    (
        "accuracy of its sign",
        "reward_accuracy",
        ".0%",
        lambda held, logps, rows: _accuracy(held.reward(logps)[rows], held.good[rows]),
    ),
    (
        "AUC, log π per token",
        "mean_logp_auc",
        ".3f",
        lambda held, logps, rows: _auc((logps / held.tokens)[rows], held.good[rows]),
    ),
    (
        "good answers: perplexity",
        "good_perplexity",
        ".1f",
        lambda held, logps, rows: _perplexity(held, logps, rows[held.good[rows]]),
    ),
    (
        "bad answers: log-ratio",
        "bad_log_ratio",
        ".1f",
        lambda held, logps, rows: float((logps - held.before)[rows[~held.good[rows]]].mean()),
    ),
]


def _perplexity(held: HeldOut, logps: np.ndarray, rows: np.ndarray) -> float:
    return float(np.exp(-logps[rows].sum() / held.tokens[rows].sum()))


def figures(held: HeldOut, seed: int) -> dict[str, dict[str, dict[str, float]]]:
    """key → "before", "after" and "change" → "value", and "low" and "high" of the 95% interval.

    The intervals are percentiles over `RESAMPLES` bootstrap samples of whole prompts, because answers to one prompt are
    not independent. "before" and "after" come from the same sample. If an interval has no width, such as for an AUC of
    1, all samples agree, but the figure is still not certain.
    """
    rng = np.random.default_rng(seed)
    groups = [np.flatnonzero(held.prompt == prompt) for prompt in np.unique(held.prompt)]
    samples = [
        np.concatenate([groups[i] for i in rng.integers(len(groups), size=len(groups))]) for _ in range(RESAMPLES)
    ]
    found = {}
    for _, key, _, of in FIGURES:
        values = np.empty((1 + RESAMPLES, 3))
        for i, rows in enumerate([np.arange(len(held.good)), *samples]):
            values[i, :2] = of(held, held.before, rows), of(held, held.after, rows)
        values[:, 2] = values[:, 1] - values[:, 0]
        low, high = np.percentile(values[1:], [2.5, 97.5], axis=0)
        found[key] = {
            when: {"value": values[0, i], "low": low[i], "high": high[i]}
            for i, when in enumerate(("before", "after", "change"))
        }
    return found


def versions() -> dict[str, str]:
    """The versions of Python and of the libraries that the numbers depend on."""
    names = ("trl-ulma", "trl", "transformers", "torch", "peft", "datasets", "accelerate")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}


class ProgressBar(TrainerCallback):
    """A bar with the step, the loss and the time left."""

    def __init__(self):
        self.bar = Progress(
            TextColumn("Training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps  loss {task.fields[loss]}"),
            TimeRemainingColumn(),
        )

    def on_train_begin(self, args, state, control, **kwargs):
        self.task = self.bar.add_task("training", total=state.max_steps, loss="–")
        self.bar.start()

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.bar.update(self.task, loss=f"{float(logs['loss']):.2f}")

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.stop()


def show(console: Console, facts: dict[str, Any], output_dir: Path) -> None:
    """Print the table, the answers and the paths of the files."""
    held_out, model = facts["held_out"], output_dir / "model"
    console.print(
        f"\n[bold]{held_out['rows']} answers to {held_out['prompts']} prompts that were not trained on[/bold]"
    )
    table = Table(
        Column(no_wrap=True),
        *(Column(when, justify="right") for when in ("before", "after", "change")),
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    for name, key, form, _ in FIGURES:
        table.add_row(name, *(_cell(found, form, when) for when, found in held_out["figures"][key].items()))
    console.print(table)
    console.print()
    console.print(
        escape("[95% bootstrap interval, by prompt]. ")
        + "Before training, the model is its own reference, so all implicit rewards are 0. Ties count half. log π per "
        "token needs no reference, so it also ranks answers before training. The log-ratio is in nats.",
        style="dim",
    )
    for each in facts["answers"]:
        console.print(f"\n[bold]{escape(each['prompt'])}[/bold]")
        for when in ("before", "after"):
            console.print(Padding(f"[dim]{when}:[/dim] {escape(each[when])}", (0, 0, 0, 2)))
    if facts["note"]:
        console.print(f"\n{facts['note']}", style="dim")
    console.print(f"\n{facts['seconds']['total']:.0f} seconds, {facts['seconds']['training']:.0f} of them training.")
    for name, path in (("Figure", "figure.png"), ("Numbers", "report.json"), ("Model", "model")):
        console.print(f"{name:<9}{escape(str(output_dir / path))}", soft_wrap=True)
    console.print(f'{"":<9}AutoModelForCausalLM.from_pretrained("{escape(str(model))}")', soft_wrap=True)


def _cell(found: dict[str, float], form: str, when: str) -> str:
    sign = "+" if when == "change" else ""
    value, low, high = (format(found[end], sign + form) for end in ("value", "low", "high"))
    if when == "before" and found["low"] == found["high"]:  # by definition
        return f"{value}\n"
    return f"{value}\n[dim]{escape(f'[{low}, {high}]')}[/dim]"


def draw(history: list[dict[str, float]], held: HeldOut, path: Path) -> None:
    """Save a figure with the losses, and with the implicit rewards of held-out answers by kind."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), dpi=160, layout="constrained")
    parts: Any = figure.subfigures(1, 2, width_ratios=(1, 1.25), wspace=0.04)
    left, right = parts
    upper, lower = left.subplots(2, 1, sharex=True)
    _curve(upper, history, "loss/sft", "Demonstrations: −log π of an answer, nats", GOOD)
    _curve(lower, history, "loss/preference", "Other rows: preference loss", GRAY)
    lower.set_xlabel("step")
    left.suptitle("Training", x=0.02, ha="left", weight="bold")

    axes = right.subplots()
    rng = np.random.default_rng(0)
    reward = held.reward(held.after)
    axes.axvline(0, color="black", linewidth=1)
    for kind in range(len(KINDS)):
        values = reward[held.kind == kind]
        good = kind < KINDS.index("1–2 stars")
        height = kind + rng.uniform(-0.17, 0.17, len(values))
        axes.scatter(
            values, height, s=26, alpha=0.6, linewidths=0, color=GOOD if good else BAD, marker="o" if good else "D"
        )
        if len(values):
            axes.plot([np.median(values)] * 2, [kind - 0.32, kind + 0.32], color="black", linewidth=2)
    axes.set_yticks(range(len(KINDS)), [f"{name} ({(held.kind == kind).sum()})" for kind, name in enumerate(KINDS)])
    axes.set_ylim(len(KINDS) - 0.45, -0.55)
    axes.set_xlabel("implicit reward  β (log π − log π$_{ref}$);  bars: medians")
    axes.text(0.01, 1.01, "← less likely than before", transform=axes.transAxes, ha="left", va="bottom", color=BAD)
    axes.text(0.99, 1.01, "more likely than before →", transform=axes.transAxes, ha="right", va="bottom", color=GOOD)
    right.suptitle("Held-out answers after training", x=0.02, ha="left", weight="bold")
    for each in (upper, lower, axes):
        each.spines[["top", "right"]].set_visible(False)
        each.grid(axis="x" if each is axes else "y", color="#E6E6E6", linewidth=0.8)
        each.set_axisbelow(True)
    figure.savefig(path)


def _curve(axes: Any, history: Iterable[dict[str, float]], name: str, title: str, color: str, width: int = 9) -> None:
    """Plot a loss per step as dots, and its running mean as a line."""
    steps, losses = zip(*((log["step"], log[name]) for log in history if name in log), strict=True)
    half = width // 2
    smooth = [np.mean(losses[max(0, i - half) : i + half + 1]) for i in range(len(losses))]
    axes.scatter(steps, losses, s=9, color=color, alpha=0.35, linewidths=0)
    axes.plot(steps, smooth, color=color, linewidth=2)
    axes.set_title(title, loc="left", fontsize=10)
