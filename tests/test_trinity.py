"""The scoreboard: cells at the bytes asked for, resumed and never measured twice, tables that say what the cells say."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch

import moyu
from moyu import methods, records
from moyu.calibration import speed, walk
from moyu.calibration.budget import Reader, plan_for_bytes, solve, ways
from moyu.calibration.context import Context
from moyu.calibration.settings import Settings
from moyu.measure.storage import Storage
from moyu.methods.estimate import Estimate, best_map
from moyu.reporting import scoreboard, write_scoreboard
from moyu.research import trinity


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("trinity")
    asked = trinity.Asked(
        models=("swiglu",),
        methods=("quantise", "cats", "griffin"),
        bytes=(0.75, 0.5),
        quick=True,
        speed=False,
    )
    return asked, out, trinity.run(asked, out)


def find(rows, method, **fields):
    return [r for r in rows if r.method == method and all(getattr(r, k) == v for k, v in fields.items())]


def test_cells_meet_their_bytes_and_floors_are_named(quick):
    _, _, rows = quick
    (griffin,) = find(rows, "griffin", weight_bits=16, target_byte_fraction=0.5)
    assert griffin.byte_fraction == pytest.approx(0.5, abs=0.01)
    assert griffin.kl_oracle < griffin.kl < griffin.kl_random
    assert griffin.kl_interval[0] < griffin.kl < griffin.kl_interval[1]
    assert len(griffin.by_document["kl"]) == griffin.documents
    assert math.fsum(griffin.by_document["kl"]) / griffin.documents == pytest.approx(griffin.kl, rel=1e-4)
    (cats,) = find(rows, "cats", weight_bits=16, target_byte_fraction=0.5)
    assert cats.status == "n/a (floor 0.64)" and cats.kl is None
    low = find(rows, "griffin", weight_bits=4.5)
    rounding = {r.weight_bits: r for r in find(rows, "quantise")}
    for cell, bits in zip(sorted(low, key=lambda c: -c.target_byte_fraction), (3.5, 2.5), strict=True):
        assert cell.byte_fraction_16 == pytest.approx(rounding[bits].byte_fraction_16, abs=0.01)
    kl = [rounding[b + 0.5].kl for b in (8, 6, 5, 4, 3, 2)]
    assert kl == sorted(kl) and kl[0] < 1e-3


@pytest.mark.slow
def test_finished_cells_are_kept_and_missing_ones_are_filled_in(quick, monkeypatch):
    asked, out, rows = quick
    measured = []
    measure = trinity.PlainBoard.measure
    monkeypatch.setattr(trinity.PlainBoard, "measure", lambda self, *a: measured.append(a[0]) or measure(self, *a))
    assert trinity.run(asked, out) == rows
    assert measured == []
    next(out.glob("cells/quick/swiglu/cats.16bit.bytes0.750.jsonl")).unlink()
    again = trinity.run(asked, out)
    assert measured == ["cats"]
    assert [(r.method, r.kl) for r in again] == [(r.method, r.kl) for r in rows]
    other = dataclasses.replace(asked, methods=("cats",), bytes=(0.75,), seed=1)
    assert all(r.seed == 1 for r in trinity.run(other, out))


def test_tables_and_report(quick, tmp_path):
    _, _, rows = quick
    text = scoreboard.markdown(rows)
    assert "n/a (floor 0.64)" in text and "| (MOYU's own rounding) |" in text
    write_scoreboard(rows, tmp_path)
    assert records.read(tmp_path / "records.jsonl") == rows
    page = (tmp_path / "report.html").read_text()
    assert "Scoreboard" in page and "swiglu, weights of 4.5 bits, at equal bytes" in page
    assert (tmp_path / "trinity.svg").read_text().startswith("<svg")
    best = scoreboard.front([r for r in rows if r.kl is not None])
    assert all(a.kl > b.kl and a.byte_fraction_16 < b.byte_fraction_16 for a, b in itertools.pairwise(best))
    (griffin,) = find(rows, "griffin", weight_bits=16, target_byte_fraction=0.75)
    assert 0 < scoreboard.place(griffin) < 1


@pytest.mark.parametrize(
    ("wrong", "says"),
    [({"bytes": (1.5,)}, "in \\(0, 1\\)"), ({"methods": ("cat",)}, "did you mean"), ({"documents": 1}, "no interval")],
)
def test_what_cannot_be_run_is_refused(wrong, says, tmp_path):
    with pytest.raises(moyu.UserError, match=says):
        trinity.run(trinity.Asked(**wrong), tmp_path)


@pytest.mark.parametrize("name", ["estimate", *(pytest.param(n, marks=pytest.mark.slow) for n in ("prox", "r-sparse"))])
def test_what_a_plan_adds_is_counted_in(name):
    context = Context.open("swiglu", Settings(window=96, boundary=48, test=4, calibration=4))
    reader = Reader(context.loaded.model, context.anatomy, Storage())
    method, windows = methods.method(name), context.split.calibration
    sparsity = solve(reader, method, windows, 0.7)
    plan = walk.calibrate(reader.model, method, windows, sparsity=sparsity, anatomy=reader.anatomy)
    read = reader.dense() + reader.added(plan) - sparsity * reader.skippable(method)
    assert reader.added(plan) > 0.01 * reader.dense()
    assert read / reader.dense() == pytest.approx(0.7, abs=2e-3)


@pytest.mark.slow
def test_settings_are_chosen_and_the_estimate_beats_what_skips_whole(tmp_path):
    context = Context.open("swiglu", Settings(window=96, boundary=48, test=8, calibration=4))
    reader = Reader(context.loaded.model, context.anatomy, Storage())
    found = {n: ways(reader, methods.method(n), context.split.calibration) for n in ("estimate", "teal")}
    plans = {n: plan_for_bytes(own, context.split, 0.6) for n, own in found.items()}
    kl = {n: float(context.quality(p, matched=False).method.kl.mean()) for n, p in plans.items()}
    assert plans["estimate"].method in Estimate().settings_for(16)
    assert kl["estimate"] < 0.2 * kl["teal"]


def test_factors_are_the_best_of_their_rank():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 24, generator=generator) * torch.linspace(3, 0.1, 24)
    weight = torch.randn(40, 24, generator=generator)
    outer, inner = best_map(weight, x, 6)
    assert outer.shape == (40, 6) and inner.shape == (6, 24)
    found = float((x @ (weight - outer @ inner).t()).square().sum())
    ideal = float(torch.linalg.svdvals((x @ weight.t()).double())[6:].square().sum())
    assert found == pytest.approx(ideal, rel=0.02)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    plain = float((x @ (weight - (u[:, :6] * s[:6]) @ v[:6]).t()).square().sum())
    assert found < 0.7 * plain


@pytest.mark.parametrize("way", ["copy", "channels"])
def test_what_is_skipped_still_gives_its_few_bits(way):
    """With eight bits for the rest, hardly anything is lost, however much is skipped."""
    context = Context.open("relu", Settings(window=96, boundary=48, test=4, calibration=4))
    kl = {}
    for rest in (0, 8):
        method = Estimate(way, 8, rest=rest)
        plan = walk.calibrate(context.loaded.model, method, context.split.calibration, sparsity=0.9)
        kl[rest] = float(context.quality(plan, matched=False).method.kl.mean())
    assert kl[8] < 1e-3 < 0.1 < kl[0]


def test_published_tables_are_those_of_the_records():
    root = Path(__file__).parent.parent
    rows = records.read(root / "docs" / "results" / "trinity.jsonl")
    assert scoreboard.markdown(rows) in (root / "docs" / "scoreboard.md").read_text(), (
        "run `python -m moyu.research.pages`"
    )


def test_speed_is_timed_once_with_all_methods_in_one_run(quick, monkeypatch):
    asked, out, rows = quick
    found = trinity.timed(asked, out, rows)
    assert [r.method for r in found] == ["dense", "cats", "griffin"]
    assert len({r.read_ceiling_gb_s for r in found}) == 1
    monkeypatch.setattr(trinity.timing, "bench_shape", None)
    assert trinity.timed(asked, out, rows) == found


def test_timing_finds_the_plans_that_took_training(tmp_path, monkeypatch):
    def timed():
        return speed.bench_shape("tiny", {"deja-vu": 0.5, "cats": 0.5}, keep=tmp_path, layers=1, rounds=1)

    first = timed()
    assert [p.name.rpartition("-")[0] for p in tmp_path.iterdir()] == ["deja-vu"]
    trained = []
    calibrate = walk.calibrate
    monkeypatch.setattr(
        speed, "calibrate", lambda m, how, *a, **k: (trained.append(how.name), calibrate(m, how, *a, **k))[1]
    )
    assert [r.plan for r in timed()] == [r.plan for r in first]
    assert trained == ["cats"]
