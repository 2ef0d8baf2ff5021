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

from moyu.methods.base import (
    Acts,
    Family,
    Granularity,
    KvPolicy,
    Memory,
    Rows,
    Site,
    SiteParams,
    Trained,
    check_kv,
    head_norms,
    head_sites,
    neuron_site,
)
from moyu.methods.routers import low_rank
from moyu.methods.selection import TopK, keep_count, select


@dataclass(frozen=True)
class Polar(Trained):
    """Polar Sparsity, arXiv 2505.14884.

    rank: width of the neurons' router, at most the model's.
    kv: what becomes of keys and values of skipped heads: "full" (kept and read), "hole", "zero", "recompute" or "carry".
    """

    rank: int = 64
    kv: KvPolicy = "full"

    name: ClassVar[str] = "polar"
    paper: ClassVar[str] = "Polar Sparsity, arXiv 2505.14884"
    family: ClassVar[Family] = "router_off_loop"
    granularity: ClassVar[Granularity] = "token"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, not {self.rank}")
        check_kv(self.kv)

    @property
    def kv_policy(self) -> KvPolicy:
        return self.kv

    def sites(self, block) -> tuple[Site, ...]:
        if block.layer == 0:
            return ()
        heads = head_sites(block, groups=True, kv=self.kv)
        neurons = block.has_ffn and not block.gated and block.act == "relu"
        return (*heads, neuron_site(block, "mlp_in")) if neurons else heads

    def router(self, site: Site, width: int) -> nn.Module:
        if site.skips == "neurons":
            return low_rank(width, min(self.rank, width), site.units, seed=site.layer)
        router = nn.Sequential()
        router.add_module("outer", nn.Linear(width, site.units, bias=False))
        nn.init.zeros_(router[0].weight)  # pyright: ignore[reportArgumentType]
        return router

    def lessons(self, site: Site, acts: Acts, target: float) -> tuple[Tensor, Tensor]:
        if site.skips == "neurons":
            labels = acts.met("mid") != 0  # (N, f)
        else:
            added = head_norms(acts.met("heads"), acts.weights["o"], site.units)  # (N, h)
            labels = select(added, TopK(keep_count(site.units, target)))
        return labels, torch.ones_like(labels, dtype=torch.float)

    def score(self, x, rows: Rows, site: Site, params: SiteParams, memory: Memory):
        inner = params.buffers.get("inner.weight")
        x = x if inner is None else x @ inner.to(x.dtype).t()
        return x @ params.buffers["outer.weight"].to(x.dtype).t()  # (N, units)
