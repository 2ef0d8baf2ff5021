"""Rules that turn scores into masks, and the quantiles that calibrate them."""

from __future__ import annotations

from dataclasses import dataclass

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
    most = int(counts.max())
    order = scores.argsort(dim=-1, descending=True, stable=True)[:, :most]  # (N, most)
    kept = torch.arange(most, device=scores.device) < counts[:, None]  # (N, most)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, kept)


def quantile(values: Tensor, fraction: float) -> float:
    """The exact `fraction` quantile of all entries: at most that share of them is at or below it, ties aside.

    torch.quantile refuses more than 2**24 entries; kthvalue has no limit.
    """
    flat = values.flatten().float()
    rank = min(max(round(fraction * flat.numel()), 1), flat.numel())
    return float(flat.kthvalue(rank).values)


def keep_count(units: int, sparsity: float) -> int:
    """Units kept of `units` at `sparsity`, at least one."""
    return max(1, round(units * (1.0 - sparsity)))
