"""COUNTDOWN-M: skip the neurons whose up value is small.

score_j = |u_j|, kept above the calibrated quantile of its layer: CATS with the roles of gate and up exchanged. Up is
computed densely; rows of gate and columns of down are skipped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moyu.methods.base import Family
from moyu.methods.magnitude import Magnitude
from moyu.methods.sites import row_sites
from moyu.methods.values import Site


@dataclass(frozen=True)
class Countdown(Magnitude):
    """COUNTDOWN-M, arXiv 2505.17701. Needs a gated network."""

    name: ClassVar[str] = "countdown"
    paper: ClassVar[str] = "COUNTDOWN, arXiv 2505.17701"
    family: ClassVar[Family] = "threshold"

    def sites(self, block) -> tuple[Site, ...]:
        return row_sites(block, "up")
