"""Q4_0: x_i = d * (q_i - 8) with q_i in 0 .. 15 and d = x of largest size / -8; 18 bytes for 32 weights.

Of 32 in a row, byte b holds number b (low four bits) and number b + 16 (high): inputs by rows, outputs by columns.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from moyu.weights.grouped import GROUP, Grouped, inverse, whole

HALF = GROUP // 2


class Q4(Grouped):
    """Two weights a byte."""

    name = native = "q4_0"
    bits = 4
    ggml = 2

    def rounded(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        scale = groups.gather(2, groups.abs().argmax(2, keepdim=True))[..., 0] / -8
        codes = (groups * inverse(scale)[..., None] + 8.5).trunc().clamp(0, 15)
        return (codes - 8).to(torch.int8), scale

    def packed(self, integers: Tensor) -> Tensor:
        count = integers.shape[1]
        codes = functional.pad(integers, (0, whole(count) - count)).add(8).view(torch.uint8)
        low, high = codes.unflatten(1, (-1, 2, HALF)).unbind(2)
        return (low | high << 4).flatten(1)

    def unpacked(self, codes: Tensor) -> Tensor:
        pairs = codes.unflatten(1, (-1, 1, HALF))
        return torch.cat([pairs & 15, pairs >> 4], dim=2).flatten(1).view(torch.int8) - 8

    def integer_at(self, codes: Tensor, first: Tensor, second: Tensor) -> Tensor:
        byte = codes[first, second // GROUP * HALF + second % HALF]
        return torch.where(second % GROUP < HALF, byte & 15, byte >> 4).to(torch.int8) - 8

    def column_bytes(self, outputs: int) -> int:
        return whole(outputs) // 2


Q4_0 = Q4()
