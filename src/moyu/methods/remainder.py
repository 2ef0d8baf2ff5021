"""What skipped units give all the same: a second copy of their weights, in few bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from moyu import kernels
from moyu.weights import Stored
from moyu.weights.few_bits import GROUP, dequantize


@dataclass(frozen=True, eq=False)
class FewBits:
    """A matrix (q, n) in codes of so many bits: codes (q, n) uint8, scales (q, groups); one scale per row or per 32 weights."""

    codes: Tensor
    scales: Tensor
    bits: int

    def dequantise(self, like: Tensor) -> Tensor:
        """(q, n) in the type and on the device of `like`."""
        group = self.codes.shape[1] if self.scales.shape[1] == 1 else GROUP
        return dequantize(self.codes, self.scales.float(), self.bits, group).to(like)


@dataclass(frozen=True, eq=False)
class Remainder:
    """Weights that stand for those of skipped units.

    weight: (q, units) as blocks by columns, which kernels read; or (units, q) in few bits, which no kernel reads.
    """

    weight: Stored | FewBits

    @property
    def stored(self) -> Stored | None:
        """The weight where kernels read it."""
        return self.weight if isinstance(self.weight, Stored) else None

    def needs(self) -> frozenset[str]:
        """What it asks of a step."""
        return frozenset({"remainder" if self.stored is not None else "remainder without a kernel"})

    def given(self, values: Tensor, mask: Tensor) -> Tensor:
        """What the units that the mask skips add to the output: (N, units), (N, units) bool -> (N, q)."""
        if isinstance(self.weight, FewBits):
            return torch.where(mask, 0, values) @ self.weight.dequantise(values)
        if values.requires_grad or values.device.type != "cpu":  # where no kernel reads it
            return functional.linear(torch.where(mask, 0, values), self.weight.values(values.dtype))
        return kernels.columns(values, self.weight, ~mask)
