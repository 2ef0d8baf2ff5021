// Rows of weights in groups times rows of x, for any format of formats/.
#pragma once

#include "core/rounded.h"

namespace {

// out[c] = row w[c] · x for C rows of weights, in plain loops.
template <class F, int C>
MOYU_ONCE void dot_plainly(const typename F::Line *w, const uint8_t *const *scales, const Rounded &x, int64_t groups, float *out) {
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
// Scales and offsets of `count` groups from b on, of four rows of weights: of each part of each group four neighbouring floats.
template <class S>
struct FourScales {
    static constexpr int H = S::halves;
    alignas(64) float scale[H][8][4], offset[H][8][4];
    void take(const typename S::Fields *fields, int64_t b, int count) {
        __m256 own[4][H], its[4][H];
        for (int c = 0; c < 4; ++c) S::row(fields[c], b, count, own[c], its[c]);
        for (int h = 0; h < H; ++h) {
            const auto place = [&](int part, float(*to)[8][4]) { return to[(8 * h + part) % H][(8 * h + part) / H]; };
            transpose_scales(own[0][h], own[1][h], own[2][h], own[3][h], [&](int part) { return place(part, scale); });
            if constexpr (S::has_offset)
                transpose_scales(its[0][h], its[1][h], its[2][h], its[3][h], [&](int part) { return place(part, offset); });
        }
    }
};

// What a row of x brings to kBeside groups from b + k on: its scales in the lanes of their groups, and what makes up for codes that
// stand for code - F::lift and for offsets.
template <class F>
struct GroupsOfX {
    static constexpr int H = F::Scales::halves;
    static constexpr bool kSums = F::lift != 0 || F::Scales::has_offset;
    typename Wide::Reg scale, sums[H], less[H];
    GroupsOfX(const Rounded &x, int64_t b, int k) {
        const __m256 by = load_eight(x.scale + b);
        scale = own_scales<1>(&by, k, 0);
        if constexpr (kSums) {
            __m256 some[H];
            for (int h = 0; h < H; ++h) some[h] = load_eight(H == 1 ? x.sums + b : x.half_sums + 2 * b + 8 * h);
            for (int h = 0; h < H; ++h) {
                sums[h] = own_scales<H>(some, k, h);
                less[h] = Wide::times(sums[h], Wide::set(-static_cast<float>(F::lift)));
            }
        }
    }
    // sum + what the integers of part h of the groups are worth to four rows of weights.
    typename Wide::Reg add(typename Wide::Reg sum, Bytes integers, const FourScales<typename F::Scales> &own, int k, int h) const {
        const auto value = F::lift != 0 ? add_product(in_floats(integers), scale, less[h]) : Wide::times(in_floats(integers), scale);
        sum = add_product(load_floats(own.scale[h][k]), value, sum);
        if constexpr (F::Scales::has_offset) sum = add_product(load_floats(own.offset[h][k]), sums[h], sum);
        return sum;
    }
};

// f(b, how many) for 8 groups after the other: a constant 8, or what is left behind the last 8.
template <class Fn>
inline void by_eight(int64_t groups, Fn f) {
    int64_t b = 0;
    for (; b + 8 <= groups; b += 8) f(b, std::integral_constant<int, 8>{});
    if (b < groups) f(b, static_cast<int>(groups - b));
}
// f(k, how many) for kBeside of these groups after the other; unrolled, because what depends on a group's number is then a constant.
template <class Count, class Fn>
inline void beside(Count count, Fn f) {
    if constexpr (std::is_integral_v<Count>) {
        for (int k = 0; k < count; k += kBeside) f(k, count - k < kBeside ? count - k : kBeside);
    } else {
#pragma GCC unroll 4
        for (int k = 0; k < 8; k += kBeside) f(k, kBeside);
    }
}

// out[r * stride + c] for four rows of weights in lockstep and R rows of x; the lines `then` are prefetched, null = none. Lanes of a
// product hold a group's integers in four parts; those of four rows are added up across lanes, so that the scales meet each
// group once: in the same order whatever R is, and as in core/group_tiles.h.
template <class F, int R>
MOYU_ONCE void dot_groups(const typename F::Line *w, const uint8_t *const *scales, const typename F::Line *then, const Rounded &x,
                       int64_t groups, float *out, int64_t stride) {
    using S = typename F::Scales;
    constexpr int H = S::halves;
    typename Wide::Reg sum[R];
    typename S::Fields fields[4];
    for (int c = 0; c < 4; ++c) fields[c] = S::of_row(scales[c], groups);
    for (int r = 0; r < R; ++r) sum[r] = Wide::set(0.0f);
    by_eight(groups, [&](int64_t b, auto count) {
        FourScales<S> own;
        own.take(fields, b, count);
        for (int c = 0; c < 4 && then; ++c) F::ahead(then[c], b);
        beside(count, [&](int k, int here) {
            Bytes front[4], back[4];
#pragma GCC unroll 4
            for (int c = 0; c < 4; ++c) F::codes(w[c], groups, b + k, here, front[c], back[c]);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const Rounded row = x.row(r);
                const uint8_t *q = reinterpret_cast<const uint8_t *>(row.halves) + 32 * (b + k);
                const Bytes first = load_some(q, kBytes), second = load_some(q + kBytes, kBytes);
                const GroupsOfX<F> of_x(row, b, k);
                Bytes products[4];
                if constexpr (H == 1) {
                    for (int c = 0; c < 4; ++c) products[c] = two_products<F::stands_signed>(front[c], first, back[c], second);
                    sum[r] = of_x.add(sum[r], sums_of_lanes(products), own, k, 0);
                } else {
                    for (int c = 0; c < 4; ++c) products[c] = add_products<F::stands_signed>(set_32(0), front[c], first);
                    sum[r] = of_x.add(sum[r], sums_of_lanes(products), own, k, 0);
                    for (int c = 0; c < 4; ++c) products[c] = add_products<F::stands_signed>(set_32(0), back[c], second);
                    sum[r] = of_x.add(sum[r], sums_of_lanes(products), own, k, 1);
                }
            }
        });
    });
    for (int c = 0; c < 4 && then; ++c) F::ahead_of_end(then[c], groups);
    for (int r = 0; r < R; ++r) store_four(out + r * stride, sum[r]);
}
#endif

// out[r * stride + c] = row w[c] · row r of x for four rows of weights and R rows of x; the lines `then` are prefetched, null = none.
// groups: of a row.
template <class F, int R>
inline void dot_four(const typename F::Line *w, const uint8_t *const *scales, [[maybe_unused]] const typename F::Line *then,
                     const Rounded &x, int64_t groups, float *out, int64_t stride) {
#if MOYU_INTEGERS
    dot_groups<F, R>(w, scales, then, x, groups, out, stride);
#else
    for (int r = 0; r < R; ++r) dot_plainly<F, 4>(w, scales, x.row(r), groups, out + r * stride);
#endif
}

}  // namespace
