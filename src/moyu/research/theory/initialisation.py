"""The paper's exact model: one layer of neurons read out by V, and the gradient that its loss sends to a neuron.

    f = V sigma(p),   l_CE = -<y, log softmax(f)>,   l_MSE = ||f - y||^2                                       (1, 2)

At initialisation, with y independent of a zero-mean V, the mean gradient of both losses has the sign of sigma sigma':
descent pushes an active ReLU neuron down (the paper's theorem, 3; its form for MSE, 4). The Gini law (6) gives the size.
"""

from __future__ import annotations

from torch import Tensor


def forward(v: Tensor, values: Tensor) -> Tensor:
    """The outputs (1): v (..., K, m), neuron values sigma(p) (m,) -> (..., K)."""
    return v @ values


def ce_gradient(v: Tensor, values: Tensor, slopes: Tensor, y: Tensor) -> Tensor:
    """d l_CE / d p_i = sigma'(p_i) <v_i, softmax(f) - y>, for labels that sum to 1.

    v (..., K, m); values sigma(p) and slopes sigma'(p), (m,); y (..., K) -> (..., m).
    """
    residual = forward(v, values).softmax(-1) - y  # (..., K)
    return slopes * (v.transpose(-1, -2) @ residual[..., None]).squeeze(-1)


def mse_gradient(v: Tensor, values: Tensor, slopes: Tensor, y: Tensor) -> Tensor:
    """d l_MSE / d p_i = 2 sigma'(p_i) <v_i, f - y>; shapes as for `ce_gradient`."""
    residual = forward(v, values) - y
    return 2 * slopes * (v.transpose(-1, -2) @ residual[..., None]).squeeze(-1)


def gini_impurity(probabilities: Tensor) -> Tensor:
    """1 - ||s||^2 of a distribution over outputs: (..., K) -> (...); 0 if one output is certain, 1 - 1/K if all are equal."""
    return 1 - probabilities.square().sum(-1)


def gini_law(values: Tensor, slopes: Tensor, variance: float, impurity: Tensor | float) -> Tensor:
    """E[d l_CE / d p_i] to first order: sigma(p_i) sigma'(p_i) nu E[1 - ||s||^2] (6); values, slopes (m,) -> (m,).

    variance: nu, of an entry of V. impurity: E[1 - ||s||^2], see `gini_impurity`.
    """
    return values * slopes * variance * impurity


def mse_law(values: Tensor, slopes: Tensor, variance: float, outputs: int) -> Tensor:
    """E[d l_MSE / d p_i] = 2 sigma'(p_i) sigma(p_i) E||v_i||^2 = 2 sigma sigma' K nu (4), exact; (m,) -> (m,)."""
    return 2 * values * slopes * variance * outputs
