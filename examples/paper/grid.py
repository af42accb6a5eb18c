"""The cells of the paper's experiments: which there are, and the settings of each, from the files in `configs`."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

CONFIGS = Path(__file__).parent / "configs"
SCALES = ("small", "paper")
DATA = ("hh", "golden-hh", "qa-feedback", "red-team")
METHODS = (
    *("base", "sft", "unlearning", "unlikelihood", "positive-dpo", "negative-dpo"),
    *("dpo", "rlhf", "pointwise-rlhf", "pointwise-dpo", "ulma"),
)
# At the paper's scale, with pairs
AUTHORS_CODE = "authors-code"
TRAINERS = ("ulma", "dpo", "reward", "pointwise-reward", "rloo")
# What β is an option of
_HAS_BETA = ("ulma", "dpo", "rloo")
# What a sweep varies, a field of `Cell`: (what it is, whether it is compared on a logarithmic axis)
SWEEPS = {
    "beta": ("β", True),
    "quality": ("share of good demonstrations", False),
    "learning_rate": ("learning rate", True),
    "train_rows": ("training rows", True),
}
# What one file may hold
_KEYS = {
    "scale": {
        *("processes", "beta", "chat_template", "rows", "data", "answers", "scoring_batch_size"),
        *("training", "trainers"),
    },
    "data": {"title", "family", "input", "options", "pairs", "label_type", "criterion", "ordinary", "methods"},
    "method": {"title", "stages"},
}


@dataclass(frozen=True)
class Cell:
    """One training and its evaluation.

    Attributes:
        scale, data, method: names of files in `configs`.
        seed: of the adapters, the rows' order and what is sampled; with folds it chooses the fold.
        beta: another β than the scale's.
        quality: the share of demonstrations of high quality, the others being ordinary ones.
        learning_rate, train_rows: others than those of the run that the cell is in.
    """

    scale: str
    data: str
    method: str
    seed: int = 0
    beta: float | None = None
    quality: float | None = None
    learning_rate: float | None = None
    train_rows: int | None = None

    @property
    def name(self) -> str:
        """A path of its own.

        Example:
            >>> Cell("small", "hh", "ulma", 1, beta=0.5).name
            'small/hh/ulma/beta-0.5_seed-1'
        """
        varied = [f"{key}-{value:g}_" for key in SWEEPS if (value := getattr(self, key)) is not None]
        return f"{self.scale}/{self.data}/{self.method}/{''.join(varied)}seed-{self.seed}"


def read(kind: str, name: str) -> dict[str, Any]:
    """A file of `configs`.

    Raises:
        ValueError: where there is none of that name, or it holds something else.
    """
    file = CONFIGS / kind / f"{name}.yaml"
    if not file.is_file():
        there = sorted(each.stem for each in file.parent.glob("*.yaml"))
        near = difflib.get_close_matches(name, there, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(there)}."
        raise ValueError(f"There is no {kind} {name!r}. {hint}")
    found = yaml.safe_load(file.read_text(encoding="utf-8"))
    strange = sorted(set(found) - _KEYS[kind])
    if strange:
        raise ValueError(f"{file}: {', '.join(strange)} is not among {', '.join(sorted(_KEYS[kind]))}.")
    return found


def methods_of(scale: str, data: str) -> list[str]:
    """The methods that the paper has, or would have, for a dataset.

    Example:
        >>> "dpo" in methods_of("small", "hh"), "dpo" in methods_of("small", "red-team")
        (True, False)
    """
    found = read("data", data)
    return [*found["methods"], *([AUTHORS_CODE] if scale == "paper" and found["pairs"] else [])]


def cells(
    scale: str,
    data: Sequence[str],
    methods: Sequence[str] | None,
    seeds: int,
    *,
    swept: str | None = None,
    values: Sequence[float] = (),
) -> list[Cell]:
    """The cells of a part of the grid; the untuned model, which the others are compared with, comes first.

    Args:
        scale: one of `SCALES`.
        data: of `DATA`.
        methods: of `METHODS`; None is all that a dataset has.
        seeds: how many.
        swept: of `SWEEPS`: each cell once for each of the values. A sweep over β is of the methods whose loss has one.
        values: for it.

    Raises:
        ValueError: for a name that is none, a method that none of the datasets has, or a sweep that nothing has.

    Example:
        >>> [cell.name for cell in cells("small", ["red-team"], ["ulma"], 2)]
        ['small/red-team/base/seed-0', 'small/red-team/ulma/seed-0', 'small/red-team/ulma/seed-1']
    """
    if seeds < 1:
        raise ValueError(f"seeds must be 1 or above; got {seeds}.")
    if len(set(values)) < len(values):
        raise ValueError(f"A sweep has each value once; got {', '.join(f'{value:g}' for value in values)}.")
    for value in values:
        if swept == "quality" and not 0 <= value <= 1:
            raise ValueError(f"A share of demonstrations is between 0 and 1; got {value}.")
        if swept != "quality" and value <= 0:
            raise ValueError(f"A {SWEEPS[swept or ''][0]} is above 0; got {value:g}.")
    found, used = [], set()
    varied: list[dict[str, Any]] = [{swept: value} for value in values] if swept else [{}]
    for each in data:
        there = methods_of(scale, each)
        chosen = there if methods is None else [method for method in methods if method in there]
        used |= set(chosen)
        if swept == "quality" and "ordinary" not in read("data", each):
            raise ValueError(f"{each} has no ordinary demonstrations to take the place of better ones.")
        folds = rows_of(scale, each).get("folds")
        found += [Cell(scale, each, "base", fold) for fold in range(min(folds, seeds) if folds else 1)]
        for method in chosen:
            stages = [] if method == "base" else _stages(method)
            if not stages or (swept == "beta" and not any(map(_compares, stages))):
                continue
            if swept in ("beta", "learning_rate") and method == AUTHORS_CODE:
                continue
            found += [Cell(scale, each, method, seed, **what) for what in varied for seed in range(seeds)]
    for method in methods or ():
        if method not in used:
            if method not in (*METHODS, AUTHORS_CODE):
                read("method", method)
            raise ValueError(f"{method} is not for {', '.join(data)} at the {scale} scale.")
    return found


def rows_of(scale: str, data: str) -> dict[str, Any]:
    """Which rows of a dataset are taken, at a scale."""
    found = read("scale", scale)
    return found["rows"] | found["data"].get(data, {}).get("rows", {})


def _stages(method: str) -> list[dict[str, Any]]:
    if method == AUTHORS_CODE:
        own = yaml.safe_load((CONFIGS / "authors-code.yaml").read_text(encoding="utf-8"))
        return [{"trainer": "ulma", **own}]
    return read("method", method)["stages"]


def _compares(stage: Mapping[str, Any]) -> bool:
    """Whether β is in a stage's loss: where answers are compared with the reference."""
    losses = (stage.get("positive_loss", "sft"), stage.get("negative_loss", "pointwise_dpo"))
    return stage["trainer"] in _HAS_BETA and (stage["trainer"] != "ulma" or "pointwise_dpo" in losses)


def settings(
    cell: Cell, *, changed: dict[str, Any] | None = None, rows: dict[str, Any] | None = None, **answers: Any
) -> dict[str, Any]:
    """All settings of a cell, as they can be printed and run.

    Args:
        cell: which.
        changed: options of trainers that are changed in each stage.
        rows: what is changed of the rows' choice.
        answers: what is changed of how answers are made.

    Returns:
        `cell`, `rows`, `answers`, `scoring_batch_size`, `model`, `processes`, and `stages`: for each the `trainer` and
        its `options`, which are a YAML file of that trainer's command.

    Example:
        >>> found = settings(Cell("small", "hh", "sft"))
        >>> stage = found["stages"][0]
        >>> stage["trainer"], stage["options"]["negative_loss"], stage["options"]["num_train_epochs"]
        ('ulma', 'none', 1)
    """
    scale, data = read("scale", cell.scale), read("data", cell.data)
    of_data = scale["data"].get(cell.data, {})
    training = scale["training"] | (changed or {})
    chosen = {
        "family": data["family"],
        "input": data["input"],
        "options": data.get("options", {}) | of_data.get("options", {}),
        "pairs": data["pairs"],
        "label_type": data["label_type"],
        "ordinary": data.get("ordinary"),
        "chat_template": scale.get("chat_template"),
        "quality": cell.quality,
        **scale["rows"],
        **of_data.get("rows", {}),
        **(rows or {}),
    }
    if cell.train_rows is not None:
        chosen["train_rows"] = cell.train_rows
    chosen["fold"] = cell.seed % chosen["folds"] if chosen["folds"] else None
    stages = []
    for stage in _stages(cell.method):
        options = {name: value for name, value in stage.items() if name != "trainer"}
        if cell.method != AUTHORS_CODE:
            options = training | scale["trainers"][stage["trainer"]] | options
        options |= changed or {}
        if cell.learning_rate is not None:
            options["learning_rate"] = cell.learning_rate
        options["seed"] = cell.seed
        if stage["trainer"] in _HAS_BETA and cell.method != AUTHORS_CODE:
            options["beta"] = scale["beta"] if cell.beta is None else cell.beta
        if stage["trainer"] == "ulma":
            options["label_type"] = data["label_type"]
        if stage["trainer"] != "rloo":
            # Longer rows have been left out
            options["max_length"] = chosen["max_length"]
        stages.append({"trainer": stage["trainer"], "options": options})
    return {
        "cell": vars(cell),
        "title": "ULMA, authors' code" if cell.method == AUTHORS_CODE else read("method", cell.method)["title"],
        "data_title": data["title"],
        "criterion": data["criterion"],
        "beta": scale["beta"] if cell.beta is None else cell.beta,
        "model": training["model_name_or_path"],
        "bf16": training["bf16"],
        "rows": chosen,
        "answers": scale["answers"] | answers,
        "scoring_batch_size": scale["scoring_batch_size"],
        "processes": scale["processes"],
        "stages": stages,
    }
