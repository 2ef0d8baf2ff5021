"""Budgets across sites: sizes, the greedy climb by hand, and the better of two plans."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

import moyu
from moyu import methods
from moyu.calibration import allocation, trials, walk
from moyu.calibration.allocation import climb, mean
from moyu.calibration.context import Context
from moyu.calibration.settings import Settings
from moyu.calibration.trials import weights
from moyu.commands import cli
from moyu.engine.products import Products
from moyu.measure.evaluation import evaluate
from moyu.measure.windows import Windows
from moyu.model import dissect
from moyu.plan import Plan
from moyu.research.coverage import shrinking
from moyu.research.coverage.checks import tokens as coverage_tokens
from tiny import build, tokens


def test_sizes_are_the_matrices_own_grouped_keys_included():
    block = dissect.dissect(build("llama", torch.float32)).blocks[0]
    sites = methods.method("teal").sites(block)
    shares = {s.linears[0]: w for s, w in zip(sites, weights(sites).values(), strict=True)}
    assert shares["k"] == shares["v"] == pytest.approx(shares["q"] / 2)  # 2 heads of keys for 4 of queries
    assert shares["gate"] == pytest.approx(shares["q"] * 96 / 64)
    assert sum(shares.values()) == pytest.approx(1)


def test_the_climb_takes_what_costs_least():
    """Quadratic errors c p^2 with equal weights: levels end close to what equal marginal costs say, 1 / c."""
    costs = {"a": 1.0, "b": 2.0, "c": 4.0}
    shares = dict.fromkeys(costs, 1 / 3)
    *_, levels = climb(shares, 0.4, lambda p: sum(c * p[k] ** 2 for k, c in costs.items()), step=0.01)
    assert mean(levels, shares) == pytest.approx(0.4)
    total = 1.2 / sum(1 / c for c in costs.values())
    assert {k: levels[k] for k in costs} == pytest.approx({k: total / c for k, c in costs.items()}, abs=0.02)


def test_small_matrices_take_larger_steps_and_none_passes_its_most():
    shares = {"large": 0.9, "small": 0.1}
    *_, levels = climb(shares, 0.3, lambda p: p["large"])  # skipping the small one is free
    assert levels["small"] == pytest.approx(allocation.MOST) and mean(levels, shares) == pytest.approx(0.3)
    with pytest.raises(moyu.UserError, match="no choice"):
        climb(shares, 0.99, lambda p: 0.0)


def test_the_plan_has_the_levels_and_says_which_it_is():
    model = build("llama", torch.float32)
    plan = allocation.calibrate_allocated(
        model,
        methods.method("teal"),
        Windows(tokens(6, 40), 20),
        Windows(tokens(6, 40, seed=4), 20),
        allocation="greedy",
        sparsity=0.5,
        step=0.2,
    )
    about = plan.calibration["allocation"]
    assert about["kl"][about["chosen"]] == min(about["kl"].values())
    uniform = moyu.calibrate(model, methods.method("teal"), Windows(tokens(6, 40), 20), sparsity=0.5)
    assert set(about["kl"]) == {"uniform", "greedy"}
    if about["chosen"] == "greedy":
        shares = trials.weights([s for s, _ in plan.parts.values() if s.layer == 0])
        assert mean({k: about["levels"][k] for k in shares}, shares) == pytest.approx(0.5)
    else:
        assert [p.rule for _, p in plan.parts.values()] == [p.rule for _, p in uniform.parts.values()]


@pytest.mark.parametrize("shape", [(6, 12), (2, 64)], ids=["many windows", "long ones"])
def test_trials_look_at_no_more_than_their_tokens(monkeypatch, shape):
    seen = []

    class Watched(walk.Walk):
        def __init__(self, applied, windows):
            seen.append(windows.tokens.numel())
            super().__init__(applied, windows)

    monkeypatch.setattr(trials, "Walk", Watched)
    model, windows = build("llama"), Windows(tokens(*shape), 4)
    anatomy = dissect.dissect(model)
    trials.each_layer(
        model, methods.method("teal"), windows, lambda t, shares: dict.fromkeys(shares, 0.0), anatomy, tokens=32
    )
    assert seen and max(seen) <= 32
    seen.clear()
    long = Windows(tokens(2, 64), 40)  # a prompt longer than that: half as many tokens behind it
    trials.each_layer(
        model, methods.method("teal"), long, lambda t, shares: dict.fromkeys(shares, 0.0), anatomy, tokens=32
    )
    assert seen == [56]


@pytest.mark.slow
def test_greedy_beats_uniform_on_a_trained_model_at_the_same_weights():
    context = Context.open("swiglu", Settings(calibration=4, test=12, window=64, boundary=16))
    model, split = context.loaded.model, context.split
    method = methods.method("teal")
    plan = allocation.calibrate_allocated(
        model,
        method,
        split.calibration,
        split.validation,
        allocation="greedy",
        sparsity=0.5,
        step=0.1,
        anatomy=context.anatomy,
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
        allocation.calibrate_allocated(
            build("llama"), methods.method(name), nothing, nothing, allocation="greedy", sparsity=0.5
        )


@pytest.mark.slow
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


def test_a_point_between_two_of_a_path():
    path = [{"a": 0.0, "b": 0.0}, {"a": 0.4, "b": 0.0}, {"a": 0.4, "b": 0.8}]
    shares = {"a": 0.5, "b": 0.5}
    assert allocation.at(path, shares, 0.3) == pytest.approx({"a": 0.4, "b": 0.2})
    assert allocation.at(path, shares, 0.1) == pytest.approx({"a": 0.2, "b": 0.0})


def test_products_are_made_again_only_where_they_change():
    """Kept products give the same errors as a layer that makes all of them, with less work."""
    model = build("llama")
    windows = Windows(tokens(4, 16), 4)
    errors, made = {}, []

    def visit(block, shares):
        keys = list(shares)
        trials = [dict.fromkeys(keys, 0.4)] + [{**dict.fromkeys(keys, 0.4), key: 0.6} for key in keys]
        for trial in trials:
            errors.setdefault("kept", []).append(block.error(trial))
        made.append(block.products.made)
        for trial in trials:
            block.products = Products([s for _, s in block.sites])
            errors.setdefault("fresh", []).append(block.error(trial))
        return trials[0]

    trials.each_layer(model, methods.method("teal"), windows, visit, dissect.dissect(model))
    assert errors["kept"] == pytest.approx(errors["fresh"], rel=1e-12) and min(errors["kept"]) > 0
    # The first run makes 7; q, k or v again that one and the 4 behind it, o 4, up or gate 2, down itself.
    assert made == [7 + 3 * 5 + 4 + 2 * 2 + 1] * 3


@pytest.mark.parametrize(("kind", "count"), [("search", 6), ("fisher", 0)])
def test_allocations_meet_the_target_and_say_which_was_better(kind, count):
    model = build("llama", torch.float32)
    method = methods.method("cats")
    fitting, deciding = Windows(tokens(4, 24), 8), Windows(tokens(6, 24, seed=4), 8)
    plan = allocation.calibrate_allocated(model, method, fitting, deciding, allocation=kind, sparsity=0.5, trials=count)
    about = plan.calibration["allocation"]
    assert set(about["kl"]) == {"uniform", kind} and about["kl"][about["chosen"]] == min(about["kl"].values())
    task = allocation.Division(model, method, fitting, deciding, 0.5, dissect.dissect(model), trials=count)
    levels = allocation.search(task) if kind == "search" else allocation.second_order(task)[0]
    layers = {int(key[5]): level for key, level in levels.items()}
    assert mean(layers, task.shares) == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("name", ["deepseek_v3", "longcat_flash", "llama4_text", "falcon", "gemma2"])
def test_kept_products_give_what_fresh_ones_do_in_every_structure(name):
    """Latent attention, a shared expert, two networks in a layer, attention and network side by side."""
    model = shrinking.build(name)
    anatomy, windows, seen = dissect.dissect(model), Windows(coverage_tokens(2, 12), 4), []

    def visit(trial, shares):
        for key in shares:
            trial.attach(dict.fromkeys(shares, 0.0) | {key: 0.5})
            change, fresh = trial.change(), trial.walk.output(trial.index) - trial.clean
            seen.append(float(change.abs().max()))
            assert torch.allclose(change, fresh[:, windows.prompt :].float(), atol=1e-5), key
        return dict.fromkeys(shares, 0.0)

    trials.each_layer(model, methods.method("teal"), windows, visit, anatomy)
    assert sum(value > 0 for value in seen) > len(seen) / 2


def test_layers_of_stacked_states_are_not_run_alone():
    model, windows = shrinking.build("gemma3n_text"), Windows(coverage_tokens(2, 12), 4)
    anatomy = dissect.dissect(model)
    assert not trials.separable(model, windows, anatomy)
    with pytest.raises(moyu.UserError, match="cannot be run alone"):
        allocation.calibrate_allocated(
            model, methods.method("teal"), windows, windows, allocation="fisher", sparsity=0.5, anatomy=anatomy
        )


def test_sites_that_look_ahead_are_refused():
    model, windows = build("opt-relu", torch.float32), Windows(tokens(2, 20), 8)
    with pytest.raises(moyu.UserError, match="looks ahead"):
        allocation.calibrate_allocated(
            model, methods.method("deja-vu", ahead=True), windows, windows, allocation="greedy", sparsity=0.5
        )


def test_sites_at_level_0_count_in_what_is_skipped():
    model, windows = build("llama", torch.float32), Windows(tokens(4, 40), 20)
    anatomy, method = dissect.dissect(model), methods.method("teal")
    levels = {s.key: 0.0 if s.layer == 1 else 0.8 for b in anatomy.all_blocks() for s in method.sites(b)}
    plan = moyu.calibrate(model, method, windows, sparsity=0.5, levels=levels, anatomy=anatomy)
    quality = evaluate(model, plan, windows, matched=False, anatomy=anatomy)
    assert quality.sparsity_by_layer == pytest.approx([0.8, 0.0, 0.8], abs=0.02)
    assert quality.realized_sparsity == pytest.approx(1.6 / 3, abs=0.02)
