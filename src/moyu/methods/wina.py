"""WINA: skip the input channels whose magnitude times the norm of their weights is small.

score_i = |v_i| * c_i, c_i = ||W[:, i]||_2: the norm of what channel i adds to the output. Linears that take the same input
(q, k, v; gate, up) share one mask, with the joint norm c_i = sqrt(sum_W ||W[:, i]||^2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moyu.methods.base import Family
from moyu.methods.fitting import at_count
from moyu.methods.knobs import knob
from moyu.methods.magnitude import Weighed
from moyu.methods.sites import input_sites
from moyu.methods.values import Acts, Site, SiteParams


@dataclass(frozen=True)
class Wina(Weighed):
    """WINA, arXiv 2505.19427, without its transform of the weights.

    rule: "top-k" keeps the same count for every token, as in the paper; "threshold" keeps what is above the calibrated
    quantile, so that easy tokens keep less.
    """

    rule: str = knob("top-k", one_of=("top-k", "threshold"))

    name: ClassVar[str] = "wina"
    paper: ClassVar[str] = "WINA, arXiv 2505.19427"
    family: ClassVar[Family] = "threshold"

    def sites(self, block) -> tuple[Site, ...]:
        return input_sites(block)

    def fit(self, site: Site, acts: Acts, target: float) -> SiteParams:
        if self.rule == "threshold":
            return super().fit(site, acts, target)
        return at_count(site, target, self.prepared(site, acts))
