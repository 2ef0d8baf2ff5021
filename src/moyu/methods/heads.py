"""Attention heads as units: what becomes of the keys and values of skipped ones, and what each head adds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

KvPolicy = Literal["full", "hole", "zero", "recompute", "carry"]
KV_POLICIES: Mapping[KvPolicy, tuple[str, ...]] = {  # linears of a skipped head that are not computed beside q
    "full": (),
    "hole": ("k", "v"),
    "zero": ("k", "v"),
    "recompute": ("k", "v"),
    "carry": ("v",),
}


def head_norms(heads: Tensor, o: Tensor, units: int) -> Tensor:
    """What each head adds to the output, ||W_o,h x_h||: heads (N, H D), o (d, H D) -> (N, units), by Gram matrices."""
    each, by_head = (t.float().unflatten(1, (units, -1)) for t in (heads, o.detach()))
    gram = torch.einsum("dhi,dhj->hij", by_head, by_head)
    return torch.einsum("nhi,hij,nhj->nh", each, gram, each).clamp(min=0).sqrt()
