"""The compiled way of a step: a plain layer as one function of tensors, which `torch.compile` takes as a whole.

All layers of one form share what is compiled. Nothing here waits for the host, so that a step is one CUDA graph
(`moyu.engine.steps.captured`). The same code without a compiler runs anywhere: that is how tests hold it to general steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from moyu import kernels
from moyu.engine.choosers import Known
from moyu.engine.sites import SiteState
from moyu.engine.steps.ends import Ends
from moyu.engine.steps.joining import Joined
from moyu.engine.steps.layers import Norm, PlainLayer, threshold
from moyu.kernels import operators
from moyu.methods.magnitude import factors_of
from moyu.methods.values import Rows
from moyu.weights import Stored

GROUP = 256  # outputs that `kernels.columns_above` lets share a threshold at least


class Levels:
    """The masks of every site in one step, by key: those to replay, and those that it took."""

    def __init__(self, states: Sequence[SiteState], chooser: Known, rows: Rows, places: int) -> None:
        """Asks `chooser` for what to replay; `rows` are the step's (B,), which computes `places` rows."""
        self.states, self.chooser, self.rows, self.places = states, chooser, rows, places
        self.given: dict[str, Tensor] = {}
        self.taken: dict[str, Tensor] = {}
        for state in states:
            known = chooser.known(state.site, rows)
            if known is not None:
                self.given[state.site.key] = functional.pad(known, (0, 0, 0, places - len(known)))

    def level(self, key: str, mask: Tensor) -> Tensor:
        """The mask that a site takes, where it would decide for this one."""
        self.taken[key] = mask = self.given.get(key, mask)
        return mask

    def tell(self) -> None:
        """Show the chooser what the step took."""
        for state in self.states:
            self.chooser(state.site, self.taken[state.site.key][: len(self.rows.seq)], self.rows, _no_hindsight)


def _no_hindsight() -> Tensor:
    raise RuntimeError("a compiled step has no hindsight: this chooser must not be one of the known ones")


class _Norm(nn.Module):
    """RMSNorm or LayerNorm, in float32 and rounded once."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.eps, self.centred, self.plus = norm.eps, norm.centred, norm.plus
        bias = getattr(norm.module, "bias", None)
        self.register_buffer("weight", norm.module.weight.detach(), persistent=False)  # pyright: ignore
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()  # of float64 too, as transformers' norms
        weight = self.weight.float() + self.plus
        if self.centred:
            bias = None if self.bias is None else self.bias.float()
            return functional.layer_norm(wide, weight.shape, weight, bias, self.eps).to(x)
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * weight).to(x)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class _Operand(nn.Module):
    """A live weight as the operators take it."""

    def __init__(self, weight: Tensor | Stored, order: Any) -> None:
        """order: of a plain weight; one in a format is read as it lies."""
        super().__init__()
        self.order = order = weight.order if isinstance(weight, Stored) else order
        tensors, self.format, shape = operators.opened("decode", "a weight", weight, order)
        self.shape = list(shape)
        self.names = [f"part_{i}" for i in range(len(tensors))]
        for name, tensor in zip(self.names, tensors, strict=True):
            self.register_buffer(name, tensor.detach(), persistent=False)

    @property
    def opened(self) -> tuple[list[Tensor], str, list[int]]:
        return [getattr(self, name) for name in self.names], self.format, self.shape


NOTHING = ([], "", [])  # an absent weight, as `kernels.operators` take it


class _Decision(nn.Module):
    """Which units a site keeps: those of |x| * c above its threshold."""

    threshold: Tensor
    factors: Tensor | None

    def __init__(self, state: SiteState, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.key = state.site.key
        factors = factors_of(state.method, state.site, state.params)
        least = torch.tensor(threshold(state, dtype), dtype=dtype, device=device)
        self.register_buffer("threshold", least, persistent=False)
        self.register_buffer("factors", None if factors is None else factors.to(device, dtype), persistent=False)

    def forward(self, x: Tensor, levels: Levels | None) -> Tensor:
        """(N, units) -> (N, units) bool."""
        score = x.abs() if self.factors is None else x.abs() * self.factors
        mask = score > self.threshold
        return mask if levels is None else levels.level(self.key, mask)


class Product(nn.Module):
    """Linears that read the same input as one product: whole, or without the inputs, or the further bits, that their sites skip."""

    weight: Any  # a Tensor, or None where it is stored in a format
    bias: Tensor | None
    thresholds: Tensor | None

    def __init__(self, layer: PlainLayer, names: Sequence[str], joined: Joined | None = None) -> None:
        """names: of the linears, which `joined` puts side by side where they are several."""
        super().__init__()
        pieces = [layer.block.pieces[n] for n in names]
        states = [layer.state(skips="columns", linear=n) for n in names]
        self.sizes, first = [p.shape[0] for p in pieces], pieces[0]
        weight = first.operand
        if joined is not None and len(pieces) > 1:
            weight = joined.side_by_side(pieces, "rows" if states[0] is None else "columns")
        self.stored, self.skips = isinstance(weight, Stored), states[0] is not None
        self.register_buffer("weight", None if self.stored else weight.detach(), persistent=False)  # pyright: ignore
        self.register_buffer("bias", _bias([_whole_bias(layer, n) for n in names], pieces), persistent=False)
        self.operand = _Operand(weight, "rows") if self.stored else None
        own = [s for s in states if s is not None]
        device = weight.device
        self.decisions: Any = nn.ModuleList(_Decision(s, first.dtype, device) for s in own)
        self.one = len({id(s) for s in own}) == 1  # one mask for all
        limits = [torch.full((size,), float(d.threshold)) for size, d in zip(self.sizes, self.decisions, strict=False)]
        plain = own and all(d.factors is None for d in self.decisions)
        self.register_buffer("thresholds", torch.cat(limits).to(device) if plain else None, persistent=False)
        if plain and device.type == "cuda":
            kernels.gpu.reserve(device)

    def forward(self, x: Tensor, levels: Levels | None) -> tuple[Tensor, ...]:
        """(N, n) -> of each linear (N, q)."""
        if self.operand is not None:
            y = self._stored(x, self.operand, levels)
        elif not self.skips:
            y = functional.linear(x, self.weight, self.bias)
        elif levels is None and self.thresholds is not None:
            y = operators.columns_above(x, self.weight, self.thresholds, self.bias)
        elif self.one:
            y = kernels.columns(x, self.weight, self.decisions[0](x, levels), bias=self.bias)
        else:
            biases = [None] * len(self.sizes) if self.bias is None else self.bias.split(self.sizes)
            parts = zip(self.weight.split(self.sizes), self.decisions, biases, strict=True)
            return tuple(kernels.columns(x, w, decide(x, levels), bias=b) for w, decide, b in parts)
        return y.split(self.sizes, -1)

    def _stored(self, x: Tensor, operand: _Operand, levels: Levels | None) -> Tensor:
        """The product with weights in a format: by rows, or in planes with the further bits of chosen inputs, or of all."""
        if operand.order == "rows":
            return operators.rows(x, *operand.opened, None, self.bias)
        every = torch.ones_like(x, dtype=torch.bool)
        return operators.levels(x, *operand.opened, self.decisions[0](x, levels) if self.skips else every, self.bias)


def _whole_bias(layer: PlainLayer, name: str) -> Tensor | None:
    """A linear's bias with the plan's, which its own site or that of the whole network's neurons brings."""
    state = layer.state(skips="columns", linear=name)
    if name == "down":
        state = state or layer.state(skips="rows") or layer.sequence_site
    return layer.block.pieces[name].bias if state is None else state.whole_bias(name, layer.block)


def _bias(biases: list[Tensor | None], pieces: Sequence[Any]) -> Tensor | None:
    if all(b is None for b in biases):
        return None
    like = next(b for b in biases if b is not None)
    both = zip(biases, pieces, strict=True)
    return torch.cat([like.new_zeros(p.shape[0]) if b is None else b.detach() for b, p in both])


class Group(nn.Module):
    """Linears that read the same input, in as few products as their sites and weights allow."""

    def __init__(self, layer: PlainLayer, names: Sequence[str], joined: Joined | None) -> None:
        """`joined` None: a product for each linear, weights as they lie."""
        super().__init__()
        parts: list[list[str]] = []
        for name in names:
            if parts and joined is not None and _fits(layer, parts[-1], name):
                parts[-1].append(name)
            else:
                parts.append([name])
        self.products = nn.ModuleList(Product(layer, part, joined) for part in parts)

    def forward(self, x: Tensor, levels: Levels | None) -> list[Tensor]:
        """(N, n) -> of each linear (N, q)."""
        return [y for product in self.products for y in product(x, levels)]


def _fits(layer: PlainLayer, part: Sequence[str], name: str) -> bool:
    """Whether a linear can be of one product with those of `part`."""
    names, pieces = [*part, name], [layer.block.pieces[n] for n in (*part, name)]
    states = [layer.state(skips="columns", linear=n) for n in names]
    forms = {None if p.blocks is None else (p.blocks.format, p.blocks.order) for p in pieces}
    if len(forms) > 1 or any(p.dtype != pieces[0].dtype for p in pieces):
        return False
    if forms != {None} and (forms != {(pieces[0].blocks.format, "rows")} or any(s is not None for s in states)):  # pyright: ignore
        return False
    if any(s is None for s in states):
        return all(s is None for s in states)
    if len({id(s) for s in states}) == 1:
        return True
    factors = any(factors_of(s.method, s.site, s.params) is not None for s in states if s is not None)
    return not factors and all(p.shape[0] % GROUP == 0 for p in pieces)


class _Network(nn.Module):
    """A feed-forward network (N, d) -> (N, d): of columns, of masks that are known, or of gate or up first."""

    gate: Any
    up: Any
    down: Any
    down_bias: Tensor | None
    gate_bias: Tensor | None
    up_bias: Tensor | None

    def __init__(self, layer: PlainLayer, joined: Joined | None) -> None:
        super().__init__()
        block, pieces = layer.block, layer.block.pieces
        first, whole = layer.state(skips="rows"), layer.sequence_site
        self.gated, self.name = block.gated, block.act or "identity"
        self.act = kernels.activation(self.name)
        self.first = None if first is None else first.site.reads
        self.key = None if whole is None else whole.site.key
        self.skips = first is not None or whole is not None
        if not self.skips:
            self.inputs = Group(layer, [n for n in ("gate", "up") if n in pieces], joined)
            self.output = Product(layer, ["down"])
            return
        for name in ("gate", "up", "down"):
            there = name in pieces and name != self.first
            operand = _Operand(pieces[name].operand, "columns" if name == "down" else "rows") if there else None
            setattr(self, name, operand)
            self.register_buffer(f"{name}_bias", _whole_bias(layer, name) if there else None, persistent=False)
        if first is not None:
            self.given = Product(layer, [first.site.reads])
            down = pieces["down"].weight
            self.decision = _Decision(first, down.dtype, down.device)

    def forward(self, x: Tensor, mask: Tensor | None, levels: Levels | None) -> Tensor:
        """mask: (N, f) bool, where it is known."""
        if not self.skips:
            made = self.inputs(x, levels)
            value = self.act(made[0]) * made[1] if self.gated else self.act(made[0])
            return self.output(value, levels)[0]
        tap = None
        if self.first is not None:
            (tap,) = self.given(x, levels)
            tap = self.act(tap) if self.first == "gate" else tap
            mask = self.decision(tap, levels)
        elif levels is not None:
            assert self.key is not None
            assert mask is not None
            mask = levels.level(self.key, mask)
        weights = [NOTHING if w is None else w.opened for w in (self.gate, self.up, self.down)]
        biases = self.gate_bias, self.up_bias, self.down_bias
        return operators.neurons(x, *weights[0], *weights[1], *weights[2], mask, self.name, *biases, tap)


class LayerStep(nn.Module):
    """A decoder layer on the next token of each row."""

    alone: Tensor | None

    def __init__(self, layer: PlainLayer, joined: Joined | None = None) -> None:
        """joined: puts weights that are read together side by side; None: they stay as they lie, as for a proof."""
        super().__init__()
        pieces = layer.block.pieces
        self.head_dim, self.scale, self.softcap, self.rotary = layer.head_dim, layer.scale, layer.softcap, layer.rotary
        self.kv_heads, self.heads = (pieces[n].shape[0] // layer.head_dim for n in ("k", "q"))
        self.norms = nn.ModuleDict({role: _Norm(norm) for role, norm in layer.norms.items()})
        self.inputs = Group(layer, ["q", "k", "v"], joined)
        self.output = Product(layer, ["o"])
        self.network = _Network(layer, joined)
        bias = pieces["down"].bias
        self.register_buffer("alone", None if bias is None else bias.detach(), persistent=False)

    def norm(self, role: str, x: Tensor) -> Tensor:
        """x where the layer has no such norm."""
        return self.norms[role](x) if role in self.norms else x

    def forward(
        self,
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        place: Tensor,
        seen: Tensor,
        angles: tuple[Tensor, Tensor] | None,
        mask: Tensor | None = None,
        levels: Levels | None = None,
        network: bool = True,
    ) -> Tensor:
        """x (P, d) -> (P, d), for rows whose keys and values (P, H, S, D) hold what is before `place` (P,); they get one more.

        seen: columns (P, S) that a row attends to. angles: cos and sin (P, width). mask: (P, f), of neurons that are known before.
        """
        count, rows = len(x), torch.arange(len(x), device=x.device)
        q, k, v = self.inputs(self.norm("before_attention", x), levels)
        q = self.norm("q_norm", q.view(count, self.heads, self.head_dim))
        k = self.norm("k_norm", k.view(count, self.kv_heads, self.head_dim))
        if angles is not None:
            q, k = (_turned(t, *angles, self.rotary) for t in (q, k))
        keys[rows, :, place] = k
        values[rows, :, place] = v.view(count, self.kv_heads, self.head_dim)
        q = q.view(count, self.kv_heads, self.heads // self.kv_heads, self.head_dim)
        scores = (q @ keys.transpose(-1, -2)).to(_wide(x)) * self.scale  # (P, H, heads of a group, S)
        if self.softcap:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        weights = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1).to(x)
        (y,) = self.output((weights @ values).reshape(count, -1), levels)
        x = x + self.norm("after_attention", y)
        if not network:
            return x if self.alone is None else x + self.alone
        return x + self.norm("after_network", self.network(self.norm("before_network", x), mask, levels))


def _turned(x: Tensor, cos: Tensor, sin: Tensor, width: int) -> Tensor:
    """x (P, h, D) with its first `width` values turned by the angles of its row, (P, width) each."""
    head, rest = x[..., :width].to(_wide(x)), x[..., width:]
    one, two = head.chunk(2, -1)
    head = head * cos[:, None] + torch.cat([-two, one], -1) * sin[:, None]
    return torch.cat([head.to(x), rest], -1)


class EndsStep(nn.Module):
    """Final norm, head and cap: hidden states (P, d) -> logits (P, V)."""

    weight: Any
    bias: Tensor | None
    threshold: Tensor

    def __init__(self, ends: Ends) -> None:
        """The weights of the live modules."""
        super().__init__()
        self.norm, self.softcap = _Norm(ends.norm), ends.softcap
        self.words = None if ends.words is None else ends.words.site.key
        if ends.words is not None:
            like: Any = ends.norm.module.weight
            least = torch.tensor(threshold(ends.words, like.dtype), dtype=like.dtype, device=like.device)
            self.register_buffer("threshold", least, persistent=False)
        weight = getattr(ends.head, "blocks", None)
        self.operand = None if weight is None else _Operand(weight, "rows")
        bias = ends.head.bias
        self.register_buffer("weight", ends.head.weight.detach() if weight is None else None, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)

    def forward(self, x: Tensor, levels: Levels | None = None) -> Tensor:
        """(P, d) -> (P, V)."""
        x = self.norm(x)
        if self.operand is None:
            logits = functional.linear(x, self.weight, self.bias)
        elif self.operand.order == "rows":
            logits = operators.rows(x, *self.operand.opened, None, self.bias)
        else:
            logits = operators.words(x, *self.operand.opened, self._kept(x, self.operand, levels), self.bias)
        return torch.tanh(logits / self.softcap) * self.softcap if self.softcap else logits

    def _kept(self, x: Tensor, operand: _Operand, levels: Levels | None) -> Tensor:
        """Which words have all their bits read, (P, V) bool: all where no site chooses, else those that first bits make likely."""
        mask = torch.ones(len(x), operand.shape[0], dtype=torch.bool, device=x.device)
        if self.words is None:
            return mask
        first = operators.words(x, *operand.opened, ~mask, self.bias)
        mask = first - first.amax(1, keepdim=True) > self.threshold
        return mask if levels is None else levels.level(self.words, mask)
