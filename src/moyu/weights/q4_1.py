"""Q4_1: x_i = d * q_i + m with q_i in 0 .. 15; 20 bytes for 32 weights."""

from __future__ import annotations

import torch
from torch import Tensor

from moyu.weights.grouped import HALF, Grouped, half, numbers, spread, two_bytes


class Q41(Grouped):
    """Four bits with a minimum."""

    name = native = "q4_1"
    bits = 4
    ggml = 3
    minimum = True
    fields = (HALF, 1), (HALF, 1)  # d, m

    def split(self, blocks: Tensor) -> tuple[Tensor, ...]:
        return numbers(blocks[..., 4:], 4).flatten(1), half(blocks[..., :2]), half(blocks[..., 2:4])

    def joined(self, codes: Tensor, *fields: Tensor) -> Tensor:
        return torch.cat([*map(two_bytes, fields), spread(codes.unflatten(1, (-1, 2, 16)), 4)], -1)

    def scaled(self, *fields: Tensor) -> tuple[Tensor, Tensor | None]:
        return fields[0].float(), fields[1].float()


Q4_1 = Q41()
