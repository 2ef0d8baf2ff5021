"""Kernels that read only the weights that a mask keeps: whole neurons, rows, or columns.

The three are ``torch.library`` operators (``torch.ops.moyu.neurons``, ``rows``, ``columns``) with fake implementations,
and these thin functions are in front. Any number of rows N is correct; speed is for small decode batches: all rows that
keep a piece of weight use it while it is in the cache, so it is read once (once per 32 rows in the ``cpu`` back end).

Weights are tensors of x's dtype, or ``Blocks`` (Q8_0, Q4_0), which ``reference`` and ``cpu`` take: x is then rounded to 8 bits,
a scale for every 32 values, products are sums of integers, and the operators are ``block_neurons``, ``block_rows``, ``block_columns``.

Back ends: ``reference`` (plain torch, defines the meaning), ``cpu`` (C++) and ``gpu`` (Triton). ``use("cpu")`` insists on
one, ``auto`` takes the device's own for tensors of a dtype it has where it can be used, else ``reference``; ``describe()``
says which.
"""

import contextlib
import difflib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from moyu.kernels import cpu, gpu, reference
from moyu.kernels.checks import (
    activation,
    check_block_linear,
    check_block_neurons,
    check_columns,
    check_neurons,
    check_rows,
)
from moyu.kernels.cpu import ReadCeiling
from moyu.kernels.dense import helps as product_helps
from moyu.kernels.dense import product
from moyu.kernels.reference import ACTIVATIONS
from moyu.weights.blocks import BLOCK, Blocks, Kind, Order

__all__ = [
    "ACTIVATIONS",
    "Backend",
    "ByteCounter",
    "ReadCeiling",
    "activation",
    "available",
    "columns",
    "columns_above",
    "count_bytes",
    "describe",
    "neurons",
    "product",
    "product_helps",
    "require",
    "rows",
    "serves",
    "use",
]

Backend = Literal["auto", "reference", "cpu", "gpu"]

# A back end: one module and one entry.
_BACKENDS: dict[str, ModuleType] = {"reference": reference, "cpu": cpu, "gpu": gpu}

_asked: ContextVar[str] = ContextVar("moyu_backend", default="auto")
_counter: ContextVar["ByteCounter | None"] = ContextVar("moyu_byte_counter", default=None)


def neurons(
    x: Tensor,
    gate: Tensor | Blocks | None,
    up: Tensor | Blocks | None,
    down: Tensor | Blocks,
    mask: Tensor,
    *,
    act: str,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    given: Tensor | None = None,
) -> Tensor:
    """The feed-forward network of the kept neurons: ``y = sum over kept j of value_j * down[:, j] + down_bias``.

    =============  ==================================================  ==================================
    passed         value of neuron j                                   for
    =============  ==================================================  ==================================
    gate, up       act(gate_j · x + gate_bias_j) * (up_j · x + up_bias_j)  gated feed-forward networks
    up             act(up_j · x + up_bias_j)                           plain ones
    up, given      given_j * (up_j · x + up_bias_j)                    gate computed first (CATS)
    gate, given    act(gate_j · x + gate_bias_j) * given_j             up computed first (COUNTDOWN)
    =============  ==================================================  ==================================

    Args:
        x: (N, d).
        gate: (f, d) or None, ``stride(1) == 1``, any row stride.
        up: (f, d) or None, ``stride(1) == 1``, any row stride.
        down: (d_out, f), ``stride(0) == 1``, any column stride. Fastest is the layout ``neuron_major``: gate, up and
            down are views of one storage (f, k, d), so that what a neuron needs is side by side. Or all of them are blocks,
            gate and up by rows and down by columns.
        mask: (N, f) bool, True = computed. The weights of neurons that no row keeps are not read.
        act: a name in ``ACTIVATIONS``.
        gate_bias, up_bias: (f,) or None.
        down_bias: (d_out,) or None; always added.
        given: (N, f) or None, the factor that the caller has already computed; skipped entries are ignored.

    Returns:
        (N, d_out) in x's dtype, contiguous; sums are taken in float32 (float64 for float64).

    Raises:
        ValueError: a shape, stride, combination or activation that does not fit.
        TypeError: dtypes or devices that differ (all floating tensors share x's), a mask that is not bool.
    """
    if isinstance(down, Blocks):
        weights = [_opened(down), *(_opened(w) if isinstance(w, Blocks) else (None, None, "", 0) for w in (gate, up))]
        if any(isinstance(w, Tensor) for w in (gate, up)):
            raise TypeError("neurons: down is in blocks and gate or up is not; quantise all of them or none")
        (down_, gate_, up_) = weights
        rest = (mask, act, gate_bias, up_bias, down_bias, given)
        return _op_block_neurons(x, *gate_[:3], *up_[:3], *down_, *rest)
    return _op_neurons(x, gate, up, down, mask, act, gate_bias, up_bias, down_bias, given)


def rows(x: Tensor, weight: Tensor | Blocks, mask: Tensor | None = None, *, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` where the mask keeps an output; skipped outputs are exactly 0, without bias.

    Args:
        x: (N, n).
        weight: (q, n), ``stride(1) == 1``, any row stride; or blocks by rows.
        mask: (N, q) bool, True = computed, or None = all.
        bias: (q,) or None.

    Returns:
        (N, q) in x's dtype, contiguous; sums are taken in float32 (float64 for float64).

    Raises:
        ValueError, TypeError: as ``neurons``.
    """
    if isinstance(weight, Blocks):
        return _op_block_rows(x, *_opened(weight), mask, bias)
    return _op_rows(x, weight, mask, bias)


def columns(x: Tensor, weight: Tensor | Blocks, mask: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """``sum over kept i of x_i * weight[:, i] + bias``: skipped inputs count as 0, their columns are not read.

    Args:
        x: (N, n).
        weight: (q, n), ``stride(0) == 1`` (layout ``input_major``: weight.T is contiguous), any column stride; or blocks by
            columns.
        mask: (N, n) bool, True = used.
        bias: (q,) or None.

    Returns:
        (N, q) in x's dtype, contiguous; sums are taken in float32 (float64 for float64).

    Raises:
        ValueError, TypeError: as ``neurons``.
    """
    if isinstance(weight, Blocks):
        return _op_block_columns(x, *_opened(weight), mask, bias)
    return _op_columns(x, weight, mask, bias)


def columns_above(x: Tensor, weight: Tensor, thresholds: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """`columns` where |x_i| > thresholds[o] decides whether output o uses input i; decided on load by ``gpu``.

    Projections that share an input can lie side by side in one weight, each with a threshold of its own.

    Args:
        x: (N, n).
        weight: (q, n), ``stride(0) == 1``, any column stride.
        thresholds: (q,) float32, the same for 256 outputs in a row at least; values are compared in x's dtype.
        bias: (q,) or None.

    Returns:
        (N, q) in x's dtype, contiguous.
    """
    return _op_columns_above(x, weight, thresholds, bias)


def available() -> dict[str, str | None]:
    """Each back end's name -> None where it can be used here, else the reason and the remedy."""
    return {name: module.unavailable() for name, module in _BACKENDS.items()}


def serves(x: Tensor) -> bool:
    """Whether a call with x would run on kernels rather than on the reference."""
    return _choose(x) is not reference


def require(backend: Backend) -> None:
    """Raise ValueError for an unknown name, RuntimeError with the remedy for a back end that cannot be used here."""
    if backend == "auto":
        return
    reasons = available()
    if backend not in reasons:
        near = difflib.get_close_matches(str(backend), ["auto", *reasons], 1, 0.0)[0]
        raise ValueError(f"unknown back end {backend!r}; the nearest is {near!r}, of auto, {', '.join(reasons)}")
    if reasons[backend] is not None:
        raise RuntimeError(f"The {backend} back end was asked for but is not available: {reasons[backend]}")


@contextlib.contextmanager
def use(backend: Backend) -> Iterator[None]:
    """Run the kernels inside on this back end. Holds for this thread (or task) only; a new thread starts on auto.

    Raises what ``require`` raises; calls inside raise RuntimeError for tensors that the back end cannot serve.
    """
    require(backend)
    token = _asked.set(backend)
    try:
        yield
    finally:
        _asked.reset(token)


def describe(device: torch.device | str = "cpu") -> str:
    """What runs now for bfloat16 on a device, for example ``auto: cpu (avx512, 2 threads)``; for records."""
    asked = _asked.get()
    module = _choose(torch.empty(0, 0, dtype=torch.bfloat16, device=device))
    name = next(name for name, candidate in _BACKENDS.items() if candidate is module)
    on_cpu = torch.device(device).type == "cpu"
    reason = cpu.unavailable() if name != "cpu" and asked == "auto" and on_cpu else None
    return f"{asked}: {name} ({module.details()})" + (f"; not cpu: {reason}" if reason else "")


@dataclass
class ByteCounter:
    """Bytes of weights and biases that the kernels read: a piece once for all the rows that share one reading of it."""

    by_op: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.by_op.values())


@contextlib.contextmanager
def count_bytes() -> Iterator[ByteCounter]:
    """Count what the kernels inside read, as the back end itself adds it up; this thread only. The innermost counts."""
    counter = ByteCounter()
    token = _counter.set(counter)
    try:
        yield counter
    finally:
        _counter.reset(token)


def _choose_for_blocks(x: Tensor) -> ModuleType:
    module = _choose(x)
    if module is gpu and _asked.get() == "gpu":
        raise RuntimeError("The gpu back end was asked for but takes no weights in blocks; use('auto') would")
    return reference if module is gpu else module


def _choose(x: Tensor) -> ModuleType:
    asked = _asked.get()
    if asked == "auto":
        if x.device.type == "cuda":
            return gpu if (gpu.unavailable() or gpu.unsupported(x)) is None else reference
        if cpu.unavailable() is None:
            return cpu if cpu.unsupported(x) is None else reference
        if cpu.forced():
            raise RuntimeError(f"The cpu kernels were configured but are not available: {cpu.unavailable()}")
        return reference
    module = _BACKENDS[asked]
    reason = module.unsupported(x)
    if reason is not None:
        raise RuntimeError(
            f"The {asked} back end was asked for but cannot serve this call: {reason}; use('auto') would"
        )
    return module


def count(op: str, read: int | Callable[[], int]) -> None:
    """Tell the counter of this thread, if there is one, that `op` has read so many bytes, or what it takes to find out."""
    counter = _counter.get()
    if counter is not None:
        counter.by_op[op] = counter.by_op.get(op, 0) + (read if isinstance(read, int) else read())


def _finish(op: str, result: tuple[Tensor, int | Callable[[], int]]) -> Tensor:
    count(op, result[1])
    return result[0]


# define and impl rather than torch.library.custom_op: 2 instead of 4 µs a call on top of the function itself.
_library = torch.library.Library("moyu", "DEF")
_library.define(
    "neurons(Tensor x, Tensor? gate, Tensor? up, Tensor down, Tensor mask, str act, Tensor? gate_bias=None, "
    "Tensor? up_bias=None, Tensor? down_bias=None, Tensor? given=None) -> Tensor"
)
_library.define("rows(Tensor x, Tensor weight, Tensor? mask=None, Tensor? bias=None) -> Tensor")
_library.define("columns(Tensor x, Tensor weight, Tensor mask, Tensor? bias=None) -> Tensor")
_library.define("columns_above(Tensor x, Tensor weight, Tensor thresholds, Tensor? bias=None) -> Tensor")


_library.define(
    "block_neurons(Tensor x, Tensor? gate, Tensor? gate_scales, str gate_kind, Tensor? up, Tensor? up_scales, str up_kind, "
    "Tensor down, Tensor down_scales, str down_kind, int outputs, str order, int inputs, Tensor mask, str act, Tensor? gate_bias=None, "
    "Tensor? up_bias=None, Tensor? down_bias=None, Tensor? given=None) -> Tensor"
)
for _name in ("rows", "columns"):
    _library.define(
        f"block_{_name}(Tensor x, Tensor quants, Tensor scales, str kind, int outputs, str order, int inputs, "
        "Tensor? mask=None, Tensor? bias=None) -> Tensor"
    )


def _opened(weight: Blocks) -> tuple[Tensor, Tensor, Kind, int, Order, int]:
    return weight.quants, weight.scales, weight.kind, weight.outputs, weight.order, weight.shape[1]


def _neuron_blocks(
    x, gate, gate_scales, gate_kind, up, up_scales, up_kind, down, down_scales, down_kind, outputs, order, inputs
):
    def by_rows(quants: Tensor | None, scales: Tensor | None, kind: Kind) -> Blocks | None:
        if quants is None or scales is None:
            return None
        width = x.shape[1] if scales.shape[1] == -(-x.shape[1] // BLOCK) else None  # None: too many, or too few
        return Blocks(kind, quants, scales, len(quants), inputs=width)

    opened = by_rows(gate, gate_scales, gate_kind), by_rows(up, up_scales, up_kind)
    return x, *opened, Blocks(down_kind, down, down_scales, outputs, order, inputs)


def _run_block_neurons(*args):
    passed = (*_neuron_blocks(*args[:13]), *args[13:15], *(args[15:] + (None,) * (19 - len(args))))
    check_block_neurons(*passed)
    return _finish("neurons", _choose_for_blocks(passed[0]).block_neurons(*passed))


def _run_block_rows(x, quants, scales, kind, outputs, order, inputs, mask=None, bias=None):
    weight = Blocks(kind, quants, scales, outputs, order, inputs)
    check_block_linear("rows", x, weight, mask, bias)
    return _finish("rows", _choose_for_blocks(x).block_rows(x, weight, mask, bias))


def _run_block_columns(x, quants, scales, kind, outputs, order, inputs, mask=None, bias=None):
    weight = Blocks(kind, quants, scales, outputs, order, inputs)
    check_block_linear("columns", x, weight, mask, bias)
    return _finish("columns", _choose_for_blocks(x).block_columns(x, weight, mask, bias))


def _fake_block_neurons(x, gate, gs, gk, up, us, uk, down, ds, dk, outputs, *rest):
    return x.new_empty((x.shape[0], outputs))


def _fake_block_linear(x, quants, scales, kind, outputs, *rest):
    return x.new_empty((x.shape[0], outputs))


def _run_neurons(x, gate, up, down, mask, act, gate_bias=None, up_bias=None, down_bias=None, given=None):
    args = (x, gate, up, down, mask, act, gate_bias, up_bias, down_bias, given)
    check_neurons(*args)
    return _finish("neurons", _choose(x).neurons(*args))


def _run_rows(x, weight, mask=None, bias=None):
    check_rows(x, weight, mask, bias)
    return _finish("rows", _choose(x).rows(x, weight, mask, bias))


def _run_columns(x, weight, mask, bias=None):
    check_columns(x, weight, mask, bias)
    return _finish("columns", _choose(x).columns(x, weight, mask, bias))


def _run_columns_above(x, weight, thresholds, bias=None):
    if _choose(x) is gpu:
        return gpu.columns_above(x, weight, thresholds, bias)
    values, sizes = (t.tolist() for t in torch.unique_consecutive(thresholds.to(x.dtype), return_counts=True))
    parts, biases = weight.split(sizes), [None] * len(sizes) if bias is None else bias.split(sizes)
    done = (columns(x, w, x.abs() > t, bias=b) for w, t, b in zip(parts, values, biases, strict=True))
    return torch.cat(list(done), dim=1)


def _fake_neurons(x, gate, up, down, mask, act, gate_bias=None, up_bias=None, down_bias=None, given=None):
    check_neurons(x, gate, up, down, mask, act, gate_bias, up_bias, down_bias, given)
    return x.new_empty((x.shape[0], down.shape[0]))


def _fake_rows(x, weight, mask=None, bias=None):
    check_rows(x, weight, mask, bias)
    return x.new_empty((x.shape[0], weight.shape[0]))


def _fake_columns(x, weight, mask, bias=None):
    check_columns(x, weight, mask, bias)
    return x.new_empty((x.shape[0], weight.shape[0]))


def _fake_columns_above(x, weight, thresholds, bias=None):
    return x.new_empty((x.shape[0], weight.shape[0]))


for _name, _run, _fake in (
    ("neurons", _run_neurons, _fake_neurons),
    ("rows", _run_rows, _fake_rows),
    ("columns", _run_columns, _fake_columns),
    ("columns_above", _run_columns_above, _fake_columns_above),
    ("block_neurons", _run_block_neurons, _fake_block_neurons),
    ("block_rows", _run_block_rows, _fake_block_linear),
    ("block_columns", _run_block_columns, _fake_block_linear),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"moyu::{_name}", _fake, lib=_library)

_op_neurons = torch.ops.moyu.neurons.default
_op_rows = torch.ops.moyu.rows.default
_op_columns = torch.ops.moyu.columns.default
_op_columns_above = torch.ops.moyu.columns_above.default
_op_block_neurons = torch.ops.moyu.block_neurons.default
_op_block_rows = torch.ops.moyu.block_rows.default
_op_block_columns = torch.ops.moyu.block_columns.default
