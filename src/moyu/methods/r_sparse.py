"""R-Sparse: input channels whose magnitude is small take a low-rank path instead of being dropped.

y = W S(v) + U_r V_r' (v - S(v)), S keeps v_i where |v_i| > t. The published path is the rank-r part of W's own singular value
decomposition; fitted to what is skipped it is U_r U_r' W, with U_r the leading left singular vectors of W (v - S(v)) over
the calibration rows: the best rank-r map for the skipped part (Eckart-Young).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moyu.methods.base import Family
from moyu.methods.knobs import knob
from moyu.methods.magnitude import Magnitude
from moyu.methods.selection import select
from moyu.methods.sites import projection_sites
from moyu.methods.values import Acts, Site, SiteParams

ROWS = 2048  # calibration rows, evenly spaced, that the skipped part is looked at on


@dataclass(frozen=True)
class RSparse(Magnitude):
    """R-Sparse, arXiv 2504.19449, with the same split between channels and rank at every projection.

    share: bytes of the low-rank path over all bytes that a projection still reads, in (0, 1). The paper's search gives
    about 0.05.
    path: "weight" approximates W, as in the paper; "skipped" approximates W on what is skipped.
    """

    share: float = knob(0.05, above=0, below=1)
    path: str = knob("weight", one_of=("weight", "skipped"))

    name: ClassVar[str] = "r-sparse"
    paper: ClassVar[str] = "R-Sparse, arXiv 2504.19449"
    family: ClassVar[Family] = "threshold"

    def sites(self, block) -> tuple[Site, ...]:
        return projection_sites(block)

    def fit(self, site: Site, acts: Acts, target: float) -> SiteParams:
        params = super().fit(site, acts, target)
        if target == 0.0:
            return params
        weight = acts.weights[site.linears[0]]
        rank = rank_for(weight.shape[0], weight.shape[1], target, self.share)
        if self.path == "weight":
            outer, inner = truncated(weight, rank)
        else:
            x = acts.met(site.reads)
            x = x[torch.linspace(0, len(x) - 1, min(ROWS, len(x))).long()]
            kept = select(x.abs(), params.rule)
            outer, inner = projected(weight, torch.where(kept, 0, x), rank)
        low_rank = (outer.to(weight.dtype).contiguous(), inner.to(weight.dtype).contiguous())
        return dataclasses.replace(params, low_rank=low_rank)


def rank_for(q: int, n: int, sparsity: float, share: float) -> int:
    """The rank whose r (q + n) weights are `share` of all weights that are read beside (1 - sparsity) q n; at least 1."""
    channels = (1 - sparsity) * q * n
    return max(1, min(q, n, round(share / (1 - share) * channels / (q + n))))


def truncated(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-r approximation of W (q, n): (q, r), (r, n)."""
    u, s, v = torch.linalg.svd(_precise(weight), full_matrices=False)
    return u[:, :rank] * s[:rank], v[:rank]


def projected(weight: Tensor, skipped: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The rank-r map M with the least ||(W - M) v||^2 summed over the rows of `skipped` (N, n): (q, r), (r, n)."""
    weight = _precise(weight)
    _, _, u = torch.linalg.svd(_precise(skipped) @ weight.t(), full_matrices=False)  # rows span the outputs
    return u[:rank].t(), u[:rank] @ weight


def _precise(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
