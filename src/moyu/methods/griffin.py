"""GRIFFIN: keep the neurons that the prompt used most, for the whole generation.

s_j = sqrt(sum_t (a_tj / ||a_t||)^2) over the prompt's tokens t; the k largest are kept. No calibration: the prompt decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moyu.methods.base import Family
from moyu.methods.fitting import at_count
from moyu.methods.sequence import Sequence
from moyu.methods.sites import neuron_sites
from moyu.methods.values import Acts, Memory, Rows, Site, SiteParams

AT_ONCE = 64  # rows whose squares stay in the cache: fresh memory for a whole prompt's costs more than the arithmetic


@dataclass(frozen=True)
class Griffin(Sequence):
    """GRIFFIN, arXiv 2404.01365."""

    name: ClassVar[str] = "griffin"
    paper: ClassVar[str] = "GRIFFIN, arXiv 2404.01365"
    family: ClassVar[Family] = "sequence"
    needs_calibration: ClassVar[bool] = False

    def sites(self, block) -> tuple[Site, ...]:
        return neuron_sites(block, "mid")

    def fit(self, site: Site, acts: Acts, target: float) -> SiteParams:
        return at_count(site, target)

    def update(self, memory: Memory, x: Tensor, rows: Rows, site: Site, params: SiteParams) -> Memory:
        return {"squares": accumulate(memory.get("squares"), x, rows)}

    def score(self, x, rows: Rows, site: Site, params: SiteParams, memory: Memory):
        return memory["squares"][rows.seq].sqrt()  # (N, f)


def accumulate(squares: Tensor | None, mid: Tensor, rows: Rows) -> Tensor:
    """Sum over dense valid rows of (a / ||a||)^2 for each slot: mid (N, f) -> (B, f); at least float32."""
    dense = rows.valid & ~rows.sparse
    seq = rows.seq
    if not bool(dense.all()):  # copies a prompt's activations only where it has padding
        mid, seq = mid[dense], seq[dense]
    kind = torch.float64 if mid.dtype == torch.float64 else torch.float32
    space = torch.empty(min(AT_ONCE, len(mid)), mid.shape[1], dtype=kind, device=mid.device)
    total = torch.zeros(rows.slots, mid.shape[1], dtype=kind, device=mid.device) if squares is None else squares.clone()
    for part, slots in zip(mid.detach().split(AT_ONCE), seq.split(AT_ONCE), strict=True):
        each = space[: len(part)].copy_(part).square_()
        share = torch.zeros(rows.slots, len(part), dtype=kind, device=mid.device)
        share[slots, torch.arange(len(part), device=mid.device)] = 1 / each.sum(dim=1).clamp(min=1e-24)
        total.addmm_(share, each)
    return total
