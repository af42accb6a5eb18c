"""Named metrics from sums and counts.

A metric is a ratio of two sums over rows, so it does not depend on how the rows are split into micro-batches and
processes. A metric without any row is left out.
"""

from collections.abc import Mapping

import torch

ROW_FIGURES = (
    "loss",
    "loss/sft",
    "loss/unlearning",
    "loss/preference",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/mse",
    "logps/chosen",
    "logps/rejected",
    "logits/chosen",
    "logits/rejected",
    "entropy",
    "mean_token_accuracy",
    "kl",
    "log_z",
    "aux_loss",
    "num_tokens",
)

# The metrics of an evaluation: those of single rows, and those that need all rows at once
EVALUATED = (
    *(name for name in ROW_FIGURES if name != "num_tokens"),
    *("rewards/margins", "rewards/auc", "rewards/pearson", "rewards/spearman"),
)

Ratios = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


def masked(values: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(numerator, denominator) of the mean of `values` over the rows in `mask`, each `(B,)`.

    `values` can be NaN for rows outside of `mask`.

    Example:
        >>> import torch
        >>> masked(torch.tensor([2.0, float("nan")]), torch.tensor([True, False]))
        (tensor([2., 0.]), tensor([1., 0.]))
    """
    return torch.where(mask, values, torch.zeros_like(values)), mask.to(values.dtype)


def reward_ratios(
    rewards: torch.Tensor,
    log_ratio: torch.Tensor,
    log_z: torch.Tensor,
    label: torch.Tensor,
    chosen: torch.Tensor,
    continuous: torch.Tensor,
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The metrics of the implicit reward, over the rows whose reward is known (not NaN).

    Args:
        rewards: `(B,)` r. NaN if the log-probability under the reference was not computed.
        log_ratio: `(B,)` log π_θ − log π_ref in nats.
        log_z: `(B,)` log Z in nats.
        label: `(B,)`.
        chosen: `(B,)` bool, rows with a label of ½ or above. For continuous labels, the demonstrations.
        continuous: `(B,)` bool, True if the label is continuous.

    Returns:
        name → (numerator, denominator), each `(B,)`. `rewards/accuracies` is the share of rows with binary labels whose
        reward has the sign that the label predicts. `kl` is the mean log-ratio. It estimates KL(π_θ‖π_ref) to the
        extent that the completions are samples of the policy.
    """
    known = ~rewards.isnan()
    right = ((rewards > 0) == (label >= 0.5)).to(rewards.dtype)
    return {
        "rewards/chosen": masked(rewards, known & chosen),
        "rewards/rejected": masked(rewards, known & ~chosen),
        "rewards/accuracies": masked(right, known & ~continuous),
        "rewards/mse": masked((label - rewards) ** 2, known & continuous),
        "kl": masked(log_ratio, known),
        "log_z": masked(log_z, known),
    }


def token_ratios(
    entropy: torch.Tensor, mean_logits: torch.Tensor, is_top1: torch.Tensor, mask: torch.Tensor, chosen: torch.Tensor
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The metrics that are means over completion tokens.

    Args:
        entropy, mean_logits, is_top1: `(B, T)` statistics of the next-token distribution, as in TRL's fused LM head.
        mask: `(B, T)`, 1 for completion tokens.
        chosen: `(B,)` bool, see `reward_ratios`.

    Returns:
        name → (sum over the tokens of the row, number of these tokens), each `(B,)`.
    """
    tokens = mask.sum(1).float()
    zero = torch.zeros_like(tokens)

    def of(rows: torch.Tensor, per_token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sums = (per_token.float() * mask).sum(1)
        return torch.where(rows, sums, zero), torch.where(rows, tokens, zero)

    return {
        "entropy": of(torch.ones_like(chosen), entropy),
        "logits/chosen": of(chosen, mean_logits),
        "logits/rejected": of(~chosen, mean_logits),
        "mean_token_accuracy": of(chosen, is_top1),
    }


class RatioSums:
    """Running numerators and denominators of `ROW_FIGURES`, kept on the device."""

    def __init__(self, device: torch.device):
        self.device = device
        self.reset()

    def reset(self) -> None:
        """Set all sums to 0."""
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        self._sums = torch.zeros(len(ROW_FIGURES), 2, dtype=dtype, device=self.device)

    def add(self, ratios: Ratios, real: torch.Tensor) -> None:
        """Add the rows of a micro-batch. Rows for which `real` is False are repetitions and are not counted.

        Raises:
            ValueError: if a name is not in `ROW_FIGURES`.
        """
        where = torch.tensor([ROW_FIGURES.index(name) for name in ratios], device=self.device)
        pairs = torch.stack([value.to(self._sums.dtype) for pair in ratios.values() for value in pair]).detach()
        pairs = torch.where(real, pairs, torch.zeros_like(pairs))
        self._sums[where] += pairs.sum(-1).view(-1, 2)

    def totals(self) -> torch.Tensor:
        """`(len(ROW_FIGURES), 2)` sums of this process. The caller adds them up over processes."""
        return self._sums


def figures(totals: torch.Tensor) -> dict[str, float]:
    """Named metrics from the sums. `num_tokens` is a sum, and `rewards/margins` is the difference of two metrics.

    If rewards, `kl` and `log_z` cover fewer rows than the loss, `rewards/rows` is the number of rows that they cover.

    Example:
        >>> import torch
        >>> sums = RatioSums(torch.device("cpu"))
        >>> sums.add({"loss": (torch.tensor([1.0, 2.0]), torch.ones(2))}, torch.tensor([True, True]))
        >>> figures(sums.totals())
        {'loss': 1.5}
    """
    named = {}
    for name, (numerator, denominator) in zip(ROW_FIGURES, totals.tolist(), strict=True):
        if denominator > 0:
            named[name] = numerator if name == "num_tokens" else numerator / denominator
    rows, rewarded = (totals[ROW_FIGURES.index(name), 1].item() for name in ("loss", "kl"))
    if 0 < rewarded < rows:
        named["rewards/rows"] = rewarded
    if "rewards/chosen" in named and "rewards/rejected" in named:
        named["rewards/margins"] = named["rewards/chosen"] - named["rewards/rejected"]
    return named


def auc(rewards: torch.Tensor, positive: torch.Tensor) -> float | None:
    """The probability that a positive row has a higher reward than a negative one. Ties count as half.

    None if there are no positive rows or no negative ones.

    Args:
        rewards: `(N,)`.
        positive: `(N,)` bool.

    Example:
        >>> import torch
        >>> auc(torch.tensor([0.1, 0.4, 0.8]), torch.tensor([False, True, True]))
        1.0
    """
    n_positive, n_negative = int(positive.sum()), int((~positive).sum())
    if not n_positive or not n_negative:
        return None
    wins = _ranks(rewards)[positive].sum() - n_positive * (n_positive + 1) / 2
    return float(wins / (n_positive * n_negative))


def pearson(a: torch.Tensor, b: torch.Tensor) -> float | None:
    """Linear correlation of two `(N,)` tensors. None if either is constant.

    Example:
        >>> import torch
        >>> round(pearson(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 6.0])), 6)
        1.0
    """
    if len(a) < 2 or (a == a[0]).all() or (b == b[0]).all():
        return None
    return float(torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1])


def spearman(a: torch.Tensor, b: torch.Tensor) -> float | None:
    """Rank correlation of two `(N,)` tensors. Ties share their mean rank. None if either tensor is constant.

    Example:
        >>> import torch
        >>> round(spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 4.0, 9.0])), 6)
        1.0
    """
    return pearson(_ranks(a), _ranks(b))


def _ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks from 1. Equal values share their mean rank."""
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse]


def ranking_figures(rewards: torch.Tensor, label: torch.Tensor, continuous: torch.Tensor) -> dict[str, float]:
    """Metrics that need all rows at once: `rewards/auc` for binary labels, correlations for continuous labels.

    Args:
        rewards: `(N,)` r. NaN if unknown.
        label: `(N,)`.
        continuous: `(N,)` bool.
    """
    known = ~rewards.isnan()
    binary, continuous = known & ~continuous, known & continuous
    found = {
        "rewards/auc": auc(rewards[binary], label[binary] >= 0.5),
        "rewards/pearson": pearson(rewards[continuous], label[continuous]),
        "rewards/spearman": spearman(rewards[continuous], label[continuous]),
    }
    return {name: value for name, value in found.items() if value is not None}
