"""The startup proof: it checks on the user's own model, before the first step, that the numbers are right."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from trl_ulma.likelihood.head import forward_arguments, logits_of
from trl_ulma.likelihood.layouts import Layout, packed, padded, shared, shares_prompts
from trl_ulma.likelihood.noise import evaluation_mode, with_effect
from trl_ulma.likelihood.reference import Reference, outside_adapter
from trl_ulma.likelihood.scorer import (
    Batch,
    Scorer,
    bare_model,
    mask_dtype,
    without_adapter,
    without_compiler_and_ddp,
)

logger = logging.getLogger(__name__)

Scores = Callable[[Layout, Batch], torch.Tensor]

# How much a log-probability may differ, in nats per token: in fp32, and in other number formats
TOLERANCE = 1e-4
COARSE_TOLERANCE = 0.05
# The error of an exact layout, as a share of that of a contaminated one, must be below this. In half precision, the
# same holds for the noise.
CONTAMINATION = 0.01
CONTAMINATION_OF_NOISE = 0.1
# In half precision, an exact layout may differ by this many times the difference that padding makes. On a few rows both
# are noisy estimates: with SmolLM2-135M in bf16, their ratio is sometimes above 2. It is above 100 for a contaminated
# layout.
NOISES = 4
# Types of weights that are not quantized
_PLAIN = (torch.Tensor, torch.nn.Parameter, type(None))
# Maximum length of a probe row's prompt and of its completion, in tokens: for the layout check, and for all others
LONGEST_OF_LAYOUT = 64
LONGEST = 24


def check_trainable(model: Any, reference: str) -> None:
    """Raise ValueError if no parameter is trainable, or if training would also change the reference.

    Args:
        reference: the kind of the reference if it runs during training, see `ReferenceIdentity`. Otherwise "none".
    """
    if not any(p.requires_grad for p in model.parameters()):
        remedy = (
            "Load the adapter with PeftModel.from_pretrained(..., is_trainable=True), and do not switch it off"
            if hasattr(model, "peft_config")
            else "Set requires_grad=True on the parameters to train, or pass a peft_config"
        )
        raise ValueError(f"The model has no trainable parameters, so training would not change it. {remedy}.")
    places = set((getattr(model, "hf_device_map", None) or {}).values())
    offloaded = [name for name, p in model.named_parameters() if p.requires_grad and p.is_meta and len(places) > 1]
    if offloaded:
        raise ValueError(
            "The model's device_map offloads weights to the CPU or to disk, where trainable parameters cannot be "
            f"trained ({offloaded[0]}, {len(offloaded)} in total). Load the model without device_map, or quantized, or "
            "only train an adapter on layers that are not offloaded."
        )
    outside = outside_adapter(model) if reference in ("adapter_off", "adapter") else []
    if outside:
        names = ", ".join(outside[:3]) + (f" and {len(outside) - 3} others" if len(outside) > 3 else "")
        raise ValueError(
            "The reference is this model with another adapter or with none. Training would change parameters outside "
            f"the adapter, so the reference would change with the policy: {names}. Set precompute_ref_log_probs=True, "
            "pass a ref_model, or only train the adapter (LoraConfig(bias='none'), and no other parameter with "
            "requires_grad=True)."
        )
    bias = getattr(getattr(model, "active_peft_config", None), "bias", "none")
    if reference == "adapter" and bias != "none":
        raise ValueError(
            f"PEFT supports one adapter with bias={bias!r} per model, so the reference cannot be a copy of it. Set "
            "precompute_ref_log_probs=True, pass a ref_model, or use bias='none'."
        )


def check_weights_stay(model: Any) -> None:
    """Raise ValueError if a forward pass in evaluation mode would change the weights of a model."""
    config: Any = getattr(without_adapter(model), "config", None)
    if getattr(config, "model_type", "") == "rwkv" and 0 < config.rescale_every < config.num_hidden_layers:
        raise ValueError(
            f"RWKV with rescale_every={config.rescale_every} changes its weights in evaluation mode, so wrong ones "
            "would be saved. Load it with rescale_every=0, which computes the same."
        )


def check_ref_model(model: Any, ref_model: Any) -> None:
    """Raise an error if `ref_model` is not a model, or if training would change it.

    Parameters that are not trained can be shared, for example the frozen weights below two adapters.

    Args:
        model: the policy, or its name.
        ref_model: the reference's own model.

    Raises:
        TypeError: if `ref_model` is not a model.
        ValueError: if a parameter that is trained is also a parameter of `ref_model`.
    """
    if not isinstance(ref_model, torch.nn.Module):
        raise TypeError(
            f"ref_model must be a model; got {type(ref_model).__name__}. Load it with "
            "AutoModelForCausalLM.from_pretrained, or leave out ref_model: the reference is then the model as it is "
            "before training."
        )
    if ref_model is model:
        raise ValueError(
            "model and ref_model are the same object, so training would also change the reference. Leave out "
            "ref_model: the reference is then the model as it is before training."
        )
    if not isinstance(model, torch.nn.Module):
        return
    # Parameters without values of their own, as under ZeRO-3 or on the device "meta", are at address 0
    trained = {(p.device, p.data_ptr()): name for name, p in model.named_parameters() if p.requires_grad}
    places = [(p.device, p.data_ptr()) for p in ref_model.parameters()]
    shared = [trained[place] for place in places if place[1] and place in trained]
    if shared:
        raise ValueError(
            f"model and ref_model share parameters that are trained ({shared[0]}, {len(shared)} in total), so training "
            "would also change the reference. Pass a copy (copy.deepcopy(model)), or leave out ref_model: the "
            "reference is then the model as it is before training."
        )


def check_optimizer(model: Any, optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError if an optimizer has none of the model's trainable parameters.

    Args:
        model: the policy.
        optimizer: the one that trains it.
    """
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    if not any(id(p) in trained for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            "The optimizer has none of the model's trainable parameters, so training would not change the model. "
            "Create it from the parameters of the model that is trained. With a peft_config, wrap the model with "
            "get_peft_model first, or set the config's optim instead."
        )


def not_optimized(model: Any, optimizer: torch.optim.Optimizer) -> list[str]:
    """The names of the trainable parameters of a model that an optimizer does not have.

    Example:
        >>> layer = torch.nn.Linear(1, 1)
        >>> not_optimized(layer, torch.optim.SGD([layer.weight]))
        ['bias']
    """
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in own]


class StartupProof:
    """Checks on a few rows that the log-probabilities and the reference are right.

    It runs a few short forward passes in evaluation mode. All processes run the same ones. The checks are:

    1. The head's log-probabilities match the log softmax of the model's own logits, and no token sees later tokens. In
       fp32, the head's are those of a batch in parts, see `trl_ulma.likelihood.parts`.
    2. The reference equals the policy before training, unless a `ref_model` was given.
    3. A second forward pass gives the same values. This is checked for the reference, and, if dropout is off, for the
       policy in training mode.
    4. The chosen layout gives the same values as padding. Here (in fp32) and in training mode, an untrained adapter has
       an effect, see `with_effect`.
    5. Training changes the policy, and does not change the reference.

    Args:
        exact: whether forward passes compute in fp32 or better.
        is_quiet: whether the policy is trained without dropout and other noise.
    """

    def __init__(self, scorer: Scorer, reference: Reference, *, exact: bool, is_quiet: bool):
        self.scorer = scorer
        self.reference = reference
        self.is_exact = exact
        self.is_quiet = is_quiet
        self.tolerance = TOLERANCE if exact else COARSE_TOLERANCE
        # If the model's batches are divided at all, into one part per length. In half precision, the parts would be
        # rounded otherwise than the whole batch
        self._pass_cost = 0.0 if exact else math.inf

    @torch.no_grad()
    def __call__(
        self, policy: Any, batch: Batch, layout_batch: Batch | None, *, at_start: bool = True, is_training: bool = True
    ) -> None:
        """Run all checks.

        Args:
            layout_batch: a few rows for the layout check, see `probe_rows`. None if the layout is "padded".
            at_start: whether the policy is still as it was before training.
            is_training: whether a training starts. False for an evaluation.

        Raises:
            ValueError: if a check fails. The message states what is wrong, by how much, and what to do.
            FloatingPointError: if the model's own logits are not finite.
        """
        if is_training:
            _check_8_bits(policy, batch["input_ids"].device.type)
        inputs = dict(batch)
        mask = inputs.pop("completion_mask")
        place = padded(batch)
        with evaluation_mode(policy):
            scored = self.scorer(policy, batch, layout=place, pass_cost=self._pass_cost).log_probs.double()
            logits = logits_of(policy(**forward_arguments(without_adapter(policy), inputs)))
            # Adapters can prepend virtual tokens to the row
            logits = logits[:, -inputs["input_ids"].size(1) :][:, :-1].double()
            own = logits.log_softmax(-1).gather(2, inputs["input_ids"][:, 1:, None].to(logits.device))[..., 0]
            own = torch.where(mask[:, 1:].to(scored.device) > 0, own.to(scored), 0.0)
            other = _with_other_ends(batch)
            changed = self.scorer(policy, other, layout=padded(other), pass_cost=self._pass_cost).log_probs.double()
        self._check_head(policy, scored, own)
        self._check_causal(policy, scored, changed, batch)
        if layout_batch is not None and self.scorer.layout != "padded":
            # In half precision, the adapter would add rounding errors that padding does not measure
            with _with_effect(policy) if self.is_exact else nullcontext():
                self._check_layout(policy, layout_batch)
        tokens = mask[:, 1:].sum(1).clamp(min=1).to(scored)
        if self.reference.is_live:
            first = self.reference.logps(policy, batch).double()
            again = self.reference.logps(policy, batch).double()
            self._check_same(first, again, tokens, "The reference", "dropout or noise that stays on in evaluation mode")
            if at_start and self.reference.kind != "given":
                self.check_reference(policy, self.policy_logps(policy, batch), first, tokens)
        if self.is_quiet and is_training:
            with _with_effect(policy):
                if isinstance(bare_model(policy), PeftModel):
                    with evaluation_mode(policy):
                        scored = self.scorer(policy, batch, layout=place, pass_cost=self._pass_cost).log_probs.double()
                training = _in_training_mode(self.scorer, policy, batch, place, self._pass_cost)
            quiet = (
                "dropout or noise that disable_dropout=True does not switch off. Set its rate to 0 in the config of "
                "the model or the adapter, or set disable_dropout=False to train with it"
            )
            self._check_same(scored.sum(1), training.double().sum(1), tokens, "The policy in training mode", quiet)

    def check_gradients(self, policy: Any, batch: Batch) -> None:
        """Raise ValueError if log π_θ depends on no parameter that is trained, or if log π_ref depends on one.

        A frozen layer that passes no gradient on to the layers below it, as some quantized ones do, is an error, too.

        Args:
            batch: the batch of the other checks.
        """
        called = without_compiler_and_ddp(policy)
        trained = {id(p): name for name, p in called.named_parameters() if p.requires_grad}
        if isinstance(called, FullyShardedDataParallel) or any(
            isinstance(p, DTensor) or hasattr(p, "ds_id") for p in called.parameters()
        ):
            return  # a parameter that is sharded (FSDP, ZeRO-3) is not a leaf of the forward pass
        with torch.enable_grad(), evaluation_mode(called), _gradients_watched(called) as stopped:
            found = _leaves(self.scorer(called, batch, layout=padded(batch)).logps)
        if found.isdisjoint(trained):
            raise ValueError(
                f"The log-probabilities of {_class_of(policy)} do not depend on any trainable parameter, so training "
                "would not change the model. If it has an adapter, the adapter may be merged or switched off: call "
                "model.unmerge_adapter() or model.base_model.enable_adapter_layers(). Otherwise its forward pass "
                "computes without gradients. To train anyway, set startup_checks=False."
            )
        if stopped:
            raise ValueError(
                f"{stopped[0]} ({type(called.get_submodule(stopped[0])).__name__}, {len(stopped)} such layers in "
                "total) passes no gradient on to the layers below it, so these would be trained on wrong gradients. "
                "Layers that quantize their inputs do this, too: quantize the weights only, or not at all. To train "
                "anyway, set startup_checks=False."
            )
        if self.reference.model is None:
            return
        with torch.enable_grad():
            found = _leaves(self.reference.with_gradients(policy, batch))
        moving = [name for leaf, name in trained.items() if leaf in found]
        if moving:
            raise ValueError(
                f"The reference computes with parameters that are trained ({moving[0]}, {len(moving)} in total), so "
                "training would also change the reference. A forward or a hook that was set on the model may still "
                "use the original's weights in a copy of the model. Load the model once more and pass it as ref_model, "
                "or set precompute_ref_log_probs=True."
            )

    def check_reference(self, model: Any, policy: torch.Tensor, reference: torch.Tensor, tokens: torch.Tensor) -> None:
        """Raise ValueError unless the reference equals the policy before training.

        Args:
            policy: `(B,)` log π_θ in evaluation mode.
            reference: `(B,)` log π_ref of the same rows.
            tokens: `(B,)` number of completion tokens of the rows.
        """
        off = ((policy.double() - reference.double().to(policy.device)).abs() / tokens.to(policy.device)).max().item()
        if off <= self.tolerance:
            return
        if getattr(getattr(bare_model(model), "active_peft_config", None), "is_prompt_learning", False):
            logger.warning(
                f"The untrained virtual tokens of the adapter change the model by {off:.2g} nats per token. The "
                "reference is the model without virtual tokens, so rewards do not start at 0."
            )
            return
        remedy = {
            "copy": "Pass the model before training as ref_model.",
            "adapter": "Pass a ref_model: the base model with a copy of the adapter, merged.",
            "adapter_off": (
                "The untrained adapter changes the model (as with init_lora_weights='pissa', 'olora' or 'loftq', or "
                "with FourierFT, C3A and VBLoRA). Wrap the model with get_peft_model before you pass it, so that the "
                "reference is a copy of the adapter. Or pass a ref_model."
            ),
        }[self.reference.kind]
        raise ValueError(
            f"Before training, the reference ({self.reference.kind}) differs from the model by {off:.2g} nats per "
            f"token (at most {self.tolerance:g} is allowed), so every implicit reward would be wrong. {remedy} To "
            "train anyway, set startup_checks=False."
        )

    @torch.no_grad()
    def policy_logps(self, policy: Any, batch: Batch) -> torch.Tensor:
        """`(B,)` log π_θ in evaluation mode."""
        with evaluation_mode(policy):
            return self.scorer(policy, batch).logps

    def _check_head(self, policy: Any, scored: torch.Tensor, own: torch.Tensor) -> None:
        if not own.isfinite().all():
            raise FloatingPointError(
                f"The logits of {_class_of(policy)} are not finite. Check its weights, or load it in another number "
                "format (bfloat16 or float32 instead of float16)."
            )
        off = (scored - own).abs()
        found = off.max().item() if self.is_exact else _root_mean_square(off)
        if not found <= self.tolerance:  # also true for NaN
            raise ValueError(
                f"Log-probabilities of {_class_of(policy)} differ by {found:.2g} nats per token from the log softmax "
                f"of its own logits (at most {self.tolerance:g} is allowed). Its forward pass uses its output "
                "embeddings in a way that this package does not support, or what it says of a row depends on the other "
                "rows of the batch. Use another model class, or report this. To train anyway, set "
                "startup_checks=False."
            )

    def _check_causal(self, policy: Any, scored: torch.Tensor, changed: torch.Tensor, batch: Batch) -> None:
        last = torch.zeros_like(scored, dtype=torch.bool)
        ends = batch["attention_mask"].sum(1) - 2
        last[torch.arange(len(last)), ends.to(last.device)] = True
        off = torch.where(last, 0.0, scored - changed).abs().max().item()
        if not off <= self.tolerance:
            raise ValueError(
                f"In {_class_of(policy)}, a token's log-probability depends on later tokens, by {off:.2g} nats, so "
                "with this configuration it is not a causal language model. Use a causal language model. For some "
                "encoders, is_decoder=True is enough."
            )

    def _check_same(self, first: torch.Tensor, again: torch.Tensor, tokens: torch.Tensor, who: str, cause: str) -> None:
        off = ((first - again).abs() / tokens).max().item()
        if not off <= self.tolerance:
            raise ValueError(
                f"{who} gives different log-probabilities for the same rows, by {off:.2g} nats per token (at most "
                f"{self.tolerance:g} is allowed). The cause is {cause}. To train anyway, set startup_checks=False."
            )

    def _check_layout(self, policy: Any, batch: Batch) -> None:
        dtype = mask_dtype(bare_model(policy))

        def scores(layout: Layout, batch: Batch) -> torch.Tensor:
            return self.scorer(policy, batch, layout=layout).log_probs.double()

        if self.scorer.layout == "shared" and not shares_prompts(batch):
            return  # such rows are padded
        with evaluation_mode(policy):
            if self.scorer.layout == "packed":
                prove_packed(scores, batch, exact=self.is_exact)
            else:
                prove_shared(scores, batch, exact=self.is_exact, dtype=dtype)


def _check_8_bits(policy: Any, device: str) -> None:
    if device not in ("cpu", "xpu"):
        return
    if any(type(module).__name__ == "Linear8bitLt" for module in policy.modules()):
        raise ValueError(
            "On a CPU or XPU, layers of 8 bits (load_in_8bit=True) round their inputs in evaluation mode only, in "
            "which the reference runs, so rewards would not start at 0. Train on a GPU, or load the model with "
            "load_in_4bit=True. To train anyway, set startup_checks=False."
        )


def _with_effect(policy: Any) -> AbstractContextManager[None]:
    """A context in which the policy's adapter has an effect, if it has one."""
    return with_effect(bare_model(policy)) if isinstance(bare_model(policy), PeftModel) else nullcontext()


@contextmanager
def _gradients_watched(model: Any) -> Iterator[list[str]]:
    """A context that collects the names of layers whose output has no gradient, although their input has one.

    They are the layers below adapters, and those with quantized weights. Others may stop gradients by design.
    """
    stopped: list[str] = []

    def watch(name: str, args: tuple[Any, ...], output: Any) -> None:
        has_gradient = bool(args) and torch.is_tensor(args[0]) and args[0].requires_grad
        if torch.is_grad_enabled() and has_gradient and torch.is_tensor(output) and not output.requires_grad:
            stopped.append(name)

    hooks = [
        module.register_forward_hook(lambda module, args, output, name=name: watch(name, args, output))
        for name, module in model.named_modules()
        if name.endswith(".base_layer") or type(module._parameters.get("weight")) not in _PLAIN
    ]
    try:
        yield stopped
    finally:
        for hook in hooks:
            hook.remove()


def _leaves(output: torch.Tensor) -> set[int]:
    """The ids of the parameters that a tensor depends on, found in its graph without a backward pass."""
    found, seen = set(), set()
    nodes = [output.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            found.add(id(variable))
        nodes += [following for following, _ in node.next_functions]
    return found


def _class_of(policy: Any) -> str:
    """The class name of the causal language model, without wrappers."""
    return type(without_adapter(policy)).__name__


def _with_other_ends(batch: Batch) -> dict[str, torch.Tensor]:
    """The batch with another last token in each row: the row's first token, or the preceding token id if they match."""
    ids = batch["input_ids"].clone()
    rows = torch.arange(len(ids), device=ids.device)
    ends = batch["attention_mask"].sum(1) - 1
    ids[rows, ends] = torch.where(ids[:, 0] == ids[rows, ends], (ids[rows, ends] - 1).clamp(min=0), ids[:, 0])
    return {**batch, "input_ids": ids}


def _in_training_mode(scorer: Scorer, policy: Any, batch: Batch, layout: Layout, pass_cost: float) -> torch.Tensor:
    """The scores in training mode. Afterwards every module is in its previous mode."""
    training = {module: module.training for module in policy.modules()}
    policy.train()
    try:
        return scorer(policy, batch, layout=layout, pass_cost=pass_cost).log_probs
    finally:
        for module, was in training.items():
            module.training = was


def prove_packed(scores: Scores, batch: Batch, *, exact: bool) -> None:
    """Raise ValueError unless rows that are packed into one sequence do not affect each other.

    Args:
        scores: computes the per-token log-probabilities `(B, T − 1)` of a batch in a layout, with dropout off.
        batch: at least two rows.
        exact: whether the forward pass computes in fp32 or better.
    """
    layout = packed(batch)
    places = torch.arange(layout.inputs["input_ids"].size(1), device=layout.positions.device)
    contaminated = layout._replace(inputs={**layout.inputs, "position_ids": places[None]})
    _compare(scores, batch, layout, contaminated, "padding_free", exact)


def prove_shared(scores: Scores, batch: Batch, *, exact: bool, dtype: torch.dtype | None) -> None:
    """Raise ValueError unless branches of a shared prompt do not affect each other.

    Args:
        scores: see `prove_packed`.
        batch: at least two rows with the same prompt.
        exact: whether the forward pass computes in fp32 or better.
        dtype: see `trl_ulma.likelihood.layouts.shared`.
    """
    layout = shared(batch, dtype)
    allowed = layout.inputs["attention_mask"]
    everything = torch.ones_like(allowed, dtype=torch.bool).tril()
    if dtype is not None:
        everything = torch.zeros_like(allowed).masked_fill(~everything, torch.finfo(dtype).min)
    contaminated = layout._replace(inputs={**layout.inputs, "attention_mask": everything})
    _compare(scores, batch, layout, contaminated, "share_prompts", exact)


def _compare(scores: Scores, batch: Batch, layout: Layout, contaminated: Layout, option: str, exact: bool) -> None:
    wanted = scores(padded(batch), batch)
    remedy = f"Set {option}=False, or load the model with attn_implementation='sdpa' or 'flash_attention_2'."
    try:
        found = scores(layout, batch) - wanted
    except (IndexError, RuntimeError, TypeError, ValueError) as failure:
        raise ValueError(
            f"{option}=True is not supported by this model, whose forward pass fails ({failure}). {remedy}"
        ) from failure
    size, measure, allowed, noise = _largest, "the fp32 bound", TOLERANCE, 0.0
    if not exact:
        # In half precision, padding alone changes the order of sums, and the largest difference is random
        size, measure = _root_mean_square, f"{NOISES} times the difference between padded and single rows"
        wider = [scores(padded(_wider(batch, by)), batch) - wanted for by in (1, 7, 64)]
        noise = max(map(size, [*wider, _one_by_one(scores, batch) - wanted]))
        allowed = max(TOLERANCE, NOISES * noise)
    error, contamination = size(found), size(scores(contaminated, batch) - wanted)
    told_apart = error <= CONTAMINATION * contamination
    told_apart |= not exact and noise <= CONTAMINATION_OF_NOISE * contamination
    if not (error <= allowed and told_apart):  # also true for NaN
        raise ValueError(
            f"{option}=True is not exact with this model: log-probabilities differ from those of padded rows by "
            f"{error:.2g} nats per token ({measure} is {allowed:.2g}). Rows that attend to each other differ by "
            f"{contamination:.2g}. {remedy}"
        )


def _largest(difference: torch.Tensor) -> float:
    return difference.abs().max().item()


def _root_mean_square(difference: torch.Tensor) -> float:
    return (difference.pow(2).sum() / difference.count_nonzero().clamp(min=1)).sqrt().item()


def _one_by_one(scores: Scores, batch: Batch) -> torch.Tensor:
    """The scores of each row in its own forward pass, without padding."""
    found = []
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        alone = {name: value[row : row + 1, :length] for name, value in batch.items()}
        missing = batch["input_ids"].size(1) - length
        found.append(torch.nn.functional.pad(scores(padded(alone), alone), (0, missing)))
    return torch.cat(found)


def _wider(batch: Batch, by: int) -> dict[str, torch.Tensor]:
    """The batch with `by` additional columns of padding."""
    return {name: torch.nn.functional.pad(value, (0, by)) for name, value in batch.items()}


def probe_rows(examples: Sequence[Mapping[str, Any]], longest: int, *, same_prompt: bool) -> list[dict[str, Any]]:
    """Four rows for the checks: truncated `examples`, which are repeated if there are fewer than four.

    Args:
        examples: prepared rows.
        longest: maximum number of tokens of a prompt and of a completion.
        same_prompt: whether all rows get the same prompt, the first that is not empty.
    """
    chosen = [examples[i % len(examples)] for i in range(4)]
    prompt = next((row["prompt_ids"] for row in chosen if len(row["prompt_ids"])), [])
    # Rows of the same length would hide many errors
    lengths = [max(longest - 7 * i, 2) for i in range(4)]
    return [
        {
            "prompt_ids": list(prompt if same_prompt else row["prompt_ids"])[-longest:],
            "completion_ids": list(row["completion_ids"])[:length],
            "label": 1.0,
        }
        for row, length in zip(chosen, lengths, strict=True)
    ]
