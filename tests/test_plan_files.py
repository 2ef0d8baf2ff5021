"""Plans on disk: old ones load and keep the hash that records name them by, and every part of a site follows from its field."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from moyu.methods.selection import Threshold, TopK
from moyu.methods.values import SiteParams
from moyu.plan import Plan

PLANS = Path(__file__).parent / "plans"  # written before `SiteParams` said by itself how it is stored


@pytest.mark.parametrize(("name", "known"), [("format-1", "501a10df95c0"), ("format-2", "592ec2cc3cf1")])
def test_old_files_load_with_the_hash_they_had(name, known, tmp_path):
    plan = Plan.load(PLANS / name)
    assert plan.hash == known
    assert (plan.save(tmp_path) / "plan.safetensors").read_bytes() == (PLANS / name / "plan.safetensors").read_bytes()
    assert (tmp_path / "plan.json").read_text() == (PLANS / name / "plan.json").read_text()


def test_every_part_of_a_site_is_where_it_belongs():
    (q, larosa), (down, r_sparse), (experts, moefication) = Plan.load(PLANS / "format-1").parts.values()
    assert larosa.rule == TopK(3) and larosa.bias.dtype == torch.bfloat16
    assert torch.allclose(larosa.basis @ larosa.basis.t(), torch.eye(6), atol=1e-6)
    assert larosa.needs() == {"basis", "centre", "bias", "top_k"}
    assert r_sparse.rule == Threshold(0.25) and [tuple(t.shape) for t in r_sparse.low_rank] == [(5, 2), (2, 8)]
    assert r_sparse.needs() == {"low_rank"} and list(r_sparse.buffers) == ["norms"]
    assert moefication.rule == Threshold(-math.inf) and moefication.blocks.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert moefication.needs() == {"units"} and (experts.expert, experts.reads_layer) == (2, 0)
    assert (
        larosa.extra_bytes() == (36 + 6) * 4 + 5 * 2
    )  # the units of neurons and the method's buffers are not among them
    assert r_sparse.extra_bytes() == (10 + 16) * 4 and moefication.extra_bytes() == 0
    assert (q.units, down.units) == (6, 8)


def test_knobs_of_sites_come_back():
    plan = Plan.load(PLANS / "format-2")
    assert [plan.method_of(site).knobs()["rest"] for site in plan.sites()] == [8, 0]


def test_parts_are_mapped_and_matrices_named():
    params = SiteParams(
        TopK(1),
        blocks=torch.arange(4),
        low_rank=(torch.ones(3, 1), torch.ones(1, 4)),
        buffers={"inner": torch.ones(2, 4), "bias": torch.ones(2)},
    )
    halves = params.mapped(lambda name, t: t / 2 if t.is_floating_point() else t)
    assert all(torch.equal(t * 2, params.low_rank[n]) for n, t in enumerate(halves.low_rank))
    assert torch.equal(halves.blocks, params.blocks) and float(halves.buffers["bias"][0]) == 0.5
    assert set(params.matrices(["inner"])) == {"outer", "inner", "buffer.inner"}
    assert params.mapped(lambda _, tensor: tensor).tensors().keys() == params.tensors().keys()


def test_what_a_mask_takes_away_by_hand():
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(4, 4, generator=generator))[0]
    v, weight, centre = (torch.randn(*s, generator=generator) for s in ((3, 4), (2, 4), (4,)))
    outer, inner = torch.randn(2, 1, generator=generator), torch.randn(1, 4, generator=generator)
    params = SiteParams(TopK(2), basis=basis, centre=centre, low_rank=(outer, inner))
    turned = params.turned(v)
    assert torch.allclose(turned, (v - centre) @ basis)
    assert torch.allclose(params.turned_back(turned), v - centre, atol=1e-6)
    assert torch.allclose(params.lost(weight, v), v @ weight.t() - v @ inner.t() @ outer.t(), atol=1e-6)
