"""A feed-forward network as a sum of neurons, and the error from leaving some out.

    o = sum_j n_j,  n_j = a_j w_j,  ||n_j|| = |a_j| ||w_j||                                                        (8)
    CETT(D) = ||sum_{j in D} n_j|| / ||o||                                                                        (10)

CETT is not monotone in the threshold that makes D (two neurons may cancel), so `moyu.methods.cett` searches its running
maximum; the triangle inequality gives an upper bound that is monotone.
"""

from __future__ import annotations

from torch import Tensor

TINY = 1e-30


def contributions(values: Tensor, down: Tensor) -> Tensor:
    """n_j for every neuron: values a (N, f), down (d, f) -> (N, f, d); they sum to the output over f."""
    return values[:, :, None] * down.t()


def neuron_norms(values: Tensor, down: Tensor) -> Tensor:
    """||n_j|| = |a_j| ||w_j||, the oracle score: values (..., f), down (d, f) -> (..., f)."""
    return values.abs() * down.norm(dim=0)


def cett(values: Tensor, down: Tensor, dropped: Tensor) -> Tensor:
    """CETT of leaving out `dropped` (N, f) bool: values (N, f), down (d, f) -> (N,)."""
    output = (values @ down.t()).norm(dim=1)
    return ((values * dropped) @ down.t()).norm(dim=1) / output.clamp(min=TINY)


def cett_bound(values: Tensor, down: Tensor, dropped: Tensor) -> Tensor:
    """sum_{j in D} ||n_j|| / ||o||, never below `cett` and monotone in D; shapes as there."""
    output = (values @ down.t()).norm(dim=1)
    return (neuron_norms(values, down) * dropped).sum(1) / output.clamp(min=TINY)


def participation_ratio(values: Tensor) -> Tensor:
    """(sum a^2)^2 / (m sum a^4): (..., m) -> (...). 1 if all are equal, 1/m if one neuron does everything."""
    squares = values.square()
    return squares.sum(-1).square() / (values.shape[-1] * squares.square().sum(-1)).clamp(min=TINY)
