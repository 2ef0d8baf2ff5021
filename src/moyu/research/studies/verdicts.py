"""From an interval to a verdict, by a rule that is stated before anything runs.

Every condition has a bound and a margin, the smallest effect that would matter. With a 95 % interval [low, high]:

- above: HOLDS where low > bound and high >= bound + margin; FAILS where high < bound + margin; else INCONCLUSIVE.
- below: the mirror image.
- within: HOLDS where the interval lies inside bound ± margin (equivalence), FAILS where it lies outside, else INCONCLUSIVE.

So "no effect" is only ever found by an interval that excludes the smallest effect of interest, never by p > 0.05.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from moyu.measure.statistics import Interval, power

Verdict = Literal["HOLDS", "FAILS", "INCONCLUSIVE"]


@dataclass(frozen=True)
class Condition:
    """One thing a claim predicts."""

    name: str
    meaning: str  # of the number
    kind: Literal["above", "below", "within"]
    bound: float
    margin: float

    @property
    def rule(self) -> str:
        """The rule in words."""
        match self.kind:
            case "above":
                return f"holds if all of the interval is above {self.bound:g}; refuted if all is below {self.bound + self.margin:g}"
            case "below":
                return f"holds if all of the interval is below {self.bound:g}; refuted if all is above {self.bound - self.margin:g}"
        low, high = self.bound - self.margin, self.bound + self.margin
        return f"holds if the interval lies within {low:g} to {high:g}; refuted if it lies outside"

    def verdict(self, interval: Interval | None) -> Verdict:
        """What the rule says of an interval; INCONCLUSIVE where there is none."""
        if interval is None:
            return "INCONCLUSIVE"
        if self.kind == "within":
            low, high = self.bound - self.margin, self.bound + self.margin
            if low < interval.low and interval.high < high:
                return "HOLDS"
            return "FAILS" if interval.high < low or interval.low > high else "INCONCLUSIVE"
        sign = 1 if self.kind == "above" else -1
        low, high = sorted((sign * interval.low, sign * interval.high))
        if high < sign * self.bound + self.margin:
            return "FAILS"
        return "HOLDS" if low > sign * self.bound else "INCONCLUSIVE"

    def power(self, interval: Interval) -> float:
        """Power at the smallest effect of interest, with the standard error that was reached.

        A pure upper limit has no margin of its own: the chance to stay below it where nothing is there.
        """
        return power(interval.error, self.margin or abs(self.bound))


@dataclass(frozen=True)
class Control:
    """What must be true of the instrument: where it is not, the study says nothing."""

    name: str
    meaning: str
    kind: Literal["at most", "at least"]
    limit: float

    @property
    def rule(self) -> str:
        """The rule in words."""
        return f"{self.kind} {self.limit:g}"

    def passed(self, value: float) -> bool:
        """Whether the value respects the limit; nan does not."""
        return value <= self.limit if self.kind == "at most" else value >= self.limit


@dataclass(frozen=True)
class Finding:
    """What a study measured."""

    estimates: Mapping[str, Interval]  # by condition
    controls: Mapping[str, float] = field(default_factory=dict)  # by control
    nulls: Mapping[str, float] = field(default_factory=dict)  # what chance, popularity or an untrained model reach
    details: Mapping[str, Any] = field(default_factory=dict)  # plain values, for tables and figures
    notes: tuple[str, ...] = ()


def judge(conditions: Iterable[Condition], controls: Iterable[Control], finding: Finding) -> Verdict:
    """HOLDS where every condition holds, FAILS where one fails, INCONCLUSIVE otherwise and where a control did not pass."""
    if not all(c.passed(finding.controls.get(c.name, float("nan"))) for c in controls):
        return "INCONCLUSIVE"
    found = {c.verdict(finding.estimates.get(c.name)) for c in conditions}
    if "FAILS" in found:
        return "FAILS"
    return "HOLDS" if found == {"HOLDS"} else "INCONCLUSIVE"
