// Integer products of blocks in plain loops; blocks_avx2.h and blocks_vector.h say what each computes.
#pragma once

#include "blocks_rest.h"

namespace {

constexpr int kBeside = 2;

// 32 values as 8 bits and a scale, half to even; returns the sum of the integers. What is not finite gives no number.
// Sizes are compared as integers, and the addition leaves the integer in the low byte: loops that become vector code.
inline int32_t quantise_block(const float *x, int8_t *q, float *scale) {
    int32_t most = 0, sum = 0;
    for (int i = 0; i < kBlock; ++i) {
        const int32_t size = static_cast<int32_t>(to_bits(x[i]) & 0x7fffffffu);
        most = size > most ? size : most;
    }
    const float widest = from_bits(static_cast<uint32_t>(most)), inverse = most != 0 ? 127.0f / widest : 0.0f;
    *scale = widest / 127.0f;
    int32_t whole[kBlock];
    for (int i = 0; i < kBlock; ++i) whole[i] = static_cast<int32_t>(to_bits(x[i] * inverse + 12582912.0f) - 0x4b400000u);
    for (int i = 0; i < kBlock; ++i) sum += whole[i];
    for (int i = 0; i < kBlock; ++i) q[i] = static_cast<int8_t>(whole[i]);
    return sum;
}

template <int C, bool>
inline void dot_q8(const uint8_t *const *w, const uint8_t *const *scales, const uint8_t *const *, const int8_t *x,
                   const float *x_scale, const float *, int64_t blocks, float *out) {
    for (int c = 0; c < C; ++c) {
        out[c] = 0.0f;
        for (int64_t b = 0; b < blocks; ++b) {
            int32_t total = 0;
            for (int i = 0; i < 32; ++i) total += static_cast<int8_t>(w[c][32 * b + i]) * x[32 * b + i];
            out[c] += static_cast<float>(total) * (half_at(scales[c], b) * x_scale[b]);
        }
    }
}

template <int C, bool>
inline void dot_q4(const uint8_t *const *w, const uint8_t *const *scales, const uint8_t *const *, const int8_t *x,
                   const float *x_scale, const float *, int64_t blocks, float *out) {
    for (int c = 0; c < C; ++c) {
        out[c] = 0.0f;
        for (int64_t b = 0; b < blocks; ++b) {
            const int8_t *own = x + b / 2 * 64 + b % 2 * 16;
            const uint8_t *codes = w[c] + 16 * b;
            int32_t total = 0;
            for (int i = 0; i < 16; ++i) total += ((codes[i] & 15) - 8) * own[i] + ((codes[i] >> 4) - 8) * own[32 + i];
            out[c] += static_cast<float>(total) * (half_at(scales[c], b) * x_scale[b]);
        }
    }
}

struct SumsQ8 { static constexpr auto at = at_q8; };
struct SumsQ4 { static constexpr auto at = at_q4; };

template <class Sums>
inline void sum_columns(const uint8_t *const *column, int count, const int8_t *v, float scale, const uint8_t *scales, float *y,
                        int64_t q, const uint8_t *const *, int) {
    sum_rest(column, count, v, scale, scales, y, 0, q, Sums::at);
}

}  // namespace
