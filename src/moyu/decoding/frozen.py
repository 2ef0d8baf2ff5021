"""A model whose plan is part of its modules: no hooks and no memory, so that a decode step compiles as one graph.

For GPUs, where a step is worth compiling whole: `torch.compile(frozen(model, plan), mode="reduce-overhead", fullgraph=True)`
with a static cache. Every position is sparse, so prompts run through the model itself.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moyu import kernels, surgery
from moyu.errors import UserError
from moyu.plan import Plan
from moyu.selection import Threshold
from moyu.surgery import Block

GROUP = 256  # outputs that `kernels.columns_above` lets share a threshold at least
TOGETHER = (("q", "k", "v"), ("o",), ("qkv",), ("gate", "up"), ("down",))  # linears that read the same input


class SkippedColumns(nn.Module):
    """One linear, its outputs cut out of a product with all linears that share its input.

    Their modules make the same call, and a compiler makes it once.
    """

    weight: Tensor
    thresholds: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, thresholds: Tensor, bias: Tensor | None, outputs: slice) -> None:
        """weight: (n, q) of all of them; thresholds: (q,) float32; bias: (q,) or None."""
        super().__init__()
        if weight.is_cuda:
            kernels.gpu.reserve(weight.device)
        self.outputs = outputs
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("thresholds", thresholds, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., own outputs)."""
        flat = x.reshape(-1, x.shape[-1])
        y = kernels.columns_above(flat, self.weight.t(), self.thresholds, bias=self.bias)
        return y[:, self.outputs].reshape(*x.shape[:-1], -1)


@torch.no_grad()
def frozen(model: nn.Module, plan: Plan, masks: Mapping[str, Tensor] | None = None) -> nn.Module:
    """A copy of `model` that skips what `plan` skips at every position; what is not replaced shares its parameters.

    masks: of a sequence-level method, by site (B, f) bool, as `runtime.memory_of(cache).masks` holds them after a prompt; they
    become smaller dense networks. Raises UserError for a method that neither skips columns by magnitude nor decides once for
    all rows, and for a block that is not made of separate linears.
    """
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    for block in surgery.dissect(twin).all_blocks():
        for group in TOGETHER:
            sites = {n: s for n in group for s in plan.parts_of(block.layer, block.expert) if n in s[0].linears}
            if sites and all(site.skips == "columns" for site, _ in sites.values()):
                _skip_columns(twin, block, plan, sites)
        for site, _ in plan.parts_of(block.layer, block.expert):
            if site.skips == "columns":
                continue
            if site.skips != "neurons" or not masks or site.key not in masks:
                raise UserError(
                    f"method {plan.method.name!r} decides anew for each token, which no frozen network can",
                    "use a sequence-level method with the masks of its prompt, or one that skips columns by magnitude",
                )
            _cut_neurons(twin, block, masks[site.key])
    return twin


def _skip_columns(model: nn.Module, block: Block, plan: Plan, sites: Mapping[str, tuple]) -> None:
    pieces = [block.pieces[name] for name in sites]
    params = [p for _, p in sites.values()]
    plain = all(isinstance(p.rule, Threshold) and p.basis is p.centre is p.low_rank is p.bias is None for p in params)
    if not plan.method.by_magnitude or not plain or not all(p.whole for p in pieces):
        raise UserError(f"method {plan.method.name!r} is no plain threshold on |x| here", "`teal` is one")
    if any(plan.method.factors(site, p) is not None for site, p in sites.values()):
        raise UserError(f"method {plan.method.name!r} weighs |x| with factors", "`teal` does not")
    sizes = [len(p.weight) for p in pieces]
    whole = [range(len(pieces))] if all(size % GROUP == 0 for size in sizes) else [[k] for k in range(len(pieces))]
    for members in whole:
        weight = torch.cat([pieces[k].weight.t() for k in members], dim=1).contiguous()
        thresholds = torch.cat(
            [torch.full((sizes[k],), params[k].rule.value, dtype=torch.float32, device=weight.device) for k in members]
        )
        biases = [pieces[k].bias for k in members]
        bias = None
        if any(b is not None for b in biases):
            bias = torch.cat([weight.new_zeros(sizes[k]) if (b := pieces[k].bias) is None else b for k in members])
        start = 0
        for k in members:
            own = slice(start, start := start + sizes[k])
            _replace(model, pieces[k].module, SkippedColumns(weight, thresholds, bias, own))


def _cut_neurons(model: nn.Module, block: Block, mask: Tensor) -> None:
    kept = mask[0].nonzero()[:, 0]
    if not bool((mask == mask[:1]).all()):
        raise UserError("the sequences keep different neurons", "freeze one sequence at a time, or one prompt for all")
    for name in ("gate", "up", "down"):
        piece = block.pieces.get(name)
        if piece is None:
            continue
        if not piece.whole or not isinstance(piece.module, nn.Linear):
            raise UserError(
                f"{name} of layer {block.layer} is no linear of its own", "only separate linears can be cut"
            )
        old, weight = piece.module, piece.weight[:, kept] if name == "down" else piece.weight[kept]
        new = nn.Linear(weight.shape[1], weight.shape[0], bias=old.bias is not None, device="meta", dtype=weight.dtype)
        new.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        if old.bias is not None:
            new.bias = nn.Parameter(old.bias if name == "down" else old.bias[kept], requires_grad=False)
        _replace(model, old, new)


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for module in model.modules():
        for name, child in module.named_children():
            if child is old:
                setattr(module, name, new)
