"""Deja Vu's heads: a small trained predictor says which attention heads the token will use, before any of them is computed.

score = B A x, A (r, d), B (h, r), x the attention's input, trained with binary cross-entropy on a frozen model. The label of
head i is whether it is among the k with the largest ||W_o,i head_i||: what it adds to the output, after W_o.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moyu.methods.knobs import knob
from moyu.methods.sites import head_sites
from moyu.methods.trained import TrainedHeads
from moyu.methods.values import Site


@dataclass(frozen=True)
class DejaVuHeads(TrainedHeads):
    """Deja Vu for heads, arXiv 2310.17157.

    rank: r, at most the model's width.
    kv: what becomes of keys and values of skipped heads: "full" (kept and read), "hole", "zero", "recompute" or "carry".
    """

    rank: int = knob(16, at_least=1)

    name: ClassVar[str] = "deja-vu-heads"
    paper: ClassVar[str] = "Deja Vu, arXiv 2310.17157"

    def sites(self, block) -> tuple[Site, ...]:
        return head_sites(block, kv=self.kv)
