"""A model whose plan is part of its modules: no hooks and no memory, so that a decode step compiles as one graph.

For GPUs, where a step is worth compiling whole: `torch.compile(frozen(model, plan), mode="reduce-overhead", fullgraph=True)`
with a static cache. Every position is sparse, so prompts run through the model itself.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from moyu import kernels
from moyu.errors import UserError
from moyu.methods.needs import needs
from moyu.methods.values import READS, Site, SiteParams
from moyu.model import dissect, networks
from moyu.model.anatomy import Piece
from moyu.plan import Plan

CAN = frozenset({"columns by magnitude"})  # what a site of columns may ask, `moyu.methods.needs`
GROUP = 256  # outputs that `kernels.columns_above` lets share a threshold at least
ALIGNED = 64  # widths of cut networks, filled up with zeros: products of odd widths take up to half as long again
TOGETHER = [[n for n in READS if READS[n] == tap] for tap in dict.fromkeys(READS.values())]  # they read the same input


class Product(nn.Module):
    """One product for linears that read the same input: the first of them makes it, the last forgets it.

    Columns whose |x_i| is not above an output's threshold are skipped, or none where there are no thresholds.
    """

    weight: Tensor
    bias: Tensor | None
    thresholds: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, thresholds: Tensor | None) -> None:
        """weight: (q, n) of all of them one after another, columns contiguous where there are thresholds (q,); bias: (q,)."""
        super().__init__()
        if weight.is_cuda and thresholds is not None:
            kernels.gpu.reserve(weight.device)
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.register_buffer("thresholds", thresholds, persistent=False)
        self.held: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor, last: bool) -> Tensor:
        """(..., n) -> (..., q)."""
        if self.held is not None and self.held[0] is x:
            y = self.held[1]
        elif self.thresholds is None:
            y = functional.linear(x, self.weight, self.bias)
        else:
            flat = kernels.columns_above(x.reshape(-1, x.shape[-1]), self.weight, self.thresholds, bias=self.bias)
            y = flat.reshape(*x.shape[:-1], -1)
        self.held = None if last else (x, y)
        return y


class Outputs(nn.Module):
    """One linear as a part of a product."""

    def __init__(self, product: Product, outputs: slice, last: bool) -> None:
        """`outputs` are its own; `last`: no other linear of the product comes after it."""
        super().__init__()
        self.product, self.outputs, self.last = product, outputs, last

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., own outputs)."""
        return self.product(x, self.last)[..., self.outputs]


@torch.no_grad()
def frozen(model: nn.Module, plan: Plan | None, masks: Mapping[str, Tensor] | None = None) -> nn.Module:
    """A copy of `model` that skips what `plan` skips at every position (None: nothing).

    Linears that read the same input become one product, whose weights are copies; what is not replaced shares its parameters.

    masks: of a sequence-level method, by site (B, f) bool, as `runtime.memory_of(cache).masks` holds them after a prompt; they
    become smaller dense networks. Raises UserError for a method that neither skips columns by magnitude nor decides once for
    all rows, for a block that is not made of separate linears, and for a plan that was not made for this model.
    """
    if plan is not None:
        plan.check(model, dissect.dissect(model))
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    for block in dissect.dissect(twin).all_blocks():
        parts = [] if plan is None else plan.parts_of(block.layer, block.expert)
        kept = _kept_neurons(plan, parts, masks or {})
        for names in TOGETHER:
            linears = {n: block.pieces[n] for n in names if n in block.pieces}
            sites = {n: s for n in linears for s in parts if n in s[0].linears and s[0].skips == "columns"}
            if sites:
                assert plan is not None
                _skip_columns(twin, plan, linears, sites)
            elif kept is not None and set(names) & {"gate", "up", "down"}:
                _cut_neurons(twin, block.layer, linears, kept)
            elif len(linears) > 1 and all(p.whole and networks.is_linear(p.module) for p in linears.values()):
                _join(
                    twin,
                    list(linears.values()),
                    [p.weight for p in linears.values()],
                    [p.bias for p in linears.values()],
                )
    return twin


def _kept_neurons(
    plan: Plan | None, parts: list[tuple[Site, SiteParams]], masks: Mapping[str, Tensor]
) -> Tensor | None:
    """The neurons that a sequence's masks keep, if the block has a site for them."""
    found = None
    for site, _ in parts:
        if site.skips == "columns":
            continue
        if site.skips != "neurons" or site.key not in masks:
            assert plan is not None
            raise UserError(
                f"method {plan.method.name!r} decides anew for each token, which no frozen network can",
                "use a sequence-level method with the masks of its prompt, or one that skips columns by magnitude",
            )
        mask = masks[site.key]
        if not bool((mask == mask[:1]).all()):
            raise UserError(
                "the sequences keep different neurons", "freeze one sequence at a time, or one prompt for all"
            )
        found = mask[0].nonzero()[:, 0]
    return found


def _skip_columns(model: nn.Module, plan: Plan, linears: Mapping[str, Piece], sites: Mapping[str, tuple]) -> None:
    params = [p for _, p in sites.values()]
    missing = frozenset().union(*(needs(plan.method_of(site), site, p) for site, p in sites.values())) - CAN
    if missing:
        raise UserError(
            f"method {plan.method.name!r} needs {', '.join(sorted(missing))}, which no compiled step has",
            "`teal` is a plain threshold on |x|",
        )
    if not all(p.whole for p in linears.values()):
        raise UserError("its linears share a weight, which no compiled step skips columns of", "use another model")
    pieces = [linears[name] for name in sites]
    together = all(len(p.weight) % GROUP == 0 for p in pieces)
    for members in [range(len(pieces))] if together else [[k] for k in range(len(pieces))]:
        own = [pieces[k] for k in members]
        limits = [
            p.weight.new_full((len(p.weight),), params[k].rule.value, dtype=torch.float32)
            for k, p in zip(members, own, strict=True)
        ]
        _join(model, own, [p.weight for p in own], [p.bias for p in own], torch.cat(limits))


def _cut_neurons(model: nn.Module, layer: int, linears: Mapping[str, Piece], kept: Tensor) -> None:
    for name, piece in linears.items():
        if not piece.whole or not isinstance(piece.module, nn.Linear):
            raise UserError(f"{name} of layer {layer} is no linear of its own", "only separate linears can be cut")
    pieces, extra = list(linears.values()), -len(kept) % ALIGNED
    if "down" in linears:
        weights, biases = [functional.pad(p.weight[:, kept], (0, extra)) for p in pieces], [p.bias for p in pieces]
    else:
        weights = [functional.pad(p.weight[kept], (0, 0, 0, extra)) for p in pieces]
        biases = [None if p.bias is None else functional.pad(p.bias[kept], (0, extra)) for p in pieces]
    _join(model, pieces, weights, biases)


def _join(
    model: nn.Module,
    pieces: list[Piece],
    weights: list[Tensor],
    biases: list[Tensor | None],
    thresholds: Tensor | None = None,
) -> None:
    """Put one product of `weights` in the place of `pieces`."""
    weight = torch.cat(weights)
    if thresholds is not None:
        weight = torch.cat([w.t() for w in weights], dim=1).contiguous().t()
    bias = None
    if any(b is not None for b in biases):
        bias = torch.cat([weight.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)])
    product, start = Product(weight.detach(), bias, thresholds), 0
    for piece, own in zip(pieces, weights, strict=True):
        new = Outputs(product, slice(start, start := start + len(own)), piece is pieces[-1])
        for module in model.modules():
            for name, child in module.named_children():
                if child is piece.module:
                    setattr(module, name, new)
