"""WAS: skip the input channels of every projection whose magnitude times the L1 norm of their weights is small.

score_i = |v_i| * c_i^alpha, c_i = ||W[:, i]||_1, kept above the calibrated quantile of its projection. alpha = 1 is WAS,
alpha = 0 is TEAL, and the L2 norm is WINA's score with a mask for every projection.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moyu.methods import selection
from moyu.methods.base import Acts, Family, Granularity, Memory, Method, Rows, Site, SiteParams, projection_sites
from moyu.methods.selection import Threshold

EXPONENTS = (0.0, 0.5, 1.0, 1.5)  # candidates where the exponent is fitted


@dataclass(frozen=True)
class Was(Method):
    """WAS (EMNLP 2025), with the same sparsity at every projection.

    order: of the norm, 1 as in the paper or 2, by which the expected squared error is least.
    exponent: alpha >= 0; None fits it at every projection, on the error of every second calibration row.
    """

    order: int = 1
    exponent: float | None = 1.0

    name: ClassVar[str] = "was"
    paper: ClassVar[str] = "WAS, EMNLP 2025"
    family: ClassVar[Family] = "threshold"
    granularity: ClassVar[Granularity] = "token"
    by_magnitude: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.order not in (1, 2):
            raise ValueError(f"order must be 1 or 2, not {self.order}")
        if self.exponent is not None and not 0 <= self.exponent < math.inf:
            raise ValueError(f"exponent must be >= 0 or None, not {self.exponent}")

    def sites(self, block) -> tuple[Site, ...]:
        return projection_sites(block)

    def fit(self, site: Site, acts: Acts, target: float) -> SiteParams:
        norms = acts.weights[site.linears[0]].float().norm(p=self.order, dim=0)  # (n,)
        exponent = self.exponent
        if exponent is None:
            x, weight = acts.met(site.reads).float(), acts.weights[site.linears[0]].float()
            exponent = min(EXPONENTS, key=lambda alpha: _error(x, weight, norms**alpha, target))
        params = SiteParams(rule=Threshold(-math.inf), buffers={"norms": norms**exponent})
        if target == 0.0:
            return params
        scores = self.calibration_scores(site, acts, params)
        return dataclasses.replace(params, rule=Threshold(selection.quantile(scores, target)))

    def factors(self, site: Site, params: SiteParams) -> Tensor | None:
        return params.buffers["norms"]

    def score(self, x, rows: Rows, site: Site, params: SiteParams, memory: Memory):
        return x.abs() * params.buffers["norms"].to(x.dtype)  # (N, n)

    def score_bytes(self, site: Site, params: SiteParams) -> int:
        return params.buffers["norms"].nbytes


def _error(x: Tensor, weight: Tensor, factors: Tensor, target: float) -> float:
    """Squared error of x @ W.T on the odd rows of x (N, n) under the threshold of the even ones."""
    scores = x.abs() * factors
    cut = selection.quantile(scores[::2], target)
    return float((torch.where(scores[1::2] > cut, 0, x[1::2]) @ weight.t()).square().sum())
