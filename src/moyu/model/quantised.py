"""Modules that hold quantised weights, and the format that a model's weights are in."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from moyu import kernels
from moyu.weights import Order, Stored

FEW_ROWS = 8  # up to these, integer products beat dequantising the whole weight first


class _Quantised(nn.Module):
    """A stored weight as buffers of integers (floats as their bits), which no cast of the model touches.

    What it computes in is the type of `like`, which is cast with the model.
    """

    like: Tensor
    bias: nn.Parameter | None
    order: Order

    def __init__(self, stored: Stored, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.format, self.shape = stored.format, stored.shape
        self.order: Order = stored.order
        self._dtypes: tuple[torch.dtype, ...] = ()
        self._twins: tuple[_Quantised, ...] = ()
        self._hold(stored)
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=stored.device), persistent=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    @property
    def _names(self) -> tuple[str, ...]:
        return tuple(f"part_{i}" for i in range(len(self._dtypes)))

    @property
    def blocks(self) -> Stored:
        """The live weight."""
        tensors = (self._buffers[name].view(d) for name, d in zip(self._names, self._dtypes, strict=True))  # pyright: ignore
        return Stored(self.format, self.order, tuple(tensors), self.shape)

    def store(self, stored: Stored) -> None:
        """Hold the same weight in other memory or in another order, here and in modules that are tied to this one."""
        for module in (self, *self._twins):
            module._hold(stored)

    def tie(self, other: _Quantised) -> None:
        """Let both hold one weight, in whatever order it is stored in later."""
        self._twins, other._twins = (*self._twins, other), (*other._twins, self)

    def _hold(self, stored: Stored) -> None:
        """Buffers that both orders have keep their identity."""
        before, self._dtypes = self._names, tuple(t.dtype for t in stored.tensors)
        for name in before[len(self._dtypes) :]:
            delattr(self, name)
        for name, tensor in zip(self._names, stored.tensors, strict=True):
            if name in before:
                self._buffers[name].data = _bits(tensor)  # pyright: ignore[reportOptionalMemberAccess]
            else:  # a tensor of its own over the same memory: `store` gives it other memory, and nobody else's may follow
                self.register_buffer(name, _bits(tensor.detach()))
        self.order = stored.order

    @property
    def weight(self) -> Tensor:
        """The weight (q, n) in the type that the module computes in, made anew each time."""
        return kernels.values(self.blocks, self.like.dtype)

    def extra_repr(self) -> str:
        """Shape and format."""
        q, n = self.shape
        return f"{n} -> {q}, {self.format.name}"


def _bits(tensor: Tensor) -> Tensor:
    """Floats of 16 bits as integers of 16 bits; integers as they are."""
    return tensor.view(torch.int16) if tensor.is_floating_point() else tensor


class QuantisedLinear(_Quantised):
    """A linear whose weight (out, in) is quantised."""

    def __init__(self, stored: Stored, bias: Tensor | None = None, dtype: torch.dtype = torch.float32) -> None:
        """bias: (out,) or None, in `dtype`, which is that of inputs and outputs."""
        super().__init__(stored, bias, dtype)
        self.out_features, self.in_features = stored.shape

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out): a few rows on the kernels, which round x; more with the dequantised weight."""
        few = x.numel() <= FEW_ROWS * self.in_features and not x.requires_grad
        if few and kernels.serves(x, self.format):
            y = kernels.whole(x.reshape(-1, self.in_features), self.blocks, bias=self.bias)
            return y.reshape(*x.shape[:-1], self.out_features)
        return functional.linear(x, self.weight, self.bias)


class QuantisedEmbedding(_Quantised):
    """An embedding whose table (vocabulary, d) is quantised; a tied head is a QuantisedLinear on the same weight."""

    def __init__(self, stored: Stored, dtype: torch.dtype = torch.float32) -> None:
        """dtype: of the rows that it gives."""
        super().__init__(stored, None, dtype)
        self.num_embeddings, self.embedding_dim = stored.shape

    def forward(self, ids: Tensor) -> Tensor:
        """(...) -> (..., d)."""
        return self.blocks.pieces(ids.flatten(), self.like.dtype).unflatten(0, ids.shape)


def weight_format(model: nn.Module) -> str | None:
    """The format of a model's linears (`q8_0`, `q4_0`), several joined by `+`; None: plain numbers."""
    names = sorted({m.format.name for m in model.modules() if isinstance(m, QuantisedLinear)}, reverse=True)
    return "+".join(names) or None
