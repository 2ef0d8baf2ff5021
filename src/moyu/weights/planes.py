"""Codes in two planes: the first bits of each, and its further bits, which a decode step reads for chosen inputs only.

A code of b bits is first << s | second, with s further bits. Codes that share their first bits are on average in the middle of
them, so an input whose further bits are not read is multiplied with first << s | (2^s - 1) / 2: that costs no bytes, and reading
everything gives the very values. Both planes lie as csrc/core/levels.h multiplies them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

INPUTS, OUTPUTS = 32, 64  # of a group, of a tile
SPLITS = {8: (4, 4), 6: (4, 2), 5: (3, 2), 4: (2, 2), 3: (2, 1)}  # bits of a code: its first ones, its further ones


def tiled(outputs: int) -> int:
    """The count, rounded up to whole tiles."""
    return -(-outputs // OUTPUTS) * OUTPUTS


def first_bytes(bits: int, outputs: int) -> int:
    """Bytes of the first bits of a group of 32 inputs."""
    return tiled(outputs) * INPUTS * SPLITS[bits][0] // 8


def second_bytes(bits: int, outputs: int) -> int:
    """Bytes of the further bits of one input."""
    return tiled(outputs) * SPLITS[bits][1] // 8


def split(codes: Tensor, bits: int, halves: int) -> tuple[Tensor, Tensor]:
    """Codes (n, q) uint8 of all columns as first plane (groups, bytes) and second plane (n, bytes).

    halves: parts of a group that have scales of their own; pairs of inputs that share a byte are of one part.
    """
    (n, q), (first, second) = codes.shape, SPLITS[bits]
    codes = functional.pad(codes, (0, tiled(q) - q))
    fields = (codes & (1 << second) - 1).unflatten(1, (-1, 8 // second, 8 * second))  # (n, T, fields, bytes)
    low = _joined(fields, 2, second).flatten(1)
    high = functional.pad(codes >> second, (0, 0, 0, -n % INPUTS))
    tiles = []
    for plane, shift in _planes(first):
        number = high >> shift & (1 << plane) - 1
        both, units = 4 // plane, 4 * plane // halves
        # inputs as groups, parts, h, units, parity; outputs as tiles, t // 32, t % 32
        number = number.unflatten(0, (-1, halves, both, units, 2)).unflatten(5, (-1, 2, 32))
        joined = _joined(number.permute(0, 5, 1, 3, 7, 4, 2, 6).flatten(6), 6, plane)  # (G, T, parts, units, 32, 2)
        tiles.append(joined.flatten(2))
    return torch.cat(tiles, 2).flatten(1), low


def joined(first: Tensor, second: Tensor, bits: int, halves: int, outputs: int) -> Tensor:
    """The inverse of `split`: codes (n, outputs)."""
    return first_codes(first, bits, halves, outputs)[: len(second)] << SPLITS[bits][1] | further(second, bits, outputs)


def further(second: Tensor, bits: int, outputs: int) -> Tensor:
    """The further bits of lines (k, bytes): (k, outputs)."""
    own = SPLITS[bits][1]
    return _fields(second.unflatten(1, (-1, 8 * own)), 2, own).flatten(1)[:, :outputs]


def first_codes(first: Tensor, bits: int, halves: int, outputs: int) -> Tensor:
    """The first bits of groups (k, bytes): (32 k, outputs)."""
    lines, start, codes = first.unflatten(1, (tiled(outputs) // OUTPUTS, -1)), 0, None
    for plane, shift in _planes(SPLITS[bits][0]):
        both, units, size = 4 // plane, 4 * plane // halves, 256 * plane
        number = lines[:, :, start : start + size].unflatten(2, (halves, units, 32, 2))
        number = _fields(number, 6, plane).unflatten(6, (both, 2))  # (G, T, parts, units, 32, 2, h, t // 32)
        number = number.permute(0, 2, 6, 3, 5, 1, 7, 4).flatten(5).flatten(0, 4) << shift
        codes, start = number if codes is None else codes | number, start + size
    assert codes is not None
    return codes[:, :outputs]


def _planes(bits: int) -> tuple[tuple[int, int], ...]:
    """Bits and shift of the planes that the first bits lie in: three bits are two and one."""
    return ((2, 0), (1, 2)) if bits == 3 else ((bits, 0),)


def _joined(numbers: Tensor, dim: int, bits: int) -> Tensor:
    """Bytes of numbers of `bits` bits along a dimension, the lowest first; it goes."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=numbers.device)
    shifts = shifts.reshape(-1, *[1] * (numbers.dim() - 1 - dim))
    return (numbers << shifts).sum(dim, dtype=torch.uint8)


def _fields(lines: Tensor, dim: int, bits: int) -> Tensor:
    """The inverse: numbers of bytes, along a new dimension."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=lines.device)
    shifts = shifts.reshape(-1, *[1] * (lines.dim() - dim))
    return lines.unsqueeze(dim) >> shifts & (1 << bits) - 1
