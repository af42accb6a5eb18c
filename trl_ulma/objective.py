"""The loss and the metrics of a batch, from log-probabilities and labels."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from trl_ulma.labels import LabelRules
from trl_ulma.likelihood.scorer import Likelihood, Scorer
from trl_ulma.log_partition import LogPartition, Observed
from trl_ulma.log_z import mismatched
from trl_ulma.losses import RowLosses, Terms, grid_loss, group_means, is_informative, reward_slope, route
from trl_ulma.metrics import Ratios, is_chosen, masked, reward_ratios, token_ratios

Rows = dict[str, torch.Tensor]

# The columns of `BatchLoss.table`
_TABLE = ("policy_logps", "ref_logps", "label", "sft_mask", "continuous", "weight", "group", "extra")


class BatchLoss(NamedTuple):
    """The contribution of a batch to the loss of a step. All but the last four fields are `(B,)`.

    Attributes:
        weighted: the row losses, including weights, without the auxiliary loss.
        rewards: the implicit rewards. NaN if `ref_logps` is NaN.
        policy_logps: log π_θ, divided by the number of tokens if `length_normalize`.
        continuous: bool, whether the label is continuous.
        total: the sum to minimize over all rows except fillers, including the auxiliary loss of a mixture of experts.
        observed: what the log Z estimator observes.
        ratios: the numerators and denominators of the metrics.
        table: `(B, 8)`, if log_z="group" and the batch is evaluated: what `Objective.of_table` needs of each row.
            `ratios` then lacks the loss and the rewards, and `weighted` and `total` lack the preference terms.
    """

    weighted: torch.Tensor
    rewards: torch.Tensor
    policy_logps: torch.Tensor
    continuous: torch.Tensor
    total: torch.Tensor
    observed: Observed
    ratios: Ratios
    table: torch.Tensor | None = None


class _Found(NamedTuple):
    """The losses of rows, and what they were computed with: terms, labels and log Z, each `(B,)`."""

    losses: RowLosses
    terms: Terms
    label: torch.Tensor
    log_z: torch.Tensor
    rewards: torch.Tensor


class Objective:
    """Σ wᵢ·vᵢ·ℓᵢ over the rows of a batch.

    ℓ is the row loss (`trl_ulma.losses`), w the row's weight, and v its class weight.

    Args:
        aux_loss_weight: of the auxiliary loss of a mixture of experts.
        center: of the continuous labels of the training set, by which figures tell chosen rows from rejected ones.
    """

    def __init__(self, args: Any, rules: LabelRules, aux_loss_weight: float = 0.0, center: float = 0.0):
        self.args = args
        self.rules = rules
        self.aux_loss_weight = aux_loss_weight
        self.center = center

    def continuous(self, rows: Rows) -> torch.Tensor:
        """`(B,)` bool, whether the label is continuous."""
        found = rows.get("continuous")
        return torch.full_like(rows["sft_mask"], self.rules.label_type == "continuous") if found is None else found

    def terms(self, rows: Rows) -> Terms:
        """The terms that the loss of each row has, see `trl_ulma.losses.route`."""
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
        is_training: bool = True,
    ) -> BatchLoss:
        """Compute the loss and the metrics.

        Args:
            policy: the completion tokens under the policy, with statistics.
            ref_logps: `(B,)` log π_ref in nats. NaN for rows that are not compared with the reference.
            rows: `label`, `sft_mask` and the other columns that describe the rows of the batch, each `(B,)`.
            inputs: `attention_mask` and `completion_mask`.
            log_partition: computes log Z of rows without their own `log_z`.
            all_rewarded: whether `ref_logps` is known for all rows that have a reference. If so, the metrics include
                the rewards.
            is_training: only read with log_z="group". A training step compares the rows of a prompt within a batch, an
                evaluation within the dataset: see `of_table`.

        Raises:
            ValueError: if rows lack a column that `log_z` needs.
        """
        label, continuous = rows["label"], self.continuous(rows)
        scored = inputs["completion_mask"][:, 1:]
        real = rows.get("real", torch.ones_like(rows["sft_mask"]))
        policy_logps = policy.logps
        ref_logps = ref_logps.to(policy_logps)
        if self.args.length_normalize:
            tokens = scored.sum(1).clamp(min=1)
            policy_logps, ref_logps = policy_logps / tokens, ref_logps / tokens
        is_desirable = torch.where(continuous, rows["sft_mask"], label >= 0.5)
        weight = torch.where(is_desirable, self.args.desirable_weight, self.args.undesirable_weight)
        weight = weight * rows.get("weight", 1.0)
        group = self._group(rows) if self.args.log_z == "group" else None
        if group is not None:
            now = torch.where(real & is_training, group, -1)
            found = self._in_groups(policy_logps, ref_logps, rows, weight, now)
        else:
            log_z = self._log_z(rows, continuous, policy, log_partition).to(policy_logps)
            terms = self.terms(rows)
            losses = self._losses(policy_logps, ref_logps, label, terms, continuous, log_z)
            found = _Found(losses, terms, label, log_z, losses.rewards)
        weighted = found.losses.total * weight
        total = torch.where(real, weighted, torch.zeros_like(weighted)).sum()
        shown, aux_loss = weighted, policy.aux_loss
        if aux_loss is not None:
            total = total + self.aux_loss_weight * aux_loss * real.sum()
            shown = weighted + self.aux_loss_weight * aux_loss
        with torch.no_grad():
            chosen = is_chosen(label, continuous, self.center)
            ratios = _token_ratios(found.losses, found.terms, policy, policy_logps, scored, chosen)
            ratios["num_tokens"] = (inputs["attention_mask"].sum(1).to(policy_logps), torch.ones_like(policy_logps))
            log_ratio = policy_logps - ref_logps
            rewards, table = found.rewards, None
            if group is not None and not is_training:
                # Without groups, a prompt's log Z is unknown
                rewards = self.args.beta * log_ratio
                columns = (policy_logps, ref_logps, label, rows["sft_mask"], continuous, weight, group)
                table = torch.stack([column.double() for column in (*columns, shown - weighted)], 1)
            else:
                ratios |= self._loss_ratios(found, shown)
                if all_rewarded:
                    ratios |= self._reward_ratios(found, log_ratio, continuous)
            if aux_loss is not None:
                ratios["aux_loss"] = (aux_loss.expand_as(weighted), torch.ones_like(weighted))
            slope = reward_slope(rewards, label, continuous, binary_loss=self.args.binary_loss) * weight
            observed = Observed(found.terms.compared & real & (weight > 0), log_ratio, slope)
        return BatchLoss(weighted, rewards, policy_logps, continuous, total, observed, ratios, table)

    @torch.no_grad()
    def of_table(self, table: torch.Tensor) -> tuple[Ratios, torch.Tensor]:
        """The loss and the rewards of an evaluation with log_z="group", from all its rows at once.

        They do not depend on how the rows are split into batches, because the rows of a prompt are compared within the
        whole dataset.

        Args:
            table: `(N, 8)` the tables of the batches, without fillers.

        Returns:
            The metrics, and `(N, 3)` reward, label and whether the label is continuous. Rewards and continuous labels
            are centered within the prompt. For rows that are not compared with others, rewards are NaN and continuous
            labels are 0.
        """
        rows: Rows = dict(zip(_TABLE, table.unbind(1), strict=True))
        rows |= {"sft_mask": rows["sft_mask"].bool(), "continuous": rows["continuous"].bool()}
        policy_logps, ref_logps, continuous = rows["policy_logps"], rows["ref_logps"], rows["continuous"]
        found = self._in_groups(policy_logps, ref_logps, rows, rows["weight"], rows["group"].long())
        ratios = self._loss_ratios(found, found.losses.total * rows["weight"] + rows["extra"])
        ratios |= self._reward_ratios(found, policy_logps - ref_logps, continuous)
        return ratios, torch.stack([found.rewards, found.label, continuous.double()], 1)

    def _losses(self, policy_logps, ref_logps, label, terms, continuous, log_z, group=None) -> RowLosses:
        return grid_loss(
            policy_logps,
            ref_logps,
            label,
            terms,
            continuous,
            beta=self.args.beta,
            log_z=log_z,
            sft_weight=getattr(self.args, "sft_weight", 1.0),
            binary_loss=self.args.binary_loss,
            group=group,
        )

    def _in_groups(
        self,
        policy_logps: torch.Tensor,
        ref_logps: torch.Tensor,
        rows: Rows,
        weight: torch.Tensor,
        group: torch.Tensor,
    ) -> _Found:
        """The losses of rows that are compared within their group, the number of which is negative for other rows."""
        label, continuous, terms = rows["label"], self.continuous(rows), self.terms(rows)
        group = torch.where(terms.compared & (weight > 0), group, -1)
        informative = is_informative(label, group, continuous)
        group = torch.where(informative, group, -1)
        terms = terms._replace(compared=terms.compared & (group >= 0))
        with torch.no_grad():
            # Rows that are not compared can have NaN as ref_logps
            log_ratio = torch.where(terms.compared, policy_logps - ref_logps, 0.0)
            log_z = -group_means(log_ratio, group, weight)
            label = torch.where(continuous, label - group_means(label, group, weight), label)
        losses = self._losses(policy_logps, ref_logps, label, terms, continuous, log_z, group)
        unknown = torch.full_like(losses.rewards, torch.nan)
        return _Found(losses, terms, label, log_z, torch.where(terms.compared, losses.rewards, unknown))

    def _group(self, rows: Rows) -> torch.Tensor:
        if "group" not in rows:
            raise ValueError(
                "log_z='group' reads the column group of prepared rows, which numbers their prompts, but a batch has "
                "none. Keep the column in the data_collator, as DataCollatorForPointwisePreference does. It is not "
                "available for streams."
            )
        return rows["group"]

    def _loss_ratios(self, found: _Found, shown: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        return {
            "loss": (shown, torch.ones_like(shown)),
            "loss/preference": masked(found.losses.preference, found.terms.compared),
        }

    def _reward_ratios(
        self, found: _Found, log_ratio: torch.Tensor, continuous: torch.Tensor
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        center = 0.0 if self.args.log_z == "group" else self.center
        chosen = is_chosen(found.label, continuous, center)
        return reward_ratios(found.rewards, log_ratio, found.log_z, found.label, chosen, continuous, center)

    def _log_z(
        self, rows: Rows, continuous: torch.Tensor, policy: Likelihood, log_partition: LogPartition
    ) -> torch.Tensor:
        if "log_z" in rows:
            return rows["log_z"]
        if self.args.log_z == "column":
            raise ValueError(
                "log_z='column' needs a column log_z, in nats, in every row, but a batch has none. Add the column to "
                "the dataset, or set another log_z."
            )
        return log_partition(continuous, policy.prompt_states)


def _token_ratios(
    losses: RowLosses,
    terms: Terms,
    policy: Likelihood,
    policy_logps: torch.Tensor,
    scored: torch.Tensor,
    chosen: torch.Tensor,
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    entropy: Any = policy.entropy
    mean_logits: Any = policy.mean_logits
    is_top1: Any = policy.is_top1
    return {
        "loss/sft": masked(losses.sft, terms.imitated),
        "loss/unlearning": masked(losses.unlearning, terms.unlearned),
        "logps/chosen": masked(policy_logps, chosen),
        "logps/rejected": masked(policy_logps, ~chosen),
        **token_ratios(entropy, mean_logits, is_top1, scored, chosen),
    }


@torch.no_grad()
def mismatched_sums(
    scorer: Scorer,
    model: Any,
    ref_logps: Callable[[Any], torch.Tensor],
    inputs: Rows,
    real: torch.Tensor,
    image_key: torch.Tensor | None,
    *,
    normalize: bool,
) -> torch.Tensor:
    """`(2,)` sum and number of the log-ratios of this micro-batch's prompts, each with the completion of another row.

    Their mean over all processes estimates KL(π_θ‖π_ref).

    Args:
        ref_logps: computes log π_ref of a batch.
        real, image_key: see `trl_ulma.log_z.mismatched`.
        normalize: whether to divide by the number of completion tokens.
    """
    names = ("input_ids", "attention_mask", "completion_mask")
    text, counts = mismatched({name: inputs[name] for name in names}, real, image_key)
    batch = {**inputs, **text}  # the images stay with their prompts
    log_ratio = scorer(model, batch).logps - ref_logps(batch)
    if normalize:
        log_ratio = log_ratio / batch["completion_mask"][:, 1:].sum(1).clamp(min=1)
    return torch.stack([torch.where(counts, log_ratio, 0.0).sum(), counts.sum().to(log_ratio)])


def refuse_not_finite(
    loss: torch.Tensor, rows: torch.Tensor, losses: torch.Tensor, *, step: int, named: Callable[[list[int]], str]
) -> None:
    """Raise FloatingPointError for a loss of a step that is not finite.

    Args:
        rows: `(B,)` numbers of the rows of the last micro-batch.
        losses: `(B,)` their losses.
        named: returns the numbers of rows as text, with their files and lines.
    """
    numbers = rows[~losses.isfinite()].tolist()
    wrong = f"[{named(numbers)}]" if numbers else "unknown"
    raise FloatingPointError(
        f"The loss of step {step} is {loss.item()}. Rows of the train dataset with a loss that is not finite: {wrong}. "
        "Check these rows, lower the learning rate, or train in fp32."
    )
