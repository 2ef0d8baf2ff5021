"""Greedy oracle: skip the neurons that, one after another, move the output least. A bound, not a method.

The plain oracle ranks |a_j| ||w_j|| as if neurons added up at right angles. Here the next neuron to skip is the one with the
least rise of ||sum of skipped n_j||^2, which is 2 <n_j, that sum> + ||n_j||^2, n_j = a_j w_j; score_j is its place in that
order. Its lead over the plain oracle is the price of correlation. (Picking what to keep instead, as matching pursuit does, can
end behind the plain oracle: the first ones fit the whole output by themselves, and the rest of the count spoils it.)
Holds the Gram matrix of down, f x f: for small models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from moyu.methods.base import Family, Method
from moyu.methods.fitting import at_count
from moyu.methods.selection import TopK
from moyu.methods.shapes import shape
from moyu.methods.sites import down_sites
from moyu.methods.values import Acts, Memory, Rows, Site, SiteParams


@dataclass(frozen=True)
class OracleGreedy(Method):
    """Greedy oracle on the neurons' contributions. Columns of down."""

    name: ClassVar[str] = "oracle-greedy"
    paper: ClassVar[str] = "reference"
    family: ClassVar[Family] = "reference"

    def sites(self, block) -> tuple[Site, ...]:
        return down_sites(block)

    def shapes(self, site: Site, block):
        return {"gram": shape("units", "units")}

    def fit(self, site: Site, acts: Acts, target: float) -> SiteParams:
        down = acts.weights["down"]
        down = down if down.dtype == torch.float64 else down.float()
        return at_count(site, target, {"gram": down.t() @ down})  # (f, f)

    def score(self, x, rows: Rows, site: Site, params: SiteParams, memory: Memory):
        assert isinstance(params.rule, TopK)
        gram = params.buffers["gram"]  # (f, f)
        a = x.to(gram)
        rise = a.square() * gram.diagonal()  # (N, f), ||n_j||^2: nothing is skipped yet
        score = torch.full_like(a, float(site.units))
        each = torch.arange(len(a), device=a.device)
        for place in range(site.units - params.rule.k):
            least = rise.argmin(dim=1)  # (N,)
            score[each, least] = float(place)
            rise += 2 * a * a[each, least, None] * gram[least]
            rise[each, least] = torch.inf
        return score
