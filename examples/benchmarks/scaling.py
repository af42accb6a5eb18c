"""python examples/benchmarks/scaling.py --model smollm2 --lengths 128,256,512,1024 --batch_sizes 2,4,8 --shares 0,0.5,1

Measures how step time and peak memory grow with the sequence's length, the batch and the share of demonstrations, one
at a time. At each point the methods take turns on the same rows, as in throughput.py. For long sequences on a CPU,
`--layers 4` keeps the model's first four layers.
"""

import gc
import itertools
import json
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from methods import Settings, World, check_methods
from throughput import MEBIBYTE, be_quiet, describe, measure, peak_memories, summary
from tqdm import tqdm
from transformers import HfArgumentParser

# Okabe and Ito's colors, which color-blind people tell apart
COLORS = ("#767676", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00")
MARKERS = "osD^vP"
AXES = {"length": "tokens a row", "batch_size": "rows a step", "demonstrations": "share of demonstrations"}


@dataclass
class Options:
    """The points that are measured, and where they are written."""

    lengths: str = field(default="128,256,512,1024", metadata={"help": "Tokens a row, a quarter of them completion."})
    batch_sizes: str = field(default="2,4,8", metadata={"help": "Rows a step."})
    shares: str = field(default="0,0.25,0.5,0.75,1", metadata={"help": "Of demonstrations."})
    method: str = field(default="sft,dpo,ulma", metadata={"help": "As in throughput.py."})
    rounds: int = field(default=3, metadata={"help": "Steps of each method at a point, after one to warm up."})
    memory: bool = field(default=True, metadata={"help": "Also measure peak memory, each method in its own process."})
    output: str = field(default="results/scaling", metadata={"help": "Files to write, without .json and .png."})


def points(settings: Settings, options: Options) -> list[tuple[str, float, Settings]]:
    """(axis, value, settings) of each point; rows of one length, enough of them that no step repeats any."""

    def at(**changes: Any) -> Settings:
        changed = replace(settings, data="synthetic", spread=0, **changes)
        return replace(changed, rows=changed.batch_size * (options.rounds + 1))

    def numbers(text: str) -> list[float]:
        return [float(value) for value in text.split(",") if value]

    lengths = [int(value) for value in numbers(options.lengths)]
    found: list[tuple[str, float, Settings]] = []
    # A word can have several tokens, so that a row can be a few tokens longer
    found += [("length", n, at(prompt_tokens=n - n // 4, completion_tokens=n // 4, max_length=n + 64)) for n in lengths]
    found += [("batch_size", size, at(batch_size=int(size))) for size in numbers(options.batch_sizes)]
    found += [("demonstrations", share, at(demonstrations=share)) for share in numbers(options.shares)]
    return found


def growth(result: dict[str, Any], axis: str, method: str) -> list[float]:
    """The power of the value by which a method's CPU time grows, from each point of an axis to the next."""
    found = [point for point in result["points"] if point["axis"] == axis]
    at = sorted((point["value"], point["methods"][method]["cpu"]) for point in found)
    return [float(np.log(c / b) / np.log(y / x)) for (x, b), (y, c) in itertools.pairwise(at)]


def draw(result: dict[str, Any], path: Path) -> None:
    """A picture of the step's seconds and the memory above the start, over each axis."""
    from matplotlib import pyplot

    clock = "wall" if result["machine"]["is_gpu"] else "cpu"
    axes_of = [axis for axis in AXES if any(point["axis"] == axis for point in result["points"])]
    lines = 2 if result["options"]["memory"] else 1
    figure, grid = pyplot.subplots(
        lines, len(axes_of), figsize=(4.2 * len(axes_of), 3.1 * lines), squeeze=False, layout="constrained"
    )
    for column, axis in enumerate(axes_of):
        at = sorted((point for point in result["points"] if point["axis"] == axis), key=lambda point: point["value"])
        values = [point["value"] for point in at]
        for number, method in enumerate(at[0]["methods"]):
            found = [point["methods"][method] for point in at]
            heights = [[each[clock] for each in found]]
            if lines == 2:
                heights.append([(each["peak"] - each["before"]) / MEBIBYTE for each in found])
            for axes, height in zip(grid[:, column], heights, strict=True):
                style = {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)]}
                axes.plot(values, height, label=method, markersize=5, **style)
        for axes in grid[:, column]:
            axes.set_xlabel(AXES[axis])
            axes.spines[["top", "right"]].set_visible(False)
            if axis != "demonstrations":
                axes.set_xscale("log", base=2)
                axes.set_yscale("log", base=2)
                axes.set_xticks(values, [f"{value:g}" for value in values])
                axes.yaxis.set_major_formatter("{x:g}")
            else:
                axes.set_ylim(bottom=0)
        grid[0, column].set_ylabel(f"{clock.replace('cpu', 'CPU')} seconds a step")
        if lines == 2:
            grid[1, column].set_ylabel("peak memory above the start, MiB")
    grid[0, 0].legend(fontsize=9, frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark with these arguments of the command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = HfArgumentParser((Settings, Options), description=__doc__)
    settings, options = parser.parse_args_into_dataclasses(args=arguments)
    methods = options.method.split(",")
    matplotlib.use("Agg")
    be_quiet()
    todo = points(settings, options)
    try:
        check_methods(methods)
        if not todo:
            raise ValueError("There is no point to measure: give --lengths, --batch_sizes or --shares.")
        first, *_ = [World(each) for _, _, each in todo]
    except ValueError as error:
        parser.error(str(error))
    settled = asdict(options) | {"output": ""}
    result = {"benchmark": "scaling", "options": settled, **describe("scaling", arguments, first)}
    print(json.dumps(result, indent=2))
    result["points"] = []
    for axis, value, each in tqdm(todo, desc="Points"):
        memory = peak_memories(each, methods, options.rounds) if options.memory else {}
        point = {"laps": measure(World(each), methods, options.rounds, 1), "memory": memory}
        found = {method: summary(point, method) for method in methods}
        result["points"].append({"axis": axis, "value": value, "methods": found})
        seconds = ", ".join(f"{method} {found[method]['cpu']:.2f}" for method in methods)
        tqdm.write(f"{AXES[axis]} {value:g}: CPU seconds a step: {seconds}")
        gc.collect()
    path = Path(options.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{path}.json").write_text(json.dumps(result), encoding="utf-8")
    draw(result, Path(f"{path}.png"))
    print(f"\nWritten: {path}.json, {path}.png")


if __name__ == "__main__":
    main()
