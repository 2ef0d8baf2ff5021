// Rows of weights in groups times rows of x, for any format of formats/.
#pragma once

#include "core/rounded.h"

namespace {

// out[c] = row w[c] · x for C rows of weights, in plain loops.
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
// out[r * stride + c] for C rows of weights in lockstep and R rows of x, kBeside groups at a time, so that codes and scales are
// taken apart once for R rows; the lines `then` are prefetched, null = none. Codes stand for code - F::lift, and groups may have
// offsets: the sums of x make up for both. The loop over 8 groups is unrolled because what depends on a group's number is then a
// constant. A row's sums are made in the same order whatever R is.
template <class F, int C, int R>
MOYU_ONCE void dot_groups(const uint8_t *const *w, const uint8_t *const *scales, const uint8_t *const *then, const Rounded &x,
                       int64_t groups, float *out, int64_t stride) {
    using S = typename F::Scales;
    constexpr int H = S::halves, kAhead = 32 * F::bits;  // bytes of a line that 8 groups take
    constexpr bool kSums = F::lift != 0 || S::has_offset;
    const uint8_t *q = reinterpret_cast<const uint8_t *>(x.halves);
    const int64_t row = x.groups;  // groups from a row of x to the next
    typename Wide::Reg sum[R][C];
    typename S::Fields fields[C];
    for (int c = 0; c < C; ++c) fields[c] = S::of_row(scales[c], groups);
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) sum[r][c] = Wide::set(0.0f);
    // `count` groups from b on: a constant 8, or what is left behind the last 8.
    const auto add = [&](int64_t b, auto count) {
        __m256 own[R][C][H];
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
            __m256 scale[H], offset[H];
            S::row(fields[c], b, count, scale, offset);
            if (then) prefetch<kAhead>(then[c] + kAhead / 8 * b);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const __m256 xs = load_eight(x.scale + r * row + b);
                for (int h = 0; h < H; ++h) {
                    if constexpr (kSums) {
                        const __m256 sums = load_eight(H == 1 ? x.sums + r * row + b : x.half_sums + 2 * (r * row + b) + 8 * h);
                        if constexpr (S::has_offset) sum[r][c] = add_product(widened(offset[h]), widened(sums), sum[r][c]);
                        if constexpr (F::lift != 0) {
                            const __m256 less = Eight::times(sums, Eight::set(-static_cast<float>(F::lift)));
                            sum[r][c] = add_product(widened(scale[h]), widened(less), sum[r][c]);
                        }
                    }
                    own[r][c][h] = Eight::times(scale[h], H == 1 ? xs : twice_each(xs, h));
                }
            }
        }
        const auto some = [&](int k, int here) {
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) {
                Bytes front, back;
                F::codes(w[c], groups, b + k, here, front, back);
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) {
                    const uint8_t *at = q + 32 * (r * row + b + k);
                    const Bytes first = load_some(at, kBytes), second = load_some(at + kBytes, kBytes);
                    if constexpr (H == 1) {
                        const Bytes products = two_products<F::stands_signed>(front, first, back, second);
                        sum[r][c] = add_product(in_floats(products), own_scales<1>(own[r][c], k, 0), sum[r][c]);
                    } else {
                        const Bytes a = add_products<F::stands_signed>(set_32(0), front, first);
                        const Bytes b = add_products<F::stands_signed>(set_32(0), back, second);
                        sum[r][c] = add_product(in_floats(a), own_scales<H>(own[r][c], k, 0), sum[r][c]);
                        sum[r][c] = add_product(in_floats(b), own_scales<H>(own[r][c], k, 1), sum[r][c]);
                    }
                }
            }
        };
        if constexpr (std::is_integral_v<decltype(count)>) {
            for (int k = 0; k < count; k += kBeside) some(k, count - k < kBeside ? count - k : kBeside);
        } else {
#pragma GCC unroll 4
            for (int k = 0; k < 8; k += kBeside) some(k, kBeside);
        }
    };
    int64_t b = 0;
    for (; b + 8 <= groups; b += 8) add(b, std::integral_constant<int, 8>{});
    if (b < groups) add(b, static_cast<int>(groups - b));
    for (int c = 0; c < C && then; ++c) prefetch<128>(then[c] + kAhead / 8 * groups);
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) out[r * stride + c] = total(sum[r][c]);
}
#endif

}  // namespace
