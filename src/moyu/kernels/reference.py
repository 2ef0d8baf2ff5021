"""The kernels in plain torch: any device, any floating dtype. This file defines what the other back ends compute.

Skipped pieces do not contribute even where they hold NaN or infinities. Formats whose products are sums of integers
(`Format.rounds_inputs`) multiply inputs that are rounded to 8 bits, with one scale for every group; a skipped value is 0 before it
is rounded, and the scales of a group count once any of its inputs is kept. Sums are taken in float32 (float64 for float64).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moyu.kernels.backend import Backend, Neurons, columns_read, levels_read, words_read
from moyu.weights import Format, Stored


def _quick_gelu(z: Tensor) -> Tensor:
    return z * torch.sigmoid(1.702 * z)


def _gelu_tanh(z: Tensor) -> Tensor:
    return F.gelu(z, approximate="tanh")


# The one list of activations; gelu_new and gelu_pytorch_tanh are the names transformers uses.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu2": lambda z: F.relu(z).square(),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "identity": lambda z: z,
}


class Reference(Backend):
    """It computes everything, anywhere."""

    name = "reference"

    def why_not(self) -> str | None:
        return None

    def supports(self, op: str, format: Format, x: Tensor) -> str | None:
        return None

    def details(self) -> str:
        return f"torch {torch.__version__}"

    def rows(self, x: Tensor, weight: Stored, mask: Tensor | None, bias: Tensor | None) -> tuple[Tensor, int]:
        wide, (q, _) = _wide(x), weight.shape
        factor = taken(x, weight.format).to(wide)
        if mask is None:
            y = factor @ weight.values(wide).T  # (N, q)
            return (y if bias is None else y + bias.to(wide)).to(x.dtype), q * weight.row_bytes + _bytes(bias)
        kept = mask.any(0).nonzero()[:, 0]  # (k,)
        z = factor @ weight.pieces(kept, wide).T
        if bias is not None:
            z = z + bias[kept].to(wide)
        y = x.new_zeros((len(x), q))
        y[:, kept] = torch.where(mask[:, kept], z, 0.0).to(x.dtype)
        return y, len(kept) * (weight.row_bytes + (0 if bias is None else bias.element_size()))

    def columns(self, x: Tensor, weight: Stored, mask: Tensor, bias: Tensor | None) -> tuple[Tensor, int]:
        y = _sum_of_columns(x.to(_wide(x)), mask, weight)
        y = y if bias is None else y + bias.to(y.dtype)
        return y.to(x.dtype), columns_read(weight, mask) + _bytes(bias)

    def levels(self, x: Tensor, weight: Stored, mask: Tensor, bias: Tensor | None) -> tuple[Tensor, int]:
        wide = _wide(x)
        factor = taken(x, weight.format).to(wide)
        y = (
            torch.where(mask, factor, 0) @ weight.values(wide).T
            + torch.where(mask, 0, factor) @ weight.first_values(wide).T
        )
        return (y if bias is None else y + bias.to(wide)).to(x.dtype), levels_read(weight, mask) + _bytes(bias)

    def words(self, x: Tensor, weight: Stored, mask: Tensor | None, bias: Tensor | None) -> tuple[Tensor, int]:
        wide = _wide(x)
        factor = taken(x, weight.format).to(wide)
        y = factor @ weight.values(wide).T
        if mask is not None:
            y = torch.where(mask, y, factor @ weight.first_values(wide).T)
        return (y if bias is None else y + bias.to(wide)).to(x.dtype), words_read(weight, mask) + _bytes(bias)

    def neurons(self, call: Neurons) -> tuple[Tensor, int]:
        x, gate, up, down, mask, act, gate_bias, up_bias, down_bias, given = call
        wide = _wide(x)
        kept = mask.any(0).nonzero()[:, 0]  # (k,)
        read = columns_read(down, mask) + _bytes(down_bias)

        def project(weight: Stored, bias: Tensor | None) -> Tensor:
            nonlocal read
            read += len(kept) * (weight.row_bytes + (0 if bias is None else bias.element_size()))
            z = taken(x, weight.format).to(wide) @ weight.pieces(kept, wide).T
            return z if bias is None else z + bias[kept].to(wide)  # (N, k)

        value = torch.ones((), dtype=wide, device=x.device)
        if gate is not None:
            value = ACTIVATIONS[act](project(gate, gate_bias))
        if up is not None:
            u = project(up, up_bias)
            value = ACTIVATIONS[act](u) if gate is None and given is None else value * u
        if given is not None:
            value = value * given[:, kept].to(wide)
        values = torch.zeros(mask.shape, dtype=wide, device=x.device)
        values[:, kept] = value
        y = _sum_of_columns(values, mask, down)
        return (y if down_bias is None else y + down_bias.to(wide)).to(x.dtype), read


def rounded(x: Tensor, group: int) -> Tensor:
    """x (N, n) as 8 bits and a scale for every `group` values, half to even, float32: d = max |x| / 127 is not rounded."""
    groups = F.pad(x.float(), (0, -x.shape[1] % group)).unflatten(1, (-1, group))
    most = groups.abs().amax(2, keepdim=True)
    inverse = most.new_tensor(127.0) / most  # `127 / most` would be 127 times a reciprocal, which is rounded itself
    whole = (groups * torch.where(most == 0, 0.0, inverse)).round()
    return (whole * (most / 127)).flatten(1)[:, : x.shape[1]]


def taken(x: Tensor, format: Format) -> Tensor:
    """x as products with weights of a format take it."""
    return rounded(x, format.group) if format.rounds_inputs else x


def _sum_of_columns(value: Tensor, mask: Tensor, weight: Stored) -> Tensor:
    """sum over the kept i of value[:, i] * weight[:, i]; value and mask (N, n) -> (N, q)."""
    kept = mask.any(0).nonzero()[:, 0]  # (k,)
    value = taken(torch.where(mask, value, 0.0), weight.format).to(value.dtype)[:, kept]
    own, pieces = mask[:, kept], weight.pieces(kept, value.dtype)  # (N, k), (k, q)
    y = value @ pieces
    # A piece that one row skips and another keeps is in the product as 0 * w: nothing for a finite w, else NaN.
    # Such rows are few and are done again, each with its own pieces alone.
    for row in (~torch.isfinite(y).all(1)).nonzero()[:, 0].tolist():
        y[row] = value[row, own[row]] @ pieces[own[row]]
    return y


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _bytes(bias: Tensor | None) -> int:
    return 0 if bias is None else bias.nbytes
