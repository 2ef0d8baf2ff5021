"""The positive control: the paper's exact model, drawn many times, must show the force of the theorem.

Both losses, plain and gated activations, on a grid of pre-activations; the Gini law in the regime where it is first order.
With an assumption broken on purpose the study must fail; otherwise it could not fail at all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from moyu.measure.statistics import Interval
from moyu.research.studies.base import Observed, Setup, Study
from moyu.research.studies.verdicts import Condition, Control, Finding
from moyu.research.theory import bootstrap, ce_gradient, force, forward, gini_impurity, gini_law, mse_gradient

PLAIN = ("relu", "relu2", "gelu", "silu")
GATED = ("relu", "gelu", "silu")  # ReGLU, GeGLU, SwiGLU
GRID = (-2.5, -1.0, -0.3, 0.5, 1.0, 2.0)
UP = (0.6, -1.1)  # values of the up branch
OUTPUTS = 10
BATCHES = 20
SCALE = 0.5  # standard deviation of V, for the signs
SMALL = 0.1  # standard deviation of V in the regime where the law is first order


@dataclass(frozen=True)
class Theorem(Study):
    """Equations 1 to 6.

    broken: an assumption to break: labels that depend on V, or a V whose mean follows the labels' frequencies.
    """

    broken: Literal["labels", "mean"] | None = None

    name: ClassVar[str] = "theorem"
    needs: ClassVar[Literal["nothing"]] = "nothing"
    claim: ClassVar[str] = "At initialisation the mean gradient of the loss pushes every active neuron towards zero."
    prediction: ClassVar[str] = (
        "In f = V sigma(p) with a random zero-mean V the mean gradient of cross-entropy and of squared error has the sign of "
        "sigma sigma' at every p, for ReLU, ReLU2, GELU, SiLU and their gated forms; its size follows the Gini law."
    )
    refutation: ClassVar[str] = (
        "A significant sign that is wrong, or a law whose slope is not 1: an error of implementation, since the theorem is "
        "proved."
    )
    conditions: ClassVar = (
        Condition("signs", "share of cells whose mean gradient has the predicted sign", "above", 0.95, 0.05),
        Condition("gini law", "slope of the measured force on the Gini law", "within", 1.0, 0.1),
    )
    controls: ClassVar = (
        Control("dead zone", "largest gradient where the law says there is none", "at most", 0.0),
    )  # fmt: skip

    def observe(self, setup: Setup) -> Observed:
        draws = setup.size(400_000, 150_000)
        sums, errors, signs = [], [], []
        generator = torch.Generator().manual_seed(setup.seed)
        for done, (cell, p, up) in enumerate(_cells()):
            setup.progress("draws", done, len(PLAIN) + len(GATED))
            for gradients, expected in self._gradients(cell, p, up, draws, generator):
                sums.append(gradients.mean(0).numpy())
                errors.append((gradients.std(0) / math.sqrt(len(gradients))).numpy())
                signs.append(expected.numpy())
        laws = [self._law(draws // 4, generator) for _ in range(BATCHES)]
        return {
            "mean": np.concatenate(sums),
            "error": np.concatenate(errors),
            "sign": np.concatenate(signs),
            "measured": np.stack([m for m, _ in laws]),  # (batches, cells)
            "law": np.stack([l for _, l in laws]),
        }

    def _draw(self, neurons: int, draws: int, scale: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """V (draws, K, m) and labels (draws, K) under the assumptions, or with one of them broken."""
        v = scale * torch.randn(draws, OUTPUTS, neurons, generator=generator)
        frequencies = torch.full((OUTPUTS,), 1.0)
        if self.broken == "mean":
            frequencies[0] = 20.0
            v += 2 * (frequencies / frequencies.sum() - 1 / OUTPUTS)[:, None]
        labels = torch.multinomial(frequencies, draws, replacement=True, generator=generator)
        if self.broken == "labels":
            labels = v.sum(2).argmax(1)
        return v, torch.eye(OUTPUTS)[labels]

    def _gradients(self, name: str, p: Tensor, up: float | None, draws: int, generator: torch.Generator):
        """Gradients (draws, cells) and the predicted sign (cells,), for every loss and every input of the neuron."""
        act = force(name, p)
        factor = 1.0 if up is None else up
        values = act.values * factor
        v, y = self._draw(len(p), draws, SCALE, generator)
        for loss in (ce_gradient, mse_gradient):
            by_value = loss(v, values, torch.ones_like(values), y)  # dl/da, (draws, m)
            slopes = act.slopes * factor  # of the value in p, or in the gate
            yield by_value * slopes, (values * slopes).sign()
            if up is not None:
                yield by_value * act.values, (values * act.values).sign()  # in the up branch

    def _law(self, draws: int, generator: torch.Generator) -> tuple[np.ndarray, np.ndarray]:
        p = torch.tensor([0.3, 0.6, 1.0, 1.5])
        act = force("relu", p)
        v, y = self._draw(len(p), draws, SMALL, generator)
        impurity = gini_impurity(forward(v, act.values).softmax(-1)).mean()
        law = gini_law(act.values, act.slopes, SMALL**2, impurity)
        return ce_gradient(v, act.values, act.slopes, y).mean(0).numpy(), law.numpy()

    def analyse(self, observed: Observed) -> Finding:
        mean, error, sign = observed["mean"], observed["error"], observed["sign"]
        live = sign != 0
        z = sign[live] * mean[live] / np.maximum(error[live], 1e-30)
        limit = float(stats.norm.ppf(1 - 0.025 / len(z)))  # all cells together at 5 %
        right, wrong = float((z > limit).mean()), float((z < -limit).mean())
        # A cell with the right sign but within its error counts for the estimate, not for the lower end.
        signs = Interval(float((z > 0).mean()), min(right, float((z > 0).mean())), 1 - wrong, len(z))
        # The noise of a mean over batches is the law's own; cells are weighed by the law, as in least squares through 0.
        pairs = np.stack([observed["measured"], observed["law"]], axis=-1)
        slope = bootstrap(pairs, lambda d: (d[..., 0] * d[..., 1]).sum() / np.square(d[..., 1]).sum())
        return Finding(
            {"signs": signs, "gini law": slope},
            controls={"dead zone": float(np.abs(mean[~live]).max(initial=0.0))},
            nulls={"share of right signs by chance": 0.5, "cells where a wrong sign is significant": wrong},
            details={"cells": len(z), "smallest z": float(z.min()), "broken assumption": self.broken or "none"},
        )


def _cells():
    p = torch.tensor(GRID)
    for name in PLAIN:
        yield name, p, None
    for name in GATED:
        for up in UP:
            yield name, p, up
