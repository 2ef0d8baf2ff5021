"""Static popularity: keep the neurons that mattered most on calibration text. Not dynamic: the null every method must beat.

score_j = mean_t |a_tj| * ||w_j||; the k largest of each layer are kept for every token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from moyu.methods.base import Acts, Family, Granularity, Memory, Method, Rows, Site, SiteParams, neuron_site
from moyu.methods.selection import TopK, keep_count


@dataclass(frozen=True)
class Popularity(Method):
    """Static popularity (mean norm of each neuron's contribution)."""

    name: ClassVar[str] = "popularity"
    paper: ClassVar[str] = "reference"
    family: ClassVar[Family] = "static"
    granularity: ClassVar[Granularity] = "static"

    def sites(self, block) -> tuple[Site, ...]:
        return (neuron_site(block, "mlp_in"),) if block.has_ffn else ()

    def prepare(self, site: Site, acts: Acts) -> Mapping[str, Tensor]:
        mean = acts.dense["mid"][acts.rows.valid].abs().float().mean(0)
        return {"popularity": mean * acts.weights["down"].float().norm(dim=0)}  # (f,)

    def fit(self, site: Site, acts: Acts, target: float) -> SiteParams:
        return SiteParams(rule=TopK(keep_count(site.units, target)), buffers=self.prepare(site, acts))

    def score(self, x, rows: Rows, site: Site, params: SiteParams, memory: Memory):
        return params.buffers["popularity"].expand(len(rows.seq), -1)  # (N, f)
