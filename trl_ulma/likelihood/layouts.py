"""How a batch's rows go through a model: padded, packed into one sequence, or with shared prompts run once.

Each way gives the log-probabilities of the same completion tokens, and only these are projected through the LM head.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch


class Layout(NamedTuple):
    """A batch's rows, laid out as sequences.

    Attributes:
        inputs: what the model is given: `input_ids` `(R, W)` and what says who attends to whom.
        positions: `(n,)` places in the flattened `(R·W)` sequences, each right before a completion token.
    """

    inputs: dict[str, torch.Tensor]
    positions: torch.Tensor


def completion_tokens(batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(row, column) of each completion token's predecessor, `(n,)` each, row by row."""
    rows, columns = batch["completion_mask"][:, 1:].nonzero(as_tuple=True)
    return rows, columns


def padded(batch: Mapping[str, torch.Tensor]) -> Layout:
    """One padded sequence a row: the batch as the collator made it."""
    rows, columns = completion_tokens(batch)
    inputs = {name: value for name, value in batch.items() if name != "completion_mask"}
    return Layout(inputs, rows * batch["input_ids"].size(1) + columns)


def packed(batch: Mapping[str, torch.Tensor]) -> Layout:
    """All rows in one sequence without padding, told apart by positions that start again.

    Exact where the attention reads rows' bounds from `position_ids`, see `trl_ulma.likelihood.proof`.
    """
    rows, columns = completion_tokens(batch)
    attended = batch["attention_mask"].bool()
    positions = batch["attention_mask"].cumsum(1) - 1
    lengths = batch["attention_mask"].sum(1)
    starts = lengths.cumsum(0) - lengths
    inputs = {"input_ids": batch["input_ids"][attended][None], "position_ids": positions[attended][None]}
    return Layout(inputs, starts[rows] + positions[rows, columns])


def shared(batch: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None) -> Layout:
    """Rows with the same prompt in one sequence: the prompt less its last token, then a branch for each row.

    A branch is a copy of the prompt's last token, which predicts the completion's first, and the completion less its
    last. It attends to the prompt and to itself, and its positions go on from the prompt's. Rows must be padded on the
    right, with the completion at their end.

    Args:
        batch: `input_ids`, `attention_mask`, `completion_mask` `(B, T)`.
        dtype: of an additive attention mask, for eager attention; a boolean mask where it is None.
    """
    device = batch["input_ids"].device
    ids, mask, attended = (batch[n].cpu() for n in ("input_ids", "completion_mask", "attention_mask"))
    prompt_lengths = mask.argmax(1).tolist()
    lengths = attended.sum(1).tolist()
    rows_of: dict[tuple[int, ...], list[int]] = {}
    for row, length in enumerate(prompt_lengths):
        rows_of.setdefault(tuple(ids[row, :length].tolist()), []).append(row)

    sequences = []  # (token, position, branch) each
    span_of = {}  # (sequence, start) of each row's branch
    for number, (prompt, rows) in enumerate(rows_of.items()):
        sequence = [(token, position, 0) for position, token in enumerate(prompt[:-1])]
        for branch, row in enumerate(rows, start=1):
            span_of[row] = (number, len(sequence))
            # Row by row a branch's tokens are the row's from its last prompt token to its last but one
            part = ids[row, len(prompt) - 1 : lengths[row] - 1].tolist()
            sequence += [(token, len(prompt) - 1 + i, branch) for i, token in enumerate(part)]
        sequences.append(torch.tensor(sequence))
    width = max(len(sequence) for sequence in sequences)
    table = torch.zeros(len(sequences), width, 3, dtype=torch.long)
    table[..., 2] = -1  # padding, which attends to itself alone
    for number, sequence in enumerate(sequences):
        table[number, : len(sequence)] = sequence
    rows, columns = mask[:, 1:].nonzero(as_tuple=True)
    # Where a row's branch begins, less the column of its first token
    begins = torch.tensor([number * width + start for number, start in (span_of[row] for row in range(len(ids)))])
    index = begins[rows] + columns - (torch.tensor(prompt_lengths)[rows] - 1)

    table, index = table.to(device), index.to(device)
    branch = table[..., 2]
    places = torch.arange(width, device=device)
    causal = places[None, :] <= places[:, None]
    sees = causal & ((branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None]))
    sees = torch.where((branch == -1)[:, :, None], torch.eye(width, dtype=torch.bool, device=device), sees)[:, None]
    if dtype is not None:
        sees = torch.zeros(sees.shape, dtype=dtype, device=device).masked_fill(~sees, torch.finfo(dtype).min)
    inputs = {"input_ids": table[..., 0], "position_ids": table[..., 1], "attention_mask": sees}
    return Layout(inputs, index)


def shares_prompts(batch: Mapping[str, torch.Tensor]) -> bool:
    """Whether two rows of the batch have the same prompt."""
    ids, mask = batch["input_ids"].cpu(), batch["completion_mask"].cpu()
    prompts = [tuple(row[:length]) for row, length in zip(ids.tolist(), mask.argmax(1).tolist(), strict=True)]
    return len(set(prompts)) < len(prompts) and all(prompts)


def why_not_shared(config: Any) -> str | None:
    """Why rows of one prompt can not be run as branches in a model of this configuration; None where they can."""
    attention = config._attn_implementation
    if attention not in ("sdpa", "eager"):
        return f"attn_implementation={attention!r} takes no mask of its own; 'sdpa' and 'eager' do"
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ())
    if kinds - {"full_attention"} or (not kinds and getattr(text, "sliding_window", None)):
        return "the model has layers that are sliding windows, or recurrent"
    if getattr(text, "output_router_logits", None) is not None:
        return "the auxiliary loss of a mixture of experts is defined for padded rows"
    return None


def positions_of(config: Any) -> int | None:
    """How many tokens a model of this configuration reads at most; None where that has no end, as with rotary ones."""
    text = config.get_text_config()
    return None if getattr(text, "rope_parameters", None) else getattr(text, "max_position_embeddings", None)


def length_that_changes_positions(config: Any) -> int | None:
    """The length from which a batch's longest row changes the rotary positions of all its rows; None where none does.

    So it is with the scalings "longrope" and "dynamic": a row's log-probability depends on the batch it is in.

    Example:
        >>> from transformers import LlamaConfig
        >>> length_that_changes_positions(LlamaConfig()) is None
        True
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    # Models with several kinds of layers have one set of parameters for each
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    if not any(kind.get("rope_type", kind.get("type")) in ("longrope", "dynamic") for kind in kinds):
        return None
    lengths = [kind.get("original_max_position_embeddings") for kind in kinds]
    lengths += [getattr(text, "original_max_position_embeddings", None), text.max_position_embeddings]
    return next(length for length in lengths if length is not None)
