"""Q5_K: x_i = d * s * q_i - dmin * m with q_i in 0 .. 31, s and m in 0 .. 63 for 32 weights; 176 bytes for 256 weights."""

from __future__ import annotations

import torch
from torch import Tensor

from moyu.weights.grouped import half, numbers, spread, two_bytes
from moyu.weights.q4_k import Q4K, of_six_bits, six_bits


class Q5K(Q4K):
    """Five bits, scales and minima in six."""

    name = native = "q5_k"
    bits = 5
    ggml = 13
    block_bytes = 176  # pyright: ignore[reportAssignmentType]

    def split(self, blocks: Tensor) -> tuple[Tensor, ...]:
        low = numbers(blocks[..., 48:].unflatten(-1, (4, 32)), 4).flatten(-3, -2)  # (q, B, 8, 32)
        codes = low | numbers(blocks[..., 16:48], 1) << 4
        return codes.flatten(1), half(blocks[..., :2]), half(blocks[..., 2:4]), *six_bits(blocks[..., 4:16])

    def joined(self, codes: Tensor, *fields: Tensor) -> Tensor:
        d, dmin, s, m = fields
        high = spread((codes >> 4).unflatten(1, (-1, 8, 32)), 1)
        low = spread((codes & 15).unflatten(1, (-1, 4, 2, 32)), 4).flatten(2)
        return torch.cat([two_bytes(d), two_bytes(dmin), of_six_bits(s, m), high, low], -1)


Q5_K = Q5K()
