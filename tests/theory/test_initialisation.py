"""Equations 1 to 6 against autograd, finite differences and Monte Carlo."""

import math

import pytest
import torch

from moyu.research import theory


def _exact(name, p, outputs=10, draws=20_000, scale=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    v = scale * torch.randn(draws, outputs, len(p), generator=generator)
    y = torch.eye(outputs)[torch.randint(outputs, (draws,), generator=generator)]
    return v, theory.force(name, p), y


@pytest.mark.parametrize("loss", ["ce", "mse"])
def test_gradients_are_autograds(loss):
    p = torch.tensor([-1.0, 0.3, 2.0], dtype=torch.float64)
    v = torch.randn(4, 3, dtype=torch.float64)
    y = torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    z = p.clone().requires_grad_()
    f = v @ torch.nn.functional.gelu(z)
    value = -(y * f.log_softmax(-1)).sum() if loss == "ce" else (f - y).square().sum()
    value.backward()
    made = theory.force("gelu", p)
    gradient = theory.ce_gradient if loss == "ce" else theory.mse_gradient
    torch.testing.assert_close(gradient(v, made.values, made.slopes, y), z.grad)


def test_an_active_relu_neuron_is_pushed_down_and_a_dead_one_is_not_moved():
    v, relu, y = _exact("relu", torch.tensor([-1.0, 0.5, 2.0]))
    gradients = theory.ce_gradient(v, relu.values, relu.slopes, y)
    mean, error = gradients.mean(0), gradients.std(0) / math.sqrt(len(gradients))
    assert mean[0] == 0
    assert (mean[1:] > 5 * error[1:]).all()


def test_gini_law_is_the_force_to_first_order():
    p = torch.tensor([0.3, 0.6, 1.0])
    v, relu, y = _exact("relu", p, draws=200_000, scale=0.1)
    impurity = theory.gini_impurity(theory.forward(v, relu.values).softmax(-1)).mean()
    law = theory.gini_law(relu.values, relu.slopes, 0.1**2, impurity)
    measured = theory.ce_gradient(v, relu.values, relu.slopes, y)
    error = measured.std(0) / math.sqrt(len(measured))
    assert ((measured.mean(0) - law).abs() < 4 * error + 0.02 * law).all()
    assert (law > 3 * error).all()  # so that agreement with 0 would fail


def test_mse_law_is_exact():
    p = torch.tensor([0.5, 1.0])
    v, silu, y = _exact("silu", p, draws=100_000, scale=1.0)
    law = theory.mse_law(silu.values, silu.slopes, 1.0, outputs=10)
    torch.testing.assert_close(theory.mse_gradient(v, silu.values, silu.slopes, y).mean(0), law, rtol=0.03, atol=0)


def test_gini_impurity_of_known_distributions():
    assert theory.gini_impurity(torch.tensor([1.0, 0.0, 0.0, 0.0])) == 0
    assert theory.gini_impurity(torch.full((4,), 0.25)) == 0.75


def test_force_by_activation_has_the_sign_of_the_table():
    p = torch.tensor([-3.0, -1.0, -0.3, 0.5])
    assert theory.force("relu", p).sign.tolist() == [0, 0, 0, 1]
    assert theory.force("relu2", p).sign.tolist() == [0, 0, 0, 1]
    assert theory.force("gelu", p).sign.tolist() == [1, 1, -1, 1]
    assert theory.force("silu", p).sign.tolist() == [1, -1, -1, 1]


def test_turning_points():
    assert theory.turning_point("gelu") == pytest.approx(-0.752, abs=1e-3)
    assert theory.turning_point("silu") == pytest.approx(-1.278, abs=1e-3)
    assert theory.turning_point("relu") is None
