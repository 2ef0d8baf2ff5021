// 16 rows of weights in groups times several rows of x: every lane is an output of a group.
//
// The codes of four rows are taken apart and transposed within lanes of 128 bits, so that such a lane holds four inputs of each of
// four outputs. They meet the same four integers of x, eight times in a group; only then come floats: the group's integer, its scales.
// That is a third of the instructions of a product along the rows (core/group_rows.h), which one or two rows of x take nevertheless,
// because there transposing costs more than it saves.
#pragma once

#include "core/group_rows.h"

namespace {

constexpr int kTileLines = kMostPieces;
constexpr int64_t kTileRows = 4;  // of x, from which on a tile is as fast or faster

#if MOYU_INTEGERS
constexpr bool kTiles = kFourProducts;

// out[r * stride + c] = row w[c] · row r of x, c in 0 .. 15; the lines `then` are prefetched.
template <class F>
MOYU_ONCE void dot_tile(const uint8_t *const *w, const uint8_t *const *scales, const uint8_t *const *then, const Rounded &x,
                     int64_t rows, int64_t groups, float *out, int64_t stride) {
    using S = typename F::Scales;
    using Floats = typename Wide::Reg;
    constexpr int H = S::halves, kAhead = 32 * F::bits, kFours = kTileLines / 4;
    constexpr bool kSums = F::lift != 0 || S::has_offset;
    const int64_t row = x.groups;
    alignas(64) float sum[kMostRows][kFours][kLanes];
    typename S::Fields fields[kTileLines];
    for (int c = 0; c < kTileLines; ++c) fields[c] = S::of_row(scales[c], groups);
    for (int64_t r = 0; r < rows; ++r)
        for (auto &four : sum[r]) store_floats(four, Wide::set(0.0f));
    const auto add = [&](int64_t b, auto count) {
        alignas(64) float scale[kFours][H][8][4], offset[kFours][H][8][4];  // of a part of a group: of four outputs
        for (int four = 0; four < kFours; ++four) {
            __m256 own[4][H], its[4][H];
            for (int c = 0; c < 4; ++c) {
                S::row(fields[4 * four + c], b, count, own[c], its[c]);
                prefetch<kAhead>(then[4 * four + c] + kAhead / 8 * b);
            }
            for (int h = 0; h < H; ++h) {
                const auto place = [&](int part, float(*to)[8][4]) { return to[(8 * h + part) % H][(8 * h + part) / H]; };
                transpose_scales(own[0][h], own[1][h], own[2][h], own[3][h], [&](int part) { return place(part, scale[four]); });
                if constexpr (S::has_offset)
                    transpose_scales(its[0][h], its[1][h], its[2][h], its[3][h], [&](int part) { return place(part, offset[four]); });
            }
        }
        const auto some = [&](int k, int here) {
            Bytes codes[kFours][2][4];
            for (int four = 0; four < kFours; ++four) {
                Bytes front[4], back[4];
#pragma GCC unroll 4
                for (int c = 0; c < 4; ++c) F::codes(w[4 * four + c], groups, b + k, here, front[c], back[c]);
                transpose_lanes(front, codes[four][0]), transpose_lanes(back, codes[four][1]);
            }
            for (int64_t r = 0; r < rows; ++r) {
                const uint8_t *q = reinterpret_cast<const uint8_t *>(x.halves) + 32 * (r * row + b + k);
                const Bytes first = load_some(q, kBytes), second = load_some(q + kBytes, kBytes);
                const Bytes parts[2][4] = {{each_four<0>(first), each_four<1>(first), each_four<2>(first), each_four<3>(first)},
                                           {each_four<0>(second), each_four<1>(second), each_four<2>(second), each_four<3>(second)}};
                const __m256 by = load_eight(x.scale + r * row + b);
                const Floats scale_of_x = own_scales<1>(&by, k, 0);
                Floats sums[H], less[H];
                if constexpr (kSums) {
                    __m256 some[H];
                    for (int h = 0; h < H; ++h)
                        some[h] = load_eight(H == 1 ? x.sums + r * row + b : x.half_sums + 2 * (r * row + b) + 8 * h);
                    for (int h = 0; h < H; ++h) {
                        sums[h] = own_scales<H>(some, k, h);
                        less[h] = Wide::times(sums[h], Wide::set(-static_cast<float>(F::lift)));
                    }
                }
#pragma GCC unroll 4
                for (int four = 0; four < kFours; ++four) {
                    Bytes total[H];
                    for (auto &t : total) t = set_32(0);
#pragma GCC unroll 8
                    for (int i = 0; i < 8; ++i) {
                        Bytes &t = total[H == 1 ? 0 : i / 4];
                        t = add_products<F::stands_signed>(t, codes[four][i / 4][i % 4], parts[i / 4][i % 4]);
                    }
                    Floats all = load_floats(sum[r][four]);
                    for (int h = 0; h < H; ++h) {
                        Floats value = F::lift != 0 ? add_product(in_floats(total[h]), scale_of_x, less[h])
                                                    : Wide::times(in_floats(total[h]), scale_of_x);
                        all = add_product(load_floats(scale[four][h][k]), value, all);
                        if constexpr (S::has_offset) all = add_product(load_floats(offset[four][h][k]), sums[h], all);
                    }
                    store_floats(sum[r][four], all);
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
    for (int c = 0; c < kTileLines; ++c) prefetch<128>(then[c] + kAhead / 8 * groups);
    for (int64_t r = 0; r < rows; ++r)
        for (int c = 0; c < kTileLines; ++c) {
            float &to = out[r * stride + c] = 0.0f;
            for (int part = 0; part < kLanes; part += 4) to += sum[r][c / 4][part + c % 4];
        }
}
#else
constexpr bool kTiles = false;
#endif

}  // namespace
