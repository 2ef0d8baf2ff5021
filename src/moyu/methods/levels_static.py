"""Static levels: all bits for the inputs that need them most on calibration text, few bits for the others, for every token.

score_i = sqrt(mean_t x_ti^2) ||W_i - w^_i||, the root mean square of the error that input i makes while its further bits are not
read (see `levels`). Of the head, all bits are read for the words that are the likeliest on average. It is mixed precision by channel,
and the null of `levels`: at equal bits, what `levels` gains over it comes from choosing for each token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moyu.methods.base import Family, Granularity, Method
from moyu.methods.fitting import at_count
from moyu.methods.levels import WORDS, further_norms
from moyu.methods.shapes import shape
from moyu.methods.sites import level_sites, word_sites
from moyu.methods.values import Acts, Memory, Rows, Site, SiteParams


@dataclass(frozen=True)
class LevelsStatic(Method):
    """Static levels, for models in formats of integers of 3 to 8 bits."""

    name: ClassVar[str] = "levels-static"
    paper: ClassVar[str] = "reference"
    family: ClassVar[Family] = "static"
    granularity: ClassVar[Granularity] = "static"
    quantised_only: ClassVar[bool] = True

    def sites(self, block) -> tuple[Site, ...]:
        return (*level_sites(block), *word_sites(block))

    def shapes(self, site: Site, block):
        return {"importance": shape("units")}

    def fit(self, site: Site, acts: Acts, target: float) -> SiteParams:
        if site.skips == "words":
            likely = acts.met("words").float().softmax(1).mean(0)
            return at_count(site, 1 - WORDS * (1 - target), {"importance": likely})
        size = acts.met(site.reads).float().square().mean(0).sqrt()
        return at_count(site, target, {"importance": size * further_norms(site, acts)})  # (n,)

    def score(self, x, rows: Rows, site: Site, params: SiteParams, memory: Memory):
        return params.buffers["importance"].expand(len(rows.seq), -1)  # (N, n)
