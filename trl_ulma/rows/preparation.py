"""From raw rows to checked rows of token ids: what runs once, before training."""

# transformers declares a tokenizer's tokens and backend to be of many kinds
# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import Any

from datasets import Dataset, Features, Image, IterableDataset, List, Value
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers import __version__ as transformers_version
from transformers.utils import logging

from trl_ulma.data.pairs import pairs_to_rows
from trl_ulma.labels import (
    OPTIONAL_COLUMNS,
    LabelRules,
    check_columns,
    check_texts,
    is_messages,
    read_labels,
    shown,
    transform_labels,
)
from trl_ulma.rows.dataset_labels import check_pairs, check_stream, transformed_labels
from trl_ulma.rows.dropped import check_stream_has_rows, kept_of, kept_rows
from trl_ulma.rows.images import (
    ImageTokens,
    as_images,
    check_mode,
    check_stray,
    first_row,
    image_column,
    image_key,
    undecoded,
)
from trl_ulma.rows.rendering import Encoder, processor_of, tokenizer_of

logger = logging.get_logger(__name__)

SAME_ANSWERS = "chosen and rejected are the same"

_TYPES = {
    "prompt_ids": List(Value("int32")),
    "completion_ids": List(Value("int32")),
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
# Named otherwise than the raw column, by which DPOTrainer would know rows that are not prepared
_OF_IMAGES = ("prompt_text", "prompt_images", "image_key")
_PREPARED = {"prompt_ids", "completion_ids", "label", "sft_mask", "row", "length"}
_READ = {"prompt", "completion", "chosen", "rejected", "label", "trials", "image", "images", *OPTIONAL_COLUMNS}


@dataclass(frozen=True)
class Preparation:
    """What is done to raw rows: pairs become rows, rows are checked, rendered, tokenised and cut.

    Attributes:
        processing_class: the policy's tokenizer, or its processor.
        rules: how labels are read.
        max_length: longest sequence in tokens, or None.
        truncation_mode: "keep_start" or "keep_end".
        positions: how many tokens the model can read at most, or None where that has no end.
        is_for_training: whether labels must tell answers apart; where they do not, that is warned of.
        keeps_prompts: whether the raw prompts are kept beside their tokens, which TRL's callbacks that generate read.
    """

    processing_class: PreTrainedTokenizerBase | ProcessorMixin
    rules: LabelRules
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    positions: int | None = None
    is_for_training: bool = True
    keeps_prompts: bool = False

    def __call__(
        self, dataset: Dataset | IterableDataset, name: str, num_proc: int | None = None
    ) -> Dataset | IterableDataset:
        """The rows of `dataset` as `prompt_ids`, `completion_ids`, `label`, `sft_mask`, the optional columns that it
        has, `row` (the raw row's number) and `length` (tokens). Rows without anything to learn from are left out, and
        counted in a warning. A data set that has been through here is returned as it is, but for rows that are too long
        for this `max_length`, which are cut or left out as raw ones are, and `ref_logps`, which another trainer's
        reference gave.

        With `keeps_prompts` also `prompt`, but of a stream or of rows with images.

        Of rows with images, `prompt_ids` has placeholders for them; the collator makes the prompt of `prompt_text` and
        `prompt_images`. Images are not decoded here, `length` counts what their size makes of them.

        Of a stream the first rows are read at once; the others are checked as they come.

        Raises:
            TypeError: for what is no data set.
            ValueError: naming the row or column that is wrong; also where no row is left.
        """
        if not isinstance(dataset, Dataset | IterableDataset):
            raise TypeError(
                f"The {name} dataset must be a Dataset or an IterableDataset; got {type(dataset).__name__}. "
                "Dataset.from_list makes one of a list of rows."
            )
        try:
            return self._prepare(dataset, name, num_proc)
        except UnicodeDecodeError as error:
            if isinstance(dataset, IterableDataset):
                raise
            raise ValueError(
                f"Row {_first_unreadable(dataset)} of the {name} dataset holds text that is not UTF-8 ({error}). Write "
                "the file anew, reading the text in the encoding that it has."
            ) from error

    def _prepare(
        self, dataset: Dataset | IterableDataset, name: str, num_proc: int | None
    ) -> Dataset | IterableDataset:
        # Rows are read as plain values; only a transform of the caller's stays, since it is what makes them
        is_transformed = isinstance(dataset, Dataset) and dataset.format["type"] == "custom"
        raw = dataset if is_transformed else dataset.with_format(None)
        first = first_row(raw)
        if first is None:
            raise ValueError(f"The {name} dataset is empty; at least one row is needed.")
        if not isinstance(first, Mapping):
            raise ValueError(
                f"Row 0 of the {name} dataset is {shown(first)}; it must be a dict of columns, such as prompt, "
                "completion and label."
            )
        names = list(first)
        if set(names) >= _PREPARED and set(names) <= {*_TYPES, "ref_logps", "prompt"}:
            return dataset if is_transformed else self._again(dataset, names, name)
        paired = check_columns(names, name, takes_images=processor_of(self.processing_class) is not None)
        images = image_column(names, name)
        if images is not None:
            check_mode(raw, images, name)
            if isinstance(raw, IterableDataset) and raw.features is not None:
                raw = raw.decode(False)
        for column in ("label", "label_type") if paired else ():
            if column in names:
                logger.warning(
                    f"The {name} dataset is paired: its column `{column}` says nothing about pairs and is not read."
                )
        if paired:
            check_pairs(self.rules, name)
        is_text = self._check_tokenizer(first)
        encoder = Encoder(self.processing_class, is_text, images is not None, self.max_length, self.truncation_mode)
        processor = encoder.processor
        image_tokens = None if images is None or processor is None else ImageTokens(processor)
        encode = _Encode(self, encoder, name, paired, tuple(names), images, image_tokens)
        optional = [c for c in OPTIONAL_COLUMNS if c in names and not (paired and c == "label_type")]
        kept = ["prompt_ids", "completion_ids", "label", "sft_mask", *(c for c in optional if c != "sft_mask")]
        features = Features({c: _TYPES[c] for c in (*kept, "row", "length", *(_OF_IMAGES if images else ()))})
        if isinstance(raw, IterableDataset):
            check_stream(self.rules, name)
            stream = raw.map(
                encode.stream, with_indices=True, batched=True, batch_size=64, remove_columns=names, features=features
            )
            check_stream_has_rows(stream, name)
            return stream

        labels = transformed_labels(raw, name, self.rules)
        prompt = self._type_of_prompts(raw, is_text) if images is None else None
        if prompt is not None:
            features["prompt"] = prompt
        encoded = raw.map(
            replace(encode, labels=labels, keeps_prompts=prompt is not None),
            with_indices=True,
            batched=True,
            # What a batch holds of images is in memory
            batch_size=1000 if images is None else 32,
            writer_batch_size=1000 if images is None else 32,
            remove_columns=raw.column_names,
            features=Features({**features, "left_out": Value("string"), "cut": Value("bool")}),
            num_proc=num_proc,
            desc=f"Tokenizing {name} dataset",
            new_fingerprint=Hasher.hash((raw._fingerprint, name, self._key())),
        )
        return kept_rows(encoded.with_format(None), name, self.rules.label_type if self.is_for_training else None)

    def _again(self, rows: Dataset | IterableDataset, names: list[str], name: str) -> Dataset | IterableDataset:
        """Rows that are prepared already, at this length and without the log-probabilities of another's reference."""
        if "ref_logps" in names:
            rows = rows.remove_columns("ref_logps")
        limits = [limit for limit in (self.max_length, self.positions) if limit is not None]
        if not limits:
            return rows
        shorten = partial(self._shorten, name=name)
        if isinstance(rows, IterableDataset):
            stream = rows.map(partial(_drop, shorten, name), batched=True, batch_size=64, features=rows.features)
            check_stream_has_rows(stream, name)
            return stream
        if max(rows["length"][:]) <= min(limits):
            return rows
        features = Features({**rows.features, "left_out": Value("string"), "cut": Value("bool")})
        shortened = rows.with_format(None).map(
            shorten,
            batched=True,
            features=features,
            desc=f"Cutting {name} dataset",
            new_fingerprint=Hasher.hash((rows._fingerprint, name, self._key())),
        )
        return kept_rows(shortened, name, self.rules.label_type if self.is_for_training else None)

    def _shorten(self, batch: Mapping[str, list], name: str) -> dict[str, list]:
        """What is other in prepared rows once they are cut, and `left_out` and `cut`."""
        encoder = Encoder(self.processing_class, True, False, self.max_length, self.truncation_mode)
        found: dict[str, list] = {c: [] for c in ("prompt_ids", "completion_ids", "length", "left_out", "cut")}
        ids = zip(batch["row"], batch["prompt_ids"], batch["completion_ids"], batch["length"], strict=True)
        for row, prompt, completion, length in ids:
            added = length - len(prompt) - len(completion)
            prompt, completion, is_cut, left_out = encoder.truncate(prompt, completion, added)
            tokens = len(prompt) + len(completion) + added
            self.check_positions(tokens, f"Row {row} of the {name} dataset")
            for column, value in zip(found, (prompt, completion, tokens, left_out, is_cut), strict=True):
                found[column].append(value)
        return found

    def check_positions(self, tokens: int, at: str) -> None:
        """Raise ValueError where a row has more tokens than the model can read."""
        if self.positions is not None and tokens > self.positions:
            raise ValueError(
                f"{at} has {tokens:,} tokens, and the model only {self.positions:,} positions. Set "
                f"max_length={self.positions}, or drop the row."
            )

    def _type_of_prompts(self, raw: Dataset, is_text: bool) -> Any:
        """Of the column `prompt` to keep, or None."""
        if not self.keeps_prompts or is_text:
            return Value("string") if self.keeps_prompts else None
        return raw.features.get("prompt", raw.features.get("chosen"))

    def _check_tokenizer(self, first: Mapping[str, Any]) -> bool:
        """Whether the rows are text, as the first one is; raises ValueError where the tokenizer cannot take it."""
        text = first["prompt"] if "prompt" in first else first["chosen"]
        if isinstance(text, str):
            if tokenizer_of(self.processing_class).eos_token is None:
                raise ValueError(
                    "The tokenizer has no EOS token, so completions of text could not be ended. Set "
                    "tokenizer.eos_token and pass the tokenizer as processing_class."
                )
        elif is_messages(text) and self.processing_class.chat_template is None:
            kind = "tokenizer" if processor_of(self.processing_class) is None else "processor"
            raise ValueError(
                f"The rows are conversations, and the {kind} has no chat template. Set {kind}.chat_template (or use an "
                f"instruction-tuned model's {kind}) and pass it as processing_class."
            )
        return isinstance(text, str)

    def _key(self) -> str:
        """What a cached result depends on, besides the rows."""
        own, processor = tokenizer_of(self.processing_class), processor_of(self.processing_class)
        if own.is_fast:
            # Which the last call left, and each call of the tokenizer sets anew
            own.backend_tokenizer.no_padding()
            own.backend_tokenizer.no_truncation()
            state = own.backend_tokenizer.to_str()
        else:
            state = Hasher.hash(own)
        tokenizer = (
            type(own).__name__,
            state,
            self.processing_class.chat_template,
            own.eos_token,
        )
        if processor is not None:
            tokenizer += (type(processor).__name__, processor.to_json_string())
        versions = (version("trl-ulma"), transformers_version)
        limits = (self.max_length, self.truncation_mode, self.positions)
        return Hasher.hash((tokenizer, self.rules, limits, self.keeps_prompts, versions))


@dataclass(frozen=True)
class _Encode:
    """The function that `datasets.map` runs over batches of raw rows."""

    how: Preparation
    encoder: Encoder
    name: str
    paired: bool
    names: tuple[str, ...]
    # The column of images and what they add, where there is one
    images: str | None = None
    image_tokens: ImageTokens | None = None
    # After the transform, of all rows; those of a stream are transformed as they come
    labels: list[Any] | None = None
    keeps_prompts: bool = False

    def __call__(self, batch: Mapping[str, list], indices: Sequence[int]) -> dict[str, list]:
        rows = list(indices)
        found, needed = sorted(_READ.intersection(batch)), sorted(_READ.intersection(self.names))
        if found != needed:
            raise ValueError(
                f"Rows {rows[0]} to {rows[-1]} of the {self.name} dataset have the columns {', '.join(found) or 'none'}"
                f"; its first row has {', '.join(needed)}. All rows need the same."
            )
        left_out: list[str | None] = [None] * len(rows)
        columns: Mapping[str, list] = batch
        halves = [""] * len(rows)
        values = [None] * len(rows) if self.images is None else undecoded(batch, self.images)
        images = [
            as_images(value, f"Row {row} of the {self.name} dataset") for value, row in zip(values, rows, strict=True)
        ]
        if self.paired:
            columns = pairs_to_rows(batch)
            left_out = columns["left_out"]
            images = [images[pair] for pair in columns["pair"]]
            rows = [rows[pair] for pair in columns["pair"]]
            halves = [" (chosen)" if label else " (rejected)" for label in columns["label"]]
        if self.labels is None:
            label = transform_labels(columns, rows, self.name, self.how.rules)
        else:
            label = [self.labels[row] for row in rows]
        # Only what is read: a batch decodes each column that is taken from it
        optional = {name: columns[name] for name in OPTIONAL_COLUMNS if name in columns}
        labels = read_labels({**optional, "label": label}, rows, self.name, self.how.rules)
        texts: dict[int, tuple[str, str]] = {}
        for i, row in enumerate(rows):
            if left_out[i] is None:
                at = f"Row {row}{halves[i]} of the {self.name} dataset"
                check_texts(columns["prompt"][i], columns["completion"][i], at, takes_images=self.images is not None)
                texts[i] = self.encoder.render(columns, i, len(images[i]), at)
        for i in range(0, len(rows) if self.paired else 0, 2):
            if i in texts and texts[i] == texts.get(i + 1):
                left_out[i] = left_out[i + 1] = SAME_ANSWERS
        tokenised = dict(zip(texts, self.encoder.tokenise(list(texts.values())), strict=True))

        prompt_ids, completion_ids, cut, length = [], [], [], []
        for i in range(len(rows)):
            prompt, completion, is_cut, added = [], [], False, 0
            if left_out[i] is None:
                if self.encoder.processor is not None:
                    at = f"Row {rows[i]}{halves[i]} of the {self.name} dataset"
                    check_stray(self.encoder.processor, *tokenised[i], len(images[i]), at)
                if self.image_tokens is not None:
                    added = self.image_tokens(images[i], f"Row {rows[i]} of the {self.name} dataset")
                prompt, completion, is_cut, left_out[i] = self.encoder.truncate(*tokenised[i], added)
            prompt_ids.append(prompt)
            completion_ids.append(completion)
            cut.append(is_cut)
            length.append(len(prompt) + len(completion) + added)
        for i, tokens in enumerate(length):
            self.how.check_positions(tokens, f"Row {rows[i]}{halves[i]} of the {self.name} dataset")
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": completion_ids,
            **labels,
            "row": rows,
            "length": length,
            "left_out": left_out,
            "cut": cut,
            **({"prompt": columns["prompt"]} if self.keeps_prompts else {}),
            **(
                {
                    "prompt_text": [texts[i][0] if i in texts else "" for i in range(len(rows))],
                    "prompt_images": images,
                    "image_key": [image_key(each) for each in images],
                }
                if self.images is not None
                else {}
            ),
        }

    def stream(self, batch: Mapping[str, list], indices: Sequence[int]) -> dict[str, list]:
        """As `__call__`, for a stream: rows to leave out are dropped here, and said as they come."""
        kept = kept_of(self(batch, indices), self.name)
        # Other columns that come late are not among those to remove, and must not differ in length
        late = set(batch).difference(self.names)
        return dict.fromkeys(late, [None] * len(kept["row"])) | kept


def _drop(shorten: Callable[..., dict[str, list]], name: str, batch: Mapping[str, list]) -> dict[str, list]:
    """A batch of a prepared stream after `shorten`, less the rows that it leaves out."""
    return kept_of({**batch, **shorten(batch)}, name)


def _first_unreadable(dataset: Dataset) -> int:
    """The row at which Arrow's bytes, which it does not check, are not the text that they are said to be."""
    for row in range(len(dataset)):
        try:
            dataset[row]
        except UnicodeDecodeError:
            return row
    return len(dataset)
