"""Per-token log-probabilities of a batch's completions under any model, laid out in the chosen way."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from peft import PeftModel

from trl_ulma.likelihood.layouts import (
    PER_TOKEN,
    CompletionHead,
    Layout,
    packed,
    padded,
    shared,
    shares_prompts,
    why_not_shared,
)
from trl_ulma.likelihood.proof import probe_packed, probe_rows, probe_shared

logger = get_logger(__name__)

Batch = Mapping[str, torch.Tensor]


class Scorer:
    """Scores completion tokens with a model that has TRL's fused LM head; policy and reference alike.

    The chosen layout is tried out on the first model that is scored, on all processes alike.

    Args:
        accelerator: of the trainer.
        layout: "padded", "packed" or "shared", see `trl_ulma.likelihood.layouts`.
        examples: a few rows of token ids to try the layout on.
        collate: makes a batch, on the device, of such rows.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        layout: str,
        examples: Sequence[Mapping[str, Any]],
        collate: Callable[[list[dict[str, Any]]], Batch],
    ):
        self.accelerator = accelerator
        self.layout = layout
        self._examples = examples
        self._collate = collate
        self._is_probed = layout == "padded"
        self._bare: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
        self._heads: dict[int, CompletionHead] = {}

    def __call__(self, model: Any, batch: Batch, **kwargs: Any) -> Any:
        """The fused LM head's output, each field of `PER_TOKEN` `(B, T − 1)` and 0 but at completion tokens.

        Args:
            model: the model, wrapped or not.
            batch: `input_ids`, `attention_mask`, `completion_mask` `(B, T)`.
            **kwargs: for the forward; `prompt_states=True` asks for them too, see `CompletionHead`.

        Raises:
            ValueError: where the layout is not exact with this model.
        """
        if not self._is_probed:
            self._is_probed = True
            self._probe(model)
        if self.layout == "packed":
            return self._forward(model, packed(batch), batch, **kwargs)
        if self.layout == "shared" and shares_prompts(batch):
            return self._forward(model, shared(batch, _mask_dtype(self._unwrapped(model))), batch, **kwargs)
        return self._forward(model, padded(batch), batch, **kwargs)

    def _unwrapped(self, model: Any) -> Any:
        """The model without wrappers; looked for once, since accelerate goes through all its modules."""
        if model not in self._bare:
            self._bare[model] = self.accelerator.unwrap_model(model)
            _keep_gradients(self._bare[model])
        return self._bare[model]

    def _forward(self, model: Any, layout: Layout, batch: Batch, *, prompt_states: bool = False, **kwargs: Any) -> Any:
        bare = self._unwrapped(model)
        if isinstance(bare, PeftModel):
            if bare.active_peft_config.is_prompt_learning:
                return _after_virtual_tokens(model, batch, prompt_states=prompt_states, **kwargs)
            bare = bare.get_base_model()
        if id(bare) not in self._heads:
            self._heads[id(bare)] = CompletionHead(bare)
        return self._heads[id(bare)](model, layout, batch, prompt_states=prompt_states, **kwargs)

    def _probe(self, model: Any) -> None:
        bare = self._unwrapped(model)
        reason = why_not_shared(bare.config) if self.layout == "shared" else None
        if isinstance(bare, PeftModel) and bare.active_peft_config.is_prompt_learning:
            reason = "adapters that put virtual tokens before the rows need padded rows"
        if reason:
            logger.warning(f"Rows are padded, and not {self.layout} as set: {reason}.")
            self.layout = "padded"
            return
        rows = probe_rows(self._examples, same_prompt=self.layout == "shared")
        made = self._collate(rows)
        batch = {name: made[name] for name in ("input_ids", "attention_mask", "completion_mask")}
        exact = self.accelerator.mixed_precision == "no" and bare.dtype in (torch.float32, torch.float64)
        # Products of quantised weights are rounded, whatever the others are in
        exact = exact and getattr(bare.config, "quantization_config", None) is None

        def scores(layout: Layout, batch: Batch) -> torch.Tensor:
            return self._forward(model, layout, batch).log_probs.double()

        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                if self.layout == "packed":
                    probe_packed(scores, batch, exact=exact)
                else:
                    probe_shared(scores, batch, exact=exact, dtype=_mask_dtype(bare))
        finally:
            model.train(was_training)


def _keep_gradients(model: Any) -> None:
    """Have 4-bit weights stay as they are trained with.

    On a CPU with AVX512-BF16 bitsandbytes (0.46 to 0.50) packs them at the first forward without gradients, for a
    product that has none, and leaves them so: all training after an evaluation would change nothing, and not say so.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
            module.state_dict()  # unpacks what was packed before


def _mask_dtype(model: Any) -> torch.dtype | None:
    """Of an attention mask: None for a boolean one, as sdpa takes it."""
    return None if model.config._attn_implementation == "sdpa" else model.dtype


def _after_virtual_tokens(model: Any, batch: Batch, *, prompt_states: bool, **kwargs: Any) -> Any:
    """The scores of padded rows behind an adapter's virtual tokens: the real ones' positions are the last."""
    if prompt_states:
        raise ValueError("There are no prompt_states behind an adapter's virtual tokens.")
    inputs = {name: value for name, value in batch.items() if name != "completion_mask"}
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    outputs = model(**inputs, labels=labels, use_cache=False, fused_lm_head=True, **kwargs)
    for name in PER_TOKEN:
        if getattr(outputs, name) is not None:
            outputs[name] = getattr(outputs, name)[:, -(labels.size(1) - 1) :]
    outputs.prompt_states = None
    return outputs
