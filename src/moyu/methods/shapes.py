"""What the tensors of a plan must be: declared once, beside what reads them, and checked where a plan meets its model.

`SiteParams` declares the shape of each of its parts, and a method those of the buffers that its score reads (`Method.shapes`).
Kernels take addresses of these tensors, so a plan whose tensors are others is refused before anything is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

NUMBERS = "numbers"  # a kind of values: floating point, all of them finite
ORDERS = "units"  # int64, each at least 0 and below the number of units


class Shape(NamedTuple):
    """The sides of a tensor, and its type.

    sides: numbers, or letters of `sizes`; any other letter is the same number wherever a site has it.
    """

    sides: tuple[int | str, ...]
    kind: str | torch.dtype = NUMBERS  # or ORDERS, or the type of codes and scales


def shape(*sides: int | str, kind: str | torch.dtype = NUMBERS) -> Shape:
    """A shape, for example `shape("units", "n")`."""
    return Shape(sides, kind)


def few_bits(name: str, rows: int, columns: int, group: int) -> dict[str, Shape]:
    """The two buffers of a matrix (rows, columns) in few bits, with a scale for every `group` weights of a row."""
    return {
        f"{name}.codes": shape(rows, columns, kind=torch.uint8),
        f"{name}.scales": shape(rows, -(-columns // group), kind=torch.float16),
    }


def check_values(name: str, tensor: Tensor) -> None:
    """Refuse numbers that are not finite (ValueError)."""
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name} has values that are not finite")


def check(name: str, tensor: Tensor, expected: Shape, sizes: dict[str, int]) -> None:
    """Refuse a tensor that is not of this shape and type (ValueError). `sizes` learns the letters that are new to it."""
    found = tuple(tensor.shape)
    sides = [side if isinstance(side, int) else sizes.get(side, side) for side in expected.sides]
    said = ", ".join(map(str, sides))
    if len(found) != len(sides):
        raise ValueError(f"{name} has shape {found}, not ({said})")
    for side, size in zip(sides, found, strict=True):
        if isinstance(side, str):
            sizes[side] = size
        if size < 1 or size != sizes.get(str(side), side):
            raise ValueError(f"{name} has shape {found}, not ({said})")
    kind = expected.kind
    if kind == NUMBERS and not tensor.is_floating_point():
        raise ValueError(f"{name} is {tensor.dtype}, not floating point")
    if isinstance(kind, torch.dtype) and tensor.dtype != kind:
        raise ValueError(f"{name} is {tensor.dtype}, not {kind}")
    if kind == ORDERS:
        if tensor.dtype != torch.int64:
            raise ValueError(f"{name} is {tensor.dtype}, not torch.int64")
        if int(tensor.min()) < 0 or int(tensor.max()) >= sizes["units"]:
            raise ValueError(f"{name} names units outside 0 .. {sizes['units'] - 1}")


def check_all(tensors: Mapping[str, Tensor], expected: Mapping[str, Shape], needed: set[str], sizes: dict[str, int]):
    """Refuse a tensor that nobody declared, one that is `needed` and not there, and one that is another (ValueError)."""
    for name in needed - tensors.keys():
        raise ValueError(f"{name} is missing")
    for name, tensor in tensors.items():
        if name not in expected:
            raise ValueError(f"{name} is a tensor that nothing here reads")
        check(name, tensor, expected[name], sizes)
        check_values(name, tensor)
