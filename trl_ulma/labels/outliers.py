"""Labels far outside the others, such as a 55 among ratings from 1 to 5."""

import numpy as np

# With fewer labels than this, no label is called far outside
_ENOUGH = 10
# At most this many labels are, or 1% of all up to a limit
_FEW, _MANY = 3, 100
# A scale of ratings has at most this many values, each of which occurs twice on average. The others have 3 or more,
# because the range of 1 and 2 says little about a scale that a rare 5 may be on.
_VALUES, _OTHERS = 12, 3
# If the others have this many values, and this share of them is at the end beside the gap, as on a scale of ratings but
# not in the tail of counts, a gap as large as their range is far: 9 beyond 1 to 5
_WELL_KNOWN, _AT_THE_END = 4, 0.05
# How many times the range of the other labels the gap to them must be. Labels that are no ratings can have long tails.
_GAP_OF_RATINGS, _GAP = 1.0, 5.0
# What survey programs write if there is no answer, in any number of rows
_CODES = tuple(sign * code for code in (9, 77, 88, 97, 98, 99, 997, 998, 999, 9999) for sign in (-1, 1))

# Labels have a long tail if this part of them has this share of their variance. The tail of an exponential distribution
# has 0.48, a normal one 0.28, and a log-normal one with a sigma of 1 has 0.68.
_TAIL, _HEAVY = 0.05, 0.5
# With fewer labels than this, no tail is called long
_ENOUGH_FOR_TAIL = 50
# This share of the labels, and at least one, can be typing mistakes: those farthest from the mean
_MISTAKES = 0.001
# The greatest labels of scales that can have many values
_FULL_MARKS = (5, 7, 10, 100)


def outliers(label: np.ndarray) -> np.ndarray:
    """`(M,)` positions of labels far outside the others, lowest labels first.

    The greatest or least labels are far outside if the gap between them and the next label is large, compared with the
    whole range of the others: for ratings on a scale (at most 12 values), larger than that range, or as large if the
    others have 4 or more values and often the one beside the gap; for other labels, larger than 5 times that range. At
    most 3 labels, or 1% of them, are far outside. Of ratings, more are if they are codes for a missing answer, such as
    99.

    Args:
        label: `(N,)` labels.

    Example:
        >>> outliers(np.array([1, 2, 5, 4, 3, 55, 1, 2, 3, 5, 4, 1]))
        array([5])
    """
    order = np.argsort(label, kind="stable")
    ordered = np.asarray(label, dtype=np.float64)[order]
    total = len(ordered)
    if total < _ENOUGH:
        return order[:0]
    is_scale = len(np.unique(ordered)) <= min(_VALUES, total / 2)

    most = min(max(_FEW, min(total // 100, _MANY)), total // 5)
    for count in range(most, 0, -1):
        for below in range(count + 1):
            above = total - (count - below)
            others = ordered[below:above]
            needed = (_GAP_OF_RATINGS if is_scale else _GAP) * (others[-1] - others[0])
            gaps = [others[0] - ordered[below - 1]] if below else []
            gaps += [ordered[above] - others[-1]] if above < total else []
            if not min(gaps) >= needed > 0:
                continue
            ends = ([others[0]] if below else []) + ([others[-1]] if above < total else [])
            is_well_known = (
                is_scale
                and len(np.unique(others)) >= _WELL_KNOWN
                and all((others == end).mean() >= _AT_THE_END for end in ends)
            )
            if (min(gaps) > needed or is_well_known) and len(np.unique(others)) >= _OTHERS:
                return np.r_[order[:below], order[above:]]
    are_codes = np.isin(ordered, _CODES)
    if is_scale and not are_codes.all():
        low, high = ordered[~are_codes][[0, -1]]
        far = are_codes & (np.maximum(low - ordered, ordered - high) >= high - low)
        if high > low and far.sum() > most:
            return order[far]
    return order[:0]


def tail_share(label: np.ndarray) -> float | None:
    """The share of the variance that the 5% of labels farthest from the mean have, if labels have a long tail.

    They have one, as numbers of likes do, if this share is above one half. A few labels then dominate a squared error.
    The farthest label, or 0.1% of all, does not count, because it can be a typing mistake.

    Args:
        label: `(N,)` labels, without outliers.

    Returns:
        The share; None if there is no long tail. Scales of ratings have none, however rare their ends are: those with
        at most 12 values, from 0 or more to 5, 7, 10 or 100, or with a tail toward 0. Fewer than 50 labels have none.

    Example:
        >>> tail_share(np.arange(100.0)) is None
        True
        >>> round(tail_share(np.exp(np.arange(100.0) / 10)), 2)
        0.53
    """
    label = np.asarray(label, dtype=np.float64)
    if len(label) < _ENOUGH_FOR_TAIL or len(np.unique(label)) <= _VALUES:
        return None
    if label.min() >= 0 and label.max() in _FULL_MARKS:
        return None
    middle = np.median(label)
    if label.min() >= 0 and middle - label.min() > label.max() - middle:  # which ends at 0
        return None
    order = np.argsort(np.abs(label - label.mean()))
    kept = label[order[: -max(1, round(_MISTAKES * len(label)))]]
    squares = np.sort((kept - kept.mean()) ** 2)
    total = squares.sum()
    share = float(squares[-int(_TAIL * len(squares)) :].sum() / total) if total else 0.0
    return share if share > _HEAVY else None


def is_code(label: float) -> bool:
    """Whether a label far outside the others is a code of survey programs for a missing answer.

    Example:
        >>> is_code(99.0), is_code(55.0)
        (True, False)
    """
    return label in _CODES
