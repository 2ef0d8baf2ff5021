"""One row of x and packed weights on a GPU: what is kept is listed first, as `single` does for plain weights.

A program reads whole packed rows: 16 bytes a thread, the scale of a block applied to the block's sum (projections) or to its
32 products (sums of columns). Two 4-bit neighbours share a byte, so that even and odd elements are summed apart.
"""

# pyright: reportInvalidTypeForm=false, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (Triton's launches and constant arguments have no types.)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moyu.kernels.gpu.common import ACTS, INTERPRETED, Pieces, inner, tickets
from moyu.kernels.gpu.many import _activation
from moyu.kernels.gpu.single import SHARE, _bring_together, _configs, _list

ROWS = _configs(
    ("PROGRAMS", "BLOCK_J"),
    (
        (3, 2, 4),
        (528, 1, 4),
        (1056, 1, 4),
        (528, 2, 4),
        (1056, 2, 4),
        (528, 4, 4),
        (528, 4, 8),
        (264, 8, 8),
        (1056, 2, 8),
    ),
)
SUMS = _configs(
    ("SPLITS", "BLOCK_J", "BLOCKS"),
    (
        (3, 4, 1, 4),
        (32, 16, 8, 4),
        (64, 16, 8, 4),
        (16, 16, 8, 4),
        (32, 32, 8, 4),
        (32, 16, 16, 4),
        (64, 8, 16, 4),
        (32, 32, 16, 8),
        (16, 64, 8, 8),
    ),
)


def neurons(x: Tensor, gate: Pieces | None, up: Pieces, down: Pieces, mask: Tensor, act: str) -> Tensor:
    """`kernels.neurons` for x (1, d), d up to ONE_ROW_WIDEST: (1, d_out) in x's dtype."""
    picks = _listed(mask)
    values = torch.empty(up.shape[0], dtype=torch.float32, device=x.device)
    first, second = (up, None) if gate is None else (gate, up)  # the activation is of the first
    _launch_rows(x, first, second, None, picks, values, act)
    return _launch_sum(values, down, picks, None, x.dtype, listed=True)


def rows(x: Tensor, weight: Pieces, mask: Tensor | None, bias: Tensor | None) -> Tensor:
    """`kernels.rows` for x (1, n), n up to ONE_ROW_WIDEST: (1, q) in x's dtype."""
    make = torch.empty if mask is None else torch.zeros
    y = make(1, weight.shape[0], dtype=torch.float32 if INTERPRETED else x.dtype, device=x.device)
    _launch_rows(x, weight, None, bias, None if mask is None else _listed(mask), y, "identity", spread=True)
    return y.to(x.dtype)


def columns(x: Tensor, weight: Pieces, mask: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`kernels.columns` for x (1, n): (1, q) in `dtype`."""
    return _launch_sum(inner(x)[0], weight, _listed(mask), bias, dtype, listed=False)


def _listed(mask: Tensor) -> Tensor:
    """How many are kept, and which: (f + 1,) int32."""
    f = mask.shape[1]
    picks = torch.empty(f + 1, dtype=torch.int32, device=mask.device)
    _list[(max(1, triton.cdiv(f, SHARE)),)](
        inner(mask).view(torch.int8), picks, f, EVERY=triton.next_power_of_2(max(1, f)), PART=SHARE, num_warps=8
    )
    return picks


def _launch_rows(
    x: Tensor, first: Pieces, second: Pieces | None, bias: Tensor | None, picks: Tensor | None, out: Tensor, act: str,
    *, spread: bool = False,
) -> None:  # fmt: skip
    m, n = first.shape
    if m == 0:
        return
    _rows[lambda meta: (meta["PROGRAMS"],)](
        inner(x), first.data, first.scales, None if second is None else second.data,
        None if second is None else second.scales, bias, picks, out, m, n,
        ACT=ACTS[act], BITS=first.bits, BLOCKS=triton.next_power_of_2(n // 32), SPREAD=spread,
    )  # fmt: skip


def _launch_sum(
    v: Tensor, weight: Pieces, picks: Tensor, bias: Tensor | None, dtype: torch.dtype, *, listed: bool
) -> Tensor:
    m, n = weight.shape
    y = torch.empty(1, n, dtype=torch.float32 if INTERPRETED else dtype, device=v.device)
    if m == 0 or n == 0:
        return (y.zero_() if bias is None else y.copy_(bias)).to(dtype)
    partial = torch.empty(max(c.kwargs["SPLITS"] for c in SUMS), n, dtype=torch.float32, device=v.device)
    _sum[lambda meta: (triton.cdiv(n, 32 * meta["BLOCKS"]), meta["SPLITS"])](
        v,
        weight.data,
        weight.scales,
        picks,
        bias,
        partial,
        tickets(v.device),
        y,
        n,
        m,
        BITS=weight.bits,
        LISTED=listed,
    )
    return y.to(dtype)


@triton.jit
def _halves(pair):
    """The even and the odd elements that bytes of 4-bit pairs stand for."""
    pair = pair.to(tl.int32)
    return ((pair & 15) - 8).to(tl.float32), ((pair >> 4) - 8).to(tl.float32)


@triton.jit
def _times(data, scales, j, here, even, odd, n, BITS: tl.constexpr, BLOCKS: tl.constexpr):
    """Pieces rows j (J,) times x, in BLOCKS blocks: x as it is (8 bits), or its even and odd elements (4 bits)."""
    block = tl.arange(0, BLOCKS)
    inside = here[:, None] & (block < n // 32)[None, :]
    scale = tl.load(scales + j[:, None] * (n // 32) + block[None, :], mask=inside, other=0.0).to(tl.float32)
    wide: tl.constexpr = 4 * BITS  # bytes of a block
    place = block[:, None] * wide + tl.arange(0, wide)[None, :]
    q = tl.load(data + j[:, None, None] * (n // 32 * wide) + place[None, :, :], mask=inside[:, :, None], other=0)
    if BITS == 8:
        part = tl.sum(q.to(tl.float32) * even[None, :, :], 2)
    else:
        low, high = _halves(q)
        part = tl.sum(low * even[None, :, :] + high * odd[None, :, :], 2)
    return tl.sum(part * scale, 1)


@triton.autotune(ROWS, key=["m", "n", "BITS", "SPREAD"], cache_results=not INTERPRETED)
@triton.jit
def _rows(
    x, first, first_scales, second, second_scales, bias, picks, out, m, n,
    ACT: tl.constexpr, BITS: tl.constexpr, BLOCKS: tl.constexpr, SPREAD: tl.constexpr, PROGRAMS: tl.constexpr,
    BLOCK_J: tl.constexpr,
):  # fmt: skip
    """out[k] = act(first_j . x + bias_j) * (second_j . x) for the k-th kept row j; out[j] where they are spread."""
    wide: tl.constexpr = 4 * BITS
    step: tl.constexpr = 32 // wide  # elements of x from one byte to the next
    i = tl.arange(0, BLOCKS)[:, None] * 32 + tl.arange(0, wide)[None, :] * step
    even = tl.load(x + i, mask=i < n, other=0.0).to(tl.float32)
    odd = even
    if BITS == 4:
        odd = tl.load(x + i + 1, mask=i < n, other=0.0).to(tl.float32)
    end = m
    if picks is not None:
        end = tl.load(picks)
    for start in range(tl.program_id(0) * BLOCK_J, end, PROGRAMS * BLOCK_J):
        k = start + tl.arange(0, BLOCK_J)
        here = k < end
        j = k.to(tl.int64)
        if picks is not None:
            j = tl.load(picks + 1 + k, mask=here, other=0).to(tl.int64)
        z = _times(first, first_scales, j, here, even, odd, n, BITS, BLOCKS)
        if bias is not None:
            z += tl.load(bias + j, mask=here, other=0.0).to(tl.float32)
        z = _activation(z, ACT)
        if second is not None:
            z *= _times(second, second_scales, j, here, even, odd, n, BITS, BLOCKS)
        if SPREAD:
            tl.store(out + j, z.to(out.dtype.element_ty), mask=here)
        else:
            tl.store(out + k, z, mask=here)


@triton.autotune(SUMS, key=["m", "n", "BITS", "LISTED"], cache_results=not INTERPRETED)
@triton.jit
def _sum(
    v, data, scales, picks, bias, partial, tickets, y, n, m,
    BITS: tl.constexpr, LISTED: tl.constexpr, SPLITS: tl.constexpr, BLOCK_J: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """y = sum over the kept rows j of v_j (or, where the values are listed too, the k-th value) times row j, + bias."""
    tile, split = tl.program_id(0), tl.program_id(1)
    count = tl.load(picks)
    begin, end = count * split // SPLITS, count * (split + 1) // SPLITS
    wide: tl.constexpr = 4 * BITS
    block = tile * BLOCKS + tl.arange(0, BLOCKS)
    place = block[:, None] * wide + tl.arange(0, wide)[None, :]
    even = tl.zeros([BLOCK_J, BLOCKS, wide], tl.float32)
    odd = even
    for start in range(begin, end, BLOCK_J):
        k = start + tl.arange(0, BLOCK_J)
        here = k < end
        j = tl.load(picks + 1 + k, mask=here, other=0).to(tl.int64)
        if LISTED:
            value = tl.load(v + k, mask=here, other=0.0).to(tl.float32)
        else:
            value = tl.load(v + j, mask=here, other=0.0).to(tl.float32)
        inside = here[:, None] & (block < n // 32)[None, :]
        scale = tl.load(scales + j[:, None] * (n // 32) + block[None, :], mask=inside, other=0.0).to(tl.float32)
        q = tl.load(data + j[:, None, None] * (n // 32 * wide) + place[None, :, :], mask=inside[:, :, None], other=0)
        factor = (scale * value[:, None])[:, :, None]
        if BITS == 8:
            even += q.to(tl.float32) * factor
        else:
            low, high = _halves(q)
            even += low * factor
            odd += high * factor
    total = tl.sum(even, 0)  # (BLOCKS, wide)
    if BITS == 4:
        total = tl.interleave(total, tl.sum(odd, 0))  # (BLOCKS, 32)
    total = tl.reshape(total, (BLOCKS * 32,))
    d = tile * (BLOCKS * 32) + tl.arange(0, BLOCKS * 32)
    _bring_together(total, partial, tickets, bias, y, d, n, tile, split, SPLITS, BLOCKS * 32)
