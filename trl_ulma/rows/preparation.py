"""From raw rows to checked rows of token ids. This runs once, before training."""

# In the type hints of transformers, a tokenizer's tokens and backend have many types
# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, List, Value
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging

from trl_ulma.data.columns import NUMBERS, class_labels
from trl_ulma.data.origins import StreamOrigins, located, places_of
from trl_ulma.labels import (
    OPTIONAL_COLUMNS,
    InvalidRow,
    LabelRules,
    LabelTransform,
    check_columns,
    is_messages,
    list_invalid,
    refuse_invalid,
    shown,
)
from trl_ulma.rows.batches import PreparedBatches, RawBatches
from trl_ulma.rows.chat import TODAY, becomes_chat, check_chat, warn_of_date
from trl_ulma.rows.dataset_labels import check_pairs, check_stream, transformed_labels
from trl_ulma.rows.dropped import INVALID_ROWS, check_stream_has_rows, kept_rows
from trl_ulma.rows.identity import cache_key, serialized, token_rules
from trl_ulma.rows.images import (
    ImageTokens,
    check_mode,
    first_row,
    image_column,
)
from trl_ulma.rows.notes import note, noted
from trl_ulma.rows.rendering import Encoder, processor_of, tokenizer_of
from trl_ulma.rows.token_ids import check_token_ids, faults_of, token_faults

logger = logging.get_logger(__name__)

_TYPES = {
    "prompt_ids": List(Value("int32")),
    "completion_ids": List(Value("int32")),
    "completion_mask": List(Value("int8")),
    "prompt_text": Value("string"),
    "prompt_images": List(Image(decode=False)),
    "image_key": Value("int64"),
    "label": Value("float64"),
    "sft_mask": Value("bool"),
    "label_type": Value("string"),
    "log_z": Value("float64"),
    "weight": Value("float64"),
    "row": Value("int64"),
    "length": Value("int32"),
}
# Names differ from those of the raw columns, because DPOTrainer would take rows with a raw column for unprepared ones
_OF_IMAGES = ("prompt_text", "prompt_images", "image_key")
# Columns that `datasets.map` adds to a row for `kept_rows`
_PASSING = {
    "left_out": Value("string"),
    "cut": Value("bool"),
    "invalid": Value("string"),
    "unended": Value("bool"),
    "odd": Value("string"),
}
# Columns that a trainer adds to prepared rows, from its reference and for log_z="group"
_OF_A_TRAINER = ("ref_logps", "group")
_PREPARED = {"prompt_ids", "completion_ids", "label", "sft_mask", "row", "length"}


@dataclass(frozen=True)
class Preparation:
    """Prepares raw rows: converts pairs to rows, and checks, renders, tokenizes and truncates rows.

    Attributes:
        processing_class: the policy's tokenizer or processor.
        rules: how labels are read.
        max_length: the maximum length of a sequence in tokens, or None.
        truncation_mode: "keep_start" or "keep_end".
        positions: the maximum number of tokens that the model can read. None if there is no limit.
        is_for_training: whether labels must distinguish answers. If they do not, a warning is logged.
        keeps_prompts: whether to keep the raw prompts beside their tokens. TRL's callbacks that generate read them.
        invalid_rows: "error" raises an error that lists all invalid rows. "drop" leaves them out and logs a warning.
        assistant_only_loss: whether to score only the assistant's turns in completions with several turns.
        chat: whether rows of plain text become messages: "true", "false", or "auto", see `trl_ulma.rows.chat`.
        system_message: the system message to add to conversations that have none, or None.
        vocab_size: the number of token ids that the model has embeddings for. None if unknown.
        pad_to_multiple_of: batches are padded to a multiple of this number. The padding has positions, too.

    Raises:
        ValueError: if `invalid_rows` or `chat` is unknown.
    """

    processing_class: PreTrainedTokenizerBase | ProcessorMixin
    rules: LabelRules
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    positions: int | None = None
    is_for_training: bool = True
    keeps_prompts: bool = False
    invalid_rows: str = "error"
    assistant_only_loss: bool = True
    chat: str = "auto"
    system_message: str | None = None
    vocab_size: int | None = None
    pad_to_multiple_of: int | None = None

    def __post_init__(self):
        check_chat(self.chat, self.system_message)
        if self.invalid_rows not in INVALID_ROWS:
            raise ValueError(f"invalid_rows must be one of {INVALID_ROWS}; got {self.invalid_rows!r}.")

    def __call__(
        self, dataset: Dataset | IterableDataset, name: str, num_proc: int | None = None
    ) -> Dataset | IterableDataset:
        """Prepare the rows of `dataset`.

        Prepared rows have `prompt_ids`, `completion_ids`, `label`, `sft_mask`, the optional columns of the dataset,
        `row` (the number of the raw row) and `length` (in tokens). Rows without any token to learn from are left out
        and counted in a warning.

        If not all tokens of a completion are scored, because it has several turns, `completion_mask` marks the scored
        ones. This column is None for rows whose tokens are all scored.

        If the dataset is already prepared, its labels are checked again, and `sft_mask` is computed again by these
        rules unless the raw rows had one. Rows that are longer than this `max_length` are truncated or left out like
        raw rows. What a trainer has added to them, `ref_logps` and `group`, is removed. If all this changes no
        row, the dataset itself is returned.

        With `keeps_prompts`, rows also have `prompt`, except those of streams and rows with images.

        For rows with images, `prompt_ids` has placeholders, and the collator creates the prompt from `prompt_text` and
        `prompt_images`. Images are not decoded here. `length` includes the tokens that they need because of their size.

        The first rows of a stream are read immediately. The others are checked when they are read, 64 at a time.

        Raises:
            TypeError: if `dataset` is not a dataset.
            ValueError: if rows are invalid (the message lists them), if a column is wrong, if no row is left, or if a
                token has no embedding.
        """
        if not isinstance(dataset, Dataset | IterableDataset):
            raise TypeError(
                f"The {name} dataset must be a Dataset or an IterableDataset; got {type(dataset).__name__}. Use "
                "Dataset.from_list for a list of rows."
            )
        try:
            prepared = self._prepare(dataset, name, num_proc)
        except UnicodeDecodeError:
            if isinstance(dataset, IterableDataset):
                raise
            readable, errors = _readable(dataset, name)
            if not errors:
                raise
            if not readable:
                refuse_invalid(errors, len(dataset), name)
            prepared = self._prepare(dataset.select(readable), name, num_proc, np.array(readable), errors, dataset)
        if self.vocab_size is not None and isinstance(prepared, Dataset):
            check_token_ids(prepared, self.vocab_size, name, tokenizer_of(self.processing_class))
        template = str(self.processing_class.chat_template)
        if TODAY in template and noted(prepared).get("rules", {}).get("is_chat"):
            row = first_row(prepared)
            ids = [*row["prompt_ids"], *row["completion_ids"]]
            warn_of_date(template, str(tokenizer_of(self.processing_class).decode(ids)))
        return prepared

    def _prepare(
        self,
        dataset: Dataset | IterableDataset,
        name: str,
        num_proc: int | None,
        numbers: np.ndarray | None = None,
        unreadable: Sequence[InvalidRow] = (),
        whole: Dataset | None = None,
    ) -> Dataset | IterableDataset:
        """Like `__call__`, for the rows of `whole` with these numbers. The other rows could not be read."""
        # Rows are read as plain values. Only the caller's own transform is kept, because it creates the rows.
        is_transformed = isinstance(dataset, Dataset) and dataset.format["type"] == "custom"
        raw = dataset if is_transformed else dataset.with_format(None)
        first = first_row(raw)
        if first is None:
            raise ValueError(f"The {name} dataset is empty. Pass at least one row.")
        if not isinstance(first, Mapping):
            raise ValueError(
                f"Row 0 of the {name} dataset is {shown(first)}; it must be a dict of columns, such as prompt, "
                "completion and label."
            )
        names = list(first)
        if set(names) >= {"prompt_ids", "completion_ids"} and not {"prompt", "completion"} <= set(names):
            check_prepared_columns(names, name)
            if not is_transformed:
                return self._again(dataset, names, name)
            if "ref_logps" in names:
                raise ValueError(
                    f"The {name} dataset has a transform and a column ref_logps, which another trainer's reference may "
                    "have computed. Remove the column (remove_columns) before you set the transform."
                )
            return dataset
        paired = check_columns(names, name, takes_images=processor_of(self.processing_class) is not None)
        images = image_column(names, name)
        if images is not None:
            check_mode(raw, images, name)
            if isinstance(raw, IterableDataset) and raw.features is not None:
                raw = raw.decode(False)
        for column in ("label", "label_type") if paired else ():
            if column in names:
                logger.warning(f"The {name} dataset is paired, so its column `{column}` is ignored.")
        transform = self.rules.transform
        reads = frozenset() if transform is None else transform.reads
        if self.is_for_training and "trials" in names and not paired and "trials" not in reads:
            logger.warning(
                f'The {name} dataset has a column `trials`, which only label_transform="votes:1,1" reads. Set it if '
                "the labels count the votes for an answer. If not, rename the column."
            )
        self._check_classes(raw, name)
        _warn_of_stored_logps(names, name)
        if paired:
            check_pairs(self.rules, name)
        prompt = _first_prompt(raw, first)
        is_text = isinstance(prompt, str)
        is_made_chat = is_text and becomes_chat(
            raw,
            prompt if "prompt" in first else None,
            self.chat,
            self.system_message,
            self.processing_class.chat_template is not None,
            name,
        )
        is_text = is_text and not is_made_chat
        self._check_tokenizer(is_text, name)
        encoder = Encoder(
            self.processing_class,
            is_text,
            images is not None,
            self.max_length,
            self.truncation_mode,
            self.assistant_only_loss,
        )
        processor = encoder.processor
        image_tokens = None if images is None or processor is None else ImageTokens(processor)
        encode = RawBatches(
            self, encoder, name, paired, tuple(names), images, image_tokens, is_made_chat, numbers=numbers
        )
        optional = [c for c in OPTIONAL_COLUMNS if c in names and not (paired and c == "label_type")]
        kept = ["prompt_ids", "completion_ids", "label", "sft_mask", *(c for c in optional if c != "sft_mask")]
        if not is_text and self.assistant_only_loss:
            kept.append("completion_mask")
        features = Features({c: _TYPES[c] for c in (*kept, "row", "length", *(_OF_IMAGES if images else ()))})
        tokenizer = serialized(self)
        rules = {
            "transform": str(self.rules.transform),
            "fitted": _fitted(transform),
            "names_demonstrations": "sft_mask" in names,
            "demonstrations": self._marks_demonstrations,
            "is_for_training": self.is_for_training,
            "is_chat": not is_text,
            "tokens": token_rules(self, is_text, tokenizer),
        }
        if isinstance(raw, IterableDataset):
            check_stream(self.rules, name)
            encode = replace(encode, shards=raw.num_shards, place=StreamOrigins(places_of(dataset)))
            stream = raw.map(
                encode.stream, with_indices=True, batched=True, batch_size=64, remove_columns=names, features=features
            )
            note(stream, rules=rules)
            check_stream_has_rows(stream, name)
            return stream

        labels = transformed_labels(raw, name, self.rules, invalid := {}, logger.warning)
        kept_prompts = self._type_of_prompts(raw, is_text, is_made_chat) if images is None else None
        if kept_prompts is not None:
            features["prompt"] = kept_prompts
        encoded = raw.map(
            replace(encode, labels=labels, invalid=invalid, keeps_prompts=kept_prompts is not None),
            with_indices=True,
            batched=True,
            # All images of a batch are in memory
            batch_size=1000 if images is None else 32,
            writer_batch_size=1000 if images is None else 32,
            remove_columns=raw.column_names,
            features=Features({**features, **_PASSING}),
            num_proc=num_proc,
            desc=f"Tokenizing {name} dataset",
            new_fingerprint=Hasher.hash((raw._fingerprint, name, cache_key(self, tokenizer), *_PASSING)),
        )
        note(encoded, rules=rules)
        label_type = self.rules.label_type if self.is_for_training else None
        return kept_rows(encoded.with_format(None), name, label_type, self.invalid_rows, unreadable, whole or raw)

    def _again(self, rows: Dataset | IterableDataset, names: list[str], name: str) -> Dataset | IterableDataset:
        """Apply these rules and this length to rows that are already prepared, and remove the log-probabilities of
        another trainer's reference.

        Raises:
            ValueError: if the rows were prepared with other rules that prepared rows cannot be changed to.
        """
        rules = noted(rows).get("rules", {})
        # Rows that were prepared for scoring only may have no labels
        is_for_training = rules.get("is_for_training", True)
        transform, fitted = str(self.rules.transform), _fitted(self.rules.transform)
        if is_for_training and rules.get("transform", transform) != transform:
            raise ValueError(
                f"The {name} dataset was prepared by a trainer with label_transform={rules['transform']}, but this "
                f"trainer has label_transform={transform}. Pass the raw rows."
            )
        if is_for_training and rules.get("fitted", fitted) != fitted:
            raise ValueError(
                f"The {name} dataset was prepared by a trainer whose label_transform={transform} was fitted on other "
                "rows than that of this trainer. Pass the raw rows."
            )
        tokenizer = serialized(self)
        made, own = rules.get("tokens", {}), token_rules(self, not rules.get("is_chat", False), tokenizer)
        different = [what for what, value in own.items() if made.get(what, value) != value]
        if different:
            raise ValueError(
                f"The {name} dataset was prepared with another {' and another '.join(different)} than this trainer "
                "has, so its token ids do not fit. Pass the raw rows."
            )
        _warn_of_stored_logps(names, name)
        theirs = [column for column in _OF_A_TRAINER if column in names]
        if theirs:
            rows = rows.remove_columns(theirs)
        how = self if is_for_training else replace(self, rules=replace(self.rules, need_mask=False, binary_only=False))
        again = PreparedBatches(how, name, rules.get("names_demonstrations", True) or not is_for_training)
        if isinstance(rows, IterableDataset):
            stream = rows.map(again.stream, batched=True, batch_size=64, features=rows.features)
            note(stream, rules=rules)
            check_stream_has_rows(stream, name)
            return stream
        columns = {c: rows[c][:] for c in ("label", "sft_mask", "row", "length", *OPTIONAL_COLUMNS) if c in names}
        if rules.get("demonstrations") == self._marks_demonstrations:
            again.warn_of_edited_masks(columns)
        faults = faults_of(rows, self.vocab_size, name, tokenizer_of(self.processing_class))
        if not (faults or again.changes(columns) or _is_stale(rows)):
            return rows
        made = rows.with_format(None).map(
            again,
            batched=True,
            features=Features({c: _TYPES.get(c, rows.features[c]) for c in names if c not in _OF_A_TRAINER} | _PASSING),
            desc=f"Checking {name} dataset",
            new_fingerprint=Hasher.hash((rows._fingerprint, name, cache_key(self, tokenizer), *_PASSING)),
        )
        note(made, rules=rules)
        return kept_rows(made, name, self.rules.label_type if self.is_for_training else None, self.invalid_rows)

    @property
    def _marks_demonstrations(self) -> list[Any]:
        """What decides which rows are demonstrations if the raw rows do not say it."""
        return [self.rules.label_type, self.rules.sft_threshold]

    @staticmethod
    def _check_classes(raw: Dataset | IterableDataset, name: str) -> None:
        """Raise ValueError if labels are classes whose numbers are not their labels, or if weights are classes."""
        kinds = raw.features or {}
        for column in NUMBERS[1:]:
            if isinstance(kinds.get(column), ClassLabel):
                raise ValueError(
                    f"The {name} dataset has classes in the column {column}, whose numbers only count the classes. "
                    "Convert the column to numbers."
                )
        feature = kinds.get("label")
        if not isinstance(feature, ClassLabel):
            return
        try:
            labels = class_labels(feature.names)
        except ValueError as error:
            raise ValueError(f"The {name} dataset {error}, or convert the column.") from error
        if labels != list(range(len(labels))):
            raise ValueError(
                f"The {name} dataset has labels of the classes {', '.join(feature.names)}, which are numbered from 0 "
                "in this order. Convert the column label to numbers."
            )

    def check_positions(self, tokens: int) -> None:
        """Raise InvalidRow if a row has more tokens than the model can read."""
        size = self.pad_to_multiple_of or 1
        padded = tokens + -tokens % size
        if self.positions is not None and padded > self.positions:
            longest = self.positions - self.positions % size
            remedy = f"Set max_length={longest}, or remove the row" if longest else f"Lower pad_to_multiple_of={size}"
            raise InvalidRow(
                f"has {tokens:,} tokens"
                + (f" ({padded:,} with pad_to_multiple_of={size})" if padded > tokens else "")
                + f", but the model only has {self.positions:,} positions. {remedy}.",
                "more tokens than the model has positions",
            )

    def check_batch(self, rows: Mapping[str, list], numbers: Sequence[int | str], name: str) -> None:
        """Raise ValueError if prepared rows of a batch have tokens without an embedding. The message lists them."""
        if self.vocab_size is not None:
            ids = {column: rows[column] for column in ("prompt_ids", "completion_ids")}
            faults = token_faults({**ids, "row": numbers}, self.vocab_size, name, tokenizer_of(self.processing_class))
            if faults:
                raise ValueError(list_invalid([faults[i] for i in sorted(faults)], None, name))

    def _type_of_prompts(self, raw: Dataset, is_text: bool, is_made_chat: bool) -> Any:
        """The type of the column `prompt` if it is kept, or None."""
        if self.keeps_prompts and is_made_chat:
            return List({"role": Value("string"), "content": Value("string")})
        if not self.keeps_prompts or is_text:
            return Value("string") if self.keeps_prompts else None
        return raw.features.get("prompt", raw.features.get("chosen"))

    def _check_tokenizer(self, is_text: bool, name: str) -> None:
        """Raise ValueError if the tokenizer does not support the rows."""
        tokenizer = tokenizer_of(self.processing_class)
        if is_text:
            end = tokenizer.eos_token
            if end is None:
                raise ValueError(
                    "The tokenizer has no EOS token to end completions of plain text with. Set tokenizer.eos_token, "
                    "and pass the tokenizer as processing_class."
                )
            ids = tokenizer(str(end), add_special_tokens=False)["input_ids"]
            if len(ids) != 1:
                logger.warning(
                    f"The tokenizer splits the EOS token {str(end)!r} into {len(ids)} tokens, so the completions of "
                    f"the {name} dataset do not end with the token that stops generation. Set tokenizer.eos_token to a "
                    "single token of its vocabulary."
                )
        elif self.processing_class.chat_template is None:
            kind = "tokenizer" if processor_of(self.processing_class) is None else "processor"
            raise ValueError(
                f"The rows are conversations, but the {kind} has no chat template. Set {kind}.chat_template (or use "
                f"the {kind} of an instruction-tuned model), and pass it as processing_class."
            )


def _fitted(transform: LabelTransform | None) -> str:
    """A hash of all that was fitted, most of which the text of a transform leaves out, up to the rounding of sums."""
    steps = [] if transform is None else transform.to_json()
    text = json.dumps([{**step, "numbers": [f"{number:g}" for number in step["numbers"]]} for step in steps])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_prepared_columns(names: Sequence[str], name: str) -> None:
    """Raise ValueError if prepared rows lack columns, or have others.

    Args:
        names: the names of their columns.
        name: the name of the dataset.

    Example:
        >>> check_prepared_columns(sorted(_PREPARED), "train")
    """
    missing = sorted(_PREPARED.difference(names))
    others = sorted(set(names).difference(_TYPES, _OF_A_TRAINER, ("prompt",)))
    if missing or others:
        wrong = [f"lack the columns {', '.join(missing)}"] if missing else []
        wrong += [f"have other columns, too: {', '.join(others)}"] if others else []
        raise ValueError(
            f"The rows of the {name} dataset are prepared (they have prompt_ids and completion_ids), but "
            f"{' and '.join(wrong)}. Pass the raw rows, or the prepared rows with their columns as they were."
        )


def _warn_of_stored_logps(names: Sequence[str], name: str) -> None:
    stored = [column for column in ("ref_chosen_logps", "ref_rejected_logps", "ref_logps") if column in names]
    if stored:
        logger.warning(
            f"The {name} dataset has {' and '.join(stored)}, which are not read: the trainer runs its own reference "
            "(once, before training, if precompute_ref_log_probs=True)."
        )


def _is_stale(rows: Dataset) -> bool:
    """Whether the column `length` of prepared rows without images is not that of their ids."""
    if "prompt_images" in rows.column_names:
        return False
    table: Any = rows.select_columns(["prompt_ids", "completion_ids", "length"]).with_format("arrow")
    for batch in table.iter(10_000):
        lengths = [pc.list_value_length(batch[column]) for column in ("prompt_ids", "completion_ids")]
        if not pc.all(pc.equal(pc.add(*lengths), batch["length"])).as_py():
            return True
    return False


def _first_prompt(raw: Dataset | IterableDataset, first: Mapping[str, Any]) -> Any:
    """The first prompt that is text or messages and not empty. It decides whether all prompts are text or messages."""
    column = "prompt" if "prompt" in first else "chosen"
    for row in chain([first], islice(raw, 64)):
        value = row.get(column) if isinstance(row, Mapping) else None
        if (isinstance(value, str) and value.strip()) or (is_messages(value) and value):
            return value
    return first[column]


def _readable(dataset: Dataset, name: str) -> tuple[list[int], list[InvalidRow]]:
    """The rows whose text is valid UTF-8, and the errors of the others. Arrow does not check this."""
    readable, errors = [], []
    for row in range(len(dataset)):
        try:
            dataset[row]
        except UnicodeDecodeError as error:
            invalid = InvalidRow(
                f"contains text that is not UTF-8 ({error}). Read the file in its "
                "actual encoding, and write it again as UTF-8.",
                "text that is not UTF-8",
            )
            errors.append((row, invalid.at(row, name)))
        else:
            readable.append(row)
    return readable, located(errors, dataset)
