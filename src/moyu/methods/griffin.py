"""GRIFFIN: keep the neurons that the prompt used most, for the whole generation.

s_j = sqrt(sum_t (a_tj / ||a_t||)^2) over the prompt's tokens t; the k largest are kept. No calibration: the prompt decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moyu.methods.base import Acts, Family, Granularity, Memory, Method, Rows, Site, SiteParams, neuron_site
from moyu.selection import TopK, keep_count


@dataclass(frozen=True)
class Griffin(Method):
    """GRIFFIN, arXiv 2404.01365."""

    name: ClassVar[str] = "griffin"
    paper: ClassVar[str] = "GRIFFIN, arXiv 2404.01365"
    family: ClassVar[Family] = "sequence"
    granularity: ClassVar[Granularity] = "sequence"
    needs_calibration: ClassVar[bool] = False

    def sites(self, block) -> tuple[Site, ...]:
        return (neuron_site(block, "mid"),) if block.has_ffn else ()

    def fit(self, site: Site, acts: Acts, target: float) -> SiteParams:
        return SiteParams(rule=TopK(keep_count(site.units, target)))

    def update(self, memory: Memory, x: Tensor, rows: Rows, site: Site, params: SiteParams) -> Memory:
        return {"squares": accumulate(memory.get("squares"), x, rows)}

    def score(self, x, rows: Rows, site: Site, params: SiteParams, memory: Memory):
        return memory["squares"][rows.seq].sqrt()  # (N, f)


def accumulate(squares: Tensor | None, mid: Tensor, rows: Rows) -> Tensor:
    """Sum over dense valid rows of (a / ||a||)^2 for each slot: mid (N, f) -> (B, f); at least float32."""
    dense = rows.valid & ~rows.sparse
    precise = mid if mid.dtype == torch.float64 else mid.float()
    share = precise[dense] / precise[dense].norm(dim=1, keepdim=True).clamp(min=1e-12)
    fresh = torch.zeros(rows.slots, mid.shape[1], dtype=precise.dtype, device=mid.device)
    fresh.index_add_(0, rows.seq[dense], share.square())
    return fresh if squares is None else squares + fresh
