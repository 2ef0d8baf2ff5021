// y = x · Wᵀ with skipped rows of W (`rows`) or skipped columns of W (`columns`). The `_share` functions are one thread's
// part; the operators below and the decode step (decode.h) are made of them.
#pragma once

#include "pieces.h"

namespace {

// out (rows, q), the kept rows of W that are this thread's; x as load_rows leaves it. Returns the bytes read.
template <class T>
int64_t rows_share(const LinearArgs &a, const Factor<T> *x, const int32_t *kept, int64_t count, const moyu::Team &team) {
    const int64_t row_bytes = a.n * static_cast<int64_t>(sizeof(T));
    const int64_t bias_bytes = a.bias ? static_cast<int64_t>(sizeof(T)) : 0;
    const int64_t hop = Taken::hop(row_bytes);
    const int streams = together(row_bytes, a.mask && a.rows > kFewRows);
    const Share share(count, team);
    const Part weight{a.weight, a.weight_stride};
    T *out = static_cast<T *>(a.out);
    float value[kRowBlock][kTogether];
    int64_t read = 0;
    for (int64_t step = 0; step < Taken::steps(share, streams); ++step) {
        const Taken taken(kept, share, streams, step, hop);
        const Takers takers(taken, a.mask, a.mask_stride, a.rows);
        auto weights = [&](int64_t r) {
            return Weights<T>(taken, takers.which[r], takers.own[r], weight, weight, taken.next);
        };
        project<T>(takers, weights, x, a.rows, a.n, value);
        for (int64_t r = 0; r < a.rows; ++r)
            for (int i = 0; i < takers.own[r]; ++i) {
                const int64_t j = taken.piece[takers.which[r][i]];
                if (takers.keeps(a.mask, a.mask_stride, r, j)) narrow(value[r][i] + bias_at<T>(a.bias, j), out[r * a.q + j]);
            }
        read += taken.count * (row_bytes + bias_bytes);
    }
    return read;
}

// Where the rows of x keep most of the `count` columns that any of them keeps, they take all: x has zeros for what a row
// skips (`zeroed` has room for them), and nobody asks the mask for each piece again.
template <class T>
void take_together(LinearArgs &a, int64_t count, T *zeroed) {
    if (a.mask == nullptr || a.rows == 1) return;
    int64_t kept = 0;
    for (int64_t r = 0; r < a.rows; ++r) {
        const uint8_t *mask = a.mask + r * a.mask_stride;
        int32_t own = 0;
        for (int64_t i = 0; i < a.n; ++i) own += mask[i] != 0;
        kept += own;
    }
    if (100 * kept < kSharedColumnsPercent * a.rows * count) return;
    for (int64_t r = 0; r < a.rows; ++r) {
        const T *x = at<T>(a.x, r * a.x_stride);
        const uint8_t *mask = a.mask + r * a.mask_stride;
        for (int64_t i = 0; i < a.n; ++i) zeroed[r * a.n + i] = or_zero(mask[i] != 0, x[i]);
    }
    a.x = zeroed, a.x_stride = a.n, a.mask = nullptr;
}

// sums (rows, padded q) += the kept columns of W that are this thread's, times their x. Returns the bytes read.
template <class T>
int64_t columns_share(const LinearArgs &a, const int32_t *kept, int64_t count, const moyu::Team &team, float *sums) {
    const int64_t column_bytes = a.q * static_cast<int64_t>(sizeof(T));
    const int64_t hop = Taken::hop(column_bytes);
    const int streams = together(column_bytes, a.mask && a.rows > kFewRows);
    const Share share(count, team);
    const Part weight{a.weight, a.weight_stride};
    float value[kRowBlock][kTogether];
    int64_t read = 0;
    for (int64_t step = 0; step < Taken::steps(share, streams); ++step) {
        const Taken taken(kept, share, streams, step, hop);
        const Takers takers(taken, a.mask, a.mask_stride, a.rows);
        auto weights = [&](int64_t r) {
            return Weights<T>(taken, takers.which[r], takers.own[r], weight, weight, taken.next);
        };
        for (int64_t r = 0; r < a.rows; ++r)
            for (int i = 0; i < takers.own[r]; ++i) {
                const int64_t j = taken.piece[takers.which[r][i]];
                value[r][i] = takers.keeps(a.mask, a.mask_stride, r, j) ? widen(*at<T>(a.x, r * a.x_stride + j)) : 0.0f;
            }
        accumulate<T>(takers, weights, value, sums, a.rows, a.q);
        read += taken.count * column_bytes;
    }
    return read;
}

template <class T>
int64_t rows_block(const LinearArgs &a) {
    Arena arena(4 * (a.rows * round_up(a.n) + a.q) + a.q + 8 * a.threads);
    Factor<T> *x = arena.take<Factor<T>>(a.rows * round_up(a.n));
    int32_t *kept = arena.take<int32_t>(a.q);
    uint8_t *any = arena.take<uint8_t>(a.q);
    int64_t *bytes = arena.take<int64_t>(a.threads);

    load_rows<T>(a.x, a.x_stride, a.rows, a.n, x);
    if (a.mask)
        for (int64_t i = 0; i < a.rows * a.q; ++i) static_cast<T *>(a.out)[i] = T{};
    const int64_t count = list_kept(a.mask, a.mask_stride, a.rows, a.q, any, kept);
    auto work = [&](const moyu::Team &team) { bytes[team.thread] = rows_share<T>(a, x, kept, count, team); };
    return total_of(bytes, a.threads, threads_for(count * a.n * static_cast<int64_t>(sizeof(T)), count, a.threads), work);
}

template <class T>
int64_t columns_block(const LinearArgs &args) {
    LinearArgs a = args;
    const int64_t sums_size = a.rows * round_up(a.q);
    Arena arena(4 * (a.threads * sums_size + a.n) + a.n + 8 * a.threads + a.rows * a.n * static_cast<int64_t>(sizeof(T)));
    float *sums = arena.take<float>(a.threads * sums_size);
    int32_t *kept = arena.take<int32_t>(a.n);
    uint8_t *any = arena.take<uint8_t>(a.n);
    int64_t *bytes = arena.take<int64_t>(a.threads);

    const int64_t count = list_kept(a.mask, a.mask_stride, a.rows, a.n, any, kept);
    take_together<T>(a, count, arena.take<T>(a.rows * a.n));
    auto work = [&](const moyu::Team &team) {
        float *own = sums + team.thread * sums_size;
        clear(own, a.rows, a.q);
        bytes[team.thread] = columns_share<T>(a, kept, count, team, own);
        team.wait();
        bytes[team.thread] +=
            write_sums<T>(sums, team.threads, a.rows, a.q, a.bias, static_cast<T *>(a.out), team);
    };
    return total_of(bytes, a.threads, threads_for(count * a.q * static_cast<int64_t>(sizeof(T)), count, a.threads), work);
}

template <class T, int64_t (*block)(const LinearArgs &)>
int64_t by_blocks(const LinearArgs &all) {
    int64_t bytes = 0;
    for (int64_t row = 0; row < all.rows; row += kRowBlock) bytes += block(rows_of<T>(all, row));
    return bytes;
}

}  // namespace
