"""Linears that no site governs, and routed experts, under a plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from moyu import kernels
from moyu.engine.network import FfnCall
from moyu.engine.rows import MAX_SKIPPING_ROWS
from moyu.engine.session import Session
from moyu.model import experts
from moyu.model.anatomy import Block, Experts, Piece


class DenseLinear:
    """A linear that no site governs: in a skipping step it runs on the kernels, which reach the memory's rate."""

    def __init__(self, session: Session, piece: Piece) -> None:
        """`piece` is the whole linear."""
        self.session, self.piece = session, piece
        self.inner = piece.module.forward

    def forward(self, x: Tensor) -> Tensor:
        """Stands for the linear's forward, (..., in) -> (..., out)."""
        state = self.session.current()
        if state is None or self.session.engine != "skip":
            return self.inner(x)
        flat = x.reshape(-1, x.shape[-1])
        if state.skipping and len(flat) <= MAX_SKIPPING_ROWS:
            y = kernels.whole(flat, self.piece.operand, bias=self.piece.bias)
        elif kernels.product_helps(x) and self.piece.blocks is None:
            y = kernels.product(flat, self.piece.weight, self.piece.bias)
        else:
            return self.inner(x)
        return y.reshape(*x.shape[:-1], y.shape[-1])


class ExpertsCall:
    """Routed experts under a plan: each expert is a network of its own on the rows that are routed to it."""

    def __init__(self, session: Session, experts: Experts, calls: list[FfnCall], inner: Callable) -> None:
        """`calls` are the experts' networks, in the order of their index."""
        self.session, self.experts, self.calls, self.inner = session, experts, calls, inner

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Stands for the experts' forward: rows (N, d), and who is routed where -> (N, d)."""
        state = self.session.current()
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
