"""Drafts from the text itself: what followed the last few tokens when they stood there before.

Prompt lookup (the idea is LLMA's, arXiv 2304.04487): it reads no weights, and texts that repeat themselves or their prompt, as
code, summaries and answers about a document do, are full of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

LONGEST, SHORTEST = 4, 2  # tokens that must agree


@dataclass(frozen=True)
class Match:
    """Where the last `size` tokens stood before: what followed them is at `start`."""

    size: int
    start: int


class Lookup:
    """A text that knows where each of its sequences of two to four tokens last stood."""

    def __init__(self, tokens: Iterable[int]) -> None:
        """tokens: the prompt."""
        self.tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # where what follows a sequence stands, the last time that it came
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """The text goes on with `token`."""
        place = len(self.tokens)
        for size in range(SHORTEST, min(LONGEST, place) + 1):
            self._after[tuple(self.tokens[place - size :])] = place
        self.tokens.append(token)

    def find(self) -> Match | None:
        """The longest end of the text that stood there before, the last time that it did; None where none of two tokens did."""
        for size in range(min(LONGEST, len(self.tokens)), SHORTEST - 1, -1):
            start = self._after.get(tuple(self.tokens[-size:]))
            if start is not None:
                return Match(size, start)
        return None

    def following(self, match: Match, most: int) -> list[int]:
        """At most `most` tokens that came after the match. Where they reach the end of the text, the text repeats itself there."""
        period = len(self.tokens) - match.start
        return [self.tokens[match.start + i % period] for i in range(most)]
