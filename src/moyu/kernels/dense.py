"""Dense products of many rows (a prompt's) on weights in any layout.

torch multiplies 16-bit matrices well where the processor has instructions for it. Where it has none, torch's product takes
10 GFLOP/s on row-major weights and a fortieth of that on input-major ones (two cores of a Zen 3, AVX2), and its float32
product 60 and more on both: there the weights are widened, a block of outputs at a time, and multiplied in float32.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from moyu.kernels import cpu

BLOCK = 1 << 20  # widened elements at a time: they stay in the cache
FEW_ROWS = 32  # that the kernels take at once: they read 16 bits, and no more than once


@lru_cache
def _torch_is_fast(dtype: torch.dtype) -> bool:
    """Whether oneDNN has products of this type for this processor."""
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype not in supported or not torch.backends.mkldnn.is_available() or bool(supported[dtype]())


def helps(x: Tensor) -> bool:
    """Whether `product` is another computation than torch's own: on CPUs without 16-bit products, outside of gradients."""
    return x.device.type == "cpu" and not _torch_is_fast(x.dtype) and not torch.is_grad_enabled()


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, (N, n) and (q, n) -> (N, q) in x's dtype; sums in float32 where `helps(x)`.

    `weight` may have any strides. `out` (N, q), contiguous: memory for the result; it must not be seen by gradients.
    """
    if not helps(x):
        if out is None:
            return functional.linear(x, weight, bias)
        return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)
    (rows, n), q = x.shape, len(weight)
    if rows <= FEW_ROWS and cpu.unavailable() is None and 1 in weight.stride():
        y = cpu.linear(x, weight, bias)
        return y if out is None else out.copy_(y)
    out = x.new_empty(rows, q) if out is None else out
    wide = x.float()
    count = max(1, min(q, BLOCK // n))
    weights, sums = torch.empty(count * n), torch.empty(rows * count)
    for start in range(0, q, count):
        part = weight[start : start + count]
        size = len(part)
        # Widened as it lies: a transposing copy takes several times as long.
        if part.stride(1) == 1:
            block = weights[: size * n].view(size, n).copy_(part).t()
        else:
            block = weights[: size * n].view(n, size).copy_(part.t())
        y = torch.mm(wide, block, out=sums[: rows * size].view(rows, size))
        out[:, start : start + size] = y if bias is None else y.add_(bias[start : start + size])
    return out
