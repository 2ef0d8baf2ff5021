"""WINA: skip the input channels whose magnitude times the norm of their weights is small.

score_i = |v_i| * c_i, c_i = ||W[:, i]||_2: the norm of what channel i adds to the output. Linears that take the same input
(q, k, v; gate, up) share one mask, with the joint norm c_i = sqrt(sum_W ||W[:, i]||^2).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moyu.methods.base import Acts, Family, Granularity, Memory, Method, Rows, Site, SiteParams, input_sites
from moyu.methods.selection import TopK, keep_count


@dataclass(frozen=True)
class Wina(Method):
    """WINA, arXiv 2505.19427, without its transform of the weights.

    rule: "top-k" keeps the same count for every token, as in the paper; "threshold" keeps what is above the calibrated
    quantile, so that easy tokens keep less.
    """

    rule: str = "top-k"

    name: ClassVar[str] = "wina"
    paper: ClassVar[str] = "WINA, arXiv 2505.19427"
    family: ClassVar[Family] = "threshold"
    granularity: ClassVar[Granularity] = "token"
    by_magnitude: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.rule not in ("top-k", "threshold"):
            raise ValueError(f"rule must be 'top-k' or 'threshold', not {self.rule!r}")

    def sites(self, block) -> tuple[Site, ...]:
        return input_sites(block)

    def prepare(self, site: Site, acts: Acts) -> Mapping[str, Tensor]:
        return {"norms": torch.cat([acts.weights[n] for n in site.linears]).float().norm(dim=0)}  # (n,)

    def fit(self, site: Site, acts: Acts, target: float) -> SiteParams:
        params = super().fit(site, acts, target)
        if self.rule == "threshold":
            return params
        return dataclasses.replace(params, rule=TopK(keep_count(site.units, target)))

    def factors(self, site: Site, params: SiteParams) -> Tensor | None:
        return params.buffers["norms"]

    def score(self, x, rows: Rows, site: Site, params: SiteParams, memory: Memory):
        return x.abs() * params.buffers["norms"].to(x.dtype)  # (N, n)

    def score_bytes(self, site: Site, params: SiteParams) -> int:
        return params.buffers["norms"].nbytes
