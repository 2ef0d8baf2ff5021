"""Weights in fewer bits, for quality and for counting bytes: round to nearest, a scale for every few weights.

A code of b bits stands for (code + 1/2 - 2^(b-1)) times its scale: levels on both sides of zero and none at it, so that the
first k bits of a code are the code of the same weight in k bits, with a step 2^(b-k) times as wide.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from moyu import accounting
from moyu.surgery import Anatomy

GROUP = 32  # weights that share a scale
SCALE_BITS = 16
HEAD_BITS = 8  # of the head and of a plan's own matrices, the least: below, they spoil what the blocks keep
SHRINK = (1.0, 0.94, 0.88, 0.82, 0.76, 0.7, 0.64, 0.58, 0.52, 0.46, 0.4)  # of the range, tried for the least error


@dataclass(frozen=True)
class Storage:
    """How weights are kept: the blocks' linears, and the head, in `bits` (16: as they are), the rest in 16 bits.

    Raises ValueError for bits that are neither 16 nor in 1 .. 8.
    """

    bits: int = 16

    def __post_init__(self) -> None:
        if self.bits != 16 and not 1 <= self.bits <= 8:
            raise ValueError(f"bits must be 16 or in 1 .. 8, not {self.bits}")

    @property
    def weight_bits(self) -> float:
        """Bits a weight of a block takes, its share of a scale included."""
        return stored_bits(self.bits)

    @property
    def head(self) -> Storage:
        """How the head is kept, and what a plan has in matrices."""
        return Storage(max(self.bits, HEAD_BITS))

    def kept(self, weight: Tensor) -> Tensor:
        """A weight (q, n) as `bits` keep it, in its own type; groups along the rows."""
        return weight if self.bits == 16 else rounded(weight, self.bits)

    def kept_bytes(self, rows: int, columns: int) -> float:
        """Bytes of a weight (rows, columns) that is kept so: its codes, and a scale for every group, the last one of a row too."""
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
    """Bits a weight takes in `bits`, its share of a scale included."""
    return float(bits) if bits == 16 else bits + SCALE_BITS / GROUP


def quantize(weight: Tensor, bits: int, group: int = GROUP) -> tuple[Tensor, Tensor]:
    """Codes (q, n) uint8 and scales (q, ceil(n / group)) float of a weight (q, n), groups along its rows.

    Of several ranges a group takes the one whose squared error is least.
    """
    groups = _grouped(weight.detach().float(), group)  # (q, G, group)
    widest = groups.abs().amax(2, keepdim=True) * 2 / (2**bits - 1)
    widest = widest.clamp(min=torch.finfo(torch.float16).tiny)
    best, error = widest, torch.full_like(widest, torch.inf)
    for shrink in SHRINK:
        scale = (widest * shrink).half().float().clamp(min=torch.finfo(torch.float16).tiny)
        found = (_levels(_codes(groups, scale, bits), bits) * scale - groups).square().sum(2, keepdim=True)
        best, error = torch.where(found < error, scale, best), torch.minimum(found, error)
    codes = _codes(groups, best, bits).to(torch.uint8).flatten(1)[:, : weight.shape[1]]
    return codes, best.squeeze(2)


def dequantize(codes: Tensor, scales: Tensor, bits: int, group: int = GROUP) -> Tensor:
    """What `quantize` kept, (q, n) float."""
    values = _levels(_grouped(codes.float(), group), bits) * scales[..., None]
    return values.flatten(1)[:, : codes.shape[1]]


def rounded(weight: Tensor, bits: int, group: int = GROUP) -> Tensor:
    """A weight (q, n) as `bits` keep it, in its own type."""
    return dequantize(*quantize(weight, bits, group), bits, group).to(weight.dtype)


def _grouped(values: Tensor, group: int) -> Tensor:
    return functional.pad(values, (0, -values.shape[1] % group)).unflatten(1, (-1, group))


def _codes(values: Tensor, scale: Tensor, bits: int) -> Tensor:
    return (values / scale).floor().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) + 2 ** (bits - 1)


def _levels(codes: Tensor, bits: int) -> Tensor:
    return codes + 0.5 - 2 ** (bits - 1)


@contextmanager
@torch.no_grad()
def stored(model: nn.Module, anatomy: Anatomy, storage: Storage) -> Iterator[None]:
    """The model computes with the weights that `storage` keeps; afterwards it has its own again.

    Groups lie along what a skipped unit leaves out of the feed-forward network: rows of gate and up, columns of down.
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
