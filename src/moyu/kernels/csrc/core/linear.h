// y = x · Wᵀ with skipped rows of W (`rows`) or skipped columns of W (`columns`), for plain weights. The `_share` functions
// are one thread's part; the operators (table.h) and the decode step (decode.h) are made of them.
#pragma once

#include "core/products.h"
#include "core/sums.h"

namespace {

// out (rows, outputs), the kept rows of W that are this thread's; x as load_rows leaves it. Returns the bytes read.
template <class T>
int64_t rows_share(const LinearArgs &a, const Factor<T> *x, const int32_t *kept, int64_t count, const moyu::Team &team) {
    const int64_t n = a.weight.inputs, q = a.weight.outputs;
    const int64_t row_bytes = bytes_of<T>(n), bias_bytes = a.bias ? bytes_of<T>(1) : 0;
    const int64_t hop = Taken::hop(row_bytes);
    const int streams = together(row_bytes, a.mask && a.rows > kFewRows);
    const Share share(count, team);
    T *out = static_cast<T *>(a.out);
    float value[kMostRows][kTogether];
    int64_t read = 0;
    for (int64_t step = 0; step < Taken::steps(share, streams); ++step) {
        const Taken taken(kept, share, streams, step, hop);
        const Takers takers(taken, a.mask, a.mask_stride, a.rows);
        auto weights = [&](int64_t r) {
            return Pieces<T>(taken, takers.which[r], takers.own[r], a.weight, a.weight, taken.next);
        };
        project<T>(takers, weights, x, a.rows, n, value);
        for (int64_t r = 0; r < a.rows; ++r)
            for (int i = 0; i < takers.own[r]; ++i) {
                const int64_t j = taken.piece[takers.which[r][i]];
                if (takers.keeps(a.mask, a.mask_stride, r, j)) narrow(value[r][i] + bias_at<T>(a.bias, j), out[r * q + j]);
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
    const int64_t n = a.weight.inputs;
    int64_t kept = 0;
    for (int64_t r = 0; r < a.rows; ++r) {
        const uint8_t *mask = a.mask + r * a.mask_stride;
        int32_t own = 0;
        for (int64_t i = 0; i < n; ++i) own += mask[i] != 0;
        kept += own;
    }
    if (100 * kept < kSharedColumnsPercent * a.rows * count) return;
    for (int64_t r = 0; r < a.rows; ++r) {
        const T *x = at<T>(a.x, r * a.x_stride);
        const uint8_t *mask = a.mask + r * a.mask_stride;
        for (int64_t i = 0; i < n; ++i) zeroed[r * n + i] = or_zero(mask[i] != 0, x[i]);
    }
    a.x = zeroed, a.x_stride = n, a.mask = nullptr;
}

// sums (rows, padded outputs) += the kept columns of W that are this thread's, times their x. Returns the bytes read.
template <class T>
int64_t columns_share(const LinearArgs &a, const int32_t *kept, int64_t count, const moyu::Team &team, float *sums) {
    const int64_t column_bytes = bytes_of<T>(a.weight.outputs);
    const int64_t hop = Taken::hop(column_bytes);
    const int streams = together(column_bytes, a.mask && a.rows > kFewRows);
    const Share share(count, team);
    float value[kMostRows][kTogether];
    int64_t read = 0;
    for (int64_t step = 0; step < Taken::steps(share, streams); ++step) {
        const Taken taken(kept, share, streams, step, hop);
        const Takers takers(taken, a.mask, a.mask_stride, a.rows);
        auto weights = [&](int64_t r) {
            return Pieces<T>(taken, takers.which[r], takers.own[r], a.weight, a.weight, taken.next);
        };
        for (int64_t r = 0; r < a.rows; ++r)
            for (int i = 0; i < takers.own[r]; ++i) {
                const int64_t j = taken.piece[takers.which[r][i]];
                value[r][i] = takers.keeps(a.mask, a.mask_stride, r, j) ? widen(*at<T>(a.x, r * a.x_stride + j)) : 0.0f;
            }
        accumulate<T>(takers, weights, value, sums, a.rows, a.weight.outputs);
        read += taken.count * column_bytes;
    }
    return read;
}

template <class T>
int64_t plain_rows(const LinearArgs &a) {
    const int64_t n = a.weight.inputs, q = a.weight.outputs;
    Factor<T> *x;
    int32_t *kept;
    uint8_t *any;
    int64_t *bytes;
    in_scratch([&](Arena &arena) {
        x = arena.take<Factor<T>>(a.rows * round_up(n));
        kept = arena.take<int32_t>(q);
        any = arena.take<uint8_t>(q);
        bytes = arena.take<int64_t>(a.threads);
    });
    load_rows<T>(a.x, a.x_stride, a.rows, n, x);
    clear_skipped<T>(a);
    const int64_t count = list_kept(a.mask, a.mask_stride, a.rows, q, any, kept);
    auto work = [&](const moyu::Team &team) { bytes[team.thread] = rows_share<T>(a, x, kept, count, team); };
    return total_of(bytes, a.threads, threads_for(count * bytes_of<T>(n), count, a.threads), work);
}

template <class T>
int64_t plain_columns(const LinearArgs &args) {
    LinearArgs a = args;
    const int64_t n = a.weight.inputs, q = a.weight.outputs, sums_size = a.rows * round_up(q);
    float *sums;
    int32_t *kept;
    uint8_t *any;
    int64_t *bytes;
    T *zeroed;
    in_scratch([&](Arena &arena) {
        sums = arena.take<float>(a.threads * sums_size);
        kept = arena.take<int32_t>(n);
        any = arena.take<uint8_t>(n);
        bytes = arena.take<int64_t>(a.threads);
        zeroed = arena.take<T>(a.rows * n);
    });
    const int64_t count = list_kept(a.mask, a.mask_stride, a.rows, n, any, kept);
    take_together<T>(a, count, zeroed);
    auto work = [&](const moyu::Team &team) {
        float *own = sums + team.thread * sums_size;
        clear(own, a.rows, q);
        bytes[team.thread] = columns_share<T>(a, kept, count, team, own);
        team.wait();
        bytes[team.thread] += write_sums<T>(sums, team.threads, a.rows, q, a.bias, static_cast<T *>(a.out), team);
    };
    return total_of(bytes, a.threads, threads_for(count * bytes_of<T>(q), count, a.threads), work);
}

}  // namespace
