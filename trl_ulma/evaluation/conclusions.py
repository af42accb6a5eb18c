"""What a report concludes, in sentences, and what to do if it concludes nothing."""

from collections.abc import Mapping, Sequence
from typing import Any

from trl_ulma.bootstrap import ENOUGH_PROMPTS, Estimate
from trl_ulma.evaluation.implicit_reward import CHANCE
from trl_ulma.evaluation.intervals import shown

_NAMES = {"auc": "AUC", "spearman": "Spearman's correlation"}
_UNDECIDED = "nothing can be concluded: the interval includes"
# From this accuracy in training on, a model knows the rows that it was trained on
_KNOWS = 0.7


def are_alone(models: Sequence[Mapping[str, Any]]) -> bool:
    """Whether only one of these models is not a model before training. Sentences call it "the model" then."""
    return sum(not model.get("is_base") for model in models) == 1


def conclusions(facts: Mapping[str, Any]) -> list[str]:
    """The conclusions, one sentence each: first about rewards, then about judged answers.

    Nothing is concluded from an interval that includes chance, nor from fewer than `ENOUGH_PROMPTS` prompts, of which
    the bootstrap gives intervals that are too narrow.
    """
    found = []
    for model in facts["models"]:
        if model.get("is_base"):
            continue
        name, chance = next(((n, c) for n, c in CHANCE.items() if n in model["implicit_reward"]), ("", 0.0))
        if name:
            figure = model["implicit_reward"][name]
            of = f"{_NAMES[name]} {shown(figure)}, on {of_prompts(model['ranked_rows'], figure.n)}"
            trained_on = model.get("trained_on")
            what = f"its reward ranks {'held-out ' if trained_on == 0 else ''}answers"
            if trained_on:
                of += f"; training saw the prompts of {counted(trained_on, 'row')}"
            told = _concluded(figure, chance, what, of)
            hint = " Check whether higher labels are better: --label_transform lower_is_better reverses them."
            more = hint if "worse than chance" in told else ""
            if "better than chance" in told:
                more = _than_length(model.get("over_length", {}).get(name))
            found.append(f"{model['name']}: {told}{more}")
        elif model["implicit_reward"]:
            found.append(
                f"{model['name']}: nothing can be concluded about its ranking of answers, because all labels are on "
                "one side, or all rewards are the same."
            )
    bases = {model["name"] for model in facts["models"] if model.get("is_base")}
    for each in facts["differences"]:
        if bases and not bases & {each["one"], each["other"]}:
            continue
        points, sign = each["points"], 1
        one, other = each["one"], each["other"]
        if one in bases:
            one, other, sign = other, one, -1
            ends = (None, None) if points.low is None else (-points.high, -points.low)
            points = Estimate(sign * points.value, *ends, points.n)
        of = (
            f"{shown(points, '+.3f')} points per prompt on {counted(points.n, 'prompt')}, criterion "
            f"{each['criterion']}, judge {each['judge']}{corrected(each)}"
        )
        found.append(f"{one}: {_concluded(points, 0.0, 'its answers do', of, f' than those of {other}')}")
    return found


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


def what_next(sentences: Sequence[str], models: Sequence[Mapping[str, Any]]) -> str:
    """What to do if an interval includes chance, as far as the accuracy in training tells. "" if none does.

    Args:
        sentences: the conclusions.
        models: the models that they are about.
    """
    if not any(_UNDECIDED in sentence for sentence in sentences):
        return ""
    said = "What to do next: "
    for model in models:
        own, new = model.get("accuracy_in_training"), (model.get("split") or {}).get("accuracies")
        if own is None or new is None:
            continue
        said += (
            f"at the end of its training, the rewards of {own:.0%} of the training rows were on the side of their "
            f"label, and here those of {new.value:.0%}. "
        )
        if own >= _KNOWS:
            return said + (
                f"So {model['name']} has learned to tell its own rows apart, and needs no more epochs. Rate answers to "
                "more prompts, for training and evaluation: four times as many halve the width of the interval."
            )
        return (
            said + f"So {model['name']} has learned little. Train for more epochs, or with 3 times the learning rate."
        )
    return said + (
        "rate answers to more prompts: four times as many halve the width of the interval. If a figure stays near "
        "chance, train for more epochs or with a higher learning rate."
    )


def _concluded(figure: Estimate, chance: float, what: str, of: str, than: str = " than chance") -> str:
    if figure.n < ENOUGH_PROMPTS:
        are = "is" if figure.n == 1 else "are"
        return f"{counted(figure.n, 'prompt')} {are} too few for a conclusion ({of}). Use {ENOUGH_PROMPTS} or more."
    if figure.low is None or figure.high is None:
        return (
            f"nothing can be concluded: there is no interval, because the figure is the same in all resamples, or "
            f"undefined in many of them ({of})."
        )
    if figure.low <= chance <= figure.high:
        return f"{_UNDECIDED} {chance:g} ({of})."
    if figure.low > chance:
        return f"{what} better{than} ({of})."
    return f"{what} worse{than} ({of})."


def counted(number: int, what: str) -> str:
    """A number and its noun.

    Example:
        >>> counted(1, "row"), counted(1200, "row")
        ('1 row', '1,200 rows')
    """
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def of_prompts(rows: int, prompts: int) -> str:
    """How many rows of how many prompts there are."""
    return f"{counted(rows, 'row')} of {counted(prompts, 'prompt')}"
