"""Levels: few bits of every weight for every token, all bits for the inputs that this token needs.

score_i = |x_i| ||W_i - w^_i||, at the input of every linear: W_i is column i of the weight and w^_i what the first bits of its
codes stand for (`weights.planes`): of 8 bits the first 4, of 6 the first 4, of 5 the first 3, of 4 the first 2. The score is the
size of the error that input i makes while its further bits are not read. Inputs above a threshold of their linear, calibrated on
text, are multiplied with all bits; the others with the first ones. At the head the first bits of all words say which words need the others
(`shortlist`). The weights are those of the quantised model as it is: nothing
is stored twice, and nothing is lost where all bits are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moyu import kernels
from moyu.methods.base import Family, Method
from moyu.methods.magnitude import Magnitude
from moyu.methods.shapes import shape
from moyu.methods.shortlist import Shortlist
from moyu.methods.sites import level_sites, word_sites
from moyu.methods.values import Acts, Site, SiteParams

WORDS = 0.1  # words of the head that are kept, for each input that other linears keep


@dataclass(frozen=True)
class Levels(Magnitude):
    """Own, for models in formats of integers of 3 to 8 bits.

    Near: Any-Precision LLM (arXiv 2402.10517) and MatQuant (arXiv 2502.06786) nest precisions of a whole model; Prox
    (arXiv 2607.27591) estimates neurons from few bits. Here every input of every linear has a precision of its own for each token.
    """

    name: ClassVar[str] = "levels"
    paper: ClassVar[str] = "own"
    family: ClassVar[Family] = "own"
    divides: ClassVar[bool] = True
    quantised_only: ClassVar[bool] = True

    def sites(self, block) -> tuple[Site, ...]:
        return (*level_sites(block), *word_sites(block))

    def at(self, site: Site) -> Method:
        return Shortlist(WORDS) if site.skips == "words" else self

    def shapes(self, site: Site, block):
        return {"norms": shape("units")}

    def prepare(self, site: Site, acts: Acts) -> Mapping[str, Tensor]:
        return {"norms": further_norms(site, acts)}

    def factors(self, site: Site, params: SiteParams) -> Tensor | None:
        return params.buffers["norms"]


def further_norms(site: Site, acts: Acts) -> Tensor:
    """||W_i - w^_i|| of the linear of a site, (n,) float."""
    stored = acts.stored[site.linears[0]]
    return (kernels.values(stored, torch.float32) - kernels.first_values(stored, torch.float32)).norm(dim=0)
