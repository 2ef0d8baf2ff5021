"""How a block computes under a plan: one order of events, with masked products or with kernels that skip.

`Products` is the only difference between simulating and skipping. Scores, rules and memory are the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from moyu import kernels
from moyu.engine import runtime
from moyu.methods import selection
from moyu.methods.base import Method
from moyu.methods.magnitude import rest_of
from moyu.methods.needs import ALL
from moyu.methods.sequence import remembers
from moyu.methods.values import ATTENTION, NOTHING, Rows, Site, SiteParams, Tap
from moyu.model import experts, layout
from moyu.model.anatomy import Block, Experts, Piece, product

if TYPE_CHECKING:
    from moyu.engine.applied import Applied
    from moyu.engine.runtime import Pass


AT_ONCE = 64  # rows of a prompt whose values stay in the cache


class SiteState:
    """A site, its part of the plan, and its method."""

    def __init__(self, site: Site, params: SiteParams, method: Method) -> None:
        """Values only; what changes in a sequence is in the pass and its memory."""
        self.site, self.params, self.method = site, params, method
        self.static_mask: Tensor | None = None
        self.factors: Tensor | None = None  # of a score |x| * c, for native steps

    def decide(self, x: Tensor, rows: Rows, state: Pass) -> Tensor:
        """The method's own mask of these rows, (N, n) bool before dense rows are freed."""
        site, params, method = self.site, self.params, self.method
        if method.granularity == "static":
            if self.static_mask is None:
                self.static_mask = self._expand(method.score(NOTHING, rows.take(rows.seq[:1] * 0), site, params, {}))
            return self.static_mask.expand(len(rows.seq), -1)
        if method.granularity == "sequence":
            frozen = state.memory.masks.get(site.key)
            if frozen is None:
                memory = state.memory.sites.get(site.key)
                slots = Rows.one_each(rows.slots, rows.seq.device)
                if memory is None:  # an expert that no prompt token was routed to: nothing is known, nothing is skipped
                    width = site.units if params.blocks is None else len(params.blocks)
                    frozen = torch.ones(rows.slots, width, dtype=torch.bool, device=rows.seq.device)
                else:
                    frozen = self._expand(method.score(NOTHING, slots, site, params, memory))
                state.memory.masks[site.key] = frozen
            return frozen[rows.seq]
        return self._expand(method.score(x, rows, site, params, {}))

    def _expand(self, scores: Tensor) -> Tensor:
        mask = selection.select(scores, self.params.rule)
        return mask if self.params.blocks is None else mask[:, self.params.blocks.to(mask.device)]

    def bias_of(self, name: str, block: Block) -> Tensor | None:
        """The plan's bias of one linear, (q,); a site of the columns of several linears holds theirs one after another."""
        bias, site = self.params.bias, self.site
        if bias is None or site.skips != "columns":
            return bias
        start = sum(block.pieces[n].shape[0] for n in site.linears[: site.linears.index(name)])
        return bias[start : start + block.pieces[name].shape[0]]

    def whole_bias(self, name: str, block: Block) -> Tensor | None:
        """The bias of a linear and the plan's together, (q,) in the linear's type: what sparse rows have."""
        piece, own = block.pieces[name], self.bias_of(name, block)
        if own is None:
            return piece.bias
        return (own if piece.bias is None else own + piece.bias.to(own.dtype)).to(piece.dtype)

    def remember(self, x: Tensor, rows: Rows, state: Pass) -> None:
        """Let the dense valid rows of the tap `x` (N, n) into the sequence memory."""
        dense = rows.valid & ~rows.sparse
        if not remembers(self.method) or not bool(dense.any()):
            return
        memory = state.memory
        before = memory.sites.get(self.site.key, {})
        memory.sites[self.site.key] = dict(self.method.update(before, x, rows, self.site, self.params))
        memory.masks.pop(self.site.key, None)


class Executor:
    """What every replaced forward shares: choosing masks and making products."""

    CAN: ClassVar[frozenset[str]] = ALL  # what a site may ask, `moyu.methods.needs`

    def __init__(self, applied: Applied, block: Block, states: list[SiteState], lookahead: set) -> None:
        self.applied, self.block, self.states, self.lookahead = applied, block, states, lookahead

    def attach(self, states: list[SiteState]) -> None:
        """Replace the sites (calibration fits them one after another)."""
        self.states = states

    def site(
        self, *, reads: Tap | None = None, skips: str | None = None, linear: str | None = None
    ) -> SiteState | None:
        """The site of this block that fits, if any."""
        for state in self.states:
            site = state.site
            if (
                (reads is None or site.reads == reads)
                and (skips is None or site.skips == skips)
                and (linear is None or linear in site.linears)
            ):
                return state
        return None

    def see(self, tap: Tap, x: Tensor, rows: Rows, state: Pass) -> None:
        """Show a tap to the observer and to sites that look ahead."""
        if state.observer is not None:
            state.observer.see(self.block.layer, self.block.expert, tap, x, rows)
        if (self.block.layer, tap) in self.lookahead:
            state.taps[self.block.layer, tap] = x

    def choose(self, site: SiteState, x: Tensor, rows: Rows, state: Pass, oracle: Callable[[], Tensor]) -> Tensor:
        """The mask (N, n) of a site: the method's, or what a chooser makes of it; dense rows keep everything.

        A mask that several linears share is chosen by the first of them.
        """
        shared = site.site.skips == "columns" and len(site.site.linears) > 1
        if shared and site.site.key in state.masks:
            return state.masks[site.site.key]
        if site.site.source_layer != site.site.layer:
            x = state.taps[site.site.source_layer, site.site.reads]
        mask = site.decide(x, rows, state)
        if state.chooser is not None:
            mask = state.chooser(site.site, mask, rows, oracle)
        if not state.skipping:
            dense = ~rows.sparse[:, None]
            mask = torch.where(dense, 1.0, mask) if mask.is_floating_point() else mask | dense
        if shared:
            state.masks[site.site.key] = mask
        return mask

    def observe(self, site: SiteState, values: Tensor, mask: Tensor, rows: Rows, state: Pass) -> None:
        """Show a decision to the observer."""
        if state.observer is not None:
            state.observer.mask(site.site, values, mask, rows)

    def dense(self, piece: Piece, x: Tensor, state: Pass) -> Tensor:
        """The whole product, (N, in) -> (N, out)."""
        if state.skipping and layout.is_laid_out(piece, "row"):
            return kernels.rows(x, piece.operand, None, bias=piece.bias)
        return self.whole(piece, x)

    def whole(self, piece: Piece, x: Tensor, out: Tensor | None = None) -> Tensor:
        """The whole product of a prompt's rows, (N, in) -> (N, out); `out` is memory that it may use."""
        if self.applied.own_products and not piece.foreign:
            return kernels.product(x, piece.weight, piece.bias, out=out)
        return product(piece, x)

    def _watched(self, state: Pass) -> bool:
        """Whether somebody holds values of this pass, which may then not be overwritten."""
        return state.observer is not None or state.products is not None or bool(self.lookahead)

    def own_prompts(self, x: Tensor, pieces: Iterable[Piece], state: Pass) -> bool:
        """Whether prompts of which nothing is skipped take `whole` instead of the modules' own products."""
        return (
            self.applied.own_products
            and not self._watched(state)
            and kernels.product_helps(x)
            and not any(piece.foreign or piece.blocks for piece in pieces)
        )

    def columns(self, piece: Piece, name: str, x: Tensor, site: SiteState | None, rows: Rows, state: Pass) -> Tensor:
        """The product with inputs (columns) skipped where a site says so, (N, in) -> (N, out)."""
        if state.products is not None:
            return state.products.get(self.block.expert, name, lambda: self._columns(piece, name, x, site, rows, state))
        return self._columns(piece, name, x, site, rows, state)

    def _columns(self, piece: Piece, name: str, x: Tensor, site: SiteState | None, rows: Rows, state: Pass) -> Tensor:
        if site is None:
            return self.dense(piece, x, state)
        params = site.params
        if params.basis is not None or params.centre is not None:
            return self._transformed(piece, name, x, site, rows, state)
        mask = self.choose(site, x, rows, state, Hindsight(self, site, x, rows))
        self.observe(site, x, mask, rows, state)
        return self._masked_columns(piece, name, x, mask, site, rows, state)

    def _masked_columns(
        self, piece: Piece, name: str, x: Tensor, mask: Tensor, site: SiteState, rows: Rows, state: Pass
    ) -> Tensor:
        if state.skipping:
            self._ensure([piece], ["column"])
            y = kernels.columns(x, piece.operand, mask, bias=site.whole_bias(name, self.block))
        else:
            y = self.compensate(self.whole(piece, torch.where(mask, x, 0)), name, site, rows)
        if site.params.low_rank is not None:
            outer, inner = (t.to(x.dtype) for t in site.params.low_rank)
            y = y + functional.linear(functional.linear(torch.where(mask, 0, x), inner), outer)
        return self.complete(y, x, mask, site, rows)

    def _transformed(self, piece: Piece, name: str, x: Tensor, site: SiteState, rows: Rows, state: Pass) -> Tensor:
        """Masks in a rotated or centred basis: S(v) = Q (mask * Q.T (v - c)) + c. Products stay dense."""
        basis, centre = site.params.basis, site.params.centre
        shifted = x if centre is None else x - centre.to(x.dtype)
        turned = shifted if basis is None else shifted @ basis.to(x.dtype)
        mask = self.choose(site, turned, rows, state, Hindsight(self, site, turned, rows))
        self.observe(site, turned, mask, rows, state)
        kept = torch.where(mask, turned, 0)
        back = kept if basis is None else kept @ basis.to(x.dtype).t()
        back = back if centre is None else back + centre.to(x.dtype)
        back = torch.where(rows.sparse[:, None], back, x)  # dense rows see no rounding
        y = self.whole(piece, back)
        if site.params.low_rank is not None:
            outer, inner = (t.to(x.dtype) for t in site.params.low_rank)
            y = y + functional.linear(functional.linear(x - back, inner), outer)
        return self.compensate(y, name, site, rows)

    def complete(self, y: Tensor, x: Tensor, mask: Tensor, site: SiteState, rows: Rows) -> Tensor:
        """Add what skipped units give all the same to sparse rows: y (N, q), what was decided from (N, n), mask (N, units)."""
        rest = rest_of(site.method, x, mask, site.site, site.params)
        return y if rest is None else y + torch.where(rows.sparse[:, None], rest.to(y.dtype), 0)

    def compensate(self, y: Tensor, name: str, site: SiteState, rows: Rows) -> Tensor:
        """Add the plan's bias to sparse rows."""
        bias = site.bias_of(name, self.block)
        return y if bias is None else y + torch.where(rows.sparse[:, None], bias.to(y.dtype), 0)

    def norms(self, site: SiteState) -> Tensor:
        """||W[:, i]||_2 over all linears of a site of columns, in the basis of its mask: (in,) float."""
        whole = torch.cat([self.block.pieces[n].weight.detach() for n in site.site.linears]).float()
        basis = site.params.basis
        return (whole if basis is None else whole @ basis.float()).norm(dim=0)

    def _ensure(self, pieces: list[Piece], roles: list) -> None:
        """Lay out again what `.to`, `deepcopy` or an assignment has packed."""
        if not all(layout.is_laid_out(p, r) for p, r in zip(pieces, roles, strict=True)):
            self.applied.lay_out_again(pieces, roles)


@dataclass(frozen=True)
class Hindsight:
    """What the matched oracle knows of columns x (N, n), in the basis of their mask: contributions, and the error of a choice."""

    executor: Executor
    site: SiteState
    x: Tensor
    rows: Rows

    def __call__(self) -> Tensor:
        """|x_i| ||w_i||, (N, n)."""
        return self.x.abs() * self.executor.norms(self.site)

    def own(self) -> Tensor:
        """The method's scores, (N, n)."""
        return self.site.method.score(self.x, self.rows, self.site.site, self.site.params, {})

    def error(self, mask: Tensor) -> Tensor:
        """Squared error (N,) of the outputs of all linears of the site under a mask (N, n), the plan's bias aside."""
        params, total = self.site.params, self.x.new_zeros(len(self.x))
        rest = torch.where(mask, 0, self.x)
        rest = rest if params.basis is None else rest @ params.basis.to(rest).t()
        given = rest_of(self.site.method, self.x, mask, self.site.site, params)
        for name in self.site.site.linears:
            lost = functional.linear(rest, self.executor.block.pieces[name].weight.detach())
            if params.low_rank is not None:
                outer, inner = (t.to(rest) for t in params.low_rank)
                lost = lost - functional.linear(functional.linear(rest, inner), outer)
            total = total + (lost if given is None else lost - given.to(lost)).square().sum(1)
        return total


class FfnCall(Executor):
    """A feed-forward network under a plan: down(mask * act(gate) * up) whatever the order of decisions."""

    def __init__(self, applied: Applied, block: Block, states: list[SiteState], lookahead: set) -> None:
        """`states` may hold sites of the attention; they are not this network's."""
        super().__init__(applied, block, [], lookahead)
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
        state = runtime.current(self.applied)
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


class DenseLinear:
    """A linear that no site governs: in a skipping step it runs on the kernels, which reach the memory's rate."""

    def __init__(self, applied: Applied, piece: Piece) -> None:
        """`piece` is the whole linear."""
        self.applied, self.piece = applied, piece
        self.inner = piece.module.forward

    def forward(self, x: Tensor) -> Tensor:
        """Stands for the linear's forward, (..., in) -> (..., out)."""
        state = runtime.current(self.applied)
        if state is None or self.applied.engine != "skip":
            return self.inner(x)
        flat = x.reshape(-1, x.shape[-1])
        if state.skipping and len(flat) <= runtime.MAX_SKIPPING_ROWS:
            y = kernels.rows(flat, self.piece.operand, None, bias=self.piece.bias)
        elif kernels.product_helps(x) and self.piece.blocks is None:
            y = kernels.product(flat, self.piece.weight, self.piece.bias)
        else:
            return self.inner(x)
        return y.reshape(*x.shape[:-1], y.shape[-1])


class ExpertsCall:
    """Routed experts under a plan: each expert is a network of its own on the rows that are routed to it."""

    def __init__(self, applied: Applied, experts: Experts, calls: list[FfnCall], inner: Callable) -> None:
        """`calls` are the experts' networks, in the order of their index."""
        self.applied, self.experts, self.calls, self.inner = applied, experts, calls, inner

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Stands for the experts' forward: rows (N, d), and who is routed where -> (N, d)."""
        state = runtime.current(self.applied)
        told = None
        if state is not None and any(call.active() for call in self.calls):
            told = experts.routing(self.experts, (*args, *kwargs.values()))
        if state is None or told is None:
            return self.inner(*args, **kwargs)
        hidden, index, weights = told
        first, count = self.calls[0].block.expert or 0, len(state.rows.seq)

        def run(block: Block, x: Tensor, token: Tensor) -> Tensor:
            return self.calls[(block.expert or 0) - first].run(x, state.rows.take(token % count), state)

        out = experts.run_experts(self.experts, hidden, index, weights, run)
        return out.reshape(args[0].shape) if args else out


def column_norms(piece: Piece) -> Tensor:
    """||W[:, i]||_2 of a logical linear, (in,) float."""
    return piece.weight.detach().float().norm(dim=0)
