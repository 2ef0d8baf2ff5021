"""CETT: skip the neurons whose output is small, with the tail's norm as the error that calibrates it.

score_j = |a_j| * ||w_j||, the norm of what neuron j adds to the output. CETT(eps) is the norm of the sum of all skipped
contributions over the norm of the output; it is not monotone in eps, so the search runs on its running maximum.
Decided from the neuron values themselves: only columns of down are skipped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moyu.methods.base import Family
from moyu.methods.knobs import knob
from moyu.methods.magnitude import Weighed
from moyu.methods.selection import Threshold
from moyu.methods.sites import down_sites
from moyu.methods.values import Acts, Site, SiteParams

GRID = 256  # quantiles of the pooled scores that the search looks at


@dataclass(frozen=True)
class Cett(Weighed):
    """CETT threshold (ReLU2 Wins, arXiv 2402.03804; Sparsing Law, arXiv 2411.02335).

    tau: target mean CETT in (0, 1), e.g. 0.2; replaces the sparsity target.
    """

    tau: float | None = knob(None, above=0, below=1)

    name: ClassVar[str] = "cett"
    paper: ClassVar[str] = "Sparsing Law, arXiv 2411.02335"
    family: ClassVar[Family] = "threshold"

    def sites(self, block) -> tuple[Site, ...]:
        return down_sites(block)

    def fit(self, site: Site, acts: Acts, target: float) -> SiteParams:
        if self.tau is None or target == 0.0:
            return super().fit(site, acts, target)
        buffers = self.prepare(site, acts)
        kept = acts.rows.sparse & acts.rows.valid
        threshold = search(acts.sparse["mid"][kept], acts.weights["down"], self.tau)
        return SiteParams(rule=Threshold(threshold), buffers=buffers)


def curve(mid: Tensor, down: Tensor, grid: Tensor) -> Tensor:
    """CETT of each token at each threshold of an ascending `grid` (G,), or (N, G) a token: mid (N, f), down (d, f) -> (N, G).

    A neuron is dropped at grid value e where |a_j| ||w_j|| <= e. O(N (f d + G d)): contributions are summed into buckets
    of the grid, cumulated, and their norms taken.
    """
    mid, down = mid.float(), down.float()
    norms = down.norm(dim=0)  # (f,)
    out = mid.new_empty(len(mid), grid.shape[-1])
    turned = down.t().contiguous()  # (f, d)
    for n, (a, own) in enumerate(zip(mid, grid.expand(len(mid), -1), strict=True)):
        bucket = torch.searchsorted(own, a.abs() * norms)  # (f,) first grid value that drops the neuron
        sums = down.new_zeros(len(own) + 1, len(down)).index_add_(0, bucket, a[:, None] * turned)  # (G + 1, d)
        total = sums.sum(0).norm().clamp(min=1e-12)
        out[n] = sums[:-1].cumsum(0).norm(dim=1) / total
    return out


def search(mid: Tensor, down: Tensor, tau: float, tokens: int = 512) -> float:
    """The largest threshold whose running-maximum mean CETT stays at or below `tau`; -inf where none does.

    mid (N, f) neuron values, down (d, f). At most `tokens` evenly spaced rows are used.
    """
    mid = mid[torch.linspace(0, len(mid) - 1, min(tokens, len(mid))).long()]
    scores = (mid.abs().float() * down.float().norm(dim=0)).flatten().sort().values
    grid = scores[torch.linspace(0, len(scores) - 1, GRID).long()]
    worst = curve(mid, down, grid).mean(0).cummax(0).values  # (G,)
    within = int((worst <= tau).sum())
    return float(grid[within - 1]) if within else -math.inf
