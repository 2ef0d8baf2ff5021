"""Q5_K: x_i = d * s * q_i - dmin * m with q_i in 0 .. 31, s and m in 0 .. 63 for 32 weights; 176 bytes for 256 weights."""

from __future__ import annotations

from torch import Tensor

from moyu.weights.grouped import half, numbers
from moyu.weights.q4_k import Q4K, six_bits


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


Q5_K = Q5K()
