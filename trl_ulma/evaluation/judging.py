"""Judges applied to models' answers: their agreement with known labels first, then verdicts, rates and differences."""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

from trl_ulma.evaluation.held_out import Question, known_comparisons
from trl_ulma.evaluation.intervals import Estimate
from trl_ulma.evaluation.judges import Comparison, Judge, Verdict, check_criterion
from trl_ulma.evaluation.llm_judge import LLMJudge, Plan
from trl_ulma.evaluation.rates import POINTS, counts, difference, mean_points, rates
from trl_ulma.evaluation.refusals import Why

# What a reader can do about comparisons that are not judged
_REMEDIES = {
    Why.CUT: "raise --judge_max_tokens: a model that reasons needs thousands",
    Why.FAILED: "run the same command again",
    Why.NOT_ASKED: "raise --max_requests, or run the same command again, which asks only what is missing",
    Why.FILTERED: "ask again with --retry_refused, or take a judge without such a filter",
    Why.TOO_LONG: "take a judge that reads more, or rows with shorter texts",
    Why.REFUSED: "ask again with --retry_refused",
    Why.UNPARSABLE: "take a judge that follows instructions",
}


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

    def plan(self, questions: Sequence[Question], runs: int) -> dict[str, Plan]:
        """What each judge behind a server will cost at most, before the first request.

        Args:
            questions: as for `judge`.
            runs: how many models' answers there will be; each is taken to be as long as the chosen one.
        """
        known = known_comparisons(questions)
        answers = [Comparison(each.prompt, f"{each.chosen}.", each.chosen) for each in questions]
        found: dict[str, Plan] = {}
        for judge, criterion in self.pairs:
            if isinstance(judge, LLMJudge):
                own = judge.plan(answers, criterion)
                of_runs = Plan(2 * len(answers) * runs, 0, own.tokens * runs)
                found[judge.name] = found.get(judge.name, Plan()) + judge.plan(known, criterion) + of_runs
        return found

    def agree(self, questions: Sequence[Question]) -> None:
        """Have each judge compare the data's chosen answers with the rejected ones, of which the outcome is known."""
        known = known_comparisons(questions)
        for judge, criterion in self.pairs:
            verdicts = judge(known, criterion) if known else []
            self._unjudged(judge, criterion, known, verdicts, "the data's own answers")
            self.agreement[judge.name, criterion] = mean_points(verdicts, seed=self._seed)

    def judge(
        self, run: str, questions: Sequence[Question], answers: Sequence[str | None]
    ) -> dict[str, dict[str, Any]]:
        """Judge → criterion → what is found of a run's answers against the data's chosen ones.

        Args:
            run: the model's name.
            questions: `(N,)`.
            answers: `(N,)`; None where the model's server refused to answer.

        Returns:
            `counts`, `rates` and `points` of the verdicts, and `unjudged`: of a judge that is asked in both orders, why
            replies are missing, by the place in which it was shown the run's answer.
        """
        there = [i for i, answer in enumerate(answers) if answer is not None]
        comparisons = [Comparison(questions[i].prompt, str(answers[i]), questions[i].chosen) for i in there]
        rows = [question.row for question in questions]
        found: dict[str, dict[str, Any]] = {}
        for judge, criterion in self.pairs:
            verdicts = [Verdict.REFUSED] * len(questions)
            for i, verdict in zip(there, judge(comparisons, criterion), strict=True):
                verdicts[i] = verdict
            of_runs = self._verdicts.setdefault((judge.name, criterion), {})
            of_runs[run] = dict(zip(rows, verdicts, strict=True))
            judged = [verdicts[i] for i in there]
            found.setdefault(judge.name, {})[criterion] = {
                "counts": counts(verdicts),
                "unanswered": len(questions) - len(there),
                "unjudged": self._unjudged(judge, criterion, comparisons, judged, run),
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

    def _unjudged(
        self, judge: Judge, criterion: str, comparisons: Sequence[Comparison], verdicts: Sequence[Verdict], of: str
    ) -> dict[str, dict[str, int]]:
        """Why replies are missing, by the place of the first answer; a note says it, and what to do."""
        missing = sum(verdict not in POINTS for verdict in verdicts)
        if not missing or not isinstance(judge, LLMJudge):
            return {}
        replies = zip(*judge.replies(comparisons, criterion), strict=True)
        found = {
            place: dict(Counter(reply.value for reply in of_place if isinstance(reply, Why)))
            for place, of_place in zip(("first", "second"), replies, strict=True)
        }
        whys = [why for why in Why if any(why in of_place for of_place in found.values())]
        told = ", ".join(f"{sum(of_place.get(why, 0) for of_place in found.values())} {why}" for why in whys)
        remedies = "; ".join(f"{why}: {_REMEDIES[why]}" for why in whys)
        self._note(
            f"{missing} of {len(verdicts)} comparisons of {of} were not judged ({judge.name}, {criterion}; missing "
            f"replies: {told}). They count in no rate and no agreement. {remedies[:1].upper()}{remedies[1:]}. "
            f'The first: "{judge.words(comparisons, criterion)}"'
        )
        return found
