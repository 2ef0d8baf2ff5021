"""The statistics by which sequence-level methods choose one mask for a prompt.

s_j = sqrt(sum_t (a_tj / ||a_t||)^2)   (GRIFFIN, 11),      R_j = s_j / max_j' s_j'   (TDA of 2408.11393, 12)
"""

from __future__ import annotations

import torch
from torch import Tensor

from moyu.methods.griffin import accumulate
from moyu.methods.values import Rows


def griffin_statistic(values: Tensor) -> Tensor:
    """s (11) of each sequence: values (..., T, f) -> (..., f)."""
    *lead, tokens, neurons = values.shape
    flat = values.reshape(-1, neurons)
    slots = flat.shape[0] // tokens
    everyone = torch.ones(len(flat), dtype=torch.bool, device=flat.device)
    rows = Rows(
        torch.arange(slots, device=flat.device).repeat_interleave(tokens),
        torch.arange(tokens, device=flat.device).repeat(slots),
        everyone,
        ~everyone,
        slots,
    )
    return accumulate(None, flat, rows).sqrt().reshape(*lead, neurons)


def tda_statistic(values: Tensor) -> Tensor:
    """R (12) of each sequence: values (..., T, f) -> (..., f), the largest is 1."""
    s = griffin_statistic(values)
    return s / s.amax(-1, keepdim=True).clamp(min=1e-12)
