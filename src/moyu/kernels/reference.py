"""The kernels in plain torch: any device, any floating dtype. This file defines what the other back ends compute.

Skipped pieces do not contribute even where they hold NaN or infinities.
Weights in blocks meet inputs that are rounded to 8 bits, a scale for every 32; there a skipped value is 0 before it is rounded, and a
touched group's scales count whole. Sums are taken in float32 (float64 for float64).
Each function returns its output and the bytes of weights and biases that it read.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moyu.weights.blocks import BLOCK, Blocks


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


def unavailable() -> str | None:
    """Why this back end cannot be used here: never."""
    return None


def unsupported(x: Tensor) -> str | None:
    """Why it cannot serve tensors of x's device and dtype: it serves all."""
    return None


def details() -> str:
    return f"torch {torch.__version__}"


def neurons(
    x: Tensor,
    gate: Tensor | None,
    up: Tensor | None,
    down: Tensor,
    mask: Tensor,
    act: str,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    given: Tensor | None,
) -> tuple[Tensor, int]:
    wide = _wide(x)
    kept = mask.any(0).nonzero()[:, 0]  # (k,)
    read = 0

    def project(weight: Tensor, bias: Tensor | None) -> Tensor:
        nonlocal read
        pieces = weight[kept]  # (k, d)
        read += _bytes(pieces)
        z = x.to(wide) @ pieces.to(wide).T
        if bias is not None:
            read += _bytes(bias[kept])
            z = z + bias[kept].to(wide)
        return z  # (N, k)

    value = torch.ones((), dtype=wide, device=x.device)
    if gate is not None:
        value = ACTIVATIONS[act](project(gate, gate_bias))
    if up is not None:
        u = project(up, up_bias)
        value = ACTIVATIONS[act](u) if gate is None and given is None else value * u
    if given is not None:
        value = value * given[:, kept].to(wide)
    columns_ = down[:, kept]  # (d_out, k)
    read += _bytes(columns_)
    y = _weighted_sum(value, mask[:, kept], columns_.to(wide))
    if down_bias is not None:
        read += _bytes(down_bias)
        y = y + down_bias.to(wide)
    return y.to(x.dtype), read


def rows(x: Tensor, weight: Tensor, mask: Tensor | None, bias: Tensor | None) -> tuple[Tensor, int]:
    wide = _wide(x)
    if mask is None:
        y = x.to(wide) @ weight.to(wide).T  # (N, q)
        if bias is not None:
            y = y + bias.to(wide)
        return y.to(x.dtype), _bytes(weight) + (0 if bias is None else _bytes(bias))
    kept = mask.any(0).nonzero()[:, 0]  # (k,)
    pieces = weight[kept]  # (k, n)
    z = x.to(wide) @ pieces.to(wide).T
    read = _bytes(pieces)
    if bias is not None:
        read += _bytes(bias[kept])
        z = z + bias[kept].to(wide)
    y = x.new_zeros((x.shape[0], weight.shape[0]))
    y[:, kept] = torch.where(mask[:, kept], z, 0.0).to(x.dtype)
    return y, read


def columns(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None) -> tuple[Tensor, int]:
    wide = _wide(x)
    kept = mask.any(0).nonzero()[:, 0]  # (k,)
    pieces = weight[:, kept]  # (q, k)
    read = _bytes(pieces)
    y = _weighted_sum(x[:, kept].to(wide), mask[:, kept], pieces.to(wide))
    if bias is not None:
        read += _bytes(bias)
        y = y + bias.to(wide)
    return y.to(x.dtype), read


def block_neurons(
    x: Tensor,
    gate: Blocks | None,
    up: Blocks | None,
    down: Blocks,
    mask: Tensor,
    act: str,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    given: Tensor | None,
) -> tuple[Tensor, int]:
    wide, kept = _wide(x), int(mask.any(0).sum())
    read = 0

    def project(weight: Blocks, bias: Tensor | None) -> Tensor:
        nonlocal read
        read += kept * (weight.nbytes // weight.shape[0] + (0 if bias is None else bias.element_size()))
        z = _block_product(x, weight)
        return z if bias is None else z + bias.to(wide)

    value = torch.ones((), dtype=wide, device=x.device)
    if gate is not None:
        value = ACTIVATIONS[act](project(gate, gate_bias))
    if up is not None:
        u = project(up, up_bias)
        value = ACTIVATIONS[act](u) if gate is None and given is None else value * u
    if given is not None:
        value = value * given.to(wide)
    y = _block_product(torch.where(mask, value, 0.0), down)
    if down_bias is not None:
        read += _bytes(down_bias)
        y = y + down_bias.to(wide)
    return y.to(x.dtype), read + _column_bytes(down, mask)


def block_rows(x: Tensor, weight: Blocks, mask: Tensor | None, bias: Tensor | None) -> tuple[Tensor, int]:
    y, kept = _block_product(x, weight), weight.shape[0] if mask is None else int(mask.any(0).sum())
    if bias is not None:
        y = y + bias.to(y.dtype)
    each = weight.nbytes // weight.shape[0] + (0 if bias is None else bias.element_size())
    return (y if mask is None else torch.where(mask, y, 0.0)).to(x.dtype), kept * each


def block_columns(x: Tensor, weight: Blocks, mask: Tensor, bias: Tensor | None) -> tuple[Tensor, int]:
    y, read = _block_product(torch.where(mask, x, 0), weight), _column_bytes(weight, mask)
    if bias is not None:
        y, read = y + bias.to(y.dtype), read + _bytes(bias)
    return y.to(x.dtype), read


def rounded(x: Tensor) -> Tensor:
    """x (N, n) as 8 bits and a scale for every 32 values keep it, half to even, float32: d = max |x| / 127 is not rounded."""
    groups = F.pad(x.float(), (0, -x.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    most = groups.abs().amax(2, keepdim=True)
    whole = (groups * torch.where(most == 0, 0.0, 127 / most)).round()
    return (whole * (most / 127)).flatten(1)[:, : x.shape[1]]


def _block_product(x: Tensor, weight: Blocks) -> Tensor:
    wide = _wide(x)
    return rounded(x).to(wide) @ weight.dequantise(torch.float32).to(wide).T


def _column_bytes(weight: Blocks, mask: Tensor) -> int:
    """Of the columns that any row keeps, and of every scale of the groups that they are in."""
    kept = mask.any(0)
    groups = F.pad(kept, (0, -len(kept) % BLOCK)).unflatten(0, (-1, BLOCK)).any(1)
    scales = int(groups.sum()) * weight.shape[0] * weight.scales.element_size()
    return int(kept.sum()) * weight.column_bytes + scales


def _weighted_sum(value: Tensor, mask: Tensor, pieces: Tensor) -> Tensor:
    """sum over the kept k of value[:, k] * pieces[:, k]; value and mask (N, k), pieces (m, k) -> (N, m)."""
    y = torch.where(mask, value, 0.0) @ pieces.T
    # A piece that one row skips and another keeps is in the product as 0 * w: nothing for a finite w, else NaN.
    # Such rows are few and are done again, each with its own pieces alone.
    for row in (~torch.isfinite(y).all(1)).nonzero()[:, 0].tolist():
        own = mask[row]
        y[row] = pieces[:, own] @ value[row, own]
    return y


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
