"""Q4_0: x_i = d * (q_i - 8) with q_i in 0 .. 15 and d = x of largest size / -8; 18 bytes for 32 weights."""

from __future__ import annotations

import torch
from torch import Tensor

from moyu.weights.grouped import Grouped, half, inverse, numbers, spread, two_bytes


class Q4(Grouped):
    """Two weights a byte."""

    name = native = "q4_0"
    bits = 4
    ggml = 2
    zero = 8

    def rounded(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        scale = groups.gather(2, groups.abs().argmax(2, keepdim=True))[..., 0] / -8
        return (groups * inverse(scale)[..., None] + 8.5).trunc().clamp(0, 15).byte(), scale

    def split(self, blocks: Tensor) -> tuple[Tensor, ...]:
        return numbers(blocks[..., 2:], 4).flatten(1), half(blocks[..., :2])

    def joined(self, codes: Tensor, *fields: Tensor) -> Tensor:
        return torch.cat([two_bytes(fields[0]), spread(codes.unflatten(1, (-1, 2, 16)), 4)], -1)


Q4_0 = Q4()
