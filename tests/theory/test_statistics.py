"""Spectrum and statistics: each against a case whose answer is known."""

import numpy as np
import pytest
import torch

from moyu.research import theory


def test_bootstrap_covers_the_mean_and_keeps_pairs():
    rng = np.random.default_rng(0)
    interval = theory.bootstrap(rng.normal(1.0, 1.0, 400))
    assert interval.low < 1.0 < interval.high and interval.units == 400
    assert interval.error == pytest.approx(0.05, rel=0.2)
    shared = rng.normal(0, 10, 100)
    paired = theory.bootstrap(np.stack([shared + 1, shared], 1), lambda d: (d[:, 0] - d[:, 1]).mean(), resamples=200)
    assert paired.high - paired.low < 1e-9 and paired.value == pytest.approx(1)


def test_bootstrap_needs_units():
    assert theory.bootstrap([1.0, 2.0, float("nan")]).units == 2
    with pytest.raises(ValueError, match="resampled"):
        theory.bootstrap([1.0])


def test_power_and_equivalence():
    assert theory.power(1.0, 2.8) == pytest.approx(0.80, abs=0.01)
    assert theory.power(1.0, 0.0) == pytest.approx(0.05, abs=1e-3)
    inside, outside = theory.Interval(0.0, -0.01, 0.01, 9), theory.Interval(0.0, -0.05, 0.05, 9)
    assert theory.equivalent(inside, 0.02)
    assert not theory.equivalent(outside, 0.02)  # an interval that holds 0 is no proof of nothing


def test_holm_is_holms():
    assert theory.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_rank_correlations():
    assert theory.kendall([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(2 / 3)
    assert theory.pairwise_spearman([[1, 2, 3], [2, 4, 9], [3, 2, 1]]) == pytest.approx(-1 / 3)
    assert np.isnan(theory.pairwise_spearman([[1, 1], [2, 3]]))


def test_half_life_of_an_exponential():
    t = np.arange(20)
    assert theory.half_life(t, 0.5 ** (t / 4)) == pytest.approx(4)
    assert theory.half_life(t, np.ones(20) + t) == float("inf")


def test_intraclass_correlation_of_known_variances():
    generator = torch.Generator().manual_seed(0)
    groups = 3**0.5 * torch.randn(400, 1, generator=generator) + torch.randn(400, 5, generator=generator)
    assert float(theory.intraclass_correlation(groups)) == pytest.approx(0.75, abs=0.04)
    assert abs(float(theory.intraclass_correlation(torch.randn(400, 5, generator=generator)))) < 0.05


def test_variance_shares_of_additive_and_interacting_tables():
    rows, columns = torch.tensor([1.0, -1.0]), torch.tensor([2.0, 0.0, -2.0])
    additive = theory.variance_shares(rows[:, None] + columns)
    assert additive.interaction < 1e-6
    assert float(additive.rows) == pytest.approx(1 / (1 + 8 / 3))
    product = theory.variance_shares(rows[:, None] * columns)
    assert float(product.interaction) == pytest.approx(1)


def test_singular_energy_of_one_direction_and_of_many():
    assert theory.singular_energy(torch.randn(6, 1) @ torch.randn(1, 9)).item() == pytest.approx(1, rel=1e-5)
    assert theory.singular_energy(torch.eye(8)).item() == pytest.approx(1 / 8)


def test_mixed_model_finds_the_slope():
    rng = np.random.default_rng(0)
    document = np.repeat(np.arange(30), 8)
    layer = np.tile(np.repeat([0, 1], 4), 30)
    x = np.tile(np.arange(4.0), 60)
    y = 0.5 * x + rng.normal(0, 1, 30)[document] + 0.3 * layer + rng.normal(0, 0.1, len(x))
    columns = {"y": y, "x": x, "document": document, "layer": layer}
    effects = theory.mixed_model("y ~ x", columns, "document", ["layer"])
    assert effects["x"].low < 0.5 < effects["x"].high
    assert effects["x"].high - effects["x"].low < 0.1
