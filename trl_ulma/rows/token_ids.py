"""Checks of the token ids of prepared rows, which a user may have changed."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from trl_ulma.labels import InvalidRow, list_invalid

_IDS = ("prompt_ids", "completion_ids")


def check_token_ids(rows: Dataset, vocab_size: int, name: str, tokenizer: Any) -> None:
    """Raise ValueError if the model has no embedding for a token id. The message lists the rows.

    Args:
        rows: prepared rows.
        vocab_size: the number of embeddings of the model.
        name: the name of the dataset.
        tokenizer: the tokenizer that created the ids.

    Example:
        >>> rows = Dataset.from_dict({"prompt_ids": [[1, 2]], "completion_ids": [[3]], "row": [0]})
        >>> check_token_ids(rows, 4, "train", None)
    """
    found = faults_of(rows, vocab_size, name, tokenizer)
    if found:
        raise ValueError(list_invalid([found[i] for i in sorted(found)], len(rows), name))


def faults_of(rows: Dataset, vocab_size: int | None, name: str, tokenizer: Any) -> dict[int, InvalidRow]:
    """Like `token_faults`, for a whole dataset."""
    found, start = {}, 0
    columns = [column for column in (*_IDS, "completion_mask", "row") if column in rows.column_names]
    table: Any = rows.select_columns(columns).with_format("arrow")
    for batch in table.iter(10_000):
        found |= {start + i: error for i, error in token_faults(batch, vocab_size, name, tokenizer).items()}
        start += len(batch)
    return found


def token_faults(
    columns: pa.Table | Mapping[str, list], vocab_size: int | None, name: str, tokenizer: PreTrainedTokenizerBase | None
) -> dict[int, InvalidRow]:
    """The errors of rows whose ids and masks cannot be read, by position.

    Args:
        columns: `prompt_ids`, `completion_ids` and `row` of prepared rows, and `completion_mask` if they have one.
        vocab_size: the number of embeddings of the model. None if it is unknown.
        name: the name of the dataset.
        tokenizer: shows tokens in messages.

    Raises:
        ValueError: if a column does not hold lists of whole numbers.

    Example:
        >>> rows = {"prompt_ids": [[1], [1]], "completion_ids": [[2], []], "row": [5, 6]}
        >>> print(token_faults(rows, 4, "train", None)[1])
        Row 6 of the train dataset: completion_ids is empty, so there is nothing to learn. Drop the row.
    """
    found: dict[int, InvalidRow] = {}
    lengths = {}
    for column in _IDS:
        lengths[column], owners, ids = _lists(columns[column], column, name)
        for i in np.flatnonzero(lengths[column] < 0).tolist():
            fault = "is None; it must be a list of token ids. Pass the raw rows, or correct it."
            found.setdefault(i, InvalidRow(fault, f"{column} is missing", column))
        beyond = (ids < 0) if vocab_size is None else (ids < 0) | (ids >= vocab_size)
        rows, firsts = np.unique(owners[beyond], return_index=True)
        for i, token in zip(rows.tolist(), ids[beyond][firsts].tolist(), strict=True):
            found.setdefault(i, _no_embedding(token, vocab_size, tokenizer))
    for i in np.flatnonzero(lengths["completion_ids"] == 0).tolist():
        fault = "is empty, so there is nothing to learn. Drop the row."
        found.setdefault(i, InvalidRow(fault, "completion_ids is empty", "completion_ids"))
    names: Any = getattr(columns, "column_names", columns)
    if "completion_mask" in names:
        found = _mask_faults(columns["completion_mask"], lengths["completion_ids"], name) | found
    numbers = _listed(columns["row"])
    return {i: error.at(numbers[i], name) for i, error in found.items()}


def _mask_faults(masks: Any, lengths: np.ndarray, name: str) -> dict[int, InvalidRow]:
    """The errors of completion masks, by position. A mask can be None: then all tokens are scored."""
    sizes, owners, values = _lists(masks, "completion_mask", name)
    ones = np.bincount(owners, weights=values == 1, minlength=len(lengths))
    others = np.bincount(owners, weights=(values != 0) & (values != 1), minlength=len(lengths))
    found = {}
    for i in np.flatnonzero((sizes >= 0) & ((sizes != lengths) | (ones == 0) | (others > 0))).tolist():
        what, kind = f"{sizes[i]} values, but completion_ids has {lengths[i]}", "mask and ids of different lengths"
        if sizes[i] == lengths[i]:
            what, kind = "only zeros, so there is nothing to learn", "completion_mask scores no token"
            if others[i]:
                what, kind = "values other than 0 and 1", "completion_mask is no mask"
        found[i] = InvalidRow(f"has {what}. Pass the raw rows, or correct it.", kind, "completion_mask")
    return found


def _lists(values: Any, column: str, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`(N,)` lengths of lists (-1 for None), and for all elements `(M,)` positions of their lists, and values."""
    try:
        lists = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(_wrong_kind(column, name, str(error))) from error
    if pa.types.is_null(lists.type) or (pa.types.is_list(lists.type) and pa.types.is_null(lists.type.value_type)):
        lists = lists.cast(pa.list_(pa.int64()))  # only None, or only empty lists
    is_list = pa.types.is_list(lists.type) or pa.types.is_large_list(lists.type)
    if not is_list or not (pa.types.is_integer(lists.type.value_type) or pa.types.is_boolean(lists.type.value_type)):
        raise ValueError(_wrong_kind(column, name, str(lists.type)))
    lengths = _array(pc.call_function("list_value_length", [lists]))
    owners = pc.call_function("list_parent_indices", [lists]).to_numpy(zero_copy_only=False)
    return lengths, owners, _array(pc.call_function("list_flatten", [lists]).cast(pa.int64()))


def _array(numbers: Any) -> np.ndarray:
    """Numbers of Arrow as an array, with -1 for None."""
    filled = pc.fill_null(numbers, -1) if numbers.null_count else numbers  # a copy
    return filled.to_numpy(zero_copy_only=False)


def _wrong_kind(column: str, name: str, found: str) -> str:
    return (
        f"The column {column} of the {name} dataset must hold lists of whole numbers; it holds {found}. Pass the raw "
        "rows, or correct the column."
    )


def _listed(values: Any) -> list:
    return values.to_pylist() if isinstance(values, pa.ChunkedArray) else list(values)


def _no_embedding(token: int, vocab_size: int | None, tokenizer: Any) -> InvalidRow:
    if token < 0:
        fault = f"has the token id {token}, which is no token. Pass the raw rows, or correct the ids."
        return InvalidRow(fault, "an id that is no token")
    shown = f"the token {tokenizer.convert_ids_to_tokens(token)!r} with id" if tokenizer is not None else "the token id"
    return InvalidRow(
        f"has {shown} {token}, but the model only has embeddings for ids below {vocab_size}. If you added the "
        "token on purpose, call model.resize_token_embeddings(len(tokenizer)). Otherwise use the tokenizer that "
        "belongs to the model.",
        "a token without an embedding",
    )
