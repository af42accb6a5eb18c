"""The row losses of point-wise DPO and ULMA: pure functions of log-probabilities, unreduced.

Every function takes tensors of shape `(B,)` and returns row losses of shape `(B,)`. Log-probabilities are in nats,
summed over the completion's tokens. Whatever the dtype of the log-probabilities, the arithmetic is done, and the
losses are returned, in at least float32.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

POSITIVE_LOSSES = ("sft", "pointwise_dpo", "none")
NEGATIVE_LOSSES = ("pointwise_dpo", "unlearning", "none")


def _checked(policy_logps: torch.Tensor, **others: torch.Tensor | float) -> tuple[torch.Tensor, ...]:
    """`policy_logps` and `others` in one floating dtype of at least float32; every tensor must have the same shape."""
    if policy_logps.dim() != 1:
        raise ValueError(f"policy_logps must have shape (B,), one value a row; got {tuple(policy_logps.shape)}.")
    dtype = torch.promote_types(policy_logps.dtype, torch.float32)
    tensors = [policy_logps.to(dtype)]
    for name, value in others.items():
        if not isinstance(value, torch.Tensor):
            value = torch.tensor(float(value), dtype=dtype, device=policy_logps.device).expand_as(policy_logps)
        if value.shape != policy_logps.shape:
            raise ValueError(
                f"{name} must have shape {tuple(policy_logps.shape)}, like policy_logps; got {tuple(value.shape)}."
            )
        tensors.append(value.to(dtype))
    return tuple(tensors)


def _check_beta(beta: float) -> None:
    if not beta > 0:
        raise ValueError(f"beta must be above 0; got {beta}.")


def pointwise_dpo_loss(
    policy_logps: torch.Tensor,
    ref_logps: torch.Tensor,
    label: torch.Tensor,
    *,
    beta: float = 0.1,
    log_z: torch.Tensor | float = 0.0,
) -> torch.Tensor:
    r"""Row losses of point-wise DPO for binary and soft labels.

    With the implicit reward r = β·(log π_θ(y|x) − log π_ref(y|x) + log Z(x)),

        ℓ = −z·log σ(r) − (1 − z)·log σ(−r),        ∂ℓ/∂log π_θ = −β·(z − σ(r)).

    Source: ULMA, arXiv 2312.02554, Eq. 8. Eq. 7 prints `log σ(1 − r)`; it must be `log(1 − σ(r)) = log σ(−r)`.

    Args:
        policy_logps: `(B,)` log π_θ(y|x) in nats, summed over completion tokens.
        ref_logps: `(B,)` log π_ref(y|x) in nats, summed over the same tokens.
        label: `(B,)` z in [0, 1]: 1 desirable, 0 undesirable, in between the probability of being desirable.
        beta: β > 0, the strength of the pull towards the reference.
        log_z: log Z(x) in nats, one number or `(B,)`.

    Returns:
        `(B,)` row losses, at least float32.

    Raises:
        ValueError: on shapes that differ, or β that is not above 0.

    Example:
        >>> import torch
        >>> logps = torch.tensor([-10.0, -10.0])
        >>> pointwise_dpo_loss(logps, logps, torch.tensor([1.0, 0.0]))
        tensor([0.6931, 0.6931])
    """
    _check_beta(beta)
    policy, ref, z, log_z = _checked(policy_logps, ref_logps=ref_logps, label=label, log_z=log_z)
    reward = beta * (policy - ref + log_z)
    return -z * F.logsigmoid(reward) - (1 - z) * F.logsigmoid(-reward)


def pointwise_mse_loss(
    policy_logps: torch.Tensor,
    ref_logps: torch.Tensor,
    label: torch.Tensor,
    *,
    beta: float = 0.1,
    log_z: torch.Tensor | float = 0.0,
) -> torch.Tensor:
    r"""Row losses of point-wise DPO for continuous labels.

    With the implicit reward r = β·(log π_θ(y|x) − log π_ref(y|x) + log Z(x)),

        ℓ = (z − r)²,        ∂ℓ/∂log π_θ = −2β·(z − r).

    Source: ULMA, arXiv 2312.02554, Eq. 9 with Eq. 4 plugged in.

    Args:
        policy_logps: `(B,)` log π_θ(y|x) in nats, summed over completion tokens.
        ref_logps: `(B,)` log π_ref(y|x) in nats, summed over the same tokens.
        label: `(B,)` z, any real number, read as the reward r*(x, y): higher is better.
        beta: β > 0, the strength of the pull towards the reference.
        log_z: log Z(x) in nats, one number or `(B,)`.

    Returns:
        `(B,)` row losses, at least float32.

    Raises:
        ValueError: on shapes that differ, or β that is not above 0.

    Example:
        >>> import torch
        >>> logps = torch.tensor([-10.0, -10.0])
        >>> pointwise_mse_loss(logps, logps, torch.tensor([2.0, -1.0]))
        tensor([4., 1.])
    """
    _check_beta(beta)
    policy, ref, z, log_z = _checked(policy_logps, ref_logps=ref_logps, label=label, log_z=log_z)
    return (z - beta * (policy - ref + log_z)) ** 2


def squared_error_loss(
    policy_logps: torch.Tensor,
    ref_logps: torch.Tensor,
    label: torch.Tensor,
    *,
    beta: float = 0.1,
    log_z: torch.Tensor | float = 0.0,
) -> torch.Tensor:
    r"""Row losses of UNA for binary and soft labels: the squared error of the predicted probability.

    With the implicit reward r = β·(log π_θ(y|x) − log π_ref(y|x) + log Z(x)),

        ℓ = (σ(r) − z)²,        ∂ℓ/∂log π_θ = 2β·(σ(r) − z)·σ(r)·σ(−r).

    Source: UNA, arXiv 2408.15339. Unlike the cross-entropy of `pointwise_dpo_loss`, the gradient vanishes for rows
    whose reward is far on the wrong side.

    Args:
        policy_logps: `(B,)` log π_θ(y|x) in nats, summed over completion tokens.
        ref_logps: `(B,)` log π_ref(y|x) in nats, summed over the same tokens.
        label: `(B,)` z in [0, 1].
        beta: β > 0, the strength of the pull towards the reference.
        log_z: log Z(x) in nats, one number or `(B,)`.

    Returns:
        `(B,)` row losses, at least float32.

    Raises:
        ValueError: if shapes differ, or β is not above 0.

    Example:
        >>> import torch
        >>> logps = torch.tensor([-10.0, -10.0])
        >>> squared_error_loss(logps, logps, torch.tensor([1.0, 0.5]))
        tensor([0.2500, 0.0000])
    """
    _check_beta(beta)
    policy, ref, z, log_z = _checked(policy_logps, ref_logps=ref_logps, label=label, log_z=log_z)
    return (torch.sigmoid(beta * (policy - ref + log_z)) - z) ** 2


def kto_loss(
    policy_logps: torch.Tensor,
    ref_logps: torch.Tensor,
    label: torch.Tensor,
    *,
    beta: float = 0.1,
    log_z: torch.Tensor | float = 0.0,
) -> torch.Tensor:
    r"""Row losses of KTO for binary and soft labels: they saturate on both sides.

    With the implicit reward r = β·(log π_θ(y|x) − log π_ref(y|x) + log Z(x)),

        ℓ = z·(1 − σ(r)) + (1 − z)·(1 − σ(−r)),        ∂ℓ/∂log π_θ = −β·(2z − 1)·σ(r)·σ(−r).

    Source: KTO, arXiv 2402.01306, Eq. 8. Its reference point z₀ is −β·log Z here (`log_z="batch_kl"`), and its λ are
    `desirable_weight` and `undesirable_weight`. With log Z = 0 it is APO-zero for unpaired rows (arXiv 2408.06266).

    Args:
        policy_logps: `(B,)` log π_θ(y|x) in nats, summed over completion tokens.
        ref_logps: `(B,)` log π_ref(y|x) in nats, summed over the same tokens.
        label: `(B,)` z in [0, 1].
        beta: β > 0, the strength of the pull towards the reference.
        log_z: log Z(x) in nats, one number or `(B,)`.

    Returns:
        `(B,)` row losses, at least float32.

    Raises:
        ValueError: if shapes differ, or β is not above 0.

    Example:
        >>> import torch
        >>> logps = torch.tensor([-10.0, -10.0])
        >>> kto_loss(logps, logps - 20, torch.tensor([1.0, 0.0]))
        tensor([0.1192, 0.8808])
    """
    _check_beta(beta)
    policy, ref, z, log_z = _checked(policy_logps, ref_logps=ref_logps, label=label, log_z=log_z)
    reward = beta * (policy - ref + log_z)
    return z * torch.sigmoid(-reward) + (1 - z) * torch.sigmoid(reward)


# Losses of compared rows with binary or soft labels, by the name that `binary_loss` has for them
BINARY_LOSSES = {"cross_entropy": pointwise_dpo_loss, "squared_error": squared_error_loss, "kto": kto_loss}


def check_binary_loss(binary_loss: str) -> None:
    """Raise ValueError if a loss of binary labels has no such name."""
    if binary_loss not in BINARY_LOSSES:
        raise ValueError(f"binary_loss must be one of {tuple(BINARY_LOSSES)}; got {binary_loss!r}.")


def reward_slope(
    rewards: torch.Tensor, label: torch.Tensor, continuous: torch.Tensor, *, binary_loss: str = "cross_entropy"
) -> torch.Tensor:
    r"""∂ℓ/∂r of the losses: −2·(z − r) for continuous labels, and for binary ones by the loss

        cross_entropy: σ(r) − z,    squared_error: 2·(σ(r) − z)·σ(r)·σ(−r),    kto: (1 − 2z)·σ(r)·σ(−r).

    With c = β·log Z, ∂ℓ/∂c is the same, and ∂ℓ/∂log π_θ is β times it.

    Args:
        rewards: `(B,)` r.
        label: `(B,)` z.
        continuous: `(B,)` bool, True where the label is continuous.
        binary_loss: one of `BINARY_LOSSES`.

    Returns:
        `(B,)` slopes.

    Example:
        >>> import torch
        >>> reward_slope(torch.zeros(2), torch.tensor([1.0, 3.0]), torch.tensor([False, True]))
        tensor([-0.5000, -6.0000])
    """
    check_binary_loss(binary_loss)
    probability = torch.sigmoid(rewards)
    spread = probability * torch.sigmoid(-rewards)
    binary = {
        "cross_entropy": probability - label,
        "squared_error": 2 * (probability - label) * spread,
        "kto": (1 - 2 * label) * spread,
    }[binary_loss]
    return torch.where(continuous, 2 * (rewards - label), binary)


def ulma_loss(
    policy_logps: torch.Tensor,
    ref_logps: torch.Tensor,
    label: torch.Tensor,
    sft_mask: torch.Tensor,
    *,
    beta: float = 0.1,
    log_z: torch.Tensor | float = 0.0,
    label_type: str = "binary",
    sft_weight: float = 1.0,
) -> torch.Tensor:
    r"""Row losses of ULMA: demonstrations and feedback in one loss.

        binary:      demonstration −w·log π_θ(y|x), every other row the loss of Eq. 8
        continuous:  (z − r)² on all rows, plus −w·log π_θ(y|x) on demonstrations

    with w = `sft_weight`. Source: ULMA, arXiv 2312.02554, §4.3 and §5.1 (iii). The printed sum weighs SFT by z; the
    paper defines ULMA for labels 0 and 1 only, where that is the same.

    Args:
        policy_logps: `(B,)` log π_θ(y|x) in nats, summed over completion tokens.
        ref_logps: `(B,)` log π_ref(y|x) in nats. Not read for binary demonstrations, where it may be NaN.
        label: `(B,)` z, see `pointwise_dpo_loss` and `pointwise_mse_loss`.
        sft_mask: `(B,)` bool, True for demonstrations.
        beta: β > 0.
        log_z: log Z(x) in nats, one number or `(B,)`.
        label_type: "binary" or "continuous".
        sft_weight: w ≥ 0, weight of the SFT term.

    Returns:
        `(B,)` row losses, at least float32.

    Raises:
        ValueError: on shapes that differ, an unknown `label_type`, β that is not above 0 or a negative `sft_weight`.

    Example:
        >>> import torch
        >>> logps = torch.tensor([-10.0, -10.0])
        >>> ulma_loss(logps, logps, torch.tensor([1.0, 0.0]), torch.tensor([True, False]))
        tensor([10.0000,  0.6931])
    """
    if label_type not in ("binary", "continuous"):
        raise ValueError(f"label_type must be 'binary' or 'continuous'; got {label_type!r}.")
    _checked(policy_logps, label=label)
    continuous = torch.full_like(sft_mask, label_type == "continuous", dtype=torch.bool)
    terms = route(label, sft_mask, continuous)
    return grid_loss(
        policy_logps, ref_logps, label, terms, continuous, beta=beta, log_z=log_z, sft_weight=sft_weight
    ).total


class Terms(NamedTuple):
    """Which terms a row's loss has; each `(B,)` bool. A row with none of them has the loss 0.

    Attributes:
        imitated: the row has −log π_θ(y|x), the SFT term.
        unlearned: the row has +log π_θ(y|x).
        compared: the row has the point-wise DPO term (Eq. 8 or Eq. 9), and so needs the reference.
    """

    imitated: torch.Tensor
    unlearned: torch.Tensor
    compared: torch.Tensor


def check_cell(positive_loss: str, negative_loss: str) -> None:
    """Raise ValueError where `positive_loss` × `negative_loss` is no cell of the grid of methods."""
    if positive_loss not in POSITIVE_LOSSES:
        raise ValueError(f"positive_loss must be one of {POSITIVE_LOSSES}; got {positive_loss!r}.")
    if negative_loss not in NEGATIVE_LOSSES:
        raise ValueError(f"negative_loss must be one of {NEGATIVE_LOSSES}; got {negative_loss!r}.")
    if positive_loss == "none" and negative_loss == "none":
        raise ValueError("positive_loss and negative_loss are both 'none': no row would be learned from. Set one.")
    if positive_loss == "pointwise_dpo" and negative_loss == "unlearning":
        raise ValueError(
            "positive_loss='pointwise_dpo' with negative_loss='unlearning' is not a method: the one holds the policy "
            "to its reference, the other drives it away without bound. Use negative_loss='pointwise_dpo', or "
            "positive_loss='sft' (unlikelihood)."
        )


def route(
    label: torch.Tensor,
    sft_mask: torch.Tensor,
    continuous: torch.Tensor,
    *,
    positive_loss: str = "sft",
    negative_loss: str = "pointwise_dpo",
) -> Terms:
    r"""The terms of each row in one cell of the grid of methods.

    | positive ↓ / negative → | `pointwise_dpo`  | `unlearning` | `none`       |
    |-------------------------|------------------|--------------|--------------|
    | `sft`                   | ULMA             | Unlikelihood | SFT          |
    | `pointwise_dpo`         | Point-wise DPO   | –            | Positive DPO |
    | `none`                  | Negative DPO     | Unlearning   | –            |

    Positive rows are the demonstrations (`sft_mask`), negative rows those with a label below 1 that are not. A liked
    row (label 1, not a demonstration) is compared by Eq. 8 in every cell. Rows with continuous labels: every
    demonstration has the MSE term where `positive_loss` is "pointwise_dpo" or the cell is ULMA's, every other row where
    `negative_loss` is "pointwise_dpo".

    Args:
        label: `(B,)`.
        sft_mask: `(B,)` bool, True for demonstrations.
        continuous: `(B,)` bool, True where the label is continuous.
        positive_loss: "sft", "pointwise_dpo" or "none".
        negative_loss: "pointwise_dpo", "unlearning" or "none".

    Returns:
        `Terms` of `(B,)` bools.

    Raises:
        ValueError: for a cell marked "–", or shapes that differ.

    Example:
        >>> import torch
        >>> route(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([True, False, False]), torch.tensor([False] * 3)).compared
        tensor([False,  True,  True])
    """
    check_cell(positive_loss, negative_loss)
    for name, value in {"sft_mask": sft_mask, "continuous": continuous}.items():
        if value.shape != label.shape:
            raise ValueError(f"{name} must have shape {tuple(label.shape)}, like label; got {tuple(value.shape)}.")
    demonstration = sft_mask.bool()
    continuous = continuous.bool()
    liked = ~demonstration & ~continuous & (label >= 1)
    negative = ~demonstration & ~liked
    none = torch.zeros_like(demonstration)

    imitated = demonstration if positive_loss == "sft" else none
    unlearned = negative if negative_loss == "unlearning" else none
    compared = liked
    if positive_loss == "pointwise_dpo":
        compared = compared | demonstration
    if negative_loss == "pointwise_dpo":
        compared = compared | negative
        if positive_loss == "sft":
            compared = compared | (demonstration & continuous)
    return Terms(imitated, unlearned, compared)


class RowLosses(NamedTuple):
    """Row losses and their parts, each `(B,)` and 0 where the row lacks the term.

    Attributes:
        total: the row loss.
        sft: −log π_θ(y|x) of imitated rows, before `sft_weight`.
        unlearning: +log π_θ(y|x) of unlearned rows.
        preference: the Eq. 8 or Eq. 9 loss of compared rows.
        rewards: the implicit reward r of every row; NaN where `ref_logps` is.
    """

    total: torch.Tensor
    sft: torch.Tensor
    unlearning: torch.Tensor
    preference: torch.Tensor
    rewards: torch.Tensor


def grid_loss(
    policy_logps: torch.Tensor,
    ref_logps: torch.Tensor,
    label: torch.Tensor,
    terms: Terms,
    continuous: torch.Tensor,
    *,
    beta: float = 0.1,
    log_z: torch.Tensor | float = 0.0,
    sft_weight: float = 1.0,
    binary_loss: str = "cross_entropy",
) -> RowLosses:
    r"""Row losses of any cell of the grid, with binary and continuous labels mixed.

        ℓ = sft_weight·(−log π_θ)  on imitated rows
          + log π_θ                on unlearned rows
          + Eq. 8 or Eq. 9         on compared rows, as `continuous` says; `binary_loss` can replace Eq. 8

    Args:
        policy_logps: `(B,)` log π_θ(y|x) in nats, summed over completion tokens.
        ref_logps: `(B,)` log π_ref(y|x) in nats; read on compared rows only, NaN elsewhere does no harm.
        label: `(B,)`.
        terms: which terms each row has, see `route`.
        continuous: `(B,)` bool, True where the label is continuous.
        beta: β > 0.
        log_z: log Z(x) in nats, one number or `(B,)`.
        sft_weight: weight of the SFT term, ≥ 0.
        binary_loss: the loss of compared rows with binary labels, one of `BINARY_LOSSES`; by default Eq. 8.

    Returns:
        `RowLosses`, each `(B,)`, at least float32.

    Raises:
        ValueError: on shapes that differ, β that is not above 0 or a negative `sft_weight`.

    Example:
        >>> import torch
        >>> label, mask = torch.tensor([1.0, 0.0]), torch.tensor([True, False])
        >>> terms = route(label, mask, torch.zeros(2, dtype=torch.bool), negative_loss="none")
        >>> grid_loss(torch.tensor([-3.0, -4.0]), torch.tensor([-3.0, -4.0]), label, terms, ~mask & mask).total
        tensor([3., 0.])
    """
    if not sft_weight >= 0:
        raise ValueError(f"sft_weight must be 0 or above; got {sft_weight}.")
    check_binary_loss(binary_loss)
    flags = {"continuous": continuous, **terms._asdict()}
    policy, ref, z, log_z, *_ = _checked(policy_logps, ref_logps=ref_logps, label=label, log_z=log_z, **flags)
    # A row that is not compared may have no reference: its NaN is replaced before the arithmetic, not after, since the
    # gradient of a NaN that `where` discards is NaN still.
    ref = torch.where(terms.compared, ref, policy.detach())
    zero = torch.zeros_like(policy)
    compared = torch.where(
        continuous.bool(),
        pointwise_mse_loss(policy, ref, z, beta=beta, log_z=log_z),
        BINARY_LOSSES[binary_loss](policy, ref, z, beta=beta, log_z=log_z),
    )
    sft = torch.where(terms.imitated, -policy, zero)
    unlearning = torch.where(terms.unlearned, policy, zero)
    preference = torch.where(terms.compared, compared, zero)
    with torch.no_grad():
        rewards = beta * (policy - ref_logps.to(policy.dtype) + log_z)
    return RowLosses(sft_weight * sft + unlearning + preference, sft, unlearning, preference, rewards)
