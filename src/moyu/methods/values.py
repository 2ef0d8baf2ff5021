"""The values that a method speaks in: rows of activations, sites, a site's part of a plan, what `fit` sees."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from moyu.methods.selection import Rule, Soft, TopK
from moyu.methods.shapes import ORDERS, Shape, shape
from moyu.weights import Stored

Tap = Literal["attn_in", "q_latent", "kv_latent", "heads", "mlp_in", "gate", "up", "mid", "words"]
Skips = Literal["columns", "rows", "neurons", "heads", "words"]
Memory = Mapping[str, Tensor]  # one site's sequence memory; every tensor is (B, ...)
NOTHING = torch.empty(0)  # stands for an activation that a score does not look at
TAPS: tuple[Tap, ...] = ("attn_in", "q_latent", "kv_latent", "heads", "mlp_in", "gate", "up", "mid")  # of layers
READS: Mapping[str, Tap] = {  # the input of each linear
    "q": "attn_in",
    "k": "attn_in",
    "v": "attn_in",
    "qkv": "attn_in",
    "q_a": "attn_in",
    "kv_a": "attn_in",
    "g": "attn_in",
    "q_b": "q_latent",
    "kv_b": "kv_latent",
    "o": "heads",
    "gate": "mlp_in",
    "up": "mlp_in",
    "down": "mid",
}
_UNITS: tuple[Skips, ...] = ("columns", "rows", "neurons", "heads")  # of layers
ATTENTION = tuple(n for n in READS if n not in ("gate", "up", "down"))  # the linears of an attention


class Rows(NamedTuple):
    """What is known of N flat activation rows: B x T, OPT's 2-D, routed experts and packed batches alike."""

    seq: Tensor  # (N,) int64, slot in the batch
    pos: Tensor  # (N,) int64, position in the sequence, padding not counted
    valid: Tensor  # (N,) bool, False = padding, enters no statistic
    sparse: Tensor  # (N,) bool, True = skip here
    slots: int  # B; every seq is below it, some may have no row here

    def take(self, index: Tensor) -> Rows:
        """The rows at `index` (M,)."""
        return Rows(self.seq[index], self.pos[index], self.valid[index], self.sparse[index], self.slots)

    @classmethod
    def one_each(cls, slots: int, device: torch.device) -> Rows:
        """One sparse row per slot."""
        index = torch.arange(slots, device=device)
        everyone = torch.ones(slots, dtype=torch.bool, device=device)
        return cls(index, index, everyone, everyone, slots)


@dataclass(frozen=True)
class Site:
    """One mask: which activation it is decided from, and what of which weights it skips."""

    layer: int
    reads: Tap
    skips: Skips
    linears: tuple[str, ...]
    units: int
    unit_bytes: int  # bytes that skipping one unit saves, in whole 64-byte lines
    expert: int | None = None
    reads_layer: int | None = None  # another layer whose activation decides: look-ahead
    act: str | None = None  # the network's activation, for scores that foresee neurons
    further: bool = False  # of what is skipped the first bits are read all the same (`weights.planes`)

    @property
    def source_layer(self) -> int:
        """The layer whose activation decides."""
        return self.layer if self.reads_layer is None else self.reads_layer

    @property
    def key(self) -> str:
        """A stable name, unique within a plan."""
        expert = "" if self.expert is None else f".expert{self.expert}"
        skips = "bits" if self.further else self.skips
        return f"layer{self.layer}{expert}.{self.reads}.{skips}.{'+'.join(self.linears)}"


def _part(
    need: str,
    *shapes: Shape,
    names: tuple[str, ...] = (),
    skips: tuple[Skips, ...] = get_args(Skips),
    matrix: bool = False,
    read: bool = True,
) -> Mapping[str, Any]:
    """About a field of `SiteParams` that holds tensors.

    need: the word by which a step says that it can do this. shapes: of the tensors, in the letters of `methods.expected.sizes`.
    names: of the tensors in a plan's file, the field's own unless given. skips: the kinds of sites that may have it.
    matrix: weights, which are kept in few bits where the model's are. read: whether a decode step reads the tensors.
    """
    return {"need": need, "shapes": shapes, "names": names, "skips": skips, "matrix": matrix, "read": read}


@dataclass(frozen=True)
class SiteParams:
    """One site's part of a plan. A new kind of part is one field here; files, bytes and `needs` follow from it.

    blocks: (f,) unit of each neuron (MoEfication, LTE). basis: (n, n) orthogonal, the mask acts on basis.T @ v (LaRoSA).
    centre: (n,) the mask acts on v - centre (SCAP). low_rank: (q, r), (r, n), output path of the skipped part (R-Sparse).
    bias: (q,) added on sparse rows only, never folded; those of several linears one after another.
    buffers: what the method's score reads.
    """

    rule: Rule
    blocks: Tensor | None = field(
        default=None, metadata=_part("units", shape("width", kind=ORDERS), skips=_UNITS, read=False)
    )
    basis: Tensor | None = field(
        default=None, metadata=_part("basis", shape("n", "n"), skips=("columns",), matrix=True)
    )
    centre: Tensor | None = field(default=None, metadata=_part("centre", shape("n"), skips=("columns",)))
    low_rank: tuple[Tensor, Tensor] | None = field(
        default=None,
        metadata=_part(
            "low_rank", shape("q", "r"), shape("r", "n"), names=("outer", "inner"), skips=("columns",), matrix=True
        ),
    )
    bias: Tensor | None = field(default=None, metadata=_part("bias", shape("outputs"), skips=_UNITS))
    buffers: Mapping[str, Tensor] = field(default_factory=dict)

    def needs(self) -> frozenset[str]:
        """What the site asks of a step beyond keeping the units of a mask, by name."""
        asked = {p.metadata["need"] for p in _parts() if getattr(self, p.name) is not None}
        match self.rule:
            case TopK():
                asked.add("top_k")
            case Soft():
                asked.add("soft")
        return frozenset(asked)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its name in a plan's file."""
        found: dict[str, Tensor] = {}
        for part in _parts():
            value = getattr(self, part.name)
            if value is not None:
                found |= zip(_names(part), value if isinstance(value, tuple) else (value,), strict=True)
        return found | {f"buffer.{name}": tensor for name, tensor in self.buffers.items()}

    @staticmethod
    def shapes(skips: Skips) -> dict[str, Shape]:
        """The shapes that the tensors of a site may have, by their names in a plan's file, buffers aside."""
        able = [part for part in _parts() if skips in part.metadata["skips"]]
        return {name: s for part in able for name, s in zip(_names(part), part.metadata["shapes"], strict=True)}

    @classmethod
    def of(cls, rule: Rule, tensors: Mapping[str, Tensor]) -> SiteParams:
        """The inverse of `tensors`. ValueError for half of a part."""
        fields: dict[str, Any] = {}
        for part in _parts():
            found = tuple(tensors[name] for name in _names(part) if name in tensors)
            if found and len(found) < len(_names(part)):
                raise ValueError(f"of {' and '.join(_names(part))} only one is there")
            if found:
                fields[part.name] = found if part.metadata["names"] else found[0]
        buffers = {k.removeprefix("buffer."): v for k, v in tensors.items() if k.startswith("buffer.")}
        return cls(rule, **fields, buffers=buffers)

    def mapped(self, change: Callable[[str, Tensor], Tensor]) -> SiteParams:
        """The same with `change(name, tensor)` in the place of every tensor."""
        return SiteParams.of(self.rule, {name: change(name, tensor) for name, tensor in self.tensors().items()})

    def matrices(self, buffers: Collection[str]) -> dict[str, Tensor]:
        """The tensors that are weights of the plan's own, by name; `buffers`: which of the method's are."""
        names = {name for part in _parts() if part.metadata["matrix"] for name in _names(part)}
        names |= {f"buffer.{name}" for name in buffers}
        return {name: tensor for name, tensor in self.tensors().items() if name in names}

    def extra_bytes(self) -> int:
        """Bytes that a decode step reads for the plan itself, scores aside."""
        read = {name for part in _parts() if part.metadata["read"] for name in _names(part)}
        return sum(tensor.nbytes for name, tensor in self.tensors().items() if name in read)

    # What a mask of columns acts on, and what it takes away. v is the input of the site's linears, (N, n).

    def turned(self, v: Tensor) -> Tensor:
        """What the mask acts on: Q' (v - c), (N, n)."""
        v = v if self.centre is None else v - self.centre.to(v)
        return v if self.basis is None else v @ self.basis.to(v)

    def turned_back(self, v: Tensor) -> Tensor:
        """Inputs without the centre, of what a mask keeps or takes: Q v, (N, n)."""
        return v if self.basis is None else v @ self.basis.to(v).t()

    def lost(self, weight: Tensor, missing: Tensor) -> Tensor:
        """What an output lacks of missing inputs (N, n), less what the low-rank path gives: weight (q, n) -> (N, q)."""
        lost = missing @ weight.to(missing).t()
        if self.low_rank is None:
            return lost
        outer, inner = (t.to(missing) for t in self.low_rank)
        return lost - missing @ inner.t() @ outer.t()


def _parts() -> list[dataclasses.Field[Any]]:
    return [f for f in dataclasses.fields(SiteParams) if "need" in f.metadata]


PARAMS = frozenset(part.metadata["need"] for part in _parts()) | {"top_k", "soft"}  # every word of `SiteParams.needs`


def _names(part: dataclasses.Field[Any]) -> tuple[str, ...]:
    return part.metadata["names"] or (part.name,)


@dataclass(frozen=True)
class Acts:
    """What `fit` sees of one site: its tap on calibration rows.

    `dense` comes from the dense model, `sparse` from the model whose earlier sites are already sparsified (the site's own
    block still dense). Both are (N, n) with the same rows.
    """

    dense: Mapping[Tap, Tensor]
    sparse: Mapping[Tap, Tensor]
    rows: Rows
    weights: Mapping[str, Tensor]  # name -> (out, in)
    biases: Mapping[str, Tensor] = field(default_factory=dict)  # name -> (out,), of the linears that have one
    stored: Mapping[str, Stored] = field(default_factory=dict)  # name -> the weight as it is stored, if it is quantised
    known: dict[tuple[Hashable, str], Mapping[str, Tensor]] = field(
        default_factory=dict, init=False, compare=False
    )  # what a method has prepared for a site, by both: the same at every target

    @property
    def chosen(self) -> Rows:
        """The rows that masks will be decided for: sparse and valid ones."""
        return self.rows.take((self.rows.sparse & self.rows.valid).nonzero().squeeze(1))

    def met(self, tap: Tap) -> Tensor:
        """A tap on the rows that masks will be decided for, behind sparsified sites."""
        return self.sparse[tap][self.rows.sparse & self.rows.valid]
