"""A feed-forward network under a plan: one order of events, masked or skipping."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from moyu import kernels
from moyu.engine.executor import Executor
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
        columns = [n for n in ("gate", "up") if self.site(reads="mlp_in", skips="columns", linear=n)]
        together = {
            "neurons": ["gate", "up", "down"],
            "gate": ["up", "down"],
            "up": ["gate", "down"],
        }
        for key, names in together.items():
            if self.site(skips="neurons") if key == "neurons" else self.site(reads=key, skips="rows"):  # pyright: ignore
                names = [n for n in names if n in pieces]
                return [([pieces[n] for n in names], ["column" if n == "down" else "row" for n in names])]
        groups = [([pieces[n]], ["column"]) for n in columns]
        return groups + ([([pieces["down"]], ["column"])] if self.site(reads="mid") else [])

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
        """The network on N rows, (N, d) -> (N, d)."""
        if self.block.middle is not None:
            return self._run_own(x, rows, state)
        pieces, act = self.block.pieces, kernels.activation(self.block.act or "identity")
        up, down, gate = pieces["up"], pieces["down"], pieces.get("gate")
        self.see("mlp_in", x, rows, state)
        neurons = self.site(skips="neurons")
        if not (state.any_sparse or self._watched(state) or torch.is_grad_enabled()):
            return self._dense_prompt(x, neurons, rows, state)
        gate_first, up_first = self.site(reads="gate"), self.site(reads="up")
        norms = column_norms(down) if state.chooser is not None else None

        def hindsight() -> Tensor:  # oracle score ||n_j||, (N, f)
            value = product(up, x)
            gated = act(value) if gate is None else act(product(gate, x)) * value
            return gated.abs() * (column_norms(down) if norms is None else norms)

        if neurons is not None and state.skipping:
            given = x if neurons.site.reads == "mlp_in" else NOTHING
            return self._neurons(x, None, neurons, self.choose(neurons, given, rows, state, hindsight), rows)
        mask, decided = None, None
        if gate is not None and gate_first is not None:
            opened = act(self.dense(gate, x, state))  # (N, f)
            self.see("gate", opened, rows, state)
            mask, decided = self.choose(gate_first, opened, rows, state, hindsight), gate_first
            if state.skipping:
                return self._neurons(x, opened, gate_first, mask, rows)
            value = opened * self.dense(up, x, state)
        elif gate is not None and up_first is not None:
            risen = self.dense(up, x, state)  # (N, f)
            self.see("up", risen, rows, state)
            mask, decided = self.choose(up_first, risen, rows, state, hindsight), up_first
            if state.skipping:
                return self._neurons(x, risen, up_first, mask, rows)
            value = act(self.dense(gate, x, state)) * risen
        else:
            site = self.site(reads="mlp_in", skips="columns", linear="up")
            value = self.columns(up, "up", x, site, rows, state)
            if gate is None:
                value = act(value)
            else:
                self.see("up", value, rows, state)
                site = self.site(reads="mlp_in", skips="columns", linear="gate")
                opened = act(self.columns(gate, "gate", x, site, rows, state))
                self.see("gate", opened, rows, state)
                value = opened * value
        self.see("mid", value, rows, state)
        if neurons is not None:
            if neurons.site.reads == "mid":
                neurons.remember(value, rows, state)
            if state.any_sparse:
                mask, decided = self.choose(neurons, x, rows, state, hindsight), neurons
        if decided is None:
            return self.columns(down, "down", value, self.site(reads="mid", skips="columns"), rows, state)
        self.observe(decided, value, mask, rows, state)  # pyright: ignore[reportArgumentType]
        kept = value * mask if mask.is_floating_point() else torch.where(mask, value, 0)  # pyright: ignore
        y = self.whole(down, kept)
        return self.compensate(self.complete(y, x, mask, decided, rows), "down", decided, rows)  # pyright: ignore

    def _dense_prompt(self, x: Tensor, neurons: SiteState | None, rows: Rows, state: Pass) -> Tensor:
        """The network on a prompt's rows of which nothing is skipped, (N, d) -> (N, d), in memory that all layers share.

        A prompt's values are megabytes, and fresh ones cost as much in page faults as the arithmetic on them.
        """
        pieces, act = self.block.pieces, kernels.activation(self.block.act or "identity")
        first = [name for name in ("gate", "up") if name in pieces]
        made = [self.whole(pieces[n], x, state.space(n, x, pieces[n].shape[0])) for n in first]  # each (N, f)
        for parts in zip(*(values.split(AT_ONCE) for values in made), strict=True):
            parts[-1].copy_(act(parts[0])) if len(parts) == 1 else parts[-1].mul_(act(parts[0]))
        value = made[-1]
        if neurons is not None and neurons.site.reads == "mid":
            neurons.remember(value, rows, state)
        return self.whole(pieces["down"], value)

    def _run_own(self, x: Tensor, rows: Rows, state: Pass) -> Tensor:
        """The same order of events where only the network's own module makes the middle.

        It sees 0 for what a mask skips, in both engines, so that a norm inside it means the same in both.
        """
        pieces, middle = self.block.pieces, self.block.middle
        assert middle is not None
        up, down, gate = pieces["up"], pieces["down"], pieces.get("gate")
        self.see("mlp_in", x, rows, state)
        neurons, gate_first, up_first = self.site(skips="neurons"), self.site(reads="gate"), self.site(reads="up")
        g: Tensor | None = None
        u: Tensor | None = None

        def hindsight() -> Tensor:  # (N, f)
            opened = None if gate is None else product(gate, x)
            return middle(x, opened, product(up, x)).abs() * column_norms(down)

        mask, decided = None, None
        if neurons is not None and state.any_sparse and (neurons.site.reads == "mlp_in" or state.skipping):
            given = x if neurons.site.reads == "mlp_in" else NOTHING
            mask, decided = self.choose(neurons, given, rows, state, hindsight), neurons
        elif gate is not None and gate_first is not None:
            g = self.dense(gate, x, state)
            opened = middle(x, g, torch.ones_like(g))
            self.see("gate", opened, rows, state)
            mask, decided = self.choose(gate_first, opened, rows, state, hindsight), gate_first
        elif gate is not None and up_first is not None:
            u = self.dense(up, x, state)
            self.see("up", u, rows, state)
            mask, decided = self.choose(up_first, u, rows, state, hindsight), up_first
        if u is None:
            site = self.site(reads="mlp_in", skips="columns", linear="up")
            u = self._kept(up, "up", x, mask, site, rows, state)
        if gate is not None and g is None:
            site = self.site(reads="mlp_in", skips="columns", linear="gate")
            g = self._kept(gate, "gate", x, mask, site, rows, state)
            if decided is None:
                self.see("up", u, rows, state)
                self.see("gate", middle(x, g, torch.ones_like(g)), rows, state)
        value = middle(x, g, u)  # (N, f)
        if neurons is not None and neurons.site.reads == "mid":
            neurons.remember(value, rows, state)
            if mask is None and state.any_sparse:  # masked: the prompt's rows had to come first
                mask, decided = self.choose(neurons, NOTHING, rows, state, hindsight), neurons
                kept = None if g is None else torch.where(mask, g, 0)
                value = middle(x, kept, torch.where(mask, u, 0))
        if mask is None or decided is None:
            self.see("mid", value, rows, state)
            return self.columns(down, "down", value, self.site(reads="mid", skips="columns"), rows, state)
        value = torch.where(mask, value, 0)
        self.see("mid", value, rows, state)
        self.observe(decided, value, mask, rows, state)
        if state.skipping:
            self._ensure([down], ["column"])
            y = kernels.columns(value, down.operand, mask, bias=down.bias)
        else:
            y = self.whole(down, value)
        return self.compensate(y, "down", decided, rows)

    def _kept(
        self, piece: Piece, name: str, x: Tensor, mask: Tensor | None, site: SiteState | None, rows: Rows, state: Pass
    ) -> Tensor:
        """gate or up where a mask of neurons keeps it, exactly 0 elsewhere; its input's columns where none is."""
        if mask is None:
            return self.columns(piece, name, x, site, rows, state)
        if not state.skipping:
            return torch.where(mask, self.whole(piece, x), 0)
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


def column_norms(piece: Piece) -> Tensor:
    """||W[:, i]||_2 of a logical linear, (in,) float."""
    return piece.weight.detach().float().norm(dim=0)
