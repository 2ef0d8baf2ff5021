"""CLADA's trigger by hand, and its refreshes while generating."""

from __future__ import annotations

import math

import pytest
import torch

import moyu
from equality import plan_for
from moyu import methods
from moyu.engine.applied import Applied
from moyu.methods.clada import OnSurprise, surprise, turn
from moyu.methods.control import Keep, Refresh, Step
from tiny import build, tokens


def test_surprise_by_hand():
    probabilities = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.25, 0.25, 0.25, 0.25]])
    surprisal, entropy = surprise(probabilities.log(), torch.tensor([1, 3]))
    assert surprisal.tolist() == pytest.approx([2 / 2, 2 / 2])  # bits over log2 4
    assert entropy.tolist() == pytest.approx([1.5 / 2, 1.0])


@pytest.mark.parametrize(
    ("now", "fires"), [((0.9, 0.9), True), ((0.9, 0.1), False), ((0.1, 0.9), False), ((0.63, 0.63), False)]
)
def test_both_must_exceed_their_quantile(now, fires):
    past = torch.arange(10).float().div(10).repeat(2, 1)  # quantile 0.7 is 0.63
    assert turn(past, torch.tensor(now), 0.7) is fires


def test_a_stream_without_structure_fires_as_often_as_ranks_say():
    """Surprisal and entropy that are one number: a new one is above 0.7 of the last ten about 3 times in 10."""
    values = torch.rand(4000, generator=torch.Generator().manual_seed(0))
    fired = [turn(values[i - 10 : i].repeat(2, 1), values[i].repeat(2), 0.7) for i in range(10, 4000)]
    assert sum(fired) / len(fired) == pytest.approx(0.3, abs=0.05)


def test_controller_waits_for_its_window_then_fires_on_a_turn():
    memory, decisions = {}, []
    sure, unsure = torch.full((1, 8), -9.0), torch.zeros(1, 8)
    sure[0, 3] = 9.0
    for step, logits in enumerate([sure] * 6 + [unsure, sure]):
        token = 3 if step < 7 else 5
        decisions.append(OnSurprise(4, 0.7, 16).after(Step(step, logits, torch.tensor([[token]]), memory)))
    assert decisions[:-1] == [Keep()] * 7
    assert decisions[-1] == Refresh(16)  # the token after the unsure distribution
    assert memory["past"].shape == (1, 2, 4)


def test_generation_selects_again_and_follows_beams():
    model = build("llama")
    plan = plan_for(model, methods.method("clada", window=3, quantile=0.3, refresh=6))
    options = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 24, "eos_token_id": None}
    fixed = plan_for(model, methods.method("clada", window=1000))
    written = {}
    for name, own in (("turns", plan), ("fixed", fixed)):
        with moyu.apply(model, own, backend="reference") as applied:
            written[name] = model.generate(tokens(2, 9), **options)
            assert applied.controller is not None
            beams = model.generate(tokens(1, 9), num_beams=3, **options)
            assert beams.shape == (1, 33)
    assert not torch.equal(written["turns"], written["fixed"])


@torch.no_grad()
def test_a_refreshed_cache_is_dense_over_its_last_tokens():
    """Layer 0's keys depend on tokens alone; those of layer 1 show whether the network below ran dense."""
    model = build("llama")
    ids = tokens(1, 9 + 12)
    dense = model(ids, use_cache=True).past_key_values.layers[1].keys

    class Once(OnSurprise):
        def after(self, step):
            return Refresh(100) if step.index == 11 else Keep()

    plan = plan_for(model, methods.method("clada"))
    with Applied(model, plan, backend="reference", controller=Once(10, 0.7, 100)) as applied, applied.prompt(9):
        cache = model(ids[:, :9], use_cache=True).past_key_values
        for t in range(9, 21):
            model(ids[:, t : t + 1], past_key_values=cache)
    keys = cache.layers[1].keys
    assert (keys[:, :, :20] - dense[:, :, :20]).abs().max() < 1e-10
    assert (keys[:, :, 20] - dense[:, :, 20]).abs().max() > 1e-6  # the step after it is sparse again


def test_surprisal_is_in_units_of_the_vocabulary():
    uniform = torch.full((1, 32), -math.log(32))
    assert [float(v) for v in surprise(uniform, torch.tensor([4]))] == pytest.approx([1.0, 1.0])
