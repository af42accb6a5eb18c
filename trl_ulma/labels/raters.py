"""Columns along which labels differ, such as the names of strict and lenient raters."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from trl_ulma.labels.invalid_rows import InvalidRow
from trl_ulma.labels.outliers import outliers
from trl_ulma.labels.rater_offsets import rater_name

# A column is looked at if it has at most so many values, and each of two or more values has so many rows at least
MOST_RATERS, _ROWS = 50, 8
# Variance between values over that within them, from which means differ: by chance, fewer than 1 column in 500 has more
_F = 8.0
# The means of rows that are named
_NAMED = 6


def raters_in_words(
    label: np.ndarray,
    columns: Mapping[str, Sequence[Any]],
    remedy: Callable[[str], str] = 'columns="rater={}" and label_transform="center_raters,standardize"'.format,
) -> list[str]:
    """A warning about each column whose values have labels of different means.

    Args:
        label: `(N,)` labels, NaN where unknown.
        columns: name → `(N,)` values of a column that is not read.
        remedy: returns the settings that remove the differences between the raters that a column names.

    Example:
        >>> label = np.array([1.0, 2.0] * 10 + [4.0, 5.0] * 10)
        >>> print(raters_in_words(label, {"who": ["Tom"] * 20 + ["Ann"] * 20, "row": range(40)})[0])
        Labels differ by the column who, which is not read: Tom 1.5, Ann 4.5 on average. If it names raters, set
        columns="rater=who" and label_transform="center_raters,standardize". If it names what was rated, such as a model
        or a topic, this may be right.
    """
    found = []
    label = np.array(label, dtype=np.float64)
    known = np.flatnonzero(np.isfinite(label))
    label[known[outliers(label[known])]] = np.nan
    for name, values in columns.items():
        means = _means(label, values)
        if means is None:
            continue
        shown = [f"{value} {mean:.3g}" for value, mean in means]
        if len(shown) > _NAMED:
            half = _NAMED // 2
            shown = [*shown[:half], "…", *shown[-half:]]
        found.append(
            f"Labels differ by the column {name}, which is not read: {', '.join(shown)} on average. If it names "
            f"raters, set {remedy(name)}. If it names what was rated, such as a model or a topic, this may be right."
        )
    return found


def _means(label: np.ndarray, values: Sequence[Any]) -> list[tuple[str, float]] | None:
    """(value, mean of its labels), lowest mean first, if the means differ by more than chance. None if not."""
    try:  # a column of whole numbers with empty cells has floats
        texts = np.array([rater_name(value) for value in values], dtype=object)
    except InvalidRow:
        return None
    there = np.isfinite(label) & (texts != "")
    names, group, rows = np.unique(texts[there].astype(str), return_inverse=True, return_counts=True)
    large = np.flatnonzero(rows >= _ROWS)
    if len(large) < 2 or len(names) > MOST_RATERS:
        return None
    kept = np.isin(group, large)
    of, labels = np.searchsorted(large, group[kept]), label[there][kept]
    sizes = np.bincount(of)
    means = np.bincount(of, labels) / sizes
    between = (sizes * (means - labels.mean()) ** 2).sum() / (len(large) - 1)
    within = ((labels - means[of]) ** 2).sum() / max(len(labels) - len(large), 1)
    if between < _F * within or not between:
        return None
    return sorted(zip(names[large].tolist(), means.tolist(), strict=True), key=lambda each: each[1])
