"""Oracle neuron mask: keep the neurons whose contributions are largest for this very token. A bound, not a method.

score_j = |a_j| * ||w_j||, which needs all of gate and up: its choice is free in every byte count, and labelled so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moyu.methods.base import Family
from moyu.methods.fitting import at_count
from moyu.methods.magnitude import Weighed
from moyu.methods.sites import down_sites
from moyu.methods.values import Acts, Site, SiteParams


@dataclass(frozen=True)
class Oracle(Weighed):
    """Oracle: exact top-k of the norm of each neuron's contribution. Columns of down."""

    name: ClassVar[str] = "oracle"
    paper: ClassVar[str] = "reference"
    family: ClassVar[Family] = "reference"

    def sites(self, block) -> tuple[Site, ...]:
        return down_sites(block)

    def fit(self, site: Site, acts: Acts, target: float) -> SiteParams:
        return at_count(site, target, self.prepared(site, acts))

    def score_bytes(self, site: Site, params: SiteParams) -> int:
        return 0  # its choice is free
