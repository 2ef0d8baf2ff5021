"""Random neurons: the floor. A counter-based generator, so that batch and padding change nothing.

score_j = hash(seed, layer, expert, position, j) in [0, 1); the k largest are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moyu.methods.base import Family, Method
from moyu.methods.fitting import at_count
from moyu.methods.knobs import knob
from moyu.methods.sites import neuron_sites
from moyu.methods.values import Acts, Memory, Rows, Site, SiteParams


@dataclass(frozen=True)
class Random(Method):
    """Uniformly random neurons, drawn anew for every token.

    seed: a non-negative integer.
    """

    seed: int = knob(0, at_least=0)

    name: ClassVar[str] = "random"
    paper: ClassVar[str] = "reference"
    family: ClassVar[Family] = "reference"
    needs_calibration: ClassVar[bool] = False

    def sites(self, block) -> tuple[Site, ...]:
        return neuron_sites(block, "mlp_in")

    def fit(self, site: Site, acts: Acts, target: float) -> SiteParams:
        return at_count(site, target)

    def score(self, x, rows: Rows, site: Site, params: SiteParams, memory: Memory):
        return uniform(self.seed, site, rows.pos, site.units)  # (N, f)


def uniform(seed: int, site: Site, counters: Tensor, units: int) -> Tensor:
    """Numbers in [0, 1) that depend on (seed, site, counter, unit) alone: counters (N,) -> (N, units) float64.

    splitmix64's finaliser on int64 (wrapping) arithmetic.
    """
    stream = seed * 1_000_003 + site.layer * 8191 + (0 if site.expert is None else (site.expert + 1) * 131_071)
    unit = torch.arange(units, device=counters.device)
    z = (counters[:, None] * units + unit) + stream * 0x1E3779B97F4A7C15 % 2**62
    z = (z ^ _shift(z, 30)) * -4658895280553007687
    z = (z ^ _shift(z, 27)) * -7723592293110705685
    z = z ^ _shift(z, 31)
    return _shift(z, 11).double() / 2**53


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
