"""A model with a plan applied: attach, run, restore."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import MethodType
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from moyu import kernels
from moyu.engine import spread, steps
from moyu.engine.attention import AttentionCall, AttentionLinear
from moyu.engine.calls import BATCHED, ForwardCall, GenerateCall, RefusedCall, TrainCall
from moyu.engine.head import HeadLinear
from moyu.engine.modules import DenseLinear, ExpertsCall
from moyu.engine.network import FfnCall
from moyu.engine.session import Engine, Session
from moyu.engine.sites import SiteState, states_of
from moyu.errors import UserError
from moyu.kernels import BackendName
from moyu.methods.control import Controller
from moyu.methods.values import ATTENTION
from moyu.model import layout
from moyu.model.anatomy import Anatomy, Block, Experts, Piece
from moyu.model.dissect import APPLIED, dissect, require_dense
from moyu.model.networks import Aside, is_linear
from moyu.model.quantised import QuantisedLinear
from moyu.plan import Plan

WORTH = 0.9  # of the bytes of a step: where less than that can be parted, drafts from first bits cost too much
WIDE_BITS = 8  # of a code whose first half stands for its weight well enough to draft with (docs/LOG.md)


class Applied(Session, AbstractContextManager):
    """A plan applied to a model until `restore()` or the end of the `with` block.

    While applied the model generates, evaluates, copies and casts as before; training and loading other weights are
    refused. Afterwards parameters and logits are bit-identical to before.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan | None,
        *,
        backend: BackendName = "auto",
        engine: Engine = "skip",
        controller: Controller | None = None,
        anatomy: Anatomy | None = None,
        check: bool = True,
        first_bits: bool = False,
    ) -> None:
        """Attach `plan` (None: nothing is skipped; for observers).

        engine "mask" simulates: dense products, masked. "skip" uses the kernels of `backend` where every row of a call
        is sparse and there are at most MAX_SKIPPING_ROWS of them. first_bits: without a plan, lay weights of 8 bits parted where they
        are nearly all of a step's bytes, so that a step can read their first bits alone (`Session.parted`). Raises UserError for a
        plan made for another model.
        """
        if not isinstance(plan, Plan | None):
            raise UserError(
                f"{plan!r:.60} is no plan",
                "make one with moyu.calibrate(model, method, windows, ...), or Plan.load(folder)",
            )
        require_dense(model)
        if model.training:
            raise UserError("the model is in training mode", "call model.eval() first")
        try:
            kernels.require(backend)
        except (ValueError, RuntimeError) as error:
            raise UserError(str(error), "or use backend 'auto'") from error
        anatomy = anatomy or dissect(model)
        spread.refuse(anatomy, plan, engine)
        if plan is not None and check:
            plan.check(model, anatomy)
        kinds = anatomy.foreign
        if kinds and backend != "auto":
            raise UserError(
                f"no kernel reads {kinds}, and backend {backend!r} was asked for", "leave it `auto`: units are masked"
            )
        super().__init__(model, plan, anatomy, backend=backend, engine=engine, controller=controller)
        self._undo: list[tuple[nn.Module, str, Any]] = []
        self._hooks: list[Any] = []
        self._laid_out: list[nn.Module] = []
        self._halves: list[Piece] = []  # weights whose first bits lie apart
        self.ffns: list[FfnCall] = []
        self.linears: list[AttentionLinear] = []
        self.attentions: list[AttentionCall] = []
        if kinds and engine == "skip":
            self.engine = "mask"
            self.general_because = f"no kernel reads {kinds}: units are masked, and no bytes are saved"
        elif engine == "mask":
            self.general_because = "units are masked, as asked"
        elif backend not in ("auto", steps.backend_of(model)):
            kind = "native" if steps.backend_of(model) == "cpu" else "compiled"
            self.general_because = f"back end {backend!r} has no {kind} step"
        try:
            self._attach(first_bits)
        except BaseException:
            self.restore()
            raise

    # ------------------------------------------------------------------------------------------------ what users call

    def restore(self) -> nn.Module:
        """Undo everything; safe to call twice. Returns the model."""
        if self.native is not None:
            self.native.detach()
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

    def _pack(self, *args: Any) -> None:
        """Before a state dict is read: weights become contiguous in place, module by module; the next step lays out again.

        Copies would hold a second model. Not while another thread generates: its kernels would meet packed weights.
        """
        with self.layout_lock:
            if self.native is not None:
                self.native.detach()
            for module in self._laid_out:
                layout.pack(module)

    # --------------------------------------------------------------------------------------------------------- attach

    def _replace(self, module: nn.Module, name: str, value: Any) -> None:
        for key, new in ((name, value), (APPLIED, True)):
            self._undo.append((module, key, vars(module).get(key)))
            vars(module)[key] = new

    def _attach(self, first_bits: bool) -> None:
        if self.plan is not None:
            self.lookahead |= {(s.source_layer, s.reads) for s in self.plan.sites() if s.source_layer != s.layer}
        blocks = [*self.anatomy.blocks, *self.anatomy.further]
        direct = {id(p.module) for b in blocks for p in b.pieces.values()} | {
            id(e.module) for e in self.anatomy.experts
        }
        self.places = [(name, m) for name, m in self.model.named_modules() if id(m) in direct]
        lookahead = self.lookahead
        taken: set[int] = set()
        for block in blocks:
            states = states_of(self, block)
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
        top = (
            None
            if self.anatomy.head is None
            else HeadLinear(self, self.anatomy.head, states_of(self, self.anatomy.head))
        )
        if top is not None:
            self._lay_out(top)  # its forward is replaced below: native steps are proved on the module's own
        calls = (*self.ffns, *self.linears, *(() if top is None else (top,)))
        self.layouts = [call.ensure_layout for call in calls]
        if self.engine == "skip" and self.backend in ("auto", steps.backend_of(self.model)):
            self.native, self.general_because = steps.plain_run(self)
            if self.native is not None:
                self.native.attach(self._replace)
                if first_bits and self.plan is None:
                    self._part()
        head = self.model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
        if top is not None:
            self._replace(top.piece.module, "forward", top.forward)
        elif head is not None and is_linear(head) and id(head) not in taken:
            self._replace(head, "forward", MethodType(DenseLinear.forward, DenseLinear(self, Piece(head))))
        # Wrappers such as PEFT's call the transformers model inside them, past their own forward.
        inner = next((m for m in self.model.modules() if isinstance(m, PreTrainedModel)), self.model)
        self._replace(inner, "forward", ForwardCall(self, inner.forward))
        if callable(getattr(self.model, "generate", None)):
            self._replace(self.model, "generate", GenerateCall(self, self.model.generate))  # pyright: ignore
        for name in BATCHED:
            if callable(getattr(self.model, name, None)):
                self._replace(self.model, name, RefusedCall(name))
        self._replace(self.model, "train", TrainCall(self, self.model.train))
        self._hooks.append(self.model.register_load_state_dict_pre_hook(_refuse_loading))
        self._hooks.append(self.model.register_state_dict_pre_hook(self._pack))

    def _wrap_linear(self, call: AttentionLinear, piece: Piece, taken: set[int]) -> None:
        taken.add(id(piece.module))
        self._lay_out(call)
        self._replace(piece.module, "forward", call.forward)

    def _lay_out(self, call: AttentionLinear | HeadLinear) -> None:
        """Lay a linear out as its site's kernels read it."""
        if self.engine == "skip" and call.role is not None:
            layout.lay_out([call.piece], [call.role])
            self._laid_out.append(call.piece.module)

    def _part(self) -> None:
        """Lay the first bits of weights by rows apart, where that lets a native step draft."""
        pieces = [piece for block in self.anatomy.blocks for piece in block.pieces.values()]
        head = self.model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
        pieces += [Piece(head)] if isinstance(head, QuantisedLinear) else []
        halves = [p for p in pieces if p.blocks and p.blocks.order == "rows" and p.blocks.format.bits == WIDE_BITS]
        self.parted = sum(p.nbytes for p in halves) >= WORTH * sum(p.nbytes for p in pieces) > 0
        if self.parted:
            self._halves = halves
            self._laid_out += [piece.module for piece in halves]
            self._lay_halves()
            self.layouts.append(self._lay_halves)

    def _lay_halves(self) -> None:
        """Lay them apart, again where something has packed them."""
        for piece in self._halves:
            if not layout.is_laid_out(piece, "parted"):
                layout.lay_out([piece], ["parted"])

    def _wrap_attention(self, block: Block, states: list[SiteState]) -> None:
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
        call.bind()
        if block.middle is not None:
            for module in block.middle.modules:
                taken.add(id(module))
                self._replace(module, "forward", MethodType(Aside.run, Aside(module.forward, module)))
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

    def _wrap_experts(self, experts: Experts, lookahead: set) -> None:
        calls = [FfnCall(self, b, states_of(self, b), lookahead) for b in experts.blocks]
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


def _refuse_loading(module: nn.Module, *args: Any) -> None:
    raise UserError(
        "a plan is applied, and it was made for the weights that are loaded now", "restore() before loading others"
    )
