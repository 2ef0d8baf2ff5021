"""The most that a method may skip while perplexity rises, or KL is, no more than is allowed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

from moyu.calibration import allocation
from moyu.calibration.budget import Divided
from moyu.calibration.context import Context
from moyu.calibration.settings import Stage, quiet
from moyu.errors import UserError
from moyu.measure import evaluation
from moyu.measure.evaluation import Quality
from moyu.plan import Plan

STEPS = 7  # plans that are tried
CLOSE = 0.9  # of what is allowed: a plan that costs so much ends the search
LEAST = 1e-9  # nats or shares, below which a cost is noise


@dataclass(frozen=True)
class Allowed:
    """What skipping may cost: `kl` in nats a token, or a rise of perplexity, 0.01 = 1 %."""

    kind: str  # "kl" or "ppl_increase"
    most: float

    def cost(self, quality: Quality) -> float:
        """What a plan costs."""
        if self.kind == "kl":
            return float(quality.method.kl.double().mean())
        return quality.method.perplexity / quality.dense.perplexity - 1

    def __str__(self) -> str:
        return f"a KL of {self.most:g}" if self.kind == "kl" else f"a perplexity increase of {self.most:.1%}"


def largest(context: Context, name: str, allowed: Allowed, stage: Stage = quiet, steps: int = STEPS) -> Plan:
    """The plan that skips the most at no more than the allowed cost on the validation windows.

    The test windows then report on a plan that they did not choose. A method that divides budgets is searched by the bytes that it
    saves, another one by its sparsity. The plan's calibration says under "search" what decided. Raises UserError where even the
    least that was tried costs more.
    """
    validation, model = context.split.validation, context.loaded.model
    reference = evaluation.predict(model, validation)
    make, top, start = _plans(context, name, allowed, stage)

    def tried(amount: float) -> tuple[Plan, float]:
        plan = make(amount)
        found = evaluation.evaluate(
            model, plan, validation, matched=False, anatomy=context.anatomy, reference=reference
        )
        return plan, allowed.cost(found)

    low, high = (0.0, 0.0), (top, math.inf)  # an amount and its cost: allowed, and not known to be
    amount, best = start, None
    for step in range(steps):
        plan, cost = tried(amount)
        if cost <= allowed.most:
            low, best = (amount, cost), (plan, cost)
        else:
            high = (amount, cost)
        stage(f"search {name}", step + 1, steps)
        if CLOSE * allowed.most <= cost <= allowed.most:
            break
        amount = _between(low, high, allowed.most)
    stage(f"search {name}", steps, steps)
    if best is None:
        raise UserError(f"{name} exceeds {allowed} even where it skips the least that was tried", "allow more")
    plan, cost = best
    search = {f"max_{allowed.kind}": allowed.most, allowed.kind: cost, "corpus": dict(validation.source)}
    return dataclasses.replace(plan, calibration={**plan.calibration, "search": search})


def _between(low: tuple[float, float], high: tuple[float, float], most: float) -> float:
    """Where the cost is about what is allowed, if its logarithm is linear between two amounts; the middle where that says nothing."""
    (a, least), (b, largest) = low, high
    if least < LEAST or not math.isfinite(largest):
        return (a + b) / 2
    share = math.log((1 + CLOSE) / 2 * most / least) / math.log(largest / least)
    return a + min(max(share, 0.1), 0.9) * (b - a)


def _plans(context: Context, name: str, allowed: Allowed, stage: Stage) -> tuple[Callable[[float], Plan], float, float]:
    """How to make a plan that skips an amount, the largest amount, and the one to begin with."""
    if context.settings.allocation != "uniform":
        return lambda amount: context.plan(name, sparsity=amount), allocation.MOST, 0.5
    ways = context.ways(name, lambda done, whole: stage(f"measure {name}", done, whole))
    if len(ways) != 1 or not isinstance(ways[0], Divided):
        return lambda amount: context.plan(name, sparsity=amount), 1.0, 0.5
    way, windows = ways[0], context.split.calibration
    start = way.saved_at(allowed.most) if allowed.kind == "kl" else way.most / 2
    return lambda amount: context.learnt(way.plan(windows, amount, None)), way.most, start
