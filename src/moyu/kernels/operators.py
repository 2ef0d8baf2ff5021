"""The products as ``torch.library`` operators, so that torch.compile and fake tensors see them.

An operator takes a weight as its tensors, the name of its format and its shape; an absent weight has no tensors. Order follows
from the operator: `rows`, and gate and up of `neurons`, read rows; `columns` and down read columns; `levels` reads planes; `words`
reads parted weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moyu.kernels import choosing, gpu
from moyu.kernels.backend import Neurons, Read
from moyu.kernels.checks import check_linear, check_neurons
from moyu.kernels.gpu import Gpu
from moyu.weights import Order, Stored, held, named
from moyu.weights.format import LIES

Opened = tuple[Sequence[Tensor], str, Sequence[int]]

_WEIGHT = "Tensor[] {0}, str {0}_format, int[] {0}_shape"
# define and impl rather than torch.library.custom_op: 2 instead of 4 µs a call on top of the function itself.
_library = torch.library.Library("moyu", "DEF")
_library.define(
    f"neurons(Tensor x, {_WEIGHT.format('gate')}, {_WEIGHT.format('up')}, {_WEIGHT.format('down')}, Tensor mask, str act, "
    "Tensor? gate_bias=None, Tensor? up_bias=None, Tensor? down_bias=None, Tensor? given=None) -> Tensor"
)
_library.define(f"rows(Tensor x, {_WEIGHT.format('weight')}, Tensor? mask=None, Tensor? bias=None) -> Tensor")
_library.define(f"columns(Tensor x, {_WEIGHT.format('weight')}, Tensor mask, Tensor? bias=None) -> Tensor")
_library.define(f"levels(Tensor x, {_WEIGHT.format('weight')}, Tensor mask, Tensor? bias=None) -> Tensor")
_library.define(f"words(Tensor x, {_WEIGHT.format('weight')}, Tensor? mask=None, Tensor? bias=None) -> Tensor")
_library.define("columns_above(Tensor x, Tensor weight, Tensor thresholds, Tensor? bias=None) -> Tensor")


def opened(op: str, name: str, weight: Tensor | Stored | None, order: Order) -> Opened:
    """A weight as an operator takes it. ValueError for one that is stored in another order."""
    if weight is None:
        return [], "", []
    stored = weight if isinstance(weight, Stored) else held(weight, order)
    if stored.order != order:
        raise ValueError(f"{op}: {name} {LIES[stored.order]}, and `{order}` are read; use Stored.laid_out({order!r})")
    return stored.tensors, stored.format.name, stored.shape


def _closed(tensors: Sequence[Tensor], format: str, shape: Sequence[int], order: Order) -> Stored:
    return Stored(named(format), order, tuple(tensors), tuple(shape))  # pyright: ignore[reportArgumentType]


def _finish(op: str, result: tuple[Tensor, Read]) -> Tensor:
    choosing.count(op, result[1])
    return result[0]


def _neurons(x, g, g_format, g_shape, u, u_format, u_shape, d, d_format, d_shape, mask, act, *rest):
    gate = _closed(g, g_format, g_shape, "rows") if g else None
    up = _closed(u, u_format, u_shape, "rows") if u else None
    down = _closed(d, d_format, d_shape, "columns")
    if down is None:
        raise ValueError("neurons: down has no tensors")
    call = Neurons(x, gate, up, down, mask, act, *rest)
    check_neurons(call)
    return call


def _run_neurons(*args):
    call = _neurons(*args)
    formats = {w.format.name: w.format for w in (call.gate, call.up, call.down) if w is not None}
    backends = [choosing.choose("neurons", f, call.x) for f in formats.values()]
    # Where formats differ and some back end lacks one of them, the one that comes last in the list serves all.
    backend = max(backends, key=list(choosing.BACKENDS.values()).index)
    return _finish("neurons", backend.neurons(call))


def _fake_neurons(*args):
    call = _neurons(*args)
    return call.x.new_empty((call.x.shape[0], call.down.shape[0]))


def _linear(order: Order, x, tensors, format, shape, mask: Any = None, bias=None):
    weight = _closed(tensors, format, shape, order)
    check_linear({"planes": "levels", "parted": "words"}.get(order, order), x, weight, mask, bias)
    return x, weight, mask, bias


def _product(op: str, order: Order) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """What an operator on one weight runs, and what it gives for fake tensors."""

    def run(*args):
        x, weight, mask, bias = _linear(order, *args)
        return _finish(op, getattr(choosing.choose(op, weight.format, x), op)(x, weight, mask, bias))

    def fake(*args):
        x, weight, _, _ = _linear(order, *args)
        return x.new_empty((x.shape[0], weight.shape[0]))

    return run, fake


def _run_columns_above(x, weight, thresholds, bias=None):
    if isinstance(choosing.choose("columns", held(weight, "columns").format, x), Gpu):
        return gpu.columns_above(x, weight, thresholds, bias)
    values, sizes = (t.tolist() for t in torch.unique_consecutive(thresholds.to(x.dtype), return_counts=True))
    parts, biases = weight.split(sizes), [None] * len(sizes) if bias is None else bias.split(sizes)
    done = (
        columns(x, *opened("columns_above", "weight", w, "columns"), x.abs() > t, b)
        for w, t, b in zip(parts, values, biases, strict=True)
    )
    return torch.cat(list(done), dim=1)


def _fake_columns_above(x, weight, thresholds, bias=None):
    return x.new_empty((x.shape[0], weight.shape[0]))


for _name, _run, _fake in (
    ("neurons", _run_neurons, _fake_neurons),
    ("rows", *_product("rows", "rows")),
    ("columns", *_product("columns", "columns")),
    ("levels", *_product("levels", "planes")),
    ("words", *_product("words", "parted")),
    ("columns_above", _run_columns_above, _fake_columns_above),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"moyu::{_name}", _fake, lib=_library)

neurons = torch.ops.moyu.neurons.default
rows = torch.ops.moyu.rows.default
columns = torch.ops.moyu.columns.default
levels = torch.ops.moyu.levels.default
words = torch.ops.moyu.words.default
columns_above = torch.ops.moyu.columns_above.default
