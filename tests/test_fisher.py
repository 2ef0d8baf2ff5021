"""What errors cost to second order: the Fisher information by another way, KL foreseen, and budgets against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from moyu import methods
from moyu.calibration import fisher, streams
from moyu.calibration.context import Context
from moyu.calibration.fisher import DENSE, Point, curvature, divide, name_of
from moyu.calibration.settings import Settings
from moyu.calibration.trials import weights
from moyu.calibration.walk import calibrate
from moyu.measure import evaluation
from moyu.measure.windows import Windows
from moyu.methods.estimate import Estimate
from moyu.model.dissect import dissect
from tiny import build, tokens


def by_level(plan, skipped, levels):
    return sum(levels.values())


def test_curvature_is_the_diagonal_of_the_fisher_information():
    """Of one scored token it is known without drawing: the sum over the vocabulary of p (d log p)^2."""
    model = build("llama", torch.float32)
    anatomy, windows = dissect(model), Windows(tokens(1, 6), 5)
    drawn = [curvature(model, windows, anatomy, seed) for seed in range(300)]
    states = []
    hook = anatomy.layers[1].register_forward_hook(lambda m, a, o: states.append(streams.first(o)))
    log_p = model(input_ids=windows.tokens, use_cache=False).logits[0, -1].float().log_softmax(-1)
    hook.remove()
    squares = [torch.autograd.grad(p, states[0], retain_graph=True)[0][0, -1].square() for p in log_p]
    exact = (log_p.detach().exp()[:, None] * torch.stack(squares)).sum(0)
    found = torch.stack([one[1] for one in drawn]).mean(0)
    assert float((found - exact).norm() / exact.norm()) < 0.15
    assert set(drawn[0]) == {0, 1, 2} and all(p.grad is None for p in model.parameters())


def test_it_needs_no_gradient_of_weights():
    model, windows = build("llama", torch.float32), Windows(tokens(2, 12), 4)
    asked = curvature(model, windows, dissect(model))
    frozen = curvature(model.requires_grad_(False), windows, dissect(model))
    assert all(torch.equal(asked[layer], frozen[layer]) for layer in asked)


@pytest.mark.slow
def test_costs_foresee_kl():
    """Of one site and of all together, on a trained model."""
    context = Context.open("swiglu", Settings(calibration=6, test=8, window=96, boundary=32))
    model, anatomy, windows = context.loaded.model, context.anatomy, context.split.calibration
    method = methods.method("teal")
    found = fisher.curves(model, [method], windows, anatomy, by_level)
    assert len(found) == 42 and all(set(fisher.LEVELS) <= {p.level for p in points} for points in found.values())
    sites = [s for b in anatomy.all_blocks() for s in method.sites(b)]
    for chosen in (sites, sites[6:7], sites[20:21]):
        at = {name_of(s): next(p for p in found[name_of(s)] if p.level == 0.4) for s in chosen}
        levels = {s.key: 0.4 if s in chosen else 0.0 for s in sites}
        plan = calibrate(model, method, windows, sparsity=0.4, levels=levels, anatomy=anatomy)
        assert set(plan.parts) == {
            s.key for s in sites
        }  # those at level 0 too: what is skipped is a part of all of them
        kl = float(evaluation.evaluate(model, plan, windows, matched=False, anatomy=anatomy).method.kl.mean())
        assert 0.6 < sum(p.cost for p in at.values()) / kl < 1.2


def test_experts_of_a_layer_go_together():
    model = build("mixtral", torch.float32)
    anatomy, method = dissect(model), methods.method("teal")
    found = fisher.curves(model, [method], Windows(tokens(4, 24), 8), anatomy, by_level)
    sites = [s for b in anatomy.all_blocks() for s in method.sites(b)]
    assert any(s.expert is not None for s in sites) and any(name.startswith("experts of") for name in found)
    assert set(found) == {name_of(s) for s in sites} and len(found) < len(sites)
    assert all(p.saved > 0 and p.cost > 0 for points in found.values() for p in points if p.level > 0.1)


def test_a_budget_is_divided_as_brute_force_divides_it():
    """Convex curves, and one that is not: that costs up to a piece of its hull."""
    grid = (0.2, 0.4, 0.6, 0.8, 0.95)
    costs = {0: [0.1, 0.3, 0.7, 1.5, 3.0], 1: [0.02, 0.05, 0.2, 0.9, 2.0], 2: [0.6, 0.7, 0.8, 0.9, 1.0]}
    shares = {0: 0.5, 1: 0.25, 2: 0.25}
    points = {k: [Point(p, p * shares[k], c) for p, c in zip(grid, own, strict=True)] for k, own in costs.items()}
    loss = lambda p: sum(float(np.interp(p[i], (0, *grid), (0, *costs[i]))) for i in costs)  # noqa: E731
    fine = np.linspace(0, 0.95, 20)
    for target in (0.2, 0.45, 0.7):
        taken = divide(points, target)
        levels = {k: p.level for k, p in taken.items()}
        assert sum(shares[k] * p for k, p in levels.items()) == pytest.approx(target)
        best = min(loss(p) for p in itertools.product(fine, repeat=3) if np.dot(p, list(shares.values())) >= target)
        assert loss(levels) <= best + 0.12
        assert sum(p.saved for p in taken.values()) == pytest.approx(target)


def test_of_two_choices_a_site_takes_the_one_that_is_cheaper_at_what_it_saves():
    fine, coarse = Estimate(rest=8), Estimate(rest=4)
    points = [(0.5, 0.2, 0.001, fine), (1.0, 0.4, 0.002, fine), (0.5, 0.35, 0.1, coarse), (1.0, 0.7, 0.2, coarse)]
    curves = {"a": [Point(*each) for each in points]}
    assert divide(curves, 0.2)["a"] == curves["a"][0] and divide(curves, 0.4)["a"] == curves["a"][1]
    between = divide(curves, 0.525)["a"]  # no plan has a point between two choices: the second one, on its own curve
    assert between.method == coarse and between.level == pytest.approx(0.75)
    assert between.saved == pytest.approx(0.525) and between.cost == pytest.approx(0.15)
    assert divide(curves, 0.7)["a"] == divide(curves, 9.9)["a"] == curves["a"][3]
    assert divide(curves, 0.0)["a"] == DENSE
    assert (
        divide({"a": [Point(0.1, -0.1, 0.0), Point(0.5, 0.2, 0.1)]}, 0.2)["a"].level == 0.5
    )  # one that saves less than it adds


def test_sizes_decide_at_equal_costs():
    model = build("llama", torch.float32)
    sites = [s for b in dissect(model).all_blocks() for s in methods.method("teal").sites(b)]
    shares = weights(sites)
    points = {s.key: [Point(0.5, 0.5 * shares[s.key], 1.0)] for s in sites}
    taken = divide(points, 0.25 * shares[sites[0].key])
    assert {key for key, p in taken.items() if p.level} <= {
        key for key in shares if shares[key] == max(shares.values())
    }


def test_between_two_points_costs_are_squares():
    method = Estimate()
    found = {
        round(p.level, 6): p
        for p in fisher.interpolated([Point(0.2, 1.0, 0.04, method), Point(0.4, 2.0, 0.16, method)])
    }
    assert len(found) == 21 and found[0.2].cost == pytest.approx(0.04) and found[0.4].saved == 2.0
    assert found[0.3].cost == pytest.approx(0.09) and found[0.3].saved == pytest.approx(1.5)
    assert {p.method for p in found.values()} == {method}
