"""CATS: skip the neurons whose gate is small.

score_j = |act(g_j)|, kept above the calibrated quantile of its layer. The gate is computed densely, so at most two thirds of
a gated feed-forward network can be skipped: rows of up and columns of down.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moyu.methods.base import Family, Granularity, Memory, Method, Rows, Site, SiteParams, row_site


@dataclass(frozen=True)
class Cats(Method):
    """CATS, arXiv 2404.08763, without its optional fine-tuning. Needs a gated network."""

    name: ClassVar[str] = "cats"
    paper: ClassVar[str] = "CATS, arXiv 2404.08763"
    family: ClassVar[Family] = "threshold"
    granularity: ClassVar[Granularity] = "token"
    by_magnitude: ClassVar[bool] = True

    def sites(self, block) -> tuple[Site, ...]:
        return (row_site(block, "gate"),) if block.gated and block.has_ffn else ()

    def score(self, x, rows: Rows, site: Site, params: SiteParams, memory: Memory):
        return x.abs()  # (N, f)
