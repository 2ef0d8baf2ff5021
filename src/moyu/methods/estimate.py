"""Estimate: what a token needs most is computed exactly, what it needs least from few bits or not at all.

Neurons are ranked by an estimate of what they add, |act(g^_j) u^_j| ||w_j||, with w_j column j of down. g^ and u^ come from
  svd     U V x, the rank-r map with the least error on the inputs of the calibration text (Eckart-Young), stored in few bits; or
  copy    a copy of gate and up in few bits.
A skipped neuron may still add act(g^_j) u^_j w^_j, with w^_j a copy of w_j in few bits. The third way needs no estimate:
  channels  the inputs of every projection are ranked by |x_i| ||W_i - w^_i||, and a skipped one adds x_i w^_i.
The mean of what is still missing is added as a bias: b = E[y - y^]. For `channels` a copy in 4 or 8 bits is stored as Q4_0 or
Q8_0, which the kernels read. If the model is itself kept in few bits, the copy is the first bits of the stored codes (bit
planes), so nothing is read twice.
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
from moyu.methods.base import Family, Method
from moyu.methods.knobs import knob
from moyu.methods.magnitude import Magnitude, rest_of
from moyu.methods.remainder import FewBits, Remainder
from moyu.methods.selection import select
from moyu.methods.shapes import few_bits, shape
from moyu.methods.sites import neuron_sites, projection_sites
from moyu.methods.values import Acts, Site, SiteParams
from moyu.weights import FORMATS, QUANTISED, Stored
from moyu.weights.few_bits import GROUP, dequantize, quantize
from moyu.weights.grouped import Grouped

WAYS = ("svd", "copy", "channels")
KIND_OF: Mapping[int, Grouped] = {f.bits: f for name in QUANTISED if isinstance(f := FORMATS[name], Grouped)}
DAMPING = 1e-3  # of the mean second moment, for inputs that calibration hardly saw


@dataclass(frozen=True)
class Estimate(Magnitude):
    """Own; near Prox (arXiv 2607.27591), SparseInfer (arXiv 2411.12692) and SVD predictors of ReGLU models.

    way: "svd", "copy" or "channels".
    bits: bits of the SVD's factors or of the copy of gate and up, 1 .. 8.
    rank: rank of the SVD over d, in (0, 1].
    rest: bits of the copy that stands in for skipped weights, 0 .. 8; with 0 what is skipped adds nothing. The kernels read
    copies of 4 and 8 bits, for "channels".
    stored: bits that the model's weights are kept in, 16 or 2 .. 8; below 16 the copies are their first bits.
    weighted: rank inputs by what skipping loses, |x_i| ||W_i - w^_i||; else by |x_i| alone.
    bias: add the mean of what is missing.
    """

    way: str = knob("channels", one_of=WAYS)
    bits: int = knob(4, at_least=1, at_most=8)
    rank: float = knob(0.25, above=0, at_most=1)
    rest: int = knob(4, at_least=0, at_most=8)
    stored: int = knob(16, one_of=(16, *range(2, 9)))
    weighted: bool = True
    bias: bool = True

    name: ClassVar[str] = "estimate"
    paper: ClassVar[str] = "own"
    family: ClassVar[Family] = "own"
    divides: ClassVar[bool] = True

    @property
    def nested(self) -> bool:
        """Whether the copies are the first bits of the stored weights, and so are not read twice."""
        return self.stored < 16

    @property
    def in_blocks(self) -> bool:
        """Whether the copy of skipped weights is in blocks that kernels read."""
        return self.way == "channels" and not self.nested and self.rest in KIND_OF

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
        return neuron_sites(block, "mlp_in")

    def shapes(self, site: Site, block):
        """A copy in blocks, or matrices in few bits with a scale for every 32 weights; copies that are first bits have one a row."""
        first, names = block.pieces[site.linears[0]], [n for n in ("gate", "up") if n in site.linears]
        outputs, width = block.pieces[site.linears[-1]].shape[0], first.shape[1]
        found = {"skipped": shape(1)} | ({"norms": shape("units")} if self.weighted else {})
        if self.way != "channels":
            found |= {f"{n}.bias": shape("units") for n in names if block.pieces[n].bias is not None}
            stacked, rank = len(names) * site.units, max(1, round(self.rank * width))
            if self.way == "svd":
                found |= few_bits("outer", stacked, rank, GROUP) | few_bits("inner", rank, width, GROUP)
            else:
                found |= few_bits("rows", stacked, width, width if self.nested else GROUP)
        if self.in_blocks:
            kind = KIND_OF[self.rest]
            found["rest.quants"] = shape(width, kind.column_bytes(outputs), kind=kind.code)
            found["rest.scales"] = shape(-(-width // kind.group), outputs, kind=torch.float16)
        elif self.rest:
            found |= few_bits("rest", site.units, outputs, outputs if self.nested else GROUP)
        return found

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
                parts["outer"], parts["inner"] = best_map(stack, acts.met("mlp_in"), rank)
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
                given = self._few_bits("rest", buffers).dequantise(last).t()
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
        mask = select(self.score(x, acts.rows, site, params, {}), params.rule)
        exact, name = (x, site.linears[0]) if self.way == "channels" else (acts.met("mid"), "down")
        missing = functional.linear(torch.where(mask, 0, exact), acts.weights[name])  # (N, q)
        rest = rest_of(self, x, mask, site, params)
        missing = missing if rest is None else missing - rest
        return dataclasses.replace(params, bias=missing.mean(0))

    def factors(self, site: Site, params: SiteParams) -> Tensor | None:
        return params.buffers.get("norms")

    def values(self, x: Tensor, site: Site, params: SiteParams) -> Tensor:
        """Inputs as they are, (N, n); of neurons the estimate of their activations, (N, d) -> (N, f)."""
        if self.way == "channels":
            return x
        found = x
        for name in ("inner", "outer") if self.way == "svd" else ("rows",):
            found = functional.linear(found, self._few_bits(name, params.buffers).dequantise(x))  # (N, F) at the end
        act, f = kernels.activation(site.act or "identity"), site.units
        sides = [found[:, :f], found[:, f:]] if found.shape[1] > f else [found]
        names = ("gate", "up") if len(sides) == 2 else ("up",)
        biases = [params.buffers.get(f"{n}.bias") for n in names]
        sides = [s if b is None else s + b.to(s) for s, b in zip(sides, biases, strict=True)]
        return act(sides[0]) * sides[1] if len(sides) == 2 else act(sides[0])

    def remainder(self, site: Site, params: SiteParams) -> Remainder | None:
        if not self.rest:
            return None
        if not self.in_blocks:
            return Remainder(self._few_bits("rest", params.buffers))
        if "rest.quants" not in params.buffers:
            raise UserError(
                "this plan of `estimate` is of a version without kernels", "make it again: `moyu calibrate`"
            )
        quants, scales = params.buffers["rest.quants"], params.buffers["rest.scales"]
        return Remainder(Stored(KIND_OF[self.rest], "columns", (quants, scales), (scales.shape[1], len(quants))))

    def _few_bits(self, name: str, buffers: Mapping[str, Tensor]) -> FewBits:
        bits = self.rest if name == "rest" else self.bits
        return FewBits(buffers[f"{name}.codes"], buffers[f"{name}.scales"], bits)

    def score_bytes(self, site: Site, params: SiteParams) -> int:
        """Codes count with their bits and scales. A copy that is read for skipped units alone counts for the target's share.

        One row of scales belongs to 32 channels, and is read with any of them.
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


def best_map(weight: Tensor, x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(q, r), (r, n) whose product M has the least sum of ||(W - M) x||^2 over rows x (N, n), of all of rank r."""
    wide = x.double()
    second = wide.t() @ wide / len(wide)  # (n, n)
    second += DAMPING * second.diagonal().mean() * torch.eye(len(second), dtype=second.dtype, device=x.device)
    values, vectors = torch.linalg.eigh(second)
    root, inverse = vectors * values.sqrt(), vectors / values.sqrt()  # C = root root', inverse' root = 1
    u, s, v = torch.linalg.svd(weight.double() @ root, full_matrices=False)
    share = s[:rank].sqrt()
    return (u[:, :rank] * share).float(), (share[:, None] * (v[:rank] @ inverse.t())).float()
