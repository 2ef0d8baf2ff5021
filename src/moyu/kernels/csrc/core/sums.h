// Each thread's sums of columns, and how they become the output.
#pragma once

#include "core/pieces.h"

namespace {

inline void clear(float *sums, int64_t rows, int64_t n) {
    for (int64_t i = 0; i < rows * round_up(n); ++i) sums[i] = 0.0f;
}

// sums += more, both (rows, padded n): `more` in its order, `sums` as Vec::load2 took the weights (see write_sums).
template <class T>
void add_sums(const float *more, int64_t rows, int64_t n, float *sums) {
    constexpr int W = Vec::width;
    for (int64_t i = 0; i < rows * round_up(n); i += 2 * W)
        for (int k = 0; k < 2 * W; ++k) sums[i + (Vec::split<T> ? k % 2 * W + k / 2 : k)] += more[i + k];
}

// out (rows, n) = sum over threads of sums (threads, rows, padded n) + bias, always in the order of the threads, for the
// elements that are this thread's; returns their bytes of bias. The sums lie as Vec::load2 took the weights: where it
// splits, the even elements, then the odd ones; in their order where `split` is false.
template <class T, bool split = Vec::split<T>>
int64_t write_sums(const float *sums, int64_t threads, int64_t rows, int64_t n, const void *bias, T *out,
                   const moyu::Team &team) {
    constexpr int W = Vec::width;
    const int64_t padded = round_up(n);
    const Share blocks((n + 2 * W - 1) / (2 * W), team);
    const int64_t begin = blocks.begin * 2 * W, end = blocks.end * 2 * W < n ? blocks.end * 2 * W : n;
    for (int64_t row = 0; row < rows; ++row, out += n)
        for (int64_t i = begin; i < end; i += 2 * W) {
            const float *from = sums + row * padded + i;
            auto a = Vec::load(from), b = Vec::load(from + W);
            for (int64_t t = 1; t < threads; ++t) {
                a = Vec::add(a, Vec::load(from + t * rows * padded));
                b = Vec::add(b, Vec::load(from + t * rows * padded + W));
            }
            float total[2 * W];
            Vec::store(total, a);
            Vec::store(total + W, b);
            const int count = n - i < 2 * W ? static_cast<int>(n - i) : 2 * W;
            for (int k = 0; k < count; ++k) {
                const float sum = split ? total[k % 2 * W + k / 2] : total[k];
                narrow(sum + bias_at<T>(bias, i + k), out[i + k]);
            }
        }
    return bias && end > begin ? (end - begin) * static_cast<int64_t>(sizeof(T)) : 0;
}

}  // namespace
