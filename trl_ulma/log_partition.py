r"""The choices for log Z(x), the partition function that point-wise methods, unlike pair-wise ones, cannot cancel.

The optimum is π* = π_ref·exp(r*/β) / Z(x), so that r* = β·(log π*/π_ref + log Z(x)). Below, c = β·log Z, in units of
the reward; `log_z` is in nats. An estimator gives each row its log Z, watches the rows that are compared, and moves
once an optimiser step, by sums over all rows of the step, so that no split into micro-batches or processes changes it.
"""

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

LOG_Z_CHOICES = ("column", "prior", "running_mean", "batch_kl", "learned", "learned_constant")
# Where compared rows are of one class, these would fit them by log Z alone
NEED_CLASSES = ("prior", "learned", "learned_constant")
# What the running mean keeps of itself in a step
DECAY = 0.9


class Observed(NamedTuple):
    """What a micro-batch shows of its rows, each `(B,)`.

    Attributes:
        compared: bool, the rows whose loss contains the implicit reward, repeated rows left out.
        log_ratio: log π_θ − log π_ref in nats; NaN where it is not known.
        slope: ∂ℓ/∂r of the row's loss, weights included.
    """

    compared: torch.Tensor
    log_ratio: torch.Tensor
    slope: torch.Tensor


class LogPartition:
    """log Z as one number, which stays as it is; the base of the choices that move.

    Take it where labels are centred at 0 (ratings), or where every prompt has few answers and nothing else is known: 0
    is the paper's setting.

    Args:
        log_z: in nats.
        device: of the rows.

    Example:
        >>> LogPartition(0.5)(torch.tensor([True, False]))
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """

    needs_prompt_states = False

    def __init__(self, log_z: float = 0.0, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.dtype = torch.float32 if self.device.type == "mps" else torch.float64
        # (binary labels, continuous labels): their zeros differ, and so do their log Z
        self.log_z = torch.full((2,), log_z, dtype=self.dtype, device=self.device)
        self._sums: torch.Tensor | None = None

    def __call__(self, continuous: torch.Tensor, prompt_states: torch.Tensor | None = None) -> torch.Tensor:
        """`(B,)` log Z in nats.

        Args:
            continuous: `(B,)` bool, whether the label is continuous.
            prompt_states: `(B, H)` hidden states of the policy before each completion, where they are asked for.
        """
        return torch.where(continuous, self.log_z[1], self.log_z[0])

    def observe(self, rows: Observed, continuous: torch.Tensor, prompt_states: torch.Tensor | None = None) -> None:
        """Add a micro-batch's rows to the sums of the step."""
        found = self.sums_of(rows, continuous, prompt_states)
        if found is not None:
            self._sums = found if self._sums is None else self._sums + found

    def sums_of(
        self, rows: Observed, continuous: torch.Tensor, prompt_states: torch.Tensor | None
    ) -> torch.Tensor | None:
        """What of a micro-batch is added up over the step, `(k,)`; None where nothing is."""
        return None

    def take_sums(self) -> torch.Tensor | None:
        """The sums since they were last taken, to be added over processes."""
        sums, self._sums = self._sums, None
        return sums

    def update(self, sums: torch.Tensor, rate: float = 1.0) -> None:
        """Move by a step's sums.

        Args:
            sums: of all processes.
            rate: what the learning-rate schedule multiplies its rate by.
        """

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps; empty where nothing moves."""
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take over the state of a checkpoint.

        Raises:
            ValueError: where it is that of another choice or model.
        """
        own = self.state_dict()
        found = {name: tuple(value.shape) for name, value in state.items()}
        needed = {name: tuple(value.shape) for name, value in own.items()}
        if found != needed:
            raise ValueError(
                f"The checkpoint's state of log Z is {found or 'empty'}, and log_z needs {needed or 'none'}. Set log_z "
                "to what the checkpoint was trained with."
            )
        for name, value in own.items():
            value.copy_(state[name])


class Prior(LogPartition):
    """log Z so that the start is calibrated: c is the logit of the mean label (binary), the mean label (continuous).

    Take it where classes are unbalanced or ratings are not centred, and nothing is to be trained: it takes out what all
    prompts share. A kind of label that no training row has gets 0.

    Args:
        label: `(N,)` labels of the compared training rows.
        continuous: `(N,)` bool.
        weight: `(N,)` their weights in the loss.
        beta: β.
        device: of the rows.

    Raises:
        ValueError: where the labels of a kind are of one class.

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
        for kind in (0, 1):
            rows = (continuous == bool(kind)) & (weight > 0)
            if not rows.any():
                continue
            mean = float(np.average(label[rows], weights=weight[rows]))
            if not kind and not 0 < mean < 1:
                raise ValueError(
                    f"log_z='prior' needs labels of both classes; the compared rows have mean label {mean}."
                )
            self.log_z[kind] = (mean if kind else math.log(mean / (1 - mean))) / beta

    def state_dict(self) -> dict[str, torch.Tensor]:
        """log Z of both kinds of labels."""
        return {"log_z": self.log_z}


class RunningMean(LogPartition):
    """log Z as minus the moving average of compared rows' log-ratio (the shift of BCO), 0.9 of which stays in a step.

    Take it where classes are balanced and the policy drifts as a whole, as with long completions. It depends on which
    rows make up a step, though not on how they are split; it is no estimate of Z.
    """

    def sums_of(
        self, rows: Observed, continuous: torch.Tensor, prompt_states: torch.Tensor | None
    ) -> torch.Tensor | None:
        """(sum, number) of the log-ratios, for each kind of label."""
        kinds = torch.stack([rows.compared & ~continuous, rows.compared & continuous])
        ratios = torch.where(kinds, rows.log_ratio.to(self.dtype), 0.0)
        return torch.cat([ratios.sum(1), kinds.sum(1)])

    def update(self, sums: torch.Tensor, rate: float = 1.0) -> None:
        """Move towards minus the step's mean."""
        total, count = sums.view(2, 2)
        moved = DECAY * self.log_z - (1 - DECAY) * total / count.clamp(min=1)
        self.log_z = torch.where(count > 0, moved, self.log_z)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """log Z of both kinds of labels."""
        return {"log_z": self.log_z}


class BatchKL(LogPartition):
    """log Z as −KL(π_θ‖π_ref), estimated on prompts with other prompts' completions and cut at 0, as KTO does.

    Take it to compare with KTO. It costs two more forwards, and depends on the micro-batches: the estimate is made
    anew for each.
    """

    def set_kl(self, total: torch.Tensor, count: torch.Tensor) -> None:
        """Take the mean log-ratio of mismatched rows, `total` nats over `count` rows; none leaves it as it was."""
        if count > 0:
            self.log_z.fill_(-max(float(total / count), 0.0))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The last estimate, which evaluation uses."""
        return {"log_z": self.log_z}


class Learned(LogPartition):
    r"""log Z as a read-out of the prompt, trained by the loss itself: c(x) = w·h(x)/‖h(x)‖ + b.

    h(x) is the policy's hidden state at the token before the completion, detached; binary and continuous labels have a
    b each. Where every answer of a prompt can appear in the data, the joint minimiser with the policy is (π*, log Z),
    since a normalised policy cannot take up what all answers of a prompt share. Take it where prompts have several
    answers each; with one answer a prompt Z is not identified, and only what prompts share holds it.

    Trained with Adam, by ∂ℓ/∂c = ∂ℓ/∂r, whose mean over the compared rows is σ(r) − z or −2(z − r). It is the trainer's
    own, and not in its optimiser, since what shards a model knows the model's parameters only.

    Args:
        size: H, or 0 for b alone ("learned_constant").
        beta: β.
        learning_rate: of Adam, in units of the reward; follows the trainer's schedule.
        device: of the rows.

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
        # Adam makes its moments at its first step; a checkpoint must know their shapes before
        self.weights.grad = torch.zeros_like(self.weights)
        self._adam.step()
        self._adam.state[self.weights]["step"].zero_()

    def _features(self, continuous: torch.Tensor, prompt_states: torch.Tensor | None) -> torch.Tensor:
        """`(B, H + 2)`: the state's direction, and which kind of label the row has."""
        kinds = torch.stack([~continuous, continuous], 1).to(self.dtype)
        if not self.needs_prompt_states:
            return kinds
        if prompt_states is None:
            raise ValueError("log_z='learned' needs prompt_states, the hidden states before each completion.")
        return torch.cat([torch.nn.functional.normalize(prompt_states.to(self.dtype), dim=1), kinds], 1)

    def __call__(self, continuous: torch.Tensor, prompt_states: torch.Tensor | None = None) -> torch.Tensor:
        """`(B,)` log Z = c/β in nats."""
        return self._features(continuous, prompt_states) @ self.weights.detach() / self.beta

    def sums_of(
        self, rows: Observed, continuous: torch.Tensor, prompt_states: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The gradient's sum over compared rows, and their number."""
        slope = torch.where(rows.compared, rows.slope.to(self.dtype), 0.0)
        gradient = slope @ self._features(continuous, prompt_states)
        return torch.cat([gradient, rows.compared.sum()[None].to(self.dtype)])

    def update(self, sums: torch.Tensor, rate: float = 1.0) -> None:
        """A step of Adam; none where no row was compared."""
        if sums[-1] > 0:
            self.weights.grad = sums[:-1] / sums[-1]
            self._adam.param_groups[0]["lr"] = self.learning_rate * rate
            self._adam.step()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The read-out, (w, b of binary labels, b of continuous labels), and Adam's moments."""
        moments: dict[str, Any] = self._adam.state[self.weights]
        return {"weights": self.weights.detach(), **{f"adam.{name}": value for name, value in moments.items()}}


class LogZEstimate(NamedTuple):
    """`log_z` of each row's prompt, nats; its standard error (infinite of a single answer) and its bias, which is
    downward. Each `(N,)`."""

    log_z: np.ndarray
    standard_error: np.ndarray
    bias: np.ndarray


def estimate_log_z(prompts: Sequence[Hashable], label: Sequence[float], *, beta: float) -> LogZEstimate:
    r"""log Z(x) from several labelled answers a prompt: log of the mean of exp(label/β) over the prompt's answers.

    For labels that are rewards r*(x, y), of answers drawn from the reference: Z(x) = E_ref[exp(r*/β)]. Of n answers
    with weights e = exp(label/β), the standard error is sd(e)/(√n·mean(e)) and the bias −var(e)/(2n·mean(e)²) (the
    delta method): with few answers, or a small β, a few of them decide, and the estimate is low. Take it where prompts
    have a dozen rated answers or more and β is of the size of the labels' spread; write it as the column `log_z`.

    Args:
        prompts: `(N,)`, what tells prompts apart.
        label: `(N,)`.
        beta: β > 0.

    Raises:
        ValueError: on lengths that differ, or β that is not above 0.

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
    r"""`(N,)` labels replaced by their quantile among their prompt's answers, (rank − ½)/n, ties at their mean rank.

    Under the reference a quantile is uniform on [0, 1] at every prompt, so that Z is known and the same for all:
    `quantile_log_z`. Take it where prompts have a dozen answers or more, drawn from the reference, few of them tied,
    and only their order is to be trusted; with `label_type="continuous"`.

    Args:
        prompts: `(N,)`, what tells prompts apart.
        label: `(N,)`.

    Raises:
        ValueError: on lengths that differ.

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
        ValueError: for β that is not above 0.

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
