"""Per-token log-probabilities of a batch's completions under any causal language model, in a chosen layout."""

import logging
import math
from collections.abc import Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from trl_ulma.likelihood.head import CompactHead, TokenScores, takes
from trl_ulma.likelihood.layouts import (
    Layout,
    completion_tokens,
    packed,
    padded,
    shared,
    shares_prompts,
    why_not_packed,
    why_not_shared,
)
from trl_ulma.likelihood.parts import cost_of_a_pass, parts

logger = logging.getLogger(__name__)

Batch = Mapping[str, torch.Tensor]


class Likelihood(NamedTuple):
    """Scores of a batch's completion tokens under a model.

    All fields except the last two are `(B, T − 1)`, and 0 for all other tokens. `entropy`, `mean_logits` and `is_top1`
    are None if statistics were not requested.

    Attributes:
        log_probs: log π of each token in nats.
        entropy: entropy of the next-token distribution in nats.
        mean_logits: mean logit over the vocabulary.
        is_top1: 1 if the token is the most likely one.
        prompt_states: `(B, H)` inputs of the output embeddings before each row's first completion token, or None.
        aux_loss: load-balancing loss of a mixture of experts, or None.
    """

    log_probs: torch.Tensor
    entropy: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    prompt_states: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None

    @property
    def logps(self) -> torch.Tensor:
        """`(B,)` log π(y|x) in nats, summed over completion tokens in at least float32."""
        return self.log_probs.sum(1, dtype=torch.promote_types(self.log_probs.dtype, torch.float32))


class Scorer:
    """Scores completion tokens with any causal language model. The policy and the reference use the same scorer.

    Args:
        layout: "padded", "packed" or "shared", see `trl_ulma.likelihood.layouts`.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=1)).eval()
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> mask = torch.tensor([[0, 1, 1]])
        >>> batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask}
        >>> found = Scorer()(model, batch)
        >>> expected = model(ids).logits[0, :-1].log_softmax(-1)[[0, 1], [2, 3]]
        >>> torch.allclose(found.log_probs[0], expected)
        True
    """

    def __init__(self, layout: str = "padded"):
        self.layout = layout
        # Keys are models as passed in. A head only holds a weak reference to its model, so this keeps no model alive.
        self._heads: WeakKeyDictionary[Any, CompactHead] = WeakKeyDictionary()

    def __call__(
        self,
        model: Any,
        batch: Batch,
        *,
        statistics: bool = False,
        prompt_states: bool = False,
        layout: Layout | None = None,
        pass_cost: float | None = None,
        **kwargs: Any,
    ) -> Likelihood:
        """Score the completion tokens.

        Args:
            batch: `input_ids`, `attention_mask`, `completion_mask` `(B, T)`, and any other inputs of the forward.
            statistics: whether to compute entropy, mean logits and top-1 agreement.
            prompt_states: whether to return the prompt states.
            layout: the layout of the batch, instead of this scorer's own.
            pass_cost: tokens that a forward pass costs, instead of an estimate. With 0, a batch that can be divided is
                divided at every length, see `trl_ulma.likelihood.parts`.
            **kwargs: additional arguments of the forward.
        """
        bare = bare_model(model)
        if layout is None:
            layout = self._laid_out(bare, batch)
        rows, columns = completion_tokens(batch)
        first = None
        if prompt_states:
            first = torch.searchsorted(rows, torch.arange(len(batch["input_ids"]), device=rows.device))
            first = first.clamp(max=len(rows) - 1)
        targets = batch["input_ids"][rows, columns + 1]
        # What else is asked for, such as an auxiliary loss, is of the whole batch
        cost = math.inf if kwargs else cost_of_a_pass(model, bare)
        if pass_cost is not None and cost < math.inf:
            cost = pass_cost
        divided = parts(layout, cost)
        if len(divided) > 1:
            found = [
                self._head(model, bare)(
                    model, part.inputs, part.positions, targets[own], first=_among(first, own), statistics=statistics
                )
                for part, own in divided
            ]
            scores, states, aux_loss = _joined(found, torch.cat([own for _, own in divided]), first)
        else:
            scores, states, aux_loss = self._head(model, bare)(
                model, {**layout.inputs, **kwargs}, layout.positions, targets, first=first, statistics=statistics
            )
        log_probs, entropy, mean_logits, is_top1 = _dense(scores, rows, columns, batch["input_ids"])
        # A device_map can put the head on another device than the batch
        states, aux_loss = (None if x is None else x.to(batch["input_ids"].device) for x in (states, aux_loss))
        return Likelihood(log_probs, entropy, mean_logits, is_top1, states, aux_loss)

    def _laid_out(self, bare: Any, batch: Batch) -> Layout:
        if self.layout == "packed":
            return packed(batch)
        if self.layout == "shared" and shares_prompts(batch):
            return shared(batch, mask_dtype(bare))
        return padded(batch)

    def _head(self, model: Any, bare: Any) -> CompactHead:
        if model not in self._heads:
            _keep_gradients(bare)
            self._heads[model] = CompactHead(without_adapter(bare))
        return self._heads[model]

    def check_map(self, model: Any, batch: Batch) -> None:
        """Raise ValueError if a model's logits are computed in another way than when it was first scored."""
        if model in self._heads:
            self._heads[model].check_map(model, dict(padded(batch).inputs))

    def check_nothing_is_trained_after_head(self, model: Any, batch: Batch) -> None:
        """Raise ValueError if a trainable parameter of a model changes its logits after the output embeddings."""
        called = without_compiler_and_ddp(model)
        self._head(model, bare_model(model)).check_nothing_is_trained_after(called, dict(padded(batch).inputs))

    def choose_layout(self, model: Any) -> None:
        """Fall back to padding and log a warning if a model does not support the chosen layout."""
        bare = bare_model(model)
        why_not = {"packed": why_not_packed, "shared": why_not_shared}.get(self.layout)
        reason = None if why_not is None else why_not(bare.config)
        inner = without_adapter(bare)
        needed = {"packed": ("position_ids",), "shared": ("position_ids", "attention_mask")}.get(self.layout, ())
        missing = [name for name in needed if not takes(inner, name)]
        if missing:
            reason = f"the forward of {type(inner).__name__} takes no {' and no '.join(missing)}"
        if isinstance(bare, PeftModel) and bare.active_peft_config.is_prompt_learning and self.layout != "padded":
            reason = "prompt-learning adapters put virtual tokens before the rows, which requires padded rows"
        invocation = getattr(getattr(bare, "active_peft_config", None), "alora_invocation_tokens", None)
        if invocation and self.layout != "padded":
            reason = "an aLoRA adapter begins at the last invocation tokens of a sequence, which has to be one row"
        if reason:
            logger.warning(f"The layout is padded instead of {self.layout}: {reason}.")
            self.layout = "padded"


def bare_model(model: Any) -> Any:
    """The model without the wrappers of distributed training and of torch.compile, but with its adapter.

    Example:
        >>> layer = torch.nn.Linear(1, 1)
        >>> bare_model(torch.compile(layer)) is layer
        True
    """
    while not isinstance(model, PreTrainedModel | PeftModel):
        inner = getattr(model, "_orig_mod", None)
        inner = getattr(model, "module", None) if inner is None else inner
        if inner is None:
            break
        model = inner
    return model


def without_compiler_and_ddp(model: Any) -> Any:
    """The model for a forward pass with gradients that no backward pass follows, for which DDP would wait.

    A sharded model keeps its wrapper, without which it does not run.
    """
    while isinstance(model, DistributedDataParallel) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, DistributedDataParallel) else model._orig_mod
    return model


def without_adapter(model: Any) -> Any:
    """The causal language model without wrappers and, if it has an adapter, below it."""
    bare = bare_model(model)
    return bare.get_base_model() if isinstance(bare, PeftModel) else bare


def is_exact(model: Any, mixed_precision: str | None) -> bool:
    """Whether forward passes of a model compute in float32 or better. Products of quantized weights are rounded.

    Args:
        mixed_precision: accelerate's own autocast. A caller's autocast is seen here.
    """
    if torch.is_autocast_enabled(model.device.type):
        return False
    is_quantized = getattr(model.config, "quantization_config", None) is not None
    is_wide = model.dtype == torch.float64 or (model.dtype == torch.float32 and not rounds_float32(model.device.type))
    return mixed_precision in (None, "no") and is_wide and not is_quantized


def rounds_float32(device: str) -> bool:
    """Whether a type of device rounds the factors of float32 products, such as to TF32 or bfloat16.

    `tf32=True`, `torch_compile=True` and `torch.set_float32_matmul_precision` switch it on.

    Example:
        >>> rounds_float32("cuda")
        False
    """
    backend = {"cuda": torch.backends.cuda, "cpu": torch.backends.mkldnn}.get(device)
    precision = getattr(getattr(backend, "matmul", None), "fp32_precision", None)
    if precision is None:  # torch before 2.9; later ones raise an error for the older question if the newer was used
        return backend is not None and torch.get_float32_matmul_precision() != "highest"
    return precision not in ("none", "ieee")


def _among(first: torch.Tensor | None, own: torch.Tensor) -> torch.Tensor | None:
    """Where the wanted positions of a part are among its own, in its order."""
    return None if first is None else torch.isin(own, first).nonzero()[:, 0]


def _joined(found: list[Any], order: torch.Tensor, first: torch.Tensor | None) -> Any:
    """The scores of a batch, and its hidden states, from those of its parts.

    Args:
        order: `(n,)` of which position each score of the parts is, one part after the other.
        first: `(B,)` the positions whose hidden states were asked for.
    """
    place = order.argsort()
    columns: Any = zip(*(scores for scores, _, _ in found), strict=True)
    scores: Any = [None if values[0] is None else torch.cat(values)[place] for values in columns]
    states = None
    if first is not None:
        of_states = order[torch.isin(order, first)]
        states = torch.cat([own for _, own, _ in found])[(of_states == first[:, None]).int().argmax(1)]
    return TokenScores(*scores), states, None


def mask_dtype(model: Any) -> torch.dtype | None:
    """The dtype of an attention mask. None for a boolean mask, which sdpa uses."""
    return None if model.config._attn_implementation == "sdpa" else model.dtype


def _dense(scores: TokenScores, rows: torch.Tensor, columns: torch.Tensor, ids: torch.Tensor) -> Any:
    shape, place = ids[:, 1:].shape, (rows, columns)
    moved = [None if values is None else values.to(ids.device) for values in scores]
    return [None if values is None else values.new_zeros(shape).index_put(place, values) for values in moved]


def _keep_gradients(model: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights.

    On a CPU with AVX512-BF16, bitsandbytes (0.46 to 0.50) packs the weights at the first forward pass without
    gradients, for a product that has no gradient, and does not unpack them. Any training after an evaluation would then
    silently have no effect.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
            module.state_dict()  # unpacks weights that are already packed
