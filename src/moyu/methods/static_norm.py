"""Static norm: keep the neurons whose weights and usual size are largest, for every token. Pruning, not dynamic.

score_j = sqrt(mean_t a_tj^2) * ||w_j||, the root mean square of what neuron j adds (Wanda's idea for whole neurons); without
data ||W_g[j]|| * ||W_u[j]||, the static baseline of GRIFFIN (||W_u[j]|| * ||w_j|| where there is no gate).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from moyu.methods.base import Acts, Family, Granularity, Memory, Method, Rows, Site, SiteParams, neuron_site
from moyu.methods.selection import TopK, keep_count


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
        return (neuron_site(block, "mlp_in"),) if block.has_ffn else ()

    def prepare(self, site: Site, acts: Acts) -> Mapping[str, Tensor]:
        down = acts.weights["down"].float().norm(dim=0)  # (f,)
        if self.data:
            return {"importance": acts.met("mid").float().square().mean(0).sqrt() * down}
        up = acts.weights["up"].float().norm(dim=1)
        return {"importance": up * (acts.weights["gate"].float().norm(dim=1) if "gate" in acts.weights else down)}

    def fit(self, site: Site, acts: Acts, target: float) -> SiteParams:
        return SiteParams(rule=TopK(keep_count(site.units, target)), buffers=self.prepare(site, acts))

    def score(self, x, rows: Rows, site: Site, params: SiteParams, memory: Memory):
        return params.buffers["importance"].expand(len(rows.seq), -1)  # (N, f)
