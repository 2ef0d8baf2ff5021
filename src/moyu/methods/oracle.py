"""Oracle neuron mask: keep the neurons whose contributions are largest for this very token. A bound, not a method.

score_j = |a_j| * ||w_j||, which needs all of gate and up: its choice is free in every byte count, and labelled so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from moyu.methods.base import Acts, Family, Granularity, Memory, Method, Rows, Site, SiteParams, column_site
from moyu.methods.selection import TopK, keep_count


@dataclass(frozen=True)
class Oracle(Method):
    """Oracle: exact top-k of the norm of each neuron's contribution. Columns of down."""

    name: ClassVar[str] = "oracle"
    paper: ClassVar[str] = "reference"
    family: ClassVar[Family] = "reference"
    granularity: ClassVar[Granularity] = "token"

    def sites(self, block) -> tuple[Site, ...]:
        return (column_site(block, "mid", "down"),) if block.has_ffn else ()

    def prepare(self, site: Site, acts: Acts) -> Mapping[str, Tensor]:
        return {"norms": acts.weights["down"].float().norm(dim=0)}  # (f,)

    def fit(self, site: Site, acts: Acts, target: float) -> SiteParams:
        return SiteParams(rule=TopK(keep_count(site.units, target)), buffers=self.prepare(site, acts))

    def score(self, x, rows: Rows, site: Site, params: SiteParams, memory: Memory):
        return x.abs() * params.buffers["norms"].to(x.dtype)  # (N, f)
