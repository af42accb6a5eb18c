"""How the rows of a batch are laid out for a model: padded, packed into one sequence, or with shared prompts.

All layouts give the log-probabilities of the same completion tokens. Only these are projected through the LM head.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

# Types of models whose forward reads tables by the place of a token in the sequence: GPT-Neo's causal mask and local
# windows, and BigBird's token types
_TABLES_OF_PLACES = ("gpt_neo", "big_bird")


class Layout(NamedTuple):
    """The rows of a batch, laid out as sequences.

    Attributes:
        inputs: the inputs of the model: `input_ids` `(R, W)`, and the tensors that determine which tokens attend to
            which.
        positions: `(n,)` indices into the flattened `(R·W)` sequences, each right before a completion token.
        lengths: `(R,)` tokens of the sequences without padding on the right. None if there is none to leave out.
    """

    inputs: dict[str, torch.Tensor]
    positions: torch.Tensor
    lengths: torch.Tensor | None = None


def completion_tokens(batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The row and the column of the token before each completion token, `(n,)` each, ordered by rows."""
    rows, columns = batch["completion_mask"][:, 1:].nonzero(as_tuple=True)
    return rows, columns


def padded(batch: Mapping[str, torch.Tensor]) -> Layout:
    """One padded sequence per row: the batch as it comes from the collator."""
    rows, columns = completion_tokens(batch)
    inputs = {name: value for name, value in batch.items() if name != "completion_mask"}
    return Layout(inputs, rows * batch["input_ids"].size(1) + columns, batch["attention_mask"].sum(1))


def packed(batch: Mapping[str, torch.Tensor]) -> Layout:
    """All rows in one sequence without padding. Positions restart at the beginning of each row.

    This is exact if the attention derives the boundaries of rows from `position_ids`, see `trl_ulma.likelihood.proof`.
    """
    rows, columns = completion_tokens(batch)
    attended = batch["attention_mask"].bool()
    positions = batch["attention_mask"].cumsum(1) - 1
    lengths = batch["attention_mask"].sum(1)
    starts = lengths.cumsum(0) - lengths
    inputs = {"input_ids": batch["input_ids"][attended][None], "position_ids": positions[attended][None]}
    return Layout(inputs, starts[rows] + positions[rows, columns])


def shared(batch: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None) -> Layout:
    """Rows with the same prompt in one sequence: the prompt without its last token, then one branch per row.

    A branch consists of a copy of the prompt's last token, which predicts the first token of the completion, and of the
    completion without its last token. A branch attends to the prompt and to itself, and its positions continue those of
    the prompt. Rows must be padded on the right, and the completion must be at the end of the row.

    Args:
        batch: `input_ids`, `attention_mask`, `completion_mask` `(B, T)`.
        dtype: the dtype of an additive attention mask, for eager attention. None gives a boolean mask.
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
            # The branch has the row's tokens from its last prompt token to its second-to-last token
            part = ids[row, len(prompt) - 1 : lengths[row] - 1].tolist()
            sequence += [(token, len(prompt) - 1 + i, branch) for i, token in enumerate(part)]
        sequences.append(torch.tensor(sequence))
    width = max(len(sequence) for sequence in sequences)
    table = torch.zeros(len(sequences), width, 3, dtype=torch.long)
    table[..., 2] = -1  # padding, which only attends to itself
    for number, sequence in enumerate(sequences):
        table[number, : len(sequence)] = sequence
    rows, columns = mask[:, 1:].nonzero(as_tuple=True)
    # The start of each row's branch
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
    return Layout(inputs, index, torch.tensor([len(sequence) for sequence in sequences]))


def shares_prompts(batch: Mapping[str, torch.Tensor]) -> bool:
    """Whether two rows of the batch have the same prompt."""
    ids, mask = batch["input_ids"].cpu(), batch["completion_mask"].cpu()
    prompts = [tuple(row[:length]) for row, length in zip(ids.tolist(), mask.argmax(1).tolist(), strict=True)]
    return len(set(prompts)) < len(prompts) and all(prompts)


def why_not_packed(config: Any) -> str | None:
    """The reason why a model of this configuration does not support packed rows. None if it does."""
    if getattr(config.get_text_config(), "attn_temperature_tuning", False):
        # Beyond some thousand tokens, so that a short batch does not show it
        return "its attention depends on the place of a token in the whole packed sequence (attn_temperature_tuning)"
    return _why_places_count(config)


def _why_places_count(config: Any) -> str | None:
    """The reason why a forward pass depends on the places of tokens in a sequence, beside their positions, or None.

    A short batch does not show it.
    """
    text = config.get_text_config()
    if getattr(text, "model_type", "") in _TABLES_OF_PLACES:
        return f"a {text.model_type} model has tables by the place in the sequence, which packed sequences can exceed"
    return None


def why_not_shared(config: Any) -> str | None:
    """The reason why a model of this configuration does not support shared prompts. None if it does."""
    attention = config._attn_implementation
    if attention not in ("sdpa", "eager"):
        return f"attn_implementation={attention!r} does not support custom masks, but 'sdpa' and 'eager' do"
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ())
    if kinds - {"full_attention"} or (not kinds and getattr(text, "sliding_window", None)):
        return "the model has sliding-window or recurrent layers"
    if reason := _why_places_count(config):
        return reason
    if getattr(text, "output_router_logits", None) is not None:
        return "the auxiliary loss of a mixture of experts is only defined for padded rows"
    return None


def positions_of(config: Any) -> int | None:
    """The maximum number of tokens that a model of this configuration can read. None for rotary positions.

    Rotary positions of the type "dynamic" have a maximum, too: beyond it, they depend on all batches that the model has
    read before, so the policy and the reference would have different ones.
    """
    text = config.get_text_config()
    if text.model_type == "mpt":  # its biases by distance (ALiBi) are a table of this size
        return text.max_seq_len
    if "dynamic" in {kind.get("rope_type", kind.get("type")) for kind in _rotary_kinds(text)}:
        return text.max_position_embeddings
    return None if getattr(text, "rope_parameters", None) else getattr(text, "max_position_embeddings", None)


def length_that_changes_positions(config: Any) -> int | None:
    """The length from which on the longest row of a batch changes the rotary positions of all its rows, or None.

    The scalings "longrope" and "dynamic" have such a length. With them, a row's log-probability depends on its batch.

    Example:
        >>> from transformers import LlamaConfig
        >>> length_that_changes_positions(LlamaConfig()) is None
        True
    """
    text = config.get_text_config()
    kinds = _rotary_kinds(text)
    if not any(kind.get("rope_type", kind.get("type")) in ("longrope", "dynamic") for kind in kinds):
        return None
    lengths = [kind.get("original_max_position_embeddings") for kind in kinds]
    lengths += [getattr(text, "original_max_position_embeddings", None), text.max_position_embeddings]
    return next(length for length in lengths if length is not None)


def _rotary_kinds(text: Any) -> list[dict[str, Any]]:
    """The settings of rotary positions. Models with several kinds of layers have one set of settings per kind."""
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    return [rope, *(value for value in rope.values() if isinstance(value, dict))]
