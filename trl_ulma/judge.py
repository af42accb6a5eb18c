"""The model as a judge: what a trained policy thinks of rows, and what must be kept beside it to know that later."""

# transformers declares the model and the processing class of a trainer optional or of many kinds
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import numpy as np
from datasets import Dataset, Value
from safetensors.torch import load_file
from transformers.utils import cached_file
from trl import DPOTrainer

from trl_ulma.labels import LabelRules, LabelTransform
from trl_ulma.log_partition import Learned, LogPartition
from trl_ulma.rows.dataset_labels import is_continuous
from trl_ulma.rows.preparation import Preparation

# Beside the model's weights
FILE = "pointwise.json"
COLUMNS = ("row", "reward", "probability", "predicted_label", "surprise")


@dataclass(frozen=True)
class JudgeSettings:
    """What a score depends on besides the weights: `pointwise.json` in a saved model's folder.

    Attributes:
        beta: β.
        label_type: of rows that do not say it themselves.
        length_normalize: whether log-probabilities are divided by the completion's tokens.
        log_z: a number of nats, or the name of a choice, whose state is in `log_z.safetensors`.
        max_length: longest sequence in tokens.
        truncation_mode: "keep_start" or "keep_end".
        label_transform: fitted, or None.
        sft_threshold: continuous labels of this and above, after the transform, are demonstrations; or None.
        trl_ulma: the version that wrote it.
    """

    beta: float
    label_type: str = "binary"
    length_normalize: bool = False
    log_z: float | str = 0.0
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    label_transform: LabelTransform | None = None
    sft_threshold: float | None = None
    trl_ulma: str = ""

    def write(self, folder: str | Path) -> None:
        """Write them into a folder."""
        steps = None if self.label_transform is None else self.label_transform.to_json()
        text = json.dumps({**asdict(self), "label_transform": steps}, indent=2)
        (Path(folder) / FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Those that a file holds; all but `beta` may be left out of it.

        Raises:
            ValueError: naming the file, where it holds something else.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            steps = found.get("label_transform")
            return cls(**{**found, "label_transform": None if steps is None else LabelTransform.from_json(steps)})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} does not hold the settings of a point-wise model ({error}).") from error


def saved_file(model: str, name: str) -> str | None:
    """Where a file is that was saved with a model, in its folder or on the hub; None where there is none."""
    return cached_file(
        model, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )


def saved_log_partition(settings: JudgeSettings, state: str | Path | None, device: Any) -> LogPartition:
    """log Z as a saved model has it.

    Args:
        settings: saved with the model.
        state: the file `log_z.safetensors`; None where there is none.
        device: of the rows.

    Raises:
        ValueError: where the choice has a state and there is no file.

    Example:
        >>> saved_log_partition(JudgeSettings(beta=0.1, log_z=0.5), None, "cpu").log_z
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    if not isinstance(settings.log_z, str) or settings.log_z == "column":
        return LogPartition(0.0 if settings.log_z == "column" else float(settings.log_z), device)
    if state is None:
        raise ValueError(
            f"The model was trained with log_z={settings.log_z!r}, and its state, log_z.safetensors, is not beside it. "
            "Copy it there from the folder that training wrote."
        )
    found = load_file(state)
    if "weights" not in found:
        fixed = LogPartition(0.0, device)
        fixed.log_z.copy_(found["log_z"])
        return fixed
    # The weights are of a prompt's state and of two kinds of labels
    learned = Learned(len(found["weights"]) - 2, beta=settings.beta, learning_rate=0.0, device=device)
    learned.load_state_dict(found)
    return learned


def judged(reward: np.ndarray, label: np.ndarray, continuous: np.ndarray, rules: LabelRules) -> dict[str, np.ndarray]:
    r"""What an implicit reward says of rows.

        binary:      P(label = 1) = σ(r),  surprise −z·log σ(r) − (1 − z)·log σ(−r)
        continuous:  E[label] = r,         surprise (z − r)²

    Args:
        reward: `(N,)` r.
        label: `(N,)` z after the transform.
        continuous: `(N,)` bool.
        rules: how labels were read.

    Returns:
        `probability` (NaN for continuous labels), `predicted_label` (the expected label on the scale that rows carry)
        and `surprise` (the loss of Eq. 8 or Eq. 9, high where label and reward disagree), `(N,)` each.

    Example:
        >>> found = judged(np.array([0.0, 2.0]), np.array([1.0, 1.5]), np.array([False, True]), LabelRules())
        >>> found["predicted_label"], found["surprise"].round(4)
        (array([0.5, 2. ]), array([0.6931, 0.25  ]))
    """
    negative, positive = np.logaddexp(0, reward), np.logaddexp(0, -reward)  # −log σ(−r), −log σ(r)
    probability = np.exp(-positive)
    expected = np.where(continuous, reward, probability)
    predicted = expected
    if rules.transform is not None:
        own = continuous == (rules.label_type == "continuous")
        predicted = np.where(own, rules.transform.invert(expected), expected)
    surprise = np.where(continuous, (label - reward) ** 2, label * positive + (1 - label) * negative)
    return {
        "probability": np.where(continuous, np.nan, probability),
        "predicted_label": predicted,
        "surprise": surprise,
    }


class Judges(DPOTrainer):
    """A `DPOTrainer` that says what its model thinks of rows, and saves beside it what that depends on."""

    _rules: LabelRules
    _has_reference: bool
    _positions: int | None
    log_partition: LogPartition

    def score(self, dataset: Dataset) -> Dataset:
        r"""What the policy thinks of each row: the row as it was, and

        - `row`: its number in `dataset`;
        - `reward`: the implicit reward r = β·(log π_θ − log π_ref + log Z);
        - `probability`: P(label = 1) = σ(r), None for continuous labels;
        - `predicted_label`: the expected label, r or σ(r), on the scale that the training rows carried, as far as
          `label_transform` has a way back (what comes of a threshold or of votes is a probability or rate);
        - `surprise`, where rows have labels: the row's loss of Eq. 8 or Eq. 9. The most surprising labels are the first
          to look at for errors: `scored.sort("surprise", reverse=True)`. Those of binary and of continuous labels are
          not comparable.

        Args:
            dataset: raw rows as the trainer takes them, with or without `label`. Of a pair both halves are scored, with
                `label` 1 and 0. `sft_mask` and `weight` are not read.

        Raises:
            TypeError: for what is no `Dataset`.
            ValueError: for rows that cannot be scored, or a model without a reference.
        """
        if not isinstance(dataset, Dataset):
            raise TypeError(f"score needs a Dataset, all of whose rows are at hand; got {type(dataset).__name__}.")
        if not self._has_reference:
            raise ValueError(
                f"A reward needs a reference model; with {self.args.method} no row is compared with one, so that none "
                "was loaded."
            )
        if dataset.format["type"] == "custom":  # rows are made as they are read
            dataset = Dataset.from_list([dict(row) for row in dataset])
        names = dataset.column_names
        if "prompt_ids" in names:
            raise ValueError("score takes raw rows, and these are prepared already. Pass the rows that they came from.")
        taken = [name for name in COLUMNS if name in names]
        if taken:
            raise ValueError(f"The rows have columns that score writes: {', '.join(taken)}. Rename or remove them.")
        choice: Any = self.args.log_z
        if choice == "column" and "log_z" not in names:
            raise ValueError("log_z='column' needs a column log_z in the scored rows, in nats; there is none.")
        if isinstance(choice, str) and choice != "column" and "log_z" in names:
            raise ValueError(
                f"The scored rows have a column log_z, and the model its own ({choice}). Remove the column."
            )
        is_labelled = "label" in names or "chosen" in names
        rows = dataset.remove_columns([name for name in ("sft_mask", "weight") if name in names])
        if not is_labelled:
            rows = rows.add_column("label", [0.5] * len(rows))  # which no reward depends on
        rules = replace(
            self._rules, need_mask=False, binary_only=False, transform=self._rules.transform if is_labelled else None
        )
        prepare = Preparation(
            self.processing_class,
            rules,
            self.args.max_length,
            self.args.truncation_mode,
            self._positions,
            is_for_training=False,
            invalid_rows=self.args.invalid_rows,
            assistant_only_loss=self.args.assistant_only_loss,
            chat=self.args.chat,
            system_message=self.args.system_message,
        )
        with self.accelerator.main_process_first():
            prepared: Any = prepare(rows, "scored", self.args.dataset_num_proc)
        reward = self._rewards(prepared)

        label = np.asarray(prepared["label"][:])
        continuous = is_continuous(prepared, self._rules.label_type)
        found: Mapping[str, Any] = judged(reward, label, continuous, self._rules)
        scored = dataset.with_format(None).select(prepared["row"][:])
        if is_labelled and "label" not in names:
            scored = scored.add_column("label", label.tolist())
        columns = {
            "row": prepared["row"][:],
            "reward": reward.tolist(),
            "probability": [None if np.isnan(p) else p for p in found["probability"].tolist()],
            "predicted_label": found["predicted_label"].tolist(),
        }
        if is_labelled:
            columns["surprise"] = found["surprise"].tolist()
        for name, values in columns.items():
            scored = scored.add_column(name, values, feature=Value("int64" if name == "row" else "float64"))
        return scored

    def _rewards(self, prepared: Any) -> np.ndarray:
        """`(N,)` implicit rewards."""
        compute_metrics, self.compute_metrics = self.compute_metrics, None
        loss_only, self.args.prediction_loss_only = self.args.prediction_loss_only, False
        try:
            predictions = self.predict(prepared, metric_key_prefix="score").predictions
        finally:
            self.compute_metrics, self.args.prediction_loss_only = compute_metrics, loss_only
        reward = np.asarray(predictions, dtype=np.float64)
        wrong = np.asarray(prepared["row"][:])[~np.isfinite(reward)].tolist()
        if wrong:
            raise FloatingPointError(f"The rewards of these scored rows are not finite: {wrong}. Score in float32.")
        return reward

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.judge_settings().write(str(self.args.output_dir if output_dir is None else output_dir))

    def use_settings(self, settings: JudgeSettings, log_partition: LogPartition) -> None:
        """Score with the label transform and the log Z of a saved model; the rest must be in `args` already."""
        self._rules = replace(self._rules, transform=settings.label_transform)
        self.args.log_z = settings.log_z
        self.log_partition = log_partition

    def judge_settings(self) -> JudgeSettings:
        """What scores depend on besides the weights."""
        args: Any = self.args
        return JudgeSettings(
            beta=args.beta,
            label_type=args.label_type,
            length_normalize=args.length_normalize,
            log_z=args.log_z,
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,
            label_transform=self._rules.transform,
            sft_threshold=self._rules.sft_threshold,
            trl_ulma=version("trl-ulma"),
        )
