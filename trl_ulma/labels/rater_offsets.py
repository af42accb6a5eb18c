"""By how much the labels of each rater are above or below those of an average rater."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from trl_ulma.labels.invalid_rows import InvalidRow
from trl_ulma.labels.texts import shown

# Raters that a notice names
_NAMED = 3


def rater_name(value: Any) -> str:
    """The name of a rater as text, "" if there is none. The number 7, as files with empty cells have it, is also "7.0".

    Raises:
        InvalidRow: for a value that is neither text nor a whole number nor a bool.

    Example:
        >>> rater_name(" Ann "), rater_name(7), rater_name("7.0"), rater_name(None), rater_name(float("nan"))
        ('Ann', '7', '7', '', '')
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or value != value:
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int):
        raise InvalidRow(
            f"is {shown(value)}; it must be text or a whole number that says who gave the label.",
            "rater is neither text nor a whole number",
            "rater",
        )
    name = str(value).strip()
    return name[:-2] if name.endswith(".0") and name[:-2].isdecimal() else name


def rater_offsets(labels: np.ndarray, raters: Sequence[Any]) -> dict[str, float]:
    r"""The offset of each rater: the best linear unbiased prediction in a one-way random-effects model.

    Label i of rater j is μ + uⱼ + eᵢⱼ, where the offset uⱼ has the variance B between raters, and eᵢⱼ the variance W
    within them. With nⱼ rows and the mean zⱼ of each of J raters, N rows and the mean z of all rows,

        W  = Σ (zᵢⱼ − zⱼ)² / (N − J)
        B  = max(0, Σ nⱼ (zⱼ − z)² / (J − 1) − W) / n₀     n₀ = (N − Σ nⱼ²/N) / (J − 1)
        tⱼ = nⱼ / (nⱼ + W/B)
        μ  = Σ tⱼ zⱼ / Σ tⱼ
        uⱼ = tⱼ (zⱼ − μ)

    tⱼ is close to 1 for a rater with many rows, whose mean is known well. It is close to 0 for a rater with few rows,
    whose mean says more about these answers than about the rater. With B = 0, raters do not differ by more than chance,
    and all offsets are 0. If all raters have as many rows, μ is the mean of all labels.

    The offsets are right if raters were given answers of similar quality. Otherwise, they contain that difference.

    Args:
        labels: `(N,)` labels.
        raters: `(N,)` names. Rows without a name, see `rater_name`, do not count.

    Raises:
        ValueError: if no row has a rater, if all have the same one, or if no rater has two rows.

    References:
        Searle, Casella and McCulloch, Variance Components (1992), chapters 3 (variances) and 7 (prediction).

    Example:
        >>> rater_offsets(np.array([1.0, 2.0, 3.0, 3.0, 4.0, 5.0]), ["Tom"] * 3 + ["Ann"] * 3)
        {'Ann': 0.833..., 'Tom': -0.833...}
    """
    texts = np.array([rater_name(rater) for rater in raters], dtype=object)
    there = texts != ""
    names, group, rows = np.unique(texts[there].astype(str), return_inverse=True, return_counts=True)
    total, count = int(there.sum()), len(names)
    if not total:
        raise ValueError(
            f"label_transform: center_raters needs to know who gave a label, but none of the {len(texts)} rows has a "
            "rater. Fill the column `rater`, or leave center_raters out."
        )
    if count == 1 or count == total:
        found = (
            f"all rows have the rater {str(names[0])!r}" if count == 1 else f"each of the {count} raters has one row"
        )
        raise ValueError(
            f"label_transform: center_raters needs two or more raters, and raters with several rows, but {found}. "
            "Leave it out."
        )
    mean = labels[there].mean()
    label = labels[there] - mean
    means = np.bincount(group, label) / rows
    within = ((label - means[group]) ** 2).sum() / (total - count)
    size = (total - (rows**2).sum() / total) / (count - 1)
    between = max((rows * means**2).sum() / (count - 1) - within, 0.0) / size
    if not between:
        return dict.fromkeys(names.tolist(), 0.0)
    trust = rows / (rows + within / between)
    average = (trust * means).sum() / trust.sum()
    return dict(zip(names.tolist(), (trust * (means - average)).tolist(), strict=True))


def alike_raters(raters: Iterable[str]) -> str | None:
    """A warning about names that only differ in capital letters or spaces. None if there are none.

    Example:
        >>> print(alike_raters(["Tom", "tom", "Ann"]))
        Raters whose names only differ in capital letters or spaces count as different ones: 'Tom' and 'tom'. If they
        are the same person, write one name in all rows.
    """
    found: dict[str, list[str]] = {}
    for rater in raters:
        found.setdefault("".join(rater.casefold().split()), []).append(rater)
    alike = [names for names in found.values() if len(names) > 1]
    if not alike:
        return None
    listed = "; ".join(" and ".join(map(repr, names)) for names in alike[:_NAMED])
    listed += f"; and {len(alike) - _NAMED:,} more" if alike[_NAMED:] else ""
    return (
        f"Raters whose names only differ in capital letters or spaces count as different ones: {listed}. If they are "
        "the same person, write one name in all rows."
    )


def unknown_raters(raters: Sequence[str], known: Mapping[str, float], where: str) -> str | None:
    """What to say of rows without a rater, and of raters that the training did not have. None if there are none.

    Args:
        raters: `(N,)` names, "" for none.
        known: the offsets of the training.
        where: name of the dataset.

    Example:
        >>> print(unknown_raters(["Ann", "", "Zoe", "Zoe"], {"Ann": 0.5}, "eval"))
        1 of 4 rows of the eval dataset has no rater. 2 of 4 have a rater that the training does not have: 'Zoe'. Such
        labels are read as those of an average rater.
        >>> unknown_raters(["Ann"], {"Ann": 0.5}, "eval") is None
        True
    """
    rows = f"of {len(raters):,}"
    missing = sum(not rater for rater in raters)
    unseen = [rater for rater in raters if rater and rater not in known]
    names = [*dict.fromkeys(unseen)]
    listed = ", ".join(map(repr, names[:_NAMED])) + (f" and {len(names) - _NAMED:,} more" if names[_NAMED:] else "")
    told = []
    if missing:
        told.append(f"{missing:,} {rows} rows of the {where} dataset {'has' if missing == 1 else 'have'} no rater.")
    if unseen:
        which = rows if missing else f"{rows} rows of the {where} dataset"
        have = "has" if len(unseen) == 1 else "have"
        told.append(f"{len(unseen):,} {which} {have} a rater that the training does not have: {listed}.")
    return " ".join([*told, "Such labels are read as those of an average rater."]) if told else None
