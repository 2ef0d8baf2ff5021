"""The result of dissecting a model: logical linears, the feed-forward networks and attention of each layer, routed experts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moyu import kernels
from moyu.model.quantised import QuantisedLinear
from moyu.weights import Stored, mapped


def is_foreign(weight: Tensor) -> bool:
    """Whether a tensor is of a quantiser's own type with a `dequantize`. Only its module can compute with it."""
    return type(weight) not in (Tensor, nn.Parameter) and type(weight).dequantize is not Tensor.dequantize


def stored_bytes(weight: Tensor) -> int:
    """Bytes of memory of a tensor; for a quantised one, of all that its quantiser stores."""
    if not is_foreign(weight):
        return weight.numel() * weight.element_size()
    names, _ = weight.__tensor_flatten__()  # pyright: ignore[reportAttributeAccessIssue]
    return sum(stored_bytes(getattr(weight, name)) for name in names)


@dataclass(eq=False)
class Piece:
    """One logical linear of a block: the outputs `rows` of a module's parameter, seen as (out, in)."""

    module: nn.Module
    parameter: str = "weight"
    bias_parameter: str | None = "bias"
    transposed: bool = False  # the parameter is stored (in, out): Conv1D, some experts
    expert: int | None = None  # the parameter is stored (E, ., .), the bias (E, .)
    rows: slice = field(default_factory=lambda: slice(None))

    @property
    def weight(self) -> Tensor:
        """The live weight, (out, in): a view of the parameter, or a dequantised copy if it is quantised."""
        weight = getattr(self.module, self.parameter)
        weight = weight.dequantize() if self.foreign else weight
        weight = weight if self.expert is None else weight[self.expert]
        return (weight.t() if self.transposed else weight)[self.rows]

    @property
    def blocks(self) -> Stored | None:
        """The live weight if it is quantised, else None. `weight` then returns a copy."""
        return self.module.blocks if isinstance(self.module, QuantisedLinear) else None

    @property
    def operand(self) -> Tensor | Stored:
        """The live weight as the kernels take it."""
        return self.blocks or self.weight

    @property
    def first_values(self) -> Tensor:
        """What the first bits of a quantised weight stand for, (out, in). ValueError for one that cannot lie in planes."""
        if self.blocks is None:
            raise ValueError("a weight of plain numbers has no first bits")
        return kernels.first_values(self.blocks, self.dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = getattr(self.module, self.parameter).shape if self.foreign else self.operand.shape
        return len(range(rows)[self.rows]) if self.foreign else rows, columns

    @property
    def dtype(self) -> torch.dtype:
        """The type to compute in."""
        return self.module.like.dtype if isinstance(self.module, QuantisedLinear) else self.weight.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the weight, with its scales."""
        if self.foreign:
            weight = getattr(self.module, self.parameter)
            return stored_bytes(weight) * self.shape[0] // weight.shape[0]
        return self.operand.nbytes

    @property
    def row_bytes(self) -> int:
        """Bytes saved per skipped row."""
        return self.nbytes // self.shape[0]

    @property
    def column_bytes(self) -> int:
        """Bytes saved per skipped column. Of blocks only quants count, because 32 columns share a scale."""
        blocks = self.blocks
        return self.nbytes // self.shape[1] if blocks is None else blocks.column_bytes

    @property
    def bias(self) -> Tensor | None:
        """The live bias, (out,), or None."""
        bias = getattr(self.module, self.bias_parameter, None) if self.bias_parameter else None
        if bias is None:
            return None
        bias = bias if self.expert is None else bias[self.expert]
        return bias[self.rows].contiguous()  # a copy of f numbers if gate and up alternate

    @property
    def foreign(self) -> bool:
        """Whether the weight is of another library's quantiser, so that only the module's own forward can compute with it."""
        return not isinstance(self.module, QuantisedLinear) and is_foreign(getattr(self.module, self.parameter))

    @property
    def spread(self) -> bool:
        """Whether the weight is spread over processes."""
        return isinstance(getattr(self.module, self.parameter, None), DTensor)

    @property
    def whole(self) -> bool:
        """Whether this is the module's whole weight. Only then may its storage be laid out again."""
        return self.expert is None and self.rows == slice(None)

    @property
    def has_columns(self) -> bool:
        """Whether a column can be contiguous in memory; it cannot if gate and up alternate in one linear."""
        return self.rows.step in (None, 1)

    def store(self, weight: Tensor) -> None:
        """Point the parameter at `weight` (out, in). The parameter object stays the same."""
        parameter = getattr(self.module, self.parameter)
        before, parameter.data = parameter.data, weight.t() if self.transposed else weight
        mapped.let_go(before)


class Middle(Protocol):
    """The step from gate and up to `down`'s input, computed by the network's own module because no kernel has its formula."""

    def __call__(self, x: Tensor, gate: Tensor | None, up: Tensor) -> Tensor:
        """x (N, d), gate and up (N, f) -> the input of `down`, (N, f)."""
        ...

    @property
    def modules(self) -> list[nn.Module]:
        """The linears that are stubbed out while the module runs for its middle alone."""
        ...


def product(piece: Piece, x: Tensor) -> Tensor:
    """x @ W.T + b of a logical linear, (N, in) -> (N, out). A foreign quantised weight is run by its module's class."""
    if piece.foreign:
        return type(piece.module).forward(piece.module, x)[..., piece.rows]
    return nn.functional.linear(x, piece.weight, piece.bias)


@dataclass(eq=False)
class Attention:
    """The linears of one attention, and its heads if they were proved.

    Pieces are q, k and v, or all in qkv, or q alone if another layer has the others; with latents q_a and q_b, kv_a and kv_b;
    the attention's own gate g; and o.
    """

    pieces: dict[str, Piece]
    heads: int = 0
    kv_heads: int = 0
    head_rows: Tensor | None = None


@dataclass(eq=False)
class Block:
    """The prunable part of one decoder layer: a feed-forward network (or one expert of it) and the attention's linears."""

    layer: int
    pieces: dict[str, Piece]  # of an attention (see `Attention`), and gate, up, down; or the head
    act: str | None = None  # activation of the feed-forward network, if kernels have it
    expert: int | None = None  # of routed ones; -1, -2, ... are further dense networks of the layer
    host: nn.Module | None = None  # the module whose forward is the whole network; None: inline in the layer
    middle: Middle | None = None  # used instead of act
    cuts: bool = False  # whether the middle makes many neurons exactly 0; the gate alone decides if there is one
    heads: int = 0  # query heads; 0: not proved
    kv_heads: int = 0  # groups of heads that share keys and values
    head_rows: Tensor | None = None  # (heads, r) outputs of the query's linear that are used by that head alone

    def attend(self, attention: Attention) -> None:
        """Add an attention to this block."""
        self.pieces |= attention.pieces
        self.heads, self.kv_heads, self.head_rows = attention.heads, attention.kv_heads, attention.head_rows

    @property
    def gated(self) -> bool:
        """Whether the network is down(act(gate) * up) rather than down(act(up))."""
        return "gate" in self.pieces

    @property
    def spread(self) -> bool:
        """Whether some of its weights are spread over processes."""
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
    """A module that runs routed experts stored as 3-D parameters, with one block per expert."""

    layer: int
    module: nn.Module
    blocks: list[Block]
    routed: int = 1  # experts per row
    rest: str = "nothing"  # the output for an index beyond the experts: "nothing" is 0, "identity" the row itself

    @property
    def share(self) -> float:
        """The fraction of the experts that a row is routed to."""
        return self.routed / len(self.blocks)


@dataclass(eq=False)
class Anatomy:
    """All that dissecting found in a model."""

    layers: nn.ModuleList
    blocks: list[Block]
    experts: list[Experts]
    gaps: list[str]  # parts that stay dense, with the reason
    further: list[Block] = field(default_factory=list)  # dense networks beside the first of their layer
    head: Block | None = None  # behind the last layer: the quantised linear that gives the logits
    dense_layers: tuple[int, ...] = ()  # left dense on request

    @property
    def foreign(self) -> str:
        """Type names of the foreign quantised weights among the linears; "" if all are plain."""
        pieces = [p for b in self.all_blocks() for p in b.pieces.values()]
        return ", ".join(sorted({type(getattr(p.module, p.parameter)).__name__ for p in pieces if p.foreign}))

    def all_blocks(self) -> Iterator[Block]:
        """Every block, with those of routed experts, in layer order."""
        for block in self.blocks:
            yield block
            yield from (b for b in self.further if b.layer == block.layer)
            yield from (b for e in self.experts if e.layer == block.layer for b in e.blocks)

    def places(self) -> Iterator[Block]:
        """All that may have sites: every block, and the head."""
        yield from self.all_blocks()
        if self.head is not None:
            yield self.head

    def attention(self) -> str:
        """The kinds of attention that were proved, with their counts and heads."""
        kinds: Counter[str] = Counter()
        for block in (*self.blocks, *self.further):
            if "o" in block.pieces:
                kind = " ".join(n for n in block.pieces if n not in ("gate", "up", "down"))
                shared = f" in {block.kv_heads} groups" if 1 < block.kv_heads < block.heads else ""
                kinds[f"{kind}, {block.heads} heads{shared}" if block.heads else kind] += 1
        return "; ".join(f"{count} × {kind}" for kind, count in kinds.items()) or "left dense"
