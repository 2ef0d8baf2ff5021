"""The force of the mean gradient at initialisation on each activation function: the sign of sigma sigma' = (sigma^2)' / 2.

Gradient descent moves p against the force. ReLU and ReLU^2 end in a dead zone without gradient. GELU and SiLU move to 0
from above, and from below down to a turning point; further below they fall towards minus infinity. The smooth functions are
never exactly 0. Derived from the convexity of the loss, for any activation.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from scipy.optimize import brentq
from torch import Tensor

from moyu.kernels import activation

SMOOTH = {"gelu": -1.0, "silu": -1.5}  # a pre-activation below the minimum of the function


@dataclass(frozen=True)
class Force:
    """An activation and its slope at pre-activations p, and the resulting force."""

    values: Tensor  # sigma(p), the shape of p
    slopes: Tensor  # sigma'(p)

    @property
    def sign(self) -> Tensor:
        """The sign of the mean gradient: +1 pushed down, -1 pushed up, 0 no force."""
        return (self.values * self.slopes).sign()


def force(name: str, p: Tensor) -> Force:
    """The activation `name` of `moyu.kernels` at p, with its derivative by autograd."""
    z = p.detach().clone().requires_grad_()
    with torch.enable_grad():
        values = activation(name)(z)
        (slopes,) = torch.autograd.grad(values.sum(), z)
    return Force(values.detach(), slopes)


@cache
def turning_point(name: str) -> float | None:
    """The p < 0 at which the force on a smooth activation changes sign (its minimum), or None."""
    if name not in SMOOTH:
        return None

    def slope(p: float) -> float:
        return float(force(name, torch.tensor([p], dtype=torch.float64)).slopes)

    return float(brentq(slope, SMOOTH[name] * 2, SMOOTH[name] / 4))  # pyright: ignore[reportArgumentType]
