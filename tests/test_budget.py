"""From bytes to a plan: alike layers stand for each other, a plan's matrices are kept and counted as the weights are."""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from moyu import methods
from moyu.calibration import budget
from moyu.calibration.budget import SLACK, Divided, Reader, Way, kinds, plan_for_bytes, solve, ways
from moyu.calibration.context import Context
from moyu.calibration.settings import Settings
from moyu.calibration.trials import separable
from moyu.calibration.walk import calibrate
from moyu.errors import OutOfReach
from moyu.measure.accounting import added_bytes
from moyu.measure.storage import Storage, stored_bits
from moyu.measure.text import Split
from moyu.measure.windows import Windows
from moyu.model import loading
from moyu.model.dissect import dissect
from moyu.weights.few_bits import GROUP
from tiny import build, tokens

SHORT = Settings(window=96, boundary=48, test=4, calibration=4)


def windows(rows: int = 4, seed: int = 1) -> Windows:
    return Windows(tokens(rows, 40, seed=seed), 20)


@pytest.mark.parametrize(
    ("name", "model", "alike"),
    [("teal", "llama", {0: 3}), ("polar", "opt-relu", {1: 2}), ("deja-vu", "gpt2", {0: 3})],
)
def test_alike_layers_are_one_kind(name, model, alike):
    assert kinds(dissect(build(model, torch.float32)), methods.method(name)) == alike


def test_a_layer_of_another_size_is_a_kind_of_its_own():
    model = build("llama", torch.float32)
    wide = copy.deepcopy(model.config)
    wide.intermediate_size = 128
    model.model.layers[1].mlp = LlamaMLP(wide)
    assert kinds(dissect(model), methods.method("teal")) == {0: 2, 1: 1}


@pytest.mark.parametrize("name", ["r-sparse", "larosa", "deja-vu"])
def test_one_layer_of_a_kind_says_what_all_of_them_do(name, monkeypatch):
    model = build("llama", torch.float32)
    reader = Reader(model, dissect(model), Storage(4))
    method = methods.method(name, **({"rank": 8} if name == "deja-vu" else {}))
    by_kind = solve(reader, method, windows(), 0.9)
    monkeypatch.setattr(budget, "kinds", lambda anatomy, method: {layer: 1 for layer in range(len(anatomy.layers))})
    assert solve(reader, method, windows(), 0.9) == pytest.approx(by_kind, abs=1e-9)
    assert 0 < by_kind < 1


@pytest.mark.parametrize(
    ("name", "knobs"), [("deja-vu", {"rank": 8}), ("moefication", {}), ("r-sparse", {}), ("larosa", {})]
)
def test_matrices_of_a_plan_are_kept_and_counted_in_the_bits_of_the_weights(name, knobs):
    model = build("llama", torch.float32)
    anatomy, method = dissect(model), methods.method(name, **knobs)
    plan = calibrate(model, method, windows(), sparsity=0.5, anatomy=anatomy)
    sixteen, four = Reader(model, anatomy, Storage()), Reader(model, anatomy, Storage(4))
    assert sixteen.kept(plan) is plan
    short = four.kept(plan)
    saved, count = 0.0, 0
    for key, (_, params) in plan.parts.items():
        kept = short.parts[key][1]
        pairs = [(params.buffers[n], kept.buffers[n]) for n in method.matrices if n in params.buffers]
        pairs += [] if params.basis is None else [(params.basis, kept.basis)]
        pairs += list(zip(params.low_rank or (), kept.low_rank or (), strict=True))
        count += len(pairs)
        for matrix, found in pairs:
            assert found.shape == matrix.shape and not torch.equal(found, matrix)
            assert float((found - matrix).norm()) < 0.01 * float(matrix.norm())  # 8 bits
            rest = -max(matrix.shape) % GROUP  # the last group of a row has its scale too
            padded = min(matrix.shape) * (max(matrix.shape) + rest)
            saved += (16 - stored_bits(8)) / 8 * matrix.numel() - (padded - matrix.numel()) * 0.5 / 8
            assert rest == 0 or padded > matrix.numel()
        for field in ("rule", "centre", "bias"):
            assert getattr(kept, field) is getattr(params, field)
    assert count
    assert sixteen.added(plan) - four.added(short) == pytest.approx(saved, rel=0.02)
    assert sixteen.added(plan) <= added_bytes(plan, anatomy)  # the model's own are of 32 bits


def test_bytes_are_out_of_reach_where_there_is_nothing_to_skip():
    model = build("llama", torch.float32)
    with pytest.raises(OutOfReach, match=r"floor 1\.00"):
        solve(Reader(model, dissect(model)), methods.method("relu-zero"), windows(), 0.9)


def test_what_is_planned_reads_what_was_asked_for():
    settings = dataclasses.replace(SHORT, bytes=0.6)
    context = Context.open("relu", settings)
    plan = context.plan("teal")
    probe = dataclasses.replace(context.split, test=context.split.calibration)
    read = dataclasses.replace(context, split=probe).quality(plan, matched=False).byte_fraction
    assert read == pytest.approx(0.6, abs=SLACK)


@pytest.mark.parametrize(
    ("read", "best"),
    [
        (
            lambda s: 0.673 if s > 0.8 else 0.626,
            0.626,
        ),  # both within the bytes: the one that skips less, not the nearer
        (lambda s: 0.696 if s < 0.9 else 0.66, 0.66),  # what reads more is none where one within the bytes was found
        (lambda s: 0.8 - 0.01 * s, 0.79),  # all read more: the nearest
    ],
)
def test_plans_within_the_bytes_skip_as_little_as_they_can(monkeypatch, read, best):
    monkeypatch.setattr(budget, "solve", lambda *a, **k: 0.85)
    monkeypatch.setattr(budget, "calibrate", lambda *a, sparsity, **k: sparsity)
    monkeypatch.setattr(budget, "read_fraction", lambda model, plan, *a: read(plan))
    same = {"kept": lambda p: p, "byte_fraction": lambda fraction, plan: fraction}
    reader = SimpleNamespace(model=None, anatomy=None, skippable=lambda m: 1.0, dense=lambda: 1.0, **same)
    plan = budget._solved(Way(reader, methods.method("teal"), {}), windows(), 0.69)
    assert read(plan) == pytest.approx(best, abs=1e-4)


def test_the_rank_of_a_router_is_chosen_where_none_is_named(monkeypatch):
    """By held-out text, at equal bytes: what a smaller router saves buys neurons."""
    default = methods.method("deja-vu")
    ranks = [m.rank for m in default.settings_for(16)]
    assert ranks == [default.rank // by for by in (1, 2, 4, 8)]
    tried = []
    fit = budget._solved
    monkeypatch.setattr(budget, "_solved", lambda way, *a: tried.append(way.method.rank) or fit(way, *a))
    model = build("opt-relu", torch.float32)
    reader, split = Reader(model, dissect(model), Storage()), Split(windows(), windows(seed=2), windows(seed=3))
    chosen = plan_for_bytes(ways(reader, default, windows()), split, 0.95)
    assert tried == ranks  # the plan that was judged is the one that is returned
    assert chosen.method.rank in ranks
    tried.clear()
    own = ways(reader, methods.method("deja-vu", rank=4), windows())
    assert plan_for_bytes(own, split, 0.95).method.rank == 4 and tried == [4]


@pytest.mark.parametrize(("weights", "bits", "rests"), [(None, 16, {0, 4, 8}), ("q8_0", 8, {0, 4}), ("q4_0", 4, {0})])
def test_settings_of_weights_in_blocks_are_of_fewer_bits_and_have_kernels(weights, bits, rests):
    model = build("llama", torch.float32)
    if weights:
        loading.quantise_model(model, weights)
    reader = Reader(model, dissect(model))
    assert (reader.bits, reader.planes) == (bits, False)
    settings = methods.method("estimate").settings_for(reader.bits, reader.planes)
    assert {m.knobs()["rest"] for m in settings} == rests
    assert all(m.in_blocks or not m.rest for m in settings)
    assert Reader(model, reader.anatomy, Storage(4)).planes


@pytest.mark.slow
def test_a_budget_is_divided_over_settings_and_sites():
    """As many bytes as one setting and level everywhere, at a smaller loss, foreseen; each fraction from one measurement."""
    context = Context.open("swiglu", SHORT)
    split, method = context.split, methods.method("estimate")
    reader = Reader(context.loaded.model, context.anatomy, Storage())
    (divided,) = ways(reader, method, split.calibration)
    even = [Way(reader, own, {}) for own in method.settings_for(16)]
    plans = [plan_for_bytes(own, split, 0.6) for own in ([divided], even)]
    curves = divided.curves
    graded = [context.quality(plan, matched=False) for plan in plans]
    for plan, quality in zip(plans, graded, strict=True):
        assert reader.byte_fraction(quality.byte_fraction, plan) == pytest.approx(0.6, abs=0.01)
    found, uniform = (float(q.method.kl.mean()) for q in graded)
    assert found < 0.5 * uniform
    about = plans[0].calibration["allocation"]
    assert about["summed_kl"] == pytest.approx(found, rel=0.35)
    assert plans[0].site_knobs and len(set(about["levels"].values())) > 2 and not plans[1].settings
    assert plan_for_bytes([divided], split, 0.75).target_sparsity < plans[0].target_sparsity
    assert divided.curves is curves
    with pytest.raises(OutOfReach, match="floor"):
        plan_for_bytes([divided], split, 0.05)


def test_named_knobs_are_kept_and_layers_that_cannot_run_alone_are_not_divided(monkeypatch):
    model = build("llama", torch.float32)
    reader, named = Reader(model, dissect(model)), methods.method("estimate", rest=8)
    (own,) = ways(reader, named, windows())
    assert isinstance(own, Divided) and own.choices == [named]
    assert not isinstance(ways(reader, methods.method("teal"), windows())[0], Divided)
    planes = ways(Reader(model, dissect(model), Storage(4)), methods.method("estimate"), windows())
    assert [len(way.choices) for way in planes] == [6, 1]  # channels, and neurons by a copy
    monkeypatch.setattr(budget, "separable", lambda *a: False)
    assert [type(way) for way in ways(reader, methods.method("estimate"), windows())] == [Way] * 3


def test_layers_of_a_chain_are_separable():
    model = build("llama", torch.float32)
    assert separable(model, windows(), dissect(model))
    model.model.layers[1].register_forward_hook(lambda m, a, o: o + 0)  # the next one takes what another gave
    model.model.layers[2].register_forward_pre_hook(lambda m, a: (a[0] + 1, *a[1:]))
    assert not separable(model, windows(), dissect(model))


def test_units_of_less_than_a_line_save_nothing():
    """Blocks of 4 bits at width 64: a column is 36 bytes."""
    model = build("llama", torch.float32)
    loading.quantise_model(model, "q4_0")
    reader = Reader(model, dissect(model))
    with pytest.raises(OutOfReach, match=r"floor 1\.00"):
        plan_for_bytes(
            ways(reader, methods.method("estimate"), windows()), Split(windows(), windows(), windows()), 0.85
        )


def test_what_a_plan_adds_at_routed_experts_is_read_of_the_routed_ones():
    model = build("mixtral", torch.float32)
    anatomy = dissect(model)
    plan = calibrate(model, methods.method("estimate"), windows(), sparsity=0.5, anatomy=anatomy)
    sizes = {s.key: p.extra_bytes() + plan.method.score_bytes(s, p) for s, p in plan.parts.values()}
    routed = sum(sizes[s.key] for s in plan.sites() if s.expert is not None)
    assert routed > 0.3 * sum(sizes.values())
    assert added_bytes(plan, anatomy) == sum(sizes.values()) - routed / 2  # two experts of four
    assert Reader(model, anatomy).added(plan) == added_bytes(plan, anatomy)
