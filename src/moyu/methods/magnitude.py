"""Methods whose score is a magnitude: |x| * c, x the tap and c a constant per unit.

The formula stands here once, for Python and for kernels: a method gives c. Under a `Threshold` rule a site of columns or rows of
such a method is decided by the kernels while they compute, so its decode steps are native.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from moyu.methods.base import Method
from moyu.methods.fitting import at_quantile
from moyu.methods.remainder import Remainder
from moyu.methods.shapes import Shape, shape
from moyu.methods.values import Acts, Memory, Rows, Site, SiteParams
from moyu.model.anatomy import Block


@dataclass(frozen=True)
class Magnitude(Method):
    """score_j = |x_j| * c_j."""

    def factors(self, site: Site, params: SiteParams) -> Tensor | None:
        """c (units,), or None where every c_j is 1."""
        return None

    @final
    def score(self, x: Tensor, rows: Rows, site: Site, params: SiteParams, memory: Memory) -> Tensor:
        values, c = self.values(x, site, params), self.factors(site, params)
        return values.abs() if c is None else values.abs() * c.to(values)  # (N, units)

    def values(self, x: Tensor, site: Site, params: SiteParams) -> Tensor:
        """What has the magnitude, (N, n) -> (N, units): the tap itself, unless the method foresees neurons from it."""
        return x

    def prepare(self, site: Site, acts: Acts) -> Mapping[str, Tensor]:
        """Buffers that `factors` and `values` need, from weights and calibration activations; the same at every target."""
        return {}

    def fit(self, site: Site, acts: Acts, target: float) -> SiteParams:
        """What `prepare` gives, and a threshold at the target quantile of the calibration scores."""
        return at_quantile(self, site, acts, target, self.prepared(site, acts))

    def prepared(self, site: Site, acts: Acts) -> Mapping[str, Tensor]:
        """What `prepare` gives, made once for all targets."""
        if (self, site.key) not in acts.known:
            acts.known[self, site.key] = self.prepare(site, acts)
        return acts.known[self, site.key]

    def remainder(self, site: Site, params: SiteParams) -> Remainder | None:
        """The weights in few bits that stand for those of skipped units; None: skipped units give nothing."""
        return None

    def score_bytes(self, site: Site, params: SiteParams) -> int:
        c = self.factors(site, params)
        return 0 if c is None else c.nbytes


@dataclass(frozen=True)
class Weighed(Magnitude):
    """score_i = |x_i| * ||W[:, i]||_2: the norm of what input i adds to the outputs of all linears of its site."""

    def shapes(self, site: Site, block: Block) -> Mapping[str, Shape]:
        return {"norms": shape("units")}

    def prepare(self, site: Site, acts: Acts) -> Mapping[str, Tensor]:
        return {"norms": column_norms(acts.weights, site.linears)}

    def factors(self, site: Site, params: SiteParams) -> Tensor | None:
        return params.buffers["norms"]


def column_norms(weights: Mapping[str, Tensor], linears: Sequence[str], order: int = 2) -> Tensor:
    """||W[:, i]|| over all linears together, (n,) float."""
    return torch.cat([weights[n] for n in linears]).float().norm(p=order, dim=0)


def factors_of(method: Method, site: Site, params: SiteParams) -> Tensor | None:
    """c (units,) of a method's score |x| * c; None where every c is 1, or the score is no magnitude."""
    return method.factors(site, params) if isinstance(method, Magnitude) else None


def remainder_of(method: Method, site: Site, params: SiteParams) -> Remainder | None:
    """The weights in few bits that stand for those of skipped units; None: skipped units give nothing."""
    return method.remainder(site, params) if isinstance(method, Magnitude) else None


def rest_of(method: Method, x: Tensor, mask: Tensor, site: Site, params: SiteParams) -> Tensor | None:
    """What skipped units give all the same: the tap (N, n) and the mask (N, units) -> (N, q) of one linear; None: nothing."""
    rest = remainder_of(method, site, params)
    if rest is None:
        return None
    assert isinstance(method, Magnitude)
    return rest.given(method.values(x, site, params), mask)
