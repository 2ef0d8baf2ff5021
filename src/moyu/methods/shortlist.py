"""A shortlist: the head reads the first bits of every word's row, and all bits for the words that may come next.

score_j = y_j - max_k y_k, y the logits that the first bits give (`weights.planes` says which bits they are). Words above a
threshold, calibrated on text, get their exact logits; the others keep those of the first bits. A word that is far below the
likeliest one has next to no probability, whatever its further bits say, so nearly all of them can stay unread. Any other part of the
model is dense. The head is a third of the bytes of a model of 135 M weights, and two thirds of one with 262,144 words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from moyu.methods.base import Family, Method
from moyu.methods.fitting import at_quantile
from moyu.methods.knobs import knob
from moyu.methods.sites import word_sites
from moyu.methods.values import Acts, Memory, Rows, Site, SiteParams


@dataclass(frozen=True)
class Shortlist(Method):
    """Own, for models whose head is in a format of integers of 4 to 8 bits.

    Near: SVD-softmax (Shim et al., NeurIPS 2017) previews all logits with a few singular vectors and computes the largest ones
    in full. Here the preview is the first bits of the very weights, so nothing is stored beside them.
    """

    share: float = knob(1.0, above=0.0, at_most=1.0)

    name: ClassVar[str] = "shortlist"
    paper: ClassVar[str] = "own"
    family: ClassVar[Family] = "own"
    quantised_only: ClassVar[bool] = True

    def sites(self, block) -> tuple[Site, ...]:
        return word_sites(block)

    def fit(self, site: Site, acts: Acts, target: float) -> SiteParams:
        """A threshold at which `share` (1 - target) of the words are kept, on average over the calibration rows."""
        return at_quantile(self, site, acts, 0.0 if target == 0 else 1 - self.share * (1 - target))

    def score(self, x, rows: Rows, site: Site, params: SiteParams, memory: Memory):
        return x - torch.amax(x, 1, keepdim=True)  # (N, words)
