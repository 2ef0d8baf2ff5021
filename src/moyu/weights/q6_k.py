"""Q6_K: x_i = d * s * (q_i - 32) with q_i in 0 .. 63 and s in -128 .. 127 for 16 weights; 210 bytes for 256 weights."""

from __future__ import annotations

import torch
from torch import Tensor

from moyu.weights.grouped import BYTE, HALF, SIGNED, Grouped, half, numbers, spread, two_bytes


class Q6K(Grouped):
    """Six bits, scales in eight."""

    name = native = "q6_k"
    bits = 6
    ggml = 14
    zero = 32
    steps = -128, 127
    halves, span = 2, 8
    fields = (HALF, 1), (SIGNED, 16)  # d, s

    def split(self, blocks: Tensor) -> tuple[Tensor, ...]:
        low = (
            numbers(blocks[..., :128].unflatten(-1, (2, 64)), 4).unflatten(-1, (2, 32)).flatten(-3, -2)
        )  # (q, B, 2, 4, 32)
        high = numbers(blocks[..., 128:192].unflatten(-1, (2, 32)), 2)
        return (low | high << 4).flatten(1), half(blocks[..., 208:]), blocks[..., 192:208].view(SIGNED)

    def joined(self, codes: Tensor, *fields: Tensor) -> Tensor:
        low = spread((codes & 15).unflatten(1, (-1, 2, 2, 64)), 4).flatten(2)
        high = spread((codes >> 4).unflatten(1, (-1, 2, 4, 32)), 2).flatten(2)
        return torch.cat([low, high, fields[1].view(BYTE), two_bytes(fields[0])], -1)


Q6_K = Q6K()
