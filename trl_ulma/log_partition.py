r"""The choices for log Z(x), the log-partition function. It cancels in pairwise losses, but not in pointwise ones.

The optimum is π* = π_ref·exp(r*/β) / Z(x), so r* = β·(log π*/π_ref + log Z(x)). Below, c = β·log Z is in units of the
reward, and `log_z` is in nats. An estimator gives each row its log Z and observes the rows that are compared with the
reference. It is updated once per optimizer step from sums over all rows of the step, so the update does not depend on
how the rows are split into micro-batches or processes.
"""

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

LOG_Z_CHOICES = ("column", "prior", "running_mean", "batch_kl", "learned", "learned_constant", "group")
# If all compared rows have the same class, these choices would fit them with log Z alone
NEED_CLASSES = ("prior", "learned", "learned_constant")
# The share of its value that the running mean keeps in each step
DECAY = 0.9


class Observed(NamedTuple):
    """What an estimator observes of a micro-batch, each `(B,)`.

    Attributes:
        compared: bool, True for rows whose loss contains the implicit reward. Repeated rows and rows of weight 0 are
            left out.
        log_ratio: log π_θ − log π_ref in nats. NaN if it is unknown.
        slope: ∂ℓ/∂r of the row's loss, including weights.
    """

    compared: torch.Tensor
    log_ratio: torch.Tensor
    slope: torch.Tensor


class LogPartition:
    """log Z as a constant. Also the base class of the choices that change during training.

    Use it if labels are centered at 0 (ratings), or if every prompt has few answers and nothing else is known. The
    paper uses 0.

    Args:
        log_z: the constant in nats.
        device: the device of the rows.

    Example:
        >>> LogPartition(0.5)(torch.tensor([True, False]))
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """

    needs_prompt_states = False

    def __init__(self, log_z: float = 0.0, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.dtype = torch.float32 if self.device.type == "mps" else torch.float64
        # (binary labels, continuous labels): their zero points differ, so each kind has its own log Z
        self.log_z = torch.full((2,), log_z, dtype=self.dtype, device=self.device)
        self._sums: torch.Tensor | None = None

    def __call__(self, continuous: torch.Tensor, prompt_states: torch.Tensor | None = None) -> torch.Tensor:
        """`(B,)` log Z in nats.

        Args:
            continuous: `(B,)` bool, whether the label is continuous.
            prompt_states: `(B, H)` hidden states of the policy before each completion, if `needs_prompt_states`.
        """
        return torch.where(continuous, self.log_z[1], self.log_z[0])

    def set_beta(self, beta: float) -> None:
        """Take over a β that has changed. Choices that know c keep c, and their log Z = c/β changes."""

    def observe(self, rows: Observed, continuous: torch.Tensor, prompt_states: torch.Tensor | None = None) -> None:
        """Add the rows of a micro-batch to the sums of the step."""
        found = self.sums_of(rows, continuous, prompt_states)
        if found is not None:
            self._sums = found if self._sums is None else self._sums + found

    def sums_of(
        self, rows: Observed, continuous: torch.Tensor, prompt_states: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The `(k,)` values of a micro-batch that are summed over the step. None if the choice needs no sums."""
        return None

    def take_sums(self) -> torch.Tensor | None:
        """The sums since the last call. The caller adds them up over processes."""
        sums, self._sums = self._sums, None
        return sums

    def update(self, sums: torch.Tensor, rate: float = 1.0) -> None:
        """Update log Z from the sums of a step.

        Args:
            sums: the sums over all processes.
            rate: the factor of the learning-rate schedule.
        """

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The state that a checkpoint saves. Empty if log Z is constant."""
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Load the state of a checkpoint.

        Raises:
            ValueError: if the state belongs to another choice or model.
        """
        own = self.state_dict()
        found = {name: tuple(value.shape) for name, value in state.items()}
        needed = {name: tuple(value.shape) for name, value in own.items()}
        if found != needed:
            raise ValueError(
                f"The checkpoint's state of log Z is {found or 'empty'}, but this log_z needs {needed or 'none'}. Set "
                "log_z to the value that the checkpoint was trained with."
            )
        for name, value in own.items():
            value.copy_(state[name])


class Prior(LogPartition):
    """log Z that calibrates the start: c is the logit of the mean label (binary), or the mean label (continuous).

    Use it if classes are unbalanced or ratings are not centered, and log Z should not be trained. It removes the offset
    that all prompts share. If no training row has binary labels, or none has continuous ones, that kind gets 0.

    Args:
        label: `(N,)` labels of the compared training rows.
        continuous: `(N,)` bool.
        weight: `(N,)` weights of these rows in the loss.
        beta: β.
        device: the device of the rows.

    Raises:
        ValueError: if all binary labels have the same class.

    Example:
        >>> prior = Prior(np.array([1.0, 1.0, 0.0, 1.0]), np.zeros(4, bool), np.ones(4), beta=0.5)
        >>> round(float(prior.log_z[0]) * 0.5, 4), round(math.log(3), 4)
        (1.0986, 1.0986)
    """

    def __init__(
        self,
        label: np.ndarray,
        continuous: np.ndarray,
        weight: np.ndarray,
        *,
        beta: float,
        device: torch.device | str = "cpu",
    ):
        super().__init__(0.0, device)
        self._c = torch.zeros_like(self.log_z)
        for kind in (0, 1):
            rows = (continuous == bool(kind)) & (weight > 0)
            if not rows.any():
                continue
            mean = float(np.average(label[rows], weights=weight[rows]))
            if not kind and not 0 < mean < 1:
                raise ValueError(
                    f"log_z='prior' needs labels of both classes; the mean label of the compared rows is {mean}. Set "
                    "log_z to a number."
                )
            self._c[kind] = mean if kind else math.log(mean / (1 - mean))
        self.set_beta(beta)

    def set_beta(self, beta: float) -> None:
        """Keep c, which follows from the labels."""
        self.log_z = self._c / beta

    def state_dict(self) -> dict[str, torch.Tensor]:
        """log Z of both kinds of labels."""
        return {"log_z": self.log_z}


class RunningMean(LogPartition):
    """log Z as minus the moving average of the log-ratio of compared rows (the shift of BCO), with a decay of 0.9.

    Use it if classes are balanced and the policy drifts as a whole, for example with long completions. It depends on
    which rows make up a step, but not on how they are split. It is not an estimate of Z.
    """

    def sums_of(
        self, rows: Observed, continuous: torch.Tensor, prompt_states: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The sum and the number of the log-ratios, for each kind of label."""
        kinds = torch.stack([rows.compared & ~continuous, rows.compared & continuous])
        ratios = torch.where(kinds, rows.log_ratio.to(self.dtype), 0.0)
        return torch.cat([ratios.sum(1), kinds.sum(1)])

    def update(self, sums: torch.Tensor, rate: float = 1.0) -> None:
        """Move log Z toward minus the mean log-ratio of the step."""
        total, count = sums.view(2, 2)
        moved = DECAY * self.log_z - (1 - DECAY) * total / count.clamp(min=1)
        self.log_z = torch.where(count > 0, moved, self.log_z)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """log Z of both kinds of labels."""
        return {"log_z": self.log_z}


class BatchKL(LogPartition):
    """log Z as −KL(π_θ‖π_ref), estimated as in KTO: on prompts with completions of other prompts, and clipped at 0.

    Use it to compare with KTO. It costs two additional forward passes. It depends on the split into micro-batches,
    because each micro-batch has its own estimate.
    """

    is_estimated = False

    def set_kl(self, total: torch.Tensor, count: torch.Tensor) -> None:
        """Set the estimate from mismatched rows: `total` nats over `count` rows. If `count` is 0, nothing changes."""
        if count > 0:
            self.is_estimated = True
            self.log_z.fill_(-max(float(total / count), 0.0))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The last estimate, which evaluation uses."""
        return {"log_z": self.log_z}


class Learned(LogPartition):
    r"""log Z as a linear read-out of the prompt's hidden state, trained by the loss: c(x) = w·h(x)/‖h(x)‖ + b.

    h(x) is the policy's hidden state at the token before the completion, detached. Binary and continuous labels each
    have their own b. If every answer to a prompt can appear in the data, the joint minimizer with the policy is
    (π*, log Z), because a normalized policy cannot absorb an offset that all answers of a prompt share. Use it if
    prompts have several answers each. With one answer per prompt, Z is not identified, and only the structure that
    prompts share constrains it.

    Adam trains it with ∂ℓ/∂c = ∂ℓ/∂r, which is σ(r) − z or −2(z − r), averaged over the compared rows. The parameters
    are not part of the trainer's optimizer, because FSDP and DeepSpeed only handle the parameters of the model.

    Args:
        size: H, or 0 for b alone ("learned_constant").
        beta: β.
        learning_rate: the learning rate of Adam, in units of the reward. It follows the trainer's schedule.
        device: the device of the rows.

    Example:
        >>> Learned(0, beta=0.1, learning_rate=0.01)(torch.tensor([False]))
        tensor([0.], dtype=torch.float64)
    """

    def __init__(self, size: int, *, beta: float, learning_rate: float, device: torch.device | str = "cpu"):
        super().__init__(0.0, device)
        self.needs_prompt_states = size > 0
        self.beta = beta
        self.learning_rate = learning_rate
        self.weights = torch.zeros(size + 2, dtype=self.dtype, device=self.device, requires_grad=True)
        self._adam = torch.optim.Adam([self.weights], lr=learning_rate)
        # Adam creates its moments at its first step, but loading a checkpoint needs their shapes before that
        self.weights.grad = torch.zeros_like(self.weights)
        self._adam.step()
        self._adam.state[self.weights]["step"].zero_()

    def set_beta(self, beta: float) -> None:
        """Keep c, which is what the weights compute."""
        self.beta = beta

    def _features(self, continuous: torch.Tensor, prompt_states: torch.Tensor | None) -> torch.Tensor:
        """`(B, H + 2)`: the direction of the hidden state, and the kind of label as two indicators."""
        kinds = torch.stack([~continuous, continuous], 1).to(self.dtype)
        if not self.needs_prompt_states:
            return kinds
        if prompt_states is None:
            raise ValueError("log_z='learned' needs prompt_states, the hidden states before each completion; got None.")
        return torch.cat([torch.nn.functional.normalize(prompt_states.to(self.dtype), dim=1), kinds], 1)

    def __call__(self, continuous: torch.Tensor, prompt_states: torch.Tensor | None = None) -> torch.Tensor:
        """`(B,)` log Z = c/β in nats."""
        return self._features(continuous, prompt_states) @ self.weights.detach() / self.beta

    def sums_of(
        self, rows: Observed, continuous: torch.Tensor, prompt_states: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The sum of the gradient over compared rows, and the number of these rows."""
        slope = torch.where(rows.compared, rows.slope.to(self.dtype), 0.0)
        gradient = slope @ self._features(continuous, prompt_states)
        return torch.cat([gradient, rows.compared.sum()[None].to(self.dtype)])

    def update(self, sums: torch.Tensor, rate: float = 1.0) -> None:
        """Take a step of Adam. Skip it if no row was compared."""
        if sums[-1] > 0:
            self.weights.grad = sums[:-1] / sums[-1]
            self._adam.param_groups[0]["lr"] = self.learning_rate * rate
            self._adam.step()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The weights (w, b of binary labels, b of continuous labels), and Adam's moments."""
        moments: dict[str, Any] = self._adam.state[self.weights]
        return {"weights": self.weights.detach(), **{f"adam.{name}": value for name, value in moments.items()}}


class LogZEstimate(NamedTuple):
    """The estimated `log_z` of each row's prompt in nats, its standard error (infinite for a single answer), and its
    bias, which is negative. Each `(N,)`."""

    log_z: np.ndarray
    standard_error: np.ndarray
    bias: np.ndarray


def estimate_log_z(prompts: Sequence[Hashable], label: Sequence[float], *, beta: float) -> LogZEstimate:
    r"""log Z(x) from several labeled answers per prompt: the log of the mean of exp(label/β) over the prompt's answers.

    It assumes that labels are rewards r*(x, y) of answers drawn from the reference, so Z(x) = E_ref[exp(r*/β)]. For n
    answers with weights e = exp(label/β), the delta method gives the standard error sd(e)/(√n·mean(e)) and the bias
    −var(e)/(2n·mean(e)²). With few answers or a small β, a few answers dominate and the estimate is too low. Use it if
    prompts have a dozen rated answers or more and β is about as large as the spread of the labels. Write the result
    into the column `log_z`.

    Args:
        prompts: `(N,)` prompts, or keys that identify them.
        label: `(N,)`.
        beta: β > 0.

    Raises:
        ValueError: if lengths differ, or if β is not above 0.

    Example:
        >>> estimate_log_z(["a", "a"], [0.0, 1.0], beta=1.0).log_z.round(4)
        array([0.6201, 0.6201])
    """
    if not beta > 0:
        raise ValueError(f"beta must be above 0; got {beta}.")
    scaled = np.asarray(label, dtype=np.float64) / beta
    found = [np.empty(len(scaled)) for _ in range(3)]
    for rows in _rows_of(prompts, len(scaled)):
        top = scaled[rows].max()
        weights = np.exp(scaled[rows] - top)
        n, mean = len(rows), weights.mean()
        relative = weights.var(ddof=1) / mean**2 / n if n > 1 else math.inf
        for into, value in zip(found, (top + math.log(mean), math.sqrt(relative), -relative / 2), strict=True):
            into[rows] = value
    return LogZEstimate(*found)


def quantile_labels(prompts: Sequence[Hashable], label: Sequence[float]) -> np.ndarray:
    r"""`(N,)` labels replaced by their quantile among the prompt's answers, (rank − ½)/n. Ties share their mean rank.

    Under the reference, quantiles are uniform on [0, 1] for every prompt, so Z is known and the same for all prompts
    (`quantile_log_z`). Use it if prompts have a dozen answers or more that were drawn from the reference, if few of
    them are tied, and if only their order is reliable. Train with `label_type="continuous"`.

    Args:
        prompts: `(N,)` prompts, or keys that identify them.
        label: `(N,)`.

    Raises:
        ValueError: if lengths differ.

    Example:
        >>> quantile_labels(["a", "a", "b", "a"], [3.0, 1.0, 9.0, 2.0])
        array([0.83333333, 0.16666667, 0.5       , 0.5       ])
    """
    values = np.asarray(label, dtype=np.float64)
    found = np.empty(len(values))
    for rows in _rows_of(prompts, len(values)):
        _, inverse, counts = np.unique(values[rows], return_inverse=True, return_counts=True)
        found[rows] = (counts.cumsum() - counts / 2)[inverse] / len(rows)
    return found


def quantile_log_z(beta: float) -> float:
    r"""log Z of labels that are uniform on [0, 1] under the reference: log(β·(e^{1/β} − 1)) nats.

    Args:
        beta: β > 0.

    Raises:
        ValueError: if β is not above 0.

    Example:
        >>> round(quantile_log_z(1.0), 6) == round(math.log(math.e - 1), 6)
        True
    """
    if not beta > 0:
        raise ValueError(f"beta must be above 0; got {beta}.")
    return 1 / beta + math.log(beta) + math.log1p(-math.exp(-1 / beta))


def _rows_of(prompts: Sequence[Hashable], count: int) -> list[list[int]]:
    if len(prompts) != count:
        raise ValueError(f"prompts must have as many values as label, {count}; got {len(prompts)}.")
    rows: defaultdict[Hashable, list[int]] = defaultdict(list)
    for row, prompt in enumerate(prompts):
        rows[prompt].append(row)
    return list(rows.values())
