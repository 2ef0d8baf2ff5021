"""One row of x on a GPU: what it keeps is listed first, so that time goes with what is read and not with what there is.

Neurons take three launches: the list of the kept ones, their values (a program takes every P-th, whole rows at a time), and
the sum of their down columns (a program takes an even share of the list). Columns take one: each program lists what its part
of x keeps. Sums are float32; a sum that is split over programs is added up by the last one to arrive, in the order of splits.
A launch may begin while the one before it ends (programmatic dependent launch) and waits itself for what that one writes.
Calls of one row come here; the rows of wider calls share weights and go through the tensor-core kernels of `many`.
"""

# pyright: reportInvalidTypeForm=false, reportCallIssue=false, reportArgumentType=false
# (Triton's launches and constant arguments have no types.)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moyu.kernels.gpu.common import ACTS, INTERPRETED, inner, tickets
from moyu.kernels.gpu.many import _activation
from moyu.kernels.gpu.overlap import EARLY, begin_next, wait_for_last

SHARE = 1024  # neurons that a program lists


def neurons(
    x: Tensor,
    gate: Tensor | None,
    up: Tensor | None,
    down: Tensor,
    mask: Tensor,
    act: str,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    given: Tensor | None,
) -> Tensor:
    """`kernels.neurons` for x (1, d), d up to ONE_ROW_WIDEST of the back end: (1, d_out) in x's dtype."""
    x, mask = inner(x), inner(mask)
    given = None if given is None else inner(given)
    d, f = x.shape[1], mask.shape[1]
    if down.shape[0] == 0 or f == 0:
        return x.new_zeros(1, down.shape[0]) if down_bias is None else down_bias[None].clone()
    picks = torch.empty(f + 1, dtype=torch.int32, device=x.device)  # how many, and which
    values = torch.empty(f, dtype=torch.float32, device=x.device)
    _list[(triton.cdiv(f, SHARE),)](
        mask.view(torch.int8), picks, f, EVERY=triton.next_power_of_2(f), PART=SHARE, num_warps=8, **EARLY
    )
    first, second = (up, None) if gate is None else (gate, up)  # the activation is of the first
    assert first is not None
    _values[lambda meta: (meta["PROGRAMS"],)](
        x, first, second, up_bias if gate is None else gate_bias, None if gate is None else up_bias, given, picks, values,
        first.stride(0), 0 if second is None else second.stride(0), d, f,
        ACT=ACTS["identity" if gate is None and given is not None else act], D=triton.next_power_of_2(d),
        EVEN=d == triton.next_power_of_2(d), **EARLY,
    )  # fmt: skip
    return _add_up(values, down, None, None, picks, down_bias, x.dtype)


def columns(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None) -> Tensor:
    """`kernels.columns` for x (1, n): (1, q) in x's dtype."""
    return _add_up(inner(x)[0], weight, inner(mask), None, None, bias, x.dtype)


def columns_above(x: Tensor, weight: Tensor, thresholds: Tensor, bias: Tensor | None) -> Tensor:
    """`kernels.columns_above` for x (1, n): (1, q) in x's dtype."""
    if INTERPRETED:  # it cuts bfloat16 instead of rounding it
        thresholds = thresholds.to(x.dtype).float()
    return _add_up(inner(x)[0], weight, None, thresholds, None, bias, x.dtype)


def _add_up(
    values: Tensor, weight: Tensor, mask: Tensor | None, thresholds: Tensor | None, picks: Tensor | None,
    bias: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    q, n = weight.shape
    y = torch.empty(1, q, dtype=torch.float32 if INTERPRETED else dtype, device=values.device)
    if q == 0:
        return y.to(dtype)
    listed, tiles = picks is not None, triton.cdiv(q, min(c.kwargs["BLOCK_D"] for c in SUMS))
    splits = triton.cdiv(n, min(c.kwargs["CHUNK"] for c in SUMS))
    partial = torch.empty(splits, q, dtype=torch.float32, device=values.device)
    if picks is None:
        picks = torch.empty(tiles * (n + max(c.kwargs["CHUNK"] for c in SUMS)), dtype=torch.int32, device=values.device)
    _sum[lambda meta: (triton.cdiv(q, meta["BLOCK_D"]), triton.cdiv(n, meta["CHUNK"]))](
        values, weight, None if mask is None else mask.view(torch.int8), thresholds, picks, bias, partial,
        tickets(values.device), y, weight.stride(1), n, q, LISTED=listed, **EARLY,
    )  # fmt: skip
    return y.to(dtype)


def _configs(names: tuple[str, ...], options: tuple[tuple[int, ...], ...]) -> list[triton.Config]:
    """Candidates: sizes, then warps. The interpreter takes the first, which small tests fill."""
    found = [triton.Config(dict(zip(names, o[:-1], strict=True)), num_warps=o[-1], num_stages=1) for o in options]
    return found[:1] if INTERPRETED else found[1:]


VALUES = _configs(
    ("PROGRAMS", "BLOCK_J"),
    (
        (3, 2, 4),
        (528, 1, 4),
        (1056, 1, 4),
        (528, 2, 8),
        (1056, 1, 8),
        (2112, 1, 4),
        (264, 2, 8),
        (1056, 2, 8),
        (396, 4, 8),
    ),
)
SUMS = _configs(
    ("CHUNK", "BLOCK_J", "BLOCK_D"),
    (
        (16, 4, 32, 4), (128, 16, 256, 4), (128, 32, 256, 4), (256, 32, 256, 4), (512, 32, 256, 4), (256, 16, 512, 4),
        (128, 16, 512, 8), (64, 16, 256, 2), (256, 64, 128, 4), (512, 16, 256, 4), (1024, 32, 128, 4), (1024, 16, 256, 8),
    ),
)  # fmt: skip


@triton.jit
def _list(mask, picks, f, EVERY: tl.constexpr, PART: tl.constexpr):
    """picks[1:] = the kept neurons in their order, picks[0] = how many; a program lists PART and counts those before."""
    begin_next()
    wait_for_last()
    p = tl.program_id(0)
    every = tl.arange(0, EVERY)
    before = tl.sum((tl.load(mask + every, mask=every < p * PART, other=0) != 0).to(tl.int32), 0)
    j = p * PART + tl.arange(0, PART)
    kept = (tl.load(mask + j, mask=j < f, other=0) != 0).to(tl.int32)
    rank = before + tl.cumsum(kept, 0) - kept
    tl.store(picks + 1 + rank, j, mask=kept != 0)
    if p == tl.num_programs(0) - 1:
        tl.store(picks, before + tl.sum(kept, 0))


@triton.autotune(VALUES, key=["d", "f"], cache_results=not INTERPRETED)
@triton.jit
def _values(
    x, first, second, first_bias, second_bias, given, picks, values, first_row, second_row, d, f,
    ACT: tl.constexpr, D: tl.constexpr, EVEN: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """values[k] = act(first_j . x + bias) * (second_j . x + bias) * given_j for the k-th kept neuron j."""
    begin_next()
    wait_for_last()
    step: tl.constexpr = PROGRAMS * BLOCK_J
    i = tl.arange(0, D)
    inputs = tl.load(x + i, mask=i < d, other=0.0).to(tl.float32)[None, :]
    end = tl.load(picks)
    begin = tl.program_id(0) * BLOCK_J
    k = begin + tl.arange(0, BLOCK_J)
    j = tl.load(picks + 1 + k, mask=k < end, other=0).to(tl.int64)
    for start in range(begin, end, step):
        k = start + tl.arange(0, BLOCK_J)
        here = k < end
        whole = here[:, None] & ((i < d)[None, :] | EVEN)
        a = tl.load(first + j[:, None] * first_row + i[None, :], mask=whole, other=0.0)
        if second is not None:
            b = tl.load(second + j[:, None] * second_row + i[None, :], mask=whole, other=0.0)
        after = tl.load(picks + 1 + k + step, mask=k + step < end, other=0).to(tl.int64)
        z = tl.sum(a.to(tl.float32) * inputs, 1)  # (J,)
        if first_bias is not None:
            z += tl.load(first_bias + j, mask=here, other=0.0).to(tl.float32)
        z = _activation(z, ACT)
        if second is not None:
            u = tl.sum(b.to(tl.float32) * inputs, 1)
            if second_bias is not None:
                u += tl.load(second_bias + j, mask=here, other=0.0).to(tl.float32)
            z *= u
        if given is not None:
            z *= tl.load(given + j, mask=here, other=0.0).to(tl.float32)
        tl.store(values + k, z, mask=here)
        j = after


@triton.autotune(SUMS, key=["n", "q", "LISTED"], cache_results=not INTERPRETED)
@triton.jit
def _sum(
    values, w, mask, thresholds, picks, bias, partial, tickets, y, w_column, n, q,
    LISTED: tl.constexpr, CHUNK: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y = sum over the kept j of values_j * w_j + bias; BLOCK_D outputs and one of the splits a program."""
    begin_next()
    wait_for_last()
    tile, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    d = tile * BLOCK_D + tl.arange(0, BLOCK_D)
    if LISTED:
        count = tl.load(picks)
        begin, end = 1 + count * split // splits, 1 + count * (split + 1) // splits
    else:
        own = split * CHUNK + tl.arange(0, CHUNK)
        if mask is not None:
            kept = tl.load(mask + own, mask=own < n, other=0) != 0
        else:
            least = tl.load(thresholds + tile * BLOCK_D).to(values.dtype.element_ty).to(tl.float32)
            kept = (tl.abs(tl.load(values + own, mask=own < n, other=0.0).to(tl.float32)) > least) & (own < n)
        begin = (tile * splits + split) * CHUNK
        rank = tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(picks + begin + rank, own, mask=kept)
        end = begin + tl.sum(kept.to(tl.int32), 0)
        tl.debug_barrier()  # the list is read by other threads than wrote it
    k = begin + tl.arange(0, BLOCK_J)
    j = tl.load(picks + k, mask=k < end, other=0).to(tl.int64)
    lanes = tl.zeros([BLOCK_J, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_J):
        k = start + tl.arange(0, BLOCK_J)
        here = k < end
        part = tl.load(w + j[:, None] * w_column + d[None, :], mask=here[:, None] & (d < q)[None, :], other=0.0)
        if LISTED:
            value = tl.load(values + k - 1, mask=here, other=0.0)
        else:
            value = tl.load(values + j, mask=here, other=0.0)
        j = tl.load(picks + k + BLOCK_J, mask=k + BLOCK_J < end, other=0).to(tl.int64)
        lanes += part.to(tl.float32) * value.to(tl.float32)[:, None]
    _bring_together(tl.sum(lanes, 0), partial, tickets, bias, y, d, q, tile, split, splits, BLOCK_D)


@triton.jit
def _bring_together(own, partial, tickets, bias, y, d, q, tile, split, splits, BLOCK_D: tl.constexpr):
    """y[d] = the sum over splits of what each calls with as `own`, + bias: the last one to arrive adds them up in order."""
    tl.store(partial + split * q + d, own, mask=d < q)
    _last_adds_up(partial, tickets, bias, y, d, q, tile, splits, BLOCK_D)


@triton.jit
def _last_adds_up(partial, tickets, bias, y, d, q, tile, splits, BLOCK_D: tl.constexpr):
    """y[d] = the sum over splits of partial[s, d], + bias, by the last program of a tile that calls; all have written theirs."""
    tl.debug_barrier()  # all of this program's partial sums are written before its ticket
    ticket = tl.atomic_add(tickets + tile, 1, sem="acq_rel", scope="gpu")
    if ticket == splits - 1:
        parts = tl.zeros([16, BLOCK_D], tl.float32)
        for before in range(0, splits, 16):
            s = before + tl.arange(0, 16)
            there = (s < splits)[:, None] & (d < q)[None, :]
            parts += tl.load(partial + s[:, None] * q + d[None, :], mask=there, other=0.0, cache_modifier=".cg")
        total = tl.sum(parts, 0)
        if bias is not None:
            total += tl.load(bias + d, mask=d < q, other=0.0).to(tl.float32)
        tl.store(y + d, total.to(y.dtype.element_ty), mask=d < q)
        tl.store(tickets + tile, 0)
