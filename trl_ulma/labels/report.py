"""The label report: labels, weights, prompts and lengths of a training set, with warnings, before any training.

`report_text` writes it as text.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from trl_ulma.labels.outliers import is_code, outliers, tail_share

# Rows that a warning names
LISTED = 5
# Rows from which they are taken, and one more: both halves of a pair have its name
_NAMED = 2 * (LISTED + 1)
_BINS = 10
# With more distinct values than this, labels are counted in bins
_VALUES = 12
# A label that correlates this much with length is suspect: length then explains 0.3², about a tenth, of its variance
LENGTH_BIAS = 0.3
# In nats. Below this range a target log-ratio is lost in the noise; above it a policy cannot reach it
TARGETS = (1.0, 50.0)
_GOOD_TARGET = 10.0
# KTO's advice: keep the ratio of the classes' summed weights within 4:3
_BALANCED = 4 / 3
# From this ratio on, an estimate of log Z did better than 0 (examples/exact_world/RESULTS.md has 1 and 9)
_LOPSIDED = 3


def label_report(
    label: np.ndarray,
    continuous: np.ndarray,
    sft_mask: np.ndarray,
    *,
    prompt: np.ndarray,
    answer: np.ndarray,
    tokens: np.ndarray,
    compared: np.ndarray | None = None,
    weight: np.ndarray | None = None,
    log_z: np.ndarray | float | None = 0.0,
    beta: float = 0.1,
    length_normalize: bool = False,
    class_weights: tuple[float, float] = (1.0, 1.0),
    raw: np.ndarray | None = None,
    transform: str | None = None,
    groups_lengths: bool = False,
    named: Callable[[int], str] = "row {}".format,
    begins: Callable[[int], str] = "".format,
) -> dict[str, Any]:
    r"""Return counts, shares and warnings about a training set, in types that JSON can hold.

    Args:
        label: `(N,)` labels to learn, after the label transform; N ≥ 1.
        continuous: `(N,)` bool.
        sft_mask: `(N,)` bool, True for demonstrations.
        prompt: `(N,)` numbers; rows with the same prompt have the same number.
        answer: `(N,)` numbers; rows with the same prompt and completion have the same number.
        tokens: `(N,)` number of tokens of each completion.
        compared: `(N,)` bool, whether the loss of a row contains the reference; None if it does for all rows except
            demonstrations.
        weight: `(N,)` row weights; None if all are 1.
        log_z: log Z in nats, one number or `(N,)`; None if it is unknown before training.
        beta: β.
        length_normalize: whether log-ratios are divided by the number of completion tokens. The targets of summed
            log-ratios are then larger by that factor.
        class_weights: the settings `desirable_weight` and `undesirable_weight`.
        raw: `(N,)` labels before the label transform, NaN for rows that are not transformed; None without a transform.
        transform: the fitted transform, such as "threshold:4".
        groups_lengths: whether the rows of a step have similar lengths.
        named: returns the name of the row at a position, such as its file and line, for warnings.
        begins: returns the start of the prompt of the row at a position, "" if unknown.

    Returns:
        - `rows`, and `demonstrations`, the share of rows that are demonstrations;
        - `binary` and `continuous`, for the rows of each type: `rows`; `classes`, rows by class; `mean`, `std`;
          `histogram`, a list of `low`, `high`, `rows`, `weight` (the sum) and `tokens` (the mean), with `low` equal to
          `high` if each bin is a single label; `length_correlation`, Pearson's correlation of label and tokens, None if
          either is constant;
        - `raw`, for rows with a label transform: `transform`; `mean`, `std` and `histogram` of the labels before it, as
          above; each bin also has `learned_low` and `learned_high`, the range of its labels after the transform;
        - for binary labels, `undecided`, the rows with a label of ½, which accuracy and AUC leave out; and
          `class_weights`: values of `desirable_weight` and `undesirable_weight` that balance the
          classes and keep the total weight; None if there is one class;
        - for continuous labels, `targets`: |u| in nats, where u = (z − c)/β with c = β·log Z is the log-ratio at
          which the loss is 0;
        - `weight`: its distribution, the share of the demonstrations, and Kish's effective number of rows;
        - the results of `repeats`;
        - `prompts`: how many there are, the mean and the largest number of answers per prompt, and `with_answers`, the
          number of prompts by number of answers;
        - `warnings`: sentences; `outliers`, those of them about labels far outside the others.

    Example:
        >>> ones = np.ones(4, dtype=int)
        >>> label = np.array([1.0, 1.0, 1.0, 0.0])
        >>> report = label_report(label, label < 0, label < 0, prompt=ones, answer=np.arange(4), tokens=ones)
        >>> report["binary"]["classes"]
        {'1': 3, 'between': 0, '0': 1}
        >>> report["binary"]["class_weights"]
        {'desirable_weight': 0.6667, 'undesirable_weight': 2.0}
    """
    label = np.asarray(label, dtype=np.float64)
    weights = np.ones(len(label)) if weight is None else np.asarray(weight, dtype=np.float64)
    warnings: list[str] = []
    far: list[str] = []
    is_zero = log_z is not None and not np.any(log_z)
    report: dict[str, Any] = {"rows": len(label), "demonstrations": _rounded(sft_mask.mean())}
    for name, rows in (("binary", ~continuous), ("continuous", continuous)):
        if rows.any():
            report[name] = _of_type(name, label[rows], sft_mask[rows], weights[rows], tokens[rows])
            correlation = report[name]["length_correlation"]
            if correlation is not None and abs(correlation) >= LENGTH_BIAS:
                warnings.append(_length_bias(name, correlation, None if length_normalize else tokens.mean()))
            own = label
            if raw is not None and np.isfinite(raw[rows]).all():
                own = raw
                report[name]["raw"] = _before(raw[rows], label[rows], weights[rows], tokens[rows], transform or "")
            # Numbers of votes have long tails
            if (own is raw or name == "continuous") and not (transform or "").startswith("votes"):
                far += outliers_in_words(own, np.flatnonzero(rows), named, begins=begins)
    warnings += far
    if "binary" in report:
        rows = ~continuous
        report["binary"]["undecided"] = int((label[rows] == 0.5).sum())
        report["binary"]["class_weights"] = _class_weights(weights[rows], label[rows] >= 0.5, class_weights, warnings)
        of_reward = np.where(rows & (~sft_mask if compared is None else compared), weights, 0)
        good = class_weights[0] * of_reward[label >= 0.5].sum()
        bad = class_weights[1] * of_reward[label < 0.5].sum()
        if is_zero and max(good, bad) >= _LOPSIDED * min(good, bad) > 0:
            warnings.append(
                f"Among the compared rows, good and bad ones weigh {good / bad:.2g} to 1. With log_z=0 the model "
                'mostly learns that share. Set log_z="prior" to remove it.'
            )
    if "continuous" in report:
        shift = 0.0 if log_z is None else np.broadcast_to(log_z, label.shape)[continuous]
        targets = np.abs(label[continuous] / beta - shift) * (tokens[continuous] if length_normalize else 1)
        report["continuous"]["targets"] = _targets(targets, beta, log_z is not None, [], tail=None)
        # Labels far outside the others are told already
        own = label if raw is None else np.where(np.isfinite(raw), raw, label)
        told = outliers(own[continuous]) if far else []
        tail = tail_share(np.delete(label[continuous], told))
        _targets(np.delete(targets, told), beta, log_z is not None, warnings, tail=tail)
        mean, std = report["continuous"]["mean"], report["continuous"]["std"]
        if is_zero and 0 < std < abs(mean):
            warnings.append(
                f"Continuous labels are {mean:.3g} on average, {abs(mean) / std:.2g} standard deviations from 0. With "
                f"log_z=0 this asks every answer to become {'more' if mean > 0 else 'less'} likely, which is not "
                'possible. Set log_z="prior" or label_transform="center" to remove the mean.'
            )
    correlations = [report[name]["length_correlation"] for name in ("binary", "continuous") if name in report]
    if groups_lengths and any(value is not None and abs(value) >= LENGTH_BIAS for value in correlations):
        warnings.append(
            'With train_sampling_strategy="group_by_length", the rows of a step have similar lengths, and here also '
            'similar labels: most steps see mainly good rows or mainly bad ones. Set train_sampling_strategy="random".'
        )
    report["weight"] = _weights(weights, weight is not None, sft_mask)
    own = label if raw is None else np.where(np.isfinite(raw), raw, label)
    report.update(repeats(label, own, continuous, answer, named))
    warnings += contradictions_in_words(report)
    report["prompts"] = _prompts(prompt)
    report["warnings"], report["outliers"] = warnings, far
    return report


def _of_type(
    name: str, label: np.ndarray, sft_mask: np.ndarray, weight: np.ndarray, tokens: np.ndarray
) -> dict[str, Any]:
    if name == "binary":
        classes = {"1": label == 1, "between": (label > 0) & (label < 1), "0": label == 0}
    else:
        classes = {"demonstrations": sft_mask, "others": ~sft_mask}
    correlation = None
    if len(np.unique(label)) > 1 and len(np.unique(tokens)) > 1:
        correlation = _rounded(np.corrcoef(label, tokens)[0, 1])
    return {
        "rows": len(label),
        "classes": {of: int(rows.sum()) for of, rows in classes.items()},
        "mean": _rounded(label.mean()),
        "std": _rounded(label.std()),
        "histogram": _histogram(label, weight, tokens),
        "length_correlation": correlation,
    }


def _length_bias(name: str, correlation: float, mean_tokens: float | None) -> str:
    """A warning that labels go along with lengths. `mean_tokens` is None if log-ratios are divided by the length."""
    compare = ""
    if mean_tokens is not None:
        compare = ", or compare with length_normalize=True"
        if mean_tokens >= 2:  # the log-ratio becomes smaller by that factor
            compare += f" and β about {float(f'{mean_tokens:.1g}'):g} times as large, the mean number of tokens"
    return (
        f"Better answers are {'longer' if correlation > 0 else 'shorter'} (correlation of {name} label and tokens "
        f"{correlation:+.2f}), so the model may learn length instead of quality. Balance the lengths{compare}."
    )


def outliers_in_words(
    label: np.ndarray,
    rows: np.ndarray,
    named: Callable[[int], str],
    among: int | None = None,
    *,
    begins: Callable[[int], str] = "".format,
) -> list[str]:
    """Return a warning if labels are far outside the others.

    Args:
        label: `(N,)` labels.
        rows: ascending positions of the labels to compare.
        named: returns the name of the row at a position.
        among: if given, only the first so many of the N rows are named.
        begins: returns the start of the prompt of the row at a position, "" if unknown.
    """
    far = rows[outliers(label[rows])]
    others = np.delete(label[rows], np.searchsorted(rows, far))
    far = far[far < (len(label) if among is None else among)]
    if not len(far):
        return []
    places = [(row, named(int(row)), begins(int(row))) for row in far[:LISTED]]
    listed = ", ".join(
        f"{label[row]:g} ({place}{f', prompt {prompt!r}' if prompt else ''})" for row, place, prompt in places
    )
    more = f", and {len(far) - LISTED:,} more" if len(far) > LISTED else ""
    are = "1 label is" if len(far) == 1 else f"{len(far):,} labels are"
    remedy = "Check for typing mistakes."
    if all(is_code(value) for value in label[far]):
        remedy = "Correct typing mistakes. In surveys, such numbers mean that there is no answer: remove these rows."
    return [
        f"{are} far outside the others, which are between {others.min():g} and {others.max():g}: {listed}{more}. "
        f"{remedy}"
    ]


def _before(
    raw: np.ndarray, label: np.ndarray, weight: np.ndarray, tokens: np.ndarray, transform: str
) -> dict[str, Any]:
    """Return the labels in the data next to what the transform makes of them."""
    histogram = _histogram(raw, weight, tokens)
    _, _, bins = _bins(raw)
    for i, each in enumerate(histogram):
        learned = label[bins == i]
        each["learned_low"] = _rounded(learned.min()) if len(learned) else None
        each["learned_high"] = _rounded(learned.max()) if len(learned) else None
    return {"transform": transform, "mean": _rounded(raw.mean()), "std": _rounded(raw.std()), "histogram": histogram}


def _bins(label: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (lower ends, upper ends, bin index of each label): one bin per label, or ten bins if there are many."""
    values, bins = np.unique(label, return_inverse=True)
    if len(values) <= _VALUES:
        return values, values, bins
    edges = np.histogram_bin_edges(label, _BINS)
    return edges[:-1], edges[1:], np.digitize(label, edges[1:-1])


def _histogram(label: np.ndarray, weight: np.ndarray, tokens: np.ndarray) -> list[dict[str, Any]]:
    lows, highs, bins = _bins(label)
    rows, weights, lengths = (np.bincount(bins, of, len(lows)) for of in (None, weight, tokens))
    return [
        {
            "low": float(lows[i]),
            "high": float(highs[i]),
            "rows": int(rows[i]),
            "weight": _rounded(weights[i]),
            "tokens": _rounded(lengths[i] / rows[i]) if rows[i] else 0.0,
        }
        for i in range(len(lows))
    ]


def _targets(
    targets: np.ndarray, beta: float, is_known: bool, warnings: list[str], *, tail: float | None
) -> dict[str, Any]:
    """Return the sizes of targets, and append a warning if they are too small or too large.

    `tail` is the share of the labels' variance that 5% of them have, if they have a long tail, see `tail_share`.
    """
    size, greatest = float(np.sqrt((targets**2).mean())), float(targets.max())
    low, high = TARGETS
    beyond = int((targets > high).sum())
    better = f"{beta * size / _GOOD_TARGET:.2g}"
    advice = f"With beta={better} it would be {_GOOD_TARGET:g}." if size and better != f"{beta:.2g}" else ""
    if size < low:
        warnings.append(
            f"The target log-ratios (z − c)/β are {size:.2g} nats in root mean square, below {low:g}. There is little "
            f"to learn at beta={beta:g}. {advice}".rstrip()
        )
    elif beyond:
        if tail:  # which another β does not change
            advice += (
                " A few of the labels have more than half of their variance. If their order is what counts, set "
                'label_transform="quantile,center".'
            )
        warnings.append(
            f"{counted(beyond, 'target log-ratio')} (z − c)/β above {high:g} nats, up to {greatest:.0f}. A model "
            f"cannot move that far from its reference and still write well. The root mean square is {size:.3g} at "
            f"beta={beta:g}. {advice.strip()}".rstrip()
        )
    return {
        "rms": _rounded(size),
        "median": _rounded(np.median(targets)),
        "max": _rounded(greatest),
        "above_50": beyond,
        "log_z_is_known": is_known,
    }


def _weights(weights: np.ndarray, is_given: bool, sft_mask: np.ndarray) -> dict[str, Any]:
    total = weights.sum()
    return {
        "is_given": is_given,
        "min": float(weights.min()),
        "median": float(np.median(weights)),
        "max": float(weights.max()),
        "zero": int((weights == 0).sum()),
        "demonstrations": _rounded(weights[sft_mask].sum() / total) if total else None,
        "effective_rows": _rounded(total**2 / (weights**2).sum()) if total else 0.0,
    }


def repeats(
    label: np.ndarray, own: np.ndarray, continuous: np.ndarray, answer: np.ndarray, named: Callable[[int], str]
) -> dict[str, Any]:
    """Return counts and names of rows with the same prompt and completion. Each row is in at most one of the counts.

    Args:
        label, continuous, answer, named: as in `label_report`.
        own: `(N,)` labels to show.

    Returns:
        - `contradicting`: rows that have the same prompt and completion as another row, and a different label of the
          same type; `contradicting_rows`, the names and labels of the first pairs of them;
        - `repeated`: the other rows that have the same prompt and completion as an earlier row; `repeated_rows`, the
          names of the first of them, each with the row that it repeats.
    """
    # After sorting by answer, type and label, contradicting rows form a run in which the label changes
    order = np.lexsort((label, continuous, answer))
    starts = np.r_[True, (np.diff(answer[order]) != 0) | (np.diff(continuous[order]) != 0)]
    run = starts.cumsum() - 1
    first = np.flatnonzero(starts)
    last = np.r_[first[1:], len(label)] - 1
    differs = label[order[first]] != label[order[last]]
    contradicts = np.zeros(len(label), dtype=bool)
    contradicts[order] = differs[run]
    pairs: dict[tuple[str, str], str] = {}
    earliest = np.minimum.reduceat(order, first)
    for one in np.sort(earliest[differs])[:_NAMED]:
        alike = (answer == answer[one]) & (continuous == continuous[one])
        other = np.flatnonzero(alike & (label != label[one]))[0]
        two = _pair(named, (int(one), f" ({own[one]:g})"), (int(other), f" ({own[other]:g})"))
        pairs.setdefault((named(int(one)), named(int(other))), two)
    _, first_of, inverse = np.unique(answer, return_index=True, return_inverse=True)
    earlier = first_of[inverse]
    repeated = np.flatnonzero((earlier != np.arange(len(answer))) & ~contradicts)
    return {
        "repeated": len(repeated),
        "repeated_rows": [
            *dict.fromkeys(_pair(named, (int(earlier[row]), ""), (int(row), "")) for row in repeated[:_NAMED])
        ],
        "contradicting": int(contradicts.sum()),
        "contradicting_rows": [*pairs.values()],
    }


def contradictions_in_words(found: Mapping[str, Any]) -> list[str]:
    """Return a warning if `repeats` has found contradicting rows."""
    if not found["contradicting"]:
        return []
    pairs = found["contradicting_rows"]
    listed, more = "; ".join(pairs[:LISTED]), "; …" if len(pairs) > LISTED else ""
    return [
        f"{found['contradicting']:,} rows contradict one another: the same prompt and completion with different "
        f"labels, {listed}{more}. This is expected for votes by several people. Otherwise a label is wrong."
    ]


def _pair(named: Callable[[int], str], one: tuple[int, str], other: tuple[int, str]) -> str:
    """Return the names of two rows (position, text after the name). A file that both are in is named once.

    Example:
        >>> _pair(["a.csv, line 2", "a.csv, line 5"].__getitem__, (0, " (1)"), (1, " (4)"))
        'a.csv, line 2 (1) and line 5 (4)'
    """
    first, second = named(one[0]), named(other[0])
    file = first.rpartition(", ")[0]
    if file and file == second.rpartition(", ")[0]:
        second = second.rpartition(", ")[2]
    return f"{first}{one[1]} and {second}{other[1]}"


def _prompts(prompt: np.ndarray) -> dict[str, Any]:
    _, answers = np.unique(prompt, return_counts=True)
    edges = [1, 2, 3, 5, 9, 17]
    names = ["1", "2", "3–4", "5–8", "9–16", "17 or more"]
    counts = np.bincount(np.digitize(answers, edges) - 1, minlength=len(names))
    return {
        "count": len(answers),
        "mean_answers": _rounded(answers.mean()),
        "max_answers": int(answers.max()),
        "with_answers": {name: int(count) for name, count in zip(names, counts, strict=True) if count},
    }


def _class_weights(
    weights: np.ndarray, chosen: np.ndarray, as_set: tuple[float, float], warnings: list[str]
) -> dict[str, float] | None:
    desirable, undesirable = float(weights[chosen].sum()), float(weights[~chosen].sum())
    if not desirable or not undesirable:
        return None
    total = desirable + undesirable
    advice = {
        "desirable_weight": float(f"{total / (2 * desirable):.4g}"),
        "undesirable_weight": float(f"{total / (2 * undesirable):.4g}"),
    }
    desirable, undesirable = desirable * as_set[0], undesirable * as_set[1]
    if max(desirable, undesirable) > _BALANCED * min(desirable, undesirable) > 0:
        warnings.append(
            f"Desirable and undesirable rows weigh {desirable / undesirable:.3g} to 1. To balance them, set "
            f"desirable_weight={advice['desirable_weight']:g}, undesirable_weight={advice['undesirable_weight']:g}."
        )
    return advice


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def counted(count: float, noun: str) -> str:
    """A number and its noun, which is in the plural unless the number is 1.

    Example:
        >>> counted(1, "row"), counted(1200, "row"), counted(1.5, "epoch")
        ('1 row', '1,200 rows', '1.5 epochs')
    """
    return f"{count:,.12g} {noun}{'' if count == 1 else 's'}"
