"""What every kernel call must satisfy, in one place and before any pointer is taken; a few µs a call."""

import difflib
from collections.abc import Callable

import torch
from torch import Tensor

from moyu.kernels.reference import ACTIVATIONS
from moyu.weights.blocks import Blocks


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The elementwise function of that name in ACTIVATIONS. Raises ValueError that gives the nearest one."""
    if name not in ACTIVATIONS:
        near = difflib.get_close_matches(str(name), ACTIVATIONS, 1, 0.0)[0]
        raise ValueError(f"unknown activation {name!r}; the nearest is {near!r}, of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def check_neurons(
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
) -> None:
    """Raise ValueError (a shape, a stride, a name) or TypeError (a dtype, a device) that says what to do."""
    activation(act)
    _matrix("neurons", "x", x)
    _matrix("neurons", "down", down)
    n, d = x.shape
    d_out, f = down.shape
    _combination(gate, up, gate_bias, up_bias, given)
    if gate is not None:
        _weight("neurons", "gate", gate, x, f, d)
        _contiguous("neurons", "gate", gate, 1)
    if up is not None:
        _weight("neurons", "up", up, x, f, d)
        _contiguous("neurons", "up", up, 1)
    _weight("neurons", "down", down, x, d_out, f)
    _contiguous("neurons", "down", down, 0)
    _rest_of_neurons(x, mask, n, f, d_out, gate_bias, up_bias, down_bias, given)


def check_rows(x: Tensor, weight: Tensor, mask: Tensor | None, bias: Tensor | None) -> None:
    """As check_neurons."""
    _matrix("rows", "x", x)
    _matrix("rows", "weight", weight)
    q = weight.shape[0]
    _weight("rows", "weight", weight, x, q, x.shape[1])
    _contiguous("rows", "weight", weight, 1)
    if mask is not None:
        _mask("rows", mask, x, x.shape[0], q)
    if bias is not None:
        _bias("rows", "bias", bias, x, q)


def check_columns(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None) -> None:
    """As check_neurons."""
    _matrix("columns", "x", x)
    _matrix("columns", "weight", weight)
    n, q = x.shape[1], weight.shape[0]
    _weight("columns", "weight", weight, x, q, n)
    _contiguous("columns", "weight", weight, 0)
    _mask("columns", mask, x, x.shape[0], n)
    if bias is not None:
        _bias("columns", "bias", bias, x, q)


def check_blocks(op: str, name: str, weight: Blocks, x: Tensor, shape: tuple[int, int], order: str) -> None:
    """As check_neurons, of a weight in blocks that is read by rows or by columns."""
    _matrix(op, "x", x)
    if weight.shape != shape:
        raise ValueError(f"{op}: {name} has shape {weight.shape}, expected {shape} beside x {tuple(x.shape)}")
    if weight.order != order:
        raise ValueError(f"{op}: {name} lies by {weight.order}, not by {order}; lay it out with Blocks.in_order")
    if weight.device != x.device:
        raise TypeError(f"{op}: {name} is on {weight.device}, x on {x.device}; move one of them")
    _contiguous(op, f"{name}'s quants", weight.quants, 1)
    _contiguous(op, f"{name}'s scales", weight.scales, 1)


def check_block_linear(op: str, x: Tensor, weight: Blocks, mask: Tensor | None, bias: Tensor | None) -> None:
    """As check_rows and check_columns."""
    _matrix(op, "x", x)
    q, n = weight.shape[0], x.shape[1]
    check_blocks(op, "weight", weight, x, (q, n), op)
    if mask is not None:
        _mask(op, mask, x, x.shape[0], q if op == "rows" else n)
    if bias is not None:
        _bias(op, "bias", bias, x, q)


def check_block_neurons(
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
) -> None:
    """As check_neurons."""
    activation(act)
    _matrix("neurons", "x", x)
    (n, d), (d_out, f) = x.shape, down.shape
    _combination(gate, up, gate_bias, up_bias, given)
    for name, weight in (("gate", gate), ("up", up)):
        if weight is not None:
            check_blocks("neurons", name, weight, x, (f, d), "rows")
    check_blocks("neurons", "down", down, x, (d_out, f), "columns")
    _rest_of_neurons(x, mask, n, f, d_out, gate_bias, up_bias, down_bias, given)


def _combination(
    gate: Tensor | Blocks | None,
    up: Tensor | Blocks | None,
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


def _rest_of_neurons(
    x: Tensor,
    mask: Tensor,
    n: int,
    f: int,
    d_out: int,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    given: Tensor | None,
) -> None:
    _mask("neurons", mask, x, n, f)
    if gate_bias is not None:
        _bias("neurons", "gate_bias", gate_bias, x, f)
    if up_bias is not None:
        _bias("neurons", "up_bias", up_bias, x, f)
    if down_bias is not None:
        _bias("neurons", "down_bias", down_bias, x, d_out)
    if given is not None:
        _weight("neurons", "given", given, x, n, f)


def _matrix(op: str, name: str, tensor: Tensor) -> None:
    if tensor.ndim != 2:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, not two dimensions; flatten it to rows first")
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{op}: {name} is {tensor.dtype}, not floating point")


def _weight(op: str, name: str, weight: Tensor, x: Tensor, rows: int, columns: int) -> None:
    shape = weight.shape
    if len(shape) != 2 or shape[0] != rows or shape[1] != columns:
        raise ValueError(f"{op}: {name} has shape {tuple(shape)}, expected {(rows, columns)} beside x {tuple(x.shape)}")
    _alike(op, name, weight, x)


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
