"""Collates rows of token ids and labels to the tensors of a batch."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.data.data_collator import DataCollatorMixin
from trl.trainer.utils import pad

from trl_ulma.labels import LabelRules


@dataclass
class DataCollatorForPointwisePreference(DataCollatorMixin):
    r"""Collates rows with `prompt_ids`, `completion_ids` and `label` into a batch that is padded on the right.

    Rows can have a `completion_mask` with 1 for each completion token that is scored, and 0 for the others. If a row
    has no mask (or None), all completion tokens are scored.

    Returns a dictionary of

    - `input_ids`, `attention_mask`, `completion_mask`: `(B, T)`;
    - `label`: `(B,)` float32;
    - `sft_mask`: `(B,)` bool. A row without `sft_mask` is a demonstration if its label is 1 ("binary"), or at least
      `sft_threshold` ("continuous");
    - if the rows have them: `log_z` (nats), `weight`, `ref_logps` (nats, summed over the completion) `(B,)` float32,
      `continuous` `(B,)` bool (from `label_type`), `row` and `group` `(B,)` int64.

    Args:
        pad_token_id: the token to pad with.
        max_length: the maximum length of a sequence. Longer sequences are truncated before padding. None does not
            truncate.
        truncation_mode: "keep_start" or "keep_end".
        pad_to_multiple_of: pads the length to a multiple of this number.
        label_type: "binary" or "continuous", for rows without their own `label_type`.
        sft_threshold: see `sft_mask`.
        return_tensors: "pt".

    Raises:
        ValueError: if `truncation_mode` is unknown.

    Example:
        >>> collator = DataCollatorForPointwisePreference(pad_token_id=0)
        >>> batch = collator(
        ...     [
        ...         {"prompt_ids": [1, 2, 3], "completion_ids": [4, 5], "label": 1.0},
        ...         {"prompt_ids": [7, 8], "completion_ids": [9], "label": 0.0},
        ...     ]
        ... )
        >>> batch["input_ids"]
        tensor([[1, 2, 3, 4, 5],
                [7, 8, 9, 0, 0]])
        >>> batch["attention_mask"]
        tensor([[1, 1, 1, 1, 1],
                [1, 1, 1, 0, 0]])
        >>> batch["completion_mask"]
        tensor([[0, 0, 0, 1, 1],
                [0, 0, 1, 0, 0]])
        >>> batch["label"], batch["sft_mask"]
        (tensor([1., 0.]), tensor([ True, False]))
    """

    pad_token_id: int
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    pad_to_multiple_of: int | None = None
    label_type: str = "binary"
    sft_threshold: float | None = None
    return_tensors: str = "pt"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The batch of `examples`."""
        kept = slice(None)
        if self.max_length is not None:
            if self.truncation_mode not in ("keep_start", "keep_end"):
                raise ValueError(f"truncation_mode must be 'keep_start' or 'keep_end'; got {self.truncation_mode!r}.")
            kept = slice(self.max_length) if self.truncation_mode == "keep_start" else slice(-self.max_length, None)
        input_ids, completion_mask = [], []
        for example in examples:
            prompt, completion = example["prompt_ids"], example["completion_ids"]
            input_ids.append(torch.tensor([*prompt, *completion][kept]))
            scored = (example.get("completion_mask") or [1] * len(completion))[: len(completion)]
            completion_mask.append(torch.tensor([*[0] * len(prompt), *scored][kept]))
        batch = {
            "input_ids": self._pad(input_ids, self.pad_token_id),
            "attention_mask": self._pad([torch.ones_like(ids) for ids in input_ids], 0),
            "completion_mask": self._pad(completion_mask, 0),
            "label": torch.tensor([float(example["label"]) for example in examples], dtype=torch.float32),
            "sft_mask": torch.tensor([self._is_demonstration(example) for example in examples], dtype=torch.bool),
        }
        first = examples[0]
        if "label_type" in first:
            batch["continuous"] = torch.tensor([example["label_type"] == "continuous" for example in examples])
        for name in ("log_z", "weight", "ref_logps"):
            if name in first:
                batch[name] = torch.tensor([example[name] for example in examples], dtype=torch.float32)
        for name in ("row", "group"):
            if name in first:
                batch[name] = torch.tensor([example[name] for example in examples])
        return batch

    def _pad(self, tensors: list[torch.Tensor], value: int) -> torch.Tensor:
        return pad(tensors, padding_value=value, padding_side="right", pad_to_multiple_of=self.pad_to_multiple_of)

    def _is_demonstration(self, example: dict[str, Any]) -> bool:
        if "sft_mask" in example:
            return bool(example["sft_mask"])
        rules = LabelRules(self.label_type, self.sft_threshold)
        return rules.is_demonstration(float(example["label"]), example.get("label_type"))
