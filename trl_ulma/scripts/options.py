"""The parser of the training commands."""

import argparse
import contextlib
import re
import sys
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser
from trl.scripts.utils import DatasetConfig

from trl_ulma.data.file_rows import missing
from trl_ulma.scripts.command_line import (
    SAME,
    OneNameFormatter,
    accept_other_names,
    add_verbose,
    as_options,
    did_you_mean,
    one_line,
    refuse_contradictions,
    tell_last_counts,
)
from trl_ulma.scripts.help_page import GROUPS, NAMES, help_page, usage

EPILOG = f"Options of accelerate launch are accepted, too: see `accelerate launch --help`. {NAMES}"
# Which of our option names are TRL's settings
_SETTINGS = {short[2:]: others[0][2:] for short, others in SAME.items()}


@dataclass
class DataArguments(ScriptArguments):
    """TRL's options of the dataset, and the names of its columns and labels."""

    columns: str | None = field(
        default=None,
        metadata={
            "help": "Names of the columns in your data: prompt=question,completion=response,label=rating. In YAML also "
            "a mapping."
        },
    )
    label_map: str | None = field(
        default=None,
        metadata={"help": "Numbers for labels that are words: up=1,down=0. In YAML also a mapping."},
    )


@dataclass
class PartConfig(DatasetConfig):
    """TRL's entry of a mixture, in which `columns` can also be a mapping of names, and with `label_map`."""

    columns: list[str] | dict[str, str] | str | None = None  # type: ignore[assignment]
    label_map: dict | str | None = None
    fraction: float | None = None  # TRL before 1.9 does not have it


class _Formatter(OneNameFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


class _HelpAll(argparse.Action):
    def __init__(self, option_strings: list[str], dest: str, **kwargs: Any):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, **kwargs)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Print all options, and exit."""
        parser._print_message(parser.format_help(), sys.stdout)
        parser.exit()


# Options of `accelerate launch` that the command sets itself
_NOT_FOR_USERS = {"help", "module", "no_python"}


class OptionParser(TrlParser):
    """A `TrlParser` without abbreviations. An error is one line, with exit code 2.

    Options that it does not know, on the command line or in the YAML file, must be options of `accelerate launch`.
    `--help` shows the most important options, and `--help-all` shows all.

    Args:
        config_class: the config class of the trainer.
        prog: the name of the command, such as "trl-ulma ulma".
        description: a sentence about the command.
        method: the training command that has these options.
    """

    def __init__(self, config_class: type, prog: str, description: str, method: str = "ulma"):
        types: Any = (DataArguments, config_class, ModelConfig, DatasetMixtureConfig)
        command = prog.removeprefix("trl-ulma ")
        super().__init__(
            types,
            prog=prog,
            usage=f"{prog} {usage(command)}",
            description=description,
            epilog=EPILOG,
            allow_abbrev=False,
            formatter_class=_Formatter,
        )
        self.set_defaults(logging_first_step=True)  # the others can be minutes away
        self.command, self.method = command, method
        hints = {name: hint for each in types for name, hint in get_type_hints(each).items()}
        # A bool has two actions, --flag and --no_flag. The first one takes a value.
        actions = {action.dest: action for action in reversed(self._actions)}
        self._own = {name: (actions[name], hint) for name, hint in hints.items() if name in actions}
        self._file = ""
        self._from_file: list[str] = []
        for action in list(self._actions):
            accept_other_names(self, action)
        add_verbose(self)
        self.add_argument("--help-all", "--help_all", action=_HelpAll, help="show all options")

    def print_help(self, file: Any = None) -> None:
        """Print the most important options."""
        self._print_message(help_page(self.command, self.method) + "\n", file)

    def format_help(self) -> str:
        """All options, in the groups of `--help`. The options that `--help` does not show come last."""
        groups = {title: self.add_argument_group(title) for title in GROUPS}
        rest = self.add_argument_group("other options of TRL and transformers")
        title_of = {option.name: title for title, options in GROUPS.items() for option in options}
        actions: dict[str | None, list[argparse.Action]] = {title: [] for title in (None, *groups)}
        for action in self._optionals._group_actions:
            title = next((title_of[name] for name in action.option_strings if name in title_of), None)
            actions[title].append(action)
        for title, found in actions.items():
            (rest if title is None else groups[title])._group_actions += found
        listed, self._optionals._group_actions = self._optionals._group_actions, []
        text = super().format_help()
        self._optionals._group_actions = listed
        for group in (*groups.values(), rest):
            self._action_groups.remove(group)
        return text

    def error(self, message: str) -> NoReturn:
        """Print one line, without the usage of 200 options, and exit with code 2."""
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")

    def parse_for_launch(self, argv: list[str]) -> tuple[list[str], list[str]]:
        """Returns (options of `accelerate launch`, options of the script). Exits if an option is invalid."""
        argv = self._check_config_file(argv)
        _, from_file, left = self._parse(argv)
        script_options, unclaimed = [], list(left)
        for token in argv:
            if unclaimed and token == unclaimed[0]:
                unclaimed.pop(0)
            else:
                script_options.append(token)
        chosen = {**self._launch_options(from_file), **self._launch_options(left)}
        return [token for tokens in chosen.values() for token in tokens], script_options

    def parse_settings(self, argv: list[str] | None = None) -> tuple[Any, ...]:
        """Returns (script_args, training_args, model_args, dataset_args). Exits if an option is invalid."""
        settings, _, left = self._parse(self._check_config_file(sys.argv[1:] if argv is None else argv))
        for option in self._launch_options(left).values():
            self.error(f"{option[0]} is an option of accelerate launch: give it before the script's name.")
        return settings

    def _parse(self, argv: list[str]) -> tuple[tuple[Any, ...], list[str], list[str]]:
        self._from_file = []
        try:
            *settings, left = self.parse_args_and_config(argv, return_remaining_strings=True)
        except (OSError, TypeError, ValueError, yaml.YAMLError) as problem:
            self.error(as_options(str(problem), self._option_string_actions))
        training_args, model_args = settings[1:3]
        # TRL turns one name into text, which PEFT reads as a regular expression for whole paths
        target = model_args.lora_target_modules
        if isinstance(target, str) and re.fullmatch(r"\w+", target):
            model_args.lora_target_modules = [target]
        # Before TRL 1.7, it is an option of ModelConfig, and TRL's own configs do not have it
        trusts = getattr(model_args, "trust_remote_code", False)
        if trusts or not hasattr(training_args, "trust_remote_code"):
            training_args.trust_remote_code = trusts
        # TRL puts those of the file first
        return tuple(settings), self._from_file, left[len(self._from_file) :]

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse the options. Exits if an option is unknown or missing, before the configs are created."""
        words = list(sys.argv[1:] if args is None else args)
        namespace, left = super().parse_known_args(words, namespace)
        self._launch_options(left)
        refuse_contradictions(self, words)
        self._refuse_unused(namespace)
        if namespace.model_name_or_path is None:
            self.error("--model is missing: a checkpoint's folder, or its name on the Hub.")
        if namespace.dataset_name is None and not namespace.datasets:
            self.error(
                "--dataset is missing: a file, a folder or a name on the Hub. (A mixture is the list `datasets` in the "
                "YAML file.)"
            )
        return namespace, left

    def _refuse_unused(self, namespace: argparse.Namespace) -> None:
        """Exit if options of LoRA or of quantization are given, but not the option that they need."""
        options = ModelConfig.__dataclass_fields__
        for switch, prefixes, what in (
            ("use_peft", ("lora_", "use_dora", "use_rslora"), "all weights are trained"),
            ("load_in_4bit", ("bnb_4bit", "use_bnb_nested"), "the model is not quantized"),
        ):
            given = [
                name
                for name, option in options.items()
                if name.startswith(prefixes) and getattr(namespace, name, option.default) not in (None, option.default)
            ]
            if given and not getattr(namespace, switch):
                self.error(f"--{given[0]} has no effect without --{switch}: {what}. Add it, or leave --{given[0]} out.")
        for name in ("load_in_4bit", "load_in_8bit"):
            if getattr(namespace, name) and not namespace.use_peft:
                self.error(
                    f"--{name} needs --use_peft: quantized weights cannot be trained, but an adapter (LoRA) can."
                )

    def _check_config_file(self, argv: list[str]) -> list[str]:
        """`argv` with `--config=FILE` as two words, as TRL expects."""
        argv = [word for token in argv for word in (token.split("=", 1) if token.startswith("--config=") else [token])]
        if "--config" in argv:
            place = argv.index("--config")
            if place + 1 == len(argv):
                self.error("--config needs the name of a YAML file.")
            if "--config" in argv[place + 1 :]:
                self.error("--config is given twice. Put all options in one file.")
            self._file = argv[place + 1]
            if not Path(self._file).exists():
                self.error(f"--config: {missing(Path(self._file))}")
            with contextlib.suppress(OSError, ValueError, yaml.YAMLError):  # which TRL raises again
                if not isinstance(yaml.safe_load(Path(self._file).read_text()), dict):
                    self.error(f"{self._file} must contain a YAML mapping, one setting per line, such as beta: 0.1.")
        return argv

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        """Use the values of the YAML file as defaults. They are checked like options on the command line.

        Returns:
            The options of `accelerate launch` in the file.
        """
        for short, long in _SETTINGS.items():
            if config.get(long, config.get(short)) != config.get(short, config.get(long)):
                self.error(f"{self._file}: {short} and {long} are two names of one setting. Give it once.")
            if short in config:
                config[long] = config.pop(short)
        super().set_defaults_with_config(**{key: self._value(key, config[key]) for key in config if key in self._own})
        options = []
        for key, value in config.items():
            if key in self._own:
                continue
            action = self._launcher_actions.get(f"--{key}")
            if action is None:
                hint = self._nearest(key, [*self._own, *_SETTINGS, *(option[2:] for option in self._launcher_actions)])
                self.error(f"{self._file}: {key} is not an option. {hint}")
            if action.nargs != 0:
                options += [f"--{key}", str(value)]
            elif not isinstance(value, bool):
                self.error(f"{self._file}: {key} is {value!r}; it must be true or false.")
            elif value:
                options.append(f"--{key}")
        self._from_file = options
        return options

    def _value(self, key: str, value: Any) -> Any:
        action, hint = self._own[key]
        if key == "datasets":
            return self._mixture(value)
        if key in ("columns", "label_map") and isinstance(value, dict):
            return value
        if value is False and "no" in (action.choices or ()):
            return "no"  # `no` is false in YAML
        if _fits(value, hint) and not isinstance(value, str):
            return value
        many = action.nargs == "+"
        try:
            converted = self._as_on_command_line(action, value if many and isinstance(value, list) else [value])
        except (argparse.ArgumentTypeError, TypeError, ValueError):
            name = f"one of {', '.join(map(str, action.choices))}" if action.choices else _name(hint)
            self.error(f"{self._file}: {key} is {value!r}; it must be {name}.")
        return converted if many else converted[0]

    @staticmethod
    def _as_on_command_line(action: argparse.Action, values: list) -> list:
        if any(value is None or isinstance(value, list | dict) for value in values):
            raise TypeError("not a scalar")
        convert: Any = action.type or str
        converted = [convert(str(value)) for value in values]
        if action.choices is not None and any(value not in action.choices for value in converted):
            raise ValueError("not a choice")
        return converted

    def _mixture(self, value: Any) -> Any:
        hints = get_type_hints(PartConfig)
        where = f"{self._file}: datasets"
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            self.error(f"{where} is {value!r}; it must be a list of datasets, each with a `path`.")
        for number, entry in enumerate(value, start=1):
            if "path" not in entry:
                self.error(f"{where}, entry {number}, has no `path`: a file, a folder, a builder (json) or a hub name.")
            for key, each in entry.items():
                if key not in hints:
                    self.error(f"{where}, entry {number}: {key} is not an option. {self._nearest(str(key), [*hints])}")
                if not _fits(each, hints[key]):
                    self.error(f"{where}, entry {number}: {key} is {each!r}; it must be {_name(hints[key])}.")
        return [PartConfig(**entry) for entry in value]

    @cached_property
    def _launcher_actions(self) -> dict[str, argparse.Action]:
        from accelerate.commands.launch import launch_command_parser

        parser = launch_command_parser()
        parser.add_argument("--accelerate_config")
        return {
            option: action
            for action in parser._actions
            if action.dest not in _NOT_FOR_USERS
            for option in action.option_strings
        }

    def _launch_options(self, tokens: list[str]) -> dict[str, list[str]]:
        """The words of each option of `accelerate launch`. If an option is repeated, the last one counts."""
        chosen = {}
        words = list(tokens)
        while words:
            option, equals, value = words.pop(0).partition("=")
            action = self._launcher_actions.get(option)
            if action is None:
                known = [*self._option_string_actions, *self._launcher_actions, "--config"]
                self.error(f"{option} is not an option. {self._nearest(option, known)}")
            if action.nargs == 0:
                if equals or (words and not words[0].startswith("-")):
                    self.error(f"{option} takes no value; got {value or words[0]!r}.")
                chosen[action.dest] = [option]
                continue
            if not equals:
                if not words or words[0].startswith("--"):
                    self.error(f"{option} needs a value.")
                value = words.pop(0)
            if chosen.get(action.dest, [option, value])[-1] != value:
                tell_last_counts(self.prog, option)
            chosen[action.dest] = [option, value]
        return chosen

    def _nearest(self, name: str, known: list[str]) -> str:
        return did_you_mean(name, known) or f"See {self.prog} --help."


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value in YAML has the type of a field."""
    origin = get_origin(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(_fits(value, each) for each in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    if origin is dict:
        keys, values = get_args(hint)
        return isinstance(value, dict) and all(_fits(k, keys) and _fits(v, values) for k, v in value.items())
    if origin is list:
        return isinstance(value, list) and all(_fits(each, get_args(hint)[0]) for each in value)
    if isinstance(value, bool):
        return hint is bool
    if hint is float:
        return isinstance(value, int | float)
    return isinstance(value, origin or hint)


def _name(hint: Any) -> str:
    names = {"float": "a number", "int": "a whole number", "bool": "true or false", "str": "text"}
    if hint is type(None):
        return "null"
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(_name, get_args(hint)))
    if get_origin(hint) is list:
        return f"a list ({_name(get_args(hint)[0])} each)"
    if hint is dict or get_origin(hint) is dict:
        return "a mapping"
    name = getattr(hint, "__name__", str(hint))
    return names.get(name, name)
