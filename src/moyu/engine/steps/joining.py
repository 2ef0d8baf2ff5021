"""Weights that one product reads, side by side in one storage, every parameter a view of it: no second copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from moyu.model.anatomy import Piece
from moyu.weights import Stored, mapped


class Joined:
    """What was put side by side, so that it can be taken apart again."""

    def __init__(self) -> None:
        """Nothing yet."""
        self.pieces: list[Piece] = []

    def side_by_side(self, pieces: Sequence[Piece], order: Literal["rows", "columns"]) -> Tensor | Stored:
        """One weight (q, n) of all outputs, whose rows or columns are contiguous; values do not change.

        Weights in a format lie by rows, all in the same one.
        """
        self.pieces += pieces
        stored = [p.blocks for p in pieces if p.blocks is not None]
        if stored:
            return _rows_together(pieces, stored)
        weights = [p.weight.detach() for p in pieces]
        sizes, columns = [len(w) for w in weights], order == "columns"
        whole = weights[0].new_empty(
            *((weights[0].shape[1], sum(sizes)) if columns else (sum(sizes), weights[0].shape[1]))
        )
        whole = whole.t() if columns else whole
        for piece, view in zip(pieces, whole.split(sizes), strict=True):
            view.copy_(piece.weight.detach())
            piece.store(view)
        return whole

    def apart(self) -> None:
        """Give every parameter a storage of its own, contiguous."""
        for piece in self.pieces:
            own = piece.blocks
            if own is not None:
                tensors = tuple(t.clone(memory_format=torch.contiguous_format) for t in own.tensors)
                piece.module.store(Stored(own.format, own.order, tensors, own.shape))  # pyright: ignore[reportCallIssue]
            else:
                piece.store(piece.weight.detach().clone(memory_format=torch.contiguous_format))
        self.pieces = []


def _rows_together(pieces: Sequence[Piece], stored: list[Stored]) -> Stored:
    """The same of weights that lie by rows in one format."""
    tensors = [torch.cat(parts) for parts in zip(*(s.tensors for s in stored), strict=True)]
    sizes = [s.shape[0] for s in stored]
    views = zip(*(t.split(sizes) for t in tensors), strict=True)
    for piece, own, view in zip(pieces, stored, views, strict=True):
        piece.module.store(Stored(own.format, "rows", view, own.shape))  # pyright: ignore[reportCallIssue]
        mapped.let_go(own.tensors[0])
    return Stored(stored[0].format, "rows", tuple(tensors), (sum(sizes), stored[0].shape[1]))
