"""The reference: it computes log π_ref without noise, and has an identity by which it is recognized later."""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PretrainedConfig

from trl_ulma.likelihood.layouts import length_that_changes_positions
from trl_ulma.likelihood.noise import evaluation_mode
from trl_ulma.likelihood.parts import cost_of_a_pass
from trl_ulma.likelihood.scorer import Batch, Scorer, bare_model

# The adapter that training started from, beside the one that is trained. It is saved in a folder of this name.
ADAPTER = "ref"
KINDS = ("none", "given", "copy", "adapter_off", "adapter")
# How much a reference may differ from itself at another time, in nats per token: in fp32, and in other number formats
TOLERANCE, COARSE_TOLERANCE = 1e-3, 0.1
_TEXT = {"input_ids", "attention_mask", "completion_mask"}


@dataclass(frozen=True)
class ReferenceIdentity:
    """The identity of a reference. It is saved with the model that was trained against the reference.

    Attributes:
        kind: "none"; "given" (a `ref_model`); "copy" (the model as it was before training); "adapter_off" (the model
            without its adapter); "adapter" (the adapter that training started from, saved in the folder "ref").
        name: the folder of the model or its name on the Hub. For adapters, that of the base model. "" if the model was
            created in memory.
        revision: the revision on the Hub, or None.
        input_ids: `(4, 8)` random tokens.
        logps: their log-probabilities under the reference, one sum per sequence, in nats.
        dtype: of the weights of a reference with a model of its own, as "float32"; "" if it is not known.
    """

    kind: str
    name: str = ""
    revision: str | None = None
    input_ids: Sequence[Sequence[int]] = ()
    logps: Sequence[float] = ()
    dtype: str = ""

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "ReferenceIdentity":
        """From plain values.

        Raises:
            ValueError: if the kind is unknown.
        """
        if found.get("kind") not in KINDS:
            raise ValueError(f"reference.kind must be one of {KINDS}; got {found.get('kind')!r}")
        return cls(**found)

    def difference(self, logps: Sequence[float]) -> float:
        """The largest difference between `logps` and the saved log-probabilities of `input_ids`, in nats per token."""
        if not self.logps:
            return 0.0
        tokens = len(self.input_ids[0]) - 1
        differences = [abs(a - b) / tokens for a, b in zip(logps, self.logps, strict=True)]
        return math.inf if any(map(math.isnan, differences)) else max(differences)


class Reference:
    """Computes log π_ref of rows with its own model, or with the policy and another adapter or none.

    The reference always runs in evaluation mode and, except in a check, without gradients.

    Args:
        kind: see `ReferenceIdentity`. "given" and "copy" need a `model`.
        scorer: a scorer with the policy's layout.
        autocast: returns a context for mixed precision.

    Raises:
        ValueError: if the kind is unknown.
    """

    def __init__(
        self,
        kind: str,
        scorer: Scorer,
        model: Any = None,
        *,
        name: str = "",
        revision: str | None = None,
        autocast: Callable[[], Any] = contextlib.nullcontext,
    ):
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}; got {kind!r}.")
        self.kind = kind
        self.scorer = scorer
        self.model = model
        self.name = name
        self.revision = revision
        self._autocast = autocast

    @property
    def is_live(self) -> bool:
        """Whether the reference can run now. It cannot if its model was released after precomputing."""
        return self.model is not None or self.kind in ("adapter_off", "adapter")

    def logps(self, policy: Any, batch: Batch) -> torch.Tensor:
        """`(B,)` log π_ref(y|x) in nats, summed over completion tokens.

        Args:
            policy: the policy's model, with or without wrappers, for references that are an adapter on it.
            batch: `input_ids`, `attention_mask`, `completion_mask` `(B, T)`, and any other inputs of the forward.

        Raises:
            ValueError: if the reference cannot run.
        """
        with torch.no_grad():
            return self.with_gradients(policy, batch)

    def with_gradients(self, policy: Any, batch: Batch) -> torch.Tensor:
        """Like `logps`, in the caller's gradient mode."""
        if not self.is_live:
            raise ValueError(f"The reference cannot run: its kind is {self.kind!r}, and it has no model.")
        model = policy if self.model is None else self.model
        # In half precision, rows of other widths are rounded otherwise, so both models divide a batch or none does
        cost = math.inf if cost_of_a_pass(policy, bare_model(policy)) == math.inf else None
        with evaluation_mode(model), self._adapter(policy), self._autocast():
            return self.scorer(model, batch, pass_cost=cost).logps

    def logps_of(self, policy: Any, batch: Batch, asked: tuple[Sequence[int], int] | None) -> torch.Tensor:
        """Like `logps`, but only for some rows. The other rows get NaN.

        Args:
            asked: the indices of the rows and the width of the longest of them, or None for all rows.
        """
        # Only the processor knows which images of a batch belong to a row. Rotary positions that depend on the longest
        # row must be the same as in the policy's forward pass. In both cases the whole batch must run.
        depends = set(batch) - _TEXT or length_that_changes_positions(bare_model(policy).config) is not None
        if asked is not None and not asked[0]:
            return torch.full(batch["input_ids"].shape[:1], torch.nan, device=batch["input_ids"].device)
        if asked is None or depends:
            return self.logps(policy, batch)
        index = torch.tensor(asked[0], device=batch["input_ids"].device)
        part = {name: value[index, : asked[1]] for name, value in batch.items()}
        found = self.logps(policy, part)
        unknown = torch.full(batch["input_ids"].shape[:1], torch.nan, device=found.device, dtype=found.dtype)
        return unknown.index_copy(0, index.to(found.device), found)

    def fingerprint(self, policy: Any, input_ids: torch.Tensor) -> list[float]:
        """log π_ref of whole sequences without their first token, in nats.

        Args:
            input_ids: `(N, W)`.
        """
        return self.logps(policy, plain_batch(input_ids)).double().tolist()

    def identity(self, policy: Any, input_ids: torch.Tensor) -> ReferenceIdentity:
        """The identity of the reference. It includes the fingerprint if the reference can run.

        Args:
            input_ids: `(N, W)` tokens for the fingerprint.
        """
        logps = self.fingerprint(policy, input_ids) if self.is_live else []
        dtype = "" if self.model is None else str(bare_model(self.model).dtype).removeprefix("torch.")
        ids = input_ids.tolist() if logps else []
        return ReferenceIdentity(self.kind, self.name, self.revision, ids, logps, dtype)

    @contextlib.contextmanager
    def _adapter(self, policy: Any):
        bare = bare_model(policy)
        if self.kind in ("adapter_off", "adapter") and not is_peft_model(bare):
            raise ValueError(
                "The reference is the model with another adapter or with none, but the model has no adapter any more, "
                "for example because of merge_and_unload. Evaluate before you merge, or pass a ref_model."
            )
        if self.kind == "adapter_off":
            with _same_trainable(bare), _switched_off(bare):
                yield
        elif self.kind == "adapter":
            trained = bare.active_adapter
            with _same_trainable(bare):
                bare.set_adapter(ADAPTER)
                try:
                    yield
                finally:
                    bare.set_adapter(trained)
        else:
            yield


@contextlib.contextmanager
def _switched_off(bare: Any):
    """A context without a PEFT model's adapter, as in `PeftModel.disable_adapter`.

    That asks for everything about all layers, and only reads whether they are enabled. This takes longer than the
    switch itself.
    """
    # A wrapper of trainable tokens contains a layer, which is found, too
    layers = [module for module in bare.modules() if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper)]
    enabled = {not layer.disable_adapters for layer in layers}
    status = SimpleNamespace(enabled=enabled.pop() if len(enabled) == 1 else "irregular")
    with contextlib.ExitStack() as stack:
        bare.get_model_status = lambda: status
        try:
            stack.enter_context(bare.disable_adapter())
        finally:
            del bare.get_model_status
        yield


@contextlib.contextmanager
def _same_trainable(model: Any):
    """A context after which the same parameters are trainable as before, which PEFT's switches decide by names."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    finally:
        for p, was_trainable in before:
            if p.requires_grad != was_trainable:
                p.requires_grad_(was_trainable)


def plan_references(batches: list[dict[str, Any]], compared: list[torch.Tensor], *, at_least_one: bool) -> None:
    """Add the key `asked` to each micro-batch: the rows that the reference must run on, and the width of the longest.

    All micro-batches of a step are planned together, because reading values from the device waits for the device.

    Args:
        batches: micro-batches with `attention_mask` `(B, T)`. They are modified.
        compared: for each micro-batch, `(B,)` bool: whether the row's loss uses the reference.
        at_least_one: whether to run the reference on one row even if no row needs it, because the forward passes of
            other processes wait for this one.
    """
    plans = []
    for batch, rows in zip(batches, compared, strict=True):
        places = torch.arange(1, batch["attention_mask"].size(1) + 1, device=rows.device)
        plans.append(torch.stack([rows, (batch["attention_mask"] * places).amax(1)]))
    sizes = [plan.size(1) for plan in plans]
    for batch, (needed, widths) in zip(batches, torch.cat(plans, 1).cpu().split(sizes, 1), strict=True):
        asked = needed.nonzero()[:, 0].tolist() or ([0] if at_least_one else [])
        batch["asked"] = (asked, int(widths[asked].max()) if asked else 0)


def plain_batch(input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """A batch of whole sequences. All tokens except the first are scored.

    Example:
        >>> plain_batch(torch.tensor([[5, 6]]))["completion_mask"]
        tensor([[0, 1]])
    """
    mask = torch.ones_like(input_ids)
    scored = mask.clone()
    scored[:, 0] = 0
    return {"input_ids": input_ids, "attention_mask": mask, "completion_mask": scored}


class NoReferenceModel(FSDPModule, nn.Module):
    """Passed to `DPOTrainer` as `ref_model` if no reference is needed, so that it does not load one.

    It is an FSDP module, because DPOTrainer would wrap any other model.
    """

    def __new__(cls):
        return object.__new__(cls)  # FSDPModule.__new__ would create an instance of the wrapped class

    def __init__(self):
        nn.Module.__init__(self)
        self.config = PretrainedConfig()
        self.nothing = nn.Parameter(torch.zeros(1), requires_grad=False)

    def _apply(self, *args: Any, **kwargs: Any) -> "NoReferenceModel":
        return self  # ignore moves to a device

    def forward(self, **inputs: Any) -> None:
        """Do nothing."""


def copy_adapter(model: Any) -> None:
    """Copy all parameters and buffers of the adapter "default" to the adapter `ADAPTER`, for any type of adapter.

    PEFT stores an adapter's name as one part of its parameters' names, in the middle ("lora_A.default.weight") or at
    the end ("lora_embedding_A.default").
    """
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    with torch.no_grad():
        for name, value in tensors.items():
            parts = name.split(".")
            if "default" in parts:
                other = ".".join(ADAPTER if part == "default" else part for part in parts)
                if other in tensors:
                    tensors[other].copy_(value)
                    # PEFT creates adapters in float32, and in another number format the reference would round otherwise
                    tensors[other].data = tensors[other].data.to(value.dtype)


def active_adapters(model: Any) -> list[str]:
    """The names of the adapters that a model computes with unless they are switched off; [] if it has none.

    Example:
        >>> active_adapters(nn.Linear(1, 1))
        []
    """
    bare = bare_model(model)
    if is_peft_model(bare):
        return list(bare.active_adapters)
    # Adapters that transformers has added, without a PeftModel
    return list(bare.active_adapters()) if getattr(bare, "_hf_peft_config_loaded", False) else []


def is_without_adapter(model: Any) -> bool:
    """Whether a model's adapters are switched off, or merged into the weights below them.

    Example:
        >>> is_without_adapter(nn.Linear(1, 1))
        False
    """
    layer = next((module for module in model.modules() if isinstance(module, BaseTunerLayer)), None)
    return layer is not None and (layer.disable_adapters or layer.merged)


def outside_adapter(model: nn.Module) -> list[str]:
    """The names of trainable parameters outside the adapter. They stay in effect when the adapter is switched off.

    Example:
        >>> outside_adapter(nn.Linear(1, 1))
        []
    """
    if not is_peft_model(model):
        return []
    active = set(model.active_adapters)  # pyright: ignore[reportArgumentType]
    return [
        name for name, p in model.named_parameters() if p.requires_grad and not active.intersection(name.split("."))
    ]
