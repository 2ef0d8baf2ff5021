"""What comes before and after the layers of a native step: embedding, angles, final norm and head."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moyu.engine.sites import SiteState
from moyu.engine.steps.layers import Norm, native_linear, threshold
from moyu.kernels import cpu
from moyu.model.quantised import QuantisedEmbedding, QuantisedLinear
from moyu.weights import Stored

FIRST = 512  # positions of the first table of angles


class Angles:
    """cos and sin of a rotary embedding by position, as its own module computes them, as far as positions have come."""

    def __init__(self, module: nn.Module, kind: str | None = None) -> None:
        """The module's angles must depend on nothing but the position. kind: of the layers, where the module asks for it."""
        self.module, self.kind = module, kind
        self._made: tuple[tuple, Tensor, Tensor] | None = None  # of what, cos, sin

    def at(self, positions: int | Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin, (1, width) of one position or (B, width) of B, float32 but rounded as a model of `dtype` has them.

        They lie where the module does.
        """
        furthest = int(positions if isinstance(positions, int) else positions.max())
        key = (dtype, *(b.data_ptr() for b in vars(self.module)["_buffers"].values() if b is not None))
        made = self._made
        if made is None or made[0] != key or len(made[1]) <= furthest:
            count = max(FIRST, 1 << furthest.bit_length())
            kind = () if self.kind is None else (self.kind,)
            device = next((b.device for b in self.module.buffers()), None)
            tables = self.module(
                torch.empty(1, 1, 1, dtype=dtype, device=device), torch.arange(count, device=device)[None], *kind
            )
            cos, sin = (table[0].float().contiguous() for table in tables)
            made = self._made = (key, cos, sin)
        index = slice(positions, positions + 1) if isinstance(positions, int) else positions
        return made[1][index], made[2][index]


@dataclass(eq=False)
class Ends:
    """What comes before and after the layers."""

    embedding: nn.Embedding | QuantisedEmbedding
    norm: Norm
    head: nn.Linear | QuantisedLinear
    angles: list[Angles]  # as many as the layers name
    output: type  # of the model's own forward
    softcap: float = 0.0  # of the logits; 0 = none
    words: SiteState | None = None  # the plan's site of the head

    @property
    def scale(self) -> float:
        """What the embedding multiplies its rows with; 0 = nothing."""
        return float(getattr(self.embedding, "scalar_embed_scale", getattr(self.embedding, "scale", 0.0)))

    def native(self, dense: bool = False, first_bits: bool = False) -> Any:
        """The ends as the extension takes them; pointers are those of the live parameters.

        dense: no word is skipped. first_bits: of a parted head those alone are read.
        """
        ends = cpu.extension().Ends()
        ends.embedding, ends.norm = native_linear(_held(self.embedding), None), self.norm.native()
        ends.head = native_linear(_held(self.head), self.head.bias)
        if self.words is not None and not dense:
            assert isinstance(self.head, QuantisedLinear)
            ends.head.threshold = threshold(self.words, self.head.like.dtype)
        if first_bits and ends.head.parted:
            ends.head.threshold = math.inf
        ends.scale, ends.softcap = self.scale, self.softcap
        return ends


def _held(module: nn.Module) -> Tensor | Stored:
    return module.blocks if isinstance(module, QuantisedEmbedding | QuantisedLinear) else module.weight  # pyright: ignore
