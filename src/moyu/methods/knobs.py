"""Knobs: a method's fields, each with the values that it may have."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Legal:
    """The values that a knob may have."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    one_of: tuple[Any, ...] | None = None
    optional: bool = False  # None as well

    def allows(self, value: Any) -> bool:
        """Whether the knob may have this value."""
        if value is None:
            return self.optional
        if self.one_of is not None:
            return value in self.one_of
        if isinstance(value, str):
            return False
        return (  # written so that nan is refused
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        """As in "rank must be ..."."""
        none = " or None" if self.optional else ""
        if self.one_of is not None:
            return f"one of {', '.join(map(str, self.one_of))}{none}"
        bounds = {"at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
        return " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None) + none

    def wrong(self) -> list[Any]:
        """A value beyond each end, of the kind that the knob has."""
        if self.one_of is not None:
            return ["no such word" if isinstance(self.one_of[0], str) else max(self.one_of) + 1]
        outside = [] if self.at_least is None else [self.at_least - 1]
        outside += [] if self.at_most is None else [self.at_most + 1]
        return outside + [bound for bound in (self.above, self.below) if bound is not None and math.isfinite(bound)]


def knob(
    default: Any,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    one_of: Iterable[Any] | None = None,
    optional: bool = False,
) -> Any:
    """A field of a method with its default and the values that it may have; a flag, True or False, needs no declaration.

    optional: None as well; always so where None is the default.
    """
    words = None if one_of is None else tuple(one_of)
    allowed = Legal(at_least, above, at_most, below, words, optional or default is None)
    return dataclasses.field(default=default, metadata={"legal": allowed})


def legal(field: dataclasses.Field[Any]) -> Legal | None:
    """The values that a knob may have; None = any of its kind."""
    return field.metadata.get("legal")


def check(method: Any) -> None:
    """Refuse a knob that has a value it may not have (ValueError)."""
    for field in dataclasses.fields(method):
        allowed, value = legal(field), getattr(method, field.name)
        if allowed is not None and not allowed.allows(value):
            raise ValueError(f"{field.name} must be {allowed}, not {value!r}")
