"""Estimate: what a token needs most is computed exactly, what it needs least from few bits or not at all.

Neurons are ranked by |act(g^_j) u^_j| ||w_j||, w_j column j of down, with g^ and u^ from one of
  svd     U V x, the best rank-r map of the inputs that were met (Eckart-Young under their second moment), in few bits;
  copy    a copy of gate and up in few bits.
A neuron that is not computed exactly may still give act(g^_j) u^_j w^_j, with w^_j in few bits. In a third way
  channels  the inputs of every projection are ranked by |x_i| ||W_i - w^_i||, which needs no estimate, and x_i w^_i stands for W_i.
What is missing on average is added: b = E[y - y^]. Of channels, w^ in 4 and 8 bits are the blocks that kernels read (Q4_0,
Q8_0). For weights that are kept in few bits, few bits are the first of theirs (bit planes): what is computed exactly is not
read twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from moyu import kernels
from moyu.errors import UserError
from moyu.methods import selection
from moyu.methods.base import (
    Acts,
    Family,
    Granularity,
    Memory,
    Method,
    Rows,
    Site,
    SiteParams,
    neuron_site,
    projection_sites,
)
from moyu.weights import FORMATS, QUANTISED, Format, Stored
from moyu.weights.few_bits import GROUP, dequantize, quantize

WAYS = ("svd", "copy", "channels")
KIND_OF: Mapping[int, Format] = {FORMATS[name].bits: FORMATS[name] for name in QUANTISED}
DAMPING = 1e-3  # of the mean second moment, for inputs that calibration hardly saw


@dataclass(frozen=True)
class Estimate(Method):
    """Own; near Prox (arXiv 2607.27591), SparseInfer (arXiv 2411.12692) and SVD predictors of ReGLU models.

    way: "svd", "copy" or "channels".
    bits: bits of the factors or of the copy, 1 .. 8.
    rank: rank over d, for "svd", in (0, 1].
    rest: bits of the weights of what is not computed exactly, 0 .. 8; 0: it gives nothing. Kernels have 0, 4 and 8, of channels.
    stored: bits the model's weights are kept in, 16 or 2 .. 8; below 16, few bits are their first ones.
    weighted: rank by what is lost, |x_i| ||W_i - w^_i||; else by |x_i| alone.
    bias: add what is missing on average.
    """

    way: str = "channels"
    bits: int = 4
    rank: float = 0.25
    rest: int = 4
    stored: int = 16
    weighted: bool = True
    bias: bool = True

    name: ClassVar[str] = "estimate"
    paper: ClassVar[str] = "own"
    family: ClassVar[Family] = "own"
    granularity: ClassVar[Granularity] = "token"
    by_magnitude: ClassVar[bool] = True  # of channels
    divides: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.way not in WAYS:
            raise ValueError(f"way must be one of {', '.join(WAYS)}, not {self.way!r}")
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits must be in 1 .. 8, not {self.bits}")
        if not 0 < self.rank <= 1:
            raise ValueError(f"rank must be in (0, 1], not {self.rank}")
        if not 0 <= self.rest <= 8:
            raise ValueError(f"rest must be in 0 .. 8, not {self.rest}")
        if self.stored != 16 and not 2 <= self.stored <= 8:
            raise ValueError(f"stored must be 16 or in 2 .. 8, not {self.stored}")

    @property
    def nested(self) -> bool:
        """Whether few bits are the first ones of the weights, and not read again with the others."""
        return self.stored < 16

    @property
    def in_blocks(self) -> bool:
        """Whether the rest is a copy in blocks that kernels read."""
        return self.way == "channels" and not self.nested and self.rest in KIND_OF

    @property
    def kernels_decide(self) -> bool:
        return self.in_blocks or not self.rest

    def settings_for(self, bits: int, planes: bool = False) -> tuple[Method, ...]:
        if bits == 16:
            return tuple(Estimate(rest=b) for b in (0, *KIND_OF))
        own: dict[str, Any] = {"bias": False}  # at few bits a weight a bias costs more than it gives, on narrow models
        if planes:
            own["stored"] = bits
        rests = range(min(bits, 3)) if planes else (0, *(b for b in KIND_OF if b < bits))
        ways = [Estimate(rest=b, weighted=w, **own) for b in rests for w in (True, False)]
        return (*ways, Estimate("copy", 2, rest=0, stored=bits)) if planes else tuple(ways)

    def sites(self, block) -> tuple[Site, ...]:
        if self.way == "channels":
            return projection_sites(block)
        return (neuron_site(block, "mlp_in"),) if block.has_ffn else ()

    def prepare(self, site: Site, acts: Acts) -> Mapping[str, Tensor]:
        buffers, parts, given = {}, {}, 0.0
        if self.way == "channels":
            last = acts.weights[site.linears[0]].float()
        else:
            last = acts.weights["down"].float()
            names = [n for n in ("gate", "up") if n in acts.weights]
            stack = torch.cat([acts.weights[n] for n in names]).float()  # (F, d), F = f or 2 f
            buffers |= {f"{n}.bias": acts.biases[n].clone() for n in names if n in acts.biases}
            if self.way == "svd":
                rank = max(1, round(self.rank * stack.shape[1]))
                parts["outer"], parts["inner"] = factors(stack, acts.met("mlp_in"), rank)
            else:
                parts["rows"] = stack
        if self.in_blocks:
            copy = KIND_OF[self.rest].store(last).laid_out("columns")
            buffers["rest.quants"], buffers["rest.scales"] = copy.tensors
            given = copy.values()
        elif self.rest:
            parts["rest"] = last.t()  # (units, q)
        for name, weight in parts.items():
            bits = self.rest if name == "rest" else self.bits
            first = self.nested and name in ("rest", "rows")
            codes, scales = first_bits(weight, self.stored, bits) if first else quantize(weight, bits)
            buffers[f"{name}.codes"], buffers[f"{name}.scales"] = codes, scales.half()
        if self.weighted:
            if "rest" in parts:
                given = self._weight("rest", last, buffers).t()
            buffers["norms"] = (last - given).norm(dim=0)
        return buffers

    def fit(self, site: Site, acts: Acts, target: float) -> SiteParams:
        params = super().fit(site, acts, target)
        params = dataclasses.replace(
            params, buffers={**params.buffers, "skipped": torch.tensor([target], device=acts.met(site.reads).device)}
        )
        if target == 0.0 or not self.bias:
            return params
        x = acts.met(site.reads)
        mask = selection.select(self.score(x, acts.rows, site, params, {}), params.rule)
        exact, name = (x, site.linears[0]) if self.way == "channels" else (acts.met("mid"), "down")
        missing = functional.linear(torch.where(mask, 0, exact), acts.weights[name])  # (N, q)
        rest = self.rest_of(x, mask, site, params)
        missing = missing if rest is None else missing - rest
        return dataclasses.replace(params, bias=missing.mean(0))

    def factors(self, site: Site, params: SiteParams) -> Tensor | None:
        return params.buffers.get("norms")

    def score(self, x, rows: Rows, site: Site, params: SiteParams, memory: Memory):
        value = x if self.way == "channels" else self.values(x, site, params)
        norms = params.buffers.get("norms")
        return value.abs() if norms is None else value.abs() * norms.to(value)  # (N, units)

    def values(self, x: Tensor, site: Site, params: SiteParams) -> Tensor:
        """The estimate of the neurons' activations, (N, d) -> (N, f)."""
        if self.way == "svd":
            found = functional.linear(
                functional.linear(x, self._weight("inner", x, params.buffers)), self._weight("outer", x, params.buffers)
            )
        else:
            found = functional.linear(x, self._weight("rows", x, params.buffers))  # (N, F)
        act, f = kernels.activation(site.act or "identity"), site.units
        sides = [found[:, :f], found[:, f:]] if found.shape[1] > f else [found]
        names = ("gate", "up") if len(sides) == 2 else ("up",)
        biases = [params.buffers.get(f"{n}.bias") for n in names]
        sides = [s if b is None else s + b.to(s) for s, b in zip(sides, biases, strict=True)]
        return act(sides[0]) * sides[1] if len(sides) == 2 else act(sides[0])

    def rest_blocks(self, site: Site, params: SiteParams) -> Stored | None:
        if not self.in_blocks:
            return None
        if "rest.quants" not in params.buffers:
            raise UserError(
                "this plan of `estimate` is of a version without kernels", "make it again: `moyu calibrate`"
            )
        quants, scales = params.buffers["rest.quants"], params.buffers["rest.scales"]
        return Stored(KIND_OF[self.rest], "columns", (quants, scales), (scales.shape[1], len(quants)))

    def rest_of(self, x: Tensor, mask: Tensor, site: Site, params: SiteParams) -> Tensor | None:
        if self.in_blocks or not self.rest:
            return super().rest_of(x, mask, site, params)
        value = x if self.way == "channels" else self.values(x, site, params)
        return torch.where(mask, 0, value) @ self._weight("rest", x, params.buffers)  # (N, q)

    def _weight(self, name: str, like: Tensor, buffers: Mapping[str, Tensor]) -> Tensor:
        codes, scales = buffers[f"{name}.codes"], buffers[f"{name}.scales"]
        bits = self.rest if name == "rest" else self.bits
        return dequantize(codes, scales.float(), bits, _group(codes, scales)).to(like)

    def score_bytes(self, site: Site, params: SiteParams) -> int:
        """Codes count in their bits and with their scales; where only what is skipped is read, at the target.

        A block's scale is of 32 channels, and is read with any of them.
        """
        skipped = float(params.buffers["skipped"])
        total = 0.0
        for name, buffer in params.buffers.items():
            part, _, kind = name.partition(".")
            if kind == "codes":
                alone = part == "rest" or (part == "rows" and self.nested)
                bits = self.rest if part == "rest" else self.bits
                scales = params.buffers[f"{part}.scales"].nbytes
                total += (buffer.numel() * bits / 8 + scales) * (skipped if alone else 1.0)
            elif kind == "quants":
                total += buffer.nbytes * skipped + params.buffers["rest.scales"].nbytes * (skipped > 0)
            elif kind == "bias" or name == "norms":
                total += buffer.nbytes
        return round(total)


def first_bits(weight: Tensor, whole: int, bits: int) -> tuple[Tensor, Tensor]:
    """The first `bits` of the codes (q, n) that a weight has in `whole` bits, and the scale of each row that fits best.

    One scale a row: the groups' own would weigh half a bit a weight, as much as half of one plane.
    """
    codes = quantize(weight, whole)[0] >> (whole - bits)
    levels = dequantize(codes, torch.ones(len(codes), 1, device=codes.device), bits, codes.shape[1])
    return codes, (weight.float() * levels).sum(1, keepdim=True) / levels.square().sum(1, keepdim=True)


def _group(codes: Tensor, scales: Tensor) -> int:
    """Weights that share a scale: a whole row, or the usual group."""
    return codes.shape[1] if scales.shape[1] == 1 else GROUP


def factors(weight: Tensor, x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(q, r), (r, n) whose product M has the least sum of ||(W - M) x||^2 over rows x (N, n), of all of rank r."""
    wide = x.double()
    second = wide.t() @ wide / len(wide)  # (n, n)
    second += DAMPING * second.diagonal().mean() * torch.eye(len(second), dtype=second.dtype, device=x.device)
    values, vectors = torch.linalg.eigh(second)
    root, inverse = vectors * values.sqrt(), vectors / values.sqrt()  # C = root root', inverse' root = 1
    u, s, v = torch.linalg.svd(weight.double() @ root, full_matrices=False)
    share = s[:rank].sqrt()
    return (u[:, :rank] * share).float(), (share[:, None] * (v[:rank] @ inverse.t())).float()
