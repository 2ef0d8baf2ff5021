"""IQ4_XS: x_i = d * s * level of q_i, with IQ4_NL's levels and s in -32 .. 31 for 32 weights; 136 bytes for 256 weights."""

from __future__ import annotations

from torch import Tensor

from moyu.weights.grouped import HALF, SIGNED, Grouped, half, numbers
from moyu.weights.iq4_nl import LEVELS


class Iq4Xs(Grouped):
    """Four bits of a table, scales in six."""

    name = native = "iq4_xs"
    bits = 4
    ggml = 23
    block_bytes = 136  # pyright: ignore[reportAssignmentType]
    table = LEVELS
    span = 8
    fields = (HALF, 1), (SIGNED, 8)  # d, s

    def split(self, blocks: Tensor) -> tuple[Tensor, ...]:
        codes = numbers(blocks[..., 8:].unflatten(-1, (8, 16)), 4)  # (q, B, 8, 2, 16)
        low = numbers(blocks[..., 4:8], 4).transpose(-1, -2).flatten(-2)
        high = numbers(blocks[..., 2:4], 2).transpose(-1, -2).flatten(-2)
        return codes.flatten(1), half(blocks[..., :2]), (low | high << 4).view(SIGNED) - 32


IQ4_XS = Iq4Xs()
