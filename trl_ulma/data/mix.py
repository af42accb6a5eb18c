"""Several data sets as one."""

from collections.abc import Mapping
from dataclasses import dataclass

from datasets import Dataset, concatenate_datasets

from trl_ulma.data.files import split_by_prompt
from trl_ulma.labels import LabelRules, read_labels

COLUMNS = ("prompt", "completion", "label", "sft_mask", "label_type")


@dataclass(frozen=True)
class Part:
    """What a mixture took of one of its parts.

    Attributes:
        taken: rows in the mixture.
        of: rows that there were.
        share: of the mixture's rows.
    """

    taken: int
    of: int
    share: float


@dataclass(frozen=True)
class Mixture:
    """A shuffled mixture; `str()` of it says what it is made of.

    Attributes:
        rows: point-wise rows, with the name of the part that each comes from in column `part`.
        parts: name → what was taken.
        seed: of the choice and the order.
    """

    rows: Dataset
    parts: Mapping[str, Part]
    seed: int

    def __str__(self) -> str:
        made = (f"{part.taken:,} of {part.of:,} rows of {name} ({part.share:.1%})" for name, part in self.parts.items())
        return f"{len(self.rows):,} rows (seed {self.seed}): {', '.join(made)}."


def mix(parts: Mapping[str, Dataset], fractions: Mapping[str, float], *, seed: int) -> Mixture:
    """A part of each data set, shuffled together; whole prompts are taken, none of them twice.

    Rows without `label_type` are binary; of rows without `sft_mask` those with label 1 are demonstrations, as trainers
    read them. Other columns than `COLUMNS`, and `weight` and `log_z` where all parts have them, are refused.

    Args:
        parts: name → point-wise rows.
        fractions: name → how much of the part is taken, above 0 and up to 1, for each part.
        seed: another seed takes other prompts, and orders them differently.

    Raises:
        ValueError: where fractions and parts do not have the same names, a fraction is outside (0, 1], a column is
            missing or not in all parts, or a label is wrong.

    Example:
        >>> rows = Dataset.from_dict({"prompt": list("abcd"), "completion": list("abcd"), "label": [1, 0, 1, 0]})
        >>> print(mix({"half": rows, "all": rows}, {"half": 0.5, "all": 1}, seed=0))
        6 rows (seed 0): 2 of 4 rows of half (33.3%), 4 of 4 rows of all (66.7%).
    """
    if not parts or set(parts) != set(fractions):
        raise ValueError(
            f"fractions are given for {', '.join(fractions) or 'none'}, and parts are {', '.join(parts) or 'none'}. "
            "Give each part a fraction."
        )
    for name, fraction in fractions.items():
        if not 0 < fraction <= 1:
            raise ValueError(f"The fraction of {name} is {fraction}; it must be above 0 and at most 1.")
    whole = {name: _with_columns(name, rows) for name, rows in parts.items()}
    if len({tuple(sorted(rows.column_names)) for rows in whole.values()}) > 1:
        found = "; ".join(f"{name}: {', '.join(rows.column_names)}" for name, rows in whole.items())
        raise ValueError(f"The parts of a mixture need the same columns; found {found}. Add or remove some.")
    kinds = {name: isinstance(rows[0]["prompt"], str) for name, rows in whole.items()}
    if len(set(kinds.values())) > 1:
        text = ", ".join(name for name, is_text in kinds.items() if is_text)
        raise ValueError(f"Prompts are text in {text} and messages elsewhere. Bring all parts into one form.")
    taken = {
        name: rows if fractions[name] == 1 else split_by_prompt(rows, test_size=fractions[name], seed=seed)["test"]
        for name, rows in whole.items()
    }
    features = next(iter(taken.values())).features
    named = [rows.cast(features).add_column("part", [name] * len(rows)) for name, rows in taken.items()]
    mixed = concatenate_datasets(named).shuffle(seed=seed)
    return Mixture(
        mixed,
        {name: Part(len(rows), len(whole[name]), len(rows) / len(mixed)) for name, rows in taken.items()},
        seed,
    )


def _with_columns(name: str, rows: Dataset) -> Dataset:
    """The rows with all of `COLUMNS`, their labels checked."""
    missing = [column for column in COLUMNS[:3] if column not in rows.column_names]
    strange = [column for column in rows.column_names if column not in (*COLUMNS, "weight", "log_z")]
    if missing or strange or not len(rows):
        found = f"found {', '.join(rows.column_names)}, {len(rows)} rows"
        raise ValueError(
            f"The part {name} is to have rows, with prompt, completion, label, and perhaps sft_mask, label_type, "
            f"weight and log_z; {found}."
        )
    columns = {column: rows[column][:] for column in rows.column_names if column not in COLUMNS[:2]}
    read = {"label_type": ["binary"] * len(rows)}
    read |= read_labels(columns, range(len(rows)), name, LabelRules(need_mask=True))
    rows = rows.select_columns(list(COLUMNS[:2]))
    for column, values in sorted(read.items()):
        rows = rows.add_column(column, values)
    return rows
