"""The contract of a method: where it looks, what it may skip, how it ranks.

A method ranks units; MOYU selects, skips and measures. Everything here is a value: what changes while a sequence is
decoded lives in the memory that is passed in, never in a method.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from moyu import kernels
from moyu.methods import routers, selection
from moyu.methods.selection import PerUnitThreshold, Rule, Threshold, TopK
from moyu.weights import Stored

if TYPE_CHECKING:
    from moyu.model.anatomy import Block

Tap = Literal["attn_in", "q_latent", "kv_latent", "heads", "mlp_in", "gate", "up", "mid"]
Skips = Literal["columns", "rows", "neurons", "heads"]
Family = Literal["threshold", "router_off_loop", "router_in_loop", "sequence", "static", "reference", "own"]
Granularity = Literal["token", "sequence", "static"]
KvPolicy = Literal["full", "hole", "zero", "recompute", "carry"]
Memory = Mapping[str, Tensor]  # one site's sequence memory; every tensor is (B, ...)
NOTHING = torch.empty(0)  # stands for an activation that a score does not look at
TAPS: tuple[Tap, ...] = ("attn_in", "q_latent", "kv_latent", "heads", "mlp_in", "gate", "up", "mid")
KV_POLICIES: Mapping[
    KvPolicy, tuple[str, ...]
] = {  # what of a skipped head is not computed beside q, see `moyu.engine.attention`
    "full": (),
    "hole": ("k", "v"),
    "zero": ("k", "v"),
    "recompute": ("k", "v"),
    "carry": ("v",),
}
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
        """One sparse row a slot."""
        index = torch.arange(slots, device=device)
        everyone = torch.ones(slots, dtype=torch.bool, device=device)
        return cls(index, index, everyone, everyone, slots)


@dataclass(frozen=True)
class Site:
    """One mask: which activation it is decided from and which pieces of which weights it skips."""

    layer: int
    reads: Tap
    skips: Skips
    linears: tuple[str, ...]
    units: int
    unit_bytes: int  # bytes that skipping one unit saves, in whole 64-byte lines
    expert: int | None = None
    reads_layer: int | None = None  # another layer: look-ahead
    act: str | None = None  # the network's activation, for scores that foresee neurons

    @property
    def source_layer(self) -> int:
        """The layer whose activation decides."""
        return self.layer if self.reads_layer is None else self.reads_layer

    @property
    def key(self) -> str:
        """A stable name, unique within a plan."""
        expert = "" if self.expert is None else f".expert{self.expert}"
        return f"layer{self.layer}{expert}.{self.reads}.{self.skips}.{'+'.join(self.linears)}"


@dataclass(frozen=True)
class SiteParams:
    """One site's part of a plan."""

    rule: Rule
    blocks: Tensor | None = None  # (f,) unit of each neuron: MoEfication, LTE
    basis: Tensor | None = None  # (n, n) orthogonal; the mask acts on basis.T @ v (LaRoSA)
    centre: Tensor | None = None  # (n,) the mask acts on v - centre (SCAP)
    low_rank: tuple[Tensor, Tensor] | None = None  # (q, r), (r, n): output path of the skipped part (R-Sparse)
    bias: Tensor | None = None  # (q,) added on sparse rows only, never folded (E1, E2); linears one after another
    buffers: Mapping[str, Tensor] = field(default_factory=dict)

    def extra_bytes(self) -> int:
        """Bytes that a decode step reads for the plan itself, scores aside."""
        tensors = [self.basis, self.centre, self.bias, *(self.low_rank or ())]
        if isinstance(self.rule, PerUnitThreshold):
            tensors.append(self.rule.values)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


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
    known: dict[tuple[Method, str], Mapping[str, Tensor]] = field(
        default_factory=dict, init=False, compare=False
    )  # what methods have prepared

    def met(self, tap: Tap) -> Tensor:
        """A tap on the rows that masks will be decided for: sparse and valid ones, behind sparsified sites."""
        return self.sparse[tap][self.rows.sparse & self.rows.valid]


@dataclass(frozen=True)
class Method(ABC):
    """A dynamic activation method. Leaves are frozen dataclasses whose fields are the knobs.

    The class variables are declared, never detected.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    family: ClassVar[Family]
    granularity: ClassVar[Granularity]
    exact: ClassVar[bool] = False  # skips only what contributes exactly nothing
    needs_calibration: ClassVar[bool] = True
    trains: ClassVar[bool] = False
    divides: ClassVar[bool] = False  # a byte budget goes to the sites, and to their settings, where it costs least
    joint: ClassVar[bool] = False  # what `fit` leaves is then trained through the model's own loss, all sites together
    solves_target: ClassVar[bool] = True  # False: the model decides how much is skipped
    matrices: ClassVar[
        tuple[str, ...]
    ] = ()  # buffers that are weights of its own: kept in few bits where the model's are
    by_magnitude: ClassVar[bool] = False  # the score is |x| * factors(): kernels may decide while they compute

    @abstractmethod
    def sites(self, block: Block) -> tuple[Site, ...]:
        """The masks this method puts on a block; empty where the block has not what it needs."""

    @abstractmethod
    def score(self, x: Tensor, rows: Rows, site: Site, params: SiteParams, memory: Memory) -> Tensor:
        """Rank the units: (N, n) -> (N, units); row-wise, causal; larger is kept. `x` is NOTHING where only memory speaks."""

    @property
    def kernels_decide(self) -> bool:
        """Whether kernels may decide by magnitude here: what skipped units give, they must be able to give too."""
        return self.by_magnitude

    def factors(self, site: Site, params: SiteParams) -> Tensor | None:
        """c (units,) of a score |x| * c, for methods that are `by_magnitude`; None = 1."""
        return None

    def settings_for(self, bits: int, planes: bool = False) -> tuple[Method, ...]:
        """The ways to spend a byte budget on weights kept in `bits`; where there are several, held-out text decides.

        planes: whether the first bits of a weight can be read without the others.
        """
        return (self,)

    def rest_blocks(self, site: Site, params: SiteParams) -> Stored | None:
        """Of a site of columns: what stands for the columns (q, n) of skipped inputs, by columns; None: nothing."""
        return None

    def rest_of(self, x: Tensor, mask: Tensor, site: Site, params: SiteParams) -> Tensor | None:
        """What skipped units give all the same, of one linear: (N, n) and the mask (N, units) -> (N, q); None: nothing."""
        rest = self.rest_blocks(site, params)
        if rest is None:
            return None
        if x.requires_grad or x.device.type != "cpu":  # where kernels have no blocks
            return functional.linear(torch.where(mask, 0, x), rest.values(x.dtype))
        return kernels.columns(x, rest, ~mask)

    def prepare(self, site: Site, acts: Acts) -> Mapping[str, Tensor]:
        """Buffers that `score` needs, from weights and calibration activations."""
        return {}

    def fit(self, site: Site, acts: Acts, target: float) -> SiteParams:
        """Solve the site for `target` sparsity (fraction of units skipped) on the calibration rows."""
        if (self, site.key) not in acts.known:
            acts.known[self, site.key] = self.prepare(site, acts)  # the same at every target
        params = SiteParams(rule=Threshold(-math.inf), buffers=acts.known[self, site.key])
        if target == 0.0:
            return params
        scores = self.calibration_scores(site, acts, params)
        return dataclasses.replace(params, rule=Threshold(selection.quantile(scores, target)))

    def calibration_scores(self, site: Site, acts: Acts, params: SiteParams) -> Tensor:
        """The scores of the calibration rows that a deployed mask would be decided from."""
        if self.granularity == "sequence":
            memory = self.update({}, acts.sparse[site.reads], acts.rows, site, params)
            return self.score(NOTHING, Rows.one_each(acts.rows.slots, acts.rows.seq.device), site, params, memory)
        rows = acts.rows.take((acts.rows.sparse & acts.rows.valid).nonzero().squeeze(1))
        return self.score(acts.met(site.reads), rows, site, params, {})

    def update(self, memory: Memory, x: Tensor, rows: Rows, site: Site, params: SiteParams) -> Memory:
        """Sequence memory after these rows; pure. Only dense valid rows may enter it."""
        return memory

    def score_bytes(self, site: Site, params: SiteParams) -> int:
        """Bytes read in order to decide, beyond weights that the step reads anyway."""
        return 0

    def penalty(self, gates: Tensor, eta: float) -> Tensor:
        """Of a `joint` method: what its soft gates (..., units) in (0, 1) add to the task's loss at the multiplier `eta`."""
        raise NotImplementedError(f"{self.name} is not trained in the loop")

    @property
    def kv_policy(self) -> KvPolicy:
        """What becomes of the keys and values of skipped heads."""
        return "full"

    def controller(self) -> Controller | None:
        """What decides between the steps of a generation, where a method has something that does."""
        return None

    def knobs(self) -> dict[str, Any]:
        """The knobs and their values."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


@dataclass(frozen=True)
class Trained(Method):
    """A method whose score is a router's, trained off the loop: the model is frozen, calibration text trains."""

    rank: int = 64

    trains: ClassVar[bool] = True
    matrices: ClassVar[tuple[str, ...]] = ("inner.weight", "outer.weight")

    def settings_for(self, bits: int, planes: bool = False) -> tuple[Method, ...]:
        """Routers of half, a quarter and an eighth of the rank too: what a router reads, the network cannot."""
        return tuple(dataclasses.replace(self, rank=max(1, self.rank // part)) for part in (1, 2, 4, 8))

    @abstractmethod
    def router(self, site: Site, width: int) -> nn.Module:
        """An untrained router, (N, width) -> (N, units) logits; the same at every call."""

    @abstractmethod
    def lessons(self, site: Site, acts: Acts, target: float) -> tuple[Tensor, Tensor]:
        """What the router should say on `acts.met`: labels (N, units) in [0, 1], and how much each one counts."""

    def fit(self, site: Site, acts: Acts, target: float) -> SiteParams:
        x = acts.met(site.reads)
        router = self.router(site, x.shape[1])
        if target > 0.0:
            routers.train(router, x, *self.lessons(site, acts, target))
        dtype = next(iter(acts.weights.values())).dtype
        buffers = {name: tensor.to(dtype) for name, tensor in router.state_dict().items()}
        return SiteParams(rule=TopK(selection.keep_count(site.units, target)), buffers=buffers)

    def score_bytes(self, site: Site, params: SiteParams) -> int:
        return sum(t.nbytes for t in params.buffers.values())


@dataclass(frozen=True)
class Keep:
    """Go on with the masks as they are."""


@dataclass(frozen=True)
class Refresh:
    """Run the last `tokens` tokens through the dense model again, cache and sequence memory included."""

    tokens: int


@dataclass(frozen=True)
class Step:
    """What a controller sees after a decode step."""

    index: int  # decode steps so far in this sequence
    logits: Tensor  # (B, V) of the newest position
    tokens: Tensor  # (B, t) every token so far
    memory: dict[str, Tensor] = field(default_factory=dict)  # the controller's own, (B, ...); it follows the cache


class Controller(ABC):
    """Decides between steps; at most one a plan. What it must know of earlier steps it keeps in `step.memory`."""

    @abstractmethod
    def after(self, step: Step) -> Keep | Refresh:
        """The decision after a decode step."""


# ------------------------------------------------------------------------------------------------ sites of a block, by shape


def whole_lines(size: int) -> int:
    """Bytes of a piece that skipping saves for sure: whole 64-byte lines."""
    return size if size % 64 == 0 else max(0, (size - 63) // 64 * 64)


def _row_bytes(block: Block, name: str) -> int:
    return whole_lines(block.pieces[name].row_bytes)


def _column_bytes(block: Block, name: str) -> int:
    return whole_lines(block.pieces[name].column_bytes)


def _has_columns(block: Block, name: str) -> bool:
    return name in block.pieces and block.pieces[name].has_columns


def column_site(block: Block, reads: Tap, *linears: str) -> Site:
    """Skip columns (input channels) of the linears that take one input: one mask for all of them."""
    width = block.pieces[linears[0]].shape[1]
    size = sum(_column_bytes(block, n) for n in linears)
    return Site(block.layer, reads, "columns", linears, width, size, block.expert)


def projection_sites(block: Block) -> tuple[Site, ...]:
    """A mask of input channels for every linear."""
    return tuple(column_site(block, tap, name) for name, tap in READS.items() if _has_columns(block, name))


def input_sites(block: Block) -> tuple[Site, ...]:
    """A mask of input channels for every input: q, k and v share one, gate and up share one."""
    shared: dict[Tap, list[str]] = {}
    for name, tap in READS.items():
        if _has_columns(block, name):
            shared.setdefault(tap, []).append(name)
    return tuple(column_site(block, tap, *names) for tap, names in shared.items())


def row_site(block: Block, reads: Literal["gate", "up"]) -> Site:
    """Decide on gate (or up), computed densely; skip rows of the other and columns of down."""
    other = "up" if reads == "gate" else "gate"
    size = _row_bytes(block, other) + _column_bytes(block, "down")
    return Site(block.layer, reads, "rows", (other, "down"), block.neurons, size, block.expert)


def head_sites(block: Block, *, groups: bool = False, kv: KvPolicy = "full") -> tuple[Site, ...]:
    """Skip whole heads: their rows of the query's linear where those are known, columns of o, and what the KV policy leaves out.

    The first linear's input decides. groups: a unit is the query heads that share keys and values; always so where keys or
    values are left out. Nothing where there is one unit, or where k and v that a policy needs are no linears of their own.
    """
    left_out, pieces = KV_POLICIES[kv], block.pieces
    units = block.kv_heads if groups or left_out else block.heads
    if units < 2 or (left_out and not {"q", "k", "v"} <= set(pieces)):
        return ()
    readers = [n for n in ("q_a", "q_b") if n in pieces] or ["q" if "q" in pieces else "qkv"]
    held = whole_lines(pieces["o"].column_bytes * pieces["o"].shape[1] // units)
    held += sum(whole_lines(pieces[n].row_bytes * pieces[n].shape[0] // units) for n in left_out)
    if block.head_rows is not None:
        held += whole_lines(block.head_rows.numel() // units * pieces[readers[-1]].row_bytes)
    return (Site(block.layer, "attn_in", "heads", (*readers, *left_out, "o"), units, held, block.expert),)


def check_kv(policy: str) -> None:
    """Refuse a KV policy that there is not (ValueError)."""
    if policy not in KV_POLICIES:
        raise ValueError(f"kv must be one of {', '.join(KV_POLICIES)}, not {policy!r}")


def head_norms(heads: Tensor, o: Tensor, units: int) -> Tensor:
    """What each head adds to the output, ||W_o,h x_h||: heads (N, H D), o (d, H D) -> (N, units), by Gram matrices."""
    each, by_head = (t.float().unflatten(1, (units, -1)) for t in (heads, o.detach()))
    gram = torch.einsum("dhi,dhj->hij", by_head, by_head)
    return torch.einsum("nhi,hij,nhj->nh", each, gram, each).clamp(min=0).sqrt()


def neuron_site(block: Block, reads: Literal["mlp_in", "mid"], reads_layer: int | None = None) -> Site:
    """Skip whole neurons: rows of gate and up, columns of down. "mid" is the prompt's, not the current token's."""
    rows = [n for n in ("gate", "up") if n in block.pieces]
    size = sum(_row_bytes(block, n) for n in rows) + _column_bytes(block, "down")
    linears = (*rows, "down")
    return Site(block.layer, reads, "neurons", linears, block.neurons, size, block.expert, reads_layer, block.act)
