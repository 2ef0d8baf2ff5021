"""A quantiser of its own for the tests: 8-bit weights behind a tensor subclass, as torchao's are."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Rounded(Tensor):
    """Codes (out, in) int8 and scales (out, 1); a linear computes with them, nothing else does."""

    @staticmethod
    def __new__(cls, codes, scales):
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scales.dtype)

    def __init__(self, codes, scales):
        self.codes, self.scales = codes, scales

    def __tensor_flatten__(self):
        return ["codes", "scales"], None

    def dequantize(self):
        return self.codes * self.scales

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is functional.linear:
            x, weight, bias = (*args, *(kwargs or {}).values(), None)[:3]
            y = functional.linear(x, weight.codes.to(x.dtype)) * weight.scales.t()
            return y if bias is None else y + bias
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scales)
        raise NotImplementedError(f"{func} of quantised weights")


class Packed(Rounded):
    """One that does not say which values it stands for."""

    dequantize = Tensor.dequantize


def quantise(model: nn.Module, kind: type = Rounded) -> nn.Module:
    """Round the weights of every linear but the head."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            weight = module.weight.detach()
            scales = weight.abs().amax(1, keepdim=True) / 127
            module.weight = nn.Parameter(kind((weight / scales).round().to(torch.int8), scales), requires_grad=False)
    return model
