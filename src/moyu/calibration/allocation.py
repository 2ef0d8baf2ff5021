"""Budgets across the sites of a plan: how much of a model's target sparsity each site gives.

uniform      the same everywhere.
greedy       inside each block, starting from nothing, the site whose next step moves the block's output least is stepped, until
             the block's weights are skipped to the target (TEAL, arXiv 2408.14690).
search       blocks by a search with Parzen densities on held-out KL, greedy inside each (WAS); `search-up` and `search-down` keep
             the blocks' levels growing or falling with depth, `search-random` draws as many blindly.
cett         every block at the level that changes what it adds by the same share; `cett-stream`: what it hands on.
sensitivity  least sum of the losses that each block causes alone: equal slopes on their convex hulls.
fisher       the same of sites, whose losses come from one backward pass and a second order (`moyu.calibration.fisher`).
A site's weight in the mean is the size of its own matrices, so grouped keys and values count what they hold.
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

from moyu.calibration.fisher import Point, curves, divide, name_of
from moyu.calibration.settings import check_allocation
from moyu.calibration.trials import Trial, each_layer, separable, weights
from moyu.calibration.walk import Progress, calibrate
from moyu.errors import UserError
from moyu.measure.evaluation import evaluate
from moyu.measure.windows import Windows
from moyu.methods.base import Method, Site
from moyu.model import dissect
from moyu.model.anatomy import Anatomy
from moyu.plan import Plan

STEP = 0.05  # of a block's mean weight a site
MOST = 0.95  # sparsity of a site, at most
GRID = (0.0, 0.2, 0.4, 0.6, 0.8, MOST)  # levels at which a block's error is measured
TRIALS = 50  # of a search over blocks
SPREAD, WIDTH = 0.15, 0.08  # of its first draws, and of its kernels, in sparsity


def mean(levels: Mapping[Any, float], shares: Mapping[Any, float]) -> float:
    """The sparsity of all weights: sum of N p over sum of N."""
    return sum(shares[key] * level for key, level in levels.items())


def climb(
    shares: Mapping[str, float], target: float, error: Callable[[Mapping[str, float]], float], step: float = STEP
) -> list[dict[str, float]]:
    """Greedy levels from nothing to a mean of `target`, step by step: shares by site, the error of levels by site.

    A step is `step` of the block's mean weight a site: sites with small matrices take larger ones, as a step costs every site
    the same number of weights. Raises UserError where `target` is above what all sites can give.
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
    """The levels on a path whose mean is `target`, between two of its points."""
    means = [mean(levels, shares) for levels in path]
    return {key: float(np.interp(target, means, [levels[key] for levels in path])) for key in shares}


# --------------------------------------------------------------------------------------------------------- across blocks


@dataclass(frozen=True)
class Task:
    """What is divided, and what decides."""

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
        """Of each layer that has any."""
        found: dict[int, list[Site]] = {}
        for block in self.anatomy.all_blocks():
            for site in self.method.sites(block):
                found.setdefault(block.layer, []).append(site)
        return found

    @cached_property
    def shares(self) -> dict[int, float]:
        """The share of each layer's sites in all weights."""
        sizes = {layer: sum(s.units * s.unit_bytes for s in sites) for layer, sites in self.sites.items()}
        return {layer: size / sum(sizes.values()) for layer, size in sizes.items()}

    def plan(self, levels: Mapping[str, float] | None) -> Plan:
        """The plan of such levels; None: uniform."""
        return calibrate(
            self.model, self.method, self.windows, sparsity=self.sparsity, levels=levels, anatomy=self.anatomy,
            **self.options,
        )  # fmt: skip

    def kl(self, plan: Plan, windows: Windows) -> float:
        """Mean KL from dense."""
        return float(evaluate(self.model, plan, windows, matched=False, anatomy=self.anatomy).method.kl.mean())

    def flat(self, blocks: Mapping[int, float]) -> dict[str, float]:
        """Levels of sites from those of blocks."""
        return {site.key: level for layer, level in blocks.items() for site in self.sites[layer]}

    def paths(self, target: float, step: float) -> dict[int, list[dict[str, float]]]:
        """The greedy path of each block up to `target`."""
        found = {}

        def visit(block: Trial, shares: dict[str, float]) -> dict[str, float]:
            found[block.index] = climb(shares, target, block.error, step)
            return at(found[block.index], shares, self.sparsity)

        each_layer(self.model, self.method, self.windows, visit, self.anatomy, self.progress)
        return found


def solved(shape: Callable[[float], dict[int, float]], shares: Mapping[int, float], target: float) -> dict[int, float]:
    """The levels of blocks, from a family that grows with its number in [-1, 1], whose mean is `target`; by bisection."""
    low, high = -1.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(shape(middle), shares) < target else (low, middle)
    return shape(high)


def greedy(task: Task) -> dict[str, float]:
    """Levels by site key, each block at the target."""
    return {key: level for path in task.paths(task.sparsity, task.step).values() for key, level in path[-1].items()}


def search(task: Task, order: str) -> dict[str, float]:
    """Levels by site key: blocks as KL on every second deciding window says, greedy inside; order "", "up", "down", "random".

    A tree-structured Parzen search in one leaf: draw near the better quarter of the trials, and take the draw whose density
    among them is largest over that among the others. Starts from equal blocks.
    """
    paths, layers = task.paths(MOST, max(task.step, 0.1)), list(task.sites)
    deciding = dataclasses.replace(task.deciding, tokens=task.deciding.tokens[::2])
    draw = np.random.default_rng(int(task.options.get("seed", 0)))

    def levels(profile: np.ndarray) -> dict[str, float]:
        profile = {"up": np.sort(profile), "down": -np.sort(-profile)}.get(order, profile)
        shape = lambda c: {k: min(max(task.sparsity + z + c, 0.0), MOST) for k, z in zip(layers, profile, strict=True)}  # noqa: E731
        blocks = solved(shape, task.shares, task.sparsity)
        return {k: v for i in layers for k, v in at(paths[i], weights(task.sites[i]), blocks[i]).items()}

    tried: list[tuple[float, np.ndarray]] = []
    for trial in range(task.trials):
        fresh = draw.normal(0, SPREAD, len(layers)) if trial else np.zeros(len(layers))
        if order != "random" and trial >= max(4, task.trials // 5):
            ranked = [profile for _, profile in sorted(tried, key=lambda t: t[0])]
            good, rest = ranked[: max(2, trial // 4)], ranked[max(2, trial // 4) :]
            drawn = [good[draw.integers(len(good))] + draw.normal(0, WIDTH, len(layers)) for _ in range(24)]
            fresh = max(drawn, key=lambda z: _density(z, good) - _density(z, rest))
        tried.append((task.kl(task.plan(levels(fresh)), deciding), fresh))
        if task.progress:
            task.progress(trial + 1, task.trials)
    return levels(min(tried, key=lambda t: t[0])[1])


def _density(point: np.ndarray, centres: Sequence[np.ndarray]) -> float:
    """Log of a mean of equal Gaussians, up to a constant."""
    exponents = [-float(np.square(point - c).sum()) / (2 * WIDTH**2) for c in centres]
    return float(np.logaddexp.reduce(exponents)) - math.log(len(centres))


def equalised(task: Task, stream: bool) -> dict[str, float]:
    """Levels by site key at which every block loses one share of what it adds, or of what it hands on."""
    lost: dict[int, list[float]] = {}

    def visit(block: Trial, shares: dict[str, float]) -> dict[str, float]:
        found = [block.share(dict.fromkeys(shares, level), stream) for level in GRID]
        lost[block.index] = list(np.maximum.accumulate(found))  # a larger level may lose less: the safe side
        return dict.fromkeys(shares, task.sparsity)

    each_layer(task.model, task.method, task.windows, visit, task.anatomy, task.progress)
    most = max(curve[-1] for curve in lost.values())
    shape = lambda c: {i: float(np.interp((1 + c) / 2 * most, curve, GRID)) for i, curve in lost.items()}  # noqa: E731
    return task.flat(solved(shape, task.shares, task.sparsity))


def sensitivity(task: Task) -> tuple[dict[str, float], float]:
    """Levels by site key of least summed loss, each block's KL measured with it alone sparse, and that sum."""
    deciding = dataclasses.replace(task.deciding, tokens=task.deciding.tokens[::2])
    losses_of: dict[int, list[float]] = {}
    for done, layer in enumerate(task.sites):
        nothing = dict.fromkeys(task.sites, 0.0)
        losses = [task.kl(task.plan(task.flat({**nothing, layer: p})), deciding) for p in GRID[1:]]
        losses_of[layer] = losses
        if task.progress:
            task.progress(done + 1, len(task.sites))
    points = {
        layer: [Point(level, level * task.shares[layer], loss) for level, loss in zip(GRID[1:], curve, strict=True)]
        for layer, curve in losses_of.items()
    }
    taken = divide(points, task.sparsity)
    return task.flat({layer: point.level for layer, point in taken.items()}), sum(p.cost for p in taken.values())


def second_order(task: Task) -> tuple[dict[str, float], float]:
    """Levels by site key of least summed loss, which `moyu.calibration.fisher` foresees, and that sum."""
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
    """The better of an allocation and uniform, by KL on `deciding` windows; which one is in the plan's calibration.

    Where the allocation itself looks at deciding windows, it sees every second one, and the others choose.
    options: those of `calibrate`. Raises UserError for an allocation that there is not, and for a method that knows no
    token-level target.
    """
    check_allocation(allocation)
    if method.granularity != "token" or not method.solves_target or method.joint:
        raise UserError(f"method {method.name!r} has no site budgets to divide", "leave allocation uniform")
    if not 0 <= sparsity <= MOST:
        raise UserError(f"a sparsity of {sparsity} cannot be divided", f"ask for one in [0, {MOST}]")
    anatomy = anatomy or dissect.dissect(model)
    alone = allocation not in ("uniform", "sensitivity")
    if alone and not separable(model, windows, anatomy):
        raise UserError("the layers of this model cannot be run alone, one after another", "allocate uniformly")
    if alone and any(s.source_layer != s.layer for b in anatomy.all_blocks() for s in method.sites(b)):
        raise UserError(f"method {method.name!r} looks ahead, to other layers", "allocate uniformly, or by sensitivity")
    task = Task(model, method, windows, deciding, sparsity, anatomy, step, trials, progress, options)
    found, about = {}, {}
    kind, _, order = allocation.partition("-")
    if kind == "greedy":
        found = greedy(task)
    elif kind == "search":
        found = search(task, order)
    elif kind == "cett":
        found = equalised(task, stream=order == "stream")
    elif kind == "sensitivity":
        found, about["summed_kl"] = sensitivity(task)
    elif kind == "fisher":
        found, about["summed_kl"] = second_order(task)
    halved = kind in ("search", "sensitivity") and len(deciding.tokens) > 1
    choosing = dataclasses.replace(deciding, tokens=deciding.tokens[1::2]) if halved else deciding
    levels = {"uniform": None, **({} if allocation == "uniform" else {allocation: found})}
    plans = {name: task.plan(own) for name, own in levels.items()}
    errors = {name: task.kl(plan, choosing) for name, plan in plans.items()}
    chosen = min(errors, key=lambda name: errors[name])
    about |= {"asked": allocation, "chosen": chosen, "kl": errors, "levels": levels[chosen]}
    plan = plans[chosen]
    return dataclasses.replace(plan, calibration={**plan.calibration, "allocation": about})
