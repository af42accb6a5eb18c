"""The loss of a batch and the figures of its rows, from log-probabilities and labels."""

from typing import Any, NamedTuple

import torch

from trl_ulma.labels import LabelRules
from trl_ulma.likelihood.scorer import Likelihood
from trl_ulma.log_partition import LogPartition, Observed
from trl_ulma.losses import RowLosses, Terms, grid_loss, reward_slope, route
from trl_ulma.metrics import Ratios, masked, reward_ratios, token_ratios

Rows = dict[str, torch.Tensor]


class BatchLoss(NamedTuple):
    """What a batch's rows add to the loss of a step; each `(B,)` but the last three.

    Attributes:
        weighted: the rows' losses, weights included; what is not finite is not a row's auxiliary loss.
        rewards: the implicit rewards; NaN where `ref_logps` is.
        policy_logps: log π_θ, divided by the tokens if `length_normalize`.
        continuous: bool, whether the label is continuous.
        total: the sum to minimize, over rows that are no filler; with the auxiliary loss of a mixture of experts.
        observed: what log Z sees.
        ratios: the figures' numerators and denominators.
    """

    weighted: torch.Tensor
    rewards: torch.Tensor
    policy_logps: torch.Tensor
    continuous: torch.Tensor
    total: torch.Tensor
    observed: Observed
    ratios: Ratios


class Objective:
    """Σ wᵢ·vᵢ·ℓᵢ over a batch's rows: ℓ the row loss (`trl_ulma.losses`), w the row's weight, v its class weight.

    Args:
        args: the trainer's config.
        rules: how labels are read.
        aux_loss_weight: of the auxiliary loss of a mixture of experts.
    """

    def __init__(self, args: Any, rules: LabelRules, aux_loss_weight: float = 0.0):
        self.args = args
        self.rules = rules
        self.aux_loss_weight = aux_loss_weight

    def continuous(self, rows: Rows) -> torch.Tensor:
        """`(B,)` bool, whether the label is continuous."""
        found = rows.get("continuous")
        return torch.full_like(rows["sft_mask"], self.rules.label_type == "continuous") if found is None else found

    def terms(self, rows: Rows) -> Terms:
        """Which terms the loss of each row has, see `trl_ulma.losses.route`."""
        positive, negative = self.args.cell
        kinds = {"positive_loss": positive, "negative_loss": negative}
        return route(rows["label"], rows["sft_mask"], self.continuous(rows), **kinds)

    def __call__(
        self,
        policy: Likelihood,
        ref_logps: torch.Tensor,
        rows: Rows,
        inputs: Rows,
        log_partition: LogPartition,
        *,
        all_rewarded: bool,
    ) -> BatchLoss:
        """The loss and the figures.

        Args:
            policy: the completion tokens under the policy, with statistics.
            ref_logps: `(B,)` log π_ref in nats, NaN for rows that are not compared.
            rows: `label`, `sft_mask` and what else a batch holds of its rows, each `(B,)`.
            inputs: `attention_mask` and `completion_mask`.
            log_partition: gives log Z of rows without a `log_z` of their own.
            all_rewarded: whether `ref_logps` is known of all rows that have a reference, so that their rewards are
                figures.

        Raises:
            ValueError: if log Z is to be a column, and the rows have none.
        """
        label, continuous, terms = rows["label"], self.continuous(rows), self.terms(rows)
        scored = inputs["completion_mask"][:, 1:]
        real = rows.get("real", torch.ones_like(rows["sft_mask"]))
        policy_logps = policy.logps
        ref_logps = ref_logps.to(policy_logps)
        if self.args.length_normalize:
            tokens = scored.sum(1).clamp(min=1)
            policy_logps, ref_logps = policy_logps / tokens, ref_logps / tokens
        log_z = self._log_z(rows, continuous, policy, log_partition).to(policy_logps)
        losses = grid_loss(
            policy_logps,
            ref_logps,
            label,
            terms,
            continuous,
            beta=self.args.beta,
            log_z=log_z,
            sft_weight=getattr(self.args, "sft_weight", 1.0),
            binary_loss=self.args.binary_loss,
        )
        chosen = torch.where(continuous, rows["sft_mask"], label >= 0.5)
        weight = torch.where(chosen, self.args.desirable_weight, self.args.undesirable_weight)
        weight = weight * rows.get("weight", 1.0)
        weighted = losses.total * weight
        total = torch.where(real, weighted, torch.zeros_like(weighted)).sum()
        shown, aux_loss = weighted, policy.aux_loss
        if aux_loss is not None:
            total = total + self.aux_loss_weight * aux_loss * real.sum()
            shown = weighted + self.aux_loss_weight * aux_loss
        with torch.no_grad():
            ratios = _ratios(losses, terms, policy, policy_logps, shown, scored, chosen)
            ratios["num_tokens"] = (inputs["attention_mask"].sum(1).to(policy_logps), torch.ones_like(policy_logps))
            log_ratio = policy_logps - ref_logps
            if all_rewarded:
                ratios.update(reward_ratios(losses.rewards, log_ratio, log_z, label, chosen, continuous))
            if aux_loss is not None:
                ratios["aux_loss"] = (aux_loss.expand_as(weighted), torch.ones_like(weighted))
            slope = reward_slope(losses.rewards, label, continuous, binary_loss=self.args.binary_loss) * weight
            observed = Observed(terms.compared & real, log_ratio, slope)
        return BatchLoss(weighted, losses.rewards, policy_logps, continuous, total, observed, ratios)

    def _log_z(
        self, rows: Rows, continuous: torch.Tensor, policy: Likelihood, log_partition: LogPartition
    ) -> torch.Tensor:
        if "log_z" in rows:
            return rows["log_z"]
        if self.args.log_z == "column":
            raise ValueError("log_z='column' needs a column log_z, in nats, in every row; a batch has none.")
        return log_partition(continuous, policy.prompt_states)


def _ratios(
    losses: RowLosses,
    terms: Terms,
    policy: Likelihood,
    policy_logps: torch.Tensor,
    shown: torch.Tensor,
    scored: torch.Tensor,
    chosen: torch.Tensor,
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    entropy: Any = policy.entropy
    mean_logits: Any = policy.mean_logits
    is_top1: Any = policy.is_top1
    return {
        "loss": (shown, torch.ones_like(shown)),
        "loss/sft": masked(losses.sft, terms.imitated),
        "loss/unlearning": masked(losses.unlearning, terms.unlearned),
        "loss/preference": masked(losses.preference, terms.compared),
        "logps/chosen": masked(policy_logps, chosen),
        "logps/rejected": masked(policy_logps, ~chosen),
        **token_ratios(entropy, mean_logits, is_top1, scored, chosen),
    }
