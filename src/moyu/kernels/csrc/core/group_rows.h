// Rows of weights in groups times a row of x, for any format of formats/.
#pragma once

#include "core/rounded.h"

namespace {

// out[c] = row w[c] · x for C rows, in plain loops.
template <class F, int C>
MOYU_ONCE void dot_plainly(const uint8_t *const *w, const uint8_t *const *scales, const Rounded &x, int64_t groups, float *out) {
    using S = typename F::Scales;
    constexpr int size = kGroup / S::halves;
    for (int c = 0; c < C; ++c) {
        const auto fields = S::of_row(scales[c], groups);
        out[c] = 0.0f;
        for (int64_t part = 0; part < groups * S::halves; ++part) {
            int32_t total = 0, sum = 0;
            for (int64_t i = part * size; i < (part + 1) * size; ++i)
                total += F::level(w[c], i, groups) * x.ordered[i], sum += x.ordered[i];
            const auto own = S::at(fields, part / (S::halves * S::span), part);
            const float by = x.scale[part / S::halves];
            out[c] += static_cast<float>(total) * (own.scale * by);
            if (S::has_offset) out[c] += static_cast<float>(sum) * (own.offset * by);
        }
    }
}

#if MOYU_INTEGERS
// The same for C rows in lockstep, kBeside groups at a time; the lines `then` are prefetched, null = none. Codes stand for
// code - F::lift, and groups may have offsets: the sums of x make up for both. The loop over 8 groups is unrolled because what
// depends on a group's number is then a constant.
template <class F, int C>
MOYU_ONCE void dot_groups(const uint8_t *const *w, const uint8_t *const *scales, const uint8_t *const *then, const Rounded &x,
                       int64_t groups, float *out) {
    using S = typename F::Scales;
    constexpr int H = S::halves, kAhead = 32 * F::bits;  // bytes of a line that 8 groups take
    constexpr bool kSums = F::lift != 0 || S::has_offset, kWhole = F::bits == 8;  // kWhole: registers hold whole groups
    const uint8_t *q = reinterpret_cast<const uint8_t *>(kWhole ? x.ordered : x.halves);
    typename Wide::Reg sum[C];
    typename S::Fields fields[C];
    for (int c = 0; c < C; ++c) sum[c] = Wide::set(0.0f), fields[c] = S::of_row(scales[c], groups);
    for (int64_t b = 0; b < groups; b += 8) {
        const int count = groups - b < 8 ? static_cast<int>(groups - b) : 8;
        const __m256 xs = load_eight(x.scale + b);
        __m256 own[C][H];
        for (int c = 0; c < C; ++c) {
            __m256 offset[H];
            S::row(fields[c], b, count, own[c], offset);
            if (then) prefetch<kAhead>(then[c] + kAhead / 8 * b);
            for (int h = 0; h < H; ++h) {
                if constexpr (kSums) {
                    const __m256 sums = load_eight(H == 1 ? x.sums + b : x.half_sums + 2 * b + 8 * h);
                    if constexpr (S::has_offset) sum[c] = add_product(widened(offset[h]), widened(sums), sum[c]);
                    if constexpr (F::lift != 0) {
                        const __m256 less = Eight::times(sums, Eight::set(-static_cast<float>(F::lift)));
                        sum[c] = add_product(widened(own[c][h]), widened(less), sum[c]);
                    }
                }
                own[c][h] = Eight::times(own[c][h], H == 1 ? xs : twice_each(xs, h));
            }
        }
        const auto some = [&](int k, int here) {
            const Bytes first = load_some(q + 32 * (b + k), kBytes), second = load_some(q + 32 * (b + k) + kBytes, kBytes);
            for (int c = 0; c < C; ++c) {
                Bytes front, back;
                F::codes(w[c], groups, b + k, here, front, back);
                if constexpr (H == 1 && !kWhole) {
                    const Bytes products = two_products<F::stands_signed>(front, first, back, second);
                    sum[c] = add_product(in_floats(products), own_scales<1>(own[c], k, 0), sum[c]);
                } else {
                    const auto scales_of = [&](int half) { return kWhole ? whole_scales(own[c][0], k, half) : own_scales<H>(own[c], k, half); };
                    const Bytes a = add_products<F::stands_signed>(set_32(0), front, first);
                    const Bytes b = add_products<F::stands_signed>(set_32(0), back, second);
                    sum[c] = add_product(in_floats(a), scales_of(0), sum[c]);
                    sum[c] = add_product(in_floats(b), scales_of(1), sum[c]);
                }
            }
        };
        if (count == 8) {
#pragma GCC unroll 4
            for (int k = 0; k < 8; k += kBeside) some(k, kBeside);
        } else {
            for (int k = 0; k < count; k += kBeside) some(k, count - k < kBeside ? count - k : kBeside);
        }
    }
    for (int c = 0; c < C && then; ++c) prefetch<128>(then[c] + kAhead / 8 * groups);
    for (int c = 0; c < C; ++c) out[c] = total(sum[c]);
}
#endif

}  // namespace
