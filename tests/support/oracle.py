"""The losses of the package in float64, row by row, written from the paper's equations (ULMA, arXiv 2312.02554).

It imports nothing from the package and shares no idea of its code: plain loops over rows, `math`, and gradients in
closed form, so that it can be read next to the paper. Every loss returns `(losses, gradients)`, two float64 arrays of
shape `(B,)`; a gradient is with respect to that row's `log π(y|x)`.

A row that is not compared with the reference never reads `ref_logps` or `log_z`, which may be NaN there.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Rows = Sequence[float] | Array

REFUSED_CELLS = {("pointwise_dpo", "unlearning"), ("none", "none")}
POSITIVE_LOSSES = ("sft", "pointwise_dpo", "none")
NEGATIVE_LOSSES = ("pointwise_dpo", "unlearning", "none")
CELLS = [(p, n) for p in POSITIVE_LOSSES for n in NEGATIVE_LOSSES if (p, n) not in REFUSED_CELLS]


def minus_log_sigmoid(r: float) -> float:
    """−log σ(r) = log(1 + exp(−r)), without overflow."""
    return max(-r, 0.0) + math.log1p(math.exp(-abs(r)))


def sigmoid(r: float) -> float:
    small = math.exp(-abs(r))
    return 1.0 / (1.0 + small) if r >= 0.0 else small / (1.0 + small)


def implicit_reward(policy_logp: float, ref_logp: float, beta: float, log_z: float) -> float:
    """Eq. 4: r = β · (log π − log π_ref + log Z)."""
    return beta * (policy_logp - ref_logp + log_z)


def cross_entropy_term(r: float, z: float, beta: float) -> tuple[float, float]:
    """Eq. 8: −z·log σ(r) − (1 − z)·log σ(−r), and its gradient −β(z − σ(r))."""
    return z * minus_log_sigmoid(r) + (1.0 - z) * minus_log_sigmoid(-r), beta * (sigmoid(r) - z)


def squared_error_term(r: float, z: float, beta: float) -> tuple[float, float]:
    """Eq. 9 with Eq. 4 plugged in: (z − r)², and its gradient −2β(z − r)."""
    return (z - r) ** 2, 2.0 * beta * (r - z)


def squared_probability_term(r: float, z: float, beta: float) -> tuple[float, float]:
    """UNA: (σ(r) − z)², and its gradient by the chain rule."""
    error = sigmoid(r) - z
    return error * error, 2.0 * error * sigmoid(r) * sigmoid(-r) * beta


def kahneman_tversky_term(r: float, z: float, beta: float) -> tuple[float, float]:
    """KTO with λ = 1: the desirable part 1 − σ(r) with weight z, the undesirable part 1 − σ(−r) with weight 1 − z."""
    slope = sigmoid(r) * sigmoid(-r)
    return z * sigmoid(-r) + (1.0 - z) * sigmoid(r), beta * ((1.0 - z) * slope - z * slope)


def grid(
    policy_logps: Rows,
    ref_logps: Rows,
    label: Rows,
    sft_mask: Sequence[bool] | Array,
    *,
    positive_loss: str = "sft",
    negative_loss: str = "pointwise_dpo",
    beta: float = 0.1,
    log_z: float | Rows = 0.0,
    label_type: str | Sequence[str] = "binary",
    sft_weight: float = 1.0,
) -> tuple[Array, Array]:
    """One cell of the grid of methods; `label_type` is one word for all rows, or one word a row."""
    if (positive_loss, negative_loss) in REFUSED_CELLS:
        raise ValueError(f"({positive_loss}, {negative_loss}) is no method.")
    policy, ref, z = as_rows(policy_logps), as_rows(ref_logps), as_rows(label)
    shift = np.broadcast_to(np.asarray(log_z, dtype=np.float64), policy.shape)
    types = [label_type] * len(policy) if isinstance(label_type, str) else list(label_type)
    losses, gradients = np.zeros(len(policy)), np.zeros(len(policy))
    for i, masked in enumerate(sft_mask):
        terms = (continuous_terms if types[i] == "continuous" else binary_terms)(
            positive_loss, negative_loss, bool(masked), float(z[i])
        )
        r = math.nan
        if "cross entropy" in terms or "squared error" in terms:
            r = implicit_reward(float(policy[i]), float(ref[i]), beta, float(shift[i]))
        for term in terms:
            if term == "cross entropy":
                loss, gradient = cross_entropy_term(r, float(z[i]), beta)
            elif term == "squared error":
                loss, gradient = squared_error_term(r, float(z[i]), beta)
            elif term == "sft":
                loss, gradient = -sft_weight * float(policy[i]), -sft_weight
            else:
                loss, gradient = float(policy[i]), 1.0
            losses[i] += loss
            gradients[i] += gradient
    return losses, gradients


def binary_terms(positive_loss: str, negative_loss: str, masked: bool, z: float) -> list[str]:
    """The terms of a row whose label is binary or soft: a liked row (label 1, no demonstration) takes Eq. 8 always."""
    if masked:
        return {"sft": ["sft"], "pointwise_dpo": ["cross entropy"], "none": []}[positive_loss]
    if z < 1.0:
        return {"pointwise_dpo": ["cross entropy"], "unlearning": ["unlearning"], "none": []}[negative_loss]
    return ["cross entropy"]


def continuous_terms(positive_loss: str, negative_loss: str, masked: bool, z: float) -> list[str]:
    """The terms of a row whose label is continuous: in the ULMA cell, (z − r)² on all rows and SFT besides."""
    if negative_loss == "unlearning":
        raise ValueError("Unlearning has no meaning for continuous labels.")
    if not masked:
        return ["squared error"] if negative_loss == "pointwise_dpo" else []
    terms = ["sft"] if positive_loss == "sft" else []
    if positive_loss == "pointwise_dpo" or (positive_loss == "sft" and negative_loss == "pointwise_dpo"):
        terms.append("squared error")
    return terms


def pointwise_dpo(
    policy_logps: Rows, ref_logps: Rows, label: Rows, *, beta: float = 0.1, log_z: float | Rows = 0.0
) -> tuple[Array, Array]:
    """Eq. 8 on every row."""
    return every_row(cross_entropy_term, policy_logps, ref_logps, label, beta, log_z)


def pointwise_mse(
    policy_logps: Rows, ref_logps: Rows, label: Rows, *, beta: float = 0.1, log_z: float | Rows = 0.0
) -> tuple[Array, Array]:
    """Eq. 9 on every row."""
    return every_row(squared_error_term, policy_logps, ref_logps, label, beta, log_z)


def una(
    policy_logps: Rows, ref_logps: Rows, label: Rows, *, beta: float = 0.1, log_z: float | Rows = 0.0
) -> tuple[Array, Array]:
    """UNA's squared error on every row."""
    return every_row(squared_probability_term, policy_logps, ref_logps, label, beta, log_z)


def kto(
    policy_logps: Rows, ref_logps: Rows, label: Rows, *, beta: float = 0.1, log_z: float | Rows = 0.0
) -> tuple[Array, Array]:
    """KTO's loss on every row."""
    return every_row(kahneman_tversky_term, policy_logps, ref_logps, label, beta, log_z)


def conditional(
    policy_logps: Rows, ref_logps: Rows, label: Rows, group: Sequence[int] | Array, *, beta: float = 0.1
) -> tuple[Array, Array]:
    """−log P(labels | k of the group's n rows are liked), by listing all subsets of k rows; each row has the n-th part.
    The gradient is that of the sum over all rows. Rows with a negative number are in no group, and have loss 0."""
    policy, ref, z = as_rows(policy_logps), as_rows(ref_logps), as_rows(label)
    losses, gradients = np.zeros(len(policy)), np.zeros(len(policy))
    for number in {int(each) for each in group if each >= 0}:
        rows = [i for i in range(len(policy)) if group[i] == number]
        reward = {i: implicit_reward(float(policy[i]), float(ref[i]), beta, 0.0) for i in rows}
        liked = {i for i in rows if z[i] == 1.0}
        subsets = list(itertools.combinations(rows, len(liked)))
        sums = [math.fsum(reward[i] for i in subset) for subset in subsets]
        top = max(sums)
        parts = [math.exp(each - top) for each in sums]
        loss = top + math.log(math.fsum(parts)) - math.fsum(reward[i] for i in liked)
        for i in rows:
            among = math.fsum(part for part, subset in zip(parts, subsets, strict=True) if i in subset)
            losses[i] = loss / len(rows)
            gradients[i] = beta * (among / math.fsum(parts) - (i in liked))
    return losses, gradients


def centered(values: Rows, group: Sequence[int] | Array, weight: Rows) -> Array:
    """Each value less the weighted mean of its group; 0 for rows with a negative number, which are in no group."""
    found, made = as_rows(values), np.zeros(len(as_rows(values)))
    for number in {int(each) for each in group if each >= 0}:
        rows = [i for i in range(len(found)) if group[i] == number]
        total = math.fsum(weight[i] for i in rows)
        mean = math.fsum(weight[i] * found[i] for i in rows) / total
        for i in rows:
            made[i] = found[i] - mean
    return made


def every_row(
    term: Any, policy_logps: Rows, ref_logps: Rows, label: Rows, beta: float, log_z: float | Rows
) -> tuple[Array, Array]:
    policy, ref, z = as_rows(policy_logps), as_rows(ref_logps), as_rows(label)
    shift = np.broadcast_to(np.asarray(log_z, dtype=np.float64), policy.shape)
    pairs = [
        term(implicit_reward(p, q, beta, s), y, beta)
        for p, q, y, s in zip(policy.tolist(), ref.tolist(), z.tolist(), shift.tolist(), strict=True)
    ]
    return np.array([loss for loss, _ in pairs]), np.array([gradient for _, gradient in pairs])


def ulma(
    policy_logps: Rows,
    ref_logps: Rows,
    label: Rows,
    sft_mask: Sequence[bool] | Array,
    *,
    beta: float = 0.1,
    log_z: float | Rows = 0.0,
    label_type: str | Sequence[str] = "binary",
    sft_weight: float = 1.0,
) -> tuple[Array, Array]:
    """§4.3, written out without the grid: binary, SFT on demonstrations and Eq. 8 on all other rows; continuous,
    Eq. 9 on all rows and SFT on demonstrations besides."""
    policy, ref, z = as_rows(policy_logps), as_rows(ref_logps), as_rows(label)
    shift = np.broadcast_to(np.asarray(log_z, dtype=np.float64), policy.shape)
    types = [label_type] * len(policy) if isinstance(label_type, str) else list(label_type)
    losses, gradients = np.zeros(len(policy)), np.zeros(len(policy))
    for i, demonstration in enumerate(sft_mask):
        here = slice(i, i + 1)
        if types[i] == "continuous":
            losses[here], gradients[here] = pointwise_mse(policy[here], ref[here], z[here], beta=beta, log_z=shift[i])
        elif not demonstration:
            losses[here], gradients[here] = pointwise_dpo(policy[here], ref[here], z[here], beta=beta, log_z=shift[i])
        if demonstration:
            losses[here] -= sft_weight * policy[here]
            gradients[here] -= sft_weight
    return losses, gradients


def class_weights(
    label: Rows,
    sft_mask: Sequence[bool] | Array,
    *,
    label_type: str | Sequence[str] = "binary",
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Array:
    """v: the desirable weight where a binary label is at least ½, or where a continuous row is a demonstration."""
    z = as_rows(label)
    types = [label_type] * len(z) if isinstance(label_type, str) else list(label_type)
    desirable = [bool(sft_mask[i]) if types[i] == "continuous" else z[i] >= 0.5 for i in range(len(z))]
    return np.array([desirable_weight if good else undesirable_weight for good in desirable])


def step_loss(
    losses: Array, gradients: Array, *, weight: float | Rows = 1.0, class_weight: float | Rows = 1.0
) -> tuple[float, Array]:
    """Σ wᵢ·vᵢ·ℓᵢ / N over the N rows of an optimizer step, and its gradient with respect to each row's log π."""
    scale = np.broadcast_to(np.multiply(weight, class_weight), losses.shape) / len(losses)
    return float(np.sum(scale * losses)), scale * gradients


def as_rows(values: Rows) -> Array:
    return np.asarray(values, dtype=np.float64).reshape(-1)
