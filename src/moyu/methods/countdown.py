"""COUNTDOWN-M: skip the neurons whose up value is small.

score_j = |u_j|, kept above the calibrated quantile of its layer: CATS with the roles of gate and up exchanged. Up is
computed densely; rows of gate and columns of down are skipped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moyu.methods.base import Family, Granularity, Memory, Method, Rows, Site, SiteParams, row_site


@dataclass(frozen=True)
class Countdown(Method):
    """COUNTDOWN-M, arXiv 2505.17701. Needs a gated network."""

    name: ClassVar[str] = "countdown"
    paper: ClassVar[str] = "COUNTDOWN, arXiv 2505.17701"
    family: ClassVar[Family] = "threshold"
    granularity: ClassVar[Granularity] = "token"
    by_magnitude: ClassVar[bool] = True

    def sites(self, block) -> tuple[Site, ...]:
        return (row_site(block, "up"),) if block.gated else ()

    def score(self, x, rows: Rows, site: Site, params: SiteParams, memory: Memory):
        return x.abs()  # (N, f)
