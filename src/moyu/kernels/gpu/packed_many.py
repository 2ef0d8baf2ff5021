"""2 to 16 rows of x on a GPU with packed weights (and one row that is too long for `packed_single`)."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moyu.kernels.gpu.common import ACTS, INTERPRETED, Pieces, inner, output, tickets, tile_rows
from moyu.kernels.gpu.many import _activation, _dot

MAX_SPLITS = 32
_DOTS = {torch.float32: None, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _configs(options: list[tuple[dict[str, int], int]]) -> list[triton.Config]:
    """The first is the interpreter's, which takes no time over choosing."""
    found = [triton.Config(sizes, num_warps=warps, num_stages=2) for sizes, warps in options]
    return found[:1] if INTERPRETED else found[1:]


PROJECT = _configs(
    [({"BLOCK_J": 16, "BLOCKS": 2}, 4)]
    + [({"BLOCK_J": j, "BLOCKS": blocks}, warps) for j, blocks, warps in ((16, 2, 4), (16, 4, 4), (16, 4, 8))]
    + [
        ({"BLOCK_J": j, "BLOCKS": blocks}, warps)
        for j, blocks, warps in ((1, 64, 4), (2, 64, 4), (4, 32, 4), (8, 16, 4))
    ]
)
COMBINE = _configs(
    [({"BLOCK_J": 16, "BLOCKS": 1, "SPLITS": 3}, 4)]
    + [
        ({"BLOCK_J": j, "BLOCKS": blocks, "SPLITS": splits}, 4)
        for j, blocks in ((16, 8), (32, 8), (16, 16))
        for splits in (8, 16, 32)
    ]
)


def _prune(configs: list[triton.Config], _named: dict, **sizes: Any) -> list[triton.Config]:
    """The tensor cores take 16 rows of a weight and more."""
    return [c for c in configs if sizes["ROWS"] == 1 or c.kwargs["BLOCK_J"] >= 16]


def project(
    out: Tensor, x: Tensor, gate: Pieces | None, up: Pieces, mask: Tensor | None, bias: Tensor | None, act: str
) -> None:
    """out[r, j] (N, m) = act(gate_j . x_r) * (up_j . x_r + bias_j), or act(up_j . x_r + bias_j), 0 where r skips j."""
    x, mask = inner(x), None if mask is None else inner(mask)
    m, n = up.shape
    if m == 0 or len(x) == 0:
        return
    first = up if gate is None else gate
    _project[lambda meta: (triton.cdiv(m, meta["BLOCK_J"]),)](
        x, first.data, first.scales, up.data, up.scales, None if mask is None else mask.view(torch.int8), bias, out,
        len(x), m, n, x.stride(0), 0 if mask is None else mask.stride(0),
        ACT=ACTS[act], GATE=gate is not None, BITS=up.bits, BITS16=_DOTS[x.dtype], ROWS=tile_rows(x),
    )  # fmt: skip


def combine(v: Tensor, weight: Pieces, mask: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """y[r] (N, n) = sum over the j that r keeps of v[r, j] * weight_j + bias, in `dtype`."""
    v, mask = inner(v), inner(mask)
    m, n = weight.shape
    y = output(v, n, dtype)
    if n == 0 or len(v) == 0:
        return y.to(dtype)
    partial = torch.empty(MAX_SPLITS, len(v), n, dtype=torch.float32, device=v.device)
    _combine[lambda meta: (triton.cdiv(n, 32 * meta["BLOCKS"]), meta["SPLITS"])](
        v, mask.view(torch.int8), weight.data, weight.scales, bias, partial, tickets(v.device), y,
        len(v), m, n, v.stride(0), mask.stride(0), BITS=weight.bits, ROWS=tile_rows(v),
        BITS16=_DOTS[dtype],
    )  # fmt: skip
    return y.to(dtype)


@triton.jit
def _unpacked(data, scales, ids, keep, first, n, BITS: tl.constexpr, BLOCKS: tl.constexpr):
    """Blocks first .. first + BLOCKS of the rows `ids` (J,) that are kept, 0 elsewhere: (J, BLOCKS, 32) float32."""
    block = first + tl.arange(0, BLOCKS)
    row = ids.to(tl.int64)
    here = keep[:, None] & (block < n // 32)[None, :]
    scale = tl.load(scales + row[:, None] * (n // 32) + block[None, :], mask=here, other=0.0).to(tl.float32)
    place = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    if BITS == 8:
        q = tl.load(data + row[:, None, None] * n + place[None, :, :], mask=here[:, :, None], other=0).to(tl.float32)
    else:  # each byte is loaded for both its halves: halves put together by tl.interleave came wrong out of tl.dot
        pair = tl.load(data + row[:, None, None] * (n // 2) + place[None, :, :] // 2, mask=here[:, :, None], other=0)
        q = (((pair.to(tl.int32) >> (place % 2 * 4)[None, :, :]) & 15) - 8).to(tl.float32)
    return q * scale[:, :, None]


@triton.jit
def _fine_dot(a, b, c, BITS16: tl.constexpr):
    """c + a @ b of float32 tiles on the tensor cores: each is a sum of two 16-bit ones, lo @ lo is below the rounding."""
    if BITS16 is None:
        c = tl.dot(a, b, c, input_precision="ieee")
    else:
        a_hi, b_hi = a.to(BITS16), b.to(BITS16)
        a_lo, b_lo = (a - a_hi.to(tl.float32)).to(BITS16), (b - b_hi.to(tl.float32)).to(BITS16)
        c = _dot(a_lo, b_hi, c)
        c = _dot(a_hi, b_lo, c)
        c = _dot(a_hi, b_hi, c)
    return c


@triton.autotune(PROJECT, key=["m", "n", "BITS", "GATE", "ROWS"], prune_configs_by={"early_config_prune": _prune})
@triton.jit
def _project(
    x, gate, gate_scales, up, up_scales, mask, bias, out, count, m, n, x_row, mask_row,
    ACT: tl.constexpr, GATE: tl.constexpr, BITS: tl.constexpr, BITS16: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    j = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    r = tl.arange(0, ROWS)
    inside = (r < count)[None, :] & (j < m)[:, None]  # (J, R)
    own = inside
    if mask is not None:
        own = inside & (tl.load(mask + r[None, :] * mask_row + j[:, None], mask=inside, other=0) != 0)
    keep = tl.max(own.to(tl.int32), 1) != 0
    if ROWS == 1:
        g = tl.zeros([BLOCK_J, BLOCKS, 32], tl.float32)
        u = tl.zeros([BLOCK_J, BLOCKS, 32], tl.float32)
    else:
        g = tl.zeros([BLOCK_J, ROWS], tl.float32)
        u = tl.zeros([BLOCK_J, ROWS], tl.float32)
    for first in range(0, n // 32, BLOCKS):
        if ROWS == 1:
            place = (first + tl.arange(0, BLOCKS))[:, None] * 32 + tl.arange(0, 32)[None, :]
            values = tl.load(x + place, mask=place < n, other=0.0).to(tl.float32)[None, :, :]
            if GATE:
                g += _unpacked(gate, gate_scales, j, keep, first, n, BITS, BLOCKS) * values
            u += _unpacked(up, up_scales, j, keep, first, n, BITS, BLOCKS) * values
        else:
            k = first * 32 + tl.arange(0, BLOCKS * 32)
            some = (k < n)[:, None] & (r < count)[None, :]
            values = tl.load(x + r[None, :] * x_row + k[:, None], mask=some, other=0.0).to(tl.float32)
            if GATE:
                tile = _unpacked(gate, gate_scales, j, keep, first, n, BITS, BLOCKS)
                g = _fine_dot(tl.reshape(tile, (BLOCK_J, BLOCKS * 32)), values, g, BITS16)
            tile = _unpacked(up, up_scales, j, keep, first, n, BITS, BLOCKS)
            u = _fine_dot(tl.reshape(tile, (BLOCK_J, BLOCKS * 32)), values, u, BITS16)
    if ROWS == 1:
        z_gate = tl.sum(tl.sum(g, 2), 1)[:, None]
        z_up = tl.sum(tl.sum(u, 2), 1)[:, None]
    else:
        z_gate = g
        z_up = u
    if bias is not None:
        z_up += tl.load(bias + j, mask=keep, other=0.0).to(tl.float32)[:, None]
    if GATE:
        value = _activation(z_gate, ACT) * z_up
    else:
        value = _activation(z_up, ACT)
    value = tl.where(own, value, 0.0)
    tl.store(out + r[None, :].to(tl.int64) * m + j[:, None], value.to(out.dtype.element_ty), mask=inside)


@triton.autotune(COMBINE, key=["m", "n", "BITS", "ROWS"], prune_configs_by={"early_config_prune": _prune})
@triton.jit
def _combine(
    v, mask, data, scales, bias, partial, tickets, y, count, m, n, v_row, mask_row,
    BITS: tl.constexpr, ROWS: tl.constexpr, BITS16: tl.constexpr, BLOCK_J: tl.constexpr, BLOCKS: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    tile, split = tl.program_id(0), tl.program_id(1)
    r = tl.arange(0, ROWS)
    d = tile * (BLOCKS * 32) + tl.arange(0, BLOCKS * 32)
    chunk = tl.cdiv(tl.cdiv(m, SPLITS), BLOCK_J) * BLOCK_J
    if ROWS == 1:
        lanes = tl.zeros([BLOCK_J, BLOCKS, 32], tl.float32)
    else:
        total = tl.zeros([ROWS, BLOCKS * 32], tl.float32)
    for start in range(split * chunk, min((split + 1) * chunk, m), BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        some = (r < count)[:, None] & (j < m)[None, :]
        own = some & (tl.load(mask + r[:, None] * mask_row + j[None, :], mask=some, other=0) != 0)
        value = tl.load(v + r[:, None] * v_row + j[None, :], mask=own, other=0.0).to(tl.float32)  # (R, J)
        keep = tl.max(own.to(tl.int32), 0) != 0
        part = _unpacked(data, scales, j, keep, tile * BLOCKS, n, BITS, BLOCKS)
        if ROWS == 1:
            lanes += part * tl.sum(value, 0)[:, None, None]
        else:
            total = _fine_dot(value, tl.reshape(part, (BLOCK_J, BLOCKS * 32)), total, BITS16)
    if ROWS == 1:
        total = tl.reshape(tl.sum(lanes, 0), (1, BLOCKS * 32))
    inside = (r < count)[:, None] & (d < n)[None, :]
    place = r[:, None] * n + d[None, :]
    tl.store(partial + split * count * n + place, total, mask=inside)
    tl.debug_barrier()  # all of this program's partial sums are written before its ticket
    ticket = tl.atomic_add(tickets + tile, 1, sem="acq_rel", scope="gpu")
    if ticket == SPLITS - 1:
        total = tl.zeros([ROWS, BLOCKS * 32], tl.float32)
        for before in range(SPLITS):
            total += tl.load(partial + before * count * n + place, mask=inside, other=0.0, cache_modifier=".cg")
        if bias is not None:
            total += tl.load(bias + d, mask=d < n, other=0.0).to(tl.float32)[None, :]
        tl.store(y + place, total.to(y.dtype.element_ty), mask=inside)
        tl.store(tickets + tile, 0)
