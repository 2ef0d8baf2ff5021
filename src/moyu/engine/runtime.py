"""What is true during one generation: phases, rows, and the sequence memory that belongs to the cache.

A position is sparse by explicit state, never because a call happens to bring one token: `generate` says where its prompt
ends, `Applied.prompt(P)` says it for direct calls, and the cache remembers it for the calls that follow.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from moyu import kernels
from moyu.errors import UserError
from moyu.methods.control import Keep, Refresh, Step
from moyu.methods.values import Rows, Site, Tap

if TYPE_CHECKING:
    from moyu.engine.applied import Applied

# Rows up to which the skipping kernels are used; above it the same masks run as dense products.
MAX_SKIPPING_ROWS = 8

_pass: ContextVar[Mapping[int, Pass]] = ContextVar("moyu_pass", default=MappingProxyType({}))
_prompt: ContextVar[Mapping[int, int]] = ContextVar("moyu_prompt", default=MappingProxyType({}))


class Observer(Protocol):
    """Sees the taps and the masks of a pass (calibration, profiling)."""

    def see(self, layer: int, expert: int | None, tap: Tap, x: Tensor, rows: Rows) -> None:
        """A tap's value (N, n)."""

    def mask(self, site: Site, values: Tensor, mask: Tensor, rows: Rows) -> None:
        """A decision: the values (N, n) that the mask (N, n) acted on."""


# (site, mask of the method, rows, oracle scores) -> the mask to use. All (N, n).
Chooser = Callable[[Site, Tensor, Rows, Callable[[], Tensor]], Tensor]


@dataclass(eq=False)
class Pass:
    """One forward of the applied model."""

    rows: Rows
    memory: SequenceMemory
    any_sparse: bool
    any_dense: bool
    skipping: bool
    observer: Observer | None = None
    chooser: Chooser | None = None
    taps: dict[tuple[int, Tap], Tensor] = field(default_factory=dict)  # kept for look-ahead sites
    masks: dict[str, Tensor] = field(default_factory=dict)  # head masks, from q to o
    native: bool = False  # this step went through `moyu.engine.steps`
    pending: dict[int | str, Tensor] = field(default_factory=dict)  # inputs: of inline networks, of masked heads
    past: int = 0  # columns of the cache before this call
    products: Products | None = None  # where a layer runs again and again at other levels
    spaces: dict[str, Tensor] = field(default_factory=dict)  # memory that the layers use one after another

    def space(self, name: str, like: Tensor, width: int) -> Tensor:
        """Memory for (len(like), width) of like's dtype, the same one as long as it is large enough."""
        size, space = len(like) * width, self.spaces.get(name)
        if space is None or space.numel() < size or space.dtype != like.dtype or space.device != like.device:
            space = self.spaces[name] = like.new_empty(size)
        return space[:size].view(len(like), width)


class Products:
    """Products of a layer's linears from run to run: those are made again that depend on a level that has changed."""

    KEPT = 64  # tensors; a round of trials over seven sites makes 24
    STAGES: Mapping[str, int] = MappingProxyType(
        {
            **dict.fromkeys(("attn_in", "q", "k", "v", "qkv", "q_a", "kv_a", "g"), 0),
            **dict.fromkeys(("q_latent", "kv_latent", "q_b", "kv_b"), 1),
            **dict.fromkeys(("heads", "o"), 2),
            **dict.fromkeys(("mlp_in", "gate", "up"), 3),
            **dict.fromkeys(("mid", "down"), 4),
        }
    )  # of linears, and of what sites read, in the order of data flow

    def __init__(self, sites: list[Site]) -> None:
        """`sites` of the layer."""
        self.sites, self.levels = sites, dict[str, Hashable]()
        self.made = 0
        self._kept: dict[tuple, Tensor] = {}

    def at(self, levels: Mapping[str, Hashable]) -> None:
        """What the next run's sites are at, by key: a level, or whatever else tells runs apart."""
        self.levels = dict(levels)

    def get(self, expert: int | None, name: str, make: Callable[[], Tensor]) -> Tensor:
        """The product of a linear, (N, q), the caller's own: models add to what they are given in place."""
        stage = self.STAGES[name]
        depends = (s for s in self.sites if self.STAGES[s.reads] < stage or (name in s.linears and s.expert == expert))
        key = (expert, name, *((s.key, self.levels[s.key]) for s in depends))
        known = self._kept.pop(key, None)
        if known is None:
            known = make()
            self.made += 1
        self._kept[key] = known
        if len(self._kept) > self.KEPT:
            self._kept.pop(next(iter(self._kept)))
        return known.clone()


@dataclass(eq=False)
class SequenceMemory:
    """What a cache remembers beside keys and values; follows its reorder, repeat, select and crop."""

    owner: str | None = None  # hash of the plan that filled it
    prompt: int | None = None  # columns before this one are dense
    sites: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # method's memory, (B, ...)
    masks: dict[str, Tensor] = field(default_factory=dict)  # frozen masks, (B, n)
    columns: dict[str, Tensor] = field(
        default_factory=dict
    )  # of every column of the cache, (B, T, ...): see `moyu.engine.attention`
    dense_until: int = 0  # the memory holds nothing from this column on
    seen: int = 0  # columns of the cache that came through the applied model
    tokens: Tensor | None = None  # (B, t), kept only where a controller asks
    steps: int = 0
    control: dict[str, Tensor] = field(default_factory=dict)  # the controller's memory, (B, ...)
    decision: Keep | Refresh = field(default_factory=Keep)

    def select(self, index: Tensor) -> None:
        """Keep the slots at `index`, in that order."""
        self.sites = {k: {n: t[index.to(t.device)] for n, t in m.items()} for k, m in self.sites.items()}
        self.masks = {k: t[index.to(t.device)] for k, t in self.masks.items()}
        self.columns = {k: t[index.to(t.device)] for k, t in self.columns.items()}
        self.control = {k: t[index.to(t.device)] for k, t in self.control.items()}
        if self.tokens is not None:
            self.tokens = self.tokens[index.to(self.tokens.device)]

    def repeat(self, repeats: int) -> None:
        """Every slot `repeats` times in a row."""
        slots = next((len(t) for m in self.sites.values() for t in m.values()), 0)
        slots = slots or (0 if self.tokens is None else len(self.tokens))
        slots = slots or next((len(t) for t in self.columns.values()), 0)
        self.select(torch.arange(slots).repeat_interleave(repeats))

    def append(self, name: str, past: int, fresh: Tensor, unknown: float) -> Tensor:
        """Columns (B, T, ...) of a call that follows `past` ones: all columns so far; those that no call told are `unknown`."""
        known = self.columns.get(name, fresh[:, :0])[:, :past]
        gap = fresh.new_full((len(fresh), past - known.shape[1], *fresh.shape[2:]), unknown)
        self.columns[name] = torch.cat([known, gap, fresh], dim=1)
        return self.columns[name]

    def crop(self, length: int) -> None:
        """The cache now holds `length` columns: forget what came from later ones."""
        if length < self.dense_until:
            self.sites, self.masks, self.dense_until, self.seen = {}, {}, 0, 0
        self.seen = min(self.seen, length)
        self.columns = {k: t[:, :length] for k, t in self.columns.items()}
        if self.tokens is not None and length < self.tokens.shape[1]:
            self.tokens, self.control = self.tokens[:, :length], {}


class _Remembering:
    """Mixed into the class of a cache that carries a SequenceMemory."""

    _moyu_memory: SequenceMemory

    def reorder_cache(self, beam_idx):
        result = super().reorder_cache(beam_idx)  # pyright: ignore[reportAttributeAccessIssue]
        self._moyu_memory.select(beam_idx)
        return result

    def batch_repeat_interleave(self, repeats):
        super().batch_repeat_interleave(repeats)  # pyright: ignore[reportAttributeAccessIssue]
        self._moyu_memory.repeat(repeats)

    def batch_select_indices(self, indices):
        super().batch_select_indices(indices)  # pyright: ignore[reportAttributeAccessIssue]
        self._moyu_memory.select(indices)

    def crop(self, *args, **kwargs):
        super().crop(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        self._moyu_memory.crop(int(self.get_seq_length()))  # pyright: ignore[reportAttributeAccessIssue]

    def reset(self):
        super().reset()  # pyright: ignore[reportAttributeAccessIssue]
        self._moyu_memory = SequenceMemory()


@lru_cache
def _remembering(cls: type) -> type:
    return type(cls.__name__, (_Remembering, cls), {})


def memory_of(cache: Cache | None) -> SequenceMemory:
    """The memory of a cache, made on first sight; a fresh one where there is no cache."""
    if cache is None:
        return SequenceMemory()
    if not isinstance(cache, _Remembering):
        remember(cache, SequenceMemory())
    return cache._moyu_memory  # pyright: ignore[reportAttributeAccessIssue]


def remember(cache: Cache, memory: SequenceMemory) -> None:
    """Attach a memory to a cache. Its class changes so that copies of the cache copy the memory too."""
    if not isinstance(cache, _Remembering):
        cache.__class__ = _remembering(type(cache))
    cache._moyu_memory = memory  # pyright: ignore[reportAttributeAccessIssue]


def current(applied: Applied) -> Pass | None:
    """The pass that is running in this thread for this applied model."""
    return _pass.get().get(id(applied))


@contextmanager
def entered(applied: Applied, state: Pass) -> Iterator[None]:
    """Make `state` the running pass of this thread."""
    token = _pass.set({**_pass.get(), id(applied): state})
    try:
        yield
    finally:
        _pass.reset(token)


@contextmanager
def outside(applied: Applied) -> Iterator[None]:
    """No running pass in this thread: the model's modules compute as they do without a plan."""
    token = _pass.set({key: state for key, state in _pass.get().items() if key != id(applied)})
    try:
        yield
    finally:
        _pass.reset(token)


@contextmanager
def prompt(applied: Applied, columns: int) -> Iterator[None]:
    """Direct calls in this thread: columns before `columns` are dense, later ones sparse."""
    token = _prompt.set({**_prompt.get(), id(applied): columns})
    try:
        yield
    finally:
        _prompt.reset(token)


def prompt_end(applied: Applied, memory: SequenceMemory) -> int | None:
    """The column that the dense prompt ends before, where anything has said it."""
    return _prompt.get().get(id(applied), memory.prompt)


def rows_of(shape: tuple[int, int], mask: Tensor | None, past: int, boundary: int, device: torch.device) -> Rows:
    """Rows of a (B, T) call that follows `past` columns; `mask` (B, past + T) says which columns are no padding."""
    batch, length = shape
    columns = torch.arange(past, past + length, device=device)
    if mask is not None and mask.dim() == 2 and mask.shape[1] >= past + length:
        mask = mask[:, : past + length].bool()
        pos = (mask.long().cumsum(1) - 1).clamp(min=0)[:, past:]
        valid = mask[:, past:]
    else:
        pos = columns.expand(batch, length)
        valid = torch.ones(batch, length, dtype=torch.bool, device=device)
    slots = torch.arange(batch, device=device)[:, None].expand(batch, length)
    sparse = (columns >= boundary).expand(batch, length) & valid
    return Rows(slots.reshape(-1), pos.reshape(-1), valid.reshape(-1), sparse.reshape(-1), batch)


class ForwardCall:
    """Stands for a model's `forward`: says what each row is, then runs the model. Copies with the model."""

    def __init__(self, applied: Applied, inner: Callable) -> None:
        """`inner` is the bound forward that was there before."""
        self.applied, self.inner = applied, inner
        self.__signature__ = inspect.signature(inner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, with the applied plan."""
        applied = self.applied
        output = applied.native_step(args, kwargs)
        if output is not None:
            return output
        call = self.__signature__.bind_partial(*args, **kwargs).arguments
        call = {**call, **call.get("kwargs", {})}
        ids = call.get("input_ids")
        ids = call.get("inputs_embeds") if ids is None else ids
        if ids is None:
            return self.inner(*args, **kwargs)
        cache = call.get("past_key_values")
        memory = memory_of(cache)
        boundary = prompt_end(applied, memory)
        if boundary is None:
            if applied.granularity == "sequence":
                raise UserError(
                    f"method {applied.method_name!r} decides from the prompt, and nothing says where the prompt ends",
                    "call generate(), or wrap direct calls in `with applied.prompt(columns):`",
                )
            boundary = 0
        memory.prompt = boundary
        if applied.controller is not None:
            self._refresh(memory, cache, call)
        past = 0 if cache is None else int(cache.get_seq_length())
        unseen = memory.seen < past or (past > 0 and memory.owner != applied.owner)
        memory.owner = applied.owner
        if unseen and applied.granularity == "sequence":
            raise UserError(
                "the cache holds a prompt that this plan's memory has not seen (cropped, or filled under no plan or another one)",
                "run the prompt again with an empty cache",
            )
        rows = rows_of(tuple(ids.shape[:2]), call.get("attention_mask"), past, boundary, ids.device)
        state = applied.new_pass(rows, memory)
        state.past = past
        with entered(applied, state), kernels.use(applied.backend):
            output = self.inner(*args, **kwargs)
        memory.seen = past + ids.shape[1]
        if state.any_dense:
            memory.dense_until = max(memory.dense_until, min(memory.seen, boundary))
        made = getattr(output, "past_key_values", None)
        if cache is None and isinstance(made, Cache):
            remember(made, memory)
        if applied.controller is not None:
            self._consult(memory, state, output, ids)
        return output

    def _consult(self, memory: SequenceMemory, state: Pass, output: Any, ids: Tensor) -> None:
        """Keep the tokens and ask the controller after a sparse step."""
        memory.tokens = ids if memory.tokens is None else torch.cat([memory.tokens, ids], dim=1)
        if state.any_sparse and self.applied.controller is not None:
            memory.steps += 1
            step = Step(memory.steps, output.logits[:, -1], memory.tokens, memory.control)
            memory.decision = self.applied.controller.after(step)

    def _refresh(self, memory: SequenceMemory, cache: Cache | None, call: Mapping[str, Any]) -> None:
        """Carry out a Refresh: the last tokens again through the dense model, cache and memory included."""
        decision, memory.decision = memory.decision, Keep()
        if not isinstance(decision, Refresh) or cache is None or memory.tokens is None:
            return
        length = int(cache.get_seq_length())
        start = max(0, length - decision.tokens)
        tokens, boundary, control = memory.tokens, memory.prompt, memory.control
        mask = call.get("attention_mask")
        mask = None if mask is None else mask[:, :length]
        memory.sites, memory.masks = {}, {}
        cache.crop(start - length)
        kwargs: dict[str, Any] = {"input_ids": tokens[:, start:length], "past_key_values": cache, "use_cache": True}
        if mask is not None:
            kwargs["attention_mask"] = mask
            if "position_ids" in self.__signature__.parameters:
                kwargs["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)[:, start:]
        rows = rows_of((len(tokens), length - start), mask, start, length, tokens.device)  # all dense
        state = self.applied.new_pass(rows, memory)
        state.past = start
        with entered(self.applied, state), kernels.use(self.applied.backend):
            self.inner(**kwargs)
        memory.tokens, memory.prompt, memory.dense_until, memory.seen = tokens, boundary, length, length
        memory.control = control


class GenerateCall:
    """Stands for a model's `generate`: columns of the given input are the prompt."""

    def __init__(self, applied: Applied, inner: Callable) -> None:
        """`inner` is the bound generate that was there before."""
        self.applied, self.inner = applied, inner
        self.__signature__ = inspect.signature(inner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """generate() with the applied plan."""
        given = [*args[:1], *(kwargs.get(n) for n in ("inputs", "input_ids", "inputs_embeds"))]
        columns = next((t.shape[1] for t in given if isinstance(t, Tensor)), 1)
        with prompt(self.applied, columns):
            return self.inner(*args, **kwargs)


class TrainCall:
    """Stands for a model's `train`: masks and laid-out weights are for inference."""

    def __init__(self, applied: Applied, inner: Callable) -> None:
        """`inner` is the bound train that was there before."""
        self.applied, self.inner = applied, inner

    def __call__(self, mode: bool = True) -> Any:
        """train(False) passes; train(True) is refused."""
        if mode:
            raise UserError("a plan is applied, and training under it would train a masked model", "restore() first")
        return self.inner(False)
