"""TEAL: skip the input channels of every projection whose magnitude is small.

score_i = |v_i| at the input of q, k, v, o, gate, up and down, each with a threshold of its own: the target quantile of |v|
on calibration text (no symmetry of the density is assumed).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moyu.methods.base import Family
from moyu.methods.magnitude import Magnitude
from moyu.methods.sites import projection_sites
from moyu.methods.values import Site


@dataclass(frozen=True)
class Teal(Magnitude):
    """TEAL, arXiv 2408.14690, with the same sparsity at every projection."""

    name: ClassVar[str] = "teal"
    paper: ClassVar[str] = "TEAL, arXiv 2408.14690"
    family: ClassVar[Family] = "threshold"

    def sites(self, block) -> tuple[Site, ...]:
        return projection_sites(block)
