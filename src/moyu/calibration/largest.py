"""The most that a method may skip while perplexity rises by no more than is allowed."""

from __future__ import annotations

import dataclasses

from moyu.calibration.context import Context
from moyu.calibration.settings import Stage, quiet
from moyu.errors import UserError
from moyu.measure.evaluation import evaluate
from moyu.plan import Plan

STEPS = 7  # of the bisection: the sparsity is found to 1 / 128


def largest_sparsity(
    context: Context, name: str, max_increase: float, stage: Stage = quiet, steps: int = STEPS
) -> Plan:
    """The plan of the largest sparsity at which perplexity rises by at most `max_increase` (0.01 = 1 %).

    Bisection, decided on the validation windows: the test windows then report on a plan that they did not choose. The plan's
    calibration says under "search" what decided. Raises UserError where even the least sparsity tried costs more.
    """
    validation = context.split.validation
    low, high, best = 0.0, 1.0, None
    for step in range(steps):
        target = (low + high) / 2
        plan = context.plan(name, sparsity=target)
        quality = evaluate(context.loaded.model, plan, validation, matched=False, anatomy=context.anatomy)
        rise = quality.method.perplexity / quality.dense.perplexity - 1
        if rise <= max_increase:
            low, best = target, (plan, rise)
        else:
            high = target
        stage(f"search {name}", step + 1, steps)
    if best is None:
        raise UserError(
            f"{name} exceeds a perplexity increase of {max_increase:.1%} even at sparsity {high:.3f}",
            "allow a larger increase",
        )
    plan, rise = best
    search = {"max_ppl_increase": max_increase, "ppl_increase": rise, "corpus": dict(validation.source)}
    return dataclasses.replace(plan, calibration={**plan.calibration, "search": search})
