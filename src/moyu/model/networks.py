"""Feed-forward networks among the calls of a layer, proved in numbers.

First we try known formulas: `down`'s input is act(gate) * up, or act(up), of earlier linears, on the values of the probe and on
much wider ones. If none fits, we run the original module with its linears stubbed out and use whatever it computes between
them (`moyu.model.middles`).
"""

from __future__ import annotations

import math
from itertools import permutations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from moyu import kernels
from moyu.model.anatomy import Block, Piece
from moyu.model.calls import Adapters, Call, close, discrepancy, is_linear, is_linear_call
from moyu.model.middles import SPLITS, Aside, ModuleMiddle, cuts_neurons, find_by_module

__all__ = ["Aside", "close", "find_networks", "is_linear"]

WIDE = 8.0  # standard deviation of the wide values; limits and caps of published models are below it


def find_networks(layer: int, calls: list[Call], adapters: Adapters) -> list[Block]:
    """Every dense feed-forward network of a layer, the widest first.

    A network with adapters on gate or up is run by its own module, which adds them. One with an adapter on down is left out.
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
            block = find_by_module(layer, calls, down, before)
        if block is not None and (not block.spread or _spread_alike(block)):
            block.cuts = cuts_neurons(block, next((c for c in calls if c.module is block.host), None))
            found.append(block)
            used |= {id(p.module) for p in block.pieces.values()}
    return sorted(found, key=lambda b: -math.prod(b.pieces["down"].shape))


def _spread_alike(block: Block) -> bool:
    """Whether each process holds the same neurons in every linear: rows of gate and up, columns of down."""
    return all(
        piece.whole and isinstance(piece.weight, DTensor) and piece.weight.placements[0].is_shard(int(name == "down"))
        for name, piece in block.pieces.items()
    )


def _by_formula(layer: int, calls: list[Call], down: Call, before: list[Call]) -> Block | None:
    """A network whose `down` takes act(gate) * up, or act(up), of earlier linears. Checked on wide values too if one module holds it."""
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
        except Exception:  # the module needs more than its input: the values of the probe must suffice
            return block
    function = kernels.activation(act)
    if not close(own, function(gate) * up if block.gated else function(up)):
        block.act, block.middle = None, middle
    return block


def _match(down: Call, before: list[Call]) -> tuple[str, dict[str, Piece]] | None:
    """The activation and the earlier linears that give `down`'s input."""
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
    # The closest, not the first: in 16 bits GELU can look like ReLU.
    return min(found, key=lambda f: f[0])[1:] if found else None


def _host(calls: list[Call], up: Piece, down: Call) -> Call | None:
    """The innermost module whose input is the network's and whose output is `down`'s, or None."""
    first = next(c for c in calls if c.module is up.module)
    for call in calls:
        inside = call.module is not down.module and any(m is down.module for m in call.module.modules())
        if not inside or not isinstance(call.output, Tensor) or not call.inputs or not isinstance(call.x, Tensor):
            continue
        same_input = call.x.data_ptr() == first.x.data_ptr() and call.x.numel() == first.x.numel()
        if same_input and call.output.shape == down.y.shape and torch.equal(call.output, down.y):
            return call
    return None
