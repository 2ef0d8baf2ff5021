"""A model with weights stored in few bits: its outputs, and the bytes that a step reads."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moyu.measure import accounting
from moyu.model.anatomy import Anatomy
from moyu.weights.few_bits import GROUP, SCALE_BITS, rounded

HEAD_BITS = (
    8  # the least for the head and for a plan's own matrices: with fewer bits their error exceeds that of the blocks
)


@dataclass(frozen=True)
class Storage:
    """How weights are stored: linears of the blocks and the head in `bits` (16: unchanged), the rest in 16 bits.

    Raises ValueError if bits are neither 16 nor in 1 .. 8.
    """

    bits: int = 16

    def __post_init__(self) -> None:
        if self.bits != 16 and not 1 <= self.bits <= 8:
            raise ValueError(f"bits must be 16 or in 1 .. 8, not {self.bits}")

    @property
    def weight_bits(self) -> float:
        """Bits per weight of a block, with its share of a scale."""
        return stored_bits(self.bits)

    @property
    def head(self) -> Storage:
        """How the head and the matrices of a plan are stored."""
        return Storage(max(self.bits, HEAD_BITS))

    def kept(self, weight: Tensor) -> Tensor:
        """A weight (q, n) rounded to `bits`, in its own type; groups lie along the rows."""
        return weight if self.bits == 16 else rounded(weight, self.bits)

    def kept_bytes(self, rows: int, columns: int) -> float:
        """Bytes of a stored weight (rows, columns): codes, and one scale per group; a last, shorter group has one too."""
        scales = 0 if self.bits == 16 else rows * math.ceil(columns / GROUP)
        return rows * columns * self.bits / 8 + scales * SCALE_BITS / 8

    def step_bytes(self, model: nn.Module, anatomy: Anatomy) -> float:
        """Bytes that one dense decode step reads."""
        size = next(model.parameters()).element_size()
        blocks = accounting.block_bytes(model, anatomy)
        head = getattr(model.get_output_embeddings(), "weight", None)  # pyright: ignore[reportCallIssue]
        top = 0 if head is None else head.nbytes
        rest = accounting.dense_step_bytes(model, anatomy) - blocks - top
        return (blocks * self.weight_bits + top * self.head.weight_bits + rest * 16) / (8 * size)


def stored_bits(bits: int) -> float:
    """Bits per weight stored in `bits`, with its share of a scale."""
    return float(bits) if bits == 16 else bits + SCALE_BITS / GROUP


@contextmanager
@torch.no_grad()
def stored(model: nn.Module, anatomy: Anatomy, storage: Storage) -> Iterator[None]:
    """Let the model compute with rounded weights; on exit it has its own again.

    Groups lie along the units that a feed-forward network skips: rows of gate and up, columns of down.
    """
    if storage.bits == 16:
        yield
        return
    head = getattr(model.get_output_embeddings(), "weight", None)  # pyright: ignore[reportCallIssue]
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        for block in anatomy.all_blocks():
            for name, piece in block.pieces.items():
                view = piece.weight.t() if name == "down" else piece.weight
                kept.append((view, view.clone()))
                view.copy_(rounded(view, storage.bits))
        if head is not None:
            kept.append((head, head.clone()))
            head.copy_(storage.head.kept(head))
        yield
    finally:
        for view, before in kept:
            view.copy_(before)
