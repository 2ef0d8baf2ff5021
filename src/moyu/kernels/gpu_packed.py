"""8- and 4-bit weights on a GPU: blocks of 32 neighbours with one float16 scale, unpacked on load and never stored.

A `Packed` matrix is read by whole rows, each skipped or not: outputs of a linear (`rows`), its inputs (`columns`, of a
transposed weight), or neurons (both). 8 bits: q in -127..127, the weight is q * scale (as q8_0). 4 bits: q in 0..15, the weight
is (q - 8) * scale, two neighbours a byte, the first in the low half (as q4_0 but for the order). Sums are float32, in a fixed
order; products of one row are float32 too, those of 2 to 16 rows run on the tensor cores on values rounded to x's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from moyu.kernels import gpu
from moyu.kernels.checks import activation

BLOCK = 32  # weights that share a scale


@dataclass(frozen=True)
class Packed:
    """A matrix (m, n) in blocks along n, a multiple of 32."""

    data: Tensor  # (m, n) int8, or (m, n / 2) uint8
    scales: Tensor  # (m, n / 32) float16

    @property
    def bits(self) -> int:
        """8 or 4."""
        return 8 if self.data.dtype == torch.int8 else 4

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return len(self.data), self.scales.shape[1] * BLOCK

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, scales included."""
        return self.data.shape[1] + self.scales.shape[1] * 2


def pack(weight: Tensor, bits: int) -> Packed:
    """Round a matrix (m, n) to 8 or 4 bits. ValueError for other widths and where n is no multiple of 32."""
    if bits not in (4, 8) or weight.ndim != 2 or weight.shape[1] % BLOCK:
        raise ValueError(
            f"pack takes 4 or 8 bits and rows of a multiple of {BLOCK}, got {bits} and {tuple(weight.shape)}"
        )
    blocks = weight.float().unflatten(1, (-1, BLOCK))  # (m, n / 32, 32)
    if bits == 8:
        scales = blocks.abs().amax(-1, keepdim=True) / 127
        q = (blocks / _nonzero(scales.half())).round().clamp(-127, 127)
        return Packed(q.to(torch.int8).flatten(1), scales.half().squeeze(-1).contiguous())
    extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))  # the largest in magnitude becomes -8
    scales = extreme / -8
    q = (blocks / _nonzero(scales.half()) + 8).round().clamp(0, 15).to(torch.uint8).flatten(1)
    return Packed(q[:, ::2] | q[:, 1::2] << 4, scales.half().squeeze(-1).contiguous())


def unpack(packed: Packed) -> Tensor:
    """What the kernels compute with: (m, n) float32."""
    if packed.bits == 8:
        q = packed.data.float()
    else:
        q = torch.stack([packed.data & 15, packed.data >> 4], -1).flatten(1).float() - 8
    return (q.unflatten(1, (-1, BLOCK)) * packed.scales.float()[:, :, None]).flatten(1)


def _nonzero(scales: Tensor) -> Tensor:
    scales = scales.float()
    return torch.where(scales == 0, 1.0, scales)


def rows(x: Tensor, weight: Packed, mask: Tensor | None = None, *, bias: Tensor | None = None) -> Tensor:
    """``kernels.rows`` with a packed weight (q, n): (N, n) -> (N, q), N up to 16."""
    return _op_rows(x, weight.data, weight.scales, mask, bias)


def columns(x: Tensor, weight: Packed, mask: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """``kernels.columns`` with the transposed weight packed, (n, q), a row an input: (N, n) -> (N, q), N up to 16."""
    return _op_columns(x, weight.data, weight.scales, mask, bias)


def neurons(x: Tensor, gate: Packed | None, up: Packed, down: Packed, mask: Tensor, *, act: str) -> Tensor:
    """``kernels.neurons`` with gate and up packed as (f, d) and down transposed as (f, d_out): (N, d) -> (N, d_out)."""
    none = up.data[:0], up.scales[:0]
    first = none if gate is None else (gate.data, gate.scales)
    return _op_neurons(x, *first, up.data, up.scales, down.data, down.scales, mask, act)


def _check(x: Tensor, width: int) -> None:
    reason = gpu.unavailable() or gpu.unsupported(x)
    if reason is not None:
        raise RuntimeError(f"Packed weights need the gpu back end, which cannot serve this call: {reason}")
    if x.shape[1] != width:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (N, {width})")


def _single(x: Tensor, whole: Packed | None = None) -> ModuleType | None:
    """The kernels for one row, where it is one and a program can hold a row of `whole`."""
    if len(x) != 1:
        return None
    from moyu.kernels import gpu_packed_single

    return None if whole is not None and whole.shape[1] > gpu_packed_single.WIDEST else gpu_packed_single


def _run_rows(x: Tensor, data: Tensor, scales: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
    from moyu.kernels import gpu_packed_programs as programs

    weight = Packed(data, scales)
    _check(x, weight.shape[1])
    if (single := _single(x, weight)) is not None:
        return single.rows(x, weight, mask, bias)
    y = gpu._output(x, len(data), x.dtype)
    programs.project(y, x, None, weight, mask, bias, "identity")
    return y.to(x.dtype)


def _run_columns(x: Tensor, data: Tensor, scales: Tensor, mask: Tensor, bias: Tensor | None) -> Tensor:
    from moyu.kernels import gpu_packed_programs as programs

    _check(x, len(data))
    if (single := _single(x)) is not None:
        return single.columns(x, Packed(data, scales), mask, bias)
    return programs.combine(x, Packed(data, scales), mask, bias, x.dtype)


def _run_neurons(
    x: Tensor, gate: Tensor, gate_scales: Tensor, up: Tensor, up_scales: Tensor, down: Tensor, down_scales: Tensor,
    mask: Tensor, act: str,
) -> Tensor:  # fmt: skip
    from moyu.kernels import gpu_packed_programs as programs

    activation(act)
    second = Packed(up, up_scales)
    _check(x, second.shape[1])
    first, third = Packed(gate, gate_scales) if len(gate) else None, Packed(down, down_scales)
    if (single := _single(x, second)) is not None:
        return single.neurons(x, first, second, third, mask, act)
    value = torch.empty(mask.shape, dtype=torch.float32, device=x.device)
    programs.project(value, x, first, second, mask, None, act)
    return programs.combine(value, third, mask, None, x.dtype)


def _fake_rows(x: Tensor, data: Tensor, scales: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
    return x.new_empty((len(x), len(data)))


def _fake_columns(x: Tensor, data: Tensor, scales: Tensor, mask: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((len(x), scales.shape[1] * BLOCK))


def _fake_neurons(x, gate, gate_scales, up, up_scales, down, down_scales, mask, act):
    return x.new_empty((len(x), down_scales.shape[1] * BLOCK))


_library = torch.library.Library("moyu", "FRAGMENT")
for _definition, _run, _fake in (
    ("packed_rows(Tensor x, Tensor data, Tensor scales, Tensor? mask, Tensor? bias)", _run_rows, _fake_rows),
    ("packed_columns(Tensor x, Tensor data, Tensor scales, Tensor mask, Tensor? bias)", _run_columns, _fake_columns),
    (
        "packed_neurons(Tensor x, Tensor gate, Tensor gate_scales, Tensor up, Tensor up_scales, Tensor down, "
        "Tensor down_scales, Tensor mask, str act)",
        _run_neurons,
        _fake_neurons,
    ),
):
    _library.define(f"{_definition} -> Tensor")
    _name = _definition.partition("(")[0]
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"moyu::{_name}", _fake, lib=_library)

_op_rows = torch.ops.moyu.packed_rows.default
_op_columns = torch.ops.moyu.packed_columns.default
_op_neurons = torch.ops.moyu.packed_neurons.default
