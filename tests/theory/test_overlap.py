"""Chance-corrected Jaccard: known sets, both nulls, flocking, and the statistics of a sequence."""

import pytest
import torch

from moyu.methods.tda import Tda
from moyu.methods.values import Rows
from moyu.research import theory


def _random_sets(count, neurons, k, seed=0):
    return theory.top_sets(torch.rand(count, neurons, generator=torch.Generator().manual_seed(seed)), k)


def test_jaccard_by_hand():
    a, b = torch.tensor([True, True, False, False]), torch.tensor([False, True, True, False])
    assert theory.jaccard(a, b).item() == pytest.approx(1 / 3)
    assert theory.jaccard(a, a) == 1
    assert theory.jaccard(~a & a, ~a & a) == 1


def test_uniform_null_is_what_random_sets_reach():
    sets = _random_sets(400, 500, 100)
    observed = theory.jaccard(sets[::2], sets[1::2]).double().mean()
    assert float(observed) == pytest.approx(float(theory.uniform_null(100, 100, 500)), abs=5e-3)
    assert float(theory.uniform_null(400, 400, 2000)) == pytest.approx(1 / 9)


def test_popularity_null_is_what_popular_sets_reach():
    generator = torch.Generator().manual_seed(0)
    frequencies = torch.rand(400, generator=generator) ** 3
    sets = torch.rand(600, 400, generator=generator) < frequencies
    observed = float(theory.jaccard(sets[::2], sets[1::2]).double().mean())
    assert observed == pytest.approx(float(theory.popularity_null(frequencies)), abs=0.01)
    assert observed > 1.5 * float(theory.uniform_null(sets.sum(1).float().mean(), sets.sum(1).float().mean(), 400))


def test_flocking_is_one_for_equal_sets_and_zero_for_random_ones():
    same = _random_sets(1, 200, 50).expand(8, 200)
    assert theory.flocking(same).item() == pytest.approx(1)
    assert abs(float(theory.flocking(_random_sets(64, 400, 100)))) < 0.01
    batch = torch.stack([same, _random_sets(8, 200, 50)])
    torch.testing.assert_close(theory.flocking(batch)[1], theory.flocking(batch[1]))


def test_flocking_is_the_mean_over_pairs():
    sets = _random_sets(5, 30, 10)
    pairs = [theory.kappa(sets[i], sets[j]) for i in range(5) for j in range(i)]
    torch.testing.assert_close(
        pairs[0], theory.chance_corrected(theory.jaccard(sets[1], sets[0]), theory.uniform_null(10, 10, 30))
    )
    assert theory.flocking(sets).item() == pytest.approx(float(torch.stack(pairs).mean()), rel=1e-5)


def test_sequence_statistics_are_the_definitions_and_the_methods():
    values = torch.randn(3, 6, 12, dtype=torch.float64)
    rows = values / values.norm(dim=-1, keepdim=True)
    s = theory.griffin_statistic(values)
    torch.testing.assert_close(s, rows.norm(dim=1))
    scores = Tda().score(None, Rows.one_each(3, s.device), None, None, {"squares": s.square()})
    torch.testing.assert_close(theory.tda_statistic(values), scores)
