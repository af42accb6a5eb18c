"""From raw rows to checked rows of token ids. This runs once, before training."""

# In the type hints of transformers, a tokenizer's tokens and backend have many types
# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false

import datetime
import hashlib
import json
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import chain, islice
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Features, Image, IterableDataset, List, Value
from datasets.fingerprint import Hasher
from torch.utils.data import get_worker_info
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers import __version__ as transformers_version
from transformers.utils import logging

from trl_ulma.data.conversations import as_chat
from trl_ulma.data.origins import StreamOrigins, located, places_of
from trl_ulma.data.pairs import pairs_to_rows
from trl_ulma.data.unread import UNREAD
from trl_ulma.labels import (
    OPTIONAL_COLUMNS,
    InvalidRow,
    LabelRules,
    check_columns,
    check_texts,
    is_empty,
    is_messages,
    list_invalid,
    read_labels,
    refuse_invalid,
    shown,
    transform_labels,
    unread,
)
from trl_ulma.rows.chat import becomes_chat, check_chat, with_system_message
from trl_ulma.rows.dataset_labels import check_pairs, check_stream, transformed_labels
from trl_ulma.rows.dropped import INVALID_ROWS, check_stream_has_rows, kept_of, kept_rows, packed
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
from trl_ulma.rows.notes import note, noted
from trl_ulma.rows.rendering import Encoder, Rendered, Tokenized, processor_of, tokenizer_of
from trl_ulma.rows.token_ids import check_token_ids, faults_of, token_faults

logger = logging.get_logger(__name__)

SAME_ANSWERS = "chosen and rejected are the same"

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
    "unasked": Value("bool"),
}
_PREPARED = {"prompt_ids", "completion_ids", "label", "sft_mask", "row", "length"}
_READ = {"prompt", "completion", "chosen", "rejected", "label", "trials", "eos", "image", "images", *OPTIONAL_COLUMNS}


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
        raw rows. `ref_logps` is removed, because it comes from the reference of another trainer. If all this changes no
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
            return dataset if is_transformed else self._again(dataset, names, name)
        paired = check_columns(names, name, takes_images=processor_of(self.processing_class) is not None)
        images = image_column(names, name)
        if images is not None:
            check_mode(raw, images, name)
            if isinstance(raw, IterableDataset) and raw.features is not None:
                raw = raw.decode(False)
        for column in ("label", "label_type") if paired else ():
            if column in names:
                logger.warning(f"The {name} dataset is paired, so its column `{column}` is ignored.")
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
        encode = _Encode(self, encoder, name, paired, tuple(names), images, image_tokens, is_made_chat, numbers=numbers)
        optional = [c for c in OPTIONAL_COLUMNS if c in names and not (paired and c == "label_type")]
        kept = ["prompt_ids", "completion_ids", "label", "sft_mask", *(c for c in optional if c != "sft_mask")]
        if not is_text and self.assistant_only_loss:
            kept.append("completion_mask")
        features = Features({c: _TYPES[c] for c in (*kept, "row", "length", *(_OF_IMAGES if images else ()))})
        rules = {
            "transform": str(self.rules.transform),
            "names_demonstrations": "sft_mask" in names,
            "is_for_training": self.is_for_training,
            "is_chat": not is_text,
            "tokens": self._token_rules(is_text),
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

        labels = transformed_labels(raw, name, self.rules, invalid := {})
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
            new_fingerprint=Hasher.hash((raw._fingerprint, name, self._key())),
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
        transform = str(self.rules.transform)
        if is_for_training and self.rules.transform is not None and rules.get("transform", transform) != transform:
            raise ValueError(
                f"The {name} dataset was prepared by a trainer with label_transform={rules['transform']}, but this "
                f"trainer has label_transform={transform!r}. Pass the raw rows."
            )
        made, own = rules.get("tokens", {}), self._token_rules(not rules.get("is_chat", False))
        different = [what for what, value in own.items() if made.get(what, value) != value]
        if different:
            raise ValueError(
                f"The {name} dataset was prepared with another {' and another '.join(different)} than this trainer "
                "has, so its token ids do not fit. Pass the raw rows."
            )
        if "ref_logps" in names:
            rows = rows.remove_columns("ref_logps")
        how = self if is_for_training else replace(self, rules=replace(self.rules, need_mask=False, binary_only=False))
        again = _Again(how, name, rules.get("names_demonstrations", True) or not is_for_training)
        if isinstance(rows, IterableDataset):
            stream = rows.map(again.stream, batched=True, batch_size=64, features=rows.features)
            note(stream, rules=rules)
            check_stream_has_rows(stream, name)
            return stream
        columns = {c: rows[c][:] for c in ("label", "sft_mask", "row", "length", *OPTIONAL_COLUMNS) if c in names}
        faults = faults_of(rows, self.vocab_size, name, tokenizer_of(self.processing_class))
        if not (faults or again.changes(columns) or _is_stale(rows)):
            return rows
        made = rows.with_format(None).map(
            again,
            batched=True,
            features=Features({c: _TYPES.get(c, rows.features[c]) for c in names if c != "ref_logps"} | _PASSING),
            desc=f"Checking {name} dataset",
            new_fingerprint=Hasher.hash((rows._fingerprint, name, self._key())),
        )
        note(made, rules=rules)
        return kept_rows(made, name, self.rules.label_type if self.is_for_training else None, self.invalid_rows)

    def check_positions(self, tokens: int, at: str) -> None:
        """Raise InvalidRow if a row has more tokens than the model can read."""
        if self.positions is not None and tokens > self.positions:
            raise InvalidRow(
                f"{at} has {tokens:,} tokens, but the model only has {self.positions:,} positions. Set "
                f"max_length={self.positions}, or remove the row.",
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

    def _token_rules(self, is_text: bool) -> dict[str, Any]:
        """What the token ids of prepared rows depend on, except for their length."""
        tokenizer = tokenizer_of(self.processing_class)
        vocabulary = json.dumps(_tokens_of(tokenizer))
        found = {"vocabulary": hashlib.sha256(vocabulary.encode()).hexdigest()}
        if is_text:
            return found | {"EOS token": str(tokenizer.eos_token)}
        template = json.dumps(self.processing_class.chat_template)
        return found | {
            "chat template": hashlib.sha256(template.encode()).hexdigest(),
            "system_message": self.system_message,
            "assistant_only_loss": self.assistant_only_loss,
        }

    def _key(self) -> str:
        """A hash of everything that a cached result depends on besides the rows."""
        own, processor = tokenizer_of(self.processing_class), processor_of(self.processing_class)
        state: dict[str, Any] = {name: value for name, value in vars(own).items() if name not in _NOT_READ}
        state["type"] = f"{type(own).__module__}.{type(own).__qualname__}"
        # Chat templates print the special tokens
        state["special_tokens"] = own.special_tokens_map
        state["added_tokens"] = {str(i): repr(token) for i, token in own.added_tokens_decoder.items()}
        if own.is_fast:
            # Each call of the tokenizer sets these again, so the values of the last call must not matter
            own.backend_tokenizer.no_padding()
            own.backend_tokenizer.no_truncation()
            state["backend"] = own.backend_tokenizer.to_str()
        else:
            state["vocabulary"] = sorted(own.get_vocab().items())
        template = self.processing_class.chat_template
        if processor is not None:
            state["processor"] = (type(processor).__name__, processor.to_json_string())
            state["processor's"] = {n: v for n, v in vars(processor).items() if isinstance(v, _PLAIN)}
        if "strftime_now" in str(template):
            state["date"] = datetime.date.today().isoformat()  # the template prints the date
        how = replace(self, processing_class=None)  # type: ignore[arg-type]
        versions = (version("trl-ulma"), transformers_version)
        return Hasher.hash((sorted(state), [state[name] for name in sorted(state)], str(template), how, versions))


# Attributes of a tokenizer that are part of its serialized backend, or that do not affect tokens
_NOT_READ = {"_tokenizer", "name_or_path", "deprecation_warnings", "init_kwargs", "_processor_class", "padding_side"}
_PLAIN = str | int | float | bool | None | tuple | list | dict


@dataclass(frozen=True)
class _Encode:
    """The function that `datasets.map` runs on batches of raw rows."""

    how: Preparation
    encoder: Encoder
    name: str
    paired: bool
    names: tuple[str, ...]
    # The column of images and the number of tokens that they add, if there is such a column
    images: str | None = None
    image_tokens: ImageTokens | None = None
    # Whether plain text becomes messages
    is_made_chat: bool = False
    # The transformed labels of all rows, and the errors of rows without one. Labels of a stream are transformed here.
    labels: list[Any] | None = None
    invalid: Mapping[int, InvalidRow] | None = None
    keeps_prompts: bool = False
    # The numbers of the rows, if some rows of the dataset could not be read
    numbers: np.ndarray | None = None
    # The number of shards of a stream, and the origins of its rows
    shards: int = 1
    place: StreamOrigins = StreamOrigins(None)

    def __call__(self, batch: Mapping[str, list], indices: Sequence[int]) -> dict[str, list]:
        rows: list[int] = list(indices) if self.numbers is None else self.numbers[list(indices)].tolist()
        found, needed = sorted(_READ.intersection(batch)), sorted(_READ.intersection(self.names))
        if found != needed:
            raise ValueError(
                f"Rows {rows[0]} to {rows[-1]} of the {self.name} dataset have the columns {', '.join(found) or 'none'}"
                f", but its first row has {', '.join(needed)}. All rows must have the same columns."
            )
        # Rows are identified by their index in the batch. The two halves of a pair have two indices.
        columns: Mapping[str, list] = batch
        left_out: list[str | None] = [None] * len(rows)
        pair, halves = range(len(rows)), [""] * len(rows)
        if self.paired:
            columns = pairs_to_rows(batch)
            left_out, pair = columns["left_out"], columns["pair"]
            rows = [rows[i] for i in pair]
            halves = [" (chosen)" if label else " (rejected)" for label in columns["label"]]
        columns = self._as_chat(columns)
        numbers = [self._number(row) for row in rows]
        at = [f"Row {row}{half} of the {self.name} dataset" for row, half in zip(numbers, halves, strict=True)]
        invalid: dict[int, InvalidRow] = {}

        labels = self._labels(columns, indices, numbers, invalid)
        for i, fault in enumerate(columns.get(UNREAD, ())):
            if fault is not None:
                left_out[i], invalid[i] = None, unread(fault, f"Row {numbers[i]} of the {self.name} dataset")
        values = None if self.images is None else undecoded(batch, self.images)
        images: list[list] = [[] for _ in rows]
        texts: dict[int, Rendered] = {}
        for i in range(len(rows)):
            if left_out[i] is not None or i in invalid:
                continue
            try:
                if values is not None:
                    images[i] = as_images(values[pair[i]], f"Row {numbers[i]} of the {self.name} dataset")
                check_texts(columns["prompt"][i], columns["completion"][i], at[i], takes_images=values is not None)
                texts[i] = self.encoder.render(columns, i, len(images[i]), at[i])
                left_out[i] = texts[i].left_out
            except InvalidRow as error:
                invalid[i] = error
        for i in range(0, len(rows) if self.paired else 0, 2):
            if i in texts and texts[i] == texts.get(i + 1):
                left_out[i] = left_out[i + 1] = SAME_ANSWERS
        wanted = [i for i in texts if left_out[i] is None]
        tokenized = dict(zip(wanted, self.encoder.tokenize([texts[i] for i in wanted]), strict=True))

        made: list[Tokenized] = [Tokenized([], [])] * len(rows)
        cut, length = [False] * len(rows), [0] * len(rows)
        for i, tokens in tokenized.items():
            added = 0
            try:
                if self.encoder.processor is not None:
                    check_stray(self.encoder.processor, tokens.prompt, tokens.completion, len(images[i]), at[i])
                if self.image_tokens is not None:
                    added = self.image_tokens(images[i], f"Row {numbers[i]} of the {self.name} dataset")
                made[i], cut[i], left_out[i] = self.encoder.truncate(tokens, added)
                length[i] = len(made[i].prompt) + len(made[i].completion) + added
                self.how.check_positions(length[i], at[i])
            except InvalidRow as error:
                invalid[i] = error
        invalid = {i: error.at_prompt(columns["prompt"][i]) for i, error in invalid.items()}
        return {
            "prompt_ids": [tokens.prompt for tokens in made],
            "completion_ids": [tokens.completion for tokens in made],
            **labels,
            "row": rows,
            "length": length,
            "left_out": left_out,
            "cut": cut,
            "invalid": [packed(invalid.get(i)) for i in range(len(rows))],
            "unended": [i in texts and not texts[i].is_ended for i in range(len(rows))],
            "unasked": [
                "prompt" in self.names and i in texts and is_empty(columns["prompt"][i]) for i in range(len(rows))
            ],
            **(
                {"completion_mask": [tokens.mask for tokens in made]}
                if not self.encoder.is_text and self.how.assistant_only_loss
                else {}
            ),
            **({"prompt": columns["prompt"]} if self.keeps_prompts else {}),
            **(
                {
                    "prompt_text": [texts[i].prompt if i in texts else "" for i in range(len(rows))],
                    "prompt_images": images,
                    "image_key": [image_key(each) for each in images],
                }
                if self.images is not None
                else {}
            ),
        }

    def _as_chat(self, columns: Mapping[str, list]) -> Mapping[str, list]:
        """The columns with plain text converted to messages and with the system message added."""
        system_message = self.how.system_message
        if self.is_made_chat:
            prompts, completions = as_chat(columns["prompt"], columns["completion"])
            columns = ChainMap({"prompt": prompts, "completion": completions}, columns)  # type: ignore[arg-type]
        if system_message is not None:
            prompts = [with_system_message(prompt, system_message) for prompt in columns["prompt"]]
            columns = ChainMap({"prompt": prompts}, columns)  # type: ignore[arg-type]
        return columns

    def _labels(
        self, columns: Mapping[str, list], indices: Sequence[int], numbers: list, invalid: dict[int, InvalidRow]
    ) -> dict[str, list]:
        """The columns of labels. Errors are added to `invalid`."""
        rules = self.how.rules
        if self.labels is None:
            label = transform_labels(columns, numbers, self.name, rules, invalid=invalid)
        else:
            label = [self.labels[row] for row in indices]
            known = self.invalid or {}
            invalid |= {i: known[row] for i, row in enumerate(indices) if row in known}
        # Only take columns that are read, because a batch decodes each column that is taken from it
        optional = {name: columns[name] for name in OPTIONAL_COLUMNS if name in columns}
        return read_labels({**optional, "label": label}, numbers, self.name, rules, invalid)

    def _number(self, row: int) -> int | str:
        """The number of a row in messages. In a worker of a data loader, rows are counted within its shards."""
        worker = get_worker_info()
        if worker is None or worker.num_workers == 1 or self.shards == 1:
            return row
        own = list(range(worker.id, self.shards, worker.num_workers))
        if len(own) == 1:
            return f"{row} of shard {own[0]}"
        return f"{row}, counted in the shards {', '.join(map(str, own[:5]))}{', …' if len(own) > 5 else ''},"

    def stream(self, batch: Mapping[str, list], indices: Sequence[int]) -> dict[str, list]:
        """Like `__call__`, for a stream: rows to leave out are dropped and logged here."""
        made = self(batch, indices)
        numbers = [self._number(row) for row in made["row"]]
        kept = kept_of(made, self.name, self.how.invalid_rows, numbers, self.place)
        self.how.check_batch(kept, [self._number(row) for row in kept["row"]], self.name)
        # Columns that the first row lacks are not removed by `map`, so they must have the same length
        late = set(batch).difference(self.names)
        return dict.fromkeys(late, [None] * len(kept["row"])) | kept


@dataclass(frozen=True)
class _Again:
    """The function that `datasets.map` runs on batches of prepared rows."""

    how: Preparation
    name: str
    # Whether the raw rows had `sft_mask`. If not, this trainer's rules compute it.
    names_demonstrations: bool

    def __call__(self, batch: Mapping[str, list]) -> dict[str, list]:
        """The changed columns of prepared rows, and the columns `_PASSING`."""
        faults = token_faults(batch, self.how.vocab_size, self.name, tokenizer_of(self.how.processing_class))
        labels, invalid = self._labels(batch, faults)
        encoder = Encoder(self.how.processing_class, True, False, self.how.max_length, self.how.truncation_mode)
        count = len(batch["row"])
        masks = batch["completion_mask"] if "completion_mask" in batch else [None] * count
        names = ["prompt_ids", "completion_ids", "length", "left_out", "cut"]
        found: dict[str, list] = {name: [] for name in [*names, "completion_mask"]}
        for i, row in enumerate(batch["row"]):
            both = ([], []) if i in faults else (batch["prompt_ids"][i], batch["completion_ids"][i])
            tokens = Tokenized(*both, None if i in faults else masks[i])
            # Only images add tokens. The length of other rows may be that of ids which were changed since.
            has_images = "prompt_images" in batch and i not in faults
            added = batch["length"][i] - len(tokens.prompt) - len(tokens.completion) if has_images else 0
            tokens, is_cut, left_out = encoder.truncate(tokens, added)
            length = len(tokens.prompt) + len(tokens.completion) + added
            try:
                self.how.check_positions(length, f"Row {row} of the {self.name} dataset")
            except InvalidRow as error:
                invalid.setdefault(i, error)
            values = (tokens.prompt, tokens.completion, length, left_out, is_cut, tokens.mask)
            for into, value in zip(found.values(), values, strict=True):
                into.append(value)
        if "completion_mask" not in batch:
            del found["completion_mask"]
        errors = [packed(invalid.get(i)) for i in range(count)]
        return {**found, **labels, "invalid": errors, "unended": [False] * count, "unasked": [False] * count}

    def stream(self, batch: Mapping[str, list]) -> dict[str, list]:
        """Like `__call__`, for a stream."""
        kept = kept_of({**batch, **self(batch)}, self.name, self.how.invalid_rows, batch["row"])
        self.how.check_batch(kept, kept["row"], self.name)
        return kept

    def changes(self, columns: Mapping[str, list]) -> bool:
        """Whether any row with these columns would be changed or left out."""
        labels, invalid = self._labels(columns)
        limits = [limit for limit in (self.how.max_length, self.how.positions) if limit is not None]
        is_long = bool(limits) and max(columns["length"]) > min(limits)
        return bool(invalid) or is_long or labels["sft_mask"] != columns["sft_mask"]

    def _labels(
        self, columns: Mapping[str, list], faults: Mapping[int, InvalidRow] | None = None
    ) -> tuple[dict[str, list], dict[int, InvalidRow]]:
        """The columns of labels, and the errors, with those that are known already."""
        names = ["label", *(name for name in OPTIONAL_COLUMNS if name in columns)]
        if not self.names_demonstrations:
            names.remove("sft_mask")
        read: dict[int, InvalidRow] = dict(faults or {})
        rules = replace(self.how.rules, transform=None)
        return read_labels({name: columns[name] for name in names}, columns["row"], self.name, rules, read), read


def check_prepared_columns(names: Sequence[str], name: str) -> None:
    """Raise ValueError if prepared rows lack columns, or have others.

    Args:
        names: the names of their columns.
        name: the name of the dataset.

    Example:
        >>> check_prepared_columns(sorted(_PREPARED), "train")
    """
    missing = sorted(_PREPARED.difference(names))
    others = sorted(set(names).difference(_TYPES, ("ref_logps", "prompt")))
    if missing or others:
        wrong = [f"lack the columns {', '.join(missing)}"] if missing else []
        wrong += [f"have other columns, too: {', '.join(others)}"] if others else []
        raise ValueError(
            f"The rows of the {name} dataset are prepared (they have prompt_ids and completion_ids), but "
            f"{' and '.join(wrong)}. Pass the raw rows, or the prepared rows with their columns as they were."
        )


def _tokens_of(tokenizer: PreTrainedTokenizerBase) -> list:
    """All tokens in the order of their ids, with the ids if these do not run from 0 without a gap."""
    if tokenizer.is_fast:
        # Several times as fast as the vocabulary as a dict
        backend = tokenizer.backend_tokenizer
        tokens = [backend.id_to_token(i) for i in range(backend.get_vocab_size())]
        if None not in tokens:
            return tokens
    pairs = sorted((i, token) for token, i in tokenizer.get_vocab().items())
    has_gap = any(place != i for place, (i, _) in enumerate(pairs))
    return pairs if has_gap else [token for _, token in pairs]


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
    readable, errors = [], {}
    for row in range(len(dataset)):
        try:
            dataset[row]
        except UnicodeDecodeError as error:
            errors[row] = InvalidRow(
                f"Row {row} of the {name} dataset contains text that is not UTF-8 ({error}). Read the file in its "
                "actual encoding, and write it again as UTF-8.",
                "text that is not UTF-8",
            )
        else:
            readable.append(row)
    return readable, located(errors, dataset)
