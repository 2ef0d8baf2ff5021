"""Bytes of a decode step as a file stores the weights, as MOYU does, and as 16 bits would take."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moyu.errors import UserError
from moyu.measure import accounting
from moyu.model import dissect
from moyu.model.anatomy import Anatomy
from moyu.model.gguf.loading import load_model
from moyu.model.gguf.reader import File, read
from moyu.model.quantised import QuantisedLinear
from moyu.weights import Stored


@dataclass(frozen=True)
class Size:
    """Bytes that a step reads, and the weights of the layers."""

    file: float
    moyu: float
    layers: float | None  # of `file`, those of the layers' linears; None: nobody has told them apart
    layers_moyu: float
    weights: int  # of the layers' linears

    @classmethod
    def of(cls, model: nn.Module, anatomy: Anatomy) -> Size:
        """Of a model as its file stores it and as MOYU does: scales of K types take a byte each in MOYU, and 6 bits in a file."""
        if anatomy.experts:
            raise UserError("routed experts become plain numbers here", "compare files of models without them")
        moyu = accounting.dense_step_bytes(model, anatomy)
        more = sum(m.blocks.nbytes - in_file(m.blocks) for m in linears(model))
        pieces = [p for b in anatomy.all_blocks() for p in b.pieces.values()]
        layers = sum(p.nbytes if p.blocks is None else in_file(p.blocks) for p in pieces)
        own = accounting.block_bytes(model, anatomy)
        return cls(moyu - more, moyu, layers, own, sum(math.prod(p.shape) for p in pieces))

    @property
    def bits(self) -> float | None:
        """Bits of the file that a weight of the layers takes."""
        return None if self.layers is None else 8 * self.layers / self.weights


def in_file(stored: Stored) -> int:
    """Bytes of a weight in a GGUF file."""
    return math.prod(stored.shape) // stored.format.block * stored.format.block_bytes


def in_sixteen_bits(model: nn.Module, anatomy: Anatomy) -> float:
    """Bytes of a dense step with every quantised linear in 16 bits."""
    more = sum(2 * math.prod(m.blocks.shape) - m.blocks.nbytes for m in linears(model))
    return accounting.dense_step_bytes(model, anatomy) + more


def linears(model: nn.Module) -> list[QuantisedLinear]:
    """The quantised linears of a model, the head included."""
    return [m for m in model.modules() if isinstance(m, QuantisedLinear)]


def opened(path: Path) -> tuple[File, Any, Anatomy, Size]:
    """A GGUF file's model, which computes in float32, and its size; numbers of 16 bits count as such."""
    file = read(path)
    model: Any = load_model(file)
    anatomy = dissect.dissect(model)
    size = Size.of(model, anatomy)
    if model.dtype != torch.float32:
        model = model.float()
        anatomy = dissect.dissect(model)
    return file, model, anatomy, size
