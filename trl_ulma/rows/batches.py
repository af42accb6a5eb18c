"""The functions that `datasets.map` runs on batches of rows: raw ones, and ones that are prepared already."""

import gc
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import get_worker_info
from transformers.utils import logging

from trl_ulma.data.conversations import as_chat
from trl_ulma.data.origins import StreamOrigins
from trl_ulma.data.pairs import pairs_to_rows
from trl_ulma.data.unread import UNREAD
from trl_ulma.labels import (
    OPTIONAL_COLUMNS,
    InvalidRow,
    check_texts,
    is_empty,
    read_labels,
    transform_labels,
    unread,
)
from trl_ulma.rows.chat import with_system_message
from trl_ulma.rows.dropped import UNASKED, kept_of, packed
from trl_ulma.rows.images import ImageTokens, as_images, check_stray, image_key, undecoded
from trl_ulma.rows.rendering import Encoder, Rendered, Tokenized, tokenizer_of
from trl_ulma.rows.token_ids import token_faults

if TYPE_CHECKING:
    from trl_ulma.rows.preparation import Preparation

logger = logging.get_logger(__name__)

SAME_ANSWERS = "chosen and rejected are the same"

_READ = {"prompt", "completion", "chosen", "rejected", "label", "trials", "eos", "image", "images", *OPTIONAL_COLUMNS}


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Turn Python's garbage collector off, if it is on.

    A batch makes many lists and no cycles, so the collector would visit all objects of the process and find nothing.
    This takes 5% of the time of the preparation.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@dataclass(frozen=True)
class RawBatches:
    """The function that `datasets.map` runs on batches of raw rows."""

    how: "Preparation"
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
    # What was logged about raters of a stream that the training did not have
    told: set[str] = field(default_factory=set, compare=False)

    def __call__(self, batch: Mapping[str, list], indices: Sequence[int]) -> dict[str, list]:
        with _no_garbage_collection():
            return self._prepared(batch, indices)

    def _prepared(self, batch: Mapping[str, list], indices: Sequence[int]) -> dict[str, list]:
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
            halves = ["chosen" if label else "rejected" for label in columns["label"]]
        columns = self._as_chat(columns)
        numbers = [self._number(row) for row in rows]
        invalid: dict[int, InvalidRow] = {}

        labels = self._labels(columns, indices, numbers, invalid)
        for i, fault in enumerate(columns.get(UNREAD, ())):
            if fault is not None:
                left_out[i], invalid[i] = None, unread(fault).at(numbers[i], self.name)
        values = None if self.images is None else undecoded(batch, self.images)
        images: list[list] = [[] for _ in rows]
        texts: dict[int, Rendered] = {}
        for i in range(len(rows)):
            if left_out[i] is not None or i in invalid:
                continue
            try:
                if values is not None:
                    images[i] = as_images(values[pair[i]])
            except InvalidRow as error:  # in both answers of a pair
                invalid[i] = error.at(numbers[i], self.name)
                continue
            try:
                check_texts(columns["prompt"][i], columns["completion"][i], takes_images=values is not None)
                texts[i] = self.encoder.render(columns, i, len(images[i]))
                left_out[i] = texts[i].left_out
            except InvalidRow as error:
                invalid[i] = error.at(numbers[i], self.name, halves[i])
        for i in range(0, len(rows) if self.paired else 0, 2):
            if i in texts and texts[i] == texts.get(i + 1):
                left_out[i] = left_out[i + 1] = SAME_ANSWERS
        wanted = [i for i in texts if left_out[i] is None]
        tokenized = dict(zip(wanted, self.encoder.tokenize([texts[i] for i in wanted]), strict=True))

        made: list[Tokenized] = [Tokenized([], [])] * len(rows)
        cut, length = [False] * len(rows), [0] * len(rows)
        for i, tokens in tokenized.items():
            try:
                added = 0 if self.image_tokens is None else self.image_tokens(images[i])
            except InvalidRow as error:  # in both answers of a pair
                invalid[i] = error.at(numbers[i], self.name)
                continue
            try:
                if self.encoder.processor is not None:
                    check_stray(self.encoder.processor, tokens.prompt, tokens.completion, len(images[i]))
                made[i], cut[i], left_out[i] = self.encoder.truncate(tokens, added)
                length[i] = len(made[i].prompt) + len(made[i].completion) + added
                self.how.check_positions(length[i])
            except InvalidRow as error:
                invalid[i] = error.at(numbers[i], self.name, halves[i])
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
            "odd": [self._odd(columns["prompt"][i], texts.get(i)) for i in range(len(rows))],
            **(
                {"completion_mask": [tokens.mask for tokens in made]}
                if not self.encoder.is_text and self.how.assistant_only_loss
                else {}
            ),
            # Those of other rows can have another type
            **(
                {"prompt": [columns["prompt"][i] if i in texts else None for i in range(len(rows))]}
                if self.keeps_prompts
                else {}
            ),
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

    def _odd(self, prompt: Any, text: Rendered | None) -> str | None:
        """What is odd about a row, in the words of `trl_ulma.rows.dropped`, or None."""
        if text is None:
            return None
        is_unasked = "prompt" in self.names and is_empty(prompt)
        return " ".join([*text.odd, *([UNASKED] if is_unasked else [])]) or None

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
            note = partial(self._tell_once, numbers)
            label = transform_labels(columns, numbers, self.name, rules, invalid=invalid, note=note)
        else:
            label = [self.labels[row] for row in indices]
            known = self.invalid or {}
            invalid |= {i: known[row] for i, row in enumerate(indices) if row in known}
        # Only take columns that are read, because a batch decodes each column that is taken from it
        optional = {name: columns[name] for name in OPTIONAL_COLUMNS if name in columns}
        return read_labels({**optional, "label": label}, numbers, self.name, rules, invalid)

    def _tell_once(self, numbers: list, raters: str) -> None:
        """Log what is to be said of the raters in a batch of a stream, for the first such batch."""
        if not self.told:
            logger.warning(f"Rows {numbers[0]} to {numbers[-1]}: {raters} Later rows of the stream are not counted.")
        self.told.add(raters)

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
class PreparedBatches:
    """The function that `datasets.map` runs on batches of prepared rows."""

    how: "Preparation"
    name: str
    # Whether the raw rows had `sft_mask`. If not, this trainer's rules compute it.
    names_demonstrations: bool

    def __call__(self, batch: Mapping[str, list]) -> dict[str, list]:
        """The changed columns of prepared rows, and the columns `PASSING`."""
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
                self.how.check_positions(length)
            except InvalidRow as error:
                invalid.setdefault(i, error.at(row, self.name))
            values = (tokens.prompt, tokens.completion, length, left_out, is_cut, tokens.mask)
            for into, value in zip(found.values(), values, strict=True):
                into.append(value)
        if "completion_mask" not in batch:
            del found["completion_mask"]
        errors = [packed(invalid.get(i)) for i in range(count)]
        return {**found, **labels, "invalid": errors, "unended": [False] * count, "odd": [None] * count}

    def stream(self, batch: Mapping[str, list]) -> dict[str, list]:
        """Like `__call__`, for a stream."""
        kept = kept_of({**batch, **self(batch)}, self.name, self.how.invalid_rows, batch["row"])
        self.how.check_batch(kept, kept["row"], self.name)
        return kept

    def warn_of_edited_masks(self, columns: Mapping[str, list]) -> None:
        """Warn if `sft_mask` is computed again for rows whose labels or masks were changed since they were prepared."""
        if self.names_demonstrations:
            return
        masks = zip(columns["row"], columns["sft_mask"], self._labels(columns)[0]["sft_mask"], strict=True)
        edited = [row for row, was, now in masks if was != now]
        if edited:
            rows = f"{len(edited):,} row{'s' if len(edited) > 1 else ''} (such as row {edited[0]})"
            logger.warning(
                f"sft_mask of {rows} of the {self.name} dataset is computed again from the labels, because the rows "
                "that it was prepared from had none. To choose demonstrations yourself, pass raw rows with sft_mask."
            )

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
