"""One layer at a time, run again and again at other levels: what a trial changes at the layer's output."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from moyu.calibration.walk import Progress, Walk, acts_of, tensors_of
from moyu.engine.applied import Applied
from moyu.engine.runtime import Products
from moyu.measure.windows import Windows
from moyu.methods.base import Method
from moyu.methods.values import Site, SiteParams
from moyu.model.anatomy import Anatomy, Block
from moyu.plan import Plan

TOKENS = 1024  # calibration tokens that trials look at, at most


def weights(sites: Iterable[Site]) -> dict[str, float]:
    """The share of each site's weights in all of them, by key."""
    sizes = {site.key: site.units * site.unit_bytes for site in sites}
    total = sum(sizes.values()) or 1  # units of less than a line of memory save nothing
    return {key: size / total for key, size in sizes.items()}


class Trial:
    """The sites of one layer at any levels: fitted once a level, on the layer's activations without masks of its own.

    Products that a trial does not change are kept from the trials before.
    """

    def __init__(self, walk: Walk, index: int, method: Method, sites: list[tuple[Block, Site]]) -> None:
        """The layer `index`, whose sites are `sites`, behind the layers that `walk` has passed."""
        self.walk, self.index, self.method, self.sites = walk, index, method, sites
        walk.attach(index, Plan(method, {}, {}))
        seen = walk.observe(index, walk.sparse), walk.observe(index, walk.dense)
        self.clean = walk.output(index)
        tensors = {id(block): tensors_of(block) for block, _ in sites}
        acts = {site.key: acts_of(tensors[id(block)], site, *seen) for block, site in sites}
        self.acts = {key: own for key, own in acts.items() if own is not None}
        self.fits: dict[tuple[str, float, Method], SiteParams] = {}
        in_order = not any((site.expert or 0) < 0 for _, site in sites)  # a second network follows the first
        self.products = Products([s for _, s in sites]) if in_order else None

    def attach(self, levels: Mapping[str, float], method: Method | None = None) -> Plan:
        """Let the layer run at these levels, of `method` where it is not the usual one; what it runs is returned."""
        method, parts = method or self.method, {}
        for _, site in self.sites:
            level = levels[site.key]
            if level > 0 and site.key in self.acts:
                key = site.key, round(level, 9), method
                if key not in self.fits:
                    self.fits[key] = method.fit(site, self.acts[site.key], level)
                parts[site.key] = (site, self.fits[key])
        plan = Plan(method, parts, {})
        self.walk.attach(self.index, plan)
        if self.products is not None:
            self.products.at({key: (method, level) if level > 0 else None for key, level in levels.items()})
        return plan

    def change(self) -> Tensor:
        """The layer's output less the one without its masks, at sparse positions, (B, T - P, d) float32."""
        change = self.walk.output(self.index, self.products) - self.clean
        return change[:, self.walk.windows.prompt :].float()

    def lost(self, levels: Mapping[str, float]) -> Tensor:
        """How far the output at these levels is from the one without masks, (B, T - P)."""
        self.attach(levels)
        return self.change().norm(dim=-1)

    def error(self, levels: Mapping[str, float]) -> float:
        """The mean square of `lost`."""
        return float(self.lost(levels).square().mean())

    def share(self, levels: Mapping[str, float], stream: bool) -> float:
        """The mean of `lost` over what the block adds, or over what it hands on."""
        whole = self.clean if stream else self.clean - self.walk.sparse
        whole = whole[:, self.walk.windows.prompt :].float().norm(dim=-1)
        return float((self.lost(levels) / whole.clamp(min=1e-12)).mean())


@torch.no_grad()
def separable(model: nn.Module, windows: Windows, anatomy: Anatomy) -> bool:
    """Whether layers can be run alone: a simple chain of hidden states (B, T, d)."""
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
    """Visit layers in order, on at most so many tokens, or half as many behind a long prompt.

    `visit` is handed the share of each site's weights in those of its layer, and gives the levels that later layers' inputs
    are sparsified at.
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
                del trial  # before the next layer's is made
            walk.advance(index)
            if progress:
                progress(index + 1, len(anatomy.layers))
