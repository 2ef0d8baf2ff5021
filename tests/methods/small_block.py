"""A small network with its activations, computed with numpy alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from moyu.methods.base import Method
from moyu.methods.selection import select
from moyu.methods.values import Acts, Rows, Site, SiteParams
from moyu.model.anatomy import Block, Piece

D, F, N = 12, 24, 40


@dataclass(frozen=True)
class Case:
    """A block, its weights as arrays, and what they make of N rows, every second of them sparse."""

    block: Block
    weights: dict[str, np.ndarray]
    taps: dict[str, np.ndarray]
    acts: Acts

    @property
    def met(self) -> np.ndarray:
        """The indices of the rows that masks are decided for."""
        return np.arange(1, N, 2)

    def site(self, method: Method, reads: str) -> Site:
        return next(s for s in method.sites(self.block) if s.reads == reads)

    def scores(self, method: Method, site: Site, params: SiteParams) -> np.ndarray:
        """Scores of all rows."""
        x = torch.from_numpy(self.taps[site.reads])
        x = x if params.basis is None else x @ params.basis
        return method.score(x, self.acts.rows, site, params, {}).double().numpy()

    def mask(self, method: Method, site: Site, params: SiteParams) -> np.ndarray:
        return select(torch.from_numpy(self.scores(method, site, params)), params.rule).numpy()


def silu(z: np.ndarray) -> np.ndarray:
    return z / (1 + np.exp(-z))


def case(act: str = "silu", gated: bool = True, seed: int = 0) -> Case:
    """A block of one attention and one network, in float64; q, k, v and o read and write D channels."""
    random = np.random.default_rng(seed)
    shapes = {n: (D, D) for n in "qkvo"} | {"up": (F, D), "down": (D, F)} | ({"gate": (F, D)} if gated else {})
    weights = {n: random.standard_normal(s) for n, s in shapes.items()}
    pieces = {}
    for name, weight in weights.items():
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float64)
        linear.weight.data = torch.from_numpy(weight.copy())
        pieces[name] = Piece(linear)
    scale = np.exp(random.standard_normal(D))  # channels of different sizes, as models have them
    taps = {tap: random.standard_normal((N, D)) * scale for tap in ("attn_in", "heads", "mlp_in")}
    function = {"silu": silu, "relu": lambda z: np.maximum(z, 0)}[act]
    taps["up"] = taps["mlp_in"] @ weights["up"].T
    if gated:
        taps["gate"] = function(taps["mlp_in"] @ weights["gate"].T)
        taps["mid"] = taps["gate"] * taps["up"]
    else:
        taps["mid"] = function(taps["up"])
    tensors = {tap: torch.from_numpy(x.copy()) for tap, x in taps.items()}
    index = torch.arange(N)
    sparse = index % 2 == 1
    rows = Rows(torch.zeros(N, dtype=torch.long), index, torch.ones(N, dtype=torch.bool), sparse, 1)
    acts = Acts(tensors, tensors, rows, {n: torch.from_numpy(w.copy()) for n, w in weights.items()})
    return Case(Block(0, pieces, act=act), weights, taps, acts)
