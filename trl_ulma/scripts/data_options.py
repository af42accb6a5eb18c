"""How training read its data. It is saved with the model, so that later commands read the same data in the same way."""

import argparse
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FILE = "data_options.json"
# Option → its value if it is neither given nor saved
DEFAULTS: dict[str, Any] = {
    "dataset_config": None,
    "columns": None,
    "label_map": None,
    "invalid_rows": "error",
    "test_split_size": None,  # see `splits.default_part`
    "split_seed": 42,
}


def check_output(output: str | Path, dataset: str | None) -> None:
    """Raise ValueError if a command would write into the folder of the data, all of whose files are read as rows."""
    folder = Path(dataset or "").expanduser()
    if dataset and folder.is_dir() and Path(output).expanduser().resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"--output {output} is in the folder of the data, {dataset}, so the next command would read it as more "
            "rows. Name a place outside of that folder, or name the file of the data as --dataset."
        )


def save(folder: str, script_args: Any, training_args: Any, dataset_args: Any) -> None:
    """Write how the dataset of a training was read to the folder of its model. For a mixture, there is no such file."""
    (Path(folder) / FILE).unlink(missing_ok=True)  # of an earlier training
    if dataset_args.datasets:
        return
    found = {
        "dataset": _known_as(script_args.dataset_name),
        "dataset_config": script_args.dataset_config,
        "columns": _as_text(script_args.columns),
        "label_map": _as_text(script_args.label_map),
        "invalid_rows": training_args.invalid_rows,
        "test_split_size": dataset_args.test_split_size,
        "split_seed": training_args.seed,
    }
    (Path(folder) / FILE).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def fill(args: argparse.Namespace, models: Sequence[str]) -> str | None:
    """Set the options that are None as in training, if the models were trained on this dataset, else to `DEFAULTS`.

    The names of columns and labels are also those of the training if another file has these columns.

    Args:
        args: the options of a command; those of `DEFAULTS` that it has are set.
        models: the models that the command names.

    Returns:
        A note on the options that are as in training. None if there are none.
    """
    options = {name: default for name, default in DEFAULTS.items() if hasattr(args, name)}
    saved = [each for each in map(_saved, models) if each is not None]
    known = [each for each in saved if each.get("dataset") == _known_as(args.dataset)]
    note, trained = None, {}
    if not known and getattr(args, "columns", "") is None and Path(args.dataset).exists():
        names = [{name: each.get(name) for name in ("columns", "label_map")} for each in saved]
        if names and all(each == names[0] for each in names) and _has_columns(args.dataset, names[0]["columns"]):
            known = [names[0]]
    if known:
        missing = [name for name in options if getattr(args, name) is None]
        found = {name: [each.get(name) for each in known] for name in missing}
        trained = {name: each[0] for name, each in found.items() if each[0] is not None and len({*each}) == 1}
        set_here = {name: value for name, value in trained.items() if value != options[name]}
        if set_here:
            words = shlex.join(word for name, value in set_here.items() for word in (f"--{name}", str(value)))
            note = f"{args.dataset} is read as in training: {words}"
        differ = [name for name, values in found.items() if len({*values}) > 1]
        if differ:
            note = f"{note}. " if note else ""
            note += f"The models were trained on {args.dataset} with different options, of which none is used here: "
            note += "; ".join(f"--{name} {', '.join(map(str, found[name]))}" for name in differ) + "."
    for name, default in options.items():
        if getattr(args, name) is None:
            setattr(args, name, trained.get(name, default))
    return note


def is_as_in_training(args: argparse.Namespace, models: Sequence[str]) -> bool:
    """Whether the models were trained on the dataset, and the options, which `fill` has set, read it as then."""
    names = [name for name in DEFAULTS if hasattr(args, name)]
    found = [_saved(model) for model in models]
    return bool(found) and all(
        saved is not None
        and saved.get("dataset") == _known_as(args.dataset)
        and all(getattr(args, name) == (DEFAULTS[name] if saved.get(name) is None else saved[name]) for name in names)
        for saved in found
    )


def _saved(model: str) -> dict[str, Any] | None:
    """How a model's training read its dataset. None if it is not known."""
    from trl_ulma.judge import saved_file

    try:
        file = saved_file(model, FILE)
    except (OSError, ValueError):  # a misspelt folder; loading the model says so
        return None
    try:
        found = {} if file is None else json.loads(Path(file).read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it must be an object")
    except ValueError as error:
        raise ValueError(
            f"{file} does not contain the options with which training read its data ({error}). Delete it, or copy the "
            "file from the folder that training wrote."
        ) from error
    return found or None


def _has_columns(dataset: str, columns: str | None) -> bool:
    """Whether a file or folder has the columns that a training's prompts and answers were in, and none by our names."""
    from trl_ulma.data.columns import TEXTS, unsaid
    from trl_ulma.data.files import load_rows
    from trl_ulma.data.names import Names

    named = {ours: theirs for ours, theirs in Names.of(columns, None).columns.items() if ours in TEXTS}
    others = set(named) - set(named.values())
    how: Any = {"streaming": True, "invalid_rows": "mark", "needs_label": False}
    try:
        with unsaid():
            splits: Any = load_rows(dataset, **how)
            there = [set(next(iter(rows), ())) for rows in splits.values()]
            # Raises an error if the file has no such names, or two that look alike
            load_rows(dataset, columns=named, **how)
    except (OSError, TypeError, ValueError):  # which reading it says
        return False
    return bool(named) and all(map(others.isdisjoint, there))


def _as_text(names: Any) -> str | None:
    """Names of columns or labels as they are written on the command line. In YAML they can be a mapping.

    Example:
        >>> _as_text({True: 1, "meh": 0}), _as_text("label=stars"), _as_text({"yes, please": 1})
        ('true=1,yes=1,meh=0', 'label=stars', '"yes, please"=1')
    """
    if not isinstance(names, Mapping):
        return names
    words = {True: ("true", "yes"), False: ("false", "no")}  # `yes` and `no` are true and false in YAML
    return ",".join(
        f"{_between_quotes(word)}={_between_quotes(value)}"
        for name, value in names.items()
        for word in (words[name] if isinstance(name, bool) else (name,))
    )


def _between_quotes(name: Any) -> str:
    """A name, between quotes if it contains what separates names."""
    mark = "'" if '"' in str(name) else '"'
    return f"{mark}{name}{mark}" if re.search("[,=]", str(name)) else str(name)


def _known_as(dataset: str) -> str:
    """The name of a dataset on the Hub; of a file or folder only the last part, because the model may be published."""
    return Path(dataset).resolve().name if Path(dataset).exists() else dataset
