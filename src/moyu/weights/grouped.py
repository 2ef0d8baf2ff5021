"""What formats of integers with one float16 scale for every 32 inputs share.

A stored weight has two tensors, codes and scales. By rows (as in a GGUF file) the codes of 32 neighbouring inputs lie side by
side: codes (q, bytes of n), scales (q, n / 32), n rounded up to 32. By columns the same integers lie the other way round: codes
(n, bytes of q), scales (n / 32, q), one row of them for 32 columns.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor
from torch.nn import functional

from moyu.weights.format import Format, Order, Stored, parts

GROUP = 32
SCALE_BYTES = 2


class Grouped(Format):
    """A weight is its integer times the scale of its group."""

    group = GROUP
    rounds_inputs = True
    code: torch.dtype = torch.uint8  # what the tensor of codes is made of

    @abstractmethod
    def rounded(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Integers (q, G, 32) int8 of values and the scales (q, G) float32, as llama.cpp's quantiser (ggml-quants.c) rounds."""

    @abstractmethod
    def packed(self, integers: Tensor) -> Tensor:
        """The codes of integers (m, k) int8."""

    @abstractmethod
    def unpacked(self, codes: Tensor) -> Tensor:
        """The integers of codes, (m, k or more) int8."""

    @abstractmethod
    def integer_at(self, codes: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Single integers: place `second` of row `first` of the codes, both (k,)."""

    @torch.no_grad()
    def store(self, weight: Tensor) -> Stored:
        """As llama.cpp's quantiser rounds. Where n is no multiple of 32, the last group of a row is filled up with zeros."""
        q, inputs = weight.shape
        n = whole(inputs)
        codes = torch.empty((q, self.column_bytes(n)), dtype=self.code, device=weight.device)
        scales = torch.empty((q, n // GROUP), dtype=torch.float16, device=weight.device)
        for part in parts(q, n):
            values = functional.pad(weight[part].detach().float(), (0, n - inputs))
            integers, scale = self.rounded(values.unflatten(1, (-1, GROUP)))
            codes[part], scales[part] = self.packed(integers.flatten(1)), scale.half()
        return Stored(self, "rows", (codes, scales), (q, inputs))

    def read(self, raw: Tensor, shape: tuple[int, int]) -> Stored:
        groups = raw.unflatten(1, (shape[1] // GROUP, -1))  # a scale, then codes
        scales = groups[..., :SCALE_BYTES].contiguous().view(torch.float16)[..., 0]
        return Stored(self, "rows", (groups[..., SCALE_BYTES:].flatten(1).view(self.code), scales), shape)

    def values(self, stored: Stored, dtype: torch.dtype) -> Tensor:
        (codes, scales), (q, n) = stored.tensors, stored.shape
        out = torch.empty(stored.shape, dtype=dtype, device=codes.device)
        if stored.order == "columns":
            wide = scales.float().repeat_interleave(GROUP, 0)[:n]  # (n, q)
            return out.copy_((self.unpacked(codes)[:, :q] * wide).t())
        for part in parts(q, n):
            out[part] = self._rows(codes[part], scales[part], n)
        return out

    def pieces(self, stored: Stored, index: Tensor, dtype: torch.dtype) -> Tensor:
        (codes, scales), (q, n) = stored.tensors, stored.shape
        if stored.order == "rows":
            return self._rows(codes[index], scales[index], n).to(dtype)
        return (self.unpacked(codes[index])[:, :q] * scales[index // GROUP].float()).to(dtype)

    def _rows(self, codes: Tensor, scales: Tensor, n: int) -> Tensor:
        return (self.unpacked(codes).unflatten(1, (-1, GROUP)) * scales.float()[..., None]).flatten(1)[:, :n]

    def at(self, stored: Stored, row: Tensor, column: Tensor) -> Tensor:
        codes, scales = stored.tensors
        if stored.order == "rows":
            return self.integer_at(codes, row, column) * scales[row, column // GROUP].float()
        return self.integer_at(codes, column, row) * scales[column // GROUP, row].float()

    def laid_out(self, stored: Stored, order: Order) -> Stored:
        if order == stored.order:
            return stored
        (codes, scales), (q, n) = stored.tensors, stored.shape
        if order == "columns":
            integers = self.unpacked(codes)[:, :n].t()
        else:
            integers = functional.pad(self.unpacked(codes)[:, :q].t(), (0, whole(n) - n))
        return Stored(self, order, (self.packed(integers).contiguous(), scales.t().contiguous()), stored.shape)

    def row_bytes(self, inputs: int) -> int:
        return self.column_bytes(whole(inputs)) + whole(inputs) // GROUP * SCALE_BYTES

    def scale_bytes(self, outputs: int) -> int:
        return outputs * SCALE_BYTES


def whole(count: int) -> int:
    """The count, rounded up to whole groups."""
    return -(-count // GROUP) * GROUP


def inverse(scale: Tensor) -> Tensor:
    """1 / scale, 0 for 0."""
    return torch.where(scale == 0, 0, 1 / scale)
