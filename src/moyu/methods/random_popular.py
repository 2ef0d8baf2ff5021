"""Random neurons drawn in proportion to their popularity: the null for "the choice of the token matters".

score_j = log(u_j) / f_j with u_j uniform in (0, 1), drawn anew for every token, and f_j neuron j's mean |a_j| ||w_j|| on
calibration text: the k largest are a draw of k neurons without replacement, with weights f (Efraimidis and Spirakis 2006).
A method that does not beat it has only found out which neurons are popular.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moyu.methods.base import Acts, Family, Granularity, Memory, Method, Rows, Site, SiteParams, neuron_site
from moyu.methods.random import uniform
from moyu.methods.selection import TopK, keep_count


@dataclass(frozen=True)
class RandomPopular(Method):
    """Popularity-stratified random neurons.

    seed: a non-negative integer.
    """

    seed: int = 0

    name: ClassVar[str] = "random-popular"
    paper: ClassVar[str] = "reference"
    family: ClassVar[Family] = "reference"
    granularity: ClassVar[Granularity] = "token"

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed must be >= 0, not {self.seed}")

    def sites(self, block) -> tuple[Site, ...]:
        return (neuron_site(block, "mlp_in"),) if block.has_ffn else ()

    def prepare(self, site: Site, acts: Acts) -> Mapping[str, Tensor]:
        return {"popularity": acts.met("mid").abs().float().mean(0) * acts.weights["down"].float().norm(dim=0)}  # (f,)

    def fit(self, site: Site, acts: Acts, target: float) -> SiteParams:
        return SiteParams(rule=TopK(keep_count(site.units, target)), buffers=self.prepare(site, acts))

    def score(self, x, rows: Rows, site: Site, params: SiteParams, memory: Memory):
        popularity = params.buffers["popularity"].double().clamp(min=1e-30)
        drawn = uniform(self.seed, site, rows.pos, site.units).clamp(min=torch.finfo(torch.float64).tiny)
        return drawn.log() / popularity  # (N, f)
