"""Named metrics from sums and counts.

A figure is a ratio of two sums over rows, whatever micro-batch or process the rows fell into. A figure over no row is
left out. Only the `loss` of a training is Trainer's: the mean of the losses of the steps since the last log.

Figures tell *chosen* rows from *rejected* ones. A row with a binary label is chosen if its label is ½ or above. A row
with a continuous label, such as a rating, is chosen if its label is at or above the center: the mean of the continuous
labels of the training set, after `label_transform`. Evaluation uses the center of the training set, too. Whether a row
is a demonstration makes no difference.

- `rewards/chosen`, `rewards/rejected`: mean implicit reward of the chosen and of the rejected rows.
- `rewards/margins`: `rewards/chosen` − `rewards/rejected`.
- `rewards/accuracies`: the share of rows whose reward is on the side of their label. Rewards are compared with 0 for
  binary labels, because σ(0) = ½, and with the center for continuous ones, because the reward predicts the label.
  A binary label of exactly ½, such as of a tie, is on no side: neither this figure nor `rewards/auc` counts its row.
- `rewards/mean`, `rewards/mse`: of rows with continuous labels, the mean reward and the mean of (z − r)².
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
    "rewards/mean",
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

# What rows must be for a figure to be there; others are there for any rows
NEEDED_ROWS = {
    "loss/sft": "demonstrations that are imitated",
    "loss/unlearning": "rows that are unlearned",
    "loss/preference": "rows that are compared with the reference",
    "rewards/mean": "rows with continuous labels",
    "rewards/mse": "rows with continuous labels",
    "rewards/pearson": "continuous labels that differ",
    "rewards/spearman": "continuous labels that differ",
    "rewards/accuracies": "labels other than ½",
    "rewards/auc": "binary labels above ½, and others below ½",
    **dict.fromkeys(("rewards/chosen", "logps/chosen", "logits/chosen", "mean_token_accuracy"), "chosen rows"),
    **dict.fromkeys(("rewards/rejected", "logps/rejected", "logits/rejected"), "rejected rows"),
    "rewards/margins": "chosen rows and rejected ones",
}

# Figures of an evaluation whose smallest value is best
LOWER_IS_BETTER = (
    *(
        "loss",
        "loss/sft",
        "loss/unlearning",
        "loss/preference",
        "rewards/mse",
        "rewards/rejected",
        "logps/rejected",
        "kl",
    ),
)

Ratios = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


def is_of_rewards(name: str) -> bool:
    """Whether a figure is there only if rows are compared with a reference.

    Example:
        >>> is_of_rewards("rewards/auc"), is_of_rewards("loss")
        (True, False)
    """
    return name.startswith("rewards/") or name in ("kl", "log_z")


def masked(values: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(numerator, denominator) of the mean of `values` over the rows in `mask`, each `(B,)`.

    `values` can be NaN for rows outside of `mask`.

    Example:
        >>> import torch
        >>> masked(torch.tensor([2.0, float("nan")]), torch.tensor([True, False]))
        (tensor([2., 0.]), tensor([1., 0.]))
    """
    return torch.where(mask, values, torch.zeros_like(values)), mask.to(values.dtype)


def is_chosen(label: torch.Tensor, continuous: torch.Tensor, center: float = 0.0) -> torch.Tensor:
    """`(B,)` bool: whether figures count a row as chosen, see the module's docstring.

    Args:
        center: of the continuous labels of the training set.

    Example:
        >>> import torch
        >>> is_chosen(torch.tensor([0.5, 4.0, 2.0]), torch.tensor([False, True, True]), 3.0)
        tensor([ True,  True, False])
    """
    return torch.where(continuous, label >= center, label >= 0.5)


def is_sided(label: torch.Tensor, continuous: torch.Tensor) -> torch.Tensor:
    """`(B,)` bool: whether a row counts in accuracies and AUC, see the module's docstring.

    Example:
        >>> import torch
        >>> is_sided(torch.tensor([0.5, 0.6, 0.5]), torch.tensor([False, False, True]))
        tensor([False,  True,  True])
    """
    return continuous | (label != 0.5)


def reward_ratios(
    rewards: torch.Tensor,
    log_ratio: torch.Tensor,
    log_z: torch.Tensor,
    label: torch.Tensor,
    chosen: torch.Tensor,
    continuous: torch.Tensor,
    center: float = 0.0,
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The metrics of the implicit reward, over the rows whose reward is known (not NaN).

    Args:
        rewards: `(B,)` r. NaN if the log-probability under the reference was not computed.
        log_ratio: `(B,)` log π_θ − log π_ref in nats.
        log_z: `(B,)` log Z in nats.
        chosen: `(B,)` bool, see `is_chosen`.
        center: of the continuous labels of the training set.

    Returns:
        name → (numerator, denominator), each `(B,)`. The module's docstring defines `rewards/*`. `kl` is the mean
        log-ratio, an estimate of KL(π_θ‖π_ref) as far as the rows are what the policy would say.

    Example:
        Ratings around 3: the first answer is liked, and the policy expects 3.5 of it.

        >>> import torch
        >>> rewards, label = torch.tensor([3.5, 3.2]), torch.tensor([5.0, 1.0])
        >>> continuous = torch.tensor([True, True])
        >>> chosen = is_chosen(label, continuous, 3.0)
        >>> sums = RatioSums(torch.device("cpu"))
        >>> sums.add(reward_ratios(rewards, rewards, rewards, label, chosen, continuous, 3.0), continuous)
        >>> found = figures(sums.totals())
        >>> [round(found[f"rewards/{name}"], 2) for name in ("mean", "chosen", "rejected", "margins", "accuracies")]
        [3.35, 3.5, 3.2, 0.3, 0.5]
    """
    known = ~rewards.isnan()
    sided = is_sided(label, continuous)
    right = (torch.where(continuous, rewards > center, rewards > 0) == chosen).to(rewards.dtype)
    return {
        "rewards/chosen": masked(rewards, known & chosen),
        "rewards/rejected": masked(rewards, known & ~chosen),
        "rewards/accuracies": masked(right, known & sided),
        "rewards/mean": masked(rewards, known & continuous),
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
