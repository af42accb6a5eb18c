"""Label transforms: from the scale of the labels in the data to the scale that is learned, and back."""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from trl_ulma.labels.rater_offsets import rater_name, rater_offsets, unknown_raters

# name: (its optional numbers, its formula)
TRANSFORMS = {
    "center": ("the mean", "z − mean"),
    "standardize": ("mean and standard deviation", "(z − mean) / standard deviation"),
    "min_max": ("least and greatest", "(z − least) / (greatest − least)"),
    "quantile": ("", "share of training labels below z, plus half the share equal to z: in (0, 1)"),
    "prompt_quantile": ("", "the same, among the labels of the row's own prompt in its own dataset"),
    "center_raters": ("", "z − offset of the row's rater, the column `rater`, see `rater_offsets`"),
    "lower_is_better": ("greatest", "greatest − z, where greatest is 1 for binary labels and 0 for continuous ones"),
    "threshold": ("least good", "1 where z ≥ least good, else 0"),
    "votes": (
        "a and b",
        "(z + a) / (trials + a + b): z is votes for, the column `trials` votes cast; a = b = 1",
    ),
}
# British spellings, which older settings and saved models may contain
_BRITISH = {"centre": "center", "standardise": "standardize", "centre_raters": "center_raters"}
_COUNTS = {"center": 1, "standardize": 2, "min_max": 2, "lower_is_better": 1, "threshold": 1, "votes": 2}
_ALWAYS_GIVEN = ("threshold",)
# What a step reads of each row besides its label
_READS = {"votes": "trials", "prompt_quantile": "prompts", "center_raters": "raters"}
# The numbers of these are too many to be shown, and cannot be given
_FITTED_ONLY = ("quantile", "center_raters")
# After these, labels are still those that a rater gave
_BEFORE_RATERS = ("lower_is_better", "votes")
# Their results lie in [0, 1]
_IN_UNIT = ("min_max", "quantile", "prompt_quantile", "threshold", "votes")
# These cannot be inverted: `invert` stops at their scale
_ONE_WAY = ("prompt_quantile", "threshold", "votes")
# Why these make all labels equal, and what to do
_ALL_EQUAL = {
    "prompt_quantile": "no prompt has answers with different labels. Use quantile, or leave it out.",
    "center_raters": "no rater gave different labels. Leave it out.",
}
# Number of points kept of a distribution that has more distinct labels
_KNOTS = 1000


def reaches(label: Any, threshold: float) -> Any:
    """Return whether labels are at or above a threshold, as far as float32 and transforms keep their decimals.

    Example:
        >>> reaches(1 - 0.9, 0.1), reaches(float(np.float32(0.7)), 0.7), reaches(0.69, 0.7)
        (True, True, False)
    """
    return label >= threshold - 1e-6 * abs(threshold) - 1e-9


@dataclass(frozen=True)
class Step:
    """One transform. `numbers` are its arguments, given or fitted; None before fitting.

    The numbers of "quantile" are k labels in ascending order, followed by their k quantiles. Those of "center_raters"
    are the offsets of `raters`, which are empty for other steps.
    """

    name: str
    numbers: tuple[float, ...] | None
    raters: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.name in _FITTED_ONLY or not self.numbers:
            return self.name
        return f"{self.name}:{','.join(f'{number:g}' for number in self.numbers)}"

    def fit(self, labels: np.ndarray, beside: Mapping[str, Any]) -> Self:
        """Return this step with numbers fitted on its `(N,)` input labels, or itself if it has numbers.

        Args:
            labels: the labels.
            beside: `(N,)` values of each entry of `_READS`, or None, as in `LabelTransform.fit`.
        """
        if self.numbers is not None:
            return self
        if self.name != "center" and labels.min() == labels.max():
            raise ValueError(
                f"label_transform: {self.name} needs labels that differ, but all {len(labels)} labels that it is "
                f"given are {labels[0]:g}. Leave it out."
            )
        if self.name == "center_raters":
            offsets = rater_offsets(labels, self._read(beside))
            return replace(self, numbers=tuple(offsets.values()), raters=tuple(offsets))
        if self.name == "center":
            numbers = (labels.mean(),)
        elif self.name == "standardize":
            numbers = (labels.mean(), labels.std())
        elif self.name == "min_max":
            numbers = (labels.min(), labels.max())
        else:
            values, counts = np.unique(labels, return_counts=True)
            quantiles = _mid_ranks(counts) / len(labels)
            kept = np.unique(np.linspace(0, len(values) - 1, min(len(values), _KNOTS)).round().astype(int))
            numbers = (*values[kept], *quantiles[kept])
        return replace(self, numbers=tuple(map(float, numbers)))

    def apply(self, labels: np.ndarray, beside: Mapping[str, Any]) -> np.ndarray:
        """Return `(N,)` labels after this step. The arguments are those of `fit`."""
        if self.numbers is None:
            raise ValueError(f"label_transform: {self.name} has not been fitted.")
        first, second = (*self.numbers, 0.0, 0.0)[:2]
        match self.name:
            case "center":
                return labels - first
            case "standardize":
                return (labels - first) / second
            case "min_max":
                return (labels - first) / (second - first)
            case "quantile":
                values, quantiles = np.split(np.array(self.numbers), 2)
                return np.interp(labels, values, quantiles)
            case "prompt_quantile":
                return _quantiles_within(labels, self._read(beside))
            case "center_raters":
                return labels - self._offsets(self._read(beside))
            case "lower_is_better":
                return first - labels
            case "threshold":
                return np.asarray(reaches(labels, first), dtype=np.float64)
            case _:
                return (labels + first) / (self._read(beside) + first + second)

    def _offsets(self, raters: Sequence[Any]) -> np.ndarray:
        """`(N,)` offsets of "center_raters". Those of unknown raters are 0."""
        offsets = dict(zip(self.raters, self.numbers or (), strict=True))
        return np.array([offsets.get(rater_name(rater), 0.0) for rater in raters])

    def _read(self, beside: Mapping[str, Any]) -> Any:
        what = _READS[self.name]
        if beside.get(what) is None:
            raise ValueError(f"label_transform: {self.name} needs the rows' {what}.")
        return beside[what]

    def invert(self, labels: np.ndarray, raters: Sequence[Any] | None = None) -> np.ndarray:
        """Return the `(N,)` labels before this step, given the labels after it, see `LabelTransform.invert`."""
        first, second = (*(self.numbers or ()), 0.0, 0.0)[:2]
        match self.name:
            case "center":
                return labels + first
            case "standardize":
                return labels * second + first
            case "min_max":
                return labels * (second - first) + first
            case "lower_is_better":
                return first - labels
            case "center_raters":
                return labels if raters is None else labels + self._offsets(raters)
            case _:
                values, quantiles = np.split(np.array(self.numbers), 2)
                return np.interp(labels, quantiles, values)


@dataclass(frozen=True)
class LabelTransform:
    """A chain of transforms, from the labels in the data to the labels that are learned.

    `parse_transform` makes it. It is fitted on the training set and saved as JSON beside the weights, and applied to
    all rows that are evaluated or scored.

    Example:
        >>> import numpy as np
        >>> transform = parse_transform("lower_is_better,center", "continuous").fit(np.array([0.0, 0.0, 3.0]))
        >>> str(transform), transform.apply(np.array([0.0, 4.0])), transform.invert(np.array([1.0]))
        ('lower_is_better:0,center:-1', array([ 1., -3.]), array([0.]))
    """

    steps: tuple[Step, ...]

    def __str__(self) -> str:
        return ",".join(map(str, self.steps))

    @property
    def is_fitted(self) -> bool:
        """Whether every step has its numbers."""
        return all(step.numbers is not None for step in self.steps)

    @property
    def reads(self) -> frozenset[str]:
        """What the steps read of each row besides its label: "trials", "prompts" (all rows must be known), "raters".

        Example:
            >>> parse_transform("center_raters,standardize", "continuous").reads
            frozenset({'raters'})
        """
        return frozenset(_READS[step.name] for step in self.steps if step.name in _READS)

    @property
    def offsets(self) -> dict[str, float]:
        """The offset of each rater of the training, which "center_raters" subtracts. Empty without this step."""
        return {
            rater: offset
            for step in self.steps
            for rater, offset in zip(step.raters, step.numbers or (), strict=step.name == "center_raters")
        }

    @property
    def ends(self) -> tuple[float, float] | None:
        """The least and the greatest label that are told from those beyond, on the scale of `own_scale`. None if there
        is no such limit; "quantile" has one, because it reads labels beyond those of the training set as its ends.
        After "center_raters", a label of any rater of the training set is beyond these limits if it is told.

        Example:
            >>> import numpy as np
            >>> fitted = parse_transform("lower_is_better,quantile", "continuous").fit(np.array([1.0, 2.0, 4.0]))
            >>> fitted.ends, fitted.apply(np.array([4.0, 9.0]))
            ((1.0, 4.0), array([0.16666667, 0.16666667]))
        """
        back = self.steps[self._way_back() :]
        for number, step in enumerate(back):
            if step.name == "quantile":
                ends = np.array(step.numbers)[[0, len(step.numbers or ()) // 2 - 1]]
                for before in reversed(back[:number]):
                    ends = np.sort(before.invert(ends))
                    if before.name == "center_raters":
                        offsets = before.numbers or ()
                        ends += np.array([min(0.0, *offsets), max(0.0, *offsets)])
                return float(ends.min()), float(ends.max())
        return None

    def own_scale(
        self,
        labels: np.ndarray,
        trials: np.ndarray | None = None,
        prompts: Sequence[Any] | None = None,
        raters: Sequence[Any] | None = None,
    ) -> np.ndarray:
        """`(N,)` labels on the scale that `invert` returns, of labels as rows carry them; arguments as in `fit`.

        These are the labels themselves, if there is a way back to them.

        Example:
            >>> import numpy as np
            >>> parse_transform("standardize:3,1", "continuous").own_scale(np.array([5.0]))
            array([5.])
        """
        return LabelTransform(self.steps[: self._way_back()]).apply(labels, trials, prompts, raters)

    def _way_back(self) -> int:
        """The number of the first step that `invert` can go back through."""
        return max((number for number, step in enumerate(self.steps, 1) if step.name in _ONE_WAY), default=0)

    def fit(
        self,
        labels: np.ndarray,
        trials: np.ndarray | None = None,
        prompts: Sequence[Any] | None = None,
        raters: Sequence[Any] | None = None,
    ) -> "LabelTransform":
        """Return this transform with all numbers, each step fitted on the output of the steps before it.

        Args:
            labels: `(N,)` labels in the data. Each row counts once, whatever its weight.
            trials: `(N,)` numbers of votes cast, for "votes".
            prompts: `(N,)` keys of the prompts, for "prompt_quantile".
            raters: `(N,)` names or whole numbers of the raters, None or "" if unknown, for "center_raters".

        Raises:
            ValueError: if labels or raters that must differ are all equal.
        """
        labels = np.asarray(labels, dtype=np.float64)
        beside = {"trials": trials, "prompts": prompts, "raters": raters}
        fitted = []
        for step in self.steps:
            step = step.fit(labels, beside)
            labels = step.apply(labels, beside)
            if step.name in _ALL_EQUAL and np.ptp(labels) <= 1e-9 * max(1.0, abs(labels[0])):
                raise ValueError(
                    f"label_transform: {step.name} makes all {len(labels)} labels {labels[0]:g}, because "
                    f"{_ALL_EQUAL[step.name]}"
                )
            fitted.append(step)
        return LabelTransform(tuple(fitted))

    def apply(
        self,
        labels: np.ndarray,
        trials: np.ndarray | None = None,
        prompts: Sequence[Any] | None = None,
        raters: Sequence[Any] | None = None,
    ) -> np.ndarray:
        """Return the `(N,)` labels to learn, given the labels in the data. The arguments are those of `fit`.

        Raters that the training set did not have are average ones, and so are unknown raters.

        Example:
            >>> labels, raters = np.array([1.0, 1.0, 2.0, 4.0, 4.0, 5.0]), ["Tom"] * 3 + ["Ann"] * 3
            >>> transform = parse_transform("center_raters", "continuous").fit(labels, raters=raters)
            >>> transform.apply(np.array([3.0, 3.0, 3.0]), raters=["Tom", "Ann", "Zoe"]).round(2)
            array([4.46, 1.54, 3.  ])
        """
        labels = np.asarray(labels, dtype=np.float64)
        beside = {"trials": trials, "prompts": prompts, "raters": raters}
        for step in self.steps:
            labels = step.apply(labels, beside)
        return labels

    def unknown_raters(self, raters: Sequence[str] | None, where: str) -> str | None:
        """What to say of rows whose rater the training set did not have, see `rater_offsets.unknown_raters`."""
        return None if raters is None else unknown_raters(raters, self.offsets, where)

    def invert(self, labels: np.ndarray, raters: Sequence[Any] | None = None) -> np.ndarray:
        """Return `(N,)` labels on the scale of the data, given labels that are learned.

        After "center_raters", these are the labels that `(N,)` raters would give, or without `raters` an average rater.

        Three steps cannot be inverted. The result is then on the scale of that step: 1 means "at or above the
        threshold" for "threshold", a share of votes for "votes" (the number of votes is unknown), and a rank among the
        prompt's answers for "prompt_quantile".

        Example:
            >>> import numpy as np
            >>> parse_transform("min_max:1,5", "binary").invert(np.array([0.0, 0.5]))
            array([1., 3.])
            >>> parse_transform("votes:1,1,lower_is_better", "binary").invert(np.array([0.25]))
            array([0.75])
        """
        labels = np.asarray(labels, dtype=np.float64)
        for step in reversed(self.steps[self._way_back() :]):
            labels = step.invert(labels, raters)
        return labels

    def to_json(self) -> list[dict[str, Any]]:
        """Return plain lists, names and numbers, which `from_json` reads.

        Example:
            >>> parse_transform("center:3", "continuous").to_json()
            [{'name': 'center', 'numbers': [3.0]}]
        """
        return [
            {"name": step.name, "numbers": list(step.numbers or ())}
            | ({"raters": list(step.raters)} if step.name == "center_raters" else {})
            for step in self.steps
        ]

    @classmethod
    def from_json(cls, steps: Sequence[Mapping[str, Any]]) -> Self:
        """Return the fitted transform that `to_json` wrote.

        Raises:
            ValueError: for an unknown step, or a wrong number of numbers.
        """
        made = []
        for step in steps:
            named = str(step["name"])
            name = _BRITISH.get(named, named)
            count = _COUNTS.get(name, 0)
            found = len(step["numbers"])
            right = found >= 4 and found % 2 == 0 if name == "quantile" else found == count
            raters: Sequence[str] = ()
            if name == "center_raters":
                raters = step["raters"]
                right = found == len(set(raters)) == len(raters) > 0 and all(isinstance(each, str) for each in raters)
            made.append(Step(name, tuple(map(float, step["numbers"])), tuple(raters)))
            if name not in TRANSFORMS or not right:
                raise ValueError(f"{dict(step)} is no label transform. The known ones are {_known()}.")
        return cls(tuple(made))


def parse_transform(spec: str, label_type: str) -> LabelTransform:
    """Return the chain of transforms that a setting names. Steps without numbers are fitted later.

    Commas separate the steps. Numbers follow the name of a step after a colon, also separated by commas:
    "lower_is_better,standardize", "threshold:0.5", "votes:1,1,lower_is_better". `TRANSFORMS` lists the steps.

    Args:
        spec: the setting.
        label_type: type of the labels after the transform, "binary" or "continuous".

    Raises:
        ValueError: for a wrong name or number, or steps that do not fit each other or the label type.

    Example:
        >>> [step.name for step in parse_transform("min_max:0,4,lower_is_better", "binary").steps]
        ['min_max', 'lower_is_better']
    """
    if not isinstance(spec, str):
        raise ValueError(f"label_transform must be text such as 'lower_is_better,standardize'; got {spec!r}.")
    found: list[tuple[str, list[float]]] = []
    for piece in spec.split(","):
        name, colon, argument = (part.strip() for part in piece.partition(":"))
        name = _BRITISH.get(name, name)
        if not colon and found and found[-1][1] and _number(name) is not None:
            argument = name  # another number for the step before
        elif name not in TRANSFORMS:
            near = difflib.get_close_matches(name, TRANSFORMS, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(f"label_transform={spec!r}: {name!r} is not a transform; known are {_known()}.{hint}")
        else:
            found.append((name, []))
        if colon or argument:
            number = _number(argument)
            if number is None:
                raise ValueError(f"label_transform={spec!r}: {argument!r} is not a number, which {found[-1][0]} needs.")
            found[-1][1].append(number)
    steps = tuple(_step(name, numbers, label_type, spec) for name, numbers in found)
    _check_order([step.name for step in steps], label_type, spec)
    return LabelTransform(steps)


def _step(name: str, numbers: list[float], label_type: str, spec: str) -> Step:
    count = _COUNTS.get(name, 0)
    if len(numbers) != count and (numbers or name in _ALWAYS_GIVEN):
        given = f"{name}:{','.join(f'{number:g}' for number in numbers)}" if numbers else name
        takes = f"takes {TRANSFORMS[name][0]}" if count else "takes no numbers"
        raise ValueError(f"label_transform={spec!r}: {given} has {len(numbers)} numbers; {name} {takes}.")
    if name == "standardize" and numbers and not numbers[1] > 0:
        raise ValueError(f"label_transform={spec!r}: the standard deviation must be above 0; got {numbers[1]:g}.")
    if name == "min_max" and numbers and not numbers[0] < numbers[1]:
        raise ValueError(
            f"label_transform={spec!r}: the least label must be below the greatest; got {numbers[0]:g} and "
            f"{numbers[1]:g}."
        )
    if name == "votes" and numbers and not (min(numbers) >= 0 and sum(numbers) > 0):
        raise ValueError(
            f"label_transform={spec!r}: a and b of the Beta prior must be 0 or above, and one of them above 0; got "
            f"{numbers[0]:g} and {numbers[1]:g}."
        )
    fixed = {"lower_is_better": (float(label_type == "binary"),), "votes": (1.0, 1.0), "prompt_quantile": ()}
    return Step(name, tuple(numbers) if numbers else fixed.get(name))


def with_centered_raters(spec: str | None) -> str:
    """The setting with the step "center_raters" at its place.

    Example:
        >>> with_centered_raters(None), with_centered_raters("lower_is_better:4,standardize")
        ('center_raters,standardize', 'lower_is_better:4,center_raters,standardize')
    """
    pieces = [piece.strip() for piece in (spec or "standardize").split(",")]
    place = 0
    while place < len(pieces) and (
        pieces[place].partition(":")[0] in _BEFORE_RATERS or (place and _number(pieces[place]) is not None)
    ):
        place += 1
    return ",".join([*pieces[:place], "center_raters", *pieces[place:]])


def _check_order(names: list[str], label_type: str, spec: str) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ValueError(f"label_transform={spec!r} has {twice} twice. Keep one.")
    if "votes" in names[1:]:
        raise ValueError(f"label_transform={spec!r}: votes reads the vote counts of the rows. Put it first.")
    if "center_raters" in names:
        others = [name for name in names[: names.index("center_raters")] if name not in _BEFORE_RATERS]
        if others:
            raise ValueError(
                f"label_transform={spec!r}: center_raters reads labels as raters gave them, not after {others[0]}. Put "
                f"it first; only {' and '.join(_BEFORE_RATERS)} may be before it."
            )
    if "threshold" in names and "lower_is_better" in names[: names.index("threshold")]:
        raise ValueError(
            f"label_transform={spec!r}: it is unclear whether the threshold is meant before or after lower_is_better "
            "turns the labels. Put threshold first: it then reads the labels in the data."
        )
    makes = next((name for name in reversed(names) if name != "lower_is_better"), None)
    if label_type == "continuous" and makes == "threshold":
        raise ValueError(f"label_transform={spec!r}: threshold makes labels 0 and 1. Set label_type='binary'.")
    if label_type == "binary" and makes is not None and makes not in _IN_UNIT:
        raise ValueError(
            f"label_transform={spec!r}: {makes} makes labels outside [0, 1]. Set label_type='continuous', or use one "
            f"of {', '.join(_IN_UNIT)}."
        )


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _known() -> str:
    return ", ".join(f"{name}[:{numbers}]" if numbers else name for name, (numbers, _) in TRANSFORMS.items())


def _mid_ranks(counts: np.ndarray) -> np.ndarray:
    """Return, for each distinct label, the number of labels below it plus half the number equal to it."""
    return counts.cumsum() - counts / 2


def _quantiles_within(labels: np.ndarray, prompts: Sequence[Any]) -> np.ndarray:
    """Return the `(N,)` quantile of each label among the labels of the same prompt."""
    number: dict[Any, int] = {}
    group = np.array([number.setdefault(prompt, len(number)) for prompt in prompts])
    pairs, which, counts = np.unique(np.stack([group, labels]), axis=1, return_inverse=True, return_counts=True)
    of_pair = pairs[0].astype(int)
    size = np.bincount(group)
    before = size.cumsum() - size
    return ((_mid_ranks(counts) - before[of_pair]) / size[of_pair])[which.ravel()]
