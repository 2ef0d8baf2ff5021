"""Weights that one product reads, side by side in one storage, every parameter a view of it: no second copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from moyu.model.anatomy import Piece


class Joined:
    """What was put side by side, so that it can be taken apart again."""

    def __init__(self) -> None:
        """Nothing yet."""
        self.pieces: list[Piece] = []

    def side_by_side(self, pieces: Sequence[Piece], order: Literal["rows", "columns"]) -> Tensor:
        """One weight (q, n) of all outputs, whose rows or columns are contiguous; values do not change."""
        weights = [p.weight.detach() for p in pieces]
        sizes, columns = [len(w) for w in weights], order == "columns"
        whole = weights[0].new_empty(
            *((weights[0].shape[1], sum(sizes)) if columns else (sum(sizes), weights[0].shape[1]))
        )
        whole = whole.t() if columns else whole
        for piece, view in zip(pieces, whole.split(sizes), strict=True):
            view.copy_(piece.weight.detach())
            piece.store(view)
        self.pieces += pieces
        return whole

    def apart(self) -> None:
        """Give every parameter a storage of its own, contiguous."""
        for piece in self.pieces:
            piece.store(piece.weight.detach().clone(memory_format=torch.contiguous_format))
        self.pieces = []
