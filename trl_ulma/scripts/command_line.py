"""What all commands share: option names, one-line errors, and quiet libraries. Imports nothing heavy."""

import argparse
import difflib
import dis
import logging
import os
import re
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NoReturn

# The options that every command has if it has such a thing, and what else they are called, in TRL or here
SAME = {
    "--model": ("--model_name_or_path",),
    "--dataset": ("--dataset_name",),
    "--output": ("--output_dir",),
}
# Set to "1" by --verbose, and inherited by the processes that a command starts
VERBOSE = "TRL_ULMA_VERBOSE"

# Errors that say what is wrong with rows, settings or files, if someone raised them on purpose
_REFUSALS = (ValueError, TypeError, ImportError, FloatingPointError)
_PACKAGES = ("trl_ulma", "trl", "transformers", "peft", "accelerate", "datasets", "huggingface_hub")


# A setting as Python has it, such as label_type="binary"
_WITH_VALUE = re.compile(
    r"(?<![\w./-])(?P<name>[a-z]\w*)="
    r"(?:'(?P<text>[^']*)'|\"(?P<quoted>[^\"]*)\"|(?P<plain>(?!None\b)-?\w(?:[\w.:,-]*\w)?))"
)
# One in both spellings: chat False (--chat false)
_TWICE = re.compile(
    r"(?:--)?(?P<name>[a-z]\w*)(?: [^\s()]+)? \((?:on the command line )?(?P<option>--(?P=name)\b[^()]*)\)"
)
# A word that is no column, attribute, file, function or option already, and is not quoted
_BARE = re.compile(r"(?<!column )(?<!columns )(?<![\w./`'\"=-])[a-z]\w*\b(?![\w(=/`'\"]|\.\w)")
# What columns may be called as well, and what stands before a setting
_COLUMNS = ("label_type", "log_z")
_VERBS = ("et ", "eave ", "hange ", "or ", "and ", "another ")


class CommandParser(argparse.ArgumentParser):
    """An `ArgumentParser` that takes exact options only, and prints an error as one line with exit code 2."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{"allow_abbrev": False, "formatter_class": OneNameFormatter, **kwargs})

    def add_argument(self, *names: str, **kwargs: Any) -> argparse.Action:
        """As argparse's; an option in `SAME` is accepted under its other names, too."""
        action = super().add_argument(*names, **kwargs)
        accept_other_names(self, action)
        return action

    def add_argument_group(self, *args: Any, **kwargs: Any) -> Any:
        """As argparse's; the group's options in `SAME` have their other names, too."""
        group = super().add_argument_group(*args, **kwargs)
        add = group.add_argument

        def add_argument(*names: str, **options: Any) -> argparse.Action:
            action = add(*names, **options)
            accept_other_names(self, action)
            return action

        group.add_argument = add_argument
        return group

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse's; exits if an option is given under two names with two values."""
        words = list(sys.argv[1:] if args is None else args)
        refuse_contradictions(self, words)
        return super().parse_known_args(words, namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse's; for an unknown option it names the nearest."""
        found, left = self.parse_known_args(args, namespace)
        if left:
            option = left[0].split("=")[0]
            hint = did_you_mean(option, self._option_string_actions) or f"See {self.prog} --help."
            self.error(f"{option} is not an option. {hint}")
        return found

    def error(self, message: str) -> NoReturn:
        """Print one line, and exit with code 2."""
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")


def terminal_width() -> int:
    """Columns of a help text: those of the terminal, from 60 to 100."""
    return max(60, min(100, shutil.get_terminal_size().columns))


class OneNameFormatter(argparse.HelpFormatter):
    """Shows an option under its first name only."""

    def __init__(self, prog: str, **kwargs: Any):
        super().__init__(prog, **{"max_help_position": 30, "width": terminal_width(), **kwargs})

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        if isinstance(action, argparse.BooleanOptionalAction):
            return ", ".join(action.option_strings)
        name = next((option for option in action.option_strings if option.startswith("--")), action.option_strings[0])
        value = "" if action.nargs == 0 else self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{name} {value}".rstrip()

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return super()._get_default_metavar_for_optional(action).rpartition("_")[2]


class Verbose(argparse.Action):
    """The option --verbose, which leaves nothing in the namespace: `be_quiet` reads the environment."""

    def __init__(self, option_strings: Sequence[str], dest: str = argparse.SUPPRESS, **kwargs: Any):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        """Have this process, and those that it starts, say everything."""
        os.environ[VERBOSE] = "1"


def add_verbose(parser: argparse.ArgumentParser) -> None:
    """Add --verbose."""
    parser.add_argument(
        "--verbose", action=Verbose, help="show the warnings of other libraries, and tracebacks of all errors"
    )


def accept_other_names(parser: argparse.ArgumentParser, action: argparse.Action) -> None:
    """Accept an option of `SAME` under all of its names; the one in `SAME` becomes the first, which is shown.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> accept_other_names(parser, parser.add_argument("--output_dir"))
        >>> parser.parse_args(["--output", "out"]).output_dir
        'out'
    """
    for short, others in SAME.items():
        names = (short, *others, *(name.replace("_", "-") for name in others))
        if set(names).isdisjoint(action.option_strings):
            continue
        found = (*names, *action.option_strings)
        if action.option_strings[0] not in names:  # which has a name of its own, as --input of `prepare`
            found = (*action.option_strings, *names)
        action.option_strings = list(dict.fromkeys(found))
        for name in found:
            parser._option_string_actions[name] = action


def refuse_contradictions(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Exit with code 2 if an option is given under two of its names, with two values.

    Under one name the last value counts, as everywhere; options that may be given several times collect them.
    """
    given: dict[argparse.Action, dict[str, str]] = {}
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        action = parser._option_string_actions.get(name)
        if action is None or isinstance(action, argparse._AppendAction) or action.nargs is not None:
            continue
        if equals or place + 1 < len(words):
            given.setdefault(action, {})[name] = value if equals else words[place + 1]
    for values in given.values():
        if len(set(values.values())) > 1:
            both = " and ".join(f"{name} {value}" for name, value in values.items())
            parser.error(f"{both} are two names of one option, with two values. Give it once.")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question about what `name` may have been meant to be, or "".

    Example:
        >>> did_you_mean("--label_tipe", ["--label_type", "--label-type", "--beta"])
        'Did you mean --label_type?'
    """
    words = sorted({option.lstrip("-") for option in known if "-" not in option.lstrip("-")})
    word = name.lstrip("-").replace("-", "_")
    near = [each for each in words if each.startswith(word)] if word else []
    other_names = {name[2:] for short, names in SAME.items() if short[2:] in near for name in names}
    near = [each for each in near if each not in other_names][:3]
    near = near or difflib.get_close_matches(word, words, n=1, cutoff=0.65)
    dashes = name[: len(name) - len(name.lstrip("-"))]
    return f"Did you mean {' or '.join(dashes + each for each in near)}?" if near else ""


def one_line(message: str) -> str:
    """An error of argparse in one line, which names an option once.

    Example:
        >>> one_line("argument --label_type/--label-type: invalid choice: 'odd'")
        "argument --label_type: invalid choice: 'odd'"
    """
    return re.sub(r"(?<!\S)(--[\w-]+)(?:/--?[\w-]+)+(?=[\s:,]|$)", r"\1", " ".join(message.split()))


def as_options(message: str, options: Collection[str]) -> str:
    """A message of the Python interface in the command line's spelling.

    Args:
        message: such as "Set label_type='continuous'.".
        options: the command's options, with their dashes; other words stay.

    Example:
        >>> options = ["--label_type", "--log_z", "--beta"]
        >>> as_options('Rescale it, or set label_type="continuous".', options)
        'Rescale it, or set --label_type continuous.'
        >>> as_options("beta must be above 0; got -1.0.", options)
        '--beta must be above 0; got -1.0.'
        >>> as_options("Remove the column log_z, or leave log_z at 0.", options)
        'Remove the column log_z, or leave --log_z at 0.'
        >>> as_options('Set label_type="binary" (on the command line --label_type binary).', options)
        'Set --label_type binary.'
    """
    names = {option.lstrip("-") for option in options if option.startswith("--")}

    def with_value(found: re.Match[str]) -> str:
        name, text, quoted, plain = found.group("name", "text", "quoted", "plain")
        if name not in names:
            return found[0]
        value = plain if plain is not None else quoted if text is None else text
        return f"--{name} {value}" if re.fullmatch(r"[^\s'\"]+", value) else f'--{name} "{value}"'

    def bare(found: re.Match[str]) -> str:
        name, before = found[0], found.string[: found.start()]
        is_meant = not before or ("_" in name and (name not in _COLUMNS or before.endswith(_VERBS)))
        return f"--{name}" if name in names and is_meant else name

    lines = []
    for line in message.split("\n"):
        said, prompt, quoted = line.partition(" Prompt: ")  # whose words are the data's
        said = _WITH_VALUE.sub(with_value, said)
        said = _TWICE.sub(r"\g<option>", said)
        lines.append(_BARE.sub(bare, said) + prompt + quoted)
    return "\n".join(lines)


def is_refusal(problem: BaseException) -> bool:
    """Whether an error was raised on purpose, for rows, settings or files that cannot be used; others are bugs, whose
    traceback is needed.

    Example:
        >>> try:
        ...     int("x")
        ... except ValueError as problem:
        ...     is_refusal(problem)
        False
    """
    if isinstance(problem, OSError):
        return not isinstance(problem, BrokenPipeError)
    if not isinstance(problem, _REFUSALS) or problem.__traceback__ is None:
        return False
    last = problem.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    package = last.tb_frame.f_globals.get("__name__", "").split(".")[0]
    is_raised = dis.opname[last.tb_frame.f_code.co_code[last.tb_lasti]] == "RAISE_VARARGS"
    return is_raised and package in _PACKAGES


def refuse(problem: BaseException, parser: argparse.ArgumentParser) -> None:
    """Print an error that `is_refusal` to stderr, in the command line's spelling; with --verbose also its traceback."""
    if is_verbose():
        traceback.print_exception(problem)
    print(f"{parser.prog}: error: {as_options(str(problem), parser._option_string_actions)}", file=sys.stderr)


def attempt(parser: argparse.ArgumentParser, work: Callable[[], Any]) -> int:
    """Do a command's work, and return its exit code: 1 if it is refused."""
    try:
        work()
    except Exception as problem:
        if not is_refusal(problem):
            raise
        refuse(problem, parser)
        return 1
    return 0


def is_verbose() -> bool:
    """Whether the command was given --verbose."""
    return os.environ.get(VERBOSE) == "1"


# Loggers of other libraries, and what they need not say in a command
_NOISE = {
    # A kernel for CPUs that `kernels` would fetch from the hub; without it bitsandbytes computes the same
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    # Defaults of accelerate launch
    "accelerate.commands.launch": "The following values were not passed to `accelerate launch`",
}


class _Filter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is not noise."""
        return not record.getMessage().startswith(_NOISE[record.name])


_NOISE_FILTER = _Filter()


def be_quiet() -> None:
    """Silence what other libraries say that a command's user can do nothing about, unless there is --verbose.

    Deprecations are for the authors of code, and a command's user is not one. Nothing of this package is silenced, and
    no warning of another about the model, the rows or the settings.
    """
    if is_verbose():
        return
    for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
        warnings.filterwarnings("ignore", category=category)
        warnings.filterwarnings("default", category=category, module=r"trl_ulma\b")
    # Without an accelerator there is nothing to pin memory for
    warnings.filterwarnings("ignore", message=r"'pin_memory' argument is set as true but no accelerator is found")
    for name in _NOISE:
        logging.getLogger(name).addFilter(_NOISE_FILTER)  # once, however often it is added
