"""Fit the site of a head, and measure what it costs: its outputs are the logits themselves, so the loss needs no estimate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from moyu.calibration.fisher import LEVELS, Point, interpolated
from moyu.calibration.taps import tensors_of
from moyu.engine.applied import Applied
from moyu.measure.windows import Windows
from moyu.methods import selection
from moyu.methods.base import Method
from moyu.methods.values import Acts, Rows, Site, SiteParams
from moyu.model import dissect
from moyu.model.anatomy import Anatomy, Block
from moyu.plan import Plan

ROWS, NUMBERS = 1024, 1 << 25  # tokens, and logits of them, that are looked at, at most


class _Enough(Exception):
    """The head has been reached: nobody needs its logits."""


def fit(
    applied: Applied, draft: Plan, windows: Windows, target: Callable[[Site], float]
) -> dict[str, tuple[Site, SiteParams]]:
    """The site of the head behind the sites that are attached to `applied`; nothing where the method has none there."""
    head = applied.anatomy.head
    sites = () if head is None else draft.method.sites(head)
    if head is None or not sites:
        return {}
    acts = _acts(head, _inputs(applied, head, windows))
    return {site.key: (site, draft.method_of(site).fit(site, acts, target(site))) for site in sites}


@torch.no_grad()
def curves(model: nn.Module, choices: Sequence[Method], windows: Windows, anatomy: Anatomy) -> dict[str, list[Point]]:
    """What the site of a head saves, in bytes a token, and its KL in nats a token, at levels as `fisher.curves` has them."""
    head = anatomy.head
    if head is None or not choices[0].sites(head):
        return {}
    with Applied(model, None, engine="mask", anatomy=anatomy, check=False) as applied:
        x = _inputs(applied, head, windows)
    acts, (site,) = _acts(head, x), choices[0].sites(head)
    piece, first = head.pieces["head"], acts.dense["words"]
    whole, after = functional.linear(x, piece.weight, piece.bias), _after(model)
    dense = after(whole.float()).log_softmax(1)
    found: list[Point] = []
    for method in choices:
        points = []
        for level in LEVELS:
            own = method.at(site)
            params = own.fit(site, acts, level)
            mask = selection.select(own.score(first, acts.rows, site, params, {}), params.rule)
            logits = after(torch.where(mask, whole, first).float()).log_softmax(1)
            kl = float((dense.exp() * (dense - logits)).sum(1).mean())
            points.append(Point(level, float((~mask).sum(1).float().mean()) * site.unit_bytes, max(0.0, kl), method))
        found += interpolated(points)
    return {site.key: found}


def _inputs(applied: Applied, head: Block, windows: Windows) -> Tensor:
    """What the head reads at positions behind the prompt, (R, d), from the first windows."""
    piece, seen = head.pieces["head"], list[Tensor]()
    count = max(1, min(ROWS, NUMBERS // piece.shape[0]))

    def reached(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0].detach().reshape(-1, args[0].shape[-1])[windows.prompt :])
        raise _Enough

    device = next(applied.model.parameters()).device
    hook = piece.module.register_forward_pre_hook(reached)
    try:
        for window in windows.tokens.split(1):
            try:
                with applied.prompt(windows.prompt):
                    applied.model(input_ids=window.to(device), use_cache=False)
            except _Enough:
                pass
            if sum(map(len, seen)) >= count:
                break
    finally:
        hook.remove()
    return torch.cat(seen)[:count]


def _acts(head: Block, x: Tensor) -> Acts:
    piece = head.pieces["head"]
    first: dict[Any, Tensor] = {"words": functional.linear(x, piece.first_values, piece.bias)}
    return Acts(first, first, Rows.one_each(len(x), x.device), *tensors_of(head))


def _after(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """What the model makes of the head's outputs, as its config says."""
    config = dissect.text_config(model)
    cap = getattr(config, "final_logit_softcapping", None)
    by = float(getattr(config, "logit_scale", None) or 1) / float(getattr(config, "logits_scaling", None) or 1)
    return lambda logits: logits * by if not cap else cap * torch.tanh(logits * by / cap)
