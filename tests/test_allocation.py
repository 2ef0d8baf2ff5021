"""Budgets across sites: sizes, the greedy climb by hand, and the better of two plans."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

import moyu
from moyu import allocation, cli, methods, pipeline, surgery
from moyu.allocation import climb, mean, weights
from moyu.calibration import Windows
from moyu.plan import Plan
from tiny import build, tokens


def test_sizes_are_the_matrices_own_grouped_keys_included():
    block = surgery.dissect(build("llama", torch.float32)).blocks[0]
    sites = methods.method("teal").sites(block)
    shares = {s.linears[0]: w for s, w in zip(sites, weights(sites).values(), strict=True)}
    assert shares["k"] == shares["v"] == pytest.approx(shares["q"] / 2)  # 2 heads of keys for 4 of queries
    assert shares["gate"] == pytest.approx(shares["q"] * 96 / 64)
    assert sum(shares.values()) == pytest.approx(1)


def test_the_climb_takes_what_costs_least():
    """Quadratic errors c p^2 with equal weights: levels end close to what equal marginal costs say, 1 / c."""
    costs = {"a": 1.0, "b": 2.0, "c": 4.0}
    shares = dict.fromkeys(costs, 1 / 3)
    levels = climb(shares, 0.4, lambda p: sum(c * p[k] ** 2 for k, c in costs.items()), step=0.01)
    assert mean(levels, shares) == pytest.approx(0.4)
    total = 1.2 / sum(1 / c for c in costs.values())
    assert {k: levels[k] for k in costs} == pytest.approx({k: total / c for k, c in costs.items()}, abs=0.02)


def test_small_matrices_take_larger_steps_and_none_passes_its_most():
    shares = {"large": 0.9, "small": 0.1}
    levels = climb(shares, 0.3, lambda p: p["large"])  # skipping the small one is free
    assert levels["small"] == pytest.approx(allocation.MOST) and mean(levels, shares) == pytest.approx(0.3)
    with pytest.raises(moyu.UserError, match="no choice"):
        climb(shares, 0.99, lambda p: 0.0)


def test_the_plan_has_the_levels_and_says_which_it_is():
    model = build("llama", torch.float32)
    plan = allocation.calibrate_greedily(
        model, methods.method("teal"), Windows(tokens(6, 40), 20), Windows(tokens(6, 40, seed=4), 20), sparsity=0.5
    )
    about = plan.calibration["allocation"]
    assert about["kl"][about["chosen"]] == min(about["kl"].values())
    uniform = moyu.calibrate(model, methods.method("teal"), Windows(tokens(6, 40), 20), sparsity=0.5)
    assert set(about["kl"]) == {"uniform", "greedy"}
    if about["chosen"] == "greedy":
        shares = allocation.weights([s for s, _ in plan.parts.values() if s.layer == 0])
        assert mean({k: about["levels"][k] for k in shares}, shares) == pytest.approx(0.5)
    else:
        assert [p.rule for _, p in plan.parts.values()] == [p.rule for _, p in uniform.parts.values()]


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(6, 12), (2, 64)], ids=["many windows", "long ones"])
def test_greedy_looks_at_no_more_than_its_tokens(monkeypatch, shape):
    seen = []

    class Watched(allocation.Walk):
        def __init__(self, applied, windows):
            seen.append(windows.tokens.numel())
            super().__init__(applied, windows)

    monkeypatch.setattr(allocation, "TOKENS", 32)
    monkeypatch.setattr(allocation, "Walk", Watched)
    allocation.greedy(build("llama"), methods.method("teal"), Windows(tokens(*shape), 4), 0.5, step=0.25)
    assert seen and max(seen) <= 32


def test_greedy_beats_uniform_on_a_trained_model_at_the_same_weights():
    context = pipeline.Context.open("swiglu", pipeline.Settings(calibration=4, test=12, window=64, boundary=16))
    model, split = context.loaded.model, context.split
    method = methods.method("teal")
    plan = allocation.calibrate_greedily(
        model, method, split.calibration, split.validation, sparsity=0.5, step=0.1, anatomy=context.anatomy
    )
    about = plan.calibration["allocation"]
    assert about["chosen"] == "greedy"
    uniform = moyu.calibrate(model, method, split.calibration, sparsity=0.5, anatomy=context.anatomy)
    greedy, even = (context.quality(p, matched=False) for p in (plan, uniform))
    assert greedy.method.kl.mean() < even.method.kl.mean()
    assert greedy.byte_fraction == pytest.approx(even.byte_fraction, abs=0.02)


@pytest.mark.parametrize("name", ["griffin", "lte", "relu-zero"])
def test_methods_without_budgets_are_refused(name):
    nothing = Windows(tokens(2, 20), 8)
    with pytest.raises(moyu.UserError, match="no site budgets"):
        allocation.calibrate_greedily(build("llama"), methods.method(name), nothing, nothing, sparsity=0.5)


def test_the_command_divides_budgets(tmp_path):
    arguments = [
        "calibrate",
        "swiglu",
        "-m",
        "cats",
        "--allocation",
        "greedy",
        "--window",
        "48",
        "--prompt-tokens",
        "8",
    ]
    done = CliRunner().invoke(cli.app, [*arguments, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    about = Plan.load(tmp_path / "cats").calibration["allocation"]
    assert about["kl"]["greedy"] == pytest.approx(about["kl"]["uniform"])  # one site a block: nothing to divide
    refused = CliRunner().invoke(cli.app, ["calibrate", "swiglu", "--allocation", "wild"])
    assert isinstance(refused.exception, moyu.UserError) and "greedy" in str(refused.exception)
