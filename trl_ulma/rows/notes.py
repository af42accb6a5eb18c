"""Facts about prepared rows that go with them: what was left out, and by which rules their labels were read."""

import json
from typing import Any

from datasets import Dataset, IterableDataset


def note(rows: Dataset | IterableDataset, **facts: Any) -> None:
    """Keep facts about prepared rows with them, in their `info`, which saving and loading keeps as well."""
    # A new object, because data sets share theirs with those that they were made of
    rows._info = rows.info.copy()
    rows.info.description = json.dumps(noted(rows) | facts)


def noted(rows: Dataset | IterableDataset) -> dict[str, Any]:
    """What `note` has kept with rows; {} for rows that it knows nothing of.

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
    """How many raw rows were left out of prepared ones, by reason.

    Example:
        >>> left_out_of(Dataset.from_dict({"label": [1.0]}))
        {}
    """
    return noted(rows).get("left_out", {})
