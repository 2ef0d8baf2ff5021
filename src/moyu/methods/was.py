"""WAS: skip the input channels of every projection whose magnitude times the L1 norm of their weights is small.

score_i = |v_i| * c_i^alpha, c_i = ||W[:, i]||_1, kept above the calibrated quantile of its projection. alpha = 1 is WAS,
alpha = 0 is TEAL, and the L2 norm is WINA's score with a mask for every projection.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moyu.methods.base import Family
from moyu.methods.fitting import at_quantile
from moyu.methods.knobs import knob
from moyu.methods.magnitude import Weighed, column_norms
from moyu.methods.selection import quantile
from moyu.methods.sites import projection_sites
from moyu.methods.values import Acts, Site, SiteParams

EXPONENTS = (0.0, 0.5, 1.0, 1.5)  # candidates where the exponent is fitted


@dataclass(frozen=True)
class Was(Weighed):
    """WAS (EMNLP 2025), with the same sparsity at every projection.

    order: of the norm, 1 as in the paper or 2, by which the expected squared error is least.
    exponent: alpha >= 0; None fits it at every projection, on the error of every second calibration row.
    """

    order: int = knob(1, one_of=(1, 2))
    exponent: float | None = knob(1.0, at_least=0, below=math.inf, optional=True)

    name: ClassVar[str] = "was"
    paper: ClassVar[str] = "WAS, EMNLP 2025"
    family: ClassVar[Family] = "threshold"

    def sites(self, block) -> tuple[Site, ...]:
        return projection_sites(block)

    def fit(self, site: Site, acts: Acts, target: float) -> SiteParams:
        norms, exponent = column_norms(acts.weights, site.linears, self.order), self.exponent
        if exponent is None:
            x, weight = acts.met(site.reads).float(), acts.weights[site.linears[0]].float()
            exponent = min(EXPONENTS, key=lambda alpha: _error(x, weight, norms**alpha, target))
        return at_quantile(self, site, acts, target, {"norms": norms**exponent})


def _error(x: Tensor, weight: Tensor, factors: Tensor, target: float) -> float:
    """Squared error of x @ W.T on the odd rows of x (N, n) under the threshold of the even ones."""
    scores = x.abs() * factors
    cut = quantile(scores[::2], target)
    return float((torch.where(scores[1::2] > cut, 0, x[1::2]) @ weight.t()).square().sum())
