"""Rules that turn scores into masks, and the quantiles that calibrate them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Threshold:
    """Keep units whose score is above `value`."""

    value: float


@dataclass(frozen=True)
class TopK:
    """Keep the `k` highest scores of each row."""

    k: int


@dataclass(frozen=True)
class Soft:
    """Keep every unit as far as its score in (0, 1) says: only while routers train in the loop, never in a plan."""


Rule = Threshold | TopK | Soft


def select(scores: Tensor, rule: Rule) -> Tensor:
    """The mask of `scores` (N, units) under `rule`: (N, units) bool, True = kept; under Soft the scores themselves."""
    match rule:
        case Threshold(value):
            return scores > value
        case Soft():
            return scores
        case TopK(k):
            return top_k(scores, torch.full((scores.shape[0],), k, device=scores.device))


def top_k(scores: Tensor, counts: Tensor) -> Tensor:
    """Keep the `counts[i]` highest scores of row i; ties go to the lower index. (N, units) and (N,) -> (N, units) bool."""
    if scores.shape[0] == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    width = scores.shape[1]
    # Values are sorted, not places: a sort of places takes ten times as long as the products of a small model's layer.
    cut = ascending(scores).gather(1, (width - counts).clamp(0, width - 1)[:, None])  # (N, 1) the least score kept
    kept, tied = scores > cut, scores == cut
    room = counts - kept.sum(1)  # (N,) for those that are tied
    crowded = (tied.sum(1) > room).nonzero().squeeze(1)
    tied[crowded] &= tied[crowded].cumsum(1) <= room[crowded, None]
    return kept | tied


def ascending(scores: Tensor) -> Tensor:
    """Scores (..., units) in order; by numpy where it can, whose sort is vectorised and torch's is not."""
    scores = scores.detach()
    if scores.device.type != "cpu" or scores.dtype not in (torch.float32, torch.float64):
        return scores.sort(dim=-1).values
    return torch.from_numpy(np.sort(scores.numpy(), axis=-1))


def quantile(values: Tensor, fraction: float) -> float:
    """The exact `fraction` quantile of all entries: at most that share of them is at or below it, ties aside.

    torch.quantile refuses more than 2**24 entries; kthvalue has no limit, and numpy's partition takes half of its time.
    """
    flat = values.detach().flatten().float()
    rank = min(max(round(fraction * flat.numel()), 1), flat.numel())
    if flat.device.type == "cpu":
        return float(np.partition(flat.numpy(), rank - 1)[rank - 1])
    return float(flat.kthvalue(rank).values)


def keep_count(units: int, sparsity: float) -> int:
    """Units kept of `units` at `sparsity`, at least one."""
    return max(1, round(units * (1.0 - sparsity)))
