"""Deja Vu: a small trained predictor says which neurons the token will use, before any of them is computed.

score = B A x, A (r, d), B (f, r), trained with binary cross-entropy on a frozen model; the k largest are computed. The labels
are the paper's, 1[a_j != 0], where the activation has exact zeros; elsewhere nearly every a_j is non-zero, and the label is
whether neuron j is among the k with the largest |a_j| ||w_j||.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moyu.methods.magnitude import column_norms
from moyu.methods.selection import TopK, keep_count, select
from moyu.methods.sites import neuron_sites
from moyu.methods.trained import Trained
from moyu.methods.values import Acts, Site


@dataclass(frozen=True)
class DejaVu(Trained):
    """Deja Vu for neurons, arXiv 2310.17157.

    rank: r, at most the model's width.
    weighted: a label counts as much as its neuron adds, |a_j| ||w_j|| over the token's mean, instead of all the same.
    ahead: the predictor of layer l reads what the network of layer l - 1 reads, so that it can run beside it.
    """

    weighted: bool = False
    ahead: bool = False

    name: ClassVar[str] = "deja-vu"
    paper: ClassVar[str] = "Deja Vu, arXiv 2310.17157"

    def sites(self, block) -> tuple[Site, ...]:
        source = block.layer - 1 if self.ahead and block.layer and block.expert is None else None
        return neuron_sites(block, "mlp_in", source)

    def lessons(self, site: Site, acts: Acts, target: float) -> tuple[Tensor, Tensor]:
        mass = acts.met("mid").abs().float() * column_norms(acts.weights, ["down"])  # (N, f)
        if site.act in ("relu", "relu2"):
            labels = mass > 0
        else:
            labels = select(mass, TopK(keep_count(site.units, target)))
        weights = mass / mass.mean(1, keepdim=True).clamp(min=1e-30) if self.weighted else torch.ones_like(mass)
        return labels, weights
