"""What every registered method is held to, and every knob that changes its way of working."""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3nTextConfig

import moyu
from equality import (
    LENGTH,
    PROMPT,
    QUICK,
    anatomy_of,
    applied_to,
    assert_same_masks,
    has_sites,
    one_pass,
    padded,
    plan_for,
    positions,
    stepwise,
)
from moyu import kernels, methods
from moyu.engine.applied import Applied
from moyu.engine.choosers import Counter, Recorder
from moyu.engine.executor import Executor
from moyu.measure import accounting
from moyu.measure.windows import Windows
from moyu.methods import knobs
from moyu.methods.magnitude import factors_of, remainder_of, rest_of
from moyu.methods.needs import needs
from moyu.methods.selection import Threshold, TopK
from moyu.methods.values import Rows
from moyu.model import dissect
from moyu.plan import Plan
from plan_mutations import taken
from tiny import build, tokens

VARIANTS = {
    "cett-tau": ("cett", {"tau": 0.3}),
    "tda-cett": ("tda", {"cett": 0.3}),
    "chess-weighted": ("chess", {"weighted": True}),
    "wina-threshold": ("wina", {"rule": "threshold"}),
    "was-l2": ("was", {"order": 2, "exponent": 0.5}),
    "was-fitted": ("was", {"exponent": None}),
    "r-sparse-skipped": ("r-sparse", {"path": "skipped", "share": 0.3}),
    "larosa-even": ("larosa", {"ratio": 1}),
    "prox-dense": ("prox", {"inputs": 0, "weighted": True}),
    "deja-vu-ahead": ("deja-vu", {"ahead": True, "weighted": True, "rank": 8}),
    "moefication-activations": ("moefication", {"groups": "activations", "block": 10}),
    "moefication-graph": ("moefication", {"groups": "graph", "block": 12}),
    "moefication-mlp": ("moefication", {"selector": "mlp", "block": 12}),
    "static-norm-weights": ("static-norm", {"data": False}),
    "estimate-8-bit": ("estimate", {"rest": 8, "weighted": False}),
    "estimate-3-bit": ("estimate", {"rest": 3}),
    "random-seed": ("random", {"seed": 5}),
    "random-popular-seed": ("random-popular", {"seed": 5}),
}
ALL = {name: (name, QUICK.get(name, {})) for name in methods.names()} | VARIANTS


def make(name):
    registered, knobs = ALL[name]
    return methods.method(registered, **knobs)


@functools.cache
def model_of(structure, dtype):
    """One model for all tests, which leave it as it is."""
    return build(structure, dtype)


def applicable(structure, name, dtype=torch.float64):
    model, method = model_of(structure, dtype), make(name)
    if not has_sites(model, method):
        pytest.skip("no site")
    return model, method


@functools.cache
def plan_of(structure, name, dtype=torch.float64):
    """One plan for all tests, which change nothing in it."""
    return plan_for(*applicable(structure, name, dtype))


BESIDE = {name: ("opt-gelu", "mixtral")[n % 2] for n, name in enumerate(VARIANTS)}  # what a variant has beside Llama


@pytest.mark.parametrize(
    ("name", "structure"),
    [
        pytest.param(n, s, marks=() if s in ("llama", BESIDE[n]) else pytest.mark.slow)
        for n in VARIANTS
        for s in ("llama", "opt-gelu", "mixtral")
    ],
)
def test_masked_pass_equals_skipped_steps(name, structure):
    """The variants; `test_equality` has every method as it is by default."""
    if (name, structure) == ("deja-vu-ahead", "mixtral"):
        structure = "opt-relu"  # routed experts see other rows than the layer that is looked at
    model, _ = applicable(structure, name)
    plan = plan_of(structure, name)
    ids, mask = padded(3)
    whole, steps = Recorder(), Recorder()
    expected = one_pass(model, plan, ids, mask, recorder=whole)
    actual = stepwise(model, plan, ids, mask, recorder=steps)
    assert_same_masks(whole, steps)
    assert (expected - actual)[mask.bool()].abs().max() < 1e-10


@pytest.mark.parametrize("name", ALL)
def test_sparsity_zero_is_dense_to_the_bit(name):
    """Masked, every product is the dense one: nothing of the method is left."""
    model, method = applicable("reglu", name, torch.float32)
    ids, mask = padded(2)
    plan = plan_for(model, method, sparsity=0.0)
    with torch.no_grad(), applied_to(model, None, engine="mask") as applied, applied.prompt(PROMPT):
        dense = model(ids, attention_mask=mask, position_ids=positions(mask), use_cache=False).logits
    assert torch.equal(one_pass(model, plan, ids, mask)[mask.bool()], dense[mask.bool()])
    assert all(p.bias is None and p.low_rank is None and p.basis is None for _, p in plan.parts.values())


@pytest.mark.parametrize("name", ALL)
def test_plans_round_trip_and_repeat(name, tmp_path):
    model, method = applicable("reglu", name)
    plan = plan_of("reglu", name)
    assert plan_for(build("reglu"), make(name)).hash == plan.hash
    loaded = Plan.load(plan.save(tmp_path))
    assert loaded.hash == plan.hash
    assert loaded.method == method
    assert [s for s, _ in loaded.parts.values()] == [s for s, _ in plan.parts.values()]
    ids, mask = padded(2)
    assert torch.equal(one_pass(model, loaded, ids, mask), one_pass(model, plan, ids, mask))
    loaded.check(model, anatomy_of(model))


MUTATED = ("teal", "was", "griffin", "cats", "deja-vu", "estimate")  # the others in `make slow`


@pytest.mark.parametrize("name", [n if n in MUTATED else pytest.param(n, marks=pytest.mark.slow) for n in ALL])
def test_tensors_of_other_shapes_and_numbers_are_refused(name):
    model, _ = applicable("reglu", name)
    assert taken(plan_of("reglu", name), anatomy_of(model)) == []


@pytest.mark.parametrize("name", ALL)
def test_batch_and_padding_change_nothing(name):
    model, _ = applicable("reglu", name)
    plan = plan_of("reglu", name)
    ids, mask = padded(3)
    together = one_pass(model, plan, ids, mask)
    for row in range(3):
        with torch.no_grad(), applied_to(model, plan, engine="mask") as applied, applied.prompt(PROMPT - row):
            alone = model(ids[row : row + 1, row:], use_cache=False).logits[0]
        assert (together[row, row:] - alone).abs().max() < 1e-10


@pytest.mark.parametrize("name", ALL)
def test_target_is_met_on_text_that_was_not_calibrated_on(name):
    model, method = applicable("llama", name)
    solves = method.solves_target and not any(method.knobs().get(k) for k in ("tau", "cett"))
    if not solves:
        pytest.skip("the target is not a sparsity")
    plan = plan_of("llama", name)
    counter = Counter(8, 40)
    with torch.no_grad(), applied_to(model, plan, engine="mask") as applied, applied.prompt(20):
        with applied.watched(chooser=counter):
            model(tokens(8, 40, seed=7), use_cache=False)
    # One threshold on prompts: with 6 calibration prompts of 20 tokens it is known to about this much.
    tolerance = 0.1 if method.granularity == "sequence" else 0.04
    tolerance += 0.5 / min(s.units for s, _ in plan.parts.values())  # counts are whole numbers of units
    assert counter.sparsity == pytest.approx(0.5, abs=tolerance)


def read_to_score(model, method, site, params):
    """Bytes that kernels read while one row is scored."""
    block = anatomy_of(model).blocks[site.layer]
    width = site.units if site.skips == "rows" else block.pieces[site.linears[0]].shape[1]
    x = torch.randn(1, width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), kernels.count_bytes() as counted:
        method.score(x, Rows.one_each(1, x.device), site, params, {})
    return counted.total


@pytest.mark.parametrize("name", ALL)
def test_kernels_read_what_the_formula_says(name):
    """Weights that the skipping kernels read in a step: all, less what is skipped."""
    model, method = applicable("reglu", name, torch.float32)
    plan = plan_of("reglu", name, torch.float32)
    if any(p.basis is not None for _, p in plan.parts.values()):
        pytest.skip("rotated products are dense: there is no kernel that skips them")
    total = accounting.dense_step_bytes(model, anatomy_of(model))
    norms = sum(p.numel() * 4 for n, p in model.named_parameters() if "norm" in n)
    with torch.no_grad(), applied_to(model, plan) as applied, applied.prompt(PROMPT):
        cache = model(tokens(1, PROMPT), use_cache=True).past_key_values
        counter, masks = Counter(1, LENGTH), {}

        def chooser(site, mask, rows, oracle):
            masks[site.key] = mask[0]
            return counter(site, mask, rows, oracle)

        with applied.watched(chooser=chooser), kernels.count_bytes() as counted:
            model(tokens(1, 1), past_key_values=cache)
    assert counter.skipped_bytes > 0
    proxy = sum(p.bias.numel() * 4 for _, p in plan.parts.values() if p.bias is not None)
    for site, params in plan.parts.values():
        rest, skipped = remainder_of(method, site, params), ~masks[site.key]
        if rest is not None and rest.stored is not None:  # a group of 32 columns has its scales read with any of them
            groups = {i // 32 for i in skipped.nonzero()[:, 0].tolist()}
            proxy += int(skipped.sum()) * rest.stored.column_bytes + len(groups) * rest.stored.scale_bytes
        if method.granularity == "token":
            own = read_to_score(model, method, site, params)
            factors = factors_of(method, site, params)
            declared = method.score_bytes(site, params) - (0 if factors is None else factors.nbytes)
            assert own in (0, declared)  # scores that run on kernels read there all that they declare, but for factors
            proxy += own
    # Nor is the embedding's row the kernels'.
    assert counted.total == total - counter.skipped_bytes - norms - 64 * 4 + proxy


@pytest.mark.parametrize("name", ALL)
def test_what_a_plan_needs_is_known_to_the_general_step(name):
    _, method = applicable("reglu", name)
    plan = plan_of("reglu", name)
    for site, params in plan.parts.values():
        asked = needs(method, site, params)
        assert asked <= Executor.CAN
        assert sum(f"{site.skips} by " in word for word in asked) == 1  # one way to decide
        masks = method.granularity != "token"
        assert (f"{site.skips} by masks" in asked) == masks
        assert ("top_k" in asked) == (isinstance(params.rule, TopK) and not masks)


def test_a_shared_mask_is_decided_and_counted_once():
    """WINA's q, k and v: one decision, the bytes of three."""
    model = build("llama", torch.float32)
    plan = plan_for(model, methods.method("wina"))
    seen = []
    with torch.no_grad(), applied_to(model, plan, engine="mask") as applied, applied.prompt(PROMPT):
        with applied.watched(chooser=lambda site, mask, rows, oracle: (seen.append(site), mask)[1]):
            model(tokens(1, LENGTH), use_cache=False)
    assert [s.linears for s in seen[:4]] == [("q", "k", "v"), ("o",), ("gate", "up"), ("down",)]
    assert len(seen) == 4 * 3
    pieces = dissect.dissect(model).blocks[0].pieces
    assert seen[0].units * seen[0].unit_bytes == sum(pieces[n].weight.nbytes for n in "qkv")


@pytest.mark.parametrize(
    ("name", "knobs"), [("wina", {"rule": "threshold"}), ("chess", {"weighted": True}), ("was", {})]
)
def test_native_steps_know_factors_and_shared_masks(name, knobs):
    from moyu.kernels import cpu

    if cpu.unavailable() is not None:
        pytest.skip("the CPU kernels are not built")
    model = build("llama", torch.float32)
    plan = plan_for(model, methods.method(name, **knobs))
    ids, mask = padded(1)
    with Applied(model, plan) as applied:
        assert applied.native is not None, applied.general_because
    expected, actual = (stepwise(model, plan, ids, mask, backend=b) for b in ("reference", "auto"))
    assert (expected - actual).abs().max() < 1e-4 * expected.abs().max()


# ---------------------------------------------------------------------------------------------------- what is special


def test_larosa_rotation_alone_is_exact():
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        model = build("llama", dtype)
        plan = plan_for(model, methods.method("larosa"))
        assert sum(p.basis is not None for _, p in plan.parts.values()) == 2 * 3
        whole = {k: (s, dataclasses.replace(p, rule=TopK(s.units))) for k, (s, p) in plan.parts.items()}
        ids, mask = padded(1)
        with torch.no_grad():
            dense = model(ids).logits
        rotated = one_pass(model, dataclasses.replace(plan, parts=whole), ids, mask)
        # In float64 even the last bits agree: the model's norms round to float32 and absorb 1e-15.
        assert dtype == torch.float64 or not torch.equal(rotated, dense)
        assert (rotated - dense).abs().max() <= tolerance * dense.abs().max()


def test_larosa_bytes_are_counted():
    model = build("llama", torch.float32)
    plan = plan_for(model, methods.method("larosa"))
    added = accounting.added_bytes(plan, dissect.dissect(model))
    assert added == 3 * 2 * 64 * 64 * 4  # layers, inputs, d x d float32


@pytest.mark.parametrize("path", ["weight", "skipped"])
def test_r_sparse_path_lowers_the_error(path):
    model = build("llama")
    plan = plan_for(model, methods.method("r-sparse", path=path, share=0.3), 0.6)
    bare = {k: (s, dataclasses.replace(p, low_rank=None)) for k, (s, p) in plan.parts.items()}
    held_out = Windows(tokens(8, 40, seed=5), 20)
    with_path, without = (
        float(moyu.evaluate(model, p, held_out, matched=False).method.kl.mean())
        for p in (plan, dataclasses.replace(plan, parts=bare))
    )
    assert with_path < without
    assert accounting.added_bytes(plan, dissect.dissect(model)) == sum(
        t.nbytes for _, p in plan.parts.values() for t in p.low_rank
    )


def test_exact_methods_skip_nothing_that_counts():
    for name in methods.names():
        if methods.method_class(name).exact:
            model, method = applicable("reglu", name)
            plan = plan_for(model, method)
            ids, mask = padded(1)
            with torch.no_grad():
                assert (one_pass(model, plan, ids, mask) - model(ids).logits).abs().max() < 1e-10


def test_the_statistical_top_k_of_gemma_3n_is_skipped_exactly():
    config = Gemma3nTextConfig(
        **{"vocab_size": 256, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "head_dim": 16},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_kv_shared_layers": 0, "laurel_rank": 8},
        **{"vocab_size_per_layer_input": 256, "hidden_size_per_layer_input": 16, "altup_num_inputs": 2},
        **{"activation_sparsity_pattern": [0.95, 0.95, 0.0], "layer_types": ["full_attention"] * 3},
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    plan = plan_for(model, methods.method("relu-zero"))
    assert [s.layer for s in plan.sites()] == [0, 1]
    ids, kept, masks, counter = tokens(1, LENGTH), {}, Recorder(), Counter(1, LENGTH)

    def chooser(site, mask, rows, oracle):
        counter(site, mask, rows, oracle)
        return masks(site, mask, rows, oracle)

    layers = model.model.layers
    for index in (0, 1):
        cut = layers[index].mlp._gaussian_topk
        layers[index].mlp._gaussian_topk = lambda g, i=index, cut=cut: (
            kept.setdefault(i, []).append(cut(g)) or kept[i][-1]
        )
    with torch.no_grad():
        dense = model(ids, use_cache=False).logits
        own = {index: seen[-1][0] > 0 for index, seen in kept.items()}
        with Applied(model, plan, engine="mask") as applied, applied.prompt(PROMPT), applied.watched(chooser=chooser):
            assert torch.equal(model(ids, use_cache=False).logits, dense)
    assert counter.sparsity == pytest.approx(0.95, abs=0.01)
    for site in plan.sites():
        for (_, position), mask in masks.masks[site.key].items():
            assert torch.equal(mask, own[site.layer][position])
    with torch.no_grad(), kernels.count_bytes() as read:
        stepped = stepwise(model, plan, ids, torch.ones_like(ids))
    assert (stepped - dense).abs().max() < 1e-5 * dense.abs().max()
    columns_of_down = 2 * 256 * 64 * 4 * (LENGTH - PROMPT)
    assert 0 < read.by_op["columns"] < 0.1 * columns_of_down


class _NormedUp(nn.Module):
    """relu(gate) * norm(up): what is 0 by the gate still moves the norm of the others."""

    def __init__(self, mlp):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x):
        up = self.up_proj(x)
        normed = up * torch.rsqrt(up.square().mean(-1, keepdim=True) + 1e-6)
        return self.down_proj(torch.relu(self.gate_proj(x)) * normed)


def test_a_cut_behind_a_norm_over_neurons_is_left_alone():
    model = build("llama", torch.float32)
    for layer in model.model.layers:
        layer.mlp = _NormedUp(layer.mlp)
    assert all(b.middle is not None and not b.cuts for b in dissect.dissect(model).blocks)
    assert not has_sites(model, methods.method("relu-zero"))


def test_what_skipped_columns_give_has_a_gradient():
    model = build("llama", torch.float32)
    plan = plan_for(model, methods.method("estimate"))
    site, params = next(iter(plan.parts.values()))
    x = torch.randn(3, site.units, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(3, site.units, generator=torch.Generator().manual_seed(1)) < 0.5
    free = x.clone().requires_grad_()
    given = rest_of(plan.method, free, mask, site, params)
    given.sum().backward()
    assert free.grad is not None and bool((free.grad != 0).eq(~mask).all())
    assert (given - rest_of(plan.method, x, mask, site, params)).abs().max() < 0.02 * given.abs().max()


def test_thresholds_of_methods_are_finite():
    for name in (n for n in methods.names() if not methods.method_class(n).quantised_only):
        for _, params in plan_of("reglu", name).parts.values():
            assert not isinstance(params.rule, Threshold) or math.isfinite(params.rule.value), name


def _wrong():
    """Every value that a knob must refuse: beyond each end of its range, and of another kind."""
    for name in methods.names():
        for field in dataclasses.fields(methods.method_class(name)):
            allowed = knobs.legal(field)
            for value in [] if allowed is None else allowed.wrong():
                yield name, {field.name: value}
            yield name, {field.name: 7 if isinstance(field.default, str) else "much"}


@pytest.mark.parametrize(("name", "wrong"), list(_wrong()))
def test_bad_knobs_are_refused_in_one_line(name, wrong):
    (knob,) = wrong
    with pytest.raises(moyu.UserError, match=f"method '{name}'.*{knob}") as error:
        methods.method(name, **wrong)
    assert "\n" not in str(error.value)


def test_every_knob_says_what_it_may_be():
    for name in methods.names():
        for field in dataclasses.fields(methods.method_class(name)):
            allowed = knobs.legal(field)
            if isinstance(field.default, bool):
                continue
            assert allowed is not None, f"{name}.{field.name} is declared without `knob(...)`"
            assert allowed.wrong() and allowed.allows(field.default), f"{name}.{field.name}"
            assert not any(allowed.allows(value) for value in allowed.wrong()), f"{name}.{field.name}"
