"""Methods that stretch the contract without being in the registry."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from moyu.methods.base import Refresh, SiteParams, column_site, head_sites, neuron_site, row_site
from moyu.methods.cats import Cats
from moyu.methods.griffin import Griffin
from moyu.methods.selection import PerUnitThreshold, quantile
from moyu.methods.teal import Teal


@dataclass(frozen=True)
class Countdown(Cats):
    """Up first: rows of gate and columns of down."""

    def sites(self, block):
        return (row_site(block, "up"),) if block.gated else ()


@dataclass(frozen=True)
class PerUnit(Cats):
    """A threshold a neuron (CHESS)."""

    def fit(self, site, acts, target):
        scores = acts.sparse["gate"].abs()
        return SiteParams(rule=PerUnitThreshold(scores.quantile(target, dim=0)))


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
class LookAhead(Cats):
    """Layer l decides from the attention input of layer l - 1."""

    def sites(self, block):
        if block.layer == 0:
            return ()
        return (dataclasses.replace(neuron_site(block, "mlp_in", block.layer - 1), reads="mlp_in"),)

    def prepare(self, site, acts):
        generator = torch.Generator().manual_seed(site.layer)
        return {"router": torch.randn(site.units, acts.dense["mlp_in"].shape[1], generator=generator)}

    def score(self, x, rows, site, params, memory):
        return x @ params.buffers["router"].to(x.dtype).T


@dataclass(frozen=True)
class Blocked(Griffin):
    """Blocks of 8 neurons, decided by the prompt."""

    def sites(self, block):
        if not block.has_ffn:
            return ()
        site = neuron_site(block, "mid")
        return (dataclasses.replace(site, units=site.units // 8, unit_bytes=site.unit_bytes * 8),)

    def fit(self, site, acts, target):
        return dataclasses.replace(
            super().fit(site, acts, target), blocks=torch.arange(site.units).repeat_interleave(8)
        )

    def score(self, x, rows, site, params, memory):
        return super().score(x, rows, site, params, memory).unflatten(1, (site.units, 8)).sum(2)


@dataclass(frozen=True)
class Heads(Cats):
    """Whole heads by a fixed random router (Deja Vu's heads)."""

    def sites(self, block):
        return head_sites(block)

    def prepare(self, site, acts):
        generator = torch.Generator().manual_seed(site.layer)
        return {"router": torch.randn(site.units, acts.dense["attn_in"].shape[1], generator=generator)}

    def score(self, x, rows, site, params, memory):
        return x @ params.buffers["router"].to(x.dtype).T


class Every:
    """A controller that refreshes every `period` steps."""

    def __init__(self, period: int, tokens: int):
        self.period, self.tokens, self.events = period, tokens, []

    def after(self, step):
        from moyu.methods.base import Keep

        if step.index % self.period == 0:
            self.events.append(step.tokens.shape[1])
            return Refresh(self.tokens)
        return Keep()


FIXTURES = {
    "countdown": Countdown(),
    "per-unit": PerUnit(),
    "low-rank": LowRank(),
    "rotated": Rotated(),
    "centred": Centred(),
    "look-ahead": LookAhead(),
    "blocked": Blocked(),
    "heads": Heads(),
}
