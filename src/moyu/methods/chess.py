"""CHESS: a threshold of its own for every gate channel, so that the expected error of the layer is least.

Keep neuron j where |act(g_j)| >= t_j = sqrt(kappa / E[u_j^2]), kappa one cut a layer: in the score
|act(g_j)| * sqrt(E[u_j^2]) it is one threshold. Rows of up and columns of down as in CATS; in the attention the inputs of
q and o are cut by their magnitude, k and v stay dense.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from moyu.methods.base import Family
from moyu.methods.magnitude import Magnitude
from moyu.methods.shapes import shape
from moyu.methods.sites import column_site, row_sites
from moyu.methods.values import READS, Acts, Site, SiteParams


@dataclass(frozen=True)
class Chess(Magnitude):
    """CHESS, arXiv 2409.01366.

    weighted: t_j = sqrt(kappa / (E[u_j^2] ||w_j||^2)) with w_j column j of down, which is least expected squared error
    of the output where u_j is independent of g_j and neurons are uncorrelated. The paper leaves ||w_j|| out.
    """

    weighted: bool = False

    name: ClassVar[str] = "chess"
    paper: ClassVar[str] = "CHESS, arXiv 2409.01366"
    family: ClassVar[Family] = "threshold"

    def sites(self, block) -> tuple[Site, ...]:
        attention = tuple(column_site(block, READS[name], name) for name in ("q", "o") if name in block.pieces)
        return (*attention, *row_sites(block, "gate"))

    def shapes(self, site: Site, block):
        return {"usual": shape("units")} if site.skips == "rows" else {}

    def prepare(self, site: Site, acts: Acts) -> Mapping[str, Tensor]:
        if site.skips != "rows":
            return {}
        usual = acts.met("up").float().square().mean(0).sqrt()  # (f,)
        return {"usual": usual * acts.weights["down"].float().norm(dim=0) if self.weighted else usual}

    def factors(self, site: Site, params: SiteParams) -> Tensor | None:
        return params.buffers.get("usual")
