"""Modules that hold weights in blocks, and what a model's weights are kept as."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from moyu import kernels
from moyu.weights.blocks import Blocks, Kind, Order

FEW_ROWS = 8  # up to these, integer products beat dequantising the whole weight first


class _Quantised(nn.Module):
    """Blocks as buffers: integers, which no cast of the model touches, scales as the bits of fp16.

    What it computes in is the type of `like`, which is cast with the model.
    """

    quants: Tensor
    scale_bits: Tensor
    like: Tensor
    bias: nn.Parameter | None
    kind: Kind
    order: Order

    def __init__(self, blocks: Blocks, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        # tensors of its own over the same memory: `store` gives them other memory, and nobody else's may follow
        self.register_buffer("quants", blocks.quants.detach())
        self.register_buffer("scale_bits", blocks.scales.view(torch.int16))
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=blocks.quants.device), persistent=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        self.kind, self.outputs, self.order, self.inputs = blocks.kind, blocks.outputs, blocks.order, blocks.shape[1]

    @property
    def blocks(self) -> Blocks:
        """The live blocks."""
        return Blocks(
            self.kind, self.quants, self.scale_bits.view(torch.float16), self.outputs, self.order, self.inputs
        )

    def store(self, blocks: Blocks) -> None:
        """Hold the same weight in other memory or in another order; buffers keep their identity."""
        self.quants.data, self.scale_bits.data = blocks.quants, blocks.scales.view(torch.int16)
        self.order = blocks.order

    @property
    def weight(self) -> Tensor:
        """The weight (q, n) in the type that the module computes in, made anew each time."""
        return self.blocks.dequantise(self.like.dtype)

    def extra_repr(self) -> str:
        """Shape and kind."""
        q, n = self.blocks.shape
        return f"{n} -> {q}, {self.kind}"


class QuantisedLinear(_Quantised):
    """A linear whose weight (out, in) is kept as blocks."""

    def __init__(self, blocks: Blocks, bias: Tensor | None = None, dtype: torch.dtype = torch.float32) -> None:
        """bias: (out,) or None, in `dtype`, which is that of inputs and outputs."""
        super().__init__(blocks, bias, dtype)
        self.out_features, self.in_features = blocks.shape

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out): a few rows on the kernels, which round x; more with the dequantised weight."""
        few = x.numel() <= FEW_ROWS * self.in_features and self.order == "rows" and not x.requires_grad
        if few and kernels.serves(x):
            y = kernels.rows(x.reshape(-1, self.in_features), self.blocks, None, bias=self.bias)
            return y.reshape(*x.shape[:-1], self.out_features)
        return functional.linear(x, self.weight, self.bias)


class QuantisedEmbedding(_Quantised):
    """An embedding whose table (vocabulary, d) is kept as blocks; a tied head is a QuantisedLinear on the same ones."""

    def __init__(self, blocks: Blocks, dtype: torch.dtype = torch.float32) -> None:
        """dtype: of the rows that it gives."""
        super().__init__(blocks, None, dtype)
        self.num_embeddings, self.embedding_dim = blocks.shape

    def forward(self, ids: Tensor) -> Tensor:
        """(...) -> (..., d)."""
        return self.blocks.rows(ids, self.like.dtype)


def weight_format(model: nn.Module) -> str | None:
    """How a model's linears are kept: a kind of blocks (`q8_0`, `q4_0`), several joined by `+`, or None: as numbers."""
    kinds = sorted({m.kind for m in model.modules() if isinstance(m, QuantisedLinear)}, reverse=True)
    return "+".join(kinds) or None
