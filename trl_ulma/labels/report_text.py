"""The label report as text, at most 80 columns wide."""

import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trl_ulma.labels.report import LENGTH_BIAS, LISTED, TARGETS, counted

_WIDTH = 80
# Raters whose offsets are printed
_RATERS = 6


def render_report(
    report: Mapping[str, Any],
    name: str = "train",
    *,
    in_short: bool = False,
    in_detail: bool = True,
    spelling: Callable[[str], str] = str,
) -> str:
    """Return the report as text, at most 80 columns wide.

    Args:
        report: the result of `label_report`.
        name: name of the dataset.
        in_short: whether to return only the numbers of rows and prompts, the means, and the warnings.
        in_detail: whether to also return what is usual: a second histogram, of the labels as they are learned, if there
            is one of the labels as they were given; a low correlation of label and tokens; and how far labels ask
            log π to move.
        spelling: how settings are spelled, such as on the command line, in a warning or a fact.

    Example:
        >>> import numpy as np
        >>> from trl_ulma.labels import label_report
        >>> ones = np.ones(4, dtype=int)
        >>> label = np.array([1.0, 1.0, 1.0, 0.0])
        >>> report = label_report(label, label < 0, label < 0, prompt=ones, answer=np.arange(4), tokens=ones)
        >>> print(render_report(report))
        Labels of the train dataset: 4 rows, 1 prompt
        <BLANKLINE>
        binary labels: 4 rows, mean 0.75, standard deviation 0.433
                      label                               rows               tokens
                          0 ████████                         1  25.0%             1
                          1 ████████████████████████         3  75.0%             1
        <BLANKLINE>
        answers per prompt  mean 4, most 4; 1 prompt with 3–4
        ...
    """
    prompts, weight = report["prompts"], report["weight"]
    lines = [f"Labels of the {name} dataset: {counted(report['rows'], 'row')}, {counted(prompts['count'], 'prompt')}"]
    kinds = [kind for kind in ("binary", "continuous") if kind in report]
    if in_short:
        for kind in kinds:
            lines += _render_type(kind, report[kind], weight["is_given"])[:1]
        if report.get("raters"):
            lines += _render_facts({"raters": _raters_in_words(report["raters"])})
        return "\n".join(lines + _render_warnings(report, spelling))
    for kind in kinds:
        lines += ["", *_render_type(kind, report[kind], weight["is_given"], in_detail)]
    facts = {"demonstrations": f"{report['demonstrations']:.1%} of rows"} if report["demonstrations"] else {}
    if weight["is_given"]:
        if facts and weight["demonstrations"] is not None:
            facts["demonstrations"] += f", {weight['demonstrations']:.1%} of weights"
        facts["weights"] = (
            f"{weight['min']:.4g} to {weight['max']:.4g}, median {weight['median']:.4g}; {weight['zero']:,} are 0; "
            f"worth {weight['effective_rows']:,.0f} rows of equal weight"
        )
    numbers = prompts["with_answers"].items()
    by_number = ", ".join(f"{counted(count, 'prompt')} with {number}" for number, count in numbers)
    facts["answers per prompt"] = f"mean {prompts['mean_answers']:.3g}, most {prompts['max_answers']:,}; {by_number}"
    facts |= _repeats_in_words(report)
    if report.get("raters"):
        facts["raters"] = _raters_in_words(report["raters"])
    undecided = report.get("binary", {}).get("undecided")
    if undecided:
        facts["undecided"] = f"{counted(undecided, 'row')} with a label of ½, which accuracy and AUC leave out"
    class_weights = report.get("binary", {}).get("class_weights")
    if class_weights:
        facts["balanced with"] = ", ".join(spelling(f"{key}={value:g}") for key, value in class_weights.items())
    if in_detail and report.get("left_out"):  # a warning says it, too, with the lines of the rows
        facts["left out"] = "; ".join(
            f"{reason} ({counted(count, 'row')})" for reason, count in report["left_out"].items()
        )
    return "\n".join([*lines, "", *_render_facts(facts), *_render_warnings(report, spelling)])


def render_repeats(found: Mapping[str, Any], name: str, rows: int) -> str:
    """Return the result of `repeats` as text, at most 80 columns wide.

    Args:
        found: the result.
        name: name of the dataset.
        rows: number of its rows.
    """
    return "\n".join([f"The {name} dataset: {counted(rows, 'row')}", *_render_facts(_repeats_in_words(found))])


def _repeats_in_words(found: Mapping[str, Any]) -> dict[str, str]:
    facts = {}
    if found["repeated"]:
        kept = "which is kept" if found["repeated"] == 1 else "which are kept"
        more = "; …" if len(found["repeated_rows"]) > LISTED else ""
        listed = f"{'; '.join(found['repeated_rows'][:LISTED])}{more}"
        facts["repeated"] = f"{counted(found['repeated'], 'row')}, {kept}: {listed}"
    if found["contradicting"]:
        facts["contradicting"] = counted(found["contradicting"], "row")
    return facts


def _raters_in_words(offsets: Mapping[str, float]) -> str:
    """Return by how much raters are above or below an average one, the strictest and the most lenient of many.

    Example:
        >>> _raters_in_words({"Ann": 0.51, "Tom": -0.48})
        '2, whose strictness is removed. Compared with an average rater: Tom -0.48, Ann +0.51'
    """
    if not any(offsets.values()):
        return f"{len(offsets):,}, who do not differ by more than chance, so labels stay as they are"
    shown = [f"{rater} {_signed(offset)}" for rater, offset in sorted(offsets.items(), key=lambda each: each[1])]
    if len(shown) > _RATERS:
        shown = [*shown[: _RATERS // 2], "…", *shown[-(_RATERS // 2) :]]
    return f"{len(offsets):,}, whose strictness is removed. Compared with an average rater: {', '.join(shown)}"


def _render_facts(facts: Mapping[str, str]) -> list[str]:
    wrapped = (textwrap.wrap(f"{fact:<19} {text}", _WIDTH, subsequent_indent=" " * 20) for fact, text in facts.items())
    return [line for lines in wrapped for line in lines]


def _render_warnings(report: Mapping[str, Any], spelling: Callable[[str], str]) -> list[str]:
    lines = []
    for warning in report["warnings"]:
        lines += ["", *textwrap.wrap(f"! {spelling(warning)}", _WIDTH, subsequent_indent="  ")]
    return lines


def _render_type(kind: str, found: Mapping[str, Any], has_weights: bool, in_detail: bool = True) -> list[str]:
    raw = found.get("raw")
    shown = found if raw is None else raw
    lines = [f"{kind} labels: {counted(found['rows'], 'row')}, {_moments(shown)}"]
    if raw is not None:
        lines.append(f"after {_in_words(raw['transform'])}: {_moments(found)}")
        lines += _render_histogram(raw["histogram"], found["rows"], has_weights)
    # One table says everything if each label becomes exactly one other
    if raw is None or (in_detail and any(each["learned_low"] != each["learned_high"] for each in raw["histogram"])):
        if raw is not None:
            lines += ["", f"{kind} labels as they are learned"]
        lines += _render_histogram(found["histogram"], found["rows"], has_weights)
    correlation = found["length_correlation"]
    if correlation is not None and (in_detail or abs(correlation) >= LENGTH_BIAS):
        lines.append(f"{'':<20}correlation of label and tokens {correlation:+.2f}")
    if "targets" in found and in_detail:
        targets = found["targets"]
        low, high = TARGETS
        without = "" if targets["log_z_is_known"] else ", without log Z"
        lines += [
            f"{'':<20}labels ask log π to move by |z − c|/β nats{without}:",
            f"{'':<20}root mean square {targets['rms']:.3g} ({low:g} to {high:g} is usual), most {targets['max']:.3g}",
        ]
    return [line.rstrip() for line in lines]


def _in_words(transform: str) -> str:
    """A label transform, with what `standardize` subtracts and divides by.

    Example:
        >>> _in_words("center_raters,standardize:3.00787,0.844452")
        "center_raters and standardize, (label − the rater's offset − 3.008) / 0.8445"
    """
    offset = " − the rater's offset" if "center_raters," in transform else ""
    return re.sub(
        r"standardize:([^,]+),([^,]+)",
        lambda found: f"standardize, (label{offset} − {float(found[1]):.4g}) / {float(found[2]):.4g}",
        transform.replace("center_raters,", "center_raters and "),
    )


def _render_histogram(histogram: Sequence[Mapping[str, Any]], rows: int, has_weights: bool) -> list[str]:
    is_raw = "learned_low" in histogram[0]
    spans = [_span(each, is_raw=is_raw) for each in histogram]
    column = max(19, *map(len, spans))
    bar = max(43 - column, 10)
    name = "label → learned" if is_raw else "label"
    lines = [f"{name:>{column}} {'':<{bar}} {'rows':>9} {'':>6} {'weight' if has_weights else '':>6} {'tokens':>6}"]
    most = max(each["rows"] for each in histogram)
    total = sum(each["weight"] for each in histogram)
    for each, span in zip(histogram, spans, strict=True):
        count = each["rows"]
        weight = f"{each['weight'] / total:.1%}" if has_weights and total else ""
        lines.append(
            f"{span:>{column}} {_bar(count / most, bar):<{bar}} {count:>9,} {count / rows:>6.1%} {weight:>6} "
            f"{each['tokens']:>6.0f}"
        )
    return lines


def _span(each: Mapping[str, Any], *, is_raw: bool) -> str:
    """The label or the labels of a bin, and what is learned of them."""
    low, high = each["low"], each["high"]
    span = f"{low:.6g}" if low == high else f"{low:.4g} … {high:.4g}"
    if is_raw and each["rows"]:
        learned = [_signed(each["learned_low"]), _signed(each["learned_high"])]
        span += f" → {' … '.join(dict.fromkeys(learned))}"
    return span


def _moments(found: Mapping[str, Any]) -> str:
    """Return mean and standard deviation in words.

    Example:
        >>> _moments({"mean": 3.375, "std": 1.654}), _moments({"mean": 12345.6, "std": 804.2})
        ('mean 3.38, standard deviation 1.65', 'mean 12,346, standard deviation 804')
    """
    # A mean of 0 is not exactly 0 after rounding
    mean = 0.0 if abs(found["mean"]) < 1e-9 * found["std"] else found["mean"]
    mean, std = (f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}" for x in (mean, found["std"]))
    return f"mean {mean}, standard deviation {std}"


def _signed(label: float) -> str:
    """Return a transformed label with its sign.

    Example:
        >>> _signed(0.4267), _signed(0.0455), _signed(-0.0012), _signed(0.0)
        ('+0.43', '+0.05', '-0.0012', '0.00')
    """
    if not label:
        return "0.00"
    return f"{label:+.2f}" if 0.01 <= abs(label) < 100 else f"{label:+.3g}"


def _bar(share: float, width: int) -> str:
    whole, eighth = divmod(round(share * width * 8), 8)
    return "█" * whole + " ▏▎▍▌▋▊▉"[eighth].strip()
