"""A feed-forward network under a plan: one order of events, masked or skipping."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from moyu import kernels
from moyu.engine.executor import Executor, kept
from moyu.engine.session import Pass, Session
from moyu.engine.sites import SiteState
from moyu.methods.values import ATTENTION, NOTHING, Rows
from moyu.model import layout
from moyu.model.anatomy import Block, Piece, product

AT_ONCE = 64  # rows of a prompt whose values stay in the processor's cache


class FfnCall(Executor):
    """A feed-forward network under a plan: down(mask * act(gate) * up) whatever the order of decisions."""

    def __init__(self, session: Session, block: Block, states: list[SiteState], lookahead: set) -> None:
        """`states` may hold sites of the attention; they are not this network's."""
        super().__init__(session, block, [], lookahead)
        self.attach(states)
        self.inner: Callable | None = None

    def attach(self, states: list[SiteState]) -> None:
        """Keep the sites of the network."""
        self.states = [s for s in states if s.site.expert == self.block.expert and s.site.linears[-1] not in ATTENTION]

    def bind(self) -> None:
        """Keep the host's forward, for calls in which nothing is skipped."""
        self.inner = None if self.block.host is None else self.block.host.forward

    @cached_property
    def layout(self) -> list[tuple[list[Piece], list]]:
        """Groups of pieces that a decode step reads neuron by neuron, with their roles."""
        pieces = self.block.pieces
        together = {
            "neurons": ["gate", "up", "down"],
            "gate": ["up", "down"],
            "up": ["gate", "down"],
        }
        for key, names in together.items():
            if self.site(skips="neurons") if key == "neurons" else self.site(reads=key, skips="rows"):  # pyright: ignore
                names = [n for n in names if n in pieces]
                return [([pieces[n] for n in names], ["column" if n == "down" else "row" for n in names])]
        sites = {n: self.site(skips="columns", linear=n) for n in ("gate", "up", "down")}
        return [([pieces[n]], [site.role]) for n, site in sites.items() if site is not None]

    def lay_out(self) -> None:
        """Store the weights as this plan's kernels read them."""
        for pieces, roles in self.layout:
            layout.lay_out(pieces, roles)

    def ensure_layout(self) -> None:
        """Lay the weights out again where something has packed them."""
        for pieces, roles in self.layout:
            self._ensure(pieces, roles)

    def active(self, x: Tensor | None = None) -> Pass | None:
        """The running pass where this network has something to decide, remember or show, or products of its own for x."""
        state = self.session.current()
        if state is None:
            return None
        remembers = state.any_dense and any(s.method.granularity == "sequence" for s in self.states)
        watched = state.observer is not None or any(layer == self.block.layer for layer, _ in self.lookahead)
        works = self.states and state.any_sparse
        own = x is not None and self.block.middle is None and self.own_prompts(x, self.block.pieces.values(), state)
        return state if works or remembers or watched or state.skipping or state.products is not None or own else None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Stands for the forward of the network's module, (..., d) -> (..., d)."""
        state = self.active(x)
        if state is None:
            return self.inner(x, *args, **kwargs)  # pyright: ignore[reportOptionalCall]
        return self.run(x.reshape(-1, x.shape[-1]), state.rows, state).reshape(x.shape)

    def enter(self, x: Tensor, inner: Callable) -> Tensor:
        """Stands for gate's or up's forward where the network is inline: the input waits for `leave`."""
        state = self.active(x)
        if state is None:
            return inner(x)
        state.pending[id(self)] = x
        return x.new_empty(*x.shape[:-1], 0)

    def leave(self, x: Tensor, inner: Callable) -> Tensor:
        """Stands for down's forward where the network is inline."""
        state = self.active(x)
        if state is None:
            return inner(x)
        x = state.pending.pop(id(self))
        y = self.run(x.reshape(-1, x.shape[-1]), state.rows, state)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def run(self, x: Tensor, rows: Rows, state: Pass) -> Tensor:
        """The network on N rows, (N, d) -> (N, d). What decides is one of

        whole neurons   the network's input, or the prompt: before any product;
        gate first      act(gate), or up first: up. That product is whole, the others skip;
        columns         the input of each product, for that product alone.
        """
        block, pieces, own = self.block, self.block.pieces, self.block.middle is not None
        self.see("mlp_in", x, rows, state)
        free = not (state.any_sparse or self._watched(state) or torch.is_grad_enabled())  # nobody decides or looks
        site = neurons = self.site(skips="neurons")
        from_prompt = neurons is not None and neurons.site.reads == "mid"
        first = (self.site(reads="gate") or self.site(reads="up")) if block.gated else None
        mask, tap = None, None
        made: dict[str, Tensor] = {}  # gate and up, (N, f)

        def choose(site: SiteState, given: Tensor) -> Tensor:  # (N, f)
            return self.choose(site, given, rows, state, lambda: self.contributions(x))

        if neurons is not None:
            if state.any_sparse and (state.skipping or not from_prompt):
                mask = choose(neurons, NOTHING if from_prompt else x)
        elif first is not None and not free:
            site, name = first, first.site.reads
            made[name] = tap = self.dense(pieces[name], x, state)
            if name == "gate":
                tap = self.middle(x, tap, torch.ones_like(tap))
            self.see(name, tap, rows, state)
            mask = choose(first, tap)
        if mask is not None and site is not None and state.skipping and not own:
            return self._neurons(x, tap, site, mask, rows)
        hidden = mask if own else None
        for name in (n for n in ("up", "gate") if n in pieces and n not in made):
            made[name] = self._risen(name, x, hidden, rows, state, free)
        gate, up = made.get("gate"), made["up"]
        if first is None and hidden is None and gate is not None and self._watched(state):
            self.see("up", up, rows, state)
            self.see("gate", self.middle(x, gate, torch.ones_like(gate)), rows, state)
        value = self.middle(x, gate, up, free)  # (N, f)
        if neurons is not None and from_prompt:
            neurons.remember(value, rows, state)
            if mask is None and state.any_sparse:  # masked: the prompt's rows had to come first
                mask = choose(neurons, NOTHING)
                if own:
                    value = self.middle(x, None if gate is None else kept(gate, mask), kept(up, mask))
        if mask is not None and own:
            value = kept(value, mask)
        self.see("mid", value, rows, state)
        if mask is None or site is None:
            site = None if free else self.site(reads="mid", skips="columns")
            return self.columns(pieces["down"], "down", value, site, rows, state)
        self.observe(site, value, mask, rows, state)
        return self.masked(pieces["down"], "down", value, mask, site, rows, state, decided=x)

    def middle(self, x: Tensor, gate: Tensor | None, up: Tensor, free: bool = False) -> Tensor:
        """act(gate) * up, act(up), or what the network's own module makes of them, (N, f); free: in up's memory.

        With up = 1 it is the tap `gate`.
        """
        if self.block.middle is not None:
            return self.block.middle(x, gate, up)
        act = kernels.activation(self.block.act or "identity")
        if not free:
            return act(up) if gate is None else act(gate) * up
        for u, g in zip(up.split(AT_ONCE), (up if gate is None else gate).split(AT_ONCE), strict=True):
            u.copy_(act(u)) if gate is None else u.mul_(act(g))
        return up

    def contributions(self, x: Tensor) -> Tensor:
        """The size of what each neuron adds to the output, which the matched oracle ranks, (N, d) -> (N, f)."""
        gate, up, down = (self.block.pieces.get(n) for n in ("gate", "up", "down"))
        assert up is not None and down is not None
        value = self.middle(x, None if gate is None else product(gate, x), product(up, x))
        return value.abs() * down.weight.detach().float().norm(dim=0)

    def _risen(self, name: str, x: Tensor, mask: Tensor | None, rows: Rows, state: Pass, free: bool) -> Tensor:
        """gate or up, (N, d) -> (N, f), with skipped columns of its input; exactly 0 where a mask (N, f) skips it.

        The module that makes the middle sees those zeros in both engines, so that a norm in it means the same in both.
        free: in memory that all layers share, since fresh megabytes cost a prompt as much in page faults as the arithmetic.
        """
        piece = self.block.pieces[name]
        if free:
            return self.whole(piece, x, state.space(name, x, piece.shape[0]))
        if mask is None:
            site = self.site(reads="mlp_in", skips="columns", linear=name)
            return self.columns(piece, name, x, site, rows, state)
        if not state.skipping:
            return kept(self.whole(piece, x), mask)
        self._ensure([piece], ["row"])
        return kernels.rows(x, piece.operand, mask, bias=piece.bias)

    def _neurons(self, x: Tensor, given: Tensor | None, site: SiteState, mask: Tensor, rows: Rows) -> Tensor:
        """Kept neurons only; `given` is what was computed densely to decide, its matrix is not read again."""
        self._ensure(*self.layout[0])
        pieces = self.block.pieces
        gate, up, down = pieces.get("gate"), pieces.get("up"), pieces["down"]
        if given is not None and site.site.reads == "gate":
            gate = None
        if given is not None and site.site.reads == "up":
            up = None
        y = kernels.neurons(
            x,
            None if gate is None else gate.operand,
            None if up is None else up.operand,
            down.operand,
            mask,
            act=self.block.act or "identity",
            gate_bias=None if gate is None else gate.bias,
            up_bias=None if up is None else up.bias,
            down_bias=site.whole_bias("down", self.block),
            given=given,
        )
        return self.complete(y, x, mask, site, rows)
