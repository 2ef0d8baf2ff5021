"""CATS: skip the neurons whose gate is small.

score_j = |act(g_j)|, kept above the calibrated quantile of its layer. The gate is computed densely, so at most two thirds of
a gated feed-forward network can be skipped: rows of up and columns of down.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moyu.methods.base import Family
from moyu.methods.magnitude import Magnitude
from moyu.methods.sites import row_sites
from moyu.methods.values import Site


@dataclass(frozen=True)
class Cats(Magnitude):
    """CATS, arXiv 2404.08763, without its optional fine-tuning. Needs a gated network."""

    name: ClassVar[str] = "cats"
    paper: ClassVar[str] = "CATS, arXiv 2404.08763"
    family: ClassVar[Family] = "threshold"

    def sites(self, block) -> tuple[Site, ...]:
        return row_sites(block, "gate")
