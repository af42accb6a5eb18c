"""Facts that are stored with prepared rows: which rows were left out, and the rules by which labels were read."""

import json
from typing import Any

from datasets import Dataset, IterableDataset


def note(rows: Dataset | IterableDataset, **facts: Any) -> None:
    """Store facts about prepared rows in their `info`, which is kept when they are saved and loaded."""
    # A copy, because datasets share their `info` with the datasets that they were created from
    rows._info = rows.info.copy()
    rows.info.description = json.dumps(noted(rows) | facts)


def noted(rows: Dataset | IterableDataset) -> dict[str, Any]:
    """The facts that `note` has stored with rows. {} if there are none.

    Example:
        >>> rows = Dataset.from_dict({"label": [1.0]})
        >>> note(rows, left_out={"its answer is empty": 2})
        >>> noted(rows.select([0]))
        {'left_out': {'its answer is empty': 2}}
    """
    try:
        found = json.loads(rows.info.description or "")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def left_out_of(rows: Dataset) -> dict[str, int]:
    """The number of raw rows that were left out of prepared rows, by reason.

    Example:
        >>> left_out_of(Dataset.from_dict({"label": [1.0]}))
        {}
    """
    return noted(rows).get("left_out", {})
