"""Weights spread over processes (tensor parallelism, DTensor): what every process masks of its own part.

A linear holds rows of a logical weight, and gives a part of the outputs, or columns, and takes a part of the inputs before one sum over the
processes. A mask is decided from the whole activation, gathered first: every process decides alike, and top-k, norms of a
row and statistics of a prompt mean what they mean on one process. Each then masks what its own columns take. Products
stay dense and run as the model's own linears run them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from moyu import kernels
from moyu.engine.attention import AttentionLinear
from moyu.engine.network import FfnCall
from moyu.engine.session import Pass
from moyu.errors import UserError
from moyu.methods.needs import ANY, needs
from moyu.model.anatomy import Anatomy
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


class _Spread:
    """Of a linear: its whole input from the processes' parts, and this process' part of a mask."""

    def __init__(self, weight: Tensor) -> None:
        assert isinstance(weight, DTensor)
        self.weight, self.by_columns = weight, weight.placements[0].is_shard(1)

    def whole(self, x: Tensor) -> Tensor:
        """What the logical linear takes, (N, in)."""
        return gathered(x, self.weight, 1) if self.by_columns else x

    def masked(self, x: Tensor, mask: Tensor) -> Tensor:
        """This process' input with 0 where the mask (N, in) of the logical linear says so."""
        if self.by_columns:
            mask = distribute_tensor(mask, self.weight.device_mesh, [Shard(1)], src_data_rank=None).to_local()
        return torch.where(mask, x, 0)


def gathered(x: Tensor, weight: DTensor, dim: int) -> Tensor:
    """Every process' (N, part of n) side by side, (N, n), where n is that dimension of `weight`."""
    shape = torch.Size((*x.shape[:-1], weight.shape[dim]))
    stride = torch.empty(shape, device="meta").stride()
    parts = DTensor.from_local(x, weight.device_mesh, [Shard(x.dim() - 1)], run_check=False, shape=shape, stride=stride)
    return parts.full_tensor()


class SpreadLinear(AttentionLinear):
    """One linear of an attention: columns of its input are masked."""

    def __init__(self, *args) -> None:
        """As `AttentionLinear`."""
        super().__init__(*args)
        self.parts = _Spread(self.piece.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Stands for the linear's forward, (..., part of in) -> (..., part of out)."""
        state = self.session.current()
        works = state is not None and self.own is not None and state.any_sparse
        if state is None or not (works or state.observer is not None or self.lookahead):
            return self.inner(x)
        flat = x.reshape(-1, x.shape[-1])
        whole = self.parts.whole(flat)
        if self.shows:
            self.see(self.tap, whole, state.rows, state)
        if works:
            assert self.own is not None
            mask = self.choose(self.own, whole, state.rows, state, _no_hindsight)
            self.observe(self.own, whole, mask, state.rows, state)
            flat = self.parts.masked(flat, mask)
        return self.inner(flat.reshape(x.shape))


class SpreadFfn(FfnCall):
    """A feed-forward network: its linears run as they are, and every mask is one on what a linear takes."""

    def entry(self, name: str, inner: Callable) -> Callable[[Tensor], Tensor]:
        """What stands for the forward of one linear."""
        return _Entry(self, name, inner).forward

    def rises(self, name: str, x: Tensor, inner: Callable, state: Pass) -> Tensor:
        """gate or up: the network's input with masked columns."""
        rows, flat = state.rows, x.reshape(-1, x.shape[-1])
        if self._key("mlp_in") not in state.pending:
            state.pending[self._key("mlp_in")] = flat
            self.see("mlp_in", flat, rows, state)
        site = self.site(reads="mlp_in", skips="columns", linear=name)
        if site is not None and state.any_sparse:
            mask = self.choose(site, flat, rows, state, _no_hindsight)
            self.observe(site, flat, mask, rows, state)
            flat = torch.where(mask, flat, 0)
        y = inner(flat.reshape(x.shape))
        state.pending[self._key(name)] = y.reshape(len(flat), -1)
        return y

    def falls(self, x: Tensor, inner: Callable, state: Pass) -> Tensor:
        """down: what the middle made, with masked neurons."""
        rows, flat = state.rows, x.reshape(-1, x.shape[-1])
        parts = _Spread(self.block.pieces["down"].weight)
        whole = parts.whole(flat)  # (N, f)
        given = {
            n: state.pending.pop(self._key(n))
            for n in ("mlp_in", "gate", "up")
            if n in self.block.pieces or n == "mlp_in"
        }
        taps = {"mlp_in": given["mlp_in"], "mid": whole}
        for name in ("up", "gate"):
            watched = state.observer is not None or (self.block.layer, name) in self.lookahead
            wanted = self.site(reads=name) is not None or watched
            if wanted and name in given and self.block.gated:
                weight = self.block.pieces[name].weight
                assert isinstance(weight, DTensor)
                value = gathered(given[name], weight, 0)
                taps[name] = kernels.activation(self.block.act or "identity")(value) if name == "gate" else value
                self.see(name, taps[name], rows, state)
        self.see("mid", whole, rows, state)
        site = next((s for s in self.states if "down" in s.site.linears), None)
        if site is not None and site.site.skips == "neurons" and site.site.reads == "mid":
            site.remember(whole, rows, state)
        if site is not None and state.any_sparse:
            mask = self.choose(site, taps[site.site.reads], rows, state, _no_hindsight)
            self.observe(site, whole, mask, rows, state)
            flat = parts.masked(flat, mask)
        return inner(flat.reshape(x.shape))

    def _key(self, name: str) -> str:
        return f"{id(self)} {name}"


class _Entry:
    """A linear of a network: its part in the network's call, with the forward that it replaces."""

    def __init__(self, call: SpreadFfn, name: str, inner: Callable) -> None:
        self.call, self.name, self.inner = call, name, inner

    def forward(self, x: Tensor) -> Tensor:
        state = self.call.active()
        if state is None:
            return self.inner(x)
        if self.name == "down":
            return self.call.falls(x, self.inner, state)
        return self.call.rises(self.name, x, self.inner, state)


def _no_hindsight() -> Tensor:
    raise UserError(
        "matched baselines and oracles need whole weights, and these are spread over processes",
        "run them on one process",
    )
