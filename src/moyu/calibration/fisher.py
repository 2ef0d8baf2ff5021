"""The loss that skipping causes at each site, to second order, and the division of a budget with the least total loss.

To second order, perturbing a layer's output by e costs KL = e' F e / 2, where F = E[g g'] is the Fisher information and g the
gradient of log p for tokens drawn from the model itself. We use the diagonal of F at each layer's output, from one backward
pass over calibration text; e is the change caused by one site's skipping with all else dense. Costs of sites add up. The
total is least if the next byte costs the same at every site (Lagrange; Shoham and Gersho 1988 for bits). The diagonal Fisher
as the cost of pruning: LeCun, Denker and Solla 1990, Theis et al. (arXiv 1801.05787).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from moyu.calibration.streams import Progress, first
from moyu.calibration.trials import Trial, each_layer
from moyu.engine.choosers import Counter
from moyu.measure.windows import Windows
from moyu.methods.base import Method
from moyu.methods.values import Site
from moyu.model.anatomy import Anatomy
from moyu.plan import Plan

LEVELS = (0.001, 0.2, 0.4, 0.6, 0.8, 0.9, 0.97, 0.999)  # sparsities at which each site is tried
TOKENS = 512  # of calibration text, for these trials
STEP = 0.01  # between interpolated sparsities
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Point:
    """A site at a level: its saving in units of the budget, and its cost in nats per token."""

    level: float
    saved: float
    cost: float
    method: Method | None = (
        None  # the method with the knobs of this point; None: nothing is skipped, or there is only one choice
    )


DENSE = Point(0.0, 0.0, 0.0)


def curvature(model: nn.Module, windows: Windows, anatomy: Anatomy, seed: int = 0) -> dict[int, Tensor]:
    """The diagonal of the Fisher information at each layer's output, (d,) by layer, per sparse token of `windows`."""
    generator, found = torch.Generator().manual_seed(seed), dict[int, Tensor]()
    outputs: list[Tensor] = []
    embedding = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    hooks = [layer.register_forward_hook(lambda m, a, o: outputs.append(first(o))) for layer in anatomy.layers]
    # The embedding's output needs a gradient even if no weight does.
    hooks.append(embedding.register_forward_hook(lambda m, a, o: o.detach().requires_grad_()))
    try:
        for window in windows.tokens.split(1):
            outputs.clear()
            with torch.enable_grad():
                logits = model(input_ids=window.to(next(model.parameters()).device), use_cache=False).logits
                log_probs = logits[0, windows.prompt :].float().log_softmax(-1)  # (T - P, V)
                drawn = torch.multinomial(log_probs.detach().exp().cpu(), 1, generator=generator).to(log_probs.device)
                total = log_probs.gather(1, drawn).sum()
                gradients = torch.autograd.grad(total, outputs, allow_unused=True)
            for layer, gradient in enumerate(gradients):
                if gradient is not None:
                    squares = gradient[0, windows.prompt :].float().square().mean(0) / len(windows.tokens)
                    found[layer] = found[layer] + squares if layer in found else squares
    finally:
        for hook in hooks:
            hook.remove()
    return found


Worth = Callable[
    [Plan, float, Mapping[str, float]], float
]  # saving by a trial's plan, its skipped bytes per token and its levels


@torch.no_grad()
def curves(
    model: nn.Module,
    choices: Sequence[Method],
    windows: Windows,
    anatomy: Anatomy,
    worth: Worth,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, list[Point]]:
    """Savings and costs of each site under each of `choices`, by `name_of`: measured at LEVELS, interpolated between them.

    All choices must have the same sites. The experts of a layer count as one site. Layers must be `trials.separable`.
    """
    fisher, tried = curvature(model, windows, anatomy, seed), dict[tuple[str, Method], list[Point]]()

    def visit(trial: Trial, shares: dict[str, float]) -> dict[str, float]:
        nothing = dict.fromkeys(shares, 0.0)
        groups: dict[str, list[str]] = {}
        for _, site in trial.sites:
            groups.setdefault(name_of(site), []).append(site.key)
        batch, length = trial.clean.shape[:2]
        for (name, keys), method, level in itertools.product(groups.items(), choices, LEVELS):
            levels = nothing | dict.fromkeys(keys, level)
            plan, counter = trial.attach(levels, method), Counter(batch, length)
            with trial.walk.applied.watched(chooser=counter):
                change = trial.change()
            squares, skipped = change.square().mean((0, 1)), counter.skipped_bytes / change[..., 0].numel()
            cost = float((squares * fisher[trial.index].to(squares.device)).sum()) / 2 if trial.index in fisher else 0.0
            tried.setdefault((name, method), []).append(Point(level, worth(plan, skipped, levels), cost, method))
        return nothing

    each_layer(model, choices[0], windows, visit, anatomy, progress, TOKENS)
    found: dict[str, list[Point]] = {}
    for (name, _), points in tried.items():
        found.setdefault(name, []).extend(interpolated(points))
    return found


def interpolated(points: Sequence[Point]) -> list[Point]:
    """The points of one choice, and points at every STEP between: savings are linear, and so are the roots of costs.

    An error is about proportional to the sparsity, so its cost is about a square.
    """
    tried = [p.level for p in points]
    levels = np.union1d(tried, np.arange(min(tried), max(tried), STEP))
    saved = np.interp(levels, tried, [p.saved for p in points])
    costs = np.interp(levels, tried, [math.sqrt(p.cost) for p in points]) ** 2
    rows = zip(levels.tolist(), saved.tolist(), costs.tolist(), strict=True)
    return [Point(level, worth, cost, points[0].method) for level, worth, cost in rows]


def name_of(site: Site) -> str:
    """The key of a site. All routed experts of a layer share one."""
    routed = site.expert is not None and site.expert >= 0
    return f"experts of {dataclasses.replace(site, expert=None).key}" if routed else site.key


def divide(found: Mapping[Key, Sequence[Point]], saved: float) -> dict[Key, Point]:
    """One point for each site, so that together they save `saved` at the least cost; less, if the sites cannot save that much.

    Each site's points are reduced to their lower convex hull. Segments of all hulls are then taken by cost per saving, cheapest
    first. The last segment is taken in part: between two levels of one choice, or at a level of the second choice.
    """
    pieces = []
    for key, points in found.items():
        hull = _hull(points)
        pieces += [(_slope(a, b), n, key, a, b) for n, (a, b) in enumerate(itertools.pairwise(hull))]
    taken = dict.fromkeys(found, DENSE)
    for _, _, key, a, b in sorted(pieces, key=lambda piece: piece[:2]):
        if saved <= 0:
            break
        room = b.saved - a.saved
        taken[key] = b if saved >= room else _between(a, b, a.saved + saved, found[key])
        saved -= room
    return taken


def _hull(points: Sequence[Point]) -> list[Point]:
    """The lower convex hull of cost over saving, from the dense point on."""
    hull = [DENSE]
    for point in sorted(points, key=lambda p: (p.saved, -p.cost)):
        if point.saved <= 0 or not math.isfinite(point.cost):  # skip overflows
            continue
        while hull[-1].saved == point.saved or (len(hull) > 1 and _slope(*hull[-2:]) >= _slope(hull[-1], point)):
            hull.pop()
        hull.append(point)
    return hull


def _between(a: Point, b: Point, saved: float, points: Sequence[Point]) -> Point:
    """The point of b's choice that saves `saved`. It lies on the line from a if both are of one choice."""
    line = [a, b]
    if a.method is not b.method and a is not DENSE:
        line = sorted([DENSE, *(p for p in points if p.method is b.method)], key=lambda p: p.saved)
    at = [p.saved for p in line]
    level, cost = (float(np.interp(saved, at, [getattr(p, n) for p in line])) for n in ("level", "cost"))
    return Point(level, saved, cost, b.method)


def _slope(a: Point, b: Point) -> float:
    return (b.cost - a.cost) / (b.saved - a.saved)
