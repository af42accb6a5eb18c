"""The sections of a report about judged answers."""

from collections.abc import Mapping
from typing import Any

from trl_ulma.bootstrap import ENOUGH_PROMPTS, Estimate
from trl_ulma.evaluation.conclusions import corrected
from trl_ulma.evaluation.document import Details, Heading, Part, Table, Text
from trl_ulma.evaluation.intervals import shown
from trl_ulma.evaluation.judging import is_above_chance
from trl_ulma.evaluation.model_names import other_models

_NOT_JUDGED = ("refused", "cut", "unparsable", "unread")


def judged_section(facts: Mapping[str, Any], judge: Mapping[str, Any]) -> list[Part]:
    """The main figures of a judge: how often each model wins, and differences of models."""
    name, criterion = judge["judge"], judge["criterion"]
    rows = []
    for model in facts["models"]:
        found = model["judged"].get(name, {}).get(criterion)
        if found is None:
            continue
        shares = [shown(found["rates"].get(verdict), ".1%") for verdict in ("win", "tie", "lose", "win_or_tie")]
        unjudged = {why: found["counts"][why] for why in _NOT_JUDGED if found["counts"][why]}
        told = f" ({', '.join(f'{count} {why}' for why, count in unjudged.items())})" if unjudged else ""
        rows.append([model["name"], *shares, f"{sum(unjudged.values())}{told}"])
    parts: list[Part] = [
        Heading(f"{criterion.capitalize()}: answers against the data's chosen ones, judged by {name}"),
        Text(_agreement_said(judge["agreement"])),
        Table(["model", "win", "tie", "lose", "win or tie", "not judged"], rows),
    ]
    gained = [each for each in facts["differences"] if (each["judge"], each["criterion"]) == (name, criterion)]
    if gained:
        lines = [[f"{each['one']} − {each['other']}", shown(each["points"], "+.3f")] for each in gained]
        parts.append(Table(["points (win 1, tie ½), paired by prompt", "difference"], lines))
        if gained[0]["comparisons"] > 1:
            how = corrected(gained[0]).removeprefix(", ")
            parts.append(Text(f"These intervals are {how}, so that all hold together with 95%."))
    if others := other_models(judge.get("model", ""), judge.get("answered_by", {})):
        parts.append(Text(f"The judge's server: {' '.join(others)}"))
    return parts


def more_of_judge(facts: Mapping[str, Any], judge: Mapping[str, Any]) -> list[Details]:
    """Missing replies of a judge, how it depends on the order of answers, and what its server does not accept."""
    name, criterion = judge["judge"], judge["criterion"]
    missing = []
    for model in facts["models"]:
        found = model["judged"].get(name, {}).get(criterion)
        if found is None:
            continue
        missing += [
            [model["name"], f"the model's answer {place}", str(count), why]
            for place, whys in found["unjudged"].items()
            for why, count in whys.items()
        ]
        if found["unanswered"]:
            missing.append(
                [model["name"], "not asked", str(found["unanswered"]), "the model's server refused to answer"]
            )
    parts: list[Part] = []
    if missing:
        parts.append(Table(["model", "position", "missing replies", "why"], missing, is_text=True))
    replies = judge.get("replies")
    if replies and replies["first"] + replies["second"]:
        decided = replies["first"] + replies["second"]
        parts.append(
            Text(
                f"Over all criteria, {decided} of the judge's replies to these comparisons name an answer, and "
                f"{replies['first'] / decided:.1%} of them name the one shown first (50% without a position bias). "
                "The two orders disagree in "
                f"{judge['orders_disagree']} of {judge['judged']} comparisons with both verdicts, which count as ties."
            )
        )
    if judge.get("changes"):
        parts.append(Text(f"The judge's server: {'; '.join(judge['changes'])}."))
    return [Details(f"More about the judge: {name}, {criterion}", parts)] if parts else []


def _agreement_said(agreement: Estimate | None) -> str:
    if agreement is None:
        return (
            "The judge's agreement with known labels could not be measured (no prompt has both a good and a bad "
            "answer, or none of these comparisons was judged): no ranking is claimed."
        )
    said = (
        f"On {agreement.n} of the data's own good and bad answers, the judge agrees with "
        f"{shown(agreement, '.1%')} of the labels (a tie counts half)"
    )
    if agreement.n < ENOUGH_PROMPTS:
        return f"{said}, which are too few to show that it is above chance: no ranking is claimed."
    return said + ("." if is_above_chance(agreement) else ", which is not above chance: no ranking is claimed.")
