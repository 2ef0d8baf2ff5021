"""LTE: blocks of neurons behind a router that learned from the model's own loss, with the masks in place.

G(x) = sigmoid(W_r x + b) (E,), one number a block of similar neurons (balanced k-means on the rows of gate). Stage 1 multiplies
neurons by G and trains the routers of all layers together on task + eta mean(G^2) + separation mean 1 / ((G - 1/2)^2 + 1/20);
eta rises and falls (dual ascent) until as much is skipped as asked. Stage 2 freezes the routers and skips where G is at or
below one threshold for all layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from moyu.methods.knobs import knob
from moyu.methods.magnitude import column_norms
from moyu.methods.moefication import balanced_clusters
from moyu.methods.routers import train
from moyu.methods.selection import Threshold, TopK, keep_count, select
from moyu.methods.shapes import shape
from moyu.methods.sites import grouped, neuron_sites
from moyu.methods.trained import Joint
from moyu.methods.values import Acts, Memory, Rows, Site, SiteParams


@dataclass(frozen=True)
class Lte(Joint):
    """LTE, arXiv 2402.06126, on a frozen model unless its weights are tuned as well (`moyu fit lte --tune`).

    steps: of stage 1.
    block: neurons that share one number of the router.
    separation: weight of the term that drives G away from 1/2. The paper's term has no 1/20 and a weight of 0.5, next to a
    loss that also tunes the model.
    """

    block: int = knob(32, at_least=1)
    separation: float = knob(0.02, at_least=0)

    name: ClassVar[str] = "lte"
    paper: ClassVar[str] = "LTE, arXiv 2402.06126"
    matrices: ClassVar[tuple[str, ...]] = ("weight",)

    def sites(self, block) -> tuple[Site, ...]:
        sites = neuron_sites(block, "mlp_in")
        return tuple(grouped(site, max(2, round(site.units / self.block))) for site in sites)

    def shapes(self, site: Site, block):
        return {"weight": shape("units", "n"), "bias": shape("units")}

    def fit(self, site: Site, acts: Acts, target: float) -> SiteParams:
        """Groups of neurons, and a router that has learned off the loop which groups add most: where stage 1 starts."""
        rows = acts.weights["gate" if "gate" in acts.weights else "up"].float()  # (f, d)
        blocks = balanced_clusters(functional.normalize(rows, dim=1), site.units)  # (f,)
        x = acts.met("mlp_in")
        router = nn.Linear(x.shape[1], site.units)
        nn.init.zeros_(router.weight)
        nn.init.zeros_(router.bias)
        mass = acts.met("mid").abs().float() * column_norms(acts.weights, ["down"])  # (N, f)
        mass = mass.new_zeros(len(mass), site.units).index_add_(1, blocks, mass)
        labels = select(mass, TopK(keep_count(site.units, target)))
        if target > 0:
            train(router, x, labels, torch.ones_like(mass))
        return SiteParams(
            rule=Threshold(0.5 if target > 0 else -1.0),
            blocks=blocks,
            buffers={"weight": router.weight.detach().to(x.dtype), "bias": router.bias.detach().to(x.dtype)},
        )

    def score(self, x, rows: Rows, site: Site, params: SiteParams, memory: Memory):
        weight, bias = (params.buffers[name].to(x.dtype) for name in ("weight", "bias"))
        return functional.linear(x, weight, bias).sigmoid()  # (N, E)

    def score_bytes(self, site: Site, params: SiteParams) -> int:
        return sum(t.nbytes for t in params.buffers.values())

    def penalty(self, gates: Tensor, eta: float) -> Tensor:
        """What stage 1 adds to the task's loss: gates (..., E) in (0, 1) -> scalar."""
        apart = 1 / ((gates - 0.5).square() + 0.05)
        return eta * gates.square().mean() + self.separation * apart.mean()
