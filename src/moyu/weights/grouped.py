"""What formats of integers share that have scales for every 32 inputs, as the types of GGUF files do.

A weight is (level of its code) * scale + offset. Levels are integers of 8 bits: the code minus `zero`, or an entry of `table`. Scale
and offset are those of its group of 32 inputs, or of half a group (`halves` = 2); they follow from `fields`, of which some belong to
one group and some to a block of `span` groups.

A stored weight has two tensors, codes and scales. By rows, a line of codes is a row; by columns, it is a column, and its numbers are
those of outputs. In planes and parted there is a third tensor, the first bits of all codes, and codes are the further ones: by columns
as `weights.planes` has them, or by rows, lines of the same form.
A line is a plane of the codes' low bits (4 of them, or 2, or all 8) and one of the high bits, if any. A plane of b bits has 4 b
bytes for 32 numbers: number i is in byte i % (4 b), from bit b * (i // (4 b)) on. Scales by rows are (q, bytes): field after field.
By columns they are (n / (32 span), bytes): field after field, each (count, q).
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor
from torch.nn import functional

from moyu.weights import planes
from moyu.weights.format import CHUNK, Format, Order, Stored, parts

GROUP = 32
PLANES = {
    8: (8,),
    6: (4, 2),
    5: (4, 1),
    4: (4,),
    3: (2, 1),
    2: (2,),
}  # bits of a code: of its planes, the low one first
HALF, BYTE, SIGNED = torch.float16, torch.uint8, torch.int8
BY_ROWS = ("rows", "parted")  # orders in which the scales of a row lie together


class Grouped(Format):
    """A format of integers.

    zero, table: what codes stand for. code: the type of the tensor of codes.
    minimum: whether a group has an offset of its own. steps: the integers that scales of a block are multiples by, None: any scale.
    fields: the type of each field of the scales, and how many a block of `span` groups has of it.
    """

    group = GROUP
    rounds_inputs = True
    code: torch.dtype = BYTE
    zero: int = 0
    table: tuple[int, ...] | None = None
    minimum: bool = False
    steps: tuple[int, int] | None = None
    halves: int = 1
    span: int = 1
    fields: tuple[tuple[torch.dtype, int], ...] = ((HALF, 1),)

    @abstractmethod
    def split(self, blocks: Tensor) -> tuple[Tensor, ...]:
        """Blocks of a file (q, B, bytes) uint8 as codes (q, n) and as many fields (q, B, count) as the format has."""

    def fields_of(self, d: Tensor, e: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        """The fields of blocks whose scales are d s and whose offsets are e t: d and e (q, B, 1), integers s and t (q, B, count)."""
        if self.steps is None:
            return (d, e) if self.minimum else (d,)
        if not self.minimum:
            return d, s.to(SIGNED)
        return d, e, s.to(BYTE), (-t).to(BYTE)

    def joined(self, codes: Tensor, *fields: Tensor) -> Tensor:
        """The inverse of `split`: codes (q, n) uint8 and fields (q, B, count) as blocks (q, B, bytes). ValueError: none are made."""
        raise ValueError(f"MOYU reads weights in {self.name} but does not make them; use llama.cpp's `llama-quantize`")

    def rounded(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (q, G, 32) of values, and the scales (q, G) float32. ValueError: MOYU does not quantise to this format."""
        raise ValueError(f"MOYU reads weights in {self.name} but does not make them; use llama.cpp's `llama-quantize`")

    def scaled(self, *fields: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and offset, float32, (q, B, span * halves), of the fields (q, B, count): their product, and no offset (None)."""
        return math.prod(fields[1:], start=fields[0].float()), None

    @property
    def block(self) -> int:
        return GROUP * self.span

    @property
    def splits(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.table is None and self.bits in planes.SPLITS

    @property
    def splits_rows(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.splits and self.bits >= 4

    @torch.no_grad()
    def store(self, weight: Tensor) -> Stored:
        """As llama.cpp's quantiser rounds. Where n is no multiple of 32, the last group of a row is filled up with zeros."""
        q, inputs = weight.shape
        n = whole(inputs)
        codes = torch.empty((q, self._line_bytes(n)), dtype=self.code, device=weight.device)
        scales = torch.empty((q, n // GROUP), dtype=HALF, device=weight.device)
        for part in parts(q, n):
            values = functional.pad(weight[part].detach().float(), (0, n - inputs))
            code, scale = self.rounded(values.unflatten(1, (-1, GROUP)))
            codes[part], scales[part] = self.packed(code.flatten(1)), scale.half()
        return Stored(self, "rows", (codes, scales), (q, inputs))

    def read(self, raw: Tensor, shape: tuple[int, int]) -> Stored:
        q, n = shape
        codes = torch.empty((q, self._line_bytes(n)), dtype=self.code)
        scales = torch.empty((q, n // self.block * self._field_bytes), dtype=BYTE)
        for part in parts(q, n):
            code, *fields = self.split(raw[part].unflatten(1, (n // self.block, -1)))
            codes[part], scales[part] = self.packed(code), _side_by_side([field.flatten(1) for field in fields])
        return Stored(self, "rows", (codes, self._typed(scales)), shape)

    def levels(self, codes: Tensor) -> Tensor:
        """What codes stand for, int8."""
        if self.table is not None:
            return torch.tensor(self.table, dtype=SIGNED, device=codes.device)[codes.int()]
        return codes.view(SIGNED) - self.zero if self.zero else codes.view(SIGNED)

    def packed(self, codes: Tensor) -> Tensor:
        """Lines (m, bytes) of codes (m, k)."""
        return codes.view(self.code) if self.bits == 8 else _lines(codes, self.bits, self.zero)

    def unpacked(self, lines: Tensor) -> Tensor:
        """The codes of lines, (m, k or more)."""
        return lines if self.bits == 8 else _codes_of(lines, self.bits)

    def _code_at(self, lines: Tensor, line: Tensor, place: Tensor) -> Tensor:
        """Single codes: place `place` of line `line`, both (k,)."""
        if self.bits == 8:
            return lines[line, place]
        codes, low, start = torch.zeros_like(place, dtype=BYTE), 0, 0
        groups = lines.shape[1] // (4 * self.bits)
        for bits in PLANES[self.bits]:
            byte = lines[line, start + place // GROUP * 4 * bits + place % (4 * bits)]
            shift = (place % GROUP // (4 * bits) * bits).to(BYTE)
            codes |= (byte >> shift & (1 << bits) - 1) << low
            low, start = low + bits, start + groups * 4 * bits
        return codes

    def _fields(self, scales: Tensor, order: Order, q: int) -> list[Tensor]:
        """The fields of scales, each (q, B, count)."""
        scales = scales.view(BYTE)
        by_rows = order in BY_ROWS
        blocks = scales.shape[1] // self._field_bytes if by_rows else len(scales)
        fields, start = [], 0
        for dtype, count in self.fields:
            size = count * dtype.itemsize * (blocks if by_rows else q)
            field = scales[:, start : start + size].view(dtype)
            start += size
            fields.append(field.unflatten(1, (blocks, count) if by_rows else (count, q)))
        return fields if by_rows else [field.permute(2, 0, 1) for field in fields]

    def _scales(self, stored: Stored, rows: slice | Tensor = slice(None)) -> tuple[Tensor, Tensor | None]:
        """Scale and offset of each part of a group, (q, parts) float32; rows: of a weight by rows, only of these."""
        scales = stored.tensors[1][rows] if stored.order in BY_ROWS else stored.tensors[1]
        scale, offset = self.scaled(*self._fields(scales, stored.order, stored.shape[0]))
        return scale.flatten(1), None if offset is None else offset.flatten(1)

    def values(self, stored: Stored, dtype: torch.dtype) -> Tensor:
        q, n = stored.shape
        out = torch.empty(stored.shape, dtype=dtype, device=stored.device)
        if stored.order not in BY_ROWS:
            for part in parts(n, q):
                index = torch.arange(part.start, part.stop, device=stored.device)
                out[:, part] = self.pieces(stored, index, dtype).t()
            return out
        for part in parts(q, n):
            out[part] = self._rows(stored, part)
        return out

    def pieces(self, stored: Stored, index: Tensor, dtype: torch.dtype) -> Tensor:
        if stored.order in BY_ROWS:
            return self._rows(stored, index).to(dtype)
        return self._columns(stored, index, self.levels(self._codes(stored, index)), dtype)

    def first_values(self, stored: Stored, dtype: torch.dtype) -> Tensor:
        if stored.order == "parted":
            out = torch.empty(stored.shape, dtype=dtype, device=stored.device)
            for part in parts(*stored.shape):
                out[part] = self._valued(stored, part, self._first_levels(self._first_of_rows(stored, part)))
            return out
        codes = planes.first_codes(stored.tensors[2], self.bits, self.halves, stored.shape[0])[: stored.shape[1]]
        return self._columns(
            stored, torch.arange(len(codes), device=codes.device), self._first_levels(codes), dtype
        ).t()

    def _first_levels(self, codes: Tensor) -> Tensor:
        """What first bits stand for: the middle of the codes that share them."""
        further = planes.SPLITS[self.bits][1]
        zero = 1 << 7 if self.bits == 8 else self.zero
        return (codes.to(torch.int16) << further) - zero + ((1 << further) - 1) / 2

    def _first_of_rows(self, stored: Stored, index: slice | Tensor) -> Tensor:
        return _codes_of(stored.tensors[2][index], planes.SPLITS[self.bits][0])

    def _columns(self, stored: Stored, index: Tensor, levels: Tensor, dtype: torch.dtype) -> Tensor:
        """Columns `index` of these levels, (k, q)."""
        part = index * self.halves // GROUP
        scale, offset = self._scales(stored)
        values = levels * scale.t()[part]
        return (values if offset is None else values + offset.t()[part]).to(dtype)

    def _codes(self, stored: Stored, index: Tensor) -> Tensor:
        """The codes of columns `index` (k,) of a weight that does not lie by rows, (k, q)."""
        q = stored.shape[0]
        if stored.order == "columns":
            return self.unpacked(stored.tensors[0][index])[:, :q]
        second, _, first = stored.tensors
        groups, own = torch.unique(index // GROUP, return_inverse=True)
        codes = planes.first_codes(first[groups], self.bits, self.halves, q)[own * GROUP + index % GROUP]
        codes = codes << planes.SPLITS[self.bits][1] | planes.further(second[index], self.bits, q)
        return self._signed(codes)

    def _rows(self, stored: Stored, index: slice | Tensor) -> Tensor:
        return self._valued(stored, index, self.levels(self._row_codes(stored, index)))

    def _row_codes(self, stored: Stored, index: slice | Tensor) -> Tensor:
        """The codes of rows `index` of a weight by rows or parted, (k, n or more)."""
        lines = stored.tensors[0][index]
        if stored.order == "rows":
            return self.unpacked(lines)
        further = planes.SPLITS[self.bits][1]
        return self._signed(self._first_of_rows(stored, index) << further | _codes_of(lines, further))

    def _signed(self, codes: Tensor) -> Tensor:
        """Codes as a weight by rows holds them, of codes from 0 on; and the inverse."""
        return (codes.view(BYTE) ^ 1 << 7).view(self.code) if self.bits == 8 else codes

    def _valued(self, stored: Stored, index: slice | Tensor, levels: Tensor) -> Tensor:
        """The values of rows `index`, (k, n), of their levels (k, n or more)."""
        scale, offset = self._scales(stored, index)
        levels = levels.unflatten(1, (-1, GROUP // self.halves))[:, : scale.shape[1]]
        values = levels * scale[..., None]
        values = values if offset is None else values + offset[..., None]
        return values.flatten(1)[:, : stored.shape[1]]

    def at(self, stored: Stored, row: Tensor, column: Tensor) -> Tensor:
        if stored.order == "planes":
            return self.pieces(stored, column, torch.float32).gather(1, row[:, None])[:, 0]
        if stored.order == "parted":
            return self.pieces(stored, row, torch.float32).gather(1, column[:, None])[:, 0]
        by_rows = stored.order == "rows"
        code = self._code_at(stored.tensors[0], *((row, column) if by_rows else (column, row)))
        scale, offset = self._scales(stored, row if by_rows else slice(None))
        place = (torch.arange(len(row), device=row.device) if by_rows else row, column * self.halves // GROUP)
        values = self.levels(code) * scale[place]
        return values if offset is None else values + offset[place]

    def laid_out(self, stored: Stored, order: Order) -> Stored:
        if order == stored.order:
            return stored
        if order == "planes":
            return self._split(stored.laid_out("columns"))
        if order == "parted":
            return self._parted(stored.laid_out("rows"))
        if stored.order in ("planes", "parted"):
            return self._whole(stored).laid_out(order)
        (lines, scales), (q, n) = stored.tensors, stored.shape
        count, padded = (n, q) if stored.order == "rows" else (q, whole(n))
        codes = self.unpacked(lines)[:, :count].t()
        code = self.packed(functional.pad(codes, (0, padded - codes.shape[1]), value=self.zero).contiguous())
        fields = self._fields(scales, stored.order, q)
        if order == "columns":
            turned = _side_by_side([field.permute(1, 2, 0).flatten(1) for field in fields])
        else:
            turned = _side_by_side([field.flatten(1) for field in fields])
        return Stored(self, order, (code, self._typed(turned)), stored.shape)

    def _split(self, stored: Stored) -> Stored:
        """A weight by columns in planes."""
        if not self.splits:
            raise ValueError(f"weights in {self.name} have no planes: their codes are no integers of 3 bits or more")
        (lines, scales), (q, n) = stored.tensors, stored.shape
        whole_first, second = self.plane_bytes(q)
        low = torch.empty((n, second), dtype=BYTE, device=stored.device)
        high = torch.empty((-(-n // GROUP), whole_first), dtype=BYTE, device=stored.device)
        step = max(1, CHUNK // (GROUP * q)) * GROUP
        for start in range(0, n, step):
            codes = self._signed(self.unpacked(lines[start : start + step])[:, :q]).view(BYTE)
            part = slice(start // GROUP, (start + len(codes) + GROUP - 1) // GROUP)
            high[part], low[start : start + len(codes)] = planes.split(codes, self.bits, self.halves)
        return Stored(self, "planes", (low, scales, high), stored.shape)

    def _parted(self, stored: Stored) -> Stored:
        """A weight by rows, parted."""
        if not self.splits_rows:
            raise ValueError(f"weights in {self.name} cannot be parted: their codes are no integers of 4 bits or more")
        (lines, scales), (q, n) = stored.tensors, stored.shape
        first, further = planes.SPLITS[self.bits]
        high = torch.empty((q, whole(n) * first // 8), dtype=BYTE, device=stored.device)
        low = torch.empty((q, whole(n) * further // 8), dtype=BYTE, device=stored.device)
        for part in parts(q, n):
            codes = self._signed(self.unpacked(lines[part])).view(BYTE)
            codes = functional.pad(codes, (0, whole(n) - codes.shape[1]))
            high[part], low[part] = _lines(codes >> further, first), _lines(codes & (1 << further) - 1, further)
        return Stored(self, "parted", (low, scales, high), stored.shape)

    def _whole(self, stored: Stored) -> Stored:
        """The inverse of both."""
        q, n = stored.shape
        if stored.order == "parted":
            lines = torch.empty((q, self._line_bytes(whole(n))), dtype=self.code, device=stored.device)
            for part in parts(q, n):
                lines[part] = self.packed(self._row_codes(stored, part))
            return Stored(self, "rows", (lines, stored.tensors[1]), stored.shape)
        lines = torch.empty((n, self.column_bytes(stored.shape[0])), dtype=self.code, device=stored.device)
        for part in parts(n, stored.shape[0]):
            lines[part] = self.packed(self._codes(stored, torch.arange(part.start, part.stop, device=stored.device)))
        return Stored(self, "columns", (lines, stored.tensors[1]), stored.shape)

    def tensors_of(self, shape: tuple[int, int], order: Order) -> tuple[tuple[tuple[int, int], torch.dtype], ...]:
        """Shape and type of the tensors of a weight (q, n): codes and scales, and in planes the first bits."""
        (q, n), halves = shape, len(self.fields) == 1 and self.fields[0][0] == HALF
        blocks, dtype = -(-n // self.block), HALF if halves else BYTE
        first: tuple[tuple[int, int], ...] = ()
        if order == "planes":
            lines, first = (n, self.plane_bytes(q)[1]), ((-(-n // GROUP), self.plane_bytes(q)[0]),)
        elif order == "parted":
            lines, first = (q, self.part_bytes(n)[1]), ((q, self.part_bytes(n)[0]),)
        else:
            lines = (q, self._line_bytes(whole(n))) if order == "rows" else (n, self.column_bytes(q))
        scales = (q, blocks * self._field_bytes) if order in BY_ROWS else (blocks, q * self._field_bytes)
        scales = (scales[0], scales[1] // dtype.itemsize)
        return (lines, BYTE if first else self.code), (scales, dtype), *((side, BYTE) for side in first)

    def plane_bytes(self, outputs: int) -> tuple[int, int]:
        return planes.first_bytes(self.bits, outputs), planes.second_bytes(self.bits, outputs)

    def part_bytes(self, inputs: int) -> tuple[int, int]:
        first, further = planes.SPLITS[self.bits]
        return whole(inputs) * first // 8, whole(inputs) * further // 8

    def row_bytes(self, inputs: int) -> int:
        return self._line_bytes(whole(inputs)) + -(-inputs // self.block) * self._field_bytes

    def column_bytes(self, outputs: int) -> int:
        return self._line_bytes(outputs if self.bits == 8 else whole(outputs))

    def scale_bytes(self, outputs: int) -> int:
        return -(-outputs * self._field_bytes // self.span)

    def _line_bytes(self, count: int) -> int:
        return count * self.bits // 8

    @property
    def _field_bytes(self) -> int:
        return sum(dtype.itemsize * count for dtype, count in self.fields)

    def _typed(self, scales: Tensor) -> Tensor:
        return scales.view(HALF) if len(self.fields) == 1 and self.fields[0][0] == HALF else scales


def _lines(codes: Tensor, bits: int, fill: int = 0) -> Tensor:
    """Lines (m, bytes) of codes (m, k) of so many bits; `fill` is the code that fills the last group of 32 up."""
    codes = functional.pad(codes, (0, -codes.shape[1] % GROUP), value=fill).unflatten(1, (-1, GROUP))
    lines, low = [], 0
    for plane in PLANES[bits]:
        numbers = (codes >> low & (1 << plane) - 1).unflatten(2, (8 // plane, 4 * plane))
        line = numbers[:, :, 0]
        for i in range(1, 8 // plane):
            line = line | numbers[:, :, i] << plane * i
        lines.append(line.flatten(1))
        low += plane
    return torch.cat(lines, 1) if len(lines) > 1 else lines[0]


def _codes_of(lines: Tensor, bits: int) -> Tensor:
    """The inverse: codes (m, k or more)."""
    codes, low, start, groups = None, 0, 0, lines.shape[1] // (4 * bits)
    for plane in PLANES[bits]:
        line = lines[:, start : start + groups * 4 * plane].unflatten(1, (groups, 1, 4 * plane))
        shifts = torch.arange(0, 8, plane, dtype=BYTE, device=lines.device)[:, None]
        numbers = (line >> shifts & (1 << plane) - 1).flatten(1)
        codes = numbers if codes is None else codes | numbers << low
        low, start = low + plane, start + groups * 4 * plane
    assert codes is not None
    return codes


def _side_by_side(fields: list[Tensor]) -> Tensor:
    """Fields (m, count) one after the other, as bytes (m, bytes)."""
    return torch.cat([_copy(field).view(BYTE) for field in fields], 1)


def _copy(t: Tensor) -> Tensor:
    # A copy, because `contiguous` keeps the odd strides of dimensions of one element, which no view of another type bears.
    return t.clone(memory_format=torch.contiguous_format)


def numbers(lines: Tensor, bits: int) -> Tensor:
    """Numbers of `bits` bits, the lowest first, of bytes (..., k): (..., 8 / bits, k)."""
    shifts = torch.arange(0, 8, bits, dtype=BYTE, device=lines.device)
    return lines[..., None, :] >> shifts[:, None] & (1 << bits) - 1


def spread(numbers: Tensor, bits: int) -> Tensor:
    """The inverse: bytes (..., k) of numbers (..., 8 / bits, k)."""
    shifts = torch.arange(0, 8, bits, dtype=BYTE, device=numbers.device)
    return (numbers << shifts[:, None]).sum(-2, dtype=BYTE)


def two_bytes(value: Tensor) -> Tensor:
    """The bytes (..., 2) of a float16 (..., 1)."""
    return _copy(value.to(HALF)).view(BYTE)


def half(raw: Tensor) -> Tensor:
    """Two bytes (..., 2) as a float16 (..., 1)."""
    return _copy(raw).view(HALF)


def whole(count: int) -> int:
    """The count, rounded up to whole groups."""
    return -(-count // GROUP) * GROUP


def inverse(scale: Tensor) -> Tensor:
    """1 / scale, 0 for 0."""
    return torch.where(scale == 0, 0, 1 / scale)
