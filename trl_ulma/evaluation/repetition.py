"""Finds out while an answer is generated whether it repeats itself without end, as small models do."""

from collections.abc import Callable, Sequence

# The longest span whose repetition is found, in tokens
LONGEST = 128
# A loop has this many tokens after the first occurrence of its span, and at least four more occurrences. Shorter
# repetitions are normal: laughter, a refrain, cards of a web page, the empty cells of a table.
LETTERS = 128
# The same for spans without letters, such as the zeros of a matrix or a line of dashes
OTHERS = 192
# What ends a sentence or a line, and what can follow it there
_ENDS = (".", "!", "?", "…", "。", "！", "？", "\n")
_AFTER = " \"'”’»)]*`"


class Repetition:
    """Follows the tokens of an answer, and finds the span that they repeat.

    Args:
        text_of: returns the text of tokens.

    Attributes:
        tokens: the tokens so far.
        kept: how many of them remain if the later occurrences of the span are left out. None if there is no loop.

    Example:
        >>> words = "I see . A cat . A cat . A cat .".split()
        >>> repetition = Repetition(lambda tokens: "".join(words[token] for token in tokens))
        >>> for word in words:
        ...     repetition.add(words.index(word))
        >>> repetition.undecided, repetition.kept  # it is not long enough
        (7, None)
    """

    def __init__(self, text_of: Callable[[Sequence[int]], str]):
        self.text_of = text_of
        self.tokens: list[int] = []
        self.kept: int | None = None
        # By period: how many of the last tokens are equal to the one that is a period before them
        self._equal = [0] * (LONGEST + 1)

    @property
    def undecided(self) -> int:
        """How many of the last tokens repeat earlier ones, and would be left out if a loop began with them."""
        return max(self._equal)

    def add(self, token: int) -> None:
        """Take the next token."""
        for period in range(1, min(len(self.tokens), LONGEST) + 1):
            self._equal[period] = self._equal[period] + 1 if self.tokens[-period] == token else 0
        self.tokens.append(token)
        for period, equal in enumerate(self._equal[1:], 1):
            if equal >= max(4 * period, LETTERS):
                if equal >= OTHERS or any(map(str.isalpha, self.text_of(self.tokens[-period:]))):
                    self.kept = self._end(len(self.tokens) - equal, period)
                return  # a longer period is a multiple of this one

    def _end(self, kept: int, period: int) -> int:
        """A place for the end: that of the sentence or line in which the second occurrence begins, if it has one.

        The text before the loop can end like the span, so that the second occurrence begins within a sentence.
        """
        for place in range(kept, kept + period):
            if self.text_of(self.tokens[:place]).rstrip(_AFTER).endswith(_ENDS):
                return place
        return kept
