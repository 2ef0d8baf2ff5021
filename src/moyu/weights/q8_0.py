"""Q8_0: x_i = d * q_i with q_i in -127 .. 127 and d = max |x| / 127; 34 bytes for 32 weights."""

from __future__ import annotations

import torch
from torch import Tensor

from moyu.weights.grouped import SIGNED, Grouped, half, inverse, two_bytes


class Q8(Grouped):
    """A byte for each weight."""

    name = native = "q8_0"
    bits = 8
    ggml = 8
    code = SIGNED

    def rounded(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        scale = groups.abs().amax(2) / 127
        return _round(groups * inverse(scale)[..., None]).to(torch.int8), scale

    def split(self, blocks: Tensor) -> tuple[Tensor, ...]:
        return blocks[..., 2:].flatten(1), half(blocks[..., :2])

    def joined(self, codes: Tensor, *fields: Tensor) -> Tensor:
        return torch.cat([two_bytes(fields[0]), codes.unflatten(1, (-1, 32))], -1)


def _round(x: Tensor) -> Tensor:
    """Half away from zero, as C's roundf."""
    below = x.abs().floor()
    return x.sign() * (below + (2 * (x.abs() - below)).floor())


Q8_0 = Q8()
