"""Feed-forward networks among the calls of a layer, proved in numbers.

Two ways to a proof. A *formula* is one row of FORMULAS: `down`'s input is it, for earlier linears, on what flowed through
the probe and on values far wider than that. Where no formula holds, the network's *own module* makes the middle: it is run
with its linears standing aside, which keeps whatever it does between them (clamps, norms, learned activations, cut-offs).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import permutations
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import all_reduce
from torch.distributed.tensor import DTensor, Shard
from transformers.pytorch_utils import Conv1D

from moyu import kernels
from moyu.model.anatomy import Block, Middle, Piece, is_foreign
from moyu.model.quantised import QuantisedLinear

WIDE = (
    8.0  # standard deviation of the values that a formula must hold on; limits and caps of published models are below
)
SAMPLES, CUT = 4, 0.1  # rows of usual values, and the share of zeros that makes a cut: GELU has none, a ReLU half
SPLITS: Mapping[str, Callable[[int], tuple[slice, slice]]] = {  # gate and up in one linear of 2 f outputs
    "halves": lambda f: (slice(0, f), slice(f, None)),
    "halves, up first": lambda f: (slice(f, None), slice(0, f)),
    "interleaved": lambda f: (slice(0, None, 2), slice(1, None, 2)),
    "interleaved, up first": lambda f: (slice(1, None, 2), slice(0, None, 2)),
}

_given: ContextVar[dict[int, Any] | None] = ContextVar("moyu_given", default=None)


@dataclass(eq=False)
class Call:
    """One observed call of a module during the probe."""

    name: str
    module: nn.Module
    inputs: tuple
    output: Any
    named: tuple[str, ...] = ()  # the last inputs' names, where they were given by name

    def again(self) -> Any:
        """Call the module once more with what it was given."""
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
    """Whether a module is a linear whose forward is x @ W.T + b and whose weight is a plain tensor."""
    return type(module) in (nn.Linear, Conv1D, QuantisedLinear) and _is_plain(module)


def _is_plain(module: nn.Module) -> bool:
    return (isinstance(module, QuantisedLinear) or type(module.weight) is nn.Parameter) and _is_alone(module)


def _is_alone(module: nn.Module) -> bool:
    return "forward" not in vars(module) and not module._forward_hooks and not module._forward_pre_hooks


def _adds_up(call: Call) -> bool:
    """Whether a linear of quantised weights takes inputs apart: what masks leave out is missing in its output, and no more.

    A quantiser may round activations too, hence the tolerance.
    """
    module, x = call.module, call.x.detach()
    kept = torch.arange(x.shape[-1], device=x.device) % 2 == 0
    apart = module(torch.where(kept, x, 0)) + module(torch.where(kept, 0, x)) - module(torch.zeros_like(x))
    return apart.shape == call.y.shape and discrepancy(call.y, apart) <= 2e-2


def is_spread(module: nn.Module) -> bool:
    """Whether a linear's weight is spread over the processes of one mesh, by rows or by columns, and its forward says how."""
    weight = getattr(module, "weight", None)
    if type(module) is not nn.Linear or not isinstance(weight, DTensor) or weight.device_mesh.ndim != 1:
        return False
    hooked = module._forward_hooks or module._forward_pre_hooks
    return type(weight.placements[0]) is Shard and "forward" in vars(module) and not hooked


def _spread_product(module: nn.Linear, x: Tensor) -> Tensor:
    """This process' part of x @ W.T + b, or the whole where x is a part."""
    weight, bias = module.weight, module.bias
    assert isinstance(weight, DTensor)
    own = None if bias is None else bias.to_local() if isinstance(bias, DTensor) else bias
    if weight.placements[0].is_shard(0):
        return nn.functional.linear(x, weight.to_local(), own)
    y = nn.functional.linear(x, weight.to_local())
    all_reduce(y, group=weight.device_mesh.get_group())
    return y if own is None else y + own


def obstacle(calls: list[Call]) -> str | None:
    """Why linears among the calls cannot be taken although they are linears: where weights are, or who stands around them."""
    linears = [c.module for c in calls if isinstance(c.module, (nn.Linear, Conv1D)) and not is_linear_call(c)]
    linears = [m for m in linears if not _is_plain(m)]
    kinds = sorted({type(m.weight).__name__ for m in linears if type(m.weight) is not nn.Parameter})
    if kinds:
        return f"the weights of its linears are {', '.join(kinds)}, which the kernels cannot read; load the model with plain ones"
    if linears:
        return "its linears run inside hooks, as where a device_map offloads them; load the model onto one device"
    return None


def is_linear_call(call: Call) -> bool:
    """The same of an observed call: a subclass of Linear counts where its output was x @ W.T + b in numbers."""
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
    """||a - b|| / ||a||; infinite where a is 0 or not finite."""
    size, error = float(a.float().norm()), float((a.float() - b.float()).norm())
    return error / size if 0 < size < math.inf and error < math.inf else math.inf


def close(a: Tensor, b: Tensor) -> bool:
    """Equality in numbers, up to the rounding of the tensor's type."""
    return discrepancy(a, b) <= {torch.float64: 1e-9, torch.float32: 1e-4}.get(a.dtype, 2e-2)


class Adapters:
    """Linears that stand in a wrapper with further weights (PEFT's `base_layer`), which may start to count at any time."""

    def __init__(self, calls: list[Call]) -> None:
        """`calls` of one layer."""
        wrappers = [c for c in calls if isinstance(getattr(c.module, "base_layer", None), nn.Module)]
        self.adapted = {id(c.module.base_layer): c.name for c in wrappers}
        self.around = {id(c.module.base_layer): c.module for c in wrappers}
        self.beside = {id(m) for c in wrappers for m in c.module.modules()} - set(self.adapted)

    def on(self, *pieces: Piece) -> bool:
        """Whether one of the pieces is such a linear."""
        return any(id(p.module) in self.adapted for p in pieces)


def find_networks(layer: int, calls: list[Call], adapters: Adapters) -> list[Block]:
    """Every dense feed-forward network of a layer, the widest first.

    One with adapters on gate or up keeps its own module, which adds them; one with an adapter on down is left out.
    """
    linears = [c for c in calls if is_linear_call(c) and id(c.module) not in adapters.beside]
    found: list[Block] = []
    used: set[int] = set()
    for position in range(len(linears) - 1, -1, -1):
        down = linears[position]
        before = [c for c in linears[:position] if id(c.module) not in used]
        if id(down.module) in used or adapters.on(down.piece()):
            continue
        block = _by_formula(layer, calls, down, before)
        if block is None or adapters.on(*block.pieces.values()):
            block = _by_module(layer, calls, down, before)
        if block is not None and (not block.spread or _spread_alike(block)):
            block.cuts = _cuts(block, next((c for c in calls if c.module is block.host), None))
            found.append(block)
            used |= {id(p.module) for p in block.pieces.values()}
    return sorted(found, key=lambda b: -math.prod(b.pieces["down"].shape))


def _spread_alike(block: Block) -> bool:
    """Whether each process holds the same neurons of every linear: rows of gate and up, columns of down."""
    return all(
        piece.whole and isinstance(piece.weight, DTensor) and piece.weight.placements[0].is_shard(int(name == "down"))
        for name, piece in block.pieces.items()
    )


# ------------------------------------------------------------------------------------------------------------- by formula


def _by_formula(layer: int, calls: list[Call], down: Call, before: list[Call]) -> Block | None:
    """`down`'s input is act(gate) * up, or act(up), of earlier linears; on wide values too where a module holds them."""
    matched = _match(down, before)
    if matched is None:
        return None
    act, pieces = matched
    pieces |= {"down": down.piece()}
    host = _host(calls, pieces["up"], down)
    block = Block(layer, pieces, act=act, host=host.module if host else None)
    if host is None:
        return block
    width, count = block.neurons, 4
    generator = torch.Generator().manual_seed(0)
    gate, up = (WIDE * torch.randn(count, width, generator=generator).to(down.x) for _ in range(2))
    x = host.x.reshape(-1, host.x.shape[-1])[:1].expand(count, -1)
    middle = ModuleMiddle(host.module, pieces)
    with middle.aside():
        try:
            own = middle(x, gate if block.gated else None, up)
        except Exception:  # a module that wants more than its input: what flowed through the probe has to do
            return block
    function = kernels.activation(act)
    if not close(own, function(gate) * up if block.gated else function(up)):
        block.act, block.middle = None, middle
    return block


def _match(down: Call, before: list[Call]) -> tuple[str, dict[str, Piece]] | None:
    """Which earlier linears make `down`'s input, and by which activation."""
    mid = down.x.reshape(-1, down.x.shape[-1])  # (N, f)
    flat = [(c, c.y.reshape(-1, c.y.shape[-1])) for c in before]
    flat = [(c, y) for c, y in flat if y.shape[0] == mid.shape[0]]
    width = mid.shape[1]
    exact = [(c, y) for c, y in flat if y.shape[1] == width]
    found: list[tuple[float, str, dict[str, Piece]]] = []

    def consider(name: str, pieces: dict[str, Piece], value: Tensor) -> None:
        if close(mid, value):
            found.append((discrepancy(mid, value), name, pieces))

    for name in kernels.ACTIVATIONS:
        act = kernels.activation(name)
        if name != "identity":
            for up, y in exact:
                consider(name, {"up": up.piece()}, act(y))
        for (gate, g), (up, u) in permutations(exact, 2):
            if gate.x.data_ptr() == up.x.data_ptr():
                consider(name, {"gate": gate.piece(), "up": up.piece()}, act(g) * u)
        for both, y in flat:
            if y.shape[1] == 2 * width:
                for split in SPLITS.values():
                    g, u = split(width)
                    consider(name, {"gate": both.piece(g), "up": both.piece(u)}, act(y[:, g]) * y[:, u])
    # The best and not the first: in 16 bits GELU can look like ReLU.
    return min(found, key=lambda f: f[0])[1:] if found else None


def _host(calls: list[Call], up: Piece, down: Call) -> Call | None:
    """The innermost module that takes the network's input and returns `down`'s output, if there is one."""
    first = next(c for c in calls if c.module is up.module)
    for call in calls:
        inside = call.module is not down.module and any(m is down.module for m in call.module.modules())
        if not inside or not isinstance(call.output, Tensor) or not call.inputs or not isinstance(call.x, Tensor):
            continue
        same_input = call.x.data_ptr() == first.x.data_ptr() and call.x.numel() == first.x.numel()
        if same_input and call.output.shape == down.y.shape and torch.equal(call.output, down.y):
            return call
    return None


# -------------------------------------------------------------------------------------------------------------- by module


class ModuleMiddle:
    """The middle of a network as the module that holds it computes it, its linears standing aside."""

    def __init__(self, host: nn.Module, pieces: Mapping[str, Piece]) -> None:
        """`pieces` are gate (or none), up and down; gate and up may share a linear."""
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
            type(self.host).forward(self.host, x[None])  # not the instance's: that one is ours while a plan is applied
        finally:
            _given.reset(token)
        return taken[0].reshape(up.shape)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Let the linears stand aside during the proof; `apply` does the same for longer."""
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
    """Stands for a linear's forward: gives what the middle was asked for, keeps what `down` would have taken."""

    def __init__(self, inner: Callable, module: nn.Module) -> None:
        """`inner` is the forward that was there before."""
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


def _by_module(layer: int, calls: list[Call], down: Call, before: list[Call]) -> Block | None:
    """Two or three linears of one module that takes a row and gives a row: `down`'s input is what it makes of the others."""
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


def _cuts(block: Block, host: Call | None) -> bool:
    """Whether the network's own module makes a tenth of its neurons exactly 0 at usual values, whatever up is.

    What up is at those neurons must not matter to the others either.
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
        except Exception:  # a module that wants more than its input
            return False
    return bool(zeros.float().mean() >= CUT) and not value[zeros].any() and torch.equal(value, without)


def _roles(readers: list[Call], width: int) -> Iterator[dict[str, Piece]]:
    """What the readers could be: gate and up in either order, both in one, or up alone."""
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
    """Whether the module makes `down`'s input of these linears row by row, neuron beside neuron, and not linearly."""
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
    except Exception:  # a module that wants more than its input
        return False


def paired(value: Callable[[Tensor, Tensor], Tensor], gate: Tensor, up: Tensor) -> bool:
    """Whether entry j of the value depends on entry j of gate and of up alone: gate, up (N, f)."""
    width = gate.shape[1]
    other = torch.arange(width, device=gate.device) % 3 == 0  # falls into both halves, and into odd and even places
    before, after = value(gate, up), value(torch.where(other, gate + 1, gate), torch.where(other, up - 1, up))
    return torch.equal(before[:, ~other], after[:, ~other]) and not close(before[:, other], after[:, other])


def gates(value: Callable[[Tensor, Tensor], Tensor], gate: Tensor, up: Tensor) -> bool:
    """Which of two is the gate: the value changes its sign with up and not with gate, or is 0 with the gate and not with up."""
    whole = value(gate, up)
    odd_up, odd_gate = close(-whole, value(gate, -up)), close(-whole, value(-gate, up))
    if odd_up != odd_gate:
        return odd_up
    nothing = torch.zeros_like(gate)
    return not value(nothing, up).any() and bool(value(gate, nothing).any())


__all__ = ["Aside", "Call", "Middle", "ModuleMiddle", "close", "discrepancy", "find_networks", "is_linear", "paired"]
