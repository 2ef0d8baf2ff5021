"""Decomposition, CETT, participation, saliency and importance, against cases worked out by hand."""

import pytest
import torch

from moyu.research import theory


def test_neurons_sum_to_the_output_and_their_norms_factor():
    values, down = torch.randn(5, 7), torch.randn(3, 7)
    each = theory.contributions(values, down)
    torch.testing.assert_close(each.sum(1), values @ down.t())
    torch.testing.assert_close(each.norm(dim=2), theory.neuron_norms(values, down))


def test_cett_is_not_monotone_and_its_bound_is():
    eta = 0.1
    down = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])  # two neurons that cancel, one that does not
    values = torch.tensor([[1.0, -(1 + eta), 1.0]])
    one, two = torch.tensor([[True, False, False]]), torch.tensor([[True, True, False]])
    assert theory.cett(values, down, one) > 5 * theory.cett(values, down, two)
    assert theory.cett_bound(values, down, one) < theory.cett_bound(values, down, two)
    assert theory.cett(values, down, two).item() == pytest.approx(eta / (1 + eta**2) ** 0.5)


def test_cett_of_a_set_is_a_point_of_the_methods_curve():
    values, down = torch.randn(4, 16), torch.randn(8, 16)
    grid = theory.neuron_norms(values, down).flatten().sort().values[::9].contiguous()
    curve = theory.cett_curve(values, down, grid)
    for g, threshold in enumerate(grid):
        dropped = theory.neuron_norms(values, down) <= threshold
        torch.testing.assert_close(curve[:, g], theory.cett(values, down, dropped), rtol=1e-3, atol=1e-5)


def test_participation_ratio_of_extremes():
    assert theory.participation_ratio(torch.ones(10)).item() == pytest.approx(1)
    assert theory.participation_ratio(torch.eye(10)[0]).item() == pytest.approx(0.1)


def test_the_two_sides_of_the_sign_statistic_agree():
    values = torch.randn(6, 5, dtype=torch.float64)
    down = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    a = values.clone().requires_grad_()
    (a @ down.t()).pow(3).sum().backward()
    weights = theory.sign_statistic_of_weights(down.detach(), down.grad, 6)
    torch.testing.assert_close(theory.sign_statistic(values, a.grad), weights)


def test_uplift_share_counts_only_what_has_an_effect():
    values = torch.tensor([[1.0, -1.0, 0.0, 2.0]])
    gradients = torch.tensor([[1.0, 1.0, 5.0, 3.0]])
    assert theory.uplift_share(values, gradients).item() == pytest.approx(2 / 3)


def test_importance_in_three_forms():
    w, g = torch.tensor([-2.0, 3.0]), torch.tensor([1.0, -1.0])
    assert theory.signed_step(w, g).tolist() == [2, -3]
    assert theory.snip_step(w, g).tolist() == [2, 3]
    a, ga = torch.tensor([[1.0, -1.0], [2.0, 1.0]]), torch.tensor([[-1.0, 1.0], [1.0, 1.0]])
    assert theory.taylor_step(a, ga).tolist() == [3, 2]
    theta = theory.Importance(torch.zeros(2)).after(theory.snip_step(w, g)).after(theory.snip_step(w, g))
    assert theta.total.tolist() == [4, 6] and theta.inputs == 2


def test_running_sum_of_independent_steps_looks_inert():
    steps = torch.randn(200, 2000, generator=torch.Generator().manual_seed(0)).abs()
    overlap = theory.running_sum_overlap(steps, 400)
    fresh = theory.jaccard(theory.top_sets(steps[0], 400), theory.top_sets(steps[1], 400))
    assert fresh < 0.14  # the sets themselves are at chance, 0.111
    assert overlap[-1] > 0.85 > overlap[0]
