"""Q8_0: x_i = d * q_i with q_i in -127 .. 127 and d = max |x| / 127; 34 bytes for 32 weights."""

from __future__ import annotations

import torch
from torch import Tensor

from moyu.weights.grouped import Grouped, inverse


class Q8(Grouped):
    """A byte for each weight."""

    name = native = "q8_0"
    bits = 8
    ggml = 8
    code = torch.int8

    def rounded(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        scale = groups.abs().amax(2) / 127
        return _round(groups * inverse(scale)[..., None]).to(torch.int8), scale

    def packed(self, integers: Tensor) -> Tensor:
        return integers

    def unpacked(self, codes: Tensor) -> Tensor:
        return codes

    def integer_at(self, codes: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return codes[first, second]

    def column_bytes(self, outputs: int) -> int:
        return outputs


def _round(x: Tensor) -> Tensor:
    """Half away from zero, as C's roundf."""
    below = x.abs().floor()
    return x.sign() * (below + (2 * (x.abs() - below)).floor())


Q8_0 = Q8()
