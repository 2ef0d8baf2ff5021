"""TEAL: skip the input channels of every projection whose magnitude is small.

score_i = |v_i| at the input of q, k, v, o, gate, up and down, each with a threshold of its own: the target quantile of |v|
on calibration text (no symmetry of the density is assumed).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moyu.methods.base import Family, Granularity, Memory, Method, Rows, Site, SiteParams, projection_sites


@dataclass(frozen=True)
class Teal(Method):
    """TEAL, arXiv 2408.14690, with the same sparsity at every projection."""

    name: ClassVar[str] = "teal"
    paper: ClassVar[str] = "TEAL, arXiv 2408.14690"
    family: ClassVar[Family] = "threshold"
    granularity: ClassVar[Granularity] = "token"
    by_magnitude: ClassVar[bool] = True

    def sites(self, block) -> tuple[Site, ...]:
        return projection_sites(block)

    def score(self, x, rows: Rows, site: Site, params: SiteParams, memory: Memory):
        return x.abs()  # (N, n)
