"""Static popularity: keep the neurons that mattered most on calibration text. Not dynamic: the null every method must beat.

score_j = mean_t |a_tj| * ||w_j||; the k largest of each layer are kept for every token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moyu.methods.base import Family, Granularity, Method
from moyu.methods.fitting import at_count
from moyu.methods.magnitude import column_norms
from moyu.methods.shapes import shape
from moyu.methods.sites import neuron_sites
from moyu.methods.values import Acts, Memory, Rows, Site, SiteParams


@dataclass(frozen=True)
class Popularity(Method):
    """Static popularity (mean norm of each neuron's contribution)."""

    name: ClassVar[str] = "popularity"
    paper: ClassVar[str] = "reference"
    family: ClassVar[Family] = "static"
    granularity: ClassVar[Granularity] = "static"

    def sites(self, block) -> tuple[Site, ...]:
        return neuron_sites(block, "mlp_in")

    def shapes(self, site: Site, block):
        return {"popularity": shape("units")}

    def fit(self, site: Site, acts: Acts, target: float) -> SiteParams:
        mean = acts.dense["mid"][acts.rows.valid].abs().float().mean(0)
        return at_count(site, target, {"popularity": mean * column_norms(acts.weights, ["down"])})  # (f,)

    def score(self, x, rows: Rows, site: Site, params: SiteParams, memory: Memory):
        return params.buffers["popularity"].expand(len(rows.seq), -1)  # (N, f)
