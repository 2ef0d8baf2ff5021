"""Calls of modules that the probe observed, and which of them are linears."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import all_reduce
from torch.distributed.tensor import DTensor, Shard
from transformers.pytorch_utils import Conv1D

from moyu.model.anatomy import Piece, is_foreign
from moyu.model.quantised import QuantisedLinear


@dataclass(eq=False)
class Call:
    """One call of a module during the probe: what went in and what came out."""

    name: str
    module: nn.Module
    inputs: tuple
    output: Any
    named: tuple[str, ...] = ()  # names of the last inputs, which were given by keyword

    def again(self) -> Any:
        """Call the module once more with the same inputs."""
        count = len(self.inputs) - len(self.named)
        return self.module(*self.inputs[:count], **dict(zip(self.named, self.inputs[count:], strict=True)))

    @property
    def x(self) -> Tensor:
        return self.inputs[0]

    @property
    def y(self) -> Tensor:
        return self.output

    def piece(self, rows: slice = slice(None)) -> Piece:
        return Piece(self.module, transposed=isinstance(self.module, Conv1D), rows=rows)


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes x @ W.T + b, with a weight that kernels can read."""
    return type(module) in (nn.Linear, Conv1D, QuantisedLinear) and _is_plain(module)


def _is_plain(module: nn.Module) -> bool:
    return (isinstance(module, QuantisedLinear) or type(module.weight) is nn.Parameter) and _is_alone(module)


def _is_alone(module: nn.Module) -> bool:
    return "forward" not in vars(module) and not module._forward_hooks and not module._forward_pre_hooks


def _adds_up(call: Call) -> bool:
    """Whether a linear with a foreign quantised weight is linear: f(a + b) = f(a) + f(b) - f(0), for inputs split in two.

    The tolerance is wide because a quantiser may round activations too.
    """
    module, x = call.module, call.x.detach()
    kept = torch.arange(x.shape[-1], device=x.device) % 2 == 0
    apart = module(torch.where(kept, x, 0)) + module(torch.where(kept, 0, x)) - module(torch.zeros_like(x))
    return apart.shape == call.y.shape and discrepancy(call.y, apart) <= 2e-2


def is_spread(module: nn.Module) -> bool:
    """Whether a linear's weight is spread over the processes of a mesh by rows or columns, with a forward of its own."""
    weight = getattr(module, "weight", None)
    if type(module) is not nn.Linear or not isinstance(weight, DTensor) or weight.device_mesh.ndim != 1:
        return False
    hooked = module._forward_hooks or module._forward_pre_hooks
    return type(weight.placements[0]) is Shard and "forward" in vars(module) and not hooked


def _spread_product(module: nn.Linear, x: Tensor) -> Tensor:
    """x @ W.T + b of a spread linear: this process' part of the outputs; all outputs if x is this process' part."""
    weight, bias = module.weight, module.bias
    assert isinstance(weight, DTensor)
    own = None if bias is None else bias.to_local() if isinstance(bias, DTensor) else bias
    if weight.placements[0].is_shard(0):
        return nn.functional.linear(x, weight.to_local(), own)
    y = nn.functional.linear(x, weight.to_local())
    all_reduce(y, group=weight.device_mesh.get_group())
    return y if own is None else y + own


def obstacle(calls: list[Call]) -> str | None:
    """Why MOYU cannot use some linears among the calls: how their weights are stored, or the hooks around them; else None."""
    linears = [c.module for c in calls if isinstance(c.module, (nn.Linear, Conv1D)) and not is_linear_call(c)]
    linears = [m for m in linears if not _is_plain(m)]
    kinds = sorted({type(m.weight).__name__ for m in linears if type(m.weight) is not nn.Parameter})
    if kinds:
        return f"the weights of its linears are {', '.join(kinds)}, which the kernels cannot read; load the model with plain weights"
    if linears:
        return "its linears run inside hooks, for example because a device_map offloads them; load the model onto one device"
    return None


def is_linear_call(call: Call) -> bool:
    """Whether a call is of a linear. A subclass of Linear counts if its output was x @ W.T + b in numbers."""
    module = call.module
    if not call.inputs or not isinstance(call.inputs[0], Tensor) or not isinstance(call.output, Tensor):
        return False
    if is_linear(module):
        return True
    if type(module) is nn.Linear and is_foreign(module.weight):
        return _is_alone(module) and _adds_up(call)
    if is_spread(module):
        expected = _spread_product(module, call.x)  # pyright: ignore[reportArgumentType]
        return expected.shape == call.y.shape and close(call.y, expected)
    if not isinstance(module, nn.Linear) or not _is_plain(module) or module.weight.dim() != 2:
        return False
    if call.x.shape[-1] != module.weight.shape[1] or call.x.dtype != module.weight.dtype:
        return False
    expected = nn.functional.linear(call.x, module.weight, module.bias)
    return expected.shape == call.y.shape and close(call.y, expected)


def discrepancy(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||a||; infinite if a is 0, or if a or b is not finite."""
    size, error = float(a.float().norm()), float((a.float() - b.float()).norm())
    return error / size if 0 < size < math.inf and error < math.inf else math.inf


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal up to the rounding of their type."""
    return discrepancy(a, b) <= {torch.float64: 1e-9, torch.float32: 1e-4}.get(a.dtype, 2e-2)


class Adapters:
    """Linears inside a wrapper that adds weights of its own (PEFT's `base_layer`), which may become active at any time."""

    def __init__(self, calls: list[Call]) -> None:
        """calls: of one layer."""
        wrappers = [c for c in calls if isinstance(getattr(c.module, "base_layer", None), nn.Module)]
        self.adapted = {id(c.module.base_layer): c.name for c in wrappers}
        self.around = {id(c.module.base_layer): c.module for c in wrappers}
        self.beside = {id(m) for c in wrappers for m in c.module.modules()} - set(self.adapted)

    def on(self, *pieces: Piece) -> bool:
        """Whether one of the pieces is a wrapped linear."""
        return any(id(p.module) in self.adapted for p in pieces)
