"""What every kernel call must satisfy, in one place and before any pointer is taken; a few µs a call."""

import difflib
from collections.abc import Callable

import torch
from torch import Tensor

from moyu.kernels.backend import Neurons
from moyu.kernels.reference import ACTIVATIONS
from moyu.weights import Plain, Stored
from moyu.weights.format import LIES
from moyu.weights.grouped import Grouped


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The elementwise function of that name in ACTIVATIONS. Raises ValueError that gives the nearest one."""
    if name not in ACTIVATIONS:
        near = difflib.get_close_matches(str(name), ACTIVATIONS, 1, 0.0)[0]
        raise ValueError(f"unknown activation {name!r}; the nearest is {near!r}, of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def check_neurons(call: Neurons) -> None:
    """Raise ValueError (a shape, a stride, a name) or TypeError (a dtype, a device) that says what to do."""
    x, gate, up, down, mask, act, gate_bias, up_bias, down_bias, given = call
    activation(act)
    _matrix("neurons", "x", x)
    if len(down.shape) != 2:
        raise ValueError(f"neurons: down has shape {down.shape}, not two dimensions; flatten it to rows first")
    (n, d), (d_out, f) = x.shape, down.shape
    _combination(gate, up, gate_bias, up_bias, given)
    for name, weight in (("gate", gate), ("up", up)):
        if weight is None:
            continue
        if isinstance(weight.format, Plain) != isinstance(down.format, Plain):
            raise TypeError(
                f"neurons: {name} is in {weight.format} and down in {down.format}; quantise all of them or none"
            )
        _weight("neurons", name, weight, x, (f, d), "rows")
    _weight("neurons", "down", down, x, (d_out, f), "columns")
    _mask("neurons", mask, x, n, f)
    for name, bias, size in (("gate_bias", gate_bias, f), ("up_bias", up_bias, f), ("down_bias", down_bias, d_out)):
        if bias is not None:
            _bias("neurons", name, bias, x, size)
    if given is not None:
        _activations("neurons", "given", given, x, n, f)


def check_linear(op: str, x: Tensor, weight: Stored, mask: Tensor | None, bias: Tensor | None) -> None:
    """As check_neurons, of `rows`, `columns`, `levels` and `words`."""
    _matrix(op, "x", x)
    if len(weight.shape) != 2:
        raise ValueError(f"{op}: weight has shape {weight.shape}, not two dimensions; flatten it to rows first")
    q, n = weight.shape[0], x.shape[1]
    _weight(op, "weight", weight, x, (q, n), {"levels": "planes", "words": "parted"}.get(op, op))
    if mask is not None:
        _mask(op, mask, x, x.shape[0], q if op in ("rows", "words") else n)
    if bias is not None:
        _bias(op, "bias", bias, x, q)


def address(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """The address of a tensor that a kernel reads this much of. ValueError for one of another size or type, or with gaps."""
    if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
        raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {dtype} {shape}, contiguous")
    return tensor.data_ptr()


def check_stored(op: str, name: str, weight: Stored) -> None:
    """Refuse a weight in groups whose tensors are not what its shape says (ValueError): kernels take it at its word."""
    kind = weight.format
    if not isinstance(kind, Grouped):
        return
    for tensor, (shape, dtype) in zip(weight.tensors, kind.tensors_of(weight.shape, weight.order), strict=True):
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ValueError(
                f"{op}: a tensor of {name} is {tensor.dtype} {tuple(tensor.shape)}, but {kind} of {weight.shape} "
                f"that {LIES[weight.order]} has {dtype} {shape}"
            )


def _combination(
    gate: Stored | None,
    up: Stored | None,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    given: Tensor | None,
) -> None:
    if gate is None and (up is None or gate_bias is not None):
        what = "gate_bias without gate" if up is not None else "neither gate nor up"
        raise ValueError(f"neurons: got {what}; pass the weights that compute the neurons' values")
    if up is None and (given is None or up_bias is not None):
        what = "up_bias without up" if given is not None else "gate alone"
        raise ValueError(f"neurons: got {what}; pass up as well, or given (N, f), and up_bias only with up")
    if gate is not None and up is not None and given is not None:
        raise ValueError("neurons: got gate, up and given; given stands for one of the two, leave that one out")


def _matrix(op: str, name: str, tensor: Tensor) -> None:
    if tensor.ndim != 2:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, not two dimensions; flatten it to rows first")
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{op}: {name} is {tensor.dtype}, not floating point")


def _weight(op: str, name: str, weight: Stored, x: Tensor, shape: tuple[int, int], order: str) -> None:
    if weight.shape != shape:
        raise ValueError(f"{op}: {name} has shape {weight.shape}, expected {shape} beside x {tuple(x.shape)}")
    if weight.order != order:
        raise ValueError(f"{op}: {name} {LIES[weight.order]}, and `{order}` are read; use Stored.laid_out({order!r})")
    if isinstance(weight.format, Plain):
        _alike(op, name, weight.tensors[0], x)
        _contiguous(op, name, weight.tensors[0], 1 if order == "rows" else 0)
        return
    if weight.device != x.device:
        raise TypeError(f"{op}: {name} is on {weight.device}, x on {x.device}; move one of them")
    check_stored(op, name, weight)
    for tensor in weight.tensors:
        _contiguous(op, f"a tensor of {name}", tensor, 1)


def _activations(op: str, name: str, values: Tensor, x: Tensor, rows: int, units: int) -> None:
    if values.shape != (rows, units):
        raise ValueError(
            f"{op}: {name} has shape {tuple(values.shape)}, expected {(rows, units)} beside x {tuple(x.shape)}"
        )
    _alike(op, name, values, x)


def _bias(op: str, name: str, bias: Tensor, x: Tensor, size: int) -> None:
    if bias.shape != (size,):
        raise ValueError(f"{op}: {name} has shape {tuple(bias.shape)}, expected {(size,)}")
    _alike(op, name, bias, x)
    _contiguous(op, name, bias, 0)


def _mask(op: str, mask: Tensor, x: Tensor, rows: int, units: int) -> None:
    if mask.shape != (rows, units):
        raise ValueError(f"{op}: mask has shape {tuple(mask.shape)}, expected {(rows, units)}: a row for each row of x")
    if mask.dtype is not torch.bool:
        raise TypeError(f"{op}: mask is {mask.dtype}, expected torch.bool with True = computed; compare scores first")
    if mask.device != x.device:
        raise TypeError(f"{op}: mask is on {mask.device}, x on {x.device}; move it with mask.to(x.device)")


def _alike(op: str, name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.dtype is not x.dtype:
        raise TypeError(f"{op}: {name} is {tensor.dtype}, x is {x.dtype}; convert one, nothing is converted silently")
    if tensor.device != x.device:
        raise TypeError(f"{op}: {name} is on {tensor.device}, x on {x.device}; move one of them")


def _contiguous(op: str, name: str, weight: Tensor, dim: int) -> None:
    if weight.stride(dim) != 1 and weight.shape[dim] > 1:
        layout = "" if weight.ndim == 1 else " (neuron_major for neurons, input_major for columns)"
        raise ValueError(
            f"{op}: {name} has strides {tuple(weight.stride())}, dimension {dim} must have stride 1; "
            f"lay the weight out again{layout}: kernels read weights in place and never copy them"
        )
