"""Q5_1: x_i = d * q_i + m with q_i in 0 .. 31; 24 bytes for 32 weights."""

from __future__ import annotations

import torch
from torch import Tensor

from moyu.weights.grouped import half, two_bytes
from moyu.weights.q4_1 import Q41
from moyu.weights.q5_0 import five_bits, of_five_bits


class Q51(Q41):
    """Five bits with a minimum."""

    name = native = "q5_1"
    bits = 5
    ggml = 7

    def split(self, blocks: Tensor) -> tuple[Tensor, ...]:
        return five_bits(blocks[..., 4:]), half(blocks[..., :2]), half(blocks[..., 2:4])

    def joined(self, codes: Tensor, *fields: Tensor) -> Tensor:
        return torch.cat([*map(two_bytes, fields), of_five_bits(codes)], -1)


Q5_1 = Q51()
