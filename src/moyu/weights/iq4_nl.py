"""IQ4_NL: x_i = d * level of q_i, with 16 levels that are closer together near zero; 18 bytes for 32 weights."""

from __future__ import annotations

from torch import Tensor

from moyu.weights.grouped import Grouped, half, numbers

LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


class Iq4Nl(Grouped):
    """Four bits of a table."""

    name = native = "iq4_nl"
    bits = 4
    ggml = 20
    table = LEVELS

    def split(self, blocks: Tensor) -> tuple[Tensor, ...]:
        return numbers(blocks[..., 2:], 4).flatten(1), half(blocks[..., :2])


IQ4_NL = Iq4Nl()
