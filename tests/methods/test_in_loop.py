"""Routers in the loop: what training through the model's loss gains, and the checkpoint of tuned weights."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from typer.testing import CliRunner

import moyu
from equality import plan_for
from moyu import methods
from moyu.calibration.context import Context
from moyu.calibration.settings import Settings
from moyu.commands import cli
from moyu.measure.windows import Windows
from moyu.methods import selection
from moyu.methods.lte import Lte
from moyu.methods.selection import Soft
from moyu.methods.trained import is_joint
from moyu.plan import Plan
from tiny import build, tokens


@pytest.mark.slow
def test_training_in_the_loop_lowers_held_out_error():
    """On a trained model: the same routers off the loop, then in it."""
    context = Context.open("swiglu", Settings(calibration=48, test=32, window=96, boundary=16))
    model, windows = context.loaded.model, context.split.calibration
    before, after = (
        moyu.calibrate(model, methods.method("lte", steps=n), windows, sparsity=0.5, anatomy=context.anatomy)
        for n in (0, 30)
    )
    found = [context.quality(p, matched=False) for p in (before, after)]
    assert float(found[1].method.kl.mean()) < 0.9 * float(found[0].method.kl.mean())
    assert found[1].realized_sparsity == pytest.approx(0.5, abs=0.05)
    assert len({params.rule for _, params in after.parts.values()}) == 1  # layers share the target
    assert not any(p.grad is not None for p in model.parameters()) and all(p.requires_grad for p in model.parameters())


def test_layers_share_the_target_and_training_repeats():
    model = build("llama", torch.float32)
    plan, again = (
        plan_for(model, methods.method("lte", block=8, steps=10), windows=Windows(tokens(16, 40), 20)) for _ in range(2)
    )
    assert plan.hash == again.hash
    quality = moyu.evaluate(model, plan, Windows(tokens(8, 40, seed=5), 20), matched=False)
    assert quality.realized_sparsity == pytest.approx(0.5, abs=0.06)
    assert len({round(s, 3) for s in quality.sparsity_by_layer}) > 1


def test_penalty_by_hand():
    gates = torch.tensor([0.0, 0.5, 1.0])
    method = Lte(separation=0.1)
    apart = (1 / 0.3 + 1 / 0.05 + 1 / 0.3) / 3
    assert float(method.penalty(gates, 2.0)) == pytest.approx(2.0 * (0.25 + 1.0) / 3 + 0.1 * apart)


def test_soft_masks_are_the_scores_and_one_is_dense():
    """Gates of exactly 1 leave the model as it is; dense rows are never scaled."""
    scores = torch.rand(3, 4)
    assert selection.select(scores, Soft()) is scores
    model = build("llama")
    plan = plan_for(model, methods.method("lte", block=12, steps=0))
    parts = {}
    for key, (site, params) in plan.parts.items():
        buffers = {"weight": 0 * params.buffers["weight"], "bias": 0 * params.buffers["bias"] + 100}
        parts[key] = (site, dataclasses.replace(params, rule=Soft(), buffers=buffers))
    ids = tokens(1, 12)
    with torch.no_grad():
        dense = model(ids).logits
        soft = dataclasses.replace(plan, parts=parts)  # which a file cannot hold
        with moyu.Applied(model, soft, engine="mask", check=False) as applied, applied.prompt(4):
            assert (model(ids).logits - dense).abs().max() < 1e-12


def test_only_methods_in_the_loop_have_a_penalty():
    assert [name for name in methods.names() if is_joint(methods.method(name))] == ["lte"]
    assert all(methods.method_class(name).joint == (name == "lte") for name in methods.names())


@pytest.mark.slow
def test_tuning_writes_a_checkpoint_and_a_plan_that_fits_it_alone(tmp_path):
    arguments = ["fit", "lte", "relu", "--windows", "8", "--window", "48", "--prompt-tokens", "8", "--knob", "steps=4"]
    done = CliRunner().invoke(cli.app, [*arguments, "--tune", str(tmp_path / "tuned"), "--json"])
    assert done.exit_code == 0, done.output
    row = json.loads(done.stdout)
    assert row["ppl"] < row["ppl_before_tuning"]
    tuned, plain = moyu.load(str(tmp_path / "tuned")).model, moyu.load("relu").model
    plan = Plan.load(tmp_path / "tuned" / "plan")
    with moyu.apply(tuned, plan):
        pass
    with pytest.raises(moyu.UserError, match="other weights"):
        moyu.apply(plain, plan)
    changed = [
        n for (n, a), b in zip(tuned.named_parameters(), plain.parameters(), strict=True) if not torch.equal(a, b)
    ]
    assert changed and all("fc" in name for name in changed)


def test_only_methods_in_the_loop_tune(tmp_path):
    done = CliRunner().invoke(cli.app, ["fit", "deja-vu", "relu", "--tune", str(tmp_path / "x")])
    assert isinstance(done.exception, moyu.UserError) and "lte" in str(done.exception)


@pytest.mark.slow
def test_a_fit_that_was_made_is_not_made_again(tmp_path):
    arguments = [
        "fit",
        "deja-vu",
        "relu",
        "--windows",
        "4",
        "--window",
        "48",
        "--prompt-tokens",
        "8",
        "--out",
        str(tmp_path),
    ]
    runs = [CliRunner().invoke(cli.app, [*arguments, *more]) for more in ([], [], ["--sparsity", "0.3"])]
    assert all(r.exit_code == 0 for r in runs)
    assert ["train deja-vu" in r.stderr for r in runs] == [True, False, True]
    assert runs[0].stdout == runs[1].stdout != runs[2].stdout
