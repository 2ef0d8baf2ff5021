"""Q3_K: x_i = d * s * (q_i - 4) with q_i in 0 .. 7 and s in -32 .. 31 for 16 weights; 110 bytes for 256 weights."""

from __future__ import annotations

import torch
from torch import Tensor

from moyu.weights.grouped import BYTE, HALF, SIGNED, Grouped, half, numbers, spread, two_bytes


class Q3K(Grouped):
    """Three bits, scales in six."""

    name = native = "q3_k"
    bits = 3
    ggml = 11
    block_bytes = 110  # pyright: ignore[reportAssignmentType]
    zero = 4
    steps = -32, 31
    halves, span = 2, 8
    fields = (HALF, 1), (SIGNED, 16)  # d, s

    def split(self, blocks: Tensor) -> tuple[Tensor, ...]:
        low = numbers(blocks[..., 32:96].unflatten(-1, (2, 32)), 2).flatten(-3, -2)  # (q, B, 8, 32)
        codes = low | numbers(blocks[..., :32], 1) << 2
        first, high = blocks[..., 96:104], blocks[..., 104:108]
        scales = torch.cat([first & 15, first >> 4], -1) | numbers(high, 2).flatten(-2) << 4
        return codes.flatten(1), half(blocks[..., 108:]), scales.view(SIGNED) - 32

    def joined(self, codes: Tensor, *fields: Tensor) -> Tensor:
        high = spread((codes >> 2).unflatten(1, (-1, 8, 32)), 1)
        low = spread((codes & 3).unflatten(1, (-1, 2, 4, 32)), 2).flatten(2)
        scales = (fields[1] + 32).view(BYTE)
        first = spread((scales & 15).unflatten(-1, (2, 8)), 4)
        last = spread((scales >> 4).unflatten(-1, (4, 4)), 2)
        return torch.cat([high, low, first, last, two_bytes(fields[0])], -1)


Q3_K = Q3K()
