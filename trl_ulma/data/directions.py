"""Whether a low number in a column is better, and the words in the names of columns."""

import re
from collections.abc import Mapping
from typing import Any

from trl_ulma.data.names import Names
from trl_ulma.labels import LabelTransform

# Beginnings of words for what is good in an answer, and for what is bad
_GOOD_STARTS = re.compile(
    "accept|accura|agree|align|appropriate|approv|clear|coheren|complete|concise|consisten|correct|desirable|ethic|"
    "factual|fair|faithful|favo|fluen|ground|helpful|honest|interest|like|natural|plausib|pleasant|polite|proper|"
    "professional|quality|readable|relevan|reliab|respect|safe|satisf|succe|support|true|trust|truth|usable|useful|"
    "valid|verif"
)
_BAD_STARTS = re.compile(
    "abus|against$|aggress|annoy|attack|bad$|bias|boring|brier$|broken|bugs?$|buggy|cer$|complain|concern|confus|"
    "contradict|"
    "crash|danger|decepti|deduct|defect|discriminati(?!v)|discriminatory|distances?$|divergence$|down$|downvot|error|"
    "evasi|fabricat|fail|fake|"
    "false|fault|flag|flaw|frustrat|garbage|gibberish|hallucinat|harm(?!on)|hate|hostil|illegal|insult|issues?$|"
    "jailbr[eo]|latency$|leak(?!proof)|loss(es)?$|mae$|manipulati|misinform|mislead|mistake|mse$|negativ|nll$|nonsens|"
    "nsfw|"
    "obscen|offens|offtopic|omission|penalt|perplex|plagiari|poor|ppl$|profan|racis|rank(ing)?$|redundan|refus|regret|"
    "reject|repetit|risk|rmse$|rude|severity|sexis|sexual|spam|stereotyp|sycophan|terrible|threat|thumbs?down$|"
    "timeouts?$|"
    "tox|typos?$|unanswered|unresolved|useless|violat|violen|vulgar|warning|wer$|wors|wrong|"
    "fehler|giftig|schlecht|schädlich|erreur|mauvais"
)
_OPPOSITE = re.compile("(?:un|in|im|ir|dis|non|mis)(?=[a-z]{4})")  # unhelpful, inaccurate, unbiased
_NOT = frozenset(("no", "not", "non", "never", "without", "lack", "less", "low"))  # no_errors
# Words that turn a number around, so that a high one is better, before a word for what is bad: neg_loss, 1_minus_wer
_TURNED = frozenset(("neg", "negative", "negated", "minus", "inverse", "inverted", "anti", "reverse", "reversed"))
_TURNED |= {"reciprocal", "percentile"}
_ENDED = frozenset(("free", "fixed", "resolved", "solved", "reduction", "avoidance", "resistance", "prevention"))
# error_free, toxicity_reduction, absence_of_harm
_ENDED |= {"absence", "lack", "detection", "handling", "recovery", "inverted", "reversed"}
# Words of scales from bad to good, such as thumbs_up_or_down
_BEST = frozenset(("up", "yes", "good", "like", "likes", "positive", "safe", "correct", "right", "true", "helpful"))
_BEST |= {"pass", "passed", "win", "wins", "better"}
_FILLERS = frozenset(("a", "any", "at", "all", "is", "really", "so", "too", "very", "was"))  # not_very_helpful


def direction(name: str) -> str:
    """What to do about a column that looks like a label for which lower is better. "" for another one.

    Example:
        >>> direction("rating"), direction("harm_score")
        ('', ' A low `harm_score` looks better, so train with --label_transform lower_is_better.')
    """
    steps = reversing(name)
    ranks = "--label_type continuous and " if "," in steps else ""
    return f" A low `{name}` looks better, so train with {ranks}--label_transform {steps}." if steps else ""


def noted_direction(name: str, *, imitates: bool = True) -> str:
    """What `prepare` notes about a label for which lower looks better, and which it reads as better if it is high.

    Args:
        name: of the column or the score.
        imitates: whether answers with the label 1 become demonstrations.

    Example:
        >>> noted_direction("hallucination").partition(",")[0], noted_direction("rating")
        ('a low `hallucination` looks better', '')
    """
    if not is_lower_better(name):
        return ""
    liked = "Add --liked, so that no such answer becomes a demonstration, and train" if imitates else "Train"
    return (
        f"a low `{name}` looks better, but a high one is read as better here. {liked} with --label_transform "
        f"{reversing(name)}; or give --label_map"
    )


def reversing(name: str) -> str:
    """The label transform for a column that looks like a label for which lower is better. "" for another one.

    Example:
        >>> reversing("rating"), reversing("harm_score"), reversing("rank")
        ('', 'lower_is_better', 'lower_is_better,prompt_quantile')
    """
    if not is_lower_better(name):
        return ""
    is_rank = {"rank", "ranking"}.intersection(words_of(name))
    return "lower_is_better,prompt_quantile" if is_rank else "lower_is_better"


def check_direction(
    where: str, columns: str | Mapping[str, str] | None, label_map: Any, transform: LabelTransform | str | None
) -> list[str]:
    """A warning if the column that is read as the label looks as if lower is better, and nothing reverses it.

    Args:
        where: the name of the dataset.
        columns, label_map: as for `trl_ulma.data.files.load_rows`.
        transform: the label transform of the training.

    Example:
        >>> check_direction("a.csv", "label=errors", None, None)
        ['a.csv: A low `errors` looks better, so train with --label_transform lower_is_better.']
        >>> check_direction("a.csv", "label=errors", None, "lower_is_better,standardize")
        []
    """
    said = direction(Names.of(columns, None).columns.get("label", ""))
    return [f"{where}:{said}"] if said and not label_map and "lower_is_better" not in str(transform) else []


def is_lower_better(name: str) -> bool:
    """Whether the name of a column says that a low number is better.

    Example:
        >>> [is_lower_better(name) for name in ("thumbs_down", "notHelpful", "inaccuracy", "quality issues")]
        [True, True, True, True]
        >>> [is_lower_better(name) for name in ("thumbs_up", "not_toxic", "unbiased", "harmless", "up_or_down")]
        [False, False, False, False, False]
        >>> [is_lower_better(name) for name in ("pass_fail", "neg_loss", "error_reduction", "absence_of_harm", "nll")]
        [False, False, False, False, True]
    """
    words = [word for word in words_of(name) if word not in _FILLERS]
    senses = [_sense(word) for word in words]
    is_not = "yes" not in words and any(
        word in _NOT and sense != 0 for word, sense in zip(words, [*senses[1:], 1], strict=True)
    )
    is_not |= any(word in _TURNED and sense == -1 for word, sense in zip(words, [*senses[1:], 0], strict=True))
    if -1 in senses:
        return not (is_not or not _ENDED.isdisjoint(words) or not _BEST.isdisjoint(words))
    return 1 in senses and is_not


def _sense(word: str) -> int:
    """1 for a word for what is good in an answer, -1 for what is bad, and 0 for other words.

    Example:
        >>> _sense("helpful"), _sense("unhelpful"), _sense("harmless"), _sense("stars")
        (1, -1, 1, 0)
    """
    sense = -1 if _BAD_STARTS.match(word) else 1 if _GOOD_STARTS.match(word) else 0
    if sense:
        return -sense if "less" in word and not word.startswith("useless") else sense
    stem = _OPPOSITE.sub("", word, count=1)
    return 0 if stem == word else -_sense(stem)


def words_of(name: str) -> list[str]:
    """The words in the name of a column, in lower case.

    Example:
        >>> words_of("Thumbs-down"), words_of("userRating")
        (['thumbs', 'down'], ['user', 'rating'])
    """
    return re.split(r"[_.\s-]+", re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z]{2})", "_", name).lower())
