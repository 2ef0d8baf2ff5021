"""Compensation: a bias, a centre or a learned bias that recovers a part of a mask's error. Each works with any method.

All act on sparse rows only and are off by default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from moyu.engine.applied import Applied
from moyu.engine.executor import taken_away
from moyu.measure.windows import Windows
from moyu.methods import selection
from moyu.methods.base import Method
from moyu.methods.values import Acts, Site, SiteParams
from moyu.model import dissect
from moyu.model.anatomy import Anatomy, Block
from moyu.plan import Plan

BINS = 256  # of the histogram whose peak is a candidate for the centre


def targets(site: Site) -> tuple[str, ...]:
    """The linears whose outputs lack a site's skipped units."""
    if site.skips == "columns":
        return site.linears
    return ("down",) if site.skips in ("rows", "neurons") else site.linears[-1:]


def correction(block: Block, site: Site, params: SiteParams, missing: Tensor) -> Tensor:
    """Closed-form bias b = W E[v - S(v)], the b that minimises E ||W v - W S(v) - b||^2: missing (n,) -> (q,).

    missing: mean of the masked values, in the basis of the mask. The part that a low-rank path recovers is subtracted.
    """
    missing = params.turned_back(missing)[None]
    return torch.cat([params.lost(taken_away(block.pieces[n], site), missing)[0] for n in targets(site)])


# ----------------------------------------------------------------------------------------------------------- centring


def centred(method: Method, site: Site, acts: Acts, target: float, bias: bool) -> SiteParams:
    """Fit a site of columns on v - c, S(v) = mask * (v - c) + c (SCAP, arXiv 2412.07174), with the best c for the site.

    c is 0, the median of each channel, or the peak of the pooled density. Each is fitted on every second window; the one with
    the least output error on the others is used. bias: the mean of the error is ignored, because a bias will correct it.
    """
    fitting, held_out = (_windows(acts, acts.rows.seq % 2 == parity) for parity in (0, 1))
    if not len(fitting.met(site.reads)) or not len(held_out.met(site.reads)):
        return method.fit(site, acts, target)  # too little text to choose
    best, least = None, float("inf")
    for centre in _centres(fitting.met(site.reads)):
        params = _fit_around(method, site, fitting, target, centre)
        error = _error(method, site, params, held_out, bias)
        if error < least:
            best, least = centre, error
    return _fit_around(method, site, acts, target, best)


def _centres(x: Tensor) -> list[Tensor | None]:
    """Candidates for rows (N, n): none, the medians (n,), the peak of the pooled density (n,)."""
    pooled = x.float().flatten()
    low, high = selection.quantile(pooled, 0.01), selection.quantile(pooled, 0.99)
    counts = torch.histc(pooled, BINS, low, high)
    peak = low + (int(counts.argmax()) + 0.5) * (high - low) / BINS
    return [None, x.median(0).values, torch.full_like(x[0], peak)]


def _fit_around(method: Method, site: Site, acts: Acts, target: float, centre: Tensor | None) -> SiteParams:
    if centre is None:
        return method.fit(site, acts, target)
    dense, sparse = ({**taps, site.reads: taps[site.reads] - centre} for taps in (acts.dense, acts.sparse))
    params = method.fit(site, dataclasses.replace(acts, dense=dense, sparse=sparse), target)
    return dataclasses.replace(params, centre=centre)


def _windows(acts: Acts, chosen: Tensor) -> Acts:
    """The rows at which `chosen` (N,) is True."""
    dense, sparse = ({tap: x[chosen] for tap, x in taps.items()} for taps in (acts.dense, acts.sparse))
    return dataclasses.replace(acts, dense=dense, sparse=sparse, rows=acts.rows.take(chosen.nonzero().squeeze(1)))


def _error(method: Method, site: Site, params: SiteParams, acts: Acts, bias: bool) -> float:
    """Mean squared error of the outputs that a site's mask causes on the sparse rows of `acts`."""
    v = params.turned(acts.met(site.reads))
    mask = selection.select(method.score(v, acts.chosen, site, params, {}), params.rule)
    missing = params.turned_back(torch.where(mask, 0, v))
    lost = torch.cat([params.lost(acts.weights[n], missing) for n in site.linears], dim=1)
    lost = lost - lost.mean(0) if bias else lost
    return float(lost.square().sum(1).mean())


# ------------------------------------------------------------------------------------------------------- learned biases


def learn(
    model: nn.Module,
    plan: Plan,
    windows: Windows,
    *,
    steps: int = 100,
    rate: float = 1e-3,
    batch: int = 4,
    anatomy: Anatomy | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """A plan with learned biases (SPON, arXiv 2512.12744): z = W S(v) + W alpha at every skipping linear.

    Only the alphas (n,) are trained, with Adam at `rate`, on KL(dense || sparse) at the sparse positions of `windows`. The
    learned biases are added to those that the plan already has.
    """
    anatomy = anatomy or dissect.dissect(model)
    frozen = [p for p in model.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        with Applied(model, plan, engine="mask", anatomy=anatomy) as applied, torch.enable_grad():
            learned = [_Learned(call.block, s) for call in (*applied.ffns, *applied.linears) for s in call.states]
            learned = list({entry.state.site.key: entry for entry in learned}.values())
            optimiser = torch.optim.Adam([a for entry in learned for a in entry.alphas], lr=rate)
            for step in range(steps):
                at = torch.arange(step * batch, (step + 1) * batch) % len(windows.tokens)
                tokens = windows.tokens[at].to(next(model.parameters()).device)
                with torch.no_grad(), applied.prompt(tokens.shape[1]):
                    dense = log_probs(model, tokens, windows.prompt)
                for entry in learned:
                    entry.update()
                with applied.prompt(windows.prompt):
                    sparse = log_probs(model, tokens, windows.prompt)
                loss = functional.kl_div(sparse, dense, log_target=True, reduction="batchmean")
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                if progress:
                    progress(step + 1, steps)
            parts = dict(plan.parts)
            for entry in learned:
                site, params = parts[entry.state.site.key]
                parts[site.key] = (site, dataclasses.replace(params, bias=entry.bias().detach()))
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    calibration = {**plan.calibration, "learned_bias": {"steps": steps, "rate": rate, "batch": batch}}
    return dataclasses.replace(plan, parts=parts, calibration=calibration)


class _Learned:
    """The learned inputs alpha of a site's linears, and the bias that follows from them."""

    def __init__(self, block: Block, state) -> None:
        """state: the SiteState with whose parameters the model runs."""
        self.state, self.start = state, state.params.bias
        self.weights = [block.pieces[n].weight.detach() for n in targets(state.site)]
        self.alphas = [nn.Parameter(torch.zeros_like(w[0], dtype=_at_least_float(w.dtype))) for w in self.weights]

    def bias(self) -> Tensor:
        """The plan's own bias plus W alpha, (q,)."""
        made = torch.cat([w.to(a) @ a for w, a in zip(self.weights, self.alphas, strict=True)])
        return made if self.start is None else self.start.to(made) + made

    def update(self) -> None:
        """Let the model run with the present alphas."""
        self.state.params = dataclasses.replace(self.state.params, bias=self.bias())


def _at_least_float(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def log_probs(model: nn.Module, tokens: Tensor, prompt: int) -> Tensor:
    """Log-probabilities of the sparse positions, (B * (T - P), V)."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, prompt:]
    return logits.flatten(0, 1).float().log_softmax(-1)
