"""Products by rows with weights in the formats of GGUF files, as they lie: codes are unpacked in registers, never stored.

x is taken as it is, not rounded to 8 bits as on a CPU. Products of one row are in float32; those of 2 to 16 rows run on the tensor
cores on values rounded to x's dtype. Sums are float32, in a fixed order.

One row: a program holds all of x in its registers and takes every P-th group of outputs; a thread reads 16 bytes of codes at
once, a chunk, and the next ones before it multiplies. A code c of b bits goes into the high bits of the mantissa of 1.0, which makes
1 + c / 2^b in a shift and one logical operation, where a conversion would take four; what the ones and the zero point add is the
sum of the chunk's x times a constant. The first codes are on their way before the launch waits for the one that writes x.
"""

# pyright: reportInvalidTypeForm=false, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (Triton's launches and constant arguments have no types.)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moyu.kernels.gpu.common import INTERPRETED, KINDS, inner, output, processors
from moyu.kernels.gpu.many import _dot
from moyu.kernels.gpu.overlap import EARLY, begin_next, wait_for_last
from moyu.weights import Stored

Q8, Q4, Q4_K, Q6_K = (tl.constexpr(KINDS[name]) for name in ("q8_0", "q4_0", "q4_k", "q6_k"))
ONE, BEYOND = 0x3F800000, 0x4B000000  # the bits of 1.0 and of 2^23: a code goes into the high bits of the mantissa, a byte into the low


def rows(x: Tensor, weight: Stored, mask: Tensor | None, bias: Tensor | None) -> Tensor:
    """`kernels.rows`."""
    x, mask = inner(x), None if mask is None else inner(mask)
    codes, scales = weight.tensors
    q, n = weight.shape
    y = output(x, q, x.dtype)
    if q == 0 or len(x) == 0:
        return y.to(x.dtype)
    plain, halves = scales.view(torch.uint8), scales.view(torch.float16)
    kept = None if mask is None else mask.view(torch.int8)
    steps, kind = (plain.stride(0), halves.stride(0)), KINDS[weight.format.name]
    if len(x) == 1 and _aligned(codes):
        words, bytes = codes.view(torch.int32), kind == Q8.value
        chunks, units = triton.cdiv(n, 32) * (2 if bytes else 1), processors(x.device)
        _one_row[lambda meta: (min(triton.cdiv(q, meta["BLOCK_J"]), units * meta["EACH"]),)](
            x, words, plain, halves, kept, bias, y, q, words.stride(0), *steps, n, BEYOND if bytes else ONE,
            KIND=kind, CHUNKS=triton.next_power_of_2(chunks), EVEN=chunks == triton.next_power_of_2(chunks), **EARLY,
        )  # fmt: skip
    else:
        _rows[lambda meta: (triton.cdiv(q, meta["BLOCK_J"]),)](
            x, codes, plain, halves, kept, bias, y, len(x), q,
            x.stride(0), codes.stride(0), *steps, 0 if mask is None else mask.stride(0), y.stride(0), n, KIND=kind,
        )  # fmt: skip
    return y.to(x.dtype)


def _aligned(codes: Tensor) -> bool:
    """Whether rows begin at multiples of 16 bytes; they need not where they lie beside those of other weights."""
    return codes.data_ptr() % 16 == 0 and (len(codes) == 1 or codes.stride(0) % 16 == 0)


def _configs(names: tuple[str, ...], options: tuple[tuple[int, ...], ...]) -> list[triton.Config]:
    """Candidates: sizes, warps, stages. The interpreter takes the first, which small tests fill."""
    found = [triton.Config(dict(zip(names, o, strict=False)), num_warps=o[-2], num_stages=o[-1]) for o in options]
    return found[:1] if INTERPRETED else found[1:]


ONE_ROW = _configs(
    ("BLOCK_J", "EACH"),  # outputs that a program takes at once; programs a multiprocessor
    ((4, 2, 4, 1), *((j, each, warps, 1) for warps in (1, 2, 4, 8, 16, 32) for j, each in ((4, 24), (2, 24), (8, 16), (4, 16)))),
)
TILES = _configs(
    ("BLOCK_J", "BLOCK_G"),  # outputs of a program, groups of 32 inputs that it takes at once
    ((16, 2, 4, 1), (16, 2, 4, 3), (16, 4, 4, 3), (32, 2, 4, 3), (32, 4, 4, 3), (64, 2, 4, 3), (64, 4, 8, 2)),
)


def _fitting(configs: list, named: dict, **sizes: int) -> list:
    """A chunk a thread, or two where a row has more than there are threads."""
    threads = min(1024, max(32, sizes["CHUNKS"]))
    return [c for c in configs if 32 * c.num_warps == threads] or configs


@triton.jit
def _inputs(x, c, n, CHUNK: tl.constexpr, HALF: tl.constexpr):
    """x of 16 numbers of each chunk c, one half of a group: the first of every word, the second ..., (C, 4) float32 each."""
    k = tl.arange(0, 4)
    i = c[:, None, None] * CHUNK + 16 * HALF + k[None, :, None] * 4 + k[None, None, :]
    parts = tl.load(x + i, mask=i < n, other=0.0)
    even, odd = tl.split(tl.reshape(parts, (parts.shape[0], 4, 2, 2)))
    one, three = tl.split(even)
    two, four = tl.split(odd)
    return one.to(tl.float32), two.to(tl.float32), three.to(tl.float32), four.to(tl.float32)


@triton.jit
def _level(words, more, one, KIND: tl.constexpr, PLACE: tl.constexpr):
    """Of number PLACE (of 4, or 8) of each word: its signed byte, or 1 + c / 2^b of its code c of b bits; float32.

    one: the bits of the float that codes go into: not a constant, so that `and` and `or` become one instruction. more: where codes
    have six bits, words with the upper two.
    """
    if KIND == Q8:
        level = (((words >> 8 * PLACE) & 255) | one).to(tl.float32, bitcast=True) - 8388736.0  # 2^23 + 128
    elif KIND == Q6_K:
        low = (words << 17 if PLACE == 0 else words >> (4 * PLACE - 17) if PLACE > 4 else words << (17 - 4 * PLACE))
        at: tl.constexpr = 8 * (PLACE // 2) + 2 * 2 * (PLACE % 2)  # pyright: ignore
        high = more << (21 - at) if at <= 21 else more >> (at - 21)
        level = ((low & 0x1E0000) | ((high & 0x600000) | one)).to(tl.float32, bitcast=True)
    else:
        code = words << (19 - 4 * PLACE) if PLACE <= 4 else words >> (4 * PLACE - 19)
        level = ((code & 0x780000) | one).to(tl.float32, bitcast=True)
    return level


@triton.jit
def _tile(words, plain, halves, j, c, here, groups, words_row, plain_row, halves_row, n, KIND: tl.constexpr):
    """Of chunks c of outputs j: words (J, C, 4), those of upper bits, scale of one half and of the other and offset (J, C)."""
    k = tl.arange(0, 4)
    j = j[:, None].to(tl.int64)
    own = tl.load(
        words + (j * words_row + (c * 4)[None, :])[:, :, None] + k[None, None, :], mask=here[:, :, None], other=0
    )
    upper = own
    if KIND == Q6_K:
        at = (j * words_row + (groups * 4 + c * 2)[None, :])[:, :, None] + (k % 2)[None, None, :]
        upper = tl.load(words + at, mask=here[:, :, None], other=0) >> (k // 2 * 2)[None, None, :]
    g = (c // 2 if KIND == Q8 else c)[None, :]
    scale, offset = _scale(plain, halves, j, g, 0, here, plain_row, halves_row, n, KIND)
    second = scale
    if KIND == Q6_K:
        second, offset = _scale(plain, halves, j, g, 1, here, plain_row, halves_row, n, KIND)
    return own, upper, scale, second, offset


@triton.autotune(ONE_ROW, key=["n", "q", "KIND"], prune_configs_by={"early_config_prune": _fitting},
                 cache_results=not INTERPRETED)  # fmt: skip
@triton.jit
def _one_row(
    x, words, plain, halves, mask, bias, y, q, words_row, plain_row, halves_row, n, one, EACH,
    KIND: tl.constexpr, CHUNKS: tl.constexpr, EVEN: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """y[j] = x . w[j] + bias[j] where the mask keeps it, else 0; a program takes every P-th BLOCK_J outputs."""
    begin_next()
    groups = (n + 31) // 32
    per: tl.constexpr = 16 if KIND == Q8 else 32  # pyright: ignore -- inputs of a chunk
    c = tl.arange(0, CHUNKS)
    whole = ((c < groups * (32 // per)) | EVEN)[None, :]
    step = tl.num_programs(0) * BLOCK_J
    begin = tl.program_id(0) * BLOCK_J
    j = begin + tl.arange(0, BLOCK_J)
    keep = j < q
    if mask is not None:
        wait_for_last()
        keep = keep & (tl.load(mask + j, mask=keep, other=0) != 0)
    own, upper, scale, second, offset = _tile(
        words, plain, halves, j, c, keep[:, None] & whole, groups, words_row, plain_row, halves_row, n, KIND
    )
    if mask is None:
        wait_for_last()
    x0, x1, x2, x3 = _inputs(x, c, n, per, 0)
    if KIND != Q8:
        x4, x5, x6, x7 = _inputs(x, c, n, per, 1)
        all_x = tl.sum(x0 + x1 + x2 + x3, 1)[None, :]
        more_x = tl.sum(x4 + x5 + x6 + x7, 1)[None, :]
        if KIND != Q6_K:
            all_x += more_x
    for start in range(begin, q, step):
        kept = keep
        j = start + step + tl.arange(0, BLOCK_J)
        keep = j < q
        if mask is not None:
            keep = keep & (tl.load(mask + j, mask=keep, other=0) != 0)
        next_own, next_upper, next_scale, next_second, next_offset = _tile(
            words, plain, halves, j, c, keep[:, None] & whole, groups, words_row, plain_row, halves_row, n, KIND
        )
        if KIND == Q8:
            own = own ^ -2139062144  # 0x80808080: from -128 .. 127 to 0 .. 255
            part = _level(own, own, one, KIND, 0) * x0[None]
            part += _level(own, own, one, KIND, 1) * x1[None]
            part += _level(own, own, one, KIND, 2) * x2[None]
            part += _level(own, own, one, KIND, 3) * x3[None]
            sums = tl.sum(part, 2) * scale
        else:
            part = _level(own, upper, one, KIND, 0) * x0[None]
            part += _level(own, upper, one, KIND, 2) * x1[None]
            part += _level(own, upper, one, KIND, 4) * x2[None]
            part += _level(own, upper, one, KIND, 6) * x3[None]
            if KIND == Q6_K:
                sums = (tl.sum(part, 2) * 64.0 - all_x * 96.0) * scale
                part = _level(own, upper, one, KIND, 1) * x4[None]
            else:
                part += _level(own, upper, one, KIND, 1) * x4[None]
            part += _level(own, upper, one, KIND, 3) * x5[None]
            part += _level(own, upper, one, KIND, 5) * x6[None]
            part += _level(own, upper, one, KIND, 7) * x7[None]
            if KIND == Q6_K:
                sums += (tl.sum(part, 2) * 64.0 - more_x * 96.0) * second
            elif KIND == Q4:
                sums = (tl.sum(part, 2) * 16.0 - all_x * 24.0) * scale
            else:
                sums = (tl.sum(part, 2) * 16.0 - all_x * 16.0) * scale + offset * all_x
        total = tl.sum(sums, 1)
        j = start + tl.arange(0, BLOCK_J)
        if bias is not None:
            total += tl.load(bias + j, mask=kept, other=0.0).to(tl.float32)
        tl.store(y + j, tl.where(kept, total, 0.0).to(y.dtype.element_ty), mask=j < q)
        own, upper, scale, second, offset = next_own, next_upper, next_scale, next_second, next_offset


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


@triton.autotune(TILES, key=["n", "q", "KIND"], cache_results=not INTERPRETED)
@triton.jit
def _rows(
    x, codes, plain, halves, mask, bias, y, count, q, x_row, codes_row, plain_row, halves_row, mask_row, y_row, n,
    KIND: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """y[r, j] = x[r] . w[j] + bias[j] where the mask keeps it, else 0; BLOCK_J outputs a program, 2 to 16 rows."""
    groups = (n + 31) // 32
    wide: tl.constexpr = 32 if KIND == Q8 else 16  # pyright: ignore -- numbers of a group that are taken at once
    parts: tl.constexpr = 32 // wide
    j = tl.program_id(0).to(tl.int64) * BLOCK_J + tl.arange(0, BLOCK_J)
    r = tl.arange(0, 16)
    own = (r < count)[:, None] & (j < q)[None, :]
    inside = own
    if mask is not None:
        own = own & (tl.load(mask + r[:, None] * mask_row + j[None, :], mask=own, other=0) != 0)
    keep = tl.max(own.to(tl.int32), 0) != 0  # (J,)
    total = tl.zeros([16, BLOCK_J], tl.float32)
    k = tl.arange(0, BLOCK_G * wide)
    for start in range(0, groups, BLOCK_G):
        g = start + k // wide
        b = k % wide
        there = keep[None, :] & (g < groups)[:, None]  # (K, J)
        for half in tl.static_range(parts):
            i = g * 32 + half * 16 + b
            value = tl.load(x + r[:, None] * x_row + i[None, :], mask=(r < count)[:, None] & (i < n)[None, :], other=0.0)
            level = _codes(codes, j[None, :], g[:, None], b[:, None], half, there, codes_row, groups, KIND)
            scale, offset = _scale(plain, halves, j[None, :], g[:, None], half, there, plain_row, halves_row, n, KIND)
            total = _dot(value, (level * scale + offset).to(x.dtype.element_ty), total)
    if bias is not None:
        total += tl.load(bias + j, mask=keep, other=0.0).to(tl.float32)[None, :]
    tl.store(y + r[:, None] * y_row + j[None, :], tl.where(own, total, 0.0).to(y.dtype.element_ty), mask=inside)
