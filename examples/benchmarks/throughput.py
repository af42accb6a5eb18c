"""python examples/benchmarks/throughput.py --model smollm2 --method sft,dpo,kto,pointwise-dpo,ulma

Measures TRL's trainers and ours on the same rows in one run, in which they take turns (A B C A B C), each through its
own `train()`. Prints and writes, per method, the median step, tokens a second, padding, positions that the policy and
the reference run, peak memory, what is spent around the forwards, and the ratios of the methods to each other.
"""

import functools
import json
import multiprocessing
import os
import platform
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import datasets
import matplotlib
import numpy as np
import psutil
import torch
from datasets import load_from_disk
from floor import FLOORS, Floor
from methods import Settings, World, check_methods
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.utils import logging
from turns import Lap, PeakMemory, Turns, share_freed_memory

# Okabe and Ito's colours, which colour-blind people tell apart; TRL's own trainers are grey
OURS, TRL, LIGHT, DARK = "#0072B2", "#767676", "#56B4E9", "#D55E00"
MEBIBYTE = 2**20


@dataclass
class Options:
    """What is measured, and where it is written."""

    method: str = field(
        default="sft,dpo,kto,pointwise-dpo,ulma",
        metadata={
            "help": "Methods, separated by commas. pointwise-dpo and ulma also with -precomputed, -shared or -packed, "
            "or several of them; dpo and kto with -precomputed. floor and floor-shared: the policy's bare forward and "
            "backward on the real tokens."
        },
    )
    rounds: int = field(default=10, metadata={"help": "Times that each method has its turn, after a first to warm up."})
    steps: int = field(default=1, metadata={"help": "Optimiser steps in a turn."})
    memory: bool = field(default=True, metadata={"help": "Also measure peak memory, each method in its own process."})
    preparation_rows: int = field(default=0, metadata={"help": "Rows to time the preparation with; 0 skips it."})
    output: str = field(
        default="results/throughput", metadata={"help": "Files to write, without .json and .png at the end."}
    )


def measure(world: World, methods: list[str], rounds: int, steps: int) -> dict[str, list[Lap]]:
    """The laps of each method, `rounds × steps`, after a round to warm up.

    Raises:
        RuntimeError: where the methods were not given the same tokens.
    """
    laps: dict[str, list[Lap]] = {method: [] for method in methods}
    share_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        turns = {
            method: _turns(world, method, Path(folder), (rounds + 1) * steps)
            for method in tqdm(methods, desc="Setting up")
        }
        for number in tqdm(range(rounds + 1), desc="Rounds"):
            for method, turn in turns.items():
                made = turn.steps(steps)
                if number > 0:
                    laps[method] += made
        for turn in turns.values():
            turn.finish()
    tokens = {method: [lap["tokens"] for lap in made] for method, made in laps.items()}
    if any(counts != tokens[methods[0]] for counts in tokens.values()):
        raise RuntimeError(f"The methods were not given the same rows: tokens of each step are {tokens}.")
    return laps


def _turns(world: World, method: str, folder: Path, steps: int) -> Turns | Floor:
    if method in FLOORS:
        return Floor(world, method, folder, steps)
    return Turns(world.trainer(method, folder, steps), world.settings.threads)


def peak_memory(settings: Settings, method: str, steps: int) -> dict[str, int]:
    """Bytes in use before the method's first step, and at most in `steps` steps."""
    be_quiet()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    with tempfile.TemporaryDirectory() as folder:
        trainer = World(settings).trainer(method, Path(folder), steps)
        memory = PeakMemory()
        trainer.add_callback(memory)
        trainer.train()
    return {"before": memory.before, "peak": memory.peak}


def peak_memories(settings: Settings, methods: list[str], steps: int) -> dict[str, dict[str, int]]:
    """`peak_memory` of each trainer, each in a new process."""
    # glibc gives memory back at once only above a threshold, which grows unless it is set
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "131072")
    context, found = multiprocessing.get_context("spawn"), {}
    for method in tqdm([method for method in methods if method not in FLOORS], desc="Peak memory"):
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            found[method] = pool.submit(peak_memory, settings, method, steps).result()
    return found


def time_preparation(world: World, count: int, repeats: int = 9) -> dict[str, Any]:
    """Seconds of our preparation, of TRL's for KTO, and of the tokenizer alone on the texts that ours tokenizes.

    They take turns, on new files, so that nothing is cached.
    """
    pairs = world.make_pairs(count // 2)
    # As ours: each prompt, and each prompt with its completion, once
    ends = ("", *(f"{{{half}}}{world.tokenizer.eos_token}" for half in ("chosen", "rejected")))
    texts = list(dict.fromkeys(pair["prompt"] + end.format_map(pair) for pair in pairs for end in ends))
    encode = world.tokenizer.backend_tokenizer.encode_batch_fast
    spent: dict[str, dict[str, list[float]]] = {way: {"cpu": [], "wall": []} for way in ("kto", "ulma", "tokenizer")}
    with tempfile.TemporaryDirectory() as folder:
        trainers = {method: world.trainer(method, Path(folder), 1) for method in ("kto", "ulma")}
        for number in tqdm(range(repeats), desc="Preparation"):
            for method, trainer in trainers.items():
                path = str(Path(folder) / f"rows-{method}-{number}")
                world.rows_for(method, pairs).save_to_disk(path)
                rows = load_from_disk(path)
                prepare = functools.partial(trainer._prepare_dataset, rows, trainer.processing_class, trainer.args)
                _time(functools.partial(prepare, "train"), spent[method])
            _time(functools.partial(encode, texts, add_special_tokens=False), spent["tokenizer"])
    return {"rows": 2 * len(pairs), "texts": len(texts), "seconds": spent}


def _time(call: Callable[[], object], spent: dict[str, list[float]]) -> None:
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    spent["cpu"].append(time.process_time() - cpu)
    spent["wall"].append(time.perf_counter() - wall)


def ratio(laps: list[float], others: list[float], steps: int = 1) -> tuple[float, float, float]:
    """(median, 2.5th, 97.5th percentile) over the rounds of `laps` to `others`.

    Args:
        laps: seconds of each step, round by round.
        others: of another method, on the same batches.
        steps: of a round.
    """
    a, b = (np.array(values).reshape(-1, steps).sum(1) for values in (laps, others))
    low, median, high = np.percentile(a / b, [2.5, 50, 97.5])
    return float(median), float(low), float(high)


def summary(result: dict[str, Any], method: str) -> dict[str, float]:
    """A method's figures: medians of seconds a step, sums of positions over all steps, shares."""
    laps = {name: np.array([lap.get(name, 0) for lap in result["laps"][method]]) for name in _FIGURES}
    policy, tokens = laps["policy"].sum(), laps["tokens"].sum()
    found = {name: float(np.median(laps[name])) for name in ("cpu", "wall")}
    found |= {name: float(laps[name].mean()) for name in ("policy", "policy_no_grad", "reference", "tokens")}
    found["padding"] = float(laps["padding"].sum() / policy)
    found["tokens_per_second"] = float(tokens / laps["wall"].sum())
    found["tokens_per_cpu_second"] = float(tokens / laps["cpu"].sum())
    found["around"] = float(np.median(laps["around"]))
    found["around_share"] = float(laps["around"].sum() / laps["thread"].sum())
    if method in result["memory"]:
        found |= result["memory"][method]
    return found


_FIGURES = ("cpu", "wall", "thread", "around", "policy", "policy_no_grad", "reference", "padding", "tokens")


def describe(script: str, arguments: list[str], world: World) -> dict[str, Any]:
    """The command, settings, machine, versions and rows of a run; files that lie elsewhere by their names alone."""
    settings = world.settings
    settled = asdict(settings) | {"cache_dir": ""}
    names = ("trl-ulma", "trl", "transformers", "torch", "peft", "datasets", "accelerate")
    lengths = [
        [len(ids) for ids in world.tokenizer([pair[name] for pair in world.pairs])["input_ids"]]
        for name in ("prompt", "chosen", "rejected")
    ]
    return {
        "command": f"python examples/benchmarks/{script}.py {shlex.join(map(_named, arguments))}",
        "settings": {name: _named(value) if isinstance(value, str) else value for name, value in settled.items()},
        "machine": {
            "processor": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
            "is_gpu": torch.cuda.is_available(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threads": settings.threads or torch.get_num_threads(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30),
            "system": platform.system(),
        },
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in names}},
        "rows": {
            "count": 2 * len(world.pairs),
            "prompt_tokens": float(np.mean(lengths[0])),
            "completion_tokens": float(np.mean(lengths[1] + lengths[2])) + 1,
        },
    }


def _named(argument: str) -> str:
    """An argument, of an absolute path its last part."""
    return Path(argument).name if Path(argument).is_absolute() else argument


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def table(result: dict[str, Any]) -> str:
    """The methods' figures, one method a line."""
    head = f"{'method':<26}{'CPU s':>8}{'wall s':>8}{'tokens/s':>10}{'padding':>9}{'policy':>8}{'no grad':>9}"
    head += f"{'reference':>11}{'around':>9}{'peak MiB':>10}{'above start':>12}"
    lines = [head]
    for method in result["laps"]:
        found = summary(result, method)
        line = f"{method:<26}{found['cpu']:>8.3f}{found['wall']:>8.3f}{found['tokens_per_second']:>10.0f}"
        line += f"{found['padding']:>9.1%}{found['policy']:>8.0f}{found['policy_no_grad']:>9.0f}"
        line += f"{found['reference']:>11.0f}{found['around_share']:>9.2%}"
        if "peak" in found:
            line += f"{found['peak'] / MEBIBYTE:>10.0f}{(found['peak'] - found['before']) / MEBIBYTE:>12.0f}"
        lines.append(line)
    return "\n".join(lines)


def ratio_table(result: dict[str, Any], clock: str = "cpu") -> str:
    """Each method's step to each other's: the median of the rounds, and where 95 % of them lie."""
    methods, steps = list(result["laps"]), result["options"]["steps"]
    laps = {method: [lap[clock] for lap in result["laps"][method]] for method in methods}
    lines = [f"{'ratio of ' + clock + ' time':<26}" + "".join(f"{'to ' + other:>26}" for other in methods)]
    for method in methods:
        cells = []
        for other in methods:
            median, low, high = ratio(laps[method], laps[other], steps)
            cells.append(f"{median:.2f} [{low:.2f}, {high:.2f}]" if method != other else "")
        lines.append(f"{method:<26}" + "".join(f"{cell:>26}" for cell in cells))
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    """A picture of the seconds a step, the positions that are run, and the memory above the start."""
    from matplotlib import pyplot

    methods = list(result["laps"])
    found = {method: summary(result, method) for method in methods}
    places = np.arange(len(methods))
    colors = [OURS if method.startswith(("ulma", "pointwise")) else TRL for method in methods]
    size = (13 if result["memory"] else 9, 1.4 + 0.42 * len(methods))
    columns = 3 if result["memory"] else 2
    figure, (time_axes, run_axes, *more) = pyplot.subplots(1, columns, figsize=size, sharey=True, layout="constrained")
    clock = "wall" if result["machine"]["is_gpu"] else "cpu"
    laps = [[lap[clock] for lap in result["laps"][method]] for method in methods]
    middle = np.array([np.median(each) for each in laps])
    quartiles = np.array([np.percentile(each, [25, 75]) for each in laps])
    spread = np.abs(quartiles - middle[:, None])
    bars = time_axes.barh(places, middle, xerr=spread.T, color=colors, error_kw={"elinewidth": 1.2, "capsize": 3})
    time_axes.bar_label(bars, [f"{value:.2f}" for value in middle], padding=8, fontsize=9)
    time_axes.set_xlabel(f"{clock.replace('cpu', 'CPU')} seconds a step: median, quartiles")

    left = np.zeros(len(methods))
    parts = {"policy": ("policy, with backward", OURS), "policy_no_grad": ("policy, forward only", LIGHT)}
    for name, (label, color) in {**parts, "reference": ("reference", DARK)}.items():
        width = np.array([found[method][name] for method in methods])
        run_axes.barh(places, width, left=left, color=color, label=label)
        left += width
    run_axes.set_xlabel("positions run a step")
    run_axes.legend(fontsize=8, loc="lower right")

    for axes in more:
        above = [(found[method]["peak"] - found[method]["before"]) / MEBIBYTE for method in methods]
        bars = axes.barh(places, above, color=colors)
        axes.bar_label(bars, [f"{value:.0f}" for value in above], padding=3, fontsize=9)
        axes.set_xlabel("peak memory above the start, MiB")
    for axes in (time_axes, run_axes, *more):
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.16)
    time_axes.set_yticks(places, methods)
    time_axes.invert_yaxis()
    rows = result["rows"]
    figure.suptitle(
        f"{Path(result['settings']['model']).name}, {result['settings']['batch_size']} rows a step, "
        f"{rows['prompt_tokens']:.0f} + {rows['completion_tokens']:.0f} tokens on average",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def be_quiet() -> None:
    """Leave out what libraries say, which is not about the benchmark."""
    warnings.filterwarnings("ignore")  # deprecations among these libraries, hundreds of lines between the figures
    datasets.disable_progress_bars()
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark with these arguments of the command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = HfArgumentParser((Settings, Options), description=__doc__)
    settings, options = parser.parse_args_into_dataclasses(args=arguments)
    methods = options.method.split(",")
    matplotlib.use("Agg")
    be_quiet()
    try:
        check_methods([method for method in methods if method not in FLOORS])
        world = World(settings)
    except ValueError as error:
        parser.error(str(error))
    result = {
        "benchmark": "throughput",
        "options": asdict(options) | {"output": ""},
        **describe("throughput", arguments, world),
    }
    print(json.dumps(result, indent=2))
    result["memory"] = peak_memories(settings, methods, options.rounds * options.steps) if options.memory else {}
    result["laps"] = measure(world, methods, options.rounds, options.steps)
    count = options.preparation_rows
    result["preparation"] = time_preparation(world, count) if count else {}

    print(table(result), ratio_table(result), sep="\n\n")
    if count:
        spent = result["preparation"]["seconds"]
        for clock in ("cpu", "wall"):
            for way, name in (("kto", "KTO's"), ("tokenizer", "the tokenizer's alone")):
                median, low, high = ratio(spent[way][clock], spent["ulma"][clock])
                print(f"\npreparation, rows a {clock} second, ours to {name}: {median:.2f} [{low:.2f}, {high:.2f}]")
    path = Path(options.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{path}.json").write_text(json.dumps(result), encoding="utf-8")
    draw(result, Path(f"{path}.png"))
    print(f"\nWritten: {path}.json, {path}.png")


if __name__ == "__main__":
    main()
