"""Routers trained in the loop: through the model's own loss, all layers together, with their masks in place (RIDA).

Stage 1 trains with soft gates; dual ascent moves a multiplier until the target fraction of units is skipped. Stage 2 freezes
the routers and makes the gates hard; if weights are tuned too, they adapt to the hard gates.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from moyu.calibration.compensation import log_probs
from moyu.engine.applied import Applied
from moyu.engine.sites import SiteState
from moyu.measure.windows import Windows
from moyu.methods import selection
from moyu.methods.selection import Soft, Threshold
from moyu.methods.trained import is_joint
from moyu.methods.values import Rows, Site
from moyu.model.anatomy import Anatomy
from moyu.plan import Plan

BATCH = 4  # windows per step
RATE = 5e-3  # Adam's rate for routers
WEIGHT_RATE = 2e-4  # for tuned weights
ASCENT = 2.0  # of the multiplier, per step and missing sparsity
ROUNDS, CLOSE = 6, 2e-3  # of the search for the threshold, and the tolerance of its sparsity


def train(
    model: nn.Module,
    plan: Plan,
    windows: Windows,
    sparsity: float,
    *,
    steps: int,
    tune: bool = False,
    anatomy: Anatomy | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """The plan with routers trained in the loop for a target sparsity. The result is deterministic.

    The loss is KL(dense || sparse) at the sparse positions of a frozen model. tune: train the feed-forward weights too, in
    place, on the likelihood of the text; afterwards the plan fits these weights only.
    """
    parameters = list(model.parameters())
    asked = [p.requires_grad for p in parameters]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        with Applied(model, plan, engine="mask", anatomy=anatomy, check=False) as applied, torch.enable_grad():
            states = [s for call in applied.ffns for s in call.states]
            weights = _tuned(applied) if tune else []
            taught, held = _parts(windows)
            _soft(applied, states, weights, taught, sparsity, steps, progress)
            threshold = _threshold(applied, states, held, sparsity)
            for state in states:
                state.params = dataclasses.replace(state.params, rule=Threshold(threshold))
            if tune:
                _hard(applied, weights, taught, steps)
    finally:
        for parameter, before in zip(parameters, asked, strict=True):
            parameter.requires_grad_(before)
    trained = {state.site.key: (state.site, state.params) for state in states}
    return dataclasses.replace(plan, parts={**plan.parts, **trained})


def _parts(windows: Windows) -> tuple[Windows, Windows]:
    """Windows to train on, and a quarter of them held out for the threshold: gates differ on text that was trained on."""
    held = max(1, len(windows.tokens) // 4)
    learned = max(1, len(windows.tokens) - held)
    first, last = windows.tokens[:learned], windows.tokens[-held:]
    return dataclasses.replace(windows, tokens=first), dataclasses.replace(windows, tokens=last)


class _Gates:
    """A chooser that stores the gates or masks of sparse rows without changing them."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, site: Site, mask: Tensor, rows: Rows, oracle: Callable[[], Tensor]) -> Tensor:
        self.seen.append(mask[rows.sparse].flatten())
        return mask


def _soft(
    applied: Applied,
    states: list[SiteState],
    weights: list[nn.Parameter],
    windows: Windows,
    sparsity: float,
    steps: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Stage 1. Leaves trained routers in the states, as plain tensors of the model's type."""
    method = None if applied.plan is None else applied.plan.method
    assert method is not None and is_joint(method)
    before: list[Mapping[str, Tensor]] = [state.params.buffers for state in states]
    learned = [{n: nn.Parameter(t.float().clone()) for n, t in buffers.items()} for buffers in before]
    for state, buffers in zip(states, learned, strict=True):
        state.params = dataclasses.replace(state.params, rule=Soft(), buffers=buffers)
    groups = [{"params": [p for b in learned for p in b.values()], "lr": RATE}]
    if weights:
        groups.append({"params": weights, "lr": WEIGHT_RATE})
    optimiser, eta = torch.optim.Adam(groups), 0.0
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, steps))
    for step in range(steps):
        tokens = _batch(applied, windows, step)
        gates = _Gates()
        task = _task(applied, tokens, windows.prompt, gates, tuned=bool(weights))
        seen = torch.cat(gates.seen)
        loss = task + method.penalty(seen, eta)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        missing = sparsity - float((seen <= 0.5).float().mean())
        eta = max(0.0, eta + ASCENT * missing)
        if progress:
            progress(step + 1, steps)
    for state, buffers, old in zip(states, learned, before, strict=True):
        fixed = {n: p.detach().to(old[n].dtype) for n, p in buffers.items()}
        state.params = dataclasses.replace(state.params, buffers=fixed)


def _hard(applied: Applied, weights: list[nn.Parameter], windows: Windows, steps: int) -> None:
    """Stage 2, for tuned weights: train with hard gates."""
    optimiser = torch.optim.Adam(weights, lr=WEIGHT_RATE / 2)
    for step in range(steps // 2):
        loss = _task(applied, _batch(applied, windows, step), windows.prompt, None, tuned=True)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


@torch.no_grad()
def _threshold(applied: Applied, states: list[SiteState], windows: Windows, sparsity: float) -> float:
    """The gate value below which the target fraction of units is skipped, for all layers and windows.

    Start from a quantile of the soft gates and correct it, because later layers see other inputs under hard masks.
    """
    soft = _seen(applied, states, windows, Soft())
    share, best, nearest = sparsity, 0.0, math.inf
    for _ in range(ROUNDS):
        threshold = selection.quantile(soft, share)
        missing = sparsity - (1 - float(_seen(applied, states, windows, Threshold(threshold)).float().mean()))
        if abs(missing) < nearest:
            best, nearest = threshold, abs(missing)
        if nearest < CLOSE:
            break
        share = min(max(share + missing, 0.0), 1.0)
    return best


def _seen(applied: Applied, states: list[SiteState], windows: Windows, rule: Soft | Threshold) -> Tensor:
    """Gates or masks of all layers at the sparse positions of the windows."""
    for state in states:
        state.params = dataclasses.replace(state.params, rule=rule)
    gates = _Gates()
    for tokens in windows.tokens.split(BATCH):
        with applied.prompt(windows.prompt), applied.watched(chooser=gates):
            applied.model(input_ids=tokens.to(_device(applied)), use_cache=False)
    return torch.cat(gates.seen)


def _task(applied: Applied, tokens: Tensor, prompt: int, gates: _Gates | None, *, tuned: bool) -> Tensor:
    """The loss at the sparse positions: of the text itself if weights are tuned, else KL from the dense model."""
    model: Any = applied.model
    with applied.prompt(prompt), applied.watched(chooser=gates):
        sparse = log_probs(model, tokens, prompt)  # (B (T - P), V)
    if tuned:
        shape = (len(tokens), -1, sparse.shape[1])
        return functional.nll_loss(sparse.reshape(shape)[:, :-1].flatten(0, 1), tokens[:, prompt + 1 :].flatten())
    with torch.no_grad(), applied.prompt(tokens.shape[1]):
        dense = log_probs(model, tokens, prompt)
    return functional.kl_div(sparse, dense, log_target=True, reduction="batchmean")


def _tuned(applied: Applied) -> list[nn.Parameter]:
    """The weights of the feed-forward networks, with gradients switched on."""
    found = {id(p): p for c in applied.ffns for piece in c.block.pieces.values() if (p := _weight(piece)) is not None}
    attention = {id(p) for call in applied.linears for p in call.piece.module.parameters()}
    chosen = [p for key, p in found.items() if key not in attention]
    for parameter in chosen:
        parameter.requires_grad_(True)
    return chosen


def _weight(piece: Any) -> nn.Parameter | None:
    return getattr(piece.module, piece.parameter, None)


def _batch(applied: Applied, windows: Windows, step: int) -> Tensor:
    at = torch.arange(step * BATCH, (step + 1) * BATCH) % len(windows.tokens)
    return windows.tokens[at].to(_device(applied))


def _device(applied: Applied) -> torch.device:
    return next(applied.model.parameters()).device
