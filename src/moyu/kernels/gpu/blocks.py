"""Products by rows with weights in the formats of GGUF files, as they lie: codes are unpacked in registers, never stored.

x is taken as it is, not rounded to 8 bits as on a CPU. Products of one row are in float32; those of 2 to 16 rows run on the tensor
cores on values rounded to x's dtype. Sums are float32, in a fixed order.
"""

# pyright: reportInvalidTypeForm=false, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (Triton's launches and constant arguments have no types.)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moyu.kernels.gpu.common import INTERPRETED, KINDS, inner, output, tile_rows
from moyu.kernels.gpu.many import _dot
from moyu.weights import Stored

Q8, Q4, Q4_K, Q6_K = (tl.constexpr(KINDS[name]) for name in ("q8_0", "q4_0", "q4_k", "q6_k"))


def rows(x: Tensor, weight: Stored, mask: Tensor | None, bias: Tensor | None) -> Tensor:
    """`kernels.rows`."""
    x, mask = inner(x), None if mask is None else inner(mask)
    codes, scales = weight.tensors
    q, n = weight.shape
    y = output(x, q, x.dtype)
    if q == 0 or len(x) == 0:
        return y.to(x.dtype)
    plain, halves = scales.view(torch.uint8), scales.view(torch.float16)
    _rows[lambda meta: (triton.cdiv(q, meta["BLOCK_J"]),)](
        x, codes, plain, halves, None if mask is None else mask.view(torch.int8), bias, y, len(x), q,
        x.stride(0), codes.stride(0), plain.stride(0), halves.stride(0), 0 if mask is None else mask.stride(0),
        y.stride(0), n, KIND=KINDS[weight.format.name], ROWS=tile_rows(x),
    )  # fmt: skip
    return y.to(x.dtype)


def _configs() -> list[triton.Config]:
    """Candidates: outputs and groups of 32 inputs that a program takes at once, warps. The interpreter takes the first."""
    options = (
        (16, 2, 4, 1), (1, 32, 4, 2), (1, 64, 4, 2), (2, 32, 4, 2), (2, 64, 8, 2), (4, 32, 4, 2), (8, 16, 4, 2),
        (16, 2, 4, 3), (16, 4, 4, 3), (32, 2, 4, 3), (32, 4, 4, 3), (64, 2, 4, 3), (64, 4, 8, 2),
    )  # fmt: skip
    found = [
        triton.Config({"BLOCK_J": j, "BLOCK_G": g}, num_warps=warps, num_stages=stages)
        for j, g, warps, stages in options
    ]
    return found[:1] if INTERPRETED else found[1:]


def _prune(configs: list, named: dict, **sizes: int) -> list:
    """The tensor cores take 16 outputs and more, and tiles of few inputs; one row takes long lines."""
    many = sizes["ROWS"] == 16
    return [c for c in configs if (c.kwargs["BLOCK_J"] >= 16) == many] or configs


@triton.jit
def _scale(plain, halves, j, g, part, inside, plain_row, halves_row, n, KIND: tl.constexpr):
    """Scale and offset of group g of output j; part: which half of the group, where halves have their own. One shape, all."""
    blocks = n // 256
    if KIND == Q4_K:
        d = tl.load(halves + j * halves_row + g // 8, mask=inside, other=0.0).to(tl.float32)
        low = tl.load(halves + j * halves_row + blocks + g // 8, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(plain + j * plain_row + 4 * blocks + g, mask=inside, other=0).to(tl.float32)
        m = tl.load(plain + j * plain_row + 12 * blocks + g, mask=inside, other=0).to(tl.float32)
        scale, offset = d * s, -(low * m)
    elif KIND == Q6_K:
        d = tl.load(halves + j * halves_row + g // 8, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(plain + j * plain_row + 2 * blocks + 2 * g + part, mask=inside, other=0).to(tl.int8, bitcast=True)
        scale, offset = d * s.to(tl.float32), d * 0.0
    else:
        scale = tl.load(halves + j * halves_row + g, mask=inside, other=0.0).to(tl.float32)
        offset = scale * 0.0
    return scale, offset


@triton.jit
def _codes(codes, j, g, b, half, inside, codes_row, groups, KIND: tl.constexpr):
    """What the code of number `b` (below 16, or 32 of Q8_0) of a half of group g of output j stands for, float32."""
    if KIND == Q8:
        level = tl.load(codes + j * codes_row + g * 32 + b, mask=inside, other=0).to(tl.float32)
    else:
        byte = tl.load(codes + j * codes_row + g * 16 + b, mask=inside, other=0).to(tl.int32)
        low = (byte >> (4 * half)) & 15
        if KIND == Q6_K:
            more = tl.load(codes + j * codes_row + groups * 16 + g * 8 + b % 8, mask=inside, other=0).to(tl.int32)
            low = low + ((more >> (2 * (2 * half + b // 8))) & 3) * 16 - 32
        if KIND == Q4:
            low = low - 8
        level = low.to(tl.float32)
    return level


@triton.autotune(_configs(), key=["n", "q", "ROWS", "KIND"], prune_configs_by={"early_config_prune": _prune},
                 cache_results=not INTERPRETED)  # fmt: skip
@triton.jit
def _rows(
    x, codes, plain, halves, mask, bias, y, count, q, x_row, codes_row, plain_row, halves_row, mask_row, y_row, n,
    KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """y[r, j] = x[r] . w[j] + bias[j] where the mask keeps it, else 0; BLOCK_J outputs a program."""
    groups = (n + 31) // 32
    wide: tl.constexpr = 32 if KIND == Q8 else 16  # pyright: ignore -- numbers of a group that are taken at once
    parts: tl.constexpr = 32 // wide
    j = tl.program_id(0).to(tl.int64) * BLOCK_J + tl.arange(0, BLOCK_J)
    r = tl.arange(0, ROWS)
    own = (r < count)[:, None] & (j < q)[None, :]
    inside = own
    if mask is not None:
        own = own & (tl.load(mask + r[:, None] * mask_row + j[None, :], mask=own, other=0) != 0)
    keep = tl.max(own.to(tl.int32), 0) != 0  # (J,)
    if ROWS == 1:
        sums = tl.zeros([BLOCK_J, BLOCK_G], tl.float32)
        jj = j[:, None]
        for start in range(0, groups, BLOCK_G):
            g = start + tl.arange(0, BLOCK_G)
            b = tl.arange(0, wide)
            there = keep[:, None] & (g < groups)[None, :]
            for half in tl.static_range(parts):
                i = g[:, None] * 32 + half * 16 + b[None, :]  # (G, wide)
                value = tl.load(x + i, mask=i < n, other=0.0).to(tl.float32)
                level = _codes(
                    codes,
                    jj[:, :, None],
                    g[None, :, None],
                    b[None, None, :],
                    half,
                    there[:, :, None],
                    codes_row,
                    groups,
                    KIND,
                )
                scale, offset = _scale(plain, halves, jj, g[None, :], half, there, plain_row, halves_row, n, KIND)
                sums += tl.sum(level * value[None, :, :], 2) * scale
                if KIND == Q4_K:
                    sums += offset * tl.sum(value, 1)[None, :]
        total = tl.sum(sums, 1)[None, :]
    else:
        total = tl.zeros([ROWS, BLOCK_J], tl.float32)
        k = tl.arange(0, BLOCK_G * wide)
        for start in range(0, groups, BLOCK_G):
            g = start + k // wide
            b = k % wide
            there = keep[None, :] & (g < groups)[:, None]  # (K, J)
            for half in tl.static_range(parts):
                i = g * 32 + half * 16 + b
                value = tl.load(
                    x + r[:, None] * x_row + i[None, :], mask=(r < count)[:, None] & (i < n)[None, :], other=0.0
                )
                level = _codes(codes, j[None, :], g[:, None], b[:, None], half, there, codes_row, groups, KIND)
                scale, offset = _scale(
                    plain, halves, j[None, :], g[:, None], half, there, plain_row, halves_row, n, KIND
                )
                total = _dot(value, (level * scale + offset).to(x.dtype.element_ty), total)
    if bias is not None:
        total += tl.load(bias + j, mask=keep, other=0.0).to(tl.float32)[None, :]
    tl.store(y + r[:, None] * y_row + j[None, :], tl.where(own, total, 0.0).to(y.dtype.element_ty), mask=inside)
