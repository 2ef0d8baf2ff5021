"""How many tokens to draft and from what, by what steps cost here and by how many drafts were accepted lately."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from statistics import median

MOST = {"text": 15, "weights": 7}  # drafts of a round, at most; costs decide how many of them
# A round must be expected to write tokens so much faster than dense steps do: drafts of weights that are refused cost a step.
GAIN = {"text": 1.02, "weights": 1.08}
TRIAL = 1  # drafts of weights that are tried again after they did not pay
WAIT, LONGEST_WAIT = 32, 256  # tokens between two trials, at first and at most; it doubles
FURTHER = 0.15  # of a step: what a further token in it is taken to cost before one was measured
KEPT = 9  # measurements of a time that count
WARM = 2  # dense steps of one token that are measured first, behind one that makes ready
REFRESH = 64  # verifications between two of one token


def expected_speedup(accepted: float, drafts: int, step_cost: float, verify_cost: float) -> float:
    """Tokens a dense step's time: (1 - b^(D + 1)) / (1 - b) / (D c + v), for an acceptance b taken independent.

    `step_cost` c and `verify_cost` v are times of a drafting step and of a verification, in dense steps.
    """
    tokens = drafts + 1 if accepted == 1 else (1 - accepted ** (drafts + 1)) / (1 - accepted)
    return tokens / (drafts * step_cost + verify_cost)


def best_drafts(accepted: float, step_cost: float, verify_cost: Callable[[int], float], most: int = 16) -> int:
    """The draft length of 1 to `most` with the largest expected speed-up; first of equals.

    `verify_cost`: of a verification of so many tokens, one more than drafts, in dense steps.
    """
    return max(range(1, most + 1), key=lambda d: expected_speedup(accepted, d, step_cost, verify_cost(d + 1)))


@dataclass
class Share:
    """The share of drafts that are accepted, of the last hundred or so; `first` before any was judged."""

    first: float
    hits: float = 0.0
    judged: float = 0.0

    def note(self, hits: int, judged: int) -> None:
        """So many of so many drafts were accepted."""
        self.hits, self.judged = 0.98**judged * self.hits + hits, 0.98**judged * self.judged + judged

    @property
    def value(self) -> float:
        """The share; the first guess counts as two drafts. Never 1, which no experience shows."""
        return min(0.99, (self.hits + 2 * self.first) / (self.judged + 2))


@dataclass
class Pace:
    """What a generation has learned of its costs and its drafts.

    Kinds of drafts: of the "weights", which a plan or the first bits read in part, or of the text, ("text", size of the match).
    """

    steps: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))  # seconds of a dense step
    verified: dict[int, deque[float]] = field(default_factory=dict)  # dense steps of so many tokens, in those of one
    drafts: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))  # seconds of a step that drafts
    shares: dict[Hashable, Share] = field(default_factory=dict)
    waiting: int = 0  # tokens until the weights are tried again
    wait: int = WAIT
    ready: bool = False  # to measure dense steps
    warm: bool = False  # and steps that draft
    since: int = 0  # verifications since one of one token

    def share(self, kind: Hashable) -> Share:
        """How many drafts of a kind are accepted."""
        first = 0.7 if kind == "weights" else 0.5
        return self.shares.setdefault(kind, Share(first))

    def took(self, tokens: int, seconds: float) -> None:
        """A dense step of so many tokens took so long."""
        self.since = 0 if tokens == 1 else self.since + 1
        if not self.ready:  # its weights are laid out, its decoder made
            self.ready = True
        elif tokens == 1:
            self.steps.append(seconds)
        elif self.steps:
            self.verified.setdefault(tokens, deque(maxlen=KEPT)).append(seconds / median(self.steps))

    def cost(self, tokens: int) -> float:
        """A dense step of so many tokens, in those of one: measured, or on the line through its neighbours."""
        known = {1: 1.0} | {count: max(1.0, median(found)) for count, found in self.verified.items()}
        if tokens in known:
            return known[tokens]
        below = max(count for count in known if count < tokens)
        above = min((count for count in known if count > tokens), default=None)
        if above is not None:
            slope = (known[above] - known[below]) / (above - below)
        else:
            slope = (known[below] - 1) / (below - 1) if below > 1 else FURTHER
        return known[below] + slope * (tokens - below)

    def drafted(self, seconds: float) -> None:
        """A step that drafts took so long, on average of a round; the first round makes ready."""
        if self.warm:
            self.drafts.append(seconds)
        self.warm = True

    def judged(self, kind: Hashable, accepted: int, judged: int, written: int) -> None:
        """So many of so many drafts were accepted; the round wrote so many tokens."""
        self.share(kind).note(accepted, judged)
        self.waiting -= written

    def expected(self, kind: Hashable, most: int) -> tuple[float, int]:
        """The expected speed over dense steps and the number of drafts, at most `most`, that gives it; (1, 0) where none pays."""
        if len(self.steps) < WARM or self.since >= REFRESH or most < 1:
            return 1.0, 0
        step = 0.0
        if kind == "weights":
            step = median(self.drafts) / median(self.steps) if self.drafts else 0.6
        share = self.share(kind).value
        count = best_drafts(share, step, self.cost, most)
        gain = expected_speedup(share, count, step, self.cost(count + 1))
        if gain >= GAIN["weights" if kind == "weights" else "text"]:
            self.wait = WAIT if kind == "weights" else self.wait
            return gain, count
        if kind == "weights" and self.waiting <= 0 and self._could_pay(step, most):
            self.waiting, self.wait = self.wait, min(LONGEST_WAIT, 2 * self.wait)
            return 1.0, min(TRIAL, most)
        return 1.0, 0

    def _could_pay(self, step: float, most: int) -> bool:
        """Whether drafts that are all accepted would."""
        return any(expected_speedup(1.0, d, step, self.cost(d + 1)) >= GAIN["weights"] for d in range(1, most + 1))
