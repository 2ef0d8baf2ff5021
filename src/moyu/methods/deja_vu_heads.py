"""Deja Vu's heads: a small trained predictor says which attention heads the token will use, before any of them is computed.

score = B A x, A (r, d), B (h, r), x the attention's input, trained with binary cross-entropy on a frozen model. The label of
head i is whether it is among the k with the largest ||W_o,i head_i||: what it adds to the output, after W_o.
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
)
from moyu.methods.routers import low_rank
from moyu.methods.selection import TopK, keep_count, select


@dataclass(frozen=True)
class DejaVuHeads(Trained):
    """Deja Vu for heads, arXiv 2310.17157.

    rank: r, at most the model's width.
    kv: what becomes of keys and values of skipped heads: "full" (kept and read), "hole", "zero", "recompute" or "carry".
    """

    rank: int = 16
    kv: KvPolicy = "full"

    name: ClassVar[str] = "deja-vu-heads"
    paper: ClassVar[str] = "Deja Vu, arXiv 2310.17157"
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
        return head_sites(block, kv=self.kv)

    def router(self, site: Site, width: int) -> nn.Module:
        return low_rank(width, min(self.rank, width), site.units, seed=site.layer)

    def lessons(self, site: Site, acts: Acts, target: float) -> tuple[Tensor, Tensor]:
        added = head_norms(acts.met("heads"), acts.weights["o"], site.units)  # (N, h)
        labels = select(added, TopK(keep_count(site.units, target)))
        return labels, torch.ones_like(added)

    def score(self, x, rows: Rows, site: Site, params: SiteParams, memory: Memory):
        inner, outer = (params.buffers[f"{name}.weight"].to(x.dtype) for name in ("inner", "outer"))
        return x @ inner.t() @ outer.t()  # (N, h)
