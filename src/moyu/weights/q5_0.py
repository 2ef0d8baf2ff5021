"""Q5_0: x_i = d * (q_i - 16) with q_i in 0 .. 31; 22 bytes for 32 weights."""

from __future__ import annotations

import torch
from torch import Tensor

from moyu.weights.grouped import Grouped, half, numbers, spread, two_bytes


class Q5(Grouped):
    """Four bits and a fifth."""

    name = native = "q5_0"
    bits = 5
    ggml = 6
    zero = 16

    def split(self, blocks: Tensor) -> tuple[Tensor, ...]:
        return five_bits(blocks[..., 2:]), half(blocks[..., :2])

    def joined(self, codes: Tensor, *fields: Tensor) -> Tensor:
        return torch.cat([two_bytes(fields[0]), of_five_bits(codes)], -1)


def five_bits(raw: Tensor) -> Tensor:
    """Codes (q, n) of 4 bytes of fifth bits, that of code i in bit i, and 16 bytes of two codes each."""
    high = numbers(raw[..., :4], 1).transpose(-1, -2).flatten(-2)  # (q, B, 32)
    return (numbers(raw[..., 4:], 4).flatten(-2) | high << 4).flatten(1)


def of_five_bits(codes: Tensor) -> Tensor:
    """The inverse: 20 bytes (q, B, 20) for 32 codes each, (q, n)."""
    high = spread((codes >> 4).unflatten(1, (-1, 4, 8)).transpose(-1, -2), 1)
    return torch.cat([high, spread((codes & 15).unflatten(1, (-1, 2, 16)), 4)], -1)


Q5_0 = Q5()
