"""Prox: a 4-bit copy of gate and up foresees the neurons on a sparse input; the chosen ones are computed exactly.

a^_j = act(W^_g[j] S(x)) * (W^_u[j] S(x)), S keeps the channels of x with the largest magnitude; neurons whose |a^_j| is above
the calibrated quantile of their layer are computed from the dense x and the full weights. Whole neurons are skipped: rows of
gate and up, columns of down. What it costs: the copy's kept channels are read at every step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from moyu import kernels, selection
from moyu.methods.base import Acts, Family, Granularity, Memory, Method, Rows, Site, SiteParams, neuron_site
from moyu.selection import TopK, keep_count

GROUP = 32  # weights that share a scale, along the neurons of one input channel
LEVELS = 7  # a weight is one of -7 .. 7 times its scale


@dataclass(frozen=True)
class Prox(Method):
    """Prox, arXiv 2607.27591.

    inputs: sparsity of the input that the copy sees, in [0, 1).
    weighted: score |a^_j| ||w_j||, w_j column j of down; the paper leaves ||w_j|| out.
    """

    inputs: float = 0.5
    weighted: bool = False

    name: ClassVar[str] = "prox"
    paper: ClassVar[str] = "Prox, arXiv 2607.27591"
    family: ClassVar[Family] = "threshold"
    granularity: ClassVar[Granularity] = "token"

    def __post_init__(self) -> None:
        if not 0 <= self.inputs < 1:
            raise ValueError(f"inputs must be in [0, 1), not {self.inputs}")

    def sites(self, block) -> tuple[Site, ...]:
        return (neuron_site(block, "mlp_in"),) if block.has_ffn else ()

    def prepare(self, site: Site, acts: Acts) -> Mapping[str, Tensor]:
        buffers = {}
        for name in ("gate", "up"):
            if name in acts.weights:
                buffers[f"{name}.codes"], buffers[f"{name}.scales"] = quantize(acts.weights[name])
            if name in acts.biases:
                buffers[f"{name}.bias"] = acts.biases[name].clone()
        if self.weighted:
            buffers["norms"] = acts.weights["down"].float().norm(dim=0)
        return buffers

    def score(self, x, rows: Rows, site: Site, params: SiteParams, memory: Memory):
        act = kernels.activation(site.act or "identity")
        kept = selection.select(x.abs(), TopK(keep_count(x.shape[1], self.inputs)))
        sparse = torch.where(kept, x, 0)  # (N, d)
        values = [
            _foreseen(sparse, name, site.units, params) for name in ("gate", "up") if f"{name}.codes" in params.buffers
        ]
        value = act(values[0]) * values[1] if len(values) == 2 else act(values[0])  # (N, f)
        norms = params.buffers.get("norms")
        return value.abs() if norms is None else value.abs() * norms.to(value)

    def score_bytes(self, site: Site, params: SiteParams) -> int:
        total = 0
        for name, buffer in params.buffers.items():
            by_channel = name.endswith((".codes", ".scales"))
            kept = keep_count(len(buffer), self.inputs) if by_channel else len(buffer)
            total += kept * (buffer.nbytes // len(buffer))
        return total


def _foreseen(x: Tensor, name: str, neurons: int, params: SiteParams) -> Tensor:
    codes, scales = params.buffers[f"{name}.codes"], params.buffers[f"{name}.scales"]
    bias = params.buffers.get(f"{name}.bias")
    weight = dequantize(codes, scales)[:, :neurons].t().to(x)  # (f, d)
    return functional.linear(x, weight, None if bias is None else bias.to(x))


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """W (f, d) in 4 bits, input channel by input channel: codes (d, F / 2) uint8, scales (d, F / GROUP) float16.

    F is f rounded up to a multiple of GROUP; a byte holds neurons 2 i (low) and 2 i + 1 (high).
    """
    columns = weight.detach().float().t()  # (d, f)
    columns = functional.pad(columns, (0, -columns.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    scales = (columns.abs().amax(2) / LEVELS).half()  # (d, F / GROUP)
    steps = scales.float().clamp(min=1e-30)[..., None]
    codes = (columns / steps).round().clamp(-LEVELS, LEVELS).to(torch.int8).add(8).to(torch.uint8).flatten(1)
    return codes[:, 0::2] | codes[:, 1::2] << 4, scales


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """What `quantize` kept, (d, F) float32."""
    pairs = torch.stack([codes & 15, codes >> 4], dim=2).flatten(1)  # (d, F)
    return (pairs.float() - 8).unflatten(1, (-1, GROUP)).mul(scales.float()[..., None]).flatten(1)
