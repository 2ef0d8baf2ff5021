"""Weights as blocks of 32 with one fp16 scale each, Q8_0 and Q4_0, and the modules that hold them.

The values are llama.cpp's, bit for bit, so that quality and bytes compare one to one. A block lies along the inputs of a
linear (along an embedding's row), as in GGUF files; n below is their number rounded up to 32:

    q8_0    x_i = d * q_i,         q_i in -127 .. 127,  d = max |x| / 127             34 bytes a block
    q4_0    x_i = d * (q_i - 8),   q_i in 0 .. 15,      d = x of largest size / -8    18 bytes a block

Quants and scales are kept apart. By rows (the way of a GGUF file), quants are (q, n) int8 or (q, n / 2) uint8, where byte b of a
block holds its elements b (low four bits) and b + 16 (high); scales are (q, n / 32). By columns, for skipping inputs, the
same values lie the other way round: quants are (n, q) int8 or (n, Q / 2) uint8, where byte b of 32 outputs holds outputs b and
b + 16 and Q is q rounded up to 32; scales are (n / 32, q), one row of them for 32 columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Kind = Literal["q8_0", "q4_0"]
Order = Literal["rows", "columns"]

BLOCK = 32  # weights that share a scale
SCALE_BYTES = 2
KINDS: tuple[Kind, ...] = ("q8_0", "q4_0")
KIND_BITS: Mapping[str, int] = {"q8_0": 8, "q4_0": 4}  # of a quant
CHUNK = 1 << 20  # weights that are (de)quantised at once: temporaries take some 20 bytes a weight


@dataclass(frozen=True, eq=False)
class Blocks:
    """A weight (q, n) as blocks.

    quants and scales (float16) as the module says for `order`; the last dimension is contiguous, the first may be strided.
    """

    kind: Kind
    quants: Tensor
    scales: Tensor
    outputs: int
    order: Order = "rows"
    inputs: int | None = (
        None  # None: as many as the blocks hold; fewer: the last block of a row is filled up with zeros
    )

    @property
    def shape(self) -> tuple[int, int]:
        """(q, n) of the weight."""
        if self.order == "columns":
            return self.outputs, len(self.quants)
        return self.outputs, self.scales.shape[1] * BLOCK if self.inputs is None else self.inputs

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.quants.device

    @property
    def column_bytes(self) -> int:
        """Bytes of a column's quants; its scales belong to 32 columns."""
        return self.outputs if self.kind == "q8_0" else -(-self.outputs // BLOCK) * BLOCK // 2

    @property
    def nbytes(self) -> int:
        """Bytes of quants and scales."""
        return self.quants.nbytes + self.scales.nbytes

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight (q, n), contiguous; each value is exact in float32 and then rounded to `dtype`."""
        out = torch.empty(self.shape, dtype=dtype, device=self.quants.device)
        n = self.shape[1]
        if self.order == "columns":
            scales = self.scales.float().repeat_interleave(BLOCK, 0)[:n]  # (n, q)
            return out.copy_((self._values(self.quants)[:, : self.outputs] * scales).t())
        for part in _parts(self.outputs, n):
            values = self._values(self.quants[part]).unflatten(1, (-1, BLOCK))
            out[part] = (values * self.scales[part].float()[..., None]).flatten(1)[:, :n]
        return out

    def rows(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows `index` (...) of the weight, (..., n). Only for `order` rows."""
        flat = index.flatten()
        found = Blocks(self.kind, self.quants[flat], self.scales[flat], flat.numel(), inputs=self.inputs)
        return found.dequantise(dtype).unflatten(0, index.shape)

    def at(self, row: Tensor, column: Tensor) -> Tensor:
        """Single values, float32: row and column (k,) -> (k,)."""
        first, second = (row, column) if self.order == "rows" else (column, row)
        if self.kind == "q8_0":
            code = self.quants[first, second].float()
        else:
            byte = self.quants[first, second // BLOCK * (BLOCK // 2) + second % (BLOCK // 2)]
            code = torch.where(second % BLOCK < BLOCK // 2, byte & 15, byte >> 4).float() - 8
        scale = self.scales[row, column // BLOCK] if self.order == "rows" else self.scales[column // BLOCK, row]
        return code * scale.float()

    def in_order(self, order: Order) -> Blocks:
        """The same values laid out by rows or by columns, contiguous; itself where it already is."""
        if order == self.order:
            return self
        (q, n), by_columns = self.shape, order == "columns"
        codes = self.quants if self.kind == "q8_0" else _unpack(self.quants)
        codes = (codes[:, :n] if by_columns else codes[:, :q]).t()
        fill = -q % BLOCK if by_columns else -n % BLOCK  # with weights that are 0
        if self.kind == "q4_0":
            codes = _pack(functional.pad(codes, (0, fill), value=8))
        elif not by_columns:
            codes = functional.pad(codes, (0, fill))
        return Blocks(self.kind, codes.contiguous(), self.scales.t().contiguous(), q, order, n)

    def _values(self, quants: Tensor) -> Tensor:
        return quants.float() if self.kind == "q8_0" else _unpack(quants).float() - 8


def block_bytes(kind: Kind, values: int) -> int:
    """Bytes of so many weights, scales included; `values` is a multiple of 32."""
    return values // BLOCK * (BLOCK * KIND_BITS[kind] // 8 + SCALE_BYTES)


@torch.no_grad()
def quantise(weight: Tensor, kind: Kind) -> Blocks:
    """A weight (q, n) as llama.cpp's quantizer rounds it, by rows (ggml-quants.c, quantize_row_q8_0_ref and q4_0).

    Where n is no multiple of 32, which no file of llama.cpp's has, the last block of a row is filled up with zeros.
    """
    q, inputs = weight.shape
    n = -(-inputs // BLOCK) * BLOCK
    width, code = (n, torch.int8) if kind == "q8_0" else (n // 2, torch.uint8)
    quants = torch.empty((q, width), dtype=code, device=weight.device)
    scales = torch.empty((q, n // BLOCK), dtype=torch.float16, device=weight.device)
    for part in _parts(q, n):
        values = functional.pad(weight[part].detach().float(), (0, n - inputs))
        groups = values.unflatten(1, (-1, BLOCK))  # (rows, n / 32, 32)
        if kind == "q8_0":
            scale = groups.abs().amax(2) / 127
            quants[part] = _round(groups * _inverse(scale)[..., None]).to(torch.int8).flatten(1)
        else:
            scale = groups.gather(2, groups.abs().argmax(2, keepdim=True))[..., 0] / -8
            codes = (groups * _inverse(scale)[..., None] + 8.5).trunc().clamp(0, 15)
            quants[part] = _pack(codes.to(torch.uint8).flatten(1))
        scales[part] = scale.half()
    return Blocks(kind, quants, scales, q, inputs=inputs)


def _parts(rows: int, width: int) -> Iterator[slice]:
    step = max(1, CHUNK // max(1, width))
    return (slice(start, min(rows, start + step)) for start in range(0, rows, step))


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0, 1 / scale)


def _round(x: Tensor) -> Tensor:
    """Half away from zero, as C's roundf."""
    whole = x.abs().floor()
    return x.sign() * (whole + (2 * (x.abs() - whole)).floor())


def _pack(codes: Tensor) -> Tensor:
    """Codes 0 .. 15, (q, n) uint8 -> (q, n / 2): of 32 in a row, b and b + 16 share a byte."""
    low, high = codes.unflatten(1, (-1, 2, BLOCK // 2)).unbind(2)
    return (low | high << 4).flatten(1)


def _unpack(quants: Tensor) -> Tensor:
    pairs = quants.unflatten(1, (-1, 1, BLOCK // 2))
    return torch.cat([pairs & 15, pairs >> 4], dim=2).flatten(1)
