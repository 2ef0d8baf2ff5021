"""Weights as plain numbers: the one tensor is the weight (q, n) itself, in any strides."""

from __future__ import annotations

import torch
from torch import Tensor

from moyu.weights.format import Format, Order, Stored


class Plain(Format):
    """Numbers of one torch type."""

    native = "plain"

    def __init__(self, dtype: torch.dtype, ggml: int | None = None) -> None:
        self.dtype, self.ggml = dtype, ggml
        self.name = str(dtype).removeprefix("torch.")
        self.bits = 8 * dtype.itemsize

    def store(self, weight: Tensor) -> Stored:
        return held(weight.detach().to(self.dtype).contiguous(), "rows")

    def values(self, stored: Stored, dtype: torch.dtype) -> Tensor:
        return stored.tensors[0].to(dtype)

    def pieces(self, stored: Stored, index: Tensor, dtype: torch.dtype) -> Tensor:
        weight = stored.tensors[0] if stored.order == "rows" else stored.tensors[0].t()
        return weight[index].to(dtype)

    def at(self, stored: Stored, row: Tensor, column: Tensor) -> Tensor:
        return stored.tensors[0][row, column].float()

    def laid_out(self, stored: Stored, order: Order) -> Stored:
        weight = stored.tensors[0]
        return held(weight.contiguous() if order == "rows" else weight.t().contiguous().t(), order)

    def row_bytes(self, inputs: int) -> int:
        return inputs * self.dtype.itemsize

    def column_bytes(self, outputs: int) -> int:
        return outputs * self.dtype.itemsize

    def scale_bytes(self, outputs: int) -> int:
        return 0


FLOAT32, FLOAT16, BFLOAT16 = Plain(torch.float32, 0), Plain(torch.float16, 1), Plain(torch.bfloat16, 30)
FLOAT64 = Plain(torch.float64)
_OF = {f.dtype: f for f in (FLOAT32, BFLOAT16, FLOAT16, FLOAT64)}


def held(weight: Tensor, order: Order) -> Stored:
    """A tensor (q, n) as a stored weight, not copied. TypeError for types that are no plain format."""
    if weight.dtype not in _OF:
        raise TypeError(
            f"a weight is {weight.dtype}, which is no plain format: {', '.join(f.name for f in _OF.values())}"
        )
    return Stored(_OF[weight.dtype], order, (weight,), tuple(weight.shape))  # pyright: ignore[reportArgumentType]
