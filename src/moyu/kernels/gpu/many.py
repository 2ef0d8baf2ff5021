"""1 to 16 rows of x on a GPU, plain weights; one row goes to `single` where that takes it.

Two kernels make the three shapes. `project` computes what whole rows of a weight give (rows; gate and up of neurons), and
`combine` adds up columns times values (columns; the down projection of neurons). A piece that no row keeps is not loaded: its
lanes are switched off, which costs no traffic. Sums are in float32 and in a fixed order: where the inputs of `combine` are
split over programs, the last one to arrive adds the partial sums up, always from the first to the last. Nothing waits for the
host, so that the calls can be part of a CUDA graph. With TRITON_INTERPRET=1 the same kernels run on the CPU, for tests.
"""

# pyright: reportInvalidTypeForm=false, reportCallIssue=false, reportArgumentType=false
# (Triton's launches and constant arguments have no types.)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moyu.kernels.gpu.common import ACTS, INTERPRETED, inner, output, tickets, tile_rows

MAX_SPLITS = 32


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
    """`kernels.neurons` for rows that share weights."""
    value = torch.empty(mask.shape, dtype=torch.float32, device=x.device)
    plain = gate is None and given is None
    project(value, x, gate, up, mask, act, gate_bias, up_bias, given, act_of_up=plain)
    return combine(value, down, mask, down_bias, x.dtype)


def rows(x: Tensor, weight: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
    """`kernels.rows`."""
    y = output(x, len(weight), x.dtype)
    project(y, x, None, weight, mask, "identity", None, bias, None, act_of_up=False)
    return y.to(x.dtype)


def project(
    out: Tensor,
    x: Tensor,
    gate: Tensor | None,
    up: Tensor | None,
    mask: Tensor | None,
    act: str,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    given: Tensor | None,
    *,
    act_of_up: bool,
) -> None:
    """out (N, f) = the values of neurons of which rows keep them, 0 elsewhere."""
    x, mask, given = inner(x), None if mask is None else inner(mask), None if given is None else inner(given)
    n, f = x.shape[1], out.shape[1]
    if f == 0 or len(x) == 0:
        return

    def stride(t: Tensor | None) -> int:
        return 0 if t is None else t.stride(0)

    _project[lambda meta: (triton.cdiv(f, meta["BLOCK_J"]),)](
        x, x if gate is None else gate, x if up is None else up, x if mask is None else mask.view(torch.int8),
        x if given is None else given, x if gate_bias is None else gate_bias, x if up_bias is None else up_bias, out,
        len(x), f, x.stride(0), stride(gate), stride(up), stride(mask), stride(given), out.stride(0),
        n=n, ACT=ACTS[act], ACT_OF_UP=act_of_up, GATE=gate is not None, UP=up is not None, MASK=mask is not None,
        GIVEN=given is not None, GATE_BIAS=gate_bias is not None, UP_BIAS=up_bias is not None, ROWS=tile_rows(x),
    )  # fmt: skip


def combine(
    v: Tensor, w: Tensor, mask: Tensor | None, bias: Tensor | None, dtype: torch.dtype, thresholds: Tensor | None = None
) -> Tensor:
    """y (N, q) = sum over the kept i of v[:, i] * w[:, i] + bias; without a mask |v_i| > thresholds[o] decides."""
    v, mask = inner(v), None if mask is None else inner(mask)
    q, n = w.shape
    y = output(v, q, dtype)
    if q == 0 or len(v) == 0:
        return y.to(dtype)
    partial = torch.empty(MAX_SPLITS, len(v), q, dtype=torch.float32, device=v.device)
    _combine[lambda meta: (triton.cdiv(q, meta["BLOCK_D"]), meta["SPLITS"])](
        v, v if mask is None else mask.view(torch.int8), v if thresholds is None else thresholds, w,
        v if bias is None else bias, partial, tickets(v.device), y,
        len(v), q, v.stride(0), 0 if mask is None else mask.stride(0), w.stride(1), y.stride(0),
        n=n, MASK=mask is not None, BIAS=bias is not None, ROWS=tile_rows(v),
    )  # fmt: skip
    return y.to(dtype)


def _configs(options: list[tuple[dict[str, int], int, int]]) -> list:
    """Candidates to time, kept on disk once timed; the interpreter takes the first, which small tests fill."""
    found = [triton.Config(sizes, num_warps=warps, num_stages=stages) for sizes, warps, stages in options]
    return found[:1] if INTERPRETED else found[1:]


PROJECT = _configs(
    [({"BLOCK_J": 16, "BLOCK_K": 32}, 4, 1)]
    + [
        ({"BLOCK_J": j, "BLOCK_K": k}, warps, 2)
        for j, k, warps in (
            (16, 128, 4), (16, 256, 4), (16, 256, 8), (32, 128, 4), (16, 512, 8), (32, 128, 8), (16, 128, 2), (64, 64, 4),
            (1, 1024, 4), (1, 2048, 4), (2, 1024, 4), (4, 512, 4), (2, 1024, 2), (4, 1024, 4), (1, 2048, 8), (8, 512, 4),
        )
    ]
)  # fmt: skip
COMBINE = _configs(
    [({"BLOCK_J": 16, "BLOCK_D": 32, "SPLITS": 3}, 4, 1)]
    + [
        ({"BLOCK_J": j, "BLOCK_D": d, "SPLITS": splits}, warps, 2)
        for j, d, warps in ((16, 128, 4), (32, 128, 4), (16, 256, 4), (32, 64, 4), (16, 512, 8))
        for splits in (1, 2, 4, 8, 16, 32)
    ]
)
PROGRAMS = 264, 2112  # of a call of `_combine`: fewer leave the GPU idle, more are over before they have begun


def _prune(configs: list, named: dict, **sizes: Any) -> list:
    """The tensor cores take 16 neurons and more; a call has a fair number of programs."""

    def fits(sizes_: dict[str, int]) -> bool:
        programs = triton.cdiv(named["q"], sizes_["BLOCK_D"]) * sizes_["SPLITS"] if "SPLITS" in sizes_ else PROGRAMS[0]
        least = 16 if sizes["ROWS"] == 16 else 1
        return bool(sizes_["BLOCK_J"] >= least and PROGRAMS[0] <= programs <= PROGRAMS[1])

    return [c for c in configs if fits(c.kwargs)] or configs[-1:]


WIDE = tl.constexpr(INTERPRETED)  # whether tensor core products are in float32: the interpreter has no 16-bit ones


@triton.jit
def _dot(a, b, c):
    """c + a @ b; a float32 `a` beside 16-bit weights goes in two parts, so that it loses nothing."""
    if WIDE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), c, input_precision="ieee")
    high = a.to(b.dtype)
    c = tl.dot(high, b, c, input_precision="ieee")
    if a.dtype != b.dtype:
        c = tl.dot((a - high.to(a.dtype)).to(b.dtype), b, c, input_precision="ieee")
    return c


@triton.jit
def _activation(z, ACT: tl.constexpr):
    if ACT == 1:
        z = tl.maximum(z, 0.0)
    if ACT == 2:
        z = tl.maximum(z, 0.0) * tl.maximum(z, 0.0)
    if ACT == 3:
        z = z / (1.0 + tl.exp(-z))
    if ACT == 4:
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    if ACT == 5:
        z = z / (1.0 + tl.exp(-1.5957691216057308 * (z + 0.044715 * z * z * z)))
    if ACT == 6:
        z = z / (1.0 + tl.exp(-1.702 * z))
    return z


@triton.jit
def _one_row(v, mask, j, n: tl.constexpr, threshold, MASK: tl.constexpr):
    """Values of inputs j of the one row, and which of them are kept."""
    if MASK:
        keep = tl.load(mask + j, mask=j < n, other=0) != 0
        value = tl.load(v + j, mask=keep, other=0.0).to(tl.float32)
    else:
        value = tl.load(v + j, mask=j < n, other=0.0).to(tl.float32)
        keep = tl.abs(value) > threshold
        value = tl.where(keep, value, 0.0)
    return value, keep


@triton.autotune(PROJECT, key=["n", "f", "ROWS", "GATE", "UP"], prune_configs_by={"early_config_prune": _prune},
                 cache_results=not INTERPRETED)  # fmt: skip
@triton.jit
def _project(
    x, gate, up, mask, given, gate_bias, up_bias, out, count, f, x_row, gate_row, up_row, mask_row, given_row, out_row,
    n: tl.constexpr, ACT: tl.constexpr, ACT_OF_UP: tl.constexpr, GATE: tl.constexpr, UP: tl.constexpr, MASK: tl.constexpr,
    GIVEN: tl.constexpr, GATE_BIAS: tl.constexpr, UP_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[r, j] = value of neuron j of row r where its mask keeps it, else 0; BLOCK_J neurons a program."""
    j = tl.program_id(0).to(tl.int64) * BLOCK_J + tl.arange(0, BLOCK_J)
    r = tl.arange(0, ROWS)
    inside = (r < count)[:, None] & (j < f)[None, :]
    own = inside
    if MASK:
        own = inside & (tl.load(mask + r[:, None] * mask_row + j[None, :], mask=inside, other=0) != 0)
    keep = tl.max(own.to(tl.int32), 0) != 0  # (BLOCK_J,)
    if ROWS == 1:
        g = tl.zeros([BLOCK_J, BLOCK_K], tl.float32)
        u = tl.zeros([BLOCK_J, BLOCK_K], tl.float32)
        for start in range(0, n, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            here = keep[:, None] & (k < n)[None, :]
            values = tl.load(x + k, mask=k < n, other=0.0).to(tl.float32)[None, :]
            if GATE:
                part = tl.load(gate + j[:, None] * gate_row + k[None, :], mask=here, other=0.0)
                g += part.to(tl.float32) * values
            if UP:
                part = tl.load(up + j[:, None] * up_row + k[None, :], mask=here, other=0.0)
                u += part.to(tl.float32) * values
        z_gate = tl.sum(g, 1)[None, :]
        z_up = tl.sum(u, 1)[None, :]
    else:
        z_gate = tl.zeros([ROWS, BLOCK_J], tl.float32)
        z_up = tl.zeros([ROWS, BLOCK_J], tl.float32)
        for start in range(0, n, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            here = (k < n)[:, None] & keep[None, :]
            some = (r < count)[:, None] & (k < n)[None, :]
            values = tl.load(x + r[:, None] * x_row + k[None, :], mask=some, other=0.0)
            if GATE:
                part = tl.load(gate + j[None, :] * gate_row + k[:, None], mask=here, other=0.0)
                z_gate = _dot(values, part, z_gate)
            if UP:
                part = tl.load(up + j[None, :] * up_row + k[:, None], mask=here, other=0.0)
                z_up = _dot(values, part, z_up)
    if GATE_BIAS:
        z_gate += tl.load(gate_bias + j, mask=keep, other=0.0).to(tl.float32)[None, :]
    if UP_BIAS:
        z_up += tl.load(up_bias + j, mask=keep, other=0.0).to(tl.float32)[None, :]
    value = z_up
    if GATE:
        value = _activation(z_gate, ACT)
        if UP:
            value = value * z_up
    if ACT_OF_UP:
        value = _activation(z_up, ACT)
    if GIVEN:
        value = value * tl.load(given + r[:, None] * given_row + j[None, :], mask=own, other=0.0).to(tl.float32)
    tl.store(out + r[:, None] * out_row + j[None, :], tl.where(own, value, 0.0).to(out.dtype.element_ty), mask=inside)


@triton.autotune(COMBINE, key=["n", "q", "ROWS", "MASK"], prune_configs_by={"early_config_prune": _prune},
                 cache_results=not INTERPRETED)  # fmt: skip
@triton.jit
def _combine(
    v, mask, thresholds, w, bias, partial, tickets, y, count, q, v_row, mask_row, w_column, y_row,
    n: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """y[r, d] = sum over kept j of v[r, j] * w[d, j]; BLOCK_D outputs and a SPLITS-th of the inputs a program."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    r = tl.arange(0, ROWS)
    chunk: tl.constexpr = (n + SPLITS * BLOCK_J - 1) // (SPLITS * BLOCK_J) * BLOCK_J
    first = tl.program_id(1) * chunk
    threshold = tl.load(thresholds + tl.program_id(0) * BLOCK_D).to(tl.float32)
    if ROWS == 1:
        lanes = tl.zeros([BLOCK_J, BLOCK_D], tl.float32)
    else:
        total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    if ROWS == 1:  # what the next step reads is loaded while the weights of this one are on their way
        value, keep = _one_row(v, mask, first.to(tl.int64) + tl.arange(0, BLOCK_J), n, threshold, MASK)
    for step in range(0, chunk, BLOCK_J):
        j = first.to(tl.int64) + step + tl.arange(0, BLOCK_J)
        if ROWS == 1:
            here = keep[:, None] & (d < q)[None, :]
            part = tl.load(w + j[:, None] * w_column + d[None, :], mask=here, other=0.0)
            now = value
            value, keep = _one_row(v, mask, j + BLOCK_J, n, threshold, MASK)
            lanes += part.to(tl.float32) * now[:, None]
        else:
            some = (r < count)[:, None] & (j < n)[None, :]
            if MASK:
                own = some & (tl.load(mask + r[:, None] * mask_row + j[None, :], mask=some, other=0) != 0)
                value = tl.load(v + r[:, None] * v_row + j[None, :], mask=own, other=0.0)
            else:
                value = tl.load(v + r[:, None] * v_row + j[None, :], mask=some, other=0.0)
                own = tl.abs(value.to(tl.float32)) > threshold
                value = tl.where(own, value, 0.0)
            keep = tl.max(own.to(tl.int32), 0) != 0
            here = keep[:, None] & (d < q)[None, :]
            part = tl.load(w + j[:, None] * w_column + d[None, :], mask=here, other=0.0)
            total = _dot(value, part, total)
    if ROWS == 1:
        total = tl.sum(lanes, 0)[None, :]
    inside = (r < count)[:, None] & (d < q)[None, :]
    place = r[:, None] * q + d[None, :]
    tl.store(partial + tl.program_id(1) * count * q + place, total, mask=inside)
    tl.debug_barrier()  # all of this program's partial sums are written before its ticket
    ticket = tl.atomic_add(tickets + tl.program_id(0), 1, sem="acq_rel", scope="gpu")
    if ticket == SPLITS - 1:
        total = tl.zeros([ROWS, BLOCK_D], tl.float32)
        for split in range(SPLITS):
            total += tl.load(partial + split * count * q + place, mask=inside, other=0.0, cache_modifier=".cg")
        if BIAS:
            total += tl.load(bias + d, mask=d < q, other=0.0).to(tl.float32)[None, :]
        tl.store(y + r[:, None] * y_row + d[None, :], total.to(y.dtype.element_ty), mask=inside)
        tl.store(tickets + tl.program_id(0), 0)
