"""The head under a plan: all bits of the words on a shortlist, the first bits of the others."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from moyu import kernels
from moyu.engine.executor import Executor
from moyu.engine.modules import DenseLinear
from moyu.engine.session import Pass, Session
from moyu.engine.sites import SiteState
from moyu.methods.values import Rows
from moyu.model.anatomy import Block
from moyu.model.layout import Role


class HeadLinear(Executor):
    """The linear that gives the logits, (..., d) -> (..., words)."""

    def __init__(self, session: Session, block: Block, states: list[SiteState]) -> None:
        """`states`: the plan's sites of the head, one or none."""
        super().__init__(session, block, states, set())
        self.piece = block.pieces["head"]
        self.inner = self.piece.module.forward
        self.own = self.site(skips="words")
        self.without = DenseLinear(session, self.piece)

    @property
    def role(self) -> Role | None:
        """How kernels read it, where not by rows."""
        return None if self.own is None else self.own.role

    def ensure_layout(self) -> None:
        """Lay the weight out again where something has packed it."""
        if self.role is not None:
            self._ensure([self.piece], [self.role])

    def forward(self, x: Tensor) -> Tensor:
        """Stands for the linear's forward."""
        state = self.session.current()
        if state is None or self.own is None or not state.any_sparse:
            return self.without.forward(x)
        flat = x.reshape(-1, x.shape[-1])
        return self.run(flat, last_rows(state.rows, len(flat)), self.own, state).reshape(*x.shape[:-1], -1)

    def run(self, x: Tensor, rows: Rows, site: SiteState, state: Pass) -> Tensor:
        """N rows, (N, d) -> (N, words)."""
        blocks = self.piece.blocks
        assert blocks is not None
        if state.skipping and blocks.order == "parted":
            nothing = torch.zeros(len(x), self.piece.shape[0], dtype=torch.bool, device=x.device)
            first = kernels.words(x, blocks, nothing, bias=self.piece.bias)
            mask = self.choose(site, first, rows, state, lambda: self.inner(x))
            return kernels.words(x, blocks, mask, bias=self.piece.bias)
        whole, first = self.whole(self.piece, x), functional.linear(x, self.piece.first_values, self.piece.bias)
        mask = self.choose(site, first, rows, state, lambda: whole)
        self.observe(site, first, mask, rows, state)
        return torch.where(mask, whole, first)


def last_rows(rows: Rows, count: int) -> Rows:
    """Of rows (B T) the last of each sequence, `count` in all: a model may give logits of few positions."""
    if count == len(rows.seq):
        return rows
    place = torch.arange(len(rows.seq), device=rows.seq.device)
    return rows.take(place.unflatten(0, (rows.slots, -1))[:, -(count // rows.slots) :].flatten())
