"""Q5_1: x_i = d * q_i + m with q_i in 0 .. 31; 24 bytes for 32 weights."""

from __future__ import annotations

from torch import Tensor

from moyu.weights.grouped import HALF, Grouped, half
from moyu.weights.q5_0 import five_bits


class Q51(Grouped):
    """Five bits with a minimum."""

    name = native = "q5_1"
    bits = 5
    ggml = 7
    fields = (HALF, 1), (HALF, 1)  # d, m

    def split(self, blocks: Tensor) -> tuple[Tensor, ...]:
        return five_bits(blocks[..., 4:]), half(blocks[..., :2]), half(blocks[..., 2:4])

    def scaled(self, *fields: Tensor) -> tuple[Tensor, Tensor | None]:
        return fields[0].float(), fields[1].float()


Q5_1 = Q51()
