"""MXFP4: x_i = 2^(e - 128) * level of q_i, twice a 4-bit float, e in 0 .. 255 for 32 weights; 17 bytes for 32 weights."""

from __future__ import annotations

import torch
from torch import Tensor

from moyu.weights.grouped import BYTE, Grouped, numbers


class Mxfp4(Grouped):
    """Four bits of a table, scales that are powers of two."""

    name = native = "mxfp4"
    bits = 4
    ggml = 39
    table = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
    fields = ((BYTE, 1),)

    def split(self, blocks: Tensor) -> tuple[Tensor, ...]:
        return numbers(blocks[..., 1:], 4).flatten(1), blocks[..., :1]

    def scaled(self, *fields: Tensor) -> tuple[Tensor, Tensor | None]:
        powers = fields[0].int() - 128
        return torch.ldexp(torch.ones_like(powers, dtype=torch.float32), powers), None


MXFP4 = Mxfp4()
