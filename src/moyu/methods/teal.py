"""TEAL: skip the input channels of every projection whose magnitude is small.

score_i = |v_i| at the input of q, k, v, o, gate, up and down, each with a threshold of its own: the target quantile of |v|
on calibration text (no symmetry of the density is assumed).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moyu.methods.base import Family, Granularity, Memory, Method, Rows, Site, SiteParams, Tap, column_site

INPUTS: dict[str, Tap] = {
    "q": "attn_in",
    "k": "attn_in",
    "v": "attn_in",
    "qkv": "attn_in",
    "o": "heads",
    "gate": "mlp_in",
    "up": "mlp_in",
    "down": "mid",
}


@dataclass(frozen=True)
class Teal(Method):
    """TEAL, arXiv 2408.14690, with the same sparsity at every projection."""

    name: ClassVar[str] = "teal"
    paper: ClassVar[str] = "TEAL, arXiv 2408.14690"
    family: ClassVar[Family] = "threshold"
    granularity: ClassVar[Granularity] = "token"
    by_magnitude: ClassVar[bool] = True

    def sites(self, block) -> tuple[Site, ...]:
        return tuple(column_site(block, tap, name) for name, tap in INPUTS.items() if name in block.pieces)

    def score(self, x, rows: Rows, site: Site, params: SiteParams, memory: Memory):
        return x.abs()  # (N, n)
