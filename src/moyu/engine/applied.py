"""A model with a plan applied: attach, run, restore."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from moyu import kernels
from moyu.engine import runtime, spread, steps
from moyu.engine.attention import AttentionCall, AttentionLinear
from moyu.engine.execution import DenseLinear, ExpertsCall, FfnCall, SiteState
from moyu.engine.runtime import Chooser, ForwardCall, GenerateCall, Observer, Pass, SequenceMemory, TrainCall
from moyu.errors import UserError
from moyu.kernels import Asked
from moyu.methods.base import ATTENTION, Controller, Rows, Tap
from moyu.model import anatomy, dissect, layout, networks
from moyu.model.anatomy import Anatomy

if TYPE_CHECKING:
    from moyu.plan import Plan

Engine = Literal["skip", "mask"]


class Applied(AbstractContextManager):
    """A plan applied to a model until `restore()` or the end of the `with` block.

    While applied the model generates, evaluates, copies and casts as before; training and loading other weights are
    refused. Afterwards parameters and logits are bit-identical to before.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan | None,
        *,
        backend: Asked = "auto",
        engine: Engine = "skip",
        controller: Controller | None = None,
        anatomy: Anatomy | None = None,
        check: bool = True,
    ) -> None:
        """Attach `plan` (None: nothing is skipped; for observers).

        engine "mask" simulates: dense products, masked. "skip" uses the kernels of `backend` where every row of a call
        is sparse and there are at most MAX_SKIPPING_ROWS of them. Raises UserError for a plan made for another model.
        """
        if isinstance(getattr(model, "forward", None), ForwardCall):
            raise UserError("a plan is already applied to this model", "restore() it first")
        if model.training:
            raise UserError("the model is in training mode", "call model.eval() first")
        try:
            kernels.require(backend)
        except (ValueError, RuntimeError) as error:
            raise UserError(str(error), "or use backend 'auto'") from error
        self.model, self.plan, self.engine = model, plan, engine
        self.backend: Asked = backend
        self.own_products = engine == "skip" and backend in ("auto", "cpu")
        self.controller = controller or (None if plan is None else plan.method.controller())
        self.anatomy = anatomy or dissect.dissect(model)
        spread.refuse(self.anatomy, plan, engine)
        if plan is not None and check:
            plan.check(model, self.anatomy)
        kinds = self.anatomy.foreign
        if kinds and backend != "auto":
            raise UserError(
                f"no kernel reads {kinds}, and backend {backend!r} was asked for", "leave it `auto`: units are masked"
            )
        self.owner = "dense" if plan is None else plan.hash
        self.method_name = "dense" if plan is None else plan.method.name
        self.granularity = "static" if plan is None else plan.method.granularity
        self.observer: Observer | None = None
        self.chooser: Chooser | None = None
        self.layout_lock = _CopyableLock()
        self._undo: list[tuple[nn.Module, str, Any]] = []
        self._hooks: list[Any] = []
        self._laid_out: list[nn.Module] = []
        self._places: list[tuple[str, nn.Module]] = []  # of every module whose weights are read without its forward
        self.lookahead: set[tuple[int, Tap]] = set()  # taps that sites of other layers read
        self.ffns: list[FfnCall] = []
        self.linears: list[AttentionLinear] = []
        self.attentions: list[AttentionCall] = []
        self.decode_run: steps.DecodeRun | None = None
        self.general_because: str | None = None  # why decode steps are not native, where kernels are used at all
        if kinds and engine == "skip":
            self.engine = "mask"
            self.general_because = f"no kernel reads {kinds}: units are masked, and no bytes are saved"
        try:
            self._attach()
        except BaseException:
            self.restore()
            raise

    # ------------------------------------------------------------------------------------------------ what users call

    def prompt(self, columns: int) -> AbstractContextManager[None]:
        """For direct calls of the model: columns before `columns` are dense, later ones sparse."""
        return runtime.prompt(self, columns)

    @contextmanager
    def watched(self, *, observer: Observer | None = None, chooser: Chooser | None = None) -> Iterator[None]:
        """Show taps and masks to an observer, or let a chooser replace masks (record, replay, matched baselines)."""
        before = self.observer, self.chooser
        self.observer, self.chooser = observer, chooser
        try:
            yield
        finally:
            self.observer, self.chooser = before

    def restore(self) -> nn.Module:
        """Undo everything; safe to call twice. Returns the model."""
        for handle in self._hooks:
            handle.remove()
        for module, name, before in reversed(self._undo):
            if before is None:
                vars(module).pop(name, None)
            else:
                setattr(module, name, before)
        for module in self._laid_out:
            layout.pack(module)
        self._undo, self._hooks, self._laid_out = [], [], []
        return self.model

    def __exit__(self, *exc: object) -> None:
        """restore()."""
        self.restore()

    # --------------------------------------------------------------------------------------------------- one forward

    def native_step(self, args: tuple, kwargs: dict[str, Any]) -> Any | None:
        """The model's output for a decode step that is one native call, or None: the general way must be taken."""
        run = self.decode_run
        watched = self.observer is not None or self.chooser is not None or self.controller is not None
        if run is None or run.ends is None or watched or torch.is_grad_enabled():
            return None
        return steps.whole_step(run, args, kwargs)

    def new_pass(self, rows: Rows, memory: SequenceMemory) -> Pass:
        """The state of one forward over `rows`."""
        any_sparse = bool(rows.sparse.any())
        any_dense = bool((rows.valid & ~rows.sparse).any())
        if any_dense:  # once a prompt
            self._refuse_wrappers()
        skipping = (
            self.engine == "skip"
            and any_sparse
            and not any_dense
            and rows.seq.numel() <= runtime.MAX_SKIPPING_ROWS
            and self.observer is None
            and not torch.is_grad_enabled()
        )
        return Pass(rows, memory, any_sparse, any_dense, skipping, self.observer, self.chooser)

    def _refuse_wrappers(self) -> None:
        """Raise UserError where a module stands in another one since the plan was applied: nobody would ask its wrapper."""
        for name, module in self._places:
            if self.model.get_submodule(name) is not module:
                raise UserError(
                    f"{name} was replaced or wrapped after the plan was applied, and what was added would be dropped",
                    "restore() the plan, change the model, then apply a plan to it",
                )

    def lay_out_again(self, pieces: list[anatomy.Piece], roles: list) -> None:
        """Called by an executor whose weights something has repacked."""
        with self.layout_lock:
            layout.lay_out(pieces, roles)

    def _pack(self, *args: Any) -> None:
        """Before a state dict is read: weights become contiguous in place, module by module; the next step lays out again.

        Copies would hold a second model. Not while another thread generates: its kernels would meet packed weights.
        """
        with self.layout_lock:
            for module in self._laid_out:
                layout.pack(module)

    # --------------------------------------------------------------------------------------------------------- attach

    def _replace(self, module: nn.Module, name: str, value: Any) -> None:
        self._undo.append((module, name, vars(module).get(name)))
        vars(module)[name] = value

    def states(self, block: anatomy.Block) -> list[SiteState]:
        """The plan's sites of a block."""
        if self.plan is None:
            return []
        parts = self.plan.parts_of(block.layer, block.expert)
        return [SiteState(site, params, self.plan.method_of(site)) for site, params in parts]

    def _attach(self) -> None:
        if self.plan is not None:
            self.lookahead |= {(s.source_layer, s.reads) for s in self.plan.sites() if s.source_layer != s.layer}
        blocks = [*self.anatomy.blocks, *self.anatomy.further]
        direct = {id(p.module) for b in blocks for p in b.pieces.values()} | {
            id(e.module) for e in self.anatomy.experts
        }
        self._places = [(name, m) for name, m in self.model.named_modules() if id(m) in direct]
        lookahead = self.lookahead
        taken: set[int] = set()
        for block in blocks:
            states = self.states(block)
            for name in ATTENTION:
                if name in block.pieces:
                    kind = spread.SpreadLinear if block.pieces[name].spread else AttentionLinear
                    call = kind(self, block, name, states, lookahead)
                    self.linears.append(call)
                    self._wrap_linear(call, block.pieces[name], taken)
            if self.plan is not None and self.plan.kv_policy != "full":
                self._wrap_attention(block, states)
            if block.has_ffn:
                kind = spread.SpreadFfn if block.pieces["down"].spread else FfnCall
                self._wrap_ffn(kind(self, block, states, lookahead), taken)
        for experts in self.anatomy.experts:
            self._wrap_experts(experts, lookahead)
        if self.engine == "skip" and self.backend in ("auto", "cpu"):
            self.decode_run, self.general_because = steps.plain_run(self)
            if self.decode_run is not None:
                self.decode_run.attach(self._replace)
        head = self.model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
        if head is not None and networks.is_linear(head) and id(head) not in taken:
            self._replace(head, "forward", MethodType(DenseLinear.forward, DenseLinear(self, anatomy.Piece(head))))
        self._replace(self.model, "forward", ForwardCall(self, self.model.forward))
        if callable(getattr(self.model, "generate", None)):
            self._replace(self.model, "generate", GenerateCall(self, self.model.generate))  # pyright: ignore
        self._replace(self.model, "train", TrainCall(self, self.model.train))
        self._hooks.append(self.model.register_load_state_dict_pre_hook(_refuse_loading))
        self._hooks.append(self.model.register_state_dict_pre_hook(self._pack))

    def _wrap_linear(self, call: AttentionLinear, piece: anatomy.Piece, taken: set[int]) -> None:
        taken.add(id(piece.module))
        if self.engine == "skip" and call.role == "column":
            layout.lay_out([piece], ["column"])
            self._laid_out.append(piece.module)
        self._replace(piece.module, "forward", call.forward)

    def _wrap_attention(self, block: anatomy.Block, states: list[SiteState]) -> None:
        """Let a block's attention choose before its linears, where its heads may leave keys or values out."""
        reader = block.pieces["q"].module if {"q", "k", "v"} <= set(block.pieces) else None
        module = next((m for m in self.model.modules() if reader is not None and reader in m.children()), None)
        if module is not None:
            call = AttentionCall(self, block, module, states, self.lookahead)
            self.attentions.append(call)
            self._replace(module, "forward", MethodType(AttentionCall.forward, call))

    def _wrap_ffn(self, call: FfnCall, taken: set[int]) -> None:
        block = call.block
        self.ffns.append(call)
        if self.engine == "skip":
            call.lay_out()
            self._laid_out += [p.module for p in block.pieces.values()]
        if isinstance(call, spread.SpreadFfn):
            for name in (n for n in ("gate", "up", "down") if n in block.pieces):
                module = block.pieces[name].module
                taken.add(id(module))
                self._replace(module, "forward", call.entry(name, module.forward))
            return
        call.bind()
        if block.middle is not None:
            for module in block.middle.modules:
                taken.add(id(module))
                self._replace(module, "forward", MethodType(networks.Aside.run, networks.Aside(module.forward, module)))
        if block.host is not None:
            self._replace(block.host, "forward", MethodType(FfnCall.forward, call))
            return
        inner = {}
        for name in ("gate", "up", "down"):
            if name in block.pieces and id(block.pieces[name].module) not in inner:
                module = block.pieces[name].module
                taken.add(id(module))
                inner[id(module)] = module.forward
                entry = FfnCall.leave if name == "down" else FfnCall.enter
                self._replace(module, "forward", MethodType(_Bound.run, _Bound(call, module.forward, entry)))

    def _wrap_experts(self, experts: anatomy.Experts, lookahead: set) -> None:
        calls = [FfnCall(self, b, self.states(b), lookahead) for b in experts.blocks]
        self.ffns += calls
        if self.engine == "skip":
            for call in calls:
                call.lay_out()
            self._laid_out.append(experts.module)
        for call in calls:
            call.bind()
        call = ExpertsCall(self, experts, calls, experts.module.forward)
        self._replace(experts.module, "forward", MethodType(ExpertsCall.forward, call))


class _Bound:
    """A linear of an inline network: its part in the network's call, with the forward that it replaces."""

    def __init__(self, call: FfnCall, inner: Callable, entry: Callable) -> None:
        self.call, self.inner, self.entry = call, inner, entry

    def run(self, x: Tensor) -> Tensor:
        return self.entry(self.call, x, self.inner)


class _CopyableLock:
    """A lock that deepcopy replaces by a new one."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a native step that lays out again holds it already

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exc: object) -> None:
        self._lock.release()

    def __deepcopy__(self, memo: dict) -> _CopyableLock:
        return _CopyableLock()


def _refuse_loading(module: nn.Module, *args: Any) -> None:
    raise UserError(
        "a plan is applied, and it was made for the weights that are loaded now", "restore() before loading others"
    )


def apply(
    model: nn.Module,
    plan: Plan,
    *,
    backend: Asked = "auto",
    engine: Engine = "skip",
    controller: Controller | None = None,
) -> Applied:
    """Apply a plan to a model: `with moyu.apply(model, plan): model.generate(...)`.

    The result is a context manager with `.restore()`. Raises UserError where the plan does not fit the model, where a
    plan is applied already, and where a back end was asked for that this machine has not.
    """
    return Applied(model, plan, backend=backend, engine=engine, controller=controller)
