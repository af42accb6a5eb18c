"""The compact LM head: log-probabilities of selected tokens, in chunks, without the logits of all positions."""

import functools
import inspect
import math
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from trl_ulma.likelihood.noise import evaluation_mode

# If the logits need more memory than this, they are computed in chunks, and again in the backward pass
CHUNK_BYTES = 256 * 2**20
# The points at which a head's map from projections to logits is measured, and the tolerance for the measured map
_PROBES = (-50.0, -3.0, -0.5, 0.0, 0.5, 3.0, 50.0)
_MAP_TOLERANCE = 1e-4


class TokenScores(NamedTuple):
    """Scores of the next-token distribution, one value per scored token.

    Attributes:
        log_probs: log-probability of the token in nats, with gradient.
        entropy: entropy of the distribution in nats, without gradient. None if statistics were not requested.
        mean_logits: mean of the logits over the vocabulary, without gradient. None if statistics were not requested.
        is_top1: 1 if the token is the most likely one, else 0. None if statistics were not requested.
    """

    log_probs: torch.Tensor
    entropy: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None


class LogitMap(NamedTuple):
    r"""How a model computes logits from its output embeddings' projections z: c·tanh(s·z/c), or s·z without a cap.

    Attributes:
        scale: s.
        cap: c, or None.
        width: the number of logits. Models can pad their embeddings to a larger size.
    """

    scale: float = 1.0
    cap: float | None = None
    width: int | None = None

    def __call__(self, projections: torch.Tensor) -> torch.Tensor:
        """The logits, in at least float32."""
        logits = projections[..., : self.width].to(torch.promote_types(projections.dtype, torch.float32))
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def backward(self, gradient: torch.Tensor, logits: torch.Tensor, projections: torch.Tensor) -> torch.Tensor:
        """The gradient with respect to the projections. Overwrites `gradient`."""
        if self.cap is not None:
            gradient *= 1 - (logits / self.cap) ** 2
        if self.scale != 1:
            gradient *= self.scale
        missing = projections.size(-1) - gradient.size(-1)
        return nn.functional.pad(gradient, (0, missing)).to(projections.dtype)


class _LogProbs(torch.autograd.Function):
    """log softmax at the targets, and statistics of the distribution. Saves only the projections for the backward."""

    @staticmethod
    def forward(ctx, projections, targets, logit_map, with_statistics):  # pyright: ignore[reportIncompatibleMethodOverride]
        logits = logit_map(projections)
        normalizer = torch.logsumexp(logits, 1)
        log_probs = logits.gather(1, targets[:, None])[:, 0] - normalizer
        statistics = ()
        if with_statistics:
            mean, top = logits.mean(1), logits.argmax(1)
            probabilities = torch.exp(logits - normalizer[:, None])
            entropy = normalizer - torch.linalg.vecdot(probabilities, logits)
            statistics = (entropy, mean, (top == targets).to(logits.dtype))
            ctx.mark_non_differentiable(*statistics)
        ctx.save_for_backward(projections, targets, normalizer)
        ctx.logit_map = logit_map
        return log_probs, *statistics

    @staticmethod
    def backward(ctx, *gradients):
        projections, targets, normalizer = ctx.saved_tensors
        logits = ctx.logit_map(projections)
        gradient = torch.exp(logits - normalizer[:, None]).mul_(-gradients[0][:, None])
        gradient.scatter_add_(1, targets[:, None], gradients[0][:, None].to(gradient.dtype))
        return ctx.logit_map.backward(gradient, logits, projections), None, None, None


def token_scores(
    projections: torch.Tensor, targets: torch.Tensor, logit_map: LogitMap | None = None, *, statistics: bool = False
) -> TokenScores:
    r"""log softmax(logits)[target] of each row of projections, and statistics of the distribution.

    Args:
        projections: `(n, V)`, the output of the output embeddings.
        targets: `(n,)` token ids below V.
        logit_map: the map from projections to logits. None is the identity.
        statistics: whether to also compute entropy, mean logit and top-1 agreement.

    Returns:
        `TokenScores` of `(n,)` tensors, at least float32.

    Example:
        >>> scores = token_scores(torch.zeros(1, 4), torch.tensor([2]), statistics=True)
        >>> scores.log_probs, scores.entropy
        (tensor([-1.3863]), tensor([1.3863]))
    """
    found: Any = _LogProbs.apply(projections, targets, logit_map or LogitMap(), statistics)
    return TokenScores(*found)


def takes(model: nn.Module, argument: str) -> bool:
    """Whether a model's forward has a parameter of this name, or takes arguments of any name.

    Example:
        >>> takes(nn.Linear(1, 1), "input"), takes(nn.Linear(1, 1), "use_cache")
        (True, False)
    """
    return argument in _parameters(model, (argument,))


def _parameters(model: nn.Module, wanted: Iterable[str]) -> set[str]:
    """Those of the wanted arguments that a model's forward takes."""
    parameters = inspect.signature(model.forward).parameters
    takes_all = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    return {name for name in wanted if takes_all or name in parameters}


def forward_arguments(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a causal language model is called with, so that it returns the logits of all tokens.

    The forward of a model with its own code can lack parameters. Without `use_cache` there is no cache to switch off.
    Without `attention_mask`, padding on the right changes nothing for the tokens before it.

    Args:
        model: the model without wrappers.
        inputs: `input_ids` and others.

    Raises:
        ValueError: if the forward does not take an input that it needs. The message names it.
    """
    taken = _parameters(model, (*inputs, "use_cache", "return_dict"))
    missing = [name for name in inputs if name not in taken]
    mask = inputs.get("attention_mask")
    if "attention_mask" in missing and mask is not None and mask.dim() == 2 and (mask.diff(dim=1) <= 0).all():
        missing.remove("attention_mask")
        inputs = {name: value for name, value in inputs.items() if name != "attention_mask"}
    if missing:
        raise ValueError(
            f"The forward of {type(model).__name__} takes no {' and no '.join(missing)}, which these rows or settings "
            "need. Use another model class, or change its forward."
        )
    further: dict[str, Any] = {"use_cache": False} if "use_cache" in taken else {}
    if not getattr(model.config, "return_dict", True) and "return_dict" in taken:
        further["return_dict"] = True
    return {**inputs, **further}


def logits_of(output: Any) -> torch.Tensor:
    """The logits in what a model's forward returns: an object with `logits`, a dict, or a tuple.

    Raises:
        TypeError: if there are none.

    Example:
        >>> logits_of((torch.zeros(()), torch.ones(1, 2, 3))).shape
        torch.Size([1, 2, 3])
    """
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if found is None:  # a tuple can begin with a loss
        parts = output if isinstance(output, tuple | list) else [output]
        found = next((part for part in parts if isinstance(part, torch.Tensor) and part.dim() == 3), None)
    if found is None:
        raise TypeError(f"it returns a {type(output).__name__} without logits")
    return found


class CompactHead:
    """Runs a causal language model so that its output embeddings score selected tokens instead of returning all logits.

    The model's own forward runs, including its wrappers (PEFT, DDP, FSDP2, ZeRO-3, torch.compile). During a call, the
    output embeddings select the hidden states at the wanted positions, project them in chunks, and return the
    log-probabilities of the tokens. A hook returns these as the model's output. Hooks of wrappers on the output
    embeddings and on the model see the tensor that gradients flow through. After a call the model is unchanged.

    Raises:
        ValueError: if the model has no output embeddings.
    """

    def __init__(self, model: nn.Module):
        head = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
        if head is None:
            raise ValueError(
                f"{type(model).__name__} has no output embeddings (`get_output_embeddings()` is None), so it has no "
                "log-probabilities of tokens. Pass a causal language model."
            )
        self._model = weakref.ref(model)
        self._head = weakref.ref(head)
        self.logit_map: LogitMap | None = None
        # torch.compile must not trace these, because what they do depends on the batch
        self._head_forward = torch.compiler.disable(self._score)
        self._keep_hook = torch.compiler.disable(self._keep)
        # The model that it calls must still be compiled
        self._model_forward = torch.compiler.disable(self._handed_on, recursive=False)
        self._project: Any = None
        self._run_model: Any = None
        self._wanted: _Wanted | None = None
        self._log_probs: torch.Tensor | None = None
        self._scores: Any = None
        self._states: torch.Tensor | None = None

    @property
    def model(self) -> Any:
        """The causal language model."""
        return self._model()

    @property
    def head(self) -> Any:
        """The output embeddings of the model.

        Raises:
            ValueError: if the model has others by now.
        """
        head = self._head()
        if head is None:
            raise ValueError(
                f"The output embeddings of {type(self.model).__name__} were replaced after the model was first scored, "
                "as resize_token_embeddings does. Change the model before you create the trainer."
            )
        return head

    def __call__(
        self,
        wrapped: Any,
        inputs: dict[str, Any],
        positions: torch.Tensor,
        targets: torch.Tensor,
        *,
        first: torch.Tensor | None = None,
        statistics: bool = False,
    ) -> tuple[TokenScores, torch.Tensor | None, torch.Tensor | None]:
        """The scores `(n,)` of the wanted tokens, hidden states `(B, H)`, and the auxiliary loss of MoE models.

        Args:
            wrapped: the model, with or without wrappers.
            inputs: the inputs of its forward, including `input_ids` `(R, W)`.
            positions: `(n,)` indices into the flattened `(R·W)` sequences, each right before a wanted token.
            targets: `(n,)` the wanted tokens.
            first: `(B,)` indices into `positions` whose hidden states (detached) are returned. None returns no states.
            statistics: see `token_scores`.
        """
        if self.logit_map is None:
            self.logit_map = self._measure(wrapped, inputs)
        wanted = _Wanted(positions, targets, first, statistics, inputs["input_ids"].size(1))
        output = self._run(wrapped, inputs, wanted)
        log_probs: Any = output.get("log_probs")
        if log_probs is None and not torch.is_grad_enabled():
            # If virtual tokens are switched off, PEFT calls the model's forward directly and bypasses its hooks
            log_probs = self._log_probs
        if log_probs is None:
            raise ValueError(
                f"Something calls a forward of {type(self.model).__name__} that was taken from it earlier, as PEFT's "
                "AdaptionPrompt does, so its log-probabilities cannot be computed. Train another adapter, such as LoRA."
            )
        # These log-probabilities passed through the wrappers' hooks. Statistics need no gradient.
        flat: Any = log_probs
        scores = self._scores._replace(log_probs=flat.reshape(-1))
        states = self._states
        self._scores = self._states = self._log_probs = None
        return scores, states, output.get("aux_loss")

    def check_map(self, wrapped: Any, inputs: dict[str, Any]) -> None:
        """Raise ValueError if logits are no longer computed from the projections as they were at first.

        Args:
            wrapped: the model, with or without wrappers.
            inputs: the inputs of its forward, including `input_ids` `(R, W)`.
        """
        if self.logit_map is None:
            return
        made = self._known_projections()
        with torch.no_grad(), evaluation_mode(wrapped):
            _, is_close = _compared(self._last_logits(wrapped, inputs, made), self.logit_map(made.double()))
        if not is_close:
            now = self._measure(wrapped, inputs)
            raise ValueError(
                f"{type(self.model).__name__} computes its logits in another way than before training: {now}, before "
                f"{self.logit_map}. A scale or cap after the output embeddings has changed, which the losses did not "
                "take into account. Freeze it, or use another model class."
            )

    def check_nothing_is_trained_after(self, wrapped: Any, inputs: dict[str, Any]) -> None:
        """Raise ValueError if a trainable parameter changes logits after the output embeddings have projected them.

        Projections that depend on no parameter are run through the rest of the model's forward, with gradients. The
        map from projections to logits is only measured now and then, so it cannot follow such a parameter.

        Args:
            wrapped: the model, with or without wrappers. A forward with gradients must not need a backward.
            inputs: the inputs of the forward, including `input_ids` `(R, W)`.
        """
        model = self.model
        with torch.enable_grad(), evaluation_mode(wrapped):
            logits = self._logits(wrapped, _sample(inputs), self._known_projections())
        if not logits.requires_grad:
            return
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(logits.sum(), list(trained.values()), allow_unused=True)
        # Sharding can put other tensors in the place of parameters
        names = [name for name, g in zip(trained, found, strict=True) if g is not None] or ["one that is sharded"]
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} others" if len(names) > 3 else "")
        raise ValueError(
            f"{type(model).__name__} changes its logits after the output embeddings with trainable parameters: {shown}."
            " The compact head cannot follow their changes, so its log-probabilities would become wrong in training. "
            "Freeze them with requires_grad_(False), or move them into the module that get_output_embeddings() returns."
        )

    def _run(self, wrapped: Any, inputs: dict[str, Any], wanted: "_Wanted | torch.Tensor") -> dict[str, Any]:
        arguments = forward_arguments(self.model, inputs)
        with self._installed():
            self._wanted = wanted  # pyright: ignore[reportAttributeAccessIssue]
            try:
                return wrapped(**arguments)
            finally:
                self._wanted = None

    @contextmanager
    def _installed(self) -> Iterator[None]:
        """A context with the two forwards and the hook installed."""
        head, model = self.head, self.model
        self._project, self._run_model = head.forward, model.forward
        own = [(module, vars(module).get("forward")) for module in (head, model)]
        hook = head.register_forward_hook(self._keep_hook)  # runs after all other hooks
        head.forward, model.forward = self._head_forward, self._model_forward
        try:
            yield
        finally:
            hook.remove()
            self._project = self._run_model = None  # these would keep the model alive
            for module, forward in own:  # restore a forward that accelerate or the user has set
                if forward is None:
                    del module.forward
                else:
                    module.forward = forward

    def _score(self, input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:  # named as by nn.Linear
        hidden, wanted = input, self._wanted
        if wanted is None:  # a compiled model outside of a call
            return type(self.head).forward(self.head, hidden, *args, **kwargs)
        if isinstance(wanted, torch.Tensor):
            return wanted.to(hidden.device).expand(*hidden.shape[:-1], -1)
        if hidden.dim() != 3 or hidden.size(1) < wanted.width:
            raise ValueError(
                f"{type(self.model).__name__} passes hidden states of shape {tuple(hidden.shape)} to its output "
                f"embeddings for sequences of {wanted.width} tokens. Tokens can only be scored if there is one state "
                "per token. Use another model class."
            )
        rows, columns = wanted.positions // wanted.width, wanted.positions % wanted.width
        # Adapters can prepend virtual tokens to the sequence
        places = rows * hidden.size(1) + (hidden.size(1) - wanted.width) + columns
        states = hidden.flatten(0, 1)[places.to(hidden.device)]
        if wanted.first is not None:
            self._states = states.detach()[wanted.first.to(hidden.device)]
        self._scores = self._in_chunks(states, wanted.targets, wanted.statistics)
        return self._scores.log_probs[None, :, None]

    def _in_chunks(self, states: torch.Tensor, targets: torch.Tensor, statistics: bool) -> TokenScores:
        size = max(1, CHUNK_BYTES // (4 * self._vocabulary))
        project, logit_map = self._project, self.logit_map  # the backward pass needs them after the call
        if len(states) <= size:
            return _score_chunk(project, logit_map, states, targets, statistics)
        parts = [
            checkpoint(_score_chunk, project, logit_map, *chunk, statistics, use_reentrant=False)
            for chunk in zip(states.split(size), targets.split(size), strict=True)
        ]
        columns: Any = zip(*parts, strict=True)
        joined: Any = [None if values[0] is None else torch.cat(values) for values in columns]
        return TokenScores(*joined)

    def _keep(self, head: nn.Module, args: Any, output: Any) -> None:
        """Keep the output of the head after the hooks of wrappers."""
        if self._wanted is not None:
            self._log_probs = output

    def _handed_on(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, with the log-probabilities as its output."""
        if self._wanted is None:  # a compiled model outside of a call
            return type(self.model).forward(self.model, *args, **kwargs)
        output = self._run_model(*args, **kwargs)
        if self._log_probs is None:
            raise ValueError(
                f"{type(self.model).__name__} does not call the output embeddings that `get_output_embeddings()` "
                "returns, so its log-probabilities cannot be computed. Use a model whose forward projects its last "
                "hidden state with them."
            )
        if isinstance(self._wanted, torch.Tensor):
            self._log_probs = None
            return {"logits": logits_of(output)}
        found = {"log_probs": self._log_probs}
        # Older versions of transformers return the number 0 if there are no router logits
        if isinstance(getattr(output, "aux_loss", None), torch.Tensor):
            found["aux_loss"] = output.aux_loss
        return found

    @property
    def _vocabulary(self) -> int:
        """The number of projections per position."""
        size = getattr(self.head, "out_features", None)
        return self.model.config.get_text_config().vocab_size if size is None else size

    def _logits(self, wrapped: Any, inputs: dict[str, Any], projections: torch.Tensor) -> torch.Tensor:
        """The logits that the model's forward makes of these projections `(V,)` at all positions.

        Raises:
            ValueError: if the forward cannot be called in this way.
        """
        try:
            return self._run(wrapped, inputs, projections)["logits"]
        except (AttributeError, KeyError, TypeError) as error:
            model = self.model
            remedy = (
                "Use a causal language model whose forward takes input_ids and returns logits, and, with adapters, "
                "attention_mask and inputs_embeds, too."
            )
            if not getattr(model.config, "return_dict", True):
                remedy = "Set model.config.return_dict=True."
            raise ValueError(
                f"The forward of {type(model).__name__} fails with {', '.join(forward_arguments(model, inputs))} "
                f"({type(error).__name__}: {error}). {remedy}"
            ) from error

    def _last_logits(self, wrapped: Any, inputs: dict[str, Any], projections: torch.Tensor) -> torch.Tensor:
        """`(V,)` logits that the forward makes of these projections `(V,)` at the last position, in float64."""
        return self._logits(wrapped, _sample(inputs), projections)[0, -1].to("cpu", torch.float64)

    def _known_projections(self) -> torch.Tensor:
        """`(V,)` projections of all signs and sizes, in place of those of a hidden state."""
        dtype = torch.promote_types(self.model.dtype, torch.float32)
        size = self._vocabulary
        return torch.tensor(_PROBES, dtype=dtype).repeat(math.ceil(size / len(_PROBES)))[:size]

    @torch.no_grad()
    def _measure(self, wrapped: Any, inputs: dict[str, Any]) -> LogitMap:
        """The map from projections to logits, measured by running the model's own forward with known projections.

        Raises:
            ValueError: if the map is not a scale with an optional soft cap, or if the forward fails.
        """
        made = self._known_projections()
        dtype, size = made.dtype, len(made)
        logits = functools.partial(self._last_logits, wrapped, inputs)
        with evaluation_mode(wrapped):
            highest = logits(torch.full((size,), 1e30, dtype=dtype))
            found = logits(made)
            cap = None if highest.abs().min() > 1e20 else float(highest[0])
            unit = 1.0 if cap is None else 1e-4 * abs(cap)
            scale = float(logits(torch.full((size,), unit, dtype=dtype))[0]) / unit
        if abs(scale - 1) < 1e-6:
            scale = 1.0
        width = None if len(found) == size else len(found)
        logit_map = LogitMap(scale, cap, width)
        off, is_close = _compared(found, logit_map(made.double()))
        if not is_close:
            raise ValueError(
                f"{type(self.model).__name__} does not compute its logits from the output embeddings with a scale and "
                f"a soft cap alone (off by {off:.2g}), so its log-probabilities cannot be computed. Use another model "
                "class."
            )
        return logit_map


class _Wanted(NamedTuple):
    positions: torch.Tensor
    targets: torch.Tensor
    first: torch.Tensor | None
    statistics: bool
    width: int


def _compared(logits: torch.Tensor, expected: torch.Tensor) -> tuple[float, bool]:
    """How far logits are from what a map makes of the same projections, and whether the map is theirs."""
    off = (logits - expected).abs().max().item() if expected.shape == logits.shape else math.inf
    return off, off <= _MAP_TOLERANCE * max(1.0, expected.abs().max().item())  # False for NaN


def _sample(inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Two tokens, for a forward in which hidden states do not matter."""
    return {"input_ids": torch.zeros_like(inputs["input_ids"][:1, :2])}


def _score_chunk(
    project: Any, logit_map: LogitMap | None, states: torch.Tensor, targets: torch.Tensor, statistics: bool
) -> TokenScores:
    projections = project(states)  # on another device than the states, if a device_map puts the head there
    return token_scores(projections, targets.to(projections.device), logit_map, statistics=statistics)
