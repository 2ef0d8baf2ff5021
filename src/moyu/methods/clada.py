"""CLADA: a sequence's mask, selected again where the text takes a turn: its token was a surprise and dense was unsure.

score_j = mean_t |a_tj| over the dense tokens; the k largest neurons are kept. After every token: surprisal
-log2 pi / log2 V of the token that was written and entropy H / log2 V of the distribution it came from; where both exceed
their own quantile of the last tokens, the last tokens run through the dense model again and the mask is selected from them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moyu.methods.base import Family
from moyu.methods.control import Controller, Keep, Refresh, Step
from moyu.methods.fitting import at_count
from moyu.methods.knobs import knob
from moyu.methods.sequence import Sequence
from moyu.methods.sites import neuron_sites
from moyu.methods.values import Acts, Memory, Rows, Site, SiteParams


@dataclass(frozen=True)
class Clada(Sequence):
    """CLADA, arXiv 2502.19078, with a refresh of the KV cache.

    window: how many earlier tokens a new one's surprisal and entropy are compared with.
    quantile: the quantile of those, in (0, 1), that both must exceed.
    refresh: tokens that run dense again, and that the new mask is selected from; their keys and values become dense.
    """

    window: int = knob(10, at_least=2)
    quantile: float = knob(0.7, above=0, below=1)
    refresh: int = knob(32, at_least=1)

    name: ClassVar[str] = "clada"
    paper: ClassVar[str] = "CLADA, arXiv 2502.19078"
    family: ClassVar[Family] = "sequence"
    needs_calibration: ClassVar[bool] = False

    def sites(self, block) -> tuple[Site, ...]:
        return neuron_sites(block, "mid")

    def fit(self, site: Site, acts: Acts, target: float) -> SiteParams:
        return at_count(site, target)

    def update(self, memory: Memory, x: Tensor, rows: Rows, site: Site, params: SiteParams) -> Memory:
        dense = (rows.valid & ~rows.sparse).to(torch.promote_types(x.dtype, torch.float32))
        sums = dense.new_zeros(rows.slots, x.shape[1]).index_add_(0, rows.seq, x.abs().to(dense) * dense[:, None])
        count = dense.new_zeros(rows.slots, 1).index_add_(0, rows.seq, dense[:, None])
        return {"sums": memory.get("sums", 0) + sums, "count": memory.get("count", 0) + count}

    def score(self, x, rows: Rows, site: Site, params: SiteParams, memory: Memory):
        return (memory["sums"] / memory["count"].clamp(min=1))[rows.seq]  # (N, f)

    def controller(self) -> Controller:
        return OnSurprise(self.window, self.quantile, self.refresh)


@dataclass(frozen=True)
class OnSurprise(Controller):
    """Refresh where surprisal and entropy of any row both exceed their `quantile` of the last `window` tokens."""

    window: int
    quantile: float
    refresh: int

    def after(self, step: Step) -> Keep | Refresh:
        now = step.logits.float().log_softmax(-1)  # (B, V)
        before = step.memory.get("log_probs")
        step.memory["log_probs"] = now
        if before is None:
            return Keep()
        fires = False
        measured = torch.stack(surprise(before, step.tokens[:, -1]), 1)  # (B, 2)
        past = step.memory.get("past", measured[:, :, None][..., :0])  # (B, 2, up to window)
        if past.shape[2] == self.window:
            fires = any(turn(p, m, self.quantile) for p, m in zip(past, measured, strict=True))
        step.memory["past"] = torch.cat([past, measured[:, :, None]], 2)[..., -self.window :]
        return Refresh(self.refresh) if fires else Keep()


def surprise(log_probs: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Surprisal of `tokens` (B,) and entropy, (B,) each, in units of log V: log-probabilities (B, V)."""
    scale = math.log(log_probs.shape[1])
    surprisal = -log_probs.gather(1, tokens[:, None])[:, 0] / scale
    return surprisal, torch.special.entr(log_probs.exp()).sum(1) / scale


def turn(past: Tensor, now: Tensor, quantile: float) -> bool:
    """CLADA's trigger: whether surprisal and entropy `now` (2,) both exceed their `quantile` of `past` (2, window)."""
    return bool((now > past.quantile(quantile, dim=1)).all())
