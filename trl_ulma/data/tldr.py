"""Summarize from feedback (TL;DR): summaries of posts that were compared in pairs, or rated from 1 to 7."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from trl_ulma.data.adapters import LIKED, Adapter, LeftOut, Outcome, as_number, compared, labeled

ASPECTS = ("overall", "accuracy", "coverage", "coherence")
_POSTS = ("post", "article")  # what is summarized: one of them, the other is empty or missing


def tldr(rows: Iterable[Mapping[str, Any]], *, aspect: str = "overall", liked: bool = False) -> Iterator[Outcome]:
    r"""Two rows per comparison, with label 1 for the chosen summary and 0 for the other. One row per rated summary.

    Args:
        rows: `info` (with `subreddit`, `title` and `post`, or with `article`), and either `summaries` (two, each with
            `text`) and `choice`, or `summary` with `text` and `axes`.
        aspect: the entry of `axes` that is the continuous label of rated summaries.
        liked: chosen summaries are not demonstrations.

    Example:
        >>> info = {"subreddit": "tea", "title": "Hot", "post": "It was hot."}
        >>> raw = {"info": info, "summaries": [{"text": "Tea."}, {"text": "Hot tea."}], "choice": 1}
        >>> [row["label"] for row in tldr([raw])]
        [0.0, 1.0]
    """
    if aspect not in ASPECTS:
        raise ValueError(f"aspect is {aspect!r}; it must be one of {ASPECTS}.")
    for raw in rows:
        is_rated = "summaries" not in raw
        if not is_rated and aspect != "overall":
            raise ValueError(f"The summaries are compared, and not rated by aspects. Remove the aspect {aspect!r}.")
        prompt = _prompt(raw["info"])
        if is_rated:
            summary = raw["summary"] if isinstance(raw["summary"], Mapping) else {}
            if prompt is None:
                yield LeftOut("its post is empty or not text")
                continue
            axes = summary.get("axes")
            rating = axes.get(aspect) if isinstance(axes, Mapping) else None
            yield labeled(prompt, summary.get("text"), rating, label_type="continuous", scale=(1, 7))
            continue
        summaries, choice = raw["summaries"], as_number(raw["choice"])
        if not isinstance(summaries, list) or not all(isinstance(each, Mapping) for each in summaries):
            yield from [LeftOut("its summaries are not a list")] * 2
        elif prompt is None:
            yield from [LeftOut("its post is empty or not text")] * len(summaries)
        elif choice not in range(len(summaries)):
            yield from [LeftOut("its choice is not one of the summaries")] * len(summaries)
        else:
            yield from compared(
                labeled(prompt, summary.get("text"), place == choice, liked=liked)
                for place, summary in enumerate(summaries)
            )


def _prompt(info: Any) -> str | None:
    if not isinstance(info, Mapping):
        return None
    post, article = (text if isinstance(text := info.get(name), str) and text.strip() else None for name in _POSTS)
    if post is not None:
        named = (("SUBREDDIT", f"r/{info.get('subreddit')}"), ("TITLE", info.get("title")), ("POST", post))
        shown = [f"{name}: {text}" for name, text in named if text and text != "r/None"]
        return "\n\n".join([*shown, "TL;DR:"])
    return None if article is None else f"{article}\n\nTL;DR:"


TLDR = Adapter(
    tldr,
    needs=(("info", "summaries", "choice"), ("info", "summary", "worker")),
    options=LIKED
    | {
        "--aspect": {
            "choices": ASPECTS,
            "default": "overall",
            "help": "the rating to use as the label of rated summaries (default: %(default)s)",
        },
    },
)
