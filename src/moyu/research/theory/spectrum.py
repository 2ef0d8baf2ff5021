"""Structure of a matrix of activations: the share explained by one direction, group or factor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def singular_energy(values: Tensor, top: int = 1) -> Tensor:
    """Share of the squared singular values that the `top` largest hold, rows normalised first: (..., T, f) -> (...)."""
    rows = values / values.norm(dim=-1, keepdim=True).clamp(min=1e-30)
    squares = torch.linalg.svdvals(rows).square()
    return squares[..., :top].sum(-1) / squares.sum(-1).clamp(min=1e-30)


def intraclass_correlation(groups: Tensor) -> Tensor:
    """ICC(1): share of variance between groups, one-way random effects; (G, n, ...) -> (...). Below 0: less than chance."""
    count, size = groups.shape[:2]
    means = groups.mean(1)
    between = size * (means - means.mean(0)).square().sum(0) / (count - 1)
    within = (groups - means[:, None]).square().sum((0, 1)) / (count * (size - 1))
    return (between - within) / (between + (size - 1) * within).clamp(min=1e-30)


@dataclass(frozen=True)
class Shares:
    """Shares of the variance in a two-way table without replication; they sum to 1."""

    rows: Tensor
    columns: Tensor
    interaction: Tensor


def variance_shares(table: Tensor) -> Shares:
    """Sums of squares of rows, columns and their interaction over the total: (R, C, ...) -> (...) each."""
    centred = table - table.mean((0, 1))
    rows, columns = centred.mean(1), centred.mean(0)
    total = centred.square().sum((0, 1)).clamp(min=1e-30)
    by_rows = rows.square().sum(0) * table.shape[1] / total
    by_columns = columns.square().sum(0) * table.shape[0] / total
    return Shares(by_rows, by_columns, (1 - by_rows - by_columns).clamp(min=0))
