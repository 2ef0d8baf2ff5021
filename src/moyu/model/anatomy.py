"""What surgery finds in a model: logical linears, feed-forward networks and attention of each layer, routed experts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moyu.model.quantised import QuantisedLinear
from moyu.weights import Stored, mapped


def is_foreign(weight: Tensor) -> bool:
    """Whether a tensor is a quantiser's own kind and says which values it stands for; then its module computes with it."""
    return type(weight) not in (Tensor, nn.Parameter) and type(weight).dequantize is not Tensor.dequantize


def stored_bytes(weight: Tensor) -> int:
    """Bytes of memory that a tensor takes, of what a quantiser keeps for it where it is quantised."""
    if not is_foreign(weight):
        return weight.numel() * weight.element_size()
    names, _ = weight.__tensor_flatten__()  # pyright: ignore[reportAttributeAccessIssue]
    return sum(stored_bytes(getattr(weight, name)) for name in names)


@dataclass(eq=False)
class Piece:
    """One logical linear of a block: `rows` of a module's parameter, seen as (out, in)."""

    module: nn.Module
    parameter: str = "weight"
    bias_parameter: str | None = "bias"
    transposed: bool = False  # the parameter is stored (in, out): Conv1D, some experts
    expert: int | None = None  # the parameter is stored (E, ., .), the bias (E, .)
    rows: slice = field(default_factory=lambda: slice(None))

    @property
    def weight(self) -> Tensor:
        """The live weight, (out, in), a view of the parameter; where it is quantised, a copy of the values it stands for."""
        weight = getattr(self.module, self.parameter)
        weight = weight.dequantize() if self.foreign else weight
        weight = weight if self.expert is None else weight[self.expert]
        return (weight.t() if self.transposed else weight)[self.rows]

    @property
    def blocks(self) -> Stored | None:
        """The live weight where it is kept as blocks; `weight` then makes a copy of it."""
        return self.module.blocks if isinstance(self.module, QuantisedLinear) else None

    @property
    def operand(self) -> Tensor | Stored:
        """The live weight as the kernels take it."""
        return self.blocks or self.weight

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = getattr(self.module, self.parameter).shape if self.foreign else self.operand.shape
        return len(range(rows)[self.rows]) if self.foreign else rows, columns

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.module.like.dtype if isinstance(self.module, QuantisedLinear) else self.weight.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the weight, scales included."""
        if self.foreign:
            weight = getattr(self.module, self.parameter)
            return stored_bytes(weight) * self.shape[0] // weight.shape[0]
        return self.operand.nbytes

    @property
    def row_bytes(self) -> int:
        """Bytes that skipping a row saves."""
        return self.nbytes // self.shape[0]

    @property
    def column_bytes(self) -> int:
        """Bytes that skipping a column saves; of blocks, whose scales belong to 32 columns, those of its quants."""
        blocks = self.blocks
        return self.nbytes // self.shape[1] if blocks is None else blocks.column_bytes

    @property
    def bias(self) -> Tensor | None:
        """The live bias, (out,), or None."""
        bias = getattr(self.module, self.bias_parameter, None) if self.bias_parameter else None
        if bias is None:
            return None
        bias = bias if self.expert is None else bias[self.expert]
        return bias[self.rows].contiguous()  # where gate and up take turns: a copy of f numbers

    @property
    def foreign(self) -> bool:
        """Whether only the module's own forward can compute with the weight."""
        return not isinstance(self.module, QuantisedLinear) and is_foreign(getattr(self.module, self.parameter))

    @property
    def spread(self) -> bool:
        """Whether the weight is spread over processes."""
        return isinstance(getattr(self.module, self.parameter, None), DTensor)

    @property
    def whole(self) -> bool:
        """Whether this is the module's whole weight, so that its storage may be laid out anew."""
        return self.expert is None and self.rows == slice(None)

    @property
    def has_columns(self) -> bool:
        """Whether a column of it can lie in one piece; not where gate and up take turns in one linear."""
        return self.rows.step in (None, 1)

    def store(self, weight: Tensor) -> None:
        """Point the parameter at `weight` (out, in), keeping its identity."""
        parameter = getattr(self.module, self.parameter)
        before, parameter.data = parameter.data, weight.t() if self.transposed else weight
        mapped.let_go(before)


class Middle(Protocol):
    """Values of a network's neurons as its own module makes them, where no kernel's formula does."""

    def __call__(self, x: Tensor, gate: Tensor | None, up: Tensor) -> Tensor:
        """x (N, d), gate and up (N, f) -> what `down` takes, (N, f)."""
        ...

    @property
    def modules(self) -> list[nn.Module]:
        """The linears whose forward stands aside while the module runs for its middle alone."""
        ...


def product(piece: Piece, x: Tensor) -> Tensor:
    """x @ W.T + b of a logical linear, (N, in) -> (N, out); by its module's class where the weight is quantised."""
    if piece.foreign:
        return type(piece.module).forward(piece.module, x)[..., piece.rows]
    return nn.functional.linear(x, piece.weight, piece.bias)


@dataclass(eq=False)
class Attention:
    """The linears of one attention, and its heads where they were proved.

    Pieces are q, k, v, or all in qkv (or only q, where another layer has the others); behind a latent q_a and q_b, kv_a and
    kv_b; a gate g of its own; o.
    """

    pieces: dict[str, Piece]
    heads: int = 0
    kv_heads: int = 0
    head_rows: Tensor | None = None


@dataclass(eq=False)
class Block:
    """What one decoder layer offers: a feed-forward network (or one expert of it) and its attention's linears."""

    layer: int
    pieces: dict[str, Piece]  # of an attention (see `Attention`), and gate, up, down
    act: str | None = None  # activation of the feed-forward network, where kernels have it
    expert: int | None = None  # of routed ones; -1, -2, ... are further dense networks of the layer
    host: nn.Module | None = None  # the module whose forward is the whole network; None: inline in the layer
    middle: Middle | None = None  # instead of act
    cuts: bool = False  # whether that middle makes many neurons exactly 0, by the gate alone where there is one
    heads: int = 0  # of queries; 0: they were not proved
    kv_heads: int = 0  # groups of heads that share keys and values
    head_rows: Tensor | None = None  # (heads, r) outputs of the query's linear that nobody needs without the head

    def attend(self, attention: Attention) -> None:
        """Take an attention as this block's."""
        self.pieces |= attention.pieces
        self.heads, self.kv_heads, self.head_rows = attention.heads, attention.kv_heads, attention.head_rows

    @property
    def gated(self) -> bool:
        """Whether the network is down(act(gate) * up) rather than down(act(up))."""
        return "gate" in self.pieces

    @property
    def spread(self) -> bool:
        """Whether weights of it are spread over processes."""
        return any(p.spread for p in self.pieces.values())

    @property
    def has_ffn(self) -> bool:
        """Whether a feed-forward network was proved."""
        return "down" in self.pieces

    @property
    def neurons(self) -> int:
        """f, the feed-forward width."""
        return self.pieces["down"].shape[1]


@dataclass(eq=False)
class Experts:
    """A module that runs routed experts kept as 3-D parameters; its blocks are one an expert."""

    layer: int
    module: nn.Module
    blocks: list[Block]
    routed: int = 1  # experts that a row is routed to
    rest: str = "nothing"  # what a row gets for an index beyond the experts: "nothing", or itself ("identity")

    @property
    def share(self) -> float:
        """The part of its experts that a row is routed to."""
        return self.routed / len(self.blocks)


@dataclass(eq=False)
class Anatomy:
    """All that surgery found in a model."""

    layers: nn.ModuleList
    blocks: list[Block]
    experts: list[Experts]
    gaps: list[str]  # what stays dense and why
    further: list[Block] = field(default_factory=list)  # dense networks beside the first of their layer
    dense_layers: tuple[int, ...] = ()  # left alone as asked

    @property
    def foreign(self) -> str:
        """The kinds of quantised weights among the linears, by name; "" where all are plain."""
        pieces = [p for b in self.all_blocks() for p in b.pieces.values()]
        return ", ".join(sorted({type(getattr(p.module, p.parameter)).__name__ for p in pieces if p.foreign}))

    def all_blocks(self) -> Iterator[Block]:
        """Every block, routed experts included, in layer order."""
        for block in self.blocks:
            yield block
            yield from (b for b in self.further if b.layer == block.layer)
            yield from (b for e in self.experts if e.layer == block.layer for b in e.blocks)

    def attention(self) -> str:
        """The kinds of attention that were proved, with how many there are and with their heads."""
        kinds: Counter[str] = Counter()
        for block in (*self.blocks, *self.further):
            if "o" in block.pieces:
                kind = " ".join(n for n in block.pieces if n not in ("gate", "up", "down"))
                shared = f" in {block.kv_heads} groups" if 1 < block.kv_heads < block.heads else ""
                kinds[f"{kind}, {block.heads} heads{shared}" if block.heads else kind] += 1
        return "; ".join(f"{count} × {kind}" for kind, count in kinds.items()) or "left dense"
