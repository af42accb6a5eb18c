"""Applies judges to answers: first their agreement with known labels, then verdicts, rates and differences."""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

from trl_ulma.bootstrap import ENOUGH_PROMPTS, Estimate
from trl_ulma.evaluation.held_out import Question, known_comparisons
from trl_ulma.evaluation.judges import UNREAD_REMEDY, Comparison, Judge, RewardModelJudge, Verdict, check_criterion
from trl_ulma.evaluation.llm_judge import LLMJudge, Plan, steers
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
    """Return whether the whole interval of a judge's agreement with known labels is above ½. A tie counts half.

    Of fewer than `ENOUGH_PROMPTS` comparisons, it is not known.

    Example:
        >>> is_above_chance(Estimate(0.7, 0.6, 0.8, 100)), is_above_chance(Estimate(0.9, 0.6, 1.0, 10))
        (True, False)
    """
    enough = agreement is not None and agreement.n >= ENOUGH_PROMPTS
    return agreement is not None and enough and agreement.low is not None and agreement.low > 0.5


class Judging:
    """Judges with their criteria, and their verdicts.

    Args:
        judges: judges with different names.
        criteria: criteria to use; None uses all criteria of each judge.
        seed: seed of the bootstrap.
        note: called with notes for readers of the report.

    Raises:
        ValueError: if a judge cannot judge a criterion, or if two judges have the same name.
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
        """Return the largest cost of each judge behind a server, before the first request.

        Args:
            questions: the questions, as in `judge`.
            runs: number of models. Their answers are assumed to be as long as the chosen ones.
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
        """Let each judge compare chosen with rejected answers of the data, whose outcome is known."""
        known = known_comparisons(questions)
        self._note_steering([text for each in questions for text in (each.chosen, each.rejected or "")], "the data")
        for judge in self.judges.values():
            if isinstance(judge, RewardModelJudge) and questions:
                self._note_template(judge, isinstance(questions[0].prompt, str))
        for judge, criterion in self.pairs:
            verdicts = judge(known, criterion) if known else []
            self._unjudged(judge, criterion, known, verdicts, "the data's own answers")
            self.agreement[judge.name, criterion] = mean_points(verdicts, seed=self._seed)

    def judge(
        self, run: str, questions: Sequence[Question], answers: Sequence[str | None]
    ) -> dict[str, dict[str, Any]]:
        """Compare the answers of a run with the chosen answers of the data.

        Args:
            run: name of the model.
            questions: `(N,)` questions.
            answers: `(N,)` answers; None if the server of the model refused to answer.

        Returns:
            Judge → criterion → `counts`, `rates` and `points` of the verdicts, and `unjudged`: for a judge that is
            asked in both orders, why replies are missing, by the position of the run's answer.
        """
        there = [i for i, answer in enumerate(answers) if answer is not None]
        comparisons = [Comparison(questions[i].prompt, str(answers[i]), questions[i].chosen) for i in there]
        self._note_steering([each.first for each in comparisons], run)
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
        """Return the difference in points of each two runs, paired by prompt, for judges that agree above chance.

        The intervals are corrected for the number of differences, `comparisons`, so that all hold together.
        """
        pairs = [
            (judge, criterion, one, other)
            for (judge, criterion), of_runs in self._verdicts.items()
            if is_above_chance(self.agreement.get((judge, criterion)))
            for one, other in combinations(of_runs, 2)
        ]
        found = []
        for judge, criterion, one, other in pairs:
            of_runs = self._verdicts[judge, criterion]
            points = difference(of_runs[one], of_runs[other], seed=self._seed, comparisons=len(pairs))
            names = {"judge": judge, "criterion": criterion, "one": one, "other": other}
            if points is not None:
                found.append(names | {"points": points, "comparisons": len(pairs)})
        return found

    def facts(self) -> list[dict[str, Any]]:
        """Return facts about each judge and criterion, and the agreement with known labels."""
        return [
            {
                "judge": judge.name,
                "criterion": criterion,
                "agreement": self.agreement.get((judge.name, criterion)),
                **judge.facts(),
            }
            for judge, criterion in self.pairs
        ]

    def _note_steering(self, answers: Sequence[str], of: str) -> None:
        """Note how many answers contain what could steer a language model that judges them."""
        count = sum(map(steers, answers))
        if count and any(isinstance(judge, LLMJudge) for judge in self.judges.values()):
            self._note(
                f"{count} of {len(answers)} answers of {of} contain a verdict, or the tags that separate answers for "
                "the judge. Tags are escaped. Read these answers: they can try to steer the judge."
            )

    def _note_template(self, judge: RewardModelJudge, is_text: bool) -> None:
        """Note if a reward model may read other texts than in its training."""
        has_template = judge.tokenizer.chat_template is not None
        if has_template == is_text:
            has, are = (
                ("a", "text, which it reads without the template")
                if is_text
                else ("no", "conversations, which it reads as text with the names of the speakers")
            )
            self._note(
                f"{judge.name} has {has} chat template, and the prompts are {are}. If it was trained otherwise, do not "
                "trust its verdicts; its agreement with known labels shows it."
            )

    def _unjudged(
        self, judge: Judge, criterion: str, comparisons: Sequence[Comparison], verdicts: Sequence[Verdict], of: str
    ) -> dict[str, dict[str, int]]:
        """Return why replies are missing, by the position of the first answer, and note it with a remedy."""
        missing = sum(verdict not in POINTS for verdict in verdicts)
        if missing and isinstance(judge, RewardModelJudge):
            self._note(
                f"{missing} of {len(verdicts)} comparisons of {of} were not judged ({criterion}). They count in no "
                f"rate and no agreement. {judge.why_unread(comparisons)} {UNREAD_REMEDY}"
            )
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
