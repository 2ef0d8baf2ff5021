"""Methods that stretch the contract without being in the registry."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch

from moyu.methods.base import Family, Method
from moyu.methods.control import Keep, Refresh
from moyu.methods.fitting import at_quantile
from moyu.methods.griffin import Griffin
from moyu.methods.selection import quantile
from moyu.methods.shapes import shape
from moyu.methods.sites import column_site, grouped, head_sites, neuron_sites
from moyu.methods.teal import Teal


@dataclass(frozen=True)
class Router(Method):
    """A fixed random router on the site's tap, with a threshold."""

    name: ClassVar[str] = "router"
    paper: ClassVar[str] = "none"
    family: ClassVar[Family] = "reference"

    def shapes(self, site, block):
        return {"router": shape("units", "n")}

    def fit(self, site, acts, target):
        generator = torch.Generator().manual_seed(site.layer)
        router = torch.randn(site.units, acts.dense[site.reads].shape[1], generator=generator)
        return at_quantile(self, site, acts, target, {"router": router})

    def score(self, x, rows, site, params, memory):
        return x @ params.buffers["router"].to(x.dtype).T


@dataclass(frozen=True)
class LowRank(Teal):
    """An output path for the skipped part, at every projection (R-Sparse)."""

    def fit(self, site, acts, target):
        u, s, v = torch.linalg.svd(acts.weights[site.linears[0]].double(), full_matrices=False)
        return dataclasses.replace(super().fit(site, acts, target), low_rank=(u[:, :8] * s[:8], v[:8]))


@dataclass(frozen=True)
class Rotated(Teal):
    """Masks in a rotated basis (LaRoSA)."""

    def sites(self, block):
        return tuple(column_site(block, "mlp_in", n) for n in ("gate", "up") if n in block.pieces)

    def fit(self, site, acts, target):
        x = acts.sparse[site.reads].double()
        basis = torch.linalg.eigh(x.T @ x).eigenvectors
        params = super().fit(site, acts, target)
        rule = dataclasses.replace(params.rule, value=quantile((x @ basis).abs(), target)) if target else params.rule
        return dataclasses.replace(params, basis=basis, rule=rule)


@dataclass(frozen=True)
class Centred(Teal):
    """Masks around a centre (SCAP)."""

    def fit(self, site, acts, target):
        return dataclasses.replace(super().fit(site, acts, target), centre=acts.sparse[site.reads].mean(0))


@dataclass(frozen=True)
class LookAhead(Router):
    """Layer l decides from the network's input of layer l - 1."""

    def sites(self, block):
        return neuron_sites(block, "mlp_in", block.layer - 1) if block.layer else ()


@dataclass(frozen=True)
class Blocked(Griffin):
    """Blocks of 8 neurons, decided by the prompt."""

    def sites(self, block):
        return tuple(grouped(site, site.units // 8) for site in neuron_sites(block, "mid"))

    def fit(self, site, acts, target):
        return dataclasses.replace(
            super().fit(site, acts, target), blocks=torch.arange(site.units).repeat_interleave(8)
        )

    def score(self, x, rows, site, params, memory):
        return super().score(x, rows, site, params, memory).unflatten(1, (site.units, 8)).sum(2)


@dataclass(frozen=True)
class Heads(Router):
    """Whole heads (Deja Vu's heads)."""

    def sites(self, block):
        return head_sites(block)


class Every:
    """A controller that refreshes every `period` steps."""

    def __init__(self, period: int, tokens: int):
        self.period, self.tokens, self.events = period, tokens, []

    def after(self, step):
        if step.index % self.period == 0:
            self.events.append(step.tokens.shape[1])
            return Refresh(self.tokens)
        return Keep()


FIXTURES = {
    "low-rank": LowRank(),
    "rotated": Rotated(),
    "centred": Centred(),
    "look-ahead": LookAhead(),
    "blocked": Blocked(),
    "heads": Heads(),
}
