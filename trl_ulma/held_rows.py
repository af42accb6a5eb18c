"""The prepared rows of a trainer, by which it recognizes rows that it is given later."""

from typing import Any

from datasets import Dataset

from trl_ulma.likelihood.precomputed import input_hashes, known_ref_logps
from trl_ulma.training_plan import TrainingPlan

# What training reads of a row besides its tokens
_LEARNED_FROM = ("label", "sft_mask", "label_type", "log_z", "weight")


class HeldRows:
    """The datasets of a trainer, with precomputed log-probabilities if there are any.

    Args:
        plan: the plan of the training, with its prepared rows.
    """

    def __init__(self, plan: TrainingPlan):
        self._plan = plan
        self._train_dataset = plan.train_dataset
        self._first: list[Any] = []
        self._held: list[Any] = []
        self._last: Any = None

    def hold(self, datasets: list[Any]) -> None:
        """Take the datasets that the trainer has now. It also keeps the first ones."""
        self._held = datasets
        self._first = self._first or datasets

    def hold_last(self, dataset: Any) -> None:
        """Take the dataset that was evaluated last."""
        self._last = dataset

    def has(self, dataset: Any) -> bool:
        """Whether this trainer has prepared the dataset."""
        return any(dataset is each for each in (*self._plan.datasets, *self._held, self._last))

    def prepare(self, dataset: Any, name: str) -> Any:
        """Prepare rows. If the trainer knows the log π_ref of all of them, they have a column `ref_logps`."""
        if self.has(dataset):
            return dataset
        held = (*self._first, *self._held, self._last)
        stored = isinstance(dataset, Dataset) and {"prompt_ids", "ref_logps"} <= set(dataset.column_names)
        known, read = None, None
        if stored and dataset.format["type"] != "custom":
            known, read = known_ref_logps(dataset, held), dataset
            if known is not None:
                read = dataset = dataset.remove_columns("ref_logps")
        prepared = self._plan.prepare(dataset, name)
        if isinstance(prepared, Dataset) and prepared is not read:
            # They may be some of this trainer's own rows, such as with `select`
            known = known_ref_logps(prepared, held)
        return prepared if known is None else prepared.add_column("ref_logps", known)

    def to_train_on(self, dataset: Any) -> Any:
        """Rows that were put in the place of the training set, prepared.

        Raises:
            ValueError: if they are not prepared rows of the training set.
        """
        whose = "that are not prepared"
        if "prompt_ids" in (getattr(dataset, "column_names", None) or ()):
            dataset = self.prepare(dataset, "train")
            whose = self._strangers(dataset)
        if whose:
            raise ValueError(
                f"trainer.train_dataset was replaced by rows {whose}, and the trainer has already read its labels. "
                "Create another trainer with these rows."
            )
        return dataset

    def check_transforms(self, datasets: list[Any]) -> None:
        """Raise ValueError if a transform was set on the trainer's own rows."""
        if any(self.has(rows) and isinstance(rows, Dataset) and rows.format["type"] == "custom" for rows in datasets):
            raise ValueError(
                "A transform was set on rows that the trainer has already read and checked (set_transform). Set it "
                "on the raw rows, and create another trainer with them."
            )

    def _strangers(self, rows: Any) -> str:
        """Which prepared rows are not among those of the training set, in the words of an error; "" if all are."""
        if not isinstance(self._train_dataset, Dataset):
            return ""  # the rows of a stream are not known
        if not isinstance(rows, Dataset):
            return "of a stream"
        own = set(_as_read(self._train_dataset))
        other = [row for row, read in zip(rows["row"], _as_read(rows), strict=True) if read not in own]
        if not other:
            return ""
        which = f"({len(other):,} of {len(rows):,}, such as row {other[0]})"
        return f"of another trainer, or with other tokens, labels or weights {which}"


def _as_read(rows: Dataset) -> list[tuple[Any, ...]]:
    """What is read of each prepared row: its tokens, and the columns that say how it is learned from."""
    plain = rows.with_format(None)
    columns = [plain[name][:] if name in rows.column_names else [None] * len(rows) for name in _LEARNED_FROM]
    return list(zip(input_hashes(rows), *columns, strict=True))
