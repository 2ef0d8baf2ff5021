"""How the sites of a plan divide the target sparsity of a model.

uniform  the same level at every site.
greedy   within each layer, start from nothing and step the site whose next step changes the layer's output least, until the
         layer reaches the target (TEAL, arXiv 2408.14690).
search   levels of layers by a search with Parzen densities on held-out KL; greedy within each layer (WAS).
fisher   the least sum of losses over sites, which are estimated to second order (`moyu.calibration.fisher`).

The target is a mean over sites, weighted by the size of a site's own matrices.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch import nn

from moyu.calibration.fisher import curves, divide, name_of
from moyu.calibration.settings import ALLOCATIONS
from moyu.calibration.streams import Progress
from moyu.calibration.trials import Trial, each_layer, separable, weights
from moyu.calibration.walk import calibrate
from moyu.errors import UserError, check_one_of
from moyu.measure.evaluation import evaluate
from moyu.measure.windows import Windows
from moyu.methods.base import Method
from moyu.methods.values import Site
from moyu.model import dissect
from moyu.model.anatomy import Anatomy
from moyu.plan import Plan

STEP = 0.05  # of a greedy path, in units of a layer's mean weight per site
MOST = 0.95  # the largest sparsity of a site
TRIALS = 50  # of a search over layers
SPREAD, WIDTH = 0.15, 0.08  # standard deviation of a search's first draws and of its kernels, in sparsity


def mean(levels: Mapping[Any, float], shares: Mapping[Any, float]) -> float:
    """The mean level, weighted by shares that sum to 1."""
    return sum(shares[key] * level for key, level in levels.items())


def climb(
    shares: Mapping[str, float], target: float, error: Callable[[Mapping[str, float]], float], step: float = STEP
) -> list[dict[str, float]]:
    """The path of greedy levels from nothing to a mean of `target`.

    shares: each site's share of the weights. error: of levels by site. step: each step skips the same number of weights, so
    that a site with small matrices takes larger steps. Raises UserError if `target` is above MOST.
    """
    if target > MOST:
        raise UserError(f"a sparsity of {target} leaves a greedy search no choice", f"ask for at most {MOST}")
    path = [dict.fromkeys(shares, 0.0)]
    while (missing := target - mean(path[-1], shares)) > 1e-9:
        best, least = None, math.inf
        for key, share in shares.items():
            room = min(step / (share * len(shares)), MOST - path[-1][key], missing / share)
            if room <= 1e-12:
                continue
            tried = {**path[-1], key: path[-1][key] + room}
            found = error(tried)
            if found < least:
                best, least = tried, found
        assert best is not None
        path.append(best)
    return path


def at(path: Sequence[Mapping[str, float]], shares: Mapping[str, float], target: float) -> dict[str, float]:
    """The levels whose mean is `target`, interpolated on a path."""
    means = [mean(levels, shares) for levels in path]
    return {key: float(np.interp(target, means, [levels[key] for levels in path])) for key in shares}


# --------------------------------------------------------------------------------------------------------- across layers


@dataclass(frozen=True)
class Division:
    """A sparsity to divide: the model and method, the text to fit on, and the text that decides between allocations."""

    model: nn.Module
    method: Method
    windows: Windows
    deciding: Windows
    sparsity: float
    anatomy: Anatomy
    step: float = STEP
    trials: int = TRIALS
    progress: Progress | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @cached_property
    def sites(self) -> dict[int, list[Site]]:
        """The sites of each layer that has any."""
        found: dict[int, list[Site]] = {}
        for block in self.anatomy.all_blocks():
            for site in self.method.sites(block):
                found.setdefault(block.layer, []).append(site)
        return found

    @cached_property
    def shares(self) -> dict[int, float]:
        """Each layer's share of the weights of all sites."""
        sizes = {layer: sum(s.units * s.unit_bytes for s in sites) for layer, sites in self.sites.items()}
        return {layer: size / sum(sizes.values()) for layer, size in sizes.items()}

    def plan(self, levels: Mapping[str, float] | None) -> Plan:
        """The plan with these levels; None is uniform."""
        return calibrate(
            self.model, self.method, self.windows, sparsity=self.sparsity, levels=levels, anatomy=self.anatomy,
            **self.options,
        )  # fmt: skip

    def kl(self, plan: Plan, windows: Windows) -> float:
        """Mean KL from the dense model."""
        return float(evaluate(self.model, plan, windows, matched=False, anatomy=self.anatomy).method.kl.mean())

    def paths(self, target: float, step: float) -> dict[int, list[dict[str, float]]]:
        """The greedy path of each layer up to `target`."""
        found = {}

        def visit(trial: Trial, shares: dict[str, float]) -> dict[str, float]:
            found[trial.index] = climb(shares, target, trial.error, step)
            return at(found[trial.index], shares, self.sparsity)

        each_layer(self.model, self.method, self.windows, visit, self.anatomy, self.progress)
        return found


def solved(shape: Callable[[float], dict[int, float]], shares: Mapping[int, float], target: float) -> dict[int, float]:
    """The levels of layers whose mean is `target`, by bisection; shape: levels that grow with a number in [-1, 1]."""
    low, high = -1.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(shape(middle), shares) < target else (low, middle)
    return shape(high)


def greedy(task: Division) -> dict[str, float]:
    """Levels by site key, with each layer at the target."""
    return {key: level for path in task.paths(task.sparsity, task.step).values() for key, level in path[-1].items()}


def search(task: Division) -> dict[str, float]:
    """Levels by site key: layers as KL on every second deciding window says, greedy within each. Starts from equal layers.

    A tree-structured Parzen search with one leaf: draw near the better quarter of the trials, then take the draw with the
    largest ratio of its density among these to its density among the others.
    """
    paths, layers = task.paths(MOST, max(task.step, 0.1)), list(task.sites)
    deciding = dataclasses.replace(task.deciding, tokens=task.deciding.tokens[::2])
    draw = np.random.default_rng(int(task.options.get("seed", 0)))

    def levels(profile: np.ndarray) -> dict[str, float]:
        shape = lambda c: {k: min(max(task.sparsity + z + c, 0.0), MOST) for k, z in zip(layers, profile, strict=True)}  # noqa: E731
        blocks = solved(shape, task.shares, task.sparsity)
        return {k: v for i in layers for k, v in at(paths[i], weights(task.sites[i]), blocks[i]).items()}

    tried: list[tuple[float, np.ndarray]] = []
    for trial in range(task.trials):
        fresh = draw.normal(0, SPREAD, len(layers)) if trial else np.zeros(len(layers))
        if trial >= max(4, task.trials // 5):
            ranked = [profile for _, profile in sorted(tried, key=lambda t: t[0])]
            good, rest = ranked[: max(2, trial // 4)], ranked[max(2, trial // 4) :]
            drawn = [good[draw.integers(len(good))] + draw.normal(0, WIDTH, len(layers)) for _ in range(24)]
            fresh = max(drawn, key=lambda z: _density(z, good) - _density(z, rest))
        tried.append((task.kl(task.plan(levels(fresh)), deciding), fresh))
        if task.progress:
            task.progress(trial + 1, task.trials)
    return levels(min(tried, key=lambda t: t[0])[1])


def _density(point: np.ndarray, centres: Sequence[np.ndarray]) -> float:
    """Log of a mean of Gaussians of one width, up to a constant."""
    exponents = [-float(np.square(point - c).sum()) / (2 * WIDTH**2) for c in centres]
    return float(np.logaddexp.reduce(exponents)) - math.log(len(centres))


def second_order(task: Division) -> tuple[dict[str, float], float]:
    """Levels by site key with the least sum of losses, as `moyu.calibration.fisher` estimates them, and that sum."""
    shares = weights(s for sites in task.sites.values() for s in sites)

    def worth(plan: Plan, skipped: float, levels: Mapping[str, float]) -> float:
        return mean(levels, shares)

    seed = int(task.options.get("seed", 0))
    found = curves(task.model, [task.method], task.windows, task.anatomy, worth, seed=seed, progress=task.progress)
    taken = divide(found, task.sparsity)
    levels = {s.key: taken[name_of(s)].level for sites in task.sites.values() for s in sites}
    return levels, sum(p.cost for p in taken.values())


# ------------------------------------------------------------------------------------------------------------- the better


def calibrate_allocated(
    model: nn.Module,
    method: Method,
    windows: Windows,
    deciding: Windows,
    *,
    allocation: str,
    sparsity: float,
    step: float = STEP,
    trials: int = TRIALS,
    anatomy: Anatomy | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Plan:
    """A plan with an allocation or with uniform levels, whichever has less KL on `deciding`; the plan's calibration says which.

    A search looks at every second deciding window itself; then the others choose. options: of `calibrate`. Raises UserError
    for an unknown allocation, and for a method without a token-level target.
    """
    check_one_of("allocation is", allocation, ALLOCATIONS)
    if method.granularity != "token" or not method.solves_target or method.joint:
        raise UserError(f"method {method.name!r} has no site budgets to divide", "leave allocation uniform")
    if not 0 <= sparsity <= MOST:
        raise UserError(f"a sparsity of {sparsity} cannot be divided", f"ask for one in [0, {MOST}]")
    anatomy = anatomy or dissect.dissect(model)
    divided = allocation != "uniform"
    if divided and not separable(model, windows, anatomy):
        raise UserError("the layers of this model cannot be run alone, one after another", "allocate uniformly")
    if divided and any(s.source_layer != s.layer for b in anatomy.all_blocks() for s in method.sites(b)):
        raise UserError(f"method {method.name!r} looks ahead, to other layers", "allocate uniformly")
    task = Division(model, method, windows, deciding, sparsity, anatomy, step, trials, progress, options)
    found, about = {}, {}
    if allocation == "greedy":
        found = greedy(task)
    elif allocation == "search":
        found = search(task)
    elif allocation == "fisher":
        found, about["summed_kl"] = second_order(task)
    halved = allocation == "search" and len(deciding.tokens) > 1
    choosing = dataclasses.replace(deciding, tokens=deciding.tokens[1::2]) if halved else deciding
    levels = {"uniform": None} | ({allocation: found} if divided else {})
    plans = {name: task.plan(own) for name, own in levels.items()}
    errors = {name: task.kl(plan, choosing) for name, plan in plans.items()}
    chosen = min(errors, key=lambda name: errors[name])
    about |= {"asked": allocation, "chosen": chosen, "kl": errors, "levels": levels[chosen]}
    plan = plans[chosen]
    return dataclasses.replace(plan, calibration={**plan.calibration, "allocation": about})
