"""Q2_K: x_i = d * s * q_i - dmin * m with q_i in 0 .. 3, s and m in 0 .. 15 for 16 weights; 84 bytes for 256 weights."""

from __future__ import annotations

import torch
from torch import Tensor

from moyu.weights.grouped import BYTE, HALF, Grouped, half, numbers, spread, two_bytes


class Q2K(Grouped):
    """Two bits, scales and minima in four."""

    name = native = "q2_k"
    bits = 2
    ggml = 10
    halves, span = 2, 8
    minimum, steps = True, (0, 15)
    fields = (HALF, 1), (HALF, 1), (BYTE, 16)  # d, dmin, s and m in one byte

    def split(self, blocks: Tensor) -> tuple[Tensor, ...]:
        codes = numbers(blocks[..., 16:80].unflatten(-1, (2, 32)), 2)  # (q, B, 2, 4, 32)
        return codes.flatten(1), half(blocks[..., 80:82]), half(blocks[..., 82:]), blocks[..., :16]

    def fields_of(self, d: Tensor, e: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        d, e, s, m = super().fields_of(d, e, s, t)
        return d, e, s | m << 4

    def joined(self, codes: Tensor, *fields: Tensor) -> Tensor:
        low = spread(codes.unflatten(1, (-1, 2, 4, 32)), 2).flatten(2)
        return torch.cat([fields[2], low, two_bytes(fields[0]), two_bytes(fields[1])], -1)

    def scaled(self, *fields: Tensor) -> tuple[Tensor, Tensor | None]:
        d, dmin, both = fields
        return d.float() * (both & 15), -(dmin.float() * (both >> 4))


Q2_K = Q2K()
