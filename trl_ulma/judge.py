"""The model as a judge: what a trained policy thinks of rows."""

# transformers declares the processing class of many kinds
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from datasets import Dataset, Json, Value
from transformers.utils import logging

from trl_ulma.data import seen_prompts
from trl_ulma.data.origins import origins, with_origins
from trl_ulma.data.splits import prompts_of
from trl_ulma.labels import LABEL_TYPES, LabelRules, are_missing
from trl_ulma.likelihood.layouts import positions_of
from trl_ulma.likelihood.noise import evaluation_mode
from trl_ulma.likelihood.reference import Reference
from trl_ulma.likelihood.scorer import Scorer
from trl_ulma.likelihood.table import batches, batching_difference, collator_for, forward_inputs
from trl_ulma.log_partition import LogPartition
from trl_ulma.log_z import FILE as LOG_Z_FILE
from trl_ulma.log_z import saved_log_partition
from trl_ulma.predictions import ENOUGH, alike, beyond_training, judged, thumbs
from trl_ulma.rows.dataset_labels import is_continuous, own_labels, raters_of
from trl_ulma.rows.preparation import Preparation
from trl_ulma.saved import (
    SETTINGS_FILE,
    SavedSettings,
    batching_note,
    differs_from_training,
    load_model,
    load_processing_class,
    load_reference,
    saved_file,
    saved_settings,
    training_autocast,
)

logger = logging.get_logger(__name__)

# A label that is valid for either type, of rows without one; no reward depends on it
_NEUTRAL = 0.5
# Texts read as no label that a warning names
_NAMED = 3
COLUMNS = ("row", "file_line", "reward", "probability", "predicted_label", "surprise", "held_out")


class Judge:
    """Says what a trained policy thinks of rows, by its implicit reward.

    Args:
        settings: what rewards depend on besides the weights.
        processing_class: the policy's tokenizer, or its processor.
        rewards: gives `(N,)` implicit rewards of prepared rows.
        positions: how many tokens the model can read at most; None if that has no end.
        num_proc: processes that prepare rows.
        training_prompts: the hashes of the prompts that were trained on, or the file with them, see
            `trl_ulma.data.seen_prompts`; None if they are not known.

    Example:
        >>> judge = Judge.from_pretrained("out", ref_model="Qwen/Qwen3-0.6B")  # doctest: +SKIP
        >>> judge.score(rows).sort("surprise", reverse=True)  # doctest: +SKIP
    """

    def __init__(
        self,
        settings: SavedSettings,
        processing_class: Any,
        rewards: Callable[[Dataset], np.ndarray],
        *,
        positions: int | None = None,
        num_proc: int | None = None,
        training_prompts: str | np.ndarray | None = None,
    ):
        self.settings = settings
        self.processing_class = processing_class
        self._rewards = rewards
        self._positions = positions
        self._num_proc = num_proc
        self._training_prompts = training_prompts
        self._rules = LabelRules(settings.label_type, settings.sft_threshold, transform=settings.label_transform)

    @classmethod
    def from_pretrained(
        cls,
        folder: str,
        ref_model: Any = None,
        *,
        batch_size: int = 8,
        dtype: str = "auto",
        trust_remote_code: bool = False,
    ) -> Self:
        """A judge of a saved model.

        Args:
            folder: of the model or adapter, as `save_model` wrote it, or its name on the hub.
            ref_model: the reference, as a model or where one is; by default the one that training wrote down.
            batch_size: rows per forward.
            dtype: of the weights; "auto" is the one of training.
            trust_remote_code: run code that comes with the model.

        Raises:
            FileNotFoundError: if no settings were saved with the model.
            OSError: if a model is gone.
            ValueError: if there is no saying what the reference was, or it is another one than that of training.
        """
        settings = saved_settings(folder)
        if settings is None:
            raise FileNotFoundError(
                f"{folder} has no {SETTINGS_FILE}, which PointwiseDPOTrainer.save_model writes. For a model that was "
                'trained otherwise, write one beside it, such as {"beta": 0.1, "label_type": "binary"}.'
            )
        options: Any = {"dtype": dtype, "trust_remote_code": trust_remote_code}
        policy = load_model(folder, **options)
        reference = load_reference(policy, folder, settings, ref_model, **options)
        log_partition = saved_log_partition(settings, saved_file(folder, LOG_Z_FILE), policy.device)
        processing_class = load_processing_class(folder, trust_remote_code=trust_remote_code)
        cut = {"max_length": settings.max_length, "truncation_mode": settings.truncation_mode}
        collate = collator_for(processing_class, **cut)
        rewards = partial(
            _model_rewards,
            source=folder,
            policy=policy,
            reference=reference,
            settings=settings,
            log_partition=log_partition,
            collate=collate,
            batch_size=batch_size,
        )
        return cls(
            settings,
            processing_class,
            rewards,
            positions=positions_of(policy.config),
            training_prompts=saved_file(folder, seen_prompts.FILE),
        )

    def score(self, dataset: Dataset, *, invalid_rows: str = "error") -> Dataset:
        r"""What the policy thinks of each row: the row as it was, and

        - `row`: its number in `dataset`;
        - `file_line`, if `load_rows` has read the rows from files: the file and line of the row;
        - `reward`: the implicit reward r = β·(log π_θ − log π_ref + log Z);
        - `probability`: P(label = 1) = σ(r), None for continuous labels;
        - `predicted_label`: the expected label, r or σ(r), on the scale that the training rows carried, as far as
          `label_transform` has a way back (what comes of a threshold or of votes is a probability or rate);
        - `surprise`, if rows have labels: the row's loss of Eq. 8 or Eq. 9. The most surprising labels are the first to
          look at for errors: `scored.sort("surprise", reverse=True)`. Those of binary and of continuous labels are not
          comparable. It is None for rows without a label;
        - `held_out`: whether the prompt of the row was not in the training data, None if that is not known.

        Args:
            dataset: raw rows as the trainer takes them, with or without `label`, which may be None in some rows. Of a
                pair both halves are scored, with `label` 1 and 0. `sft_mask` and `weight` are not read.
            invalid_rows: "error" lists rows that cannot be scored, and stops; "drop" leaves them out, with a warning.

        Raises:
            TypeError: for what is no `Dataset`.
            ValueError: for rows that cannot be scored.
        """
        if not isinstance(dataset, Dataset):
            raise TypeError(f"score needs a Dataset, all of whose rows are at hand; got {type(dataset).__name__}.")
        if dataset.format["type"] == "custom":  # rows are made as they are read
            dataset = Dataset.from_list([dict(row) for row in dataset])
        names = dataset.column_names
        self._check_columns(names)
        missing = without_label(dataset)
        _warn_of_words(dataset, missing)
        if self.settings.log_z == "group" and "log_z" not in names:
            logger.warning(
                'The model was trained with log_z="group", so only the rewards of one prompt can be compared. '
                "probability, predicted_label and surprise are computed with log Z = 0, and hold for no single row."
            )
        is_paired = "chosen" in names
        is_labeled = is_paired or not missing.all()
        # A pair's labels are 1 and 0 by themselves, whatever labels the training had
        rules = LabelRules(is_settled=True) if is_paired else replace(self._rules, is_settled=True)
        rows = dataset.remove_columns([name for name in ("sft_mask", "weight") if name in names])
        saved = self.settings
        if not is_labeled:
            rows = _replaced(rows, "label", [_NEUTRAL] * len(rows))
        elif missing.any():
            rows = _with_neutral_labels(rows, missing, saved.label_type)
        prepare = Preparation(
            self.processing_class,
            replace(rules, transform=rules.transform if is_labeled else None),
            saved.max_length,
            saved.truncation_mode,
            self._positions,
            is_for_training=False,
            invalid_rows=invalid_rows,
            assistant_only_loss=saved.assistant_only_loss,
            chat=saved.chat,
            system_message=saved.system_message,
        )
        prepared: Any = prepare(rows, "scored", self._num_proc)
        if is_paired and saved.label_type != rules.label_type:
            prepared = _replaced(prepared, "label_type", [rules.label_type] * len(prepared))
        is_missing = missing[prepared["row"][:]]
        if is_labeled and missing.any():
            types = _types_of(dataset, saved.label_type)
            prepared = _replaced(prepared, "label_type", [types[row] for row in prepared["row"][:]])
        reward = self._rewards(prepared)
        wrong = np.asarray(prepared["row"][:])[~np.isfinite(reward)].tolist()
        if wrong:
            raise FloatingPointError(
                f"The rewards of these scored rows are not finite: [{with_origins(wrong, dataset)}]. Score in float32."
            )

        label = np.asarray(prepared["label"][:])
        continuous = is_continuous(prepared, rules.label_type)
        raters = None if is_paired else raters_of(rows, rules)
        raters = None if raters is None else [raters[row] for row in prepared["row"][:]]
        found: Mapping[str, Any] = judged(reward, label, continuous, rules, raters)
        given_label = label
        own = (continuous == (rules.label_type == "continuous")) & ~(is_missing & is_labeled)
        if is_labeled and not is_paired and rules.transform is not None:
            given_label = own_labels(rows, "scored", rules, np.zeros(len(rows)))[prepared["row"][:]]
            note = beyond_training(given_label[own], rules)
            if note is not None:
                logger.warning(note)
        if is_labeled and rules.label_type == "continuous":
            note = thumbs(given_label[own], rules, saved.label_center)
            if note is not None:
                logger.warning(note)
        trained_on, held_out = None, self._held_out(dataset, prepared["row"][:])
        if is_labeled and None not in held_out:
            known = ~np.array(held_out, dtype=bool)
            if (own & ~known).sum() >= ENOUGH:
                own &= ~known
            trained_on = int(known[own].sum())
        note = alike(
            reward[own],
            found["predicted_label"][own],
            given_label[own] if is_labeled else None,
            continuous=rules.label_type == "continuous",
            trained_on=trained_on,
        )
        if note is not None:
            logger.warning(note)
        scored = dataset.with_format(None).select(prepared["row"][:])
        if is_paired:  # a column of the pairs does not tell the halves apart
            scored = _replaced(scored, "label", label.tolist())
        columns = {
            "row": prepared["row"][:],
            "reward": reward.tolist(),
            "probability": [None if np.isnan(p) else p for p in found["probability"].tolist()],
            "predicted_label": found["predicted_label"].tolist(),
        }
        if is_labeled:
            columns["surprise"] = [
                None if is_none else surprise
                for surprise, is_none in zip(found["surprise"].tolist(), is_missing, strict=True)
            ]
        columns["held_out"] = held_out
        places = origins(dataset)
        if any(place is not None for place in places):
            columns = {"row": columns.pop("row"), "file_line": [places[row] for row in prepared["row"][:]], **columns}
        types = {"row": "int64", "file_line": "string", "held_out": "bool"}
        for name, values in columns.items():
            scored = scored.add_column(name, values, feature=Value(types.get(name, "float64")))
        return scored

    def _held_out(self, dataset: Dataset, numbers: Sequence[int]) -> list[bool | None]:
        """`(N,)`: whether the prompts of rows with these numbers were not in the training data. None: not known."""
        if self._training_prompts is None:
            return [None] * len(numbers)
        rows = dataset.with_format(None).select(numbers)
        found = seen_prompts.seen([prompts[0] for prompts in prompts_of(rows)], self._training_prompts)
        meant = {seen_prompts.SEEN: False, seen_prompts.NEW: True, seen_prompts.UNKNOWN: None}
        return [meant[each] for each in found.tolist()]

    def _check_columns(self, names: list[str]) -> None:
        if "prompt_ids" in names:
            raise ValueError("score takes raw rows, and these are prepared already. Pass the rows that they came from.")
        check_free(names)
        choice = self.settings.log_z
        if choice == "column" and "log_z" not in names:
            raise ValueError("log_z='column' needs a column log_z in the scored rows, in nats; there is none.")
        if choice not in (0, "column") and "log_z" in names:
            raise ValueError(
                f"The scored rows have a column log_z, and the model its own ({choice}). Remove the column."
            )


def check_free(names: Sequence[str]) -> None:
    """Raise ValueError if rows have columns that `Judge.score` writes."""
    taken = [name for name in COLUMNS if name in names]
    if taken:
        raise ValueError(f"The rows have columns that score writes: {', '.join(taken)}. Rename or remove them.")


def without_label(dataset: Dataset) -> np.ndarray:
    """`(N,)` bool: the rows whose label is not there: None, NaN, or a text such as "N/A". Pairs always have one.

    Example:
        >>> without_label(Dataset.from_dict({"label": [1.0, None, float("nan")]}))
        array([False,  True,  True])
        >>> without_label(Dataset.from_dict({"label": ["good", "N/A"]}))
        array([False,  True])
    """
    if "chosen" in dataset.column_names:
        return np.zeros(len(dataset), dtype=bool)
    if "label" not in dataset.column_names:
        return np.ones(len(dataset), dtype=bool)
    labels = dataset.select_columns("label").with_format(None)["label"][:]
    are_words = are_missing(labels)
    return np.array(
        [label is None or label != label or is_word for label, is_word in zip(labels, are_words, strict=True)],
        dtype=bool,
    )


def _warn_of_words(rows: Dataset, missing: np.ndarray) -> None:
    """Say which texts were read as missing labels."""
    if not missing.any() or "label" not in rows.column_names:
        return
    labels = rows.with_format(None)["label"][:]
    words = [label for label, is_none in zip(labels, missing, strict=True) if is_none and isinstance(label, str)]
    if words:
        named = list(dict.fromkeys(map(repr, words)))
        more = ", …" if len(named) > _NAMED else ""
        are = "1 label is a word" if len(words) == 1 else f"{len(words):,} labels are words"
        logger.warning(f"{are} for a missing value: {', '.join(named[:_NAMED])}{more}.")


def _with_neutral_labels(rows: Dataset, missing: np.ndarray, label_type: str) -> Dataset:
    """Raw rows of which those without a label have one that is valid for either type.

    They are given the other type than the settings', for which there is no transform to read it.
    """
    feature: Any = rows.features["label"]
    is_mixed = isinstance(feature, Json)  # such as a text among numbers
    labels, types = rows.with_format(None)["label"][:], _types_of(rows, label_type)
    if not is_mixed and any(isinstance(label, str | list | dict) for label in labels):
        return rows  # which are invalid
    other = next(each for each in LABEL_TYPES if each != label_type)
    labels = [_NEUTRAL if is_none else label for label, is_none in zip(labels, missing, strict=True)]
    types = [other if is_none else each for each, is_none in zip(types, missing, strict=True)]
    if is_mixed:
        written = [feature.encode_example(label) for label in labels]
        rows = rows.remove_columns("label").add_column("label", written, feature=feature)
    else:
        rows = _replaced(rows, "label", list(map(float, labels)))
    return _replaced(rows, "label_type", types)


def _types_of(rows: Dataset, label_type: str) -> list[str]:
    """The label type of each raw row; of one that does not say it, the settings'."""
    if "label_type" not in rows.column_names:
        return [label_type] * len(rows)
    return [label_type if each is None else each for each in rows.with_format(None)["label_type"][:]]


def _replaced(rows: Dataset, name: str, values: list[Any]) -> Dataset:
    """Rows with these values in a column."""
    return (rows.remove_columns(name) if name in rows.column_names else rows).add_column(name, values)


@torch.no_grad()
def _model_rewards(
    rows: Dataset,
    *,
    source: str,
    policy: Any,
    reference: Reference,
    settings: SavedSettings,
    log_partition: LogPartition,
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
    batch_size: int,
) -> np.ndarray:
    """`(N,)` implicit rewards of prepared rows by a loaded policy and its reference."""
    scorer = Scorer()
    reward, logps, longest = np.empty(len(rows)), np.empty(len(rows)), 0
    continuous = torch.from_numpy(is_continuous(rows, settings.label_type))
    with evaluation_mode(policy), training_autocast(settings, policy):
        for numbers, batch in batches(rows, collate, batch_size=batch_size, device=policy.device):
            inputs = forward_inputs(batch)
            found = scorer(policy, inputs, prompt_states=log_partition.needs_prompt_states)
            log_ratio = found.logps.double() - reference.logps(policy, inputs).to(found.logps).double()
            logps[list(numbers)] = found.logps.double().cpu().numpy()
            tokens = inputs["completion_mask"][:, 1:].sum(1).clamp(min=1)
            longest = max(longest, int(tokens.max()))
            if settings.length_normalize:
                log_ratio = log_ratio / tokens
            log_z = batch.get("log_z")
            if log_z is None:
                log_z = log_partition(continuous[list(numbers)].to(log_ratio.device), found.prompt_states)
            reward[list(numbers)] = (settings.beta * (log_ratio + log_z.to(log_ratio))).cpu().numpy()
        off = batching_difference(policy, rows, logps, collate, batch_size=batch_size)
    notes = (
        differs_from_training(policy, reference, source, settings, longest),
        batching_note(source, settings, policy, settings.beta, off),
    )
    for note in notes:
        if note is not None:
            logger.warning(note)
    return reward
