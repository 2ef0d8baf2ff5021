"""Training and grading of routers: known answers, planted ones, and the command that does both."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import moyu
from equality import plan_for
from moyu import methods
from moyu.calibration import fitting
from moyu.calibration.settings import Settings
from moyu.commands import cli
from moyu.measure.foresight import foresight
from moyu.measure.windows import Windows
from moyu.methods import routers
from moyu.plan import Plan
from tiny import build, tokens


def test_grade_by_hand():
    mass = torch.tensor([[4.0, 3.0, 2.0, 1.0], [0.0, 1.0, 0.0, 3.0]])
    scores = torch.tensor([[9.0, 1.0, 5.0, 3.0], [0.0, 2.0, 1.0, 3.0]])
    # Wanted {0, 1} and {1, 3}; found {0, 2} and {1, 3}. Pairs in order: 2 of 4 (0 before 2, 3) and 4 of 4.
    own = routers.grade(scores, mass, 2)
    assert own.recall == pytest.approx(3 / 4)
    assert own.auroc == pytest.approx((2 / 4 + 4 / 4) / 2)
    assert own.captured == pytest.approx((6 + 4) / 14)
    assert own.ideal == pytest.approx((7 + 4) / 14)


def test_grade_at_the_ends_and_by_chance():
    mass = torch.rand(400, 30)
    best, worst, chance = (routers.grade(s, mass, 10) for s in (mass, -mass, torch.rand(400, 30)))
    assert (best.recall, best.auroc) == (1, 1) and best.captured == best.ideal
    assert (worst.recall, worst.auroc) == (0, 0)
    assert chance.recall == pytest.approx(1 / 3, abs=0.03) and chance.auroc == pytest.approx(0.5, abs=0.03)
    assert chance.captured == pytest.approx(1 / 3, abs=0.03)


def test_training_finds_a_planted_router_and_repeats():
    truth, x = torch.randn(40, 3) @ torch.randn(3, 16), torch.randn(3000, 16)
    signal = x @ truth.t()  # (N, 40), of rank 3
    labels = signal > 0

    def trained():
        torch.manual_seed(1)
        router = nn.Sequential(nn.Linear(16, 3, bias=False), nn.Linear(3, 40, bias=False))
        return routers.train(router, x[:2000], labels[:2000], torch.ones(2000, 40))

    router, again = trained(), trained()
    assert all(
        torch.equal(a, b) for a, b in zip(router.state_dict().values(), again.state_dict().values(), strict=True)
    )
    assert not any(p.requires_grad for p in router.parameters())
    right = (router(x[2000:]) > 0) == labels[2000:]
    assert right.float().mean() > 0.95


def test_weights_say_what_counts():
    """Labels that contradict each other: the heavier ones win."""
    x = torch.randn(500, 4)
    double, labels = x.repeat(2, 1), torch.cat([x[:, :1] > 0, x[:, :1] < 0])
    for heavy in (0, 1):
        weights = torch.ones(1000, 1)
        weights[heavy * 500 : (heavy + 1) * 500] = 5
        router = routers.train(nn.Linear(4, 1, bias=False), double, labels, weights)
        assert ((router(x) > 0) == labels[heavy * 500 : (heavy + 1) * 500]).float().mean() > 0.85


def test_foresight_ranks_methods_as_it_must():
    """A 4-bit copy on the whole input, or a router that learned a ReLU's signs, sees nearly everything; chance nothing."""
    model = build("opt-relu", torch.float32)
    windows = Windows(tokens(24, 40), 8)
    held_out = Windows(tokens(8, 40, seed=9), 8)
    found = {}
    for name, knobs in (("prox", {"inputs": 0, "weighted": True}), ("deja-vu", {}), ("random", {})):
        plan = moyu.calibrate(model, methods.method(name, **knobs), windows, sparsity=0.5)
        grades = foresight(model, plan, held_out, batch=3)
        assert list(grades) == [0, 1, 2]
        found[name] = np.mean([g.recall for g in grades.values()])
        assert all(g.captured <= g.ideal + 1e-6 for g in grades.values())
    assert min(found["prox"], found["deja-vu"]) > 0.85
    assert 0.4 < found["random"] < 0.6


def test_foresight_of_blocks_and_experts():
    for structure in ("llama", "mixtral"):
        model = build(structure, torch.float32)
        plan = plan_for(model, methods.method("moefication", block=12))
        grades = foresight(model, plan, Windows(tokens(4, 40, seed=9), 20))
        assert len(grades) == 3 and all(0 <= g.recall <= 1 for g in grades.values())


@pytest.mark.parametrize("name", ["cats", "griffin", "popularity"])
def test_foresight_of_what_foresees_nothing_is_refused(name):
    model = build("llama")
    with pytest.raises(moyu.UserError, match="predicts no neurons"):
        foresight(model, plan_for(model, methods.method(name)), Windows(tokens(2, 40), 20))


def test_fit_command_trains_saves_and_grades(tmp_path):
    small = ["--window", "48", "--prompt-tokens", "8", "--windows", "6", "--out", str(tmp_path), "--json"]
    shifted = tmp_path / "shifted.txt"
    shifted.write_text("The quick brown fox jumps over the lazy dog. " * 400)
    done = CliRunner().invoke(cli.app, ["fit", "deja-vu", "relu", *small, "--shifted", str(shifted)])
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(r["text"], r["layer"]) for r in rows] == [(t, i) for t in ("held-out", "shifted") for i in range(6)]
    assert np.mean([r["recall"] for r in rows if r["text"] == "held-out"]) > 0.7  # chance is 0.5
    assert Plan.load(tmp_path / "deja-vu").method == methods.method("deja-vu")


def test_fit_refuses_methods_without_a_router(tmp_path):
    with pytest.raises(moyu.UserError, match="'teal' trains no router"):
        fitting.fit("relu", Settings(methods=("teal",)), None, tmp_path)
