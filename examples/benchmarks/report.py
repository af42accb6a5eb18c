"""python examples/benchmarks/report.py examples/benchmarks/results/*.json > examples/benchmarks/RESULTS.md

Writes the results of throughput.py and scaling.py as a page: the targets beside what was measured, the tables, the
pictures, and what bounds each end of the scaling curves.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from scaling import AXES, growth
from throughput import MEBIBYTE, ratio, summary

Result = dict[str, Any]

# (what is compared, a method, the one it is compared with, the ratio it is to have at most, whether on HH pairs)
STEP_TARGETS = (
    ("ULMA, half demonstrations, LoRA : TRL KTO", "ulma", "kto", 0.40, False),
    ("ULMA, half demonstrations, LoRA : TRL DPO", "ulma", "dpo", 0.65, False),
    ("ULMA with precomputed reference : TRL SFT", "ulma-precomputed", "sft", 0.75, False),
    ("pointwise DPO : TRL DPO on the same rows", "pointwise-dpo", "dpo", 0.75, False),
    ("ULMA with shared prompts : TRL DPO, HH pairs", "ulma-shared", "dpo", 0.43, True),
    (
        "ULMA with shared prompts and precomputed reference : floor",
        "ulma-shared-precomputed",
        "floor-shared",
        1.15,
        True,
    ),
)
INTRODUCTION = """\
# Benchmarks

`report.py` wrote this page from the JSON files beside the pictures. In a run, all methods get the same rows in the same
order and take turns, one step or a few at a time, each through its own trainer's `train()`. The first turn warms up. A
step includes collation, metrics and logging. Ratios are taken round by round: the median, and in brackets the range of
95 % of the rounds. CPU time is that of all threads of the process. `around` is the time of the training thread in
`compute_loss` and in fetching the batch, minus the models' forwards. Memory is measured with each method in a process
of its own: how far the peak is above what is in use before the first step. `floor` is the policy's bare forward and
backward on the step's real tokens: each row alone, without padding, the head on scored positions only, no reference,
metric, optimizer or log. `floor-shared` is the same with each prompt run once for all its completions. Except for
`hh` and `preparation`, the machine was not idle, so compare ratios, not times of different runs. `scaling` was measured
before the package got its own LM head. llama-1b is a Llama of that shape with random weights. A remark above a table,
of what the run could not know, was written by hand into its JSON file.
"""
PREPARATION = """\
Why preparation misses its target: most of it is the tokenizer, which both trainers call. KTO's tokenizes two texts per
row, the prompt and the whole. Ours tokenizes each text once, in batches, which is one and a half texts per row for HH
pairs. In a profile (3,000 rows of HH, one thread), `encode_batch_fast` is four fifths of our time, the identity of the
tokenizer, which the cache needs, a twentieth, and the rest is spread over checks, rendering and Arrow. On one core,
little but the tokenizer is left to save. On several cores, its batches run in parallel.
"""

# The power of growth from which on it counts as proportional
PROPORTIONAL = 0.9


def clock_of(result: Result) -> str:
    """The clock that counts: CPU time without a GPU, since machines are noisy."""
    return "wall" if result["machine"]["is_gpu"] else "cpu"


def judged(measured: str, is_met: bool) -> str:
    """A measured value with whether it meets its target."""
    return f"{measured} {'met' if is_met else '**missed**'}"


def compared(result: Result, method: str, other: str, most: float) -> str | None:
    """The ratio of two methods' steps, and whether it is at most `most`; None where one was not measured whole."""
    # A model cut to its first layers is mostly its head, which says little of the whole
    if method not in result["laps"] or other not in result["laps"] or result["settings"]["layers"]:
        return None
    laps = [[lap[clock_of(result)] for lap in result["laps"][name]] for name in (method, other)]
    median, low, high = ratio(*laps, result["options"]["steps"])
    return judged(f"{median:.2f} [{low:.2f}, {high:.2f}]", median <= most)


def memory(result: Result) -> str | None:
    """The ratio of ULMA's peak memory to DPO's, above the start."""
    above = {method: found["peak"] - found["before"] for method, found in result["memory"].items()}
    if not above.keys() >= {"ulma", "dpo"}:
        return None
    found = above["ulma"] / above["dpo"]
    whole = result["memory"]["ulma"]["peak"] / result["memory"]["dpo"]["peak"]
    return judged(f"{found:.2f} (whole process {whole:.2f})", found <= 0.7)


def preparation(result: Result, way: str = "kto", least: float = 2) -> str | None:
    """The ratio of our rows a second to KTO's, or to those of the tokenizer alone."""
    if not result["preparation"]:
        return None
    spent = result["preparation"]["seconds"]
    median, low, high = ratio(spent[way]["cpu"], spent["ulma"]["cpu"])
    wall, *_ = ratio(spent[way]["wall"], spent["ulma"]["wall"])
    return judged(f"{median:.2f} [{low:.2f}, {high:.2f}] (wall {wall:.2f})", median >= least)


def around(result: Result) -> str | None:
    """The share of ULMA's step that is spent around the forwards."""
    if "ulma" not in result["laps"] or result["settings"]["layers"]:
        return None
    found = summary(result, "ulma")
    return judged(f"{found['around_share']:.2%} ({found['around'] * 1e3:.1f} ms)", found["around_share"] <= 0.01)


def packed(result: Result) -> str | None:
    """The ratio of ULMA's tokens a second without padding to those with it, on a GPU."""
    if not result["machine"]["is_gpu"] or not {"ulma", "ulma-packed"} <= set(result["laps"]):
        return None
    speeds = [summary(result, method)["tokens_per_second"] for method in ("ulma-packed", "ulma")]
    return judged(f"{speeds[0] / speeds[1]:.2f}", speeds[0] >= 1.4 * speeds[1])


def targets(runs: dict[str, Result]) -> str:
    """The table of targets, a column a run."""
    lines = [f"| | target | {' | '.join(runs)} |", f"|---|---|{'---|' * len(runs)}"]

    def line(what: str, target: str, measure: Callable[[Result], str | None]) -> None:
        lines.append(f"| {what} | {target} | {' | '.join(measure(result) or '–' for result in runs.values())} |")

    for what, method, other, most, on_pairs in STEP_TARGETS:

        def step(result: Result, names=(method, other, most), on_pairs=on_pairs) -> str | None:
            return None if on_pairs and result["settings"]["data"] != "hh" else compared(result, *names)

        line(what, f"≤ {most:.2f}", step)
    line("peak memory, ULMA : TRL DPO", "≤ 0.70", memory)
    line("preparation rows/s, one process : TRL KTO's", "≥ 2", preparation)
    bare = partial(preparation, way="tokenizer", least=0.9)
    line("preparation rows/s, one process : the tokenizer alone on the same texts", "≥ 0.9", bare)
    line("our Python around the forwards, share of a step", "≤ 1 %", around)
    line("padding-free : padded, HH lengths, batch 16, GPU, tokens/s", "≥ 1.4", packed)
    return "\n".join(lines)


def facts(result: Result) -> str:
    """The command, the machine, the versions and the rows of a run."""
    machine, rows, settings = result["machine"], result["rows"], result["settings"]
    layers = f" (first {settings['layers']} layers)" if settings["layers"] else ""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    lora = f"LoRA of rank {settings['lora_rank']}" if settings["lora_rank"] else "all weights trained"
    return (
        f"`{result['command']}`\n\n"
        f"{machine['processor']}, {machine['threads']} of {machine['cores']} cores, {machine['memory_gib']} GiB, "
        f"{machine['system']}; {versions}. {settings['model']}{layers}, weights in {settings['dtype']}, autocast to "
        f"bf16 {'on' if settings['bf16'] else 'off'}, {settings['attn_implementation']} attention, gradient "
        f"checkpointing {'on' if settings['gradient_checkpointing'] else 'off'}, {lora}, a log every "
        f"{settings['logging_steps']} steps, seed {settings['seed']}. {rows['count']} rows, "
        f"{settings['batch_size']} a step, prompts of {rows['prompt_tokens']:.0f} and completions of "
        f"{rows['completion_tokens']:.0f} tokens on average, {settings['demonstrations']:.0%} demonstrations for ULMA."
    )


def throughput_page(name: str, result: Result) -> str:
    """The table and picture of a run of throughput.py."""
    head = ("method", "CPU s a step", "wall s a step", "tokens/s", "tokens/CPU s", "padding", "policy", "forward only")
    head += ("reference", "around", "× floor", "peak MiB", "above start")
    lines = [f"| {' | '.join(head)} |", f"|---|{'--:|' * (len(head) - 1)}"]
    for method in result["laps"]:
        found = summary(result, method)
        cells = [method, f"{found['cpu']:.3g}", f"{found['wall']:.3g}"]
        cells += [f"{found['tokens_per_second']:.0f}", f"{found['tokens_per_cpu_second']:.0f}"]
        cells += [f"{found['padding']:.1%}"]
        cells += [f"{found[run]:.0f}" for run in ("policy", "policy_no_grad", "reference")]
        cells += [f"{found['around_share']:.2%}", to_floor(result, method)]
        has_memory = "peak" in found
        cells += [f"{found['peak'] / MEBIBYTE:.0f}" if has_memory else "–"]
        cells += [f"{(found['peak'] - found['before']) / MEBIBYTE:.0f}" if has_memory else "–"]
        lines.append(f"| {' | '.join(cells)} |")
    note = (
        "Medians per step. `policy`, `forward only` and `reference` are positions per step: run by the policy with a "
        "backward, by the policy without one, and by the reference. `padding` is the padding among the first. "
        "`× floor`: of the same layout's floor."
    )
    table = "\n".join(lines)
    remark = f"{result['remark']}\n\n" if "remark" in result else ""
    return f"## {name}\n\n{facts(result)}\n\n{remark}{table}\n\n{note}\n\n![{name}](results/{name}.png)\n"


def to_floor(result: Result, method: str) -> str:
    """How many times its layout's floor a method's step takes; a dash where that is not measured."""
    floor = "floor-shared" if "shared" in method else "floor"
    if floor not in result["laps"] or method == floor:
        return "–"
    laps = [[lap[clock_of(result)] for lap in result["laps"][name]] for name in (method, floor)]
    median, low, high = ratio(*laps, result["options"]["steps"])
    return f"{median:.2f} [{low:.2f}, {high:.2f}]"


def scaling_page(name: str, result: Result) -> str:
    """The tables and picture of a run of scaling.py, and what bounds each end of the curves."""
    parts = [f"## {name}", facts(result), f"![{name}](results/{name}.png)"]
    for axis, label in AXES.items():
        points = [point for point in result["points"] if point["axis"] == axis]
        if not points:
            continue
        methods = list(points[0]["methods"])
        head = [label, *(f"{method}, CPU s" for method in methods)]
        has_memory = "peak" in points[0]["methods"][methods[0]]
        head += [f"{method}, MiB above start" for method in methods if has_memory]
        lines = [f"| {' | '.join(head)} |", f"|{'--:|' * len(head)}"]
        for point in points:
            found = point["methods"]
            cells = [f"{point['value']:g}", *(f"{found[method]['cpu']:.3g}" for method in methods)]
            if has_memory:
                cells += [f"{(found[method]['peak'] - found[method]['before']) / MEBIBYTE:.0f}" for method in methods]
            lines.append(f"| {' | '.join(cells)} |")
        parts += ["\n".join(lines), bounds(result, axis, points)]
    return "\n\n".join(parts) + "\n"


def bounds(result: Result, axis: str, points: list[dict[str, Any]]) -> str:
    """What bounds each end of an axis's curve, with the numbers that say so."""
    last = next(reversed(points[0]["methods"]))
    first_point, last_point = points[0]["methods"][last], points[-1]["methods"][last]
    if axis == "demonstrations":
        saved = 1 - last_point["cpu"] / first_point["cpu"]
        return (
            f"From the first share to the last, {last}'s step becomes {saved:.0%} shorter, and the reference's "
            f"positions fall from {first_point['reference']:.0f} to {last_point['reference']:.0f} per step. Without "
            "demonstrations, both models' forwards bound the step. With nothing else, the policy's forward and "
            "backward bound it, as in SFT."
        )
    if len(points) < 3:
        return ""
    powers = growth(result, axis, last)
    start = (
        f"{last}'s step grows by the power {powers[0]:.2f} from {points[0]['value']:g} to {points[1]['value']:g}, and "
        f"by {powers[-1]:.2f} from {points[-2]['value']:g} to {points[-1]['value']:g}."
    )
    products = "the matrix products, of which the LM head's are most where a model is cut to a few layers"
    alike = f"what every step costs alike (around the forwards {first_point['around_share']:.1%} of it)"
    # Where cost is in proportion to the value from the start, nothing else counts
    low = f"not by {alike} but by {products}" if powers[0] > PROPORTIONAL else f"by {alike}"
    high = "attention, which is quadratic in the length" if powers[-1] > 2 - PROPORTIONAL else products
    return f"{start} The low end is bound {low}; the high end by {high}."


def main(paths: list[str]) -> None:
    """Print the page of these JSON files."""
    results = {Path(path).stem: json.loads(Path(path).read_text(encoding="utf-8")) for path in paths}
    runs = {name: result for name, result in results.items() if result["benchmark"] == "throughput"}
    parts = [INTRODUCTION]
    if runs:
        parts += ["## Targets\n", targets(runs), ""]
        parts += [PREPARATION] if any("missed" in (preparation(run) or "") for run in runs.values()) else []
    pages = {"throughput": throughput_page, "scaling": scaling_page}
    parts += [pages[result["benchmark"]](name, result) for name, result in results.items()]
    print("\n".join(parts))


if __name__ == "__main__":
    main(sys.argv[1:])
