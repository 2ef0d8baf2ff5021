"""Levels with weights in planes (`moyu.weights.planes`): the first bits of all inputs, the further bits of chosen ones.

One launch a row of x. Its programs are of two kinds: those of the first bits take some tiles of 64 outputs and some groups of 32 inputs;
those of the further bits list which of their inputs are chosen and read only these inputs' lines. The sums of all are added up by
the last program of a tile to arrive, in their order. Codes become floats as in `blocks`; x is not rounded, sums are float32.
"""

# pyright: reportInvalidTypeForm=false, reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false
# (Triton's launches and constant arguments have no types.)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moyu.kernels.gpu.blocks import ONE, Q4_K, Q6_K
from moyu.kernels.gpu.common import INTERPRETED, KINDS, inner, output, tickets
from moyu.kernels.gpu.overlap import EARLY, begin_next, wait_for_last
from moyu.kernels.gpu.single import _last_adds_up
from moyu.weights import Stored
from moyu.weights.planes import OUTPUTS, SPLITS

CONFIGS = [
    triton.Config(dict(zip(("BLOCK_T", "BLOCK_U", "GROUPS", "BLOCK_L", "CHUNK", "STAGES"), sizes, strict=False)), num_warps=sizes[-1],
                  num_stages=1)
    for sizes in (
        (1, 2, 3, 4, 32, 2, 4), (4, 4, 8, 32, 128, 3, 4), (4, 4, 4, 32, 128, 3, 4), (4, 4, 8, 16, 128, 3, 2), (8, 4, 8, 16, 128, 3, 4),
    )
]  # fmt: skip
CONFIGS = CONFIGS[:1] if INTERPRETED else CONFIGS[1:]


def served(weight: Stored) -> bool:
    """Whether the kernel reads the weight: whole tiles of outputs, which begin at multiples of 16 bytes."""
    aligned = all(t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 8 == 0 for t in weight.tensors)
    return weight.shape[0] % OUTPUTS == 0 and aligned


def levels(x: Tensor, weight: Stored, mask: Tensor, bias: Tensor | None) -> Tensor:
    """`kernels.levels`, of a weight that is `served`."""
    x, mask = inner(x), inner(mask).view(torch.int8)
    (second, scales, first), (q, n) = weight.tensors, weight.shape
    kind, bits = weight.format, weight.format.bits
    own, further = SPLITS[bits]
    zero = 128 if bits == 8 else kind.zero  # pyright: ignore[reportAttributeAccessIssue]
    middle = ((1 << further) - 1) / 2
    y = output(x, q, x.dtype)
    first, second = first.view(torch.int32), second.view(torch.int32)
    wide, words, shorts = (scales.view(t) for t in (torch.int64, torch.int32, torch.int16))
    tiles, groups = q // OUTPUTS, triton.cdiv(n, 32)
    smallest = {name: min(c.kwargs[name] for c in CONFIGS) for name in ("BLOCK_T", "GROUPS", "CHUNK")}
    splits = triton.cdiv(groups, smallest["GROUPS"]) + triton.cdiv(n, smallest["CHUNK"])
    room = triton.cdiv(tiles, smallest["BLOCK_T"]) * (n + max(c.kwargs["CHUNK"] for c in CONFIGS))
    for r in range(len(x)):
        partial = torch.empty(splits, q, dtype=torch.float32, device=x.device)
        picks = torch.empty(room, dtype=torch.int32, device=x.device)
        _levels[
            lambda meta: (
                triton.cdiv(tiles, meta["BLOCK_T"]),
                triton.cdiv(groups, meta["GROUPS"]) + triton.cdiv(n, meta["CHUNK"]),
            )
        ](
            x[r], mask[r], first, second, wide, words, shorts, bias, picks, partial, tickets(x.device), y[r], n, q,
            first.stride(0), second.stride(0), wide.stride(0), ONE, 2.0 ** (own + further),
            middle - zero - 2.0 ** (own + further), 1 + middle / 2**further,
            KIND=KINDS.get(kind.name), FIRST=own, FURTHER=further, **EARLY,
        )  # fmt: skip
    return y.to(x.dtype)


@triton.jit
def _number(words, one, AT: tl.constexpr, BITS: tl.constexpr):
    """1 + c / 2^b of the code of b bits from bit AT on of each word, float32. one: the bits of 1.0."""
    to: tl.constexpr = 23 - BITS
    moved = words << (to - AT) if to >= AT else words >> (AT - to)
    return ((moved & ((1 << BITS) - 1 << to)) | one).to(tl.float32, bitcast=True)


@triton.jit
def _half(words, AT: tl.constexpr):
    """The half float from bit AT on of each word, float32."""
    return (words >> AT).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _byte(words, AT: tl.constexpr, SIGNED: tl.constexpr):
    """The byte from bit AT on of each word, float32."""
    return (words >> AT).to(tl.int8).to(tl.float32) if SIGNED else ((words >> AT) & 255).to(tl.float32)


@triton.jit
def _scales_of_two(words, shorts, g, part, at, inside, q, row, KIND: tl.constexpr):
    """Scales and offsets of outputs 2 at and 2 at + 1 in a group; part: which half of it. row: words of a line."""
    if KIND == Q4_K:
        base, own = g // 8 * row, g % 8 * (q // 2)
        d = tl.load(words + base + at, mask=inside, other=0)
        low = tl.load(words + base + q // 2 + at, mask=inside, other=0)
        s = tl.load(shorts + 2 * base + 2 * q + own + at, mask=inside, other=0).to(tl.int32)
        m = tl.load(shorts + 2 * base + 6 * q + own + at, mask=inside, other=0).to(tl.int32)
        scale, more = _half(d, 0) * _byte(s, 0, False), _half(d, 16) * _byte(s, 8, False)
        offset, other = _half(low, 0) * _byte(m, 0, False), _half(low, 16) * _byte(m, 8, False)
    elif KIND == Q6_K:
        base, own = g // 8 * row, (g % 8 * 2 + part) * (q // 2)
        d = tl.load(words + base + at, mask=inside, other=0)
        s = tl.load(shorts + 2 * base + q + own + at, mask=inside, other=0).to(tl.int32)
        scale, more = _half(d, 0) * _byte(s, 0, True), _half(d, 16) * _byte(s, 8, True)
        offset, other = scale, more
    else:
        d = tl.load(words + g * row + at, mask=inside, other=0)
        scale, more = _half(d, 0), _half(d, 16)
        offset, other = scale, more
    return scale, more, offset, other


@triton.jit
def _scales_of_four(wide, words, g, part, at, inside, q, row, KIND: tl.constexpr):
    """Scales of outputs 4 at to 4 at + 3 in groups g. row: int64 words of a line."""
    base = g // 8 * row if KIND == Q4_K or KIND == Q6_K else g * row  # noqa: SIM109 -- Triton knows no `in`
    d = tl.load(wide + base + at, mask=inside, other=0)
    a, b, c, e = _half(d, 0), _half(d, 16), _half(d, 32), _half(d, 48)
    if KIND == Q4_K:
        s = tl.load(words + 2 * base + q + g % 8 * (q // 4) + at, mask=inside, other=0)
        a, b, c, e = a * _byte(s, 0, False), b * _byte(s, 8, False), c * _byte(s, 16, False), e * _byte(s, 24, False)
    elif KIND == Q6_K:
        s = tl.load(words + 2 * base + q // 2 + (g % 8 * 2 + part) * (q // 4) + at, mask=inside, other=0)
        a, b, c, e = a * _byte(s, 0, True), b * _byte(s, 8, True), c * _byte(s, 16, True), e * _byte(s, 24, True)
    return a, b, c, e


@triton.jit
def _first_bits(
    x, first, words, shorts, to, tile, begin, end, n, q, first_row, words_row, one, times, less,
    KIND: tl.constexpr, BITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_U: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """to[outputs of these tiles] = their sums over groups begin .. end. A word is of two outputs, and of two more 32 further on."""
    units: tl.constexpr = 4 * BITS  # pieces of 64 bytes of a group and tile, each of pairs of inputs
    each: tl.constexpr = units // BLOCK_U
    m, u = tl.arange(0, BLOCK_T * 16), tl.arange(0, BLOCK_U)
    t = tile * BLOCK_T + m // 16
    inside = (t < q // 64)[None, :] & (u >= 0)[:, None]
    at = (t * 32 + m % 16)[None, :]
    place = (t * (units * 16) + m % 16)[None, :]
    part = (u * each // 8)[:, None]
    a = tl.zeros([BLOCK_U, BLOCK_T * 16], tl.float32)
    b, c, d = a, a, a
    line = first + begin.to(tl.int64) * first_row
    for g in tl.range(begin, end, num_stages=STAGES):
        own_a = tl.zeros([BLOCK_U, BLOCK_T * 16], tl.float32)
        own_b, own_c, own_d = own_a, own_a, own_a
        all_x = tl.zeros([BLOCK_U], tl.float32)
        for k in tl.static_range(each):
            unit = u * each + k
            codes = tl.load(line + (g - begin) * first_row + place + unit[:, None] * 16, mask=inside, other=0)
            for h in tl.static_range(4 // BITS):
                for parity in tl.static_range(2):
                    i = g * 32 + 2 * (h * units + unit) + parity
                    value = tl.load(x + i, mask=i < n, other=0.0).to(tl.float32)
                    all_x += value
                    value = value[:, None]
                    own_a += _number(codes, one, 8 * parity + BITS * 2 * h, BITS) * value
                    own_b += _number(codes, one, 8 * parity + BITS * 2 * h + 16, BITS) * value
                    own_c += _number(codes, one, 8 * parity + BITS * (2 * h + 1), BITS) * value
                    own_d += _number(codes, one, 8 * parity + BITS * (2 * h + 1) + 16, BITS) * value
        rest = all_x[:, None]
        scale, more, offset, other = _scales_of_two(words, shorts, g, part, at, inside, q, words_row, KIND)
        a += (own_a * times + rest * less) * scale
        b += (own_b * times + rest * less) * more
        if KIND == Q4_K:
            a -= rest * offset
            b -= rest * other
        scale, more, offset, other = _scales_of_two(words, shorts, g, part, at + 16, inside, q, words_row, KIND)
        c += (own_c * times + rest * less) * scale
        d += (own_d * times + rest * less) * more
        if KIND == Q4_K:
            c -= rest * offset
            d -= rest * other
    o = t * 64 + m % 16 * 2
    there = t < q // 64
    tl.store(to + o, tl.sum(a, 0), mask=there)
    tl.store(to + o + 1, tl.sum(b, 0), mask=there)
    tl.store(to + o + 32, tl.sum(c, 0), mask=there)
    tl.store(to + o + 33, tl.sum(d, 0), mask=there)


@triton.jit
def _add_four(sums, codes, value, wide, words, g, part, at, inside, q, row, one, centre, KIND: tl.constexpr, BITS: tl.constexpr,
              FIELD: tl.constexpr):  # fmt: skip
    """Four sums += value times the codes of field FIELD of the four bytes of each word, less the middle, in 2^-b of a step."""
    a, b, c, d = _scales_of_four(wide, words, g, part, at + FIELD * (2 * BITS), inside, q, row, KIND)
    return (
        sums[0] + (_number(codes, one, BITS * FIELD, BITS) - centre) * (a * value),
        sums[1] + (_number(codes, one, BITS * FIELD + 8, BITS) - centre) * (b * value),
        sums[2] + (_number(codes, one, BITS * FIELD + 16, BITS) - centre) * (c * value),
        sums[3] + (_number(codes, one, BITS * FIELD + 24, BITS) - centre) * (d * value),
    )


@triton.jit
def _store_four(to, o, sums, there, BITS: tl.constexpr):
    """Outputs o to o + 3 of the sums over all lines."""
    step: tl.constexpr = 1 << BITS
    tl.store(to + o, tl.sum(sums[0], 0) * step, mask=there)
    tl.store(to + o + 1, tl.sum(sums[1], 0) * step, mask=there)
    tl.store(to + o + 2, tl.sum(sums[2], 0) * step, mask=there)
    tl.store(to + o + 3, tl.sum(sums[3], 0) * step, mask=there)


@triton.jit
def _further_bits(
    x, mask, second, wide, words, picks, to, tile, chunk, n, q, second_row, row, one, centre,
    KIND: tl.constexpr, BITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_L: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """to[outputs of these tiles] = the sums over the chosen inputs of a chunk of what their further bits add."""
    own = chunk * CHUNK + tl.arange(0, CHUNK)
    kept = tl.load(mask + own, mask=own < n, other=0) != 0
    rank = tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(picks + rank, own, mask=kept)
    end = tl.sum(kept.to(tl.int32), 0)
    tl.debug_barrier()  # the list is read by other threads than wrote it
    each: tl.constexpr = 2 * BITS  # words of a tile
    m = tl.arange(0, BLOCK_T * each)
    t = tile * BLOCK_T + m // each
    there = t < q // 64
    at = (t * 16 + m % each)[None, :]
    place = (t * each + m % each)[None, :]
    zero = tl.zeros([BLOCK_L, BLOCK_T * each], tl.float32)
    one_of, two_of = (zero, zero, zero, zero), (zero, zero, zero, zero)
    three_of, four_of = (zero, zero, zero, zero), (zero, zero, zero, zero)
    for start in range(0, end, BLOCK_L):
        k = start + tl.arange(0, BLOCK_L)
        here = k < end
        i = tl.load(picks + k, mask=here, other=0)
        value = tl.load(x + i, mask=here, other=0.0).to(tl.float32)[:, None]
        g, part = (i // 32)[:, None], (i // 16 % 2)[:, None]
        inside = here[:, None] & there[None, :]
        codes = tl.load(second + i.to(tl.int64)[:, None] * second_row + place, mask=inside, other=0)
        one_of = _add_four(one_of, codes, value, wide, words, g, part, at, inside, q, row, one, centre, KIND, BITS, 0)
        two_of = _add_four(two_of, codes, value, wide, words, g, part, at, inside, q, row, one, centre, KIND, BITS, 1)
        if BITS == 2:
            three_of = _add_four(
                three_of, codes, value, wide, words, g, part, at, inside, q, row, one, centre, KIND, BITS, 2
            )
            four_of = _add_four(
                four_of, codes, value, wide, words, g, part, at, inside, q, row, one, centre, KIND, BITS, 3
            )
    o = t * 64 + m % each * 4
    _store_four(to, o, one_of, there, BITS)
    _store_four(to, o + 8 * BITS, two_of, there, BITS)
    if BITS == 2:
        _store_four(to, o + 16 * BITS, three_of, there, BITS)
        _store_four(to, o + 24 * BITS, four_of, there, BITS)


@triton.autotune(CONFIGS, key=["n", "q", "KIND"], cache_results=not INTERPRETED)
@triton.jit
def _levels(
    x, mask, first, second, wide, words, shorts, bias, picks, partial, tickets, y, n, q, first_row, second_row, row, one, times,
    less, centre, KIND: tl.constexpr, FIRST: tl.constexpr, FURTHER: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_U: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK_L: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y = sum over i of x_i w_i + bias, w_i with its further bits where the mask says so. row: int64 words of a line of scales."""
    begin_next()
    wait_for_last()
    tile, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    groups = (n + 31) // 32
    firsts = (groups + GROUPS - 1) // GROUPS
    if split < firsts:
        begin = split * GROUPS
        _first_bits(
            x, first, words, shorts, partial + split * q, tile, begin, tl.minimum(begin + GROUPS, groups), n, q, first_row,
            2 * row, one, times, less, KIND, FIRST, BLOCK_T, BLOCK_U, STAGES,
        )  # fmt: skip
    else:
        chunk = split - firsts
        _further_bits(
            x, mask, second, wide, words, picks + (tile * (splits - firsts) + chunk) * CHUNK, partial + split * q, tile, chunk, n,
            q, second_row, row, one, centre, KIND, FURTHER, BLOCK_T, BLOCK_L, CHUNK,
        )  # fmt: skip
    d = tile * (BLOCK_T * 64) + tl.arange(0, BLOCK_T * 64)
    _last_adds_up(partial, tickets, bias, y, d, q, tile, splits, BLOCK_T * 64)
