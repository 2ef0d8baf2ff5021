"""Skip the neurons whose activation is exactly zero: same result, fewer bytes.

a_j = relu(p_j) = 0 contributes 0 * w_j to the output, so column j of down need not be read; behind a ReLU gate row j of up
need not be read either. So too where a network's own module cuts its gate, as the statistical top-k of Gemma 3n does, which
is asked what it makes of the gate. The result equals dense up to summation order (unless up or down holds Inf or NaN: 0 * Inf).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moyu.methods.base import Family
from moyu.methods.fitting import EVERYTHING
from moyu.methods.magnitude import Magnitude
from moyu.methods.selection import Threshold
from moyu.methods.sites import down_sites, row_sites
from moyu.methods.values import Acts, Site, SiteParams


@dataclass(frozen=True)
class ReluZero(Magnitude):
    """ReLU zero skip. Lossless on ReLU, squared ReLU, ReGLU, and where a network's own module cuts; elsewhere it has no site."""

    name: ClassVar[str] = "relu-zero"
    paper: ClassVar[str] = "ReLU Strikes Back, arXiv 2310.04564"
    family: ClassVar[Family] = "threshold"
    exact: ClassVar[bool] = True
    needs_calibration: ClassVar[bool] = False
    solves_target: ClassVar[bool] = False

    def sites(self, block) -> tuple[Site, ...]:
        if block.act not in ("relu", "relu2") and not block.cuts:
            return ()
        return row_sites(block, "gate") if block.gated else down_sites(block)

    def fit(self, site: Site, acts: Acts, target: float) -> SiteParams:
        return SiteParams(rule=Threshold(0.0) if target > 0 else EVERYTHING)
