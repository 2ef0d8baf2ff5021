"""The Triton kernels: float32, bfloat16 and float16 on a GPU, 1 to 16 rows with a selection each.

`many` and `single` read plain weights, `packed` the formats `packed8` and `packed4`,
`blocks` rows in formats of GGUF files, `planes` levels of them. Triton is imported at the first call.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moyu.kernels.backend import Backend, Neurons, Read, levels_read, words_read
from moyu.kernels.gpu import packed
from moyu.kernels.gpu.common import INTERPRETED, KINDS, tickets, unavailable, unsupported
from moyu.kernels.reference import ACTIVATIONS, Reference
from moyu.weights import Format, Plain, Stored
from moyu.weights.grouped import Grouped
from moyu.weights.packed import Packed
from moyu.weights.planes import OUTPUTS, SPLITS

__all__ = ["INTERPRETED", "Gpu", "columns_above", "reserve", "unavailable", "unread", "unsupported"]

ONE_ROW_WIDEST = 8192  # of d: x and a whole row of gate and up live in the registers of a program of `single`


class Gpu(Backend):
    """The Triton kernels."""

    name = "gpu"

    def why_not(self) -> str | None:
        return unavailable()

    def supports(self, op: str, format: Format, x: Tensor) -> str | None:
        by_rows = op in ("rows", "levels", "words") and format.name in KINDS
        if not isinstance(format, Plain | Packed) and not by_rows:
            return f"it has no kernels for {op} of weights in {format.name}"
        return unsupported(x)

    def details(self) -> str:
        return "interpreted" if INTERPRETED else torch.cuda.get_device_name()

    def rows(
        self, x: Tensor, weight: Stored, mask: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Callable[[], int]]:
        from moyu.kernels.gpu import blocks, many

        if isinstance(weight.format, Plain):
            y = many.rows(x, weight.tensors[0], mask, bias)
        elif weight.format.name in KINDS:
            y = blocks.rows(x, weight, mask, bias)
        else:
            y = packed.rows(x, weight, mask, bias)
        each = weight.row_bytes + (0 if bias is None else bias.element_size())
        return y, lambda: (weight.shape[0] if mask is None else _kept(mask)) * each

    def levels(self, x: Tensor, weight: Stored, mask: Tensor, bias: Tensor | None) -> tuple[Tensor, Read]:
        from moyu.kernels.gpu import planes

        if not planes.served(weight):
            return Reference().levels(x, weight, mask, bias)
        y = planes.levels(x, weight, mask, bias)
        return y, lambda: levels_read(weight, mask) + (0 if bias is None else bias.nbytes)

    def words(self, x: Tensor, weight: Stored, mask: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Read]:
        from moyu.kernels.gpu import blocks

        if not blocks.parted(weight):
            return Reference().words(x, weight, mask, bias)
        every = x.new_ones(len(x), weight.shape[0], dtype=torch.bool) if mask is None else mask
        y = blocks.words(x, weight, every, bias)
        return y, lambda: words_read(weight, mask) + (0 if bias is None else bias.nbytes)

    def columns(self, x: Tensor, weight: Stored, mask: Tensor, bias: Tensor | None) -> tuple[Tensor, Callable[[], int]]:
        from moyu.kernels.gpu import many, single

        if not isinstance(weight.format, Plain):
            y = packed.columns(x, weight, mask, bias, x.dtype)
        elif len(x) == 1:
            y = single.columns(x, weight.tensors[0], mask, bias)
        else:
            y = many.combine(x, weight.tensors[0], mask, bias, x.dtype)
        return y, lambda: _kept(mask) * weight.column_bytes + (0 if bias is None else bias.nbytes)

    def neurons(self, call: Neurons) -> tuple[Tensor, Callable[[], int]]:
        from moyu.kernels.gpu import many, single

        x, gate, up, down, mask, act, gate_bias, up_bias, down_bias, given = call
        parts, biases = [w for w in (gate, up) if w is not None], [b for b in (gate_bias, up_bias) if b is not None]
        each = sum(w.row_bytes for w in parts) + down.column_bytes + sum(b.element_size() for b in biases)
        fixed = 0 if down_bias is None else down_bias.nbytes
        if isinstance(down.format, Plain):
            kernel = single if len(x) == 1 and x.shape[1] <= ONE_ROW_WIDEST else many
            first, second = (None if w is None else w.tensors[0] for w in (gate, up))
            y = kernel.neurons(x, first, second, down.tensors[0], mask, act, gate_bias, up_bias, down_bias, given)
        elif up is not None and not biases and down_bias is None and given is None:
            y = packed.neurons(x, gate, up, down, mask, act)
        else:
            y = _neurons_in_parts(*call)
        return y, lambda: _kept(mask) * each + fixed


def _neurons_in_parts(x, gate, up, down, mask, act, gate_bias, up_bias, down_bias, given) -> Tensor:
    """`neurons` of packed weights as products by rows, then one by columns; values are rounded to x's dtype in between."""
    value = torch.ones((), dtype=x.dtype, device=x.device)
    if gate is not None:
        value = ACTIVATIONS[act](packed.rows(x, gate, mask, gate_bias))
    if up is not None:
        u = packed.rows(x, up, mask, up_bias)
        value = ACTIVATIONS[act](u) if gate is None and given is None else value * u
    value = value if given is None else value * given
    return packed.columns(value, down, mask, down_bias, x.dtype)


def columns_above(x: Tensor, weight: Tensor, thresholds: Tensor, bias: Tensor | None) -> Tensor:
    """`columns` with the mask |x_i| > thresholds[o] decided on load, (N, n) -> (N, q) in x's dtype.

    thresholds: (q,) float32, one value for every 256 outputs at least: projections that share an input lie side by side in
    one weight, each with its own. Values and thresholds are compared in x's dtype, as `selection.select` does.
    """
    from moyu.kernels.gpu import many, single

    if len(x) == 1:
        return single.columns_above(x, weight, thresholds, bias)
    return many.combine(x, weight, None, bias, x.dtype, thresholds.to(x.dtype))


def unread(format: Format, skips: str, outputs: int) -> str | None:
    """Why no kernel reads first and further bits of a weight apart, where a site skips further ones; None = one does."""
    if skips == "words":
        fits = not isinstance(format, Grouped) or SPLITS[format.bits][0] == 4
        return None if fits else f"the first bits of words in {format.name}"
    return None if outputs % OUTPUTS == 0 else f"planes of {outputs} outputs, which are no whole tiles of {OUTPUTS}"


def reserve(device: torch.device) -> None:
    """Make what calls on this device share, before a CUDA graph is captured: the graph's own memory may not hold it."""
    tickets(device)


def _kept(mask: Tensor) -> int:
    """Pieces that are read; waits for the device."""
    return int(mask.any(0).sum())
