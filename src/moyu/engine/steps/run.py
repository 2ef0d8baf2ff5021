"""One decode step through all layers of a model, as one native call."""

from __future__ import annotations

import operator
from array import array
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from moyu import kernels
from moyu.engine.cache import KvCache, KvLayer
from moyu.engine.choosers import Known
from moyu.engine.memory import cache_of
from moyu.engine.rows import MAX_SKIPPING_ROWS
from moyu.engine.session import Pass, Session
from moyu.engine.sites import SiteState
from moyu.engine.steps.ends import Ends
from moyu.engine.steps.layers import PlainLayer
from moyu.engine.steps.levels import StepLevels
from moyu.engine.steps.way import Watch
from moyu.engine.trace import NATIVE
from moyu.kernels import cpu
from moyu.methods.values import NOTHING, Rows

Reads = Literal["plan", "all", "first bits"]  # of the weights
GROW = 256  # tokens by which a cache's buffers grow at least


class DecodeRun:
    """All layers of a model as one native call a step. Copies rebuild what points into memory."""

    trace, most, waits_for_nobody = NATIVE, MAX_SKIPPING_ROWS, False

    def __init__(self, session: Session, layers: list[PlainLayer], ends: Ends | None) -> None:
        """`layers` are all decoder layers, in order; `ends` what is around them, where that is plain too."""
        self.session, self.layers, self.ends = session, layers, ends
        self.sequence_sites = [layer.sequence_site for layer in layers]
        self._decoders: tuple[dict[Reads, Any], list[Tensor]] | None = (
            None  # and what they point to beside the parameters
        )
        self._watch: Watch | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_decoders": None, "_watch": None}

    def attach(self, replace: Callable[[nn.Module, str, Any], None]) -> None:
        """Put the run in the place of the layers' forwards."""
        for position, layer in enumerate(self.layers):
            call = _LayerCall(self, position, layer.module.forward)
            replace(layer.module, "forward", MethodType(_LayerCall.forward, call))

    def detach(self) -> None:
        """`Run.detach`: weights are as the session's executors have laid them out."""

    def usable(self, state: Pass, hidden: Tensor, kwargs: dict[str, Any]) -> bool:
        """Whether this call is a decode step that the native layers may take."""
        cache, mask = cache_of(kwargs), kwargs.get("attention_mask")
        if (
            not state.skipping
            or not isinstance(state.chooser, Known | None)
            or hidden.dim() != 3
            or hidden.shape[1] != 1
            or hidden.dtype != self.dtype
            or torch.compiler.is_compiling()
            or (mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[2] != 1))
        ):
            return False
        return self.can_append(cache, len(hidden), hidden.dtype) and self.untouched()

    def can_append(self, cache: Any, batch: int, dtype: torch.dtype) -> bool:
        """Whether the cache's layers are plain growing ones, all of one form, which the kernel can append to."""
        known = getattr(cache, "layers", ())
        if any(layer.index >= len(known) for layer in self.layers):
            return False
        held = [known[layer.index] for layer in self.layers]
        if isinstance(cache, KvCache):
            return all(isinstance(own, KvLayer) and own.is_initialized for own in held) and all(
                own.buffers[0].shape == own.buffers[1].shape == held[0].buffers[0].shape
                and own.buffers[0].shape[0] == batch
                and own.buffers[0].dtype == dtype
                for own in held
            )
        room = getattr(cache, "_moyu_room", None)
        if room is not None and room.fits(held, batch, dtype):
            return True
        if any(type(own) is not DynamicLayer or not own.is_initialized for own in held):
            return False
        shape = held[0].keys.shape
        return (
            len(shape) == 4
            and shape[0] == batch
            and all(own.keys.shape == own.values.shape == shape and own.keys.dtype == dtype for own in held)
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.layers[0].block.pieces["q"].dtype

    def untouched(self) -> bool:
        """Whether the modules are still what was proved: nobody hooked, replaced or patched a module of them."""
        if self._watch is None:
            self._make()
        assert self._watch is not None
        return self._watch.untouched()

    def _moved(self) -> bool:
        """Whether there is no decoder, or something has repacked the weights since it was made."""
        return self._watch is None or self._watch.moved()

    def _make(self) -> None:
        """Build, once where several threads find that it must be."""
        with self.session.layout_lock:
            if self._moved():
                self._build()

    def _build(self) -> None:
        """Take the pointers of the live parameters, laid out for this plan."""
        for lay_out_again in self.session.layouts:
            lay_out_again()
        decoders: dict[Reads, Any] = {}
        kept: list[Tensor] = []
        for reads in ("plan", "all", "first bits"):
            decoder = decoders[reads] = cpu.extension().Decoder()
            how = {"dense": reads != "plan", "first_bits": reads == "first bits"}
            for layer in self.layers:
                decoder.add(layer.native(kept=kept, **how))
            if self.ends is not None:
                decoder.ends = self.ends.native(**how)
        self._decoders, self._watch = (decoders, kept), Watch(self._modules())

    def _modules(self) -> list[nn.Module]:
        """Those that a native step stands for."""
        if self.ends is not None:
            return list(self.session.model.modules())
        return [module for layer in self.layers for module in layer.module.modules()]

    def step(self, state: Pass, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Hidden states (B, 1, d) after all layers; appends to the cache."""
        y, cache = hidden.contiguous().clone(), cache_of(kwargs)
        assert cache is not None
        given = kwargs.get("position_embeddings") if self.layers[0].rotary else None
        angles = [] if given is None else [tuple(a.reshape(len(a), -1).float() for a in given)]
        allowed = _allowed(kwargs.get("attention_mask"), len(y), int(cache.get_seq_length(self.layers[0].index)))
        masks = [None if site is None else self._mask(site, state) for site in self.sequence_sites]
        levels = self.levels(state.chooser, state.rows)
        kernels.count("decode", self.launch(cache, masks, angles, allowed, levels, hidden=y))
        return y

    def levels(self, chooser: Any, rows: Rows, whole: bool = False) -> StepLevels | None:
        """What a chooser replays and wants to see in a step of these rows; None where there is none. whole: up to the logits."""
        head = self.ends.words if whole and self.ends is not None else None
        return None if chooser is None else StepLevels(self.layers, head, chooser, rows)

    def _mask(self, site: SiteState, state: Pass) -> Tensor:
        frozen = state.memory.masks.get(site.site.key)
        return site.decide(NOTHING, state.rows, state) if frozen is None else frozen

    def logits(
        self,
        cache: Any,
        ids: Tensor,
        masks: Sequence[Tensor | None],
        allowed: Tensor | None,
        positions: Tensor | None,
        rows: Rows | None,
    ) -> Tensor:
        """`Run.logits`."""
        assert self.ends is not None
        at = int(cache.get_seq_length()) if positions is None else positions
        angles = [each.at(at, self.dtype) for each in self.ends.angles]
        logits = torch.empty((len(ids), 1, self.ends.head.out_features), dtype=self.dtype)
        levels = None if rows is None else self.levels(self.session.chooser, rows, whole=True)
        read = self.launch(cache, masks, angles, allowed, levels, ids=ids.contiguous(), logits=logits)
        kernels.count("decode", read)
        return logits

    def dense_logits(self, cache: KvCache, ids: Tensor, reads: Reads = "all") -> Tensor:
        """Logits (B, T, V) of the next tokens (B, T) of every sequence, with nothing skipped; they join the cache.

        reads: "all" bits, or "first bits" alone of the weights that are parted.
        """
        assert self.ends is not None
        positions = (cache.lengths[:, None] + torch.arange(ids.shape[1])).flatten()
        angles = [each.at(positions, self.dtype) for each in self.ends.angles]
        logits = torch.empty((*ids.shape, self.ends.head.out_features), dtype=self.dtype)
        nothing = [None] * len(self.layers)
        kernels.count(
            "decode", self.launch(cache, nothing, angles, None, ids=ids.contiguous(), logits=logits, reads=reads)
        )
        return logits

    def launch(
        self,
        cache: Any,
        masks: Sequence[Tensor | None],
        angles: Sequence[tuple[Tensor, ...]],
        allowed: Tensor | None,
        levels: StepLevels | None = None,
        *,
        hidden: Tensor | None = None,
        ids: Tensor | None = None,
        logits: Tensor | None = None,
        reads: Reads = "plan",
    ) -> int:
        """One step, which appends to the cache: `hidden` (B, 1, d) in place, or from `ids` (B, T) to `logits` (B, T, V).

        `masks`: (B, f) a layer, or None where nothing is known before; `levels`: replayed and told afterwards; `reads`: what the plan
        keeps, or all of the weights, or their first bits; the others as `run_step` takes them. T is 1 on caches that are not MOYU's
        own. Returns the bytes read.
        """
        if self._moved():
            self._make()
        built = self._decoders  # held until the step is over, whatever another thread builds meanwhile
        assert built is not None
        rows, fresh = (len(hidden), 1) if hidden is not None else ids.shape  # pyright: ignore[reportOptionalMemberAccess]
        room = KvRoom(cache, self.layers, fresh) if isinstance(cache, KvCache) else _room(cache, self.layers)
        masks = [mask if mask is None or mask.stride(1) == 1 else mask.contiguous() for mask in masks]
        for layer, mask in zip(self.layers, masks, strict=True):
            if mask is not None and (mask.shape != (rows, layer.block.neurons) or mask.dtype != torch.bool):
                raise ValueError(
                    f"layer {layer.index}: a mask is {mask.dtype} {tuple(mask.shape)}, not one of {rows} rows and "
                    f"{layer.block.neurons} neurons"
                )
        memory = array("q")
        for k, (where, mask) in enumerate(zip(room.where, masks, strict=True)):
            given, row, taken = (0, 0, 0) if levels is None else levels.neurons[k]
            if mask is not None and not given:
                given, row = mask.data_ptr(), mask.stride(0)
            memory.extend((*where, given, row, taken))
        read = run_step(
            built[0][reads],
            room.past,
            room.capacity,
            angles,
            allowed,
            memory,
            levels,
            hidden=hidden,
            ids=ids,
            logits=logits,
        )
        room.grow(fresh)
        if levels is not None:
            levels.tell()
        return read


class _LayerCall:
    """One layer of a run: the first does the work of all, the others hand it on."""

    def __init__(self, run: DecodeRun, position: int, inner: Callable) -> None:
        self.run, self.position, self.inner = run, position, inner

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Stands for the layer's forward."""
        state = self.run.session.current()
        if state is None:
            return self.inner(hidden, *args, **kwargs)
        if self.position == 0:
            state.native = not args and self.run.usable(state, hidden, kwargs)
            if state.native:
                return self.run.step(state, hidden, kwargs)
            if self.run.ends is None:  # else the step from token ids has said why
                why = "the call is no step of one more token on a cache that native layers can append to"
                state.because = state.because or why
        return hidden if state.native else self.inner(hidden, *args, **kwargs)


def run_step(
    decoder: Any,
    past: Tensor,
    capacity: int,
    angles: Sequence[tuple[Tensor, ...]],
    allowed: Tensor | None,
    memory: array,
    levels: StepLevels | None = None,
    *,
    hidden: Tensor | None = None,
    ids: Tensor | None = None,
    logits: Tensor | None = None,
) -> int:
    """One step on `hidden` (B, 1, d) in place, or from `ids` (B, T) to `logits` (B, T, V). Returns the bytes read.

    `past`: (B,) int64, the positions that each row's keys and values hold, of `capacity` that there is room for; `angles`: cos
    and sin of each rotary embedding, (1 or B * T, width) float32, contiguous; `allowed`: (B, at least past + 1) uint8, or None = all;
    `memory`: structs DecodeMemory of kernels.h; `levels`: replayed and told. IndexError for a length or a token id out of
    range.
    """
    data = hidden if logits is None else logits
    assert data is not None
    step = cpu.extension().Step()
    batch, fresh = (len(data), 1) if ids is None else ids.shape
    step.dtype, step.rows, step.threads = cpu.dtype_code(data.dtype), batch * fresh, torch.get_num_threads()
    if fresh > 1:  # every token is a row of its own, and knows whose
        sequences = torch.arange(batch).repeat_interleave(fresh)
        step.sequences, step.sequences_count = sequences.data_ptr(), batch
        past = (past[:, None] + torch.arange(fresh)).flatten()
    step.past, step.capacity, step.memory = past.data_ptr(), capacity, memory.buffer_info()[0]
    if levels is not None:
        step.columns = levels.columns.buffer_info()[0]
        step.words_given, step.words_row, step.words_taken = levels.words
    if hidden is not None:
        step.hidden = hidden.data_ptr()
    if ids is not None and logits is not None:
        step.ids, step.logits = ids.data_ptr(), logits.data_ptr()
    tables = array("q", [table.data_ptr() for pair in angles for table in pair])
    if angles:
        (count, step.rotary), step.angles, step.angles_count = angles[0][0].shape, tables.buffer_info()[0], len(angles)
        step.angles_row = 0 if count == 1 else step.rotary
    if allowed is not None:
        step.mask, step.mask_row = allowed.data_ptr(), allowed.stride(0)
    return decoder.step(step)


class KvRoom:
    """The buffers of MOYU's own cache as the extension takes them, with places for `fresh` more positions a row."""

    def __init__(self, cache: KvCache, layers: list[PlainLayer], fresh: int) -> None:
        """The cache's layers are all `KvLayer`s of one shape."""
        self.cache, self.past = cache, cache.lengths
        held = [cache.layers[layer.index] for layer in layers]
        for own in held:
            own.reserve(own.longest + fresh)
        self.capacity = min(own.capacity for own in held)
        self.where = [
            tuple(n for buffer in own.buffers for n in (buffer.data_ptr(), buffer.stride(0), buffer.stride(1)))
            for own in held
        ]

    def grow(self, fresh: int) -> None:
        """So many more positions of every row are filled."""
        self.cache.hold(self.past + fresh)


class _Room:
    """Keys and values of all layers in one buffer (2 L, B, H, more than they hold, D); the cache's own are views of it."""

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers
        held = [t for layer in layers for t in (layer.keys, layer.values)]  # 2 L of (B, H, length, D)
        self.length = held[0].shape[2]
        longer = self.length + max(GROW, self.length // 2)
        self.buffer = held[0].new_empty(len(held), *held[0].shape[:2], longer, held[0].shape[3])
        for part, content in zip(self.buffer, held, strict=True):
            part[:, :, : self.length] = content
        each = self.buffer.stride(0) * self.buffer.element_size()
        row, head = self.buffer.stride(1), self.buffer.stride(2)
        start = self.buffer.data_ptr()
        self.where = [
            (start + 2 * k * each, row, head, start + (2 * k + 1) * each, row, head) for k in range(len(layers))
        ]
        self.views = self._cut()

    def __reduce__(self) -> tuple:
        return type(None), ()  # a copy of the cache has other memory: it makes a room of its own

    @property
    def capacity(self) -> int:
        """Positions that the buffer has room for."""
        return self.buffer.shape[3]

    @property
    def past(self) -> Tensor:
        """Positions that each row holds, (B,) int64."""
        return torch.full((self.buffer.shape[1],), self.length)

    def fits(self, layers: list[Any], batch: int, dtype: torch.dtype) -> bool:
        """Whether these layers hold what this room gave them, for so many rows of that type."""
        return self.buffer.shape[1] == batch and self.buffer.dtype == dtype and self.holds(layers)

    def holds(self, layers: list[Any]) -> bool:
        """Whether these layers hold what this room gave them, and it has a place left."""
        held = [t for layer in layers for t in (layer.keys, layer.values)]
        return self.length < self.capacity and len(held) == len(self.views) and all(map(operator.is_, held, self.views))

    def grow(self, fresh: int) -> None:
        """One more position is filled."""
        self.length += fresh
        self.views = self._cut()

    def _cut(self) -> tuple[Tensor, ...]:
        views = self.buffer[:, :, :, : self.length].unbind(0)
        for layer, keys, values in zip(self.layers, views[::2], views[1::2], strict=True):
            layer.keys, layer.values = keys, values
        return views


def _room(cache: Any, plain: list[PlainLayer]) -> _Room:
    """The room of a cache; a new one where somebody has put other keys and values into it, or where it is full."""
    layers = [cache.layers[layer.index] for layer in plain]
    room = getattr(cache, "_moyu_room", None)
    if room is None or room.layers != layers or not room.holds(layers):
        room = cache._moyu_room = _Room(layers)
    return room


def _allowed(mask: Tensor | None, batch: int, past: int) -> Tensor | None:
    """Which positions may be attended to, (B, past + 1) uint8, from a mask (1 or B, 1, 1, past + 1) that is boolean or added."""
    if mask is None:
        return None
    open_ = mask if mask.dtype == torch.bool else mask > -1.0
    return open_[:, 0, 0, : past + 1].expand(batch, -1).to(torch.uint8).contiguous()
