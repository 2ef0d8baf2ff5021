"""Which implementation of a decode step ran, and why not a faster one."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from moyu.errors import UserError

StepName = Literal["native", "compiled", "general"]
FASTEST: tuple[StepName, ...] = ("native", "compiled")  # on the CPU, on an accelerator


@dataclass(frozen=True)
class Trace:
    """One decode step: the implementation that ran, and why a faster one, or all of it, did not (None: it is the fastest)."""

    step: StepName
    because: str | None = None

    def __str__(self) -> str:
        return self.step if self.because is None else f"{self.step} ({self.because})"


NATIVE, COMPILED = Trace("native"), Trace("compiled")


class Traces:
    """The decode steps of a session, counted by what ran."""

    def __init__(self) -> None:
        """Nothing has run."""
        self.counts: Counter[Trace] = Counter()
        self.sparse_rows = 0  # activation rows that ran under the plan

    def note(self, trace: Trace) -> None:
        """Count a decode step."""
        self.counts[trace] += 1

    def of(self, step: StepName) -> int:
        """How many decode steps an implementation took, in whole or for the layers alone."""
        return sum(count for trace, count in self.counts.items() if trace.step == step)

    def summary(self) -> str:
        """What ran, for a line of output: each implementation with its reason, the most frequent first."""
        return "; ".join(str(trace) for trace, _ in self.counts.most_common()) or "no decode step ran"

    def require_fastest(self) -> None:
        """Raise UserError where a decode step took another implementation than the fastest."""
        slow = next((t for t in self.counts if t.step not in FASTEST), None)
        if slow is not None:
            raise UserError(f"a decode step was not the fastest there is: {slow}", "leave --strict out to accept that")
