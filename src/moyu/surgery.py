"""Blocks, taps and linears of a model: the only place that knows architectures.

A structure is found by what flows through it, never by names: the model runs once on a few tokens, every linear's input
and output is kept, and a feed-forward network is three (or two) linears for which `down`'s input *is*
`act(gate) * up` (or `act(up)`) in numbers. What cannot be proved stays dense and is named.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import permutations
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from moyu import kernels, memory
from moyu.errors import UserError

PROBE_TOKENS = 6


@dataclass(eq=False)
class Piece:
    """One logical linear of a block: `rows` of a module's parameter, seen as (out, in)."""

    module: nn.Module
    parameter: str = "weight"
    bias_parameter: str | None = "bias"
    transposed: bool = False  # the parameter is stored (in, out): Conv1D
    expert: int | None = None  # the parameter is stored (E, ., .)
    rows: slice = field(default_factory=lambda: slice(None))

    @property
    def weight(self) -> Tensor:
        """The live weight, (out, in), a view of the parameter."""
        weight = getattr(self.module, self.parameter)
        weight = weight if self.expert is None else weight[self.expert]
        return (weight.t() if self.transposed else weight)[self.rows]

    @property
    def bias(self) -> Tensor | None:
        """The live bias, (out,), or None."""
        bias = getattr(self.module, self.bias_parameter, None) if self.bias_parameter else None
        return None if bias is None else bias[self.rows]

    @property
    def whole(self) -> bool:
        """Whether this is the module's whole weight, so that its storage may be laid out anew."""
        return self.expert is None and self.rows == slice(None)

    def store(self, weight: Tensor) -> None:
        """Point the parameter at `weight` (out, in), keeping its identity."""
        parameter = getattr(self.module, self.parameter)
        before, parameter.data = parameter.data, weight.t() if self.transposed else weight
        memory.let_go(before)


@dataclass(eq=False)
class Block:
    """What one decoder layer offers: a feed-forward network (or one expert of it) and its attention's linears."""

    layer: int
    pieces: dict[str, Piece]  # of: q, k, v, qkv, o, gate, up, down
    act: str | None = None  # activation of the feed-forward network; None: the block has only attention
    expert: int | None = None
    host: nn.Module | None = None  # the module whose forward is the whole network; None: inline in the layer
    heads: int = 0  # of queries; 0: no attention was found
    kv_heads: int = 0  # of keys and values

    @property
    def gated(self) -> bool:
        """Whether the network is down(act(gate) * up) rather than down(act(up))."""
        return "gate" in self.pieces

    @property
    def has_ffn(self) -> bool:
        """Whether a feed-forward network was proved."""
        return "down" in self.pieces

    @property
    def neurons(self) -> int:
        """f, the feed-forward width."""
        return self.pieces["down"].weight.shape[1]


@dataclass(eq=False)
class Experts:
    """A module that runs routed experts kept as 3-D parameters; its blocks are one an expert."""

    layer: int
    module: nn.Module
    blocks: list[Block]


@dataclass(eq=False)
class Anatomy:
    """All that surgery found in a model."""

    layers: nn.ModuleList
    blocks: list[Block]
    experts: list[Experts]
    gaps: list[str]  # what stays dense and why

    def all_blocks(self) -> Iterator[Block]:
        """Every block, routed experts included, in layer order."""
        routed = {e.layer: e.blocks for e in self.experts}
        for block in self.blocks:
            yield block
            yield from routed.get(block.layer, [])


@dataclass(eq=False)
class _Call:
    """One observed call of a module during the probe."""

    name: str
    module: nn.Module
    inputs: tuple
    output: object

    @property
    def x(self) -> Tensor:
        return self.inputs[0]

    @property
    def y(self) -> Tensor:
        return self.output  # pyright: ignore[reportReturnType]

    def piece(self, rows: slice = slice(None)) -> Piece:
        return Piece(self.module, transposed=isinstance(self.module, Conv1D), rows=rows)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear whose forward is x @ W.T + b and whose weight is a plain tensor."""
    return (
        type(module) in (nn.Linear, Conv1D)
        and type(module.weight) is nn.Parameter
        and "forward" not in vars(module)
        and not module._forward_hooks
    )


def text_config(model: nn.Module):
    """The configuration of the language model proper."""
    return model.config.get_text_config(decoder=True)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]


def find_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder layers: the ModuleList as long as the model is deep that holds the most parameters."""
    depth = text_config(model).num_hidden_layers
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not lists:
        raise UserError(
            f"{type(model).__name__} has no list of {depth} decoder layers", "is it a causal LM of transformers?"
        )
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))


@torch.no_grad()
def dissect(model: nn.Module) -> Anatomy:
    """Find and prove every block of a causal LM. Runs the model once on a few tokens.

    Raises UserError where nothing can be taken, with the reasons.
    """
    name, layers = find_layers(model)
    calls = _probe(model, name, layers)
    anatomy = Anatomy(layers, [], [], [])
    for index in range(len(layers)):
        seen = calls[index]
        block, gap = _find_ffn(index, seen)
        experts = _find_experts(index, layers[index])
        if experts is not None:
            gap = _prove_experts(experts, seen)
            if gap is None:
                anatomy.experts.append(experts)
        elif gap is not None:
            anatomy.gaps.append(gap)
        if experts is not None and gap is not None:
            anatomy.gaps.append(gap)
        taken = {id(p.module) for p in block.pieces.values()}
        block.pieces |= _find_attention([c for c in seen if is_linear(c.module) and id(c.module) not in taken])
        block.heads, block.kv_heads = _count_heads(model, block)
        anatomy.blocks.append(block)
    if not anatomy.experts and not any(b.has_ffn for b in anatomy.blocks):
        reasons = "; ".join(dict.fromkeys(anatomy.gaps))
        raise UserError(
            f"{type(model).__name__} has no feed-forward network that MOYU can prove ({reasons})",
            "it would run dense; choose another model",
        )
    return anatomy


def _probe(model: nn.Module, prefix: str, layers: nn.ModuleList) -> list[list[_Call]]:
    """Every leaf and inner module call inside each layer, in the order of completion."""
    calls: list[list[_Call]] = [[] for _ in layers]
    handles = []
    for index, layer in enumerate(layers):
        for name, module in layer.named_modules(prefix=f"{prefix}.{index}"):

            def record(module, inputs, kwargs, output, index=index, name=name):
                tensors = (*inputs, *kwargs.values())
                calls[index].append(_Call(name, module, tensors, output))

            handles.append((module, record))
    registered = []
    device = next(model.parameters()).device
    config = text_config(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, config.vocab_size, (1, PROBE_TOKENS), generator=generator).to(device)
    training = model.training
    try:
        # Handles only now: is_linear() refuses modules that carry hooks of others.
        registered = [m.register_forward_hook(r, with_kwargs=True) for m, r in handles]
        model.eval()
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    finally:
        for handle in registered:
            handle.remove()
        model.train(training)
    return calls


def discrepancy(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||a||; infinite where a is 0 or not finite."""
    size, error = float(a.float().norm()), float((a.float() - b.float()).norm())
    return error / size if 0 < size < math.inf and error < math.inf else math.inf


def close(a: Tensor, b: Tensor) -> bool:
    """Equality in numbers, up to the rounding of the tensor's type."""
    return discrepancy(a, b) <= {torch.float64: 1e-9, torch.float32: 1e-4}.get(a.dtype, 2e-2)


def _find_ffn(layer: int, calls: list[_Call]) -> tuple[Block, str | None]:
    """The feed-forward network of a layer, proved in numbers; or an empty block and the reason."""
    linears = [c for c in calls if is_linear(c.module)]
    for position in range(len(linears) - 1, -1, -1):
        down = linears[position]
        found = _match(down, linears[:position])
        if found is not None:
            act, pieces = found
            host = _host(calls, pieces["up"], down)
            return Block(layer, pieces | {"down": down.piece()}, act=act, host=host), None
    return Block(layer, {}), f"layer {layer}: no linear takes act(gate) * up or act(up) of earlier linears"


def _match(down: _Call, before: list[_Call]) -> tuple[str, dict[str, Piece]] | None:
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
                for g, u in ((slice(0, width), slice(width, None)), (slice(width, None), slice(0, width))):
                    consider(name, {"gate": both.piece(g), "up": both.piece(u)}, act(y[:, g]) * y[:, u])
    # The best and not the first: in 16 bits GELU can look like ReLU.
    return min(found, key=lambda f: f[0])[1:] if found else None


def _host(calls: list[_Call], up: Piece, down: _Call) -> nn.Module | None:
    """The innermost module that takes the network's input and returns `down`'s output, if there is one."""
    first = next(c for c in calls if c.module is up.module)
    for call in calls:
        inside = call.module is not down.module and any(m is down.module for m in call.module.modules())
        if not inside or not isinstance(call.output, Tensor) or not call.inputs or not isinstance(call.x, Tensor):
            continue
        same_input = call.x.data_ptr() == first.x.data_ptr() and call.x.numel() == first.x.numel()
        if same_input and call.output.shape == down.y.shape and torch.equal(call.output, down.y):
            return call.module
    return None


def _find_attention(linears: list[_Call]) -> dict[str, Piece]:
    """The attention's linears: readers of one input, then one linear that reads something new.

    One reader is a fused qkv; three are q, k, v (in the order of their names where these say so, else as run).
    Anything else (latent attention, recurrent mixers) is left dense.
    """
    if not linears:
        return {}
    source = linears[0].x
    readers = [c for c in linears if c.x.data_ptr() == source.data_ptr() and c.x.shape == source.shape]
    rest = [c for c in linears if c not in readers]
    parent = linears[0].name.rpartition(".")[0]
    if len(readers) not in (1, 3) or len(rest) != 1 or any(c.name.rpartition(".")[0] != parent for c in linears):
        return {}
    output = rest[0]
    if output.y.shape[-1] != source.shape[-1]:
        return {}
    if len(readers) == 1:
        return {"qkv": readers[0].piece(), "o": output.piece()}
    by_letter = {c.name.rpartition(".")[2].lstrip("w_")[:1]: c for c in readers}
    named = [by_letter[letter] for letter in "qkv"] if set(by_letter) == set("qkv") else readers
    return {letter: call.piece() for letter, call in zip("qkv", named, strict=True)} | {"o": output.piece()}


def _count_heads(model: nn.Module, block: Block) -> tuple[int, int]:
    """Query heads, and those of keys and values, as the configuration names them and the weights' shapes confirm; else 0."""
    heads = getattr(text_config(model), "num_attention_heads", None)
    width = block.pieces["o"].weight.shape[1] if "o" in block.pieces else 0
    if not width or not isinstance(heads, int) or width % heads:
        return 0, 0
    if "k" in block.pieces:
        rows = block.pieces["k"].weight.shape[0]
    else:
        rows = (block.pieces["qkv"].weight.shape[0] - width) // 2
    kv_heads = rows // (width // heads)
    return (heads, kv_heads) if kv_heads and heads % kv_heads == 0 and rows % kv_heads == 0 else (0, 0)


def _find_experts(layer: int, module: nn.Module) -> Experts | None:
    """A module inside the layer that keeps gated experts as (E, 2f, d) and (E, d, f) parameters."""
    for host in module.modules():
        both, down = (getattr(host, n, None) for n in ("gate_up_proj", "down_proj"))
        if not (isinstance(both, nn.Parameter) and isinstance(down, nn.Parameter) and both.dim() == down.dim() == 3):
            continue
        count, wide, width = both.shape
        f = wide // 2
        if down.shape != (count, width, f):
            continue
        blocks = []
        for e in range(count):
            pieces = {
                "gate": Piece(host, "gate_up_proj", None, expert=e, rows=slice(0, f)),
                "up": Piece(host, "gate_up_proj", None, expert=e, rows=slice(f, None)),
                "down": Piece(host, "down_proj", None, expert=e),
            }
            blocks.append(Block(layer, pieces, act=None, expert=e, host=host))
        return Experts(layer, host, blocks)
    return None


def _prove_experts(experts: Experts, calls: list[_Call]) -> str | None:
    """Set the activation for which the experts' module computes gated networks; the reason where there is none."""
    call = next((c for c in calls if c.module is experts.module), None)
    if call is None or len(call.inputs) < 3 or not all(isinstance(t, Tensor) for t in call.inputs[:3]):
        return f"layer {experts.layer}: its experts are not called with (hidden, index, weights)"
    hidden, index, weights = call.inputs[:3]
    errors: dict[str, float] = {}
    for name in kernels.ACTIVATIONS:
        act = kernels.activation(name)
        value = run_experts(experts.blocks, hidden, index, weights, lambda b, x, rows, act=act: plain_ffn(b, x, act))
        if close(call.y, value):
            errors[name] = discrepancy(call.y, value)
    if errors:
        for block in experts.blocks:
            block.act = min(errors, key=lambda name: errors[name])
        return None
    return f"layer {experts.layer}: its experts are not weighted sums of down(act(gate) * up)"


def plain_ffn(block: Block, x: Tensor, act) -> Tensor:
    """The dense network of a block, (N, d) -> (N, d)."""
    value = product(block.pieces["up"], x)
    value = act(product(block.pieces["gate"], x)) * value if block.gated else act(value)
    return product(block.pieces["down"], value)


def product(piece: Piece, x: Tensor) -> Tensor:
    """x @ W.T + b of a logical linear, (N, in) -> (N, out)."""
    return nn.functional.linear(x, piece.weight, piece.bias)


def run_experts(blocks: list[Block], hidden: Tensor, index: Tensor, weights: Tensor, run) -> Tensor:
    """Weighted sum of routed experts: hidden (N, d), index and weights (N, k); `run(block, x, token)` is one expert."""
    out = torch.zeros_like(hidden)
    for expert, block in enumerate(blocks):
        token, place = (index == expert).nonzero(as_tuple=True)
        if len(token):
            value = run(block, hidden[token], token) * weights[token, place, None]
            out.index_add_(0, token, value.to(out.dtype))
    return out


# ---------------------------------------------------------------------------------------------------------------- layout

Layout = Literal["neuron_major", "input_major"]


def lay_out(pieces: list[Piece], roles: list[Literal["row", "column"]]) -> None:
    """Store the pieces of a neuron side by side: one (f, k, d) storage, every parameter a strided view of it.

    `roles` says whether neuron j is row j or column j of the piece. One piece with the role "column" is `input_major`.
    Values do not change. Pieces that are part of a parameter (fused gates, experts) only have columns made contiguous.
    """
    free = [p for p in pieces if p.whole]
    if len(free) == len(pieces) and len({_plane(p, r).shape for p, r in zip(pieces, roles, strict=True)}) == 1:
        planes = [_plane(p, r) for p, r in zip(pieces, roles, strict=True)]  # each (f, d)
        f, d = planes[0].shape
        storage = _empty((f, len(planes), d), planes[0])
        for k, plane in enumerate(planes):
            storage[:, k] = plane
        for k, (piece, role) in enumerate(zip(pieces, roles, strict=True)):
            view = storage[:, k]
            piece.store(view if role == "row" else view.t())
        return
    for piece, role in zip(pieces, roles, strict=True):
        if role == "column" and piece.weight.stride(0) != 1:
            parameter = getattr(piece.module, piece.parameter)
            if piece.whole:
                piece.store(piece.weight.t().contiguous().t())
            else:  # (E, d, f) experts: all of them at once
                parameter.data = parameter.data.transpose(-1, -2).contiguous().transpose(-1, -2)


def _empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    if like.device.type == "cpu":
        return kernels.cpu.empty_weights(*shape, dtype=like.dtype)
    return like.new_empty(shape)


def _plane(piece: Piece, role: str) -> Tensor:
    weight = piece.weight.detach()
    return weight if role == "row" else weight.t()


def is_laid_out(piece: Piece, role: Literal["row", "column"]) -> bool:
    """Whether a kernel can read the piece's rows (columns) as contiguous memory."""
    weight = piece.weight
    return weight.stride(1) == 1 if role == "row" else weight.stride(0) == 1


def pack(module: nn.Module) -> None:
    """Make every parameter of a module contiguous again; values do not change."""
    for parameter in module.parameters(recurse=False):
        if not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()
