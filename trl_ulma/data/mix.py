"""Combines several datasets into one."""

from collections.abc import Mapping
from dataclasses import dataclass

from datasets import Dataset, concatenate_datasets

from trl_ulma.data.splits import rows_of_prompts
from trl_ulma.labels import LabelRules, read_labels

COLUMNS = ("prompt", "completion", "label", "sft_mask", "label_type")


@dataclass(frozen=True)
class Part:
    """The contribution of one part to a mixture.

    Attributes:
        taken: the number of rows of the part in the mixture.
        of: the number of rows of the part.
        share: the share of the part in the rows of the mixture.
    """

    taken: int
    of: int
    share: float


@dataclass(frozen=True)
class Mixture:
    """A shuffled mixture. `str()` describes its parts.

    Attributes:
        rows: pointwise rows, with the name of their part in the column `part`.
        parts: name → contribution of the part.
        seed: the seed of the choice and the order.
    """

    rows: Dataset
    parts: Mapping[str, Part]
    seed: int

    def __str__(self) -> str:
        made = (f"{part.taken:,} of {part.of:,} rows of {name} ({part.share:.1%})" for name, part in self.parts.items())
        return f"{len(self.rows):,} rows (seed {self.seed}): {', '.join(made)}."


def mix(parts: Mapping[str, Dataset], fractions: Mapping[str, float], *, seed: int) -> Mixture:
    """Take a fraction of each dataset and shuffle the rows together. All rows of a prompt are taken or none.

    Like in the trainers, rows without `label_type` are binary, and rows with label 1 are demonstrations if there is no
    `sft_mask`. The only supported columns are `COLUMNS`, and `weight` and `log_z` if all parts have them.

    Args:
        parts: name → pointwise rows.
        fractions: name → the fraction of the part to take, above 0 and at most 1. Each part needs one.
        seed: the seed of the choice and the order. Another seed takes other prompts in another order.

    Raises:
        ValueError: if fractions and parts have different names, if a fraction is outside (0, 1], if a column is missing
            or not in all parts, or if a label is invalid.

    Example:
        >>> rows = Dataset.from_dict({"prompt": list("abcd"), "completion": list("abcd"), "label": [1, 0, 1, 0]})
        >>> print(mix({"half": rows, "all": rows}, {"half": 0.5, "all": 1}, seed=0))
        6 rows (seed 0): 2 of 4 rows of half (33.3%), 4 of 4 rows of all (66.7%).
    """
    if not parts or set(parts) != set(fractions):
        raise ValueError(
            f"fractions are given for {', '.join(fractions) or 'none'}, but the parts are "
            f"{', '.join(parts) or 'none'}. Give each part a fraction."
        )
    for name, fraction in fractions.items():
        if not 0 < fraction <= 1:
            raise ValueError(f"The fraction of {name} is {fraction}; it must be above 0 and at most 1.")
    whole = {name: _with_columns(name, rows) for name, rows in parts.items()}
    if len({tuple(sorted(rows.column_names)) for rows in whole.values()}) > 1:
        found = "; ".join(f"{name}: {', '.join(rows.column_names)}" for name, rows in whole.items())
        raise ValueError(f"The parts of a mixture need the same columns; found {found}. Add or remove columns.")
    kinds = {name: isinstance(rows[0]["prompt"], str) for name, rows in whole.items()}
    if len(set(kinds.values())) > 1:
        text = ", ".join(name for name, is_text in kinds.items() if is_text)
        raise ValueError(f"Prompts are text in {text}, but messages elsewhere. Convert all parts to the same form.")
    taken = {
        name: rows if fractions[name] == 1 else rows.select(rows_of_prompts(rows, test_size=fractions[name], seed=seed))
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
    """The rows with all `COLUMNS` and checked labels."""
    missing = [column for column in COLUMNS[:3] if column not in rows.column_names]
    strange = [column for column in rows.column_names if column not in (*COLUMNS, "weight", "log_z")]
    if missing or strange or not len(rows):
        found = f"found {', '.join(rows.column_names)}, {len(rows)} rows"
        raise ValueError(
            f"The part {name} must have at least one row, and the columns prompt, completion, label, and optionally "
            f"sft_mask, label_type, weight and log_z; {found}."
        )
    columns = {column: rows[column][:] for column in rows.column_names if column not in COLUMNS[:2]}
    read = {"label_type": ["binary"] * len(rows)}
    read |= read_labels(columns, range(len(rows)), name, LabelRules(need_mask=True))
    rows = rows.select_columns(list(COLUMNS[:2]))
    for column, values in sorted(read.items()):
        rows = rows.add_column(column, values)
    return rows
