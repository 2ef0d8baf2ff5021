"""Does a neuron raise the loss? To first order, removing it changes the loss by -a dl/da.

    G_j = 1/T sum_t a_tj dl/da_tj = 1/T <w_j, dl/dw_j>                                                             (7)

The theory predicts G > 0 at initialisation. At a stationary point of training G is exactly 0, and negative under weight
decay; so a trained model without a positive G refutes nothing.
"""

from __future__ import annotations

from torch import Tensor


def sign_statistic(values: Tensor, gradients: Tensor) -> Tensor:
    """G from the neurons: values a and dl/da, (T, f) each, l summed over tokens -> (f,)."""
    return (values * gradients).mean(0)


def sign_statistic_of_weights(down: Tensor, gradient: Tensor, tokens: int) -> Tensor:
    """G from the weights: down (d, f) and dl/d down (d, f), l summed over `tokens` tokens -> (f,)."""
    return (down * gradient).sum(0) / tokens


def uplift_share(values: Tensor, gradients: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Among neurons with a != 0 and dl/da != 0, the share with a dl/da > 0: removal lowers the loss. Chance is one half.

    values, gradients (..., f); over all entries, or over `dim`.
    """
    effect = values * gradients
    positive, counted = effect > 0, effect != 0
    if dim is None:
        return positive.sum() / counted.sum().clamp(min=1)
    return positive.sum(dim) / counted.sum(dim).clamp(min=1)
