"""The middle of a network, from gate and up to `down`'s input, computed by the network's own module.

The module runs with its linears stubbed out. This keeps whatever it does between them: clamps, norms, learned activations,
cut-offs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import permutations
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from moyu.model.anatomy import Block, Piece
from moyu.model.calls import Call, close

SAMPLES, CUT = 4, 0.1  # rows of usual values, and the share of zeros that counts as a cut: GELU has none, ReLU a half
SPLITS: Mapping[str, Callable[[int], tuple[slice, slice]]] = {  # how gate and up share one linear of 2 f outputs
    "halves": lambda f: (slice(0, f), slice(f, None)),
    "halves, up first": lambda f: (slice(f, None), slice(0, f)),
    "interleaved": lambda f: (slice(0, None, 2), slice(1, None, 2)),
    "interleaved, up first": lambda f: (slice(1, None, 2), slice(0, None, 2)),
}

_given: ContextVar[dict[int, Any] | None] = ContextVar("moyu_given", default=None)


class ModuleMiddle:
    """The middle of a network, computed by the module that holds the network while its linears are stubbed out."""

    def __init__(self, host: nn.Module, pieces: Mapping[str, Piece]) -> None:
        """pieces: gate (or none), up and down. Gate and up may share a linear."""
        self.host, self.pieces = host, pieces

    @property
    def modules(self) -> list[nn.Module]:
        return list({id(p.module): p.module for p in self.pieces.values()}.values())

    def __call__(self, x: Tensor, gate: Tensor | None, up: Tensor) -> Tensor:
        pieces, given = self.pieces, {}
        given[id(pieces["up"].module)] = up
        if gate is not None and pieces["gate"].module is pieces["up"].module:
            both = up.new_empty(*up.shape[:-1], 2 * up.shape[-1])
            both[:, pieces["gate"].rows], both[:, pieces["up"].rows] = gate, up
            given[id(pieces["up"].module)] = both
        elif gate is not None:
            given[id(pieces["gate"].module)] = gate
        taken: list[Tensor] = []
        given[id(pieces["down"].module)] = taken
        token = _given.set(given)
        try:
            type(self.host).forward(
                self.host, x[None]
            )  # not the instance's forward, which is ours while a plan is applied
        finally:
            _given.reset(token)
        return taken[0].reshape(up.shape)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Stub out the linears during the proof. `apply` does the same for as long as a plan is applied."""
        before = [(m, vars(m).get("forward")) for m in self.modules]
        try:
            for module, _ in before:
                vars(module)["forward"] = MethodType(Aside.run, Aside(module.forward, module))
            yield
        finally:
            for module, own in before:
                del vars(module)["forward"]
                if own is not None:
                    vars(module)["forward"] = own


class Aside:
    """A stub for a linear's forward: returns the values given to the middle, and keeps what `down` would take as input."""

    def __init__(self, inner: Callable, module: nn.Module) -> None:
        """inner: the forward to run outside a middle."""
        self.inner, self.module = inner, module

    def run(self, x: Tensor) -> Tensor:
        given = (_given.get() or {}).get(id(self.module))
        if given is None:
            return self.inner(x)
        if isinstance(given, list):
            given.append(x)
            weight = self.module.weight
            return x.new_zeros(*x.shape[:-1], weight.shape[1 if isinstance(self.module, Conv1D) else 0])  # pyright: ignore
        return given.reshape(*x.shape[:-1], given.shape[-1])


def find_by_module(layer: int, calls: list[Call], down: Call, before: list[Call]) -> Block | None:
    """The network of one module whose input is a row and whose output is `down`'s: two or three linears, proved by its middle."""
    width = down.x.shape[-1]
    for host in calls:
        inside = {id(m) for m in host.module.modules()}
        if host.module is down.module or id(down.module) not in inside:
            continue
        if not host.inputs or not isinstance(host.x, Tensor) or not isinstance(host.output, Tensor):
            continue
        if host.output.shape != down.y.shape or not torch.equal(host.output, down.y):
            continue
        readers = [
            c
            for c in before
            if id(c.module) in inside
            and c.x.data_ptr() == host.x.data_ptr()
            and c.x.numel() == host.x.numel()
            and c.y.shape[-1] in (width, 2 * width)
        ]
        for pieces in _roles(readers, width):
            middle = ModuleMiddle(host.module, pieces | {"down": down.piece()})
            with middle.aside():
                if _holds(middle, host, down, readers):
                    return Block(layer, middle.pieces | {}, host=host.module, middle=middle)  # pyright: ignore
        return None
    return None


def cuts_neurons(block: Block, host: Call | None) -> bool:
    """Whether the module makes a tenth of its neurons exactly 0 at usual values of the gate (of up, without a gate).

    Those zeros must not depend on up, and the other neurons must not depend on up at the zeros.
    """
    if not isinstance(block.middle, ModuleMiddle) or host is None:
        return False
    x = host.x.reshape(-1, host.x.shape[-1])[:1].expand(SAMPLES, -1)
    generator = torch.Generator().manual_seed(0)
    decides, other = (torch.randn(SAMPLES, block.neurons, generator=generator).to(x) for _ in range(2))
    with block.middle.aside():
        try:
            if not block.gated:
                return bool((block.middle(x, None, decides) == 0).float().mean() >= CUT)
            zeros = block.middle(x, decides, torch.ones_like(other)) == 0
            value, without = (block.middle(x, decides, up) for up in (other, torch.where(zeros, 0, other)))
        except Exception:  # the module needs more than its input
            return False
    return bool(zeros.float().mean() >= CUT) and not value[zeros].any() and torch.equal(value, without)


def _roles(readers: list[Call], width: int) -> Iterator[dict[str, Piece]]:
    """The roles that the readers could have: gate and up in either order, both in one linear, or up alone."""
    if len(readers) == 2 and all(c.y.shape[-1] == width for c in readers):
        for gate, up in permutations(readers):
            yield {"gate": gate.piece(), "up": up.piece()}
    elif len(readers) == 1 and readers[0].y.shape[-1] == 2 * width:
        for split in SPLITS.values():
            gate, up = split(width)
            yield {"gate": readers[0].piece(gate), "up": readers[0].piece(up)}
    elif len(readers) == 1:
        yield {"up": readers[0].piece()}


def _holds(middle: ModuleMiddle, host: Call, down: Call, readers: list[Call]) -> bool:
    """Whether the module computes `down`'s input from these linears row by row and neuron by neuron, and not linearly."""
    x = host.x.reshape(-1, host.x.shape[-1])
    values = {id(c.module): c.y.reshape(-1, c.y.shape[-1]) for c in readers}
    pieces = middle.pieces
    up = values[id(pieces["up"].module)][:, pieces["up"].rows]
    gate = values[id(pieces["gate"].module)][:, pieces["gate"].rows] if "gate" in pieces else None
    try:
        whole = middle(x, gate, up)
        alone = middle(x[-1:], None if gate is None else gate[-1:], up[-1:])
        if not close(down.x.reshape(whole.shape), whole) or not close(whole[-1:], alone):
            return False
        if gate is None:
            return not close(middle(x, None, 2 * up), 2 * whole)
        if pieces["gate"].module is pieces["up"].module and not paired(lambda g, u: middle(x, g, u), gate, up):
            return False
        return gates(lambda g, u: middle(x, g, u), gate, up)
    except Exception:  # the module needs more than its input
        return False


def paired(value: Callable[[Tensor, Tensor], Tensor], gate: Tensor, up: Tensor) -> bool:
    """Whether entry j of the value depends only on entry j of gate and of up: gate, up (N, f)."""
    width = gate.shape[1]
    other = torch.arange(width, device=gate.device) % 3 == 0  # in both halves, at odd and at even places
    before, after = value(gate, up), value(torch.where(other, gate + 1, gate), torch.where(other, up - 1, up))
    return torch.equal(before[:, ~other], after[:, ~other]) and not close(before[:, other], after[:, other])


def gates(value: Callable[[Tensor, Tensor], Tensor], gate: Tensor, up: Tensor) -> bool:
    """Whether the first of two is the gate: the value changes sign with up and not with gate, or is 0 with gate and not with up."""
    whole = value(gate, up)
    odd_up, odd_gate = close(-whole, value(gate, -up)), close(-whole, value(-gate, up))
    if odd_up != odd_gate:
        return odd_up
    nothing = torch.zeros_like(gate)
    return not value(nothing, up).any() and bool(value(gate, nothing).any())
