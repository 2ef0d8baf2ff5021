"""Polar Sparsity: heads by a linear router, neurons of ReLU networks by a two-layer one; the first layer stays dense.

Heads: score = W x, W (h, d), h the groups of query heads that share keys and values; the k largest are computed. Neurons (ReLU
networks only): score = B A x. Both are trained with binary cross-entropy on a frozen model; the labels are the k heads that
add most to the output, and 1[a_j != 0].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from moyu.methods.shapes import shape
from moyu.methods.sites import head_sites, neuron_sites
from moyu.methods.trained import TrainedHeads
from moyu.methods.values import Acts, Site


@dataclass(frozen=True)
class Polar(TrainedHeads):
    """Polar Sparsity, arXiv 2505.14884.

    rank: width of the neurons' router, at most the model's.
    kv: what becomes of keys and values of skipped heads: "full" (kept and read), "hole", "zero", "recompute" or "carry".
    """

    name: ClassVar[str] = "polar"
    paper: ClassVar[str] = "Polar Sparsity, arXiv 2505.14884"

    def sites(self, block) -> tuple[Site, ...]:
        if block.layer == 0:
            return ()
        heads = head_sites(block, groups=True, kv=self.kv)
        return heads if block.gated or block.act != "relu" else (*heads, *neuron_sites(block, "mlp_in"))

    def shapes(self, site: Site, block):
        return super().shapes(site, block) if site.skips == "neurons" else {"outer.weight": shape("units", "n")}

    def router(self, site: Site, width: int) -> nn.Module:
        if site.skips == "neurons":
            return super().router(site, width)
        router = nn.Sequential()
        router.add_module("outer", nn.Linear(width, site.units, bias=False))
        nn.init.zeros_(router[0].weight)  # pyright: ignore[reportArgumentType]
        return router

    def lessons(self, site: Site, acts: Acts, target: float) -> tuple[Tensor, Tensor]:
        if site.skips != "neurons":
            return super().lessons(site, acts, target)
        labels = acts.met("mid") != 0  # (N, f)
        return labels, torch.ones_like(labels, dtype=torch.float)
