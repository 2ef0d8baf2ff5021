"""The memory layout of a model's weights: pieces of a neuron side by side, contiguous columns, or packed."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from moyu import kernels
from moyu.model.anatomy import Piece
from moyu.model.quantised import QuantisedLinear
from moyu.weights import Order, Stored, mapped

Layout = Literal["neuron_major", "input_major"]
Role = Literal["row", "column", "planes", "parted"]
_ORDERS: dict[Role, Order] = {"row": "rows", "column": "columns", "planes": "planes", "parted": "parted"}


def lay_out(pieces: list[Piece], roles: list[Role]) -> None:
    """Store the k pieces of each neuron side by side: one (f, k, d) storage, and every parameter a strided view of it.

    roles: whether neuron j is row j or column j of each piece; "planes" is for the columns of quantised weights, "parted" for the rows
    of a head. One piece with the role "column" is `input_major`. Values do not change. If a piece is a part of a parameter (fused
    gates, experts), its rows or columns are made contiguous and no more.
    """
    if any(p.blocks for p in pieces):
        _lay_out_blocks(pieces, roles)
        return
    free = [p for p in pieces if p.whole]
    if len(free) == len(pieces) and len({_plane(p, r).shape for p, r in zip(pieces, roles, strict=True)}) == 1:
        planes = [_plane(p, r) for p, r in zip(pieces, roles, strict=True)]  # each (f, d)
        f, d = planes[0].shape
        storage = _empty((f, len(planes), d), planes[0])
        for k, plane in enumerate(planes):
            storage[:, k] = plane
        for k, (piece, role) in enumerate(zip(pieces, roles, strict=True)):
            view = storage[:, k]
            piece.store(view if role == "row" else view.t())
        return
    for piece, role in zip(pieces, roles, strict=True):
        if is_laid_out(piece, role):
            continue
        parameter = getattr(piece.module, piece.parameter)
        if piece.whole:
            piece.store(piece.weight.contiguous() if role == "row" else piece.weight.t().contiguous().t())
        elif parameter.is_contiguous():  # gate and up in one, or all experts at once
            parameter.data = parameter.data.transpose(-1, -2).contiguous().transpose(-1, -2)
        else:
            parameter.data = parameter.data.contiguous()


def _lay_out_blocks(pieces: list[Piece], roles: list[Role]) -> None:
    """The same for weights in blocks. A row is followed by its scales; 32 columns share scales, so these are stored apart."""
    modules = [p.module for p in pieces if isinstance(p.module, QuantisedLinear)]
    if len(modules) < len(pieces):
        for piece, role in zip(pieces, roles, strict=True):  # some are not blocks: lay out each by itself
            if not is_laid_out(piece, role):
                lay_out([piece], [role])
        return
    planes = [m.blocks.laid_out(_ORDERS[r]) for m, r in zip(modules, roles, strict=True)]
    parts = [b.tensors if b.order == "rows" else b.tensors[:1] for b in planes]
    sizes = [[t.shape[1] * t.element_size() for t in part] for part in parts]
    width = sum(map(sum, sizes))
    width += width % 2  # scales are 16 bits wide
    width += 64 if width % 2048 == 0 else 0  # neurons of whole pages would fall into the same cache sets
    storage = _empty((len(planes[0].tensors[0]), width), parts[0][0].view(torch.uint8))
    start = 0
    for module, blocks, part, widths in zip(modules, planes, parts, sizes, strict=True):
        views = []
        for tensor, size in zip(part, widths, strict=True):
            views.append(storage[:, start : start + size].view(tensor.dtype))
            views[-1].copy_(tensor)
            start += size
        views += [_empty(tuple(t.shape), t).copy_(t) for t in blocks.tensors[len(views) :]]
        before = module.blocks.tensors[0]
        module.store(Stored(blocks.format, blocks.order, tuple(views), blocks.shape))
        mapped.let_go(before)


def _empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    if like.device.type == "cpu":
        return kernels.cpu.empty_weights(*shape, dtype=like.dtype)
    return like.new_empty(shape)


def _plane(piece: Piece, role: str) -> Tensor:
    weight = piece.weight.detach()
    return weight if role == "row" else weight.t()


def is_laid_out(piece: Piece, role: Role) -> bool:
    """Whether the piece's rows (columns) are contiguous in memory, as kernels need them."""
    if piece.blocks is not None:
        return piece.blocks.order == _ORDERS[role]
    weight = piece.weight
    return weight.stride(1) == 1 if role == "row" else weight.stride(0) == 1


def pack(module: nn.Module) -> None:
    """Make every parameter of a module contiguous again; values do not change."""
    if isinstance(module, QuantisedLinear):
        blocks = module.blocks.laid_out("rows")
        module.store(Stored(blocks.format, "rows", tuple(t.contiguous() for t in blocks.tensors), blocks.shape))
    for parameter in module.parameters(recurse=False):
        if not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()
