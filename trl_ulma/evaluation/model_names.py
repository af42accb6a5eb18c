"""Names of models, as servers spell them in requests and in answers."""

import re
from collections.abc import Mapping

# How a server extends a name: by a date, a version or a revision
_DATE = r"(?:\d{4}-\d\d(?:-\d\d)?|\d\d-\d\d(?:-\d{4})?|\d{3,8})"
_EXTENSION = re.compile(
    rf"(?:[-_:@](?:latest|(?:preview-|exp-)?{_DATE}(?:-preview)?|v\d+(?::\d+)?)|@\S+|\.gguf)*", re.IGNORECASE
)
_LATEST = re.compile(r"[-:@]latest$")


def is_same_model(asked: str, answered: str) -> bool:
    """Whether two names can be those of one model: they are the same, or one extends the other by a path before it, or
    by a date, a version or a revision after it.

    Example:
        >>> is_same_model("gpt-4o", "gpt-4o-2024-08-06"), is_same_model("models/tiny.gguf", "tiny.gguf")
        (True, True)
        >>> is_same_model("gpt-4o", "gpt-4o-mini"), is_same_model("one/tiny", "other/tiny")
        (False, False)
    """
    (path, name), (other_path, other) = map(_parts, (asked, answered))
    if path and other_path and not f"/{path}".endswith(f"/{other_path}") and not f"/{other_path}".endswith(f"/{path}"):
        return False
    shorter, longer = sorted((name, other), key=len)
    return longer.startswith(shorter) and _EXTENSION.fullmatch(longer, len(shorter)) is not None


def other_models(asked: str, answered_by: Mapping[str, int]) -> list[str]:
    """A sentence on each other model that answered, with the number of its answers.

    Example:
        >>> other_models("gpt-4o", {"gpt-4o-2024-08-06": 3, "gpt-4o-mini": 1})
        ['1 answer is of gpt-4o-mini, and not of gpt-4o, which was asked.']
    """
    return [
        f"{count:,} answer{' is' if count == 1 else 's are'} of {name}, and not of {asked}, which was asked."
        for name, count in answered_by.items()
        if not is_same_model(asked, name)
    ]


def _parts(name: str) -> tuple[str, str]:
    """The path of a name and its last part, without the word "latest", which stands for any date."""
    path, _, last = name.strip().casefold().replace("\\", "/").strip("/").rpartition("/")
    return path, _LATEST.sub("", last)
