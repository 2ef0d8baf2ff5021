"""Skip the neurons whose activation is exactly zero: same result, fewer bytes.

a_j = relu(p_j) = 0 contributes 0 * w_j to the output, so column j of down need not be read; behind a ReLU gate row j of up
need not be read either. So too where a network's own module cuts its gate, as the statistical top-k of Gemma 3n does, which
is asked what it makes of the gate. The result equals dense up to summation order (unless up or down holds Inf or NaN: 0 * Inf).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from moyu.methods.base import Acts, Family, Granularity, Memory, Method, Rows, Site, SiteParams, column_site, row_site
from moyu.methods.selection import Threshold


@dataclass(frozen=True)
class ReluZero(Method):
    """ReLU zero skip. Lossless on ReLU, squared ReLU, ReGLU, and where a network's own module cuts; elsewhere it has no site."""

    name: ClassVar[str] = "relu-zero"
    paper: ClassVar[str] = "ReLU Strikes Back, arXiv 2310.04564"
    family: ClassVar[Family] = "threshold"
    granularity: ClassVar[Granularity] = "token"
    by_magnitude: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    needs_calibration: ClassVar[bool] = False
    solves_target: ClassVar[bool] = False

    def sites(self, block) -> tuple[Site, ...]:
        if block.act not in ("relu", "relu2") and not block.cuts:
            return ()
        return (row_site(block, "gate"),) if block.gated else (column_site(block, "mid", "down"),)

    def fit(self, site: Site, acts: Acts, target: float) -> SiteParams:
        return SiteParams(rule=Threshold(0.0 if target > 0 else -math.inf))

    def score(self, x, rows: Rows, site: Site, params: SiteParams, memory: Memory):
        return x.abs()  # (N, f)
