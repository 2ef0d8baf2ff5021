"""Products by rows with weights in the formats of GGUF files, as they lie: codes are unpacked in registers, never stored.

x is taken as it is, not rounded to 8 bits as on a CPU. Products of one row are in float32; those of 2 to 16 rows run on the tensor
cores on values rounded to x's dtype. Sums are float32, in a fixed order.

One row: a program takes every P-th group of outputs, for one segment of x after another, which it holds in registers. A thread reads
16 bytes of codes at once, a chunk. A code c of b bits goes into the high bits of the mantissa of
1.0, which makes 1 + c / 2^b in a shift and one logical operation, where a conversion would take four; what the ones and the zero point add
is the sum of the chunk's x times a constant. Each warp adds up by itself and leaves its sum in memory, so that the loop has no
exchange between warps; the program adds these up at its end. Codes are copied to shared memory a few groups of outputs ahead.
"""

# pyright: reportInvalidTypeForm=false, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (Triton's launches and constant arguments have no types.)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from moyu.kernels.gpu.common import INTERPRETED, KINDS, inner, output, processors
from moyu.kernels.gpu.many import _dot
from moyu.kernels.gpu.overlap import EARLY, begin_next, wait_for_last
from moyu.weights import Stored
from moyu.weights.planes import SPLITS

Q8, Q4, Q4_K, Q6_K = (tl.constexpr(KINDS[name]) for name in ("q8_0", "q4_0", "q4_k", "q6_k"))
ONE, BEYOND = (
    0x3F800000,
    0x4B000000,
)  # the bits of 1.0 and of 2^23: a code goes into the high bits of the mantissa, a byte into the low


def rows(x: Tensor, weight: Stored, mask: Tensor | None, bias: Tensor | None) -> Tensor:
    """`kernels.rows`."""
    x, mask = inner(x), None if mask is None else inner(mask)
    codes, scales = weight.tensors
    q, n = weight.shape
    y = output(x, q, x.dtype)
    if q == 0 or len(x) == 0:
        return y.to(x.dtype)
    if len(x) == 1 and _aligned(codes):
        bits, form = weight.format.bits, weight.format
        zero = 0 if bits == 8 else form.zero  # pyright: ignore[reportAttributeAccessIssue] -- bytes are levels
        _launch(x, codes, scales, mask, bias, y, bits, 1, -zero, KINDS[form.name])
    else:
        plain, halves = scales.view(torch.uint8), scales.view(torch.float16)
        kept = None if mask is None else mask.view(torch.int8)
        _rows[lambda meta: (triton.cdiv(q, meta["BLOCK_J"]),)](
            x, codes, plain, halves, kept, bias, y, len(x), q, x.stride(0), codes.stride(0), plain.stride(0), halves.stride(0),
            0 if mask is None else mask.stride(0), y.stride(0), n, KIND=KINDS[weight.format.name],
        )  # fmt: skip
    return y.to(x.dtype)


def parted(weight: Stored) -> bool:
    """Whether `words` reads the weight: its first bits are four, and rows begin at multiples of 16 bytes."""
    return SPLITS[weight.format.bits][0] == 4 and _aligned(weight.tensors[2])


def words(x: Tensor, weight: Stored, mask: Tensor, bias: Tensor | None) -> Tensor:
    """`kernels.words`, of a weight that is `parted`: the first bits of every row, then what the further ones add to kept rows."""
    x, mask = inner(x), inner(mask)
    (second, scales, first), (q, n), form = weight.tensors, weight.shape, weight.format
    own, further = SPLITS[form.bits]
    middle, zero = ((1 << further) - 1) / 2, 128 if form.bits == 8 else form.zero  # pyright: ignore[reportAttributeAccessIssue]
    y, kind = output(x, q, x.dtype), KINDS[form.name]
    plain, halves = scales.view(torch.uint8), scales.view(torch.float16)
    for r in range(len(x)):
        base = torch.empty(1, q, dtype=torch.float32, device=x.device)
        _launch(x[r : r + 1], first, scales, None, bias, base, own, 1 << further, middle - zero, kind)
        _further[(triton.cdiv(q, 4),)](
            x[r], second, plain, halves, mask[r].view(torch.int8), base, y[r], q, second.stride(0), plain.stride(0),
            halves.stride(0), n, middle, KIND=kind, BITS=further, BLOCK_J=4, BLOCK_G=4, num_warps=1,
        )  # fmt: skip
    return y.to(x.dtype)


def _launch(
    x: Tensor, codes: Tensor, scales: Tensor, mask: Tensor | None, bias: Tensor | None, y: Tensor, bits: int, times: int,
    plus: float, kind: int,
) -> None:  # fmt: skip
    """`_one_row` on codes of so many bits; a code stands for times * code + plus steps of its scale."""
    plain, halves, words = scales.view(torch.uint8), scales.view(torch.float16), codes.view(torch.int32)
    q, n = y.shape[1], x.shape[1]
    chunks, units = triton.cdiv(n, 32) * (2 if bits == 8 else 1), processors(x.device)
    wide = x.element_size() == 2 and n % 4 == 0 and x.data_ptr() % 8 == 0
    segments = triton.cdiv(chunks, min(c.kwargs["BLOCK_C"] for c in ONE_ROW))
    sums = torch.empty(q, segments * MOST_WARPS, dtype=torch.float32, device=x.device)
    kept = None if mask is None else mask.view(torch.int8)
    _one_row[lambda meta: (min(triton.cdiv(q, meta["BLOCK_J"]), units * meta["EACH"]),)](
        x.view(torch.int64) if wide else _by_place(x, 1 if bits == 8 else 2), words, plain, halves, kept, bias, sums, y, q,
        words.stride(0), plain.stride(0), halves.stride(0), n, BEYOND if bits == 8 else ONE, 1, float(times << bits),
        plus - float(times << bits), KIND=kind, BITS=bits, HALF=x.dtype == torch.float16, WIDE=wide, **EARLY,
    )  # fmt: skip


def _by_place(x: Tensor, halves: int) -> Tensor:
    """x (1, n) as (halves, 4, chunks, 4): number b of word k of a half of chunk c at [half, b, c, k], filled up with zeros."""
    x = functional.pad(x, (0, -x.shape[1] % 32))
    return x.view(-1, halves, 4, 4).permute(1, 3, 0, 2).contiguous()


def _aligned(codes: Tensor) -> bool:
    """Whether rows begin at multiples of 16 bytes; they need not where they lie beside those of other weights."""
    return codes.data_ptr() % 16 == 0 and (len(codes) == 1 or codes.stride(0) % 16 == 0)


def _configs(names: tuple[str, ...], options: tuple[tuple[int, ...], ...]) -> list[triton.Config]:
    """Candidates: sizes, warps, stages. The interpreter takes the first, which small tests fill."""
    found = [triton.Config(dict(zip(names, o, strict=False)), num_warps=o[-2], num_stages=o[-1]) for o in options]
    return found[:1] if INTERPRETED else found[1:]


ONE_ROW = _configs(
    (
        "BLOCK_J",
        "BLOCK_C",
        "EACH",
        "STAGES",
    ),  # outputs and chunks that a program takes at once; programs a multiprocessor
    ((4, 32, 2, 2, 1, 1), (4, 128, 8, 3, 4, 1), (2, 128, 8, 4, 4, 1), (8, 128, 4, 3, 4, 1), (4, 64, 12, 3, 2, 1)),
)
MOST_WARPS = 4  # of a candidate: so many sums has a segment at most
TILES = _configs(
    ("BLOCK_J", "BLOCK_G"),  # outputs of a program, groups of 32 inputs that it takes at once
    ((16, 2, 4, 1), (16, 2, 4, 3), (16, 4, 4, 3), (32, 2, 4, 3), (32, 4, 4, 3), (64, 2, 4, 3), (64, 4, 8, 2)),
)


@triton.jit
def _number_of(four, AT: tl.constexpr, HALF: tl.constexpr):
    """Number AT of the four in 64 bits, float32. HALF: float16, not bfloat16."""
    if HALF:
        return (four >> (16 * AT)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return (((four >> (16 * AT)) & 65535) << 16).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _inputs(x, j, c, n, chunks, SECOND: tl.constexpr, CHUNK: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr):
    """x of 16 numbers of each chunk c, SECOND: of its second half: the first of every word, the second ..., (C, 4) float32 each.

    WIDE: x (n / 4,), four numbers of 16 bits in one. Else x (halves, 4, chunks, 4), as `_by_place` has it. They are loaded in the shape
    of the words of outputs j, so that the threads that multiply them have them: of the first output only, and added up with the
    zeros of the others.
    """
    k = tl.arange(0, 4)
    none = (j * 0)[:, None, None]
    only = (tl.arange(0, j.shape[0]) == 0)[:, None, None]
    if WIDE:
        i = c[:, None] * (CHUNK // 4) + 4 * SECOND + k[None, :]
        four = tl.sum(tl.load(x + i[None] + none, mask=only & (i * 4 < n)[None], other=0), 0)
        return (
            _number_of(four, 0, HALF),
            _number_of(four, 1, HALF),
            _number_of(four, 2, HALF),
            _number_of(four, 3, HALF),
        )
    i = ((SECOND * 16 * chunks + c[:, None] * 4) + k[None, :])[None] + none
    there = only & ((c < chunks)[:, None] & (k >= 0)[None, :])[None]
    return (
        tl.sum(tl.load(x + i, mask=there, other=0.0), 0).to(tl.float32),
        tl.sum(tl.load(x + i + 4 * chunks, mask=there, other=0.0), 0).to(tl.float32),
        tl.sum(tl.load(x + i + 8 * chunks, mask=there, other=0.0), 0).to(tl.float32),
        tl.sum(tl.load(x + i + 12 * chunks, mask=there, other=0.0), 0).to(tl.float32),
    )


@triton.jit
def _level(words, more, one, BITS: tl.constexpr, PLACE: tl.constexpr):
    """Of number PLACE (of 4, or 8) of each word: its signed byte, or 1 + c / 2^b of its code c of b bits; float32.

    one: the bits of the float that codes go into: not a constant, so that `and` and `or` become one instruction. more: where codes
    have six bits, words with the upper two.
    """
    if BITS == 8:
        level = (((words >> 8 * PLACE) & 255) | one).to(tl.float32, bitcast=True) - 8388736.0  # 2^23 + 128
    elif BITS == 6:
        low = words << 17 if PLACE == 0 else words >> (4 * PLACE - 17) if PLACE > 4 else words << (17 - 4 * PLACE)
        at: tl.constexpr = 8 * (PLACE // 2) + 2 * 2 * (PLACE % 2)  # pyright: ignore
        high = more << (21 - at) if at <= 21 else more >> (at - 21)
        level = ((low & 0x1E0000) | ((high & 0x600000) | one)).to(tl.float32, bitcast=True)
    else:
        code = words << (19 - 4 * PLACE) if PLACE <= 4 else words >> (4 * PLACE - 19)
        level = ((code & 0x780000) | one).to(tl.float32, bitcast=True)
    return level


@triton.jit
def _tile(
    words,
    plain,
    halves,
    j,
    c,
    here,
    groups,
    words_row,
    plain_row,
    halves_row,
    n,
    beside,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
):
    """Of chunks c of outputs j: words (J, C, 4), those of upper bits, scale of one half and of the other and offset (J, C).

    beside: 1, but no constant: scales that the compiler took for neighbours would be loaded by other threads than need them.
    """
    k = tl.arange(0, 4)
    j = j[:, None].to(tl.int64)
    own = tl.load(
        words + (j * words_row + (c * 4)[None, :])[:, :, None] + k[None, None, :], mask=here[:, :, None], other=0
    )
    upper = own
    if BITS == 6:
        at = (j * words_row + (groups * 4 + c * 2)[None, :])[:, :, None] + (k % 2)[None, None, :]
        upper = tl.load(words + at, mask=here[:, :, None], other=0) >> (k // 2 * 2)[None, None, :]
    g = (c // 2 if BITS == 8 else c)[None, :] * beside
    scale, offset = _scale(plain, halves, j, g, 0, here, plain_row, halves_row, n, KIND)
    second = scale
    if KIND == Q6_K:
        second, offset = _scale(plain, halves, j, g, 1, here, plain_row, halves_row, n, KIND)
    return own, upper, scale, second, offset


@triton.autotune(ONE_ROW, key=["n", "q", "KIND", "BITS"], cache_results=not INTERPRETED)
@triton.jit(do_not_specialize=["beside"])
def _one_row(
    x, words, plain, halves, mask, bias, sums, y, q, words_row, plain_row, halves_row, n, one, beside, times, less, EACH,
    KIND: tl.constexpr, BITS: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """y[j] = x . w[j] + bias[j] where the mask keeps it, else 0; a program takes every P-th BLOCK_J outputs.

    times, less: 2^b steps of the codes, and what they stand for beside that less 2^b: see `_launch`.
    """
    begin_next()
    groups = (n + 31) // 32
    per: tl.constexpr = 16 if BITS == 8 else 32  # pyright: ignore -- inputs of a chunk
    warps: tl.constexpr = BLOCK_C // 32
    chunks = groups * (32 // per)
    parts = (chunks + BLOCK_C - 1) // BLOCK_C * warps  # sums of an output
    step = tl.num_programs(0) * BLOCK_J
    begin = tl.program_id(0) * BLOCK_J
    c = tl.arange(0, BLOCK_C)
    w, lane = tl.arange(0, warps), tl.arange(0, 32)
    wait_for_last()
    for first in range(0, chunks, BLOCK_C):
        behind = first + c
        j = begin + tl.arange(0, BLOCK_J)
        x0, x1, x2, x3 = _inputs(x, j, behind, n, chunks, 0, per, HALF, WIDE)
        if BITS != 8:
            x4, x5, x6, x7 = _inputs(x, j, behind, n, chunks, 1, per, HALF, WIDE)
            all_x = tl.sum(x0 + x1 + x2 + x3, 1)[None, :]
            more_x = tl.sum(x4 + x5 + x6 + x7, 1)[None, :]
            if KIND != Q6_K:
                all_x += more_x
        for start in tl.range(begin, q, step, num_stages=STAGES):
            j = start + tl.arange(0, BLOCK_J)
            keep = j < q
            if mask is not None:
                keep = keep & (tl.load(mask + j, mask=keep, other=0) != 0)
            here = keep[:, None] & (behind < chunks)[None, :]
            own, upper, scale, second, offset = _tile(
                words, plain, halves, j, behind, here, groups, words_row, plain_row, halves_row, n, beside, KIND, BITS
            )
            if BITS == 8:
                own = own ^ -2139062144  # 0x80808080: from -128 .. 127 to 0 .. 255
                part = _level(own, own, one, BITS, 0) * x0[None]
                part += _level(own, own, one, BITS, 1) * x1[None]
                part += _level(own, own, one, BITS, 2) * x2[None]
                part += _level(own, own, one, BITS, 3) * x3[None]
                total = tl.sum(part, 2) * scale
            else:
                part = _level(own, upper, one, BITS, 0) * x0[None]
                part += _level(own, upper, one, BITS, 2) * x1[None]
                part += _level(own, upper, one, BITS, 4) * x2[None]
                part += _level(own, upper, one, BITS, 6) * x3[None]
                if KIND == Q6_K:
                    total = (tl.sum(part, 2) * times + all_x * less) * scale
                    part = _level(own, upper, one, BITS, 1) * x4[None]
                else:
                    part += _level(own, upper, one, BITS, 1) * x4[None]
                part += _level(own, upper, one, BITS, 3) * x5[None]
                part += _level(own, upper, one, BITS, 5) * x6[None]
                part += _level(own, upper, one, BITS, 7) * x7[None]
                if KIND == Q6_K:
                    total += (tl.sum(part, 2) * times + more_x * less) * second
                else:
                    total = (tl.sum(part, 2) * times + all_x * less) * scale
                    if KIND == Q4_K:
                        total += offset * all_x
            each = tl.sum(tl.reshape(total, (BLOCK_J, warps, 32)), 2, keep_dims=True)
            to = j[:, None, None] * parts + ((first // 32 + w) * beside)[None, :, None] + (lane * 0)[None, None, :]
            at = (j < q)[:, None, None] & (w >= 0)[None, :, None] & (lane == 0)[None, None, :]
            tl.store(sums + to, tl.broadcast_to(each, (BLOCK_J, warps, 32)), mask=at)
    tl.debug_barrier()  # the sums are read by other threads than wrote them
    rows: tl.constexpr = 16 * BLOCK_J  # pyright: ignore
    r = tl.arange(0, rows)
    for start in range(begin, q, 16 * step):
        o = start + r // BLOCK_J * step + r % BLOCK_J
        inside = o < q
        result = tl.zeros([rows], tl.float32)
        for p in range(0, parts, warps):
            at = (o[:, None] * parts + p) + w[None, :]
            result += tl.sum(tl.load(sums + at, mask=inside[:, None] & (w >= 0)[None, :], other=0.0), 1)
        kept = inside
        if mask is not None:
            kept = inside & (tl.load(mask + o, mask=inside, other=0) != 0)
        if bias is not None:
            result += tl.load(bias + o, mask=kept, other=0.0).to(tl.float32)
        tl.store(y + o, tl.where(kept, result, 0.0).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _further(
    x, second, plain, halves, mask, base, y, q, second_row, plain_row, halves_row, n, middle,
    KIND: tl.constexpr, BITS: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """y[j] = base[j], and for the rows that the mask keeps what further bits of BITS bits add."""
    groups = (n + 31) // 32
    bytes: tl.constexpr = 4 * BITS  # of a group
    j = tl.program_id(0).to(tl.int64) * BLOCK_J + tl.arange(0, BLOCK_J)
    inside = j < q
    keep = inside & (tl.load(mask + j, mask=inside, other=0) != 0)
    total = tl.load(base + j, mask=inside, other=0.0)
    if tl.max(keep.to(tl.int32), 0) != 0:
        b, jj = tl.arange(0, 16), j[:, None]
        for start in range(0, groups, BLOCK_G):
            g = start + tl.arange(0, BLOCK_G)
            there = keep[:, None] & (g < groups)[None, :]
            for half in tl.static_range(2):
                i = half * 16 + b
                at = (g * bytes)[None, :, None] + (i % bytes)[None, None, :]
                byte = tl.load(second + jj[:, :, None] * second_row + at, mask=there[:, :, None], other=0).to(tl.int32)
                code = (byte >> (i // bytes * BITS)[None, None, :]) & ((1 << BITS) - 1)
                place = g[:, None] * 32 + i[None, :]
                value = tl.load(x + place, mask=place < n, other=0.0).to(tl.float32)
                scale, _ = _scale(plain, halves, jj, g[None, :], half, there, plain_row, halves_row, n, KIND)
                total += tl.sum(tl.sum((code.to(tl.float32) - middle) * value[None], 2) * scale, 1)
    tl.store(y + j, total.to(y.dtype.element_ty), mask=inside)


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
            value = tl.load(
                x + r[:, None] * x_row + i[None, :], mask=(r < count)[:, None] & (i < n)[None, :], other=0.0
            )
            level = _codes(codes, j[None, :], g[:, None], b[:, None], half, there, codes_row, groups, KIND)
            scale, offset = _scale(plain, halves, j[None, :], g[:, None], half, there, plain_row, halves_row, n, KIND)
            total = _dot(value, (level * scale + offset).to(x.dtype.element_ty), total)
    if bias is not None:
        total += tl.load(bias + j, mask=keep, other=0.0).to(tl.float32)[None, :]
    tl.store(y + r[:, None] * y_row + j[None, :], tl.where(own, total, 0.0).to(y.dtype.element_ty), mask=inside)
