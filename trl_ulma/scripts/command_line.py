"""Option names, one-line errors and log filters for all commands. Imports no large library."""

import argparse
import contextlib
import difflib
import dis
import functools
import itertools
import logging
import os
import re
import shlex
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NoReturn

# Options with the same name in all commands, and their other names in TRL
SAME = {
    "--model": ("--model_name_or_path",),
    "--dataset": ("--dataset_name",),
    "--output": ("--output_dir",),
}
# --verbose sets it to "1". Processes that a command starts inherit it.
VERBOSE = "TRL_ULMA_VERBOSE"
# The width of a printed command, with the backslash at its end
_COMMAND_WIDTH = 108

# Errors about rows, settings or files, if a `raise` statement raised them
_REFUSALS = (ValueError, TypeError, ImportError, FloatingPointError)
_PACKAGES = ("trl_ulma", "trl", "transformers", "peft", "accelerate", "datasets", "huggingface_hub")


# A setting in Python's spelling, such as label_type="binary"
_WITH_VALUE = re.compile(
    r"(?<![\w./-])(?P<name>[a-z]\w*)="
    r"(?:'(?P<text>[^']*)'|\"(?P<quoted>[^\"]*)\"|(?P<plain>(?!None\b)-?\w(?:[\w.:,-]*\w)?))"
)
# A setting in both spellings: chat False (--chat false)
_TWICE = re.compile(
    r"(?:--)?(?P<name>[a-z]\w*)(?: [^\s()]+)? \((?:on the command line )?(?P<option>--(?P=name)\b[^()]*)\)"
)
# An unquoted word that is not a column, attribute, file, function or option
_BARE = re.compile(r"(?<!column )(?<!columns )(?<![\w./`'\"=-])[a-z]\w*\b(?![\w(=/`'\"]|\.\w)")
# Settings that are also names of columns, and words before a setting
_COLUMNS = ("label_type", "log_z")
_VERBS = ("et ", "eave ", "hange ", "or ", "and ", "another ")


def in_lines(words: Sequence[str]) -> str:
    """A command for a shell, on lines of at most 110 characters where its words allow it, each with all of an option.

    Example:
        >>> print(in_lines(["trl-ulma", "check", "--dataset", "my rows.csv", "--use_peft", "--output", "x" * 80]))
        trl-ulma check --dataset 'my rows.csv' --use_peft \\
            --output xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx
    """
    options: list[str] = []
    for word in words:
        if word.startswith("--") or not options:
            options.append(shlex.quote(word))
        else:
            options[-1] += f" {shlex.quote(word)}"
    lines = options[:1]
    for option in options[1:]:
        if len(lines[-1]) + len(option) < _COMMAND_WIDTH:
            lines[-1] += f" {option}"
        else:
            lines.append(f"    {option}")
    return " \\\n".join(lines)


class CommandParser(argparse.ArgumentParser):
    """An `ArgumentParser` without abbreviations. An error is one line, with exit code 2."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{"allow_abbrev": False, "formatter_class": OneNameFormatter, **kwargs})

    def add_argument(self, *names: str, **kwargs: Any) -> argparse.Action:
        """Add an option. If it is in `SAME`, its other names are accepted, too."""
        action = super().add_argument(*names, **kwargs)
        accept_other_names(self, action)
        return action

    def add_argument_group(self, *args: Any, **kwargs: Any) -> Any:
        """Add a group. The other names of its options in `SAME` are accepted, too."""
        group = super().add_argument_group(*args, **kwargs)
        add = group.add_argument

        def add_argument(*names: str, **options: Any) -> argparse.Action:
            action = add(*names, **options)
            accept_other_names(self, action)
            return action

        group.add_argument = add_argument
        return group

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse the options. Exits if an option has two values under two names."""
        words = list(sys.argv[1:] if args is None else args)
        refuse_contradictions(self, words)
        return super().parse_known_args(words, namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse the options. Exits if an option is unknown, and suggests the most similar one."""
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
    """The width of help texts: that of the terminal, between 60 and 100 columns."""
    return max(60, min(100, shutil.get_terminal_size().columns))


class OneNameFormatter(argparse.HelpFormatter):
    """Shows only the first name of an option."""

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
    """The option --verbose. It sets the environment variable that `be_quiet` reads, not a value of the namespace."""

    def __init__(self, option_strings: Sequence[str], dest: str = argparse.SUPPRESS, **kwargs: Any):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        """Set the environment variable for this process and the processes that it starts."""
        os.environ[VERBOSE] = "1"


def add_verbose(parser: argparse.ArgumentParser) -> None:
    """Add --verbose."""
    parser.add_argument(
        "--verbose", action=Verbose, help="show the warnings of other libraries, and tracebacks of all errors"
    )


def accept_other_names(parser: argparse.ArgumentParser, action: argparse.Action) -> None:
    """Accept all names of an option in `SAME`. Help texts show the name in `SAME`.

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
        if action.option_strings[0] not in names:  # it has another name of its own, such as --input of `prepare`
            found = (*action.option_strings, *names)
        action.option_strings = list(dict.fromkeys(found))
        for name in found:
            parser._option_string_actions[name] = action


def refuse_contradictions(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Exit with code 2 if an option has different values under two of its names.

    If one name has different values, the last one counts, as in argparse, and a line on stderr says so. So does the
    last list of an option that takes several values. Options that collect values over their uses are not checked. A
    value that the option does not accept is left to argparse, which reports it.
    """
    given: dict[argparse.Action, list[tuple[str, str, Any]]] = {}
    for place, word in enumerate(words):
        if word == "--":
            break
        name, equals, value = word.partition("=")
        action = parser._option_string_actions.get(name)
        if action is None or isinstance(action, argparse._AppendAction) or action.nargs not in (None, "?", "*", "+"):
            continue
        if action.nargs in ("*", "+"):
            values = [value] if equals else [*itertools.takewhile(lambda each: each[:2] != "--", words[place + 1 :])]
            with contextlib.suppress(argparse.ArgumentError):
                use = (name, " ".join(values), [parser._get_value(action, each) for each in values])
                given.setdefault(action, []).append(use)
            continue
        if not equals:
            value = words[place + 1] if place + 1 < len(words) else ""
            if not value or value.startswith("--"):
                if action.nargs is None:  # which argparse reports
                    continue
                value = str(action.const)  # --bf16 is --bf16 true
        with contextlib.suppress(argparse.ArgumentError):
            use = (name, value, parser._get_value(action, value))
            given.setdefault(action, []).append(use)
    for uses in given.values():
        last, text, value = uses[-1]
        for other_name, other_text, other_value in uses[:-1]:
            if other_value == value:
                continue
            if other_name != last:
                both = f"{other_name} {other_text} and {last} {text}"
                parser.error(f"{both} are two names of one option, with two values. Give it once.")
            tell_last_counts(parser.prog, last)


@functools.cache  # a command can parse its options several times
def tell_last_counts(prog: str, name: str) -> None:
    """Say on stderr that an option was given more than once, and that its last value counts, which can be a secret."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{prog}: {name} is given more than once. Its last value counts.", file=sys.stderr, flush=True)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question with the known names that are most similar to `name`, or "".

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
    """An error message of argparse in one line, with one name per option.

    Example:
        >>> one_line("argument --label_type/--label-type: invalid choice: 'odd'")
        "argument --label_type: invalid choice: 'odd'"
    """
    return re.sub(r"(?<!\S)(--[\w-]+)(?:/--?[\w-]+)+(?=[\s:,]|$)", r"\1", " ".join(message.split()))


def as_options(message: str, options: Collection[str]) -> str:
    """A message of the Python interface in command-line spelling.

    Args:
        message: such as "Set label_type='continuous'.".
        options: the options of the command, with dashes. Other words do not change.

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
        said, prompt, quoted = line.partition(" Prompt: ")  # the prompt is quoted unchanged
        said = _WITH_VALUE.sub(with_value, said)
        said = _TWICE.sub(r"\g<option>", said)
        lines.append(_BARE.sub(bare, said) + prompt + quoted)
    return "\n".join(lines)


def is_refusal(problem: BaseException) -> bool:
    """Whether an error was raised deliberately, because rows, settings or files are invalid. Other errors are bugs.

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
    """Print an error message to stderr in command-line spelling. With --verbose, print its traceback, too."""
    if is_verbose():
        traceback.print_exception(problem)
    print(f"{parser.prog}: error: {as_options(str(problem), parser._option_string_actions)}", file=sys.stderr)


class _Spelling(logging.Filter):
    """Shows the messages of this package in command-line spelling."""

    def __init__(self, options: Collection[str]):
        super().__init__()
        self.options = options

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the message of a record. Every record is shown."""
        if record.name.split(".")[0] == "trl_ulma":
            record.msg, record.args = as_options(record.getMessage(), self.options), None
        return True


@contextlib.contextmanager
def _filtered(by: Any) -> Iterator[None]:
    """Meanwhile, filter log messages.

    A command sets up no log handlers, so Python's handler of last resort shows the messages.
    """
    handler: Any = logging.lastResort
    handler.addFilter(by)
    try:
        yield
    finally:
        handler.removeFilter(by)


def logging_as_options(options: Collection[str]) -> contextlib.AbstractContextManager[None]:
    """Return a context in which log messages of this package are shown as `as_options` spells them."""
    return _filtered(_Spelling(options))


def held_back(held: list[logging.LogRecord]) -> contextlib.AbstractContextManager[None]:
    """Return a context in which log messages of this package go into a list instead. `show` shows them."""

    def keep(record: logging.LogRecord) -> bool:
        is_ours = record.name.split(".")[0] == "trl_ulma"
        if is_ours:
            held.append(record)
        return not is_ours

    return _filtered(keep)


def show(held: list[logging.LogRecord]) -> None:
    """Show the messages that were held back, once."""
    handler: Any = logging.lastResort
    while held:
        handler.handle(held.pop(0))


def attempt(parser: argparse.ArgumentParser, work: Callable[[], Any]) -> int:
    """Call `work`. Returns the exit code: 1 if it raised an error for which `is_refusal` is true."""
    try:
        with logging_as_options(parser._option_string_actions):
            work()
    except Exception as problem:
        if not is_refusal(problem):
            raise
        refuse(problem, parser)
        return 1
    return 0


def is_verbose() -> bool:
    """Whether --verbose was given."""
    return os.environ.get(VERBOSE) == "1"


# Loggers of other libraries, and the start of messages that commands do not show
_NOISE = {
    # A CPU kernel on the Hub. Without it, bitsandbytes computes the same values.
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    # Release 0.46 says so on every machine without a GPU. What needs one raises an error by itself.
    "bitsandbytes.cextension": "The installed version of bitsandbytes was compiled without GPU support",
    # Defaults of accelerate launch
    "accelerate.commands.launch": "The following values were not passed to `accelerate launch`",
}


class _Filter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to show a record."""
        return not record.getMessage().startswith(_NOISE[record.name])


_NOISE_FILTER = _Filter()


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Meanwhile, hide the progress bars of datasets and transformers, and the warnings of transformers."""
    import datasets
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    bars = (datasets.is_progress_bar_enabled(), transformers_logging.is_progress_bar_enabled())
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars[0]:
            datasets.enable_progress_bars()
        if bars[1]:
            transformers_logging.enable_progress_bar()


def be_quiet() -> None:
    """Hide messages of other libraries that users of a command cannot act on, unless --verbose is set.

    These are deprecations, which concern the authors of code, and the messages in `_NOISE`. Messages of this package,
    and other libraries' warnings about the model, the rows or the settings, are shown. If stderr is no terminal,
    progress bars are shown only of what takes longer than 20 seconds, and once a minute, because in a file each line
    stays.
    """
    if not sys.stderr.isatty():  # read once, when tqdm is loaded
        os.environ.setdefault("TQDM_DELAY", "20")
        os.environ.setdefault("TQDM_MININTERVAL", "60")
    if is_verbose():
        return
    for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
        warnings.filterwarnings("ignore", category=category)
        warnings.filterwarnings("default", category=category, module=r"trl_ulma\b")
    # Without an accelerator, pinned memory has no use
    warnings.filterwarnings("ignore", message=r"'pin_memory' argument is set as true but no accelerator is found")
    for name in _NOISE:
        logging.getLogger(name).addFilter(_NOISE_FILTER)  # adding it again has no effect
