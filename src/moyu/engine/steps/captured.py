"""The compiled step of a whole model: storage that does not move, and on a GPU one CUDA graph a storage.

A cache's keys and values move into a *slab*, a storage of a power of two of rows and of positions, and stay there while they fit:
steps append in place, and rows join, leave and go back as in any storage. The graph of a slab is captured at its first step and
serves every cache that comes to lie there. So nothing is copied between a cache and the step, and a longer text costs a
capture each time that it doubles.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import cache as once
from typing import Any

import torch
from torch import Tensor, nn

from moyu import kernels
from moyu.engine.cache import KvCache, KvLayer
from moyu.engine.session import Session
from moyu.engine.steps.compiled import EndsStep, LayerStep, Levels
from moyu.engine.steps.ends import Ends
from moyu.engine.steps.joining import Joined
from moyu.engine.steps.layers import PlainLayer
from moyu.engine.steps.way import Angles, NotCompiled, Watch
from moyu.engine.trace import COMPILED
from moyu.kernels import gpu
from moyu.kernels.gpu.common import MAX_ROWS
from moyu.methods.values import Rows
from moyu.model.quantised import QuantisedLinear

SHORTEST = 256  # positions of a slab
SLABS = 6  # that are kept
FORMS = 64  # of layers and slabs that are compiled in a process; torch stops at 8


class Compiled:
    """`Way`, compiled."""

    CAN = frozenset(
        {"columns by magnitude", "rows by magnitude", "neurons by masks", "factors", "bias", "further bits"}
        | {"words by score"}  # of the one method that has such sites, `shortlist`
    )

    def why_not(self, session: Session) -> str | None:
        """Why it cannot run the model."""
        devices = {p.device for p in session.model.parameters()}
        if len(devices) > 1:
            return "its weights lie on several devices"
        linears = [m for m in session.model.modules() if isinstance(m, QuantisedLinear)]
        for linear in linears if "cpu" not in {d.type for d in devices} else ():
            if not kernels.serves(linear.like.new_empty(1, 0), linear.format):
                return f"no GPU kernel reads weights in {linear.format.name}"
        for block in session.anatomy.places() if session.plan is not None else ():
            parts = session.plan.parts_of(block.layer, block.expert) if session.plan is not None else ()
            for site, _ in parts:
                if site.further or site.skips == "words":
                    pieces = [block.pieces[n] for n in site.linears]
                    blocks = [(p.blocks.format, p.shape[0]) for p in pieces if p.blocks is not None]
                    why = next((w for b in blocks if (w := gpu.unread(b[0], site.skips, b[1]))), None)
                    if why is not None and "cpu" not in {d.type for d in devices}:
                        return f"no GPU kernel reads {why}"
                    continue
                names = ("gate", "up", "down") if site.skips in ("rows", "neurons") else site.linears
                kinds = {p.blocks.format.name for n in names if (p := block.pieces.get(n)) and p.blocks is not None}
                if kinds:
                    return f"no compiled step skips parts of weights in {', '.join(sorted(kinds))}"
        return None

    def layer(self, layer: PlainLayer, x: Tensor, angles: Angles | None, network: bool) -> Tensor:
        """`Way.layer`."""
        step, (rows, tokens, _) = LayerStep(layer), x.shape
        keys, values = (x.new_zeros(rows, step.kv_heads, tokens, layer.head_dim) for _ in range(2))
        y, columns = x.clone(), torch.arange(tokens, device=x.device).expand(rows, -1)
        for t in range(tokens):
            now = None if angles is None else (angles[0][0, t : t + 1], angles[1][0, t : t + 1])
            place = torch.full((rows,), t, device=x.device)
            y[:, t] = step(x[:, t], keys, values, place, _seen(columns, place, layer.window), now, network=network)
        return y

    def logits(self, ends: Ends, ids: Tensor) -> Tensor:
        """`Way.logits`."""
        return EndsStep(ends)(ends.embedding(ids))

    def run(
        self, session: Session, layers: list[PlainLayer], ends: Ends | None
    ) -> tuple[CompiledRun | None, str | None]:
        """`Way.run`."""
        if ends is None:
            return None, "its embedding, final norm or head is not plain, and a compiled step goes from ids to logits"
        return CompiledRun(session, layers, ends), None


class CompiledRun:
    """The compiled step of a model. Copies compile and capture anew."""

    trace, most, waits_for_nobody = COMPILED, MAX_ROWS, True

    def __init__(self, session: Session, layers: list[PlainLayer], ends: Ends) -> None:
        """`layers` are all decoder layers, in order."""
        self.session, self.layers, self.ends = session, layers, ends
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("session", "layers", "ends")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def _forget(self) -> None:
        self._watch: Watch | None = None
        self._slabs: list[Slab] = []
        self._joined = Joined()

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.layers[0].block.pieces["q"].dtype

    def attach(self, replace: Callable[[nn.Module, str, Any], None]) -> None:
        """`Run.attach`: it takes the place of no module."""

    def detach(self) -> None:
        """Give weights back their own storages; the next step puts them together again."""
        self._joined.apart()
        self._forget()

    def can_append(self, cache: Any, batch: int, dtype: torch.dtype) -> bool:
        """`Run.can_append`: to MOYU's own cache, where all layers keep keys and values."""
        return (
            isinstance(cache, KvCache)
            and cache.per_row
            and all(own.is_initialized and len(own.lengths) == batch and own.dtype == dtype for own in cache.layers)
        )

    def untouched(self) -> bool:
        """`Run.untouched`."""
        if self._watch is None or self._watch.moved():
            with self.session.layout_lock:
                self._build()
        assert self._watch is not None
        return self._watch.untouched()

    def _build(self) -> None:
        """Take the live parameters, laid out for this plan."""
        self.detach()
        for lay_out_again in self.session.layouts:
            lay_out_again()
        self._steps = [LayerStep(layer, self._joined) for layer in self.layers]
        self._end = EndsStep(self.ends)
        self._watch = Watch(list(self.session.model.modules()))

    def logits(
        self,
        cache: KvCache,
        ids: Tensor,
        masks: Sequence[Tensor | None],
        allowed: Tensor | None,
        positions: Tensor | None,
        rows: Rows | None,
    ) -> Tensor:
        """`Run.logits`."""
        slab, lengths = self._slab(cache), cache.lengths
        slab.tell(ids, lengths, None if positions is lengths else positions, allowed, masks)
        levels = None
        if rows is not None:
            states = [state for layer in self.layers for state in layer.states]
            states += [] if self.ends.words is None else [self.ends.words]
            levels = Levels(states, self.session.chooser, rows, slab.places)  # pyright: ignore[reportArgumentType]
        with kernels.use(self.session.backend):
            logits = slab.step(levels)[: len(ids), None].clone()
        if levels is not None:
            levels.tell()
        cache.hold(lengths + 1)
        return logits

    def _slab(self, cache: KvCache) -> Slab:
        """Where the cache's keys and values lie, with room for one more position; they move where there is none."""
        rows, needed = len(cache.lengths), int(cache.get_seq_length()) + 1
        slab = next((s for s in self._slabs if s.holds(cache)), None)
        if slab is not None and slab.places >= rows and slab.capacity >= needed:
            return slab
        places, capacity = _power(rows), _power(max(SHORTEST, needed, cache.expected))
        free = [s for s in self._slabs if s.free and s.places == places and s.capacity >= capacity]
        slab = min(free, key=lambda s: s.capacity, default=None)
        if slab is None:
            unused = [s for s in self._slabs if s.free]
            for old in unused[: max(0, len(self._slabs) - SLABS + 1)]:
                self._slabs.remove(old)
            slab = Slab(self._steps, self._end, self.layers, self.ends, cache, places, capacity)
            self._slabs.append(slab)
        cache.lie_in(slab.lent())
        return slab


def _power(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()


class Slab:
    """Keys and values of `places` rows of `capacity` positions in every layer, what a step is told, and its graph."""

    def __init__(
        self,
        steps: list[LayerStep],
        end: EndsStep,
        layers: list[PlainLayer],
        ends: Ends,
        cache: KvCache,
        places: int,
        capacity: int,
    ) -> None:
        """The cache says of what form keys and values are."""
        self.layers, self.ends, self.places, self.capacity = layers, ends, places, capacity
        self._steps, self._end = steps, end
        self.storages: list[tuple[Tensor, Tensor]] = []
        for own in cache.layers:
            like = own.buffers[0]
            form = places, like.shape[1], capacity, like.shape[3]
            self.storages.append((like.new_zeros(form), like.new_zeros(form)))
        device = self.device = self.storages[0][0].device
        self._lent: weakref.ref[Tensor] | None = None
        self._ids, self._place, self._positions = torch.zeros(3, places, dtype=torch.int64, device=device).unbind(0)
        self._alive = torch.zeros(places, 1, dtype=torch.bool, device=device)
        self._open = torch.ones(places, capacity, dtype=torch.bool, device=device)
        self._columns = torch.arange(capacity, device=device)
        dtype = layers[0].block.pieces["q"].dtype
        self._angles = [tuple(t.to(device) for t in each.at(self._columns, dtype)) for each in ends.angles]
        self._masks = [
            None
            if layer.sequence_site is None
            else torch.zeros(places, layer.block.neurons, dtype=torch.bool, device=device)
            for layer in layers
        ]
        self._told: Tensor | None = None  # the lengths that a step has left; None: to be told anew
        self._given: list[Tensor | None] = [None] * len(layers)
        self._padded = False
        self._graph: Any = None
        self._logits = self._alive  # of the graph

    @property
    def free(self) -> bool:
        """Whether no cache lies here."""
        return self._lent is None or self._lent() is None

    def lent(self) -> list[tuple[Tensor, Tensor]]:
        """The storage of every layer for a cache, which lies here as long as these tensors live."""
        for storage in self.storages:
            for tensor in storage:
                tensor.zero_()  # what another text left may be infinite, which a weight of 0 would not bear
        views = [(keys.view_as(keys), values.view_as(values)) for keys, values in self.storages]
        self._lent, self._told = weakref.ref(views[0][0]), None
        return views

    def holds(self, cache: KvCache) -> bool:
        """Whether the cache lies here."""
        own = cache.layers[0]
        return isinstance(own, KvLayer) and not self.free and own.storage[0] is self._lent()  # pyright: ignore

    def tell(
        self,
        ids: Tensor,
        lengths: Tensor,
        positions: Tensor | None,
        allowed: Tensor | None,
        masks: Sequence[Tensor | None],
    ) -> None:
        """What the next step is told, as `Run.logits` has it; only what the last step did not leave as it is."""
        count = len(ids)
        self._ids[:count].copy_(ids[:, 0])
        if self._told is None or not torch.equal(self._told, lengths):
            self._alive.zero_()[:count] = True
            self._place.zero_()[:count].copy_(lengths)
            self._positions.copy_(self._place)
        if positions is not None:
            self._positions[:count].copy_(positions)
        self._told = None if positions is not None else lengths + 1
        if allowed is not None or self._padded:
            self._open.fill_(True)
            self._padded = allowed is not None
        if allowed is not None:
            self._open[:count, : allowed.shape[1]].copy_(allowed)
        for k, (own, mask) in enumerate(zip(self._masks, masks, strict=True)):
            before = self._given[k]
            if own is not None and mask is not None and not _same(before, mask):
                own.zero_()[:count].copy_(mask)
                self._given[k] = mask

    def step(self, levels: Levels | None) -> Tensor:
        """One step: logits (places, V), which the next one overwrites."""
        if levels is not None or self.device.type != "cuda":
            return self._run(levels)
        if self._graph is None:
            try:
                self._graph = self._capture()
            except Exception as error:  # of a compiler, a driver, or memory that is full: whoever writes wants his text
                line = next(iter(str(error).strip().splitlines()), "")
                raise NotCompiled(f"the step did not compile: {type(error).__name__}, {line:.200}") from error
        self._graph.replay()
        return self._logits

    def _run(self, levels: Levels | None = None) -> Tensor:
        x = self.ends.embedding(self._ids[:, None])[:, 0] * self._alive  # a row of nobody keeps nothing
        angles = [(cos[self._positions], sin[self._positions]) for cos, sin in self._angles]
        seen: dict[int, Tensor] = {}
        for layer, step, (keys, values), mask in zip(self.layers, self._steps, self.storages, self._masks, strict=True):
            if layer.window not in seen:
                seen[layer.window] = self._open & _seen(self._columns, self._place, layer.window)
            now = angles[layer.angles] if layer.rotary else None
            x = _layer(step, x, keys, values, self._place, seen[layer.window], now, mask, levels)
        logits = _ends(self._end, x, levels)
        self._place += 1
        self._positions += 1
        return logits

    def _capture(self) -> Any:
        """The step as a CUDA graph, its kernels compiled and chosen before."""
        held = self._place.clone(), self._positions.clone()

        def back() -> None:
            for own, before in zip((self._place, self._positions), held, strict=True):
                own.copy_(before)

        with torch.cuda.device(self.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    self._run()
                    back()
            torch.cuda.current_stream().wait_stream(side)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._logits = self._run()
            back()
        return graph


def _seen(columns: Tensor, place: Tensor, window: int) -> Tensor:
    """Columns (S,) that rows at `place` (P,) attend to, (P, S) bool."""
    place = place[:, None]
    return (columns <= place) & (columns > place - window) if window else columns <= place


def _same(before: Tensor | None, mask: Tensor) -> bool:
    """Whether a mask is the one that was told: `before` is held, so its memory is nobody else's."""
    return (
        before is not None
        and before.data_ptr() == mask.data_ptr()
        and before.shape == mask.shape
        and before.stride() == mask.stride()
    )


# ---------------------------------------------------------------------------------------------------------------- compiling


def _call(step: nn.Module, *args: Any) -> Tensor:
    return step(*args)


@once
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_call, fullgraph=True, dynamic=False)


def _layer(step: LayerStep, x: Tensor, *args: Any) -> Tensor:
    """A layer, compiled where that is possible; all layers of one form share what is compiled."""
    return _compile(x, args[-1])(step, x, *args)


def _ends(step: EndsStep, x: Tensor, levels: Levels | None) -> Tensor:
    return _compile(x, levels)(step, x, levels)


def _compile(x: Tensor, levels: Levels | None) -> Callable[..., Tensor]:
    """The call that runs a step on x: compiled on a GPU with Triton, unless masks are replayed or told."""
    if levels is not None or not x.is_cuda or gpu.unavailable() is not None:
        return _call
    return _within_limit


def _within_limit(*args: Any) -> Tensor:
    with torch._dynamo.config.patch(recompile_limit=FORMS):  # pyright: ignore[reportAttributeAccessIssue]
        return _compiled()(*args)
