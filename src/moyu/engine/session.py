"""What one applied plan shares: its settings, who watches, and the pass that is running.

A position is sparse by explicit state, never because a call happens to bring one token: `generate` says where its prompt
ends, `Session.prompt(P)` says it for direct calls, and the cache remembers it for the calls that follow.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from moyu import kernels
from moyu.engine.memory import SequenceMemory
from moyu.engine.products import Products
from moyu.engine.rows import MAX_SKIPPING_ROWS
from moyu.engine.trace import Traces
from moyu.errors import UserError
from moyu.kernels import BackendName
from moyu.methods.control import Controller
from moyu.methods.values import Rows, Site, Tap
from moyu.model import layout
from moyu.model.anatomy import Anatomy, Piece
from moyu.plan import Plan

Engine = Literal["skip", "mask"]
Prompt = int | Tensor  # columns of the prompt: of every sequence, or (B,) of each

AUTOCAST = "torch.autocast is on, and kernels read weights in their own type: units are masked"

_pass: ContextVar[Mapping[int, Pass]] = ContextVar("moyu_pass", default=MappingProxyType({}))
_prompt: ContextVar[Mapping[int, Prompt | PromptEnd]] = ContextVar("moyu_prompt", default=MappingProxyType({}))


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
    because: str | None = None  # why it did not, where the layers alone could have been native
    pending: dict[int | str, Tensor] = field(default_factory=dict)  # inputs: of inline networks, of masked heads
    past: int = 0  # columns of the cache before this call
    products: Products | None = None  # where a layer runs again and again at other levels
    spaces: dict[str, Tensor] = field(default_factory=dict)  # buffers that the layers use one after another

    def space(self, name: str, like: Tensor, width: int) -> Tensor:
        """A buffer (len(like), width) of like's dtype, the same one as long as it is large enough."""
        size, space = len(like) * width, self.spaces.get(name)
        if space is None or space.numel() < size or space.dtype != like.dtype or space.device != like.device:
            space = self.spaces[name] = like.new_empty(size)
        return space[:size].view(len(like), width)


class PromptEnd:
    """Where the prompt of a running `generate` ends: at the columns that the cache holds when the first token is drawn.

    Whatever adds columns between `generate` and `forward` (embeddings, virtual tokens, cached prefixes, prefill in chunks)
    is part of the prompt.
    """

    def __init__(self, columns: int | None = None) -> None:
        """The prompt is still being read. columns: of the ids that were given, where drafted tokens may come in one call with them."""
        self.columns, self.draws = columns, 0  # draws: tokens drawn so far

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """A logits processor that changes nothing: it is called once for each token that is drawn."""
        self.draws += 1
        return scores


class Session:
    """A model under a plan (None: nothing is skipped; for observers), as the replaced forwards see it."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan | None,
        anatomy: Anatomy,
        *,
        backend: BackendName,
        engine: Engine,
        controller: Controller | None,
    ) -> None:
        """engine "mask" simulates: dense products, masked. "skip" uses the kernels of `backend`."""
        self.model, self.plan, self.anatomy, self.engine = model, plan, anatomy, engine
        self.backend: BackendName = backend
        self.own_products = engine == "skip" and backend in ("auto", "cpu")
        self.controller = controller or (None if plan is None else plan.method.controller())
        self.owner = "dense" if plan is None else plan.hash
        self.method_name = "dense" if plan is None else plan.method.name
        self.granularity = "static" if plan is None else plan.method.granularity
        self.observer: Observer | None = None
        self.chooser: Chooser | None = None
        self.layout_lock = _CopyableLock()
        self.lookahead: set[tuple[int, Tap]] = set()  # taps that sites of other layers read
        self.places: list[tuple[str, nn.Module]] = []  # of every module whose weights are read without its forward
        self.traces = Traces()
        self.native: Any = None  # the step of the whole model in one piece, native or compiled, where there is one
        self.general_because: str | None = None  # why there is none, where kernels are used at all
        self.parted = False  # whether a native step can read first bits alone
        self.layouts: list[Callable[[], None]] = []  # each lays weights out again where something has packed them

    @property
    def rows_at_once(self) -> int:
        """Rows up to which a step is in one piece, or skips."""
        return MAX_SKIPPING_ROWS if self.native is None else self.native.most

    # ------------------------------------------------------------------------------------------------ phases and passes

    def current(self) -> Pass | None:
        """The pass that is running in this thread."""
        return _pass.get().get(id(self))

    @contextmanager
    def entered(self, state: Pass) -> Iterator[None]:
        """Make `state` the running pass of this thread, on this session's back end."""
        token = _pass.set({**_pass.get(), id(self): state})
        try:
            # auto: the back end that the code around has asked for
            with nullcontext() if self.backend == "auto" else kernels.use(self.backend):
                yield
        finally:
            _pass.reset(token)

    @contextmanager
    def outside(self) -> Iterator[None]:
        """No running pass in this thread: the model's modules compute as they do without a plan."""
        token = _pass.set({key: state for key, state in _pass.get().items() if key != id(self)})
        try:
            yield
        finally:
            _pass.reset(token)

    @contextmanager
    def prompt(self, columns: Prompt | PromptEnd) -> Iterator[None]:
        """Direct calls in this thread: columns before `columns` are dense, later ones sparse. (B,) gives each row its own."""
        token = _prompt.set({**_prompt.get(), id(self): columns})
        try:
            yield
        finally:
            _prompt.reset(token)

    def begin(self, memory: SequenceMemory, past: int, fresh: int, plain: bool = True) -> Prompt | None:
        """Note in `memory` where the dense prompt ends, for a call of `fresh` columns after `past`; None: nobody has said it.

        plain: the call brings token ids.
        """
        said = _prompt.get().get(id(self), memory.prompt)
        if isinstance(said, PromptEnd):
            if (
                memory.drawing is None or memory.drawing[0] is not said or memory.drawing[1] == said.draws
            ):  # still the prompt
                known = plain and said.columns is not None and past < said.columns <= past + fresh
                said.columns = said.columns if known else past + fresh
                memory.prompt, memory.drawing = said.columns, (said, said.draws)
            return memory.prompt
        memory.prompt = said
        return said

    @contextmanager
    def watched(self, *, observer: Observer | None = None, chooser: Chooser | None = None) -> Iterator[None]:
        """Show taps and masks to an observer, or let a chooser replace masks (record, replay, matched baselines)."""
        before = self.observer, self.chooser
        self.observer, self.chooser = observer, chooser
        try:
            yield
        finally:
            self.observer, self.chooser = before

    def new_pass(self, rows: Rows, memory: SequenceMemory) -> Pass:
        """The state of one forward over `rows`."""
        any_sparse = bool(rows.sparse.any())
        any_dense = bool((rows.valid & ~rows.sparse).any())
        if any_dense:  # once a prompt
            self._refuse_wrappers()
        cast = autocasts(self.model)
        skipping = (
            self.engine == "skip"
            and any_sparse
            and not any_dense
            and rows.seq.numel() <= MAX_SKIPPING_ROWS
            and self.observer is None
            and not torch.is_grad_enabled()
            and not cast
        )
        state = Pass(rows, memory, any_sparse, any_dense, skipping, self.observer, self.chooser)
        state.because = AUTOCAST if cast else None
        return state

    def _refuse_wrappers(self) -> None:
        """Raise UserError where a module was replaced since the plan was applied: nobody would call what replaced it."""
        for name, module in self.places:
            if self.model.get_submodule(name) is not module:
                raise UserError(
                    f"{name} was replaced or wrapped after the plan was applied, and what was added would be dropped",
                    "restore() the plan, change the model, then apply a plan to it",
                )

    def lay_out_again(self, pieces: list[Piece], roles: list) -> None:
        """Called by an executor whose weights something has repacked."""
        with self.layout_lock:
            layout.lay_out(pieces, roles)


def autocasts(model: nn.Module) -> bool:
    """Whether torch.autocast changes the types of products on the model's device: kernels read weights in their own type."""
    device = next((p.device.type for p in model.parameters()), "cpu")
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


class _CopyableLock:
    """A lock that deepcopy replaces by a new one."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a native step that lays out again holds it already

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exc: Any) -> None:
        self._lock.release()

    def __deepcopy__(self, memo: dict) -> _CopyableLock:
        return _CopyableLock()
