"""What a report concludes, in sentences, and what to do if it concludes nothing."""

from collections.abc import Mapping, Sequence
from typing import Any

from trl_ulma.bootstrap import ENOUGH_PROMPTS, Estimate
from trl_ulma.evaluation.implicit_reward import CHANCE
from trl_ulma.evaluation.intervals import shown
from trl_ulma.labels.report import counted

# Figure → its name, and in half a sentence what it is
_NAMES = {
    "auc": ("AUC", "how often a good answer has a higher reward than a bad one, 0.5 by chance"),
    "spearman": ("Spearman's correlation of reward and label", "1: the same order, 0: chance"),
}
# From this accuracy in training on, a model knows the rows that it was trained on
_KNOWS = 0.7


def are_alone(models: Sequence[Mapping[str, Any]]) -> bool:
    """Whether only one of these models is not a model before training. Sentences call it "the model" then."""
    return sum(not model.get("is_base") for model in models) == 1


def conclusions(facts: Mapping[str, Any]) -> list[str]:
    """The conclusions, a few sentences each: first about rewards, then about judged answers.

    Nothing is concluded from an interval that includes chance, nor from fewer than `ENOUGH_PROMPTS` prompts, of which
    the bootstrap gives intervals that are too narrow. If there is only one model beside its base, it is "the model".
    """
    found: list[str] = []
    is_alone = are_alone(facts["models"])
    it, its = ("the model", "the model's") if is_alone else ("it", "its")
    explained: set[str] = set()

    def add(name: str, said: str) -> None:
        found.append(said[0].upper() + said[1:] if is_alone else f"{name}: {said}")

    for model in facts["models"]:
        if model.get("is_base"):
            continue
        name, chance = next(((n, c) for n, c in CHANCE.items() if n in model["implicit_reward"]), ("", 0.0))
        if name:
            figure, trained_on = model["implicit_reward"][name], model.get("trained_on")
            (called, meaning), rows = _NAMES[name], of_prompts(model["ranked_rows"], figure.n)
            explanation = "" if name in explained else f" ({meaning})"
            explained.add(name)
            measured = _measured(f"{called}{explanation}", figure, chance, rows)
            if trained_on:
                measured += f" Training saw the prompts of {counted(trained_on, 'row')}."
            answers = f"{'held-out ' if trained_on == 0 else ''}answers"
            about, what = f"how well {it} ranks {answers}", f"{its} reward ranks {answers}"
            told = _concluded(figure, chance, about, what, measured)
            hint = " Check whether higher labels are better: --label_transform lower_is_better reverses them."
            more = hint if "worse than chance" in told else ""
            if "better than chance" in told:
                more = _than_length(model.get("over_length", {}).get(name))
            add(model["name"], told + more)
        elif model["implicit_reward"]:
            add(
                model["name"],
                f"nothing can be concluded about how well {it} ranks answers, because all labels are on one side, or "
                "all rewards are the same.",
            )
    bases = _bases(facts)
    for each in _differences(facts):
        points, sign = each["points"], 1
        one, other = each["one"], each["other"]
        if one in bases:
            one, other, sign = other, one, -1
            ends = (None, None) if points.low is None else (-points.high, -points.low)
            points = Estimate(sign * points.value, *ends, points.n)
        of = f"{counted(points.n, 'prompt')}, criterion {each['criterion']}, judge {each['judge']}{corrected(each)}"
        measured = _measured("The difference in points per prompt (1 for a win, ½ for a tie)", points, 0.0, of, "+.3f")
        than = "before training" if is_alone and other in bases else f"those of {other}"
        about, what = f"whether {its} answers do better than {than}", f"{its} answers do"
        add(one, _concluded(points, 0.0, about, what, measured, than))
    return found


def _bases(facts: Mapping[str, Any]) -> set[str]:
    return {model["name"] for model in facts["models"] if model.get("is_base")}


def _differences(facts: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The differences that conclusions are about: those to a model before training, or all if there is none."""
    bases = _bases(facts)
    return [each for each in facts["differences"] if not bases or bases & {each["one"], each["other"]}]


def _measured(what: str, figure: Estimate, chance: float, of: str, form: str = ".3f") -> str:
    """What was measured, on which rows or prompts, and where its interval lies."""
    said = f"{what} is {figure.value:{form}} on {of}."
    if figure.low is None or figure.high is None:
        return said
    ends = f"[{figure.low:{form}}, {figure.high:{form}}]"
    if figure.n < ENOUGH_PROMPTS:
        return f"{said} The 95% interval is {ends}."
    where = "includes" if is_open(figure, chance) else f"is {'above' if figure.low > chance else 'below'}"
    return f"{said} The 95% interval {ends} {where} {chance:g}."


def _than_length(difference: Estimate | None) -> str:
    """A sentence on whether rewards rank better than lengths. "" if that is not known."""
    if difference is None or difference.low is None or difference.high is None:
        return ""
    if difference.high < 0:
        return f" Their length ranks them better than it does ({shown(difference, '+.3f')})."
    if difference.low > 0:
        return f" It also ranks them better than their length does, by {shown(difference)}."
    return (
        f" No difference from ranking them by their length was found ({shown(difference, '+.3f')}), so the model may "
        "have learned length."
    )


def corrected(difference: Mapping[str, Any]) -> str:
    """For how many comparisons the interval of a difference is corrected; "" if for one."""
    count = difference["comparisons"]
    return f", corrected for {count} comparisons (Bonferroni)" if count > 1 else ""


def what_next(facts: Mapping[str, Any]) -> str:
    """What to do if an interval includes chance, as far as the accuracy in training tells. "" if none does."""
    models = facts["models"]
    open_models = [model for model in models if not model.get("is_base") and _ranks_like_chance(model)]
    if not open_models and not any(is_open(each["points"], 0.0) for each in _differences(facts)):
        return ""
    said, prompts = "What to do next: ", "four times as many make the interval half as wide"
    for model in open_models:
        own, new = model.get("accuracy_in_training"), (model.get("split") or {}).get("accuracies")
        if own is None or new is None:
            continue
        name, first = ("the model", "The model") if are_alone(models) else (model["name"], model["name"])
        rows = "held-out rows" if model.get("trained_on") == 0 else "rows here"
        among_new = f"and in {new.value:.0%} of the {rows}"
        if own >= _KNOWS:
            return (
                f"{said}rate answers to more prompts, for training and evaluation: {prompts}. More epochs are no "
                f"remedy, because {name} has learned the training rows: its reward tells good from bad in {own:.0%} of "
                f"them, {among_new}."
            )
        return (
            f"{said}train for more epochs, or with 3 times the learning rate. {first} has learned little: "
            f"its reward tells good from bad in {own:.0%} of the training rows, {among_new}."
        )
    return (
        f"{said}rate answers to more prompts: {prompts}. If a figure stays near chance, train for more epochs or with "
        "a higher learning rate."
    )


def is_open(figure: Estimate, chance: float) -> bool:
    """Whether nothing can be concluded from a figure, because its interval includes chance."""
    if figure.n < ENOUGH_PROMPTS or figure.low is None or figure.high is None:
        return False
    return figure.low <= chance <= figure.high


def _ranks_like_chance(model: Mapping[str, Any]) -> bool:
    return any(
        is_open(model["implicit_reward"][name], CHANCE[name]) for name in CHANCE if name in model["implicit_reward"]
    )


def _concluded(figure: Estimate, chance: float, about: str, what: str, measured: str, than: str = "chance") -> str:
    """A conclusion, and what it was measured by.

    Args:
        figure: the figure with its interval.
        chance: its value by chance.
        about: what is not known if nothing can be concluded.
        what: what is better or worse than `than` otherwise.
        measured: a sentence with the figure.
        than: see `what`.
    """
    if figure.n < ENOUGH_PROMPTS:
        are = "is" if figure.n == 1 else "are"
        few = f"{counted(figure.n, 'prompt')} {are} too few for a conclusion about {about}."
        return f"{few} Use {ENOUGH_PROMPTS} or more. {measured}"
    if figure.low is None or figure.high is None:
        return (
            f"nothing can be concluded about {about}: there is no interval, because the figure is the same in all "
            f"resamples, or undefined in many of them. {measured}"
        )
    if is_open(figure, chance):
        return f"nothing can be concluded about {about}. {measured}"
    return f"{what} {'better' if figure.low > chance else 'worse'} than {than}. {measured}"


def of_prompts(rows: int, prompts: int) -> str:
    """How many rows of how many prompts there are."""
    return f"{counted(rows, 'row')} of {counted(prompts, 'prompt')}"
