"""Prox: a 4-bit copy of gate and up foresees the neurons on a sparse input; the chosen ones are computed exactly.

a^_j = act(W^_g[j] S(x)) * (W^_u[j] S(x)), S keeps the channels of x with the largest magnitude; neurons whose |a^_j| is above
the calibrated quantile of their layer are computed from the dense x and the full weights. Whole neurons are skipped: rows of
gate and up, columns of down. What it costs: the copy's kept channels are read at every step, and its scales.

The copy is in Q4_0, by columns, and the integer kernels multiply it: S(x) is rounded to 8 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moyu import kernels
from moyu.methods.base import Family
from moyu.methods.knobs import knob
from moyu.methods.magnitude import Magnitude, column_norms
from moyu.methods.selection import TopK, keep_count, select
from moyu.methods.shapes import shape
from moyu.methods.sites import neuron_sites
from moyu.methods.values import Acts, Site, SiteParams
from moyu.weights import Stored
from moyu.weights.q4_0 import Q4_0


@dataclass(frozen=True)
class Prox(Magnitude):
    """Prox, arXiv 2607.27591.

    inputs: sparsity of the input that the copy sees, in [0, 1).
    weighted: score |a^_j| ||w_j||, w_j column j of down; the paper leaves ||w_j|| out.
    """

    inputs: float = knob(0.5, at_least=0, below=1)
    weighted: bool = False

    name: ClassVar[str] = "prox"
    paper: ClassVar[str] = "Prox, arXiv 2607.27591"
    family: ClassVar[Family] = "threshold"

    def sites(self, block) -> tuple[Site, ...]:
        return neuron_sites(block, "mlp_in")

    def shapes(self, site: Site, block):
        """A copy by columns in Q4_0 of gate and up, and their biases."""
        found = {"norms": shape("units")} if self.weighted else {}
        for name in (n for n in ("gate", "up") if n in site.linears):
            outputs, inputs = block.pieces[name].shape
            found[f"{name}.codes"] = shape(inputs, Q4_0.column_bytes(outputs), kind=Q4_0.code)
            found[f"{name}.scales"] = shape(-(-inputs // Q4_0.group), outputs, kind=torch.float16)
            if block.pieces[name].bias is not None:
                found[f"{name}.bias"] = shape(outputs)
        return found

    def prepare(self, site: Site, acts: Acts) -> Mapping[str, Tensor]:
        buffers = {}
        for name in ("gate", "up"):
            if name in acts.weights:
                copy = Q4_0.store(acts.weights[name]).laid_out("columns")
                buffers[f"{name}.codes"], buffers[f"{name}.scales"] = copy.tensors
            if name in acts.biases:
                buffers[f"{name}.bias"] = acts.biases[name].clone()
        if self.weighted:
            buffers["norms"] = column_norms(acts.weights, ["down"])
        return buffers

    def factors(self, site: Site, params: SiteParams) -> Tensor | None:
        return params.buffers.get("norms")

    def values(self, x: Tensor, site: Site, params: SiteParams) -> Tensor:
        """What the copy foresees of the neurons, (N, d) -> (N, f)."""
        kept = select(x.abs(), TopK(keep_count(x.shape[1], self.inputs)))
        names = [n for n in ("gate", "up") if f"{n}.codes" in params.buffers]
        sides = [_foreseen(x, kept, n, site.units, params) for n in names]
        opened = kernels.activation(site.act or "identity")(sides[0])
        return opened * sides[1] if len(sides) == 2 else opened  # (N, f)

    def score_bytes(self, site: Site, params: SiteParams) -> int:
        total = 0
        for name, buffer in params.buffers.items():
            by_channel = name.endswith(".codes")  # the scales belong to 32 channels each
            kept = keep_count(len(buffer), self.inputs) if by_channel else len(buffer)
            total += kept * (buffer.nbytes // len(buffer))
        return total


def _foreseen(x: Tensor, kept: Tensor, name: str, neurons: int, params: SiteParams) -> Tensor:
    """The copy times S(x): x (N, d), kept (N, d) bool -> (N, f)."""
    tensors = params.buffers[f"{name}.codes"], params.buffers[f"{name}.scales"]
    copy = Stored(Q4_0, "columns", tensors, (neurons, x.shape[1]))
    bias = params.buffers.get(f"{name}.bias")
    return kernels.columns(x, copy, kept, bias=None if bias is None else bias.to(x))
