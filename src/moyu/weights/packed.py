"""8- and 4-bit weights for GPUs: groups of 32 neighbours in memory with one float16 scale.

A group lies along the contiguous piece, a row's inputs or a column's outputs, so that a program that reads a piece needs no other
scales. 8 bits: x_i = q_i * d, q_i in -127 .. 127. 4 bits: x_i = (q_i - 8) * d, q_i in 0 .. 15, two neighbours a byte, the first in the low
half. Rounding depends on the order: store a weight in the order in which it is read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moyu.weights.format import Format, Order, Stored

GROUP = 32


class Packed(Format):
    """Two tensors: data (m, n) int8 or (m, n / 2) uint8, and scales (m, n / 32), for m pieces of n values, n a multiple of 32."""

    group = GROUP

    def __init__(self, bits: int) -> None:
        self.bits, self.name = bits, f"packed{bits}"

    def store(self, weight: Tensor, order: Order = "rows") -> Stored:
        pieces = (weight if order == "rows" else weight.t()).detach().float().contiguous()
        if pieces.ndim != 2 or pieces.shape[1] % GROUP:
            raise ValueError(f"{self.name} takes {order} of a multiple of {GROUP} values, got {tuple(weight.shape)}")
        groups = pieces.unflatten(1, (-1, GROUP))  # (m, n / 32, 32)
        if self.bits == 8:
            scales = groups.abs().amax(-1, keepdim=True) / 127
            q = (groups / _nonzero(scales.half())).round().clamp(-127, 127).to(torch.int8).flatten(1)
        else:  # the largest in magnitude becomes -8
            scales = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)) / -8
            q = (groups / _nonzero(scales.half()) + 8).round().clamp(0, 15).to(torch.uint8).flatten(1)
            q = q[:, ::2] | q[:, 1::2] << 4
        tensors = q, scales.half().squeeze(-1).contiguous()
        return Stored(self, order, tensors, (weight.shape[0], weight.shape[1]))

    def values(self, stored: Stored, dtype: torch.dtype) -> Tensor:
        pieces = self._unpacked(*stored.tensors).to(dtype)
        return pieces if stored.order == "rows" else pieces.t()

    def pieces(self, stored: Stored, index: Tensor, dtype: torch.dtype) -> Tensor:
        return self._unpacked(*(t[index] for t in stored.tensors)).to(dtype)

    def at(self, stored: Stored, row: Tensor, column: Tensor) -> Tensor:
        return self.values(stored, torch.float32)[row, column]

    def laid_out(self, stored: Stored, order: Order) -> Stored:
        raise ValueError(
            f"{self.name} is rounded along its {stored.order}: store the weight anew in the order {order!r}"
        )

    def row_bytes(self, inputs: int) -> int:
        return inputs * self.bits // 8 + inputs // GROUP * 2

    def column_bytes(self, outputs: int) -> int:
        return self.row_bytes(outputs)

    def scale_bytes(self, outputs: int) -> int:
        return 0

    def _unpacked(self, data: Tensor, scales: Tensor) -> Tensor:
        q = data if self.bits == 8 else torch.stack([data & 15, data >> 4], -1).flatten(1).view(torch.int8) - 8
        return (q.unflatten(1, (-1, GROUP)) * scales.float()[:, :, None]).flatten(1)


def _nonzero(scales: Tensor) -> Tensor:
    scales = scales.float()
    return torch.where(scales == 0, 1.0, scales)


PACKED8, PACKED4 = Packed(8), Packed(4)
