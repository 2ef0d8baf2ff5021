"""Q4_K: x_i = d * s * q_i - dmin * m with q_i in 0 .. 15, s and m in 0 .. 63 for 32 weights; 144 bytes for 256 weights."""

from __future__ import annotations

import torch
from torch import Tensor

from moyu.weights.grouped import BYTE, HALF, Grouped, half, numbers, spread, two_bytes


class Q4K(Grouped):
    """Four bits, scales and minima in six."""

    name = native = "q4_k"
    bits = 4
    ggml = 12
    block_bytes = 144  # pyright: ignore[reportAssignmentType]
    span = 8
    minimum, steps = True, (0, 63)
    fields = (HALF, 1), (HALF, 1), (BYTE, 8), (BYTE, 8)  # d, dmin, s, m

    def split(self, blocks: Tensor) -> tuple[Tensor, ...]:
        codes = numbers(blocks[..., 16:].unflatten(-1, (4, 32)), 4)  # (q, B, 4, 2, 32)
        return codes.flatten(1), half(blocks[..., :2]), half(blocks[..., 2:4]), *six_bits(blocks[..., 4:16])

    def joined(self, codes: Tensor, *fields: Tensor) -> Tensor:
        d, dmin, s, m = fields
        low = spread(codes.unflatten(1, (-1, 4, 2, 32)), 4).flatten(2)
        return torch.cat([two_bytes(d), two_bytes(dmin), of_six_bits(s, m), low], -1)

    def scaled(self, *fields: Tensor) -> tuple[Tensor, Tensor | None]:
        d, dmin, s, m = (field.float() for field in fields)
        return d * s, -(dmin * m)


def six_bits(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and eight minima of six bits, (..., 8) each, of 12 bytes: the last four of each are spread over three places."""
    scales, minima, rest = raw.unflatten(-1, (3, 4)).unbind(-2)
    last = rest & 15 | scales >> 6 << 4, rest >> 4 | minima >> 6 << 4
    return torch.cat([scales & 63, last[0]], -1), torch.cat([minima & 63, last[1]], -1)


def of_six_bits(scales: Tensor, minima: Tensor) -> Tensor:
    """The inverse: 12 bytes (..., 12) of eight scales and eight minima, (..., 8) each."""
    first, last = scales.unflatten(-1, (2, 4)).unbind(-2)
    least, final = minima.unflatten(-1, (2, 4)).unbind(-2)
    return torch.cat([first | last >> 4 << 6, least | final >> 4 << 6, last & 15 | (final & 15) << 4], -1)


Q4_K = Q4K()
