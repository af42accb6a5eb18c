"""The reference: what log π_ref is asked of, always without noise, and what it is known by later."""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PretrainedConfig

from trl_ulma.likelihood.layouts import length_that_changes_positions
from trl_ulma.likelihood.noise import evaluation_mode
from trl_ulma.likelihood.scorer import Batch, Scorer, bare_model

# The adapter that training began with, beside the one that is trained; saved in a folder of this name
ADAPTER = "ref"
KINDS = ("none", "given", "copy", "adapter_off", "adapter")
# Nats a token by which a reference may differ from itself at another time: in fp32, and in other number formats
TOLERANCE, COARSE_TOLERANCE = 1e-3, 0.1
_TEXT = {"input_ids", "attention_mask", "completion_mask"}


@dataclass(frozen=True)
class ReferenceIdentity:
    """What a reference is known by; saved with the model that was trained against it.

    Attributes:
        kind: "none"; "given" (a `ref_model`); "copy" (the model as it was before training); "adapter_off" (the model
            without its adapter); "adapter" (the adapter that training began with, saved in the folder "ref").
        name: folder or hub name of the model; "" of one that was made in memory. Of adapters, the base model's.
        revision: of the hub, or None.
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

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "ReferenceIdentity":
        """From plain values.

        Raises:
            ValueError: for a kind that is none.
        """
        if found.get("kind") not in KINDS:
            raise ValueError(f"reference.kind must be one of {KINDS}; got {found.get('kind')!r}")
        return cls(**found)

    def difference(self, logps: Sequence[float]) -> float:
        """The largest difference in nats a token between a reference's values of `input_ids` and the saved ones."""
        if not self.logps:
            return 0.0
        tokens = len(self.input_ids[0]) - 1
        differences = [abs(a - b) / tokens for a, b in zip(logps, self.logps, strict=True)]
        return math.inf if any(map(math.isnan, differences)) else max(differences)


class Reference:
    """Gives log π_ref of rows: by a model of its own, or by the policy with another adapter or none.

    Whatever mode the models are in, the reference runs in evaluation mode and without gradients.

    Args:
        kind: see `ReferenceIdentity`; "given" and "copy" need a `model`.
        scorer: with the policy's layout.
        model: the reference's own model.
        name: see `ReferenceIdentity`.
        revision: see `ReferenceIdentity`.
        autocast: a context for mixed precision.

    Raises:
        ValueError: for an unknown kind.
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
        """Whether it can be asked now; what was precomputed may be all that is left."""
        return self.model is not None or self.kind in ("adapter_off", "adapter")

    @torch.no_grad()
    def logps(self, policy: Any, batch: Batch) -> torch.Tensor:
        """`(B,)` log π_ref(y|x) in nats, summed over completion tokens.

        Args:
            policy: the policy's model, wrapped or not; for references that are an adapter on it.
            batch: `input_ids`, `attention_mask`, `completion_mask` `(B, T)`, and what the forward takes besides them.

        Raises:
            ValueError: where there is none to ask.
        """
        if not self.is_live:
            raise ValueError(f"There is no reference to ask: its kind is {self.kind!r}, and no model of it is held.")
        model = policy if self.model is None else self.model
        with evaluation_mode(model), self._adapter(policy), self._autocast():
            return self.scorer(model, batch).logps

    def logps_of(self, policy: Any, batch: Batch, asked: tuple[Sequence[int], int] | None) -> torch.Tensor:
        """As `logps`, for some rows only; NaN for the others.

        Args:
            policy: see `logps`.
            batch: see `logps`.
            asked: (the rows, the width of the longest of them), or None for all rows.
        """
        # Where a row's images are among all of the batch, only its processor knows; and rotary positions that change
        # with the longest row must be the policy's
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
        """log π_ref of whole sequences, less their first token, in nats.

        Args:
            policy: see `logps`.
            input_ids: `(N, W)`.
        """
        return self.logps(policy, plain_batch(input_ids)).double().tolist()

    def identity(self, policy: Any, input_ids: torch.Tensor) -> ReferenceIdentity:
        """What it is known by, with its fingerprint where it can be asked.

        Args:
            policy: see `logps`.
            input_ids: `(N, W)` tokens for the fingerprint.
        """
        logps = self.fingerprint(policy, input_ids) if self.is_live else []
        dtype = "" if self.model is None else str(bare_model(self.model).dtype).removeprefix("torch.")
        ids = input_ids.tolist() if logps else []
        return ReferenceIdentity(self.kind, self.name, self.revision, ids, logps, dtype)

    def release(self) -> None:
        """Let go of a model of its own."""
        self.model = None

    @contextlib.contextmanager
    def _adapter(self, policy: Any):
        bare = bare_model(policy)
        if self.kind == "adapter_off":
            with bare.disable_adapter():
                yield
        elif self.kind == "adapter":
            trained = bare.active_adapter
            trainable = [p for p in bare.parameters() if p.requires_grad]
            bare.set_adapter(ADAPTER)
            try:
                yield
            finally:
                bare.set_adapter(trained)
                # Which set_adapter decides by names
                for p in bare.parameters():
                    p.requires_grad_(False)
                for p in trainable:
                    p.requires_grad_(True)
        else:
            yield


def plan_references(batches: list[dict[str, Any]], compared: list[torch.Tensor], *, at_least_one: bool) -> None:
    """Give each micro-batch, as `asked`, the rows that the reference is asked for and the width of the longest.

    All micro-batches of a step are planned together, because reading them off the device waits for it.

    Args:
        batches: micro-batches with `attention_mask` `(B, T)`; written to.
        compared: of each, `(B,)` bool: whether the row's loss contains the reference.
        at_least_one: ask for a row even if none needs it, because other processes' forwards wait for this one's.
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
    """A batch of whole sequences, of which all tokens but the first are scored.

    Example:
        >>> plain_batch(torch.tensor([[5, 6]]))["completion_mask"]
        tensor([[0, 1]])
    """
    mask = torch.ones_like(input_ids)
    scored = mask.clone()
    scored[:, 0] = 0
    return {"input_ids": input_ids, "attention_mask": mask, "completion_mask": scored}


class NoReferenceModel(FSDPModule, nn.Module):
    """Passed to `DPOTrainer` as `ref_model` where no reference is needed, so that it loads none.

    It is called an FSDP module because DPOTrainer wraps what is none.
    """

    def __new__(cls):
        return object.__new__(cls)  # FSDPModule's own makes the class behind it

    def __init__(self):
        nn.Module.__init__(self)
        self.config = PretrainedConfig()
        self.nothing = nn.Parameter(torch.zeros(1), requires_grad=False)

    def _apply(self, *args: Any, **kwargs: Any) -> "NoReferenceModel":
        return self  # wherever it is to be put

    def forward(self, **inputs: Any) -> None:
        """Nothing."""


def copy_adapter(model: Any, source: str = "default", target: str = ADAPTER) -> None:
    """Make the parameters and buffers of adapter `target` those of `source`, whatever their kind.

    PEFT keeps an adapter's name as one part of its parameters' names, in the middle ("lora_A.default.weight") or at the
    end ("lora_embedding_A.default").

    Args:
        model: a `PeftModel` with both adapters.
        source: to copy from.
        target: to copy to.
    """
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    with torch.no_grad():
        for name, value in tensors.items():
            parts = name.split(".")
            if source in parts:
                other = ".".join(target if part == source else part for part in parts)
                if other in tensors:
                    tensors[other].copy_(value)


def outside_adapter(model: nn.Module) -> list[str]:
    """Names of trainable parameters that are no part of the adapter, and so stay when it is switched off.

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
