"""Judges applied to models' answers: their agreement with known labels first, then verdicts, rates and differences."""

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

from trl_ulma.evaluation.held_out import Question, known_comparisons
from trl_ulma.evaluation.intervals import Estimate
from trl_ulma.evaluation.judges import Comparison, Judge, Verdict, check_criterion
from trl_ulma.evaluation.rates import counts, difference, mean_points, rates


def is_above_chance(agreement: Estimate | None) -> bool:
    """Whether a judge's agreement with known labels, a tie counted half, is above ½ with its whole interval.

    Example:
        >>> is_above_chance(Estimate(0.7, 0.6, 0.8, 100)), is_above_chance(Estimate(0.7, 0.5, 0.9, 10))
        (True, False)
    """
    return agreement is not None and agreement.low is not None and agreement.low > 0.5


class Judging:
    """Some judges, each with its criteria, and the verdicts that they give.

    Args:
        judges: with different names.
        criteria: to judge by; None is all that a judge knows.
        seed: of the intervals.
        note: is told what a reader of the figures should know.

    Raises:
        ValueError: for a criterion that a judge cannot judge, or two judges of one name.
    """

    def __init__(
        self, judges: Sequence[Judge], criteria: Sequence[str] | None, *, seed: int, note: Callable[[str], None]
    ):
        self.judges = {judge.name: judge for judge in judges}
        if len(self.judges) < len(judges):
            raise ValueError(f"Two judges have one name: {', '.join(judge.name for judge in judges)}.")
        self.pairs = [(judge, criterion) for judge in judges for criterion in (criteria or judge.criteria)]
        for judge, criterion in self.pairs:
            check_criterion(judge, criterion)
        self.agreement: dict[tuple[str, str], Estimate | None] = {}
        self._seed, self._note = seed, note
        self._verdicts: dict[tuple[str, str], dict[str, dict[int, Verdict]]] = {}

    def agree(self, questions: Sequence[Question]) -> None:
        """Have each judge compare the data's chosen answers with the rejected ones, of which the outcome is known."""
        known = known_comparisons(questions)
        for judge, criterion in self.pairs:
            verdicts = judge(known, criterion) if known else []
            self._count(verdicts, f"the data's own answers ({judge.name}, {criterion})")
            self.agreement[judge.name, criterion] = mean_points(verdicts, seed=self._seed)

    def judge(self, run: str, questions: Sequence[Question], answers: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Judge → criterion → `counts`, `rates` and `points` of a run's answers against the data's chosen ones."""
        comparisons = [
            Comparison(question.prompt, answer, question.chosen)
            for question, answer in zip(questions, answers, strict=True)
        ]
        found: dict[str, dict[str, Any]] = {}
        for judge, criterion in self.pairs:
            verdicts = judge(comparisons, criterion)
            self._count(verdicts, f"{run} ({judge.name}, {criterion})")
            rows = [question.row for question in questions]
            of_runs = self._verdicts.setdefault((judge.name, criterion), {})
            of_runs[run] = dict(zip(rows, verdicts, strict=True))
            found.setdefault(judge.name, {})[criterion] = {
                "counts": counts(verdicts),
                "rates": rates(verdicts),
                "points": mean_points(verdicts, seed=self._seed),
            }
        return found

    def differences(self) -> list[dict[str, Any]]:
        """Each two runs' difference in points, paired by prompt, of the judges whose agreement is above chance."""
        return [
            {"judge": judge, "criterion": criterion, "one": one, "other": other, "points": points}
            for (judge, criterion), of_runs in self._verdicts.items()
            if is_above_chance(self.agreement.get((judge, criterion)))
            for one, other in combinations(of_runs, 2)
            if (points := difference(of_runs[one], of_runs[other], seed=self._seed)) is not None
        ]

    def facts(self) -> list[dict[str, Any]]:
        """Of each judge and criterion: what the judge is, and its agreement with the known labels."""
        return [
            {
                "judge": judge.name,
                "criterion": criterion,
                "agreement": self.agreement.get((judge.name, criterion)),
                **judge.facts(),
            }
            for judge, criterion in self.pairs
        ]

    def _count(self, verdicts: Sequence[Verdict], of: str) -> None:
        unparsable = counts(verdicts)["unparsable"]
        if unparsable:
            self._note(
                f"{unparsable} of {len(verdicts)} verdicts on {of} could not be parsed; they are in no rate and no "
                "agreement."
            )
