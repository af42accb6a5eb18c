"""Pictures in colors that color-blind people can distinguish. Hatches and markers distinguish them in gray.

With `dark=True`, a picture is drawn for a dark page.
"""

import functools
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from trl_ulma.evaluation.implicit_reward import CalibrationBin
from trl_ulma.evaluation.intervals import Estimate

# The palette of Okabe and Ito. Its dark blue and its black are invisible on a dark page, so dark pages have others
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
COLORS_ON_DARK = ("#56B4E9", "#E69F00", "#2FBF94", "#E39AC3", "#F0E442", "#D55E00", "#FFFFFF")
PAPER, PAPER_DARK = "white", "#16181C"
_DARK = {
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), PAPER_DARK),
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "axes.titlecolor"), "#E6E6E6"
    ),
}
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":")
_GRID, _GRID_DARK, _GUIDE = "#E6E6E6", "#3A3E46", "#8A8A8A"
# Figures between -1 and 1, whose axis spans this much at least, so that noise does not look like a collapse
_AT_MOST_1, _LEAST_RANGE = ("accuracies", "auc", "pearson", "spearman"), 0.2
# The same of losses, as a share of their value
_LEAST_SHARE = 0.05
VERDICT_STYLES = {
    "win": {"color": "#0072B2", "hatch": "", "text": "white"},
    "tie": {"color": "#E6E6E6", "hatch": "..", "text": "black"},
    "lose": {"color": "#E69F00", "hatch": "//", "text": "black"},
}
# Inches: on the page of a phone, letters are still read
WIDTH = 5.6
# Characters of a line of a name
_NAME_WIDTH = 36


def _drawn(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Let `draw` use matplotlib's default style, independent of the user's settings, for a light or dark page."""

    @functools.wraps(draw)
    def in_own_style(*args: Any, dark: bool = False, **kwargs: Any) -> Figure:
        # Names are no formulas, even with dollar signs
        settings = {"text.parse_math": False, **(_DARK if dark else {})}
        with matplotlib.style.context(["default", settings], after_reset=True):
            return draw(*args, **kwargs)

    return in_own_style


def save(figure: Figure, folder: Path, name: str) -> list[str]:
    """Write a figure as PNG and SVG, with reproducible bytes, and return the names of the files."""
    settings = {"svg.hashsalt": name, "svg.fonttype": "path", "hatch.linewidth": 0.8}
    with matplotlib.style.context(["default", settings], after_reset=True):
        figure.savefig(folder / f"{name}.png", dpi=160, facecolor=figure.get_facecolor())
        figure.savefig(folder / f"{name}.svg", facecolor=figure.get_facecolor(), metadata={"Date": None})
    return [f"{name}.png", f"{name}.svg"]


def _is_dark() -> bool:
    return matplotlib.rcParams["figure.facecolor"] == PAPER_DARK


def _ink() -> str:
    """The color of lines and texts on this page."""
    return matplotlib.rcParams["text.color"]


def _name(name: str) -> str:
    """The name of a model in a picture: a long one in several lines, and none that legends omit for its underscore."""
    lines = "\n".join(textwrap.wrap(name, _NAME_WIDTH, break_on_hyphens=False)) or name
    return f"\u200b{lines}" if lines.startswith("_") else lines


def _edge() -> str:
    """The color of edges and hatches of bars. The bars have light colors on both pages."""
    return PAPER_DARK if _is_dark() else "black"


@_drawn
def win_rates(models: Mapping[str, Mapping[str, Estimate]], title: str) -> Figure:
    """Draw a bar of win, tie and lose shares per model, like Figure 1 of the ULMA paper.

    Whiskers are the 95% interval of the wins.

    Args:
        models: name → `win`, `tie` and `lose`, from `rates.rates`.
        title: title of the figure.

    Raises:
        ValueError: if there are no models.
    """
    if not models:
        raise ValueError("A figure of win rates needs a model at least.")
    figure = Figure(figsize=(WIDTH, 1.3 + 0.5 * len(models)), layout="constrained")
    axes = figure.subplots()
    for row, shares in enumerate(models.values()):
        left = 0.0
        for verdict, style in VERDICT_STYLES.items():
            width = shares[verdict].value
            label = verdict if row == 0 else None
            axes.barh(
                row, width, 0.62, left, color=style["color"], hatch=style["hatch"], edgecolor=_edge(), label=label
            )
            if width >= 0.07:
                box = {"facecolor": style["color"], "edgecolor": "none", "pad": 1.5}
                middle = left + width / 2
                axes.text(
                    middle, row + 0.02, f"{width:.0%}", ha="center", va="center", color=style["text"], bbox=box, size=9
                )
            left += width
        win = shares["win"]
        if win.low is not None and win.high is not None:
            axes.plot([win.low, win.high], [row - 0.4] * 2, "|-", color=_ink(), linewidth=1.2, markersize=6, zorder=3)
    numbers = {shares["win"].n for shares in models.values()}
    axes.set_yticks(range(len(models)), [_name(f"{name} ({shares['win'].n})") for name, shares in models.items()])
    axes.set_ylim(len(models) - 0.5, -0.6)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    of = f"{numbers.pop()} comparisons" if len(numbers) == 1 else "comparisons"
    axes.set_xlabel(f"share of {of}\n|—|: 95 % interval of the wins", size=9)
    figure.suptitle(title, x=0.01, ha="left", size=11, weight="bold")
    axes.legend(ncols=3, loc="lower right", bbox_to_anchor=(1, 1), frameon=False, borderaxespad=0.2, handlelength=1.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure


@_drawn
def sweep(
    series: Mapping[str, Mapping[float, Estimate]], *, x_label: str, y_label: str, title: str, log_x: bool = False
) -> Figure:
    """Draw a metric against a varied value, with one line per method and 95% intervals.

    Against data quality this is Figure 2 of the ULMA paper; against β (`log_x`) it is Figure 3.

    Args:
        series: method → varied value → metric.
        x_label, y_label, title: labels of the axes and the figure.
        log_x: whether the x-axis is logarithmic.

    Raises:
        ValueError: if there are no points, or if a value on a logarithmic axis is not above 0.
    """
    if not series or not all(series.values()):
        raise ValueError("A figure of a sweep needs a method at least, and a point for each.")
    values = sorted({x for points in series.values() for x in points})
    if log_x and values[0] <= 0:
        raise ValueError(f"A logarithmic axis has no place for {values[0]}: leave it out, or set log_x=False.")
    figure, axes = _single()
    span = np.log(values[-1] / values[0]) if log_x else values[-1] - values[0]
    for i, (name, points) in enumerate(series.items()):
        style = _line_style(i)
        # Shifted, so that intervals do not hide one another
        aside = 0.012 * span * (i - (len(series) - 1) / 2)
        place = {x: x * np.exp(aside) if log_x else x + aside for x in sorted(points)}
        heights = [points[x].value for x in place]
        axes.plot(list(place.values()), heights, label=_name(name), markersize=6, linewidth=1.8, **style)
        known = [(place[x], point.low, point.high) for x in place if (point := points[x]).low is not None]
        if known:
            at, low, high = zip(*known, strict=True)
            axes.vlines(at, low, high, color=style["color"], linewidth=1.2)
    if log_x:
        axes.set_xscale("log")
        axes.set_xticks(values, [f"{x:g}" for x in values])
        axes.minorticks_off()
    _finish(figure, axes, x_label, y_label, title, legend=len(series) > 1)
    return figure


@_drawn
def training_curves(history: Mapping[str, Sequence[Mapping[str, Any]]], metrics: Sequence[str]) -> Figure:
    """Draw what trainers logged against the step, with one panel per metric and one line per run.

    Args:
        history: name of the run → its `trainer.state.log_history`, which `trainer_state.json` also holds.
        metrics: names of logged metrics, such as "loss" and "eval_loss".

    Raises:
        ValueError: if no run has logged a metric.
    """
    columns = min(len(metrics), 2)
    rows = -(-len(metrics) // 2)
    figure = Figure(figsize=(WIDTH, 0.7 + 2.3 * max(rows, 1)), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten() if metrics else []
    for axes, metric in zip(panels, metrics, strict=False):
        lines = {
            _name(run): [(log["step"], log[metric]) for log in logs if metric in log and "step" in log]
            for run, logs in history.items()
        }
        if not any(lines.values()):
            raise ValueError(f"No run has logged {metric}. Leave it out.")
        for i, (run, points) in enumerate(lines.items()):
            if not points:
                continue
            style = _line_style(i)
            every = max(1, len(points) // 8)
            axes.plot(*zip(*points, strict=True), label=run, linewidth=1.6, markersize=5, markevery=every, **style)
        name, (low, high) = metric.rpartition("/")[2], axes.get_ylim()
        least = _LEAST_RANGE if name in _AT_MOST_1 else 0.0
        if name in ("loss", "eval_loss"):
            least = _LEAST_SHARE * abs(low + high) / 2
        wider = max(least - (high - low), 0) / 2
        axes.set_ylim(low - wider, high + wider)
        steps = {step for points in lines.values() for step, _ in points}
        if len(steps) == 1:  # the ticks around a single point would be fractions
            axes.set_xlim(min(steps) - 1, min(steps) + 1)
        axes.set_title(metric, loc="left", size=10)
        axes.set_xlabel("step", size=9)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        _quiet(axes)
    for axes in panels[len(metrics) :]:
        axes.set_axis_off()
    if not metrics:
        raise ValueError("A figure of training curves needs a metric at least.")
    figure.suptitle("Training", x=0.01, ha="left", size=11, weight="bold")
    if len(history) > 1:
        _legend(figure, {line.get_label(): line for axes in panels for line in axes.get_lines()})
    return figure


@_drawn
def label_histogram(label: np.ndarray, is_demonstration: np.ndarray, *, raw: np.ndarray | None = None) -> Figure:
    """Draw how often each label occurs, separately for demonstrations, if there are any, and other rows.

    Args:
        label: `(N,)`.
        is_demonstration: `(N,)` bool.
        raw: `(N,)` labels before the label transform, NaN if unknown; drawn in a second panel. None without a
            transform.

    Raises:
        ValueError: if there are no rows.
    """
    if not len(label):
        raise ValueError("A histogram of labels needs a row at least.")
    if raw is None or not np.isfinite(raw).any():
        figure, axes = _single()
        _draw_labels(axes, label, is_demonstration, named=True)
    else:
        figure = Figure(figsize=(WIDTH + 2, 3.6), layout="constrained")
        before, axes = figure.subplots(1, 2, sharey=True)
        known = np.isfinite(raw)
        _draw_labels(before, raw[known], is_demonstration[known], named=False)
        before.set_xlabel("label in the data")
        before.set_ylabel("number of rows")
        _quiet(before)
        _draw_labels(axes, label, is_demonstration, named=True)
    x_label, y_label = ("label", "number of rows") if raw is None else ("label that is learned", "")
    _finish(figure, axes, x_label, y_label, "Labels", legend=bool(is_demonstration.any()))
    return figure


def _draw_labels(axes: Any, label: np.ndarray, is_demonstration: np.ndarray, *, named: bool) -> None:
    values = np.unique(label)
    few = len(values) <= 12
    if few:
        edges = np.arange(len(values) + 1) - 0.5
        place = np.searchsorted(values, label).astype(float)
        axes.set_xticks(range(len(values)), [f"{value:.6g}" for value in values])
    else:
        edges, place = np.histogram_bin_edges(label, bins=20), label
    parts = [place[is_demonstration], place[~is_demonstration]]
    names = [f"demonstrations ({len(parts[0])})", f"other rows ({len(parts[1])})"]
    kept = [i for i, part in enumerate(parts) if len(part)]
    _, _, bars = axes.hist(
        [parts[i] for i in kept],
        bins=list(edges),
        stacked=True,
        rwidth=0.6 if few else 1.0,
        color=[("#0072B2", "#E69F00")[i] for i in kept],
        label=[names[i] if named else f"_{i}" for i in kept],  # legends omit names with an underscore
        edgecolor=_edge(),
    )
    for i, container in zip(kept, bars if len(kept) > 1 else [bars], strict=True):
        for bar in container:
            bar.set_hatch(("", "//")[i])
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))


@_drawn
def calibration(models: Mapping[str, Sequence[CalibrationBin]], *, own_scale: bool = False) -> Figure:
    """Draw mean label against mean prediction, with one line per model. Calibrated predictions lie on the diagonal.

    Args:
        models: name → bins, from `implicit_reward.calibration_curve`.
        own_scale: whether both axes have the scale of the labels in the data, such as stars; otherwise predictions
            are σ(r).

    Raises:
        ValueError: if there are no models.
    """
    if not models:
        raise ValueError("A figure of calibration needs a model at least.")
    figure, axes = _single(height=5.2)
    ends = [value for bins in models.values() for each in bins for value in (each.predicted, each.observed)]
    low, high = (min(ends), max(ends)) if own_scale else (0.0, 1.0)
    margin = 0.02 if not own_scale else max(high - low, 1e-6) * 0.04
    axes.plot([low, high], [low, high], color=_GUIDE, linewidth=1, label="perfect calibration")
    for i, (name, bins) in enumerate(models.items()):
        predicted, observed = [each.predicted for each in bins], [each.observed for each in bins]
        axes.plot(predicted, observed, label=_name(name), markersize=6, linewidth=1.6, **_line_style(i))
    axes.set_xlim(low - margin, high + margin)
    axes.set_ylim(low - margin, high + margin)
    axes.set_aspect("equal")
    predicted = "predicted label" if own_scale else "σ(r)"
    x_label = f"{predicted}, mean of a tenth of the rows"
    _finish(figure, axes, x_label, "label in the data, mean of these rows", "Calibration", legend=True)
    return figure


@_drawn
def predicted_by_label(
    models: Mapping[str, Sequence[Mapping[str, Any]]], *, labels: Sequence[float] | None = None
) -> Figure:
    """Draw the mean predicted label against the label in the data, with one line per model and 95% intervals.

    If rewards do not depend on the labels, the line is horizontal. If all predictions are right, it is the diagonal.

    Args:
        models: name → `label` and `predicted` of each group of rows, from `findings.on_own_scale`.
        labels: ticks of the x-axis; by default the labels, if they are few.

    Raises:
        ValueError: if there are no models.
    """
    if not models:
        raise ValueError("A figure of predicted labels needs a model at least.")
    figure, axes = _single(height=4.2)
    values = sorted({each["label"] for groups in models.values() for each in groups})
    axes.plot(values, values, color=_GUIDE, linewidth=1, label="perfect prediction")
    aside = 0.01 * (values[-1] - values[0])
    for i, (name, groups) in enumerate(models.items()):
        style = _line_style(i)
        at = [each["label"] + aside * (i - (len(models) - 1) / 2) for each in groups]
        found = [each["predicted"] for each in groups]
        axes.plot(at, [each.value for each in found], label=_name(name), markersize=6, linewidth=1.6, **style)
        known = [(x, each.low, each.high) for x, each in zip(at, found, strict=True) if each.low is not None]
        if known:
            axes.vlines(*zip(*known, strict=True), color=style["color"], linewidth=1.2)
    ticks = labels if labels is not None else values if len(values) <= 10 else None
    if ticks is not None:
        axes.set_xticks(ticks, [f"{value:g}" for value in ticks])
    _finish(figure, axes, "label in the data", "mean predicted label", "Predicted labels", legend=True)
    return figure


def _line_style(i: int) -> dict[str, str]:
    return {
        "color": (COLORS_ON_DARK if _is_dark() else COLORS)[i % len(COLORS)],
        "marker": MARKERS[i % len(MARKERS)],
        "linestyle": LINES[i % len(LINES)],
    }


def _single(height: float = 3.6) -> tuple[Figure, Any]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _quiet(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=_GRID_DARK if _is_dark() else _GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def _finish(figure: Figure, axes: Any, x_label: str, y_label: str, title: str, *, legend: bool) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    figure.suptitle(title, x=0.01, ha="left", size=11, weight="bold")
    _quiet(axes)
    if legend:
        handles, names = axes.get_legend_handles_labels()
        _legend(figure, dict(zip(names, handles, strict=True)))


def _legend(figure: Figure, handles: Mapping[Any, Any]) -> None:
    """A legend below, in as many columns as its names leave room for."""
    ncols = max(1, min(3, 66 // (max(map(len, handles), default=0) + 8)))
    figure.legend(
        handles.values(), handles, loc="outside lower left", ncols=ncols, frameon=False, fontsize=9, handlelength=3
    )
