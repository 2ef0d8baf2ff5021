// y = x · Wᵀ with skipped rows of W (`rows`) or skipped columns of W (`columns`).
#pragma once

#include "pieces.h"

namespace {

template <class T>
int64_t rows_block(const LinearArgs &a) {
    const int64_t row_bytes = a.n * static_cast<int64_t>(sizeof(T));
    const int64_t bias_bytes = a.bias ? static_cast<int64_t>(sizeof(T)) : 0;

    Arena arena(4 * (a.rows * round_up(a.n) + a.q) + a.q + 8 * a.threads);
    float *x = arena.take<float>(a.rows * round_up(a.n));
    int32_t *kept = arena.take<int32_t>(a.q);
    uint8_t *any = arena.take<uint8_t>(a.q);
    int64_t *bytes = arena.take<int64_t>(a.threads);

    load_rows<T>(a.x, a.x_stride, a.rows, a.n, x);
    T *out = static_cast<T *>(a.out);
    if (a.mask)
        for (int64_t i = 0; i < a.rows * a.q; ++i) out[i] = T{};
    const int64_t count = list_kept(a.mask, a.mask_stride, a.rows, a.q, any, kept);
    const int64_t threads = threads_for(count * row_bytes, count, a.threads);
    const int64_t hop = Taken::hop(row_bytes);

    auto work = [&](int64_t thread) {
        const int64_t begin = count * thread / threads, end = count * (thread + 1) / threads;
        int which[kTogether];
        float value[kTogether];
        int64_t read = 0;
        for (int64_t step = 0; step < Taken::steps(begin, end); ++step) {
            const Taken taken(kept, begin, end, step, hop);
            for (int64_t r = 0; r < a.rows; ++r) {
                const bool all = a.mask == nullptr || a.rows == 1;
                const int own = taken.kept_by(all ? nullptr : a.mask + r * a.mask_stride, which);
                const Weights<T> w(taken, which, own, a.weight, a.weight_stride, a.weight, a.weight_stride, true);
                project(w, x, r, a.n, value);
                for (int i = 0; i < own; ++i) {
                    const int64_t j = taken.piece[which[i]];
                    narrow(value[i] + bias_at<T>(a.bias, j), out[r * a.q + j]);
                }
            }
            read += taken.count * (row_bytes + bias_bytes);
        }
        bytes[thread] = read;
    };
    run_parallel(threads, work);

    int64_t total = 0;
    for (int64_t t = 0; t < threads; ++t) total += bytes[t];
    return total;
}

template <class T>
int64_t columns_block(const LinearArgs &a) {
    const int64_t column_bytes = a.q * static_cast<int64_t>(sizeof(T));
    const int64_t sums_size = a.rows * round_up(a.q);

    Arena arena(4 * (a.threads * sums_size + a.n) + a.n + 8 * a.threads);
    float *sums = arena.take<float>(a.threads * sums_size);
    int32_t *kept = arena.take<int32_t>(a.n);
    uint8_t *any = arena.take<uint8_t>(a.n);
    int64_t *bytes = arena.take<int64_t>(a.threads);

    const int64_t count = list_kept(a.mask, a.mask_stride, a.rows, a.n, any, kept);
    const int64_t threads = threads_for(count * column_bytes, count, a.threads);
    const int64_t hop = Taken::hop(column_bytes);

    auto work = [&](int64_t thread) {
        const int64_t begin = count * thread / threads, end = count * (thread + 1) / threads;
        float *y = sums + thread * sums_size;
        for (int64_t i = 0; i < sums_size; ++i) y[i] = 0.0f;
        int which[kTogether];
        float value[kTogether];
        int64_t read = 0;
        for (int64_t step = 0; step < Taken::steps(begin, end); ++step) {
            const Taken taken(kept, begin, end, step, hop);
            for (int64_t r = 0; r < a.rows; ++r) {
                const int own = taken.kept_by(a.rows == 1 ? nullptr : a.mask + r * a.mask_stride, which);
                for (int i = 0; i < own; ++i) value[i] = widen(*at<T>(a.x, r * a.x_stride + taken.piece[which[i]]));
                const Weights<T> w(taken, which, own, a.weight, a.weight_stride, a.weight, a.weight_stride, true);
                accumulate(w, value, y, r, a.q);
            }
            read += taken.count * column_bytes;
        }
        bytes[thread] = read;
    };
    run_parallel(threads, work);

    int64_t total = write_sums<T>(sums, threads, a.rows, a.q, a.bias, static_cast<T *>(a.out));
    for (int64_t t = 0; t < threads; ++t) total += bytes[t];
    return total;
}

template <class T, int64_t (*block)(const LinearArgs &)>
int64_t by_blocks(const LinearArgs &all) {
    int64_t bytes = 0;
    for (int64_t row = 0; row < all.rows; row += kRowBlock) {
        LinearArgs a = all;
        a.rows = all.rows - row < kRowBlock ? all.rows - row : kRowBlock;
        a.x = at<T>(all.x, row * all.x_stride);
        if (all.mask) a.mask = all.mask + row * all.mask_stride;
        a.out = static_cast<T *>(all.out) + row * all.q;
        bytes += block(a);
    }
    return bytes;
}

}  // namespace
