"""What a weight format is, and a weight that is stored in one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Order = Literal["rows", "columns", "planes", "parted"]
LIES: dict[Order, str] = {
    "rows": "lies by rows",
    "columns": "lies by columns",
    "planes": "lies in planes",
    "parted": "is parted",
}
CHUNK = 1 << 18  # weights that are (de)quantised at once: temporaries take some 20 bytes a weight


class Format(ABC):
    """One way to store a weight (q, n). Formats are values: one instance a format, in the list `weights.FORMATS`.

    name: what commands, plans and records call it.
    bits: bits of a weight, scales not counted.
    group: weights that share a scale, along the inputs; 1 = there are no scales.
    ggml: its type number in GGUF files, None = they do not have it.
    native: its name in the C++ kernels (csrc/formats/formats.def), None = they do not read it, and products with it take
        the values that `values` gives.
    rounds_inputs: products are sums of integers: x is rounded to 8 bits, one scale for every `group` values.
    splits: a weight can lie in planes: by columns, the first bits of its codes apart from the others (`weights.planes`).
    splits_rows: a weight can be parted: by rows, the first bits of its codes apart from the others.
    """

    name: str
    bits: int
    group: int = 1
    ggml: int | None = None
    native: str | None = None
    rounds_inputs: bool = False
    splits: bool = False
    splits_rows: bool = False

    @abstractmethod
    def store(self, weight: Tensor) -> Stored:
        """A weight (q, n) in this format, by rows."""

    @abstractmethod
    def values(self, stored: Stored, dtype: torch.dtype) -> Tensor:
        """The weight (q, n); each value is exact in float32 and then rounded to `dtype`."""

    @abstractmethod
    def pieces(self, stored: Stored, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows `index` (k,) of a weight by rows, (k, n); columns of one by columns, (k, q)."""

    @abstractmethod
    def at(self, stored: Stored, row: Tensor, column: Tensor) -> Tensor:
        """Single values, float32: row and column (k,) -> (k,)."""

    @abstractmethod
    def laid_out(self, stored: Stored, order: Order) -> Stored:
        """The same values in another order, contiguous; itself where it already is."""

    def first_values(self, stored: Stored, dtype: torch.dtype) -> Tensor:
        """Of a weight in planes or parted, what its first bits alone stand for: (q, n)."""
        raise ValueError(f"weights in {self.name} have no planes")

    def plane_bytes(self, outputs: int) -> tuple[int, int]:
        """Of a weight in planes: bytes of the first bits of a group of columns, and of the further bits of one column."""
        raise ValueError(f"weights in {self.name} have no planes")

    def part_bytes(self, inputs: int) -> tuple[int, int]:
        """Of a parted weight: bytes of the first bits of a row, without its scales, and of its further bits."""
        raise ValueError(f"weights in {self.name} cannot be parted")

    @abstractmethod
    def row_bytes(self, inputs: int) -> int:
        """Bytes of a row, scales included."""

    @abstractmethod
    def column_bytes(self, outputs: int) -> int:
        """Bytes of a column, without the scales, which belong to `group` columns."""

    @abstractmethod
    def scale_bytes(self, outputs: int) -> int:
        """Bytes of the scales that a group of columns shares."""

    @property
    def block(self) -> int:
        """Weights of a block in a GGUF file: rows there are whole blocks."""
        return self.group

    @property
    def block_bytes(self) -> int:
        """Bytes of such a block. Here a row may take more: scales that a file packs into six bits have eight."""
        return self.row_bytes(self.block)

    def read(self, raw: Tensor, shape: tuple[int, int]) -> Stored:
        """A tensor of a GGUF file, bit for bit: raw (q, bytes of a row) uint8. ValueError: files do not have the format."""
        raise ValueError(f"GGUF files have no {self.name}")

    def __repr__(self) -> str:
        return self.name


@dataclass(frozen=True, eq=False)
class Stored:
    """A weight (q, n) in a format. The tensors are the format's: a row or a column is contiguous, the steps between are free."""

    format: Format
    order: Order
    tensors: tuple[Tensor, ...]
    shape: tuple[int, int]

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.tensors[0].device

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return sum(t.nbytes for t in self.tensors)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, scales included."""
        return self.format.row_bytes(self.shape[1])

    @property
    def column_bytes(self) -> int:
        """Bytes of a column, without the scales that it shares; in planes, of its further bits."""
        outputs = self.shape[0]
        return self.format.plane_bytes(outputs)[1] if self.order == "planes" else self.format.column_bytes(outputs)

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales that a group of columns shares."""
        return self.format.scale_bytes(self.shape[0])

    def values(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight (q, n)."""
        return self.format.values(self, dtype)

    def first_values(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """What the first bits alone stand for, (q, n). ValueError for a weight whose first bits do not lie apart."""
        if self.order not in ("planes", "parted"):
            raise ValueError(
                f"a weight that {LIES[self.order]} has no first bits apart; lay it out in planes, or parted"
            )
        return self.format.first_values(self, dtype)

    def pieces(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows (k, n) or columns (k, q) of it, whichever are contiguous; index (k,)."""
        return self.format.pieces(self, index, dtype)

    def at(self, row: Tensor, column: Tensor) -> Tensor:
        """Single values, float32: row and column (k,) -> (k,)."""
        return self.format.at(self, row, column)

    def laid_out(self, order: Order) -> Stored:
        """The same values in another order; itself where it already is."""
        return self if order == self.order else self.format.laid_out(self, order)


def parts(rows: int, width: int) -> Iterator[slice]:
    """The rows of a weight in parts of about CHUNK values."""
    step = max(1, CHUNK // max(1, width))
    return (slice(start, min(rows, start + step)) for start in range(0, rows, step))
