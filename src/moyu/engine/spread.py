"""Weights spread over processes (tensor parallelism, DTensor): products of logical linears, made by the model's own forwards.

A linear holds rows of a logical weight, and gives a part of the outputs; or columns, and takes a part of the inputs before one
sum over the processes. Masks are decided from whole activations, so every process decides alike, and top-k, norms of a row
and statistics of a prompt mean what they mean on one process. The order of events is that of one process; only products differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from moyu.engine.attention import AttentionLinear
from moyu.engine.executor import Executor
from moyu.engine.network import FfnCall
from moyu.engine.session import Pass
from moyu.engine.sites import SiteState
from moyu.errors import UserError
from moyu.methods.needs import ANY, needs
from moyu.methods.values import Rows
from moyu.model.anatomy import Anatomy, Piece
from moyu.plan import Plan

# What a site may ask here, `moyu.methods.needs`: any mask of columns, rows or neurons, and nothing that adds to a product.
CAN = frozenset(n for n in ANY if not n.startswith("heads")) | {"factors", "top_k", "units", "lookahead"}


def refuse(anatomy: Anatomy, plan: Plan | None, engine: str) -> None:
    """Raise UserError for what is not right, or not built, where weights of a network or attention are spread."""
    blocks = {(b.layer, b.expert): b for b in anatomy.all_blocks() if b.spread}
    if not blocks:
        return
    if engine != "mask":
        raise UserError(
            "weights are spread over processes (DTensor), where kernels do not skip yet",
            "apply the plan with engine='mask', which computes the same and reads everything",
        )
    if plan is None:
        return
    for site, params in plan.parts.values():
        block, name = blocks.get((site.layer, site.expert)), plan.method.name
        if block is None:
            continue
        extras = sorted(needs(plan.method_of(site), site, params) - CAN)
        if site.reads == "gate" and block.act is None:
            extras.append("a gate that only its own module computes")
        if extras:
            raise UserError(
                f"method {name!r} needs {', '.join(extras)} at {site.key}, whose weights are spread over processes (DTensor)",
                "run it on one process, or use a method that only masks neurons or input channels",
            )


def gathered(x: Tensor, weight: DTensor, dim: int) -> Tensor:
    """Every process' (N, part of n) side by side, (N, n), where n is that dimension of `weight`."""
    shape = torch.Size((*x.shape[:-1], weight.shape[dim]))
    stride = torch.empty(shape, device="meta").stride()
    parts = DTensor.from_local(x, weight.device_mesh, [Shard(x.dim() - 1)], run_check=False, shape=shape, stride=stride)
    return parts.full_tensor()


def part(x: Tensor, weight: DTensor) -> Tensor:
    """This process' columns of x (N, n), where those of `weight` (q, n) are spread."""
    whole = DTensor.from_local(x, weight.device_mesh, [Replicate()], run_check=False)
    return whole.redistribute(placements=[Shard(1)]).to_local()


class _Spread(Executor):
    """Products run as the model's own linears run them, on this process' part of what the logical linear takes."""

    forwards: Mapping[Piece, Callable[[Tensor], Tensor]]  # of the linears

    def whole(self, piece: Piece, x: Tensor, out: Tensor | None = None) -> Tensor:
        """The product, (N, in) -> (N, out); of a weight spread by rows, (N, part of out)."""
        return self.forwards[piece](part(x, _spread(piece)) if _by_columns(piece) else x)

    def choose(self, site: SiteState, x: Tensor, rows: Rows, state: Pass, oracle: Callable[[], Tensor]) -> Tensor:
        """The mask of a site, (N, n), without an oracle."""
        return super().choose(site, x, rows, state, _no_hindsight)


class SpreadLinear(_Spread, AttentionLinear):
    """One linear of an attention: columns of its input are masked."""

    def __init__(self, *args) -> None:
        """As `AttentionLinear`."""
        super().__init__(*args)
        self.forwards = {self.piece: self.inner}

    def run(self, x: Tensor, rows: Rows, state: Pass) -> Tensor:
        """The linear on N rows, (N, part of in) -> (N, out), or (N, in) -> (N, part of out)."""
        return super().run(gathered(x, _spread(self.piece), 1) if _by_columns(self.piece) else x, rows, state)


class SpreadFfn(_Spread, FfnCall):
    """A feed-forward network: every process has whole values of gate and up, and takes its part of what `down` reads."""

    def bind(self) -> None:
        """Keep the forwards that are replaced."""
        super().bind()
        self.forwards = {p: p.module.forward for n, p in self.block.pieces.items() if n in ("gate", "up", "down")}

    def whole(self, piece: Piece, x: Tensor, out: Tensor | None = None) -> Tensor:
        """The product, (N, in) -> (N, out)."""
        y = super().whole(piece, x)
        return y if _by_columns(piece) else gathered(y, _spread(piece), 0)


def _spread(piece: Piece) -> DTensor:
    weight = piece.weight
    assert isinstance(weight, DTensor)
    return weight


def _by_columns(piece: Piece) -> bool:
    return _spread(piece).placements[0].is_shard(1)


def _no_hindsight() -> Tensor:
    raise UserError(
        "matched baselines and oracles need whole weights, and these are spread over processes",
        "run them on one process",
    )
