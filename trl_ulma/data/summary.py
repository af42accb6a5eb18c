"""Statistics of a set of pointwise rows: labels, demonstrations, lengths."""

from itertools import pairwise
from typing import Any

import numpy as np
from datasets import Dataset

# Up to this number of different values are counted individually. More values are counted in this number of bins.
BINS = 10
QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)


def summarize(rows: Dataset) -> dict[str, Any]:
    """The label histogram, the share of demonstrations, and quantiles of the lengths in characters.

    Args:
        rows: pointwise rows with `label`, `sft_mask` and `label_type`.

    Returns:
        `rows`; `demonstrations` and `demonstration_share`; `labels`: label type → bins, each with `from`, `to` and
        `rows` (a bin only includes `to` if it equals `from`, or in the last bin); `characters`: "prompt" and
        "completion" → `QUANTILES` and their values.

    Example:
        >>> from trl_ulma.data.adapters import row
        >>> summary = summarize(Dataset.from_list([row("Hi", "Hello!", 1.0), row("Hi", "Go.", 0.0)]))
        >>> summary["labels"]["binary"]
        [{'from': 0.0, 'to': 0.0, 'rows': 1}, {'from': 1.0, 'to': 1.0, 'rows': 1}]
        >>> summary["characters"]["completion"]["0.5"]
        4.5
    """
    label, mask, kind = (np.array(rows[name]) for name in ("label", "sft_mask", "label_type"))
    lengths = {
        name: [
            len(turns) if isinstance(turns, str) else sum(len(turn["content"]) for turn in turns)
            for turns in rows[name]
        ]
        for name in ("prompt", "completion")
    }
    return {
        "rows": len(rows),
        "demonstrations": int(mask.sum()),
        "demonstration_share": float(mask.mean()),
        "labels": {str(each): _histogram(label[kind == each]) for each in np.unique(kind)},
        "characters": {
            name: {f"{q:g}": float(value) for q, value in zip(QUANTILES, np.quantile(each, QUANTILES), strict=True)}
            for name, each in lengths.items()
        },
    }


def _histogram(label: np.ndarray) -> list[dict[str, float]]:
    values, counts = np.unique(label, return_counts=True)
    if len(values) > BINS:
        counts, edges = np.histogram(label, BINS)
        bounds = pairwise(edges)
    else:
        bounds = zip(values, values, strict=True)
    return [
        {"from": float(low), "to": float(high), "rows": int(count)}
        for (low, high), count in zip(bounds, counts, strict=True)
    ]
