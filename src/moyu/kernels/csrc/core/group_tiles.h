// 16 rows of weights in groups times several rows of x: every lane is an output of a group.
//
// The codes of four rows are taken apart and transposed within lanes of 128 bits, so that such a lane holds four inputs of each of
// four outputs. They meet the same four integers of x, eight times in a group; only then come floats: the group's integer, its scales.
// That is a third of the instructions of a product along the rows (core/group_rows.h), which a few rows of x take nevertheless,
// because there transposing costs more than it saves. Every sum is made in the same order there and here.
#pragma once

#include "core/group_rows.h"

namespace {

constexpr int kTileLines = kMostPieces;

#if MOYU_INTEGERS
constexpr int64_t kTileRows = kBytes == 64 ? 6 : 2;  // of x, from which on a tile is faster: in 256 bits four rows' sums fill the registers
constexpr bool kTiles = kFourProducts;

// out[r * stride + c] = row w[c] · row r of x, c in 0 .. 15; the lines `then` are prefetched.
template <class F>
MOYU_ONCE void dot_tile(const typename F::Line *w, const uint8_t *const *scales, const typename F::Line *then, const Rounded &x,
                     int64_t rows, int64_t groups, float *out, int64_t stride) {
    using S = typename F::Scales;
    constexpr int H = S::halves, kFours = kTileLines / 4;
    alignas(64) float sum[kMostRows][kFours][kLanes];
    typename S::Fields fields[kTileLines];
    for (int c = 0; c < kTileLines; ++c) fields[c] = S::of_row(scales[c], groups);
    for (int64_t r = 0; r < rows; ++r)
        for (auto &four : sum[r]) store_floats(four, Wide::set(0.0f));
    by_eight(groups, [&](int64_t b, auto count) {
        FourScales<S> own[kFours];
        for (int four = 0; four < kFours; ++four) own[four].take(fields + 4 * four, b, count);
        for (int c = 0; c < kTileLines; ++c) F::ahead(then[c], b);
        beside(count, [&](int k, int here) {
            Bytes codes[kFours][2][4];
            for (int four = 0; four < kFours; ++four) {
                Bytes front[4], back[4];
#pragma GCC unroll 4
                for (int c = 0; c < 4; ++c) F::codes(w[4 * four + c], groups, b + k, here, front[c], back[c]);
                transpose_lanes(front, codes[four][0]), transpose_lanes(back, codes[four][1]);
            }
            for (int64_t r = 0; r < rows; ++r) {
                const Rounded row = x.row(r);
                const uint8_t *q = reinterpret_cast<const uint8_t *>(row.halves) + 32 * (b + k);
                const Bytes first = load_some(q, kBytes), second = load_some(q + kBytes, kBytes);
                const Bytes parts[2][4] = {{each_four<0>(first), each_four<1>(first), each_four<2>(first), each_four<3>(first)},
                                           {each_four<0>(second), each_four<1>(second), each_four<2>(second), each_four<3>(second)}};
                const GroupsOfX<F> of_x(row, b, k);
#pragma GCC unroll 4
                for (int four = 0; four < kFours; ++four) {
                    Bytes total[H];
                    for (auto &t : total) t = set_32(0);
#pragma GCC unroll 8
                    for (int i = 0; i < 8; ++i) {
                        Bytes &t = total[H == 1 ? 0 : i / 4];
                        t = add_products<F::stands_signed>(t, codes[four][i / 4][i % 4], parts[i / 4][i % 4]);
                    }
                    auto all = load_floats(sum[r][four]);
                    for (int h = 0; h < H; ++h) all = of_x.add(all, total[h], own[four], k, h);
                    store_floats(sum[r][four], all);
                }
            }
        });
    });
    for (int c = 0; c < kTileLines; ++c) F::ahead_of_end(then[c], groups);
    for (int64_t r = 0; r < rows; ++r)
        for (int four = 0; four < kFours; ++four) store_four(out + r * stride + 4 * four, load_floats(sum[r][four]));
}
#else
constexpr bool kTiles = false;
constexpr int64_t kTileRows = 0;
#endif

}  // namespace
