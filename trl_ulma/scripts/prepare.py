r"""Turn a dataset of a known kind into rows that every trainer here takes, and count what became of it.

    trl-ulma prepare hh --dataset hh_harmless.jsonl.gz --output hh          # hh/train.parquet and hh/test.parquet
    trl-ulma prepare qa-feedback --dataset dev_feedback.json --output qa.jsonl --passages cited --report qa.json
    trl-ulma prepare --detect --dataset data.jsonl                          # which family is this?

Every answer of the input is a row of the output, or is counted with the reason why it is not.
"""

import argparse
import difflib
import importlib.util
import json
import sys
import textwrap
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_ulma.data.adapters import FAMILIES, find
from trl_ulma.data.directions import noted_direction
from trl_ulma.data.names import Names
from trl_ulma.scripts.command_line import CommandParser, add_verbose, attempt, terminal_width

if TYPE_CHECKING:
    from datasets import Dataset

    from trl_ulma.data.convert import Account

PROG = "trl-ulma prepare"
INPUT = ("--dataset", "--input")
TEST_SIZE = 0.1
SEED = 42


def help_text() -> str:
    """What `trl-ulma prepare --help` prints."""
    column = max(map(len, FAMILIES)) + 4
    families = [
        line
        for name, (_, what) in FAMILIES.items()
        for line in textwrap.wrap(f"  {name}".ljust(column) + what, terminal_width(), subsequent_indent=" " * column)
    ]
    return "\n".join(
        [
            f"usage: {PROG} FAMILY --dataset DATA --output FOLDER|FILE [options]",
            "",
            *textwrap.wrap(
                "Turn a dataset into rows that every trainer here takes, and count what is left out, with the reason.",
                terminal_width(),
            ),
            "",
            "families:",
            *families,
            "",
            f"{PROG} FAMILY --help shows a family's options.",
            f"{PROG} --detect --dataset DATA says which families read a dataset.",
        ]
    )


def make_parser(prog: str = PROG) -> argparse.ArgumentParser:
    """The whole command: a sub-command for each family."""
    parser = CommandParser(prog=prog)
    families = parser.add_subparsers(dest="family")
    for family, (_, what) in FAMILIES.items():
        families.add_parser(family, parents=[family_parser(family)], add_help=False, help=what)
    return parser


def family_parser(family: str) -> CommandParser:
    """The options of a family in `FAMILIES`."""
    parser = CommandParser(
        prog=f"{PROG} {family}",
        usage=f"{PROG} {family} --dataset DATA --output FOLDER|FILE [options]",
        description=FAMILIES[family][1] + ".",
    )
    parser.add_argument(
        *INPUT,
        dest="input",
        metavar="DATA",
        required=True,
        help="a .jsonl[.gz], .json[.gz], .csv, .tsv or .parquet file, a folder, or a name on the Hub",
    )
    parser.add_argument(
        "--output",
        required=True,
        help="a folder, for train.parquet and test.parquet; or a .parquet or .jsonl file, for all rows",
    )
    _add_reading_options(parser, maps_labels=_maps_labels(family))
    parser.add_argument(
        "--test_size",
        type=_test_size,
        help=f"size of the test part, split by prompt: a fraction, a number of rows, or 0 (default: {TEST_SIZE})",
    )
    parser.add_argument("--seed", type=int, help=f"random seed of the test part (default: {SEED})")
    parser.add_argument(
        "--alternating",
        action="store_true",
        help="leave out conversations in which one speaker has two turns in a row, which some chat templates refuse",
    )
    parser.add_argument("--report", type=Path, help="also write the counts and figures to this JSON file")
    add_verbose(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there already")
    group = parser.add_argument_group(f"options of {family}")
    for flag, arguments in find(family).options.items():
        group.add_argument(flag, **arguments)
    return parser


def _maps_labels(family: str) -> bool:
    """Whether the rows of a family can have labels of their own, in a column `label` or elsewhere."""
    adapter = find(family)
    return adapter.maps_labels or adapter.rated == family or any("label" in layout for layout in adapter.needs)


def _add_reading_options(parser: argparse.ArgumentParser, *, maps_labels: bool) -> None:
    parser.add_argument(
        "--dataset_config", "--config", dest="config", help="configuration of a dataset that has several"
    )
    parser.add_argument("--split", help="the split to read (default: train, or the only one)")
    parser.add_argument("--columns", help="names of the columns in your data: prompt=question,chosen=better")
    parser.set_defaults(label_map=None)
    if maps_labels:
        parser.add_argument("--label_map", help="numbers for labels that are words: up=1,down=0")
    parser.add_argument(
        "--invalid_rows",
        default="error",
        choices=("error", "drop"),
        help="list the lines that cannot be read and stop, or leave them out and count them (default: error)",
    )


def _test_size(text: str) -> float:
    size = float(text)
    if not (0 <= size < 1 or (size >= 1 and size == int(size))):
        raise argparse.ArgumentTypeError(f"{text} is neither a fraction from 0 to 1 nor a whole number of rows")
    return size


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit code: 2 for a wrong command, 1 for input that cannot be used."""
    argv = list(sys.argv[1:] if argv is None else argv)
    family, *rest = argv or ["--help"]
    if family in ("-h", "--help"):
        print(help_text(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if "--detect" in argv:
        return detect([word for word in argv if word != "--detect"])
    if family not in FAMILIES:
        near = difflib.get_close_matches(family, FAMILIES, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"They are {', '.join(FAMILIES)}."
        print(f"{PROG}: error: {family} is not a family of datasets. {hint}", file=sys.stderr)
        return 2
    parser = family_parser(family)
    args = parser.parse_args(rest)
    try:
        _files(args)
    except ValueError as problem:
        parser.error(str(problem))
    return attempt(parser, lambda: show(run(family, args)))


def detect(argv: Sequence[str]) -> int:
    """Print which families read a dataset, the likeliest first, and return the exit code."""
    parser = CommandParser(prog=f"{PROG} --detect", description="Show which families read a dataset.")
    parser.add_argument(
        *INPUT, dest="input", metavar="DATA", required=True, help="a file, a folder, or a name on the Hub"
    )
    _add_reading_options(parser, maps_labels=True)
    add_verbose(parser)
    args = parser.parse_args(argv)
    found: list[Any] = []
    splits: list[str] = []

    def read() -> None:
        from trl_ulma.data.detect import detected

        raw, split = _read(args)
        splits.append(split)
        found.extend(detected(raw))

    if code := attempt(parser, read):
        return code
    print(f"{args.input}, split {splits[0]}:")
    for each in found:
        usable = f"{each.kept:,} of {each.answers:,} answers of the first {each.rows:,} rows can be used"
        print(f"  {each.family:<22} {f'has these columns, but: {each.problem}' if each.problem else usable}")
    if not found:
        print("  no family reads it")
    return 0 if any(each.kept for each in found) else 1


def run(family: str, args: argparse.Namespace) -> dict[str, Any]:
    """Read, convert, split, write; returns what `--report` holds.

    Raises:
        OSError: where the input is not there.
        ValueError: where it is not of this family, or the output cannot be written.
    """
    files = _files(args)
    _check_columns(family, args)
    folders = _absent_folders([*files.values(), *([args.report] if args.report else [])])
    written = [*files.values(), *([args.report] if args.report else [])]
    parts: dict[Path, Path] = {}
    try:
        for file in written:
            parts[file] = _part(file, args.overwrite)
        maps_labels = find(family).maps_labels
        raw, split = _read(args, maps_labels=not maps_labels)
        if args.label_map and not maps_labels and "label" not in raw.column_names:
            raise ValueError(
                f"{args.input} has no column label that --label_map could map; its columns are "
                f"{', '.join(raw.column_names)}. Name it: --columns label=…"
            )
        if family == "pairs":  # whose question may be in a column that is not read
            from trl_ulma.data.files import check_splits

            if {"chosen", "rejected"} <= set(raw.column_names):
                for note in check_splits({split: raw}, args.input):
                    print(note, file=sys.stderr)

        label = Names.of(args.columns, None).columns.get("label", "")
        imitates = getattr(args, "liked", True) is False and getattr(args, "label_type", "binary") == "binary"
        if not args.label_map and (said := noted_direction(label, imitates=imitates)):
            print(f"{args.input}: {said}.", file=sys.stderr)
        # Imported late, as they bring `datasets` along
        from trl_ulma.data.convert import convert
        from trl_ulma.data.summary import summarize

        options = {flag.lstrip("-"): getattr(args, flag.lstrip("-")) for flag in find(family).options}
        if maps_labels:
            options["label_map"] = dict(Names.of(None, args.label_map).label_map)
        rows, account = convert(family, raw, alternating=args.alternating, **options)
        splits = _split(rows, files, args)
        facts = {
            "family": family,
            "input": args.input,
            "config": args.config,
            "split": split,
            "options": options | {"alternating": args.alternating},
            "seed": args.seed,
            **_accounted(account),
            **summarize(rows),
            "splits": {
                name: {
                    "file": str(files[name]),
                    "rows": len(each),
                    "prompts": len({json.dumps(prompt) for prompt in each["prompt"]}),
                }
                for name, each in splits.items()
            },
            "versions": {name: metadata.version(name) for name in ("trl-ulma", "datasets")},
        }
        for name, each in splits.items():
            _write(each, files[name], parts[files[name]])
        if args.report:
            parts[args.report].write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        for file, part in parts.items():
            part.replace(file)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
        for folder in folders:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
    return facts


def _check_columns(family: str, args: argparse.Namespace) -> None:
    from trl_ulma.data.names import Names

    adapter = find(family)
    unused = adapter.unused(Names.of(args.columns, None).columns)
    if unused:
        used = dict.fromkeys([*(name for layout in adapter.needs for name in layout), *(adapter.also or ())])
        label = " Rated answers are the families kto and messages." if "label" in unused else ""
        raise ValueError(
            f"--columns names {', '.join(unused)}, which {family} does not read. It reads {', '.join(used)}.{label}"
        )


def _absent_folders(files: Sequence[Path]) -> list[Path]:
    """The folders that are made for the files, the innermost first."""
    folders = {folder for file in files for folder in file.absolute().parents if not folder.exists()}
    return sorted(folders, key=lambda folder: len(folder.parts), reverse=True)


def _files(args: argparse.Namespace) -> dict[str, Path]:
    """Name of the split → its file."""
    output = Path(args.output).expanduser()
    if output.suffix in (".parquet", ".jsonl") and not output.is_dir():
        if args.test_size:
            raise ValueError(f"--output {output} is one file, which has no test part. Name a folder instead.")
        _check_seed(args)
        return {"all": output}
    if output.suffix and not (output.is_dir() or args.output.endswith("/")):
        raise ValueError(
            f"--output ends in {output.suffix!r}; it must be a .parquet or .jsonl file, or a folder (end its name "
            "in '/' if it has a dot)."
        )
    if args.test_size is None:
        args.test_size = TEST_SIZE
    if not args.test_size:
        _check_seed(args)
    elif args.seed is None:
        args.seed = SEED
    files = {name: output / f"{name}.parquet" for name in (("train", "test") if args.test_size else ("train",))}
    if args.report and args.report.resolve().is_relative_to(output.resolve()):
        raise ValueError(f"--report {args.report} lies in the folder of --output, where it would be read as data.")
    if output.is_dir():
        from trl_ulma.data.folders import data_files

        others = [str(file) for file in data_files(output) if file not in files.values()]
        if others:
            raise ValueError(
                f"{output} holds {', '.join(others[:3])}, which would be read together with the rows. Choose another "
                "folder, or remove it."
            )
    return files


def _check_seed(args: argparse.Namespace) -> None:
    if args.seed is not None:
        raise ValueError("--seed chooses the test part, but there is none. Remove it.")


def _part(file: Path, overwrite: bool) -> Path:
    """The file that is written to, and renamed when it is whole."""
    if file.exists() and not overwrite:
        raise ValueError(f"{file} exists already. Choose another name, or set --overwrite.")
    part = file.with_name(f"{file.name}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
    except OSError as problem:
        raise ValueError(f"{file} cannot be written: {problem}") from problem
    return part


def _read(args: argparse.Namespace, *, maps_labels: bool = True) -> tuple[Any, str]:
    """(the raw rows, which split they are). Unless `maps_labels`, the family itself applies the label map."""
    import datasets
    from datasets.exceptions import DatasetGenerationError

    from trl_ulma.data.files import load_rows

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        splits = load_rows(
            args.input,
            config=args.config,
            columns=args.columns,
            label_map=args.label_map if maps_labels else None,
            invalid_rows="mark" if args.invalid_rows == "drop" else "error",
        )
    except DatasetGenerationError as problem:
        raise ValueError(f"{args.input} cannot be read: {problem.__cause__ or problem}") from problem
    there = [str(name) for name in splits]
    split = args.split or ("train" if len(there) > 1 else there[0])
    if split not in there:
        raise ValueError(f"{args.input} has no split {split!r}, but {', '.join(there)}. Set --split to one of them.")
    others = [name for name in there if name != split]
    return splits[split], f"{split} (not read: {', '.join(others)})" if others else split


def _split(rows: "Dataset", files: dict[str, Path], args: argparse.Namespace) -> dict[str, "Dataset"]:
    if "test" not in files:
        return dict.fromkeys(files, rows)
    from trl_ulma.data.files import split_by_prompt

    try:
        halves = split_by_prompt(rows, test_size=args.test_size, seed=args.seed)
    except ValueError as problem:
        raise ValueError(f"--test_size {args.test_size:g} does not do for {len(rows)} rows: {problem}") from problem
    return {name: halves[name] for name in files}


def _write(rows: "Dataset", file: Path, part: Path) -> None:
    if file.suffix == ".parquet":
        rows.to_parquet(part)
        return
    from trl_ulma.data.json_rows import json_text

    with part.open("w", encoding="utf-8") as lines:
        lines.writelines(json_text(row) + "\n" for row in rows)


def _accounted(account: "Account") -> dict[str, Any]:
    found = {
        name: {what: vars(each) for what, each in found.items()}
        for name, found in (("left_out", account.left_out), ("noted", account.noted))
    }
    return {"rows_in": account.rows_in, "answers": account.answers, "rows_out": account.rows_out, **found}


def show(facts: dict[str, Any]) -> None:
    """Print the report: on a screen with rich where that is installed, else as plain text."""
    lines = _lines(facts)
    if importlib.util.find_spec("rich") is None or not sys.stdout.isatty():
        for name, value in lines:
            print(f"{name:<20}{value}")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in lines:
        table.add_row(Text(name, style="bold"), Text(value))
    Console().print(table)


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    lines = [
        ("input", f"{facts['input']}, {facts['family']}, split {facts['split']}"),
        ("rows in", f"{facts['rows_in']:,}, with {facts['answers']:,} answers"),
        ("rows out", f"{facts['rows_out']:,}"),
    ]
    for name, key in (("left out", "left_out"), ("noted", "noted")):
        found = [f"{each['count']:,} × {what} (first: row {each['first_row']})" for what, each in facts[key].items()]
        lines += [(name if i == 0 else "", text) for i, text in enumerate(found or ["nothing"])]
    for kind, bins in facts["labels"].items():
        cells = (_span(each) + f": {each['rows']:,}" for each in bins)
        lines.append((f"labels, {kind}", "   ".join(cells)))
    lines.append(("demonstrations", f"{facts['demonstrations']:,} ({facts['demonstration_share']:.1%})"))
    for name, quantiles in facts["characters"].items():
        cells = (f"{float(q):.0%} ≤ {value:,.0f}" for q, value in quantiles.items())
        lines.append((name, "characters: " + "   ".join(cells)))
    for name, each in facts["splits"].items():
        lines.append((name, f"{each['rows']:,} rows, {each['prompts']:,} prompts → {each['file']}"))
    return lines


def _span(each: dict[str, float]) -> str:
    return f"{each['from']:.3g}" if each["from"] == each["to"] else f"{each['from']:.3g} … {each['to']:.3g}"
