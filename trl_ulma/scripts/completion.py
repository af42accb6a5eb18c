"""Prints a shell script that completes commands, options and their choices.

    trl-ulma completion bash > ~/.local/share/bash-completion/completions/trl-ulma
    trl-ulma completion zsh > ~/.zfunc/_trl-ulma     # a folder of $fpath

It takes effect in new shells.
"""

import argparse
from collections.abc import Sequence
from importlib import import_module

from trl_ulma.scripts.command_line import CommandParser, add_verbose

SHELLS = ("bash", "zsh", "tcsh")


def make_parser(prog: str = "trl-ulma completion") -> argparse.ArgumentParser:
    """The parser of the command."""
    parser = CommandParser(
        prog=prog,
        description="Print a shell script that completes commands, options and their choices.",
        epilog="trl-ulma completion bash > ~/.local/share/bash-completion/completions/trl-ulma",
    )
    add_verbose(parser)
    parser.add_argument("shell", choices=SHELLS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the script."""
    parser = make_parser()
    shell = parser.parse_args(argv).shell
    try:
        import shtab
    except ModuleNotFoundError:
        parser.error("shtab is not installed, but writes the script. Run: pip install 'trl-ulma[completion]'")
    print(shtab.complete(whole_parser(), shell))
    return 0


def whole_parser() -> argparse.ArgumentParser:
    """One parser with all commands and their options."""
    from trl_ulma.scripts.cli import COMMANDS

    whole = argparse.ArgumentParser(prog="trl-ulma", allow_abbrev=False)
    whole.add_argument("--version", action="store_true", help="show the version")
    commands = whole.add_subparsers(dest="command")
    for name, (module, what, _) in COMMANDS.items():
        commands.add_parser(name, parents=[import_module(module).make_parser()], add_help=False, help=what)
    return whole


if __name__ == "__main__":
    raise SystemExit(main())
