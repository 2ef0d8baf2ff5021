"""Random neurons drawn in proportion to their popularity: the null for "the choice of the token matters".

score_j = log(u_j) / f_j with u_j uniform in (0, 1), drawn anew for every token, and f_j neuron j's mean |a_j| ||w_j|| on
calibration text: the k largest are a draw of k neurons without replacement, with weights f (Efraimidis and Spirakis 2006).
A method that does not beat it has only found out which neurons are popular.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from moyu.methods.base import Family, Method
from moyu.methods.fitting import at_count
from moyu.methods.knobs import knob
from moyu.methods.magnitude import column_norms
from moyu.methods.random import uniform
from moyu.methods.shapes import shape
from moyu.methods.sites import neuron_sites
from moyu.methods.values import Acts, Memory, Rows, Site, SiteParams


@dataclass(frozen=True)
class RandomPopular(Method):
    """Popularity-stratified random neurons.

    seed: a non-negative integer.
    """

    seed: int = knob(0, at_least=0)

    name: ClassVar[str] = "random-popular"
    paper: ClassVar[str] = "reference"
    family: ClassVar[Family] = "reference"

    def sites(self, block) -> tuple[Site, ...]:
        return neuron_sites(block, "mlp_in")

    def shapes(self, site: Site, block):
        return {"popularity": shape("units")}

    def fit(self, site: Site, acts: Acts, target: float) -> SiteParams:
        popularity = acts.met("mid").abs().float().mean(0) * column_norms(acts.weights, ["down"])  # (f,)
        return at_count(site, target, {"popularity": popularity})

    def score(self, x, rows: Rows, site: Site, params: SiteParams, memory: Memory):
        popularity = params.buffers["popularity"].double().clamp(min=1e-30)
        drawn = uniform(self.seed, site, rows.pos, site.units).clamp(min=torch.finfo(torch.float64).tiny)
        return drawn.log() / popularity  # (N, f)
