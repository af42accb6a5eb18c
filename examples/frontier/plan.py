"""Which cells there are, in the order in which they are measured: the most informative come first."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain

from contenders import METHODS
from regimes import DEMONSTRATIONS

SEEDS = 3
# What settles most: ratings, pairs and thumbs at equal KL, or ULMA beside each half of what it learns from. Three seeds
# did not tell them apart in the first part
FIRST = ("ratings-prior", "dpo", "thumbs-prior")
FIRST_OF_DEMONSTRATIONS = ("ulma-thumbs-beta", "sft", "thumbs-prior")
FIRST_SEEDS = 5
# Then method after method, these first
_NEXT = ("kto", "ulma-ratings-beta", "sft", "bco", "ulma-thumbs-beta", "qrpo")
# Each ends beyond 0.5 nats, most beyond 1. SFT has shares of the steps instead; all of them end at 8 nats
_BETAS: dict[str, tuple[float | None, ...]] = {"kto": (0.2,), "qrpo": (0.01,), "sft": (0.25, None)}
# The first comparison has a second β. Its points lie on the line through the first β's and the reference, in the root
# of KL: other comparisons do without
_SECOND_BETA = {"ratings-prior": 0.3, "dpo": 0.2, "thumbs-prior": 0.2}
# (reward, regime): the parts that are reported one by one, each only when it is whole
PARTS = (
    ("sentiment", "ratings"),
    ("sentiment", "demonstrations"),
    ("length", "ratings"),
    ("sentiment", "offset"),
    ("sentiment", "one thumb"),
    ("sentiment", "nine likes"),
    ("sentiment", "few demonstrations"),
    ("sentiment", "fair demonstrations"),
)


@dataclass(frozen=True)
class Cell:
    """One training: a record has these fields, and what was measured."""

    reward: str
    regime: str
    method: str
    beta: float | None
    seed: int

    @property
    def name(self) -> str:
        """The record's file, without its ending."""
        beta = "none" if self.beta is None else f"{self.beta:g}"
        return "_".join([self.reward, self.regime.replace(" ", "-"), self.method, beta, str(self.seed)])

    def fields(self) -> dict[str, str | float | int | None]:
        """The fields by name."""
        return asdict(self)


def methods(regime: str) -> list[str]:
    """The methods that can learn from a regime's feedback, the first ones first."""
    rated = regime in ("ratings", "offset")
    able = [
        name
        for name, each in METHODS.items()
        if (rated or not each.continuous)
        and not (each.kind == "dpo" and regime == "one thumb")
        and (each.rounds == 1 or regime == "ratings")
    ]
    order = list(dict.fromkeys((*_begin(regime), *_NEXT)))
    return sorted(able, key=lambda name: order.index(name) if name in order else len(order))


def first(regime: str) -> list[str]:
    """The methods that a part begins with."""
    return [each for each in methods(regime) if each in _begin(regime)]


def _begin(regime: str) -> tuple[str, ...]:
    return FIRST_OF_DEMONSTRATIONS if regime in DEMONSTRATIONS else FIRST


def seeds_of(reward: str, regime: str, method: str) -> range:
    """The seeds of a method in a part."""
    return range(FIRST_SEEDS if (reward, regime) == PARTS[0] and method in FIRST else SEEDS)


def betas_of(reward: str, regime: str, method: str) -> tuple[float | None, ...]:
    """The β of a method in a part, the largest first."""
    betas = _BETAS.get(method, (0.1,))
    return (_SECOND_BETA[method], *betas) if (reward, regime) == PARTS[0] and method in FIRST else betas


def part(reward: str, regime: str) -> Iterator[Cell]:
    """The cells of a part: those of its first methods, then method after method."""
    begin = first(regime)
    yield from _tier(reward, regime, begin)
    for method in methods(regime):
        if method not in begin:
            yield from _tier(reward, regime, [method])


def _tier(reward: str, regime: str, tier: list[str]) -> Iterator[Cell]:
    betas = {method: betas_of(reward, regime, method)[::-1] for method in tier}
    for place in range(max(map(len, betas.values()))):
        for seed in seeds_of(reward, regime, tier[0]):
            for method in tier:
                yield from (Cell(reward, regime, method, beta, seed) for beta in betas[method][place : place + 1])


def cells() -> Iterator[Cell]:
    """All cells: the first methods of every part, then the others, part after part. Rounds come early."""
    tiers = [_tier(reward, regime, first(regime)) for reward, regime in PARTS]
    rest = (part(reward, regime) for reward, regime in PARTS)
    yield from dict.fromkeys(chain(*tiers[:2], _tier(*PARTS[0], ["rounds"]), *tiers[2:], *rest))
