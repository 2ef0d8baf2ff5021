"""LaRoSA: masks in a rotated basis, in which few channels hold most of an input.

v~ = Q' v with Q the eigenvectors of sum_t v_t v_t' on calibration text (damping the sum would change none of them); the k
channels with the largest |v~_i| are kept: y = (W Q) S(v~). The rotation itself is exact. Inputs of q, k, v and of gate, up
are rotated, one Q for each of the two; those of o and down are not, and keep less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moyu.methods.base import Family
from moyu.methods.knobs import knob
from moyu.methods.magnitude import Magnitude
from moyu.methods.selection import TopK, keep_count
from moyu.methods.sites import input_sites
from moyu.methods.values import READS, Acts, Site, SiteParams

ROTATED = ("attn_in", "mlp_in")


@dataclass(frozen=True)
class Larosa(Magnitude):
    """LaRoSA, arXiv 2507.01299, rotating each input where it is read instead of the residual stream between blocks.

    ratio: sparsity of o and down over that of the rotated inputs, at least 1; the paper has 1.2 p over 0.8 p.
    """

    ratio: float = knob(1.5, at_least=1)

    name: ClassVar[str] = "larosa"
    paper: ClassVar[str] = "LaRoSA, arXiv 2507.01299"
    family: ClassVar[Family] = "threshold"

    def sites(self, block) -> tuple[Site, ...]:
        return input_sites(block)

    def fit(self, site: Site, acts: Acts, target: float) -> SiteParams:
        if target == 0.0:
            return SiteParams(rule=TopK(site.units))
        rotated = site.reads in ROTATED
        widths = {True: 0, False: 0}  # channels of the block's rotated inputs, and of the others
        for tap, width in {READS[name]: weight.shape[1] for name, weight in acts.weights.items()}.items():
            widths[tap in ROTATED] += width
        level = levels(target, self.ratio, widths[True], widths[False])[0 if rotated else 1]
        rule = TopK(keep_count(site.units, level))
        return SiteParams(rule=rule, basis=directions(acts.met(site.reads))) if rotated else SiteParams(rule=rule)


def levels(target: float, ratio: float, rotated: int, others: int) -> tuple[float, float]:
    """Sparsities of rotated and other inputs, in the ratio where both stay below 1, whose mean over channels is `target`."""
    first = target * (rotated + others) / (rotated + ratio * others)
    if ratio * first < 1:
        return first, ratio * first
    return (target * (rotated + others) - others) / rotated, 1.0


def directions(x: Tensor) -> Tensor:
    """Eigenvectors of sum_t v_t v_t' of rows (N, n), largest eigenvalue first, in x's type: (n, n) orthogonal."""
    wide = x.double()
    second = wide.t() @ wide  # (n, n)
    return torch.linalg.eigh(second).eigenvectors.flip(1).to(x.dtype).contiguous()
