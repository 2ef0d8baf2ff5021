"""Weights in fewer bits, for quality and for counting bytes: round to nearest, a scale for every few weights.

A code of b bits stands for (code + 1/2 - 2^(b-1)) times its scale: levels on both sides of zero and none at it, so that the
first k bits of a code are the code of the same weight in k bits, with a step 2^(b-k) times as wide.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

GROUP = 32  # weights that share a scale
SCALE_BITS = 16
SHRINK = (1.0, 0.94, 0.88, 0.82, 0.76, 0.7, 0.64, 0.58, 0.52, 0.46, 0.4)  # of the range, tried for the least error


def quantize(weight: Tensor, bits: int, group: int = GROUP) -> tuple[Tensor, Tensor]:
    """Codes (q, n) uint8 and scales (q, ceil(n / group)) float of a weight (q, n), groups along its rows.

    Of several ranges a group takes the one whose squared error is least.
    """
    groups = _grouped(weight.detach().float(), group)  # (q, G, group)
    widest = groups.abs().amax(2, keepdim=True) * 2 / (2**bits - 1)
    widest = widest.clamp(min=torch.finfo(torch.float16).tiny)
    best, error = widest, torch.full_like(widest, torch.inf)
    for shrink in SHRINK:
        scale = (widest * shrink).half().float().clamp(min=torch.finfo(torch.float16).tiny)
        found = (_levels(_codes(groups, scale, bits), bits) * scale - groups).square().sum(2, keepdim=True)
        best, error = torch.where(found < error, scale, best), torch.minimum(found, error)
    codes = _codes(groups, best, bits).to(torch.uint8).flatten(1)[:, : weight.shape[1]]
    return codes, best.squeeze(2)


def dequantize(codes: Tensor, scales: Tensor, bits: int, group: int = GROUP) -> Tensor:
    """What `quantize` kept, (q, n) float."""
    values = _levels(_grouped(codes.float(), group), bits) * scales[..., None]
    return values.flatten(1)[:, : codes.shape[1]]


def rounded(weight: Tensor, bits: int, group: int = GROUP) -> Tensor:
    """A weight (q, n) as `bits` keep it, in its own type."""
    return dequantize(*quantize(weight, bits, group), bits, group).to(weight.dtype)


def _grouped(values: Tensor, group: int) -> Tensor:
    return functional.pad(values, (0, -values.shape[1] % group)).unflatten(1, (-1, group))


def _codes(values: Tensor, scale: Tensor, bits: int) -> Tensor:
    return (values / scale).floor().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) + 2 ** (bits - 1)


def _levels(codes: Tensor, bits: int) -> Tensor:
    return codes + 0.5 - 2 ** (bits - 1)
