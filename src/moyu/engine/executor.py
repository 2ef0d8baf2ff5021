"""What every replaced forward shares: choosing masks, and products with masked inputs or with kernels that skip.

Scores, rules and memory are the same code whether units are masked or skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from moyu import kernels
from moyu.engine.session import Pass, Session
from moyu.engine.sites import SiteState
from moyu.methods.magnitude import rest_of
from moyu.methods.needs import ALL
from moyu.methods.values import Rows, Site, Tap
from moyu.model import layout
from moyu.model.anatomy import Block, Piece, product


class Executor:
    """What every replaced forward shares: choosing masks and making products."""

    CAN: ClassVar[frozenset[str]] = ALL  # what a site may ask, `moyu.methods.needs`

    def __init__(self, session: Session, block: Block, states: list[SiteState], lookahead: set) -> None:
        self.session, self.block, self.states, self.lookahead = session, block, states, lookahead

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
            return kernels.whole(x, piece.operand, bias=piece.bias)
        return self.whole(piece, x)

    def whole(self, piece: Piece, x: Tensor, out: Tensor | None = None) -> Tensor:
        """The whole product of a prompt's rows, (N, in) -> (N, out); `out` is memory that it may use."""
        if self.session.own_products and not piece.foreign:
            return kernels.product(x, piece.weight, piece.bias, out=out)
        return product(piece, x)

    def _watched(self, state: Pass) -> bool:
        """Whether somebody holds values of this pass, which may then not be overwritten."""
        return state.observer is not None or state.products is not None or bool(self.lookahead)

    def own_prompts(self, x: Tensor, pieces: Iterable[Piece], state: Pass) -> bool:
        """Whether prompts of which nothing is skipped take `whole` instead of the modules' own products."""
        return (
            self.session.own_products
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
        params, turned = site.params, site.params.turned(x)  # x itself without a basis and a centre
        mask = self.choose(site, turned, rows, state, Hindsight(self, site, turned, rows))
        self.observe(site, turned, mask, rows, state)
        if turned is x:
            return self.masked(piece, name, x, mask, site, rows, state)
        # S(v) = Q (mask * Q.T (v - c)) + c, and products stay dense.
        back = params.turned_back(torch.where(mask, turned, 0))
        back = back if params.centre is None else back + params.centre.to(back)
        back = torch.where(rows.sparse[:, None], back, x)  # dense rows see no rounding
        y = _with_low_rank(self.whole(piece, back), x - back, site)
        return self.compensate(y, name, site, rows)

    def masked(
        self,
        piece: Piece,
        name: str,
        x: Tensor,
        mask: Tensor,
        site: SiteState,
        rows: Rows,
        state: Pass,
        decided: Tensor | None = None,
    ) -> Tensor:
        """The product of the inputs that a mask keeps, (N, in) -> (N, out); decided: what the mask came from, if not x."""
        if state.skipping:
            self._ensure([piece], [site.role])
            bias = site.whole_bias(name, self.block)
            if site.site.further:
                assert piece.blocks is not None  # such are its sites
                return kernels.levels(x, piece.blocks, mask, bias=bias)
            y = kernels.columns(x, piece.operand, mask, bias=bias)
        elif site.site.further:
            whole = kept(x, mask)
            y = self.whole(piece, whole) + functional.linear(x - whole, piece.first_values)
            return self.compensate(y, name, site, rows)
        else:
            y = self.compensate(self.whole(piece, kept(x, mask)), name, site, rows)
        if site.params.low_rank is not None:
            y = _with_low_rank(y, torch.where(mask, 0, x), site)
        return self.complete(y, x if decided is None else decided, mask, site, rows)

    def complete(self, y: Tensor, x: Tensor, mask: Tensor, site: SiteState, rows: Rows) -> Tensor:
        """Add what skipped units give all the same to sparse rows: y (N, q), what was decided from (N, n), mask (N, units)."""
        rest = rest_of(site.method, x, mask, site.site, site.params)
        return y if rest is None else y + torch.where(rows.sparse[:, None], rest.to(y.dtype), 0)

    def compensate(self, y: Tensor, name: str, site: SiteState, rows: Rows) -> Tensor:
        """Add the plan's bias to sparse rows."""
        bias = site.bias_of(name, self.block)
        return y if bias is None else y + torch.where(rows.sparse[:, None], bias.to(y.dtype), 0)

    def norms(self, site: SiteState) -> Tensor:
        """||W[:, i]||_2, of what is skipped, over all linears of a site of columns, in the basis of its mask: (in,) float."""
        whole = torch.cat([taken_away(self.block.pieces[n], site.site) for n in site.site.linears]).float()
        basis = site.params.basis
        return (whole if basis is None else whole @ basis.float()).norm(dim=0)

    def _ensure(self, pieces: list[Piece], roles: list) -> None:
        """Lay out again what `.to`, `deepcopy` or an assignment has packed."""
        if not all(layout.is_laid_out(p, r) for p, r in zip(pieces, roles, strict=True)):
            self.session.lay_out_again(pieces, roles)


def taken_away(piece: Piece, site: Site) -> Tensor:
    """What of a linear's weight is missing where a site skips a unit, (q, n): all of its columns, or their further bits."""
    return piece.weight.detach() - piece.first_values if site.further else piece.weight.detach()


def kept(x: Tensor, mask: Tensor) -> Tensor:
    """x with 0 where a mask skips it; x times the mask where training has made it a number."""
    return x * mask if mask.is_floating_point() else torch.where(mask, x, 0)


def _with_low_rank(y: Tensor, missing: Tensor, site: SiteState) -> Tensor:
    """y (N, q) with what the low-rank path gives for missing inputs (N, n)."""
    if site.params.low_rank is None:
        return y
    outer, inner = (t.to(y.dtype) for t in site.params.low_rank)
    return y + functional.linear(functional.linear(missing, inner), outer)


@dataclass(frozen=True)
class Hindsight:
    """What the matched oracle knows of columns x (N, n), in the basis of their mask: contributions, and the error of a choice."""

    executor: Executor
    site: SiteState
    x: Tensor
    rows: Rows

    def at(self, index: Tensor, rows: Rows) -> Hindsight:
        """What it knows of the rows at `index`."""
        return Hindsight(self.executor, self.site, self.x[index], rows)

    def __call__(self) -> Tensor:
        """|x_i| ||w_i||, (N, n)."""
        return self.x.abs() * self.executor.norms(self.site)

    def own(self) -> Tensor:
        """The method's scores, (N, n)."""
        return self.site.method.score(self.x, self.rows, self.site.site, self.site.params, {})

    def error(self, mask: Tensor) -> Tensor:
        """Squared error (N,) of the outputs of all linears of the site under a mask (N, n), the plan's bias aside."""
        params, total = self.site.params, self.x.new_zeros(len(self.x))
        missing = params.turned_back(torch.where(mask, 0, self.x))
        given = rest_of(self.site.method, self.x, mask, self.site.site, params)
        for name in self.site.site.linears:
            lost = params.lost(taken_away(self.executor.block.pieces[name], self.site.site), missing)
            total = total + (lost if given is None else lost - given.to(lost)).square().sum(1)
        return total
