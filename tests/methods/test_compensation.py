"""Biases, centres and learned biases: with any method, on sparse rows only, and they help on text they have not seen."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from small_block import case

import moyu
from equality import PROMPT, has_sites, one_pass, padded, plan_for, stepwise
from moyu import methods
from moyu.calibration import compensation
from moyu.calibration.walk import calibrate
from moyu.engine.applied import Applied
from moyu.measure.windows import Windows
from moyu.methods.selection import select
from moyu.model import dissect
from moyu.plan import Plan
from tiny import build, tokens

HELD_OUT = Windows(tokens(12, 40, seed=5), 20)
SKIPPING = [n for n in methods.names() if methods.method_class(n).solves_target]


def kl(model, plan):
    return float(moyu.evaluate(model, plan, HELD_OUT, matched=False).method.kl.mean())


def skipped_columns(block, method, site, params):
    """(v - c) without what is kept, and the mask, on the rows that masks are decided for."""
    x = torch.from_numpy(block.taps[site.reads][block.met])
    x = x if params.centre is None else x - params.centre
    x = x if params.basis is None else x @ params.basis
    rows = block.acts.rows.take(torch.from_numpy(block.met))
    missing = torch.where(select(method.score(x, rows, site, params, {}), params.rule), 0, x)
    return missing if params.basis is None else missing @ params.basis.t()


@pytest.mark.parametrize(
    ("name", "reads"), [("teal", "mid"), ("wina", "attn_in"), ("larosa", "mlp_in"), ("r-sparse", "mid")]
)
def test_closed_form_bias_is_the_mean_error_of_the_outputs(name, reads):
    block, method = case(), methods.method(name)
    site = block.site(method, reads)
    params = method.fit(site, block.acts, 0.5)
    missing = skipped_columns(block, method, site, params).numpy()
    given = missing.mean(0) if params.basis is None else missing.mean(0) @ params.basis.numpy()
    got = compensation.correction(block.block, site, params, torch.from_numpy(given)).numpy()
    errors = []
    for linear in site.linears:
        error = missing @ block.weights[linear].T
        if params.low_rank is not None:
            error = error - missing @ params.low_rank[1].numpy().T @ params.low_rank[0].numpy().T
        errors.append(error)
    errors = np.concatenate(errors, axis=1)
    assert np.allclose(got, errors.mean(0))
    best = ((errors - got) ** 2).sum()
    assert best == pytest.approx((errors**2).sum() - len(errors) * (got**2).sum())  # E falls by ||b||^2
    assert best < ((errors - 1.1 * got) ** 2).sum()


@pytest.mark.slow
def test_bias_lowers_the_error_of_every_method():
    """In a plain GELU network, whose neurons have a mean to give back; and never by touching a dense row."""
    model = build("opt-gelu")
    ids, mask = padded(1)
    with torch.no_grad():
        dense = model(ids).logits
    ratios = []
    for name in SKIPPING:
        method = methods.method(name)
        if has_sites(model, method):
            bare = dataclasses.replace(method, bias=False) if "bias" in method.knobs() else method  # which has its own
            plain, biased = plan_for(model, bare, 0.6), plan_for(model, method, 0.6, bias=True)
            assert all(p.bias is not None for _, p in biased.parts.values()), name
            assert (one_pass(model, biased, ids, mask) - dense)[:, :PROMPT].abs().max() < 1e-10, name
            ratios.append(kl(model, biased) / kl(model, plain))
    assert len(ratios) > 15
    assert max(ratios) < 1 and np.mean(ratios) < 0.85


def test_bias_of_a_shared_mask_reaches_each_linear_in_masked_and_skipped_steps():
    for structure in ("llama", "phi3"):
        model = build(structure)
        plan = plan_for(model, methods.method("wina"), 0.6, bias=True)
        pieces = dissect.dissect(model).blocks[0].pieces
        for site, params in plan.parts.values():
            assert len(params.bias) == sum(len(pieces[n].weight) for n in site.linears)
        ids, mask = padded(2)
        difference = one_pass(model, plan, ids, mask) - stepwise(model, plan, ids, mask)
        assert difference[mask.bool()].abs().max() < 1e-10


# ----------------------------------------------------------------------------------------------------------- centring


def test_centre_is_the_one_with_the_least_held_out_error():
    """Channels with a large mean of their own: masks around it keep what varies."""
    block = case()
    shift = torch.linspace(-6, 6, 12, dtype=torch.float64)
    index = torch.arange(len(block.acts.rows.seq))
    taps = {**block.acts.sparse, "attn_in": torch.from_numpy(block.taps["attn_in"]) + shift}
    rows = block.acts.rows._replace(seq=index // 2 % 2, slots=2)  # two windows
    acts = dataclasses.replace(block.acts, dense=taps, sparse=taps, rows=rows)
    method = methods.method("teal")
    site = block.site(method, "attn_in")
    params = compensation.centred(method, site, acts, 0.5, bias=False)
    assert params.centre is not None
    assert torch.equal(params.centre, acts.met("attn_in")[rows.seq[block.met] == 0].median(0).values)
    plain = method.fit(site, acts, 0.5)
    errors = []
    for each in (params, plain):
        x = acts.met("attn_in") if each.centre is None else acts.met("attn_in") - each.centre
        missing = torch.where(x.abs() > each.rule.value, 0, x)
        errors.append(float((missing @ acts.weights["q"].t()).square().sum()))
    assert errors[0] < 0.5 * errors[1]


def test_nothing_to_centre_stays_uncentred():
    """Inputs that are symmetric around zero: 0 is among the candidates and wins, or costs next to nothing."""
    block = case()
    method = methods.method("teal")
    site = block.site(method, "attn_in")
    one_window = compensation.centred(method, site, block.acts, 0.5, bias=False)
    assert one_window.centre is None  # nothing is held out


@pytest.mark.parametrize("name", ["teal", "wina", "larosa", "chess"])
def test_centred_plans_hold_the_contract(name, tmp_path):
    model = build("opt-gelu" if name != "chess" else "llama")
    method = methods.method(name)
    plan = plan_for(model, method, centre=True)
    centred = [s for s, p in plan.parts.values() if p.centre is not None]
    assert centred and all(s.skips == "columns" for s in centred)
    ids, mask = padded(2)
    whole = one_pass(model, plan, ids, mask)
    assert (whole - stepwise(model, plan, ids, mask))[mask.bool()].abs().max() < 1e-10
    assert torch.equal(one_pass(model, Plan.load(plan.save(tmp_path)), ids, mask), whole)
    assert all(p.centre is None for _, p in plan_for(model, method, 0.0, centre=True).parts.values())


def test_centring_lowers_the_error_where_inputs_are_off_centre():
    """A plain GELU network: the inputs of down lean to one side."""
    model = build("opt-gelu")
    method = methods.method("cett")
    ratios = [
        kl(model, plan_for(model, method, p, centre=True)) / kl(model, plan_for(model, method, p)) for p in (0.5, 0.7)
    ]
    assert max(ratios) < 0.95


def test_centring_without_columns_is_refused():
    with pytest.raises(moyu.UserError, match="'cats' skips no whole columns here"):
        plan_for(build("llama"), methods.method("cats"), centre=True)


# ------------------------------------------------------------------------------------------------------ learned biases


@pytest.mark.parametrize(
    "name", ["teal", *(pytest.param(n, marks=pytest.mark.slow) for n in ("wina", "griffin", "larosa"))]
)
def test_learned_bias_beats_the_closed_form_on_the_text_it_learns_from(name):
    model = build("llama", torch.float32)
    windows = Windows(tokens(8, 40), 20)
    start = calibrate(model, methods.method(name), windows, sparsity=0.6, bias=True)
    learned = compensation.learn(model, start, windows, steps=60, rate=3e-3, batch=8)
    before, after = (float(moyu.evaluate(model, p, windows, matched=False).method.kl.mean()) for p in (start, learned))
    assert after < 0.97 * before
    changed = [not torch.equal(p.bias, start.parts[k][1].bias) for k, (_, p) in learned.parts.items()]
    assert all(changed)
    rules = [(p.rule, start.parts[k][1].rule) for k, (_, p) in learned.parts.items()]
    assert all(a == b for a, b in rules)  # masks are the same
    assert learned.calibration["learned_bias"] == {"steps": 60, "rate": 3e-3, "batch": 8}


@pytest.mark.slow
def test_learned_bias_helps_on_held_out_text():
    """On the embedded model, whose text has something to learn; a random model's has not."""
    from moyu.calibration.context import Context
    from moyu.calibration.settings import Settings

    settings = Settings(methods=("teal",), window=64, boundary=16, calibration=32, test=16, sparsity=0.6)
    context = Context.open("swiglu", settings)
    start = context.plan("teal")
    learned = compensation.learn(
        context.loaded.model, start, context.split.calibration, steps=16, rate=1e-3, anatomy=context.anatomy
    )
    before, after = (float(context.quality(p, matched=False).method.kl.mean()) for p in (start, learned))
    assert after < before


def test_learning_leaves_the_model_as_it_was():
    model = build("llama", torch.float32)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    plan = plan_for(model, methods.method("teal"))
    compensation.learn(model, plan, Windows(tokens(2, 20), 10), steps=2, batch=2)
    assert flags == [p.requires_grad for p in model.parameters()]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad(), Applied(model, None):
        pass  # nothing is still applied
