"""The console command `trl-ulma`. It imports a subcommand only when it runs it."""

import contextlib
import difflib
import os
import signal
import sys
import textwrap
from importlib import import_module
from pathlib import Path

from trl_ulma import __version__
from trl_ulma.scripts.command_line import SAME, VERBOSE, be_quiet, terminal_width
from trl_ulma.scripts.help_page import help_page

# name: (module, what it does, an example)
COMMANDS = {
    "demo": (
        "trl_ulma.scripts.demo",
        "fine-tune a small language model on a small mixture, and show what changed",
        "trl-ulma demo --tiny",
    ),
    "check": (
        "trl_ulma.scripts.check",
        "dry run: check rows and settings, and show the steps and the memory of a training",
        "trl-ulma check --model Qwen/Qwen3-0.6B --dataset feedback.jsonl",
    ),
    "pointwise-dpo": (
        "trl_ulma.scripts.pointwise_dpo",
        "learn from thumbs, votes and ratings, one answer at a time (pointwise DPO)",
        "trl-ulma pointwise-dpo --model Qwen/Qwen3-0.6B --dataset thumbs.csv --output out",
    ),
    "ulma": (
        "trl_ulma.scripts.ulma",
        "imitate demonstrations, and learn from the ratings of all other answers (ULMA)",
        "trl-ulma ulma --model Qwen/Qwen3-0.6B --dataset feedback.jsonl --output out",
    ),
    "evaluate": (
        "trl_ulma.scripts.evaluate",
        "evaluate models on held-out rows: perplexity, implicit rewards, judged answers",
        "trl-ulma evaluate --model out --dataset feedback.jsonl --output report",
    ),
    "score": (
        "trl_ulma.scripts.score",
        "score answers with a trained model, to rank them or to find wrong labels",
        "trl-ulma score --model out --dataset feedback.jsonl --output scored.jsonl",
    ),
    "chat": (
        "trl_ulma.scripts.chat",
        "chat with a trained model, and compare its answers with those before training",
        "trl-ulma chat --model out --compare",
    ),
    "prepare": (
        "trl_ulma.scripts.prepare",
        "convert a dataset of a known kind (pairs, votes, red-team, …) to rows, and count what is left out",
        "trl-ulma prepare hh --dataset hh_harmless.jsonl.gz --output hh",
    ),
    "env": (
        "trl_ulma.scripts.env",
        "show installed versions, devices, and known incompatibilities",
        "trl-ulma env",
    ),
    "completion": (
        "trl_ulma.scripts.completion",
        "print a shell script that completes commands and options",
        "trl-ulma completion bash > ~/.local/share/bash-completion/completions/trl-ulma",
    ),
}

# The commands that `accelerate launch` can start on several processes. The others run in this process.
LAUNCHED = ("ulma", "pointwise-dpo")
# The commands whose --help is in `help_page`, because their parsers import TRL, which takes seconds
WITH_HELP_PAGE = (*LAUNCHED, "check")
HELP_ALL = {"--help-all", "--help_all"}


def help_text() -> str:
    """The text of `trl-ulma --help`."""
    width = terminal_width()
    lines = [
        "usage: trl-ulma COMMAND [options]",
        "",
        "Learn from ratings, thumbs, votes and demonstrations, one answer at a time.",
        "",
        "commands:",
    ]
    for name, (_, what, example) in COMMANDS.items():
        lines += textwrap.wrap(f"  {name}".ljust(17) + what, width, subsequent_indent=" " * 17)
        lines.append(f"    $ {example}")  # not wrapped, so that it can be copied
    for note in (
        "trl-ulma COMMAND --help shows the options of a command. trl-ulma --version shows the version.",
        "All commands accept --verbose, which shows all figures, the warnings of other libraries, and tracebacks.",
        "Training commands also accept --config run.yaml, --accelerate_config and the options of accelerate launch.",
    ):
        lines += ["", *textwrap.wrap(note, width)]
    return "\n".join(lines)


def _method(words: list[str]) -> str | None:
    """The training command in `check --method`, or None."""
    named = [after for word, after in zip(words, [*words, ""][1:], strict=True) if word == "--method"]
    named += [word.partition("=")[2] for word in words if word.startswith("--method=")]
    return named[-1] if named and named[-1] in LAUNCHED else None


# Option → its setting, of options that name something to read
_SOURCES = {name: short[2:] for short in ("--model", "--dataset") for name in (short, *SAME[short])}
_SOURCES |= {"--ref_model": "ref_model", "--input": "dataset", "--resume_from_checkpoint": "resume_from_checkpoint"}


def _missing_paths(command: str, words: list[str]) -> list[str]:
    """Messages about files and folders that options or a YAML file name and that do not exist.

    They are looked for before a large library is imported. A name that can be one on the Hub is not checked.
    """
    from trl_ulma.data.file_rows import looks_local, missing

    given: dict[str, list[str]] = {}
    file = None
    for word, after in zip(words, [*words, ""][1:], strict=True):
        if not word.startswith("--"):
            continue
        option, equals, value = word.partition("=")
        option = "--" + option[2:].replace("-", "_")
        value = value if equals else after
        if option in _SOURCES:
            given.setdefault(_SOURCES[option], []).append(value)
        elif option == "--config" and command in WITH_HELP_PAGE:
            file = Path(value)
    messages = []
    if file is not None and not file.exists() and sum(word.split("=")[0] == "--config" for word in words) == 1:
        messages.append(f"--config: {missing(file)}")
    elif file is not None and file.is_file():
        import yaml

        with contextlib.suppress(OSError, ValueError, yaml.YAMLError):  # which the parser reports
            found = yaml.safe_load(file.read_text(encoding="utf-8"))
            found = found if isinstance(found, dict) else {}
            if found.get("datasets"):  # a mixture, beside which --dataset is not read
                given["dataset"] = []
            for name, value in found.items():
                if (short := _SOURCES.get(f"--{name}")) and isinstance(value, str):
                    given.setdefault(short, [value])
    for setting, value in ((setting, value) for setting, values in given.items() for value in values):
        name = value.partition("=")[2] or value  # `evaluate` takes NAME=MODEL
        paths = [Path(each).expanduser() for each in (name, value)]
        is_local = looks_local(name) and not name.startswith("served:")
        if setting == "resume_from_checkpoint":
            is_local = name.lower() not in ("true", "false", "none")
        if is_local and not any(path.exists() for path in paths):
            messages.append(f"--{setting}: {missing(paths[0])}")
    return messages


def main(argv: list[str] | None = None) -> int:
    """Run `trl-ulma`. Returns the exit code: 2 if the command itself is invalid."""
    try:
        code = _run(argv)
        if sys.stdout is not None:  # closed by the caller
            sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        if sys.stdout is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return code


def _run(argv: list[str] | None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv:
        print(help_text(), file=sys.stderr)
        return 2
    name, *rest = argv
    if name in ("-h", "--help"):
        print(help_text())
        return 0
    if name == "--version":
        print(f"trl-ulma {__version__}")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"The commands are {', '.join(COMMANDS)}."
        print(f"trl-ulma: error: {name} is not a command. {hint}", file=sys.stderr)
        return 2
    if "--verbose" in rest:
        os.environ[VERBOSE] = "1"
    be_quiet()
    if name in WITH_HELP_PAGE and {"-h", "--help"}.intersection(rest) and not HELP_ALL.intersection(rest):
        print(help_page(name, _method(rest)))
        return 0
    # With --verbose, the same errors are raised later, with a traceback
    if "--verbose" not in rest and (lost := _missing_paths(name, rest)):
        for line in lost:
            print(f"trl-ulma {name}: error: {line}", file=sys.stderr)
        return 2 if lost[0].startswith("--config: ") else 1  # without the file, the options are not known
    module = COMMANDS[name][0]
    try:
        if name not in LAUNCHED:
            return import_module(module).main(rest) or 0
        parser = import_module(module).make_parser()
        return import_module("trl_ulma.scripts.training").launch(module, parser, rest)
    except SystemExit as stop:  # argparse raises it, also after --help
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            return 1
        return stop.code or 0
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
