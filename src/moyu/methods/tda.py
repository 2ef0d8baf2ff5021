"""TDA of arXiv 2408.11393: a threshold on the prompt's neuron statistic; one mask a sequence, its size varies.

R_j = s_j / max_j' s_j' with GRIFFIN's s; neurons with R_j above the layer's threshold are kept for all generated tokens.
The thresholds come from calibration: for a target sparsity their quantile, for a target CETT the error on the *next* tokens.
The paper's normalisation and calibration are not published in what is known; these are our reading.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moyu.methods.base import Family
from moyu.methods.fitting import EVERYTHING
from moyu.methods.griffin import accumulate
from moyu.methods.knobs import knob
from moyu.methods.selection import Threshold
from moyu.methods.sequence import Sequence
from moyu.methods.sites import neuron_sites
from moyu.methods.values import Acts, Memory, Rows, Site, SiteParams


@dataclass(frozen=True)
class Tda(Sequence):
    """TDA, arXiv 2408.11393 (family `sequence`; not the paper's token-level kind of the same name).

    cett: target mean CETT of the next tokens in (0, 1), e.g. 0.2; replaces the sparsity target.
    """

    cett: float | None = knob(None, above=0, below=1)

    name: ClassVar[str] = "tda"
    paper: ClassVar[str] = "arXiv 2408.11393"
    family: ClassVar[Family] = "sequence"

    def sites(self, block) -> tuple[Site, ...]:
        return neuron_sites(block, "mid")

    def fit(self, site: Site, acts: Acts, target: float) -> SiteParams:
        if self.cett is None or target == 0.0:
            return super().fit(site, acts, target)
        scores = self.prompt_scores(site, acts, SiteParams(rule=EVERYTHING))  # (B, f)
        return SiteParams(rule=Threshold(_search(scores, acts, self.cett)))

    def update(self, memory: Memory, x: Tensor, rows: Rows, site: Site, params: SiteParams) -> Memory:
        return {"squares": accumulate(memory.get("squares"), x, rows)}

    def score(self, x, rows: Rows, site: Site, params: SiteParams, memory: Memory):
        s = memory["squares"][rows.seq].sqrt()
        return s / s.amax(dim=1, keepdim=True).clamp(min=1e-12)  # (N, f)


def _search(scores: Tensor, acts: Acts, tau: float, steps: int = 64) -> float:
    """The largest threshold whose running-maximum CETT on the sparse rows stays at or below `tau`; -inf where none does."""
    chosen = (acts.rows.sparse & acts.rows.valid).nonzero().squeeze(1)
    chosen = chosen[torch.linspace(0, len(chosen) - 1, min(512, len(chosen))).long()]
    mid, seq = acts.sparse["mid"][chosen].float(), acts.rows.seq[chosen]
    down = acts.weights["down"].float()
    total = (mid @ down.t()).norm(dim=1).clamp(min=1e-12)
    best = -math.inf
    pooled = scores.flatten()[:: max(1, scores.numel() // 2**20)].float()
    for candidate in torch.quantile(pooled, torch.linspace(0, 1, steps, device=pooled.device)):
        dropped = torch.where(scores[seq] > candidate, 0.0, mid) @ down.t()
        if float((dropped.norm(dim=1) / total).mean()) > tau:
            break  # ascending candidates: from the first excess on, the running maximum is above tau
        best = float(candidate)
    return best
