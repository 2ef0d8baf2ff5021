"""Scores of routers and of CLADA beside numpy, on small arrays."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from small_block import case

from moyu import methods
from moyu.methods.heads import head_norms
from moyu.methods.values import Rows

HEADS = 4


def block_of(act="silu", gated=True):
    own = case(act, gated)
    block = dataclasses.replace(own.block, layer=1, heads=HEADS, kv_heads=HEADS // 2)
    return dataclasses.replace(own, block=block)


def added(own, units):
    """||W_o,h head_h||, a head at a time."""
    x, o = own.taps["heads"][own.met], own.weights["o"]
    width = x.shape[1] // units
    parts = [slice(h * width, (h + 1) * width) for h in range(units)]
    return np.stack([np.linalg.norm(x[:, p] @ o[:, p].T, axis=1) for p in parts], axis=1)


def test_what_a_head_adds():
    own = block_of()
    found = head_norms(torch.from_numpy(own.taps["heads"][own.met]), torch.from_numpy(own.weights["o"]), HEADS)
    assert found.numpy() == pytest.approx(added(own, HEADS), rel=1e-4)


@pytest.mark.parametrize(("name", "units"), [("deja-vu-heads", HEADS), ("polar", HEADS // 2)])
def test_head_routers(name, units):
    own, method = block_of(), methods.method(name)
    site = own.site(method, "attn_in")
    assert site.units == units and site.skips == "heads"
    labels, weights = method.lessons(site, own.acts, 0.5)
    masses = added(own, units)
    cut = np.sort(masses, axis=1)[:, units - units // 2][:, None]
    assert (labels.numpy() == (masses >= cut)).all() and bool((weights == 1).all())
    params = method.fit(site, own.acts, 0.5)
    x = own.taps["attn_in"]
    for matrix in [params.buffers[n].double().numpy() for n in ("inner.weight", "outer.weight") if n in params.buffers]:
        x = x @ matrix.T
    assert own.scores(method, site, params) == pytest.approx(x, rel=1e-9)
    assert (own.mask(method, site, params).sum(1) == units // 2).all()


def test_polar_leaves_the_first_layer_and_gated_networks_dense():
    method = methods.method("polar")
    plain = block_of("relu", gated=False)
    assert [s.skips for s in method.sites(plain.block)] == ["heads", "neurons"]
    assert [s.skips for s in method.sites(block_of("relu").block)] == ["heads"]
    assert method.sites(dataclasses.replace(plain.block, layer=0)) == ()
    labels, _ = method.lessons(plain.site(method, "mlp_in"), plain.acts, 0.5)
    assert (labels.numpy() == (plain.taps["mid"][plain.met] > 0)).all()


def test_lte_scores_are_gates_of_its_blocks():
    own, method = block_of(), methods.method("lte", block=4)
    site = own.site(method, "mlp_in")
    params = method.fit(site, own.acts, 0.5)
    weight, bias = (params.buffers[n].double().numpy() for n in ("weight", "bias"))
    gates = 1 / (1 + np.exp(-(own.taps["mlp_in"] @ weight.T + bias)))
    assert own.scores(method, site, params) == pytest.approx(gates, rel=1e-9)
    sizes = np.bincount(params.blocks.numpy(), minlength=site.units)
    assert len(sizes) == site.units and sizes.max() - sizes.min() <= 1


def test_clada_scores_are_means_of_the_prompts_magnitudes():
    own, method = block_of(), methods.method("clada")
    site = own.site(method, "mid")
    params = method.fit(site, own.acts, 0.5)
    mid, rows = own.acts.dense["mid"], own.acts.rows
    half = len(mid) // 2
    memory = {}
    for part in (torch.arange(half), torch.arange(half, len(mid))):  # in two chunks, as a long prompt may come
        memory = method.update(memory, mid[part], rows.take(part), site, params)
    found = method.score(torch.empty(0), Rows.one_each(1, mid.device), site, params, memory)
    dense = np.setdiff1d(np.arange(len(mid)), own.met)
    assert found.numpy()[0] == pytest.approx(np.abs(own.taps["mid"][dense]).mean(0), rel=1e-5)
