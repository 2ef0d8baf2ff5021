"""The values that a weight can have in a format, and where on them it is.

A weight of the group p, of the block b, is level * scale + offset, with scale = d[b] s[p] and offset = e[b] t[p]. d and e are float16.
Formats without a minimum have e = 0; those without scales of integers have s = t = 1. All tensors here lie inputs first, (n, R) for
R outputs, because every step of quantising goes from input to input over all outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moyu.weights.grouped import BYTE, GROUP, Grouped


@dataclass(frozen=True)
class Grid:
    """What a format allows."""

    form: Grouped

    @property
    def size(self) -> int:
        """Inputs that share a scale."""
        return GROUP // self.form.halves

    @property
    def parts(self) -> int:
        """Scales of a block."""
        return self.form.span * self.form.halves

    @property
    def levels(self) -> tuple[int, int]:
        """The least and the greatest level."""
        if self.form.bits == 8:
            return -127, 127
        return -self.form.zero, (1 << self.form.bits) - 1 - self.form.zero

    def nearest(self, x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        """The levels whose values are nearest to x; 0 where the scale is 0."""
        low, high = self.levels
        found = ((x - offset) / scale).round_()
        return torch.where(scale == 0, 0.0, found).clamp_(low, high)


@dataclass
class Place:
    """A weight on a grid: level (n, R), d and e (B, R), s and t (P, R), as float32 that hold integers and float16 numbers."""

    grid: Grid
    level: Tensor
    d: Tensor
    e: Tensor
    s: Tensor
    t: Tensor

    @classmethod
    def empty(cls, grid: Grid, inputs: int, outputs: int) -> Place:
        """Of a weight that is all 0."""
        blocks = inputs // grid.form.block
        sizes = (inputs, blocks, blocks, blocks * grid.parts, blocks * grid.parts)
        level, d, e, s, t = (torch.zeros(size, outputs) for size in sizes)
        return cls(grid, level, d, e, s, t)

    def scale(self, part: int) -> Tensor:
        """(R,) of a group."""
        return self.d[part // self.grid.parts] * self.s[part]

    def offset(self, part: int) -> Tensor:
        """(R,) of a group."""
        return self.e[part // self.grid.parts] * self.t[part]

    def values(self) -> Tensor:
        """The weight (n, R)."""
        scale = self.d.repeat_interleave(self.grid.parts, 0) * self.s
        offset = self.e.repeat_interleave(self.grid.parts, 0) * self.t
        return (self.level.unflatten(0, (-1, self.grid.size)) * scale[:, None] + offset[:, None]).flatten(0, 1)

    def blocks(self) -> Tensor:
        """The blocks of a GGUF file, (R, bytes of a row) uint8."""
        form = self.grid.form
        codes = self.level.t().to(torch.int16) + form.zero
        d, e = (x.t().half()[..., None].contiguous() for x in (self.d, self.e))
        s, t = (x.t().unflatten(1, (-1, self.grid.parts)).to(torch.int16) for x in (self.s, self.t))
        fields = form.fields_of(d, e, s, t)
        return form.joined(codes.to(torch.int8).view(BYTE) if form.bits == 8 else codes.to(BYTE), *fields).flatten(1)


def half(x: Tensor) -> Tensor:
    """Rounded to float16, finite."""
    return x.clamp(-65504, 65504).half().float()
