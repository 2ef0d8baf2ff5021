"""Routed experts stored as 3-D parameters of one module: found by shape, proved by the module's output.

An expert is a feed-forward network on the rows that are routed to it. `routing` reads the routing from the module's inputs.
The middle of an expert is a known formula or the module's own gate function (the interface of transformers' experts).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moyu import kernels
from moyu.model.anatomy import Block, Experts, Piece, product
from moyu.model.calls import Call, close, discrepancy
from moyu.model.middles import SPLITS, gates, paired
from moyu.model.networks import WIDE

# The output for an index at or beyond the number of experts: 0, or the row itself.
RESTS = ("nothing", "identity")


class GateMiddle:
    """The middle of an expert: its module's gate function on gate and up in one tensor, or the activation without a gate."""

    def __init__(self, function: Callable[[Tensor], Tensor], split: str | None) -> None:
        """split: a name in SPLITS; None without a gate."""
        self.function, self.split = function, split

    @property
    def modules(self) -> list[nn.Module]:
        return []

    def __call__(self, x: Tensor, gate: Tensor | None, up: Tensor) -> Tensor:
        if gate is None or self.split is None:
            return self.function(up)
        both = up.new_empty(*up.shape[:-1], 2 * up.shape[-1])
        for part, rows in zip((gate, up), SPLITS[self.split](up.shape[-1]), strict=True):
            both[..., rows] = part
        return self.function(both)


def find_experts(layer: int, calls: list[Call]) -> tuple[list[Experts], list[str]]:
    """The proved modules of a layer that run experts stored as 3-D parameters, and the reasons why others are not proved."""
    found: list[Experts] = []
    gaps: list[str] = []
    for call in calls:
        stacks = {n: p for n, p in call.module.named_parameters(recurse=False) if p.dim() == 3}
        if not stacks or isinstance(call.module, nn.Conv1d) or any(e.module is call.module for e in found):
            continue
        first = sum(len(e.blocks) for e in found)
        if not isinstance(call.output, Tensor) or not call.inputs or not isinstance(call.x, Tensor):
            gaps.append(
                f"layer {layer}: {call.name.rpartition('.')[2]} has 3-D parameters but is not called like experts"
            )
            continue
        if any(isinstance(p, DTensor) for p in stacks.values()):
            gaps.append(f"layer {layer}: the weights of its experts are DTensor, spread over processes")
            continue
        experts = next(filter(None, (_prove(e, call) for e in _candidates(layer, first, call, stacks))), None)
        if experts is None:
            what = " and ".join(f"{n} {tuple(p.shape)}" for n, p in stacks.items())
            gaps.append(
                f"layer {layer}: {call.name.rpartition('.')[2]} ({what}) does not compute a weighted sum of feed-forward networks"
            )
        else:
            found.append(experts)
    return found, gaps


def _candidates(layer: int, first: int, call: Call, stacks: dict[str, nn.Parameter]) -> Iterator[Experts]:
    """The roles that the parameters could have by their shapes, (E, out, in) or (E, in, out)."""
    width = call.x.shape[-1]

    def piece(name: str, expert: int, transposed: bool, rows: slice = slice(None)) -> Piece:
        bias = f"{name}_bias" if isinstance(getattr(call.module, f"{name}_bias", None), nn.Parameter) else None
        return Piece(call.module, name, bias, transposed, expert, rows)

    def experts(count: int, parts: Callable[[int], dict[str, Piece]]) -> Experts:
        return Experts(
            layer, call.module, [Block(layer, parts(e), expert=first + e, host=call.module) for e in range(count)]
        )

    for transposed in (False, True):
        shape = {n: (p.shape[0], *(p.shape[1:][::-1] if transposed else p.shape[1:])) for n, p in stacks.items()}
        for up, down in permutations(stacks, 2):
            (_, wide, d), (count, out, f) = shape[up], shape[down]
            if d != width or out != width:
                continue
            if wide == 2 * f:
                for split in SPLITS.values():
                    g, u = split(f)
                    yield experts(
                        count,
                        lambda e, up=up, down=down, g=g, u=u, t=transposed: {
                            "gate": piece(up, e, t, g),
                            "up": piece(up, e, t, u),
                            "down": piece(down, e, t),
                        },
                    )
            elif wide == f and len(stacks) == 2:
                yield experts(
                    count, lambda e, up=up, down=down, t=transposed: {"up": piece(up, e, t), "down": piece(down, e, t)}
                )
        for gate, up, down in permutations(stacks, 3):
            if (
                shape[gate] == shape[up]
                and shape[down] == (shape[up][0], width, shape[up][1])
                and shape[up][2] == width
            ):
                yield experts(
                    shape[up][0],
                    lambda e, names=(gate, up, down), t=transposed: {
                        role: piece(name, e, t) for role, name in zip(("gate", "up", "down"), names, strict=True)
                    },
                )


def _prove(experts: Experts, call: Call) -> Experts | None:
    """The experts with the middle whose weighted sum equals the module's output, on the probe and on wider values, or None."""
    told = routing(experts, call.inputs)
    if told is None:
        return None
    hidden, index, weights = told
    experts.routed = min(index.shape[1], len(experts.blocks))
    blocks, gated = experts.blocks, experts.blocks[0].gated
    reach = float(product(blocks[0].pieces["up"], hidden).float().std())
    scale = WIDE / reach if reach > 0 else 1.0
    try:
        with torch.no_grad():
            wide = call.module(*(call.x * scale, *call.inputs[1:]))
    except Exception:  # its caller passes more than tensors: the values of the probe must suffice
        wide = None

    def error(run: Callable[[Block, Tensor], Tensor]) -> float | None:
        worst = 0.0
        for factor, expected in ((1.0, call.output), (scale, wide)):
            if expected is None:
                continue
            value = run_experts(experts, hidden * factor, index, weights, lambda b, x, token: run(b, x))
            expected = expected.reshape(value.shape)
            if not close(expected, value.to(expected.dtype)):
                return None
            worst = max(worst, discrepancy(expected, value))
        return worst

    for experts.rest in RESTS:
        formulas: dict[str, float] = {}
        for name in kernels.ACTIVATIONS:
            act = kernels.activation(name)
            if gated or name != "identity":
                found = error(lambda b, x, act=act: plain_ffn(b, x, act))
                if found is not None:
                    formulas[name] = found
        if formulas:
            for block in blocks:
                block.act = min(formulas, key=lambda name: formulas[name])
            return experts
        for middle in _own(experts.module, blocks[0]):
            if error(lambda b, x, middle=middle: own_ffn(b, x, middle)) is not None:
                for block in blocks:
                    block.middle = middle
                return experts
    return None


def _own(module: Any, block: Block) -> Iterator[GateMiddle]:
    """The module's own gate function (activation, without a gate), if it has one that pairs gate and up as the block does."""
    if not block.gated:
        if callable(getattr(module, "act_fn", None)):
            yield GateMiddle(module.act_fn, None)
        return
    function = getattr(module, "_apply_gate", None)
    rows = block.pieces["gate"].rows, block.pieces["up"].rows
    split = next((n for n, s in SPLITS.items() if s(block.neurons) == rows), None)
    if function is None or split is None:
        return
    middle = GateMiddle(function, split)
    weight = block.pieces["down"].weight
    generator = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(4, block.neurons, generator=generator).to(weight) for _ in range(2))

    def value(g: Tensor, u: Tensor) -> Tensor:
        return middle(g, g, u)

    if paired(value, gate, up) and gates(value, gate, up):
        yield middle


def routing(experts: Experts, inputs: tuple) -> tuple[Tensor, Tensor, Tensor] | None:
    """Rows (N, d), expert indices (N, k) and weights (N, k) of a call, from any of three known interfaces; None for others."""
    tensors = [t for t in inputs if isinstance(t, Tensor)]
    if len(tensors) != len([t for t in inputs if t is not None]) or not tensors:
        return None
    count = len(experts.blocks)
    hidden = tensors[0].reshape(-1, tensors[0].shape[-1])
    if len(tensors) == 3 and not tensors[1].is_floating_point() and tensors[1].shape == tensors[2].shape:
        return hidden, tensors[1].reshape(len(hidden), -1), tensors[2].reshape(len(hidden), -1)
    everyone = torch.arange(count, device=hidden.device).expand(len(hidden), -1)
    if len(tensors) == 2 and tensors[1].is_floating_point() and tensors[1].numel() == len(hidden) * count:
        return hidden, everyone, tensors[1].reshape(len(hidden), count)
    if len(tensors) == 1 and len(hidden) % count == 0:  # rows ordered by expert and already weighted
        index = torch.arange(count, device=hidden.device).repeat_interleave(len(hidden) // count)[:, None]
        return (
            hidden,
            torch.where(hidden.any(1, keepdim=True), index, count),
            torch.ones_like(index, dtype=hidden.dtype),
        )
    return None


def plain_ffn(block: Block, x: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    """The dense network of a block, (N, d) -> (N, d)."""
    value = product(block.pieces["up"], x)
    value = act(product(block.pieces["gate"], x)) * value if block.gated else act(value)
    return product(block.pieces["down"], value)


def own_ffn(block: Block, x: Tensor, middle: GateMiddle) -> Tensor:
    """The network of a block with a middle of its own, (N, d) -> (N, d)."""
    gate = product(block.pieces["gate"], x) if block.gated else None
    return product(block.pieces["down"], middle(x, gate, product(block.pieces["up"], x)))


def run_experts(experts: Experts, hidden: Tensor, index: Tensor, weights: Tensor, run) -> Tensor:
    """Weighted sum of routed experts (N, d): hidden (N, d), index and weights (N, k); `run(block, x, token)` runs one expert."""
    out = torch.zeros_like(hidden)
    for expert, block in enumerate(experts.blocks):
        token, place = (index == expert).nonzero(as_tuple=True)
        if len(token):
            value = run(block, hidden[token], token) * weights[token, place, None]
            out.index_add_(0, token, value.to(out.dtype))
    if experts.rest == "identity":
        beyond = torch.where(index >= len(experts.blocks), weights, 0).sum(1, keepdim=True)
        out = out + (hidden * beyond).to(out.dtype)
    return out
