"""What words and other texts mean as labels, as far as it is common."""

import math
import re
from collections.abc import Sequence
from typing import Any

from trl_ulma.data.proposals import quoted
from trl_ulma.labels import are_missing

# Common words for good and bad labels
_GOOD = frozenset(
    (
        "up", "yes", "good", "like", "liked", "positive", "pos", "true", "correct",
        "right", "chosen", "accept", "accepted", "win", "helpful", "safe", "desirable", "satisfied", "y", "t", "+",
        "👍", "ja", "pass", "passed", "approve", "approved",
        "oui", "sí", "wahr", "vrai", "verdadero", "thumbs up", "thumb up", "thumbsup", "+1", "upvote", "upvoted",
    )
)  # fmt: skip
_BAD = frozenset(
    (
        "down", "no", "bad", "dislike", "disliked", "negative", "neg", "false",
        "incorrect", "wrong", "reject", "rejected", "lose", "harmful", "unsafe", "undesirable", "dissatisfied", "n",
        "f", "-", "👎", "nein", "non", "falsch", "faux", "falso", "thumbs down", "thumb down", "thumbsdown", "-1",
        "downvote", "downvoted", "fail", "failed", "disapprove", "disapproved",
    )
)  # fmt: skip


def label_map_for(words: Sequence[str]) -> str:
    """The value to suggest for `--label_map`, with numbers for known words, quoted for the shell.

    Example:
        >>> label_map_for(["thumbs_down", "👍🏽"]), label_map_for(["very good", "poor"])
        ('thumbs_down=0,👍🏽=1', '"very good=NUMBER,poor=NUMBER"')
    """
    # A value of an option must not begin with a dash
    numbers = {word: known_number(word) for word in sorted(words[:10], key=lambda word: word.startswith("-"))}
    return quoted(",".join(f"{word}={'NUMBER' if number is None else number}" for word, number in numbers.items()))


def known_number(word: str) -> int | None:
    """1 for a common word for a good label, 0 for one for a bad label, and None for other words.

    Example:
        >>> known_number("thumbs_up"), known_number("No"), known_number("fair")
        (1, 0, None)
    """
    plain = _plain(word)
    return 1 if plain in _GOOD else 0 if plain in _BAD else None


# A number on a scale as text, such as 4/5, and as stars, of which empty ones can follow
_FRACTION = re.compile(r"(\d+(?:[.,]\d+)?)\s*(?:/|out of|of|von|sur|de)\s*(\d+)(?:\s*\w+)?", re.IGNORECASE)
_STARS = re.compile("([★⭐]+)([☆✩]*)")
# With more different labels, no map of them is suggested
_MOST_WORDS = 20


def scale_of(labels: Sequence[Any]) -> dict[str, int | float]:
    """The numbers of labels that are one scale as text, such as 4/5 or ★★★☆☆, from the lowest. {} for other labels.

    Example:
        >>> scale_of(["5/5", "2/5", None, "n/a"]), scale_of(["★★☆", "★☆☆"])
        ({'2/5': 2, '5/5': 5}, {'★☆☆': 1, '★★☆': 2})
        >>> scale_of(["4/5", "good"]), scale_of(["5/5", "2/10"]), scale_of(["7/5"])
        ({}, {}, {})
    """
    there = [label for label in labels if label is not None]
    if any(isinstance(label, list | dict) for label in there):
        return {}
    words = dict.fromkeys(label for label, is_none in zip(there, are_missing(there), strict=True) if not is_none)
    found: dict[str, int | float] = {}
    greatest = set()
    for word in words:
        plain = word.strip().replace("\N{VARIATION SELECTOR-16}", "") if isinstance(word, str) else ""
        if fraction := _FRACTION.fullmatch(plain):
            value = float(fraction[1].replace(",", "."))
            found[word] = int(value) if value.is_integer() else value
            greatest.add(int(fraction[2]))
        elif stars := _STARS.fullmatch(plain):
            found[word] = len(stars[1])
            greatest |= {len(plain)} if stars[2] else set()
        else:
            return {}
    is_one = len(greatest) <= 1 and max(found.values(), default=0) <= min(greatest, default=math.inf)
    # A map of labels has commas and equals signs of its own
    is_map = len(found) <= _MOST_WORDS and not any({",", "="} & {*word} for word in found)
    return dict(sorted(found.items(), key=lambda each: each[1])) if is_one and is_map else {}


# Those that only say whether what the name of the column says is true
_ANSWERS = frozenset(
    (
        "yes", "no", "true", "false", "y", "n", "t", "f", "ja", "nein", "oui", "non", "sí", "wahr", "falsch", "vrai",
        "faux", "verdadero", "falso", "positive", "negative", "pos", "neg",
    )
)  # fmt: skip


def says_yes(word: str) -> bool:
    """Whether a label is an answer such as yes or no, so that the name of its column says which one is good.

    Example:
        >>> says_yes("No"), says_yes("unsafe")
        (True, False)
    """
    return _plain(word) in _ANSWERS


def _plain(word: str) -> str:
    """A label without skin tones, colons of emoji names, and the case."""
    word = re.sub("[\N{VARIATION SELECTOR-16}\U0001f3fb-\U0001f3ff]", "", word.strip().lower())
    if word.startswith(":") and word.endswith(":"):
        word = word[1:-1]
    return re.sub(r"(?<=\w)[_-](?=\w)", " ", word)
