"""Products with weights in the formats `packed8` and `packed4` (weights/packed.py): unpacked on load, never stored.

Products of one row are in float32; those of 2 to 16 rows run on the tensor cores on values rounded to x's dtype. Sums are
float32, in a fixed order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moyu.kernels.gpu.common import Pieces, output
from moyu.weights import Stored

ONE_ROW_WIDEST = 8192  # values of a piece that a program of `packed_single` holds in its registers


def pieces(weight: Stored) -> Pieces:
    """The pieces of a weight in a packed format."""
    data, scales = weight.tensors
    q, n = weight.shape
    return Pieces(data, scales, weight.format.bits, (q, n) if weight.order == "rows" else (n, q))


def rows(x: Tensor, weight: Stored, mask: Tensor | None, bias: Tensor | None) -> Tensor:
    """`kernels.rows`."""
    from moyu.kernels.gpu import packed_many, packed_single

    if len(x) == 1 and x.shape[1] <= ONE_ROW_WIDEST:
        return packed_single.rows(x, pieces(weight), mask, bias)
    y = output(x, weight.shape[0], x.dtype)
    packed_many.project(y, x, None, pieces(weight), mask, bias, "identity")
    return y.to(x.dtype)


def columns(x: Tensor, weight: Stored, mask: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`kernels.columns`, in `dtype`."""
    from moyu.kernels.gpu import packed_many, packed_single

    if len(x) == 1:
        return packed_single.columns(x, pieces(weight), mask, bias, dtype)
    return packed_many.combine(x, pieces(weight), mask, bias, dtype)


def neurons(x: Tensor, gate: Stored | None, up: Stored, down: Stored, mask: Tensor, act: str) -> Tensor:
    """`kernels.neurons` without biases and without `given`."""
    from moyu.kernels.gpu import packed_many, packed_single

    first, second, third = None if gate is None else pieces(gate), pieces(up), pieces(down)
    if len(x) == 1 and x.shape[1] <= ONE_ROW_WIDEST:
        return packed_single.neurons(x, first, second, third, mask, act)
    value = torch.empty(mask.shape, dtype=torch.float32, device=x.device)
    packed_many.project(value, x, first, second, mask, None, act)
    return packed_many.combine(value, third, mask, None, x.dtype)
