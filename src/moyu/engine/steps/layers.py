"""What a plain decoder layer is made of, and how the extension is told about it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moyu.engine.sites import SiteState
from moyu.kernels import cpu
from moyu.kernels.checks import address, check_stored
from moyu.methods.magnitude import factors_of, remainder_of
from moyu.methods.selection import Threshold
from moyu.methods.values import NOTHING
from moyu.model.anatomy import Block
from moyu.weights import Stored

SEPARATE, NEURONS, GATE_FIRST, UP_FIRST = range(4)  # enum Network of kernels.h
LINEARS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(eq=False)
class Norm:
    """RMSNorm, or LayerNorm where `centred`. plus: what the module adds to its weight, in float."""

    module: nn.Module
    eps: float
    centred: bool
    plus: float = 0.0

    def native(self) -> Any:
        """The norm as the extension takes it."""
        norm, bias = cpu.extension().Norm(), getattr(self.module, "bias", None)
        norm.weight = self.module.weight.data_ptr()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        norm.bias = 0 if bias is None else bias.data_ptr()
        norm.eps, norm.centred, norm.plus = self.eps, self.centred, self.plus
        return norm


@dataclass(eq=False)
class PlainLayer:
    """A decoder layer whose parts are known; `native` is what the kernel is told about it."""

    module: nn.Module
    block: Block
    norms: dict[str, Norm]  # of: before_attention, q_norm, k_norm, after_attention, before_network, after_network
    index: int  # of its keys and values in a cache
    head_dim: int
    scale: float
    softcap: float  # of scores; 0 = none
    window: int  # positions that a row attends to; 0 = all
    rotary: int
    angles: int = 0  # which of the rotary embeddings
    states: list[SiteState] = field(default_factory=list)

    @property
    def weights(self) -> list[nn.Parameter]:
        """Every parameter of the layer."""
        return list(self.module.parameters())

    def state(self, **wanted: str) -> SiteState | None:
        """The site that skips `skips`, reads `reads`, or skips columns of `linear`."""
        for state in self.states:
            site = state.site
            if all(
                value in site.linears if key == "linear" else getattr(site, key) == value
                for key, value in wanted.items()
            ):
                return state
        return None

    @property
    def sequence_site(self) -> SiteState | None:
        """The site whose mask is known before the step."""
        return self.state(skips="neurons")

    def native(
        self, masked: bool = True, kept: list[Tensor] | None = None, dense: bool = False, first_bits: bool = False
    ) -> Any:
        """The layer as the extension takes it; pointers are those of the live parameters.

        A bias that the plan adds to is a copy. kept: takes these copies, which must live as long as the layer. dense: nothing is
        skipped and nothing of the plan is added; the weights lie as the plan's sites need them all the same. first_bits: of parted
        weights those alone are read.
        """
        extension, pieces, kept = cpu.extension(), self.block.pieces, [] if kept is None else kept
        layer = extension.Layer()
        for name, norm in self.norms.items():
            setattr(layer, name, norm.native())
        first = self.state(skips="rows")
        for name in LINEARS:
            if name in pieces:
                site = self.state(skips="columns", linear=name) or (first if name == "down" else None)
                linear = self._linear(name, site, kept, dense)
                linear.threshold = math.inf if first_bits and linear.parted else linear.threshold
                setattr(layer, name, linear)
        if self.sequence_site is not None and not dense:
            layer.down.bias = self._bias("down", self.sequence_site, kept)
        layer.act = cpu.activation_code(self.block.act or "identity")
        layer.head_dim, layer.scale, layer.softcap = self.head_dim, self.scale, self.softcap
        layer.window, layer.angles = self.window, self.angles
        layer.heads = pieces["q"].shape[0] // self.head_dim
        layer.kv_heads = pieces["k"].shape[0] // self.head_dim
        layer.network = SEPARATE
        if self.sequence_site is not None or not masked or (dense and first is not None):
            layer.network = NEURONS
        elif first is not None:
            layer.network = GATE_FIRST if first.site.reads == "gate" else UP_FIRST
        return layer

    def _linear(self, name: str, decides: SiteState | None, kept: list[Tensor], dense: bool) -> Any:
        piece = self.block.pieces[name]
        by_columns = decides is not None or (name == "down" and self.sequence_site is not None)
        linear = native_linear(piece.operand, piece.bias, by_columns)
        if decides is not None and not dense:
            linear.bias = self._bias(name, decides, kept)
            rest = remainder_of(decides.method, decides.site, decides.params)
            if rest is not None and rest.stored is not None:
                if rest.stored.shape != piece.shape:
                    raise ValueError(f"the copy of {name} is {rest.stored.shape}, not {piece.shape}")
                check_stored("decode", f"the copy of {name}", rest.stored)
                linear.rest = cpu.native_weight(rest.stored)
            linear.threshold = threshold(decides, piece.dtype)
            factors = self.factors(decides, piece.dtype)
            if factors is not None:
                units = piece.shape[1] if decides.site.skips == "columns" else self.block.neurons
                linear.factor = address(f"factors of {decides.site.key}", factors, (units,), torch.float32)
        return linear

    def _bias(self, name: str, state: SiteState, kept: list[Tensor]) -> int:
        """The address of a linear's bias with the plan's."""
        bias = state.whole_bias(name, self.block)
        if bias is None:
            return 0
        kept.append(bias)
        piece = self.block.pieces[name]
        return address(f"the bias of {name}", bias, (piece.shape[0],), piece.dtype)

    def factors(self, state: SiteState, dtype: torch.dtype) -> Tensor | None:
        """c of a score |x| * c, rounded as the score rounds it; kept alive by the site's state."""
        if state.factors is None:
            own = factors_of(state.method, state.site, state.params)
            state.factors = NOTHING if own is None else own.to(dtype).float().contiguous()
        return None if state.factors is NOTHING else state.factors


def native_linear(weight: Tensor | Stored, bias: Tensor | None, by_columns: bool = False) -> Any:
    """A linear as the extension takes it: (q, n), skipping nothing, by columns where those are contiguous.

    by_columns: what to take where rows and columns are both contiguous, in a weight of one row or one column.
    """
    linear = cpu.extension().Linear()
    linear.q, linear.n = weight.shape
    if isinstance(weight, Stored):
        codes, scales = weight.tensors[:2]
        if weight.order in ("planes", "parted"):
            first, linear.parted = weight.tensors[2], weight.order == "parted"
            linear.first, linear.first_stride = first.data_ptr(), first.stride(0)
        linear.by_columns, linear.kind = weight.order == "columns", cpu.format_code(weight.format)
        linear.weight, linear.stride = codes.data_ptr(), codes.stride(0)
        linear.scales, linear.scales_stride = scales.data_ptr(), scales.stride(0) * scales.element_size()
    else:
        linear.by_columns = weight.stride(0) == 1 if by_columns else weight.stride(1) != 1
        linear.stride = weight.stride(1) if linear.by_columns else weight.stride(0)
        linear.weight = weight.data_ptr()
    linear.bias = 0 if bias is None else bias.data_ptr()
    linear.threshold = -math.inf
    return linear


def threshold(state: SiteState, dtype: torch.dtype) -> float:
    """A site's threshold as torch compares scores of `dtype` with it: rounded to that type."""
    assert isinstance(state.params.rule, Threshold)
    return float(torch.tensor(state.params.rule.value, dtype=dtype))
