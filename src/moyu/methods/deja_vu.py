"""Deja Vu: a small trained predictor says which neurons the token will use, before any of them is computed.

score = B A x, A (r, d), B (f, r), trained with binary cross-entropy on a frozen model; the k largest are computed. The labels
are the paper's, 1[a_j != 0], where the activation has exact zeros; elsewhere nearly every a_j is non-zero, and the label is
whether neuron j is among the k with the largest |a_j| ||w_j||.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from moyu.methods.base import Acts, Family, Granularity, Memory, Rows, Site, SiteParams, Trained, neuron_site
from moyu.methods.routers import low_rank
from moyu.methods.selection import TopK, keep_count, select


@dataclass(frozen=True)
class DejaVu(Trained):
    """Deja Vu for neurons, arXiv 2310.17157.

    rank: r, at most the model's width.
    weighted: a label counts as much as its neuron adds, |a_j| ||w_j|| over the token's mean, instead of all the same.
    ahead: the predictor of layer l reads what the network of layer l - 1 reads, so that it can run beside it.
    """

    rank: int = 64
    weighted: bool = False
    ahead: bool = False

    name: ClassVar[str] = "deja-vu"
    paper: ClassVar[str] = "Deja Vu, arXiv 2310.17157"
    family: ClassVar[Family] = "router_off_loop"
    granularity: ClassVar[Granularity] = "token"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, not {self.rank}")

    def sites(self, block) -> tuple[Site, ...]:
        source = block.layer - 1 if self.ahead and block.layer and block.expert is None else None
        return (neuron_site(block, "mlp_in", source),) if block.has_ffn else ()

    def router(self, site: Site, width: int) -> nn.Module:
        return low_rank(width, min(self.rank, width), site.units, seed=site.layer)

    def lessons(self, site: Site, acts: Acts, target: float) -> tuple[Tensor, Tensor]:
        mass = acts.met("mid").abs().float() * acts.weights["down"].float().norm(dim=0)  # (N, f)
        if site.act in ("relu", "relu2"):
            labels = mass > 0
        else:
            labels = select(mass, TopK(keep_count(site.units, target)))
        weights = mass / mass.mean(1, keepdim=True).clamp(min=1e-30) if self.weighted else torch.ones_like(mass)
        return labels, weights

    def score(self, x, rows: Rows, site: Site, params: SiteParams, memory: Memory):
        inner, outer = (params.buffers[f"{name}.weight"].to(x.dtype) for name in ("inner", "outer"))
        return x @ inner.t() @ outer.t()  # (N, f)
