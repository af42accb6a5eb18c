"""The row losses of pointwise DPO and ULMA: pure functions of log-probabilities, without reduction.

Every function takes tensors of shape `(B,)` and returns row losses of shape `(B,)`. Log-probabilities are in nats,
summed over the completion tokens. The functions compute and return losses in at least float32, whatever the dtype of
the log-probabilities.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

POSITIVE_LOSSES = ("sft", "pointwise_dpo", "none")
NEGATIVE_LOSSES = ("pointwise_dpo", "unlearning", "none")


def _checked(policy_logps: torch.Tensor, **others: torch.Tensor | float) -> tuple[torch.Tensor, ...]:
    """`policy_logps` and `others` in one floating dtype of at least float32. All tensors must have the same shape."""
    if policy_logps.dim() != 1:
        raise ValueError(f"policy_logps must have shape (B,), one value per row; got {tuple(policy_logps.shape)}.")
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
    r"""Row losses of pointwise DPO for binary and soft labels.

    With the implicit reward r = β·(log π_θ(y|x) − log π_ref(y|x) + log Z(x)),

        ℓ = −z·log σ(r) − (1 − z)·log σ(−r),        ∂ℓ/∂log π_θ = −β·(z − σ(r)).

    Source: ULMA, arXiv 2312.02554, Eq. 8. Eq. 7 prints `log σ(1 − r)`, but the correct term is
    `log(1 − σ(r)) = log σ(−r)`.

    Args:
        policy_logps: `(B,)` log π_θ(y|x) in nats, summed over completion tokens.
        ref_logps: `(B,)` log π_ref(y|x) in nats, summed over the same tokens.
        label: `(B,)` z in [0, 1]: 1 is desirable, 0 undesirable, and a value in between is the probability of being
            desirable.
        beta: β > 0, the strength of the pull toward the reference.
        log_z: log Z(x) in nats, one number or `(B,)`.

    Returns:
        `(B,)` row losses, at least float32.

    Raises:
        ValueError: if shapes differ, or if β is not above 0.

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
    r"""Row losses of pointwise DPO for continuous labels.

    With the implicit reward r = β·(log π_θ(y|x) − log π_ref(y|x) + log Z(x)),

        ℓ = (z − r)²,        ∂ℓ/∂log π_θ = −2β·(z − r).

    Source: ULMA, arXiv 2312.02554, Eq. 9 with Eq. 4 plugged in.

    Args:
        policy_logps: `(B,)` log π_θ(y|x) in nats, summed over completion tokens.
        ref_logps: `(B,)` log π_ref(y|x) in nats, summed over the same tokens.
        label: `(B,)` z, any real number, interpreted as the reward r*(x, y): higher is better.
        beta: β > 0, the strength of the pull toward the reference.
        log_z: log Z(x) in nats, one number or `(B,)`.

    Returns:
        `(B,)` row losses, at least float32.

    Raises:
        ValueError: if shapes differ, or if β is not above 0.

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


def group_means(values: torch.Tensor, group: torch.Tensor, weight: torch.Tensor | float = 1.0) -> torch.Tensor:
    r"""The weighted mean of each row's group.

    With the labels and the log-ratios centered by it, `pointwise_mse_loss` is (z − z̄ − β·(u − ū))², from which log Z(x)
    cancels. That is the continuous loss with the constant c = z̄ − β·ū, the one that minimizes Σ wᵢ·(zᵢ − β·uᵢ − c)²
    over the group. The gradient is therefore the same whether or not c is detached.

    Source: REBEL, arXiv 2404.16767, and GVPO, arXiv 2504.19599. For two rows the sum of the losses is half of REBEL's.

    Args:
        values: `(B,)`.
        group: `(B,)` int64, equal for rows of a group. Each row with a negative number is a group of its own.
        weight: `(B,)` weights, above 0 in every group of several rows.

    Returns:
        `(B,)` means.

    Example:
        >>> import torch
        >>> group_means(torch.tensor([1.0, 5.0, 3.0, 7.0]), torch.tensor([2, -1, 2, -1]))
        tensor([2., 5., 2., 7.])
    """
    index = _group_index(group)
    weight = torch.where(group < 0, 1.0, weight).to(values.dtype)
    sums = torch.stack([weight * values, weight], 1)
    totals = torch.zeros_like(sums).index_add(0, index, sums)
    return (totals[:, 0] / totals[:, 1])[index]


def is_informative(label: torch.Tensor, group: torch.Tensor, continuous: torch.Tensor) -> torch.Tensor:
    """`(B,)` bool: whether the row's group says anything about the policy.

    That takes several rows, and among rows with binary labels both classes.

    Args:
        label: `(B,)`. Binary labels are 0 or 1.
        group: `(B,)` int64, see `group_means`.
        continuous: `(B,)` bool.

    Example:
        >>> import torch
        >>> binary = torch.tensor([False] * 5)
        >>> is_informative(torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0]), torch.tensor([0, 0, 1, 1, 2]), binary)
        tensor([ True,  True, False, False, False])
    """
    liked = (label >= 0.5).double()
    share = group_means(liked, group)
    size = _group_sizes(group)
    return torch.where(continuous, size > 1, (share > 0) & (share < 1))


def conditional_dpo_loss(
    policy_logps: torch.Tensor,
    ref_logps: torch.Tensor,
    label: torch.Tensor,
    group: torch.Tensor,
    *,
    beta: float = 0.1,
) -> torch.Tensor:
    r"""Row losses of pointwise DPO for binary labels, given the number of likes in each group of rows.

    If the labels of a prompt's n rows are independent and each is 1 with probability σ(r), then given that k are 1, the
    probability of the labels is

        exp(Σ_{liked} r) / Σ_{S, |S| = k} exp(Σ_{S} r),

    from which log Z(x) cancels. The loss of the group is minus its logarithm, and each of its rows has the n-th part.
    For a like and a dislike, the two rows sum to DPO's loss of the pair, −log σ(r_w − r_l). The sum over subsets is the
    k-th elementary symmetric polynomial of exp(r), computed by its recursion in log space in O(n·k). Its gradient is
    ∂/∂r of the group's loss = P(row is among the k) − z.

    Source: the conditional logistic likelihood of D. R. Cox (1958), applied to ULMA's Eq. 8.

    Args:
        policy_logps: `(B,)` log π_θ(y|x) in nats, summed over completion tokens.
        ref_logps: `(B,)` log π_ref(y|x) in nats, summed over the same tokens.
        label: `(B,)` z, 0 or 1.
        group: `(B,)` int64, see `group_means`. Groups of one row or of one class have loss 0.
        beta: β > 0.

    Returns:
        `(B,)` row losses, at least float32.

    Raises:
        ValueError: if shapes differ, or if β is not above 0.

    Example:
        >>> import torch
        >>> logps = torch.full((4,), -10.0)
        >>> conditional_dpo_loss(logps, logps, torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([0, 0, 1, 1]))
        tensor([0.3466, 0.3466, 0.0000, 0.0000])
    """
    _check_beta(beta)
    policy, ref, z = _checked(policy_logps, ref_logps=ref_logps, label=label)
    if group.shape != policy.shape:
        raise ValueError(f"group must have shape {tuple(policy.shape)}, like policy_logps; got {tuple(group.shape)}.")
    reward = beta * (policy - ref)
    # What all rows of a group share cancels; without it, sums of large rewards keep their digits
    reward = reward - group_means(reward.detach(), group)
    liked = (z >= 0.5).to(reward.dtype)
    index, sizes = _group_index(group), _group_sizes(group)
    order = torch.argsort(index, stable=True)
    number = torch.arange(len(order), device=order.device)
    is_first = torch.ones_like(order, dtype=torch.bool)
    is_first[1:] = index[order][1:] != index[order][:-1]
    place = torch.empty_like(order)
    place[order] = number - torch.where(is_first, number, torch.zeros_like(number)).cummax(0).values
    table = reward.new_zeros(len(order), int(sizes.max())).index_put((index, place), reward)
    rows_of = torch.zeros_like(sizes).index_put((index,), sizes)
    likes = torch.zeros_like(reward).index_add(0, index, liked)
    # log e_0, …, log e_k of the rows so far. Minus infinity would have no gradient.
    logs = torch.full_like(table[:, :1], torch.finfo(table.dtype).min / 4).expand(-1, int(likes.max()))
    ones = torch.zeros_like(table[:, :1])
    for column in range(table.size(1)):
        before = torch.cat([ones, logs], 1)[:, : logs.size(1)]
        added = torch.logaddexp(logs, before + table[:, column : column + 1])
        logs = torch.where((column < rows_of)[:, None], added, logs)
    chosen = torch.cat([ones, logs], 1).gather(1, likes.long()[:, None])[:, 0]
    loss = chosen - torch.zeros_like(reward).index_add(0, index, liked * reward)
    return loss[index] / sizes


def _group_index(group: torch.Tensor) -> torch.Tensor:
    """`(B,)` the number of each row's group, counted from 0. A row with a negative number is a group of its own."""
    own = -1 - torch.arange(len(group), device=group.device)
    return torch.unique(torch.where(group < 0, own, group), return_inverse=True)[1]


def _group_sizes(group: torch.Tensor) -> torch.Tensor:
    """`(B,)` the number of rows in each row's group."""
    index = _group_index(group)
    return torch.bincount(index)[index]


# Losses of compared rows with binary or soft labels, by the name that `binary_loss` has for them
BINARY_LOSSES = {"cross_entropy": pointwise_dpo_loss, "squared_error": squared_error_loss, "kto": kto_loss}


def check_binary_loss(binary_loss: str) -> None:
    """Raise ValueError if a loss of binary labels has no such name."""
    if binary_loss not in tuple(BINARY_LOSSES):  # it may be unhashable
        raise ValueError(f"binary_loss must be one of {tuple(BINARY_LOSSES)}; got {binary_loss!r}.")


def reward_slope(
    rewards: torch.Tensor, label: torch.Tensor, continuous: torch.Tensor, *, binary_loss: str = "cross_entropy"
) -> torch.Tensor:
    r"""∂ℓ/∂r of the losses: −2·(z − r) for continuous labels, and for binary ones by the loss

        cross_entropy: σ(r) − z,    squared_error: 2·(σ(r) − z)·σ(r)·σ(−r),    kto: (1 − 2z)·σ(r)·σ(−r).

    With c = β·log Z, ∂ℓ/∂c has the same value, and ∂ℓ/∂log π_θ is β times this value.

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

        binary:      −w·log π_θ(y|x) on demonstrations, the loss of Eq. 8 on all other rows
        continuous:  (z − r)² on all rows, plus −w·log π_θ(y|x) on demonstrations

    with w = `sft_weight`. Source: ULMA, arXiv 2312.02554, §4.3 and §5.1 (iii). The sum in the paper multiplies the SFT
    term by z. The paper only defines ULMA for labels 0 and 1, for which both forms agree.

    Args:
        policy_logps: `(B,)` log π_θ(y|x) in nats, summed over completion tokens.
        ref_logps: `(B,)` log π_ref(y|x) in nats. It is not read for binary demonstrations and can be NaN there.
        label: `(B,)` z, see `pointwise_dpo_loss` and `pointwise_mse_loss`.
        sft_mask: `(B,)` bool, True for demonstrations.
        beta: β > 0.
        log_z: log Z(x) in nats, one number or `(B,)`.
        label_type: "binary" or "continuous".
        sft_weight: w ≥ 0, the weight of the SFT term.

    Returns:
        `(B,)` row losses, at least float32.

    Raises:
        ValueError: if shapes differ, if `label_type` is unknown, if β is not above 0, or if `sft_weight` is negative.

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
    """The terms that the loss of each row has, as `(B,)` bools. The loss of a row without any term is 0.

    Attributes:
        imitated: the row has −log π_θ(y|x), the SFT term.
        unlearned: the row has +log π_θ(y|x).
        compared: the row has the pointwise DPO term (Eq. 8 or Eq. 9), and so needs the reference.
    """

    imitated: torch.Tensor
    unlearned: torch.Tensor
    compared: torch.Tensor


def check_cell(positive_loss: str, negative_loss: str) -> None:
    """Raise ValueError if `positive_loss` × `negative_loss` is not a cell of the grid of methods."""
    if positive_loss not in POSITIVE_LOSSES:
        raise ValueError(f"positive_loss must be one of {POSITIVE_LOSSES}; got {positive_loss!r}.")
    if negative_loss not in NEGATIVE_LOSSES:
        raise ValueError(f"negative_loss must be one of {NEGATIVE_LOSSES}; got {negative_loss!r}.")
    if positive_loss == "none" and negative_loss == "none":
        raise ValueError("positive_loss and negative_loss are both 'none', so every loss would be 0. Set one of them.")
    if positive_loss == "pointwise_dpo" and negative_loss == "unlearning":
        raise ValueError(
            "positive_loss='pointwise_dpo' with negative_loss='unlearning' is not a method: the first keeps the policy "
            "close to the reference, the second drives it away without bound. Use negative_loss='pointwise_dpo', or "
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
    | `pointwise_dpo`         | Pointwise DPO    | –            | Positive DPO |
    | `none`                  | Negative DPO     | Unlearning   | –            |

    Positive rows are the demonstrations (`sft_mask`). Negative rows have a label below 1 and are not demonstrations.
    A liked row (label 1, not a demonstration) has the term of Eq. 8 in every cell. If labels are continuous,
    demonstrations have the MSE term if `positive_loss` is "pointwise_dpo" or the cell is ULMA's, and all other rows
    have it if `negative_loss` is "pointwise_dpo".

    Args:
        label: `(B,)`.
        sft_mask: `(B,)` bool, True for demonstrations.
        continuous: `(B,)` bool, True if the label is continuous.
        positive_loss: "sft", "pointwise_dpo" or "none".
        negative_loss: "pointwise_dpo", "unlearning" or "none".

    Returns:
        `Terms` of `(B,)` bools.

    Raises:
        ValueError: if the cell is marked "–", or if shapes differ.

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
    """Row losses and their parts, each `(B,)`. A part is 0 for rows that lack the term.

    Attributes:
        total: the row loss.
        sft: −log π_θ(y|x) of imitated rows, before multiplication by `sft_weight`.
        unlearning: +log π_θ(y|x) of unlearned rows.
        preference: the Eq. 8 or Eq. 9 loss of compared rows.
        rewards: the implicit reward r of every row. NaN if `ref_logps` is NaN.
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
    group: torch.Tensor | None = None,
) -> RowLosses:
    r"""Row losses of any cell of the grid, with binary and continuous labels mixed.

        ℓ = sft_weight·(−log π_θ)  on imitated rows
          + log π_θ                on unlearned rows
          + Eq. 8 or Eq. 9         on compared rows, as `continuous` says; `binary_loss` can replace Eq. 8

    Args:
        policy_logps: `(B,)` log π_θ(y|x) in nats, summed over completion tokens.
        ref_logps: `(B,)` log π_ref(y|x) in nats. The loss only reads it on compared rows. It can be NaN elsewhere.
        label: `(B,)`.
        terms: the terms of each row, see `route`.
        continuous: `(B,)` bool, True if the label is continuous.
        beta: β > 0.
        log_z: log Z(x) in nats, one number or `(B,)`.
        sft_weight: weight of the SFT term, ≥ 0.
        binary_loss: the loss of compared rows with binary labels, one of `BINARY_LOSSES`; by default Eq. 8.
        group: `(B,)` int64. If given, compared rows with binary labels have the loss of `conditional_dpo_loss`, which
            compares the rows of a group with each other. Negative for rows that are not compared.

    Returns:
        `RowLosses`, each `(B,)`, at least float32.

    Raises:
        ValueError: if shapes differ, if β is not above 0, or if `sft_weight` is negative.

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
    # Rows that are not compared can have NaN as ref_logps. Replace it before the arithmetic, because the gradient of a
    # NaN is still NaN after `where` discards it.
    ref = torch.where(terms.compared, ref, policy.detach())
    zero = torch.zeros_like(policy)
    if group is None:
        binary = BINARY_LOSSES[binary_loss](policy, ref, z, beta=beta, log_z=log_z)
    else:
        binary = conditional_dpo_loss(policy, ref, z, torch.where(continuous.bool(), -1, group), beta=beta)
    compared = torch.where(continuous.bool(), pointwise_mse_loss(policy, ref, z, beta=beta, log_z=log_z), binary)
    sft = torch.where(terms.imitated, -policy, zero)
    unlearning = torch.where(terms.unlearned, policy, zero)
    preference = torch.where(terms.compared, compared, zero)
    with torch.no_grad():
        rewards = beta * (policy - ref_logps.to(policy.dtype) + log_z)
    return RowLosses(sft_weight * sft + unlearning + preference, sft, unlearning, preference, rewards)
