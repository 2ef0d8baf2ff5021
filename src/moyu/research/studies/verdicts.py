"""From an interval to a verdict, by a rule that is stated before anything runs.

Every condition has a bound and a margin, the smallest effect that would matter. With a 95 % interval [low, high]:

- above: HOLDS if low > bound and high >= bound + margin; FAILS if high < bound + margin; else INCONCLUSIVE.
- below: the mirror image.
- within: HOLDS if the interval lies inside bound ± margin (equivalence), FAILS if it lies outside, else INCONCLUSIVE.

So "no effect" is only concluded if the interval excludes the smallest effect of interest, never from p > 0.05.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from moyu.measure.statistics import Interval, power

Verdict = Literal["HOLDS", "FAILS", "INCONCLUSIVE"]


@dataclass(frozen=True)
class Condition:
    """One prediction of a claim."""

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
        """The verdict on an interval; INCONCLUSIVE without one."""
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

        An upper limit has no margin of its own; then it is the probability to stay below the limit if there is no effect.
        """
        return power(interval.error, self.margin or abs(self.bound))


@dataclass(frozen=True)
class Control:
    """A check of the instrument. If it fails, the study is inconclusive."""

    name: str
    meaning: str
    kind: Literal["at most", "at least"]
    limit: float

    @property
    def rule(self) -> str:
        """The rule in words."""
        return f"{self.kind} {self.limit:g}"

    def passed(self, value: float) -> bool:
        """Whether the value is within the limit; nan is not."""
        return value <= self.limit if self.kind == "at most" else value >= self.limit


@dataclass(frozen=True)
class Finding:
    """The measurements of a study."""

    estimates: Mapping[str, Interval]  # by condition
    controls: Mapping[str, float] = field(default_factory=dict)  # by control
    nulls: Mapping[str, float] = field(default_factory=dict)  # values of chance, popularity or an untrained model
    details: Mapping[str, Any] = field(default_factory=dict)  # plain values, for tables and figures
    notes: tuple[str, ...] = ()


def judge(conditions: Iterable[Condition], controls: Iterable[Control], finding: Finding) -> Verdict:
    """HOLDS if every condition holds, FAILS if one fails; INCONCLUSIVE otherwise, or if a control fails."""
    if not all(c.passed(finding.controls.get(c.name, float("nan"))) for c in controls):
        return "INCONCLUSIVE"
    found = {c.verdict(finding.estimates.get(c.name)) for c in conditions}
    if "FAILS" in found:
        return "FAILS"
    return "HOLDS" if found == {"HOLDS"} else "INCONCLUSIVE"
