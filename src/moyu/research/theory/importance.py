"""Importance as a running sum over past inputs: the paper's recursion, in the three forms in use.

    Theta_i = |V| grad L_i + Theta_{i-1}                                                                           (9)

Trap: input n contributes a share of order 1/n of Theta_n, so the top of Theta is stable whatever the data. Compare
increments, or disjoint windows, never Theta_t with Theta_{t-1}.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moyu.research.theory.overlap import jaccard, top_sets


def signed_step(weight: Tensor, gradient: Tensor) -> Tensor:
    """|w| dL/dw, the recursion as printed: any shape."""
    return weight.abs() * gradient


def snip_step(weight: Tensor, gradient: Tensor) -> Tensor:
    """|w dL/dw| (SNIP): any shape."""
    return (weight * gradient).abs()


def taylor_step(values: Tensor, gradients: Tensor) -> Tensor:
    """sum_t |a_tj dl/da_tj|, one value per neuron: (T, f) each -> (f,). Its signed version is T times the sign statistic."""
    return (values * gradients).abs().sum(0)


@dataclass(frozen=True)
class Importance:
    """Theta after some inputs. Immutable."""

    total: Tensor
    inputs: int = 0

    def after(self, step: Tensor) -> Importance:
        """Theta with one more input's step."""
        return Importance(self.total + step, self.inputs + 1)


def running_sum_overlap(steps: Tensor, k: int) -> Tensor:
    """Jaccard of the top k of Theta_t with those of Theta_{t-1}: steps (n, m) -> (n - 1,). High even for i.i.d. steps."""
    sets = top_sets(steps.cumsum(0), k)
    return torch.stack([jaccard(a, b) for a, b in zip(sets[1:], sets[:-1], strict=True)])
