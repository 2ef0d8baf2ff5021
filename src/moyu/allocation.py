"""Budgets across the sites of a plan: how much of a model's target sparsity each site gives.

Uniform: the same everywhere. Greedy (TEAL, arXiv 2408.14690): inside each block, starting from nothing, the site whose next step
moves the block's output least is stepped, until the block's weights are skipped to the target. A site's weight in the mean is
the size of its own matrices, so grouped keys and values count what they hold.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from moyu import surgery
from moyu.applied import Applied
from moyu.calibration import Walk, Windows, calibrate, fitted_parts
from moyu.errors import UserError
from moyu.evaluation import evaluate
from moyu.methods.base import Method, Site, SiteParams
from moyu.plan import Plan
from moyu.surgery import Anatomy

TOKENS = 1024  # calibration tokens that the greedy search looks at, at most
STEP = 0.05  # of a block's mean weight a site
MOST = 0.95  # sparsity of a site, at most


def weights(sites: Iterable[Site]) -> dict[str, float]:
    """The share of each site's weights in all of them, by key."""
    sizes = {site.key: site.units * site.unit_bytes for site in sites}
    return {key: size / sum(sizes.values()) for key, size in sizes.items()}


def mean(levels: Mapping[str, float], shares: Mapping[str, float]) -> float:
    """The sparsity of all weights: sum of N p over sum of N."""
    return sum(shares[key] * level for key, level in levels.items())


def climb(
    shares: Mapping[str, float], target: float, error: Callable[[Mapping[str, float]], float], step: float = STEP
) -> dict[str, float]:
    """Greedy levels whose mean is `target`: shares by site, the error of a set of levels -> levels by site.

    A step is `step` of the block's mean weight a site: sites with small matrices take larger ones, as a step costs every site
    the same number of weights. Raises UserError where `target` is above what all sites can give.
    """
    if target > MOST:
        raise UserError(f"a sparsity of {target} leaves a greedy search no choice", f"ask for at most {MOST}")
    levels = dict.fromkeys(shares, 0.0)
    while (missing := target - mean(levels, shares)) > 1e-9:
        best, least = None, float("inf")
        for key, share in shares.items():
            room = min(step / (share * len(shares)), MOST - levels[key], missing / share)
            if room <= 1e-12:
                continue
            tried = {**levels, key: levels[key] + room}
            found = error(tried)
            if found < least:
                best, least = tried, found
        assert best is not None
        levels = best
    return levels


@torch.no_grad()
def greedy(
    model: nn.Module,
    method: Method,
    windows: Windows,
    sparsity: float,
    *,
    step: float = STEP,
    anatomy: Anatomy | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Levels by site key, from at most `TOKENS` tokens; each block on inputs that earlier blocks have sparsified."""
    anatomy = anatomy or surgery.dissect(model)
    count = max(1, TOKENS // windows.tokens.shape[1])
    windows = dataclasses.replace(windows, tokens=windows.tokens[:count, :TOKENS])
    draft, levels = Plan(method, {}, {}), {}
    with Applied(model, draft, engine="mask", anatomy=anatomy, check=False) as applied:
        walk = Walk(applied, windows)
        for index in range(len(anatomy.layers)):
            sites = [(b, s) for b in anatomy.all_blocks() if b.layer == index for s in method.sites(b)]
            if sites:
                search = _Block(walk, index, method, sites)
                levels |= climb(weights(s for _, s in sites), sparsity, search.error, step)
                search.attach(levels)
            walk.advance(index)
            if progress:
                progress(index + 1, len(anatomy.layers))
    return levels


class _Block:
    """The sites of one layer at any levels: fitted once a level, on the layer's activations without masks of its own."""

    def __init__(self, walk: Walk, index: int, method: Method, sites: list) -> None:
        self.walk, self.index, self.method, self.sites = walk, index, method, sites
        walk.attach(index, {}, method)
        self.seen = walk.observe(index, walk.sparse), walk.observe(index, walk.dense)
        self.clean = walk.output(index)
        self.fits: dict[tuple[str, float], tuple[Site, SiteParams] | None] = {}

    def attach(self, levels: Mapping[str, float]) -> None:
        """Let the layer run at these levels."""
        parts = {}
        for block, site in self.sites:
            level = levels[site.key]
            if level > 0:
                key = site.key, round(level, 9)
                if key not in self.fits:
                    self.fits[key] = fitted_parts(self.method, block, site, *self.seen, level)
                fitted = self.fits[key]
                if fitted is not None:
                    parts[site.key] = fitted
        self.walk.attach(self.index, parts, self.method)

    def error(self, levels: Mapping[str, float]) -> float:
        """Squared distance of the block's output from the one without its masks, mean over sparse positions."""
        self.attach(levels)
        lost: Tensor = (self.walk.output(self.index) - self.clean)[:, self.walk.windows.prompt :]
        return float(lost.float().square().sum(-1).mean())


def calibrate_greedily(
    model: nn.Module,
    method: Method,
    windows: Windows,
    deciding: Windows,
    *,
    sparsity: float,
    step: float = STEP,
    anatomy: Anatomy | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options,
) -> Plan:
    """The better of a greedy and a uniform plan, by KL on `deciding` windows; which one is in its calibration.

    options: those of `calibrate`. Raises UserError for a method that knows no token-level target.
    """
    if method.granularity != "token" or not method.solves_target or method.joint:
        raise UserError(f"method {method.name!r} has no site budgets to divide", "leave allocation uniform")
    anatomy = anatomy or surgery.dissect(model)
    levels = greedy(model, method, windows, sparsity, step=step, anatomy=anatomy, progress=progress)
    plans, errors = {}, {}
    for name, own in (("uniform", None), ("greedy", levels)):
        plans[name] = calibrate(
            model, method, windows, sparsity=sparsity, levels=own, anatomy=anatomy, progress=progress, **options
        )
        errors[name] = float(evaluate(model, plans[name], deciding, matched=False, anatomy=anatomy).method.kl.mean())
    chosen = min(errors, key=lambda name: errors[name])
    about = {"chosen": chosen, "kl": errors, "levels": levels if chosen == "greedy" else None}
    plan = plans[chosen]
    return dataclasses.replace(plan, calibration={**plan.calibration, "allocation": about})
