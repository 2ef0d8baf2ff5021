"""Trials of one layer at a time: run it at many levels and measure the change of its output."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from moyu.calibration.streams import Progress, Walk, states_of
from moyu.calibration.taps import acts_of, tensors_of
from moyu.engine.applied import Applied
from moyu.engine.products import Products
from moyu.measure.windows import Windows
from moyu.methods.base import Method
from moyu.methods.values import Site, SiteParams
from moyu.model.anatomy import Anatomy, Block
from moyu.plan import Plan

TOKENS = 1024  # the most calibration tokens of a trial


def weights(sites: Iterable[Site]) -> dict[str, float]:
    """Each site's share of the weights of all sites, by key."""
    sizes = {site.key: site.units * site.unit_bytes for site in sites}
    total = sum(sizes.values()) or 1  # units smaller than a cache line save nothing
    return {key: size / total for key, size in sizes.items()}


class Trial:
    """The sites of one layer at any levels. Each is fitted once per level, on the layer's activations without its own masks.

    Products of linears that a trial does not change are reused from earlier trials.
    """

    def __init__(self, walk: Walk, index: int, method: Method, sites: list[tuple[Block, Site]]) -> None:
        """walk: must have advanced to the layer `index`. sites: of this layer."""
        self.walk, self.index, self.method, self.sites = walk, index, method, sites
        walk.attach(index, [])
        seen = walk.observe(index), walk.later(lambda: walk.observe_dense(index))
        self.clean = walk.output(index)
        tensors = {id(block): tensors_of(block) for block, _ in sites}
        acts = {site.key: acts_of(tensors[id(block)], site, *seen) for block, site in sites}
        self.acts = {key: own for key, own in acts.items() if own is not None}
        self.fits: dict[tuple[str, float, Method], SiteParams] = {}
        in_order = not any(
            (site.expert or 0) < 0 for _, site in sites
        )  # not with a second network, which follows the first
        self.products = Products([s for _, s in sites]) if in_order else None

    def attach(self, levels: Mapping[str, float], method: Method | None = None) -> Plan:
        """Let the layer run at these levels, of `method` or of the usual method. Returns the plan of the layer."""
        method, parts = method or self.method, {}
        for _, site in self.sites:
            level = levels[site.key]
            if level > 0 and site.key in self.acts:
                key = site.key, round(level, 9), method
                if key not in self.fits:
                    self.fits[key] = method.fit(site, self.acts[site.key], level)
                parts[site.key] = (site, self.fits[key])
        plan = Plan(method, parts, {})
        self.walk.attach(self.index, states_of(plan, self.index))
        if self.products is not None:
            self.products.at({key: (method, level) if level > 0 else None for key, level in levels.items()})
        return plan

    def change(self) -> Tensor:
        """The layer's output minus its output without masks, at sparse positions, (B, T - P, d) float32."""
        change = self.walk.output(self.index, self.products) - self.clean
        return change[:, self.walk.windows.prompt :].float()

    def error(self, levels: Mapping[str, float]) -> float:
        """The mean squared norm of the change at these levels."""
        self.attach(levels)
        return float(self.change().norm(dim=-1).square().mean())


@torch.no_grad()
def separable(model: nn.Module, windows: Windows, anatomy: Anatomy) -> bool:
    """Whether layers can run alone: they must be a simple chain of hidden states (B, T, d)."""
    with Applied(model, None, engine="mask", anatomy=anatomy, check=False) as applied:
        walk = Walk(applied, dataclasses.replace(windows, tokens=windows.tokens[:1]))
        return walk.chain is not None and walk.dense.shape[:-1] == walk.tokens.shape


@torch.no_grad()
def each_layer(
    model: nn.Module,
    method: Method,
    windows: Windows,
    visit: Callable[[Trial, dict[str, float]], dict[str, float]],
    anatomy: Anatomy,
    progress: Progress | None = None,
    tokens: int = TOKENS,
) -> None:
    """Visit layers in order, on at most `tokens` tokens, or on half as many after a long prompt.

    visit: takes a trial and each site's share of its layer's weights; returns the levels of this layer while later layers are
    visited.
    """
    count, length = max(1, tokens // windows.tokens.shape[1]), max(tokens, windows.prompt + tokens // 2)
    windows = dataclasses.replace(windows, tokens=windows.tokens[:count, :length])
    with Applied(model, Plan(method, {}, {}), engine="mask", anatomy=anatomy, check=False) as applied:
        walk = Walk(applied, windows)
        for index in range(len(anatomy.layers)):
            sites = [(b, s) for b in anatomy.all_blocks() if b.layer == index for s in method.sites(b)]
            if sites:
                trial = Trial(walk, index, method, sites)
                trial.attach(visit(trial, weights(s for _, s in sites)))
                del trial  # to free its memory before the next layer
            walk.advance(index)
            if progress:
                progress(index + 1, len(anatomy.layers))
