"""A site of a plan while it is applied: its method decides, its memory is updated."""

from __future__ import annotations

import torch
from torch import Tensor

from moyu.engine.session import Pass, Session
from moyu.methods import selection
from moyu.methods.base import Method
from moyu.methods.sequence import remembers
from moyu.methods.values import NOTHING, Rows, Site, SiteParams
from moyu.model.anatomy import Block
from moyu.model.layout import Role

KNOWN = "known"  # beside a method's memory, (B,) bool: which sequences have a token that the site has seen


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
                    frozen = frozen | ~memory[KNOWN][:, None]  # nor from sequences that no such token is of
                state.memory.masks[site.key] = frozen
            return frozen[rows.seq]
        return self._expand(method.score(x, rows, site, params, {}))

    def _expand(self, scores: Tensor) -> Tensor:
        mask = selection.select(scores, self.params.rule)
        return mask if self.params.blocks is None else mask[:, self.params.blocks.to(mask.device)]

    @property
    def role(self) -> Role:
        """How kernels read the linears of a site of columns or words."""
        if self.site.skips == "words":
            return "parted"
        return "planes" if self.site.further else "column"

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
        known = before.get(KNOWN, torch.zeros(rows.slots, dtype=torch.bool, device=x.device)).clone()
        known[rows.seq[dense]] = True
        update = self.method.update(before, x, rows, self.site, self.params)
        memory.sites[self.site.key] = {**update, KNOWN: known}
        memory.masks.pop(self.site.key, None)


def states_of(session: Session, block: Block) -> list[SiteState]:
    """The plan's sites of a block."""
    if session.plan is None:
        return []
    parts = session.plan.parts_of(block.layer, block.expert)
    return [SiteState(site, params, session.plan.method_of(site)) for site, params in parts]
