"""Static norm: keep the neurons whose weights and usual size are largest, for every token. Pruning, not dynamic.

score_j = sqrt(mean_t a_tj^2) * ||w_j||, the root mean square of what neuron j adds (Wanda's idea for whole neurons); without
data ||W_g[j]|| * ||W_u[j]||, the static baseline of GRIFFIN (||W_u[j]|| * ||w_j|| where there is no gate).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moyu.methods.base import Family, Granularity, Method
from moyu.methods.fitting import at_count
from moyu.methods.magnitude import column_norms
from moyu.methods.shapes import shape
from moyu.methods.sites import neuron_sites
from moyu.methods.values import Acts, Memory, Rows, Site, SiteParams


@dataclass(frozen=True)
class StaticNorm(Method):
    """Static norm (structured Wanda).

    data: False looks at the weights alone.
    """

    data: bool = True

    name: ClassVar[str] = "static-norm"
    paper: ClassVar[str] = "after Wanda, arXiv 2306.11695"
    family: ClassVar[Family] = "static"
    granularity: ClassVar[Granularity] = "static"

    def sites(self, block) -> tuple[Site, ...]:
        return neuron_sites(block, "mlp_in")

    def shapes(self, site: Site, block):
        return {"importance": shape("units")}

    def fit(self, site: Site, acts: Acts, target: float) -> SiteParams:
        down = column_norms(acts.weights, ["down"])  # (f,)
        if self.data:
            importance = acts.met("mid").float().square().mean(0).sqrt() * down
        else:
            up = acts.weights["up"].float().norm(dim=1)
            importance = up * (acts.weights["gate"].float().norm(dim=1) if "gate" in acts.weights else down)
        return at_count(site, target, {"importance": importance})

    def score(self, x, rows: Rows, site: Site, params: SiteParams, memory: Memory):
        return params.buffers["importance"].expand(len(rows.seq), -1)  # (N, f)
